"""The tokenizer of a GGUF file has the ids of the one that the file was made from, or is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from bitcore.exceptions import FileError
from bitmodels.checkpoints.gguf_tokenizer import RULES, tokenizer_files
from gguf_vocabularies import (
    BOS,
    BY_NAME,
    BYTE,
    CONTROL,
    EOS,
    FAMILIES,
    NORMAL,
    PAD,
    UNUSED,
    USER,
    USER_DEFINED,
    Family,
    byte_level,
    byte_level_metadata,
    metadata_of,
    sentencepiece,
    sentencepiece_metadata,
    texts,
    vocabulary_of,
)

MANY = 1 << 20  # Rows of a model that has room for any vocabulary.


@cache
def trained(family: Family) -> str:
    return json.dumps(byte_level(family))


def converted(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_files(metadata, MANY)["tokenizer.json"])


def config_of(metadata: dict[str, Any]) -> dict[str, Any]:
    found = json.loads(tokenizer_files(metadata, MANY)["tokenizer_config.json"])
    assert isinstance(found, dict)
    return found


def assert_same(found: Tokenizer, expected: Tokenizer, count: int = 500) -> None:
    for text in texts(count, 1, BOS, EOS, USER, "<|begin|>x"):
        for special in (False, True):
            encoded = expected.encode(text, add_special_tokens=special)
            again = found.encode(text, add_special_tokens=special)
            assert (again.ids, again.offsets) == (encoded.ids, encoded.offsets), text
        for skip in (False, True):
            assert found.decode(encoded.ids, skip) == expected.decode(encoded.ids, skip), text


# ---- byte-level vocabularies -----------------------------------------------------------------------------------------


def test_every_name_of_the_table_is_tested() -> None:
    assert set(BY_NAME) == set(RULES)


@pytest.mark.parametrize("name", BY_NAME)
def test_byte_level_ids(name: str, tmp_path: Path) -> None:
    content = trained(BY_NAME[name])
    metadata = byte_level_metadata(tmp_path / "a.gguf", name, json.loads(content), bos=BOS, eos=EOS, pad=PAD)
    assert_same(converted(metadata), Tokenizer.from_str(content), 500 if name == BY_NAME[name].names[0] else 200)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.names[0])
def test_the_texts_tell_families_apart(family: Family, tmp_path: Path) -> None:
    content = json.loads(trained(family))
    right = Tokenizer.from_str(trained(family))
    for other in FAMILIES:
        if other is family:
            continue
        wrong = converted(byte_level_metadata(tmp_path / "a.gguf", other.names[0], content))
        assert any(wrong.encode(text, add_special_tokens=False).ids != right.encode(text, add_special_tokens=False).ids
                   for text in texts(500, 1)), other  # fmt: skip


@pytest.mark.parametrize("name", [name for name, family in BY_NAME.items() if not family.nfc])
def test_byte_level_round_trips(name: str, tmp_path: Path) -> None:
    tokenizer = converted(byte_level_metadata(tmp_path / "a.gguf", name, json.loads(trained(BY_NAME[name]))))
    for text in texts(300, 2):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("before", [None, False, True])
@pytest.mark.parametrize("after", [None, False, True])
@pytest.mark.parametrize("name", ["qwen2", "llama-bpe"])
def test_tokens_around_a_text(name: str, before: bool | None, after: bool | None, tmp_path: Path) -> None:
    content = json.loads(trained(BY_NAME[name]))
    metadata = byte_level_metadata(tmp_path / "a.gguf", name, content, bos=BOS, eos=EOS)
    flags = {"add_bos_token": before, "add_eos_token": after}
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in flags.items() if value is not None}
    tokenizer = converted(metadata)
    bos = [BOS] if before or (before is None and name == "llama-bpe") else []
    eos = [EOS] if after else []
    assert tokenizer.encode("a").tokens == [*bos, "a", *eos]
    assert tokenizer.encode("a", "1").tokens == [*bos, "a", *eos, *bos, "1", *eos]
    assert tokenizer.encode("a", "1").type_ids == [0] * (1 + len(bos + eos)) + [1] * (1 + len(bos + eos))


def test_no_bos_token_by_default_if_the_file_names_none(tmp_path: Path) -> None:
    content = json.loads(trained(BY_NAME["llama-bpe"]))
    metadata = byte_level_metadata(tmp_path / "a.gguf", "llama-bpe", content)
    assert converted(metadata).encode("a").tokens == ["a"]
    with pytest.raises(FileError, match="add_bos_token is true, and tokenizer.ggml.bos_token_id is missing"):
        tokenizer_files({**metadata, "tokenizer.ggml.add_bos_token": True}, MANY)


def test_padding_at_the_end_is_left_out(tmp_path: Path) -> None:
    metadata = byte_level_metadata(tmp_path / "a.gguf", "qwen2", json.loads(trained(BY_NAME["qwen2"])))
    count = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += [f"[PAD{count}]", f"[PAD{count}0]", "", f"[PAD{count + 3}]", ""]
    metadata["tokenizer.ggml.token_type"] += [UNUSED, USER_DEFINED, NORMAL, USER_DEFINED, NORMAL]
    tokenizer = converted(metadata)
    assert [tokenizer.id_to_token(count + index) for index in range(5)] == [None, f"[PAD{count}0]", None, None, None]
    assert count not in tokenizer.encode(f"[PAD{count}]").ids
    metadata["tokenizer.ggml.padding_token_id"] = count
    assert converted(metadata).token_to_id(f"[PAD{count}]") == count


def test_tokens_with_spaces(tmp_path: Path) -> None:
    """User-defined runs of blanks, as GPT-NeoX has, and a merge whose first token begins with one."""
    content = json.loads(trained(BY_NAME["mpt"]))
    metadata = byte_level_metadata(tmp_path / "a.gguf", "mpt", content)
    count = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += ["   ", "  ", " x", " xa"]
    metadata["tokenizer.ggml.token_type"] += [USER_DEFINED, USER_DEFINED, NORMAL, NORMAL]
    metadata["tokenizer.ggml.merges"] += [" x a"]
    files = tokenizer_files(metadata, MANY)
    tokenizer = Tokenizer.from_str(files["tokenizer.json"])
    assert tokenizer.encode("     a").ids == [count, count + 1, tokenizer.token_to_id("a")]
    assert json.loads(files["tokenizer.json"])["model"]["merges"][-1] == [" x", "a"]


# ---- vocabularies of SentencePiece -----------------------------------------------------------------------------------


def slow_ids(text: str, tokens: list[str], scores: list[float], prefix: bool = True) -> list[int]:
    """SentencePiece's BPE: the two neighbours that make the best token become one, until there are none."""
    ids = {token: index for index, token in enumerate(tokens)}
    normal = {token: index for token, index in ids.items() if index >= 259}
    symbols = list((("▁" if prefix else "") + text if text else "").replace(" ", "▁"))
    while True:
        pairs = enumerate(pairwise(symbols))
        best = min(((-scores[normal[a + b]], index) for index, (a, b) in pairs if a + b in normal), default=None)
        if best is None:
            break
        symbols[best[1] : best[1] + 2] = [symbols[best[1]] + symbols[best[1] + 1]]
    found: list[int] = []
    for symbol in symbols:
        found += [ids[symbol]] if symbol in ids else [ids[f"<0x{octet:02X}>"] for octet in symbol.encode()]
    return found


