"""The page on small screens and in the dark, by keyboard and for screen readers."""

import itertools

import pytest
from playwright.sync_api import expect

from tests.server.page.scripted import call, delta, end, says

ROUTING = {"layers": [1, 2], "num_experts": 64, "experts": [[[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 63]]]}
RICH = [
    delta(reasoning_content="Let me think."),
    delta(content="A long word: " + "x" * 300 + "\n\n```\n" + "y" * 300 + "\n```\n\n| no | table |\n"),
    delta(tool_calls=[call(0, '{"a": "' + "z" * 300 + '"}', id="call_a", name="f" * 64)], routing=ROUTING),
    *end("tool_calls"),
]
# Relative luminance and contrast as WCAG 2 has them.
CONTRAST = """([front, back]) => {
    const style = getComputedStyle(document.documentElement);
    const light = (name) => [1, 3, 5]
        .map((at) => parseInt(style.getPropertyValue(name).trim().slice(at, at + 2), 16) / 255)
        .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
        .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0);
    const [high, low] = [light(front), light(back)].sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05);
}"""


def begin(page, scripted, *answers):
    scripted.answers[:] = answers
    page.goto(scripted.url)
    expect(page).not_to_have_title("Chat")


@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_nothing_is_wider_than_the_screen(page, scripted, width):
    page.set_viewport_size({"width": width, "height": 740})
    begin(page, scripted, RICH)
    page.get_by_label("Message").fill("What? " + "w" * 300)
    page.get_by_role("button", name="Send").click()
    page.get_by_text("Experts of 1 token").click()
    page.locator(".thoughts summary").click()
    expect(page.locator("canvas")).to_be_visible()
    for _ in range(2):
        for part in ("document.documentElement", "scroller", "document.querySelector('.frame')"):
            assert page.evaluate(f"{part}.scrollWidth <= {part}.clientWidth"), part
        page.get_by_role("button", name="Settings", exact=True).click()
        assert page.evaluate("settings.scrollWidth <= settings.clientWidth")
        if width < 1100:
            page.keyboard.press("Escape")
            expect(page.locator("#settings")).to_be_hidden()
            break
    page.get_by_label("Message").fill("\n" * 30)
    box = page.get_by_label("Message").bounding_box()
    assert box["height"] <= 0.4 * 740 + 1 and box["y"] + box["height"] <= 740


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(page, scripted, scheme):
    page.emulate_media(color_scheme=scheme)
    begin(page, scripted)
    grounds = ("--ground", "--surface", "--raised")
    pairs = dict.fromkeys(itertools.product(("--text", "--muted"), grounds), 4.5)
    pairs |= {("--danger", "--danger-ground"): 4.5, ("--danger", "--ground"): 4.5, ("--accent-ink", "--accent"): 4.5}
    pairs |= dict.fromkeys(itertools.product(("--edge", "--accent"), ("--ground", "--surface")), 3)
    found = {pair: page.evaluate(CONTRAST, list(pair)) for pair in pairs}
    assert not {pair: ratio for pair, ratio in found.items() if ratio < pairs[pair]}
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == scheme


def test_everything_has_a_name(page, scripted):
    begin(page, scripted, RICH)
    page.get_by_label("Message").fill("Hello")
    page.keyboard.press("Enter")
    page.get_by_text("Experts of 1 token").click()
    page.get_by_role("button", name="Settings", exact=True).click()
    nameless = """[...document.querySelectorAll("button, input, select, textarea, canvas")]
        .filter((e) => !e.ariaLabel && !e.labels?.length && !e.textContent.trim()).map((e) => e.outerHTML)"""
    assert page.evaluate(nameless) == []
    answer = page.locator(".answer")
    expect(answer).to_have_attribute("aria-live", "polite")
    expect(answer).to_have_attribute("aria-busy", "false")


def test_settings_beside_and_over(page, scripted):
    begin(page, scripted, says("Well."))
    button, panel = page.get_by_role("button", name="Settings", exact=True), page.locator("#settings")
    button.click()
    expect(button).to_have_attribute("aria-expanded", "true")
    assert not page.evaluate("settings.matches(':modal')")
    page.set_viewport_size({"width": 390, "height": 844})
    expect(panel).to_be_visible()
    expect(page.locator("dialog:modal")).to_have_count(1)
    expect(button).to_have_attribute("aria-expanded", "true")
    page.get_by_label("Seed").fill("3")
    page.keyboard.press("Escape")
    expect(panel).to_be_hidden()
    expect(button).to_have_attribute("aria-expanded", "false")
    page.get_by_label("Message").fill("Hello")
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".markdown")).to_have_text("Well.")
    assert scripted.requests[0]["seed"] == 3
