"""transformers loads the tokenizer of a GGUF file as it is, whatever the model beside it, and makes the same merges."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import SpmConverter

from bitmodels.checkpoints.gguf_tokenizer import tokenizer_files
from gguf_vocabularies import (
    BOS,
    EOS,
    FAMILIES,
    NORMAL,
    PAD,
    USER,
    Family,
    byte_level,
    byte_level_metadata,
    sentencepiece,
    sentencepiece_metadata,
    texts,
)

pytestmark = pytest.mark.medium

MODEL_TYPES = (None, "llama", "qwen3", "bitnet", "granite")
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


def loaded(directory: Path, metadata: dict[str, Any], model_type: str | None) -> Any:
    directory.mkdir()
    for name, text in tokenizer_files(metadata, 1 << 20).items():
        (directory / name).write_text(text, encoding="utf-8")
    if model_type is not None:
        (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def assert_same(found: Any, expected: Tokenizer) -> None:
    for text in texts(400, 5, BOS, EOS, USER):
        ids = expected.encode(text).ids
        assert found(text)["input_ids"] == ids, text
        assert found.encode(text, add_special_tokens=False) == expected.encode(text, add_special_tokens=False).ids, text
        assert found.decode(ids) == expected.decode(ids, skip_special_tokens=False), text
        assert found.decode(ids, skip_special_tokens=True) == expected.decode(ids), text


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.names[0])
def test_byte_level(family: Family, model_type: str | None, tmp_path: Path) -> None:
    content = byte_level(family, 400)
    metadata = byte_level_metadata(tmp_path / "a.gguf", family.names[0], content, bos=BOS, eos=EOS, pad=PAD)
    tokenizer = loaded(tmp_path / "a", metadata, model_type)
    assert_same(tokenizer, Tokenizer.from_str(json.dumps(content)))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BOS, EOS, PAD)
    assert tokenizer.model_max_length == 4096
    tokenizer.save_pretrained(tmp_path / "b")
    assert_same(AutoTokenizer.from_pretrained(tmp_path / "b"), Tokenizer.from_str(json.dumps(content)))


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_sentencepiece(model_type: str | None, bos: bool, tmp_path: Path) -> None:
    metadata = sentencepiece_metadata(tmp_path / "a.gguf", *sentencepiece())
    metadata |= {"tokenizer.ggml.add_bos_token": bos, "tokenizer.chat_template": TEMPLATE}
    tokenizer = loaded(tmp_path / "a", metadata, model_type)
    assert_same(tokenizer, Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json")))
    assert tokenizer.encode("a")[0] == 1 or not bos
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    messages = [{"role": "user", "content": "a b"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "user: a b\n"


def test_the_merges_are_those_that_transformers_makes_from_a_sentencepiece_model(tmp_path: Path) -> None:
    tokens, scores, types = sentencepiece(2000)
    proto = SimpleNamespace(
        trainer_spec=SimpleNamespace(byte_fallback=True, unk_piece="<unk>", unk_id=0),
        normalizer_spec=SimpleNamespace(
            precompiled_charsmap=b"", remove_extra_whitespaces=False, escape_whitespaces=True, add_dummy_prefix=True
        ),
        pieces=[
            SimpleNamespace(piece=token, score=score, type=kind)
            for token, score, kind in zip(tokens, scores, types, strict=True)
        ],
    )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    expected = SpmConverter.build_tokenizer_from_spm_proto(proto, vocabulary)
    assert expected is not None
    content = tokenizer_files(sentencepiece_metadata(tmp_path / "a.gguf", tokens, scores, types), 1 << 20)
    model = json.loads(content["tokenizer.json"])["model"]
    merges = json.loads(expected.to_str())["model"]["merges"]
    assert model["merges"] == merges
    assert len(merges) > sum(kind == NORMAL and len(token) > 1 for token, kind in zip(tokens, types, strict=True))
    found = Tokenizer.from_str(content["tokenizer.json"])
    for text in texts(400, 6):
        if "<s>" not in text:
            assert found.encode(text, add_special_tokens=False).ids == expected.encode(text).ids, text
