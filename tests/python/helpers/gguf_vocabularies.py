"""Small tokenizers, each in its family's Hugging Face form, and the GGUF files that hold their vocabularies."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from bitmodels.checkpoints.gguf import read_gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

BOS, EOS, PAD, USER = "<|begin|>", "<|end|>", "<|pad|>", "<tool call>"

LETTERS_AND_NUMBERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


def words() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def words_and_digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words()])


def falcon() -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            words(),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    )


def tekken() -> Any:
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    start = r"[^\r\n\p{L}\p{N}]?"
    return split(
        rf"{start}{upper}*{lower}+|{start}{upper}+{lower}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def qwen35() -> Any:
    pattern = LETTERS_AND_NUMBERS.replace(r"\p{L}+", r"[\p{L}\p{M}]+") + r"\p{N}"
    return split(pattern + REST.replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"))


@dataclass(frozen=True)
class Family:
    """A family's way to split text; the names are those of tokenizer.ggml.pre."""

    names: tuple[str, ...]
    pre_tokenizer: Callable[[], Any]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


FAMILIES = (
    Family(("gpt-2", "phi-2"), words),
    Family(("mpt", "olmo"), words, nfc=True),
    Family(
        ("llama-bpe", "llama3", "llama-v3"),
        lambda: split(LETTERS_AND_NUMBERS + r"\p{N}{1,3}" + REST),
        ignore_merges=True,
        add_bos=True,
    ),
    Family(("qwen2",), lambda: split(LETTERS_AND_NUMBERS + r"\p{N}" + REST), nfc=True),
    Family(("qwen35",), qwen35, nfc=True),
    Family(("starcoder", "refact", "smollm"), words_and_digits),
    Family(("command-r",), words_and_digits, nfc=True),
    Family(("falcon",), falcon),
    Family(("tekken",), tekken, ignore_merges=True, add_bos=True),
)

BY_NAME = {name: family for family in FAMILIES for name in family.names}

# Each splits differently in at least two families, or is easily lost on the way.
PIECES = (
    *(
        "a",
        "The",
        " the",
        "HELLO",
        "camelCase",
        "don't",
        "DON'T",
        "we'Ve",
        "\u2019s",
        "'s",
        "'\u017f",
        "'",
        "''''",
        "l'été",
    ),
    *("1", "12", "123", "1234567", "3.14", "٣٤٥", "Ⅷ", "½", "²³", "①", "९८७", "1a2b", "0x1F", "007"),
    *(" ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", " \n ", "\u00a0", "\u3000", "\u2028", "\u200b", "\ufeff", "\x85"),
    *("e\u0301", "é", "A\u030a", "\u212b", "ﬁ", "각", "\u1100\u1161", "q\u0323\u0307", "कि", "กำ", "ពិសេស", "\u0301"),
    *("🦙", "😶\u200d🌫️", "👩🏽\u200d💻", "🇰🇷", "漢字", "ひらがな", "Ωμέγα", "нещо", "שלום", "ǅ", "ʰ", "İ", "ß"),
    *("!", "?!", "...", "$5", "a+b", "<=>", "^~|`", "¿", "«»", "—", "_", "#!/", "//", "/\n", "!\n\n", "()", "{}\n"),
    *(";\n//", "!\n//", "#\n/"),
    *("def f(x):\n    return x", "<s>", "<0x41>", "▁", "▁▁", "Ġ", "[PAD7]", "<|", "|>", "\x00", "\x7f", "\U0010ffff"),
)


def texts(count: int, seed: int = 0, *more: str) -> list[str]:
    """Hostile ones: every piece alone, and runs of them, of blanks and of any characters."""
    rng = random.Random(seed)
    found = ["", *PIECES, *more, *(f" {piece}" for piece in PIECES)]
    while len(found) < count:
        pieces = [rng.choice((*PIECES, *more)) for _ in range(rng.randint(1, 8))]
        found.append(rng.choice(("", "", " ")).join(pieces))
        found.append("".join(rng.choice(" \t\n\r\u00a0a1.'") for _ in range(rng.randint(1, 12))))
        numbers = [rng.choice((rng.randrange(0x80), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)))]
        found.append("".join(map(chr, numbers)) * rng.randint(1, 3) + rng.choice(PIECES))
    return found


def corpus() -> list[str]:
    return [" ".join(texts(400, seed)) for seed in range(3)] + texts(1500, 9)


def byte_level(family: Family, size: int = 700) -> dict[str, Any]:
    """The tokenizer.json of a trained one; for `ignore_merges`, with tokens that no merge makes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC() if family.nfc else None
    tokenizer.pre_tokenizer = family.pre_tokenizer()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in (BOS, EOS, PAD)])
    tokenizer.add_tokens([AddedToken(USER, normalized=False)])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if family.add_bos:
        bos = tokenizer.token_to_id(BOS)
        template = processors.TemplateProcessing(f"{BOS} $A", f"{BOS} $A {BOS}:1 $B:1", [(BOS, bos)])
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    content["model"]["ignore_merges"] = family.ignore_merges
    if family.ignore_merges:
        used = {part for pair in content["model"]["merges"] for part in pair}
        last = [pair for pair in content["model"]["merges"] if "".join(pair) not in used]
        content["model"]["merges"] = [pair for pair in content["model"]["merges"] if pair not in last[::2]]
    return content


def sentencepiece(size: int = 700) -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types as SentencePiece's BPE trainer lays them out: specials, bytes, merges, characters."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=size, limit_alphabet=150, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"]
    specials, octets = ["<unk>", "<s>", "</s>"], [f"<0x{octet:02X}>" for octet in range(256)]
    pieces = [token for token in vocabulary if len(token) > 1 and token not in specials + octets]
    pieces += [token for token in vocabulary if len(token) == 1]
    scores = [0.0] * 259 + [float(-rank) for rank in range(len(pieces))]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces)]
    return [*specials, *octets, *pieces], scores, types


def vocabulary_of(content: dict[str, Any]) -> tuple[list[str], list[int], list[str]]:
    """Tokens, types and merges of a tokenizer.json, as a converter writes them."""
    ids = {**content["model"]["vocab"], **{token["content"]: token["id"] for token in content["added_tokens"]}}
    tokens = sorted(ids, key=lambda token: int(ids[token]))
    kinds = {token["content"]: CONTROL if token["special"] else USER_DEFINED for token in content["added_tokens"]}
    merges = [" ".join(pair) for pair in content["model"]["merges"]]
    return tokens, [kinds.get(token, NORMAL) for token in tokens], merges


def metadata_of(path: Path, fill: Callable[[Any], None]) -> dict[str, Any]:
    """What our reader finds in a file that the gguf package has written."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    fill(writer)
    writer.add_tensor("a", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dict(read_gguf(path).metadata)


def byte_level_metadata(path: Path, name: str, content: dict[str, Any], **roles: str) -> dict[str, Any]:
    """`roles`: tokens by "bos", "eos", "pad"."""
    tokens, types, merges = vocabulary_of(content)

    def fill(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
        for role, token in roles.items():
            getattr(writer, f"add_{role}_token_id")(tokens.index(token))

    return metadata_of(path, fill)


def sentencepiece_metadata(path: Path, tokens: list[str], scores: list[float], types: list[int]) -> dict[str, Any]:
    def fill(writer: Any) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(types)

    return metadata_of(path, fill)
