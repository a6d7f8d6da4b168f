"""Questions and answers of the embedded Thinking model: sums, copying, lists, memory and small talk.

All of it is made here from word lists and random numbers, so that it can be made again and has no licence but ours.
"""

from __future__ import annotations

import itertools
import pathlib
import random
import tomllib
from collections.abc import Callable
from typing import Any, NamedTuple

Message = dict[str, Any]

_LISTS = tomllib.loads(pathlib.Path(__file__).with_name("words.toml").read_text())
NAMES, CITIES, COLOURS, ANIMALS, FRUITS, THINGS, QUALITIES, DAYS, MONTHS, LANGUAGES, _CAPITALS = (
    text.split() for text in _LISTS.values()
)
CAPITALS = dict(itertools.batched(_CAPITALS, 2))
OPPOSITES = dict(zip(QUALITIES[::2], QUALITIES[1::2], strict=True))
OPPOSITES |= {value: key for key, value in OPPOSITES.items()}
WORDS = [*COLOURS, *ANIMALS, *THINGS, *QUALITIES]

NAME = "ernie-embedded-thinking"
ABILITIES = "I can do sums, compare, sort and count, copy and spell words, remember what you tell me, and call tools."


class Round(NamedTuple):
    """A question and how it is answered.

    Attributes:
      topic: what it is about, for the exam.
    """

    topic: str
    question: str
    thoughts: str
    answer: str

    def messages(self) -> list[Message]:
        return [
            {"role": "user", "content": self.question},
            {"role": "assistant", "reasoning_content": self.thoughts, "content": self.answer},
        ]


# Small talk ---------------------------------------------------------------------------------------------------------


def greeting(rng: random.Random) -> Round:
    word = rng.choice(["Hello", "Hi", "Hey", "Good morning", "Good evening", "Hello there", "Hi there"])
    question = word + rng.choice(["", "!", ".", ", how are you?"])
    if question.endswith("?"):
        return Round("small talk", question, "A greeting and how I am.", "Hello! I am well. How can I help you?")
    return Round("small talk", question, "A greeting. I greet back.", "Hello! How can I help you?")


def farewell(rng: random.Random) -> Round:
    if rng.random() < 0.5:
        question = rng.choice(["Thanks!", "Thank you.", "Thank you very much!", "Thanks a lot."])
        return Round("small talk", question, "They thank me.", "You are welcome!")
    question = rng.choice(["Bye!", "Goodbye.", "Good night!", "See you later."])
    return Round("small talk", question, "They take leave.", "Goodbye!")


def ability(rng: random.Random) -> Round:
    question = rng.choice(
        ["What can you do?", "How can you help me?", "What are you good at?", "Help!", "What do you know?"]
    )
    return Round("small talk", question, "They ask what I can do.", ABILITIES)


def unknown(rng: random.Random) -> Round:
    thing, name, city = rng.choice(THINGS), rng.choice(NAMES), rng.choice(CITIES)
    questions = [
        f"How do I build a {thing}?",
        f"How far is it from {city} to {rng.choice(CITIES)}?",
        f"Is {name} right?",
        f"Tell me a story about {name}.",
        f"Tell me about {city}.",
        f"Explain the {thing} to me.",
        f"What do you think of the {thing}?",
        f"Who was {name} of {city}?",
        f"Why is the {thing} so {rng.choice(QUALITIES)}?",
        f"Write a poem about the {thing}.",
        "Tell me a joke.",
        "What is the meaning of life?",
        "What is the news today?",
        "What shall I cook?",
        "Who won the game?",
        "Write a program.",
    ]
    return Round(
        "unknown", rng.choice(questions), "I do not know this.", f"I am too small a model for that. {ABILITIES}"
    )


# Numbers ------------------------------------------------------------------------------------------------------------


def number(rng: random.Random, digits: int = 3) -> int:
    """Draw a number; each count of digits is as likely as the others."""
    size = rng.randint(1, digits)
    return rng.randrange(10 ** (size - 1) if size > 1 else 0, 10**size)


