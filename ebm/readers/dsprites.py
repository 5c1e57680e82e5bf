"""The sprites of the dSprites data set, drawn from their latents or read from the published file.

    latents = dsprites.compute_latents(torch.arange(1024))  # (1024, 5)
    images = dsprites.render_sprites(*latents.unbind(1))  # (1024, 1, 64, 64), 0 or 1

The latents of a sprite are (shape, scale, orientation, x, y): shape 1 is a square, 2 an ellipse, 3 a heart; scale is in
[0.5, 1]; orientation is in radians, counterclockwise; x points to the right and y down, both in [0, 1]. The published
file holds every combination of LATENTS; y varies fastest and shape slowest.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import math
import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ebm.readers.arrays import read_npy, read_npy_header
from ebm.readers.bounded import Archive, describe_failure, open_file
from ebm.support.errors import UsageError
from ebm.support.progress import SHORT, Progress

SIDE = 64  # height and width of an image, in pixels
SHAPES = ("square", "ellipse", "heart")
LATENTS = {
    "shape": (1.0, 2.0, 3.0),
    "scale": (0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    "orientation": tuple(2 * math.pi * k / 39 for k in range(40)),
    "x": tuple(k / 31 for k in range(32)),
    "y": tuple(k / 31 for k in range(32)),
}
SIZE = math.prod(map(len, LATENTS.values()))  # 737,280 sprites


class Concept(NamedTuple):
    """A latent of sprites that a model can be conditioned on, with its labels and the tolerance of its errors."""

    columns: tuple[int, ...]  # its columns in latents (N, 5)
    label_size: int  # width of its labels, see `compute_labels`
    label_range: tuple[float, float]
    example: str  # the form in which users write a label
    unit: str  # the unit of errors
    tolerance: float  # the largest error that counts as right, in this unit


CONCEPTS = {  # in the order in which the reference's chains visit them
    "size": Concept((1,), 1, (0.5, 1.0), "0.5 to 1", "steps", 1.0),
    "shape": Concept((0,), 3, (0.0, 1.0), " or ".join(SHAPES), "share wrong", 0.0),
    "pos": Concept((3, 4), 2, (0.0, 1.0), "x,y, 0 to 1", "pixels", 2.0),
    "rot": Concept((2,), 2, (-1.0, 1.0), "degrees", "degrees", 10.0),
}

_turned, _middle = LATENTS["orientation"][15], LATENTS["x"][16]
SUBSETS = {  # subset of the reference -> the latents that are fixed in it
    "shape": {"scale": 0.5, "orientation": _turned, "x": _middle, "y": _middle},
    "pos": {"shape": 1.0, "scale": 0.5, "orientation": _turned},
    "size": {"shape": 1.0, "orientation": _turned, "x": _middle, "y": _middle},
    "rot": {"shape": 1.0, "scale": 0.5, "x": _middle, "y": _middle},
    "restrict": {"shape": 1.0, "orientation": 0.0},
}


def compute_latents(index: Tensor) -> Tensor:
    """Return the latents (N, 5) of sprites. index: their numbers (N,) in the published order, int64 in [0, SIZE)."""
    columns = []
    for values in reversed(LATENTS.values()):
        columns.append(torch.tensor(values, device=index.device)[index % len(values)])
        index = index // len(values)
    return torch.stack(columns[::-1], 1)


def is_in_subset(latents: Tensor, subset: str | None) -> Tensor:
    """Return which latents (N, 5) belong to a subset, (N,) bool. subset: one of SUBSETS, or None for all sprites."""
    return match_latents(latents, SUBSETS[subset] if subset else {})


def match_latents(latents: Tensor, fixed: Mapping[str, float]) -> Tensor:
    """Return which latents (N, 5) have fixed values, (N,) bool. fixed: name in LATENTS -> value."""
    mask = torch.ones(len(latents), dtype=torch.bool, device=latents.device)
    for name, value in fixed.items():
        mask &= (latents[:, list(LATENTS).index(name)] - value).abs() < 1e-4
    return mask


def compute_labels(latents: Tensor, condition: str) -> Tensor:
    """Return the labels of latents (N, 5) for a network that is conditioned on a concept.

    shape: one-hot (N, 3). size: the scale (N, 1). pos: x and y (N, 2). rot: cosine and sine of the orientation (N, 2).
    """
    shape, scale, orientation, x, y = latents.unbind(1)
    if condition == "shape":
        return F.one_hot(shape.long() - 1, len(SHAPES)).float()
    return torch.stack({"size": [scale], "pos": [x, y], "rot": [orientation.cos(), orientation.sin()]}[condition], 1)


def describe_sprite_labels(labels: Tensor, condition: str) -> list[str]:
    """Return labels (N, label_size), see `compute_labels`, in words, such as heart, size 0.7, 90° or (0.20, 0.80)."""
    if condition == "shape":
        return [SHAPES[number] for number in labels.argmax(1).tolist()]
    if condition == "rot":
        return [f"{round(math.degrees(math.atan2(sine, cosine))) % 360}°" for cosine, sine in labels.tolist()]
    if condition == "size":
        return [f"size {size:.2g}" for (size,) in labels.tolist()]
    return [f"({x:.2f}, {y:.2f})" for x, y in labels.tolist()]


class Sprites:
    """Sprites that are drawn when indexed, like a tensor of images uint8 (N, 1, 64, 64) with values 0 and 255.

    `sprites[index]` draws images from the latents (N, 5). If the images were read from the file as bits (N, 512), it
    unpacks these instead.
    """

    def __init__(self, latents: Tensor, bits: Tensor | None = None):
        self.latents, self.bits = latents, bits
        self.shape = (len(latents), 1, SIDE, SIDE)
        self.device = latents.device

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: Tensor) -> Tensor:
        images = render_sprites(*self.latents[index].unbind(1)) if self.bits is None else unpack_bits(self.bits[index])
        return images.mul_(255).to(torch.uint8)


# ---- drawing ----

WINDOW = 28  # side in pixels of a square that holds any sprite at any rotation
ANGLE_STEPS = 1 << 16  # number of directions in which the distance from a sprite's centre to its outline is tabulated


def render_sprites(shape: Tensor, scale: Tensor, orientation: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Draw sprites from their latents, each (N,); return float32 images (N, 1, 64, 64) of 0 and 1 on their device.

    A pixel is lit if its centre is inside the outline. This reproduces all published images (tests/test_dsprites.py).
    """
    latents = torch.stack([shape, scale, orientation, x, y], 1).float()
    return torch.cat([draw_sprites(part) for part in latents.split(512)])  # parts that fit into a processor's cache


