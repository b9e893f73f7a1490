"""The peers, one file each, behind one interface: `Peer`."""

import torch

from bitlab.bench.options import ALL, NONE
from bitlab.bench.peers.base import Peer
from bitlab.bench.peers.ggml import Ggml
from bitlab.bench.peers.torch_dynamic import TorchDynamicInt8
from bitlab.bench.peers.torch_linear import TorchLinear
from bitlab.bench.peers.transformers_bitnet import TransformersBitLinear

TORCH_FLOAT32, TORCH_BFLOAT16, TORCH_INT8 = "torch float32", "torch bfloat16", "torch dynamic int8"

PEERS: tuple[Peer, ...] = (
    TorchLinear(torch.float32),
    TorchLinear(torch.bfloat16),
    TorchDynamicInt8(TORCH_INT8, "torch", None),
    TorchDynamicInt8("oneDNN dynamic int8", "onednn", "onednn"),
    TransformersBitLinear(),
    Ggml("TQ2_0"),
    Ggml("TQ1_0"),
)
"""All of them, whether they can run here or not."""


def selected(groups: tuple[str, ...]) -> list[Peer]:
    """The peers of these groups."""
    if NONE in groups:
        return []
    return [peer for peer in PEERS if ALL in groups or peer.group in groups]


__all__ = ["PEERS", "TORCH_BFLOAT16", "TORCH_FLOAT32", "TORCH_INT8", "Peer", "selected"]
