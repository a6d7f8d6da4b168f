"""What the page makes of streams that the embedded model can't write: reasoning, calls, experts, errors, long ones."""

import itertools
import re

import pytest
from playwright.sync_api import expect

from ernie_jax.server.protocol import ApiError
from tests.server.page.scripted import CARD, call, delta, end, says

LAYERS, EXPERTS = [1, 2, 3], 64
WEATHER = [call(0, "", id="call_a", name="get_weather"), call(0, '{"city": "Bei'), call(0, 'jing", "days": [1, 2]}')]
TIME = [call(1, "{}", id="call_b", name="get_time")]
NASTY = "<img src=x onerror=alert(1)><script>alert(2)</script>"


def begin(page, scripted, *answers):
    scripted.answers[:] = answers
    page.goto(scripted.url)
    expect(page).to_have_title("ernie-scripted · Chat")


def send(page, text="Hello"):
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def calling(*pieces):
    return [*(delta(tool_calls=[piece]) for piece in pieces), *end("tool_calls")]


def routing(*tokens):
    return {"layers": LAYERS, "num_experts": EXPERTS, "experts": list(tokens)}


def test_reasoning_is_folded_timed_and_sent_back(page, scripted):
    thinks = [delta(reasoning_content="Let me "), 1.2, delta(reasoning_content="**think**."), delta(content="Done.")]
    begin(page, scripted, [thinks[0], None], [*thinks, *end()], says("Yes."))
    send(page)
    summary = page.locator(".thoughts summary")
    expect(summary).to_have_text(re.compile(r"^Thinking for \d+\ss$"))
    page.keyboard.press("Escape")
    expect(summary).to_have_text(re.compile(r"^Thought for [\d.]+\ss$"))
    page.get_by_role("button", name="Regenerate").click()
    expect(summary).to_have_text(re.compile(r"^Thought for [\d.]+\ss$"))
    assert float(summary.inner_text().split()[2]) >= 1.2
    thoughts = page.locator(".thoughts .markdown")
    expect(thoughts).to_be_hidden()
    summary.click()
    expect(thoughts).to_have_text("Let me think.")
    expect(page.locator(".answer > .markdown")).to_have_text("Done.")
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")
    send(page, "Sure?")
    expect(page.locator(".usage")).to_have_count(2)
    assert scripted.requests[2]["messages"][1] == {
        "role": "assistant", "content": "Done.", "reasoning_content": "Let me **think**.",
    }  # fmt: skip


@pytest.mark.parametrize("edited", [False, True])
def test_a_message_waits_for_the_model(page, scripted, edited):
    """Sent before the server has said which model there is, it goes out as soon as it has; not while it is edited."""
    scripted.answers.append(says("Well."))
    held = []
    page.route("**/v1/models", lambda route: held.append(route))
    page.goto(scripted.url)
    send(page)
    button, message = page.get_by_role("button", name="Send", exact=True), page.get_by_label("Message")
    expect(button).to_be_disabled()
    expect(page.locator(".answer")).to_have_count(0)
    if edited:
        message.fill("Hello, wo")
    while not held:
        page.wait_for_timeout(20)
    held[0].continue_()
    if edited:
        expect(button).to_be_enabled()
        expect(message).to_have_value("Hello, wo")
        assert not scripted.requests
    else:
        expect(page.locator(".answer .markdown")).to_have_text("Well.")
        expect(message).to_have_value("")


def test_usage_and_lengths(page, scripted):
    begin(page, scripted, [delta(content="One "), 0.2, delta(content="two"), *end("length")], [*end()])
    send(page)
    usage = page.locator(".usage")
    expect(usage).to_contain_text("1,234 tokens in (1,024 cached) · 30 out · ")
    expect(usage).to_contain_text("tok/s · first after ")
    expect(page.locator(".note")).to_have_text("The answer was cut off: it reached the most tokens that it may have.")
    send(page)
    expect(page.locator(".note").last).to_have_text("The answer is empty.")


