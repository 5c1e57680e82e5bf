"""Readers of arrays of numbers in numpy's and MATLAB's files, which need not be trusted.

    with open_file("val_data.npz") as file, Archive(file) as archive:
        rows = read_npy(archive, "data.npy")
    images, classes = read_matlab("train_32x32.mat", ["X", "y"])

An array is laid over the bytes of its file, so that it is never larger than these, whatever its header claims.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from ebm.readers.bounded import Archive, PathLike, inflate, limit_inflated, read_file

# ---- numpy: .npy files, which are the members of .npz archives ----

NPY_HEADER = re.compile(
    rb"\{'descr': '([<>|=]?[biuf]\d{1,2})', 'fortran_order': (True|False), 'shape': \(([\dL, ]*)\),? *\}\s*"
)


def read_npy_header(stream: io.BufferedIOBase) -> tuple[np.dtype, tuple[int, ...], Literal["C", "F"]]:
    """Read the header of an .npy file; return the type, the shape and the order of its array, "C" or "F"."""
    magic = stream.read(8)
    width = {b"\x93NUMPY\x01\x00": 2, b"\x93NUMPY\x02\x00": 4, b"\x93NUMPY\x03\x00": 4}.get(magic)
    if width is None:
        raise ValueError("not a numpy array")
    header = NPY_HEADER.fullmatch(stream.read(min(int.from_bytes(stream.read(width), "little"), 10_000)))
    if header is None:
        raise ValueError("not an array of numbers; pickled objects are not read, because they could run code")
    kind, is_fortran, sizes = header.groups()
    shape = tuple(int(size.rstrip(b"L ")) for size in sizes.split(b",") if size.strip())
    return np.dtype(kind.decode()), shape, "F" if is_fortran == b"True" else "C"


def read_npy(archive: Archive, name: str, limit: int | None = None) -> np.ndarray:
    """Return the array of a member `<name>` of an .npz archive; raise ValueError if it has more than `limit` bytes."""
    contents = archive.read(name, limit)
    stream = io.BytesIO(contents[:11_000])  # enough for the header
    dtype, shape, order = read_npy_header(stream)
    array = np.frombuffer(contents, dtype, math.prod(shape), stream.tell()).reshape(shape, order=order)
    return array.astype(dtype.newbyteorder("="), copy=False)


# ---- MATLAB: files of version 5 ----

# Number of a stored type -> the type.
MATLAB_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
MATRIX, COMPRESSED = 14, 15  # types of elements that hold others


def read_matlab(path: PathLike, names: Sequence[str]) -> list[np.ndarray]:
    """Return the arrays of numbers with these names in a MATLAB file of version 5; raise ValueError if one is missing.

    Variables of other kinds are passed over.
    """
    contents = read_file(path)
    if contents[124:128] != b"\x00\x01IM":
        raise ValueError("not a MATLAB file of version 5")
    arrays, budget = {}, limit_inflated(len(contents))
    for kind, element in read_elements(memoryview(contents)[128:]):
        if kind == COMPRESSED:
            inflated = inflate(element, budget)
            budget -= len(inflated)
            kind, element = next(read_elements(memoryview(inflated)), (0, memoryview(b"")))
        if kind == MATRIX:
            name, array = parse_matrix(element)
            if array is not None and name in names:
                arrays[name] = array
    if missing := [name for name in names if name not in arrays]:
        raise ValueError(f"no array of numbers {missing[0]} in it")
    return [arrays[name] for name in names]


def read_elements(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield the type and the contents of each element of a part of a MATLAB file."""
    position = 0
    while position + 8 <= len(data):
        kind, size = struct.unpack_from("<II", data, position)
        start = position + 8
        if kind >> 16:  # up to four bytes, in place of the size
            kind, size, start = kind & 0xFFFF, kind >> 16, position + 4
        if size > (4 if start == position + 4 else len(data) - start):
            raise ValueError("an element reaches beyond the end")
        yield kind, data[start : start + size]
        padding = 0 if kind == COMPRESSED else -size % 8
        position = position + 8 if start == position + 4 else start + size + padding


def parse_matrix(element: memoryview) -> tuple[str, np.ndarray | None]:
    """Return the name of a MATLAB matrix, and its array, or None if it holds no real numbers."""
    parts = list(itertools.islice(read_elements(element), 4))  # flags, sizes, name, numbers
    if [kind for kind, _ in parts[:3]] != [6, 5, 1] or len(parts[0][1]) < 4 or len(parts[1][1]) % 4:
        raise ValueError("a matrix without flags, sizes and name")
    name = bytes(parts[2][1]).decode("latin1")
    shape = np.frombuffer(parts[1][1], "<i4").tolist()
    is_complex = bool(parts[0][1][1] & 8)
    if len(parts) < 4 or parts[3][0] not in MATLAB_TYPES or is_complex or min(shape, default=0) < 0:
        return name, None
    return name, np.frombuffer(parts[3][1], f"<{MATLAB_TYPES[parts[3][0]]}").reshape(shape, order="F")
