"""Text for language models: a tokenizer, a chat template, streams that cut no character and end at stop strings."""

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from bitcore.exceptions import FileError, QuantizationError
from bitmodels.checkpoints.huggingface import read_json

_SURROGATE = re.compile("[\ud800-\udfff]")

Message = Mapping[str, Any]
"""`{"role": "user", "content": "..."}`, and what the template of the model knows besides."""


class Text:
    """The tokenizer of a model's directory.

    Args:
        vocab_size: Rows of the model's embedding.

    Raises:
        FileError: tokenizer.json is missing or damaged, or has ids that the model has no row for.
    """

    def __init__(self, directory: Path, vocab_size: int) -> None:
        self.directory = directory
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise FileError(f"{path}: is not there: without it tokens can be given, and no text")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # The package raises nothing more specific.
            raise FileError(f"{path}: no tokenizer: {error}") from error
        size = max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if size > vocab_size:
            raise FileError(f"{path}: has {size:,} tokens, and the model's vocab_size is {vocab_size:,}")

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Tokens of a text, with the model's own tokens around it unless `special` is False.

        What is no Unicode (bytes that were no UTF-8, in Python half of a surrogate pair) becomes U+FFFD.
        """
        _require_text("text", text)
        return list(self.tokenizer.encode(_SURROGATE.sub("\ufffd", text), add_special_tokens=special).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def stream(self, stop: Sequence[str] = ()) -> "TextStream":
        """Turns tokens that come one by one into text, up to the first of the `stop` strings.

        Raises:
            QuantizationError: a stop string that is empty or no text, or one alone instead of a list.
        """
        if isinstance(stop, str) or not all(isinstance(each, str) and each for each in stop):
            raise QuantizationError(f"stop is {stop!r:.80}, expected texts that are not empty")
        return TextStream(self, stop)

    @cached_property
    def config(self) -> dict[str, Any]:
        """tokenizer_config.json; empty if there is none."""
        path = self.directory / "tokenizer_config.json"
        return read_json(path) if path.is_file() else {}

    @cached_property
    def end_tokens(self) -> tuple[int, ...]:
        """Which end an answer by tokenizer_config.json."""
        own = self._special("eos_token")
        token = None if own is None else self.tokenizer.token_to_id(own)
        return () if token is None else (token,)

    # ---- chat --------------------------------------------------------------------------------------------------------

    def encode_chat(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Tokens of a conversation, ready for the answer.

        What users write stays text, even if it looks like one of the model's control tokens.

        Raises:
            FileError: the model has no chat template.
            QuantizationError: the template refuses the messages.
        """
        specials = [token.content for token in self.tokenizer.get_added_tokens_decoder().values() if token.special]
        hostile = any(special in text for special in specials for text in _texts(messages))
        if not hostile:
            return self.encode(self.render(messages, **variables), special=False)
        return self._encode_apart(messages, variables)

    def render(self, messages: Sequence[Message], **variables: Any) -> str:
        """The text of a conversation by the model's template, up to where the answer begins."""
        context = {
            "messages": [_clean(message) for message in messages],
            "add_generation_prompt": True,
            "bos_token": self._special("bos_token") or "",
            "eos_token": self._special("eos_token") or "",
            **variables,
        }
        template = self._template
        try:
            text: str = template.render(**context)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise QuantizationError(f"messages: the chat template refuses them: {error}") from error
        return text

    def _encode_apart(self, messages: Sequence[Message], variables: dict[str, Any]) -> list[int]:
        """The template's own text with control tokens, and what stands in messages without."""
        contents = list(_texts(messages))
        before = f"\ue000{secrets.token_hex(8)}:"  # Which nobody can have written.
        numbers = iter(range(len(contents)))
        marked = [_marked(message, before + "{}\ue001", numbers) for message in messages]
        tokens: list[int] = []
        # Every second piece is the number of a message, in the order in which the template has them.
        for index, piece in enumerate(re.split(f"{before}([0-9]+)\ue001", self.render(marked, **variables))):
            if index % 2:
                content = _SURROGATE.sub("\ufffd", contents[int(piece)])
                tokens += self._plain.encode(content, add_special_tokens=False).ids
            else:
                tokens += self.encode(piece, special=False)
        return tokens

    @cached_property
    def _plain(self) -> Tokenizer:
        """The tokenizer for which there are no control tokens."""
        plain = Tokenizer.from_str(self.tokenizer.to_str())
        plain.encode_special_tokens = True
        return plain

    @cached_property
    def _template(self) -> Any:
        path = self.directory / "chat_template.jinja"
        source = path.read_text(encoding="utf-8") if path.is_file() else self.config.get("chat_template")
        if isinstance(source, list):  # Named ones, of which the default is wanted.
            source = next((each.get("template") for each in source if each.get("name") == "default"), None)
        if not isinstance(source, str):
            raise FileError(f"{self.directory}: the model has no chat template (chat_template.jinja)")
        try:
            return _environment().from_string(source)
        except TemplateError as error:
            raise FileError(f"{self.directory}: the chat template is damaged: {error}") from error

    def _special(self, name: str) -> str | None:
        token = self.config.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        return content if isinstance(content, str) else None


