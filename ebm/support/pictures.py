"""Pictures for people: grids, panels and GIFs of images, curves, histograms and ROC curves.

Images are (N, C, H, W) in [0, 1] with C = 1 or 3. Functions that write a file make its folder and return its path.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import shutil
import subprocess
import tempfile
import textwrap
from collections.abc import Collection, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.nn import functional

from ebm.support import metrics
from ebm.support.errors import UsageError
from ebm.support.files import write_file
from ebm.support.progress import show_waiting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WHITE = 255
SIDE, LEAST_SIDE = 2_000, 400  # about the longest side of the largest and of the smallest picture of images, in pixels
CELL = 96  # an image is enlarged until its longest side has so many pixels
LEAST_CELL = 48  # rows are left out of a panel rather than images made smaller than this
GAP, BLOCK_GAP = 2, 16  # space between images, and between blocks of them
LINE = 18  # height of a line of text
TITLE_WIDTH = 260  # of a row at most
FONT_SIZES = (10, 11, 12, 13)
FIRST_PAUSE, LAST_PAUSE = 0.5, 2.0  # seconds that a GIF rests on its first and on its last frame
LINE_STYLES = ("-", "--", "-.", ":")
LONG_LINE = 50  # points from which on a noisy line is also drawn as a mean
MOST_PALE = 4  # lines in a panel whose values are drawn below their means; those of more would hide each other
# Okabe & Ito's palette, whose colours can be told apart by colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

# ---- images ----


def make_grid(images: Tensor, *, columns: int, titles: Sequence[str] = (), scale: float | None = None) -> np.ndarray:
    """Return a grid of images with white gaps, filled row by row: uint8 (height, width, C).

    `save_gif` and TensorBoard's HWC format take this array. titles: one above each image; if every row has those of the
    first, they stand above the first alone. scale: the size of an image in the grid, as a factor; by default it is
    chosen for a picture, see `choose_scale`.
    """
    rows = -(-len(images) // columns)  # the last one may be incomplete
    pixels = scale_pixels(images, choose_scale(images.shape[2:], columns, rows) if scale is None else scale)
    _, height, width, channels = pixels.shape
    step = width + GAP
    strip = (LINE, columns * step - GAP, channels)
    font = fit_font(titles, width)
    is_head = all(title == titles[i % columns] for i, title in enumerate(titles))
    parts: list[np.ndarray] = []
    for start in range(0, len(images), columns):
        if titles and (start == 0 or not is_head):
            places = [(i * step + width // 2, LINE // 2) for i in range(columns)]
            parts.append(draw_texts(titles[start : start + columns], strip, places, width, font, anchor="mm"))
        elif start:
            parts.append(np.full((GAP, *strip[1:]), WHITE, np.uint8))
        line = np.full((height, *strip[1:]), WHITE, np.uint8)
        for i, image in enumerate(pixels[start : start + columns]):
            line[:, i * step : i * step + width] = image
        parts.append(line)
    return np.concatenate(parts)


def make_panel(
    stages: Mapping[str, Tensor], *, rows: Sequence[str] = (), note: str = "", scale: float | None = None
) -> np.ndarray:
    """Return a picture with a titled column per batch, such as {"start": ..., "sample": ..., "real": ...}.

    Row i shows image i of each batch, and its title, if there are any; all batches have one shape. Many rows stand in
    several blocks side by side, so that the picture is about as wide as high. note: a text below the images. Rows that
    would make the images too small to see are left out, which the note then says. scale: see `make_grid`. Returns uint8
    (height, width, C).
    """
    count, columns = len(next(iter(stages.values()))), len(stages)
    font = fit_font(rows, TITLE_WIDTH)
    title_width = min(TITLE_WIDTH, math.ceil(max(map(font.getlength, map(make_drawable, rows)), default=0)))
    places = count_places(columns, title_width)
    across = SIDE // LEAST_CELL  # images that have room beside or below each other
    most = across * max(1, across // places)
    images = torch.stack([batch[:most].cpu() for batch in stages.values()], 1)  # (rows, columns, C, H, W)
    if most < count:
        note = f"the first {most} of {count} rows" + "; " * bool(note) + note
    number = choose_blocks(len(images), columns, images.shape[3:], title_width)
    size = -(-len(images) // number)
    scale = choose_scale(images.shape[3:], number * places, size) if scale is None else scale
    blocks: list[np.ndarray] = []
    for start in range(0, len(images), size):
        part, titles = images[start : start + size], rows[start : start + size]
        block = make_grid(part.flatten(0, 1), columns=columns, titles=[*stages] * len(part), scale=scale)
        if titles:
            block = np.concatenate([draw_row_titles(titles, block.shape, title_width, font), block], 1)
        missing = len(blocks[0]) - len(block) if blocks else 0  # pixels; the last block may have fewer rows
        around = (0, missing), (BLOCK_GAP if blocks else 0, 0), (0, 0)
        blocks.append(np.pad(block, around, constant_values=WHITE))
    picture = np.concatenate(blocks, 1)
    return np.concatenate([picture, draw_note(note, picture.shape)]) if note else picture


def choose_scale(shape: Sequence[int], columns: int, rows: int) -> float:
    """Return the factor by which images of a shape (H, W) are scaled in a grid: a whole number, or one below 1.

    Small images are enlarged, and so are all in a small grid. A grid is made smaller than SIDE x SIDE pixels.
    """
    longest = max(shape[0] * rows, shape[1] * columns)
    wanted = max(math.ceil(CELL / max(shape)), math.ceil(LEAST_SIDE / longest))
    return min(wanted, SIDE // longest) if longest <= SIDE else SIDE / longest


def choose_blocks(rows: int, columns: int, shape: Sequence[int], title_width: int) -> int:
    """Return in how many blocks side by side rows of images make the picture that is nearest to a square.

    shape: (H, W) of an image. title_width: the room for the titles of a block's rows, in pixels.
    """

    def compute_ratio(blocks: int) -> float:
        size = math.ceil(rows / blocks)
        scale = choose_scale(shape, blocks * count_places(columns, title_width), size)
        height = size * (scale * shape[0] + GAP)
        width = blocks * (title_width + columns * (scale * shape[1] + GAP) + BLOCK_GAP)
        return max(width / height, height / width)

    return min(range(1, rows + 1), key=compute_ratio)


def count_places(columns: int, title_width: int) -> int:
    """Return the length of a row in images, if its title takes the room of some."""
    return columns + math.ceil(title_width / CELL)


def choose_columns(number: int, classes: int = 0) -> int:
    """Return the number of columns of a grid of images that is about square.

    classes: if the images are of this many classes in turn, each column has one class, unless these are too many.
    """
    usual = math.ceil(math.sqrt(number))
    columns = classes * max(1, round(usual / classes)) if classes else usual
    return columns if columns <= 2 * usual else usual


def scale_pixels(images: Tensor, scale: float) -> np.ndarray:
    """Return images (N, C, H, W), scaled by a factor, as uint8 (N, height, width, C).

    Each pixel becomes a square, or, if the factor is below 1, is averaged with others.
    """
    images = images.detach().cpu().clamp(0, 1)
    if scale < 1:
        size = [max(1, int(scale * side)) for side in images.shape[2:]]
        images = functional.interpolate(images, size, mode="area")
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1)
    return pixels.repeat_interleave(max(1, int(scale)), 1).repeat_interleave(max(1, int(scale)), 2).numpy()


# ---- texts in pictures of images ----


@functools.cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Load the font that matplotlib brings; Pillow's own has neither accents nor arrows."""
    package = importlib.util.find_spec("matplotlib")
    assert package is not None and package.origin is not None, "requirements.txt has matplotlib"
    return ImageFont.truetype(Path(package.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf", size)


def fit_font(texts: Sequence[str], width: int) -> ImageFont.FreeTypeFont:
    """Return the largest font in which every text is at most `width` pixels long, or else the smallest one."""
    longest = max(texts, key=len, default="")
    sizes = [size for size in FONT_SIZES if load_font(size).getlength(make_drawable(longest)) <= width]
    return load_font(max(sizes, default=min(FONT_SIZES)))


def make_drawable(text: str) -> str:
    """Return text in one line, with escapes for what is no Unicode text."""
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())


def draw_texts(
    texts: Sequence[str],
    shape: tuple[int, ...],
    places: Sequence[tuple[int, int]],
    width: int,
    font: ImageFont.FreeTypeFont,
    *,
    anchor: str,
) -> np.ndarray:
    """Return texts, black on white, at places (x, y): uint8 of a shape (height, width, C).

    width: a longer text is cut, and ends with "…". anchor: Pillow's, which says what of a text is at its place.
    """
    picture = Image.new("L", (shape[1], shape[0]), WHITE)
    for text, place in zip(map(make_drawable, texts), places, strict=False):
        shown = text
        while font.getlength(shown) > width and len(shown) > 1:
            shown = shown[:-2] + "…"
        ImageDraw.Draw(picture).text(place, shown, fill=0, font=font, anchor=anchor)
    return np.repeat(np.asarray(picture)[..., None], shape[2], axis=2)


def draw_row_titles(
    titles: Sequence[str], shape: tuple[int, ...], width: int, font: ImageFont.FreeTypeFont
) -> np.ndarray:
    """Return a title for each row of a grid of a shape (height, width, C) with titled columns, for its left side."""
    step = (shape[0] - LINE + GAP) / len(titles)
    places = [(width, round(LINE + (i + 0.5) * step - GAP / 2)) for i in range(len(titles))]
    return draw_texts(titles, (shape[0], width + BLOCK_GAP // 2, shape[2]), places, width, font, anchor="rm")


def draw_note(note: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return lines of text for below a picture of a shape (height, width, C): uint8 (lines, width, C)."""
    font = load_font(FONT_SIZES[-2])
    note = make_drawable(note)
    lines = textwrap.wrap(note, max(10, int(0.95 * len(note) * shape[1] / font.getlength(note))))
    places = [(0, round((i + 0.5) * LINE)) for i in range(len(lines))]
    return draw_texts(lines, (len(lines) * LINE, *shape[1:]), places, shape[1], font, anchor="lm")


# ---- files of images ----


def save_pixels(pixels: np.ndarray, path: str | Path, *, sync: bool = True) -> Path:
    """Write an array uint8 (height, width, C) to an image file and return its path; .png in the name makes it a PNG.

    sync: see `write_file`.
    """
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    kind = Image.registered_extensions()[Path(path).suffix.lower()]
    return write_file(path, lambda file: image.save(file, kind), sync=sync)


def save_grid(images: Tensor, path: str | Path, *, columns: int, titles: Sequence[str] = ()) -> Path:
    """Write a grid of images to a file and return its path, see `make_grid`."""
    return save_pixels(make_grid(images, columns=columns, titles=titles), path)


def save_gallery(gallery: Mapping[str, Image.Image], path: str | Path) -> Path:
    """Write pictures of any sizes, each under its title, to one file of about SIDE x SIDE pixels; return its path.

    gallery: colour pictures by title. Those that are too large are made smaller.
    """
    columns = choose_columns(len(gallery))
    room = SIDE // columns
    tiles = [np.asarray(ImageOps.contain(image, (room, room)) if max(image.size) > room else image)
             for image in gallery.values()]  # fmt: skip
    width, titles = max(tile.shape[1] for tile in tiles), list(gallery)
    font, rows = fit_font(titles, width), list[np.ndarray]()
    for start in range(0, len(tiles), columns):
        line = tiles[start : start + columns]
        height = max(tile.shape[0] for tile in line) + LINE + BLOCK_GAP
        row = np.full((height, columns * (width + BLOCK_GAP) - BLOCK_GAP, 3), WHITE, np.uint8)
        for i, tile in enumerate(line):
            left = i * (width + BLOCK_GAP)
            shape = (LINE, width, 3)
            row[:LINE, left : left + width] = draw_texts(
                titles[start + i : start + i + 1], shape, [(0, LINE // 2)], width, font, anchor="lm"
            )
            row[LINE : LINE + tile.shape[0], left : left + tile.shape[1]] = tile
        rows.append(row)
    return save_pixels(np.concatenate(rows)[:-BLOCK_GAP], path)


def save_panel(stages: Mapping[str, Tensor], path: str | Path, *, rows: Sequence[str] = (), note: str = "") -> Path:
    """Write a panel of named batches to a file and return its path, see `make_panel`."""
    return save_pixels(make_panel(stages, rows=rows, note=note), path)


def list_durations(number: int, fps: float) -> list[float]:
    """Return how long each of `number` frames is shown, in seconds: the first and the last one longer than the rest."""
    durations = [FIRST_PAUSE, *[1 / fps] * (number - 2), LAST_PAUSE]
    return durations if number > 1 else [LAST_PAUSE]


def save_gif(frames: Sequence[np.ndarray], path: str | Path, *, fps: float = 20) -> Path:
    """Write frames uint8 (height, width, C) to a GIF that repeats forever, and return its path.

    It pauses on the first and on the last frame. The format counts time in hundredths of a second. Equal consecutive
    frames are merged into one longer frame.
    """
    first, *rest = [Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame) for frame in frames]
    durations = [1000 * seconds for seconds in list_durations(len(frames), fps)]
    options: dict[str, Any] = {"save_all": True, "append_images": rest, "duration": durations, "loop": 0}
    with show_waiting(f"packing {len(frames):,} frames into {path}"):
        return write_file(path, lambda file: first.save(file, "GIF", **options))


def save_film(frames: Sequence[np.ndarray], path: Path, *, fps: float = 20) -> Path | None:
    """Write frames uint8 (height, width, 1 or 3) to a film with ffmpeg and return its path.

    It pauses as a GIF of `save_gif` does. Prints a note and returns None if ffmpeg is missing or fails.
    """
    program = shutil.which("ffmpeg")
    if program is None:
        print(f"note: no {path.name}, ffmpeg is not installed")
        return None
    height, width, channels = frames[0].shape
    kind = "gray" if channels == 1 else "rgb24"
    source = f"-f rawvideo -pix_fmt {kind} -s {width}x{height} -r {fps} -i -"
    even = "-vf pad=ceil(iw/2)*2:ceil(ih/2)*2 -pix_fmt yuv420p"  # most players need even sides and yuv420p
    repeats = [round(seconds * fps) for seconds in list_durations(len(frames), fps)]
    pixels = b"".join(frame.tobytes() * count for frame, count in zip(frames, repeats, strict=True))
    # ffmpeg cannot write an MP4 file from its beginning to its end, so that it needs a file of its own.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        film = Path(folder) / path.name
        command = [program, *f"-y -loglevel error {source} {even}".split(), str(film)]
        with show_waiting(f"packing {len(frames):,} frames into {path}"):
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
    log: Collection[str] = (),
    shares: Collection[str] = (),
    smooth: bool = False,
    columns: int = 1,
) -> Path:
    """Plot lines in panels that share one x axis, and return the file's path.

    panels: {y label: {name of the line: (x, y)}}. log: the labels of axes that are logarithmic if all their values are
    positive. shares: the y labels of axes from 0 to 1. smooth: draw a line of more than LONG_LINE points pale, and its
    mean over a window of points on top; in a panel of more than MOST_PALE lines only the mean. columns: in which the
    panels stand; in several columns all panels have lines of the same names, some perhaps without points, and one
    legend.
    """
    figure, axes = make_figure(len(panels), title, columns)
    has_means = False
    for axis, (ylabel, lines) in zip(axes, panels.items(), strict=True):
        arrays = {
            name: (np.asarray(x) if np.size(x) else np.zeros(0, int), np.asarray(y)) for name, (x, y) in lines.items()
        }
        for k, (name, (x, y)) in enumerate(arrays.items()):
            look, marker = choose_line_look(k), "." if x.size <= 20 else ""  # dots mark the few measured points
            if smooth and x.size > LONG_LINE:
                if len(arrays) <= MOST_PALE:
                    axis.plot(x, y, color=look["color"], alpha=0.25, linewidth=0.6, zorder=1.5)
                y, has_means = smooth_values(y, x.size // 40), True
            axis.plot(x, y, label=escape_text(name), marker=marker, **look)
        axis.set_ylabel(ylabel)
        if ylabel in log and not any((y <= 0).any() for _, y in arrays.values()):
            axis.set_yscale("log")
            set_plain_ticks(axis.yaxis)
        if ylabel in shares:
            axis.set_ylim(-0.03, 1.03)
        if xlabel in log:
            axis.set_xscale("log")
            set_plain_ticks(axis.xaxis)
        elif all(np.issubdtype(x.dtype, np.integer) for x, _ in arrays.values()):
            axis.locator_params(axis="x", integer=True)  # integers, such as iterations, get integer ticks
        if [*arrays] != [ylabel] and columns == 1:
            add_legend(axis)
    if columns > 1:
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right upper", frameon=False)
    is_pale = max(map(len, panels.values())) <= MOST_PALE
    means = (
        "pale: every value; strong: mean over a twentieth of them" if is_pale else "means over a twentieth of the run"
    )
    for axis in axes[-columns:]:  # the lowest of each column
        axis.set_xlabel(xlabel + f"\n{means}" * has_means)
        axis.tick_params(labelbottom=True)
    return save_figure(figure, path)


def set_plain_ticks(axis: Axis) -> None:
    """Write the numbers of a logarithmic axis as 130 or 4e-05, not as powers of 10."""
    from matplotlib.ticker import LogFormatter

    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter())


def choose_line_look(place: int) -> dict[str, Any]:
    """Return the colour, style and width of the line at a place in the legend; lines that coincide can all be seen."""
    style = LINE_STYLES[place % len(LINE_STYLES)]
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": style, "linewidth": 1.4 if place else 2.2}


def smooth_values(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of each value (N,) and its neighbours, `window` to each side; there are fewer at the ends."""
    kernel = np.ones(2 * window + 1)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def plot_histograms(
    samples: Mapping[str, ArrayLike], path: str | Path, *, xlabel: str, title: str = "", bins: int = 60
) -> Path:
    """Plot the density histogram of each named set of numbers over common bins, and return the file's path.

    bins: at most; few numbers get fewer bins.
    """
    figure, (axis,) = make_figure(1, title)
    arrays = {name: np.asarray(values).ravel() for name, values in samples.items()}
    bins = min(bins, max(4, max(array.size for array in arrays.values()) // 4))
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
    for k, (name, pair) in enumerate(scores.items()):
        label = f"{escape_text(name)}, AUROC {metrics.auroc(*pair):.3f}"
        axis.plot(*metrics.roc_curve(*pair), label=label, clip_on=False, **choose_line_look(k))
    axis.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="by chance, AUROC 0.5")
    axis.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    add_legend(axis, [*COLOURS[: len(scores)], "0.4"])
    return save_figure(figure, path)


def plot_scores(scores: Mapping[str, Mapping[str, np.ndarray]], inside: str, path: str | Path) -> Path:
    """Plot for each score a histogram of every set, and beside it the ROC curves of the outliers; return the path.

    scores: {name of the score: {set: values}}. inside: the set of the data, from which the others are told.
    """
    figure = import_figure()(figsize=(13, 1 + 3 * len(scores)), dpi=120, layout="constrained")
    for (histogram, roc), (score, sets) in zip(
        figure.subplots(len(scores), 2, squeeze=False), scores.items(), strict=True
    ):
        # The outermost bins also hold what is farther out: noise would else leave nothing to see of the other sets.
        lowest, highest = np.quantile(sets[inside], [0.01, 0.99])
        low, high = lowest - 2 * (highest - lowest), highest + 2 * (highest - lowest)
        bins = min(80, max(8, len(sets[inside]) // 25))
        edges = np.linspace(low, high + 1e-6 * (high == low), bins)
        for k, (name, values) in enumerate(sets.items()):
            look = choose_line_look(k)
            heights, _ = np.histogram(values.clip(low, high), edges, density=True)
            histogram.stairs(heights, edges, **look)
            is_inside = name == inside
            curve = ([], []) if is_inside else metrics.roc_curve(sets[inside], values)
            auroc = "" if is_inside else f", AUROC {metrics.auroc(sets[inside], values):.3f}"
            roc.plot(*curve, label=escape_text(name) + auroc, **look)
        roc.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1)
        histogram.set(xlabel=f"score {score} (higher: more like the data)", ylabel="density")
        roc.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
        roc.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return save_figure(figure, path)


def plot_reliability(found: Mapping[str, metrics.Reliability], path: str | Path) -> Path:
    """Plot how often predictions of about equal confidence are right, a line for each name, and return the path."""
    lines = {name: (each.confidence.numpy(), each.accuracy.numpy()) for name, each in found.items()}
    ideal = {"well calibrated": (np.linspace(0, 1, 2), np.linspace(0, 1, 2))}
    xlabel = "confidence: the probability of the predicted class"
    return plot_lines({"accuracy": ideal | lines}, path, xlabel=xlabel, shares=["accuracy"])


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


def make_figure(panels: int, title: str, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Return an empty matplotlib figure and its axes, one per panel, in columns over a shared x axis."""
    rows = -(-panels // columns)
    figure = import_figure()(figsize=(2 + 6 * columns, 2 + 2 * rows), dpi=150, layout="constrained")
    places = list(figure.subplots(rows, columns, sharex=True, squeeze=False).flat)
    axes = places[:panels]
    for place in places[panels:]:
        place.remove()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="0.9", linewidth=0.8)
        axis.set_axisbelow(True)
    axes[0].set_title(escape_text(title), loc="left")
    figure.align_ylabels(axes)
    return figure, axes


def escape_text(text: str) -> str:
    """Return text that matplotlib draws as it is: without formulas, and with escapes for what is no Unicode text.

    A label that begins with an underscore would be left out of the legend.
    """
    return " " * text.startswith("_") + text.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")


def add_legend(axis: Axes, colours: Sequence[str] = COLOURS) -> None:
    """Add a legend to the right of the panel, where it covers no data. colours: of its texts, in turn."""
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), labelcolor=list(colours))


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a matplotlib figure to a file and return its path."""
    return write_file(path, lambda file: figure.savefig(file, format=Path(path).suffix[1:]))
