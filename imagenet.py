"""ImageNet: 32x32 from the files of Chrabaszcz et al. (2017), or 128x128 decoded while training.

    images, classes, names = imagenet.read_imagenet32(path, "train")          # uint8 (N, 3, 32, 32), in memory
    dataset = imagenet.open_imagenet(path, "train", device="cuda", workers=4)  # 1.3 million JPEGs stay on the disk
    images, labels = dataset.batch(index, generator)                           # (n, 3, 128, 128) in [0, 1], one-hot
    dataset.prefetch(next_index)                                               # decoded while the network trains

Any image can be read by its number, so a run shuffles all of them anew in each epoch, all workers deal out one common
permutation, and a resumed run sees the very images it would have seen. The reference gave each worker a contiguous
share of the records and shuffled within the next 10,000 of it, which no checkpoint can hold.

Files may come from strangers: nothing in them is executed, and every record's checksum is verified.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import json
import multiprocessing
import os
import pathlib
import queue
import re
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import readers
from ebm.readers.tensorflow import Fault, read_fields, read_nested, read_varint, verify_checksum
from errors import UsageError
from utils import Progress, dequantise

CLASSES = 1000
SIDE = 128  # pixels of a streamed image
NUMBERS = tuple(map(str, range(CLASSES)))  # the classes' names, where the files only count them

# ---------------------------------------------------------------------------------------------------------------------
# 32x32: ten files of the training set and one of the validation set


def read_imagenet32(folder: pathlib.Path, split: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Read the "train" or "test" (validation) split: images uint8 (N, 3, 32, 32), classes int64 (N,), their numbers.

    The files are the authors' pickles or .npz files, in the folder or where their archives unpack, one folder below.
    A class is the files' label minus 1, in the authors' own order of the classes (their map_clsloc.txt).
    Raises UsageError where files are missing, damaged or others.
    """
    names = [f"train_data_batch_{k}" for k in range(1, 11)] if split == "train" else ["val_data"]
    found = {name: find_batch(folder, name) for name in names}
    paths = [path for path in found.values() if path is not None]
    if not paths:
        raise UsageError(f"`imagenet_path`={folder} holds no {names[0]} or {names[0]}.npz; unpack the archives there")
    if len(paths) < len(names):
        missing = ", ".join(name for name, path in found.items() if path is None)
        print(f"note: imagenet_path={folder} lacks {missing}; the data set is what there is")
    parts = [read_batch(path) for path in paths]
    classes = torch.cat([part_classes for _, part_classes in parts])
    images = torch.empty(len(classes), 3, 32, 32, dtype=torch.uint8)  # 4 GB, filled as the parts are given back
    start = 0
    while parts:
        rows, _ = parts.pop(0)
        images[start : start + len(rows)] = torch.from_numpy(rows).view(-1, 3, 32, 32)
        start += len(rows)
    return images, classes, NUMBERS


def find_batch(folder: pathlib.Path, name: str) -> pathlib.Path | None:
    """Return the file of that name in a folder or one below, the .npz form first; None where there is none."""
    patterns = (f"{name}.npz", name, f"*/{name}.npz", f"*/{name}")
    return next((path for pattern in patterns for path in sorted(folder.glob(pattern))), None)


def read_batch(path: pathlib.Path) -> tuple[np.ndarray, Tensor]:
    """Read one file: rows uint8 (n, 3·32·32) and classes int64 (n,) from 0 to 999."""
    with readers.reading(path):
        if path.suffix == ".npz":
            with np.load(path) as file:  # which refuses pickled objects
                rows, labels = file["data"], file["labels"]
        else:
            rows, labels = readers.read_pickle(path, ["data", "labels"])
        labels = np.asarray(labels)
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or not 1 <= labels.min() <= labels.max() <= CLASSES:
            raise ValueError(f"labels are not whole numbers from 1 to {CLASSES}")
        if rows.dtype != np.uint8 or rows.shape != (len(labels), 3 * 32 * 32):
            raise ValueError(f"data is {rows.dtype} {rows.shape}, not uint8 {(len(labels), 3 * 32 * 32)}")
        return rows, torch.from_numpy(labels.astype(np.int64)) - 1


