"""JSON lines to token ids: checked line by line, rendered and tokenised on all cores, and kept for the next start."""

from __future__ import annotations

import codecs
import concurrent.futures
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from tqdm import tqdm

from ernie_jax.config import read_json
from ernie_jax.errors import UserError
from ernie_jax.paths import cache_directory
from ernie_jax.text import ChatTemplate, Tokenizer
from ernie_jax.text.special_tokens import DECLARING_FILES
from ernie_jax.train.conversations import Example, render_examples, render_pair
from ernie_jax.train.documents import Documents
from ernie_jax.train.formats import FORMATS, Conversation, Pair, Text, detect, read_record

_CHUNK = 256  # lines that a process gets at once
_FEW = 2048  # lines that are not worth starting processes for


class BadLine(NamedTuple):
    """A line that can't be learnt from, and why."""

    number: int
    reason: str


class Tokenised(NamedTuple):
    """What a file of JSON lines holds.

    Attributes:
      form: name of its format.
      lines: how many it has.
      sides: its examples; of a preference format two, of equal number: the chosen and the rejected answers.
      numbers: [examples] the line of each. A conversation may be several examples.
      bad: the lines that hold none.
      unused: fields that the format has no use for, and how many lines have them.
    """

    form: str
    lines: int
    sides: tuple[Documents, ...]
    numbers: np.ndarray
    bad: list[BadLine]
    unused: dict[str, int]


def read_lines(path: epath.Path, form: str | None, model: epath.Path, digest: str) -> Tokenised:
    """Read a JSONL file as a model's tokenizer and chat template see it.

    What comes of it is kept in the cache directory, under the contents of the file, of the tokenizer and of the code
    that renders, so that it is done again when one of them changes and else never.

    Args:
      form: a name of FORMATS; None: by the fields of the first line that is a JSON object.
      model: directory of tokenizer and template.
      digest: SHA-256 of the file.

    Raises:
      UserError: if the file's format is unknown, or it needs a chat template and there is none.
    """
    form = form or _detect(path)
    tokenizer, _ = load_text(model, FORMATS[form].read is not FORMATS["text"].read)
    key = hashlib.sha256(json.dumps([digest, form, _fingerprint(model)]).encode()).hexdigest()[:32]
    kept = cache_directory() / "tokens" / key
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as part:
            _tokenise_file(path, form, model, tokenizer.vocab_size, pathlib.Path(part) / "new")
            try:
                os.rename(pathlib.Path(part) / "new", kept)
            except OSError:
                if not kept.exists():  # else another process was quicker
                    raise
    return _load(kept, form)


@functools.cache
def load_text(model: epath.Path, chat: bool) -> tuple[Tokenizer, ChatTemplate | None]:
    """Return a model's tokenizer, and its chat template if asked for.

    Raises:
      UserError: if one of them is missing or broken, or they don't tell how an answer ends.
    """
    tokenizer = Tokenizer.load(model)
    if tokenizer.token_id(tokenizer.special_tokens.get("eos_token", "")) is None:
        raise UserError(f"{model}: its tokenizer files declare no eos_token, which closes every example")
    if not chat:
        return tokenizer, None
    own = (model / "chat_template.jinja").exists() or (
        (config := model / "tokenizer_config.json").exists() and read_json(config).get("chat_template")
    )
    known = "sep_token" in tokenizer.special_tokens or tokenizer.token_id("<|im_end|>") is not None
    if not own and not known:
        raise UserError(
            f"{model}: no chat template here, neither chat_template.jinja nor field chat_template of "
            'tokenizer_config.json; copy the one of the model, or train on {"text": ...} lines'
        )
    template = ChatTemplate.load(model, tokenizer)
    if not template.mentions("<|im_end|>") and "sep_token" not in tokenizer.special_tokens:
        raise UserError(
            f"{model}: its chat template knows no <|im_end|> and its tokenizer no sep_token to end an answer"
        )
    return tokenizer, template


def _fingerprint(model: epath.Path) -> str:
    """Hash all that decides how a record becomes tokens."""
    digest = hashlib.sha256()
    names = ("tokenizer.model", "chat_template.jinja", *DECLARING_FILES)
    here = pathlib.Path(__file__).parent
    code = [here / f"{name}.py" for name in ("conversations", "formats", "tokenised")]
    code += sorted((here.parent / "text").rglob("*.*"))
    for file in [*(model / name for name in names), *code]:
        if file.suffix != ".pyc" and file.exists():
            digest.update(f"{file.name} {len(data := file.read_bytes())} ".encode() + data)
    return digest.hexdigest()


