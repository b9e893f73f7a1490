"""What the linear layers of a model are, and its packed embeddings: ternary, int8 or float, trainable or deployed, and
how large."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError
from bitlayers.bitlinear import BitLinear
from bitlayers.embedding import PackedEmbedding, TernaryEmbedding
from bitlayers.packed_module import PackedModule


@dataclass(frozen=True)
class LayerSummary:
    """One linear layer, or an embedding of ternary or int8 codes.

    Attributes:
        name: Its qualified name.
        kind: "ternary" for a `BitLinear` or a `TernaryEmbedding`, "int8" for an `Int8Linear` or an `Int8Embedding`,
            "float" for any other `nn.Linear`.
        state: "trainable" or "deployed".
        in_features: Size of the last dimension of x; of an embedding the size of a row.
        out_features: Size of the last dimension of y; of an embedding the number of rows.
        quant_config: The schema of what is ternary; None for others.
        bytes: What its parameters and buffers take.
    """

    name: str
    kind: str
    state: str
    in_features: int
    out_features: int
    quant_config: BitQuantConfig | None
    bytes: int


@dataclass(frozen=True)
class Summary:
    """The linear layers of a model and its packed embeddings, in the order of `named_modules()`. Prints as a table."""

    layers: tuple[LayerSummary, ...]

    @property
    def bytes(self) -> int:
        """What they take together; shared tensors count for each layer."""
        return sum(layer.bytes for layer in self.layers)

    def __str__(self) -> str:
        rows = [("layer", "kind", "state", "out x in", "bytes")]
        for layer in self.layers:
            shape = f"{layer.out_features} x {layer.in_features}"
            rows.append((layer.name or "(model)", layer.kind, layer.state, shape, f"{layer.bytes:,}"))
        rows.append(("total", "", "", "", f"{self.bytes:,}"))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def summary(model: nn.Module) -> Summary:
    """Lists every linear layer of a model, and every embedding of ternary or int8 codes.

    Raises:
        QuantizationError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise QuantizationError(f"model is a {type(model).__name__}, expected an nn.Module")
    return Summary(
        tuple(_of(name, part) for name, part in model.named_modules() if isinstance(part, nn.Linear | PackedModule))
    )


def _of(name: str, layer: Any) -> LayerSummary:
    tensors: list[Tensor] = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    ternary = isinstance(layer, BitLinear | TernaryEmbedding)
    packed = isinstance(layer, PackedModule)
    embedding = isinstance(layer, PackedEmbedding)
    return LayerSummary(
        name=name,
        kind="ternary" if ternary else "int8" if packed else "float",
        state="deployed" if packed or (isinstance(layer, BitLinear) and layer.is_deployed) else "trainable",
        in_features=layer.embedding_dim if embedding else layer.in_features,
        out_features=layer.num_embeddings if embedding else layer.out_features,
        quant_config=layer.quant_config if ternary else None,
        bytes=sum(tensor.nbytes for tensor in tensors),
    )
