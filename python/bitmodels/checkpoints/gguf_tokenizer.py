"""The tokenizer of a GGUF file, as the files of a Hugging Face tokenizer.

A GGUF file holds a vocabulary and its merges, and only the name of the rule that splits text before they apply. The
table below says what each name stands for in the tokenizer.json of its model family, and so which normalizer a file
does not mention. A name belongs there only if that is known: falcon3 and falcon_e are left out, because
llama.cpp splits for them as for Llama 3, and whether their tokenizer.json does is not known.

What no GGUF file says: whether an added token swallows the blanks around it.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitcore.exceptions import FileError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # Of tokenizer.ggml.token_type.

_PREFIX = "tokenizer.ggml."
_INSTEAD = "give the tokenizer's directory with --tokenizer"
_SPACE = "▁"
_MOST_SHOWN = 80  # Characters of a foreign value in a message.

# Converters fill the rows that the embedding has beyond the vocabulary with these, each named after its own id.
_PADDING = re.compile(r"\[PAD([0-9]+)\]")

_ID_KEYS = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unk": 0}  # llama.cpp's, if the file names none.


# ---- how text is split, by tokenizer.ggml.pre ------------------------------------------------------------------------


def _isolated(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _byte_level(use_regex: bool) -> dict[str, Any]:
    """Bytes as printable characters; with `use_regex`, split as GPT-2 does before."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


_SINGLE_DIGITS = {"type": "Digits", "individual_digits": True}

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Rule:
    """What a name in tokenizer.ggml.pre stands for.

    Attributes:
        steps: the pre-tokenizers, in order.
        nfc: text is normalized to NFC first.
        ignore_merges: a piece of text that is a token is taken whole.
        add_bos: text begins with the BOS token, unless the file says otherwise.
    """

    steps: tuple[dict[str, Any], ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2_RULE = _Rule((_byte_level(use_regex=True),))
_NEOX_RULE = _Rule((_byte_level(use_regex=True),), nfc=True)
_LLAMA3_RULE = _Rule((_isolated(_LLAMA3), _byte_level(use_regex=False)), ignore_merges=True, add_bos=True)
_STARCODER_RULE = _Rule((_SINGLE_DIGITS, _byte_level(use_regex=True)))

RULES: dict[str, _Rule] = {
    "gpt-2": _GPT2_RULE,
    "phi-2": _GPT2_RULE,
    "mpt": _NEOX_RULE,
    "olmo": _NEOX_RULE,
    "llama-bpe": _LLAMA3_RULE,
    "llama3": _LLAMA3_RULE,
    "llama-v3": _LLAMA3_RULE,
    "qwen2": _Rule((_isolated(_QWEN2), _byte_level(use_regex=False)), nfc=True),  # Qwen 2, 2.5 and 3.
    "qwen35": _Rule((_isolated(_QWEN35), _byte_level(use_regex=False)), nfc=True),
    "starcoder": _STARCODER_RULE,
    "refact": _STARCODER_RULE,  # Granite's, too.
    "smollm": _STARCODER_RULE,
    "command-r": _Rule((_SINGLE_DIGITS, _byte_level(use_regex=True)), nfc=True),
    "falcon": _Rule(
        (
            {"type": "Punctuation", "behavior": "Contiguous"},
            _byte_level(use_regex=True),
            {"type": "Digits", "individual_digits": False},
            _isolated("[0-9][0-9][0-9]"),
        )
    ),
    "tekken": _Rule((_isolated(_TEKKEN), _byte_level(use_regex=False)), ignore_merges=True, add_bos=True),
}


# ---- what the file says ----------------------------------------------------------------------------------------------


def tokenizer_files(metadata: Mapping[str, Any], vocab_size: int) -> dict[str, str]:
    """The texts of tokenizer.json, tokenizer_config.json and, if the file has a template, chat_template.jinja.

    Args:
        metadata: a GGUF file's; strings that are no UTF-8 hold surrogate escapes.
        vocab_size: the rows of the model's embedding. Fewer tokens than rows are fine.

    Raises:
        FileError: the kind of tokenizer or its way to split text is not known, or the vocabulary is damaged; the
            message is one line and names no path.
    """
    kind = metadata.get(_PREFIX + "model")
    if kind not in ("gpt2", "llama"):
        raise FileError(f"{_PREFIX}model is {_shown(kind)}, known are 'gpt2' and 'llama': {_INSTEAD}")
    rule = _rule_of(metadata) if kind == "gpt2" else None
    vocabulary = _Vocabulary.read(metadata, vocab_size, _SENTENCEPIECE_IDS if rule is None else {})
    parts = _sentencepiece_parts(metadata, vocabulary) if rule is None else _byte_parts(metadata, vocabulary, rule)
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": vocabulary.added(), **parts}
    files = {
        "tokenizer.json": json.dumps(content, ensure_ascii=False) + "\n",
        "tokenizer_config.json": json.dumps(_config(metadata, vocabulary), ensure_ascii=False, indent=2) + "\n",
    }
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        files["chat_template.jinja"] = _template(template)
    return files


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 3] + "..."


