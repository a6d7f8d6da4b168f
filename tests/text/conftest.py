"""A little tokenizer of each file format, trained when the tests start."""

import io
import json
import types

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, processors

from ernie_jax.text import Tokenizer

# The special tokens of the family, as far as their kind is known: control pieces of the SentencePiece model,
# user-defined pieces, and tokens added behind it.
CONTROL = ["<|end_of_sentence|>", "<|begin_of_sentence|>"] + [f"<mask:{i}>" for i in range(8)]
USER_DEFINED = [*"0123456789", "<think>", "</think>", "<tool_call>", "</tool_call>", "<response>", "</response>"]
ADDED = ["<|LOC_1|>", "<|LOC_10|>", "<|LOC_BEGIN|>", "<|im_start|>", "<|im_end|>"]
NAMED = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<unk>",
    "unk_token": "<unk>",
    "cls_token": "<|begin_of_sentence|>",
    "sep_token": "<|end_of_sentence|>",
    "mask_token": "<mask:1>",
    "sys_start_token": "<mask:4>",
}
CORPUS = """The ship went down the river in the morning, and the people on the bank waved to it.
Nobody knew how old the bridge was; it had 12 arches in 1604 and 9 of them stood in 1987.
    indented lines  keep   their spaces\tand tabs
She asked: “is it far?” — not far, he said, and they walked on until the evening.
def area(width, height): return width * height
早上船顺着河往下走，岸上的人向它挥手。桥有多老，没有人知道。
他们一直走到晚上，天上有月亮，也有星星。春天来了，花开了。
今天是2024年5月17日，天气很好。"""


def train(**options) -> bytes:
    """Return the bytes of a small SentencePiece model: BPE, byte fallback, every digit a piece of its own."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines() * 5),
        model_writer=model,
        model_type="bpe",
        vocab_size=640,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=0.99,
        allow_whitespace_only_pieces=True,
        control_symbols=CONTROL,
        user_defined_symbols=USER_DEFINED,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def converted(model: bytes) -> tokenizers.Tokenizer:
    """Build the tokenizer.json of a SentencePiece BPE model, in the way of transformers' Llama converter."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    names = processor.id_to_piece(list(range(processor.get_piece_size())))
    ids = {name: index for index, name in enumerate(names)}
    merges = [
        (name[:cut], name[cut:])
        for name in names
        if len(name) > 1 and not name.startswith("<0x")
        for cut in range(1, len(name))
        if name[:cut] in ids and name[cut:] in ids
    ]
    result = tokenizers.Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    result.normalizer = normalizers.Replace(" ", "▁")
    result.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    result.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in USER_DEFINED])
    result.add_special_tokens(["<s>", "</s>", *CONTROL])
    result.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in ADDED[:3]])
    result.add_special_tokens(ADDED[3:])
    result.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", ids["<s>"])])
    return result


@pytest.fixture(scope="session")
def little() -> types.SimpleNamespace:
    """Give what the tokenizers were made of, and `train` to make others."""
    return types.SimpleNamespace(control=CONTROL, user_defined=USER_DEFINED, added=ADDED, corpus=CORPUS, train=train)


@pytest.fixture(scope="session")
def model() -> bytes:
    """Give a model like ERNIE 4.5's: text is taken as it is, nothing is put before it."""
    return train(add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity")


@pytest.fixture(scope="session")
def processor(model) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.fixture(scope="session")
def directories(model, processor, tmp_path_factory) -> dict:
    """Give a directory with tokenizer.model and one with tokenizer.json, of the same tokenizer."""
    result = {kind: tmp_path_factory.mktemp(kind) for kind in ("sentencepiece", "tokenizers")}
    size = processor.get_piece_size()
    (result["sentencepiece"] / "tokenizer.model").write_bytes(model)
    added = {str(size + i): {"content": name, "special": i > 2} for i, name in enumerate(ADDED)}
    config = NAMED | {"add_bos_token": False, "additional_special_tokens": None}
    (result["sentencepiece"] / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": added}))
    converted(model).save(str(result["tokenizers"] / "tokenizer.json"))
    (result["tokenizers"] / "tokenizer_config.json").write_text(json.dumps(config))
    return result


@pytest.fixture(scope="session", params=["sentencepiece", "tokenizers"])
def tokenizer(request, directories) -> Tokenizer:
    return Tokenizer.load(directories[request.param])