@cache
def pieces() -> tuple[list[str], list[float], list[int]]:
    return sentencepiece()


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids(prefix: bool, tmp_path: Path) -> None:
    tokens, scores, types = pieces()
    metadata = sentencepiece_metadata(tmp_path / "a.gguf", tokens, scores, types)
    if not prefix:
        metadata["tokenizer.ggml.add_space_prefix"] = False
    tokenizer = converted(metadata)
    for text in texts(600, 3):
        if "<s>" in text:
            continue
        found = tokenizer.encode(text, add_special_tokens=False).ids
        assert found == slow_ids(text, tokens, scores, prefix), text
        assert tokenizer.decode(found, skip_special_tokens=False) == text.replace("▁", " ")
    assert tokenizer.encode("a").ids[0] == 1


def test_specials_of_sentencepiece(tmp_path: Path) -> None:
    tokens, scores, types = pieces()
    tokens, scores, types = [*tokens, "<|x|>", "a b"], [*scores, -1e4, -1e4], [*types, CONTROL, USER_DEFINED]
    metadata = sentencepiece_metadata(tmp_path / "a.gguf", tokens, scores, types)
    metadata |= {"tokenizer.ggml.eos_token_id": len(tokens) - 2, "tokenizer.ggml.add_eos_token": True}
    tokenizer = converted(metadata)
    ids = tokenizer.encode("<s>a<|x|> a b<unk>").ids
    inner = [slow_ids(text, tokens, scores) for text in ("a", " ")]
    assert ids == [1, 1, *inner[0], len(tokens) - 2, *inner[1], len(tokens) - 1, 0, len(tokens) - 2]
    names = {"bos_token": "<s>", "eos_token": "<|x|>", "unk_token": "<unk>"}
    assert names.items() <= config_of(metadata).items()
    assert tokenizer.decode(ids) == "a  a b"


