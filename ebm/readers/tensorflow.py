"""Readers of TensorFlow's files that do not need TensorFlow: checkpoints, protobuf messages and checksums.

    variables = read_tf_checkpoint("cachedir/cifar10_cond/model_74700")  # name -> array

A checkpoint consists of `model_<iter>.index`, a table of names and places in the format of LevelDB, and of shards
`model_<iter>.data-00000-of-00001`, which hold the raw tensors. Files need not be trusted: every size, offset and
checksum is verified, and time and memory are proportional to the length of the files.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ebm.readers.bounded import Fault, open_file, read_file, report_unreadable_file, show_reading
from ebm.support.errors import UsageError

# ---------------------------------------------------------------------------------------------------------------------
# Bytes, numbers and messages, of which the table and its entries consist


def take_bytes(data: bytes, start: int, size: int) -> bytes:
    """Return `size` bytes from `start`; raise Fault if there are fewer."""
    if start + size > len(data):
        raise Fault("is damaged: something in it reaches beyond its end")
    return data[start : start + size]


def read_varint(data: bytes, start: int) -> tuple[int, int]:
    """Return the varint at `start` and the position after it; each byte holds seven bits, the lowest first."""
    value = 0
    for i, byte in enumerate(data[start : start + 10]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, start + i + 1
    raise Fault("is damaged: a number in it does not end")


def read_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) for each field of a protobuf message: a number as int, a nested message as bytes."""
    position = 0
    while position < len(message):
        key, position = read_varint(message, position)
        if key & 7 == 0:
            number, position = read_varint(message, position)
            yield key >> 3, number
        elif key & 7 == 2:
            size, position = read_varint(message, position)
            yield key >> 3, take_bytes(message, position, size)
            position += size
        elif key & 7 == 5:
            yield key >> 3, int.from_bytes(take_bytes(message, position, 4), "little")
            position += 4
        else:
            raise Fault(f"is damaged: a field of the unknown type {key & 7}")


def read_numbers(message: bytes) -> dict[int, int]:
    """Return the numeric fields of a protobuf message: field number -> value; of a repeated field, the last value."""
    return {field: value for field, value in read_fields(message) if isinstance(value, int)}


def read_nested(message: bytes, field: int) -> list[bytes]:
    """Return all nested messages in one field of a protobuf message."""
    return [value for number, value in read_fields(message) if number == field and isinstance(value, bytes)]


def verify_checksum(data: bytes | np.ndarray, masked: int, what: str) -> None:
    """Raise Fault if the CRC-32C of `data` differs from a stored one.

    masked: the stored checksum, which LevelDB masks by a rotation by 15 bits and a constant. what: names the data.
    """
    try:
        import google_crc32c  # few runs read such files
    except ImportError:
        raise UsageError("checksums of TensorFlow's files need google-crc32c: pip install google-crc32c") from None
    crc = google_crc32c.value(data)
    if ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF != masked:
        raise Fault(f"is damaged: {what} fails its checksum")


# ---------------------------------------------------------------------------------------------------------------------
# The index file: its footer points to the index block, which points to the data blocks, which hold (name, entry)

MAGIC = bytes.fromhex("57fb808b247547db")
FOOTER_SIZE = 48  # bytes: places of two blocks, padding, MAGIC
MAX_INDEX_SIZE = 1 << 20  # bytes; published index files have about ten thousand
MAX_NAME_SIZE = 1 << 10  # bytes; names share prefixes, so that a short file could expand to very long names
MAX_DIMENSIONS = 8
DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8"}  # TensorFlow's number -> type, for weights and counters


class Entry(NamedTuple):
    """A tensor's name, type and shape, and its place: `size` bytes from `offset` of a shard."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int


def read_block(table: bytes, place: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the (key, value) pairs of a block of the table. place: its offset and size, as two varints."""
    offset, position = read_varint(place, 0)
    size, _ = read_varint(place, position)
    content = take_bytes(table, offset, size)
    trailer = take_bytes(table, offset + size, 5)  # type of compression; checksum of the content and of this type
    verify_checksum(content + trailer[:1], int.from_bytes(trailer[1:], "little"), "a block")
    if trailer[0] != 0:
        raise Fault("is compressed, which TensorFlow does not do by itself: save it again without compression")
    restarts = int.from_bytes(content[-4:], "little")  # length of an array after the pairs, for binary search
    end = len(content) - 4 * (restarts + 1)
    if end <= 0:
        raise Fault("is damaged: an empty block")
    pairs = content[:end]

    key, position = b"", 0
    while position < end:
        # A key omits the prefix that it shares with the previous key.
        shared, position = read_varint(pairs, position)
        added, position = read_varint(pairs, position)
        size, position = read_varint(pairs, position)
        if shared > len(key) or shared + added > MAX_NAME_SIZE:
            raise Fault("is damaged: an impossible name")
        key = key[:shared] + take_bytes(pairs, position, added)
        yield key, take_bytes(pairs, position + added, size)
        position += added + size


