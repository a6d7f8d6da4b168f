"""The two vocabulary formats, SentencePiece's tokenizer.model and tokenizers' tokenizer.json, brought to one shape."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Mapping

import sentencepiece
import tokenizers

from ernie_jax.errors import UserError
from ernie_jax.text.special_tokens import DeclaredTokens

SPACE = "▁"  # how both formats write a space inside a piece
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Hold one tokenizer in the form that encoding and decoding need.

    Attributes:
      encode: text -> ids; recognises special tokens written in the text and adds none.
      ids: piece or token text -> id.
      pieces: id -> the UTF-8 bytes it decodes to; a byte piece is one byte, which alone may be invalid UTF-8.
      special: ids that decoding can skip.
      leading_spaces: how many spaces at the very start decoding drops, because encoding would have put them there
        (SentencePiece's add_dummy_prefix: one) or would have removed them (remove_extra_whitespaces: all).
    """

    encode: Callable[[str], list[int]]
    ids: Mapping[str, int]
    pieces: Mapping[int, bytes]
    special: frozenset[int]
    leading_spaces: int


def from_sentencepiece(model: bytes, declared: DeclaredTokens, source: str) -> Vocabulary:
    """Build a Vocabulary from the bytes of a tokenizer.model.

    The model's own normaliser runs on every stretch of text between special tokens, as in the original
    Ernie4_5_Tokenizer class.

    Raises:
      UserError: if the bytes are no SentencePiece model.
    """
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        names = processor.id_to_piece(list(range(processor.get_piece_size())))
    except RuntimeError:
        names = []
    if not names:
        raise UserError(f"{source}: not a SentencePiece model (a Git LFS pointer or a broken download?)")

    ids = {name: index for index, name in enumerate(names)}
    pieces = {index: _piece_bytes(name, processor.is_byte(index)) for index, name in enumerate(names)}
    # SentencePiece never finds its own control pieces in text, and knows nothing of tokens added behind it.
    apart = {name: i for i, name in enumerate(names) if processor.is_control(i) or processor.is_unknown(i)}
    special = set(apart.values())
    for index, text in declared.added.items():
        if ids.get(text) != index:
            ids[text] = apart[text] = index
        pieces[index] = text.encode()
    for text in declared.special & ids.keys():
        apart[text] = ids[text]
        special.add(ids[text])

    def encode(text: str) -> list[int]:
        result = []
        for position, part in enumerate(splitter.split(text)):
            if position % 2:
                result.append(apart[part])
            elif part:
                result.extend(processor.encode(part))
        return result

    longest_first = sorted(apart, key=len, reverse=True)
    splitter = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
    return Vocabulary(encode, ids, pieces, frozenset(special), _leading_spaces(processor, ids.get(SPACE)))


def from_tokenizers(text: str, declared: DeclaredTokens, source: str) -> Vocabulary:
    """Build a Vocabulary from the text of a tokenizer.json.

    Raises:
      UserError: if the file is broken, or decodes in another way than ERNIE 4.5's tokenizers.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more specific
        raise UserError(f"{source}: not a tokenizer of the `tokenizers` library ({error})") from None
    layout = json.loads(text)
    leading_spaces = _check_decoder(layout.get("decoder"), source)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = tokenizer.get_vocab(with_added_tokens=True)
    special = {name: ids[name] for name in (*declared.special, layout["model"].get("unk_token")) if name in ids}
    tokenizer.add_special_tokens(list(special))
    added = tokenizer.get_added_tokens_decoder()
    pieces = {
        index: name.encode() if index in added else _piece_bytes(name, bool(_BYTE_PIECE.fullmatch(name)))
        for name, index in ids.items()
    }

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    return Vocabulary(encode, ids, pieces, frozenset(special.values()), leading_spaces)


def _piece_bytes(name: str, is_byte: bool) -> bytes:
    """Return the bytes that a piece of the vocabulary stands for."""
    return bytes.fromhex(_BYTE_PIECE.fullmatch(name)[1]) if is_byte else name.replace(SPACE, " ").encode()


def _leading_spaces(processor: sentencepiece.SentencePieceProcessor, space: int | None) -> int:
    """Find out, by decoding two spaces, how many SentencePiece drops at the start."""
    if space is None:
        return 0
    return {2: 0, 1: 1, 0: sys.maxsize}[len(processor.decode([space, space]))]


def _check_decoder(decoder: dict | None, source: str) -> int:
    """Return how many leading spaces a tokenizer.json's decoder drops, refusing decoders that do anything else."""
    dropped = 0
    for step in (decoder or {}).get("decoders", [decoder]):
        match step:
            case {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}:
                pass
            case {"type": "ByteFallback" | "Fuse"}:
                pass
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
                dropped = start
            case {"type": "Metaspace", "replacement": "▁"}:
                dropped = int(step.get("prepend_scheme", "always") != "never")
            case _:
                kind = step.get("type") if isinstance(step, dict) else step
                raise UserError(f"{source}: decoder {kind!r} is none that an ERNIE 4.5 tokenizer uses")
    return dropped
