"""What a checkpoint is, and what BitLab can do with it."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bitcore.exceptions import FileError
from bitmodels.checkpoints.codes import (
    TERNARY_ENCODINGS,
    Codes,
    codes_of,
    codes_of_packed,
    codes_of_qweight,
)
from bitmodels.checkpoints.conversion import describe_conversion
from bitmodels.checkpoints.gguf import MAGIC, read_gguf
from bitmodels.checkpoints.huggingface import SUFFIX, as_array, read_directory, read_tensors
from bitmodels.checkpoints.stored import Checkpoint, StoredTensor
from bitmodels.checkpoints.ternary import ternary_floats
from bitmodels.checkpoints.tokenizer import TOKENIZER, vocabulary_of

FLOATS = ("float32", "float16", "bfloat16")
LOOKED_AT = 1 << 20  # Weights of a float matrix that are looked at for whether they are ternary.

_IGNORED = ("int32", "int64", "bool")  # Buffers of positions and the like.


@dataclass
class Group:
    """Tensors of one kind."""

    kind: str
    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    codes: Codes | None = None

    def add(self, tensor: StoredTensor, parameters: int, codes: Codes | None = None) -> None:
        self.tensors += 1
        self.parameters += parameters
        self.bytes += tensor.data.size
        if codes is not None:
            self.codes = self.codes or Codes()
            self.codes.add(codes)


@dataclass
class Report:
    """What inspect_checkpoint() found."""

    path: Path
    container: str
    architecture: str
    groups: list[Group] = field(default_factory=list)
    scales: str = "none"  # How scales of ternary weights are stored.
    tokenizer: str = "none"
    notes: list[str] = field(default_factory=list)  # What is odd about it, and what BitLab can do with it.


def inspect_checkpoint(path: str | Path) -> Report:
    """Looks at every byte of the ternary weights of a GGUF file, a safetensors file, or a directory of Hugging Face.

    Raises:
        FileError: it is none of them, damaged, or of a type that nobody but its writer can read (the message says why).
        OSError: it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return _inspect_directory(read_directory(path))
    if path.suffix == SUFFIX:
        return _inspect_directory(Checkpoint(path, "one safetensors file", {}, read_tensors(path)))
    with path.open("rb") as file:
        begin = file.read(len(MAGIC))
        if begin != MAGIC[: len(begin)]:
            raise FileError(f"{path}: neither a directory nor a file of safetensors or GGUF")
    return _inspect_gguf(read_gguf(path))


def _largest_first(groups: Iterable[Group]) -> list[Group]:
    return sorted(groups, key=lambda group: -group.bytes)


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def _inspect_gguf(checkpoint: Checkpoint) -> Report:
    metadata = checkpoint.metadata
    architecture = metadata.get("general.architecture")
    report = Report(checkpoint.path, checkpoint.container, str(architecture or "not named (general.architecture)"))
    groups: dict[str, Group] = {}
    for tensor in checkpoint.tensors.values():
        codes = codes_of(tensor) if tensor.encoding in TERNARY_ENCODINGS else None
        groups.setdefault(tensor.encoding, Group(tensor.encoding)).add(tensor, tensor.numel, codes)
    report.groups = _largest_first(groups.values())
    report.tokenizer = _gguf_tokenizer(checkpoint)
    if any(group.codes for group in report.groups):
        report.scales = "multiply"
    _note_codes(report)
    if str(architecture).startswith("bitnet"):
        report.notes.append(
            "llama.cpp's converter divides by every scale and quantizes anew: if this file was made by it from packed "
            "weights whose scale multiplies (bitnet-b1.58-2B-4T), its scales are wrong, which nothing in the file shows"
        )
    _note_conversion(report, checkpoint)
    return report


def _gguf_tokenizer(checkpoint: Checkpoint) -> str:
    metadata = checkpoint.metadata
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        return "none"
    kind = f"{metadata.get('tokenizer.ggml.model')}, split as {metadata.get('tokenizer.ggml.pre', 'not named')}"
    embedding = checkpoint.tensors.get("token_embd.weight")
    return f"{kind}: {_fit(len(tokens), embedding.shape[0] if embedding is not None else None)}"


def _fit(tokens: int, rows: int | None) -> str:
    if rows is None:
        return f"{tokens:,} tokens"
    return f"{tokens:,} tokens, {'within' if tokens <= rows else 'MORE than'} the model's {rows:,}"


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


