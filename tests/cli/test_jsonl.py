"""JSON lines: reading with errors in place, writing in order, going on after an interruption."""

import json

import pytest

from ernie_jax.cli.jsonl import OrderedWriter, read_objects
from ernie_jax.errors import UserError


def test_bad_lines_become_errors_that_name_them(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"a": 1}\n{oops\n\n[1]\n' + "[" * 100_000 + "\n" + "9" * 10_000 + '\n{"b": "x\u2028y"}')
    first, *bad, last = read_objects(str(path))
    assert (first, last) == ({"a": 1}, {"b": "x\u2028y"})
    assert [str(error).split(":")[0] for error in bad] == [f"line {number}" for number in range(2, 7)]
    assert str(bad[0]).endswith("at column 2)")
    assert all(isinstance(error, UserError) for error in bad)


@pytest.mark.parametrize(("content", "word"), [(None, "No such file"), (b'{"a": "\xff"}', "not UTF-8 at byte 7")])
def test_an_unreadable_file_is_named(tmp_path, content, word):
    path = tmp_path / "in.jsonl"
    if content:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"--input={path}: {word}"):
        read_objects(str(path))


def test_lines_come_in_order_and_the_file_at_the_end(tmp_path):
    path = tmp_path / "out.jsonl"
    with OrderedWriter(str(path), ["job"]) as writer:
        writer.write(2, {"error": "\ud800"})
        writer.write(1, {"text": "李\u2028\x85\n"})
        assert list(writer.lines()) == []
        writer.write(0, {"text": "a"})
        assert not path.exists()
    lines = path.read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [{"text": "a"}, {"text": "李\u2028\x85\n"}, {"error": "\ud800"}]
    assert "李" in lines[1]
    assert writer.errors == 1
    assert list(tmp_path.iterdir()) == [path]


def interrupted(path, fingerprint, *records, tail=b""):
    with pytest.raises(KeyboardInterrupt), OrderedWriter(str(path), fingerprint) as writer:
        for index, record in enumerate(records):
            writer.write(index, record)
        raise KeyboardInterrupt
    for partial in path.parent.iterdir():
        with partial.open("ab") as file:
            file.write(tail)


def test_the_same_work_goes_on_after_the_last_whole_line(tmp_path):
    path = tmp_path / "out.jsonl"
    interrupted(path, ["job"], {"text": "\u2028\x85"}, {"error": "bad"}, tail=b'{"text": "ha')
    assert not path.exists()
    with OrderedWriter(str(path), ["job"]) as writer:
        assert (writer.done, writer.errors) == (2, 1)
        writer.write(2, {"text": "c"})
        assert len(list(writer.lines())) == 3
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert records == [{"text": "\u2028\x85"}, {"error": "bad"}, {"text": "c"}]


def test_other_work_starts_anew(tmp_path):
    path = tmp_path / "out.jsonl"
    interrupted(path, ["job"], {"text": "a"})
    with OrderedWriter(str(path), ["another job"]) as writer:
        assert writer.done == 0


def test_a_failure_before_the_first_line_leaves_nothing(tmp_path):
    interrupted(tmp_path / "out.jsonl", ["job"])
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_output_is_named(tmp_path):
    with pytest.raises(UserError, match="--output=.*: No such file or directory"):
        OrderedWriter(str(tmp_path / "missing" / "out.jsonl"), ["job"])
