"""A language model next to the limits of this machine, in turns: prompt, generation, bytes per token."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bitlab.bench import machine
from bitlab.bench.limits import best_path, peak_sampler
from bitlab.bench.limits_library import STREAMS, measure_read
from bitlab.times import Spread, spread
from bitmodels.language_model import LanguageModel
from bitmodels.native_model import Append, Session

JSON_FILE = "model.json"
PROMPT, SHORT_PROMPT, CONTEXT, GENERATED = 512, 128, 128, 16
READS = 4  # Of all bytes, one after the other, as generation reads them.


@dataclass
class ModelResults:
    """Of one number of threads. Rates per second."""

    threads: int
    bytes_per_token: int  # Weights, and the keys and values of CONTEXT tokens.
    ternary_operations: int  # Of a token: two per weight of the ternary linear layers.
    read: list[float] = field(default_factory=list)  # Bytes.
    peak: list[float] = field(default_factory=list)  # Operations of the fastest int8 multiply-adds.
    prompt: list[float] = field(default_factory=list)  # Tokens, of a prompt of PROMPT.
    first_token: list[float] = field(default_factory=list)  # Seconds, after a prompt of SHORT_PROMPT.
    generation: list[float] = field(default_factory=list)  # Tokens, at a context of CONTEXT.

    @property
    def of_bandwidth(self) -> float:
        """What generation reaches of the read bandwidth."""
        return spread(self.generation).median * self.bytes_per_token / spread(self.read).median

    @property
    def of_peak(self) -> float:
        """What a prompt's ternary operations reach of the peak, all of its time counted."""
        return spread(self.prompt).median * self.ternary_operations / spread(self.peak).median


def run(directory: Path, threads: Sequence[int], kernel: str | None, turns: int, output: Path, console: Console) -> int:
    """Measures a model in BitLab's form. Returns 0."""
    found = [_measure(directory, count, kernel, turns) for count in threads]
    console.print(_table(found))
    output.mkdir(parents=True, exist_ok=True)
    record = {
        "model": str(directory),
        "machine": asdict(machine.describe()),
        "results": [asdict(each) for each in found],
    }
    (output / JSON_FILE).write_text(json.dumps(record, indent=2))
    console.print(f"Figures: {output / JSON_FILE}", highlight=False, soft_wrap=True)
    return 0


def _measure(directory: Path, threads: int, kernel: str | None, turns: int) -> ModelResults:
    model = LanguageModel.open(directory, threads=threads, kernel=kernel)
    found = ModelResults(threads, _bytes_per_token(model), 2 * _ternary_weights(directory))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for subjects in [list(_subjects(model, found))] * (turns + 1):
            for into, measure in subjects:
                into.append(measure())
    finally:
        torch.set_num_threads(before)
    for samples in (found.read, found.peak, found.prompt, found.first_token, found.generation):
        del samples[0]  # The first turn warms up.
    return found


def _subjects(model: LanguageModel, found: ModelResults) -> Iterator[tuple[list[float], Callable[[], float]]]:
    """Where each figure goes, and what measures it."""
    data = torch.zeros(model.info.weight_bytes, dtype=torch.uint8)
    peak = peak_sampler(best_path("int8"))
    session = model.session()
    yield found.read, lambda: max(measure_read(data, streams, READS) for streams in STREAMS)
    yield found.generation, lambda: GENERATED / _generate(model, session)
    yield found.peak, lambda: max(peak()) * 1e9
    yield found.prompt, lambda: PROMPT / _time_prompt(model, session, PROMPT)
    yield found.first_token, lambda: _time_prompt(model, session, SHORT_PROMPT)


def _time_prompt(model: LanguageModel, session: Session, count: int) -> float:
    session.truncate(0)
    tokens = [index * 7919 % model.info.vocab_size for index in range(count)]
    begin = time.perf_counter()
    model.forward([Append(session, tokens)])
    return time.perf_counter() - begin


def _generate(model: LanguageModel, session: Session) -> float:
    _time_prompt(model, session, CONTEXT)
    begin = time.perf_counter()
    for index in range(GENERATED):
        model.forward([Append(session, [index])])
    return time.perf_counter() - begin


def _bytes_per_token(model: LanguageModel) -> int:
    info = model.info
    return info.weight_bytes + CONTEXT * 2 * 2 * info.num_layers * info.num_key_value_heads * info.head_dim


def _ternary_weights(directory: Path) -> int:
    """Of the linear layers."""
    config = json.loads((directory / "config.json").read_text())
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    weights: int = config["num_hidden_layers"] * hidden * (2 * queries + 2 * keys + 3 * inner)
    return weights


def _table(found: list[ModelResults]) -> Table:
    table = Table()
    table.add_column("")
    for each in found:
        table.add_column(f"threads: {each.threads}", justify="right")
    rows: list[tuple[str, Callable[[ModelResults], str]]] = [
        ("read bandwidth, GB/s", lambda r: _spread(r.read, 1e-9)),
        ("int8 peak, GOPS", lambda r: _spread(r.peak, 1e-9)),
        ("bytes per token, MB", lambda r: f"{r.bytes_per_token / 1e6:,.1f}"),
        (f"generation at context {CONTEXT}, tokens/s", lambda r: _spread(r.generation, 1)),
        ("  of bytes per token / bandwidth", lambda r: f"{100 * r.of_bandwidth:.0f} %"),
        (f"prompt of {PROMPT}, tokens/s", lambda r: _spread(r.prompt, 1)),
        ("  ternary operations of the peak", lambda r: f"{100 * r.of_peak:.0f} %"),
        (f"first token after {SHORT_PROMPT}, ms", lambda r: _spread(r.first_token, 1e3)),
    ]
    for name, text in rows:
        table.add_row(name, *map(text, found))
    return table


def _spread(samples: list[float], unit: float) -> str:
    """The median, and the range of the middle 80 percent."""
    s: Spread = spread([sample * unit for sample in samples])
    return f"{s.median:,.1f} ({s.low:,.1f} - {s.high:,.1f})"
