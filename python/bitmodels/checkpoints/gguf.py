"""GGUF files: the header, the table of tensors, and which of several layouts a type id means.

The gguf package knows neither the newer ids nor the ones that two projects share, so the table is read here, every
length checked against the file before it is believed.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bitcore.exceptions import FileError
from bitmodels.checkpoints.stored import Bytes, Checkpoint, StoredTensor, check_apart, map_file

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MOST_DIMENSIONS = 4
MOST_NESTING = 4  # of arrays in arrays

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_LEAST_VALUE_BYTES = {_BOOL: 1, _STRING: 8, _ARRAY: 12}


class Encoding(NamedTuple):
    """A tensor's type: blocks of so many values in so many bytes, and `extra` bytes of a tensor or of a row."""

    name: str
    values: int
    size: int
    tensor_extra: int = 0
    row_extra: int = 0

    def bytes_of(self, shape: tuple[int, ...]) -> int | None:
        """Of a tensor; None where blocks do not fit its rows."""
        values = int(np.prod(shape, dtype=np.int64))
        row = shape[-1]
        if (values if self.tensor_extra else row) % self.values:
            return None
        return values // self.values * self.size + self.tensor_extra + values // max(1, row) * self.row_extra


# By id, the encodings that files have been seen with.
ENCODINGS: dict[int, tuple[Encoding, ...]] = {
    0: (Encoding("float32", 1, 4),),
    1: (Encoding("float16", 1, 2),),
    2: (Encoding("Q4_0", 32, 18),),
    3: (Encoding("Q4_1", 32, 20),),
    6: (Encoding("Q5_0", 32, 22),),
    7: (Encoding("Q5_1", 32, 24),),
    8: (Encoding("Q8_0", 32, 34),),
    10: (Encoding("Q2_K", 256, 84),),
    11: (Encoding("Q3_K", 256, 110),),
    12: (Encoding("Q4_K", 256, 144),),
    13: (Encoding("Q5_K", 256, 176),),
    14: (Encoding("Q6_K", 256, 210),),
    24: (Encoding("int8", 1, 1),),
    25: (Encoding("int16", 1, 2),),
    26: (Encoding("int32", 1, 4),),
    27: (Encoding("int64", 1, 8),),
    28: (Encoding("float64", 1, 8),),
    30: (Encoding("bfloat16", 1, 2),),
    34: (Encoding("TQ1_0", 256, 54),),
    35: (Encoding("TQ2_0", 256, 66),),
    36: (Encoding("I2_S", 128, 32, tensor_extra=32),),
    41: (Encoding("Q1_0", 128, 18),),
    42: (Encoding("Q2_0 of 64", 64, 18), Encoding("Q2_0 of 128", 128, 34)),
    134: (Encoding("IQ1_BN", 64, 13, row_extra=2),),
    135: (Encoding("IQ2_BN", 64, 16, row_extra=4),),
    142: (Encoding("PQ2_0", 128, 34),),
    143: (Encoding("PTQ1_0", 128, 28),),
}

# Ids that are known, and why their tensors cannot be read.
UNREADABLE = {
    38: "TL1 of bitnet.cpp, whose tiles are described by a kernel_config.ini that the file does not hold",
    39: "TL2 of bitnet.cpp (tiles described by a kernel_config.ini that the file does not hold) or MXFP4",
    40: "NVFP4, or vlut.cpp's lookup tables",
    335: "IQ2_BN_R4 of ik_llama.cpp, rows interleaved for one CPU: convert the file that it was made from",
}


class _Entry(NamedTuple):
    """A line of the table of tensors."""

    shape: tuple[int, ...]
    type_id: int
    offset: int  # From the first byte of all data.


class _Reader:
    """Takes one value after the other, and never one that runs past the end."""

    def __init__(self, path: Path, data: Bytes) -> None:
        self.path = path
        self.data = memoryview(data)  # type: ignore[arg-type]
        self.position = 0

    def fail(self, what: str) -> FileError:
        return FileError(f"{self.path}: {what}")

    def left(self) -> int:
        return len(self.data) - self.position

    def take(self, size: int, what: str) -> memoryview:
        if size > self.left():
            raise self.fail(f"{what} has {size} bytes at byte {self.position}, and the file ends at {len(self.data)}")
        self.position += size
        return self.data[self.position - size : self.position]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code), what))[0]

    def count(self, least_bytes: int, what: str) -> int:
        """A number of things that follow, each of at least so many bytes."""
        count: int = self.number("Q", what)
        if count * least_bytes > self.left():
            raise self.fail(f"{what} is {count}, more than the file has room for")
        return count

    def string(self, what: str) -> str:
        text = bytes(self.take(self.count(1, f"the length of {what}"), what))
        return text.decode("utf-8", errors="surrogateescape")  # Tokens may be any bytes.

    def value(self, kind: int, what: str, nesting: int = 0) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind], what)
        if kind == _BOOL:
            return bool(self.number("B", what))
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            raise self.fail(f"{what} has the value type {kind}, expected 0 to 12")
        if nesting == MOST_NESTING:
            raise self.fail(f"{what} holds arrays in arrays, more than {MOST_NESTING} deep")
        element: int = self.number("I", what)
        if element in _NUMBERS:
            code = _NUMBERS[element]
            count = self.count(struct.calcsize(code), f"the length of {what}")
            return np.frombuffer(self.take(count * struct.calcsize(code), what), dtype="<" + code).tolist()
        count = self.count(_LEAST_VALUE_BYTES.get(element, 1), f"the length of {what}")
        return [self.value(element, what, nesting + 1) for _ in range(count)]