def draw_sprites(latents: Tensor) -> Tensor:
    """Draw one sprite per row of latents (N, 5), see `render_sprites`."""
    shape, scale, orientation, x, y = latents[:, :, None, None].unbind(1)  # each (N, 1, 1)
    row, column, down, right = compute_window(x, y)
    images = torch.zeros(len(latents), SIDE, SIDE, device=latents.device)
    sprite = torch.arange(len(latents), device=latents.device)[:, None, None]
    images[sprite, row, column] = find_lit_pixels(shape, scale, orientation, down, right).float()
    return images[:, None]


def compute_window(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the window of pixels that a sprite at (x, y) can light: rows, columns, offsets down, offsets right.

    x, y: (..., 1, 1). Offsets are those of the pixels from the sprite's centre, in pixels. Rows and offsets down are
    (..., WINDOW, 1), columns and offsets right (..., 1, WINDOW).
    """
    centre_x, centre_y = SIDE / 4 + SIDE / 2 * x, SIDE / 4 + SIDE / 2 * y  # pixels; sprites keep to the middle half
    places = torch.arange(WINDOW, device=x.device)
    column = centre_x.round().long() - WINDOW // 2 + places
    row = centre_y.round().long() - WINDOW // 2 + places[:, None]
    return row, column, row + 0.5 - centre_y, column + 0.5 - centre_x


def find_lit_pixels(shape: Tensor, scale: Tensor, orientation: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Return which pixels are inside a sprite's outline, given their offsets down and right of its centre.

    All arguments are broadcast to one shape.
    """
    cos, sin = orientation.cos(), orientation.sin()
    angle = torch.atan2(sin * right + cos * down, cos * right - sin * down)  # in the frame of the unrotated sprite
    direction = ((angle / math.pi + 1) * (ANGLE_STEPS / 2)).round().long()
    distances = tabulate_outlines(right.device)
    distance = distances.take(direction + (shape.long() - 1) * distances.shape[1])
    return right**2 + down**2 <= (scale * distance) ** 2


@functools.cache
def tabulate_outlines(device: torch.device) -> Tensor:
    """Return the distance from centre to outline of each shape at scale 1, in pixels: (3, ANGLE_STEPS + 1).

    The directions are angles over [−π, π]. In every shape a ray from the centre crosses the outline once. The outlines
    were fitted to the published images.
    """
    unit = 9.599  # slightly less than 0.15 of the image: half the side of the square, half the width of the heart
    square = unit * torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=torch.float64)
    t = torch.arange(100, dtype=torch.float64) * (2 * math.pi / 100)
    ellipse = unit * torch.stack([1.33 * t.cos(), t.sin() / 1.33], 1)
    t = torch.arange(150, dtype=torch.float64) * (2 * math.pi / 150)
    height = 13 * t.cos() - 5 * (2 * t).cos() - 2 * (3 * t).cos() - (4 * t).cos()
    heart = unit * torch.stack([t.sin() ** 3, -height / 14.494 - 0.15], 1)
    return torch.stack([measure_polygon(corners) for corners in (square, ellipse, heart)]).float().to(device)


