import random

import pytest

from ernie_jax.errors import UserError
from ernie_jax.text import StopStringMatcher


def run(stop_strings, pieces) -> tuple[str, bool]:
    """Return all text that comes out of a matcher, and whether it stopped."""
    matcher = StopStringMatcher(stop_strings)
    text = "".join(matcher.feed(piece)[0] for piece in pieces)
    return text + matcher.flush(), matcher.stopped


def first_stop(stop_strings, text) -> tuple[str, bool]:
    """Find the stop string that is complete first by looking at every prefix of the text."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stop_strings if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


def test_any_cut_of_any_text():
    rng = random.Random()
    for _ in range(3000):
        stop_strings = ["".join(rng.choices("ab。", k=rng.randint(1, 5))) for _ in range(rng.randint(0, 3))]
        text = "".join(rng.choices("ab。c", k=rng.randrange(25)))
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(8)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert run(stop_strings, pieces) == first_stop(stop_strings, text), (stop_strings, pieces)


def test_holds_back_no_more_than_it_must():
    matcher = StopStringMatcher(["\nUser:", "###"])
    assert matcher.feed("one\n") == ("one", False)
    assert matcher.feed("Us") == ("", False)
    assert matcher.feed("ually #") == ("\nUsually ", False)
    assert matcher.feed("# two") == ("## two", False)
    assert matcher.feed("\nUser: three") == ("", True)
    assert matcher.feed("four") == ("", True)
    assert matcher.flush() == ""


def test_longer_of_two_that_end_together():
    assert run(["b", "ab"], ["xa", "b"]) == ("x", True)


def test_flush_gives_what_was_held_back():
    assert run(["###"], ["a#", "#"]) == ("a##", False)


def test_empty_stop_string():
    with pytest.raises(UserError, match="must not be empty"):
        StopStringMatcher(["a", ""])