def test_tool_calls(page, scripted):
    begin(page, scripted, [delta(content="I look."), *calling(*WEATHER, *TIME)], says("Sunny."))
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_role("button", name="Insert an example").click()
    page.get_by_role("button", name="Close settings").click()
    send(page, "Weather?")
    weather = page.get_by_label("Call of get_weather")
    expect(weather.locator("pre")).to_have_text('{ "city": "Beijing", "days": [ 1, 2 ] }')
    assert weather.locator("pre").inner_text().startswith('{\n  "city": "Beijing",\n')
    expect(page.get_by_label("Result of get_weather")).to_be_focused()
    expect(page.get_by_label("Message")).to_have_attribute("placeholder", "First give the results of the calls")
    send(page, "Well?")
    assert len(scripted.requests) == 1
    page.get_by_label("Message").fill("")
    page.get_by_label("Result of get_weather").fill("21 °C")
    page.get_by_label("Result of get_time").fill("noon")
    page.get_by_role("button", name="Send results and continue").click()
    expect(page.locator(".answer").last).to_contain_text("Sunny.")
    first, second = scripted.requests
    assert first["tools"][0]["function"]["name"] == "get_weather" and "tool_choice" not in first
    called, *results = second["messages"][1:]
    assert called["content"] == "I look." and [c["id"] for c in called["tool_calls"]] == ["call_a", "call_b"]
    assert called["tool_calls"][0]["function"]["arguments"] == '{"city": "Beijing", "days": [1, 2]}'
    assert results == [
        {"role": "tool", "tool_call_id": "call_a", "content": "21 °C"},
        {"role": "tool", "tool_call_id": "call_b", "content": "noon"},
    ]


def test_a_call_that_is_cut_off_is_shown_and_not_sent(page, scripted):
    begin(page, scripted, [*(delta(tool_calls=[piece]) for piece in WEATHER[:2]), *end("length")], says("Well."))
    send(page)
    expect(page.locator(".call")).to_contain_text("These arguments are no JSON.")
    expect(page.get_by_role("button", name="Send results and continue")).to_have_count(0)
    send(page)
    expect(page.locator(".usage")).to_have_count(2)
    assert [message["role"] for message in scripted.requests[1]["messages"]] == ["user", "user"]


def test_the_tools_are_checked(page, scripted):
    begin(page, scripted, says("Well."))
    page.get_by_role("button", name="Settings", exact=True).click()
    tools, problem = page.locator("#tools"), page.locator("#tools-problem")
    for text, words in [
        ("[{", "This is no JSON: "),
        ('{"name": "f"}', "Give an array: "),
        ('[{"type": "function"}]', 'Tool 1 needs "type": "function" and a "function" with a "name".'),
    ]:
        tools.fill(text)
        expect(problem).to_contain_text(words)
        expect(tools).to_have_attribute("aria-invalid", "true")
    send(page)
    expect(page.locator(".error")).to_contain_text("The setting “Functions, a JSON array as in OpenAI’s API”")
    expect(tools).to_be_focused()
    assert not scripted.requests
    tools.fill("")
    expect(problem).to_be_empty()
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".usage")).to_have_count(1)
    assert "tools" not in scripted.requests[0]


def test_settings(page, scripted):
    begin(page, scripted, says("Well."), says("Well."))
    page.get_by_role("button", name="Settings", exact=True).click()
    expect(page.get_by_label("Temperature")).to_have_attribute("placeholder", "0.8")
    expect(page.get_by_label("Top p")).to_have_attribute("placeholder", "0.95")
    values = {"Temperature": "0.5", "Top p": "0.9", "Max tokens": "100", "Seed": "7", "Thinking budget": "0"}
    for label, value in values.items():
        page.get_by_label(label).fill(value)
    page.get_by_label("System prompt").fill("Be brief.")
    for text, words in [("1.5", "Give a whole number."), ("0", "Give 1 or more."), ("200000", "Give 131072 or less.")]:
        page.get_by_label("Max tokens").fill(text)
        expect(page.locator("#max_completion_tokens-problem")).to_have_text(words)
    page.get_by_label("Max tokens").fill("100")
    page.get_by_label("API key").fill("schlüssel")
    expect(page.locator("#key-problem")).to_have_text("A key has only letters, digits and signs of ASCII.")
    page.get_by_label("API key").fill("")
    page.reload()
    send(page)
    expect(page.locator(".usage")).to_have_count(1)
    request = scripted.requests[0]
    sent = {"temperature": 0.5, "top_p": 0.9, "max_completion_tokens": 100, "seed": 7, "reasoning_max_tokens": 0}
    assert {name: request[name] for name in sent} == sent
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_role("button", name="Back to the defaults").click()
    send(page)
    expect(page.locator(".usage")).to_have_count(2)
    assert not sent.keys() & scripted.requests[1].keys() and scripted.requests[1]["messages"][0]["role"] == "user"


