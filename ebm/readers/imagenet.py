"""ImageNet at 32x32 pixels from the files of Chrabaszcz et al. (2017), or at 128x128, decoded while training.

    images, classes, names = imagenet.read_imagenet32(path, "train")          # uint8 (N, 3, 32, 32), in memory
    dataset = imagenet.open_imagenet(path, "train", device="cuda", workers=4)  # 1.3 million JPEGs stay on the disk

Files need not be trusted: nothing in them is executed, and the checksum of every record is verified.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ebm.readers import image_files
from ebm.readers.streaming import Place, StreamedImages
from ebm.readers.tensorflow import Fault, read_fields, read_nested, read_varint, verify_checksum
from ebm.support.errors import UsageError
from ebm.support.progress import Progress

CLASSES = 1000
NUMBERS = tuple(map(str, range(CLASSES)))  # names of the classes if the files only number them

# ---------------------------------------------------------------------------------------------------------------------
# 32x32: ten files of the training set and one of the validation set


def read_imagenet32(folder: pathlib.Path, split: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Read a split of 32x32 ImageNet; return images uint8 (N, 3, 32, 32), classes int64 (N,) and the classes' names.

    split: "train", or "test" for the validation images. The files are the authors' pickles or .npz files, in the folder
    or in a subfolder, as the archives unpack. A class is the label in the file minus 1, in the authors' order of the
    classes (their map_clsloc.txt); its name is its number. If some files are missing, a note lists them. Raises
    UsageError if all files are missing, or if one is damaged or of another format.
    """
    names = [f"train_data_batch_{k}" for k in range(1, 11)] if split == "train" else ["val_data"]
    files = {name: find_imagenet32_file(folder, name) for name in names}
    paths = [path for path in files.values() if path is not None]
    if not paths:
        raise UsageError(f"`imagenet_path`={folder} holds no {names[0]} or {names[0]}.npz; unpack the archives there")
    if len(paths) < len(names):
        missing = ", ".join(name for name, path in files.items() if path is None)
        print(f"note: imagenet_path={folder} lacks {missing}; the data set consists of the other files")
    parts = [read_imagenet32_file(path) for path in paths]
    classes = torch.cat([part_classes for _, part_classes in parts])
    images = torch.empty(len(classes), 3, 32, 32, dtype=torch.uint8)  # 4 GB; each part is freed after it is copied
    start = 0
    while parts:
        rows, _ = parts.pop(0)
        images[start : start + len(rows)] = torch.from_numpy(rows).view(-1, 3, 32, 32)
        start += len(rows)
    return images, classes, NUMBERS


def find_imagenet32_file(folder: pathlib.Path, name: str) -> pathlib.Path | None:
    """Return the path of a file in a folder or its subfolders, preferably as .npz; None if it does not exist."""
    patterns = (f"{name}.npz", name, f"*/{name}.npz", f"*/{name}")
    return next((path for pattern in patterns for path in sorted(folder.glob(pattern))), None)


def read_imagenet32_file(path: pathlib.Path) -> tuple[np.ndarray, Tensor]:
    """Read one file; return rows uint8 (n, 3·32·32) and classes int64 (n,) from 0 to 999."""
    with image_files.report_unreadable_file(path):
        if path.suffix == ".npz":
            with np.load(path) as file:  # np.load refuses pickled objects
                rows, labels = file["data"], file["labels"]
        else:
            rows, labels = image_files.read_pickle(path, ["data", "labels"])
        labels = np.asarray(labels)
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or not 1 <= labels.min() <= labels.max() <= CLASSES:
            raise ValueError(f"labels are not whole numbers from 1 to {CLASSES}")
        if rows.dtype != np.uint8 or rows.shape != (len(labels), 3 * 32 * 32):
            raise ValueError(f"data is {rows.dtype} {rows.shape}, not uint8 {(len(labels), 3 * 32 * 32)}")
        return rows, torch.from_numpy(labels.astype(np.int64)) - 1


# ---------------------------------------------------------------------------------------------------------------------
# 128x128: the places of encoded images, in TFRecord files or in files of their own

MAX_SIZE = 1 << 26  # largest size of an encoded image in bytes; ImageNet's largest has 15 million


class Record(NamedTuple):
    """The place of a TFRecord in a file.

    At `offset` are 12 bytes, its length with a checksum, then `size` bytes of contents and their checksum.
    """

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
    """The place of an image that is a file of its own. label: its class."""

    path: str
    label: int

    def __str__(self) -> str:
        return self.path

    def load(self) -> tuple[bytes, int]:
        if os.path.getsize(self.path) > MAX_SIZE:
            raise Fault(f"has more than the {MAX_SIZE} bytes of the largest image")
        return pathlib.Path(self.path).read_bytes(), self.label