def measure_polygon(corners: Tensor) -> Tensor:
    """Return the distance from the origin to the edge of a polygon around it, (ANGLE_STEPS + 1,), over [−π, π].

    corners: (n, 2).
    """
    angle = torch.linspace(-math.pi, math.pi, ANGLE_STEPS + 1, dtype=corners.dtype)
    x, y = corners[torch.atan2(corners[:, 1], corners[:, 0]).argsort()].T
    start = torch.searchsorted(torch.atan2(y, x), angle) - 1  # the first corner of the edge that the ray crosses
    end = (start + 1) % len(x)
    edge_x, edge_y = x[end] - x[start], y[end] - y[start]
    return (x[start] * edge_y - y[start] * edge_x) / (angle.cos() * edge_y - angle.sin() * edge_x)


# ---- recognition ----

# An image counts as a sprite if its overlap is at least this. Sprites of the data set have 1, and those between its
# steps 0.9 or more; discs in place of squares have 0.84 to 0.88. At sizes 0.5 and 0.6 some are outside these bounds,
# because they have few pixels (docs/concepts.md).
LEAST_OVERLAP = 0.9
LIT = 0.5  # pixels above it belong to the sprite in an image
HALF_STEPS = (0.0, 0.05, math.pi / 39, 0.5 / 31, 0.5 / 31)  # between latents of the data set


@dataclasses.dataclass(frozen=True)
class NearestSprites:
    """The sprites that are nearest to N images, and how well each fits its image; a slice has those of some images."""

    latents: Tensor  # (N, 5)
    distances: Tensor  # in L2, (N,)
    overlaps: Tensor  # intersection over union, see `measure_best_overlaps`, (N,)

    @classmethod
    def of_sprites(cls, latents: Tensor) -> NearestSprites:
        """Return sprites of the data set, of latents (N, 5), as those nearest to themselves."""
        return cls(latents, torch.zeros_like(latents[:, 0]), torch.ones_like(latents[:, 0]))

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, part: slice) -> NearestSprites:
        return NearestSprites(self.latents[part], self.distances[part], self.overlaps[part])

    @property
    def is_sprite(self) -> Tensor:
        """Which images overlap their nearest sprite so well that they count as sprites, (N,) bool."""
        return self.overlaps >= LEAST_OVERLAP


def find_nearest_sprites(images: Tensor) -> NearestSprites:
    """Find the nearest of all SIZE sprites to each image (N, 1, 64, 64) in L2.

    For a sprite s of zeros and ones |x − s|² = |x|² + Σ s·(1 − 2x). At each of the 1,024 positions the 720 sprites are
    drawn into a common window, and one matrix product compares them with all images.
    """
    blocks = images.split(4096)  # 100 MB of work each
    progress = Progress(len(blocks) * len(LATENTS["x"]) * len(LATENTS["y"]), what="search for sprites")
    parts = [find_nearest_of_part(block, progress) for block in blocks]
    latents, distances = (torch.cat(values) for values in zip(*parts, strict=True))
    with Progress(len(images), what="overlap with sprites", patience=SHORT) as progress:
        overlaps = []
        for part in zip(images.split(256), latents.split(256), strict=True):
            overlaps.append(measure_best_overlaps(*part))
            progress.advance(len(part[0]))
    return NearestSprites(latents, distances, torch.cat(overlaps))


def measure_best_overlaps(images: Tensor, latents: Tensor) -> Tensor:
    """Return the largest overlap (N,) of images (N, 1, 64, 64) with sprites of about given latents (N, 5), in [0, 1].

    These are the sprites themselves and those half a step away in one or more latents, for a sprite between two of the
    data set is one, too: halfway between two sizes it overlaps either by 0.82 to 0.95 only.
    """
    steps = latents.new_tensor(HALF_STEPS)
    neighbours = itertools.product((0,), *[(-1, 0, 1)] * (len(HALF_STEPS) - 1))
    overlaps = [measure_overlaps(images, latents + steps * steps.new_tensor(signs)) for signs in neighbours]
    return torch.stack(overlaps).amax(0)


def measure_overlaps(images: Tensor, latents: Tensor) -> Tensor:
    """Return the intersection over union (N,) of images (N, 1, 64, 64) and the sprites of latents (N, 5), in [0, 1].

    Pixels of an image above LIT count as lit. A soft measure, Σ min / Σ max, would not do: because of the noise of
    Langevin steps in the black background, real sprites of the smallest size have 0.88 by it.
    """
    is_lit, is_inside = images.flatten(1) > LIT, render_sprites(*latents.unbind(1)).flatten(1) > LIT
    return (is_lit & is_inside).sum(1) / (is_lit | is_inside).sum(1)