class TextStream:
    """Turns tokens that come one by one into text: whole characters only, up to the first stop string."""

    def __init__(self, text: Text, stop: Sequence[str]) -> None:
        self._tokenizer = text.tokenizer
        self._tokens: list[int] = []
        self._length = 0  # Of the text so far.
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._held = ""  # What may be the beginning of a stop string.
        self.stopped = False

    def push(self, token: int) -> str:
        """What can be shown now."""
        self._tokens.append(token)
        piece = self._stream.step(self._tokenizer, token) or ""
        self._length += len(piece)
        self._held += piece
        places = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            shown, self._held = self._held[: min(places)], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown

    def finish(self) -> str:
        """What is left when no more tokens come: the first bytes of a character become U+FFFD."""
        whole: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        shown, self._held = self._held + whole[self._length :], ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters are the first ones of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


def _require_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise QuantizationError(f"{name} is a {type(value).__name__}, expected a text")


def _texts(messages: Sequence[Message]) -> Iterable[str]:
    for message in messages:
        content = _clean(message).get("content")
        if isinstance(content, str):
            yield content


def _marked(message: Message, mark: str, numbers: Iterable[int]) -> Message:
    cleaned = _clean(message)
    if not isinstance(cleaned.get("content"), str):
        return cleaned
    return {**cleaned, "content": mark.format(next(iter(numbers)))}


def _clean(message: Message) -> dict[str, Any]:
    """As templates expect it: no None, parts of text joined, arguments of tool calls as objects."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise QuantizationError(f"messages has {message!r:.80}, expected objects with a role")
    cleaned = {key: deepcopy(value) for key, value in message.items() if value is not None}
    if isinstance(content := cleaned.get("content"), list):
        cleaned["content"] = "\n".join(_text_of(part) for part in content)
    for call in cleaned.get("tool_calls") or ():
        if not isinstance(call, dict) or not isinstance(function := call.get("function"), dict):
            raise QuantizationError(f"messages has a tool call {call!r:.80}, expected an object with a function")
        if isinstance(function.get("arguments"), str):
            function["arguments"] = _arguments(function["arguments"])
    return cleaned


def _text_of(part: object) -> str:
    """Of a part of a message."""
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(text := part.get("text"), str):
        raise QuantizationError(f"messages has a part {part!r:.80}, expected texts: the model knows nothing else")
    return text


def _arguments(text: str) -> Any:
    """Of a tool call, which some write as a text."""
    try:
        return json.loads(text or "{}")
    except ValueError as error:
        raise QuantizationError(f"messages: the arguments of a tool call are no JSON: {text!r:.80}") from error


class _Generation(Extension):
    """`{% generation %}`, which marks the model's own words for training: here they are only text."""

    tags = {"generation"}  # noqa: RUF012 (as the package declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up, in a sandbox."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
