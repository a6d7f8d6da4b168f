"""Whole conversations: rounds after one another, some with tools, each a function of its seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from scripts.chat import rounds as r
from scripts.chat.rounds import ABILITIES, MEMORIES, NAME, NAMES, Message, Round
from scripts.chat.tools import TOOLS, no_tool_round, offer, tool_round

# How often each is drawn.
TOPICS: dict[Callable[[random.Random], Round], int] = {
    r.greeting: 3, r.farewell: 2, r.ability: 2, r.unknown: 6, r.add: 14, r.subtract: 12, r.multiply: 10,
    r.story: 6, r.compare: 6, r.sort: 6, r.count: 4, r.parity: 3, r.copy: 12, r.repeat: 3,
    r.backwards: 5, r.spell: 5, r.how_many_words: 3, r.letter: 3, r.fact: 5,
}  # fmt: skip


def identity(rng: random.Random, name: str) -> Round:
    question = rng.choice(["Who are you?", "What is your name?", "What are you?", "Tell me who you are."])
    return Round("small talk", question, f"I am {name}.", f"I am {name}, a very small model. {ABILITIES}")


def system_prompt(rng: random.Random) -> tuple[str | None, str]:
    """Return a system prompt or none, and what the model is called."""
    kind = rng.random()
    if kind < 0.55:
        return None, NAME
    if kind < 0.8:
        prompts = ["You are a helpful assistant.", "Be brief.", "Answer the questions.", "You help people."]
        return rng.choice(prompts), NAME
    name = rng.choice(NAMES)
    return rng.choice(["You are {}.", "Your name is {}.", "You are called {}. Be kind."]).format(name), name


def plain(rng: random.Random) -> tuple[list[Message], list[str]]:
    """Return a conversation without tools, and the topic of each answer."""
    system, name = system_prompt(rng)
    messages = [{"role": "system", "content": system}] if system else []
    known: dict[str, str] = {}
    topics = []
    length = rng.choices([1, 2, 3, 4, 6, 10], [50, 18, 13, 9, 6, 4])[0]
    for _ in range(length):
        chance = rng.random()
        if chance < 0.05:
            found = identity(rng, name)
        elif chance < 0.05 + 0.12 * (length > 1):
            kind = rng.choice([*MEMORIES])
            known[kind] = MEMORIES[kind].draw(rng)
            found = r.tell(rng, kind, known[kind])
        elif chance < 0.17 + (0.35 if known else 0.01):
            kind = rng.choice([*known] if known and rng.random() < 0.9 else [*MEMORIES])
            found = r.recall(rng, kind, known.get(kind))
        else:
            found = rng.choices([*TOPICS], [*TOPICS.values()])[0](rng)
        messages += found.messages()
        topics.append(found.topic)
    return messages, topics


def with_tools(rng: random.Random) -> tuple[list[Message], list[str], list[dict[str, Any]]]:
    """Return a conversation with tools, the topic of each answer, and the tools."""
    tools = [offer(rng, kind) for kind in rng.sample(TOOLS, rng.randint(1, 3))]
    system, _ = system_prompt(rng)
    messages = [{"role": "system", "content": system}] if system else []
    topics = []
    for _ in range(rng.choices([1, 2, 3], [70, 20, 10])[0]):
        chance = rng.random()
        if chance < 0.75:
            found, names = tool_round(rng, rng.choice(tools))
        elif chance < 0.87:
            found, names = no_tool_round(rng, tools)
        else:
            other = rng.choice([r.greeting, r.farewell, r.copy, r.backwards, r.spell, r.fact])(rng)
            found, names = other.messages(), [other.topic]
        messages += found
        topics += names
    return messages, topics, [tool.schema for tool in tools]


def conversation(seed: str) -> dict[str, Any]:
    """Return the conversation of a seed: messages, tools or none, and the topic of each of the assistant's messages."""
    rng = random.Random(seed)
    if rng.random() < 0.3:
        messages, topics, tools = with_tools(rng)
        return {"messages": messages, "topics": topics, "tools": tools}
    messages, topics = plain(rng)
    return {"messages": messages, "topics": topics, "tools": None}
