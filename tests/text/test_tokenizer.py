import json
import random
import re

import pytest
import sentencepiece

from ernie_jax.config import ModelConfig
from ernie_jax.errors import UserError
from ernie_jax.text import IncrementalDetokenizer, Tokenizer, check_vocabulary

TEXTS = [
    "The ship went down the river; it had 12 arches.",
    "    indented  桥有多老，没有人知道。",
    "",
    " ",
    "  two spaces before, three after   ",
    "line\nline\n\n\ttab\r\n",
    "emoji 😀👩‍🚀 and flags 🇪🇺, rare 龘靐 and ｆｕｌｌ　width",
    "1234567890 x7",
    "a\0b",
    "▁ written",
    "<|not a token|> <s <mask:9> <|LOC_2|>",
]


def mixed_text(rng: random.Random, little) -> str:
    """Return text in which special tokens stand between words without spaces."""
    special = [*little.control, *little.user_defined, *little.added, "<s>", "</s>"]
    words = ["\n", " ", "  ", "😀", "桥", "Ǿ", "the", " ship", "<", "|>", *little.corpus.split(" ")]
    return "".join(rng.choices(special + words, k=rng.randrange(40)))


@pytest.mark.parametrize("text", TEXTS)
def test_encode_is_sentencepiece(tokenizer, processor, text):
    ids = tokenizer.encode(text)
    assert ids == processor.encode(text)
    assert tokenizer.decode(ids) == processor.decode(ids) == text.replace("▁", " ")


def test_both_formats_agree(directories, little):
    first, second = (Tokenizer.load(directory) for directory in directories.values())
    assert first.vocab_size == second.vocab_size
    assert [i for i in range(first.vocab_size) if first.is_special(i)] == [
        i for i in range(second.vocab_size) if second.is_special(i)
    ]
    rng = random.Random()
    for _ in range(300):
        text = mixed_text(rng, little)
        ids = first.encode(text)
        assert ids == second.encode(text), text
        for skip in (True, False):
            assert first.decode(ids, skip) == second.decode(ids, skip), text
        assert first.decode(ids, skip_special=False) == text


def test_sentencepiece_wins_and_takes_added_tokens_from_tokenizer_json(directories, model, little, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model)
    layout = json.loads((directories["tokenizers"] / "tokenizer.json").read_text())
    layout["model"] = {"type": "BPE", "vocab": {"<unk>": 0}, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout))
    tokenizer = Tokenizer.load(tmp_path)
    expected = Tokenizer.load(directories["sentencepiece"])
    for text in (little.corpus, "<|im_start|>user\n<|LOC_10|><|LOC_1|>0"):
        assert tokenizer.encode(text) == expected.encode(text)


def test_added_tokens_json(model, processor, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model)
    size = processor.get_piece_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|LOC_1|>": size, "<|LOC_10|>": size + 2}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab_size == size + 3
    assert tokenizer.encode("<|LOC_10|>a<|LOC_1|>0") == [size + 2, *processor.encode("a"), size, *processor.encode("0")]
    assert tokenizer.decode([size + 2, size + 1]) == "<|LOC_10|>"  # an id between tokens has no text


def test_the_longest_added_token_is_found(model, processor, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model)
    size = processor.get_piece_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<ab": size, "<ab>": size + 1}))
    assert Tokenizer.load(tmp_path).encode("<ab><ab") == [size + 1, size]


def test_special_tokens_are_one_id_and_nothing_is_added(tokenizer, little):
    for name in ["<unk>", "<s>", "</s>", *little.control, *little.user_defined, *little.added]:
        assert tokenizer.encode(name) == [tokenizer.token_id(name)]
    assert tokenizer.token_id("<|nothing|>") is None
    ids = tokenizer.encode("<|begin_of_sentence|>User: hi<|end_of_sentence|>")
    assert tokenizer.decode(ids) == "User: hi"
    assert tokenizer.decode(ids, skip_special=False) == "<|begin_of_sentence|>User: hi<|end_of_sentence|>"
    # Tokens that carry structure for a parser are not special: they stay in the text.
    assert tokenizer.decode(tokenizer.encode("<think>a</think>")) == "<think>a</think>"


