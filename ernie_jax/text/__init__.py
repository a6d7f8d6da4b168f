"""Text in and out: tokenizer, streaming detokeniser, stop strings, chat templates and what answers consist of."""

from ernie_jax.text.chat import ChatTemplate
from ernie_jax.text.stop import StopStringMatcher
from ernie_jax.text.stream import TextStream
from ernie_jax.text.tokenizer import IncrementalDetokenizer, Tokenizer, check_vocabulary

__all__ = ["ChatTemplate", "IncrementalDetokenizer", "StopStringMatcher", "TextStream", "Tokenizer", "check_vocabulary"]