def test_experts_of_the_last_answer(page, scripted):
    tokens = [[[0, 1], [2, 3], [4, 63]], [[0, 1], [2, 5], [4, 6]], [[0, 9], [2, 7], [4, 8]]]
    first = [delta(content="a", routing=routing(*tokens[:2])), delta(routing=routing(tokens[2])), *says("b")]
    second = [delta(content="c", routing=routing(tokens[0])), delta(routing=routing()), *end()]
    begin(page, scripted, first, second)
    send(page)
    page.get_by_text("Experts of 3 tokens").click()
    expect(page.locator(".facts")).to_have_text(
        "Rows are 3 layers, columns 64 experts; each token takes 2 in each layer. 181 of 192 were never chosen."
    )
    canvas = page.locator("canvas")
    expect(canvas).to_have_attribute("aria-label", re.compile("The busiest: Layer 1, expert 0: 3 of 3 tokens"))
    canvas.focus()
    for key in ("ArrowRight", "ArrowDown", "ArrowRight", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    expect(page.locator(".cell")).to_have_text("Layer 2, expert 3: 1 of 3 tokens (33.3\N{NO-BREAK SPACE}%).")
    box = canvas.bounding_box()
    canvas.hover(position={"x": 31 + 4.5 * (box["width"] - 30) / 64, "y": 25})
    expect(page.locator(".cell")).to_have_text("Layer 3, expert 4: 3 of 3 tokens (100\N{NO-BREAK SPACE}%).")
    send(page)
    expect(page.get_by_text("Experts of 1 token", exact=True)).to_be_visible()
    expect(page.locator(".experts")).to_have_count(1)
    assert all(request["include_routing"] for request in scripted.requests)


def test_experts_are_asked_for_only_where_there_are_some(page, scripted):
    scripted.card = CARD | {"num_experts": 0}
    begin(page, scripted, says("a"), says("b"))
    send(page)
    expect(page.locator(".usage")).to_have_count(1)
    scripted.card = CARD
    page.reload()
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_label("Show which experts").uncheck()
    send(page)
    expect(page.locator(".usage")).to_have_count(1)
    assert not any("include_routing" in request for request in scripted.requests)


def test_an_error_and_another_try(page, scripted):
    words = "Invalid value: temperature is 9."
    begin(page, scripted, ApiError(words, "temperature", "invalid_value"), says("Well."))
    send(page)
    expect(page.get_by_role("alert").filter(has_text=words)).to_be_visible()
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".markdown")).to_have_text("Well.")
    expect(page.locator(".error")).to_have_count(0)
    assert scripted.requests[0] == scripted.requests[1]


@pytest.mark.parametrize(
    "rest, words",
    [
        ([{"error": {"message": "A step failed; try again.", "code": None}}], "A step failed; try again."),
        ([], "The connection broke off before the answer was complete."),
    ],
)
def test_an_error_within_a_stream_keeps_what_came(page, scripted, rest, words):
    begin(page, scripted, [delta(content="Half an ans"), *rest], says("Whole."))
    send(page)
    expect(page.locator(".error p")).to_have_text(words)
    expect(page.locator(".markdown")).to_have_text("Half an ans")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".markdown")).to_have_text("Whole.")
    assert len(scripted.requests[1]["messages"]) == 1


def test_no_server(page, scripted):
    begin(page, scripted)
    page.route("**/v1/**", lambda route: route.abort())
    send(page)
    expect(page.locator(".error p")).to_have_text("The server can’t be reached; see whether it runs, then try again.")
    page.unroute("**/v1/**")
    page.route("**/v1/**", lambda route: route.fulfill(status=502, body="<h1>Bad gateway</h1>"))
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".error p")).to_have_text("The server answered with status 502 and no explanation.")


def test_behind_a_prefix(page, scripted):
    scripted.answers[:] = [says("Well.")]
    page.goto(f"{scripted.url}/a/prefix/")
    expect(page).to_have_title("ernie-scripted · Chat")
    send(page)
    expect(page.locator(".markdown")).to_have_text("Well.")


def test_a_key_that_is_asked_for_later(page, scripted):
    begin(page, scripted, says("Well."))
    scripted.key = "sk-1"
    send(page)
    page.get_by_role("button", name="Enter a key").click()
    expect(page.get_by_label("API key")).to_be_focused()
    page.get_by_label("API key").fill("sk-1")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".markdown")).to_have_text("Well.")


