"""Conversations as examples: what the model is shown is what the server shows it, and only answers are learnt."""

import itertools
import pathlib

import pytest

from ernie_jax.text import ChatTemplate, Tokenizer
from ernie_jax.train.conversations import Example, render_examples

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who spake?"},
    {"role": "assistant", "reasoning_content": "They ask who.", "content": "The LORD spake."},
    {"role": "user", "content": "To whom?"},
    {"role": "assistant", "reasoning_content": "They ask to whom.", "content": "Unto Moses."},
]
CALL = {"type": "function", "function": {"name": "get", "arguments": {"city": "Ur"}}}
TOOLS = [{"type": "function", "function": {"name": "get", "parameters": {}}}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(pathlib.Path(__file__).parents[2] / "models" / "ernie-embedded")


def render(family, tokenizer, messages, tools=None) -> list[Example]:
    template = ChatTemplate.of_family(family, tokenizer.special_tokens)
    return render_examples(messages, tools, template, tokenizer)


def parts(example, tokenizer) -> list[tuple[str, bool]]:
    """Split an example's text where learning begins and ends."""
    groups = itertools.groupby(zip(*example, strict=True), key=lambda pair: pair[1])
    return [(tokenizer.decode([t for t, _ in group], skip_special=False), learnt) for learnt, group in groups]


def test_a_base_conversation_is_one_example(tokenizer):
    (example,) = render("base", tokenizer, MESSAGES)
    assert parts(example, tokenizer) == [
        ("<|begin_of_sentence|>Be brief.\nUser: Who spake?\nAssistant: ", False),
        ("The LORD spake.<|end_of_sentence|>", True),
        ("User: To whom?\nAssistant: ", False),
        ("Unto Moses.</s>", True),
    ]


def test_every_answer_of_a_thinking_conversation_is_an_example(tokenizer):
    template = ChatTemplate.of_family("thinking", tokenizer.special_tokens)
    examples = render("thinking", tokenizer, MESSAGES)
    for example, asked in zip(examples, (2, 4), strict=True):
        prompt, answer, end = parts(example, tokenizer)
        assert prompt == (template.render(MESSAGES[:asked]), False)
        message = MESSAGES[asked]
        text = f"{message['reasoning_content']}\n</think>\n\n<response>\n{message['content']}\n</response>\n<|im_end|>"
        assert answer == (text, True) and end == ("</s>", False)
        ids = tokenizer.encode(prompt[0])
        assert example.tokens[: len(ids)] == ids  # as the server asks


def test_tool_calls_are_learnt_and_what_tools_say_is_not(tokenizer):
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "reasoning_content": "I ask.", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "dry"},
        {"role": "assistant", "reasoning_content": "It is dry.", "content": "Dry."},
    ]
    first, second = (parts(example, tokenizer) for example in render("thinking", tokenizer, messages, TOOLS))
    call = '\n\n<tool_call>\n{"name": "get", "arguments": {"city": "Ur"}}\n</tool_call>\n<|im_end|>'
    assert first[1] == (f"I ask.\n</think>\n{call}", True)
    assert '<tool_output>"dry"</tool_output>' in second[0][0] and "I ask." in second[0][0]
    assert second[1][0].startswith("It is dry.\n</think>")


def test_no_answer_no_example(tokenizer):
    assert render("base", tokenizer, MESSAGES[:2]) == []
