"""Pictures for people: grids, panels and GIFs of images, curves, histograms and ROC curves.

Images are (N, C, H, W) in [0, 1] with C = 1 or 3. Whatever writes a file makes its folder and returns its path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

import metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WHITE = 255
# Okabe & Ito's palette: its colours stay apart for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

# ---- images ----


def grid(images: Tensor, *, columns: int, padding: int = 2, scale: int = 1) -> np.ndarray:
    """Lay images out row by row with white gaps: uint8 (height, width, C), as `save_gif` and TensorBoard's HWC take it.

    `scale` enlarges each pixel to a square of that side; `padding` is the gap in final pixels.
    """
    pixels = (images.detach().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    pixels = pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    count, height, width, channels = pixels.shape
    rows = -(-count // columns)  # the last one may be incomplete
    down, right = height + padding, width + padding
    canvas = np.full((rows * down - padding, columns * right - padding, channels), WHITE, np.uint8)
    for i, image in enumerate(pixels.numpy()):
        top, left = i // columns * down, i % columns * right
        canvas[top : top + height, left : left + width] = image
    return canvas


def panel(stages: Mapping[str, Tensor], *, padding: int = 2, scale: int = 1) -> np.ndarray:
    """One row per image, one column per named batch, such as {"start": ..., "sample": ..., "real": ...}.

    The batches have one shape; their names stand above the columns. Returns uint8 (height, width, C), like `grid`.
    """
    images = torch.stack([batch.cpu() for batch in stages.values()], 1).flatten(0, 1)
    pixels = grid(images, columns=len(stages), padding=padding, scale=scale)
    return np.concatenate([_column_titles(list(stages), pixels.shape, images.shape[-1] * scale + padding), pixels])


def _column_titles(titles: list[str], shape: tuple[int, ...], step: int) -> np.ndarray:
    """A strip as wide as the pixels of `shape`, one title every `step` pixels, small enough for the longest to fit."""
    from PIL import Image, ImageDraw, ImageFont

    size = 12.0
    longest = max(ImageFont.load_default(size).getlength(title) for title in titles)
    font = ImageFont.load_default(min(size, size * step / longest))
    strip = Image.new("L", (shape[1], 16), WHITE)
    for i, title in enumerate(titles):
        ImageDraw.Draw(strip).text((i * step, 13), title, fill=0, font=font, anchor="ls")
    return np.repeat(np.asarray(strip)[..., None], shape[2], axis=2)


def save_pixels(pixels: np.ndarray, path: str | Path) -> Path:
    """Write uint8 (height, width, C) as a picture, PNG by its name."""
    from PIL import Image

    path = _with_folder(path)
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(path)
    return path


def save_grid(images: Tensor, path: str | Path, *, columns: int, padding: int = 2, scale: int = 1) -> Path:
    """Write `grid` of the images."""
    return save_pixels(grid(images, columns=columns, padding=padding, scale=scale), path)


def save_panel(stages: Mapping[str, Tensor], path: str | Path, *, padding: int = 2, scale: int = 1) -> Path:
    """Write `panel` of the named batches."""
    return save_pixels(panel(stages, padding=padding, scale=scale), path)


def save_gif(frames: Sequence[np.ndarray], path: str | Path, *, fps: float = 20) -> Path:
    """Write uint8 frames (height, width, C), such as `grid` returns, as an endless GIF.

    GIF counts time in hundredths of a second. A frame equal to the one before lengthens that one instead.
    """
    from PIL import Image

    path = _with_folder(path)
    first, *rest = [Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame) for frame in frames]
    first.save(path, save_all=True, append_images=rest, duration=1000 / fps, loop=0)
    return path


# ---- plots: matplotlib's objects without pyplot, which would keep global state ----


def plot_lines(
    panels: Mapping[str, Mapping[str, tuple[ArrayLike, ArrayLike]]],
    path: str | Path,
    *,
    xlabel: str,
    title: str = "",
    log: bool = False,
) -> Path:
    """Stack panels over one x axis: {y label: {line's name: (x, y)}}; `log` makes the y axes logarithmic."""
    figure, axes = _figure(len(panels), title)
    for axis, (ylabel, lines) in zip(axes, panels.items(), strict=True):
        for k, (name, (x, y)) in enumerate(lines.items()):
            colour, style = COLOURS[k % len(COLOURS)], "-" if k < len(COLOURS) else "--"
            few = np.size(x) <= 20  # then dots tell what was measured from the lines between
            marker = "." if few else ""
            axis.plot(np.asarray(x), np.asarray(y), style, color=colour, label=name, linewidth=1.5, marker=marker)
        axis.set(ylabel=ylabel, yscale="log" if log else "linear")
        if all(np.issubdtype(np.asarray(x).dtype, np.integer) for x, _ in lines.values()):
            axis.locator_params(axis="x", integer=True)  # no half iterations, no half concepts
        _legend(axis)
    axes[-1].set_xlabel(xlabel)
    return _save(figure, path)


def plot_histograms(
    samples: Mapping[str, ArrayLike], path: str | Path, *, xlabel: str, title: str = "", bins: int = 60
) -> Path:
    """Draw the density of each named set of numbers over common bins."""
    figure, (axis,) = _figure(1, title)
    arrays = {name: np.asarray(values).ravel() for name, values in samples.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(arrays.values())), bins).tolist()
    for colour, (name, values) in zip(cycle(COLOURS), arrays.items(), strict=False):
        axis.hist(
            values, edges, density=True, histtype="stepfilled", facecolor=(colour, 0.25), edgecolor=colour, label=name
        )
    axis.set(xlabel=xlabel, ylabel="density")
    _legend(axis)
    return _save(figure, path)


def plot_bars(groups: Mapping[str, Mapping[str, float]], path: str | Path, *, ylabel: str, title: str = "") -> Path:
    """Draw bars side by side: {legend: {place on the x axis: height}}; a missing place leaves a gap."""
    figure, (axis,) = _figure(1, title)
    places = list(dict.fromkeys(place for bars in groups.values() for place in bars))
    width = 0.8 / len(groups)
    for i, (colour, (name, bars)) in enumerate(zip(cycle(COLOURS), groups.items(), strict=False)):
        x = [places.index(place) + (i - (len(groups) - 1) / 2) * width for place in bars]
        axis.bar(x, list(bars.values()), width, color=colour, label=name)
    axis.set_xticks(range(len(places)), places)
    axis.set_ylabel(ylabel)
    _legend(axis)
    return _save(figure, path)


def plot_roc(scores: Mapping[str, tuple[ArrayLike, ArrayLike]], path: str | Path, *, title: str = "") -> Path:
    """Draw the ROC curve of each named pair (in_scores, out_scores), its AUROC in the legend."""
    figure, (axis,) = _figure(1, title)
    for colour, (name, pair) in zip(cycle(COLOURS), scores.items(), strict=False):
        label = f"{name}, AUROC {metrics.auroc(*pair):.3f}"
        axis.plot(*metrics.roc_curve(*pair), color=colour, label=label, linewidth=1.5)
    axis.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1)
    axis.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    _legend(axis)
    return _save(figure, path)


def _figure(panels: int, title: str) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2 + 2 * panels), dpi=150, layout="constrained")
    axes = list(figure.subplots(panels, sharex=True, squeeze=False)[:, 0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="0.9", linewidth=0.8)
        axis.set_axisbelow(True)
    axes[0].set_title(title, loc="left")
    return figure, axes


def _legend(axis: Axes) -> None:
    """Name the lines beside the panel, where no data is covered."""
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), labelcolor=COLOURS)


def _save(figure: Figure, path: str | Path) -> Path:
    path = _with_folder(path)
    figure.savefig(path)
    return path


def _with_folder(path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