def test_which_tokens_are_added(tmp_path: Path) -> None:
    """Of unknown ones the named alone; a user-defined one that is named is special, as transformers makes it."""
    tokens, scores, types = pieces()
    tokens, scores, types = [*tokens, "<|x|>", "<|y|>", "<|z|>"], [*scores, -1e4, -1e4, -1e4], [*types, 4, 4, 2]
    metadata = sentencepiece_metadata(tmp_path / "a.gguf", tokens, scores, types)
    metadata["tokenizer.ggml.eos_token_id"] = len(tokens) - 3
    added = json.loads(tokenizer_files(metadata, MANY)["tokenizer.json"])["added_tokens"]
    found = [(token["content"], token["special"]) for token in added]
    assert found == [("<unk>", True), ("<s>", True), ("</s>", True), ("<|x|>", True), ("<|y|>", False)]


def test_unknown_characters_without_byte_tokens_are_one_unknown_token(tmp_path: Path) -> None:
    metadata = sentencepiece_metadata(
        tmp_path / "a.gguf", ["<unk>", "<s>", "</s>", "▁", "a"], [0.0] * 5, [2, 3, 3, 1, 1]
    )
    assert converted(metadata).encode("aéüa").tokens == ["<s>", "▁", "a", "<unk>", "a"]


def test_default_ids_name_no_normal_tokens(tmp_path: Path) -> None:
    metadata = sentencepiece_metadata(tmp_path / "a.gguf", ["a", "b", "▁"], [0.0] * 3, [NORMAL] * 3)
    assert converted(metadata).encode("ab").tokens == ["▁", "a", "b"]
    assert not [key for key in config_of(metadata) if key.endswith("_token")]


def test_without_token_types_the_named_tokens_are_special(tmp_path: Path) -> None:
    tokens, scores, types = pieces()
    metadata = sentencepiece_metadata(tmp_path / "a.gguf", tokens, scores, types)
    del metadata["tokenizer.ggml.token_type"]
    tokenizer = converted(metadata)
    assert tokenizer.encode("<s>a</s>").ids == [1, 1, *slow_ids("a", tokens, scores), 2]


# ---- the other files -------------------------------------------------------------------------------------------------


def test_the_config(tmp_path: Path) -> None:
    content = json.loads(trained(BY_NAME["qwen2"]))
    metadata = byte_level_metadata(tmp_path / "a.gguf", "qwen2", content, bos="a", eos=EOS, pad=PAD)
    assert set(tokenizer_files(metadata, MANY)) == {"tokenizer.json", "tokenizer_config.json"}
    assert config_of(metadata) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,  # And no BOS token: that id names a letter.
        "pad_token": PAD,
        "model_max_length": 4096,
    }
    del metadata["llama.context_length"]
    assert "model_max_length" not in config_of(metadata)