def read_gguf(path: Path) -> Checkpoint:
    """Metadata and tensors of a GGUF file.

    Raises:
        FileError: no GGUF file, of a version or byte order that is not read, damaged, truncated; tensors that overlap
            or run past the file; a type that is unknown or cannot be told from another.
        OSError: it cannot be read.
    """
    data = map_file(path)
    reader = _Reader(path, data)
    if bytes(reader.take(4, "the magic number")) != MAGIC:
        raise reader.fail("no GGUF file: it does not begin with GGUF")
    version: int = reader.number("I", "the version")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        order = " (it is written for a big-endian machine)" if swapped in (2, 3) else ""
        raise reader.fail(f"GGUF version {version}{order}, expected 2 or 3")
    tensor_count = reader.count(24, "the number of tensors")
    metadata = _read_metadata(reader)
    entries = _read_entries(reader, tensor_count)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or isinstance(alignment, bool) or alignment < 1 or alignment & (alignment - 1):
        raise reader.fail(f"general.alignment is {alignment!r}, expected a power of two")
    begin = -(-reader.position // alignment) * alignment
    tensors = _place(path, data, begin, alignment, entries)
    return Checkpoint(path, f"GGUF {version}", metadata, tensors)


def _read_metadata(reader: _Reader) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(reader.count(13, "the number of metadata")):
        key = reader.string("a metadata key")
        if key in metadata:
            raise reader.fail(f"the metadata have {key} twice")
        metadata[key] = reader.value(reader.number("I", key), key)
    return metadata


def _read_entries(reader: _Reader, count: int) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    for _ in range(count):
        name = reader.string("a tensor's name")
        if name in entries:
            raise reader.fail(f"the tensor {name} is there twice")
        dimensions: int = reader.number("I", name)
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise reader.fail(f"{name} has {dimensions} dimensions, expected 1 to {MOST_DIMENSIONS}")
        sizes = [reader.number("Q", name) for _ in range(dimensions)]
        values = 1
        for size in sizes:
            values *= size
        if not 0 < values < 2**62:
            raise reader.fail(f"{name} has the sizes {sizes}, which no file can hold")
        entries[name] = _Entry(tuple(reversed(sizes)), reader.number("I", name), reader.number("Q", name))
    return entries


def _place(
    path: Path, data: Bytes, begin: int, alignment: int, entries: Mapping[str, _Entry]
) -> dict[str, StoredTensor]:
    offsets = sorted({entry.offset for entry in entries.values()})
    ends = dict(zip(offsets, [*offsets, len(data) - begin][1:], strict=True))
    two_layouts = _told_apart(path, alignment, entries, ends)
    places, encodings = {}, {}
    for name, entry in entries.items():
        if entry.offset % alignment:
            raise FileError(f"{path}: {name} begins at {entry.offset}, expected a multiple of {alignment}")
        encoding = two_layouts.get(entry.type_id) or _only(path, name, entry)
        size = encoding.bytes_of(entry.shape)
        if size is None:
            raise FileError(
                f"{path}: {name} is {encoding.name}, in blocks of {encoding.values}, and has the shape {entry.shape}"
            )
        encodings[name] = encoding.name
        places[name] = (begin + entry.offset, begin + entry.offset + size)
    check_apart(path, places, len(data))
    return {
        name: StoredTensor(name, entry.shape, encodings[name], data[places[name][0] : places[name][1]])
        for name, entry in entries.items()
    }


def _only(path: Path, name: str, entry: _Entry) -> Encoding:
    if entry.type_id in UNREADABLE:
        raise FileError(f"{path}: {name} has type {entry.type_id}: {UNREADABLE[entry.type_id]}")
    if entry.type_id not in ENCODINGS:
        raise FileError(f"{path}: {name} has type {entry.type_id}, which is not known")
    return ENCODINGS[entry.type_id][0]


def _told_apart(
    path: Path, alignment: int, entries: Mapping[str, _Entry], ends: Mapping[int, int]
) -> dict[int, Encoding]:
    """The encoding of every id that has two, by the room that its tensors have.

    Raises:
        FileError: neither fits, or both.
    """
    found = {}
    for type_id, candidates in ENCODINGS.items():
        own = [entry for entry in entries.values() if entry.type_id == type_id]
        if len(candidates) == 1 or not own:
            continue
        fitting = [each for each in candidates if all(_fills(each, entry, ends, alignment) for entry in own)]
        if len(fitting) != 1:
            names = " nor ".join(each.name for each in candidates)
            what = "neither " + names if not fitting else " and ".join(each.name for each in fitting)
            raise FileError(f"{path}: the tensors of type {type_id} have room for {what}: which one cannot be told")
        found[type_id] = fitting[0]
    return found


def _fills(encoding: Encoding, entry: _Entry, ends: Mapping[int, int], alignment: int) -> bool:
    """Whether a tensor takes the room up to the next one, but for padding."""
    size = encoding.bytes_of(entry.shape)
    return size is not None and 0 <= ends[entry.offset] - entry.offset - size < alignment
