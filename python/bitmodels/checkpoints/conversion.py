"""Any ternary checkpoint in, one directory out: what transformers, with BitLab's layers, and the C++ engine read."""

import json
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bitcore.exceptions import FileError, QuantizationError
from bitmodels.checkpoints import dense, gguf_model, hf_model, parts, ternary
from bitmodels.checkpoints.decoder import EMBEDDING, HEAD, Decoder
from bitmodels.checkpoints.gguf import MAGIC, read_gguf
from bitmodels.checkpoints.gguf_tokenizer import tokenizer_files
from bitmodels.checkpoints.huggingface import CONFIG, WEIGHTS, read_directory
from bitmodels.checkpoints.parts import Part, Wish
from bitmodels.checkpoints.stored import Checkpoint, StoredTensor, release
from bitmodels.checkpoints.stream import Output, SafetensorsStream
from bitmodels.checkpoints.tokenizer import TOKENIZER, copied_files, require_fit
from bitmodels.native_model import Append, NativeModel

Layout = Literal["2bit", "1.6bit"]
Head = Literal["int8", "keep"]

Progress = Callable[[int, int, str], None]
"""Called with the bytes that are written, those of the whole, and the module that comes next."""

# Ends of names: buffers that old checkpoints hold and nobody reads; scales that are 1; what config.json says instead.
_IGNORED = ("rotary_emb.inv_freq",)
_IGNORED_GGUF = (".scale", *gguf_model.ROPE_FACTORS)
_PROMPT = 16  # Tokens.
_CHOICES: dict[str, tuple[object, ...]] = {
    "layout": ("2bit", "1.6bit"),
    "head": ("int8", "keep"),
    "scales": (None, "multiply", "divide"),
    "hidden_act": (None, "silu", "relu2"),
}


@dataclass(frozen=True)
class HeadChange:
    """What int8 codes in the head change in the logits of a fixed prompt."""

    largest: float
    deviation: float  # The standard deviation of these logits, for comparison.
    tokens: int  # Of the prompt.

    def __str__(self) -> str:
        return (
            f"the int8 head changes a logit by {self.largest:.2g} at most, on a fixed prompt of {self.tokens} tokens "
            f"(their standard deviation is {self.deviation:.2g})"
        )


