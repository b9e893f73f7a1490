"""Who is timed: BitLab's kernels in each layout, and the peers."""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle, product
from typing import Literal, cast

import torch
from torch import Tensor

from bitcore.config import ActivationDtype, BitQuantConfig, Granularity
from bitcore.exceptions import KernelNotFoundError, QuantizationError
from bitcore.kernels import BitKernelBase, KernelRegistry
from bitcore.kernels.operator_kernel import OperatorKernel
from bitcore.kernels.registry import find, user_kernels
from bitcore.operators.checks import weight_scale_dtype
from bitcore.ops.packing import pack_weights
from bitlab.bench.layer import WEIGHT_SCALE, Call, Layer, Prepared
from bitlab.bench.limits import best_path, kernel_path
from bitlab.bench.options import ALL, BEST, BenchOptions, UsageError
from bitlab.bench.peers import Peer

OWN_LAYOUT = "own"  # Of a registered kernel that prepares its weights itself.
# Not among "all", but timed where they are named: one is there to check the others, one to serve other devices, and a
# call of theirs takes up to seconds.
SLOW_BY_DESIGN = ("ReferenceKernel", "TorchKernel")


@dataclass(frozen=True)
class Contender:
    """One line of the tables.

    Attributes:
        name: Of the kernel or the peer.
        is_peer: Whether it is one.
        layout: Of packed weights; "" for a peer.
        activations: "int8" or "float32"; "" for a peer.
        dispatched: Whether `bitlinear.forward` would choose this kernel.
        registered: Whether the user registered it.
        path: Whose multiply-add peak bounds it; None where that peak is not measured.
        weights: How many scales the weights have, one of options.WEIGHTS; "" for a peer.
    """

    name: str
    is_peer: bool
    layout: str
    activations: str
    dispatched: bool
    registered: bool
    path: str | None
    weights: str = ""

    @property
    def form(self) -> str:
        """The layout, and how many scales there are where that is not one."""
        return self.layout if self.weights in ("", "per_tensor") else f"{self.layout} {self.weights}"


def config_of(activations: str, weights: str = "per_tensor") -> BitQuantConfig:
    """What is measured: a scale for every row of x, as language models have it, or for every group of a row.

    weights: one of options.WEIGHTS.
    """
    dtype = cast(Literal["int8", "float32"], activations)  # The parser knows no other.
    granularity = cast(Granularity, weights.removesuffix("_x"))
    x_granularity: Granularity = "per_group" if weights.endswith("_x") and dtype == "int8" else "per_channel"
    return BitQuantConfig(granularity, dtype, x_granularity)


def import_modules(names: tuple[str, ...]) -> None:
    """Imports the user's modules, from the current folder too.

    Raises:
        UsageError: one cannot be imported.
    """
    if names and os.getcwd() not in sys.path:  # noqa: PTH109
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UsageError(f"--import {name}: {error}") from error


def choose_kernels(options: BenchOptions) -> dict[str, list[BitKernelBase]]:
    """The kernels of each activation dtype, best first.

    Raises:
        UsageError: a name is unknown, does not run here, or covers none of the activations.
        KernelNotFoundError: the environment names kernels that cover none.
    """
    named = [_named(name, options.activations) for name in options.kernels if name not in (BEST, ALL)]
    return {activations: _of_family(activations, options.kernels, named) for activations in options.activations}


def _named(name: str, activations: tuple[str, ...]) -> BitKernelBase:
    try:
        kernel = find(name)
    except KernelNotFoundError as error:
        raise UsageError(f"--kernels: {error}; or {BEST}, {ALL}") from None
    if not kernel.is_supported():
        raise UsageError(f"--kernels: {name} needs {kernel.requirement}, which this machine does not have")
    if not any(kernel.covers(config_of(dtype), "cpu") for dtype in activations):
        raise UsageError(f"--kernels: {name} does not run {' or '.join(activations)} activations on this CPU")
    return kernel


def _of_family(activations: str, asked: tuple[str, ...], named: list[BitKernelBase]) -> list[BitKernelBase]:
    config = config_of(activations)
    chosen = list(named)
    if BEST in asked:
        chosen.append(dispatched(config))
    if ALL in asked:
        chosen += [k for k in KernelRegistry.all_kernels() if k.name not in SLOW_BY_DESIGN]
    kernels = {kernel.name: kernel for kernel in chosen if kernel.covers(config, "cpu")}
    order = [kernel.name for kernel in KernelRegistry.all_kernels()]
    return sorted(kernels.values(), key=lambda kernel: order.index(kernel.name))


def dispatched(config: BitQuantConfig) -> BitKernelBase:
    """The kernel that a call gets."""
    return find(KernelRegistry.get_kernel_for_config(config).name)


@dataclass(frozen=True)
class Pool:
    """The packed weight of one layout, as often as the layer asks for.

    All kernels go through the copies together: who comes next reads the one that nobody has read for longest. Each from
    the beginning, they would find in the cache what the one before has just read.

    Attributes:
        copies: uint8 (copies, out_features, row_bytes).
        turn: The index of the next copy.
    """

    copies: Tensor
    turn: Iterator[int]


