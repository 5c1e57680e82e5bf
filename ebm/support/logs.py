"""The log of a run: TensorBoard for people, JSON lines for programs."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import pathlib
import secrets
import socket
import statistics
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from ebm.readers.bounded import Fault, open_file
from ebm.readers.tensorflow import read_varint
from ebm.support.files import RecordFile, write_file
from ebm.support.trackers import Tracker

CONFIG_NAME, LOG_NAME = "config.json", "log.jsonl"  # the files of a run's settings and of its figures
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
    return extract_series(read_log(folder), name)


def extract_series(entries: Iterable[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return the iterations and values of the entries of a log that have a number of this name."""
    series: list[tuple[int, float]] = []
    for entry in entries:
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

    An entry that cannot be written, for example because the disk is full, is left out, which is said once. resume:
    entries after this iteration are left out, so that a resumed run's log reads as if it had never stopped. is_branch:
    the run leaves a later history, whose log stays in its place until `publish`. say: prints a line. trackers: get a
    copy of the numbers and pictures. Raises WriteError if the log cannot be begun.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        resume: int = 0,
        *,
        is_branch: bool = False,
        say: Callable[[str], None] = print,
        trackers: Sequence[Tracker] = (),
    ):
        self.trackers = trackers
        self.path = folder / LOG_NAME
        branch_path = folder / f".branch_{LOG_NAME}"
        branch_path.unlink(missing_ok=True)  # of a run that was killed before it published its log
        begun_path = branch_path if is_branch else self.path
        self.lines = RecordFile(write_file(begun_path, lambda file: copy_log(self.path, file, resume)))
        self.board = RecordFile(folder / "tensorboard" / name_event_file())
        self.board.append(encode_start(resume + 1))
        self.say = say
        self.failing: set[pathlib.Path] = set()

    def publish(self) -> None:
        """Put the log of a branch in the place of the log of the history that it leaves; do nothing for another log."""
        if self.lines.path != self.path:
            os.replace(self.lines.path, self.path)
            self.lines.path = self.path

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
        """Write numbers by name to log.jsonl, TensorBoard and the trackers."""
        self.write_event(iteration, values)
        for tracker in self.trackers:
            tracker.log_figures(iteration, values)
        self.append(self.board, encode_values(iteration, {k: {"simple_value": v} for k, v in values.items()}))

    def write_picture(self, iteration: int, name: str, path: pathlib.Path) -> None:
        """Add a PNG file to TensorBoard and the trackers."""
        for tracker in self.trackers:
            tracker.log_picture(iteration, name, path)
        self.append(self.board, encode_values(iteration, {name: describe_picture(path)}))

    def write_table(self, iteration: int, name: str, values: Mapping[str, Any]) -> None:
        """Add a table of values by name to TensorBoard, which shows it among its texts."""
        self.append(self.board, encode_values(iteration, {name: describe_table(values)}))

    def write_histogram(self, iteration: int, name: str, values: np.ndarray, edges: np.ndarray) -> None:
        """Write how many values are in each bin between the edges to TensorBoard."""
        self.append(self.board, encode_values(iteration, {name: describe_histogram(values, edges)}))


# ---- TensorBoard's records. Its own writer leaves half a record on a full disk and ends its thread for good. ----


def name_event_file() -> str:
    """Return a new name for a file that TensorBoard shows; later ones come later in the alphabet."""
    return f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"


class RunTimes(NamedTuple):
    """The time that a run took until its last entry, and that of an iteration without the tests, both in seconds."""

    total: float | None = None
    per_iteration: float | None = None


def measure_times(folder: pathlib.Path) -> RunTimes:
    """Return the times of a run by the clock in its files for TensorBoard, as far as they tell.

    The time between the end of a run and its resumption does not count. The time of an iteration is a median.
    """
    total, each = 0.0, list[float]()
    for path in sorted((folder / "tensorboard").glob("events.out.tfevents.*")):
        moments = list(read_moments(path))
        total += max(moments[-1][0] - moments[0][0], 0) if moments else 0
        # The first two only say that the file begins. After a test several have its iteration.
        for (before, first), (now, second) in itertools.pairwise(moments[2:]):
            each += [(now - before) / (second - first)] if second > first and now > before else []
    return RunTimes(total or None, statistics.median(each) if each else None)


def read_moments(path: pathlib.Path) -> Iterator[tuple[float, int]]:
    """Yield the time, in seconds since 1970, and the iteration of each record of a file for TensorBoard.

    It ends at the first record that is damaged, or not written to its end yet.
    """
    with contextlib.suppress(OSError, Fault), open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        while len(head := file.read(12)) == 12:
            end = file.tell() + int.from_bytes(head[:8], "little") + 4
            event = file.read(min(20, max(end - 4 - file.tell(), 0)))  # the time comes first, then the iteration
            if end > size or event[:1] != b"\x09" or len(event) < 9:
                return
            (moment,) = struct.unpack("<d", event[1:9])
            iteration, _ = read_varint(event, 10) if event[9:10] == b"\x10" else (0, 0)
            if not math.isfinite(moment) or iteration >= 1 << 53:
                return
            yield moment, iteration
            file.seek(end)


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


def describe_table(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a table of values by name, which TensorBoard reads as Markdown."""
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    rows = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in values.items()]
    text = "\n".join(["| name | value |", "| --- | --- |", *rows])
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode(errors="backslashreplace")], tensor_shape=shape)
    return {"tensor": tensor, "metadata": {"plugin_data": {"plugin_name": "text"}}}


def describe_histogram(values: np.ndarray, edges: np.ndarray) -> dict[str, Any]:
    """Return the fields of a histogram of numbers with these edges of its bins."""
    counts = [0, *np.histogram(values, edges)[0].tolist()]  # the first bin ends at the first edge
    moments = {"num": values.size, "sum": values.sum(), "sum_squares": (values**2).sum()}
    bins = {"bucket_limit": edges.tolist(), "bucket": counts}
    return {"histo": {"min": values.min(), "max": values.max()} | moments | bins}
