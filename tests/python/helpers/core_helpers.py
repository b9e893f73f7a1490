"""What the tests of bitcore share: configs, small layers, and the straight-through step in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bitcore.config import BitQuantConfig, all_configs

CONFIGS = all_configs()
INT8_CONFIGS = tuple(config for config in CONFIGS if config.activation_dtype == "int8")
PER_TOKEN = BitQuantConfig("per_tensor", "int8", "per_channel")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def id_of(config: BitQuantConfig) -> str:
    """For parametrized tests: `weight-per_tensor-int8-per_channel`."""
    return f"{config.weight_granularity}-{config.activation_dtype}-{config.activation_granularity}"


class Layer(NamedTuple):
    """One layer's tensors."""

    x: Tensor
    weight: Tensor
    bias: Tensor


def make_layer(
    *leading: int, out_features: int = 19, in_features: int = 37, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Layer:
    """Normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*leading, in_features, generator=generator)
    weight = torch.randn(out_features, in_features, generator=generator)
    bias = torch.randn(out_features, generator=generator)
    return Layer(x.to(dtype), weight.to(dtype), bias.to(dtype))
