"""Files of JSON lines: every format, what of it is learnt, what is bad in it, and what is kept for the next start."""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
from etils import epath

from ernie_jax.config import ModelConfig
from ernie_jax.errors import UserError
from ernie_jax.text import ChatTemplate, Tokenizer
from ernie_jax.train import tokenised
from ernie_jax.train.data import PreferenceData, TrainingData, load_data, survey
from ernie_jax.train.recipe import Recipe
from ernie_jax.train.sources import SourceFile

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
THINKING, BASE = ROOT / "models" / "ernie-embedded-thinking", ROOT / "models" / "ernie-embedded"
USER = {"role": "user", "content": "Who spake?"}
ANSWER = {"role": "assistant", "content": "Moses."}
CALL = {"type": "function", "function": {"name": "get", "arguments": {"city": "Ur"}}}


@pytest.fixture(autouse=True)
def kept(cache, monkeypatch):
    monkeypatch.setenv("ERNIE_JAX_CACHE", str(cache))


def recipe(path, model=THINKING, **fields) -> Recipe:
    settings = {"sequence_length": 1024, "sources": {"a": {"train": str(path)}}, **fields}
    shape = {"steps": 10, "batch_size": 2, "learning_rate": 1e-3}
    return Recipe(model=str(model), data="nowhere", output="out", **shape, **settings)


def read(path, model=THINKING, **fields) -> SourceFile:
    (found,) = survey(recipe(path, model, **fields), ModelConfig.from_file(model / "config.json"))
    return found


def write(tmp_path, *records) -> pathlib.Path:
    path = tmp_path / "data.jsonl"
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def parts(found: SourceFile, model=THINKING, side=0) -> list[list[tuple[str, bool]]]:
    """Split each example's text where learning begins and ends."""
    tokenizer, documents = Tokenizer.load(model), found.sides[side]
    result = []
    for start, length in zip(documents.starts, documents.lengths, strict=True):
        shown = slice(start, start + length)
        learnt = np.ones(length, bool) if documents.learnt is None else documents.learnt[shown]
        groups = itertools.groupby(zip(documents.tokens[shown].tolist(), learnt, strict=True), key=lambda pair: pair[1])
        result.append([(tokenizer.decode([t for t, _ in g], skip_special=False), bool(mark)) for mark, g in groups])
    return result


def learnt(found, model=THINKING, side=0) -> list[list[str]]:
    return [[text for text, mark in example if mark] for example in parts(found, model, side)]


def prompt(model, messages, tools=None) -> str:
    return ChatTemplate.load(model, Tokenizer.load(model)).render(messages, tools)


# Formats ------------------------------------------------------------------------------------------------------------


def test_of_messages_exactly_what_the_assistant_says_is_learnt():
    found = read(EXAMPLES / "chat.jsonl")
    assert (found.form, found.lines, found.bad, found.unused) == ("messages", 36, [], {})
    records = [json.loads(line) for line in (EXAMPLES / "chat.jsonl").read_text().splitlines()]
    expected = []
    for number, record in enumerate(records, 1):
        for index, message in enumerate(record["messages"]):
            if message["role"] != "assistant":
                continue
            answer = f"{message['reasoning_content']}\n</think>\n"
            if message["content"]:
                answer += f"\n<response>\n{message['content']}\n</response>\n"
            for call in message.get("tool_calls", ()):
                answer += f"\n\n<tool_call>\n{json.dumps(call['function'])}\n</tool_call>\n"
            asked = prompt(THINKING, record["messages"][:index], record.get("tools"))
            expected.append((number, [(asked, False), (f"{answer}<|im_end|>", True), ("</s>", False)]))
    assert list(zip(found.numbers, parts(found), strict=True)) == expected
    assert any("tool_call" in answer for _, (_, (answer, _), _) in expected)