def find_nearest_of_part(images: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
    """Return the latents (N, 5) of the sprites nearest to images that fit into memory at once, and distances (N,)."""
    shape, scale, orientation, x, y = (torch.tensor(values, device=images.device) for values in LATENTS.values())
    cost = (1 - 2 * images[:, 0]).permute(1, 2, 0).contiguous()  # the cost of lighting a pixel, (64, 64, N)
    least = torch.full((len(images),), math.inf, device=images.device)
    best = torch.zeros(len(images), dtype=torch.long, device=images.device)
    for place in range(len(x) * len(y)):
        row, column, down, right = compute_window(x[place // len(y), None, None], y[place % len(y), None, None])
        sprites = find_lit_pixels(
            shape[:, None, None, None, None], scale[:, None, None, None], orientation[:, None, None], down, right
        )
        costs = sprites.view(-1, WINDOW**2).float() @ cost[row, column].flatten(0, 1)  # (720, N)
        lowest, sprite = costs.min(0)
        best = torch.where(lowest < least, sprite * len(x) * len(y) + place, best)
        least = torch.minimum(lowest, least)
        progress.update(progress.done + 1)
    squares = images.square().flatten(1).sum(1) + least
    return compute_latents(best), squares.clamp(min=0).sqrt()


# ---- the published file ----

MAX_LATENTS_SIZE = SIZE * (len(LATENTS) + 1) * 8 + 1_000  # bytes of the latents of all sprites, with their header


def read_published(
    path: str | os.PathLike[str], keep: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Read the published .npz file; return latents (N, 5) float32, and images as bits (N, 512) for `unpack_bits`.

    keep: latents -> which sprites to return, (N,) bool; default: all. The 3 GB of images are read in parts. Raises
    UsageError if the file is missing, damaged or another one.
    """
    if not os.path.exists(path):
        raise UsageError(f"`dsprites_path`={path}: no such file; leave the setting out to draw the sprites")
    try:
        with open_file(path) as file, Archive(file) as archive:
            latents = read_latents(archive)
            mask = torch.ones(len(latents), dtype=torch.bool) if keep is None else keep(latents)
            with archive.open("imgs.npy") as stream:
                return latents[mask], torch.from_numpy(read_bits(stream, mask.numpy()))
    except Exception as error:  # a damaged file can cause any error
        raise UsageError(
            f"`dsprites_path`={path} is damaged, or not the dSprites file: {describe_failure(error)}; "
            "replace it, or leave the setting out to draw the sprites"
        ) from error


def read_latents(archive: Archive) -> Tensor:
    """Read the latents (N, 5) float32 of a dSprites file; raise ValueError if they are none of LATENTS."""
    values = read_npy(archive, "latents_values.npy", MAX_LATENTS_SIZE)  # (N, 6); the colour is always white
    if values.ndim != 2 or values.shape[1] != len(LATENTS) + 1 or not 0 < len(values) <= SIZE:
        raise ValueError(f"latents_values has the shape {values.shape}, not (N, {len(LATENTS) + 1})")
    latents = torch.from_numpy(values[:, 1:].astype(np.float32))
    for column, (name, known) in zip(latents.unbind(1), LATENTS.items(), strict=True):
        if not ((column[:, None] - torch.tensor(known)).abs().amin(1) < 1e-4).all():
            raise ValueError(f"a {name} in latents_values is none of the data set's")
    return latents


def read_bits(stream: io.BufferedIOBase, mask: np.ndarray) -> np.ndarray:
    """Read an .npy stream of images uint8 (N, 64, 64); return those in the mask (N,) as bits, uint8 (M, 512)."""
    dtype, shape, order = read_npy_header(stream)
    if shape != (len(mask), SIDE, SIDE) or order != "C" or dtype != np.uint8:
        raise ValueError(f"imgs is {dtype} {shape}, not uint8 {(len(mask), SIDE, SIDE)}")
    bits = []
    with Progress(len(mask), what="reading sprite", patience=SHORT) as progress:
        for part in np.array_split(mask, math.ceil(len(mask) / 4096)):
            images = np.frombuffer(stream.read(len(part) * SIDE * SIDE), np.uint8).reshape(len(part), SIDE * SIDE)
            if images.max() > 1:
                raise ValueError("imgs holds other values than 0 and 1")
            bits.append(np.packbits(images[part], axis=1))
            progress.advance(len(part))
    if stream.read(1):  # reading to the end also verifies the checksum
        raise ValueError("imgs is longer than its header says")
    return np.concatenate(bits)


def unpack_bits(bits: Tensor) -> Tensor:
    """Return float32 images (N, 1, 64, 64) of 0 and 1, unpacked from their bits uint8 (N, 512)."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    return ((bits[:, :, None] >> shifts) & 1).view(-1, 1, SIDE, SIDE).float()
