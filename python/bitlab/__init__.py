"""BitLab's command line: `bitlab info` and `bitlab demo`."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("bitlab")
except PackageNotFoundError:  # Run from the source tree, never installed.
    __version__ = "0.1.0+source"

__all__ = ["__version__"]