@dataclass
class Conversion:
    """What convert_checkpoint() did."""

    source: Path
    target: Path
    container: str
    architecture: str
    parts: list[Part]
    tokenizer: str
    bytes_before: int
    bytes_after: int
    seconds: float  # Without what `check` took.
    notes: list[str] = field(default_factory=list)  # What had to be changed or rounded.
    head_change: HeadChange | None = None  # None: the head is not int8.

    @property
    def parameters(self) -> int:
        """A tied matrix counts once."""
        return sum(part.parameters for part in self.parts)


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    layout: Layout = "2bit",
    head: Head = "int8",
    tokenizer: str | os.PathLike[str] | None = None,
    scales: Literal["multiply", "divide"] | None = None,
    hidden_act: Literal["silu", "relu2"] | None = None,
    check: Callable[[Path], None] | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Converts a ternary language model into a directory that BitLab and transformers read. Needs no torch.

    Codes and scales stay what they are; what cannot stay (a scale of 0, one that float16 does not hold) is counted in
    the result's notes. Ternary embeddings and heads stay ternary. The guide "Bring your model" has all that changes.

    Args:
        source: A directory of Hugging Face (packed by transformers, float masters of a BitNet, or floats that are
            ternary already), or a GGUF file.
        target: The directory that is made; there must be nothing of that name. It appears when it is complete.
        layout: How ternary weights are packed: "2bit", or "1.6bit" (where a row is too short for it, 2bit).
        head: What becomes of a head that is not ternary, and of the embedding that it is tied to: "int8" codes with a
            scale per row, or "keep".
        tokenizer: A directory whose tokenizer is taken in place of the source's.
        scales: Whether the scales of packed weights multiply or divide, where config.json does not say.
        hidden_act: The activation, where a GGUF file does not say.
        check: Called with the complete directory before it gets its name; what it raises is passed on, and nothing
            remains.
        progress: Called as the work goes on.

    Raises:
        FileError: the source is damaged, or something about it is unknown or cannot be told; target exists.
        QuantizationError: an argument has a value that does not exist.
        OSError: a file cannot be read or written; the disk is full. Nothing remains of target.
    """
    begin = time.perf_counter()
    for name, value in (("layout", layout), ("head", head), ("scales", scales), ("hidden_act", hidden_act)):
        if value not in _CHOICES[name]:
            raise QuantizationError(f"{name} is {value!r}, expected {' or '.join(map(repr, _CHOICES[name]))}")
    source, target = Path(source), Path(target)
    _require_free(target)
    found = _read_source(source, layout, head, scales, hidden_act)
    texts = _texts(found, None if tokenizer is None else Path(tokenizer))
    with _directory_beside(target) as directory:
        size = _write_weights(directory / WEIGHTS, found.parts, progress)
        for name, text in texts.items():
            _write(directory / name, text)
        head_change = _head_change(found, directory)
        seconds = time.perf_counter() - begin
        if check is not None:
            check(directory)
        _sync(directory)
        _require_free(target)
        directory.rename(target)
    return Conversion(
        source,
        target,
        found.checkpoint.container,
        found.decoder.architecture.class_name,
        found.parts,
        "none" if TOKENIZER not in texts else f"{TOKENIZER}, from {tokenizer or source}",
        sum(tensor.data.size for tensor in found.checkpoint.tensors.values()),
        size,
        seconds,
        _notes(found),
        head_change,
    )


def describe_conversion(checkpoint: Checkpoint) -> str:
    """What convert_checkpoint() would make of a checkpoint.

    Raises:
        FileError: it would refuse it.
    """
    found = _plan(checkpoint, "2bit", "int8", None, None)
    size = sum(part.bytes_after for part in found.parts)
    return f"bitlab convert makes a {found.decoder.architecture.class_name} of {size / 1e6:,.1f} MB of it (2bit)"


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    checkpoint: Checkpoint
    decoder: Decoder
    parts: list[Part]
    is_gguf: bool


def _read_source(
    path: Path, layout: Layout, head: Head, scales: hf_model.Convention | None, hidden_act: str | None
) -> _Source:
    if path.is_dir():
        return _plan(read_directory(path), layout, head, scales, hidden_act)
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise FileError(f"{path}: neither a directory of Hugging Face nor a GGUF file")
    return _plan(read_gguf(path), layout, head, scales, hidden_act)


def _plan(
    checkpoint: Checkpoint, layout: Layout, head: Head, scales: hf_model.Convention | None, hidden_act: str | None
) -> _Source:
    if checkpoint.path.is_dir():
        return _read_hugging_face(checkpoint, layout, head, scales)
    return _read_gguf(checkpoint, layout, head, hidden_act)


def _read_hugging_face(
    checkpoint: Checkpoint, layout: Layout, head: Head, scales: hf_model.Convention | None
) -> _Source:
    model = hf_model.read_model(checkpoint.path, checkpoint.metadata)
    _require_as_many(checkpoint, model.decoder)
    convention = scales or model.scales
    wish = Wish(layout, "per_channel" if model.bitnet else "per_group")
    taker = _Taker(
        checkpoint, {name: checkpoint.tensors.get(model.stored_name(name)) for name in _names(model.decoder)}, _IGNORED
    )

    def linear(name: str, shape: tuple[int, int]) -> Part:
        tensor, scale = (
            taker.tensors[f"{name}.weight"],
            checkpoint.tensors.get(model.stored_name(f"{name}.weight_scale")),
        )
        if tensor is not None and tensor.encoding == "uint8" and scale is not None:
            taker.expect(f"{name}.weight", (-(-shape[0] // 4), shape[1]), ("uint8",))
            taker.used.add(scale.name)
            if convention is None:
                raise FileError(
                    f"{checkpoint.path}: config.json does not say whether {scale.name} multiplies or divides, and "
                    "nothing else tells: give bitlab convert --scales multiply or divide"
                )
            return parts.of_packed_rows(name, tensor, scale, shape[0], convention == "divide", wish)
        tensor = taker.expect(f"{name}.weight", shape, dense.FLOATS)
        if model.quantize and not _is_listed(name, model.float_modules):
            return parts.of_masters(name, tensor, wish)
        return _ternary_or_float(name, tensor, wish)

    found = [linear(name, shape) for name, shape, _ in model.decoder.linears()]
    for name, shape in model.decoder.matrices():
        tensor = taker.expect(f"{name}.weight", shape, dense.FLOATS)
        found.append(_embedding_or_head(name, tensor, wish, head, model.decoder.tied))
    scaled = {
        part.name: float(part_scale)
        for part in found
        if convention == "multiply" and part.source.startswith("packed")
        for part_scale in (_only_scale(checkpoint, model, part.name),)
    }
    for name, size in model.decoder.vectors():
        tensor = taker.expect(name, (size,), dense.FLOATS)
        found.append(parts.of_floats(name, tensor, None, scaled.get(name.removesuffix(".bias")), suffix=""))
    taker.require_nothing_left(model.decoder)
    _require_ternary(checkpoint, found)
    return _Source(checkpoint, model.decoder, found, is_gguf=False)


def _only_scale(checkpoint: Checkpoint, model: hf_model.HuggingFaceModel, name: str) -> Any:
    """transformers multiplies the bias by it, too."""
    (values,) = dense.chunks(checkpoint.tensors[model.stored_name(f"{name}.weight_scale")])
    return values.reshape(())


def _read_gguf(checkpoint: Checkpoint, layout: Layout, head: Head, hidden_act: str | None) -> _Source:
    if (count := checkpoint.metadata.get("split.count", 1)) not in (0, 1):
        raise FileError(f"{checkpoint.path}: is one of {count} files: merge them with llama.cpp's llama-gguf-split")
    model = gguf_model.read_model(checkpoint, hidden_act)
    _require_as_many(checkpoint, model.decoder)
    wish = Wish(layout, "per_channel" if model.bitnet else "per_group")
    taker = _Taker(checkpoint, model.tensors, _IGNORED_GGUF)
    encodings = (*dense.READ_ENCODINGS, *ternary.READ_ENCODINGS)
    found = []
    for name, shape, _ in model.decoder.linears():
        tensor, order = taker.expect(f"{name}.weight", shape, encodings), model.row_order(name, shape[0])
        if tensor.encoding in ternary.READ_ENCODINGS:
            found.append(parts.of_encoded(name, tensor, wish, order))
        else:
            found.append(_ternary_or_float(name, tensor, wish, order))
    for name, shape in model.decoder.matrices():
        tensor = taker.expect(f"{name}.weight", shape, encodings)
        if tensor.encoding in ternary.READ_ENCODINGS:
            found.append(parts.of_encoded(name, tensor, wish, None))
        else:
            found.append(_embedding_or_head(name, tensor, wish, head, model.decoder.tied))
    for name, size in model.decoder.vectors():
        tensor = taker.expect(name, (size,), dense.FLOATS)
        order = model.row_order(name.removesuffix(".bias"), size) if name.endswith(".bias") else None
        found.append(parts.of_floats(name, tensor, order, suffix=""))
    taker.require_nothing_left(model.decoder)
    _require_ternary(checkpoint, found)
    return _Source(checkpoint, model.decoder, found, is_gguf=True)


def _require_as_many(checkpoint: Checkpoint, decoder: Decoder) -> None:
    """Says early that tensors are missing: a damaged number of layers would take forever to go through."""
    if (layers := decoder.size("num_hidden_layers")) > len(checkpoint.tensors):
        raise FileError(
            f"{checkpoint.path}: num_hidden_layers is {layers}, and there are {len(checkpoint.tensors)} tensors"
        )


def _names(decoder: Decoder) -> Iterator[str]:
    """Of all tensors but scales."""
    yield from (f"{name}.weight" for name, _, _ in decoder.linears())
    yield from (f"{name}.weight" for name, _ in decoder.matrices())
    yield from (name for name, _ in decoder.vectors())


class _Taker:
    """Hands out the tensors that a model is made of, and knows which nobody has taken."""

    def __init__(
        self, checkpoint: Checkpoint, tensors: Mapping[str, StoredTensor | None], ignored: tuple[str, ...]
    ) -> None:
        self.checkpoint = checkpoint
        self.tensors = dict(tensors)
        self.ignored = ignored
        self.used: set[str] = set()  # By their names in the checkpoint.

    def expect(self, name: str, shape: tuple[int, ...], encodings: tuple[str, ...]) -> StoredTensor:
        tensor = self.tensors.get(name)
        path = self.checkpoint.path
        if tensor is None:
            raise FileError(f"{path}: has no tensor {name}, which the model needs")
        if tensor.encoding not in encodings:
            raise FileError(
                f"{path}: {tensor.name} is {tensor.encoding}, which is not read here: {', '.join(encodings)} are"
            )
        if tensor.shape != shape:
            raise FileError(f"{path}: {tensor.name} has shape {tensor.shape}, expected {shape}")
        self.used.add(tensor.name)
        return tensor

    def require_nothing_left(self, decoder: Decoder) -> None:
        """Refuses tensors that the model does not have: they would be lost. A copy of a tied matrix would not."""
        left = {name: tensor for name, tensor in self.checkpoint.tensors.items() if name not in self.used}
        for name, tensor in left.items():
            if name.endswith(self.ignored):
                continue
            if name == f"{HEAD}.weight" and decoder.tied:
                embedding = self.tensors[f"{EMBEDDING}.weight"]
                if embedding is not None and np.array_equal(tensor.data, embedding.data):
                    continue
                raise FileError(f"{self.checkpoint.path}: {name} is not the embedding, which it is tied to")
            raise FileError(
                f"{self.checkpoint.path}: has a tensor {name}, which {decoder.architecture.class_name} has not"
            )


def _is_listed(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether modules_to_not_convert names a module: by its name, or by how that begins or ends."""
    return any(name.startswith(pattern) or name.endswith(pattern) for pattern in patterns)