def pack_copies(layer: Layer, layout: str) -> Pool:
    """The pool of a layout.

    Raises:
        QuantizationError: the layout does not exist for this shape.
    """
    packed = pack_weights(layer.codes, layout)
    copies = packed.expand(layer.copies(packed.nbytes), *packed.shape).contiguous()
    return Pool(copies, cycle(range(len(copies))))


def prepare_kernels(
    layer: Layer, kernels: dict[str, list[BitKernelBase]], pools: dict[str, Pool], weights: tuple[str, ...]
) -> dict[Contender, Prepared]:
    """Every kernel with every layout that it reads. pools: by layout."""
    prepared = {}
    for activations, scales in product(kernels, weights):
        config = config_of(activations, scales)
        for kernel in kernels[activations]:
            if not kernel.covers(config, "cpu"):
                continue
            forms = pools if kernel.has_standard_form() else {OWN_LAYOUT: None}
            for layout, pool in forms.items():
                contender = _contender(kernel, layout, config, scales)
                prepared[contender] = (
                    _standard(kernel, layer, pool, config) if pool is not None else _own(kernel, layer, config)
                )
    return prepared


def _contender(kernel: BitKernelBase, layout: str, config: BitQuantConfig, weights: str) -> Contender:
    return Contender(
        weights=weights,
        name=kernel.name,
        is_peer=False,
        layout=layout,
        activations=config.activation_dtype,
        dispatched=kernel.name == dispatched(config).name,
        registered=any(kernel is mine for mine in user_kernels()),
        path=kernel_path(kernel, config),
    )


def _standard(kernel: BitKernelBase, layer: Layer, pool: Pool, config: BitQuantConfig) -> Prepared:
    shape = config.weight_scale_shape(layer.out_features, layer.in_features)
    scale = torch.full(shape, WEIGHT_SCALE, dtype=weight_scale_dtype(config.weight_group_size))
    weights = [(scale.clone(), qweight) for qweight in pool.copies]
    read = pool.copies[0].nbytes + (scale.nbytes if config.weight_group_size else 0)
    return Prepared(read, _binder(kernel, weights, pool.turn, config))


def _own(kernel: BitKernelBase, layer: Layer, config: BitQuantConfig) -> Prepared:
    # Its prepare_weights is made for trained weights, whose mean magnitude is the scale: of ternary ones the codes
    # survive, and the scale is smaller by the share of zeros. That changes no time.
    scale, qweight = kernel.prepare_weights(layer.weight(), config)
    copies = [(scale.clone(), qweight.clone()) for _ in range(layer.copies(max(1, qweight.nbytes)))]
    return Prepared(qweight.nbytes, _binder(kernel, copies, cycle(range(len(copies))), config))


def _binder(
    kernel: BitKernelBase, weights: list[tuple[Tensor, Tensor]], turn: Iterator[int], config: BitQuantConfig
) -> Callable[[Tensor], Call]:
    """Built-in kernels are called as operators, with nothing of Python around; others as they are."""
    function: Callable[..., Tensor] = kernel
    rest: tuple[object, ...] = (None, config)
    if isinstance(kernel, OperatorKernel):
        function, rest = kernel.inference_op, (None, *config.operator_arguments(None, kernel.name))

    def bind(x: Tensor) -> Call:
        calls = [partial(function, x, scale, qweight, *rest) for scale, qweight in weights]
        return lambda: calls[next(turn)]()

    return bind


def prepare_peers(layer: Layer, peers: list[Peer]) -> tuple[dict[Contender, Prepared], dict[str, str]]:
    """The peers that compute this layer, and why the others do not, by name."""
    prepared, reasons = {}, {}
    for peer in peers:
        reason = peer.refuses(layer.out_features, layer.in_features)
        if reason is not None:
            reasons[peer.name] = reason
            continue
        path = best_path(cast("ActivationDtype", peer.family)) if peer.family is not None else None
        prepared[Contender(peer.name, True, "", "", False, False, path)] = peer.prepare(layer)
    return prepared, reasons


def available(peers: list[Peer]) -> tuple[list[Peer], dict[str, str]]:
    """The peers that run here, and why the others do not, by name."""
    reasons = {peer.name: reason for peer in peers if (reason := peer.missing()) is not None}
    return [peer for peer in peers if peer.name not in reasons], reasons


def layouts_of(layer: Layer, layouts: tuple[str, ...]) -> tuple[dict[str, Pool], dict[str, str]]:
    """The copies of every layout that exists for this shape, and why the others do not."""
    pools, reasons = {}, {}
    for layout in layouts:
        try:
            pools[layout] = pack_copies(layer, layout)
        except QuantizationError as error:
            reasons[f"layout {layout}"] = str(error)
    return pools, reasons