# ---------------------------------------------------------------------------------------------------------------------
# 128x128: where an encoded image lies, in a TFRecord file or in one of its own

MAX_SIZE = 1 << 26  # bytes of an encoded image; ImageNet's largest has 15 million


class Place(Protocol):
    """Where an image is; as text, what to call it when it is damaged."""

    def load(self) -> tuple[bytes, int]:
        """Return the encoded image and its class, or raise Fault or OSError."""
        ...


class Record(NamedTuple):
    """A TFRecord: length and its checksum, 12 bytes from `offset` of a file, then `size` bytes and their checksum."""

    path: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.path} at byte {self.offset}"

    def load(self) -> tuple[bytes, int]:
        if self.size > MAX_SIZE:
            raise Fault(f"has {self.size} bytes, more than the {MAX_SIZE} of the largest image")
        with open(self.path, "rb", buffering=0) as file:
            contents = os.pread(file.fileno(), self.size + 4, self.offset + 12)
        example, checksum = contents[: self.size], contents[self.size :]
        verify_checksum(example, int.from_bytes(checksum, "little"), "the record")
        return parse_example(example)


class File(NamedTuple):
    """A file of its own, whose class its folder tells."""

    path: str
    label: int

    def __str__(self) -> str:
        return self.path

    def load(self) -> tuple[bytes, int]:
        if os.path.getsize(self.path) > MAX_SIZE:
            raise Fault(f"has more than the {MAX_SIZE} bytes of the largest image")
        return pathlib.Path(self.path).read_bytes(), self.label


def parse_example(message: bytes) -> tuple[bytes, int]:
    """Return the encoded image and the class, from 0 to 999, of a serialised tf.train.Example."""
    features = {}
    for collection in read_nested(message, 1):
        for entry in read_nested(collection, 1):  # an entry of a map: its key is field 1, its value field 2
            pair = dict(read_fields(entry))
            features[pair.get(1)] = pair.get(2)
    encoded = only_value(features.get(b"image/encoded"), kind=1)
    label = only_value(features.get(b"image/class/label"), kind=3)
    if isinstance(label, bytes):  # packed
        label = read_varint(label, 0)[0]
    if not isinstance(encoded, bytes) or label is None:
        raise Fault("holds no image/encoded and image/class/label")
    if not 1 <= label <= CLASSES:
        raise Fault(f"has the class label {label}, not one from 1 to {CLASSES}")
    return encoded, label - 1


def only_value(feature: int | bytes | None, kind: int) -> int | bytes | None:
    """Return the value of a tf.train.Feature, in its list of that kind: 1 bytes, 3 whole numbers; None without one."""
    lists = read_nested(feature, kind) if isinstance(feature, bytes) else []
    values = [value for number, value in read_fields(lists[0]) if number == 1] if lists else []
    return values[0] if values else None


class TFRecords(Sequence[Place]):
    """The records of all files of a split, found once by their length fields and kept as numbers, 24 bytes each.

    prefix: "train" or "validation", which file names begin with. index.json, where there is one, says which files
    there are and how many records each has. Raises UsageError where a file is missing, or its records cannot be told
    apart: behind a damaged length nothing can be found any more.
    """

    def __init__(self, folder: pathlib.Path, prefix: str):
        counts = read_counts(folder, prefix)
        self.paths = [str(folder / name) for name in counts]
        progress = Progress(len(self.paths), what="index of file", quiet=len(self.paths) < 100)
        parts = []
        with concurrent.futures.ThreadPoolExecutor(16) as pool:  # which wait for the disk
            for number, (name, found) in enumerate(zip(counts, pool.map(find_records, self.paths), strict=True)):
                if counts[name] not in (None, len(found)):
                    raise UsageError(
                        f"{folder / name} holds {len(found)} records and index.json says {counts[name]}; "
                        "replace the file or correct index.json"
                    )
                parts.append(np.insert(found, 0, number, axis=1))
                progress.update(number + 1)
        progress.close()
        self.places = np.concatenate(parts)  # (N, 3): file, offset, size
        if not len(self.places):
            raise UsageError(f"`imagenet_datadir`={folder}: its {prefix} files hold no records; replace them")

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i):
        file, offset, size = self.places[i].tolist()
        return Record(self.paths[file], offset, size)


