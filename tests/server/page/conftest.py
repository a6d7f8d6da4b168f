"""Headless Chromium: one for a module, a profile for each test."""

import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, expect, sync_playwright

from tests.server.page.scripted import Scripted, playing

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        reason = f"no browser to look at the page with; install one of {', '.join(BROWSERS)}"
        (pytest.fail if os.environ.get("ERNIE_REQUIRE_BROWSER") else pytest.skip)(reason)
    expect.set_options(timeout=30_000)  # a busy machine is slow
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=path) as browser:
        yield browser


@pytest.fixture
def complaints() -> list[str]:
    """What the pages complain of on the console, such as anything against the content policy."""
    return []


@pytest.fixture
def context(browser, complaints) -> Iterator[BrowserContext]:
    """Fail the test if there are complaints."""

    def note(message: ConsoleMessage) -> None:
        # The browser itself notes every response that is an error.
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            complaints.append(message.text)

    with browser.new_context(viewport={"width": 1280, "height": 800}) as context:
        context.on("console", note)
        context.on("weberror", lambda error: complaints.append(str(error.error)))
        context.set_default_timeout(30_000)
        yield context
    assert complaints == []


@pytest.fixture
def page(context) -> Page:
    return context.new_page()


@pytest.fixture(scope="module")
def _playing() -> Iterator[Scripted]:
    with playing() as scripted:
        yield scripted


@pytest.fixture
def scripted(_playing) -> Scripted:
    return _playing.begin()
