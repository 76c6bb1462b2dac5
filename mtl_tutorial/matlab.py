"""MATLAB files of version 5 to 7.2, as far as data sets here need them: numbers and cells of them.

scipy reads far more, but dies of a file in which one byte names a type of data that there is not;
here such a file is refused. Format: "MAT-File Format", The MathWorks, chapter 1. A file is a header
of 128 bytes and elements, each a tag (type, number of bytes) and its data, filled up to 8 bytes.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

LARGEST = 2**28  # bytes of a variable, unpacked
_HEADER = 128
_MATRIX, _COMPRESSED = 14, 15
_CELL = 1
# How numbers are stored, by type of element, and what they are numbers of, by class of array.
_STORED = {
    1: "i1",
    2: "u1",
    3: "i2",
    4: "u2",
    5: "i4",
    6: "u4",
    7: "f4",
    9: "f8",
    12: "i8",
    13: "u8",
}
_CLASSES = dict(
    zip(range(6, 16), ("f8", "f4", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"), strict=True)
)
_COMPLEX = 0x800


def load(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Variables by name; those that are neither arrays of real numbers nor cells are left out.

    Args:
        path: of the file.

    Returns:
        Arrays in MATLAB's shape, of two dimensions or more; a cell is an array of arrays.

    Raises:
        ValueError: the file is of another kind, cut or damaged.
    """
    data = memoryview(path.read_bytes())
    order = {b"IM": "<", b"MI": ">"}.get(bytes(data[126:_HEADER]))
    if order is None or data[125 if order == "<" else 124] != 1:
        raise ValueError("no MATLAB file of version 5 to 7.2")
    found = {}
    for kind, body in _elements(data[_HEADER:], order):
        if kind == _COMPRESSED:
            unpack = zlib.decompressobj()
            try:
                body = memoryview(unpack.decompress(body, LARGEST))
            except zlib.error as error:
                raise ValueError(f"packed data are damaged: {error}") from None
            if not unpack.eof:
                raise ValueError(f"packed data are cut or larger than {LARGEST} bytes")
            kind, body = next(_elements(body, order), (0, body))
        if kind != _MATRIX:
            raise ValueError(f"an element of type {kind} where a variable should be")
        name, value = _matrix(body, order)
        if value is not None:
            found[name] = value
    return found


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """Type and data of each element."""
    at = 0
    while at < len(data):
        if at + 8 > len(data):
            raise ValueError("cut within a tag")
        kind, size = np.frombuffer(data[at : at + 8], f"{order}u4").tolist()
        start = at + 8
        if kind >> 16:  # up to four bytes of data are part of the tag
            kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
            at += 8
            if size > 4:
                raise ValueError("a short element that is not short")
        else:
            at = start + size
            if at > len(data):
                raise ValueError(f"cut: {size} bytes are promised, {len(data) - start} are there")
            if kind != _COMPRESSED:
                at += -at % 8
        yield kind, data[start : start + size]


def _matrix(data: memoryview, order: str, depth: int = 0) -> tuple[str, Any]:
    """Name and value of an array; the value is None where it is of a kind that is left out."""
    parts = list(_elements(data, order))
    if len(parts) < 3 or [kind for kind, _ in parts[:3]] != [6, 5, 1] or len(parts[0][1]) != 8:
        raise ValueError("an array without flags, shape and name")
    flags = int(np.frombuffer(parts[0][1], f"{order}u4")[0])
    shape = _numbers(parts[1], order).tolist()
    name = bytes(parts[2][1]).decode("latin-1")
    kind, rest = flags & 0xFF, parts[3:]
    if len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"an array of shape {shape}")
    if kind == _CELL:
        if len(rest) != math.prod(shape) or any(k != _MATRIX for k, _ in rest) or depth > 2:
            raise ValueError(f"a cell of shape {shape} with {len(rest)} entries")
        cells = np.empty(len(rest), dtype=object)
        for i, (_, body) in enumerate(rest):
            cells[i] = _matrix(body, order, depth + 1)[1]
        return name, cells.reshape(shape, order="F")
    if kind not in _CLASSES or flags & _COMPLEX:
        return name, None
    if len(rest) != 1 or rest[0][0] not in _STORED:
        raise ValueError(f"an array of numbers with {len(rest)} parts")
    numbers = _numbers(rest[0], order)
    if len(numbers) != math.prod(shape):
        raise ValueError(f"{len(numbers)} numbers for an array of shape {shape}")
    return name, numbers.astype(_CLASSES[kind]).reshape(shape, order="F")


def _numbers(element: tuple[int, memoryview], order: str) -> np.ndarray[Any, Any]:
    kind, data = element
    stored = np.dtype(f"{order}{_STORED[kind]}")
    if len(data) % stored.itemsize:
        raise ValueError(f"{len(data)} bytes for numbers of {stored.itemsize}")
    return np.frombuffer(data, stored)
