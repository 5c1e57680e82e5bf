"""Write files whole or not at all: the one way from this project to the disk."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from ebm.support.errors import UsageError

# What fsync answers on file systems that cannot sync (some of FUSE, CIFS, of virtual machines): the file is as safe as
# it can be there. A full disk, a quota and an error of the device are answers of another kind.
CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}
PROBE = b"can this folder be written?\n" * 200  # more than an empty file, which a full disk still takes


class WriteError(OSError, UsageError):
    """A file that cannot be written: one line that names the file and the reason.

    Training goes on after it, as after any OSError; elsewhere it ends the script, as any UsageError.
    """

    def __init__(self, path: Path, error: OSError):
        super().__init__(error.errno, error.strerror or str(error), str(path))

    def __str__(self) -> str:
        return f"{self.filename} cannot be written ({self.strerror}); make room or choose another place"


class WatchedFile(io.FileIO):
    """A file that remembers why writing to it failed, whatever the library that writes makes of the error.

    It hides its descriptor, because Pillow and numpy would write to that past this class and lose the reason.
    """

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write some bytes and return how many."""
        try:
            return super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise

    def fileno(self) -> int:
        """Raise the error of files that have no descriptor."""
        raise io.UnsupportedOperation("fileno")


def write_file(path: str | Path, write: Callable[[BinaryIO], object], *, sync: bool = True) -> Path:
    """Let `write(file)` write a file under a temporary name, flush it to the disk, rename it, and return its path.

    The folder is made if it does not exist. At every moment `path` is the earlier file or the whole new one, also if
    several processes write it. Raises WriteError if that fails; no piece is left then. sync: False leaves it to the
    system when the file reaches the disk, for the many files of one result.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(6)}.tmp")
    try:
        make_folder(path.parent)
        if path.exists() and not path.is_file():
            raise OSError(errno.EEXIST, "what stands there is no file")
        try:
            write_temporary(temporary, write, sync)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise WriteError(path, error) from None
    if sync:
        sync_folder(path.parent)
    return path


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; raise OSError with a plain reason if a file is in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise OSError(errno.ENOTDIR, f"{folder} is not a folder") from None


def write_temporary(path: Path, write: Callable[[BinaryIO], object], sync: bool) -> None:
    """Write a new file and flush it to the disk; raise OSError with the system's reason if that fails."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with WatchedFile(descriptor, "w") as raw:
        try:
            file = io.BufferedWriter(raw)
            write(file)
            file.flush()
        except Exception:
            if raw.failure is None:
                raise
        if raw.failure is not None:  # torch, for one, makes a RuntimeError of it
            raise raw.failure
        if sync:
            sync_file(descriptor)


def sync_file(descriptor: int) -> None:
    """Flush a file to the disk, as far as its file system can do that."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise


def sync_folder(folder: Path) -> None:
    """Flush a folder to the disk, so that a rename in it survives a power cut.

    Errors are ignored: the renamed file is on the disk and in its place, and many file systems cannot sync folders.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class RecordFile:
    """A file that grows by whole records: of a record that cannot be written nothing stays behind."""

    def __init__(self, path: Path):
        self.path = path
        self.torn_from: int | None = None  # the place of a record that was written in part and could not be removed

    def append(self, record: bytes) -> None:
        """Add a record, and the folder if it does not exist; raise WriteError if that fails.

        The file is opened each time, so that a folder that was moved or mounted anew gets the next record.
        """
        try:
            make_folder(self.path.parent)
            with open(self.path, "ab", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                if self.torn_from is not None:
                    end = file.truncate(min(self.torn_from, end))
                self.torn_from, rest = end, memoryview(record)
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                except OSError:
                    file.truncate(end)
                    self.torn_from = None
                    raise
            self.torn_from = None
        except OSError as error:
            raise WriteError(self.path, error) from None


def prepare_folder(folder: Path, setting: str) -> Path:
    """Make a folder for results, check before the work begins that files can be written in it, and return its path.

    Raises UsageError if not. setting: the name of the setting that chooses another place.
    """
    try:
        make_folder(folder)
    except OSError as error:
        raise UsageError(f"`{setting}`: cannot make {folder} ({error.strerror}); choose another place") from None
    try:
        write_file(folder / ".writable", lambda file: file.write(PROBE)).unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"`{setting}`: cannot write {folder} ({error.strerror}); choose another place") from None
    return folder


def prepare_file(path: Path, setting: str) -> Path:
    """Check before the work begins that a file of results can be written, make its folder, and return its path.

    Raises UsageError if not. setting: the name of the setting that chooses another place.
    """
    prepare_folder(path.parent, setting)
    if path.exists() and not path.is_file():
        raise UsageError(f"`{setting}`: {path} is not a file; choose another name")
    return path