def _inspect_directory(checkpoint: Checkpoint) -> Report:
    config = checkpoint.metadata
    architectures = config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else config.get("model_type")
    report = Report(checkpoint.path, checkpoint.container, str(named or "not named (config.json)"))
    quantization = config.get("quantization_config")
    quantization = quantization if isinstance(quantization, dict) else {}
    groups: dict[str, Group] = {}
    for tensor in checkpoint.tensors.values():
        if not tensor.numel:
            continue  # Beside packed weights lies an empty tensor that only stops readers.
        kind, parameters, codes = _kind_of(tensor, checkpoint)
        groups.setdefault(kind, Group(kind)).add(tensor, parameters, codes)
    report.groups = _largest_first(groups.values())
    report.tokenizer = _tokenizer_of(checkpoint)
    _note_codes(report)
    if _PACKED in groups:
        report.scales = _convention(quantization)
    if quantization.get("quant_method") == "bitlab":
        report.scales = "multiply"
        report.notes.append("saved by BitLab: import bitlayers.transformers, then from_pretrained() loads it")
    elif checkpoint.path.is_dir():
        _note_conversion(report, checkpoint)
    return report


_PACKED, _OURS = "uint8, ternary, packed by rows (transformers)", "uint8, ternary, packed by BitLab"


def _kind_of(tensor: StoredTensor, checkpoint: Checkpoint) -> tuple[str, int, Codes | None]:
    """What a tensor is, how many parameters it holds, and its codes."""
    name, tensors = tensor.name, checkpoint.tensors
    if tensor.encoding == "uint8" and len(tensor.shape) == 2:
        scale = tensors.get(f"{name}_scale")
        if scale is not None and scale.encoding in FLOATS:
            values = as_array(scale)
            if name.endswith("qweight"):
                return _OURS, *_qweight(tensor, values, checkpoint.path)
            return _PACKED, 4 * tensor.numel, codes_of_packed(tensor, values)
        return "uint8", tensor.numel, None
    if tensor.encoding in FLOATS and len(tensor.shape) == 2:
        grouping = ternary_floats(_first_rows(tensor))
        if grouping is not None:
            of = {"per_tensor": "tensor", "per_channel": "row"}.get(
                grouping.granularity, f"group of {grouping.group_size}"
            )
            return f"{tensor.encoding}, ternary already, one magnitude per {of}", tensor.numel, None
    kind = "norms, biases, scales" if len(tensor.shape) < 2 and tensor.encoding in FLOATS else tensor.encoding
    return kind, 0 if tensor.encoding in _IGNORED else tensor.numel, None


def _first_rows(tensor: StoredTensor) -> StoredTensor:
    rows, columns = tensor.shape
    count = min(rows, max(1, LOOKED_AT // columns))
    return replace(tensor, shape=(count, columns), data=tensor.data[: tensor.data.size // rows * count])


def _qweight(tensor: StoredTensor, scale: Any, path: Path) -> tuple[int, Codes]:
    try:
        codes = codes_of_qweight(tensor, scale)
    except ValueError as error:
        raise FileError(f"{path}: {tensor.name} is no packed weight: its trailer is damaged") from error
    return int(codes.counts.sum()), codes


def _convention(quantization: dict[str, Any]) -> str:
    """What packed weights do with their scale."""
    conventions = {"bitlinear": "divide", "autobitlinear": "multiply"}
    linear_class = str(quantization.get("linear_class", "bitlinear"))
    if quantization.get("quant_method") != "bitnet" or linear_class not in conventions:
        return "NOT KNOWN: config.json does not say whether they divide or multiply"
    return conventions[linear_class]


def _tokenizer_of(checkpoint: Checkpoint) -> str:
    path = checkpoint.path / TOKENIZER
    if not path.exists():
        return f"none (no {TOKENIZER})"
    kind, tokens = vocabulary_of(checkpoint.path, path.read_text(encoding="utf-8", errors="replace"))
    rows = checkpoint.metadata.get("vocab_size")
    return f"{kind}: {_fit(tokens, rows if type(rows) is int else None)}"


# ---- both ------------------------------------------------------------------------------------------------------------


def _note_conversion(report: Report, checkpoint: Checkpoint) -> None:
    try:
        report.notes.append(describe_conversion(checkpoint))
    except FileError as error:
        report.notes.append(f"bitlab convert cannot read it: {error}")


def _note_codes(report: Report) -> None:
    for group in report.groups:
        codes = group.codes
        if codes is None:
            continue
        if codes.invalid:
            report.notes.append(f"{group.kind}: {codes.invalid:,} codes 3, which are no ternary weights")
        if codes.other_scales:
            report.notes.append(f"{group.kind}: {codes.other_scales:,} scales are NaN or infinite")
        if codes.zero_scales or codes.negative_scales:
            report.notes.append(
                f"{group.kind}: {codes.zero_scales:,} scales are 0 and {codes.negative_scales:,} negative"
            )
