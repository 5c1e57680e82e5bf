"""Readers of the files of data sets.

Each `read_<data set>` returns images uint8 (N, C, H, W), their classes int64 (N,) or None, and the classes' names. It
raises FileNotFoundError if a file is missing, and UsageError if a file is damaged or of another format. No reader
executes code from a file.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ebm.readers.arrays import read_matlab
from ebm.readers.bounded import inflate, read_file, report_unreadable_file
from ebm.readers.pickles import read_pickle, to_texts, to_whole_numbers
from ebm.support.progress import SHORT, Progress

Contents = tuple[Tensor, Tensor | None, tuple[str, ...]]

DIGITS = tuple("0123456789")
KANA = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
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
    return *read_idx_pair(find_idx_folder(root, ("MNIST", "mnist"), split), split), DIGITS


def read_fashion_mnist(root: pathlib.Path, split: str, workers: int) -> Contents:
    """Read a split of Fashion-MNIST."""
    folders = ("FashionMNIST", "fashion_mnist", "fashion-mnist", "fashionmnist", "Fashion-MNIST")
    return *read_idx_pair(find_idx_folder(root, folders, split), split), CLOTHES


def read_kmnist(root: pathlib.Path, split: str, workers: int) -> Contents:
    """Read a split of Kuzushiji-MNIST."""
    return *read_idx_pair(find_idx_folder(root, ("KMNIST", "kmnist"), split), split), KANA


def read_cifar10(root: pathlib.Path, split: str, workers: int) -> Contents:
    """Read a split of CIFAR-10."""
    files = [f"data_batch_{k}" for k in range(1, 6)] if split == "train" else ["test_batch"]
    return read_cifar(root / "cifar-10-batches-py", files, "batches.meta", "labels", "label_names")


def read_cifar100(root: pathlib.Path, split: str, workers: int) -> Contents:
    """Read a split of CIFAR-100."""
    return read_cifar(root / "cifar-100-python", [split], "meta", "fine_labels", "fine_label_names")


# ---- MNIST, Fashion-MNIST and Kuzushiji-MNIST: IDX files ----


def find_idx_folder(root: pathlib.Path, names: Sequence[str], split: str) -> pathlib.Path:
    """Return the folder of the IDX files of a split: <name>/raw, <name>, or `root` itself, with a note.

    If none holds them, it is that of the first name, where torchvision puts them.
    """
    folders = [root / name / inner for name in names for inner in ("raw", ".")]
    if found := next((folder for folder in folders if find_idx(folder, split, "images").exists()), None):
        return found
    if not find_idx(root, split, "images").exists():
        return folders[0]
    print(f"note: the files in {root} itself are taken for {names[0]}, as there is no {folders[0]}")
    return root


def find_idx(folder: pathlib.Path, split: str, content: str) -> pathlib.Path:
    """Return the path of an IDX file, packed or not, under one of the names that it goes by; else under the first.

    content: "images" or "labels".
    """
    prefix, axes = "train" if split == "train" else "t10k", 3 if content == "images" else 1
    names = [f"{prefix}-{content}{mark}idx{axes}-ubyte" for mark in "-."]
    inner = [f"{name}/{name}" for name in names]  # as Kaggle packs them
    paths = [folder / f"{name}{end}" for name in (*names, *inner) for end in ("", ".gz")]
    return next((path for path in paths if path.is_file()), paths[0])


def read_idx_pair(folder: pathlib.Path, split: str) -> tuple[Tensor, Tensor]:
    """Read the images and classes of MNIST, Fashion-MNIST or Kuzushiji-MNIST from a folder of IDX files."""
    path = find_idx(folder, split, "labels")
    images, classes = read_idx(find_idx(folder, split, "images")), read_idx(path)
    with report_unreadable_file(path):
        if images.shape != (len(classes), 28, 28) or not len(classes):
            raise ValueError(f"labels {tuple(classes.shape)} do not fit images {tuple(images.shape)}")
        if classes.max() > 9:
            raise ValueError(f"classes up to {classes.max()}")
    return images[:, None], classes.long()


def read_idx(path: pathlib.Path) -> Tensor:
    """Read an IDX file of bytes, packed if its name ends in .gz.

    The format is: two zeros, the type 8, the number of axes, their lengths, the bytes.
    """
    path.stat()  # raises FileNotFoundError
    with report_unreadable_file(path):
        contents = inflate(read_file(path)) if path.suffix == ".gz" else read_file(path)
        if contents[:3] != b"\0\0\x08":
            raise ValueError("not an IDX file of bytes")
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
    with Progress(len(files), what="reading file", patience=SHORT) as progress:
        for file in files:
            with report_unreadable_file(folder / file):
                rows, labels = read_pickle(folder / file, ["data", label_key])
                numbers = to_whole_numbers(labels)
                if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or not len(numbers):
                    raise ValueError("its images are not bytes")
                if rows.shape not in [(len(numbers), 3 * 32 * 32), (len(numbers), 3, 32, 32)]:
                    raise ValueError(
                        f"data is {rows.shape}, not {(len(numbers), 3 * 32 * 32)}, the colours one after another"
                    )
                if not 0 <= numbers.min() <= numbers.max() < len(class_names):
                    raise ValueError("a class without a name")
                images.append(torch.from_numpy(rows).view(len(numbers), 3, 32, 32))
                classes.append(torch.from_numpy(numbers))
            progress.advance()
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