def _rule_of(metadata: Mapping[str, Any]) -> _Rule:
    name = metadata.get(_PREFIX + "pre")
    if not isinstance(name, str) or name not in RULES:
        found = "missing" if name is None else _shown(name)
        raise FileError(f"{_PREFIX}pre is {found}, known are {', '.join(sorted(RULES))}: {_INSTEAD}")
    return RULES[name]


def _array(metadata: Mapping[str, Any], name: str, kinds: tuple[type, ...], what: str) -> list[Any]:
    values = metadata.get(_PREFIX + name)
    if values is None:
        raise FileError(f"{_PREFIX}{name} is missing")
    if not isinstance(values, list) or not all(type(value) in kinds for value in values):
        raise FileError(f"{_PREFIX}{name} is no list of {what}")
    return values


def _per_token(metadata: Mapping[str, Any], name: str, kinds: tuple[type, ...], count: int) -> list[Any]:
    values = _array(metadata, name, kinds, "numbers")
    if len(values) != count:
        raise FileError(f"{_PREFIX}{name} has {len(values):,} entries, and there are {count:,} tokens")
    return values


def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(_PREFIX + name, default)
    if not isinstance(value, bool):
        raise FileError(f"{_PREFIX}{name} is {_shown(value)}, expected true or false")
    return value


def _token_id(metadata: Mapping[str, Any], name: str, tokens: list[str]) -> int | None:
    value = metadata.get(_PREFIX + name)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < len(tokens):
        raise FileError(f"{_PREFIX}{name} is {_shown(value)}, and there are {len(tokens):,} tokens")
    if not tokens[value]:
        raise FileError(f"{_PREFIX}{name} is {value}, a token without text")
    return value


@dataclass(frozen=True)
class _Vocabulary:
    """Tokens, all checked.

    Attributes:
        tokens, types: by id.
        named: of "bos", "eos", "unk" and "pad" those that there are, by id.
        ids: by token, without the padding at the end and without empty tokens.
    """

    tokens: list[str]
    types: list[int]
    named: dict[str, int]
    ids: dict[str, int]

    @classmethod
    def read(cls, metadata: Mapping[str, Any], vocab_size: int, default_ids: Mapping[str, int]) -> "_Vocabulary":
        tokens = _array(metadata, "tokens", (str,), "strings")
        if len(tokens) > vocab_size:
            raise FileError(f"{len(tokens):,} tokens, and the model has {vocab_size:,} rows")
        named = {role: _token_id(metadata, key, tokens) for role, key in _ID_KEYS.items()}
        if _PREFIX + "token_type" in metadata:
            types = _per_token(metadata, "token_type", (int,), len(tokens))
        else:
            given = {*named.values(), *default_ids.values()}
            types = [CONTROL if index in given else NORMAL for index in range(len(tokens))]
        for role, index in default_ids.items():
            if named[role] is None and index < len(tokens) and types[index] in (CONTROL, UNKNOWN):
                named[role] = index
        found = {role: index for role, index in named.items() if index is not None}
        return cls(tokens, types, found, _ids(tokens, set(found.values())))

    def is_added(self, index: int) -> bool:
        """Whether a token is found in text before anything else is done to it."""
        kind = self.types[index]
        return kind in (CONTROL, USER_DEFINED) or (kind == UNKNOWN and index in self.named.values())

    def added(self) -> list[dict[str, Any]]:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        named = set(self.named.values())
        return [
            {"id": index, "content": token, **flags, "special": self.types[index] != USER_DEFINED or index in named}
            for token, index in self.ids.items()
            if self.is_added(index)
        ]


def _ids(tokens: list[str], named: set[int]) -> dict[str, int]:
    ids: dict[str, int] = {}
    for index, token in enumerate(tokens):
        padding = _PADDING.fullmatch(token) if token.startswith("[PAD") else None
        if not token or (padding and padding[1] == str(index) and index not in named):
            continue
        if token in ids:
            raise FileError(f"{_PREFIX}tokens has {_shown(token)} twice, as {ids[token]} and {index}")
        ids[token] = index
    try:
        "".join(ids).encode()
    except UnicodeEncodeError:
        bad = next(token for token in ids if not token.isascii() and re.search("[\ud800-\udfff]", token))
        raise FileError(f"{_PREFIX}tokens[{ids[bad]}] is no UTF-8: {_shown(bad)}") from None
    return ids


def _template(template: object) -> str:
    if not isinstance(template, str):
        raise FileError(f"tokenizer.chat_template is {_shown(template)}, expected a string")
    if re.search("[\ud800-\udfff]", template):
        raise FileError("tokenizer.chat_template is no UTF-8")
    return template


