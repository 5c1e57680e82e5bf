"""The ownership of a folder: one run, or one call of another script, writes to it at a time, and nothing is lost.

    with own_folder(settings.folder, workers, check) as owner:    # refused while another run owns the folder
        ...                                                       # all that can be refused
        owner.start_afresh()                                      # a new run: an earlier one is set aside
        ...

The owner holds a lock of the operating system on a file in the folder. The kernel, or the server of a network file
system, releases it when the process ends, however it ends. A file system without such locks gets a file that the owner
touches every few seconds instead.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import pathlib
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import checkpoint
from ebm.support.errors import UsageError
from ebm.support.files import prepare_folder
from ebm.support.logs import CONFIG_NAME, LOG_NAME
from ebm.training.distributed import Workers

LOCK_NAME = ".lock"
BEAT = 10.0  # seconds between two touches of the lock file, on a file system without locks
PATIENCE = 120.0  # seconds without a touch after which its owner counts as dead; attributes may be cached for a minute
HELD = {errno.EACCES, errno.EAGAIN}  # the errors with which the system refuses a lock that another process holds
OPEN_LOCK = os.O_RDWR | os.O_NOFOLLOW  # a lock file is overwritten, and a link in a stranger's folder may lead anywhere
WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}
# What shows that a folder is a run's: one of these, besides checkpoints.
MARKS = (LOCK_NAME, CONFIG_NAME, LOG_NAME, "tensorboard")


# ---- the lock ----


class FolderLock:
    """The lock of a folder, held by this process from its making to its release.

    Making one raises UsageError if another process holds the lock, OSError if the folder cannot be written, and
    FileNotFoundError if the folder does not exist or was renamed meanwhile.
    """

    def __init__(self, folder: pathlib.Path):
        self.path = folder / LOCK_NAME
        self._ended = threading.Event()
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T")}
        self._text = json.dumps(owner).encode()
        # Nothing else in this process may open the file: closing it would release the lock.
        self._file = os.open(self.path, OPEN_LOCK | os.O_CREAT, 0o666)
        try:
            has_lock = lock_file(self._file, self.path)
            if not self._is_in_place:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            self._identify()
            if not has_lock:
                time.sleep(0.1)
                if not self.is_held:  # two took over the file of a dead owner at once
                    raise refuse_folder(self.path)
                threading.Thread(target=self._touch, name="lock", daemon=True).start()
        except BaseException:
            os.close(self._file)
            raise

    def _identify(self) -> None:
        """Write who holds the lock; a file that cannot be written is removed."""
        try:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, self._text, 0)
        except OSError:
            self.path.unlink()
            raise

    def _touch(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self._file)

    @property
    def _is_in_place(self) -> bool:
        """Whether the folder has the file that this process opened."""
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(self.path))
        except OSError:
            return False

    @property
    def is_held(self) -> bool:
        """Whether the folder still has the lock file of this process."""
        return self._is_in_place and os.pread(self._file, 1000, 0) == self._text

    def release(self) -> None:
        """Remove the lock file and release the lock."""
        self._ended.set()
        with contextlib.suppress(OSError):
            if self.is_held:
                self.path.unlink()
        os.close(self._file)


def lock_file(file: int, path: pathlib.Path) -> bool:
    """Lock an open file; return False if its file system has no locks, and nobody else touches the file.

    Raises UsageError if another process holds it. path: that of the file.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the kernel, not inherited by forked processes
        return True
    except OSError as error:
        if error.errno in HELD:
            raise refuse_folder(path) from None
        if error.errno not in WITHOUT_LOCKS:
            raise
    if os.fstat(file).st_size and measure_age(path) < PATIENCE:
        raise refuse_folder(path)
    return False


def measure_age(path: pathlib.Path) -> float:
    """Return how many seconds ago a file was touched, by the clock of its file system."""
    probe = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def is_locked(path: pathlib.Path) -> bool:
    """Return whether another process holds the lock file of this path."""
    file = os.open(path, OPEN_LOCK)
    try:
        lock_file(file, path)
    except UsageError:
        return True
    finally:
        os.close(file)
    return False


def refuse_folder(path: pathlib.Path) -> UsageError:
    """Return the error that names the owner of a folder. path: that of its lock file."""
    owner: dict[str, Any] = {}
    for _ in range(10):  # the owner writes its name just after locking the file
        with contextlib.suppress(OSError, ValueError):
            owner = dict(json.loads(path.read_bytes()[:1000]))
            break
        time.sleep(0.02)
    named = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}" if owner else "another process"
    since = f" since {owner['since']}" if "since" in owner else ""
    return UsageError(
        f"{path.parent} is in use by {named}{since}; wait until it ends, or choose another `exp` or `logdir`"
    )


# ---- the owner ----