def test_keys_of_the_keyboard(page, scripted):
    begin(page, scripted, [delta(content="One"), None], says("Two"))
    message = page.get_by_label("Message")
    expect(message).to_be_focused()
    page.keyboard.type("a")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("b")
    # While an input method composes, Enter chooses a word.
    message.dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    expect(message).to_have_value("a\nb")
    page.keyboard.press("Enter")
    expect(page.locator(".markdown")).to_have_text("One")
    assert scripted.requests[0]["messages"] == [{"role": "user", "content": "a\nb"}]
    page.keyboard.type("c")
    page.keyboard.press("Enter")  # not while an answer comes
    expect(message).to_have_value("c")
    page.keyboard.press("Escape")
    expect(page.locator(".note")).to_have_text("Stopped.")
    assert scripted.gone.wait(30) and len(scripted.requests) == 1
    page.keyboard.press("Enter")
    expect(page.locator(".markdown").last).to_have_text("Two")


def test_a_new_conversation_ends_the_answer(page, scripted):
    begin(page, scripted, [delta(content="One"), None], says("Two"))
    send(page)
    expect(page.locator(".markdown")).to_have_text("One")
    page.get_by_role("button", name="New conversation").click()
    assert scripted.gone.wait(30)
    expect(page.locator("#log")).to_be_empty()
    send(page)
    expect(page.locator(".markdown")).to_have_text("Two")
    assert len(scripted.requests[1]["messages"]) == 1


def test_no_text_becomes_markup(page, scripted, complaints):
    pieces = [call(0, f'{{"a": "{NASTY}"}}', id="call_a", name=NASTY)]
    text = f"**{NASTY}**\n```{NASTY}\n{NASTY}\n```\n"
    answer = [delta(reasoning_content=NASTY), delta(content=text), *calling(*pieces)]
    begin(page, scripted, answer, ApiError(NASTY))
    page.on("dialog", lambda dialog: pytest.fail("a script ran"))
    send(page, NASTY)
    page.locator(".call textarea").fill(NASTY)
    page.get_by_role("button", name="Send results and continue").click()
    expect(page.locator(".error p")).to_have_text(NASTY)
    assert page.locator("img, #log script").count() == 0
    # The policy would not let it happen either.
    assert not complaints
    assert page.evaluate("try { document.body.innerHTML = '<b>x</b>' } catch (error) { error.name }") == "TypeError"
    assert "TrustedHTML" in complaints.pop()


def test_a_long_answer_costs_no_more_per_chunk(page, scripted):
    words = ["**bold** text, ", "and `code` ", "of a long ", "line\n", "\n", "- item\n", "plain ", "1986 ", "\n\n"]
    chunks = [delta(content=text) for text in itertools.islice(itertools.cycle(words), 2000)]
    # Shown in a hundred frames or more.
    steps = [step for at in range(0, 2000, 20) for step in (*chunks[at : at + 20], 0.02)]
    begin(page, scripted, [*steps, *end()])
    page.evaluate(
        """() => {
            window.work = { nodes: 0, letters: 0, kept: null };
            const log = document.getElementById("log");
            new MutationObserver((records) => {
                for (const { type, target, addedNodes } of records) {
                    if (type === "characterData") window.work.letters++;
                    window.work.nodes += addedNodes.length;
                }
                window.work.kept ??= log.querySelector(".markdown p");
            }).observe(log, { subtree: true, childList: true, characterData: true });
        }"""
    )
    send(page)
    expect(page.locator(".usage")).to_have_count(1)
    work = page.evaluate("({ ...work, kept: work.kept === document.querySelector('.markdown p') })")
    blocks = page.evaluate("document.querySelector('.markdown').childElementCount")
    assert blocks > 400 and work["kept"]
    assert work["nodes"] < 4 * 2000 and work["letters"] < 4 * 2000


def test_reading_back_is_not_disturbed(page, scripted):
    lines = [f"Line {i}\n\n" for i in range(60)]
    begin(page, scripted, [*says(*lines)[:-3], 1.0, delta(content="The last line"), 0.3, *end()])
    send(page)
    expect(page.locator(".markdown")).to_contain_text("Line 59")
    end_in_sight = "scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60"
    assert page.evaluate(end_in_sight)
    page.locator("#scroller").hover()
    page.mouse.wheel(0, -5000)
    expect(page.get_by_role("button", name="Latest")).to_be_visible()
    expect(page.locator(".usage")).to_have_count(1)
    assert not page.evaluate(end_in_sight)
    page.get_by_role("button", name="Latest").click()
    expect(page.get_by_role("button", name="Latest")).to_be_hidden()
    assert page.evaluate(end_in_sight)
