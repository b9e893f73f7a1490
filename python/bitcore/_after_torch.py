"""Imports a module as soon as torch has been imported."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def load_after_torch(name: str) -> None:
    """Imports the module `name` right after the first `import torch` of the process, which has not happened yet."""
    sys.meta_path.insert(0, _Finder(name))


class _Finder(MetaPathFinder):
    """Has the loader of torch import the other module afterwards, whenever torch is looked for until it is there."""

    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torch":
            return None
        others = [finder for finder in list(sys.meta_path) if finder is not self and hasattr(finder, "find_spec")]
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_both(module: ModuleType) -> None:
                execute(module)
                with suppress(ValueError):  # Another import was faster.
                    sys.meta_path.remove(self)
                if _is_being_imported(self._name.partition(".")[0]):
                    return  # By a module that is in the middle of its own import, and gets what it asks for.
                with suppress(ImportError):  # Torch itself is there; who uses the module is told.
                    import_module(self._name)

            spec.loader.exec_module = execute_both  # type: ignore[method-assign]
        return spec


def _is_being_imported(package: str) -> bool:
    """Whether a module of the package has begun to run and not ended."""
    inside = [module for name, module in list(sys.modules.items()) if name.startswith(f"{package}.")]
    return any(getattr(getattr(module, "__spec__", None), "_initializing", False) for module in inside)