def test_reasoning_may_stand_in_the_content_or_be_called_otherwise(tmp_path):
    answers = [
        {"reasoning_content": "So.", "content": "Moses."},
        {"reasoning": "So.", "content": "Moses."},
        {"thoughts": "So.", "content": "Moses."},
        {"content": "<think>\nSo.\n</think>\n\nMoses."},
        {"reasoning_content": "So.", "content": [{"type": "text", "text": "Moses."}]},
    ]
    found = read(write(tmp_path, *({"messages": [USER, {"role": "assistant", **answer}]} for answer in answers)))
    assert learnt(found) == [["So.\n</think>\n\n<response>\nMoses.\n</response>\n<|im_end|>"]] * 5


def test_an_answer_of_weight_0_is_shown_and_not_learnt(tmp_path):
    path = write(tmp_path, {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "content": "Aaron."}]})
    assert learnt(read(path)) == [["\n</think>\n\n<response>\nAaron.\n</response>\n<|im_end|>"]]
    ((before, answer),) = parts(read(path, BASE), BASE)
    assert before == (prompt(BASE, [USER, ANSWER, USER]), False) and answer == ("Aaron.</s>", True)


def test_erniekit():
    found = read(EXAMPLES / "erniekit.jsonl", BASE)
    assert (found.form, found.bad, len(found.numbers)) == ("erniekit", [], 8)
    shown = parts(found, BASE)
    system = "<|begin_of_sentence|>You answer for the lighthouse at Grey Point.\n"
    assert shown[2] == [
        (system + "User: Is there a shop?\nAssistant: ", False),
        ("Yes, a small one.<|end_of_sentence|>", True),
        ("User: What do you sell?\nAssistant: ", False),
        ("Tea, cards and candles.</s>", True),
    ]
    asked = system + "User: Hello!\nAssistant: Hi!!!<|end_of_sentence|>User: Is it windy?\nAssistant: "
    assert shown[3] == [(asked, False), ("At the top it is always windy.</s>", True)]  # label [0, 1]
    asked = "<|begin_of_sentence|>You answer in one word.\nUser: Is there tea?\nAssistant: "
    assert shown[5] == [(asked, False), ("Yes.</s>", True)]  # is_system


def test_alpaca():
    found = read(EXAMPLES / "alpaca.jsonl", BASE)
    assert (found.form, found.bad) == ("alpaca", [])
    shown = parts(found, BASE)
    assert shown[0] == [
        ("<|begin_of_sentence|>User: Spell the word.\nharbour\nAssistant: ", False),
        ("h-a-r-b-o-u-r</s>", True),
    ]
    assert shown[7][0][0].endswith("User: Write a line about a lamp.\nAssistant: ")
    assert shown[9] == [
        ("<|begin_of_sentence|>User: How do you spell boat?\nAssistant: ", False),
        ("b-o-a-t<|end_of_sentence|>", True),
        ("User: And a bell?\nAssistant: ", False),
        ("b-e-l-l</s>", True),
    ]


def test_of_texts_all_is_learnt():
    found = read(EXAMPLES / "text.jsonl")
    texts = [json.loads(line)["text"] for line in (EXAMPLES / "text.jsonl").read_text().splitlines()]
    assert parts(found) == [[(text + "</s>", True)] for text in texts]
    assert found.learnt() == found.tokens() - len(texts)  # nothing predicts the first token


def test_preferences():
    found = read(EXAMPLES / "preference.jsonl")
    assert (found.form, found.bad, len(found.sides)) == ("preference", [], 2)
    for line, chosen, rejected in zip(
        (EXAMPLES / "preference.jsonl").read_text().splitlines(), parts(found), parts(found, side=1), strict=True
    ):
        record = json.loads(line)
        asked = (prompt(THINKING, record["chosen"][:1]), False)
        for side, (before, (answer, mark), end) in (("chosen", chosen), ("rejected", rejected)):
            assert (before, mark, end) == (asked, True, ("</s>", False))
            message = record[side][1]
            said = f"{message['reasoning_content']}\n</think>\n\n<response>\n{message['content']}\n</response>\n"
            assert answer == said + "<|im_end|>"


