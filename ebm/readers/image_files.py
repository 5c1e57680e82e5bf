"""Readers of the files of data sets.

Each `read_<data set>` returns images uint8 (N, C, H, W), their classes int64 (N,) or None, and the classes' names. It
raises FileNotFoundError if a file is missing, and UsageError if a file is damaged or of another format. No reader
executes code from a file.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import pathlib
import pickle
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ebm.support.errors import UsageError

Contents = tuple[Tensor, Tensor | None, tuple[str, ...]]

DIGITS = tuple("0123456789")
CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


@contextlib.contextmanager
def report_unreadable_file(path: pathlib.Path) -> Iterator[None]:
    """Turn any error while a file is read into a UsageError that names the file."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # readers of foreign bytes fail in many ways
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{path} is damaged or of another format ({reason}); replace or delete it") from error


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


def read_cifar10(root: pathlib.Path, split: str, workers: int) -> Contents:
    """Read a split of CIFAR-10."""
    files = [f"data_batch_{k}" for k in range(1, 6)] if split == "train" else ["test_batch"]
    return read_cifar(root / "cifar-10-batches-py", files, "batches.meta", "labels", "label_names")


def read_cifar100(root: pathlib.Path, split: str, workers: int) -> Contents:
    """Read a split of CIFAR-100."""
    return read_cifar(root / "cifar-100-python", [split], "meta", "fine_labels", "fine_label_names")


# ---- MNIST and Fashion-MNIST: IDX files ----


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
    """Read the images and classes of MNIST or Fashion-MNIST from a folder of IDX files."""
    path = find_idx(folder, split, "labels")
    images, classes = read_idx(find_idx(folder, split, "images")), read_idx(path)
    with report_unreadable_file(path):
        if images.shape != (len(classes), 28, 28):
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
        contents = path.read_bytes()
        if path.suffix == ".gz":
            contents = gzip.decompress(contents)
        if contents[:3] != b"\0\0\x08":
            raise ValueError("no IDX file of bytes")
        axes = contents[3]
        shape = np.frombuffer(contents, ">u4", axes, offset=4).tolist()
        return torch.from_numpy(np.frombuffer(contents, np.uint8, offset=4 + 4 * axes).reshape(shape).copy())


# ---- CIFAR: pickles; SVHN: MATLAB files ----


def read_cifar(folder: pathlib.Path, files: list[str], meta: str, label_key: str, names_key: str) -> Contents:
    """Read the files of CIFAR-10 or CIFAR-100: pickled dictionaries with rows of 3x32x32 bytes and with classes."""
    class_names = tuple(map(decode_text, read_pickle(folder / meta, [names_key])[0]))
    images, classes = [], []
    for file in files:
        rows, labels = read_pickle(folder / file, ["data", label_key])
        with report_unreadable_file(folder / file):
            images.append(torch.from_numpy(rows).view(len(labels), 3, 32, 32))
            classes.append(torch.tensor(labels, dtype=torch.int64))
            if images[-1].dtype != torch.uint8 or not 0 <= min(labels) <= max(labels) < len(class_names):
                raise ValueError("no bytes, or a class without a name")
    return torch.cat(images), torch.cat(classes), class_names


def read_pickle(path: pathlib.Path, keys: list[str]) -> list[Any]:
    """Read the entries `keys` of a pickled dictionary of arrays and plain values, written by Python 2 or 3."""
    path.stat()
    with report_unreadable_file(path):
        contents = PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        by_name = {decode_text(key): value for key, value in contents.items()}
        values = [by_name[key] for key in keys]
        return [value.copy() if isinstance(value, PickledArray) else value for value in values]


def decode_text(value: Any) -> Any:
    """Return a value of a pickle as text if it is bytes, as the texts are that Python 2 wrote."""
    return value.decode("latin1") if isinstance(value, bytes) else value