def _ternary_or_float(name: str, tensor: StoredTensor, wish: Wish, order: parts.RowOrder = None) -> Part:
    grouping = ternary.ternary_floats(tensor) if tensor.encoding in dense.FLOATS else None
    release(tensor)
    if grouping is not None:
        return parts.of_ternary_floats(name, tensor, grouping, wish, order)
    return parts.of_floats(name, tensor, order)


def _embedding_or_head(name: str, tensor: StoredTensor, wish: Wish, head: Head, tied: bool) -> Part:
    part = _ternary_or_float(name, tensor, wish)
    is_head = name == HEAD or tied
    return parts.of_int8(name, tensor) if part.kind == "float" and is_head and head == "int8" else part


def _require_ternary(checkpoint: Checkpoint, found: list[Part]) -> None:
    if not any(part.kind == "ternary" for part in found if part.name not in (EMBEDDING, HEAD)):
        raise FileError(
            f"{checkpoint.path}: no linear layer is ternary, and config.json names no rule that would make it so: "
            "from_pretrained(..., quantization_config=BitLabConfig()) makes layers that train"
        )


# ---- config.json -----------------------------------------------------------------------------------------------------


def quantization_config(found: list[Part], tied: bool) -> dict[str, Any]:
    """What config.json says of the modules: a rule for most of them, and those that differ."""
    modules = [part for part in found if len(part.shape) == 2]
    ternary_parts = [part for part in modules if part.kind == "ternary" and part.name not in (EMBEDDING, HEAD)]
    (((most, layout), _),) = Counter((part.quant_config, part.layout) for part in ternary_parts).most_common(1)
    assert most is not None
    entries: dict[str, dict[str, Any]] = {}
    for part in modules:
        entry: dict[str, Any] = {"kind": part.kind}
        if part.quant_config is not None:
            entry |= part.quant_config.fields_unlike(most)
            entry |= {"layout": part.layout} if part.layout != layout else {}
        if entry != {"kind": "float" if part.name in (EMBEDDING, HEAD) else "ternary"}:
            entries[part.name] = entry
    if tied and EMBEDDING in entries:
        entries[HEAD] = entries[EMBEDDING]
    return {
        "quant_method": "bitlab",
        "format": 1,
        **most.to_dict(),
        "group_size": most.group_size,
        "layout": layout,
        "state": "deployed",
        "modules": entries,
    }


