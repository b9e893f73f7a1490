"""The tokenizer's files of a Hugging Face directory."""

import json
from pathlib import Path
from typing import Any

from bitcore.exceptions import FileError
from bitmodels.json_pairs import unique_pairs

TOKENIZER = "tokenizer.json"

# What belongs to a tokenizer, and to generating text with it.
_FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


def copied_files(directory: Path) -> dict[str, str]:
    """The texts of those that are there.

    Raises:
        FileError: one is no UTF-8.
        OSError: one cannot be read.
    """
    texts = {}
    for name in _FILES:
        path = directory / name
        if path.is_file():
            try:
                texts[name] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise FileError(f"{path}: no UTF-8: {error}") from error
    return texts


def vocabulary_of(source: Path, text: str) -> tuple[str, int]:
    """Of a tokenizer.json: the kind of its model, and the largest id plus one.

    Raises:
        FileError: it has no vocabulary.
    """
    path = source / TOKENIZER
    try:
        content = json.loads(text, object_pairs_hook=unique_pairs)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: no JSON: {error}") from error
    if not isinstance(content, dict):
        raise FileError(f"{path}: holds a {type(content).__name__}, expected an object")
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    added = content.get("added_tokens") or []
    if not isinstance(model, dict) or not isinstance(vocabulary, dict | list) or not isinstance(added, list):
        raise FileError(f"{path}: has no model with a vocabulary")
    ids: list[Any] = [*vocabulary.values()] if isinstance(vocabulary, dict) else [*range(len(vocabulary))]
    ids += [token.get("id") for token in added if isinstance(token, dict)]
    if not all(type(number) is int for number in ids):
        raise FileError(f"{path}: has a token whose id is no number")
    return str(model.get("type")), max(ids, default=-1) + 1


def require_fit(source: Path, text: str, vocab_size: int) -> None:
    """Refuses a tokenizer with ids that the model has no row for.

    Raises:
        FileError
    """
    _, tokens = vocabulary_of(source, text)
    if tokens > vocab_size:
        raise FileError(f"{source / TOKENIZER}: has {tokens:,} tokens, and the model's vocab_size is {vocab_size:,}")
