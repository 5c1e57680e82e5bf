"""Standard output and error of a script: a full disk behind them drops lines and does not end the work."""

from __future__ import annotations

import io
import sys
from typing import Any


class DroppingFile(io.FileIO):
    """A file that drops what it cannot write, and remembers why; the end of a pipe's reader stays an error."""

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

    It holds for the whole process. Streams that are closed, or that a test put there, stay as they are.
    """
    files = []
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper) or stream is not getattr(sys, f"__{name}__"):
            continue
        stream.flush()
        file = DroppingFile(stream.fileno(), "w", closefd=False)
        is_buffered = isinstance(stream.buffer, io.BufferedWriter)  # it is not after `python -u`
        options: dict[str, Any] = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
        layer: Any = io.BufferedWriter(file) if is_buffered else file
        setattr(sys, name, io.TextIOWrapper(layer, stream.encoding, stream.errors, **options))
        files.append(file)
    return files


def note_dropped_output(files: list[DroppingFile]) -> None:
    """Print to stderr why lines of the output are missing, if some are."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    failures = [file.failure.strerror for file in files if file.failure is not None]
    if failures and sys.stderr is not None:
        print(f"note: lines of the output are missing ({failures[0]})", file=sys.stderr)
