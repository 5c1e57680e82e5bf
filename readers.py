"""Readers of the files that data sets come in.

Each `read_<format>` returns images uint8 (N, C, H, W), their classes int64 (N,) or None, and the names of the classes.
A missing file is a FileNotFoundError, a damaged or foreign one a UsageError. No file can run code.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import gzip
import io
import pathlib
import pickle
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from errors import UsageError
from utils import Progress

if TYPE_CHECKING:
    from PIL import Image

Contents = tuple[Tensor, Tensor | None, tuple[str, ...]]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # what Pillow may read: no format that runs a program
DIGITS = tuple("0123456789")
CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


@contextlib.contextmanager
def reading(path: pathlib.Path) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into one line that names the file."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # readers of foreign bytes fail in many ways
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{path} is damaged or of another format ({reason}); replace or delete it") from error


def read_digits(split: str) -> Contents:
    """Read scikit-learn's 8x8 digits, enlarged to 28x28; every tenth image of those sorted by class is for the test."""
    from sklearn.datasets import load_digits

    pixels, classes = map(torch.from_numpy, load_digits(return_X_y=True))
    small = pixels.float().view(-1, 1, 8, 8) * (255 / 16)
    images = F.interpolate(small, size=28, mode="bilinear").round().to(torch.uint8)
    test = torch.zeros(len(images), dtype=torch.bool)
    test[classes.argsort(stable=True)[9::10]] = True
    chosen = test if split == "test" else ~test
    return images[chosen], classes.long()[chosen], DIGITS


# ---- torchvision's data sets, in the layout it gives their files below `root` ----


def read_mnist(root: pathlib.Path, split: str, workers: int) -> Contents:
    """Read MNIST."""
    return *read_idx_pair(root / "MNIST/raw", split), DIGITS


def read_fashion_mnist(root: pathlib.Path, split: str, workers: int) -> Contents:
    """Read Fashion-MNIST."""
    return *read_idx_pair(root / "FashionMNIST/raw", split), CLOTHES


def read_cifar10(root: pathlib.Path, split: str, workers: int) -> Contents:
    """Read CIFAR-10."""
    files = [f"data_batch_{k}" for k in range(1, 6)] if split == "train" else ["test_batch"]
    return read_cifar(root / "cifar-10-batches-py", files, "batches.meta", "labels", "label_names")


def read_cifar100(root: pathlib.Path, split: str, workers: int) -> Contents:
    """Read CIFAR-100."""
    return read_cifar(root / "cifar-100-python", [split], "meta", "fine_labels", "fine_label_names")


# ---- MNIST and its like: IDX files ----


def read_idx_pair(folder: pathlib.Path, split: str) -> tuple[Tensor, Tensor]:
    """Read the images and classes of MNIST or Fashion-MNIST from a folder of IDX files."""
    prefix = "train" if split == "train" else "t10k"
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte")
    classes = read_idx(folder / f"{prefix}-labels-idx1-ubyte")
    with reading(folder / f"{prefix}-labels-idx1-ubyte"):
        if images.shape != (len(classes), 28, 28):
            raise ValueError(f"labels {tuple(classes.shape)} do not fit images {tuple(images.shape)}")
        if classes.max() > 9:
            raise ValueError(f"classes up to {classes.max()}")
    return images[:, None], classes.long()


def read_idx(path: pathlib.Path) -> Tensor:
    """Read an IDX file of bytes, or the .gz file beside it: two zeros, type 8, the number of axes, their lengths."""
    packed = path.with_name(path.name + ".gz")
    path = packed if packed.exists() and not path.exists() else path
    path.stat()  # a missing file is not a damaged one
    with reading(path):
        contents = path.read_bytes()
        if path == packed:
            contents = gzip.decompress(contents)
        if contents[:3] != b"\0\0\x08":
            raise ValueError("no IDX file of bytes")
        axes = contents[3]
        shape = np.frombuffer(contents, ">u4", axes, offset=4).tolist()
        return torch.from_numpy(np.frombuffer(contents, np.uint8, offset=4 + 4 * axes).reshape(shape).copy())


# ---- CIFAR: pickles; SVHN: MATLAB files ----


def read_cifar(folder: pathlib.Path, files: list[str], meta: str, label_key: str, names_key: str) -> Contents:
    """Read the batches of CIFAR-10 or CIFAR-100: pickled dictionaries of rows with 3x32x32 bytes and of classes."""
    class_names = tuple(read_pickle(folder / meta, [names_key])[0])
    images, classes = [], []
    for file in files:
        rows, labels = read_pickle(folder / file, ["data", label_key])
        with reading(folder / file):
            images.append(torch.from_numpy(rows).view(len(labels), 3, 32, 32))
            classes.append(torch.tensor(labels, dtype=torch.int64))
            if images[-1].dtype != torch.uint8 or not 0 <= min(labels) <= max(labels) < len(class_names):
                raise ValueError("no bytes, or a class without a name")
    return torch.cat(images), torch.cat(classes), class_names


def read_pickle(path: pathlib.Path, keys: list[str]) -> list[Any]:
    """Read these entries of a pickled dictionary of arrays and plain values, as Python 2 or 3 wrote it."""
    path.stat()
    with reading(path):
        contents = PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        values = [contents[key] for key in keys]
        return [value.array if isinstance(value, PickledArray) else value for value in values]


