"""The distance of samples to data in patches of several scales and in tones, which needs neither a network nor classes.

    real = compute_patch_statistics(real_images)
    measure_patches(samples, real)  # {"patch_distance": …, "tone_distance": …}

Features that a classifier has learnt can be met by textured noise, which looks like no image of the data. Patches
cannot: a filter's responses to noise have another distribution than its responses to images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ebm.support.metrics import compute_quantiles, total_variation
from ebm.support.pixels import to_bytes
from ebm.support.progress import show_waiting

# What determines the statistics of real images: a cache file of another choice is of no use.
CHOICES = {"side": 7, "directions": 128, "quantiles": 512, "tones": 32}
MAX_IMAGES = 2_000  # largest number of images of each set whose patches are compared
BATCH = 250  # images whose patches are filtered at once
LEAST_SIDE = 14  # shorter sides are not halved
LEAST_DEVIATION = 1 / 255  # of a level of the pyramid: a level that is constant in real images is not divided by 0


@dataclasses.dataclass(frozen=True)
class PatchStatistics:
    """What real images are like in patches and in tones.

    filters: for each level of the pyramid, (directions, C, side, side): unit vectors, divided by the standard deviation
    of the channel in real images. quantiles: of what the filters respond, (quantiles, directions). tones: the histogram
    of each channel's pixels, (C, tones).
    """

    filters: Sequence[Tensor]
    quantiles: Sequence[Tensor]
    tones: Tensor


def build_pyramid(images: Tensor) -> list[Tensor]:
    """Return the Laplacian pyramid of images (N, C, H, W): what each halving of the sides loses, then what is left."""
    levels = []
    while min(images.shape[2:]) >= LEAST_SIDE:
        halved = F.avg_pool2d(images, 2, ceil_mode=True)
        levels.append(images - F.interpolate(halved, images.shape[2:], mode="bilinear", align_corners=False))
        images = halved
    return [*levels, images]


def compute_deviations(images: Tensor) -> list[Tensor]:
    """Return the deviations of the channels (C,) on each level of the pyramid of images uint8 (N, C, H, W)."""
    parts = [
        [
            torch.stack([level.mean((0, 2, 3)), level.square().mean((0, 2, 3))]) * (len(batch) / len(images))
            for level in build_pyramid(batch / 255)
        ]
        for batch in images.split(BATCH)
    ]
    moments = [torch.stack(level).sum(0) for level in zip(*parts, strict=True)]
    return [(square - mean.square()).clamp(min=0).sqrt() for mean, square in moments]


def draw_filters(shape: Sequence[int], deviations: Tensor, generator: torch.Generator) -> Tensor:
    """Return random filters for a level (N, C, H, W) of the pyramid, see `PatchStatistics`.

    deviations: those of its channels in real images (C,).
    """
    _, channels, height, width = shape
    side = min(CHOICES["side"], height, width)
    directions = torch.randn(CHOICES["directions"], channels * side * side, generator=generator)
    filters = F.normalize(directions).view(-1, channels, side, side).to(deviations.device)
    return filters / deviations.clamp(min=LEAST_DEVIATION).view(1, -1, 1, 1)


def filter_patches(level: Tensor, filters: Tensor) -> Tensor:
    """Return what filters respond to patches of a level: (patches, directions), at most about 121 patches an image."""
    stride = max(3, max(level.shape[2:]) // 10)
    return F.conv2d(level, filters, stride=stride).permute(0, 2, 3, 1).flatten(0, 2)


def compute_responses(images: Tensor, filters: Sequence[Tensor]) -> list[Tensor]:
    """Return the quantiles (quantiles, directions) of what the filters of each level respond to images uint8."""
    parts = [map(filter_patches, build_pyramid(batch / 255), filters) for batch in images.split(BATCH)]
    return [compute_quantiles(torch.cat(level), CHOICES["quantiles"]) for level in zip(*parts, strict=True)]


def compute_tones(images: Tensor) -> Tensor:
    """Return the histogram of each channel's pixels, of images uint8 (N, C, H, W): (C, tones), whose rows sum to 1."""
    bins = (images // (256 // CHOICES["tones"])).transpose(0, 1).flatten(1)
    return torch.stack([channel.bincount(minlength=CHOICES["tones"]) for channel in bins]) / bins.shape[1]


def compute_patch_statistics(images: Tensor) -> PatchStatistics:
    """Return the statistics of real images, uint8 (N, C, H, W); the directions of the filters are always the same."""
    generator, shapes = torch.Generator().manual_seed(0), [level.shape for level in build_pyramid(images[:1] / 255)]
    with show_waiting(f"filtering the patches of {len(images):,} real images"):
        filters = [draw_filters(*pair, generator) for pair in zip(shapes, compute_deviations(images), strict=True)]
        return PatchStatistics(filters, compute_responses(images, filters), compute_tones(images))


def measure_patches(images: Tensor, real: PatchStatistics) -> dict[str, float]:
    """Return the distances of images (N, C, H, W), uint8 or finite float in [0, 1], to real ones: of patches, of tones.

    patch_distance: the sliced 1-Wasserstein distance of patches of 7x7 pixels on the levels of a Laplacian pyramid, in
    standard deviations of the real images' level, mean over the levels (Karras et al. 2018, section 5). There each set
    is divided by its own deviation; here both are divided by that of the real images, so that contrast counts.
    tone_distance: the total variation distance of the histograms of pixels over 32 tones, in [0, 1], mean over the
    channels. Both are of at most 2,000 images; a small number biases them upwards.
    """
    images = images[:MAX_IMAGES]
    images = images if images.dtype == torch.uint8 else to_bytes(images)
    with show_waiting(f"filtering the patches of {len(images):,} images"):
        responses = compute_responses(images, [filters.to(images.device) for filters in real.filters])
    distances = [(a - b.to(a.device)).abs().mean() for a, b in zip(responses, real.quantiles, strict=True)]
    return {
        "patch_distance": float(torch.stack(distances).mean()),
        "tone_distance": float(total_variation(compute_tones(images), real.tones.to(images.device)).mean()),
    }


def build_patch_statistics(contents: Mapping[str, Any]) -> PatchStatistics:
    """Return the statistics in a cache file; raise ValueError unless their shapes fit and they are finite."""
    real = PatchStatistics(contents["filters"], contents["quantiles"], contents["tones"])
    for filters, quantiles in zip(real.filters, real.quantiles, strict=True):
        if quantiles.shape != (CHOICES["quantiles"], len(filters)) or filters.ndim != 4:
            raise ValueError("its statistics of patches do not fit together")
    if real.tones.shape[1:] != (CHOICES["tones"],):
        raise ValueError("its tones do not fit")
    if not all(tensor.isfinite().all() for tensor in (*real.filters, *real.quantiles, real.tones)):
        raise ValueError("its statistics are not finite")
    return real
