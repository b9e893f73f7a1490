"""`bitlab generate`, `bitlab chat` and `bitlab perplexity`."""

import argparse
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from bitcore.exceptions import BitLabError
from bitlab.convert import print_conversion
from bitlab.output import PIPE_WIDTH
from bitmodels.language_model import LanguageModel, Step
from bitmodels.native_model import Sampling, Session
from bitmodels.sources import model_directory

INTERRUPTED = 130


def generate(arguments: argparse.Namespace, console: Console) -> int:
    """Writes the answer to a prompt. Returns the exit code."""
    model = open_model(arguments, console)
    prompt = arguments.prompt if arguments.prompt != "-" else sys.stdin.read()
    tokens = model.text.encode(prompt)
    steps = model.steps(
        tokens,
        arguments.max_tokens,
        sampling=_sampling(arguments, model),
        stop=arguments.stop,
        session=_session(arguments, model),
    )
    print(prompt, end="", flush=True)
    interrupted = _write(steps, len(tokens), console if arguments.timing else None)
    return INTERRUPTED if interrupted else 0


def chat(arguments: argparse.Namespace, console: Console) -> int:
    """Talks until the input ends. Ctrl-C stops an answer, and at the prompt the program."""
    model = open_model(arguments, console)
    model.text.render([{"role": "user", "content": ""}])  # Says now if there is no template.
    beginning = [{"role": "system", "content": arguments.system}] if arguments.system else []
    messages, session, seen = list(beginning), _session(arguments, model), list[int]()
    while (line := _read()) is not None:
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        answer: list[Step] = []
        try:
            tokens = model.text.encode_chat(messages)
            if len(tokens) > session.context_limit and len(messages) > len(beginning) + 1:
                _say(f"the context of {session.context_limit} tokens is full: the conversation begins anew")
                messages = [*beginning, messages[-1]]
                tokens = model.text.encode_chat(messages)
            # What the session has seen of it already is not computed again; the last token gives the logits.
            shared = _shared(seen, tokens[:-1])
            session.truncate(shared)
            seen = seen[:shared]
            sampling = _sampling(arguments, model)
            steps = model.steps(tokens[shared:], arguments.max_tokens, sampling=sampling, session=session, seen=seen)
            _write(_kept(steps, answer), len(tokens) - shared, console if arguments.timing else None)
        except BitLabError as error:
            _say(str(error))
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": "".join(step.text for step in answer)})
        seen = [*tokens, *(step.token for step in answer)][: session.position]
    print()
    return 0


def perplexity(arguments: argparse.Namespace, console: Console) -> int:
    """Prints the perplexity of a text file."""
    model = open_model(arguments, console)
    tokens = model.text.encode(Path(arguments.text).read_text(encoding="utf-8", errors="replace"))
    value = model.perplexity(tokens, arguments.window or min(512, model.info.max_position_embeddings))
    console.print(f"{len(tokens):,} tokens, perplexity {value:.4f}", highlight=False)
    return 0


def open_model(arguments: argparse.Namespace, console: Console) -> LanguageModel:
    """Opens a source, which is converted first if it is not BitLab's own form."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None, visible=False)

        def progress(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=f"converting {name}", visible=True)

        directory = model_directory(
            arguments.source,
            offline=arguments.offline,
            progress=progress,
            converted=lambda conversion: print_conversion(conversion, _errors()),
        )
    return LanguageModel.open(directory, kernel=arguments.kernel, threads=arguments.threads)


def _say(what: str) -> None:
    print(f"bitlab: {what}", file=sys.stderr)


def _errors() -> Console:
    """Where what is not the answer goes."""
    return Console(stderr=True) if sys.stderr.isatty() else Console(stderr=True, width=PIPE_WIDTH)


def _session(arguments: argparse.Namespace, model: LanguageModel) -> Session:
    return model.session(arguments.context, arguments.cache)


def _sampling(arguments: argparse.Namespace, model: LanguageModel) -> Sampling | None:
    """What was asked for; None: the model's own."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if not given:
        return None
    own = model.default_sampling
    if own.temperature == 0 and given.keys() & {"top_k", "top_p", "min_p"}:
        given.setdefault("temperature", 1.0)
    given.setdefault("seed", secrets.randbits(32))
    return Sampling(**{**{name: getattr(own, name) for name in names}, **given})


def _write(steps: Iterator[Step], prompt_tokens: int, timing: Console | None) -> bool:
    """Writes an answer as it comes. Returns whether Ctrl-C ended it."""
    begin, first, count, interrupted = time.perf_counter(), 0.0, 0, False
    try:
        for step in steps:
            first = first or time.perf_counter()
            count += 1
            print(step.text, end="", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    print(flush=True)
    if timing is not None and count:
        end = time.perf_counter()
        rate = f", then {(count - 1) / (end - first):.1f} tokens/s" if count > 1 else ""
        timing.print(
            f"{prompt_tokens} prompt tokens in {first - begin:.2f} s ({prompt_tokens / (first - begin):.1f} tokens/s)"
            f"{rate}",
            highlight=False,
        )
    return interrupted


def _kept(steps: Iterator[Step], into: list[Step]) -> Iterator[Step]:
    for step in steps:
        into.append(step)
        yield step


def _read() -> str | None:
    """A line of the user's; None when there are no more."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None


def _shared(seen: list[int], tokens: list[int]) -> int:
    """How many first tokens are the same."""
    return next((i for i, (a, b) in enumerate(zip(seen, tokens, strict=False)) if a != b), min(len(seen), len(tokens)))
