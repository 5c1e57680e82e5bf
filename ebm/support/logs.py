"""The log of a run: TensorBoard for people, JSON lines for programs."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


LOG_NAME = "log.jsonl"
MAX_LINE = 1 << 20  # bytes; a longer line is no entry


def parse_log_entry(line: bytes) -> dict[str, Any] | None:
    """Return the entry that a line of a log holds, or None if it is no object with an iteration."""
    try:
        entry = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    iteration: Any = entry.get("iteration") if isinstance(entry, dict) else None
    is_number = isinstance(iteration, int) and not isinstance(iteration, bool)
    return entry if is_number and 0 <= iteration < 1 << 53 else None


def read_lines(path: pathlib.Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yield the lines of a log with their entries, None for what is none: half a line, or something else than a log's.

    A very long line comes in pieces.
    """
    if not path.is_file():
        return
    is_begun = False  # whether this line began in an earlier piece
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE):
            is_piece = is_begun or (len(line) == MAX_LINE and not line.endswith(b"\n"))
            yield line, None if is_piece else parse_log_entry(line)
            is_begun = not line.endswith(b"\n")


def read_log(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Return the entries of a run's log; what else its log.jsonl holds is left out."""
    return [entry for _, entry in read_lines(folder / LOG_NAME) if entry is not None]


def read_series(folder: pathlib.Path, name: str) -> tuple[list[int], list[float]]:
    """Return the iterations and values at which a run logged the number of this name."""
    series: list[tuple[int, float]] = []
    for entry in read_log(folder):
        value = entry.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):  # an integer that is no float
                series.append((entry["iteration"], float(value)))
    return [iteration for iteration, _ in series], [value for _, value in series]


def copy_log(source: pathlib.Path, file: BinaryIO, iteration: int) -> None:
    """Copy a log to an open file, without what a run wrote after its last entry of this iteration or an earlier one.

    Whole lines that are no entries are kept, wherever they are; half a line at the end, which a killed process leaves,
    is not.
    """
    last = last_whole = -1
    for number, (line, entry) in enumerate(read_lines(source)):
        if entry is not None and entry["iteration"] <= iteration:
            last = number
        if entry is not None or line.endswith(b"\n"):
            last_whole = number
    for number, (line, entry) in enumerate(read_lines(source)):
        if number <= last_whole and (number <= last or entry is None):
            file.write(line if entry is None else line.rstrip(b"\n") + b"\n")


class RunLog:
    """The log of a run in one folder: TensorBoard files, and log.jsonl with one JSON object per line.

    resume: entries after this iteration are left out, so that a resumed run's log reads as if it had never stopped.
    is_branch: the run leaves a later history, whose log stays in its place until `publish`.
    """

    def __init__(self, folder: pathlib.Path, resume: int = 0, *, is_branch: bool = False):
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / LOG_NAME
        branch_path = folder / f".branch_{LOG_NAME}"
        branch_path.unlink(missing_ok=True)  # of a run that was killed before it published its log
        self.written_path = branch_path if is_branch else self.path
        temporary = folder / f".{LOG_NAME}.tmp"
        with temporary.open("wb") as file:
            copy_log(self.path, file, resume)
        os.replace(temporary, self.written_path)
        self.file = self.written_path.open("a", buffering=1)
        self.board: SummaryWriter = SummaryWriter(str(folder / "tensorboard"), purge_step=resume + 1)

    def publish(self) -> None:
        """Put the log of a branch in the place of the log of the history that it leaves; do nothing for another log."""
        if self.written_path != self.path:
            os.replace(self.written_path, self.path)
            self.written_path = self.path

    def write_event(self, iteration: int, values: dict[str, Any]) -> None:
        """Write an entry to log.jsonl only."""
        self.file.write(json.dumps({"iteration": iteration, **values}) + "\n")

    def write_scalars(self, iteration: int, values: dict[str, float]) -> None:
        """Write numbers by name to log.jsonl and TensorBoard."""
        self.write_event(iteration, values)
        for name, value in values.items():
            self.board.add_scalar(name, value, iteration)

    def write_picture(self, iteration: int, name: str, path: str | pathlib.Path) -> None:
        """Add a PNG file to TensorBoard."""
        import imageio.v3 as imageio

        pixels = imageio.imread(path)
        self.board.add_image(name, pixels, iteration, dataformats="HWC" if pixels.ndim == 3 else "HW")

    def close(self) -> None:
        """Close both logs."""
        self.file.close()
        self.board.close()
