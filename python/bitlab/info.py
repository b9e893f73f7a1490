"""`bitlab info`: this machine, its kernels, and which one each config gets and why."""

import platform

import torch
from rich.console import Console
from rich.table import Table

from bitcore.config import DEFAULT_GROUP_SIZE, BitQuantConfig, all_configs
from bitcore.exceptions import KernelNotFoundError
from bitcore.kernels.base import BitKernelBase
from bitcore.kernels.builtin import CPU_FEATURES, FAMILY_NAMES
from bitcore.kernels.registry import KernelRegistry, naming, user_kernels
from bitlab import __version__


def print_info(console: Console) -> None:
    """Prints three tables."""
    console.print(_machine_table())
    console.print(_kernel_table())
    console.print(_config_table())


def _machine_table() -> Table:
    table = Table(title="Machine", title_justify="left", title_style="bold", show_header=False)
    table.add_row("bitlab", __version__)
    table.add_row("torch", torch.__version__)
    table.add_row("processor", f"{platform.machine()}, {torch.get_num_threads()} threads")
    table.add_row("CPU features", ", ".join(CPU_FEATURES) or "none that kernels use")
    table.add_row("CUDA", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
    table.add_row("BITLAB_KERNEL", ", ".join(naming().names) or "not set")
    return table


def _kernel_table() -> Table:
    table = Table(title="Kernels, best first", title_justify="left", title_style="bold")
    for column in ("kernel", "also called", "needs", "runs here", "activations"):
        table.add_column(column, overflow="fold")
    names = {kernel: alias for alias, kernel in FAMILY_NAMES.items()}
    for kernel in KernelRegistry.all_kernels():
        runs = "[green]yes[/green]" if kernel.is_supported() else "[red]no[/red]"
        table.add_row(kernel.name, names.get(kernel.name, ""), kernel.requirement, runs, _activations(kernel))
    return table


def _activations(kernel: BitKernelBase) -> str:
    return ", ".join(sorted({c.activation_dtype for c in all_configs() if kernel.is_compatible_with(c)}, reverse=True))


def _config_table() -> Table:
    table = Table(title="Which kernel a config gets on the CPU", title_justify="left", title_style="bold")
    for column in ("weights", "activations", "kernel", "why"):
        table.add_column(column, overflow="fold")
    for config in all_configs():
        if config.group_size != DEFAULT_GROUP_SIZE:
            continue  # Every kernel that covers one size covers them all.
        activations = f"{config.activation_dtype} {config.activation_granularity}"
        grouped = config.weight_granularity == "per_group"
        weights = f"per_group of {config.group_size}" if grouped else config.weight_granularity
        table.add_row(weights, activations, *explain(config))
    return table


def explain(config: BitQuantConfig) -> tuple[str, str]:
    """The name of the kernel that a config gets on the CPU, and why."""
    try:
        name = KernelRegistry.get_kernel_for_config(config).name
    except KernelNotFoundError as error:
        return "[red]none[/red]", str(error)
    if naming().names:
        return name, f"named by {naming().by}"
    if any(kernel.name == name for kernel in user_kernels()):
        return name, "registered by the user: before all built-in ones"
    better = [
        f"{kernel.name} needs {kernel.requirement}"
        for kernel in KernelRegistry.all_kernels()[: _position(name)]
        if kernel.is_compatible_with(config) and not kernel.is_supported()
    ]
    return name, "; ".join(["first that covers it and runs here", *better])


def _position(name: str) -> int:
    return [kernel.name for kernel in KernelRegistry.all_kernels()].index(name)