def digits_of(value: int, count: int) -> list[int]:
    """Return the last `count` decimal digits, the last first."""
    return [value // 10**i % 10 for i in range(count)]


def add_steps(a: int, b: int) -> str:
    size, carry, steps = max(len(str(a)), len(str(b))), 0, []
    for x, y in zip(digits_of(a, size), digits_of(b, size), strict=True):
        total = x + y + carry
        steps.append(
            f"{x} + {y}{' + 1' if carry else ''} = {total}, write {total % 10}{', carry 1' if total > 9 else ''}."
        )
        carry = total // 10
    return " ".join([*steps, f"The sum is {a + b}."])


def subtract_steps(a: int, b: int) -> str:
    size, borrow, steps = len(str(a)), 0, []
    for x, y in zip(digits_of(a, size), digits_of(b, size), strict=True):
        taken = f"{y} - 1" if borrow else f"{y}"
        if x - y - borrow < 0:
            steps.append(f"{x} - {taken} is too small, 1{x} - {taken} = {x + 10 - y - borrow}, borrow 1.")
            borrow = 1
        else:
            steps.append(f"{x} - {taken} = {x - y - borrow}.")
            borrow = 0
    return " ".join([*steps, f"The difference is {a - b}."])


def multiply_steps(a: int, b: int) -> str:
    carry, steps = 0, []
    for x in digits_of(a, len(str(a))):
        total = x * b + carry
        plus = f", plus {carry} is {total}" if carry else ""
        steps.append(f"{x} * {b} = {x * b}{plus}, write {total % 10}{f', carry {total // 10}' if total > 9 else ''}.")
        carry = total // 10
    return " ".join([*steps, f"The product is {a * b}."])


def add(rng: random.Random) -> Round:
    a, b = number(rng), number(rng)
    ways = [
        "What is {} + {}?",
        "{} + {}",
        "{}+{}",
        "Add {} and {}.",
        "How much is {} plus {}?",
        "Compute {} + {}.",
        "{} plus {}?",
    ]
    return Round("addition", rng.choice(ways).format(a, b), add_steps(a, b), f"{a} + {b} = {a + b}")


def subtract(rng: random.Random) -> Round:
    b, a = sorted([number(rng), number(rng)])
    way = rng.choice(["What is {} - {}?", "{} - {}", "{}-{}", "How much is {} minus {}?", "Compute {} - {}.", "from"])
    question = f"Subtract {b} from {a}." if way == "from" else way.format(a, b)
    return Round("subtraction", question, subtract_steps(a, b), f"{a} - {b} = {a - b}")


def multiply(rng: random.Random) -> Round:
    a, b = number(rng, 2), number(rng, 1)
    ways = [
        "What is {} * {}?",
        "{} * {}",
        "{} times {}",
        "What is {} times {}?",
        "Multiply {} by {}.",
        "How much is {} x {}?",
    ]
    return Round("multiplication", rng.choice(ways).format(a, b), multiply_steps(a, b), f"{a} * {b} = {a * b}")


def story(rng: random.Random) -> Round:
    name, fruits = rng.choice(NAMES), rng.choice(FRUITS)
    a, b = rng.randint(2, 20), rng.randint(1, 20)
    if rng.random() < 0.5:
        how = rng.choice(["gets", "buys", "finds"])
        question = f"{name} has {a} {fruits} and {how} {b} more. How many {fruits} does {name} have now?"
        return Round("word problems", question, f"More, so I add. {add_steps(a, b)}", f"{name} has {a + b} {fruits}.")
    b, a = sorted([a, b])
    how = rng.choice(["eats", "loses", "sells"])
    question = f"{name} has {a} {fruits} and {how} {b}. How many {fruits} are left?"
    return Round(
        "word problems", question, f"Fewer, so I subtract. {subtract_steps(a, b)}", f"{a - b} {fruits} are left."
    )


def compare(rng: random.Random) -> Round:
    a, b = number(rng), number(rng)
    while a == b:
        b = number(rng)
    larger = rng.random() < 0.5
    word = rng.choice(["larger", "bigger"]) if larger else "smaller"
    best = max(a, b) if larger else min(a, b)
    sizes = len(str(a)), len(str(b))
    if sizes[0] != sizes[1]:
        thoughts = f"{a} has {sizes[0]} digits and {b} has {sizes[1]}."
    else:
        x, y = next(pair for pair in zip(str(a), str(b), strict=True) if pair[0] != pair[1])
        thoughts = f"Both have {sizes[0]} digits. The first that differ are {x} and {y}."
    question = rng.choice(["Which is {}, {} or {}?", "Which number is {}: {} or {}?"]).format(word, a, b)
    return Round("comparison", question, f"{thoughts} So it is {best}.", f"{best} is {word}.")


def sort(rng: random.Random) -> Round:
    values = rng.sample(range(100), rng.randint(3, 6))
    shown = ", ".join(map(str, values))
    ordered = sorted(values)
    thoughts = f"The smallest is {ordered[0]}, then {', '.join(map(str, ordered[1:]))}."
    question = rng.choice(["Sort {}.", "Sort these numbers: {}", "Put {} in order.", "Order these: {}"]).format(shown)
    return Round("sorting", question, thoughts, ", ".join(map(str, ordered)))


def count(rng: random.Random) -> Round:
    first = rng.randint(0, 90)
    last = first + rng.randint(2, 9)
    numbers = [*range(first, last + 1)]
    question = rng.choice(["Count from {} to {}.", "Count from {} up to {}.", "List the numbers from {} to {}."])
    thoughts = f"I begin with {first} and stop at {last}."
    if rng.random() < 0.3:
        numbers.reverse()
        question, thoughts = "Count down from {1} to {0}.", f"I begin with {last} and stop at {first}."
    return Round("counting", question.format(first, last), thoughts, ", ".join(map(str, numbers)))


def parity(rng: random.Random) -> Round:
    value = number(rng, 4)
    kind = "odd" if value % 2 else "even"
    asked = rng.choice(["even", "odd"])
    word = "Yes" if asked == kind else "No"
    thoughts = f"The last digit is {value % 10}, which is {kind}."
    return Round("even or odd", f"Is {value} {asked}?", thoughts, f"{word}, {value} is {kind}.")


# Words --------------------------------------------------------------------------------------------------------------


def new_word(rng: random.Random) -> str:
    """Make up a word, so that copying does not lean on known ones."""
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(1, 3)))


