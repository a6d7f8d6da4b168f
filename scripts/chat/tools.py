"""Questions that tools answer: kinds of tools under many names, what they say, and what is made of it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from scripts.chat.rounds import (
    CITIES,
    DAYS,
    LANGUAGES,
    NAMES,
    QUALITIES,
    THINGS,
    WORDS,
    Message,
    Round,
    new_word,
    number,
    words,
)


class Ask(NamedTuple):
    """A question that a tool answers: its arguments by place, what the tool says, and what is said of that."""

    question: str
    arguments: list[Any]
    result: Any
    answer: str


class Tool(NamedTuple):
    """A kind of tool under several names.

    Attributes:
      parameters: JSON type and possible names of each.
      ask: draws a question.
    """

    names: list[str]
    descriptions: list[str]
    parameters: list[tuple[str, list[str]]]
    ask: Callable[[random.Random], Ask]


def ask_weather(rng: random.Random) -> Ask:
    city, degrees, sky = (
        rng.choice(CITIES),
        rng.randint(0, 35),
        rng.choice(["sunny", "cloudy", "rainy", "windy", "clear"]),
    )
    question = rng.choice(
        ["What is the weather in {}?", "How is the weather in {}?", "Weather in {}?", "Is it warm in {}?"]
    )
    result = rng.choice([{"temperature": degrees, "sky": sky}, f"{degrees} degrees, {sky}"])
    return Ask(question.format(city), [city], result, f"It is {sky} in {city}, with {degrees} degrees.")


def ask_time(rng: random.Random) -> Ask:
    city, clock = rng.choice(CITIES), f"{rng.randrange(24):02}:{rng.randrange(60):02}"
    question = rng.choice(["What time is it in {}?", "Tell me the time in {}.", "How late is it in {}?"])
    return Ask(question.format(city), [city], rng.choice([{"time": clock}, clock]), f"It is {clock} in {city}.")


def ask_sum(rng: random.Random) -> Ask:
    a, b, operator = number(rng, 5), number(rng, 5), rng.choice("+-*")
    text = f"{a} {operator} {b}"
    value = {"+": a + b, "-": a - b, "*": a * b}[operator]
    question = rng.choice(["What is {}?", "Compute {}.", "{}", "How much is {}?"]).format(text)
    return Ask(question, [text], rng.choice([{"result": value}, str(value)]), f"{text} = {value}")


def ask_message(rng: random.Random) -> Ask:
    name = rng.choice(NAMES)
    text = rng.choice([f"the {rng.choice(THINGS)} is {rng.choice(QUALITIES)}", f"we meet on {rng.choice(DAYS)}",
                       f"I am in {rng.choice(CITIES)}", " ".join(words(rng, 2, 4))])  # fmt: skip
    question = rng.choice(["Tell {} that {}.", "Send {} a message: {}", "Write to {}: {}"]).format(name, text)
    return Ask(question, [name, text], rng.choice([{"sent": True}, "sent"]), f"I told {name}.")


def ask_timer(rng: random.Random) -> Ask:
    minutes = rng.randint(1, 90)
    question = rng.choice(["Set a timer for {} minutes.", "Wake me in {} minutes.", "Timer: {} minutes"]).format(
        minutes
    )
    return Ask(question, [minutes], rng.choice([{"ok": True}, "ok"]), f"The timer is set to {minutes} minutes.")


def ask_translation(rng: random.Random) -> Ask:
    word, language, found = rng.choice(WORDS), rng.choice(LANGUAGES), new_word(rng)
    question = rng.choice(["What is {} in {}?", "Translate {} to {}.", "How do you say {} in {}?"]).format(
        word, language
    )
    return Ask(question, [word, language], rng.choice([{"text": found}, found]), f"{word} is {found} in {language}.")


def ask_search(rng: random.Random) -> Ask:
    text, pages = " ".join(words(rng, 1, 3)), rng.randint(0, 99)
    question = rng.choice(["Search for {}.", "Look up {}.", "Find pages about {}."]).format(text)
    return Ask(
        question, [text], rng.choice([{"pages": pages}, f"{pages} pages"]), f"I found {pages} pages about {text}."
    )


def ask_light(rng: random.Random) -> Ask:
    room, state = rng.choice(["kitchen", "garden", "hall", "bath", "cellar", "office"]), rng.choice(["on", "off"])
    question = rng.choice([f"Turn {state} the light in the {room}.", f"Light {state} in the {room}, please."])
    return Ask(question, [room, state], rng.choice([{"ok": True}, "ok"]), f"The light in the {room} is {state}.")


TOOLS = [
    Tool(
        ["get_weather", "weather", "lookup_weather", "current_weather", "city_weather"],
        ["Get the weather of a city.", "Return the current weather.", "The weather now"],
        [("string", ["city", "place", "location", "town"])],
        ask_weather,
    ),
    Tool(
        ["get_time", "local_time", "clock", "time_in"],
        ["Get the time in a city.", "What the clock says", "Local time"],
        [("string", ["city", "place", "location", "where"])],
        ask_time,
    ),
    Tool(
        ["calculate", "calculator", "compute", "evaluate"],
        ["Evaluate an expression.", "Do a sum.", "A calculator"],
        [("string", ["expression", "formula", "sum", "text"])],
        ask_sum,
    ),
    Tool(
        ["send_message", "message", "tell", "send_text"],
        ["Send a message to a person.", "Write to somebody."],
        [("string", ["to", "name", "person", "recipient"]), ("string", ["text", "message", "body", "content"])],
        ask_message,
    ),
    Tool(
        ["set_timer", "timer", "start_timer", "alarm"],
        ["Set a timer.", "Ring after some minutes."],
        [("integer", ["minutes", "time", "duration", "length"])],
        ask_timer,
    ),
    Tool(
        ["translate", "translate_word", "dictionary"],
        ["Translate a word.", "Look a word up in a language."],
        [("string", ["word", "text", "phrase"]), ("string", ["language", "target", "to"])],
        ask_translation,
    ),
    Tool(
        ["search", "web_search", "find_pages", "look_up"],
        ["Search the web.", "Find pages about a topic."],
        [("string", ["query", "text", "topic", "q"])],
        ask_search,
    ),
    Tool(
        ["set_light", "light", "switch_light"],
        ["Turn a light on or off.", "Switch lights."],
        [("string", ["room", "place", "where"]), ("string", ["state", "value", "switch"])],
        ask_light,
    ),
]


class Offered(NamedTuple):
    """A tool as a conversation offers it."""

    kind: Tool
    name: str
    parameters: list[str]
    schema: dict[str, Any]


def offer(rng: random.Random, kind: Tool) -> Offered:
    name = rng.choice(kind.names)
    parameters = [rng.choice(names) for _, names in kind.parameters]
    properties = {}
    for parameter, (type_, _) in zip(parameters, kind.parameters, strict=True):
        properties[parameter] = {"type": type_}
        if rng.random() < 0.3:
            properties[parameter]["description"] = rng.choice(["what it is about", f"the {parameter}", "as text"])
    function: dict[str, Any] = {"name": name}
    if rng.random() < 0.8:
        function["description"] = rng.choice(kind.descriptions)
    function["parameters"] = {"type": "object", "properties": properties}
    if rng.random() < 0.8:
        function["parameters"]["required"] = parameters
    return Offered(kind, name, parameters, {"type": "function", "function": function})


def call(tool: Offered, ask: Ask) -> dict[str, Any]:
    arguments = dict(zip(tool.parameters, ask.arguments, strict=True))
    return {"type": "function", "function": {"name": tool.name, "arguments": arguments}}


def result_text(result: Any) -> str:
    return result if isinstance(result, str) else json.dumps(result)


def tool_round(rng: random.Random, tool: Offered) -> tuple[list[Message], list[str]]:
    """Return a question that a tool answers, or two of the same at once, with calls, results and the answer."""
    asks = [tool.kind.ask(rng)]
    if tool.kind.ask in (ask_weather, ask_time) and rng.random() < 0.3:
        other = tool.kind.ask(rng)
        if other.arguments != asks[0].arguments:
            asks = [asks[0]._replace(question=f"{asks[0].question} And in {other.arguments[0]}?"), other]
    thoughts = f"I call {tool.name}{' twice' * (len(asks) - 1)}."
    return [
        {"role": "user", "content": asks[0].question},
        {
            "role": "assistant",
            "reasoning_content": thoughts,
            "content": None,
            "tool_calls": [call(tool, ask) for ask in asks],
        },
        *({"role": "tool", "content": result_text(ask.result)} for ask in asks),
        {
            "role": "assistant",
            "reasoning_content": f"{tool.name} said it.",
            "content": " ".join(ask.answer for ask in asks),
        },
    ], ["tool calls", "tool answers"]


def no_tool_round(rng: random.Random, tools: list[Offered]) -> tuple[list[Message], list[str]]:
    offered = [tool.kind for tool in tools]
    ask = rng.choice([kind for kind in TOOLS if kind not in offered and kind.ask is not ask_sum]).ask(rng)
    found = Round("no such tool", ask.question, "None of the tools can do that.", "I have no tool for that.")
    return found.messages(), [found.topic]
