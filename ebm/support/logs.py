"""The log of a run: TensorBoard for people, JSON lines for programs."""

from __future__ import annotations

import json
import os
import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def read_log(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Return the entries of a run's log.jsonl, up to the first incomplete line, which a killed process leaves."""
    lines: list[dict[str, Any]] = []
    path = folder / "log.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def read_series(folder: pathlib.Path, name: str) -> tuple[list[int], list[float]]:
    """Return the iterations and values at which a run logged the number of this name."""
    lines = [line for line in read_log(folder) if name in line]
    return [line["iteration"] for line in lines], [line[name] for line in lines]


class RunLog:
    """The log of a run in one folder: TensorBoard files, and log.jsonl with one JSON object per line.

    resume: entries after this iteration are deleted, so that a resumed run's log reads as if it had never stopped.
    """

    def __init__(self, folder: pathlib.Path, resume: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "log.jsonl"
        entries = [line for line in read_log(folder) if line["iteration"] <= resume]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in entries), encoding="utf-8")
        os.replace(temporary, path)
        self.file = path.open("a", buffering=1, encoding="utf-8")
        self.board: SummaryWriter = SummaryWriter(str(folder / "tensorboard"), purge_step=resume + 1)

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
