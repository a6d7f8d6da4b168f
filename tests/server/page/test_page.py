"""The page against the embedded model's server."""

import json

import httpx2
import pytest
from playwright.sync_api import expect

from ernie_jax.server.access import Access
from ernie_jax.server.keys import Keys
from tests.server.conftest import NAME, running


def set_fields(page, **fields):
    page.get_by_role("button", name="Settings", exact=True).click()
    for name, value in fields.items():
        page.locator(f"#{name}").fill(str(value))
    page.get_by_role("button", name="Close settings").click()


def send(page, text) -> dict:
    """Send a message; return the request that it becomes."""
    page.get_by_label("Message").fill(text)
    with page.expect_request("**/v1/chat/completions") as caught:
        page.keyboard.press("Enter")
    return caught.value.post_data_json


def test_files_and_their_policy(server):
    http = httpx2.Client(base_url=server.url, timeout=120)
    index = http.get("/")
    assert index.status_code == 200 and index.headers["content-type"].startswith("text/html")
    for path in ("/", "/page/main.js", "/page/style.css", "/page/controls.css", "/page/icon.svg"):
        response = http.get(path)
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "script-src 'self'" in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        again = http.get(path, headers={"if-none-match": response.headers["etag"]})
        assert again.status_code == 304 and again.headers["content-security-policy"] == policy
    assert http.get("/page/main.js").headers["content-type"].startswith("text/javascript")
    assert http.get("/page/nothing.js").json()["error"]["code"] == "unknown_url"
    assert http.get("/page/..%2fkeys.py").status_code == 404
    assert http.post("/").status_code == http.post("/page/main.js").status_code == 405
    outside = [line for line in index.text.splitlines() if "http" in line or "//" in line]
    assert not outside


def test_conversation(server, page, client):
    page.goto(server.url)
    expect(page).to_have_title(f"{NAME} · Chat")
    expect(page.locator("#context")).to_have_text("4,096 tokens of context")
    set_fields(page, system="You read old books.", temperature=0, max_completion_tokens=24)
    asked = send(page, "In the beginning")
    assert asked["messages"] == [
        {"role": "system", "content": "You read old books."},
        {"role": "user", "content": "In the beginning"},
    ]
    assert (asked["temperature"], asked["max_completion_tokens"], asked["stream"]) == (0, 24, True)
    expect(page.locator(".usage")).to_contain_text("24 out")
    fields = {name: asked[name] for name in ("model", "messages", "temperature", "max_completion_tokens")}
    expected = client.chat.completions.create(**fields).choices[0].message.content
    assert " ".join(page.locator(".answer .markdown").inner_text().split()) == " ".join(expected.split())

    asked = send(page, "And then?")
    assert [message["role"] for message in asked["messages"]] == ["system", "user", "assistant", "user"]
    assert asked["messages"][2]["content"] == expected
    expect(page.locator(".usage")).to_have_count(2)
    assert "(0 cached)" not in page.locator(".usage").last.inner_text()
    with page.expect_request("**/v1/chat/completions") as caught:
        page.get_by_role("button", name="Regenerate").click()
    assert caught.value.post_data_json == asked
    expect(page.locator(".usage")).to_have_count(2)

    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".answer")).to_have_count(0)
    assert len(send(page, "In the beginning")["messages"]) == 2
    expect(page.locator(".usage")).to_have_count(1)


def test_experts(server, page, client):
    page.goto(server.url)
    set_fields(page, temperature=0, max_completion_tokens=12)
    asked = send(page, "In the beginning")
    assert asked["include_routing"] is True
    page.get_by_text("Experts of 12 tokens").click()
    facts = page.locator(".facts")
    expect(facts).to_contain_text("Rows are 5 layers, columns 8 experts; each token takes 2 in each layer.")
    fields = {name: asked[name] for name in ("model", "messages", "temperature", "max_completion_tokens")}
    answer = client.chat.completions.create(**fields, extra_body={"include_routing": True})
    chosen = [layers[2] for layers in answer.choices[0].routing["experts"]]
    page.locator("canvas").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowDown"):
        page.keyboard.press(key)
    for expert in range(8):
        count = sum(expert in experts for experts in chosen)
        expect(page.locator(".cell")).to_contain_text(f"Layer 3, expert {expert}: {count} of 12 tokens")
        page.keyboard.press("ArrowRight")


@pytest.mark.parametrize("way", ["button", "key"])
def test_stopping_frees_the_sequence(server, page, way):
    def lengthen(route):
        route.continue_(post_data=json.dumps(route.request.post_data_json | {"ignore_eos": True}))

    page.route("**/v1/chat/completions", lengthen)
    page.goto(server.url)
    set_fields(page, max_completion_tokens=3000)
    send(page, "In the beginning")
    expect(page.locator(".answer .markdown")).not_to_be_empty()
    assert server.runner.open == 1
    if way == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    expect(page.locator(".note")).to_have_text("Stopped.")
    text = page.locator(".answer .markdown").inner_text()
    for _ in range(600):
        if server.runner.open == 0:
            break
        page.wait_for_timeout(50)
    assert server.runner.open == 0
    assert page.locator(".answer .markdown").inner_text() == text
    assert send(page, "Go on")["messages"][1]["role"] == "assistant"
    page.keyboard.press("Escape")


def test_a_forced_tool_call_and_its_result(server, page):
    page.goto(server.url)
    page.get_by_role("button", name="Settings", exact=True).click()
    parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "pick", "parameters": parameters}}]
    page.locator("#tools").fill(json.dumps(tools))
    page.locator("#tool_choice").select_option("required")
    page.get_by_role("button", name="Close settings").click()
    send(page, "Pick one")
    expect(page.get_by_label("Call of pick").locator("pre").first).to_have_text("{}")
    expect(page.get_by_role("button", name="Send results")).to_be_visible()  # the answer is over
    page.get_by_role("button", name="Settings", exact=True).click()
    page.locator("#tool_choice").select_option("none")
    page.locator("#max_completion_tokens").fill("4")
    fields = page.get_by_label("Result of pick").all()
    for index, field in enumerate(fields):
        field.fill(f"number {index}")
    with page.expect_request("**/v1/chat/completions") as caught:
        page.get_by_role("button", name="Send results").click()
    _, called, *results = caught.value.post_data_json["messages"]
    assert len(called["tool_calls"]) == len(results) == len(fields)
    for index, (made, result) in enumerate(zip(called["tool_calls"], results, strict=True)):
        assert made["function"] == {"name": "pick", "arguments": "{}"}
        assert result == {"role": "tool", "tool_call_id": made["id"], "content": f"number {index}"}
    expect(page.locator(".usage")).to_have_count(2)


def test_a_server_with_keys(llm, page):
    keys = Keys()
    keys.add("alice sk-alice-0123456789", "a test")
    with running(llm, access=Access(keys)) as server:
        page.goto(server.url)
        expect(page.locator("#notice")).to_contain_text("You didn't provide an API key")
        page.get_by_role("button", name="Enter a key").click()
        page.get_by_label("API key").fill("sk-alice-0123456789")
        page.get_by_label("API key").press("Tab")
        expect(page.locator("#notice")).to_be_empty()
        page.get_by_label("Max tokens").fill("4")
        send(page, "In the beginning")
        expect(page.locator(".usage")).to_contain_text("4 out")
        assert page.evaluate("localStorage.length") == 0 and not page.context.cookies()
        assert "sk-alice-0123456789" in page.evaluate("JSON.stringify(sessionStorage)")
        other = page.context.new_page()
        other.goto(server.url)
        expect(other.locator("#notice")).to_contain_text("API key")
