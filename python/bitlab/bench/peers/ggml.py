"""ggml's ternary types, through the shared library that the package llama-cpp-python carries.

Only ggml's public C functions are called, on opaque pointers; no structure of it is laid out here but the three fields
of ggml_init_params. Written and tested against ggml 0.25, as llama-cpp-python 0.3.36 has it.
"""

import ctypes
import functools
import importlib.util
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitcore.exceptions import BitLabError
from bitlab.bench.layer import Layer, Prepared

LIBRARIES = ("ggml-base", "ggml-cpu", "ggml")  # In the order in which they need each other.
FLOAT32 = 0
TYPES = {"TQ1_0": 34, "TQ2_0": 35}  # ggml_type: part of its file format, which keeps the numbers.
BLOCK = 256  # Codes of a block of both types.
THREADPOOL_PARAMETERS_BYTES = 4096  # ggml_threadpool_params has 512 flags and five fields; this is ample.
SLACK_BYTES = 2**20  # Of a context, for padding and the graph.


class _InitParameters(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def library_folder() -> Path | None:
    """Where llama-cpp-python keeps its libraries, or None. The package is not imported: that loads all of it."""
    spec = importlib.util.find_spec("llama_cpp")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "lib"


class Ggml:
    """`ggml_mul_mat` of one ternary type on ggml's CPU backend; it quantizes x to 8 bits itself."""

    group = "ggml"
    family = "int8"

    def __init__(self, type_name: str) -> None:
        self.name = f"ggml {type_name}"
        self._type = TYPES[type_name]

    def missing(self) -> str | None:
        """Where the package or its library cannot be found or loaded."""
        folder = library_folder()
        if folder is None:
            return "the package llama-cpp-python is not installed"
        try:
            load(folder)
        except (OSError, AttributeError) as error:
            return f"ggml in {folder} cannot be loaded: {error}"
        return None

    def refuses(self, out_features: int, in_features: int) -> str | None:
        """Its blocks are rows of 256 codes."""
        return f"in_features {in_features} is no multiple of {BLOCK}" if in_features % BLOCK else None

    def prepare(self, layer: Layer) -> Prepared:
        """1.69 or 2.06 bits a weight: a float16 scale for every 256 codes."""
        folder = library_folder()
        assert folder is not None
        ggml = load(folder)
        row_bytes = int(ggml.ggml_row_size(self._type, layer.in_features))
        packed = torch.empty(layer.out_features, row_bytes, dtype=torch.uint8)
        weight = layer.weight()
        ggml.ggml_quantize_chunk(
            self._type, weight.data_ptr(), packed.data_ptr(), 0, layer.out_features, layer.in_features, None
        )
        return Prepared(packed.nbytes, lambda x: _Multiplication(ggml, self._type, layer, packed, x))


class _Multiplication:
    """Copies of a weight, one x, one graph a copy: the call."""

    def __init__(self, ggml: Any, ggml_type: int, layer: Layer, packed: Tensor, x: Tensor) -> None:
        self._ggml = ggml
        self._context: int | None = None
        self._pool: int | None = None
        self._backend: int | None = None
        copies, rows = layer.copies(packed.nbytes), len(x)
        y_bytes = rows * layer.out_features * 4
        overhead = int(ggml.ggml_graph_overhead()) + 3 * int(ggml.ggml_tensor_overhead()) + 4096
        size = SLACK_BYTES + x.nbytes + copies * (packed.nbytes + y_bytes + overhead)
        self._context = _required(ggml.ggml_init(_InitParameters(size, None, False)), "ggml_init")
        inputs = ggml.ggml_new_tensor_2d(self._context, FLOAT32, layer.in_features, rows)
        ctypes.memmove(ggml.ggml_get_data(inputs), x.data_ptr(), x.nbytes)
        graphs = [self._graph(ggml_type, layer, packed, inputs) for _ in range(copies)]
        self._turn = cycle(graphs)
        self._shape = (rows, layer.out_features)
        self._start_threads(torch.get_num_threads())

    def _graph(self, ggml_type: int, layer: Layer, packed: Tensor, inputs: int) -> tuple[int, Tensor]:
        """The graph that multiplies by one more copy, and a view of its result."""
        ggml = self._ggml
        weight = ggml.ggml_new_tensor_2d(self._context, ggml_type, layer.in_features, layer.out_features)
        ctypes.memmove(ggml.ggml_get_data(weight), packed.data_ptr(), packed.nbytes)
        result = ggml.ggml_mul_mat(self._context, weight, inputs)
        graph = ggml.ggml_new_graph(self._context)
        ggml.ggml_build_forward_expand(graph, result)
        count = int(ggml.ggml_nbytes(result)) // 4
        values = (ctypes.c_float * count).from_address(ggml.ggml_get_data(result))
        return graph, torch.frombuffer(values, dtype=torch.float32)

    def _start_threads(self, threads: int) -> None:
        """Threads that stay, as llama.cpp has them: without a pool they would start anew for every graph."""
        ggml = self._ggml
        self._backend = _required(ggml.ggml_backend_cpu_init(), "ggml_backend_cpu_init")
        parameters = ctypes.create_string_buffer(THREADPOOL_PARAMETERS_BYTES)
        ggml.ggml_threadpool_params_init(parameters, threads)
        self._pool = _required(ggml.ggml_threadpool_new(parameters), "ggml_threadpool_new")
        ggml.ggml_backend_cpu_set_threadpool(self._backend, self._pool)
        ggml.ggml_backend_cpu_set_n_threads(self._backend, threads)

    def __call__(self) -> Tensor:
        """y, float32 (rows, out_features): memory of ggml, valid as long as the call is."""
        graph, y = next(self._turn)
        status = self._ggml.ggml_backend_graph_compute(self._backend, graph)
        if status != 0:
            raise BitLabError(f"ggml_backend_graph_compute returned {status}")
        return y.view(self._shape)

    def __del__(self) -> None:
        if self._backend is not None:
            self._ggml.ggml_backend_free(self._backend)
        if self._pool is not None:
            self._ggml.ggml_threadpool_free(self._pool)
        if self._context is not None:
            self._ggml.ggml_free(self._context)


def _required(pointer: int | None, function: str) -> int:
    if not pointer:
        raise BitLabError(f"{function} returned no object")
    return pointer


class _Functions:
    """ggml's functions by name, from whichever of its libraries has them."""

    def __init__(self, libraries: list[ctypes.CDLL]) -> None:
        for name, (result, arguments) in SIGNATURES.items():
            function = next((getattr(library, name) for library in libraries if hasattr(library, name)), None)
            if function is None:
                raise AttributeError(f"no function {name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)


_POINTER, _INT, _SIZE, _INT64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_int64
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (_POINTER, [_InitParameters]),
    "ggml_free": (None, [_POINTER]),
    "ggml_row_size": (_SIZE, [_INT, _INT64]),
    "ggml_nbytes": (_SIZE, [_POINTER]),
    "ggml_tensor_overhead": (_SIZE, []),
    "ggml_graph_overhead": (_SIZE, []),
    "ggml_new_tensor_2d": (_POINTER, [_POINTER, _INT, _INT64, _INT64]),
    "ggml_get_data": (_POINTER, [_POINTER]),
    "ggml_mul_mat": (_POINTER, [_POINTER, _POINTER, _POINTER]),
    "ggml_new_graph": (_POINTER, [_POINTER]),
    "ggml_build_forward_expand": (None, [_POINTER, _POINTER]),
    "ggml_quantize_chunk": (_SIZE, [_INT, _POINTER, _POINTER, _INT64, _INT64, _INT64, _POINTER]),
    "ggml_threadpool_params_init": (None, [_POINTER, _INT]),
    "ggml_threadpool_new": (_POINTER, [_POINTER]),
    "ggml_threadpool_free": (None, [_POINTER]),
    "ggml_backend_cpu_init": (_POINTER, []),
    "ggml_backend_free": (None, [_POINTER]),
    "ggml_backend_cpu_set_threadpool": (None, [_POINTER, _POINTER]),
    "ggml_backend_cpu_set_n_threads": (None, [_POINTER, _INT]),
    "ggml_backend_graph_compute": (_INT, [_POINTER, _POINTER]),
}


@functools.cache
def load(folder: Path) -> Any:
    """ggml's functions.

    Raises:
        OSError: a library cannot be loaded.
        AttributeError: a function is missing.
    """
    return _Functions([ctypes.CDLL(str(folder / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL) for name in LIBRARIES])
