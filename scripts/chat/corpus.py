"""Prepare the conversations and the tokenizer of the embedded Thinking model.

    python -m scripts.chat.corpus --data=out/chat-corpus

writes the tokenizer's files to models/ernie-embedded-thinking, and to --data the token ids of the training and of the
held-out examples with what is to be learnt of them (`chat.train.npy`, `chat.train.learnt.npy`, ...), and the held-out
conversations for the exam (`chat.heldout.jsonl`). Everything is a function of --conversations.
"""

import argparse
import concurrent.futures
import functools
import hashlib
import itertools
import json
import pathlib

import numpy as np
from tqdm import tqdm

from ernie_jax.text import ChatTemplate, Tokenizer
from ernie_jax.train.conversations import Example, render_examples
from scripts.chat.conversations import conversation
from scripts.embedded_corpus import ADDED, ASCII, train_tokenizer, write_tokenizer

PIECES = 1014  # of the SentencePiece model; with the added tokens 1,024 ids
TOKENIZER_CONVERSATIONS = 5000  # that its merges are learnt from
LONGEST = 1024  # tokens of an example; longer ones are left out
HELD_OUT = 64  # one conversation in so many, by the hash of its text
CHUNK = 500


def is_held_out(found: dict) -> bool:
    # Short questions come up again and again: one that is held out is nowhere in the training data.
    text = json.dumps([found["messages"], found["tools"]])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % HELD_OUT == 0


def render(directory: pathlib.Path, found: dict) -> list[Example]:
    tokenizer, template = load(directory)
    return render_examples(found["messages"], found["tools"], template, tokenizer)


@functools.cache
def load(directory: pathlib.Path) -> tuple[Tokenizer, ChatTemplate]:
    tokenizer = Tokenizer.load(directory)
    return tokenizer, ChatTemplate.load(directory, tokenizer)


def rendered(directory: pathlib.Path, seeds: range) -> tuple[list[Example], list[Example], list[dict]]:
    """Return the training and the held-out examples of some conversations, and those conversations held out."""
    training, heldout, exam = [], [], []
    for seed in seeds:
        found = conversation(f"chat {seed}")
        examples = [example for example in render(directory, found) if len(example.tokens) <= LONGEST]
        if is_held_out(found):
            heldout += examples
            exam.append(found)
        else:
            training += examples
    return training, heldout, exam


def texts(count: int) -> list[str]:
    """Return lines that conversations consist of, to learn merges from."""
    lines = []
    for seed in range(count):
        found = conversation(f"tokenizer {seed}")
        for message in found["messages"]:
            lines += [message["content"] or "", message.get("reasoning_content", "")]
            lines += [json.dumps(call["function"]) for call in message.get("tool_calls", ())]
        lines += [json.dumps(tool) for tool in found["tools"] or ()]
    markers = ["<system_setting>", "</system_setting>", "<global_setting>", "think_mode=True", "</global_setting>",
               "<tool_list>", "</tool_list>", "system", "user", "assistant", "tool"]  # fmt: skip
    return [line for text in lines for line in text.split("\n") if line] + markers * count


def save(name: str, examples: list[Example], directory: pathlib.Path) -> None:
    tokens = np.array([token for example in examples for token in example.tokens], np.uint16)
    learnt = np.array([mark for example in examples for mark in example.learnt])
    np.save(directory / f"{name}.npy", tokens)
    np.save(directory / f"{name}.learnt.npy", learnt)
    print(f"{name}: {len(examples):,} answers, {len(tokens):,} tokens, {learnt.sum():,} of them to be learnt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder for the token ids")
    parser.add_argument("--model", type=pathlib.Path, default="models/ernie-embedded-thinking", help="the tokenizer's")
    parser.add_argument("--conversations", type=int, default=100_000)
    flags = parser.parse_args()

    write_tokenizer(train_tokenizer(texts(TOKENIZER_CONVERSATIONS), ASCII, PIECES), ADDED[-10:], flags.model)
    flags.data.mkdir(parents=True, exist_ok=True)
    chunks = [range(start, min(start + CHUNK, flags.conversations)) for start in range(0, flags.conversations, CHUNK)]
    with concurrent.futures.ProcessPoolExecutor() as pool:
        results = tqdm(pool.map(functools.partial(rendered, flags.model), chunks), total=len(chunks), unit="chunk")
        training, heldout, exam = (list(itertools.chain(*part)) for part in zip(*results, strict=True))
    save("chat.train", training, flags.data)
    save("chat.heldout", heldout, flags.data)
    (flags.data / "chat.heldout.jsonl").write_text("".join(f"{json.dumps(found)}\n" for found in exam))


if __name__ == "__main__":
    main()