def test_preferences_as_others_write_them(tmp_path):
    wanted = "<|begin_of_sentence|>Be brief.\nUser: Who spake?\nAssistant: "
    system = {"role": "system", "content": "Be brief."}
    other = {"role": "assistant", "content": "Aaron."}
    rounds = {"system": "Be brief.", "src": ["Who spake?"], "tgt": [], "response": ["Aaron.", ["Moses."]]}
    records = [
        {"chosen": [system, USER, ANSWER], "rejected": [system, USER, other]},
        {"prompt": [system, USER], "chosen": [ANSWER], "rejected": [other]},
        {"prompt": [system, USER], "chosen": ANSWER, "rejected": other},
        {"system": "Be brief.", "question": "Who spake?", "chosen": "Moses.", "rejected": "Aaron."},
        {"system": "Be brief.", "prompt": "Who spake?", "chosen": "Moses.", "rejected": "Aaron."},
    ]
    for path in (write(tmp_path, *records), write(tmp_path, {**rounds, "sort": [0, 1]})):
        found = read(path, BASE)
        assert found.bad == []
        assert all(example == [(wanted, False), ("Moses.</s>", True)] for example in parts(found, BASE))
        assert all(example == [(wanted, False), ("Aaron.</s>", True)] for example in parts(found, BASE, side=1))
    turns = {**rounds, "response": [["Moses.", "To whom?", "Aaron."], ["No.", "To whom?", "No."]], "sort": [2, 1]}
    found = read(write(tmp_path, turns), BASE)
    assert learnt(found, BASE) == [["Moses.<|end_of_sentence|>", "Aaron.</s>"]]
    assert learnt(found, BASE, side=1) == [["No.<|end_of_sentence|>", "No.</s>"]]
    (bad,) = read(write(tmp_path, turns)).bad
    assert bad.reason.startswith("chosen and rejected must have one answer each")


def test_all_examples_are_good():
    names = [path.name for path in sorted(EXAMPLES.glob("*.jsonl")) if path.name != "questions.jsonl"]  # prompts
    assert len(names) >= 8
    for name in names:
        found = read(EXAMPLES / name)
        assert found.bad == [] and found.unused == {} and found.learnt() > 0, name


def test_the_lines_that_the_documentation_shows_are_good(tmp_path):
    text = (ROOT / "docs" / "training.md").read_text().partition("### Formats")[2].partition("### Bad lines")[0]
    lines = re.findall(r"`(\{.*?\})`(?=[,; |])", text)
    assert len(lines) == 7
    for line in lines:
        found = read(write(tmp_path, line.encode()))
        assert found.bad == [] and found.unused == {} and f"`{found.form}`" in text, line


def test_a_format_can_be_named(tmp_path):
    path = write(tmp_path, {"text": "In the beginning", "messages": [USER, ANSWER], "id": 3}, {"text": "And God said"})
    found = read(path)
    assert found.form == "messages" and [bad.number for bad in found.bad] == [2]
    assert found.bad[0].reason == "has no field messages, which format messages needs"
    found = read(path, sources={"a": {"train": str(path), "format": "text"}})
    assert found.bad == [] and len(found.numbers) == 2 and found.unused == {"messages": 1, "id": 1}


# What is bad --------------------------------------------------------------------------------------------------------


def assistant(**fields) -> dict:
    return {"messages": [USER, {**ANSWER, **fields}]}


PAIR = {"prompt": "Who?", "chosen": "Moses.", "rejected": "Aaron."}
ROUNDS = {"src": ["Who?"], "tgt": ["Moses."]}
CHOICE = {"src": ["Who?"], "tgt": [], "response": [["Moses."], ["Aaron."]], "sort": [1, 0]}


