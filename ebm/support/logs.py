"""The log of a run: TensorBoard for people, JSON lines for programs."""

from __future__ import annotations

import io
import json
import os
import pathlib
import secrets
import socket
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from ebm.support.files import RecordFile, write_file


def read_log(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Return the entries of a run's log.jsonl, up to the first incomplete line, which a killed process leaves."""
    lines: list[dict[str, Any]] = []
    path = folder / "log.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
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

    An entry that cannot be written, for example because the disk is full, is left out, which is said once. resume:
    entries after this iteration are deleted, so that a resumed run's log reads as if it had never stopped. say: prints
    a line. Raises WriteError if the log cannot be begun.
    """

    def __init__(self, folder: pathlib.Path, resume: int = 0, say: Callable[[str], None] = print):
        entries = [line for line in read_log(folder) if line["iteration"] <= resume]
        text = "".join(json.dumps(line) + "\n" for line in entries)
        self.lines = RecordFile(write_file(folder / "log.jsonl", lambda file: file.write(text.encode())))
        self.board = RecordFile(folder / "tensorboard" / name_event_file())
        self.board.append(encode_start(resume + 1))
        self.say = say
        self.failing: set[pathlib.Path] = set()

    def append(self, file: RecordFile, record: bytes) -> None:
        """Add a record to a file of the log, or say that this is impossible."""
        try:
            file.append(record)
        except OSError as error:
            if file.path not in self.failing:
                self.say(f"could not write {file.path} ({error.strerror}); training goes on, entries are left out")
            self.failing.add(file.path)
        else:
            if file.path in self.failing:
                self.say(f"{file.path} can be written again")
            self.failing.discard(file.path)

    def write_event(self, iteration: int, values: dict[str, Any]) -> None:
        """Write an entry to log.jsonl only."""
        self.append(self.lines, json.dumps({"iteration": iteration, **values}).encode() + b"\n")

    def write_scalars(self, iteration: int, values: dict[str, float]) -> None:
        """Write numbers by name to log.jsonl and TensorBoard."""
        self.write_event(iteration, values)
        self.append(self.board, encode_values(iteration, {k: {"simple_value": v} for k, v in values.items()}))

    def write_picture(self, iteration: int, name: str, path: pathlib.Path) -> None:
        """Add a PNG file to TensorBoard."""
        self.append(self.board, encode_values(iteration, {name: describe_picture(path)}))

    def write_histogram(self, iteration: int, name: str, values: np.ndarray, edges: np.ndarray) -> None:
        """Write how many values are in each bin between the edges to TensorBoard."""
        self.append(self.board, encode_values(iteration, {name: describe_histogram(values, edges)}))


# ---- TensorBoard's records. Its own writer leaves half a record on a full disk and ends its thread for good. ----


def name_event_file() -> str:
    """Return a new name for a file that TensorBoard shows; later ones come later in the alphabet."""
    return f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"


def encode_start(first_step: int) -> bytes:
    """Return the first records of a file, which let TensorBoard forget what earlier files hold from this step on."""
    from tensorboard.compat.proto.event_pb2 import SessionLog

    start = encode_event(step=first_step, session_log=SessionLog(status=SessionLog.START))
    return encode_event(step=first_step, file_version="brain.Event:2") + start


def encode_event(**contents: Any) -> bytes:
    """Return the record of an event with these fields."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    record = io.BytesIO()
    RecordWriter(record).write(Event(wall_time=time.time(), **contents).SerializeToString())
    return record.getvalue()


def encode_values(iteration: int, values: dict[str, dict[str, Any]]) -> bytes:
    """Return the record of what TensorBoard shows under some names: fields of its Summary.Value."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    summary = Summary(value=[Summary.Value(tag=name, **fields) for name, fields in values.items()])
    return encode_event(step=iteration, summary=summary)


def describe_picture(path: pathlib.Path) -> dict[str, Any]:
    """Return the fields of a PNG file."""
    with Image.open(path) as image:
        sizes = {"width": image.width, "height": image.height, "colorspace": len(image.getbands())}
    return {"image": sizes | {"encoded_image_string": path.read_bytes()}}


def describe_histogram(values: np.ndarray, edges: np.ndarray) -> dict[str, Any]:
    """Return the fields of a histogram of numbers with these edges of its bins."""
    counts = [0, *np.histogram(values, edges)[0].tolist()]  # the first bin ends at the first edge
    moments = {"num": values.size, "sum": values.sum(), "sum_squares": (values**2).sum()}
    bins = {"bucket_limit": edges.tolist(), "bucket": counts}
    return {"histo": {"min": values.min(), "max": values.max()} | moments | bins}
