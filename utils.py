"""Shared pieces: the replay buffer, the log of a run, its progress."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from errors import UsageError as UsageError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def keep_freed_memory() -> None:
    """Let the C library keep the memory of freed tensors instead of returning it to the system after each operation.

    Mapping fresh pages for every activation costs a third of a Langevin step's time on a CPU. Only glibc has this.
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: serve up to a gigabyte from the heap
        library.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: and do not give its top back


def dequantise(stored: Tensor, generator: torch.Generator | None, rescale: float) -> Tensor:
    """Return uint8 images as floats in [0, rescale], spread evenly: (value + U(0, 1))/256·rescale."""
    noise = torch.rand(stored.shape, generator=generator, device=stored.device)
    return (stored + noise).mul_(rescale / 256)


class ReplayBuffer:
    """A ring of the latest end points of the chains, (capacity, C, H, W) uint8 on the device (paper, section 3.3)."""

    def __init__(self, capacity: int, image_shape: tuple[int, ...], device: torch.device | str = "cpu"):
        self.images = torch.zeros((capacity, *image_shape), dtype=torch.uint8, device=device)
        self.size = 0
        self.position = 0

    def __len__(self) -> int:
        return self.size

    def push(self, images: Tensor, rescale: float = 1.0) -> None:
        """Store images (n, C, H, W) in [0, rescale] over the oldest ones, quantised to a byte."""
        capacity = len(self.images)
        images = images[-capacity:]
        stored = (images.clamp(0, rescale) * (255 / rescale)).to(torch.uint8)
        head = min(len(stored), capacity - self.position)
        self.images[self.position : self.position + head] = stored[:head]
        self.images[: len(stored) - head] = stored[head:]
        self.position = (self.position + len(stored)) % capacity
        self.size = min(self.size + len(stored), capacity)

    def sample(self, n: int, generator: torch.Generator | None, rescale: float = 1.0) -> Tensor:
        """Return n stored images, drawn evenly with repetition, as floats in [0, rescale]."""
        index = torch.randint(self.size, (n,), generator=generator, device=self.images.device)
        return dequantise(self.images[index], generator, rescale)

    def state_dict(self) -> dict[str, Any]:
        return {"images": self.images[: self.size].cpu(), "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the images over; a buffer of another capacity keeps the newest that fit."""
        images, position, capacity = state["images"], state["position"], len(self.images)
        if len(images) > capacity:
            images = torch.cat([images[position:], images[:position]])[len(images) - capacity :]
            position = 0
        self.size = len(images)
        self.position = position if self.size == capacity else self.size
        self.images[: self.size] = images.to(self.images.device)


def read_log(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Read the lines of a run's log.jsonl, up to one cut short by a killed process."""
    lines: list[dict[str, Any]] = []
    path = folder / "log.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def read_series(folder: pathlib.Path, name: str) -> tuple[list[int], list[float]]:
    """Return the iterations and values of a logged number, over the whole run."""
    lines = [line for line in read_log(folder) if name in line]
    return [line["iteration"] for line in lines], [line[name] for line in lines]


class RunLog:
    """The log of a run: TensorBoard, one JSON object per line in log.jsonl, and pictures, all below one folder.

    resume: lines behind this iteration are dropped, so that a resumed run's log reads as if it had never stopped.
    """

    def __init__(self, folder: pathlib.Path, resume: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "log.jsonl"
        kept = [line for line in read_log(folder) if line["iteration"] <= resume]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, path)
        self.file = path.open("a", buffering=1)
        self.board: SummaryWriter = SummaryWriter(str(folder / "tensorboard"), purge_step=resume + 1)

    def event(self, iteration: int, values: dict[str, Any]) -> None:
        """Write what happened to the JSON log alone."""
        self.file.write(json.dumps({"iteration": iteration, **values}) + "\n")

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        """Write numbers to both logs."""
        self.event(iteration, values)
        for name, value in values.items():
            self.board.add_scalar(name, value, iteration)

    def picture(self, iteration: int, name: str, path: str | pathlib.Path) -> None:
        """Show a PNG file in TensorBoard."""
        import imageio.v3 as imageio

        pixels = imageio.imread(path)
        self.board.add_image(name, pixels, iteration, dataformats="HWC" if pixels.ndim == 3 else "HW")

    def close(self) -> None:
        self.file.close()
        self.board.close()


class Progress:
    """A progress bar with rate and time left on a terminal, a plain line every `every` seconds elsewhere."""

    def __init__(self, total: int, start: int = 0, *, what: str, every: float = 10.0, quiet: bool = False):
        self.total, self.what, self.every, self.quiet = total, what, every, quiet
        self.start = self.done = start
        self.begun = self.printed = time.monotonic()
        self.text = ""
        self.bar = None
        if sys.stderr.isatty() and not quiet:
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=start, desc=what, dynamic_ncols=True)

    def update(self, done: int) -> None:
        """Say how many are done."""
        if self.bar is not None:
            self.bar.set_postfix_str(self.text, refresh=False)
            self.bar.update(done - self.done)
        self.done = done
        now = time.monotonic()
        if self.bar is None and not self.quiet and (now - self.printed >= self.every or done == self.total):
            rate = (done - self.start) / max(now - self.begun, 1e-9)
            left = (self.total - done) / max(rate, 1e-9)
            print(f"{self.what} {done}/{self.total} | {rate:.3g}/s | {left:.0f} s left | {self.text}", flush=True)
            self.printed = now

    def say(self, message: str) -> None:
        """Print a line without breaking the bar."""
        if self.bar is not None:
            self.bar.write(message)
        elif not self.quiet:
            print(message, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
