"""A reader of the files that torch.save writes, which need not be trusted.

    state = read_torch_file("model_5.pt")  # dictionaries, lists, plain values and tensors on the CPU

torch.load compares no checksums and believes the directory of the archive: a flipped bit there gives a tensor of
uninitialised memory. Here every member that is read is verified, every tensor lies within its member, and all tensors
together are not much larger than the file.
"""

from __future__ import annotations

import io
import math
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ebm.readers.bounded import Archive, PathLike, open_file
from ebm.readers.pickles import PlainUnpickler

MAX_PICKLE = 1 << 26  # bytes of the structure that holds the tensors; a worker's state takes two thousand
MAX_DIMENSIONS = 64  # of a tensor, as in torch

# The names that torch gives to stored bytes -> the type of their numbers.
STORAGES = {
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
}


def read_torch_file(source: PathLike | BinaryIO) -> Any:
    """Return what torch.save wrote to a file: plain values, dictionaries, lists, tuples and tensors on the CPU.

    Raises ForeignName if the file holds anything else, and other exceptions if it cannot be read or is damaged.
    """
    file = source if isinstance(source, io.BufferedIOBase) else open_file(source)  # type: ignore[arg-type]
    with file, Archive(file, is_stored=True) as archive:
        return TensorUnpickler(archive).load()


class TensorUnpickler(PlainUnpickler):
    """An unpickler of plain values and tensors from an archive of torch.save."""

    def __init__(self, archive: Archive):
        names = [name for name in archive.members if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise ValueError("not a file of torch.save")
        super().__init__(io.BytesIO(archive.read(names[0], MAX_PICKLE)))
        self.archive, self.folder = archive, names[0].removesuffix("data.pkl")
        byte_order = f"{self.folder}byteorder"
        if byte_order in archive.members and archive.read(byte_order, 10) != b"little":
            raise ValueError("its numbers are in another byte order")
        self.stored: dict[str, Tensor] = {}
        self.viewed = 0  # bytes of all tensors; several may share their numbers
        self.substitutes |= {f"torch.{name}": dtype for name, dtype in STORAGES.items()}
        self.substitutes |= {
            "torch._utils._rebuild_tensor_v2": self.build_tensor,
            "torch._utils._rebuild_parameter": self.build_parameter,
            "torch.Size": self.build_size,
            "collections.OrderedDict": dict,
        }

    def persistent_load(self, pid: Any) -> Tensor:
        """Return the stored numbers (n,) that the pickle refers to."""
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise ValueError("a reference to something else than numbers")
        if key not in self.stored:
            self.stored[key] = self.read_numbers(f"{self.folder}data/{key}", dtype)
        numbers = self.stored[key]
        if numbers.dtype != dtype or numbers.numel() != count:
            raise ValueError(f"the numbers {key[:100]} are of another type, or not as many as they should be")
        return numbers

    def read_numbers(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return the numbers (n,) in a member of the archive."""
        contents = torch.empty(self.archive.get_size(name), dtype=torch.uint8)
        self.archive.read_into(name, contents.numpy().data)
        if dtype == torch.bool and len(contents) and contents.max() > 1:
            raise ValueError(f"{name} holds bytes that are neither true nor false")
        return contents.view(dtype)

    def build_tensor(
        self, numbers: Tensor, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: object
    ) -> Tensor:
        """Return a tensor over stored numbers; raise ValueError unless it lies within them and shows each once."""
        if not isinstance(numbers, Tensor) or not is_size(shape) or not is_size(strides) or not is_size((offset,)):
            raise ValueError("a tensor of an impossible shape")
        axes = sorted((stride, length) for stride, length in zip(strides, shape, strict=True) if length != 1)
        extent = 1
        for stride, length in axes if math.prod(shape) else []:
            if stride < extent:
                raise ValueError("a tensor that shows a number twice")
            extent += stride * (length - 1)
        if offset + extent * bool(math.prod(shape)) > len(numbers):
            raise ValueError("a tensor that reaches beyond its numbers")
        self.viewed += math.prod(shape) * numbers.element_size()
        if self.viewed > 2 * self.archive.size:
            raise ValueError("tensors that share their numbers, and are together larger than the file")
        return numbers.as_strided(shape, strides, offset)

    def build_parameter(self, tensor: Tensor, *_: object) -> Tensor:
        """Return the tensor of a parameter."""
        return tensor

    def build_size(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return a shape as a tuple."""
        return shape


def is_size(shape: Any) -> bool:
    """Return whether a value is a tuple of whole numbers that torch takes for a shape."""
    return (
        isinstance(shape, tuple)
        and len(shape) <= MAX_DIMENSIONS
        and all(type(length) is int and 0 <= length < 1 << 62 for length in shape)
    )