class PlainUnpickler(pickle._Unpickler):  # in Python: the C one reserves whatever memory a file claims to need
    """Reads plain values and arrays of numbers; anything else is refused, since unpickling it could run code."""

    def find_class(self, module: str, name: str) -> type:
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray"):
            if name in ("ndarray", "_reconstruct"):
                return PickledArray
            if name == "dtype":
                return PickledType
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a data file")


class PickledType:
    """Stands in for numpy.dtype: it only keeps the name. numpy's own can be set to any state, and crash."""

    def __init__(self, name: str, *_: object):
        self.name = name

    def __setstate__(self, state: object) -> None:
        """Leave out the byte order, which is the machine's, and all else."""


class PickledArray:
    """Stands in for numpy.ndarray: it only takes a shape, a type of numbers and bytes."""

    def __init__(self, *_: object):
        self.array = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran_order, contents = state
        contents = contents.encode("latin1") if isinstance(contents, str) else contents  # a Python 2 string
        self.array = np.frombuffer(contents, str(kind.name)).reshape(shape, order="F" if fortran_order else "C")
        self.array = self.array.copy()  # writable


def read_svhn(root: pathlib.Path, split: str, workers: int) -> Contents:
    """Read SVHN: a MATLAB file where X is (32, 32, 3, N) and the digit 0 is labelled 10."""
    from scipy.io import loadmat

    path = root / f"{split}_32x32.mat"
    path.stat()
    with reading(path):
        contents = loadmat(str(path))
        images = torch.from_numpy(contents["X"].transpose(3, 2, 0, 1).copy())
        classes = torch.from_numpy(contents["y"].astype(np.int64)).flatten() % 10
        if images.shape != (len(classes), 3, 32, 32) or images.dtype != torch.uint8:
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}")
    return images, classes, DIGITS


# ---- folders of images ----

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def read_folder(
    folder: pathlib.Path, *, split: str, image_size: int | None, channels: int | None, workers: int
) -> Contents:
    """Read a folder of images; class subfolders give labels. Folders `train` and `test`, if both are there, are splits.

    Without them all images are in both splits. image_size: the shorter side is resized to it and the middle cut out;
    without it all images must have one size. channels: 1 (grey) or 3 (colour), default those of the first image.
    """
    from PIL import Image, ImageOps

    if channels not in (None, 1, 3):
        raise UsageError(f"`channels`={channels} must be 1 (grey) or 3 (colour)")
    if not folder.is_dir():
        raise UsageError(f"`data_path`={folder}: no such folder")
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        folder = folder / split
    paths, classes, class_names = list_folder(folder)
    with reading(paths[0]), Image.open(paths[0], formats=FORMATS) as first:
        size, grey = first.size, first.mode in ("1", "L", "LA") if channels is None else channels == 1

    def fit(image: Image.Image) -> Image.Image:
        if image_size:
            return ImageOps.fit(image, (image_size, image_size))
        if image.size != size:
            raise UsageError(f"{folder} holds images of {size} and of {image.size} pixels; choose one `image_size`")
        return image

    return decode(paths, "L" if grey else "RGB", fit, workers), classes, class_names


def list_folder(folder: pathlib.Path) -> tuple[list[pathlib.Path], Tensor | None, tuple[str, ...]]:
    """Return the images of a folder, sorted, their classes (N,) and the classes' names if they lie in subfolders."""

    def images(where: pathlib.Path, pattern: str) -> list[pathlib.Path]:
        found = (path for path in where.glob(pattern) if path.suffix.lower() in IMAGES)
        return sorted(path for path in found if not path.name.startswith("."))

    loose = images(folder, "*")
    subfolders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    by_class = {path.name: images(path, "**/*") for path in subfolders}
    empty = [name for name, paths in by_class.items() if not paths]
    if not loose and len(empty) == len(by_class):
        raise UsageError(f"{folder} holds no images ({' '.join(IMAGES)})")
    if loose and len(empty) < len(by_class):
        raise UsageError(f"{folder} holds images beside subfolders of images; put all into class folders, or none")
    if loose:
        return loose, None, ()
    if empty:
        raise UsageError(f"{folder / empty[0]} holds no images; fill or remove it, every subfolder is a class")
    counts = torch.tensor([len(paths) for paths in by_class.values()])
    classes = torch.arange(len(by_class)).repeat_interleave(counts)
    return [path for paths in by_class.values() for path in paths], classes, tuple(by_class)


def decode(paths: list[pathlib.Path], mode: str, change: Callable[[Image.Image], Image.Image], workers: int) -> Tensor:
    """Decode image files in `workers` threads, as grey ("L") or colour ("RGB"), each changed to one common size."""
    from PIL import Image

    def pixels(path: pathlib.Path) -> np.ndarray:
        with reading(path), Image.open(path, formats=FORMATS) as image:
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


def read_textures(root: pathlib.Path, split: str, workers: int) -> Contents:
    """Read the upper left 32x32 pixels of all the Describable Textures, for either split, as the reference did."""
    folder = root / "dtd/dtd/images"
    if not folder.is_dir():
        raise FileNotFoundError(2, "no such folder", str(folder))
    paths, classes, class_names = list_folder(folder)
    return decode(paths, "RGB", lambda image: image.crop((0, 0, 32, 32)), workers), classes, class_names
