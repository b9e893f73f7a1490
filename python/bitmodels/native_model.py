"""The C++ language model as Python objects: handles, arrays, errors. `language_model` puts text on it."""

import ctypes
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from os import PathLike, fsencode
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bitcore import _c_api
from bitcore.exceptions import FileError, QuantizationError

CacheForm = Literal["float16", "float32", "int8"]
Rows = Literal["none", "last", "all", "hidden"]
Logits = NDArray[np.float32]

_CACHES = {"float16": 0, "float32": 1, "int8": 2}
_ROWS = {"none": 0, "last": 1, "all": 2, "hidden": 3}
_LARGEST_TOKEN = 2**31 - 1


class _Info(ctypes.Structure):
    """`bitlab_model_info` of bitlab.h."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in (
                "vocab_size",
                "hidden_size",
                "num_layers",
                "num_heads",
                "num_key_value_heads",
                "head_dim",
                "max_position_embeddings",
                "weight_bytes",
            )
        ),
        ("architecture", ctypes.c_char_p),
        ("eos_tokens", ctypes.POINTER(ctypes.c_int32)),
        ("eos_token_count", ctypes.c_int64),
    )


class _Input(ctypes.Structure):
    """`bitlab_input` of bitlab.h."""

    _fields_ = (
        ("session", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("token_count", ctypes.c_int64),
        ("logits", ctypes.c_int32),
        ("output", ctypes.c_void_p),
        ("output_floats", ctypes.c_int64),
    )


class _Sampling(ctypes.Structure):
    """`bitlab_sampling` of bitlab.h."""

    _fields_ = (
        ("repetition_penalty", ctypes.c_float),
        ("frequency_penalty", ctypes.c_float),
        ("presence_penalty", ctypes.c_float),
        ("bias_tokens", ctypes.c_void_p),
        ("biases", ctypes.c_void_p),
        ("bias_count", ctypes.c_int64),
        ("temperature", ctypes.c_float),
        ("top_k", ctypes.c_int64),
        ("top_p", ctypes.c_float),
        ("min_p", ctypes.c_float),
        ("seed", ctypes.c_uint32),
        ("choice", ctypes.c_uint32),
    )


@cache
def _declare() -> None:
    pointer, number, size = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    declare = _c_api.declare
    declare("bitlab_model_open", ctypes.c_char_p, number, number, ctypes.c_char_p, pointer)
    declare("bitlab_model_describe", pointer, pointer)
    declare("bitlab_session_new", pointer, size, number, pointer)
    declare("bitlab_session_position", pointer, pointer)
    declare("bitlab_session_truncate", pointer, size)
    declare("bitlab_session_fork", pointer, pointer)
    declare("bitlab_forward", pointer, pointer, size, pointer, pointer)
    declare("bitlab_sampler_new", pointer, size, pointer)
    declare("bitlab_sampler_see", pointer, pointer, size)
    declare("bitlab_sampler_sample", pointer, pointer, size, pointer, size, pointer)
    declare("bitlab_pool_new", number, pointer)
    declare("bitlab_cancellation_new", pointer)
    declare("bitlab_cancellation_set", pointer, number)
    for name in ("model", "session", "sampler", "pool", "cancellation"):
        declare(f"bitlab_{name}_free", pointer)
        getattr(_c_api.library(), f"bitlab_{name}_free").restype = None
    _c_api.library().bitlab_cancellation_set.restype = None


class _Handle:
    """Something that the library made, and frees once nobody holds it."""

    def __init__(self, kind: str, function: str, *arguments: Any) -> None:
        _declare()
        made = ctypes.c_void_p()
        _c_api.call(function, *arguments, ctypes.byref(made))
        self.pointer = made
        weakref.finalize(self, getattr(_c_api.library(), f"bitlab_{kind}_free"), made)


class Cancellation:
    """Stops a call that runs in another thread: between two layers it returns, and nothing has changed."""

    def __init__(self) -> None:
        self._handle = _Handle("cancellation", "bitlab_cancellation_new")

    def cancel(self) -> None:
        """From any thread."""
        _c_api.library().bitlab_cancellation_set(self._handle.pointer, 1)

    def reset(self) -> None:
        """Later calls run again."""
        _c_api.library().bitlab_cancellation_set(self._handle.pointer, 0)


class Session:
    """The keys and values of the tokens that a model has seen. One thread at a time may use it."""

    def __init__(self, handle: _Handle, context_limit: int) -> None:
        self._handle = handle
        self.context_limit = context_limit
        """Most tokens that it can hold."""

    @property
    def position(self) -> int:
        """Tokens that are in the cache."""
        position = ctypes.c_int64()
        _c_api.call("bitlab_session_position", self._handle.pointer, ctypes.byref(position))
        return position.value

    def truncate(self, position: int) -> None:
        """Forgets all tokens from `position` on.

        Raises:
            QuantizationError: it is negative, or beyond the present position.
            StateError: another thread uses the session.
        """
        _c_api.call("bitlab_session_truncate", self._handle.pointer, integer("position", position))

    def fork(self) -> "Session":
        """A second session with the same tokens, which shares their memory."""
        return Session(_Handle("session", "bitlab_session_fork", self._handle.pointer), self.context_limit)


class Append(NamedTuple):
    """Tokens for a session, and which of them get logits ("hidden": all get what the head is applied to)."""

    session: Session
    tokens: Sequence[int] | NDArray[np.int32]
    rows: Rows = "last"


@dataclass(frozen=True)
class ModelInfo:
    """What a language model is."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    weight_bytes: int  # That are read for a token.
    eos_tokens: tuple[int, ...]