def test_special_by_list_and_by_flag(model, processor, directories, tmp_path):
    # As transformers 5 saves it: the list names the digits too, which only tokenizer.json marks as ordinary.
    (tmp_path / "tokenizer_config.json").write_text('{"extra_special_tokens": ["</s>", "0", "1", "<think>"]}')
    (tmp_path / "tokenizer.json").write_text((directories["tokenizers"] / "tokenizer.json").read_text())
    for _ in range(2):
        tokenizer = Tokenizer.load(tmp_path)
        assert tokenizer.decode(tokenizer.encode("10</s><think><|im_end|>")) == "10<think>"
        (tmp_path / "tokenizer.model").write_bytes(model)
    # Without flags the list decides.
    (tmp_path / "tokenizer.json").unlink()
    size = processor.get_piece_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size, "<|LOC_1|>": size + 1}))
    (tmp_path / "special_tokens_map.json").write_text('{"additional_special_tokens": [{"content": "<|im_end|>"}]}')
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("2<think><|im_end|><|LOC_1|>")) == "2<|LOC_1|>"


def test_digits_and_newlines(tokenizer):
    assert tokenizer.encode("2024") == [tokenizer.token_id(digit) for digit in "2024"]
    assert tokenizer.encode("\n\n") == [tokenizer.token_id("<0x0A>")] * 2
    assert tokenizer.piece_bytes(tokenizer.token_id("<0x0A>")) == b"\n"


def test_special_tokens_by_role(tokenizer):
    assert tokenizer.special_tokens["cls_token"] == "<|begin_of_sentence|>"
    assert "add_bos_token" not in tokenizer.special_tokens


def test_stop_ids(tokenizer):
    by_name = {tokenizer.token_id(name) for name in ("</s>", "<|end_of_sentence|>", "<|im_end|>")}
    assert tokenizer.stop_ids() == by_name
    assert tokenizer.stop_ids(2, [7, 8], None) == by_name | {2, 7, 8}