def parse_example(message: bytes) -> tuple[bytes, int]:
    """Return the encoded image and its class, from 0 to 999, in a serialised tf.train.Example."""
    features = {}
    for collection in read_nested(message, 1):
        for entry in read_nested(collection, 1):  # an entry of a map: its key is field 1, its value field 2
            pair = dict(read_fields(entry))
            features[pair.get(1)] = pair.get(2)
    encoded = get_only_value(features.get(b"image/encoded"), kind=1)
    label = get_only_value(features.get(b"image/class/label"), kind=3)
    if isinstance(label, bytes):  # packed
        label = read_varint(label, 0)[0]
    if not isinstance(encoded, bytes) or label is None:
        raise Fault("holds no image/encoded and image/class/label")
    if not 1 <= label <= CLASSES:
        raise Fault(f"has the class label {label}, not one from 1 to {CLASSES}")
    return encoded, label - 1


def get_only_value(feature: int | bytes | None, kind: int) -> int | bytes | None:
    """Return the first value of a tf.train.Feature, None if it has none. kind: 1 for bytes, 3 for whole numbers."""
    lists = read_nested(feature, kind) if isinstance(feature, bytes) else []
    values = [value for number, value in read_fields(lists[0]) if number == 1] if lists else []
    return values[0] if values else None


class TFRecords(Sequence[Place]):
    """The records of all TFRecord files of a split, indexed once by their length fields, 24 bytes of memory each.

    prefix: the beginning of the file names, "train" or "validation". An optional index.json lists the files and their
    numbers of records. Raises UsageError if a file is missing, or if a length is damaged: the records after it could
    not be found.
    """

    class_names = NUMBERS

    def __init__(self, folder: pathlib.Path, prefix: str):
        counts = read_counts(folder, prefix)
        self.paths = [str(folder / name) for name in counts]
        progress = Progress(len(self.paths), what="index of file", quiet=len(self.paths) < 100)
        parts = []
        with concurrent.futures.ThreadPoolExecutor(16) as pool:  # the threads wait for the disk
            for number, (name, records) in enumerate(zip(counts, pool.map(index_records, self.paths), strict=True)):
                if counts[name] not in (None, len(records)):
                    raise UsageError(
                        f"{folder / name} holds {len(records)} records and index.json says {counts[name]}; "
                        "replace the file or correct index.json"
                    )
                parts.append(np.insert(records, 0, number, axis=1))
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
    """Return the file names of a split, with their numbers of records from index.json, or None without that file."""
    pattern = rf"{prefix}-\d+-of-\d+"
    index = folder / "index.json"
    counts: dict[str, int | None]
    if index.exists():
        with image_files.report_unreadable_file(index):
            record_counts = json.loads(index.read_text(encoding="utf-8"))["record_counts"]
            counts = {name: int(record_counts[name]) for name in sorted(record_counts) if re.fullmatch(pattern, name)}
        source = index
    else:
        counts = {path.name: None for path in sorted(folder.iterdir()) if re.fullmatch(pattern, path.name)}
        source = folder
    if not counts:
        raise UsageError(f"{source} knows no files {prefix}-NNNNN-of-NNNNN; set `imagenet_datadir` to where they are")
    return counts


def index_records(path: str) -> np.ndarray:
    """Return the offset and size of each record in a TFRecord file, int64 (n, 2).

    Verifies the checksums of the length fields. Raises UsageError if the file is missing or cut short, or if a length
    is damaged.
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
        raise UsageError(f"{path} at byte {offset} {reason}; the records after it are lost; replace the file") from None
    return np.array(places, np.int64).reshape(-1, 2)


class ClassFolders(Sequence[Place]):
    """The sorted image files in class folders; the classes are the folders in the order of their names.

    Only the names of the files are kept, as bytes, because a list of a million paths would take hundreds of megabytes.
    Raises UsageError if a class folder holds no images, or if there are no class folders.
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
    """Return the sorted paths of the image files in a folder and its subfolders, relative to the folder."""
    paths: list[bytes] = []
    for parent, _, files in os.walk(folder):
        images = (
            name for name in files if name.lower().endswith(image_files.IMAGE_SUFFIXES) and not name.startswith(".")
        )
        inner = os.path.relpath(parent, folder)
        paths += (os.fsencode(os.path.join(inner, name)) for name in images)
    return sorted(paths)


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


def find_images(folder: pathlib.Path, split: str) -> TFRecords | ClassFolders:
    """Return the places of the images of a split.

    folder: holds TFRecords (train-NNNNN-of-NNNNN, validation-NNNNN-of-NNNNN, index.json), or class folders of image
    files, either in the subfolders `train` and `val` or, for the training split alone, directly. split: "train", or
    "test" for the validation images. Raises UsageError if the folder holds none of these.
    """
    if not folder.is_dir():
        raise UsageError(f"`imagenet_datadir`={folder}: no such folder")
    if (folder / "index.json").exists() or next(folder.glob("*-of-*"), None):
        return TFRecords(folder, "train" if split == "train" else "validation")
    if (folder / "train").is_dir():
        names = ("train",) if split == "train" else ("val", "validation", "test")
        parent = next((folder / name for name in names if (folder / name).is_dir()), None)
    else:
        parent = folder if split == "train" else None
    if parent is None:
        raise UsageError(f"`imagenet_datadir`={folder} has no validation images; put class folders below {folder}/val")
    return ClassFolders(parent)