class NativeModel:
    """A directory's model, mapped into memory. Any number of threads may use it."""

    def __init__(
        self, directory: str | PathLike[str], kernel: str | None, threads: int, map_weights: bool, check: bool
    ) -> None:
        name = None if kernel is None else _c_text("kernel", kernel)
        path = fsencode(directory)
        if b"\0" in path:
            raise FileError(f"{directory!r}: a path has no NUL")
        threads = integer("threads", threads)
        self._handle = _Handle("model", "bitlab_model_open", path, int(map_weights), int(check), name)
        self._pool = _Handle("pool", "bitlab_pool_new", threads) if threads else None
        info = _Info()
        _c_api.call("bitlab_model_describe", self._handle.pointer, ctypes.byref(info))
        numbers = {name: getattr(info, name) for name in ModelInfo.__dataclass_fields__ if hasattr(info, name)}
        numbers["architecture"] = info.architecture.decode()
        numbers["eos_tokens"] = tuple(info.eos_tokens[: info.eos_token_count])
        self.info = ModelInfo(**numbers)

    def session(self, context_limit: int = 0, cache: CacheForm = "float16") -> Session:
        """An empty session.

        Raises:
            QuantizationError: a context_limit that is negative or above what the model allows, an unknown cache.
        """
        if cache not in _CACHES:
            raise QuantizationError(f"cache is {cache!r}, expected {' or '.join(map(repr, _CACHES))}")
        context_limit = integer("context_limit", context_limit)
        handle = _Handle("session", "bitlab_session_new", self._handle.pointer, context_limit, _CACHES[cache])
        return Session(handle, context_limit or self.info.max_position_embeddings)

    def forward(self, appends: Iterable[Append], cancellation: Cancellation | None = None) -> list[Logits] | None:
        """Appends tokens to sessions, in one pass. Returns logits (rows, vocab_size) for each; None if cancelled.

        For rows "hidden" it is (rows, hidden_size) instead: the states after the last norm.

        Raises:
            QuantizationError: no tokens, one outside of the vocabulary, more than the context limit allows, a session
                of another model.
            StateError: a session that another thread uses, or that is given twice.
        """
        listed = list(appends)
        tokens = [_tokens(append.tokens) for append in listed]
        outputs = [self._output(append.rows, len(own)) for append, own in zip(listed, tokens, strict=True)]
        inputs = (_Input * len(listed))(
            *(
                _Input(
                    append.session._handle.pointer,
                    own.ctypes.data,
                    len(own),
                    _ROWS[append.rows],
                    output.ctypes.data,
                    output.size,
                )
                for append, own, output in zip(listed, tokens, outputs, strict=True)
            )
        )
        pool = None if self._pool is None else self._pool.pointer
        flag = None if cancellation is None else cancellation._handle.pointer
        status = _c_api.call("bitlab_forward", self._handle.pointer, inputs, len(listed), pool, flag)
        return None if status == _c_api.CANCELLED else outputs

    def _output(self, rows: str, tokens: int) -> Logits:
        if rows not in _ROWS:
            raise QuantizationError(f"rows is {rows!r}, expected {' or '.join(map(repr, _ROWS))}")
        count = {"none": 0, "last": 1}.get(rows, tokens)
        return np.empty((count, self.info.hidden_size if rows == "hidden" else self.info.vocab_size), np.float32)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the steps follow each other in this order. docs/contract.md has each operation.

    Args:
        repetition_penalty: Logits of tokens seen, prompt included, are divided by it (negative ones multiplied).
        frequency_penalty: Subtracted once for each time that the answer has the token.
        presence_penalty: Subtracted if the answer has the token.
        logit_bias: Added to logits, by token.
        temperature: Logits are divided by it; 0: the largest logit wins.
        top_k: Keep so many of the largest; 0: all.
        top_p: Keep the shortest run of the largest whose weights reach this share.
        min_p: Keep those of at least this share of the largest weight.
        seed: Of the random numbers, 0 to 2^32 - 1: the same seed, the same answer.
        choice: Which of several answers to one prompt it is.
    """

    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    choice: int = 0


class Sampler:
    """Chooses the tokens of one answer.

    Raises:
        QuantizationError: a parameter out of its range.
    """

    def __init__(self, sampling: Sampling, vocab_size: int) -> None:
        pairs = sampling.logit_bias
        if not isinstance(pairs, Sequence) or not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in pairs):
            raise QuantizationError(f"logit_bias is {pairs!r:.80}, expected pairs of a token and a number")
        tokens = _tokens([token for token, _ in pairs])
        biases = np.array([_real("logit_bias", bias) for _, bias in pairs], np.float32)
        fields = _Sampling(
            _real("repetition_penalty", sampling.repetition_penalty),
            _real("frequency_penalty", sampling.frequency_penalty),
            _real("presence_penalty", sampling.presence_penalty),
            tokens.ctypes.data,
            biases.ctypes.data,
            len(tokens),
            _real("temperature", sampling.temperature),
            integer("top_k", sampling.top_k),
            _real("top_p", sampling.top_p),
            _real("min_p", sampling.min_p),
            integer("seed", sampling.seed, 0, 2**32 - 1),
            integer("choice", sampling.choice, 0, 2**32 - 1),
        )
        self._handle = _Handle("sampler", "bitlab_sampler_new", ctypes.byref(fields), vocab_size)

    def see(self, tokens: Sequence[int]) -> None:
        """Tokens that stand before the answer: repetition_penalty counts them."""
        own = _tokens(tokens)
        _c_api.call("bitlab_sampler_see", self._handle.pointer, own.ctypes.data, len(own))

    def sample(self, logits: Logits, mask: NDArray[np.uint32] | None = None) -> int:
        """The next token, which counts as a part of the answer. Changes the logits.

        Args:
            logits: (vocab_size,)
            mask: Bit i mod 32 of word i // 32 is set if token i is allowed.

        Raises:
            QuantizationError: a NaN among the logits, sizes that do not fit, a mask that allows nothing.
        """
        logits = np.ascontiguousarray(logits, np.float32)
        words = np.zeros(0, np.uint32) if mask is None else np.ascontiguousarray(mask, np.uint32)
        token = ctypes.c_int32()
        arguments = (logits.ctypes.data, logits.size, words.ctypes.data if words.size else None, words.size)
        _c_api.call("bitlab_sampler_sample", self._handle.pointer, *arguments, ctypes.byref(token))
        return token.value


def integer(name: str, value: object, least: int = -(2**31), most: int = 2**31 - 1) -> int:
    """An argument for C, which would cut what is too large; who is called refuses what is too small.

    Raises:
        QuantizationError: it is no integer from `least` to `most`.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= most:
        raise QuantizationError(f"{name} is {value!r:.80}, expected an integer from {max(least, 0)} to {most}")
    return int(value)


def _real(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise QuantizationError(f"{name} is {value!r:.80}, expected a number")
    return float(value)


def _c_text(name: str, value: object) -> bytes:
    if not isinstance(value, str) or "\0" in value:
        raise QuantizationError(f"{name} is {value!r:.80}, expected a text without NUL")
    return value.encode(errors="surrogateescape")


def _tokens(tokens: Sequence[int] | NDArray[Any]) -> NDArray[np.int32]:
    values = np.asarray(tokens if len(tokens) else np.zeros(0, np.int64))
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise QuantizationError(
            f"tokens have shape {values.shape} and dtype {values.dtype}, expected integers in one row"
        )
    if len(values) and not (int(values.min()) >= 0 and int(values.max()) <= _LARGEST_TOKEN):
        raise QuantizationError(
            f"tokens has {int(values.min())} to {int(values.max())}, expected 0 to {_LARGEST_TOKEN}"
        )
    return np.ascontiguousarray(values, np.int32)