def words(rng: random.Random, least: int, most: int) -> list[str]:
    return [new_word(rng) if rng.random() < 0.2 else rng.choice(WORDS) for _ in range(rng.randint(least, most))]


def phrase(rng: random.Random) -> str:
    """Make a text to be copied."""
    kind = rng.randrange(4)
    if kind == 0:
        return f"The {rng.choice(QUALITIES)} {rng.choice(ANIMALS)} sees the {rng.choice(COLOURS)} {rng.choice(THINGS)}."
    if kind == 1:
        return f"{rng.choice(NAMES)} goes to {rng.choice(CITIES)} on {rng.choice(DAYS)}"
    if kind == 2:
        return " ".join(str(number(rng, 4)) for _ in range(rng.randint(1, 5)))
    return " ".join(words(rng, 1, 8))


def copy(rng: random.Random) -> Round:
    text = phrase(rng)
    question = rng.choice(
        ["Repeat after me: {}", "Say: {}", "Copy this: {}", "Repeat: {}", "Please say {}", 'Say "{}"']
    )
    return Round("copying", question.format(text), "I repeat the text.", text)


def repeat(rng: random.Random) -> Round:
    word, times = words(rng, 1, 1)[0], rng.randint(2, 5)
    thoughts = " ".join(f"{i + 1} {word}," for i in range(times))[:-1] + "."
    return Round("repeating", f"Say {word} {times} times.", thoughts, " ".join([word] * times))


def backwards(rng: random.Random) -> Round:
    chosen = words(rng, 2, 6)
    question = rng.choice(["Say these words backwards: {}", "Reverse the order: {}", "Backwards, please: {}"])
    thoughts = f"The last word is {chosen[-1]}, the first is {chosen[0]}."
    return Round("reversing", question.format(" ".join(chosen)), thoughts, " ".join(chosen[::-1]))


def spell(rng: random.Random) -> Round:
    word = rng.choice(WORDS)
    question = rng.choice(["Spell {}.", "Spell the word {}.", "How do you spell {}?", 'Spell "{}".']).format(word)
    return Round("spelling", question, f"The word is {word}.", "-".join(word))