class PlainUnpickler(
    pickle._Unpickler
):  # the Python version, because the C version reserves any memory a file asks for
    """An unpickler of plain values and arrays of numbers, of any protocol.

    It calls nothing that a file names, because that could execute code: the names that arrays need have substitutes
    here, and all others are refused. No substitute copies bytes, so that a small file cannot fill the memory with them.
    """

    def __init__(self, file: IO[bytes]):
        super().__init__(file, encoding="bytes")  # so that the arrays of Python 2 are bytes, too
        self.encoded: dict[str, bytes] = {}

    def find_class(self, module: str, name: str) -> Any:
        substitutes = {
            "numpy.ndarray": PickledArray,
            "numpy.dtype": PickledType,
            "numpy.core.multiarray._reconstruct": PickledArray,
            "numpy.core.multiarray.scalar": self.read_number,
            "numpy.core.numeric._frombuffer": self.view_array,  # protocol 5
            "_codecs.encode": self.encode_text,  # protocols 0 to 2
            "__builtin__.bytes": self.encode_text,
        }
        full_name = f"{module}.{name}".replace("numpy._core.", "numpy.core.")  # of numpy 2 and of numpy 1
        if full_name not in substitutes:
            raise pickle.UnpicklingError(f"{full_name} has no place in a data file")
        return substitutes[full_name]

    def encode_text(self, text: str = "", encoding: str = "latin1") -> bytes:
        """Return the bytes for which Python 3 wrote a text in Latin-1; those of equal texts are one object."""
        if text not in self.encoded:
            self.encoded[text] = text.encode("latin1")
        return self.encoded[text]

    def read_number(self, kind: PickledType, contents: bytes) -> Any:
        """Return one of numpy's numbers as a plain number."""
        return np.frombuffer(contents, kind.name, count=1).item()

    def view_array(
        self,
        contents: bytes | bytearray,
        kind: PickledType,
        shape: tuple[int, ...],
        order: str,
        axes: tuple[int, ...] | None = None,
    ) -> PickledArray:
        """Return an array over bytes; order: "C", "F" (the first axis varies fastest) or "K" (with permuted axes)."""
        array = PickledArray()
        array.view = np.frombuffer(contents, kind.name).reshape(shape, order="F" if order == "F" else "C")
        array.view = array.view.transpose(axes) if axes else array.view
        return array


class PickledType:
    """A substitute for numpy.dtype that keeps name and byte order; numpy's own can be set to a state that crashes."""

    def __init__(self, name: str | bytes, *_: object):
        self.name = decode_text(name)
        if not isinstance(self.name, str):
            raise pickle.UnpicklingError("the type of an array is not a name")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Take the byte order from the pickled state."""
        if decode_text(state[1]) == ">":
            self.name = f">{self.name}"


class PickledArray:
    """A substitute for numpy.ndarray that accepts a shape, a number type and bytes only."""

    def __init__(self, *_: object):
        self.view = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Lay the array over the bytes of its pickled state."""
        _, shape, kind, fortran_order, contents = state
        self.view = np.frombuffer(contents, kind.name).reshape(shape, order="F" if fortran_order else "C")

    def copy(self) -> np.ndarray:
        """Return a writable array in the byte order of this machine."""
        return self.view.astype(self.view.dtype.newbyteorder("="), order="C")


def read_svhn(root: pathlib.Path, split: str, workers: int) -> Contents:
    """Read a split of SVHN: a MATLAB file in which X is (32, 32, 3, N) and the digit 0 has the label 10."""
    from scipy.io import loadmat

    path = root / f"{split}_32x32.mat"
    path.stat()
    with report_unreadable_file(path):
        contents = loadmat(str(path))
        images = torch.from_numpy(contents["X"].transpose(3, 2, 0, 1).copy())
        classes = torch.from_numpy(contents["y"].astype(np.int64)).flatten() % 10
        if images.shape != (len(classes), 3, 32, 32) or images.dtype != torch.uint8:
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}")
    return images, classes, DIGITS