def _texts(found: _Source, tokenizer: Path | None) -> dict[str, str]:
    """The files beside the weights."""
    vocabulary = found.decoder.size("vocab_size")
    if tokenizer is not None:
        texts = copied_files(tokenizer)
        if TOKENIZER not in texts:
            raise FileError(f"{tokenizer}: has no {TOKENIZER}")
    elif found.is_gguf and "tokenizer.ggml.model" not in found.checkpoint.metadata:
        texts = {}
    elif found.is_gguf:
        texts = _gguf_tokenizer(found.checkpoint, vocabulary)
    else:
        texts = copied_files(found.checkpoint.path)
    if TOKENIZER in texts:
        require_fit(tokenizer or found.checkpoint.path, texts[TOKENIZER], vocabulary)
    config = {**found.decoder.config, "quantization_config": quantization_config(found.parts, found.decoder.tied)}
    return {**texts, CONFIG: json.dumps(config, indent=2, ensure_ascii=False) + "\n"}


def _gguf_tokenizer(checkpoint: Checkpoint, vocabulary: int) -> dict[str, str]:
    try:
        return tokenizer_files(checkpoint.metadata, vocabulary)
    except FileError as error:
        raise FileError(f"{checkpoint.path}: {error}") from error


def _notes(found: _Source) -> list[str]:
    changes = ternary.ScaleChanges()
    for part in found.parts:
        changes.add(part.changes)
    notes = []
    if changes.zero:
        notes.append(f"{changes.zero:,} scales are 0: their codes became 0, and the scales 2^-14")
    if changes.negative:
        notes.append(f"{changes.negative:,} scales are negative: they became positive, and their codes changed sign")
    if changes.rounded:
        notes.append(
            f"{changes.rounded:,} scales are no float16 and were rounded, by {changes.largest_error:.2g} of their "
            "value at most"
        )
    return notes