def read_counts(folder: pathlib.Path, prefix: str) -> dict[str, int | None]:
    """Return the files of a split, by name, and how many records index.json says they have, None without it."""
    pattern = rf"{prefix}-\d+-of-\d+"
    index = folder / "index.json"
    counts: dict[str, int | None]
    if index.exists():
        with readers.reading(index):
            record_counts = json.loads(index.read_text())["record_counts"]
            counts = {name: int(record_counts[name]) for name in sorted(record_counts) if re.fullmatch(pattern, name)}
        where = index
    else:
        counts = {path.name: None for path in sorted(folder.iterdir()) if re.fullmatch(pattern, path.name)}
        where = folder
    if not counts:
        raise UsageError(f"{where} knows no files {prefix}-NNNNN-of-NNNNN; set `imagenet_datadir` to where they are")
    return counts


def find_records(path: str) -> np.ndarray:
    """Return offset and size, int64 (n, 2), of each record of a TFRecord file, checking the length fields' checksums.

    Raises UsageError where the file is missing, cut short or damaged in a length.
    """
    places: list[tuple[int, int]] = []
    offset = 0
    try:
        with open(path, "rb", buffering=0) as file:
            end = os.fstat(file.fileno()).st_size
            while offset < end:
                header = os.pread(file.fileno(), 12, offset)
                verify_checksum(header[:8], int.from_bytes(header[8:], "little"), "a record's length")
                size = int.from_bytes(header[:8], "little")
                if offset + size + 16 > end:
                    raise Fault("is cut short")
                places.append((offset, size))
                offset += size + 16
    except (Fault, OSError) as error:
        reason = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else error
        raise UsageError(f"{path} at byte {offset} {reason}; the records from there on are lost, replace it") from None
    return np.array(places, np.int64).reshape(-1, 2)


class ClassFolders(Sequence[Place]):
    """The image files below class folders, sorted; the classes are the folders in the order of their names.

    Only names are kept, as bytes: a list of a million paths would take hundreds of megabytes. Raises UsageError where
    there are no images, or none of a class.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.class_names = tuple(
            sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
        )
        parts = [list_images(folder / name) for name in self.class_names]
        empty = [name for name, part in zip(self.class_names, parts, strict=True) if not part]
        if not parts or empty:
            place = folder / empty[0] if empty else folder
            raise UsageError(f"`imagenet_datadir`: {place} holds no images; every folder in {folder} is a class")
        self.classes = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        self.names = np.array([name for part in parts for name in part])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i):
        label = int(self.classes[i])
        path = os.path.join(self.folder, self.class_names[label], os.fsdecode(self.names[i]))
        return File(os.path.normpath(path), label)


def list_images(folder: pathlib.Path) -> list[bytes]:
    """Return the image files below a folder, relative to it and sorted."""
    found: list[bytes] = []
    for parent, _, files in os.walk(folder):
        images = (name for name in files if name.lower().endswith(readers.IMAGES) and not name.startswith("."))
        inner = os.path.relpath(parent, folder)
        found += (os.fsencode(os.path.join(inner, name)) for name in images)
    return sorted(found)


# ---------------------------------------------------------------------------------------------------------------------
# 128x128: decoding, in processes that work ahead

MAX_BAD = 100  # images of a run that may be damaged
MAX_PENDING = 8  # batches that are decoded ahead, at most

Decoded = tuple[np.ndarray, int] | str  # pixels uint8 (3, SIDE, SIDE) and class, or what is wrong


def decode(place: Place) -> Decoded:
    """Read and decode one image, or say what is wrong with it; this runs in a decode worker."""
    try:
        encoded, label = place.load()
    except Fault as fault:
        return str(fault)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    try:
        return pixels(encoded), label
    except Exception as error:  # Pillow has many ways to refuse foreign bytes
        return f"is no image that can be decoded ({' '.join(str(error).split()) or type(error).__name__})"


def pixels(encoded: bytes) -> np.ndarray:
    """Decode an image to colour, its shorter side resized to SIDE and the middle cut out: uint8 (3, SIDE, SIDE).

    Bilinear over the whole area of a pixel. A JPEG at least twice too large is decoded at a half, quarter or eighth of
    its size, which saves most of the work.
    """
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(encoded), formats=readers.FORMATS) as image:
        image.draft("RGB", (SIDE, SIDE))
        fitted = ImageOps.fit(image.convert("RGB"), (SIDE, SIDE), Image.Resampling.BILINEAR)
    return np.asarray(fitted).transpose(2, 0, 1)


def serve(connection: Connection) -> None:
    """Decode what is asked for until the run is gone; it alone is to end by Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, OSError):
        while True:
            connection.send(decode(connection.recv()))


