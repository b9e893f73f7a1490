"""What the tests of bitcore share: configs, small layers, and the straight-through step in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bitcore.config import BitQuantConfig, all_configs

CONFIGS = (
    *(config for config in all_configs() if config.weight_granularity != "per_group"),
    BitQuantConfig("per_group", "int8", "per_channel", 32),
    BitQuantConfig("per_group", "int8", "per_group", 32),
    BitQuantConfig("per_group", "int8", "per_tensor"),
    BitQuantConfig("per_group", "float32", "per_channel", 32),
)
"""All without groups, and some of each kind with them: most tests' layers have more than 32 in_features."""

INT8_CONFIGS = tuple(config for config in CONFIGS if config.activation_dtype == "int8")
PER_TOKEN = BitQuantConfig("per_tensor", "int8", "per_channel")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def id_of(config: BitQuantConfig) -> str:
    """For parametrized tests: `per_tensor-int8-per_channel`, `per_group32-int8-per_group`."""
    groups = config.group_size if config.weight_granularity == "per_group" else ""
    return f"{config.weight_granularity}{groups}-{config.activation_dtype}-{config.activation_granularity}"


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