def _head_change(found: _Source, directory: Path) -> HeadChange | None:
    """Compares the logits of what was written with those of the head that the source has."""
    name = EMBEDDING if found.decoder.tied else HEAD
    head = next((part for part in found.parts if part.name == name and part.kind == "int8"), None)
    if head is None:
        return None
    model = NativeModel(directory, kernel=None, threads=0, map_weights=True, check=False)
    count = min(_PROMPT, model.info.max_position_embeddings)
    tokens = [(37 * i + 11) % model.info.vocab_size for i in range(count)]
    answers = model.forward([Append(model.session(), tokens, rows) for rows in ("hidden", "all")])
    assert answers is not None  # Nobody can cancel it.
    hidden, logits = answers
    hidden = hidden / np.float32(found.decoder.config.get("logits_scaling", 1))
    (tensor,) = head.tensors
    largest, first = 0.0, 0
    for rows in dense.chunks(tensor):
        part = logits[:, first : first + len(rows)]
        largest = max(largest, float(np.abs(hidden @ rows.T - part).max()))
        first += len(rows)
        release(tensor)
    return HeadChange(largest, float(logits.std()), count)


# ---- writing ---------------------------------------------------------------------------------------------------------


def _require_free(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise FileError(f"{target}: exists already, expected a name that is free")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"{target}: there is no directory {target.parent} to make it in")


def _write_weights(path: Path, found: list[Part], progress: Progress | None) -> int:
    outputs = [output for part in found for output in part.outputs]
    first = next(part for part in found if part.kind == "ternary" and part.name not in (EMBEDDING, HEAD))
    # Stops a reader that does not know the packed tensors, and would fill in random numbers.
    guard = Output(f"{first.name}.weight", "U8", (0,))
    with SafetensorsStream(path, [*outputs, guard]) as stream:
        total, done = sum(output.nbytes for output in outputs), 0
        for part in found:
            if progress is not None:
                progress(done, total, part.name)
            for name, piece in part.pieces():
                stream.append(name, piece)
            for tensor in part.tensors:
                release(tensor)
            done += part.bytes_after
        if progress is not None:
            progress(total, total, "")
    return stream.nbytes


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _directory_beside(target: Path) -> Iterator[Path]:
    """A new directory beside the target, which is gone afterwards unless it was renamed."""
    directory = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _sync(directory: Path) -> None:
    """So that a crash after the renaming leaves no directory without its files."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
