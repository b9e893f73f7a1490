"""Directories in the form of Hugging Face: config.json and one safetensors file, or several with an index."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bitcore.exceptions import FileError
from bitmodels.checkpoints.stored import Bytes, Checkpoint, StoredTensor, check_apart, map_file
from bitmodels.json_pairs import unique_pairs

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SUFFIX = ".safetensors"

# The names of safetensors' dtypes, and the bits of an element.
DTYPES = {
    "BOOL": ("bool", 8),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E4M3": ("float8_e4m3", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "F32": ("float32", 32),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
    "F64": ("float64", 64),
}


def read_directory(path: Path) -> Checkpoint:
    """A checkpoint's config and tensors.

    Raises:
        FileError: files are missing, damaged or truncated; an index that names files outside of the directory, or does
            not say what its files hold.
        OSError: a file cannot be read.
    """
    config = read_json(path / CONFIG) if (path / CONFIG).exists() else {}
    if (path / INDEX).exists():
        tensors = _read_shards(path, read_json(path / INDEX))
    elif (path / WEIGHTS).exists():
        tensors = read_tensors(path / WEIGHTS)
    else:
        raise FileError(f"{path}: neither {WEIGHTS} nor {INDEX} is there{_what_else(path)}")
    return Checkpoint(path, "safetensors", config, tensors)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileError: it is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_pairs)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: no JSON: {error}") from error
    if not isinstance(value, dict):
        raise FileError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file.

    Raises:
        FileError: a header that is longer than the file, or is not what safetensors writes; tensors that overlap, run
            past the file or have another size than their shape.
    """
    data = map_file(path)
    if len(data) < 8:
        raise FileError(f"{path}: has {len(data)} bytes, expected at least 8")
    length = int(data[:8].view("<u8")[0])
    if length > len(data) - 8:
        raise FileError(f"{path}: the header has {length} bytes, and the file {len(data)}")
    try:
        header = json.loads(bytes(data[8 : 8 + length]).decode("utf-8"), object_pairs_hook=unique_pairs)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: the header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise FileError(f"{path}: the header is a {type(header).__name__}, expected an object")
    body = data[8 + length :]
    tensors = {name: _tensor(path, name, entry, body) for name, entry in header.items() if name != "__metadata__"}
    places = {name: tuple(header[name]["data_offsets"]) for name in tensors}
    check_apart(path, places, len(body))
    return tensors


def _tensor(path: Path, name: str, entry: Any, body: Bytes) -> StoredTensor:
    wrong = FileError(f"{path}: the header says of {name}: {str(entry)[:100]}")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise wrong
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FileError(f"{path}: {name} has dtype {dtype!r}, known are {', '.join(DTYPES)}")
    encoding, bits = DTYPES[dtype]
    size = bits // 8
    for extent in shape:
        size *= extent
    begin, end = offsets
    if end - begin != size:
        raise FileError(f"{path}: {name} has {end - begin} bytes, expected {size} of {dtype} {tuple(shape)}")
    return StoredTensor(name, tuple(shape), encoding, body[begin:end])


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**62 for value in values)


def _read_shards(path: Path, index: dict[str, Any]) -> dict[str, StoredTensor]:
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise FileError(f"{path / INDEX}: weight_map is {str(places)[:100]}, expected the files of tensors")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(places.values())):
        found = read_tensors(_inside(path, shard))
        expected = {name for name, place in places.items() if place == shard}
        if found.keys() != expected:
            missing, extra = _some(expected - found.keys()), _some(found.keys() - expected)
            raise FileError(f"{path / shard}: the index promises {missing}, and the file has {extra} besides")
        tensors |= found
    return tensors


def _inside(path: Path, shard: str) -> Path:
    """The path of a shard, which has to lie in the directory itself.

    A link may lead to another name beside it, and to the blobs of a download cache, as they are kept two levels up.
    """
    file = path / shard
    if "/" in shard or "\\" in shard or "\0" in shard or not shard.endswith(SUFFIX):
        raise FileError(f"{path / INDEX}: names the file {shard!r}, expected a {SUFFIX} file of the directory")
    if not file.exists():
        raise FileError(f"{path / INDEX}: names {shard}, which is not there")
    blobs = path.resolve().parent.parent / "blobs"
    if file.resolve().parent not in (path.resolve(), blobs):
        raise FileError(f"{file}: is a link out of the directory")
    return file


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "") or "nothing"


def _what_else(path: Path) -> str:
    others = sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".gguf", SUFFIX))
    if not others:
        return ""
    hint = ": pickled weights are not read" if others[0].endswith((".bin", ".pt", ".pth")) else ""
    return f", but {_some(others)}{hint}"


def as_array(tensor: StoredTensor) -> np.ndarray[Any, Any]:
    """A view of a tensor's numbers; bfloat16 becomes float32.

    Raises:
        FileError: numpy has no such numbers.
    """
    if tensor.encoding == "bfloat16":
        wide = tensor.data.view("<u2").astype(np.uint32) << 16
        return wide.view(np.float32).reshape(tensor.shape)
    try:
        dtype = np.dtype(tensor.encoding).newbyteorder("<")
    except TypeError as error:
        raise FileError(f"{tensor.name} is {tensor.encoding}, expected plain numbers") from error
    return np.frombuffer(tensor.data, dtype=dtype).reshape(tensor.shape)