@pytest.mark.parametrize(
    ("good", "line", "reason"),
    [
        (assistant(), b"{oops", "not valid JSON (Expecting property name enclosed in double quotes at column 2)"),
        (assistant(), b"", "the line is blank"),
        (assistant(), b"[1]", "not a JSON object"),
        (assistant(), b'{"messages": "\xff"}', "not UTF-8 at byte 14"),
        (assistant(), b"9" * 5000, "not valid JSON"),
        (assistant(), {"message": []}, "has no field messages"),
        (assistant(), {"messages": []}, "messages must be a list of at least one message"),
        (assistant(), {"messages": [USER]}, "the last turn is the user's; it must be the assistant's"),
        (assistant(), {"messages": [USER, {"role": "human", "content": "x"}]}, "messages[1]: role is 'human'"),
        (assistant(), {"messages": [{"role": "user", "content": 3}, ANSWER]}, "messages[0]: content must be text"),
        (assistant(), assistant(content=" "), "messages[1]: the assistant says nothing and calls no tool"),
        (assistant(), assistant(weight=0), "nothing in it is to be learnt: every answer has weight 0"),
        (assistant(), assistant(weight=0.5), "messages[1]: weight must be 0 or 1"),
        (assistant(), assistant(reasoning_content=["x"]), "messages[1]: reasoning_content must be text"),
        (assistant(), assistant(tool_calls=[{"name": "get"}]), "messages[1]: tool_calls must be a list of functions"),
        (assistant(), assistant(tool_calls=[{"name": "get", "arguments": "{"}]), "messages[1]: the arguments of get"),
        (assistant(), {**assistant(), "tools": {}}, "tools must be a list of function tools"),
        (assistant(), {**assistant(), "tools": [{}]}, "tools[0]: expected a function with a name"),
        (assistant(), assistant(content="\ud800"), "the text has half of a surrogate pair at character"),
        ({"text": "x"}, {"text": ""}, "field text is empty"),
        ({"text": "x"}, {"text": 3}, "field text must be text, found int"),
        (ROUNDS, {**ROUNDS, "tgt": []}, "src has 1 turns and tgt 0"),
        (ROUNDS, {**ROUNDS, "src": [""]}, "src must be a list of texts that are not empty"),
        (ROUNDS, {**ROUNDS, "label": [2]}, "label must have a 0 or 1 for each turn of tgt"),
        (ROUNDS, {**ROUNDS, "label": [0]}, "nothing in it is to be learnt: every label is 0"),
        ({"instruction": "x", "output": "y"}, {"instruction": "x", "output": None}, "field output must be text"),
        ({"instruction": "x", "output": "y"}, {"instruction": "x", "output": ""}, "the assistant says nothing"),
        ({"instruction": "x", "output": "y"}, {"instruction": "x", "output": "y", "history": ["z"]}, "history must be"),
        (PAIR, {**PAIR, "rejected": "Moses."}, "chosen and rejected are the same"),
        (PAIR, {**PAIR, "question": "Who?"}, "has both prompt and question; give one"),
        (PAIR, {"chosen": [USER, ANSWER], "rejected": [ANSWER]}, "must be answers to the same question"),
        (PAIR, {**PAIR, "rejected": [{**ANSWER, "content": "No."}, USER]}, "rejected: the last turn is the user's"),
        (PAIR, {"chosen": "Moses.", "rejected": "Aaron."}, "must be answers to the same question"),
        (CHOICE, {**CHOICE, "sort": [1, 1]}, "sort has the same number twice"),
        (CHOICE, {**CHOICE, "sort": [1]}, "sort must be a list of two numbers"),
        (CHOICE, {**CHOICE, "tgt": ["x"]}, "src has 1 turns and tgt 1; tgt must have one fewer"),
        (CHOICE, {**CHOICE, "response": ["x"]}, "response must be a list of two answers"),
        (CHOICE, {**CHOICE, "response": [[], ["x"]]}, "an odd number of texts"),
    ],
)
def test_bad_lines_are_told_with_their_number_and_why(tmp_path, good, line, reason):
    found = read(write(tmp_path, good, line, good))
    assert [bad.number for bad in found.bad] == [2] and reason in found.bad[0].reason
    assert found.numbers.tolist() == [1, 3]