def test_stop_ids_that_the_vocabulary_lacks(model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.stop_ids() == {tokenizer.token_id("</s>"), tokenizer.token_id("<|end_of_sentence|>")}


@pytest.mark.parametrize(
    ("options", "spaces"),
    [({"add_dummy_prefix": True, "remove_extra_whitespaces": False}, 1), ({"add_dummy_prefix": False}, 99)],
)
def test_leading_spaces_follow_the_model(little, tmp_path, options, spaces):
    (tmp_path / "tokenizer.model").write_bytes(little.train(**options))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = Tokenizer.load(tmp_path)
    assert min(tokenizer.leading_spaces, 99) == spaces
    space, ship = processor.piece_to_id("▁"), processor.encode("the ship")
    for ids in ([space] * 3, [space, *ship], [space, space, *ship], ship, [1, space, *ship]):
        assert tokenizer.decode(ids) == processor.decode(ids)
    assert tokenizer.encode("the ship <s>  the") == processor.encode("the ship ") + [1] + processor.encode("  the")


def test_decode_of_random_ids_is_sentencepieces(tokenizer, processor):
    rng = random.Random()
    bytes_ = [processor.piece_to_id(f"<0x{i:02X}>") for i in range(256)]
    for _ in range(300):
        ids = rng.choices([*range(3, processor.get_piece_size()), *bytes_ * 4], k=rng.randrange(30))
        ids = [i for i in ids if not tokenizer.is_special(i)]
        assert tokenizer.decode(ids) == processor.decode(ids), ids


def test_stream_equals_decoding_at_once(tokenizer):
    rng = random.Random()
    first, last = tokenizer.token_id("<0x00>"), tokenizer.token_id("<0xFF>")
    for _ in range(300):
        population = [*range(tokenizer.vocab_size), *range(first, last + 1)] * 2 + tokenizer.encode("😀桥Ǿ") * 40
        ids = rng.choices(population, k=rng.randrange(40))
        skip = rng.random() < 0.5
        stream = IncrementalDetokenizer(tokenizer, skip)
        text = "".join([stream.push(i) for i in ids]) + stream.flush()
        shown = b"".join(tokenizer.piece_bytes(i) for i in ids if not (skip and tokenizer.is_special(i)))
        assert text == re.sub("[\udc80-\udcff]", "\ufffd", shown.decode(errors="surrogateescape")), ids
        assert text == tokenizer.decode(ids, skip)


def test_stream_shows_a_character_with_its_last_byte(tokenizer):
    text = "a😀ß龘\n"
    stream = IncrementalDetokenizer(tokenizer)
    shown = [stream.push(i) for i in tokenizer.encode(text)]
    assert "".join(shown) == text
    assert all(piece in ("", *text) for piece in shown)
    assert len(shown) == 1 + 4 + 2 + 3 + 1
    assert stream.flush() == ""


def test_stream_flushes_an_unfinished_character(tokenizer):
    stream = IncrementalDetokenizer(tokenizer)
    assert [stream.push(i) for i in tokenizer.encode("😀")[:3]] == ["", "", ""]
    assert stream.flush() == "\ufffd" * 3


@pytest.mark.parametrize(("text", "stripped"), [(" I do", "I do"), ("  I", " I"), ("I do", "I do"), (" ", "")])
def test_strip_space_of_an_answer(tokenizer, text, stripped):
    ids = [tokenizer.token_id("</s>"), *tokenizer.encode(text)]
    stream = IncrementalDetokenizer(tokenizer, strip_space=True)
    assert "".join(stream.push(i) for i in ids) + stream.flush() == stripped
    assert tokenizer.decode(ids) == text


def test_ids_outside_of_the_vocabulary(tokenizer):
    for index in (-1, tokenizer.vocab_size):
        with pytest.raises(UserError, match=f"token id {index} is outside"):
            tokenizer.decode([index])


def test_half_of_a_surrogate_pair(tokenizer):
    with pytest.raises(UserError, match="surrogate pair at character 2"):
        tokenizer.encode("ab\ud83d")


def test_settings_of_tokenizer_json_that_would_cut_the_text(directories, little, tmp_path):
    layout = json.loads((directories["tokenizers"] / "tokenizer.json").read_text())
    layout["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode(little.corpus)) == little.corpus


@pytest.mark.parametrize(
    ("decoder", "spaces"),
    [
        ({"type": "Strip", "content": " ", "start": 1, "stop": 0}, 1),
        ({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}, 0),
        ({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}, 1),
    ],
)
def test_decoders_of_tokenizer_json(directories, tmp_path, decoder, spaces):
    layout = json.loads((directories["tokenizers"] / "tokenizer.json").read_text())
    if decoder["type"] == "Strip":
        layout["decoder"]["decoders"].append(decoder)
    else:
        layout["decoder"] = decoder
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("  the ship")) == "  the ship"[spaces:]


def test_foreign_decoder(directories, tmp_path):
    layout = json.loads((directories["tokenizers"] / "tokenizer.json").read_text())
    layout["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout))
    with pytest.raises(UserError, match=r"tokenizer\.json: decoder 'ByteLevel'"):
        Tokenizer.load(tmp_path)


def test_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        Tokenizer.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("content", ["", "version https://git-lfs.github.com/spec/v1\n", "{}"])
def test_broken_tokenizer(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", '{"<|LOC_1|>": "first"}'),
        ("added_tokens.json", "[]"),
        ("special_tokens_map.json", '{"bos_token": {}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"700": "text"'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"700": {"special": true}}}'),
        ("tokenizer_config.json", '{"additional_special_tokens": [null]}'),
    ],
)
def test_broken_declarations(model, tmp_path, name, content):
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        Tokenizer.load(tmp_path)


def test_check_vocabulary(tokenizer):
    def config(vocab_size: int) -> ModelConfig:
        return ModelConfig("ernie4_5", vocab_size, 8, 8, 1, 1, 1, 8)

    check_vocabulary(tokenizer, config(tokenizer.vocab_size))
    with pytest.raises(UserError, match=f"has {tokenizer.vocab_size} tokens.*vocab_size is {tokenizer.vocab_size - 1}"):
        check_vocabulary(tokenizer, config(tokenizer.vocab_size - 1))
