"""The one way to read files that a stranger may have written: regular files only, within limits of size.

    with report_unreadable_file(path):
        names = read_text(path, 1 << 20).splitlines()

A file that holds what it claims takes the memory of its contents; one that claims more is refused before it is read or
inflated that far. Nothing here waits: a pipe, a device or a socket in place of a file is refused at once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import zipfile
import zlib
from collections.abc import Iterator
from types import TracebackType
from typing import BinaryIO, cast

from ebm.support.errors import UsageError
from ebm.support.progress import show_waiting

CHUNK = 1 << 20  # bytes that are read at once
# Largest contents of a compressed file: the bytes here, plus this many times its own size. Photographs shrink to half,
# MNIST to a fifth; a bomb of zeros shrinks to a thousandth.
INFLATED_BASE, INFLATED_RATIO = 1 << 28, 20
MAX_MEMBERS = 100_000  # of an archive
SLOW_BYTES = 1 << 25  # bytes of a file from which on a slow disk takes so long that something is said meanwhile

PathLike = str | os.PathLike[str]


class Fault(Exception):
    """A defect of a file, as the end of a sentence; `report_unreadable_file` adds the name of the file."""


@contextlib.contextmanager
def report_unreadable_file(path: PathLike) -> Iterator[None]:
    """Turn any error while a file is read into a UsageError that names the file."""
    name = make_printable(os.fspath(path))
    try:
        yield
    except UsageError:
        raise
    except Fault as fault:
        raise UsageError(f"{name} {fault}") from None
    except FileNotFoundError:
        raise UsageError(f"{name} is missing, or a link to nothing; put the file there") from None
    except Exception as error:  # readers of foreign bytes fail in many ways
        if isinstance(error, OSError) and error.strerror:  # of the system; Pillow raises others for damaged images
            raise UsageError(f"{name} cannot be read ({error.strerror}); replace it or make it readable") from None
        raise UsageError(
            f"{name} is damaged or of another format ({describe_failure(error)}); replace or delete it"
        ) from error


def describe_failure(error: Exception) -> str:
    """Return an error in a few words on one line; texts of a file, which may be in it, cannot steer a terminal."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)[:1000]
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in words).split())
    return (line if len(line) <= 200 else f"{line[:200]}…") or type(error).__name__


def make_printable(name: str) -> str:
    """Return a name as text for any terminal: bytes that are no UTF-8, line ends and control characters as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def open_file(path: PathLike) -> BinaryIO:
    """Open a regular file for reading; raise OSError for anything else, without waiting for the other end of a pipe."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        reason = os.strerror(errno.EISDIR) if stat.S_ISDIR(mode) else "it is a pipe or a device instead of a file"
        raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, reason)
    return open(descriptor, "rb")


def read_file(path: PathLike, limit: int | None = None) -> bytes:
    """Return the contents of a regular file; raise ValueError if it has more than `limit` bytes."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        check_size(size, limit, "it")
        with show_reading(path, size):
            return file.read(size)


def show_reading(path: PathLike, size: int) -> contextlib.AbstractContextManager[None]:
    """Return a context that says so if reading a file of this size, in bytes, takes long inside it."""
    return show_waiting(f"reading {make_printable(os.fspath(path))}", f"{size / 1e6:,.0f} MB", quiet=size < SLOW_BYTES)


def check_size(size: int, limit: int | None, what: str) -> None:
    """Raise ValueError if `size` bytes are more than the limit. what: names whose size it is."""
    if limit is not None and size > limit:
        raise ValueError(f"{what} has {size:,} bytes, more than the {limit:,} of the largest valid one")


def read_text(path: PathLike, limit: int) -> str:
    """Return the text of a UTF-8 file; raise ValueError if it has more than `limit` bytes, or is no text."""
    try:
        return read_file(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None


def read_json(path: PathLike, limit: int) -> object:
    """Return the value in a JSON file of at most `limit` bytes."""
    return json.loads(read_text(path, limit))


def limit_inflated(size: int) -> int:
    """Return the largest number of bytes to which an honest compressed file of `size` bytes inflates."""
    return INFLATED_BASE + INFLATED_RATIO * size


def inflate(contents: bytes | memoryview, limit: int | None = None) -> bytearray:
    """Return what a file in the format of gzip or zlib holds, checksums verified.

    limit: raise ValueError if that is more bytes; default: if it is more than an honest file of this size holds.
    """
    limit = limit_inflated(len(contents)) if limit is None else limit
    inflated, rest = bytearray(), contents
    while bytes(rest[:1]).rstrip(b"\0"):  # a file may consist of several parts, and end in zeros
        part = zlib.decompressobj(wbits=47)  # either format
        while not part.eof:
            piece = part.decompress(rest, CHUNK)
            if not piece and not part.eof and not part.unconsumed_tail:
                raise EOFError("it is cut short")
            inflated += piece
            rest = part.unconsumed_tail
            check_size(len(inflated), limit, "what is compressed in it")
        rest = part.unused_data
    return inflated


class Archive:
    """A zip archive whose members are read by name, each verified by its checksum.

    is_stored: whether no member may be compressed. The members together are then no larger than the file; else they
    are each at most as large as an honest file inflates to, see `limit_inflated`. Members must not share a name. Raises
    OSError, ValueError or BadZipFile if this does not hold.
    """

    def __init__(self, file: BinaryIO, *, is_stored: bool = False):
        self.archive = zipfile.ZipFile(file)
        self.size = file.seek(0, os.SEEK_END)
        members = self.archive.infolist()
        self.members = {member.filename: member for member in members}
        if len(self.members) < len(members) or len(members) > MAX_MEMBERS:
            raise ValueError("members of the archive share a name, or are too many")
        methods = {zipfile.ZIP_STORED} if is_stored else {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
        if any(member.compress_type not in methods or member.flag_bits & 1 for member in members):
            raise ValueError("a member of the archive is compressed or encrypted in an unusual way")
        if sum(member.compress_size for member in members) > self.size:
            raise ValueError("members of the archive overlap, or reach beyond its end")

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.archive.close()

    def get_size(self, name: str) -> int:
        """Return the size of a member; raise ValueError if it does not exist or claims too much."""
        if name not in self.members:
            raise ValueError(f"there is no {name} in it")
        member = self.members[name]
        is_stored = member.compress_type == zipfile.ZIP_STORED
        if is_stored and member.file_size != member.compress_size:
            raise ValueError(f"{name} has two sizes")
        check_size(member.file_size, None if is_stored else limit_inflated(self.size), name)
        return member.file_size

    def read(self, name: str, limit: int | None = None) -> bytearray:
        """Return the contents of a member; raise ValueError if it has more than `limit` bytes."""
        size = self.get_size(name)
        check_size(size, limit, name)
        contents = bytearray()
        with self.open(name) as stream:
            while piece := stream.read(CHUNK):  # the file may hold fewer bytes than it claims
                contents += piece
        if len(contents) != size:
            raise ValueError(f"{name} is cut short")
        return contents

    def open(self, name: str) -> zipfile.ZipExtFile:
        """Open a member for reading in parts; reading to its end verifies the checksum."""
        self.get_size(name)
        return cast("zipfile.ZipExtFile", self.archive.open(self.members[name]))

    def read_into(self, name: str, target: memoryview) -> None:
        """Fill the target, which has the size of the member, with its contents."""
        with self.open(name) as stream:
            place = 0
            while count := stream.readinto(target[place : place + CHUNK]):
                place += count
            if place < len(target) or stream.read(1):  # reading to the end verifies the checksum
                raise ValueError(f"{name} is not as long as it claims")
