"""The commands and their arguments."""

import argparse
import io
import platform
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from bitlab import __version__
from bitlab.bench.options import UsageError, add_arguments, to_options
from bitlab.output import PIPE_WIDTH

MISSING_TORCH = """torch is not installed: run `pip install "bitlab[torch]"`"""
MISSING_EXTRAS = "the demo needs scikit-learn and matplotlib: pip install 'bitlab[demo]'"


def positive(text: str) -> int:
    """An argument that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def build_parser() -> argparse.ArgumentParser:
    """All commands and options."""
    parser = argparse.ArgumentParser(prog="bitlab", description="Ternary neural networks, from training to C++.")
    parser.add_argument("--version", action="version", version=f"bitlab {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="this machine, its kernels, and which one each config gets")
    info.set_defaults(run=run_info)
    demo = commands.add_parser("demo", help="train, pack, save and run a ternary network on handwritten digits")
    demo.add_argument("--output", type=Path, default=Path("demo-output"), help="where results go (%(default)s)")
    demo.add_argument("--seeds", type=positive, default=5, help="how many trainings to average over (%(default)s)")
    demo.add_argument("--epochs", type=positive, default=40, help="passes over the training images (%(default)s)")
    demo.add_argument("--skip-timing", action="store_true", help="do not time the layer against nn.Linear")
    demo.set_defaults(run=run_demo)
    inspect = commands.add_parser("inspect", help="what a checkpoint holds, and what BitLab can do with it")
    inspect.add_argument("path", type=Path, help="a GGUF or safetensors file, or a directory of Hugging Face")
    inspect.set_defaults(run=run_inspect)
    convert = commands.add_parser("convert", help="any ternary checkpoint into BitLab's form")
    add_convert_arguments(convert)
    convert.set_defaults(run=run_convert)
    generate = commands.add_parser("generate", help="let a language model go on with a text")
    add_model_arguments(generate)
    generate.add_argument("prompt", help="the text; -: from the standard input")
    generate.add_argument("--stop", action="append", default=[], help="a text that ends the answer; may be repeated")
    add_answer_arguments(generate, most=128)
    generate.set_defaults(run=run_generate)
    chat = commands.add_parser("chat", help="talk to a language model; Ctrl-C stops an answer, Ctrl-D ends")
    add_model_arguments(chat)
    chat.add_argument("--system", help="a message before the conversation")
    add_answer_arguments(chat, most=1024)
    chat.set_defaults(run=run_chat)
    perplexity = commands.add_parser("perplexity", help="how well a language model foresees a text")
    add_model_arguments(perplexity)
    perplexity.add_argument("text", type=Path, help="a file of text")
    perplexity.add_argument(
        "--window", type=positive, help="tokens that are seen together (512, if the model allows so many)"
    )
    perplexity.set_defaults(run=run_perplexity)
    bench = commands.add_parser("bench", help="time the kernels against the limits of this machine and against peers")
    bench.add_argument("model", nargs="?", type=Path, help="a language model in BitLab's form, instead of the kernels")
    bench.add_argument("--turns", type=positive, default=7, help="of everything, for a model (%(default)s)")
    add_arguments(bench)
    bench.set_defaults(run=run_bench)
    return parser


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `bitlab convert`."""
    parser.add_argument("source", type=Path, help="a directory of Hugging Face, or a GGUF file")
    parser.add_argument("target", type=Path, help="the directory that is made; nothing of that name may be there")
    parser.add_argument("--layout", choices=("2bit", "1.6bit"), default="2bit", help="bits per weight (%(default)s)")
    parser.add_argument(
        "--head", choices=("int8", "keep"), default="int8", help="a head that is not ternary, and what it is tied to: "
        "int8 with a scale per row, or as it is (%(default)s)"
    )  # fmt: skip
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="take the tokenizer of this directory")
    parser.add_argument(
        "--scales", choices=("multiply", "divide"), help="what scales of packed weights do, if config.json does not say"
    )
    parser.add_argument("--hidden-act", choices=("silu", "relu2"), help="the activation, if a GGUF file does not say")
    parser.add_argument(
        "--verify", action="store_true", help="compare logits with the source's in transformers (needs torch)"
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, and how it runs."""
    parser.add_argument("source", help="a directory, a GGUF file, or owner/name on the hub")
    parser.add_argument("--offline", action="store_true", help="take from the hub only what has been fetched before")
    parser.add_argument("--threads", type=int, default=0, help="default: all CPUs that this process may use")
    parser.add_argument("--kernel", help="of ternary layers; default: the best (see bitlab info)")


def add_answer_arguments(parser: argparse.ArgumentParser, most: int) -> None:
    """How an answer is written. What is not given is as the model's generation_config.json says.

    To choose among tokens is to draw: with one of --top-k, --top-p and --min-p the temperature is 1 unless something
    else is said. Without --seed the seed is drawn, too.
    """
    parser.add_argument("--max-tokens", type=positive, default=most, help="most tokens of an answer (%(default)s)")
    parser.add_argument("--temperature", type=float, help="0: always the most probable token")
    parser.add_argument("--top-k", type=int, help="draw among so many")
    parser.add_argument("--top-p", type=float, help="draw among those that make up this share")
    parser.add_argument("--min-p", type=float, help="draw among those of at least this share of the most probable")
    parser.add_argument("--repetition-penalty", type=float, help="above 1: avoid tokens that were there")
    parser.add_argument("--seed", type=int, help="the same seed, the same answer")
    parser.add_argument("--context", type=int, default=0, help="most tokens in all; default: what the model allows")
    parser.add_argument("--cache", choices=("float16", "float32", "int8"), default="float16", help="%(default)s")
    parser.add_argument("--timing", action="store_true", help="print tokens per second")


def run_info(arguments: argparse.Namespace, console: Console) -> int:
    """`bitlab info`."""
    if find_spec("torch") is None:
        print_without_torch(console)
        return 0
    from bitlab.info import print_info

    print_info(console)
    return 0


def print_without_torch(console: Console) -> None:
    """What there is to know about an installation without kernels for torch: it runs language models alone."""
    lines = (f"bitlab {__version__}", MISSING_TORCH, f"processor: {platform.machine()}")
    console.print("\n".join(lines), highlight=False, markup=False)


def run_demo(arguments: argparse.Namespace, console: Console) -> int:
    """`bitlab demo`."""
    try:
        from bitlab.demo import DemoOptions, run
    except ModuleNotFoundError as error:
        if error.name not in ("sklearn", "matplotlib"):
            raise
        console.print(f"[red]{MISSING_EXTRAS}[/red]", highlight=False)
        return 2
    options = DemoOptions(
        output=arguments.output,
        seeds=arguments.seeds,
        epochs=arguments.epochs,
        with_timing=not arguments.skip_timing,
    )
    return run(options, console)


def run_inspect(arguments: argparse.Namespace, console: Console) -> int:
    """`bitlab inspect`."""
    from bitlab.inspect import run

    return run(arguments.path, console)


def run_convert(arguments: argparse.Namespace, console: Console) -> int:
    """`bitlab convert`."""
    from bitlab.convert import run

    return run(arguments, console)


def run_generate(arguments: argparse.Namespace, console: Console) -> int:
    """`bitlab generate`."""
    from bitlab.talk import generate

    return generate(arguments, console)


def run_chat(arguments: argparse.Namespace, console: Console) -> int:
    """`bitlab chat`."""
    from bitlab.talk import chat

    return chat(arguments, console)


def run_perplexity(arguments: argparse.Namespace, console: Console) -> int:
    """`bitlab perplexity`."""
    from bitlab.talk import perplexity

    return perplexity(arguments, console)


def run_bench(arguments: argparse.Namespace, console: Console) -> int:
    """`bitlab bench`."""
    if arguments.model is not None:
        from bitlab.bench.model import run as run_model

        kernel = None if arguments.kernels in (("all",), ("best",)) else arguments.kernels[0]
        return run_model(arguments.model, arguments.threads, kernel, arguments.turns, arguments.output, console)
    from bitlab.bench.main import run

    return run(to_options(arguments), arguments.command_line, console)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0 where all went well, 1 for a failed check or error, 2 for misuse."""
    arguments = build_parser().parse_args(argv)
    for stream in (sys.stdin, sys.stdout):  # What is no UTF-8 becomes U+FFFD, or "?", and is no reason to stop.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    arguments.command_line = ["bitlab", *(sys.argv[1:] if argv is None else argv)]
    console = Console() if sys.stdout.isatty() else Console(width=PIPE_WIDTH)
    try:
        code: int = arguments.run(arguments, console)
        return code
    except UsageError as error:
        print(f"bitlab: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        if error.name not in ("torch", "bitcore"):
            raise
        print(f"bitlab: {MISSING_TORCH if error.name == 'torch' else error}", file=sys.stderr)
        return 1
    except _expected_errors() as error:
        print(f"bitlab: {error}", file=sys.stderr)
        return 1


def _expected_errors() -> tuple[type[Exception], ...]:
    """OSError, and BitLabError if bitcore has been imported: importing it here would take seconds."""
    exceptions = sys.modules.get("bitcore.exceptions")
    return (OSError, exceptions.BitLabError) if exceptions else (OSError,)