def test_the_chat_template(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}é"
    content = json.loads(trained(BY_NAME["qwen2"]))
    tokens, _, merges = vocabulary_of(content)

    def fill(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(tokens)
        writer.add_token_merges(merges)
        writer.add_chat_template([{"name": "default", "template": template}, {"name": "rag", "template": "x"}])

    files = tokenizer_files(metadata_of(tmp_path / "a.gguf", fill), MANY)
    assert files["chat_template.jinja"] == template
    assert len(files) == 3


def test_large_vocabularies_are_quick() -> None:
    tokens = [f"{chr(0x4E00 + index % 20000)}{index}" for index in range(75_000)]
    letters = [chr(0x21 + index) for index in range(94)]
    doubled = [a + b + c for a in letters for b in letters for c in letters[:8]]
    pairs = [a + b for a in letters for b in letters]
    merges = [f"{a[0]} {a[1]}" for a in pairs] + [f"{token[:2]} {token[2]}" for token in doubled]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*letters, *pairs, *doubled, *tokens],
        "tokenizer.ggml.merges": merges,
    }
    begin = time.perf_counter()
    tokenizer_files(metadata, MANY)
    assert time.perf_counter() - begin < 5


def test_importing_it_imports_no_tokenizer_package() -> None:
    code = "import sys, bitmodels.checkpoints.gguf_tokenizer; print('tokenizers' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={
        "PYTHONPATH": str(Path(tokenizer_files.__code__.co_filename).parents[2])
    })  # fmt: skip
    assert answer.stdout.strip() == "False"


# ---- errors ----------------------------------------------------------------------------------------------------------

