"""Pictures for people: grids, panels and GIFs of images, curves, histograms and ROC curves.

Images are (N, C, H, W) in [0, 1] with C = 1 or 3. Functions that write a file make its folder and return its path.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ebm.support import metrics
from ebm.support.errors import UsageError
from ebm.support.files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WHITE = 255
# Okabe & Ito's palette, whose colours can be told apart by colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

# ---- images ----


def make_grid(images: Tensor, *, columns: int, padding: int = 2, scale: int = 1) -> np.ndarray:
    """Return a grid of images with white gaps, filled row by row: uint8 (height, width, C).

    `save_gif` and TensorBoard's HWC format take this array. scale: enlarges each pixel to a square of this side.
    padding: the gap, in pixels of the grid.
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


def make_panel(stages: Mapping[str, Tensor], *, padding: int = 2, scale: int = 1) -> np.ndarray:
    """Return a grid with a titled column per batch, such as {"start": ..., "sample": ..., "real": ...}.

    Row i shows image i of each batch; all batches have one shape. Returns uint8 (height, width, C) like `make_grid`.
    """
    images = torch.stack([batch.cpu() for batch in stages.values()], 1).flatten(0, 1)
    pixels = make_grid(images, columns=len(stages), padding=padding, scale=scale)
    return np.concatenate([draw_titles(list(stages), pixels.shape, images.shape[-1] * scale + padding), pixels])


def draw_titles(titles: list[str], shape: tuple[int, ...], step: int) -> np.ndarray:
    """Return a strip of column titles, uint8 (16, width, C): one title every `step` pixels.

    shape: of the grid below, (height, width, C). The font is small enough for the longest title to fit its column.
    """
    size = 12.0
    longest = max(ImageFont.load_default(size).getlength(title) for title in titles)
    font = ImageFont.load_default(min(size, size * step / longest))
    strip = Image.new("L", (shape[1], 16), WHITE)
    for i, title in enumerate(titles):
        ImageDraw.Draw(strip).text((i * step, 13), title, fill=0, font=font, anchor="ls")
    return np.repeat(np.asarray(strip)[..., None], shape[2], axis=2)


def save_pixels(pixels: np.ndarray, path: str | Path, *, sync: bool = True) -> Path:
    """Write an array uint8 (height, width, C) to an image file and return its path; .png in the name makes it a PNG.

    sync: see `write_file`.
    """
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    kind = Image.registered_extensions()[Path(path).suffix.lower()]
    return write_file(path, lambda file: image.save(file, kind), sync=sync)


def save_grid(images: Tensor, path: str | Path, *, columns: int, padding: int = 2, scale: int = 1) -> Path:
    """Write a grid of images to a file and return its path, see `make_grid`."""
    return save_pixels(make_grid(images, columns=columns, padding=padding, scale=scale), path)


def save_panel(stages: Mapping[str, Tensor], path: str | Path, *, padding: int = 2, scale: int = 1) -> Path:
    """Write a panel of named batches to a file and return its path, see `make_panel`."""
    return save_pixels(make_panel(stages, padding=padding, scale=scale), path)


def save_gif(frames: Sequence[np.ndarray], path: str | Path, *, fps: float = 20) -> Path:
    """Write frames uint8 (height, width, C) to a GIF that repeats forever, and return its path.

    The format counts time in hundredths of a second. Equal consecutive frames are merged into one longer frame.
    """
    first, *rest = [Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame) for frame in frames]
    options: dict[str, Any] = {"save_all": True, "append_images": rest, "duration": 1000 / fps, "loop": 0}
    return write_file(path, lambda file: first.save(file, "GIF", **options))


def save_film(frames: Sequence[np.ndarray], path: Path, *, fps: float = 20) -> Path | None:
    """Write frames uint8 (height, width, 1 or 3) to a film with ffmpeg and return its path.

    Prints a note and returns None if ffmpeg is missing or fails.
    """
    program = shutil.which("ffmpeg")
    if program is None:
        print(f"note: no {path.name}, ffmpeg is not installed")
        return None
    height, width, channels = frames[0].shape
    kind = "gray" if channels == 1 else "rgb24"
    source = f"-f rawvideo -pix_fmt {kind} -s {width}x{height} -r {fps} -i -"
    even = "-vf pad=ceil(iw/2)*2:ceil(ih/2)*2 -pix_fmt yuv420p"  # most players need even sides and yuv420p
    pixels = b"".join(frame.tobytes() for frame in frames)
    # ffmpeg cannot write an MP4 file from its beginning to its end, so that it needs a file of its own.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        film = Path(folder) / path.name
        command = [program, *f"-y -loglevel error {source} {even}".split(), str(film)]
        process = subprocess.run(command, input=pixels, capture_output=True, check=False)
        if process.returncode:
            reason = process.stderr.decode(errors="replace").strip().split("\n")[-1]
            print(f"note: no {path.name}, ffmpeg failed ({reason})")
            return None
        return write_file(path, lambda file: file.write(film.read_bytes()))


# ---- plots, made without pyplot because it keeps global state ----