class DecodeWorker:
    """A process that decodes, started when it is first needed, and again where it was killed.

    It is forked from a server that imports this module once, so it shares neither threads nor a GPU nor MPI with the
    run. A pipe of its own tells each side when the other has died, also in the middle of a message.
    """

    def __init__(self) -> None:
        self.process: BaseProcess | None = None

    def start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        # Not this module: the server would look for it in the working directory, where a folder may have its name.
        context.set_forkserver_preload(["torch", "PIL.Image"])
        self.connection, other_end = context.Pipe()
        self.process = context.Process(target=serve, args=(other_end,), daemon=True)
        self.process.start()
        other_end.close()

    def decode(self, place: Place) -> Decoded:
        """Do as `decode`; an image is given up when it kills the worker twice."""
        for _ in range(2):
            try:
                if self.process is None:
                    self.start()
                self.connection.send(place)
                return self.connection.recv()
            except (EOFError, OSError) as error:
                print(f"note: a decode worker was killed ({error or 'out of memory?'}); a new one starts", flush=True)
                self.process = None
        return "kills the process that decodes it"

    def stop(self) -> None:
        if self.process is not None:
            self.connection.close()
            self.process.join()


class StreamedImages:
    """A `data.Dataset` whose images are read and decoded batch by batch, by so many worker processes.

    workers: 0 decodes in a thread of this process. A damaged image is named in a note, and the one after it takes its
    place; after MAX_BAD of them, or where all are damaged, UsageError is raised.
    """

    name = "imagenetfull"
    image_shape = (3, SIDE, SIDE)
    labels: Tensor | None = None  # they are on the disk
    noise = "steps"
    index_device = torch.device("cpu")  # an index on a GPU would wait for all work there

    def __init__(
        self,
        places: Sequence[Place],
        class_names: tuple[str, ...],
        *,
        device: torch.device | str = "cpu",
        workers: int = 4,
    ):
        self.places, self.class_names, self.device = places, class_names, device
        self.workers = [DecodeWorker() for _ in range(workers)]
        self.idle: queue.SimpleQueue[DecodeWorker] = queue.SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)
        self.threads = concurrent.futures.ThreadPoolExecutor(max(1, workers))  # each waits for a worker
        self.pending: dict[tuple[int, ...], list[concurrent.futures.Future[Decoded]]] = {}
        self.bad: set[int] = set()

    def __len__(self) -> int:
        return len(self.places)

    @property
    def label_size(self) -> int:
        """Width of the label vectors of a batch."""
        return len(self.class_names)

    def prefetch(self, index: Tensor) -> None:
        """Start to decode the images of an index (n,) that a `batch` will ask for; the oldest of many are dropped."""
        numbers = tuple(index.tolist())
        if numbers in self.pending:
            return
        self.pending[numbers] = [self.threads.submit(self.decode, number) for number in numbers]
        while len(self.pending) > MAX_PENDING:
            for future in self.pending.pop(next(iter(self.pending))):
                future.cancel()

    def batch(self, index: Tensor, generator: torch.Generator | None, rescale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return the images (n, 3, 128, 128) in [0, rescale] and one-hot labels (n, label_size) of an index (n,)."""
        stored, labels = self.decode_batch(index)
        return dequantise(stored, generator, rescale), F.one_hot(labels, self.label_size).float()

    def raw(self, index: Tensor) -> Tensor:
        """Return the images uint8 (n, 3, 128, 128) of an index (n,)."""
        return self.decode_batch(index)[0]

    def decode_batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images uint8 (n, 3, 128, 128) and classes (n,) of an index (n,), on the device."""
        self.prefetch(index)
        numbers = tuple(index.tolist())
        futures = zip(numbers, self.pending.pop(numbers), strict=True)
        good = [self.replace_bad(number, future.result()) for number, future in futures]
        return (
            self.to_device(torch.from_numpy(np.stack([image for image, _ in good]))),
            self.to_device(torch.tensor([label for _, label in good])),
        )

    def to_device(self, tensor: Tensor) -> Tensor:
        """Return a tensor where batches belong; a GPU fetches it while the CPU goes on, which takes pinned memory."""
        if torch.device(self.device).type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def close(self) -> None:
        """End the decode workers."""
        self.threads.shutdown(cancel_futures=True)
        for worker in self.workers:
            worker.stop()

    def decode(self, number: int) -> Decoded:
        """Decode an image by its number, in a worker if there are any."""
        if not self.workers:
            return decode(self.places[number])
        worker = self.idle.get()
        try:
            return worker.decode(self.places[number])
        finally:
            self.idle.put(worker)

    def replace_bad(self, number: int, result: Decoded) -> tuple[np.ndarray, int]:
        """Return an image as it was decoded, or where it is damaged, having said so, the next one that is not."""
        while isinstance(result, str):
            if number not in self.bad:
                self.bad.add(number)
                if len(self.bad) > min(MAX_BAD, len(self) - 1):
                    raise UsageError(
                        f"{self.places[number]} {result}; it is damaged image number {len(self.bad)} of "
                        f"{len(self):,}, too many to go on: replace the files named"
                    )
                print(f"note: {self.places[number]} {result}; the next image takes its place", flush=True)
            number = (number + 1) % len(self)
            result = self.decode(number)
        return result


def open_imagenet(
    folder: pathlib.Path, split: str, *, device: torch.device | str = "cpu", workers: int = 4
) -> StreamedImages:
    """Open the "train" or "test" (validation) split of ImageNet in a folder, batches to come on the device.

    The folder holds TFRecords (train-NNNNN-of-NNNNN, validation-NNNNN-of-NNNNN, index.json), or image files in class
    folders, below `train` and `val` or, without a split, right there. Raises UsageError where it holds neither.
    """
    if not folder.is_dir():
        raise UsageError(f"`imagenet_datadir`={folder}: no such folder")
    if (folder / "index.json").exists() or next(folder.glob("*-of-*"), None):
        records = TFRecords(folder, "train" if split == "train" else "validation")
        return StreamedImages(records, NUMBERS, device=device, workers=workers)
    if (folder / "train").is_dir():
        names = ("train",) if split == "train" else ("val", "validation", "test")
        where = next((folder / name for name in names if (folder / name).is_dir()), None)
    else:
        where = folder if split == "train" else None
    if where is None:
        raise UsageError(f"`imagenet_datadir`={folder} has no validation images; put class folders below {folder}/val")
    files = ClassFolders(where)
    return StreamedImages(files, files.class_names, device=device, workers=workers)
