"""Standard output and error of a script, which take any text and do not end the work if it cannot be written."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from typing import Any

from ebm.support.errors import UsageError


class DroppingFile(io.FileIO):
    """A file that drops what it cannot write, and remembers why; the end of a pipe's reader stays an error.

    So a full disk, or a terminal that was closed, does not end the work.
    """

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write or drop some bytes; return how many."""
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            self.failure = error
            return len(data)


def replace_standard_streams() -> list[DroppingFile]:
    """Make prints to stdout and stderr succeed whatever becomes of the files behind them; return these files.

    It holds for the whole process. Characters that the encoding of a stream lacks, and names of files that are no
    UTF-8, are written as escapes such as \\u2264. What goes to a closed stream is lost. Streams that a test put there
    stay as they are.
    """
    open_closed_descriptors()
    files = []
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="backslashreplace"))  # noqa: SIM115
        if not isinstance(stream, io.TextIOWrapper) or stream is not getattr(sys, f"__{name}__"):
            continue
        stream.flush()
        file = DroppingFile(stream.fileno(), "w", closefd=False)
        is_buffered = isinstance(stream.buffer, io.BufferedWriter)  # it is not after `python -u`
        options: dict[str, Any] = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
        layer: Any = io.BufferedWriter(file) if is_buffered else file
        setattr(sys, name, io.TextIOWrapper(layer, stream.encoding, "backslashreplace", **options))
        files.append(file)
    return files


def open_closed_descriptors() -> None:
    """Open the standard streams that are closed, to nowhere: else the next file to be opened received the output."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is this one


def note_dropped_output(files: list[DroppingFile]) -> None:
    """Print to stderr why lines of the output are missing, if some are."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    failures = [file.failure.strerror for file in files if file.failure is not None]
    if failures:
        print(f"note: lines of the output are missing ({failures[0]})", file=sys.stderr)


def report_mistakes(work: Callable[[], object]) -> int:
    """Return the exit status of a script's work, which is a function: 2 after a line about a user's mistake, else 0."""
    files = replace_standard_streams()
    try:
        work()
        note_dropped_output(files)
    except UsageError as error:
        print(f"error: {error}".replace("`", ""), file=sys.stderr)
        return 2
    return 0


def discard_output() -> None:
    """Send all further output of this process nowhere, because nobody reads it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            os.dup2(nowhere, descriptor)
