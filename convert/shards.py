"""Safetensors files: headers read and checked here, tensor bytes read straight into their place.

A file is eight bytes (the header's length, little-endian), a JSON header, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import zlib
from typing import BinaryIO

import ml_dtypes
import numpy as np

from ernie_jax.errors import UserError

# Paddle's numpy has no bfloat16 and writes its 16 bits as U16; `table` lets U16 pass only in Paddle's layouts.
FLOAT_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "U16": np.dtype(ml_dtypes.bfloat16),
}
_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
_ITEM_BYTES |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file: `dtype` in the format's spelling, `offset` in bytes from the file's start.

    Offset and bytes are zero while the file is yet to be written.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int = 0
    nbytes: int = 0

    @property
    def numpy_dtype(self) -> np.dtype:
        return FLOAT_DTYPES[self.dtype]


@dataclasses.dataclass(frozen=True)
class Header:
    """What the header of one file says: its tensors in the order of their bytes, its metadata, its own crc32."""

    tensors: list[StoredTensor]
    metadata: dict[str, str]
    crc32: int


def read_header(file: BinaryIO, size: int, name: str, where: str) -> Header:
    """Read and check the header of a safetensors file.

    Args:
      file: the file, open at its start.
      size: its length in bytes.
      name: its name, kept in the tensors.
      where: its full path, for error sentences.

    Raises:
      UserError: if the file is truncated, no safetensors file, or its header contradicts itself.
    """
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > _MAX_HEADER_BYTES:
        raise UserError(f"{where}: not a safetensors file; download it again")
    if 8 + length > size:
        raise UserError(f"{where}: truncated within its header ({size} bytes); download it again")
    raw = file.read(length)
    try:
        header = json.loads(raw, parse_constant=_refuse_constant)
        if not isinstance(header, dict):
            raise ValueError("it is not an object")
        metadata = header.pop("__metadata__", {})
        tensors = [_parse_tensor(tensor, fields, name, 8 + length) for tensor, fields in header.items()]
    except ValueError as error:
        raise UserError(f"{where}: damaged header ({error}); download it again") from None

    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = 8 + length
    for tensor in tensors:
        if tensor.offset != end:
            raise UserError(f"{where}: damaged header (a gap or overlap before {tensor.name}); download it again")
        end += tensor.nbytes
    if end > size:
        raise UserError(f"{where}: truncated: {size} bytes of {end}; download it again")
    if end < size:
        raise UserError(f"{where}: {size - end} bytes more than its header describes; download it again")
    return Header(tensors, metadata, zlib.crc32(raw))


def encode_header(tensors: list[tuple[str, str, tuple[int, ...], int]], metadata: dict[str, str]) -> bytes:
    """Make the first bytes of a file from (name, dtype, shape, bytes) of its tensors, in the order they will follow."""
    header: dict = {"__metadata__": metadata}
    offset = 0
    for name, dtype, shape, nbytes in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # tensors start aligned, as the reference implementation writes them
    return len(raw).to_bytes(8, "little") + raw


class TensorReader:
    """Read parts of tensors from local files; threads may share one."""

    def __init__(self):
        self._descriptors: dict[str, int] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_) -> None:
        for file in list(self._descriptors):
            self.close(file)

    def open(self, file: str, path: str) -> None:
        """Serve `file` from the local path."""
        self._descriptors[file] = os.open(path, os.O_RDONLY)

    def close(self, file: str) -> None:
        os.close(self._descriptors.pop(file))

    def read(self, tensor: StoredTensor, start: int, out: np.ndarray, transposed: bool = False) -> None:
        """Fill `out` with consecutive elements of a tensor, cast to out's dtype.

        Args:
          start: index of the first element. Elements count in the tensor's own order, or with `transposed` in that of
            its transpose.
          out: [n], contiguous.
        """
        if transposed:
            columns, rows = tensor.shape
            first, last = start // columns, -(-(start + out.size) // columns)
            slab = np.empty((last - first, columns), tensor.numpy_dtype)
            slab[:] = self._read_columns(tensor, first, last).T
            out[:] = slab.reshape(-1)[start - first * columns :][: out.size]
        elif out.dtype == tensor.numpy_dtype:
            self._pread(tensor, start * out.itemsize, out)
        else:
            stored = np.empty(out.size, tensor.numpy_dtype)
            self._pread(tensor, start * stored.itemsize, stored)
            out[:] = stored

    def _read_columns(self, tensor: StoredTensor, first: int, last: int) -> np.ndarray:
        """Read columns first..last of a stored matrix."""
        height, width = tensor.shape
        part = np.empty((height, last - first), tensor.numpy_dtype)
        if last - first == width:
            self._pread(tensor, 0, part)
        else:
            for row in range(height):
                self._pread(tensor, (row * width + first) * part.itemsize, part[row])
        return part

    def _pread(self, tensor: StoredTensor, offset: int, out: np.ndarray) -> None:
        view = memoryview(out.reshape(-1).view(np.uint8))
        descriptor, offset = self._descriptors[tensor.file], tensor.offset + offset
        while view:
            count = os.preadv(descriptor, [view], offset)
            if count == 0:
                raise UserError(f"{tensor.file}: ended within {tensor.name}; it was cut while being read")
            view, offset = view[count:], offset + count


def _parse_tensor(name: str, fields, file: str, start: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        numbers = (*shape, begin, end)
        if not all(type(number) is int and number >= 0 for number in numbers) or end < begin:
            raise TypeError
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"entry of {name} is {json.dumps(fields)[:100]}") from None
    if dtype in _ITEM_BYTES and math.prod(shape) * _ITEM_BYTES[dtype] != end - begin:
        raise ValueError(f"{name} is {dtype} {list(shape)} but has {end - begin} bytes")
    return StoredTensor(name, dtype, shape, file, start + begin, end - begin)


def _refuse_constant(text: str):
    raise ValueError(f"{text} is not JSON")
