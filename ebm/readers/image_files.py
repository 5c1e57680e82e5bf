"""Readers of the files of data sets.

Each `read_<data set>` returns images uint8 (N, C, H, W), their classes int64 (N,) or None, and the classes' names. It
raises FileNotFoundError if a file is missing, and UsageError if a file is damaged or of another format. No reader
executes code from a file.
"""

from __future__ import annotations

import concurrent.futures
import pathlib
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from ebm.readers.arrays import read_matlab
from ebm.readers.bounded import inflate, read_file, report_unreadable_file
from ebm.readers.pickles import read_pickle, to_texts, to_whole_numbers
from ebm.support.errors import UsageError
from ebm.support.progress import Progress

Contents = tuple[Tensor, Tensor | None, tuple[str, ...]]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # formats that Pillow may read; none starts a program
DIGITS = tuple("0123456789")
CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def read_digits(split: str) -> Contents:
    """Read scikit-learn's 8x8 digits, enlarged to 28x28 pixels.

    The test split is every tenth image in the order of classes.
    """
    from sklearn.datasets import load_digits

    pixels, classes = map(torch.from_numpy, load_digits(return_X_y=True))
    small = pixels.float().view(-1, 1, 8, 8) * (255 / 16)
    images = F.interpolate(small, size=28, mode="bilinear").round().to(torch.uint8)
    is_test = torch.zeros(len(images), dtype=torch.bool)
    is_test[classes.argsort(stable=True)[9::10]] = True
    mask = is_test if split == "test" else ~is_test
    return images[mask], classes.long()[mask], DIGITS


# ---- torchvision's data sets, in the folders below `root` where torchvision puts them ----


def read_mnist(root: pathlib.Path, split: str, workers: int) -> Contents:
    """Read a split of MNIST."""
    return *read_idx_pair(root / "MNIST/raw", split), DIGITS


def read_fashion_mnist(root: pathlib.Path, split: str, workers: int) -> Contents:
    """Read a split of Fashion-MNIST."""
    return *read_idx_pair(root / "FashionMNIST/raw", split), CLOTHES


def read_cifar10(root: pathlib.Path, split: str, workers: int) -> Contents:
    """Read a split of CIFAR-10."""
    files = [f"data_batch_{k}" for k in range(1, 6)] if split == "train" else ["test_batch"]
    return read_cifar(root / "cifar-10-batches-py", files, "batches.meta", "labels", "label_names")


def read_cifar100(root: pathlib.Path, split: str, workers: int) -> Contents:
    """Read a split of CIFAR-100."""
    return read_cifar(root / "cifar-100-python", [split], "meta", "fine_labels", "fine_label_names")


# ---- MNIST and Fashion-MNIST: IDX files ----


def read_idx_pair(folder: pathlib.Path, split: str) -> tuple[Tensor, Tensor]:
    """Read the images and classes of MNIST or Fashion-MNIST from a folder of IDX files."""
    prefix = "train" if split == "train" else "t10k"
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte")
    classes = read_idx(folder / f"{prefix}-labels-idx1-ubyte")
    with report_unreadable_file(folder / f"{prefix}-labels-idx1-ubyte"):
        if images.shape != (len(classes), 28, 28):
            raise ValueError(f"labels {tuple(classes.shape)} do not fit images {tuple(images.shape)}")
        if classes.max() > 9:
            raise ValueError(f"classes up to {classes.max()}")
    return images[:, None], classes.long()


def read_idx(path: pathlib.Path) -> Tensor:
    """Read an IDX file of bytes, or its .gz file.

    The format is: two zeros, the type 8, the number of axes, their lengths, the bytes.
    """
    packed = path.with_name(path.name + ".gz")
    path = packed if packed.exists() and not path.exists() else path
    path.stat()  # raises FileNotFoundError
    with report_unreadable_file(path):
        contents = inflate(read_file(path)) if path == packed else read_file(path)
        if contents[:3] != b"\0\0\x08":
            raise ValueError("no IDX file of bytes")
        axes = contents[3]
        shape = np.frombuffer(contents, ">u4", axes, offset=4).tolist()
        return torch.from_numpy(np.frombuffer(contents, np.uint8, offset=4 + 4 * axes).reshape(shape).copy())


# ---- CIFAR: pickles; SVHN: MATLAB files ----


def read_cifar(folder: pathlib.Path, files: list[str], meta: str, label_key: str, names_key: str) -> Contents:
    """Read the files of CIFAR-10 or CIFAR-100: pickled dictionaries with rows of 3x32x32 bytes and with classes."""
    for file in (meta, *files):
        (folder / file).stat()  # raises FileNotFoundError
    with report_unreadable_file(folder / meta):
        class_names = to_texts(*read_pickle(folder / meta, [names_key]))
    images, classes = [], []
    for file in files:
        with report_unreadable_file(folder / file):
            rows, labels = read_pickle(folder / file, ["data", label_key])
            numbers = to_whole_numbers(labels)
            if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or not len(numbers):
                raise ValueError("no images of bytes")
            if not 0 <= numbers.min() <= numbers.max() < len(class_names):
                raise ValueError("a class without a name")
            images.append(torch.from_numpy(rows).view(len(numbers), 3, 32, 32))
            classes.append(torch.from_numpy(numbers))
    return torch.cat(images), torch.cat(classes), class_names


