"""Prepare the texts and the tokenizer of the embedded model.

    apt-get install bible-kjv opencc        # the King James Bible with its reader; traditional to simplified Chinese
    npm pack chinese-poetry@2.0.1           # the poems
    python scripts/embedded_corpus.py --poems=chinese-poetry-2.0.1.tgz --data=out/embedded-corpus

writes the tokenizer's files to models/ernie-embedded, and to --data for each language the token ids of the training and
of the held-out documents (`english.train.npy`, ...: uint16, each document closed by the end token) and the same texts
to read (`english.train.txt`). Everything is a function of the three packages: running it again changes nothing.
Sources and licences: docs/embedded-model.md.
"""

import argparse
import collections
import hashlib
import io
import json
import pathlib
import re
import subprocess
import sys
import tarfile

import numpy as np
import sentencepiece

POEMS_SHA256 = "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86"
PIECES = 4032  # of the SentencePiece model; with the added tokens 5,057 ids
COMMON = 2560  # Chinese characters with a piece of their own; poems that need another one are left out
HELD_OUT = 32  # one document in so many, by the hash of its text, of the embedded model's

END = 2  # </s>
DIGITS = "0123456789"
ASCII = "".join(c for c in map(chr, range(33, 127)) if c not in DIGITS)
PUNCTUATION = "，。！？；：、《》“”（）…—"
CONTROL = ["<|end_of_sentence|>", "<|begin_of_sentence|>", *(f"<mask:{i}>" for i in range(8))]
# As in the published tokenizers, ids after those of the SentencePiece model, in this order.
ADDED = [
    "<|IMAGE_PLACEHOLDER|>", "<|AUDIO_PLACEHOLDER|>", *(f"<|LOC_{i}|>" for i in range(1001)),
    "<|LOC_BEGIN|>", "<|LOC_END|>", "<|LOC_SEP|>", "<|CROP_COL_SEP|>", "<|CROP_ROW_SEP|>", "<|IMAGE_SEP|>",
    "<|IMAGE_START|>", "<|IMAGE_END|>", "<|VIDEO_START|>", "<|VIDEO_END|>", "<|ASR_START|>", "<|ASR_END|>",
    "<think>", "</think>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>",
    "<response>", "</response>", "<tool_output>", "</tool_output>",
]  # fmt: skip

HAN = "[\u4e00-\u9fff]"
TITLE = re.compile(f"(?:{HAN}| ){{1,16}}")
# Quatrains and eight-line poems of five or seven characters a line.
COUPLET = re.compile("[^，。！？；]+[，。！？；][^，。！？；]*[，。！？；]?")
POEM = re.compile("|".join(f"(?:(?:{HAN}{{{n}}}[，。！？；]){{4}}){{1,2}}" for n in (5, 7)))


def read_bible() -> list[str]:
    """Return the chapters of the King James Bible: a heading, then a line for each verse."""
    text = tool("bible-kjv", ["bible", "-l99999", "Gen1:1-Rev22:21"]).strip()
    chapters = re.split(r"\n+(?=\d? ?[A-Z][A-Za-z ]+ \d+\n\n)", text)
    return [re.sub(r"\n +\d+ ", "\n", chapter) for chapter in chapters]


def read_poems(archive: pathlib.Path) -> tuple[list[str], set[str]]:
    """Return Chinese poems and the characters common among them, in simplified characters.

    A poem is its title, its author, an empty line, and a line for each couplet. The anthology Three Hundred Tang Poems
    is taken whole, the complete Tang and Song collections where they are regular and use common characters only.
    """
    if hashlib.sha256(archive.read_bytes()).hexdigest() != POEMS_SHA256:
        sys.exit(f"{archive}: not chinese-poetry 2.0.1; fetch it with: npm pack chinese-poetry@2.0.1")
    anthology, others = {}, {}  # by text: no poem may be in both parts of the split under different titles
    with tarfile.open(archive) as files:
        members = [m for m in files if re.search(r"/quantangshi/(唐诗三百首|poet\.(tang|song)\.\d+)\.json$", m.name)]
        for member in sorted(members, key=lambda m: ("poet" in m.name, m.name)):
            for poem in json.load(files.extractfile(member)):
                body = "".join(poem["paragraphs"])
                document = "\n".join([poem["title"], poem["author"], "", *re.findall(COUPLET, body)])
                if "poet" not in member.name:
                    anthology.setdefault(body, document)
                elif body not in anthology and TITLE.fullmatch(poem["title"]) and POEM.fullmatch(body):
                    others.setdefault(body, document)
    documents = [*anthology.values(), *others.values()]
    simplified = tool("opencc", ["opencc", "-c", "t2s"], "\f".join(documents)).split("\f")
    counts = collections.Counter(character for poem in simplified for character in set(poem))
    common = {character for character, _ in counts.most_common(COMMON)}
    kept = [p for i, p in enumerate(simplified) if i < len(anthology) or common.issuperset(p)]
    return list(dict.fromkeys(kept)), common


