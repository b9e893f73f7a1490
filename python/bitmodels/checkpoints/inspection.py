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
    ternary_groups,
)
from bitmodels.checkpoints.gguf import MAGIC, read_gguf
from bitmodels.checkpoints.huggingface import SUFFIX, as_array, read_directory, read_json, read_tensors
from bitmodels.checkpoints.stored import Checkpoint, StoredTensor

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
    if rotation := sorted(key for key in metadata if key.startswith("prism.hadamard")):
        report.notes.append(
            f"its weights are in a rotated basis ({rotation[0]}): read without the rotation they give fluent garbage"
        )
    if str(architecture).startswith("bitnet"):
        report.notes.append(
            "llama.cpp's converter divides by every scale and quantizes anew: if this file was made by it from packed "
            "weights whose scale multiplies (bitnet-b1.58-2B-4T), its scales are wrong, which nothing in the file shows"
        )
    report.notes.append("BitLab reads no weights from GGUF files yet")
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
    kinds = set(groups)
    if _PACKED in kinds:
        _note_bitnet(report, quantization)
    elif _OURS in kinds:
        report.scales = "multiply"
        report.notes.append("saved by BitLab: import bitlayers.transformers, then from_pretrained() loads it")
    elif ternary := sorted(kind for kind in kinds if "ternary" in kind):
        report.notes.append(
            f"{ternary[0]}: quantizing these weights anew would change them, for their mean magnitude is smaller than "
            "their magnitude; BitLab does not read them as they are yet"
        )
    elif quantization.get("quant_method") == "bitnet":
        report.notes.append(
            "float weights that transformers quantizes in every forward: load it there, then bitlayers.convert(model) "
            "makes it trainable, and bitlayers.deploy(model) packs it"
        )
    elif quantization:
        report.notes.append(f"quantized by {quantization.get('quant_method')!r}, which BitLab does not read")
    else:
        report.notes.append(
            "no ternary weights: from_pretrained(..., quantization_config=BitLabConfig()) makes its layers ternary, "
            "which have to be trained then"
        )
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
        groups = ternary_groups(as_array(_first_rows(tensor)))
        if groups is not None:
            of = f"group of {groups}" if groups.isdigit() else groups
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


def _note_bitnet(report: Report, quantization: dict[str, Any]) -> None:
    conventions = {"bitlinear": "divide", "autobitlinear": "multiply"}
    linear_class = str(quantization.get("linear_class", "bitlinear"))
    if quantization.get("quant_method") != "bitnet" or linear_class not in conventions:
        report.scales = "NOT KNOWN: config.json does not say whether they divide or multiply"
        report.notes.append("without that word every output would be a guess, so nothing loads it")
        return
    report.scales = conventions[linear_class]
    if quantization.get("use_rms_norm"):
        report.notes.append("its layers have norms of their own (use_rms_norm), which BitLinear has not")
    else:
        report.notes.append("load it with transformers, then bitlayers.convert(model) takes over its codes and scales")


def _tokenizer_of(checkpoint: Checkpoint) -> str:
    path = checkpoint.path / "tokenizer.json"
    if not path.exists():
        return "none (no tokenizer.json)"
    content = read_json(path)
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    added = content.get("added_tokens") or []
    if not isinstance(model, dict) or not isinstance(vocabulary, dict | list) or not isinstance(added, list):
        raise FileError(f"{path}: has no model with a vocabulary")
    ids = [*vocabulary.values()] if isinstance(vocabulary, dict) else [*range(len(vocabulary))]
    ids += [token.get("id") for token in added if isinstance(token, dict)]
    if not all(type(number) is int for number in ids):
        raise FileError(f"{path}: has a token whose id is no number")
    rows = checkpoint.metadata.get("vocab_size")
    return f"{model.get('type')}: {_fit(max(ids, default=-1) + 1, rows if type(rows) is int else None)}"


# ---- both ------------------------------------------------------------------------------------------------------------


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
