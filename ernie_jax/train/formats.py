"""The formats of training data: what the fields of a JSON line say, as a text, a conversation or a pair of answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ernie_jax.errors import UserError
from ernie_jax.text.chat import read_messages

_REASONING = ("reasoning_content", "reasoning", "thoughts")  # as in what the server reads


class Text(NamedTuple):
    """A text, all of which is learnt."""

    text: str


class Conversation(NamedTuple):
    """OpenAI chat messages, of which the assistant's are learnt unless their `weight` is 0."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None


class Pair(NamedTuple):
    """Two continuations of the same conversation."""

    prompt: list[dict[str, Any]]
    chosen: list[dict[str, Any]]
    rejected: list[dict[str, Any]]
    tools: list[Any] | None


class Format(NamedTuple):
    """How lines with these fields are read."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Text | Conversation | Pair]

    @property
    def is_pair(self) -> bool:
        return self.read in (_read_preference, _read_erniekit_preference)


def detect(fields: Mapping[str, Any]) -> str | None:
    """Return the name of the format that has these fields, or None."""
    return next((name for name, form in FORMATS.items() if fields.keys() >= set(form.required)), None)


def read_record(name: str, record: Mapping[str, Any]) -> Text | Conversation | Pair:
    """Read a line in a format.

    Raises:
      UserError: if a field is missing or malformed.
    """
    form = FORMATS[name]
    if missing := [field for field in form.required if field not in record]:
        raise UserError(f"has no field {', '.join(missing)}, which format {name} needs")
    return form.read(record)


def _read_text(record: Mapping[str, Any]) -> Text:
    text = _text(record, "text")
    if not text.strip():
        raise UserError("field text is empty")
    return Text(text)


def _read_messages(record: Mapping[str, Any]) -> Conversation:
    messages = _checked(record["messages"])
    _check_last(messages)
    if not any(message.get("weight", 1) for message in messages if message["role"] == "assistant"):
        raise UserError("nothing in it is to be learnt: every answer has weight 0")
    return Conversation(messages, _tools(record))


def _read_erniekit(record: Mapping[str, Any]) -> Conversation:
    system, questions, answers = _erniekit_rounds(record)
    if len(questions) != len(answers):
        raise UserError(f"src has {len(questions)} turns and tgt {len(answers)}; there must be as many")
    labels = record.get("label") or [1] * len(record["tgt"])
    if not isinstance(labels, list) or len(labels) != len(record["tgt"]) or not {*map(_hashable, labels)} <= {0, 1}:
        raise UserError("label must have a 0 or 1 for each turn of tgt")
    weights = labels[-len(answers) :]
    if not any(weights):
        raise UserError("nothing in it is to be learnt: every label is 0")
    messages = _rounds(system, questions, answers)
    for message, weight in zip([m for m in messages if m["role"] == "assistant"], weights, strict=True):
        message["weight"] = int(weight)
    return Conversation(_checked(messages), None)


def _read_alpaca(record: Mapping[str, Any]) -> Conversation:
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise UserError("history must be a list of [question, answer] pairs")
    questions, answers = [question for question, _ in history], [answer for _, answer in history]
    # A line break between them, as LlamaFactory has it; by ERNIEKit's documentation there is none.
    question = "\n".join(filter(None, (_text(record, "instruction"), _text(record, "input", ""))))
    messages = _rounds(_text(record, "system", ""), [*questions, question], [*answers, _text(record, "output")])
    return Conversation(_checked(messages), None)


def _read_preference(record: Mapping[str, Any]) -> Pair:
    given = [name for name in ("prompt", "question") if record.get(name)]
    if len(given) > 1:
        raise UserError("has both prompt and question; give one")
    prompt = _as_messages("user", record[given[0]]) if given else []
    if system := _text(record, "system", ""):
        prompt = [{"role": "system", "content": system}, *prompt]
    chosen, rejected = (_as_messages("assistant", record[name]) for name in ("chosen", "rejected"))
    common = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if common is None:
        common = min(len(chosen), len(rejected))
    return _pair([*prompt, *chosen[:common]], chosen[common:], rejected[common:], _tools(record))


def _read_erniekit_preference(record: Mapping[str, Any]) -> Pair:
    system, questions, answers = _erniekit_rounds(record)
    if len(questions) != len(answers) + 1:
        raise UserError(f"src has {len(questions)} turns and tgt {len(answers)}; tgt must have one fewer")
    responses, order = record["response"], record["sort"]
    if not isinstance(responses, list) or len(responses) != 2:
        raise UserError("response must be a list of two answers")
    if not isinstance(order, list) or len(order) != 2 or not all(type(rank) in (int, float) for rank in order):
        raise UserError("sort must be a list of two numbers")
    if order[0] == order[1]:
        raise UserError("sort has the same number twice: it does not say which response is chosen")
    turns = [[response] if isinstance(response, str) else response for response in responses]
    if not all(isinstance(said, list) and len(said) % 2 == 1 for said in turns):
        raise UserError("each response must be a list with an odd number of texts: answers, and questions between them")
    roles = ("assistant", "user")
    chosen, rejected = (
        [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns[side])]
        for side in ((0, 1) if order[0] > order[1] else (1, 0))
    )
    return _pair(_rounds(system, questions, answers), chosen, rejected, None)


# The first whose required fields are all there is the format of a line.
FORMATS = {
    "erniekit_preference": Format(
        ("src", "tgt", "response", "sort"), ("system", "is_system"), _read_erniekit_preference
    ),
    "preference": Format(("chosen", "rejected"), ("prompt", "question", "system", "tools"), _read_preference),
    "messages": Format(("messages",), ("tools",), _read_messages),
    "erniekit": Format(("src", "tgt"), ("system", "label", "is_system"), _read_erniekit),
    "alpaca": Format(("instruction", "output"), ("input", "history", "system"), _read_alpaca),
    "text": Format(("text",), (), _read_text),
}


def _pair(prompt: list, chosen: list, rejected: list, tools: list[Any] | None) -> Pair:
    prompt = _checked(prompt) if prompt else []
    if not prompt or not all(messages and messages[0]["role"] == "assistant" for messages in (chosen, rejected)):
        if chosen == rejected:
            raise UserError("chosen and rejected are the same")
        raise UserError("chosen and rejected must be answers to the same question")
    chosen, rejected = _checked(chosen), _checked(rejected)
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        _check_last(messages, f"{name}: ")
    if chosen == rejected:
        raise UserError("chosen and rejected are the same")
    return Pair(prompt, chosen, rejected, tools)


def _as_messages(role: str, value: Any) -> list[Any]:
    """Return what a preference's field says as messages: it may be a text, a message or a list of messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [value] if isinstance(value, Mapping) else value if isinstance(value, list) else [value]