BYTES: dict[str, Any] = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "merges": ["a b"]}
PIECES: dict[str, Any] = {"model": "llama", "tokens": ["<unk>", "<s>", "</s>", "a", "aa"], "scores": [0.0] * 5}
SCORES: dict[str, Any] = {**PIECES, "tokens": ["<unk>", "<s>", "</s>", "a", "b", "ab", "ba"], "scores": [-1.0] * 7}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "model is None, known are 'gpt2' and 'llama': give the tokenizer's directory with --tokenizer"),
        ({**BYTES, "model": "bert"}, "model is 'bert', known are"),
        ({**BYTES, "model": "rwkv\n"}, r"model is 'rwkv\\n', known are"),
        ({**BYTES, "model": ["gpt2"]}, r"model is \['gpt2'\], known are"),
        ({**BYTES, "model": "x" * 1000}, r"model is 'x{76}\.\.\., known are"),
        ({**BYTES, "pre": "falcon3"}, "pre is 'falcon3', known are command-r, .*: give the tokenizer's directory"),
        ({**BYTES, "pre": None}, "pre is missing, known are .*tekken: give"),
        ({**BYTES, "pre": 3}, "pre is 3, known are"),
        ({**BYTES, "tokens": None}, "tokens is missing"),
        ({**BYTES, "tokens": "ab"}, "tokens is no list of strings"),
        ({**BYTES, "tokens": ["a", 3]}, "tokens is no list of strings"),
        ({**BYTES, "tokens": ["a", "b", "ab", "b"]}, "tokens has 'b' twice, as 1 and 3"),
        ({**BYTES, "tokens": ["a", "b", "\n", "\n"]}, r"tokens has '\\n' twice, as 2 and 3"),
        ({**BYTES, "tokens": ["a", "é", "b\udcff"]}, r"tokens\[2\] is no UTF-8: 'b\\udcff'"),
        ({**PIECES, "tokens": ["a", "\udcff"]}, r"tokens\[1\] is no UTF-8"),
        ({**BYTES, "tokens": list(map(str, range(1101)))}, "1,101 tokens, and the model has 1,000 rows"),
        ({**BYTES, "merges": None}, "merges is missing"),
        ({**BYTES, "merges": [["a", "b"]]}, "merges is no list of strings"),
        ({**BYTES, "merges": ["a b", "ab"]}, r"merges\[1\] is 'ab', expected two tokens with a space between"),
        ({**BYTES, "merges": ["a "]}, r"merges\[0\] is 'a ', expected two"),
        ({**BYTES, "merges": [""]}, r"merges\[0\] is '', expected two"),
        ({**BYTES, "merges": ["a c"]}, r"merges\[0\] needs 'c', which is no token"),
        ({**BYTES, "merges": ["c\n a"]}, r"merges\[0\] needs 'c\\n', which"),
        ({**BYTES, "merges": ["b a"]}, r"merges\[0\] needs 'ba', which"),
        ({**BYTES, "token_type": [1, 1]}, "token_type has 2 entries, and there are 3 tokens"),
        ({**BYTES, "token_type": [1, 1, "3"]}, "token_type is no list of numbers"),
        ({**BYTES, "token_type": 1}, "token_type is no list of numbers"),
        ({**BYTES, "bos_token_id": 3}, "bos_token_id is 3, and there are 3 tokens"),
        ({**BYTES, "eos_token_id": -1}, "eos_token_id is -1, and there are 3 tokens"),
        ({**BYTES, "unknown_token_id": "a"}, "unknown_token_id is 'a', and there are 3 tokens"),
        ({**BYTES, "padding_token_id": True}, "padding_token_id is True, and there are 3 tokens"),
        ({**BYTES, "tokens": ["a", "b", "ab", ""], "bos_token_id": 3}, "bos_token_id is 3, a token without text"),
        ({**BYTES, "add_bos_token": 1}, "add_bos_token is 1, expected true or false"),
        ({**BYTES, "add_eos_token": True}, "add_eos_token is true, and tokenizer.ggml.eos_token_id is missing"),
        ({**PIECES, "scores": None}, "scores is missing"),
        ({**PIECES, "scores": [0.0]}, "scores has 1 entries, and there are 5 tokens"),
        ({**PIECES, "scores": [0.0, 0.0, 0.0, 0.0, float("nan")]}, "scores has an entry that is NaN or infinite"),
        ({**PIECES, "add_space_prefix": "yes"}, "add_space_prefix is 'yes', expected true or false"),
        (SCORES, "scores are all -1, and the order of merges is not known: give the tokenizer's directory"),
        ({**BYTES, "/tokenizer.chat_template": 3}, "chat_template is 3, expected a string"),
        ({**BYTES, "/tokenizer.chat_template": "\udcff"}, "chat_template is no UTF-8"),
    ],
)
def test_errors(fields: dict[str, Any], message: str) -> None:
    metadata = {
        key[1:] if key[0] == "/" else f"tokenizer.ggml.{key}": value
        for key, value in fields.items()
        if value is not None
    }
    with pytest.raises(FileError, match=message) as error:
        tokenizer_files(metadata, 1000)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300


def test_as_many_tokens_as_rows_fit() -> None:
    metadata = {f"tokenizer.ggml.{key}": value for key, value in BYTES.items()}
    assert tokenizer_files(metadata, 3) == tokenizer_files(metadata, 4)
    with pytest.raises(FileError, match="3 tokens, and the model has 2 rows"):
        tokenizer_files(metadata, 2)


def test_bytes_that_are_no_text_come_from_a_file(tmp_path: Path) -> None:
    def fill(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list([b"a", b"\xff\xfe"])
        writer.add_token_merges(["a a"])

    with pytest.raises(FileError, match=r"tokens\[1\] is no UTF-8: '\\udcff\\udcfe'"):
        tokenizer_files(metadata_of(tmp_path / "a.gguf", fill), MANY)


def test_types_of_bytes_are_never_merged(tmp_path: Path) -> None:
    tokens, types = ["<unk>", "<s>", "</s>", "a", "b", "ab", "▁"], [2, 3, 3, NORMAL, BYTE, NORMAL, NORMAL]
    metadata = sentencepiece_metadata(tmp_path / "a.gguf", tokens, [0.0] * 7, types)
    assert json.loads(tokenizer_files(metadata, MANY)["tokenizer.json"])["model"]["merges"] == []