def _config(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> dict[str, Any]:
    """Of tokenizer_config.json. This class takes tokenizer.json as it is, whatever the model beside it."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role, index in vocabulary.named.items():
        if vocabulary.is_added(index):  # Else it is a default of the model's configuration, "!" perhaps.
            config[f"{role}_token"] = vocabulary.tokens[index]
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if type(length) is int and length > 0:
        config["model_max_length"] = length
    return config


# ---- tokenizer.json --------------------------------------------------------------------------------------------------


def _model(vocabulary: _Vocabulary, merges: list[list[str]], **fields: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **fields,
        "vocab": vocabulary.ids,
        "merges": merges,
    }


def _surrounding(metadata: Mapping[str, Any], vocabulary: _Vocabulary, add_bos: bool) -> dict[str, Any]:
    """The post-processor that adds the BOS and EOS tokens, or none of them."""
    before, after = _flag(metadata, "add_bos_token", add_bos), _flag(metadata, "add_eos_token", False)
    if before and "bos" not in vocabulary.named and _PREFIX + "add_bos_token" not in metadata:
        before = False
    around: list[list[str]] = []
    tokens: dict[str, Any] = {}
    for wanted, role in ((before, "bos"), (after, "eos")):
        if wanted and role not in vocabulary.named:
            raise FileError(f"{_PREFIX}add_{role}_token is true, and {_PREFIX}{_ID_KEYS[role]} is missing")
        around.append([vocabulary.tokens[vocabulary.named[role]]] if wanted else [])
        tokens |= {token: {"id": token, "ids": [vocabulary.ids[token]], "tokens": [token]} for token in around[-1]}
    first, second = (_sequence(around, sequence, number) for number, sequence in enumerate("AB"))
    return {"type": "TemplateProcessing", "single": first, "pair": [*first, *second], "special_tokens": tokens}


def _sequence(around: list[list[str]], sequence: str, number: int) -> list[dict[str, Any]]:
    bos, eos = ([{"SpecialToken": {"id": token, "type_id": number}} for token in side] for side in around)
    return [*bos, {"Sequence": {"id": sequence, "type_id": number}}, *eos]


def _byte_parts(metadata: Mapping[str, Any], vocabulary: _Vocabulary, rule: _Rule) -> dict[str, Any]:
    merges = _stored_merges(metadata, vocabulary.ids)
    steps = [*rule.steps]
    processor: dict[str, Any] = {**_byte_level(use_regex=True), "add_prefix_space": True, "trim_offsets": False}
    surrounding = _surrounding(metadata, vocabulary, rule.add_bos)
    if surrounding["special_tokens"]:
        processor = {"type": "Sequence", "processors": [processor, surrounding]}
    return {
        "normalizer": {"type": "NFC"} if rule.nfc else None,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "post_processor": processor,
        "decoder": {**_byte_level(use_regex=True), "add_prefix_space": True},
        "model": _model(vocabulary, merges, ignore_merges=rule.ignore_merges),
    }


def _stored_merges(metadata: Mapping[str, Any], ids: Mapping[str, int]) -> list[list[str]]:
    merges = []
    for index, merge in enumerate(_array(metadata, "merges", (str,), "strings")):
        cut = merge.find(" ", 1)  # The first token may begin with one.
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or not right:
            raise FileError(f"{_PREFIX}merges[{index}] is {_shown(merge)}, expected two tokens with a space between")
        for token in (left, right, left + right):
            if token not in ids:
                raise FileError(f"{_PREFIX}merges[{index}] needs {_shown(token)}, which is no token")
        merges.append([left, right])
    return merges


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def _sentencepiece_parts(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> dict[str, Any]:
    prefix = _flag(metadata, "add_space_prefix", True)
    prepend = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown = vocabulary.named.get("unk")
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, _replace(" ", _SPACE)]},
        "pre_tokenizer": None,
        "post_processor": _surrounding(metadata, vocabulary, add_bos=True),
        "decoder": {
            "type": "Sequence",
            "decoders": [_replace(_SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": _model(
            vocabulary,
            _ranked_merges(metadata, vocabulary),
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        ),
    }


def _ranked_merges(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> list[list[str]]:
    """Every way to make a normal token of two, the highest score of the result first, then the lowest id."""
    scores = _per_token(metadata, "scores", (int, float), len(vocabulary.tokens))
    if not all(map(math.isfinite, scores)):
        raise FileError(f"{_PREFIX}scores has an entry that is NaN or infinite")
    normal = {token: index for token, index in vocabulary.ids.items() if vocabulary.types[index] == NORMAL}
    ways = [
        (-scores[index], index, token[:cut], token[cut:])
        for token, index in normal.items()
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]
    if len(ways) > 1 and len({score for score, *_ in ways}) == 1 and len({index for _, index, *_ in ways}) > 1:
        raise FileError(f"{_PREFIX}scores are all {-ways[0][0]:g}, and the order of merges is not known: {_INSTEAD}")
    return [[left, right] for _, _, left, right in sorted(ways)]