def _rounds(system: str, questions: Sequence[str], answers: Sequence[str]) -> list[dict[str, Any]]:
    """Return the messages of questions and answers in turn; the last question may have no answer."""
    messages = [{"role": "system", "content": system}] if system else []
    for index, question in enumerate(questions):
        messages.append({"role": "user", "content": question})
        if index < len(answers):
            messages.append({"role": "assistant", "content": answers[index]})
    return messages


def _erniekit_rounds(record: Mapping[str, Any]) -> tuple[str, list[str], list[str]]:
    """Return system text, questions and answers of ERNIEKit's src and tgt, which may also be single texts."""
    questions, answers = ([record[n]] if isinstance(record[n], str) else record[n] for n in ("src", "tgt"))
    for name, turns in (("src", questions), ("tgt", answers)):
        if not isinstance(turns, list) or not all(isinstance(text, str) and text.strip() for text in turns):
            raise UserError(f"{name} must be a list of texts that are not empty")
    if not questions:
        raise UserError("src is empty")
    system = _text(record, "system", "")
    if record.get("is_system"):  # an older way to give it: as the first question
        return questions[0], questions[1:], answers[1:]
    return system, questions, answers


def _checked(messages: Any) -> list[dict[str, Any]]:
    """Return chat messages in one form, or say what is wrong with them."""
    messages = read_messages(messages)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        where = f"messages[{index}]"
        message["reasoning_content"] = next((message[name] for name in _REASONING if message.get(name)), None)
        if not isinstance(message["reasoning_content"], str | None):
            raise UserError(f"{where}: reasoning_content must be text")
        if _hashable(message.get("weight", 1)) not in (0, 1):
            raise UserError(f"{where}: weight must be 0 or 1")
        if not (message["content"] or "").strip() and not message.get("tool_calls"):
            raise UserError(f"{where}: the assistant says nothing and calls no tool")
        for call in message.get("tool_calls") or ():
            _check_arguments(where, call.get("function", call))
    return messages


def _check_arguments(where: str, function: Mapping[str, Any]) -> None:
    arguments = function["arguments"]
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        parsed = None
    if not isinstance(parsed, Mapping):
        raise UserError(f"{where}: the arguments of {function['name']} are no JSON object")


def _check_last(messages: Sequence[Mapping[str, Any]], where: str = "") -> None:
    if (role := messages[-1]["role"]) != "assistant":
        raise UserError(f"{where}the last turn is the {role}'s; it must be the assistant's")


def _text(record: Mapping[str, Any], name: str, default: str | None = None) -> str:
    value = record.get(name, default)
    value = default if value is None else value
    if not isinstance(value, str):
        raise UserError(f"field {name} must be text, found {type(value).__name__}")
    return value


def _tools(record: Mapping[str, Any]) -> list[Any] | None:
    tools = record.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise UserError("tools must be a list of function tools")
    return tools


def _hashable(value: Any) -> Any:
    return value if isinstance(value, int | float) else None
