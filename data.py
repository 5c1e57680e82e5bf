"""Data sets by name, batches of them on the device, and what can be done to a batch.

    dataset = data.load_dataset("cifar10", device="cuda")
    batches = data.Batches(len(dataset), batch_size=128, seed=0, device="cuda")
    images, labels = dataset.batch(batches.next(), generator)  # (128, 3, 32, 32) in [0, 1], one-hot (128, 10)

A data set lies in memory as bytes, on the device that trains: a batch is an index, a cast and a little noise there, and
no other process takes part. Only sprites are drawn, or unpacked from bits, batch by batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import pathlib
import sys
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

import dsprites
import imagenet
import readers
from errors import UsageError
from imagenet import StreamedImages
from utils import dequantise

NAMES = (
    "digits",
    "mnist",
    "fashion_mnist",
    "cifar10",
    "svhn",
    "cifar100",
    "textures",
    "folder",
    "dsprites",
    "imagenet",
    "imagenetfull",
)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images with their labels.

    images: uint8 (N, C, H, W), or sprites that are drawn when indexed. labels: the class of each image (N,) int64, or a
    vector for each (N, label_size) float, or None. noise: how a batch gets its values in [0, 1] from bytes, by "steps",
    (byte + U(0, 1))/256, "centred", byte/255 + U(−1/512, 1/512), or with "none", byte/255.
    """

    name: str
    images: Tensor | dsprites.Sprites
    labels: Tensor | None
    class_names: tuple[str, ...] = ()
    noise: str = "steps"

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def label_size(self) -> int:
        """Width of the label vectors of a batch, 0 where there are none."""
        if self.labels is None:
            return 0
        return self.labels.shape[1] if self.labels.ndim == 2 else len(self.class_names)

    def prefetch(self, index: Tensor) -> None:
        """Do nothing, where StreamedImages begins to read an index's images: they are in memory."""

    def batch(
        self, index: Tensor, generator: torch.Generator | None, rescale: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """Return the images (n, C, H, W) in [0, rescale] and label vectors (n, label_size) of an index (n,) int64."""
        stored = self.images[index]
        if self.noise == "steps":
            images = dequantise(stored, generator, rescale)
        elif self.noise == "centred":
            noise = torch.rand(stored.shape, generator=generator, device=stored.device)
            images = (stored / 255 + (noise - 0.5) / 256) * rescale
        else:
            images = stored * (rescale / 255)
        if self.labels is None:
            return images, None
        labels = self.labels[index]
        return images, labels if labels.ndim == 2 else F.one_hot(labels, self.label_size).float()


def load_dataset(
    name: str,
    *,
    split: str = "train",
    root: str | pathlib.Path = "data",
    device: torch.device | str = "cpu",
    path: str | pathlib.Path | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    condition: str | None = None,
    subset: str | None = None,
    workers: int = 4,
    download: bool = True,
) -> Dataset | StreamedImages:
    """Load one of NAMES, its "train" or "test" split, onto the device.

    digits: scikit-learn's 1,797 digits, a tenth of each class for the test. mnist, fashion_mnist, cifar10, cifar100,
    svhn, textures: torchvision's files below `root`, downloaded where there are none. folder: the images below `path`,
    see `readers.read_folder`. dsprites: drawn, or read from the published file `path`; `condition` (shape, size, pos,
    rot) says what their labels are, `subset` (shape, pos, size, rot, restrict) keeps a part of them. imagenet: 32x32,
    from the authors' files below `path`. imagenetfull: 128x128, read from TFRecords or class folders below `path`
    batch by batch. dsprites and textures have no split. Raises UsageError for what is unknown, missing, damaged or
    does not go together.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}, must be 'train' or 'test'")
    if name not in NAMES:
        raise UsageError(f"--dataset={name} is unknown; use one of {', '.join(NAMES)}")
    if name != "dsprites" and (condition or subset):
        raise UsageError(f"--cond_*, --d*_only and --dsprites_restrict are for --dataset=dsprites, not {name}")
    if name != "folder" and (image_size or channels):
        raise UsageError(f"--image_size and --channels are for --dataset=folder; {name} has its own")
    if name == "dsprites":
        return load_sprites(path, torch.device(device), condition, subset)
    if name == "folder":
        images, labels, class_names = readers.read_folder(
            given(path, name, "--data_path"), split=split, image_size=image_size, channels=channels, workers=workers
        )
    elif name == "imagenetfull":
        return imagenet.open_imagenet(given(path, name, "--imagenet_datadir"), split, device=device, workers=workers)
    elif name == "imagenet":
        images, labels, class_names = imagenet.read_imagenet32(given(path, name, "--imagenet_path"), split)
    elif name == "digits":
        images, labels, class_names = readers.read_digits(split)
    else:
        images, labels, class_names = read_or_download(name, pathlib.Path(root), split, download, workers)
    if labels is not None:
        labels = labels.to(device)
    noise = "centred" if name in ("imagenet", "svhn", "cifar100", "textures") else "steps"  # as in the reference
    return Dataset(name, images.to(device), labels, class_names, noise)


def given(path: str | pathlib.Path | None, name: str, flag: str) -> pathlib.Path:
    """Return a path that a data set cannot do without."""
    if path is None:
        raise UsageError(f"--dataset={name} needs {flag}, the folder where it lies")
    return pathlib.Path(path)


def load_sprites(
    path: str | pathlib.Path | None, device: torch.device, condition: str | None, subset: str | None
) -> Dataset:
    """Return dSprites, drawn or from the published file; labels are the subset's own, else the shape."""
    bits = None
    if path is None:
        latents = dsprites.latents_of(torch.arange(dsprites.SIZE))
        latents = latents[dsprites.in_subset(latents, subset)]
    else:
        latents, bits = dsprites.read_published(path, lambda latents: dsprites.in_subset(latents, subset))
        if not len(latents):
            raise UsageError(f"--dsprites_path={path} holds no sprite of the chosen subset")
    repeats = -(-10_000 // len(latents))  # few sprites are repeated, as in the reference, to fill a batch
    latents = latents.repeat(repeats, 1).to(device)
    bits = None if bits is None else bits.repeat(repeats, 1).to(device)
    sprites = dsprites.Sprites(latents, bits)
    condition = condition or (subset if subset in ("pos", "size", "rot") else "shape")
    if condition == "shape":
        return Dataset("dsprites", sprites, latents[:, 0].long() - 1, dsprites.SHAPES, noise="none")
    labels = dsprites.label_vectors(latents, condition)
    if subset == condition == "pos":
        labels = labels + 0.5  # as the reference labels this subset
    return Dataset("dsprites", sprites, labels, noise="none")


# ---- data sets that torchvision knows how to download ----


def read_or_download(name: str, root: pathlib.Path, split: str, download: bool, workers: int) -> readers.Contents:
    """Read a data set that torchvision knows, after a download where its files are missing and that is allowed."""
    try:
        return read_stored(name, root, split, workers)
    except FileNotFoundError as error:
        missing = f"--dataset={name}: {error.filename} is missing"
    remedy = "put the files there, or set --datadir to where they are"
    if not download:
        raise UsageError(f"{missing}; {remedy}")
    try:
        download_with_torchvision(name, root, split)
    except Exception as error:  # no network, a broken download, no torchvision
        reason = " ".join(str(error).split())
        raise UsageError(f"{missing} and cannot be downloaded ({reason}); {remedy}") from error
    return read_stored(name, root, split, workers)


def read_stored(name: str, root: pathlib.Path, split: str, workers: int) -> readers.Contents:
    """Read the files of one of torchvision's data sets, in the layout it gives them below `root`."""
    if name == "mnist":
        return *readers.read_idx_pair(root / "MNIST/raw", split), readers.DIGITS
    if name == "fashion_mnist":
        return *readers.read_idx_pair(root / "FashionMNIST/raw", split), readers.CLOTHES
    if name == "cifar10":
        files = [f"data_batch_{k}" for k in range(1, 6)] if split == "train" else ["test_batch"]
        return readers.read_cifar(root / "cifar-10-batches-py", files, "batches.meta", "labels", "label_names")
    if name == "cifar100":
        return readers.read_cifar(root / "cifar-100-python", [split], "meta", "fine_labels", "fine_label_names")
    if name == "svhn":
        return readers.read_svhn(root / f"{split}_32x32.mat")
    return readers.read_textures(root / "dtd/dtd/images", workers)


def download_with_torchvision(name: str, root: pathlib.Path, split: str) -> None:
    """Let torchvision download a data set and unpack it below `root`."""
    datasets = import_torchvision().datasets
    {
        "mnist": lambda: datasets.MNIST(root, download=True),
        "fashion_mnist": lambda: datasets.FashionMNIST(root, download=True),
        "cifar10": lambda: datasets.CIFAR10(root, download=True),
        "cifar100": lambda: datasets.CIFAR100(root, download=True),
        "svhn": lambda: datasets.SVHN(root, split=split, download=True),
        "textures": lambda: datasets.DTD(root, download=True),
    }[name]()


def import_torchvision() -> ModuleType:
    """Import torchvision, also where its compiled operators do not load, as beside a torch of another build.

    Its Python parts then only need these operators to be declared, before the import.
    """
    found = importlib.util.find_spec("torchvision")
    if found is not None and found.origin and "torchvision" not in sys.modules:
        with contextlib.suppress(OSError):
            for library in pathlib.Path(found.origin).parent.glob("_C.*"):
                torch.ops.load_library(library)
        if not hasattr(torch.ops.torchvision, "nms"):
            declare_operators()
    return importlib.import_module("torchvision")


_declared: list[torch.library.Library] = []  # a declaration lasts as long as its library object


def declare_operators() -> None:
    """Declare the compiled operators of torchvision, with nothing to run behind them."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms", "qroi_align"):
        library.define(f"{name}() -> ()")
    for name in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
        library.define(f"{name}() -> ()")
        library.define(f"_{name}_backward() -> ()")
    _declared.append(library)


# ---- batches, and changes to them on the device ----


class Batches:
    """Endless batches of shuffled epochs, as indices: no image twice in an epoch, a tail shorter than a batch left out.

    With several workers each takes its slice of one common permutation: `world` workers with batches of n see together
    exactly what one worker sees with batches of world·n. Raises UsageError where an epoch is shorter than a batch.
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
            raise UsageError(f"--batch_size={batch_size}{several} is more than the {size} images of the data set")
        self.size, self.batch_size, self.rank, self.world, self.device = size, batch_size, rank, world, device
        self.load_state_dict({"seed": seed, "epoch": 0, "position": 0})

    def next(self) -> Tensor:
        """Return the indices (batch_size,) int64 of this worker's next images."""
        if self.position + self.world * self.batch_size > self.size:
            self.load_state_dict({"seed": self.seed, "epoch": self.epoch + 1, "position": 0})
        index = self.following()
        self.position += self.world * self.batch_size
        return index

    def following(self) -> Tensor:
        """Return the indices that `next` will give, as far as this epoch knows them, without going on."""
        start = self.position + self.rank * self.batch_size
        return self.permutation[start : start + self.batch_size]

    def state_dict(self) -> dict[str, int]:
        """Return where the run is: `position` counts the images that all workers took from this epoch."""
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on exactly there, with any number of workers."""
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**32)
        self.permutation = torch.randperm(self.size, generator=generator).to(self.device)


def augment(images: Tensor, generator: torch.Generator, *, crop_padding: int = 4, flip: bool = True) -> Tensor:
    """Return images (N, C, H, W), each shifted by up to `crop_padding` pixels over black, and half of them mirrored."""
    n, channels, height, width = images.shape
    device = images.device

    def shifts() -> Tensor:
        return torch.randint(2 * crop_padding + 1, (n, 1), generator=generator, device=device)

    rows = shifts() + torch.arange(height, device=device)  # (N, H)
    columns = shifts() + torch.arange(width, device=device)  # (N, W)
    if flip:
        mirrored = torch.rand(n, 1, generator=generator, device=device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    image = torch.arange(n, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[:, None, None]
    return F.pad(images, [crop_padding] * 4)[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def cutout(
    images: Tensor, generator: torch.Generator, *, probability: float = 1.0, size: int = 16, inside: bool = False
) -> Tensor:
    """Return images (N, C, H, W) of which a share has a black square of `size` pixels (DeVries & Taylor 2017).

    Its centre may lie anywhere on the image; `inside` keeps all of it on the image.
    """
    n, _, height, width = images.shape
    if size > min(height, width):
        raise UsageError(f"--cutout_mask_size={size} is larger than the images of {height}x{width}")
    lowest = 0 if inside else -(size // 2)

    def covered(side: int) -> Tensor:
        """Which of the rows or columns 0 … side−1 the square covers, (N, side)."""
        start = torch.randint(lowest, side - size - lowest + 1, (n, 1), generator=generator, device=images.device)
        place = torch.arange(side, device=images.device)
        return (start <= place) & (place < start + size)

    chosen = torch.rand(n, 1, generator=generator, device=images.device) < probability
    square = (covered(height) & chosen)[:, :, None] & covered(width)[:, None, :]  # (N, H, W)
    return images.masked_fill(square[:, None], 0)


def mixup(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return convex mixes of images (N, C, H, W) and a permutation of them; labels stay those of the first image.

    Each image's weight is drawn from Beta(1, 1), the uniform distribution on [0, 1].
    """
    weight = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device)
    other = images[torch.randperm(len(images), generator=generator, device=images.device)]
    return weight * images + (1 - weight) * other