class FolderOwner:
    """The owner of a folder, on rank 0; see `own_folder`. setting: the setting to change if it cannot be written."""

    def __init__(self, folder: pathlib.Path, workers: Workers, check: Callable[[], object], setting: str):
        self.folder, self.workers, self.check, self.setting = folder, workers, check, setting
        self._lock: FolderLock | None = None
        self._made: list[pathlib.Path] = []  # the folders that did not exist, the deepest first

    @contextlib.contextmanager
    def report_unwritable(self) -> Iterator[None]:
        """Inside the block, turn the error of a folder that cannot be written into a UsageError."""
        try:
            yield
        except OSError as error:
            place = f"`{self.setting}`: cannot write {self.folder}"
            raise UsageError(f"{place} ({error.strerror}); choose another place") from None

    def claim(self) -> None:
        """Take the lock of the folder, which is made if it does not exist."""
        with self.report_unwritable():
            self.check()
            self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
            self._lock = self._take()
        prepare_folder(self.folder, self.setting)

    def _take(self) -> FolderLock:
        """Return the lock of the folder, which is made if it does not exist or is just being removed."""
        for _ in range(100):
            self.folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                return FolderLock(self.folder)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    def confirm(self) -> bool:
        """Take the lock again if its file has gone; return whether it had.

        Raises UsageError if the folder is another's by now, and OSError while it cannot be written; the next call then
        tries again.
        """
        if self._lock is not None:
            if self._lock.is_held:
                return False
            lost, self._lock = self._lock, None
            lost.release()
        self._lock = self._take()
        return True

    def start_afresh(self) -> None:
        """Rename the folder if it holds an earlier run, so that a new one has it for itself and nothing is lost."""
        remedy = " (resume_iter=latest would have gone on)" if checkpoint.list_iterations(self.folder) else ""
        self.workers.call_first(lambda: self.set_aside(f"{self.folder} held an earlier run; it is now", remedy))

    def set_aside(self, words: str, remedy: str = "") -> None:
        """On rank 0, rename the folder if it holds anything, and note that: the words, the new name, the remedy."""
        if self._lock is None or {path.name for path in self.folder.iterdir()} <= {LOCK_NAME}:
            return
        with self.report_unwritable():
            aside = find_free_path(self.folder.with_name(f"{self.folder.name}."))
            self.folder.rename(aside)
            earlier, self._lock = self._lock, None
            earlier.path = aside / LOCK_NAME
            earlier.release()
            self._made.insert(0, self.folder)
            self._lock = self._take()
        print(f"note: {words} {aside}{remedy}")

    def release(self) -> None:
        """Give the folder up. Folders that were made for it and are empty are removed."""
        if self._lock is not None:
            self._lock.release()
        for path in self._made:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def own_folder(
    folder: pathlib.Path, workers: Workers, check: Callable[[], object] = lambda: None, setting: str = "logdir"
) -> Iterator[FolderOwner]:
    """Own a folder inside the block; rank 0 owns it for all workers.

    check: called before the folder is touched; it raises UsageError if the folder cannot be used. Raises UsageError, on
    all workers, if another run owns the folder or if it cannot be written, and names the setting to change then. If
    the block is left before something was written, nothing has changed.
    """
    owner = FolderOwner(folder, workers, check, setting)
    try:
        workers.call_first(owner.claim)
        yield owner
    finally:
        owner.release()


def find_free_path(prefix: pathlib.Path) -> pathlib.Path:
    """Return the first of the paths <prefix>1, <prefix>2, … at which nothing stands."""
    paths = (prefix.with_name(f"{prefix.name}{number}") for number in itertools.count(1))
    return next(path for path in paths if not os.path.lexists(path))


def check_new_folder(folder: pathlib.Path) -> None:
    """Raise UsageError if a new run cannot set aside what a folder holds: no run, or a living one further inside."""
    if not folder.exists():
        return
    names = [path.name for path in folder.iterdir()]
    is_run = bool(checkpoint.list_iterations(folder)) or any(mark in names for mark in MARKS)
    if names and not is_run:
        shown = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
        raise UsageError(f"{folder} is not the folder of a run, it holds {shown}; choose another `exp`")
    for path in folder.glob(f"*/**/{LOCK_NAME}"):
        if is_locked(path):
            raise refuse_folder(path)


# ---- branches ----


def list_branch_files(folder: pathlib.Path, iteration: int) -> list[pathlib.Path]:
    """Return the checkpoints of later iterations in a folder and the files of the reports on them, the latest last."""
    matches = (re.fullmatch(r"(?:model|samples|quality)_([0-9]+)\..+", path.name) for path in folder.iterdir())
    later = sorted((int(match[1]), match[0]) for match in matches if match and int(match[1]) > iteration)
    return [folder / name for _, name in later]


def set_aside_branch(folder: pathlib.Path, iteration: int, *, is_resumed: bool) -> pathlib.Path | None:
    """Move what a run has of later iterations to a folder of its own, because it goes on differently from this one.

    Return that folder, or None if there is nothing to move. is_resumed: the best model moves, too, if it is of a later
    iteration, and the log is copied; a run that has returned to an earlier state keeps both.
    """
    files = list_branch_files(folder, iteration)
    copied = [folder / LOG_NAME] if files and is_resumed and (folder / LOG_NAME).exists() else []
    best = folder / "model_best.pt"
    if is_resumed and best.exists():
        with contextlib.suppress(UsageError, TypeError):  # a damaged file stays
            files += [best] if checkpoint.load(best)["iteration"] > iteration else []
    if not files:
        return None
    aside = find_free_path(folder / "abandoned_")
    aside.mkdir()
    for path in copied:
        shutil.copyfile(path, aside / path.name)
    for path in files:  # the latest last, so that it stays the latest until all have moved
        if path.is_symlink():  # one to a relative path would lead elsewhere from there
            (aside / path.name).symlink_to(os.path.join(os.path.realpath(folder), os.readlink(path)))
            path.unlink()
        else:
            path.rename(aside / path.name)
    return aside