def read_table(table: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield all (key, value) pairs of a table; raise Fault unless the keys increase."""
    footer = table[-FOOTER_SIZE:]
    if not footer.endswith(MAGIC):
        raise Fault("is not the index of a TensorFlow checkpoint, or its end is missing")
    position = read_varint(footer, read_varint(footer, 0)[1])[1]  # after the place of a block of metadata
    last = None
    for _, place in read_block(table, footer[position:]):
        for key, value in read_block(table, place):
            if last is not None and key <= last:
                raise Fault("is damaged: its names are not in order")
            yield key, value
            last = key


def parse_entry(key: bytes, message: bytes) -> Entry:
    """Parse an entry (TensorFlow's BundleEntryProto); raise Fault if its size does not agree with its shape."""
    name = key.decode("ascii", errors="replace")
    if not key.isascii() or not name.isprintable():
        raise Fault(f"is damaged: an impossible name {key[:80]!r}")
    values = read_numbers(message)
    if values.get(1, 0) not in DTYPES:
        raise Fault(f"holds {name} of TensorFlow's type {values.get(1, 0)}, this reader takes {sorted(DTYPES)}")
    if read_nested(message, 7):
        raise Fault(f"holds {name} in slices, which this reader does not take")
    dtype = np.dtype(DTYPES[values[1]])
    dimensions = [dimension for shape in read_nested(message, 2) for dimension in read_nested(shape, 2)]
    if len(dimensions) > MAX_DIMENSIONS:
        raise Fault(f"is damaged: {name} of {len(dimensions)} dimensions")
    shape = tuple(read_numbers(dimension).get(1, 0) for dimension in dimensions)
    size = values.get(5, 0)
    if size == 0 or size != math.prod(shape) * dtype.itemsize:
        raise Fault(f"is damaged: {name} of shape {shape} in {size} bytes")
    return Entry(name, dtype, shape, values.get(3, 0), values.get(4, 0), size, values.get(6, 0))


def read_index(path: Path) -> tuple[list[Entry], int]:
    """Read an index file; return its entries in the order of their places, and the number of shards.

    Raises Fault if entries overlap, or if the file is damaged.
    """
    if path.stat().st_size > MAX_INDEX_SIZE:
        raise Fault(f"has more than {MAX_INDEX_SIZE} bytes, too many for an index")
    items = read_table(read_file(path))
    key, header = next(items)  # TensorFlow's BundleHeaderProto
    if key:
        raise Fault("is damaged: it has no header")
    if read_numbers(header).get(2, 0) != 0:
        raise Fault("was written in big-endian order, which this reader does not take")
    entries = sorted((parse_entry(*item) for item in items), key=lambda entry: (entry.shard, entry.offset))
    for one, other in itertools.pairwise(entries):
        if one.shard == other.shard and one.offset + one.size > other.offset:
            raise Fault(f"is damaged: {one.name} and {other.name} overlap")
    return entries, read_numbers(header).get(1, 0)


def read_shard(path: Path, entries: Iterable[Entry]) -> dict[str, np.ndarray]:
    """Read the tensors of a shard by name. entries: those of the shard."""
    tensors = {}
    with open_file(path) as file:
        length = path.stat().st_size
        for entry in entries:
            if entry.offset + entry.size > length:
                raise Fault(f"is truncated: {entry.name} reaches beyond its end")
            file.seek(entry.offset)
            data = np.fromfile(file, np.uint8, entry.size)
            verify_checksum(data, entry.checksum, entry.name)
            tensors[entry.name] = data.view(entry.dtype).reshape(entry.shape)
    return tensors


def read_tf_checkpoint(prefix: str | Path) -> dict[str, np.ndarray]:
    """Read all tensors of a TF1 checkpoint by name.

    prefix: the path without `.index`. Raises UsageError, which names the file and its defect, if a file is missing,
    truncated, damaged, compressed or not a checkpoint.
    """
    index = Path(f"{prefix}.index")
    with report_unreadable_file(index):
        entries, shards = read_index(index)
    variables: dict[str, np.ndarray] = {}
    for number, group in itertools.groupby(entries, key=lambda entry: entry.shard):
        shard = Path(f"{prefix}.data-{number:05d}-of-{shards:05d}")
        with report_unreadable_file(shard), show_reading(shard, shard.stat().st_size):
            variables |= read_shard(shard, group)
    return variables
