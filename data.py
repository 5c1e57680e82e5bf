"""Data sets by name, their batches on the device, and augmentations of a batch.

    dataset = data.load_dataset("cifar10", device="cuda")
    batches = data.Batches(len(dataset), batch_size=128, seed=0, device=dataset.index_device)
    images, labels = dataset.batch(batches.next(), generator)  # (128, 3, 32, 32) in [0, 1], one-hot (128, 10)

A data set lies in memory as bytes, on the device that trains. A batch takes an index, a cast and a little noise there,
and no worker process. Sprites are drawn, or unpacked from bits, batch by batch. Images of 128x128 pixels are decoded
ahead of time by worker processes.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import pathlib
import re
import unicodedata
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ebm.readers import dsprites, folders, image_files, imagenet
from ebm.readers.downloads import import_torchvision
from ebm.support.errors import UsageError
from ebm.support.pixels import dequantise


class Dataset(Protocol):
    """The interface of a data set: images with their labels, in memory or on the disk."""

    @property
    def name(self) -> str:
        """The data set's name in DATASETS, or the name of its folder."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The channels, height and width of an image."""

    @property
    def labels(self) -> Tensor | None:
        """The class of each image (N,) int64, or a vector for each (N, label_size) float.

        None if the images have no labels, or if the labels are on the disk only.
        """

    @property
    def label_size(self) -> int:
        """The width of the label vectors of a batch, 0 without labels."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes; empty if the labels are not classes."""

    @property
    def concept(self) -> str | None:
        """The concept of sprites that the labels describe, if they are not classes; None for other labels."""

    @property
    def noise(self) -> str:
        """The kind of noise by which bytes become values in [0, 1], see `StoredImages`."""

    @property
    def index_device(self) -> torch.device:
        """The device on which an index of images should lie."""

    def __len__(self) -> int: ...

    def raw(self, index: Tensor) -> Tensor:
        """Return the images (n, C, H, W) uint8 of an index (n,) int64, without noise."""

    def batch(
        self, index: Tensor, generator: torch.Generator | None, rescale: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """Return the images (n, C, H, W) in [0, rescale] and label vectors (n, label_size) of an index (n,) int64."""

    def prefetch(self, index: Tensor) -> None:
        """Begin to read the images of an index that a later `batch` will ask for, if they are on the disk."""

    def with_classes(self, class_names: tuple[str, ...], numbers: Tensor) -> Dataset:
        """Return the same images with labels of other classes.

        numbers: int64, the number that each class of this data set has in `class_names`.
        """


@dataclasses.dataclass(frozen=True)
class StoredImages:
    """A data set in memory.

    images: uint8 (N, C, H, W), or sprites that are drawn when indexed. noise: how bytes become values in [0, 1]:
    "steps": (byte + U(0, 1))/256, "centred": byte/255 + U(−1/512, 1/512), "none": byte/255, "floor": byte/256, which is
    "steps" without the noise.
    """

    name: str
    images: Tensor | dsprites.Sprites
    labels: Tensor | None
    class_names: tuple[str, ...] = ()
    noise: str = "steps"
    concept: str | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def label_size(self) -> int:
        if self.labels is None:
            return 0
        return self.labels.shape[1] if self.labels.ndim == 2 else len(self.class_names)

    @property
    def index_device(self) -> torch.device:
        return self.images.device

    def prefetch(self, index: Tensor) -> None:
        """Do nothing: the images are in memory."""

    def raw(self, index: Tensor) -> Tensor:
        return self.images[index.to(self.index_device)]

    def with_classes(self, class_names: tuple[str, ...], numbers: Tensor) -> StoredImages:
        assert self.labels is not None, "only classes can be renamed"
        labels = numbers.to(self.labels.device)[self.labels]
        return dataclasses.replace(self, labels=labels, class_names=class_names)

    def batch(
        self, index: Tensor, generator: torch.Generator | None, rescale: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        stored = self.images[index]
        if self.noise == "steps":
            images = dequantise(stored, generator, rescale)
        elif self.noise == "centred":
            noise = torch.rand(stored.shape, generator=generator, device=stored.device)
            images = (stored / 255 + (noise - 0.5) / 256) * rescale
        else:
            images = stored * (rescale / (256 if self.noise == "floor" else 255))
        if self.labels is None:
            return images, None
        labels = self.labels[index]
        return images, labels if labels.ndim == 2 else F.one_hot(labels, self.label_size).float()


# ---- data sets by name ----


class Request(NamedTuple):
    """The arguments of `load_dataset`, as the loader of a data set receives them."""

    name: str
    split: str
    root: pathlib.Path
    device: torch.device
    path: pathlib.Path | None
    image_size: tuple[int, int] | None
    channels: int | None
    condition: str | None
    subset: str | None
    antialias: bool
    workers: int
    download: bool

    def require_path(self) -> pathlib.Path:
        """Return the path of the data set's files; raise UsageError if it was not given."""
        if self.path is None:
            setting = DATASETS[self.name].path_setting
            raise UsageError(f"`dataset`={self.name} needs `{setting}`, the folder of its files")
        return self.path


class Source(NamedTuple):
    """The loader of a data set, the setting that holds the path of its files, and what makes its labels false.

    path_setting: None if the files are below `datadir`. label_breakers: the settings of augmentations after which an
    image is no longer of its class.
    """

    load: Callable[[Request], Dataset]
    path_setting: str | None = None
    label_breakers: tuple[str, ...] = ()


def load_dataset(
    name: str,
    *,
    split: str = "train",
    root: str | pathlib.Path = "data",
    device: torch.device | str = "cpu",
    path: str | pathlib.Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    condition: str | None = None,
    subset: str | None = None,
    antialias: bool = False,
    workers: int = 4,
    download: bool = True,
) -> Dataset:
    """Load the "train" or "test" split of a data set, one of DATASETS, onto the device.

    digits: scikit-learn's 1,797 digits, of which a tenth of each class is the test split. mnist, fashion_mnist, kmnist,
    cifar10, cifar100, svhn, textures: torchvision's files below `root`, downloaded if they are missing. celeba: the
    aligned faces below `root`, squeezed to 32x32 pixels. folder: the images below `path`, see `folders.read_folder`;
    `image_size` is their side or (height, width). dsprites: drawn, or read from the published file `path`; `condition`
    (shape, size, pos, rot) chooses the labels, `subset` (shape, pos, size, rot, restrict) keeps a part of the sprites.
    imagenet: 32x32 pixels, or another size, from the authors' files below `path`. imagenetfull: 128x128 pixels, read
    batch by batch from TFRecords or class folders below `path`; resized as in the reference, or better with
    `antialias`. celeba, dsprites and textures have no splits. Raises UsageError for an unknown name, for missing or
    damaged files and for arguments that exclude each other.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}, must be 'train' or 'test'")
    if name not in DATASETS:
        raise UsageError(f"`dataset`={name} is unknown; use one of {', '.join(DATASETS)}")
    if name != "dsprites" and (condition or subset):
        raise UsageError(f"a condition or a subset of sprites is for `dataset`=dsprites, not {name}")
    if name != "folder" and (image_size or channels):
        raise UsageError(f"`image_size` and `channels` are for `dataset`=folder; {name} has its own")
    if name != "imagenetfull" and antialias:
        raise UsageError(f"`antialias` is for `dataset`=imagenetfull; the images of {name} are not resized by it")
    root_and_device = pathlib.Path(root), torch.device(device)
    height_and_width = (image_size, image_size) if isinstance(image_size, int) else image_size
    files, size = None if path is None else pathlib.Path(path), (height_and_width, channels)
    return DATASETS[name].load(
        Request(name, split, *root_and_device, files, *size, condition, subset, antialias, workers, download)
    )


def make_dataset(request: Request, contents: image_files.Contents, noise: str = "steps") -> Dataset:
    """Return a data set on the device, with the images, labels and class names that a reader returned."""
    images, labels, class_names = contents
    labels = None if labels is None else labels.to(request.device)
    return StoredImages(request.name, images.to(request.device), labels, class_names, noise)


def load_digits(request: Request) -> Dataset:
    """Load scikit-learn's digits."""
    return make_dataset(request, image_files.read_digits(request.split))


def load_folder(request: Request) -> Dataset:
    """Load a folder of images."""
    folder = request.require_path()
    contents = folders.read_folder(
        folder,
        split=request.split,
        image_size=request.image_size,
        channels=request.channels,
        workers=request.workers,
    )
    return make_dataset(request, contents)


def load_celeba(request: Request) -> Dataset:
    """Load the faces of CelebA at 32x32 pixels."""
    contents = folders.read_celeba(request.root, request.split, request.workers)
    return make_dataset(request, contents, "none")  # as the reference


def load_imagenet32(request: Request) -> Dataset:
    """Load ImageNet at 32x32 pixels."""
    return make_dataset(
        request, imagenet.read_imagenet32(request.require_path(), request.split), "centred"
    )  # as the reference


def open_imagenet128(request: Request) -> Dataset:
    """Open ImageNet at 128x128 pixels, whose images are read batch by batch."""
    return imagenet.open_imagenet(
        request.require_path(),
        request.split,
        device=request.device,
        workers=request.workers,
        antialias=request.antialias,
    )


def load_sprites(request: Request) -> Dataset:
    """Load dSprites, drawn or read from the published file.

    The labels are those of `condition`. Without it they are the factor that the subset is named after (pos, size or
    rot), else the shape.
    """
    condition, subset, bits = request.condition, request.subset, None
    if request.path is None:
        latents = dsprites.compute_latents(torch.arange(dsprites.SIZE))
        latents = latents[dsprites.is_in_subset(latents, subset)]
    else:
        latents, bits = dsprites.read_published(request.path, lambda latents: dsprites.is_in_subset(latents, subset))
        if not len(latents):
            raise UsageError(f"`dsprites_path`={request.path} holds no sprite of the chosen subset")
    repeats = -(-10_000 // len(latents))  # a small subset is repeated, as in the reference, so that it fills a batch
    latents = latents.repeat(repeats, 1).to(request.device)
    bits = None if bits is None else bits.repeat(repeats, 1).to(request.device)
    sprites = dsprites.Sprites(latents, bits)
    condition = condition or (subset if subset in ("pos", "size", "rot") else "shape")
    if condition == "shape":
        return StoredImages("dsprites", sprites, latents[:, 0].long() - 1, dsprites.SHAPES, noise="none")
    labels = dsprites.compute_labels(latents, condition)
    if subset == condition == "pos":
        labels = labels + 0.5  # as the reference labels this subset
    return StoredImages("dsprites", sprites, labels, noise="none", concept=condition)


# The arguments: the module torchvision.datasets, the folder for the files, the split.
Download = Callable[[ModuleType, pathlib.Path, str], object]


def load_torchvision(
    request: Request,
    *,
    read: Callable[[pathlib.Path, str, int], image_files.Contents],
    download: Download,
    address: str,
    noise: str = "steps",
) -> Dataset:
    """Load one of torchvision's data sets; download its files if they are missing and `download` is set.

    address: where they are published, for the message if they cannot be downloaded.
    """
    arguments = request.root, request.split, request.workers
    try:
        return make_dataset(request, read(*arguments), noise)
    except FileNotFoundError as error:
        missing = f"`dataset`={request.name}: {error.filename} is missing"
    remedy = f"put the files of {address} there (see docs/data.md), or set `datadir` to where they are"
    if not request.download:
        raise UsageError(f"{missing}; {remedy}")
    try:
        download(import_torchvision().datasets, request.root, request.split)
    except Exception as error:  # no network, a broken download, no torchvision
        reason = " ".join(str(error).split())
        raise UsageError(f"{missing} and cannot be downloaded ({reason}); {remedy}") from error
    return make_dataset(request, read(*arguments), noise)


def download_into(folder: pathlib.Path, download: Callable[[], object]) -> None:
    """Download an archive and unpack it to a folder; raise OSError if it would replace files, which may be a user's."""
    if folder.is_dir() and any(folder.iterdir()):
        raise OSError(f"{folder} holds other files, which the download would replace")
    download()


def make_torchvision_source(
    read: Callable[[pathlib.Path, str, int], image_files.Contents],
    download: Download,
    address: str,
    noise: str = "steps",
    label_breakers: tuple[str, ...] = (),
) -> Source:
    """Return the source of one of torchvision's data sets."""
    load = functools.partial(load_torchvision, read=read, download=download, address=address, noise=noise)
    return Source(load, label_breakers=label_breakers)


# The one list of data sets. Their kind of noise is that of the reference. The mirror image of a digit is no digit; on a
# black background a black square changes a shape; labels of sprites tell their place, size and rotation.
DATASETS = {
    "digits": Source(load_digits, label_breakers=("augment", "cutout")),
    "mnist": make_torchvision_source(
        image_files.read_mnist,
        lambda sets, root, _: sets.MNIST(root, download=True),
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        label_breakers=("augment", "cutout"),
    ),
    "fashion_mnist": make_torchvision_source(
        image_files.read_fashion_mnist,
        lambda sets, root, _: sets.FashionMNIST(root, download=True),
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        label_breakers=("cutout",),
    ),
    "kmnist": make_torchvision_source(
        image_files.read_kmnist,
        lambda sets, root, _: sets.KMNIST(root, download=True),
        "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
        label_breakers=("augment", "cutout"),
    ),
    "cifar10": make_torchvision_source(
        image_files.read_cifar10,
        lambda sets, root, _: download_into(root / "cifar-10-batches-py", lambda: sets.CIFAR10(root, download=True)),
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    ),
    "celeba": Source(load_celeba),
    "imagenet": Source(load_imagenet32, "imagenet_path"),
    "imagenetfull": Source(open_imagenet128, "imagenet_datadir"),
    "dsprites": Source(load_sprites, "dsprites_path", label_breakers=("augment", "cutout")),
    "folder": Source(load_folder, "data_path"),
    "svhn": make_torchvision_source(
        image_files.read_svhn,
        lambda sets, root, split: sets.SVHN(root, split=split, download=True),
        "http://ufldl.stanford.edu/housenumbers/",
        "centred",
        label_breakers=("augment",),
    ),
    "cifar100": make_torchvision_source(
        image_files.read_cifar100,
        lambda sets, root, _: download_into(root / "cifar-100-python", lambda: sets.CIFAR100(root, download=True)),
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        "centred",
    ),
    "textures": make_torchvision_source(
        folders.read_textures,
        lambda sets, root, _: sets.DTD(root, download=True),
        "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz",
        "centred",
    ),
}


# ---- classes by name ----


def name_classes(classes: Sequence[int], names: Sequence[str]) -> list[str]:
    """Return a short name for each class, for pictures: the first of its synonyms, which commas separate.

    names: of all classes; if it is empty, the name of a class is its number.
    """
    return [names[number].split(",")[0] if names else str(number) for number in classes]


def describe_labels(labels: Tensor | None, dataset: Dataset) -> list[str]:
    """Return the label vectors (n, label_size) of a data set in words; an empty list if there are none."""
    if labels is None or not labels.shape[1]:
        return []
    if dataset.concept:
        return dsprites.describe_sprite_labels(labels, dataset.concept)
    return name_classes(labels.argmax(1).tolist(), dataset.class_names)


def find_class(setting: str, word: str, names: Sequence[str], classes: int) -> int:
    """Return the number of a class, given its number or its name.

    setting: the name of the setting, for messages. word: its value. names: of the classes; one entry may hold several
    names of its class, separated by commas. If they are numbers other than those of the classes, as of the folders 1
    to 9, a number is a name. classes: the number of classes. Raises UsageError if no class has this name or number, or
    if several classes have this name.
    """
    if not classes:
        raise UsageError(f"`{setting}`={word}: the model is not conditioned on classes; leave it out")
    has_other_numbers = any(
        name.isdecimal() and (name.lstrip("0") or "0") != str(number) for number, name in enumerate(names)
    )
    if word.isdecimal() and not has_other_numbers:
        if int(word) >= classes:
            raise UsageError(f"`{setting}`: there is no class {word}; they are 0 to {classes - 1}")
        return int(word)
    if not names:
        remedy = f"give numbers from 0 to {classes - 1}"
        remedy += ", or a file of names with `class_names`" * (setting == "classes")
        raise UsageError(f"`{setting}`: the class {word!r} is unknown, because this model has no class names; {remedy}")
    numbers: dict[str, list[int]] = {}
    for number, name in enumerate(map(str.casefold, names)):
        for synonym in {name, *map(str.strip, name.split(","))}:
            numbers.setdefault(synonym, []).append(number)
    matches = numbers.get(word.casefold(), [])
    if len(matches) > 1:
        several = ", ".join(map(str, matches))
        raise UsageError(f"`{setting}`: {word!r} is the name of the classes {several}; give a number")
    if not matches:
        similar = ", ".join(difflib.get_close_matches(word.casefold(), numbers, 3))
        some = ", ".join(names[:10]) + ", …" * (len(names) > 10)
        remedy = f"did you mean {similar}?" if similar else f"the classes are {some}"
        raise UsageError(f"`{setting}`: no class is called {word!r}; {remedy}")
    return matches[0]


def split_class_off(dataset: Dataset, name: str) -> tuple[Dataset, Dataset]:
    """Return a data set without one class, whose other classes are numbered anew, and the images of that class.

    name: of the class, or its number, see `find_class`. Raises UsageError if there is no such class, and for a data set
    that is not in memory.
    """
    names = dataset.class_names
    if not isinstance(dataset, StoredImages) or not isinstance(dataset.images, Tensor) or not names:
        raise UsageError(f"`leave_out`={name}: {dataset.name} has no images of classes in memory; leave it out")
    images, labels = dataset.images, dataset.labels
    assert labels is not None, "names of classes belong to labels"
    number = find_class("leave_out", name, names, len(names))
    if len(names) < 3:
        raise UsageError(f"`leave_out`={name}: {dataset.name} has {len(names)} classes; at least two must be left")
    is_left_out, index = labels == number, torch.arange(len(labels), device=labels.device)
    kept, left_out = index[~is_left_out], index[is_left_out]
    others, numbered = (*names[:number], *names[number + 1 :]), labels[kept] - (labels[kept] > number).long()
    return (
        dataclasses.replace(dataset, images=images[kept], labels=numbered, class_names=others),
        StoredImages(f"left out: {names[number]}", images[left_out], None, noise=dataset.noise),
    )


def have_same_images(one: Dataset, other: Dataset) -> bool:
    """Return whether two data sets hold the same images; a thousand of them are compared."""
    if len(one) != len(other):
        return False
    some = torch.arange(0, len(one), max(1, len(one) // 1_000))
    return torch.equal(one.raw(some), other.raw(some))


def match_classes(dataset: Dataset, known: tuple[str, ...]) -> Dataset:
    """Return a data set with the class numbers of a model, or of another data set, found by the names of the classes.

    known: the names of all classes, in the order of their numbers. The data set may lack classes. A note lists the
    names that are written otherwise. Raises UsageError if the data set has a class that is not known.
    """
    names = dataset.class_names
    if names == known:
        return dataset
    if len(names) == len(known) and is_wordnet_order(names, known):
        print(f"note: the classes of {dataset.name} are matched by their order, that of ImageNet's labels")
        return dataset.with_classes(known, torch.arange(len(known)))
    by_spelling = {unify_spelling(name): name for name in known if name not in names}
    matches = {name: name if name in known else by_spelling.get(unify_spelling(name)) for name in names}
    unknown = next((name for name, match in matches.items() if match is None), None)
    if unknown is not None:
        some = ", ".join(known[:5]) + ", …" * (len(known) > 5)
        raise UsageError(
            f"`dataset`={dataset.name} has the class {unknown!r}, which is not one of {some}; choose "
            "images of these classes, or rename the class"
        )
    numbers = [known.index(match) for match in matches.values() if match is not None]
    if twice := next((known[number] for number in numbers if numbers.count(number) > 1), None):
        raise UsageError(f"`dataset`={dataset.name} has several classes that could be {twice!r}; rename them")
    if respelt := [f"{name} is {match}" for name, match in matches.items() if name != match]:
        print(f"note: classes of {dataset.name} that are spelt differently are matched: {', '.join(respelt)}")
    return dataset.with_classes(known, torch.tensor(numbers))


def unify_spelling(name: str) -> str:
    """Return a name without the difference of capitals, and of the forms in which systems store accents."""
    return unicodedata.normalize("NFC", name).casefold()


def is_wordnet_order(names: Sequence[str], others: Sequence[str]) -> bool:
    """Return whether one of two lists of classes are WordNet's numbers (n01440764), and the other 0, 1, 2 …"""
    numbers = tuple(map(str, range(len(names))))
    pairs = (names, others), (others, names)
    return any(tuple(one) == numbers and all(re.fullmatch(r"n\d{8}", name) for name in other) for one, other in pairs)


# ---- batches, and their augmentation on the device ----


class Batches:
    """An endless sequence of batches, as indices of images, in shuffled epochs.

    An epoch holds no image twice; a tail shorter than a batch is left out. With several workers each takes its slice of
    one common permutation: `world` workers with batches of n see together exactly what one worker sees with batches of
    world·n. Raises UsageError if an epoch is shorter than a batch.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ):
        if batch_size * world > size:
            several = f" on {world} workers" if world > 1 else ""
            raise UsageError(f"`batch_size`={batch_size}{several} is more than the {size} images of the data set")
        self.size, self.batch_size, self.rank, self.world, self.device = size, batch_size, rank, world, device
        self.load_state_dict({"seed": seed, "epoch": 0, "position": 0})

    def next(self) -> Tensor:
        """Return the indices (batch_size,) int64 of this worker's next images."""
        if self.position + self.world * self.batch_size > self.size:
            self.load_state_dict({"seed": self.seed, "epoch": self.epoch + 1, "position": 0})
        index = self.peek()
        self.position += self.world * self.batch_size
        return index

    def peek(self) -> Tensor:
        """Return the indices that `next` will return, without advancing; fewer or none at the end of an epoch."""
        start = self.position + self.rank * self.batch_size
        return self.permutation[start : start + self.batch_size]

    def state_dict(self) -> dict[str, int]:
        """Return the position in the data: `position` counts the images that all workers took from this epoch."""
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue exactly at a saved position, with any number of workers."""
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**32)
        self.permutation = torch.randperm(self.size, generator=generator).to(self.device)


def augment(images: Tensor, generator: torch.Generator, *, crop_padding: int = 4, flip: bool = True) -> Tensor:
    """Shift each image (N, C, H, W) by up to `crop_padding` pixels and mirror half of them; return the new images.

    The uncovered pixels are black. flip: whether images are mirrored.
    """
    n, channels, height, width = images.shape
    device = images.device

    def shifts() -> Tensor:
        return torch.randint(2 * crop_padding + 1, (n, 1), generator=generator, device=device)

    rows = shifts() + torch.arange(height, device=device)  # (N, H)
    columns = shifts() + torch.arange(width, device=device)  # (N, W)
    if flip:
        is_mirrored = torch.rand(n, 1, generator=generator, device=device) < 0.5
        columns = torch.where(is_mirrored, columns.flip(1), columns)
    image = torch.arange(n, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[:, None, None]
    return F.pad(images, [crop_padding] * 4)[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def cutout(
    images: Tensor, generator: torch.Generator, *, probability: float = 1.0, size: int = 16, inside: bool = False
) -> Tensor:
    """Cover a black square in images (N, C, H, W); return the new images (DeVries & Taylor 2017).

    probability: the share of images with a square. size: the side of a square, in pixels. Its centre may lie anywhere
    on the image; `inside` keeps all of the square on the image.
    """
    n, _, height, width = images.shape
    if size > min(height, width):
        raise UsageError(f"`cutout_mask_size`={size} is larger than the images of {height}x{width}")
    lowest = 0 if inside else -(size // 2)

    def draw_cover(side: int) -> Tensor:
        """Return which of the rows or columns 0 … side−1 the square covers, bool (N, side)."""
        start = torch.randint(lowest, side - size - lowest + 1, (n, 1), generator=generator, device=images.device)
        place = torch.arange(side, device=images.device)
        return (start <= place) & (place < start + size)

    has_square = torch.rand(n, 1, generator=generator, device=images.device) < probability
    square = (draw_cover(height) & has_square)[:, :, None] & draw_cover(width)[:, None, :]  # (N, H, W)
    return images.masked_fill(square[:, None], 0)


def mixup(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mix each image (N, C, H, W) with another one of the batch; return the new images.

    The weight of an image is drawn from Beta(1, 1), the uniform distribution on [0, 1]; the other image has the rest.
    Labels stay those of the first image.
    """
    weight = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device)
    other = images[torch.randperm(len(images), generator=generator, device=images.device)]
    return weight * images + (1 - weight) * other
