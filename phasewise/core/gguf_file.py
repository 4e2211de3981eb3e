"""Reads GGUF files (llama.cpp's model format): metadata, the table of tensors, and their raw bytes. No tensor library.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), all little-endian:
    magic "GGUF", version, number of tensors, number of metadata entries
    metadata entries: name, value type, value
    tensor table: name, dimensions (innermost first), type, offset
    padding to `general.alignment`, then the tensors' bytes
The file is mapped, not read: bytes that are not looked at are not loaded.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from phasewise.core.errors import ModelLoadError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
"""Type id → (name, values in a block, bytes of a block)."""


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One entry of the tensor table. `shape` is outermost first; `offset` counts from the beginning of the file."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    num_bytes: int

    @property
    def type_name(self) -> str:
        return TENSOR_TYPES[self.type_id][0]


class GGUFFile:
    """An open GGUF file. `metadata` maps names to Python values, arrays as lists; `tensors` maps names to entries.

    Raises:
        ModelLoadError: one line that says what is wrong (missing, no GGUF, cut short, unknown version or type).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._map = _map_file(self.path)
        try:
            reader = _Reader(self._map, self.path)
            num_tensors, num_entries = _read_header(reader)
            self.metadata: dict[str, Any] = {}
            for _ in range(num_entries):
                name = reader.string()
                self.metadata[name] = reader.value(reader.scalar("I"))
            self.tensors = _read_tensor_table(reader, num_tensors, self.metadata)
        except BaseException:
            self._map.close()
            raise

    def data(self, tensor: GGUFTensor) -> memoryview:
        """The tensor's bytes as they lie in the file, without a copy. Keep no view of them beyond `close`."""
        return memoryview(self._map)[tensor.offset : tensor.offset + tensor.num_bytes]

    def close(self) -> None:
        """Unmaps the file. Raises BufferError while a view from `data` is alive."""
        self._map.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:  # the error's traceback may hold views; they unmap the file when they go
            with contextlib.suppress(BufferError):
                self.close()


class _Reader:
    """A position in the mapped file. Every read raises ModelLoadError past the end, or for a type that is unknown."""

    def __init__(self, buffer: mmap.mmap, path: str) -> None:
        self._buffer = buffer
        self.size = len(buffer)
        self.position = 0
        self.path = path

    def cut_short(self, what: str) -> ModelLoadError:
        return ModelLoadError(
            f"{self.path}: the GGUF file is cut short or damaged in {what} (file size {self.size}); copy it again"
        )

    def take(self, num_bytes: int) -> int:
        """Moves on by `num_bytes` and returns the old position."""
        start = self.position
        if num_bytes > self.size - start:
            raise self.cut_short("its metadata")
        self.position = start + num_bytes
        return start

    def scalar(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self._buffer, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        length = self.scalar("Q")
        start = self.take(length)
        # Lossless for bytes that are no UTF-8, which some vocabularies hold.
        return self._buffer[start : start + length].decode("utf-8", errors="surrogateescape")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        raise ModelLoadError(f"{self.path}: metadata value of the unknown type {kind}; the GGUF file is damaged")

    def _array(self) -> list[Any]:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind in _SCALARS:
            code = f"<{count}{_SCALARS[kind]}"
            start = self.take(count * struct.calcsize("<" + _SCALARS[kind]))
            return list(struct.unpack_from(code, self._buffer, start))
        if kind == _STRING:
            return self._string_array(count)
        raise ModelLoadError(
            f"{self.path}: metadata array of the type {kind}, which no known GGUF file has; damaged file"
        )

    def _string_array(self, count: int) -> list[str]:
        """The hot path (vocabularies of 50,000 strings and more): no call per string but the two that decode it."""
        if count * 8 > self.size - self.position:
            raise self.cut_short("its metadata")
        unpack: Callable[..., tuple[int]] = struct.Struct("<Q").unpack_from
        buffer, size, position = self._buffer, self.size, self.position
        strings: list[str] = []
        for _ in range(count):
            if position + 8 > size:
                raise self.cut_short("its metadata")
            start = position + 8
            position = start + unpack(buffer, position)[0]
            if position > size:
                raise self.cut_short("its metadata")
            strings.append(buffer[start:position].decode("utf-8", errors="surrogateescape"))
        self.position = position
        return strings


def _map_file(path: str) -> mmap.mmap:
    """Raises ModelLoadError when the file cannot be mapped."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size < 24:
                raise ModelLoadError(f"{path} is not a GGUF file: it is shorter than a GGUF header")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelLoadError(f"cannot read the GGUF file {path}: {error.strerror}; check model.path") from None


def _read_header(reader: _Reader) -> tuple[int, int]:
    """(number of tensors, number of metadata entries). Raises ModelLoadError for another format or version."""
    magic = struct.pack("<I", reader.scalar("I"))
    if magic != _MAGIC:
        raise ModelLoadError(f"{reader.path} is not a GGUF file: it begins with {magic!r} instead of {_MAGIC!r}")
    version = reader.scalar("I")
    if version not in _VERSIONS:
        big_endian = version and version & 0xFFFF == 0
        what = "is big-endian" if big_endian else f"has GGUF version {version}"
        raise ModelLoadError(
            f"{reader.path} {what}; supported are the little-endian versions 2 and 3: convert it again with llama.cpp"
        )
    num_tensors, num_entries = reader.scalar("Q"), reader.scalar("Q")
    if 24 * num_tensors + 12 * num_entries > reader.size:  # the shortest possible entries
        raise reader.cut_short("its header")
    return num_tensors, num_entries


def _read_tensor_table(reader: _Reader, num_tensors: int, metadata: dict[str, Any]) -> dict[str, GGUFTensor]:
    """The tensors by name. Raises ModelLoadError when the table, or a tensor, does not fit into the file."""
    entries: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(num_tensors):
        name = reader.string()
        num_dims = reader.scalar("I")
        if num_dims > 8:
            raise ModelLoadError(f"{reader.path}: tensor {name!r} claims {num_dims} dimensions; the file is damaged")
        dims = tuple(reader.scalar("Q") for _ in range(num_dims))
        entries.append((name, dims[::-1], reader.scalar("I"), reader.scalar("Q")))
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise ModelLoadError(f"{reader.path}: general.alignment is {alignment!r}, not a power of two; damaged file")
    data_start = -(-reader.position // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, type_id, offset in entries:
        num_bytes = _tensor_bytes(reader.path, name, shape, type_id)
        if data_start + offset + num_bytes > reader.size:
            raise reader.cut_short(f"tensor {name!r}, which should end at byte {data_start + offset + num_bytes}")
        if name in tensors:
            raise ModelLoadError(f"{reader.path}: tensor {name!r} is there twice; the file is damaged")
        tensors[name] = GGUFTensor(name, shape, type_id, data_start + offset, num_bytes)
    return tensors


def _tensor_bytes(path: str, name: str, shape: tuple[int, ...], type_id: int) -> int:
    """Raises ModelLoadError for a type that is not supported, or rows that are no whole blocks of it."""
    if type_id not in TENSOR_TYPES:
        raise ModelLoadError(f"{path}: tensor {name!r} has the unknown type {type_id}; the file is newer or damaged")
    type_name, block_values, block_bytes = TENSOR_TYPES[type_id]
    row = shape[-1] if shape else 1
    if row % block_values:
        raise ModelLoadError(
            f"{path}: tensor {name!r} of type {type_name} has rows of {row} values, not a multiple of {block_values}"
        )
    return prod(shape) // block_values * block_bytes
