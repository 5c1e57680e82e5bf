"""ImageNet at 8x8 to 64x64 pixels from the files of Chrabaszcz et al. (2017), or at 128x128, decoded while training.

    images, classes, names = imagenet.read_imagenet32(path, "train")          # uint8 (N, 3, 32, 32), in memory
    dataset = imagenet.open_imagenet(path, "train", device="cuda", workers=4)  # 1.3 million JPEGs stay on the disk

Files need not be trusted: nothing in them is executed, and the checksum of every record is verified.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import math
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ebm.readers.arrays import read_npy
from ebm.readers.bounded import (
    Archive,
    Fault,
    open_file,
    read_file,
    read_json,
    report_unreadable_file,
    show_reading,
)
from ebm.readers.folders import TRAIN_NAMES, VALIDATION_NAMES, find_split, is_folder, list_folder, scan_folder
from ebm.readers.pickles import read_pickle, to_whole_numbers
from ebm.readers.streaming import Place, StreamedImages
from ebm.readers.tensorflow import read_fields, read_nested, read_varint, verify_checksum
from ebm.support.errors import UsageError
from ebm.support.progress import SHORT, Progress

CLASSES = 1000
NUMBERS = tuple(map(str, range(CLASSES)))  # names of the classes if the files only number them

# ---------------------------------------------------------------------------------------------------------------------
# 32x32 or another size: ten files of the training set and one of the validation set

SIDES = (8, 16, 32, 64)  # of the images that the authors published, in pixels


def read_imagenet32(folder: pathlib.Path, split: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Read a split of small ImageNet; return uint8 images (N, 3, S, S), classes int64 (N,) and the classes' names.

    split: "train", or "test" for the validation images. The files are the authors' pickles or .npz files, in the folder
    or in a subfolder, as the archives unpack; all have images of one size S, one of SIDES. A class is the label in the
    file minus 1, in the authors' order of the classes (their map_clsloc.txt); its name is its number. If some files are
    missing, a note lists them. Raises UsageError if all files are missing, or if one is damaged or of another format.
    """
    names = [f"train_data_batch_{k}" for k in range(1, 11)] if split == "train" else ["val_data"]
    files = {name: find_imagenet32_file(folder, name) for name in names}
    paths = [path for path in files.values() if path is not None]
    if not paths:
        raise UsageError(f"`imagenet_path`={folder} holds no {names[0]} or {names[0]}.npz; unpack the archives there")
    if len(paths) < len(names):
        missing = ", ".join(name for name, path in files.items() if path is None)
        print(f"note: imagenet_path={folder} lacks {missing}; the other files are used")
    parts = []
    with contextlib.closing(Progress(len(paths), what="reading file", patience=SHORT)) as progress:
        for path in paths:
            parts.append(read_imagenet32_file(path))
            progress.advance()
    widths = {rows.shape[1]: path for path, (rows, _) in zip(paths, parts, strict=True)}
    if len(widths) > 1:
        one, other, *_ = widths.values()
        raise UsageError(f"{one} and {other} hold images of different sizes; keep one size below `imagenet_path`")
    side = math.isqrt(max(widths) // 3)
    classes = torch.cat([part_classes for _, part_classes in parts])
    images = torch.empty(len(classes), 3, side, side, dtype=torch.uint8)  # 4 GB; each part is freed after it is copied
    start = 0
    while parts:
        rows, _ = parts.pop(0)
        images[start : start + len(rows)] = torch.from_numpy(rows).view(-1, 3, side, side)
        start += len(rows)
    return images, classes, NUMBERS


def find_imagenet32_file(folder: pathlib.Path, name: str) -> pathlib.Path | None:
    """Return the path of a file in a folder or its subfolders, preferably as .npz; None if it does not exist."""
    patterns = (f"{name}.npz", name, f"*/{name}.npz", f"*/{name}")
    return next((path for pattern in patterns for path in sorted(folder.glob(pattern))), None)


def read_imagenet32_file(path: pathlib.Path) -> tuple[np.ndarray, Tensor]:
    """Read one file; return rows uint8 (n, 3·side·side) and classes int64 (n,) from 0 to 999."""
    with report_unreadable_file(path):
        if path.suffix == ".npz":
            with open_file(path) as file, Archive(file) as archive, show_reading(path, archive.size):
                rows, labels = read_npy(archive, "data.npy"), read_npy(archive, "labels.npy")
        else:
            rows, labels = read_pickle(path, ["data", "labels"])
        labels = to_whole_numbers(labels)
        if not len(labels) or not 1 <= labels.min() <= labels.max() <= CLASSES:
            raise ValueError(f"labels are not whole numbers from 1 to {CLASSES}")
        if not isinstance(rows, np.ndarray):
            raise ValueError("data is not an array")
        if rows.dtype != np.uint8 or rows.shape not in [(len(labels), 3 * side * side) for side in SIDES]:
            expected = f"uint8 {(len(labels), 3 * 32 * 32)}, or so for another side of {SIDES}"
            raise ValueError(f"data is {rows.dtype} {rows.shape}, not {expected}")
        return rows, torch.from_numpy(labels) - 1


# ---------------------------------------------------------------------------------------------------------------------
# 128x128: the places of encoded images, in TFRecord files or in files of their own

MAX_SIZE = 1 << 26  # largest size of an encoded image in bytes; ImageNet's largest has 15 million
MOST_EXAMINED = 5_000  # records that are read to learn from which number labels count
HELD_OUT_NAMES = (*VALIDATION_NAMES, "test", "testing")  # in this order, because ImageNet's test images have no labels
RECORD_FILE = re.compile(r"-\d+-of-\d+|\.tfrecords?\b")


class Record(NamedTuple):
    """The place of a TFRecord in a file.

    At `offset` are 12 bytes, its length with a checksum, then `size` bytes of contents and their checksum. first_label:
    the label of the first class; None if the records of this file have no labels.
    """

    path: str
    offset: int
    size: int
    first_label: int | None = 1

    def __str__(self) -> str:
        return f"{self.path} at byte {self.offset}"

    def load(self) -> tuple[bytes, int | None]:
        encoded, label = self.load_example()
        if self.first_label is None:
            return encoded, None
        if label is None:
            raise Fault("holds no image/class/label")
        last = self.first_label + CLASSES - 1
        if not self.first_label <= label <= last:
            raise Fault(f"has the class label {label}, not one from {self.first_label} to {last}")
        return encoded, label - self.first_label

    def load_example(self) -> tuple[bytes, int | None]:
        """Return the encoded image and its label as it is stored; raise Fault or OSError."""
        if self.size > MAX_SIZE:
            raise Fault(f"has {self.size} bytes, more than the {MAX_SIZE} of the largest image")
        with open_file(self.path) as file:
            contents = os.pread(file.fileno(), self.size + 4, self.offset + 12)
        example, checksum = contents[: self.size], contents[self.size :]
        verify_checksum(example, int.from_bytes(checksum, "little"), "the record")
        return parse_example(example)


class File(NamedTuple):
    """The place of an image that is a file of its own. label: its class."""

    path: str
    label: int | None

    def __str__(self) -> str:
        return self.path

    def load(self) -> tuple[bytes, int | None]:
        if os.path.getsize(self.path) > MAX_SIZE:
            raise Fault(f"has more than the {MAX_SIZE} bytes of the largest image")
        return read_file(self.path), self.label


def parse_example(message: bytes) -> tuple[bytes, int | None]:
    """Return the encoded image and its label, None without one, in a serialised tf.train.Example.

    The features have the names of the usual conversion scripts, or of tensorflow_datasets.
    """
    features = {}
    for collection in read_nested(message, 1):
        for entry in read_nested(collection, 1):  # an entry of a map: its key is field 1, its value field 2
            pair = dict(read_fields(entry))
            features[pair.get(1)] = pair.get(2)
    encoded = get_only_value(features.get(b"image/encoded", features.get(b"image")), kind=1)
    label = get_only_value(features.get(b"image/class/label", features.get(b"label")), kind=3)
    if isinstance(label, bytes):  # packed
        label = read_varint(label, 0)[0]
    if not isinstance(encoded, bytes):
        raise Fault("holds no image/encoded")
    return encoded, label


def get_only_value(feature: int | bytes | None, kind: int) -> int | bytes | None:
    """Return the first value of a tf.train.Feature, None if it has none. kind: 1 for bytes, 3 for whole numbers."""
    lists = read_nested(feature, kind) if isinstance(feature, bytes) else []
    values = [value for number, value in read_fields(lists[0]) if number == 1] if lists else []
    return values[0] if values else None


class TFRecords(Sequence[Place]):
    """The records of all TFRecord files of a split, indexed once by their length fields, 24 bytes of memory each.

    counts: the paths of the files, with their numbers of records if these are known. Raises UsageError if a file is
    missing, or if a length is damaged: the records after it could not be found.
    """

    def __init__(self, counts: Mapping[str, int | None]):
        self.paths = list(counts)
        self.first_label: int | None = 1
        parts: list[np.ndarray] = []
        with (
            Progress(len(self.paths), what="index of file", patience=SHORT) as progress,
            concurrent.futures.ThreadPoolExecutor(16) as pool,  # the threads wait for the disk
        ):
            # In parts, so that of a million files that are missing only the first is looked for.
            for start in range(0, len(self.paths), 64):
                for path, records in zip(
                    part := self.paths[start : start + 64], pool.map(index_records, part), strict=True
                ):
                    if counts[path] not in (None, len(records)):
                        raise UsageError(
                            f"{path} holds {len(records)} records and index.json says {counts[path]}; "
                            "replace the file or correct index.json"
                        )
                    parts.append(np.insert(records, 0, len(parts), axis=1))
                    progress.update(len(parts))
        self.places = np.concatenate(parts)  # (N, 3): file, offset, size
        if not len(self.places):
            raise UsageError(f"{self.paths[0]} and the other files of its split hold no records; replace them")

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, their numbers; none without labels."""
        return () if self.first_label is None else NUMBERS

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i):
        file, offset, size = self.places[i].tolist()
        return Record(self.paths[file], offset, size, self.first_label)


def find_extreme_label(records: TFRecords) -> int | None:
    """Return 0 or 1000, whichever label comes first in a random order of records; 1 if neither does.

    Labels count from 0 or from 1, and only these two tell. Returns None if no record has a label. Of a million shuffled
    records a few hundred are read.
    """
    found, order = None, np.random.default_rng(0).permutation(len(records))[:MOST_EXAMINED]
    with Progress(len(order), what="reading label", patience=SHORT) as progress:
        for i in order:
            with contextlib.suppress(Fault, OSError):  # damaged records are noted when they are used
                _, label = records[i].load_example()
                if label in (0, CLASSES):
                    return label
                found = found if label is None else 1
            progress.advance()
    return found


def open_records(folder: pathlib.Path, split: str) -> TFRecords | None:
    """Return the records of a split with the label of their first class; None if the folder holds no TFRecords."""
    counts = find_record_files(folder, split)
    if counts is None:
        return None
    note_missing_files(counts)
    records = TFRecords(counts)
    extreme = find_extreme_label(records)
    if extreme == 1:  # as far as this split tells: a small one may lack the first and the last class
        with contextlib.suppress(UsageError):
            other = find_record_files(folder, "test" if split == "train" else "train")
            extreme = find_extreme_label(TFRecords(other)) if other else None
        extreme = 1 if extreme is None else extreme
    records.first_label = None if extreme is None else int(extreme > 0)
    if extreme is None:
        print(f"note: the TFRecords in {folder} hold no labels")
    elif extreme == 0:
        print(f"note: labels of the TFRecords in {folder} count from 0; the class of an image is its label")
    return records


def find_record_files(folder: pathlib.Path, split: str) -> dict[str, int | None] | None:
    """Return the paths of the TFRecord files of a split, with their numbers of records if index.json tells them.

    The files are in the folder, where their names tell the split, or in its subfolder for the split. Returns None if
    there are no such files. Raises UsageError if there are, but none of this split.
    """
    index = folder / "index.json"
    if index.exists():
        names, source = read_record_counts(index), index
    else:
        names, source = dict.fromkeys(list_record_files(folder)), folder
        if not names:
            place = find_split(folder, split, HELD_OUT_NAMES, quiet=True)
            if place is None or place == folder:
                return None
            return {os.path.join(place, name): None for name in list_record_files(place)} or None
    for word in TRAIN_NAMES if split == "train" else HELD_OUT_NAMES:
        if chosen := {locate_record_file(folder, name): names[name] for name in names if word in list_words(name)}:
            return chosen
    if names and split == "train" and not any(list_words(name) & {*TRAIN_NAMES, *HELD_OUT_NAMES} for name in names):
        return {locate_record_file(folder, name): names[name] for name in names}
    prefix = "train" if split == "train" else "validation"
    raise UsageError(f"{source} lists no files {prefix}-NNNNN-of-NNNNN; set `imagenet_datadir` to where they are")


def list_record_files(folder: pathlib.Path) -> list[str]:
    """Return the names of the TFRecord files in a folder, in order."""
    return [entry.name for entry in scan_folder(folder) if RECORD_FILE.search(entry.name) and not is_folder(entry)]


def note_missing_files(paths: Iterable[str]) -> None:
    """Print a note if there are fewer files than their names, such as train-00007-of-01024, say."""
    numbers: dict[int, set[int]] = {}
    for path in paths:
        if match := re.search(r"-(\d{1,9})-of-(\d{1,9})", os.path.basename(path)):
            numbers.setdefault(int(match[2]), set()).add(int(match[1]))
    for total, found in numbers.items():
        if len(found) < total:
            print(f"note: {total - len(found):,} of {total:,} TFRecord files are missing; the others are used")


def list_words(path: str) -> set[str]:
    """Return the words of a file's name, which may tell its split."""
    return set(re.findall("[a-z]+", path.rpartition("/")[2].lower()))


def locate_record_file(folder: pathlib.Path, name: str) -> str:
    """Return the path of a file of a folder; a path from elsewhere counts as the file of this name in the folder.

    Raises UsageError if there is no such file.
    """
    paths = [os.path.join(folder, place) for place in (name, os.path.basename(name)) if not os.path.isabs(place)]
    if found := next(filter(os.path.exists, paths), None):
        return found
    raise UsageError(f"{paths[-1]} at byte 0 cannot be read (No such file), and index.json names it; replace the file")


def read_record_counts(index: pathlib.Path) -> dict[str, int | None]:
    """Return the TFRecord files that an index.json names, in order, with their numbers of records."""
    with report_unreadable_file(index):
        counts = read_json(index, MAX_SIZE)["record_counts"]  # type: ignore[index]
        return {name: int(counts[name]) for name in sorted(counts) if RECORD_FILE.search(name) and ".." not in name}


def index_records(path: str) -> np.ndarray:
    """Return the offset and size of each record in a TFRecord file, int64 (n, 2).

    Verifies the checksums of the length fields. Raises UsageError if the file is missing or cut short, or if a length
    is damaged.
    """
    places: list[tuple[int, int]] = []
    offset = 0
    try:
        with open_file(path) as file:
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
        raise UsageError(f"{path} at byte {offset} {reason}; the records after it are lost; replace the file") from None
    return np.array(places, np.int64).reshape(-1, 2)


class ImageFiles(Sequence[Place]):
    """The image files below a folder, by classes if they are in class folders."""

    def __init__(self, folder: pathlib.Path):
        self.found = list_folder(folder)
        self.class_names = self.found.class_names

    def __len__(self) -> int:
        return len(self.found.paths)

    def __getitem__(self, i):
        label = None if self.found.classes is None else int(self.found.classes[i])
        return File(self.found.get_path(i), label)


def open_imagenet(
    folder: pathlib.Path,
    split: str,
    *,
    device: torch.device | str = "cpu",
    workers: int = 4,
    antialias: bool = False,
) -> StreamedImages:
    """Open a split of ImageNet, whose images are decoded batch by batch to 128x128 pixels.

    folder, split: see `find_images`. device: where batches are put. workers: number of decoding processes. antialias:
    see `StreamedImages`. Raises UsageError if the folder holds no such images.
    """
    images = find_images(folder, split)
    return StreamedImages(images, images.class_names, device=device, workers=workers, antialias=antialias)


def find_images(folder: pathlib.Path, split: str) -> TFRecords | ImageFiles:
    """Return the places of the images of a split.

    folder: holds TFRecords, see `find_record_files`, or image files, in class folders or, without labels, not: either
    in subfolders for the splits (train, val) or, for the training split alone, directly. split: "train", or "test" for
    the validation images. Raises UsageError if the folder holds none of these.
    """
    if not folder.is_dir():
        raise UsageError(f"`imagenet_datadir`={folder}: no such folder")
    if records := open_records(folder, split):
        return records
    place = find_split(folder, split, HELD_OUT_NAMES)
    if place is None or (split == "test" and place == folder):
        missing = (
            "training images; put them below" if split == "train" else "validation images; put class folders below"
        )
        raise UsageError(
            f"`imagenet_datadir`={folder} has no {missing} {folder / ('train' if split == 'train' else 'val')}"
        )
    return ImageFiles(place)