def plot_lines(
    panels: Mapping[str, Mapping[str, tuple[ArrayLike, ArrayLike]]],
    path: str | Path,
    *,
    xlabel: str,
    title: str = "",
    log: bool = False,
) -> Path:
    """Plot lines in panels that share one x axis, and return the file's path.

    panels: {y label: {name of the line: (x, y)}}. log: make the y axes logarithmic.
    """
    figure, axes = make_figure(len(panels), title)
    for axis, (ylabel, lines) in zip(axes, panels.items(), strict=True):
        for k, (name, (x, y)) in enumerate(lines.items()):
            colour, style = COLOURS[k % len(COLOURS)], "-" if k < len(COLOURS) else "--"
            marker = "." if np.size(x) <= 20 else ""  # dots mark the few measured points on the line
            axis.plot(
                np.asarray(x), np.asarray(y), style, color=colour, label=escape_text(name), linewidth=1.5, marker=marker
            )
        axis.set(ylabel=ylabel, yscale="log" if log else "linear")
        if all(np.issubdtype(np.asarray(x).dtype, np.integer) for x, _ in lines.values()):
            axis.locator_params(axis="x", integer=True)  # integers, such as iterations, get integer ticks
        add_legend(axis)
    axes[-1].set_xlabel(xlabel)
    return save_figure(figure, path)


def plot_histograms(
    samples: Mapping[str, ArrayLike], path: str | Path, *, xlabel: str, title: str = "", bins: int = 60
) -> Path:
    """Plot the density histogram of each named set of numbers over common bins, and return the file's path."""
    figure, (axis,) = make_figure(1, title)
    arrays = {name: np.asarray(values).ravel() for name, values in samples.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(arrays.values())), bins).tolist()
    for colour, (name, values) in zip(cycle(COLOURS), arrays.items(), strict=False):
        axis.hist(
            values,
            edges,
            density=True,
            histtype="stepfilled",
            facecolor=(colour, 0.25),
            edgecolor=colour,
            label=escape_text(name),
        )
    axis.set(xlabel=xlabel, ylabel="density")
    add_legend(axis)
    return save_figure(figure, path)


def plot_bars(groups: Mapping[str, Mapping[str, float]], path: str | Path, *, ylabel: str, title: str = "") -> Path:
    """Plot groups of bars side by side, and return the file's path.

    groups: {legend: {place on the x axis: height}}; a missing place leaves a gap.
    """
    figure, (axis,) = make_figure(1, title)
    places = list(dict.fromkeys(place for bars in groups.values() for place in bars))
    width = 0.8 / len(groups)
    for i, (colour, (name, bars)) in enumerate(zip(cycle(COLOURS), groups.items(), strict=False)):
        x = [places.index(place) + (i - (len(groups) - 1) / 2) * width for place in bars]
        axis.bar(x, list(bars.values()), width, color=colour, label=escape_text(name))
    axis.set_xticks(range(len(places)), list(map(escape_text, places)))
    axis.set_ylabel(ylabel)
    add_legend(axis)
    return save_figure(figure, path)


def plot_roc(scores: Mapping[str, tuple[ArrayLike, ArrayLike]], path: str | Path, *, title: str = "") -> Path:
    """Plot the ROC curve of each named pair (in_scores, out_scores), and return the file's path.

    The legend shows the AUROC.
    """
    figure, (axis,) = make_figure(1, title)
    for colour, (name, pair) in zip(cycle(COLOURS), scores.items(), strict=False):
        label = f"{escape_text(name)}, AUROC {metrics.auroc(*pair):.3f}"
        axis.plot(*metrics.roc_curve(*pair), color=colour, label=label, linewidth=1.5)
    axis.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1)
    axis.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    add_legend(axis)
    return save_figure(figure, path)


def import_figure() -> type[Figure]:
    """Import matplotlib's figure, with its own defaults instead of what the environment says about screens and styles.

    A notebook, for example, asks for a backend in MPLBACKEND that only its own Python has. Raises UsageError if a file
    matplotlibrc in the working directory, which matplotlib always reads, is no text.
    """
    with mock.patch.dict(os.environ, {"MPLBACKEND": "agg", "MATPLOTLIBRC": os.devnull}):
        try:
            from matplotlib import rcdefaults
            from matplotlib.figure import Figure
        except UnicodeDecodeError:
            raise UsageError(
                "matplotlib cannot read matplotlibrc in the working directory; correct or remove it"
            ) from None
    rcdefaults()
    return Figure


def make_figure(panels: int, title: str) -> tuple[Figure, list[Axes]]:
    """Return an empty matplotlib figure and its axes, one per panel, stacked over a shared x axis."""
    figure = import_figure()(figsize=(7, 2 + 2 * panels), dpi=150, layout="constrained")
    axes = list(figure.subplots(panels, sharex=True, squeeze=False)[:, 0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="0.9", linewidth=0.8)
        axis.set_axisbelow(True)
    axes[0].set_title(escape_text(title), loc="left")
    return figure, axes


def escape_text(text: str) -> str:
    """Return text that matplotlib draws as it is: without formulas, and with escapes for what is no Unicode text.

    A label that begins with an underscore would be left out of the legend.
    """
    return " " * text.startswith("_") + text.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")


def add_legend(axis: Axes) -> None:
    """Add a legend to the right of the panel, where it covers no data."""
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), labelcolor=COLOURS)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a matplotlib figure to a file and return its path."""
    return write_file(path, lambda file: figure.savefig(file, format=Path(path).suffix[1:]))
