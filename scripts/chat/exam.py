"""Ask a model the held-out conversations and count how many answers are right, topic by topic.

    python -m scripts.chat.exam --model=out/ernie-embedded-thinking/checkpoint --data=out/chat-corpus

Answers are greedy. Right is what says the same to the letter, calls of tools included; how it was thought of does not
matter. Earlier rounds of a conversation are those of the data, not the model's own.
"""

import argparse
import collections
import json
import pathlib
from typing import Any

from ernie_jax import LLM
from ernie_jax.text.answer import AnswerFormat, AnswerParser, Content, ToolCallArguments, ToolCallStart


def said(form: AnswerFormat, text: str) -> tuple[str, list[list[str]]]:
    """Return the content and the calls, each a name and JSON text, of an answer."""
    parser = AnswerParser(form)
    content, calls = "", []
    for event in [*parser.feed(text), *parser.finish(truncated=False)]:
        match event:
            case Content(part):
                content += part
            case ToolCallStart(name=name):
                calls.append([name, ""])
            case ToolCallArguments(text=part):
                calls[-1][1] += part
    return content, calls


def expected(message: dict[str, Any]) -> tuple[str, list[list[str]]]:
    calls = [call["function"] for call in message.get("tool_calls", ())]
    return message["content"] or "", [[call["name"], json.dumps(call["arguments"])] for call in calls]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint")
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder with chat.heldout.jsonl")
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print for each topic")
    flags = parser.parse_args()

    llm = LLM.load(flags.model, cache_tokens=65536, max_sequences=64)
    questions = []
    for line in (flags.data / "chat.heldout.jsonl").read_text().splitlines():
        found = json.loads(line)
        spoken = [i for i, message in enumerate(found["messages"]) if message["role"] == "assistant"]
        for index, topic in zip(spoken, found["topics"], strict=True):
            prompt = {"messages": found["messages"][:index], "tools": found["tools"]}
            questions.append((topic, prompt, found["messages"][index]))
    form = AnswerFormat(thinking=True, response_tags=True, tool_calls=True)
    params = llm.sampling_params(temperature=0, max_new_tokens=256)
    answers = llm.generate([prompt for _, prompt, _ in questions], params)

    right, asked = collections.Counter(), collections.Counter()
    for (topic, prompt, message), answer in zip(questions, answers, strict=True):
        text = llm.tokenizer.decode(answer.token_ids, skip_special=False)
        asked[topic] += 1
        if said(form, text.removesuffix("<|im_end|>")) == expected(message):
            right[topic] += 1
        elif asked[topic] - right[topic] <= flags.show:
            print(f"{topic}: {prompt['messages'][-1]['content']!r} should give {expected(message)}, gave {text!r}")
    for topic in sorted(asked):
        print(f"{topic:16} {right[topic]:5} of {asked[topic]:5} {right[topic] / asked[topic]:7.1%}")
    print(f"{'all':16} {right.total():5} of {asked.total():5} {right.total() / asked.total():7.1%}")


if __name__ == "__main__":
    main()
