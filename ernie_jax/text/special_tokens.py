"""The tokens that a checkpoint's small JSON files declare beside its vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from etils import epath

from ernie_jax.config import read_json
from ernie_jax.errors import UserError

# Later files win, as in transformers.
DECLARING_FILES = ("tokenizer.json", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")
_LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclasses.dataclass(frozen=True)
class DeclaredTokens:
    """Hold what the JSON files of a checkpoint say about tokens.

    Attributes:
      added: id -> text of the tokens added to the vocabulary.
      named: role -> text, such as {"cls_token": "<|begin_of_sentence|>"}; what chat templates see as variables.
      special: texts that decoding can leave out, wherever the vocabulary has them.
    """

    added: dict[int, str]
    named: dict[str, str]
    special: frozenset[str]

    @classmethod
    def read(cls, directory: epath.Path) -> DeclaredTokens:
        """Collect the declarations of every file that exists.

        Raises:
          UserError: if a file is not JSON, or declares a token in a form that no checkpoint uses.
        """
        added: dict[int, str] = {}
        flags: dict[str, bool] = {}
        named: dict[str, str] = {}
        listed: set[str] = set()
        for name in DECLARING_FILES:
            path = directory / name
            if not path.exists():
                continue
            fields = read_json(path)
            try:
                if name == "added_tokens.json":
                    added.update({int(index): text for text, index in fields.items()})
                for index, token in _flagged(fields):
                    added[index] = _text(token)
                    flags[added[index]] = bool(token.get("special"))
                if name in ("special_tokens_map.json", "tokenizer_config.json"):
                    named.update({k: _text(v) for k, v in fields.items() if k.endswith("_token") and _declares(v)})
                    listed.update(text for key in _LISTS for text in _texts(fields.get(key)))
            except (TypeError, ValueError, KeyError, AttributeError) as error:
                raise UserError(f"{path}: malformed token declaration ({error!r})") from None
        # transformers 5 lists even the digits as special, and yet shows them: a token's own flag counts for more.
        listed = {text for text in listed if flags.get(text, True)}
        return cls(added, named, frozenset(listed | {*named.values()} | {text for text, flag in flags.items() if flag}))


def _flagged(fields: dict) -> Iterator[tuple[int, dict]]:
    """Give the (id, token) pairs of tokenizer.json and of tokenizer_config.json."""
    for token in fields.get("added_tokens") or ():
        yield int(token["id"]), token
    for index, token in (fields.get("added_tokens_decoder") or {}).items():
        yield int(index), token


def _declares(value: object) -> bool:
    """Tell a token from a switch such as add_bos_token, which ends in "_token" too, or from null."""
    return isinstance(value, (str, dict))


def _text(token: str | dict) -> str:
    """Return the text of a token written plainly or as an object with its attributes."""
    text = token if isinstance(token, str) else token["content"]
    if not isinstance(text, str) or not text:
        raise ValueError(f"a token must be a non-empty string, found {text!r}")
    return text


def _texts(tokens: list | dict | None) -> list[str]:
    """Return the texts of a list of tokens, which newer files write as an object of role -> token."""
    return [_text(token) for token in (tokens.values() if isinstance(tokens, dict) else tokens or ())]