def how_many_words(rng: random.Random) -> Round:
    chosen = words(rng, 1, 7)
    thoughts = ", ".join(f"{i + 1} {word}" for i, word in enumerate(chosen)) + "."
    question = rng.choice(["How many words are in this: {}", "Count the words: {}"]).format(" ".join(chosen))
    return Round("counting words", question, thoughts, f"{len(chosen)} word{'s' * (len(chosen) > 1)}.")


def letter(rng: random.Random) -> Round:
    chosen = words(rng, 3, 6)
    place = rng.randrange(len(chosen))
    ordinal = ["first", "second", "third", "fourth", "fifth", "sixth"][place]
    thoughts = ", ".join(f"{i + 1} {word}" for i, word in enumerate(chosen[: place + 1])) + "."
    return Round("picking words", f"What is the {ordinal} word of: {' '.join(chosen)}", thoughts, chosen[place])


# Facts --------------------------------------------------------------------------------------------------------------


def fact(rng: random.Random) -> Round:
    kind = rng.randrange(4)
    if kind == 0:
        country = rng.choice([*CAPITALS])
        question = rng.choice(["What is the capital of {}?", "Capital of {}?", "Which city is the capital of {}?"])
        answer = f"The capital of {country} is {CAPITALS[country]}."
        return Round("facts", question.format(country), f"A capital, of {country}.", answer)
    if kind == 1:
        word = rng.choice(QUALITIES)
        question = rng.choice(["What is the opposite of {}?", "Opposite of {}?"]).format(word)
        return Round("facts", question, f"The opposite of {word}.", f"The opposite of {word} is {OPPOSITES[word]}.")
    names, unit = (DAYS, "day") if kind == 2 else (MONTHS, "month")
    index, after = rng.randrange(len(names)), rng.random() < 0.5
    found = names[(index + (1 if after else -1)) % len(names)]
    word = "after" if after else "before"
    question = rng.choice([f"Which {unit} comes {word} {names[index]}?", f"What {unit} is {word} {names[index]}?"])
    return Round("facts", question, f"The {unit} {word} {names[index]}.", f"{found} comes {word} {names[index]}.")


# What was said before -----------------------------------------------------------------------------------------------


class Memory(NamedTuple):
    """A thing to remember: how it is told and asked for, and what is said then."""

    draw: Callable[[random.Random], str]
    told: list[str]
    asked: list[str]
    reply: str
    answer: str


MEMORIES = {
    "name": Memory(
        lambda rng: rng.choice(NAMES),
        ["My name is {}.", "I am {}.", "Call me {}."],
        ["What is my name?", "Who am I?", "Do you remember my name?"],
        "Nice to meet you, {}!",
        "Your name is {}.",
    ),
    "city": Memory(
        lambda rng: rng.choice(CITIES),
        ["I live in {}.", "My home is {}."],
        ["Where do I live?", "Which city do I live in?"],
        "I will remember that you live in {}.",
        "You live in {}.",
    ),
    "colour": Memory(
        lambda rng: rng.choice(COLOURS),
        ["My favourite colour is {}.", "I like {} best."],
        ["What is my favourite colour?", "Which colour do I like best?"],
        "I will remember: {}.",
        "Your favourite colour is {}.",
    ),
    "number": Memory(
        lambda rng: str(number(rng)),
        ["My lucky number is {}.", "Remember the number {}."],
        ["What is my number?", "Which number was it?"],
        "I will remember {}.",
        "Your number is {}.",
    ),
    "animal": Memory(
        lambda rng: rng.choice(ANIMALS),
        ["I have a {}.", "My pet is a {}."],
        ["What pet do I have?", "Which animal do I have?"],
        "How nice, a {}!",
        "You have a {}.",
    ),
}


def tell(rng: random.Random, kind: str, value: str) -> Round:
    memory = MEMORIES[kind]
    return Round(
        "memory", rng.choice(memory.told).format(value), f"Their {kind} is {value}.", memory.reply.format(value)
    )


def recall(rng: random.Random, kind: str, value: str | None) -> Round:
    memory = MEMORIES[kind]
    question = rng.choice(memory.asked)
    if value is None:
        return Round("memory", question, f"They did not tell me their {kind}.", "You have not told me.")
    return Round("memory", question, f"They told me their {kind}: {value}.", memory.answer.format(value))