def _lines(path: epath.Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for index, line in enumerate(file):
            yield line.removeprefix(codecs.BOM_UTF8) if index == 0 else line


def _detect(path: epath.Path) -> str:
    """Return the format of the first line that is a JSON object."""
    number = 0
    for number, line in enumerate(_lines(path), 1):
        if number == 1 and line.lstrip().startswith(b"["):
            raise UserError(f"{path}: a JSON list; one JSON object a line is needed (jq -c '.[]' makes them)")
        try:
            record = _parse(line)
        except UserError:
            continue
        if form := detect(record):
            return form
        known = "; ".join(f"{name}: {', '.join(form.required)}" for name, form in FORMATS.items())
        raise UserError(f"{path}: line {number} has fields {', '.join(record)}, which are of no format ({known})")
    raise UserError(f"{path}: none of its {number} lines is a JSON object")


def _parse(line: bytes) -> dict[str, Any]:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 at byte {error.start}") from None
    if not text.strip():
        raise UserError("the line is blank")
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # an endless number, endless brackets
        raise UserError(f"not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise UserError("not a JSON object")
    return record


class _Chunk(NamedTuple):
    """The examples of some lines: of each side tokens, lengths and what is learnt, one after the other."""

    numbers: list[int]
    sides: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    bad: list[BadLine]
    unused: Counter[str]


def _tokenise(model: epath.Path, form: str, first: int, lines: Sequence[bytes]) -> _Chunk:
    """Tokenise lines, of which `first` is the number of the first."""
    numbers: list[int] = []
    examples: list[tuple[Example, ...]] = []
    bad, unused = [], Counter()
    known = {*FORMATS[form].required, *FORMATS[form].optional}
    for number, line in enumerate(lines, first):
        try:
            record = _parse(line)
            unused.update(record.keys() - known)
            found = _render(model, read_record(form, record))
        except UserError as error:
            bad.append(BadLine(number, str(error)))
            continue
        numbers += [number] * len(found)
        examples += found
    sides = []
    for side in zip(*examples, strict=True):
        tokens = np.array([token for example in side for token in example.tokens], np.uint32)
        learnt = np.array([mark for example in side for mark in example.learnt], bool)
        sides.append((tokens, np.array([len(example.tokens) for example in side], np.int64), learnt))
    return _Chunk(numbers, sides, bad, unused)


def _render(model: epath.Path, record: Text | Conversation | Pair) -> list[tuple[Example, ...]]:
    """Return the examples of a record, each with its sides."""
    tokenizer, template = load_text(model, not isinstance(record, Text))
    match record:
        case Text(text):
            tokens = [*tokenizer.encode(text), tokenizer.token_id(tokenizer.special_tokens["eos_token"])]
            return [(Example(tokens, [True] * len(tokens)),)]
        case Conversation(messages, tools):
            _check_reasoning(template, messages)
            template.render(messages, tools)  # looks at all messages, the last one too
            return [(example,) for example in render_examples(messages, tools, template, tokenizer)]
        case Pair(prompt, chosen, rejected, tools):
            for messages in (chosen, rejected):
                _check_reasoning(template, messages)
                template.render([*prompt, *messages], tools)
            chosen, rejected = render_pair(prompt, chosen, rejected, tools, template, tokenizer)
            if chosen.tokens == rejected.tokens:
                raise UserError("chosen and rejected are the same once the chat template has rendered them")
            return [(chosen, rejected)]


def _check_reasoning(template: ChatTemplate, messages: Sequence[dict[str, Any]]) -> None:
    if template.mentions("<think>"):
        return
    for index, message in enumerate(messages):
        if message.get("reasoning_content"):
            raise UserError(
                f"messages[{index}] has reasoning_content, and this model's chat template knows no reasoning; remove it"
            )


def _tokenise_file(path: epath.Path, form: str, model: epath.Path, vocab_size: int, target: pathlib.Path) -> None:
    """Write the tokens of a file into a new directory."""
    chunks = list(_tokenise_chunks(path, form, model))
    target.mkdir()
    numbers = np.array([number for chunk in chunks for number in chunk.numbers], np.int64)
    np.save(target / "numbers.npy", numbers)
    filled = [chunk for chunk in chunks if chunk.numbers]
    for side in range(1 + FORMATS[form].is_pair):
        parts = zip(*(chunk.sides[side] for chunk in filled), strict=True) if filled else [[], [], []]
        dtypes = (np.uint16 if vocab_size <= 1 << 16 else np.uint32, np.int64, bool)
        for name, arrays, dtype in zip(("tokens", "lengths", "learnt"), parts, dtypes, strict=True):
            if name != "learnt" or form != "text":
                np.save(target / f"{side}.{name}.npy", np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype))
    facts = {
        "lines": sum(1 for _ in _lines(path)),
        "bad": [bad for chunk in chunks for bad in chunk.bad],
        "unused": sum((chunk.unused for chunk in chunks), Counter()),
    }
    (target / "facts.json").write_text(json.dumps(facts))


def _tokenise_chunks(path: epath.Path, form: str, model: epath.Path) -> Iterator[_Chunk]:
    work = functools.partial(_tokenise, model, form)
    chunks = ((i * _CHUNK + 1, lines) for i, lines in enumerate(itertools.batched(_lines(path), _CHUNK)))
    few = list(itertools.islice(chunks, _FEW // _CHUNK))
    yield from itertools.starmap(work, few)
    rest = next(chunks, None)
    if rest is None:
        return
    workers = os.cpu_count() or 1
    # Not forked: JAX's threads may hold locks, which would stay held in the children.
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(workers, context) as pool,
        tqdm(desc=f"tokenise {path.name}", initial=_CHUNK * len(few), unit="line", delay=1) as bar,
    ):
        for some in itertools.batched(itertools.chain([rest], chunks), 8 * workers):
            for chunk, (_, lines) in zip(pool.map(work, *zip(*some, strict=True)), some, strict=True):
                bar.update(len(lines))
                yield chunk


def _load(kept: pathlib.Path, form: str) -> Tokenised:
    facts = json.loads((kept / "facts.json").read_text())
    numbers = np.load(kept / "numbers.npy")
    mode = "r" if len(numbers) else None  # what is empty can't be mapped
    sides = []
    for side in range(1 + FORMATS[form].is_pair):
        lengths = np.load(kept / f"{side}.lengths.npy")
        tokens = np.load(kept / f"{side}.tokens.npy", mode)
        learnt = None if form == "text" else np.load(kept / f"{side}.learnt.npy", mode)
        sides.append(Documents(tokens, np.cumsum(lengths) - lengths, lengths, learnt))
    bad = [BadLine(*bad) for bad in facts["bad"]]
    return Tokenised(form, facts["lines"], tuple(sides), numbers, bad, facts["unused"])
