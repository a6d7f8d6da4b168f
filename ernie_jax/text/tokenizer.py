"""Tokenizer: text to token ids and back, at once or token by token."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable, Mapping

from etils import epath

from ernie_jax.config import ModelConfig
from ernie_jax.errors import UserError
from ernie_jax.text.special_tokens import DeclaredTokens
from ernie_jax.text.vocabulary import Vocabulary, from_sentencepiece, from_tokenizers

# An answer of any text member of the family ends with one of these, where its vocabulary has them.
STOP_TOKENS = ("</s>", "<|end_of_sentence|>", "<|im_end|>")

# SentencePiece writes one U+FFFD for each byte that belongs to no character; Python's "replace" one for several.
_REPLACE_EACH_BYTE = "ernie_jax.replace_each_byte"
codecs.register_error(_REPLACE_EACH_BYTE, lambda error: ("\ufffd" * (error.end - error.start), error.end))


class Tokenizer:
    """Turn text into token ids and back; special ids are found by name.

    Attributes:
      vocab_size: the first id that no token has; the model's vocab_size is padded beyond it.
      special_tokens: role -> text of the special tokens that have a role, such as {"bos_token": "<s>"}.
    """

    def __init__(self, vocabulary: Vocabulary, special_tokens: Mapping[str, str]):
        self._vocabulary = vocabulary
        self.special_tokens = dict(special_tokens)
        self.vocab_size = max(vocabulary.pieces) + 1

    @classmethod
    def load(cls, directory: str | os.PathLike) -> Tokenizer:
        """Read the tokenizer of a checkpoint directory, local or gs://.

        Where both formats exist, tokenizer.model wins: the models were trained on what SentencePiece makes of text,
        while tokenizer.json is a conversion that keeps the merges and leaves out the model's own normaliser. Tokens
        that only tokenizer.json declares are taken from there all the same.

        Raises:
          UserError: if neither file is there, or one of the tokenizer's files is broken.
        """
        directory = epath.Path(directory)
        model, layout = directory / "tokenizer.model", directory / "tokenizer.json"
        if model.exists():
            declared = DeclaredTokens.read(directory)
            vocabulary = from_sentencepiece(model.read_bytes(), declared, str(model))
        elif layout.exists():
            declared = DeclaredTokens.read(directory)
            vocabulary = from_tokenizers(layout.read_text(encoding="utf-8"), declared, str(layout))
        else:
            raise UserError(f"{directory}: no tokenizer here, neither tokenizer.model nor tokenizer.json")
        return cls(vocabulary, declared.named)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; special tokens written in it are recognised, none is added.

        Raises:
          UserError: if the text has half of a surrogate pair, which no UTF-8 can hold.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text has half of a surrogate pair at character {error.start}; remove it") from None
        return self._vocabulary.encode(text)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Return the text of token ids; bytes that form no character become U+FFFD.

        Raises:
          UserError: if an id is outside of the vocabulary.
        """
        stream = IncrementalDetokenizer(self, skip_special)
        return "".join([stream.push(index) for index in ids]) + stream.flush()

    def token_id(self, name: str) -> int | None:
        """Return the id of the token with this exact text, or None."""
        return self._vocabulary.ids.get(name)

    def is_special(self, index: int) -> bool:
        """Tell whether decoding with skip_special leaves this id out."""
        return index in self._vocabulary.special

    def piece_bytes(self, index: int) -> bytes:
        """Return the bytes that an id decodes to, perhaps only a part of a character; ids between tokens have none.

        Raises:
          UserError: if the id is outside of the vocabulary.
        """
        if not 0 <= index < self.vocab_size:
            raise UserError(f"token id {index} is outside of the tokenizer's vocabulary (0 to {self.vocab_size - 1})")
        return self._vocabulary.pieces.get(index, b"")

    @property
    def leading_spaces(self) -> int:
        """Give the number of spaces at the start of a text that decoding drops; 0 for ERNIE 4.5's own tokenizers."""
        return self._vocabulary.leading_spaces

    def stop_ids(self, *eos: int | Iterable[int] | None) -> frozenset[int]:
        """Return the ids that end an answer: those of STOP_TOKENS and the given ones.

        Args:
          *eos: `eos_token_id` fields of config files: an id, several, or none.
        """
        ids = {self.token_id(name) for name in STOP_TOKENS}
        for value in eos:
            ids.update((value,) if isinstance(value, int) else value or ())
        return frozenset(ids - {None})


class IncrementalDetokenizer:
    """Turn a stream of token ids into text as soon as it is certain.

    All pushes and the flush, joined, equal Tokenizer.decode of all ids; a character whose bytes come in several tokens
    appears with the last of them. Constant time per token.

    Args:
      tokenizer: where the ids come from.
      skip_special: leave special tokens out of the text.
      keep: ids that are text even if special, such as the tags that a parser looks for.
      strip_space: drop one space at the very start, as chat does: the template ends in "Assistant: ", and yet the first
        piece of the answer carries a space of its own.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special: bool = True,
        strip_space: bool = False,
        keep: frozenset[int] = frozenset(),
    ):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._keep = keep
        self._spaces_to_drop = max(tokenizer.leading_spaces, int(strip_space))
        self._utf8 = codecs.getincrementaldecoder("utf-8")(_REPLACE_EACH_BYTE)

    def push(self, index: int) -> str:
        """Take the next token and return the text that has become certain.

        Raises:
          UserError: if the id is outside of the vocabulary.
        """
        if self._skip_special and self._tokenizer.is_special(index) and index not in self._keep:
            return ""
        piece = self._tokenizer.piece_bytes(index)
        if piece and self._spaces_to_drop:
            rest = piece.lstrip(b" ")
            dropped = min(len(piece) - len(rest), self._spaces_to_drop)
            piece = piece[dropped:]
            self._spaces_to_drop = 0 if piece else self._spaces_to_drop - dropped
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """End the stream: return U+FFFD for the bytes of a character that was never finished."""
        return self._utf8.decode(b"", final=True)


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Refuse a tokenizer that has ids the model has no embedding for.

    Raises:
      UserError: naming both sizes.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model's config field vocab_size is "
            f"{config.vocab_size}: the tokenizer files belong to another model"
        )