def tool(package: str, command: list[str], text: str | None = None) -> str:
    """Return what a command prints, given `text` on standard input."""
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        sys.exit(f"{command[0]} is missing; install it with: apt-get install {package}")


def is_held_out(document: str, one_in: int) -> bool:
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8]) % one_in == 0


def train_tokenizer(lines: list[str], characters: str, pieces: int) -> bytes:
    """Return a SentencePiece BPE model: merges from the lines, each of the characters a piece of its own.

    Text passes unchanged (identity normaliser, no prefix space); what has no piece, newlines too, becomes bytes.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=pieces,
        required_chars=characters,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        user_defined_symbols=list(DIGITS),
        control_symbols=CONTROL,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


def write_tokenizer(model: bytes, added: list[str], directory: pathlib.Path) -> None:
    """Write the tokenizer in the files of a Hugging Face ERNIE 4.5 repository; added tokens follow the model's."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model)
    named = {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>",
        "cls_token": "<|begin_of_sentence|>", "sep_token": "<|end_of_sentence|>", "mask_token": "<mask:1>",
    }  # fmt: skip
    more = {
        "sys_start_token": "<mask:4>", "sys_end_token": "<mask:5>",
        "header_start_token": "<mask:6>", "header_end_token": "<mask:7>",
    }  # fmt: skip
    settings = {
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": 4096,
        "tokenizer_class": "LlamaTokenizer",
    }
    size = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    write_json(directory / "added_tokens.json", {token: size + i for i, token in enumerate(added)})
    write_json(directory / "special_tokens_map.json", named | {"additional_special_tokens": list(more.values())})
    write_json(directory / "tokenizer_config.json", settings | named | more)


def write_json(path: pathlib.Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--poems", type=pathlib.Path, required=True, help="chinese-poetry-2.0.1.tgz")
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder for the texts and token ids")
    parser.add_argument("--model", type=pathlib.Path, default="models/ernie-embedded", help="folder for the tokenizer")
    parser.add_argument("--held_out", type=int, default=HELD_OUT, help="hold out one document in so many")
    flags = parser.parse_args()

    poems, characters = read_poems(flags.poems)
    languages = {"english": read_bible(), "chinese": poems}
    splits = {
        (language, split): [d for d in documents if is_held_out(d, flags.held_out) == (split == "heldout")]
        for language, documents in languages.items()
        for split in ("train", "heldout")
    }
    lines = [line for chapter in splits["english", "train"] for line in chapter.split("\n") if line]
    chinese = sorted((characters | set(PUNCTUATION)) - {" ", "\n"})
    model = train_tokenizer(lines, "".join(chinese) + ASCII, PIECES)
    write_tokenizer(model, ADDED, flags.model)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    flags.data.mkdir(parents=True, exist_ok=True)
    for (language, split), documents in splits.items():
        ids = [[*tokens, END] for tokens in processor.encode(documents)]
        np.save(flags.data / f"{language}.{split}.npy", np.concatenate(ids).astype(np.uint16))
        (flags.data / f"{language}.{split}.txt").write_text("\n\n\n".join(documents) + "\n")
        print(f"{language} {split}: {len(documents):,} documents, {sum(map(len, ids)):,} tokens")


if __name__ == "__main__":
    main()