def read_svhn(root: pathlib.Path, split: str, workers: int) -> Contents:
    """Read a split of SVHN: a MATLAB file in which X is (32, 32, 3, N) and the digit 0 has the label 10."""
    path = root / f"{split}_32x32.mat"
    path.stat()
    with report_unreadable_file(path):
        images, labels = read_matlab(path, ["X", "y"])
        if images.shape != (32, 32, 3, labels.size) or images.dtype != np.uint8 or not labels.size:
            raise ValueError(f"images are {images.dtype} {images.shape}, not uint8 {(32, 32, 3, labels.size)}")
        if not np.isin(labels, range(11)).all():
            raise ValueError("labels are not whole numbers from 0 to 10")
        classes = torch.from_numpy(labels.astype(np.int64).flatten()) % 10
        return torch.from_numpy(images.transpose(3, 2, 0, 1).copy()), classes, DIGITS


# ---- folders of images ----

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def read_folder(
    folder: pathlib.Path, *, split: str, image_size: int | None, channels: int | None, workers: int
) -> Contents:
    """Read a folder of images; if the images are in subfolders, each subfolder is a class.

    Subfolders `train` and `test`, if both exist, are the splits; else all images are in both splits. image_size: resize
    the shorter side to this number of pixels and cut out the middle; None: all images must have one size. channels: 1
    (grey) or 3 (colour); None: those of the first image. workers: number of threads. Raises UsageError if the folder or
    an image does not fit this.
    """
    if channels not in (None, 1, 3):
        raise UsageError(f"`channels`={channels} must be 1 (grey) or 3 (colour)")
    if not folder.is_dir():
        raise UsageError(f"`data_path`={folder}: no such folder")
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        folder = folder / split
    paths, classes, class_names = list_folder(folder)
    with report_unreadable_file(paths[0]), Image.open(paths[0], formats=FORMATS) as first:
        size, grey = first.size, first.mode in ("1", "L", "LA") if channels is None else channels == 1

    def fit(image: Image.Image) -> Image.Image:
        if image_size:
            return ImageOps.fit(image, (image_size, image_size))
        if image.size != size:
            raise UsageError(f"{folder} holds images of {size} and of {image.size} pixels; choose one `image_size`")
        return image

    return decode_files(paths, "L" if grey else "RGB", fit, workers), classes, class_names


def list_folder(folder: pathlib.Path) -> tuple[list[pathlib.Path], Tensor | None, tuple[str, ...]]:
    """Return the sorted paths of the images in a folder, their classes (N,) and the names of the classes.

    The classes are None if the images are not in subfolders.
    """

    def list_paths(place: pathlib.Path, pattern: str) -> list[pathlib.Path]:
        paths = (path for path in place.glob(pattern) if path.suffix.lower() in IMAGE_SUFFIXES)
        return sorted(path for path in paths if not path.name.startswith("."))

    direct_paths = list_paths(folder, "*")
    subfolders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    by_class = {path.name: list_paths(path, "**/*") for path in subfolders}
    empty = [name for name, paths in by_class.items() if not paths]
    if not direct_paths and len(empty) == len(by_class):
        raise UsageError(f"{folder} holds no images ({' '.join(IMAGE_SUFFIXES)})")
    if direct_paths and len(empty) < len(by_class):
        raise UsageError(
            f"{folder} holds images beside subfolders of images; put all images into class folders, or none"
        )
    if direct_paths:
        return direct_paths, None, ()
    if empty:
        raise UsageError(f"{folder / empty[0]} holds no images; every subfolder is a class, so fill or remove it")
    counts = torch.tensor([len(paths) for paths in by_class.values()])
    classes = torch.arange(len(by_class)).repeat_interleave(counts)
    return [path for paths in by_class.values() for path in paths], classes, tuple(by_class)


def decode_files(
    paths: list[pathlib.Path], mode: str, change: Callable[[Image.Image], Image.Image], workers: int
) -> Tensor:
    """Decode image files in `workers` threads; return images uint8 (N, C, H, W).

    mode: "L" (grey) or "RGB". change: converts a decoded image to the common size.
    """

    def pixels(path: pathlib.Path) -> np.ndarray:
        with report_unreadable_file(path), Image.open(path, formats=FORMATS) as image:
            return np.asarray(change(image.convert(mode)))

    def read(part: list[pathlib.Path]) -> Tensor:
        images = torch.from_numpy(np.stack([pixels(path) for path in part]))
        return images.view(*images.shape[:3], -1).permute(0, 3, 1, 2)  # (n, C, H, W)

    parts = [paths[i : i + 100] for i in range(0, len(paths), 100)]
    progress = Progress(len(paths), what="reading image", quiet=len(paths) < 10_000)
    images = []
    with concurrent.futures.ThreadPoolExecutor(max(1, workers)) as pool:
        for part in pool.map(read, parts):
            images.append(part)
            progress.update(progress.done + len(part))
    progress.close()
    return torch.cat(images).contiguous()


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
    paths, _, _ = list_folder(folder)
    images = decode_files(paths, "RGB", lambda image: image.resize((32, 32), Image.Resampling.BILINEAR), workers)
    return images, None, ()


def read_textures(root: pathlib.Path, split: str, workers: int) -> Contents:
    """Read the upper left 32x32 pixels of all Describable Textures, as the reference does; both splits are the same."""
    folder = root / "dtd/dtd/images"
    if not folder.is_dir():
        raise FileNotFoundError(2, "no such folder", str(folder))
    paths, classes, class_names = list_folder(folder)
    return decode_files(paths, "RGB", lambda image: image.crop((0, 0, 32, 32)), workers), classes, class_names