def test_what_the_template_has_no_place_for_is_bad(tmp_path):
    tools = [{"type": "function", "function": {"name": "get", "parameters": {}}}]
    records = [assistant(), assistant(reasoning_content="So."), {**assistant(), "tools": tools}]
    reasons = [bad.reason for bad in read(write(tmp_path, *records, assistant(tool_calls=[CALL])), BASE).bad]
    assert "messages[1] has reasoning_content, and this model's chat template knows no reasoning" in reasons[0]
    assert len(reasons) == 3 and all("knows no tools" in reason for reason in reasons[1:])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "none of its 0 lines is a JSON object"),
        (b"\n{oops\n", "none of its 2 lines is a JSON object"),
        (b'[{"text": "x"}]', "a JSON list; one JSON object a line is needed"),
        (b'{"id": 1, "question": "x"}\n', "line 1 has fields id, question, which are of no format"),
        (None, "no such file"),
    ],
)
def test_a_file_of_no_format_is_an_error(tmp_path, content, message):
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"data.jsonl: .*{message}"):
        read(path)


def test_a_model_without_a_chat_template_can_only_learn_texts(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(BASE, model)
    (model / "chat_template.jinja").unlink()
    path = write(tmp_path, assistant())
    # Else the tokenizer tells the family: it has the tokens of the Thinking models.
    assert learnt(read(path, model), BASE) == [["\n</think>\n\n<response>\nMoses.\n</response>\n<|im_end|>"]]
    settings = json.loads((model / "tokenizer_config.json").read_text())
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (model / name).write_text(json.dumps({"eos_token": settings["eos_token"]}))
    added = json.loads((model / "added_tokens.json").read_text())
    del added["<|im_end|>"]
    (model / "added_tokens.json").write_text(json.dumps(added))
    tokenised.load_text.cache_clear()
    with pytest.raises(UserError, match="model: no chat template here"):
        read(path, model)
    assert read(write(tmp_path, {"text": "x"}), model).bad == []


# Long examples, bad lines and files together ------------------------------------------------------------------------


def test_long_examples_are_bad_or_left_out_or_cut(tmp_path, capsys):
    long = {"messages": [USER, {**ANSWER, "content": "word " * 80}]}
    asked = {"messages": [{"role": "user", "content": "word " * 90}, ANSWER]}
    path = write(tmp_path, assistant(), long, asked)
    found = read(path, BASE, sequence_length=64)
    assert [bad.number for bad in found.bad] == [2, 3] and found.numbers.tolist() == [1]
    assert "tokens, and rows have 64: make sequence_length larger" in found.bad[0].reason
    found = read(path, BASE, sequence_length=64, long_examples="skip")
    assert (found.bad, found.skipped, found.truncated, found.numbers.tolist()) == ([], 2, 0, [1])
    found = read(path, BASE, sequence_length=64, long_examples="truncate")
    assert (found.bad, found.skipped, found.truncated, found.numbers.tolist()) == ([], 1, 1, [1, 2])
    assert found.sides[0].lengths.max() == 64
    assert load_data(recipe(path, BASE, sequence_length=64, long_examples="truncate"), config()).training.steps(1) == 1
    told = capsys.readouterr().err
    assert "1 of 3 examples too long and cut off" in told and "1 of 3 examples too long and left out" in told


def config() -> ModelConfig:
    return ModelConfig.from_file(BASE / "config.json")


def test_training_refuses_bad_lines_unless_told_to_skip_them(tmp_path, capsys):
    path = write(tmp_path, assistant(), {"messages": [USER]}, b"{")
    with pytest.raises(UserError) as error:
        load_data(recipe(path, BASE), config())
    assert str(error.value) == (
        f"{path}, line 2: the last turn is the user's; it must be the assistant's (and 1 more, which `main.py data` "
        "lists); skip_bad_lines = true leaves it out"
    )
    data = load_data(recipe(path, BASE, skip_bad_lines=True), config())
    assert f"{path}: 2 of 3 lines are bad and left out" in capsys.readouterr().err
    assert (data.training.batch(0).segments >= 0).sum() == len(Tokenizer.load(BASE).encode(prompt(BASE, [USER]))) + 4
    with pytest.raises(UserError, match="none of its 1 lines can be learnt from"):
        load_data(recipe(write(tmp_path, {"messages": [USER]}), BASE, skip_bad_lines=True), config())


def test_sources_are_mixed_and_held_out(tmp_path):
    sources = {
        "chat": {"train": "chat.jsonl", "heldout": "chat_heldout.jsonl", "times": 2},
        "alpaca": {"train": "alpaca.jsonl", "times": 0.5},
    }
    given = dataclasses.replace(recipe("", sources=sources), data=str(EXAMPLES))
    data = load_data(given, ModelConfig.from_file(THINKING / "config.json"))
    assert isinstance(data.training, TrainingData)
    steps = map(data.training.contents, range(data.training.steps(1)))
    parts = [part for rows in steps for row in rows for part, _ in row]
    assert (parts.count(0), parts.count(1)) == (2 * 54, 14 // 2)
    (batch,) = data.heldout.pop("chat")
    assert data.heldout == {} and (batch.targets != -100).sum() == 435
    digest = hashlib.sha256((EXAMPLES / "chat.jsonl").read_bytes()).hexdigest()
    assert data.digests[str(EXAMPLES / "chat.jsonl")] == digest and len(data.digests) == 3


def test_pairs_and_other_examples_do_not_mix(tmp_path):
    sources = {"a": {"train": "preference.jsonl", "heldout": "preference_heldout.jsonl"}}
    given = dataclasses.replace(recipe("", sources=sources), data=str(EXAMPLES))
    thinking = ModelConfig.from_file(THINKING / "config.json")
    data = load_data(given, thinking)
    assert isinstance(data.training, PreferenceData)
    assert sum((batch.pairs >= 0).sum() for batch in data.heldout["a"]) == 8
    given = dataclasses.replace(given, sources={**sources, "b": {"train": "alpaca.jsonl"}})
    with pytest.raises(UserError, match="preference.jsonl has pairs of answers and .*alpaca.jsonl has none"):
        load_data(given, thinking)


# What is kept -------------------------------------------------------------------------------------------------------


def test_a_file_is_tokenised_once(tmp_path, monkeypatch):
    monkeypatch.setenv("ERNIE_JAX_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path, assistant(), b"{")
    first = read(path)
    work, calls = tokenised._tokenise_file, []
    monkeypatch.setattr(tokenised, "_tokenise_file", lambda *a: calls.append(a) or work(*a))
    again = read(path)
    assert not calls
    np.testing.assert_array_equal(first.sides[0].tokens, again.sides[0].tokens)
    assert (first.bad, first.numbers.tolist()) == (again.bad, again.numbers.tolist())
    read(path, BASE)  # another tokenizer
    read(write(tmp_path, assistant(content="Aaron."), b"{"))
    assert len(calls) == 2
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 3  # and nothing temporary


def test_many_lines_are_tokenised_by_several_processes(tmp_path, monkeypatch):
    records = [assistant(content=f"Moses {n}.") if n % 7 else b"{" for n in range(900)]
    path = epath.Path(write(tmp_path, *records))
    alone = list(tokenised._tokenise_chunks(path, "messages", epath.Path(BASE)))
    monkeypatch.setattr(tokenised, "_FEW", 256)
    monkeypatch.setattr(tokenised.os, "cpu_count", lambda: 1)
    together = list(tokenised._tokenise_chunks(path, "messages", epath.Path(BASE)))
    assert len(alone) == 4
    for one, other in zip(alone, together, strict=True):
        assert (one.numbers, one.bad, one.unused) == (other.numbers, other.bad, other.unused)
        for mine, theirs in zip(one.sides[0], other.sides[0], strict=True):
            np.testing.assert_array_equal(mine, theirs)
