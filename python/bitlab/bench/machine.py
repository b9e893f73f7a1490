"""What runs the benchmark."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from bitcore.kernels.builtin import CPU_FEATURES
from bitlab import __version__

CPUINFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
ASSUMED_CACHE_BYTES = 64 * 2**20  # Where the system does not tell: more than one core of most machines sees.


@dataclass(frozen=True)
class Machine:
    """The machine and what is installed on it."""

    cpu: str
    cpu_features: tuple[str, ...]
    cores: int
    last_level_cache_bytes: int
    system: str
    bitlab: str
    torch: str


def describe() -> Machine:
    """This machine."""
    return Machine(
        cpu=_cpu_model(CPUINFO),
        cpu_features=tuple(CPU_FEATURES),
        cores=len(os.sched_getaffinity(0)),
        last_level_cache_bytes=last_level_cache(CACHES),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        bitlab=__version__,
        torch=torch.__version__,
    )


def _cpu_model(cpuinfo: Path) -> str:
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.processor() or platform.machine()


def last_level_cache(caches: Path) -> int:
    """Bytes of the largest cache that one core sees."""
    sizes = [_bytes(path.read_text().strip()) for path in caches.glob("index*/size")]
    return max(sizes, default=ASSUMED_CACHE_BYTES)


def _bytes(text: str) -> int:
    """Of "32768K"."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text)
