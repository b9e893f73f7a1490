"""`LanguageModel`: a ternary language model from a directory, on the CPU, with text. Needs no torch."""

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from bitcore.exceptions import FileError, QuantizationError
from bitmodels.checkpoints.huggingface import read_json
from bitmodels.native_model import (
    Append,
    CacheForm,
    Cancellation,
    Logits,
    ModelInfo,
    NativeModel,
    Sampler,
    Sampling,
    Session,
)

if TYPE_CHECKING:
    from bitmodels.text import Message, Text

FinishReason = Literal["stop", "length", "cancelled"]
Prompt = str | Sequence[int]

_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Generation:
    """An answer."""

    text: str
    tokens: list[int]
    finish_reason: FinishReason  # "stop": an end token or a stop string; "length": as many tokens as were asked for.
    prompt_tokens: int
    seed: int


@dataclass
class Step:
    """A token of an answer, and what can be shown of its text."""

    token: int
    text: str
    finish_reason: FinishReason | None = None  # Of the last step.


class LanguageModel:
    """A model that `bitlab convert` or `save_pretrained` wrote.

    Its logits are a pure function of the tokens and of the cache's form: the same bits on every CPU, for every number
    of threads, batch and split of the prompt. Any number of threads may use one model, each with sessions of its own.

        model = LanguageModel.open("bitnet")
        print(model.generate("The capital of France is", max_tokens=20).text)
        for text in model.stream_chat([{"role": "user", "content": "Hello!"}]):
            print(text, end="", flush=True)
    """

    def __init__(self, native: NativeModel, directory: Path) -> None:
        self._native = native
        self.directory = directory

    @classmethod
    def open(
        cls,
        directory: str | PathLike[str],
        *,
        kernel: str | None = None,
        threads: int = 0,
        map_weights: bool = True,
        check: bool = False,
    ) -> Self:
        """Opens a directory.

        Args:
            kernel: Name of the kernel of ternary layers (`bitlab info` lists them); None: the best.
            threads: 0: BITLAB_NUM_THREADS, or the CPUs that this process may use.
            map_weights: False: read the weights into memory instead of mapping the file.
            check: Check every byte of packed weights now; otherwise their trailers, and codes as they are read.

        Raises:
            FileError: it is missing, damaged, or of a form or an architecture that is not supported.
            KernelNotFoundError: no kernel of that name runs here.
            QuantizationError: threads is negative.
        """
        return cls(NativeModel(directory, kernel, threads, map_weights, check), Path(directory))

    @property
    def info(self) -> ModelInfo:
        """Sizes and architecture."""
        return self._native.info

    @cached_property
    def text(self) -> "Text":
        """The tokenizer and the chat template.

        Raises:
            FileError: there is no tokenizer, or it does not fit the model.
        """
        from bitmodels.text import Text  # Its libraries are needed for text alone.

        return Text(self.directory, self.info.vocab_size)

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end an answer: those of config.json, generation_config.json and the tokenizer.

        Raises:
            FileError: one of these files is damaged.
        """
        own = self.text.end_tokens if (self.directory / "tokenizer.json").is_file() else ()
        named = self._generation_config.get("eos_token_id")
        listed = [] if named is None else named if isinstance(named, list) else [named]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in listed):
            raise FileError(f"{self.directory / _GENERATION}: eos_token_id is {named!r:.80}, expected tokens")
        return frozenset((*self.info.eos_tokens, *own, *listed))

    @cached_property
    def _generation_config(self) -> dict[str, Any]:
        """generation_config.json; empty if there is none."""
        path = self.directory / _GENERATION
        return read_json(path) if path.is_file() else {}

    @cached_property
    def default_sampling(self) -> Sampling:
        """What generation_config.json says; without it the largest logit wins.

        Raises:
            FileError: it has values that no sampler knows.
        """
        config = self._generation_config
        if not config.get("do_sample"):
            return Sampling()
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        given = {name: config[name] for name in names if config.get(name) is not None}
        sampling = Sampling(**{"temperature": 1.0, **given})
        try:
            Sampler(sampling, self.info.vocab_size)
        except QuantizationError as error:
            raise FileError(f"{self.directory / _GENERATION}: {error}") from error
        return sampling

    def session(self, context_limit: int = 0, cache: CacheForm = "float16") -> Session:
        """An empty session: what the model has seen.

        Args:
            context_limit: Most tokens; 0: as many as the model allows.
            cache: How keys and values are kept: "float16", "float32" or "int8".

        Raises:
            QuantizationError: a limit above what the model allows, an unknown cache.
        """
        return self._native.session(context_limit, cache)

    def forward(self, appends: Sequence[Append], cancellation: Cancellation | None = None) -> list[Logits] | None:
        """Appends tokens to sessions, in one pass. Returns logits (rows, vocab_size) for each; None if cancelled."""
        return self._native.forward(appends, cancellation)

    def logits(self, prompt: Prompt, cache: CacheForm = "float16") -> NDArray[np.float32]:
        """Logits after each token of a prompt, float32 (tokens, vocab_size)."""
        return self._all_logits(self.session(0, cache), self._tokens(prompt))

    # ---- answers -----------------------------------------------------------------------------------------------------

    def generate(self, prompt: Prompt, max_tokens: int = 128, **options: Any) -> Generation:
        """The answer to a prompt, all at once; see `steps` for the options."""
        return self._collected(self._tokens(prompt), max_tokens, options)

    def stream(self, prompt: Prompt, max_tokens: int = 128, **options: Any) -> Iterator[str]:
        """The text of the answer to a prompt as it is written."""
        return (step.text for step in self.steps(self._tokens(prompt), max_tokens, **options) if step.text)

    def chat(self, messages: "Sequence[Message]", max_tokens: int = 1024, **options: Any) -> Generation:
        """The model's next message in a conversation, all at once.

        Args:
            messages: `[{"role": "user", "content": "Hello!"}]`, as the model's chat template knows them.

        Raises:
            FileError: the model has no tokenizer, or no chat template.
            QuantizationError: the template refuses the messages; as `steps`.
        """
        return self._collected(self.text.encode_chat(messages), max_tokens, options)

    def stream_chat(self, messages: "Sequence[Message]", max_tokens: int = 1024, **options: Any) -> Iterator[str]:
        """The same as it is written."""
        tokens = self.text.encode_chat(messages)
        return (step.text for step in self.steps(tokens, max_tokens, **options) if step.text)

    def steps(
        self,
        tokens: Sequence[int],
        max_tokens: int,
        *,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        session: Session | None = None,
        seen: Sequence[int] = (),
        cancellation: Cancellation | None = None,
    ) -> Iterator[Step]:
        """The tokens of an answer, one after the other.

        Args:
            tokens: What is appended to the session before the answer; at least one.
            max_tokens: Most tokens of the answer. It also ends where the context is full.
            sampling: How tokens are chosen; None: `default_sampling`, with a seed that is drawn.
            stop: Texts that end the answer; they are not part of it.
            session: What the model has seen already; None: nothing. Afterwards it has seen prompt and answer, but for
                the last token.
            seen: The tokens that the session has seen, for repetition_penalty, which counts them.
            cancellation: Ends the answer from another thread.

        Raises:
            QuantizationError: no tokens, or more than the context allows; a parameter out of its range.
        """
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
            raise QuantizationError(f"max_tokens is {max_tokens!r}, expected a positive integer")
        own = session or self.session()
        sampler = Sampler(sampling or self._drawn_sampling(), self.info.vocab_size)
        sampler.see(seen)
        sampler.see(tokens)
        return self._steps(list(tokens), max_tokens, sampler, stop, own, cancellation)

    def _steps(
        self,
        tokens: list[int],
        max_tokens: int,
        sampler: Sampler,
        stop: Sequence[str],
        session: Session,
        cancellation: Cancellation | None,
    ) -> Iterator[Step]:
        has_text = (self.directory / "tokenizer.json").is_file()
        stream = self.text.stream(stop) if has_text or stop else None  # Without a tokenizer it says what is missing.
        for index in range(max_tokens):
            logits = self._native.forward([Append(session, tokens)], cancellation)
            if logits is None:
                yield Step(-1, stream.finish() if stream else "", "cancelled")
                return
            token = sampler.sample(logits[0][0])
            is_end = token in self.end_tokens
            text = stream.push(token) if stream and not is_end else ""
            reason: FinishReason | None = "stop" if is_end or (stream and stream.stopped) else None
            full = session.position >= session.context_limit
            if reason is None and (index + 1 == max_tokens or full):
                reason = "length"
            if reason and stream and not stream.stopped:
                text += stream.finish()
            yield Step(token, text, reason)
            if reason:
                return
            tokens = [token]

    def _all_logits(self, session: Session, tokens: list[int]) -> NDArray[np.float32]:
        found = self._native.forward([Append(session, tokens, "all")])
        assert found is not None  # Nobody can cancel it.
        return found[0]

    def _collected(self, tokens: Sequence[int], max_tokens: int, options: dict[str, Any]) -> Generation:
        sampling = options.pop("sampling", None) or self._drawn_sampling()
        steps = list(self.steps(tokens, max_tokens, sampling=sampling, **options))
        reason = steps[-1].finish_reason
        assert reason is not None
        answer = [step.token for step in steps if step.token >= 0]
        return Generation("".join(step.text for step in steps), answer, reason, len(tokens), sampling.seed)

    def _drawn_sampling(self) -> Sampling:
        default = self.default_sampling
        return replace(default, seed=secrets.randbits(32)) if default.temperature else default

    def _tokens(self, prompt: Prompt) -> list[int]:
        return self.text.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def perplexity(self, prompt: Prompt, window: int = 0, cache: CacheForm = "float16") -> float:
        """exp of the mean negative log-likelihood of each token but the first, given those before it.

        Args:
            window: Most tokens that are seen together; longer texts are cut into windows of so many, each of which
                begins anew. 0: as many as the model allows.

        Raises:
            QuantizationError: fewer than two tokens, or a window of fewer or of more than the model allows.
        """
        most = self.info.max_position_embeddings
        size = most if window == 0 else window
        if isinstance(size, bool) or not isinstance(size, int) or not 2 <= size <= most:
            raise QuantizationError(f"window is {window!r}, expected 0 or 2 to {most}")
        tokens = self._tokens(prompt)
        total, count = 0.0, 0
        for first in range(0, len(tokens), size):
            part = tokens[first : first + size]
            if len(part) > 1:
                total += self._surprise(part, cache)
                count += len(part) - 1
        if not count:
            raise QuantizationError(f"prompt has {len(tokens)} tokens, expected at least 2")
        return float(np.exp(total / count))

    def _surprise(self, tokens: list[int], cache: CacheForm) -> float:
        """The sum of negative log-likelihoods; logits of at most 128 tokens are in memory at a time."""
        session, total = self.session(0, cache), 0.0
        for first in range(0, len(tokens) - 1, 128):
            part = tokens[first : min(first + 128, len(tokens) - 1)]
            wide = self._all_logits(session, part).astype(np.float64)
            wide -= wide.max(axis=1, keepdims=True)
            following = tokens[first + 1 : first + 1 + len(part)]
            total -= float((wide[np.arange(len(part)), following] - np.log(np.exp(wide).sum(axis=1))).sum())
        return total
