"""Folders of image files: their splits, their classes, and their images, decoded.

    place = find_split(folder, "train")  # train/ if the folder is divided
    found = list_folder(place)  # paths, classes and names of the classes
    images, classes, names = read_folder(folder, split="train", image_size=None, channels=None, workers=4)

One rule holds for every reader: hidden files and folders are left out at any depth, links are followed, each folder of
a class is entered once, classes and images are sorted by their names.
"""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ebm.readers.bounded import make_printable, open_file, report_unreadable_file
from ebm.readers.decoding import convert_image, is_grey, open_image
from ebm.readers.image_files import Contents
from ebm.support.errors import UsageError
from ebm.support.hardware import find_free_memory
from ebm.support.progress import SHORT, Progress, show_waiting

# fmt: off
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff",
                  ".ppm", ".pgm", ".pbm", ".pnm")
# fmt: on
CLUTTER = ("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "thumbs.db", "desktop.ini")
TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("val", "valid", "validation", "dev", "eval")
TEST_NAMES = ("test", "testing", *VALIDATION_NAMES)  # the first that exists
SPLIT_ENDING = re.compile("[ _-]?(set|images|data)$")  # after such a name, as in training_set
MOST_PIXELS = 1 << 20  # of an image that a network is to be trained on


# ---- which files ----


class FoundImages(NamedTuple):
    """The image files below a folder, in the order of their classes and names.

    paths: bytes relative to the folder, because a list of a million texts would take hundreds of megabytes. classes:
    None, and no class_names, if the images are not in subfolders.
    """

    folder: pathlib.Path
    paths: np.ndarray  # (N,) bytes
    classes: np.ndarray | None  # (N,) int64
    class_names: tuple[str, ...]

    def get_path(self, i: int) -> str:
        """Return the path of the image with this number."""
        return os.path.join(self.folder, os.fsdecode(self.paths[i]))


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is one that programs put there for themselves, by its name."""
    return name.startswith(".") or name.casefold() in CLUTTER


def scan_folder(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """Return the entries of a folder that are not hidden, by name; raise UsageError if it cannot be read."""
    try:
        return sorted((e for e in os.scandir(folder) if not is_hidden(e.name)), key=lambda e: e.name)
    except OSError as error:
        raise UsageError(f"{os.fspath(folder)} cannot be read: {error.strerror}") from None


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder, or a link to one.

    Raises UsageError for a link that leads nowhere, which could be a folder of images on a disk that is away. If it has
    the name of an image, the error comes when that is read.
    """
    if entry.is_symlink() and not os.path.exists(entry):
        if not entry.name.lower().endswith(IMAGE_SUFFIXES):
            raise UsageError(f"{make_printable(entry.path)} is a broken link; repair or remove it")
        return False
    return entry.is_dir()


def walk_files(folder: str, inner: str, entered: set[tuple[int, int]]) -> Iterator[str]:
    """Yield the paths of the files below folder/inner, relative to `folder`; links are followed.

    entered: device and number of folders that are not to be entered, again; it grows.
    """
    waiting = [inner]  # the next one last
    while waiting:
        inner = waiting.pop()
        status = os.stat(os.path.join(folder, inner))
        if (status.st_dev, status.st_ino) in entered:
            continue
        entered.add((status.st_dev, status.st_ino))
        entries = scan_folder(os.path.join(folder, inner))
        waiting += [os.path.join(inner, entry.name) for entry in reversed(entries) if is_folder(entry)]
        yield from (os.path.join(inner, entry.name) for entry in entries if not is_folder(entry))


def list_folder(folder: pathlib.Path) -> FoundImages:
    """Return the images below a folder; if they are in subfolders, each of these is a class.

    A note counts the files beside images whose names are those of no images. Raises UsageError if there are no images,
    if a class has none, or if images lie beside classes.
    """
    root, top = os.fspath(folder), os.stat(folder)
    by_class: dict[str, list[str]] = {}
    others: list[str] = []

    def keep_images(paths: Iterator[str]) -> list[str]:
        images: list[str] = []
        for path in paths:
            (images if path.lower().endswith(IMAGE_SUFFIXES) else others).append(path)
        return images

    with show_waiting(f"listing the images below {folder}"):
        entries = scan_folder(folder)
        direct = keep_images(entry.name for entry in entries if not is_folder(entry))
        if not direct:
            others.clear()  # lists and texts beside class folders
        for entry in filter(is_folder, entries):
            paths = keep_images(walk_files(root, entry.name, {(top.st_dev, top.st_ino)}))
            by_class[entry.name] = sorted(paths, key=lambda path: path.split("/"))
    check_classes(folder, direct, by_class)
    if others:
        print(
            f"note: {len(others):,} files below {folder} are skipped, such as {make_printable(others[0])}: "
            f"the names of images end in {' '.join(IMAGE_SUFFIXES)}"
        )
    paths = direct or [path for paths in by_class.values() for path in paths]
    if len(by_class) == 1 and all(path.count("/") > 1 for path in paths):
        name = make_printable(*by_class)
        print(f"note: all images are of the class {name}; if its subfolders are the classes, give {folder / name}")
    encoded = np.array([os.fsencode(path) for path in paths])
    if direct:
        return FoundImages(folder, encoded, None, ())
    classes = np.repeat(np.arange(len(by_class)), [len(paths) for paths in by_class.values()])
    return FoundImages(folder, encoded, classes, tuple(map(make_printable, by_class)))


def check_classes(folder: pathlib.Path, direct: Sequence[str], by_class: dict[str, list[str]]) -> None:
    """Raise UsageError unless images lie either directly in a folder, or in each of its subfolders."""
    empty = [name for name, paths in by_class.items() if not paths]
    if not direct and len(empty) == len(by_class):
        raise UsageError(f"{folder} holds no images ({' '.join(IMAGE_SUFFIXES)})")
    if direct and len(empty) < len(by_class):
        raise UsageError(
            f"{folder} holds images beside subfolders of images; put all images into class folders, or none"
        )
    if empty and not direct:
        raise UsageError(f"{folder / empty[0]} holds no images; every subfolder is a class, so fill or remove it")


def find_split(
    folder: pathlib.Path, split: str, test_names: Sequence[str] = TEST_NAMES, *, quiet: bool = False
) -> pathlib.Path | None:
    """Return the folder of a split, "train" or "test": the folder itself if it is not divided; None if it lacks it.

    A folder is divided if it has a subfolder of TRAIN_NAMES and one of `test_names`, or no subfolders but such. The
    first of `test_names` that exists holds the test images; capitals do not matter, nor does a word such as set after
    the name. A note, unless `quiet`, names the subfolders that are in no split.
    """
    paths = [folder / entry.name for entry in filter(is_folder, scan_folder(folder))]
    longest_first = sorted(paths, key=lambda path: len(path.name), reverse=True)  # so that train is before train_set
    subfolders = {SPLIT_ENDING.sub("", path.name.casefold()): path for path in longest_first}
    places = {
        "train": next((subfolders[name] for name in TRAIN_NAMES if name in subfolders), None),
        "test": next((subfolders[name] for name in test_names if name in subfolders), None),
    }
    is_alone = bool(subfolders) and set(subfolders) <= {*TRAIN_NAMES, *test_names}
    if not is_alone and None in places.values():
        return folder
    unused = [make_printable(path.name) for path in paths if path not in places.values()]
    if unused and not quiet:
        print(f"note: {folder} is divided into splits; left out: {', '.join(unused)}")
    return places[split]


# ---- their images ----


def read_folder(
    folder: pathlib.Path,
    *,
    split: str,
    image_size: tuple[int, int] | None,
    channels: int | None,
    workers: int,
) -> Contents:
    """Read a folder of images; if the images are in subfolders, each subfolder is a class.

    A folder may be divided into splits, see `find_split`; else all images are in both. image_size: resize images to
    cover this height and width, and cut out the middle; None: all images must have one size. channels: 1 (grey) or 3
    (colour); None: those of the first image. workers: number of threads. Raises UsageError if the folder or an image
    does not fit this.
    """
    if channels not in (None, 1, 3):
        raise UsageError(f"`channels`={channels} must be 1 (grey) or 3 (colour)")
    if not folder.is_dir():
        raise UsageError(f"`data_path`={folder}: no such folder")
    found = list_folder(find_folder_split(folder, split))
    size, has_grey = find_first_shape(found, image_size)
    is_grey_wanted = has_grey if channels is None else channels == 1

    def fit(image: Image.Image) -> Image.Image:
        if image_size:
            return ImageOps.fit(image, size[::-1])
        if image.size != size[::-1]:
            raise UsageError(
                f"{folder} holds images of {size[::-1]} and of {image.size} pixels; choose one `image_size`"
            )
        return image

    contents = decode_files(found, "L" if is_grey_wanted else "RGB", size, fit, workers)
    if has_grey and channels is None and contents.colours:
        print(
            f"note: {contents.colours:,} image(s) of {folder} are in colour and become grey like the first; "
            "channels=3 keeps the colours"
        )
    return contents.images, contents.classes, found.class_names


def find_folder_split(folder: pathlib.Path, split: str) -> pathlib.Path:
    """Return the folder of a split; without test images, with a note, that of the training images."""
    place = find_split(folder, split)
    if place is not None:
        return place
    if split == "train" or (place := find_split(folder, "train")) is None:
        raise UsageError(f"`data_path`={folder} is divided into splits, but has no folder train; add or rename it")
    print(f"note: {folder} has no folder of test images ({', '.join(TEST_NAMES)}); those of {place} are used")
    return place


def find_first_shape(found: FoundImages, image_size: tuple[int, int] | None) -> tuple[tuple[int, int], bool]:
    """Return the height and width that images get, by default those of the first one, and whether that one is grey.

    Raises UsageError if no network could be trained on images of this size.
    """
    path = found.get_path(0)
    with report_unreadable_file(path), open_file(path) as file, open_image(file) as image:
        height, width = image_size or (image.height, image.width)
        if height * width > MOST_PIXELS:
            raise UsageError(
                f"images of {width}x{height} pixels are more than a network is trained on ({MOST_PIXELS:,} pixels); "
                "choose a smaller `image_size`"
            )
        width, height = image_size[::-1] if image_size else convert_image(image, "L").size
        has_grey = is_grey(image)
    return (height, width), has_grey


class DecodedImages(NamedTuple):
    """Images uint8 (N, C, H, W), their classes (N,) or None, and how many of the files have colours."""

    images: Tensor
    classes: Tensor | None
    colours: int


def decode_files(
    found: FoundImages, mode: str, size: tuple[int, int], change: Callable[[Image.Image], Image.Image], workers: int
) -> DecodedImages:
    """Decode image files in `workers` threads; a note says, once for each kind, what was changed in their pixels.

    mode: "L" (grey) or "RGB". size: height and width to which `change` converts a decoded image. Raises UsageError if
    memory cannot hold the images.
    """
    count, channels = len(found.paths), len(mode) if mode == "RGB" else 1
    need, free = count * channels * size[0] * size[1], find_free_memory()
    if need > free:
        raise UsageError(
            f"{count:,} images of {size[1]}x{size[0]} pixels take {need / 1e9:.1f} GB, and {free / 1e9:.1f} are free; "
            "choose a smaller `image_size`"
        )
    pixels = np.empty((count, channels, *size), np.uint8)

    def read_part(part: range) -> tuple[list[tuple[str, set[str]]], int]:
        """Decode a part; return the remarks on its images, and how many of them have colours."""
        remarks, colours = [], 0
        for i in part:
            path, changes = found.get_path(i), set[str]()
            with report_unreadable_file(path), open_file(path) as file, open_image(file) as image:
                decoded = np.asarray(change(convert_image(image, mode, changes)))
                colours += not is_grey(image)
            pixels[i] = decoded.reshape(*size, channels).transpose(2, 0, 1)
            remarks.append((path, changes))
        return remarks, colours

    parts = [range(start, min(start + 100, count)) for start in range(0, count, 100)]
    said, colours = set[str](), 0
    with (
        Progress(count, what="reading image", patience=SHORT) as progress,
        concurrent.futures.ThreadPoolExecutor(max(1, workers)) as pool,
    ):
        for remarks, part_colours in pool.map(read_part, parts):
            for path, changes in remarks:
                note_remarks(path, changes, said)
            colours += part_colours
            progress.update(progress.done + len(remarks))
    classes = None if found.classes is None else torch.from_numpy(found.classes)
    return DecodedImages(torch.from_numpy(pixels), classes, colours)


def note_remarks(place: object, remarks: set[str], said: set[str]) -> None:
    """Print a note for each remark on an image that no earlier image gave cause for. said: all remarks; it grows."""
    for remark in sorted(remarks - said):
        print(f"note: {make_printable(str(place))} {remark}; the same holds for others like it", flush=True)
    said |= remarks


# ---- data sets that are folders of images ----


def read_celeba(root: pathlib.Path, split: str, workers: int) -> Contents:
    """Read all aligned faces of CelebA, squeezed to 32x32 pixels as the reference does; both splits are the same.

    Raises UsageError if there is no folder of them.
    """
    folders = root / "celeba/img_align_celeba", root / "img_align_celeba"
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        raise UsageError(
            f"`dataset`=celeba: {folders[0]} is missing; unpack CelebA's img_align_celeba.zip there, or set `datadir` "
            "to where it is"
        )

    def squeeze(image: Image.Image) -> Image.Image:
        return image.resize((32, 32), Image.Resampling.BILINEAR)

    return decode_files(list_folder(folder), "RGB", (32, 32), squeeze, workers).images, None, ()


def read_textures(root: pathlib.Path, split: str, workers: int) -> Contents:
    """Read the upper left 32x32 pixels of all Describable Textures, as the reference does; both splits are the same."""
    folder = root / "dtd/dtd/images"
    if not folder.is_dir():
        raise FileNotFoundError(2, "no such folder", str(folder))
    found = list_folder(folder)
    contents = decode_files(found, "RGB", (32, 32), lambda image: image.crop((0, 0, 32, 32)), workers)
    return contents.images, contents.classes, found.class_names
