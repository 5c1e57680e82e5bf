"""Pictures read back from the files, and plots by what stands on their axes."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from ebm.support import pictures


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def make_greys(number: int, size: tuple[int, int]) -> torch.Tensor:
    """Images (number, 1, *size), each of one grey; that of image i is 51·i of 255, from 0 again after 204."""
    return (torch.arange(number) % 5 / 5).view(-1, 1, 1, 1).expand(-1, 1, *size)


def test_grid_places_every_pixel(tmp_path) -> None:
    """Red if rows and columns, the scale, the gap or the unfilled place are off by one; five 2x3 images of one grey."""
    pixels = pictures.make_grid(make_greys(5, (2, 3)), columns=3, scale=2)
    path = pictures.save_pixels(pixels, tmp_path / "new" / "grid.png")
    expected = np.full((2 * 4 + 2, 3 * 6 + 2 * 2), 255)
    for i, level in enumerate((0, 51, 102, 153, 204)):
        top, left = i // 3 * 6, i % 3 * 8
        expected[top : top + 4, left : left + 6] = level
    assert path == tmp_path / "new" / "grid.png"
    assert np.array_equal(read(path), expected)


def test_grid_keeps_colour_and_orientation(tmp_path) -> None:
    """Red if channels, height and width are permuted or the image is flipped, or values outside [0, 1] wrap."""
    image = torch.zeros(1, 3, 2, 3)
    image[0, :, 0, 2] = torch.tensor([1.5, 0.5, -0.5])
    written = read(pictures.save_pixels(pictures.make_grid(image, columns=1, scale=1), tmp_path / "colour.png"))
    assert written.shape == (2, 3, 3)
    assert written[0, 2].tolist() == [255, 128, 0]
    assert written.sum() == 255 + 128


def test_large_images_are_shrunk_by_averaging() -> None:
    """Red if 20 images of 128x128 side by side are wider than a picture, or lose every second line."""
    checkers = (torch.arange(128)[:, None] + torch.arange(128)).remainder(2).float().expand(20, 1, 128, 128)
    grid = pictures.make_grid(checkers, columns=20)
    assert 1900 < grid.shape[1] < 2100
    assert grid[5:-5, 5:90].min() > 64 and grid[5:-5, 5:90].max() < 192


def test_panel_is_a_row_per_image_under_the_names(tmp_path) -> None:
    """Red if rows and columns are swapped, or the names missing or in the images."""
    start, real = torch.tensor([0.0, 0.2]), torch.tensor([0.6, 0.8])
    stages = {name: v.view(2, 1, 1, 1).expand(2, 1, 30, 30) for name, v in {"start": start, "real": real}.items()}
    written = pictures.make_panel(stages, scale=1).squeeze()
    titles, images = written[: pictures.LINE], written[pictures.LINE :]
    assert images.shape == (62, 62)
    assert images[[15, 47]][:, [15, 47]].tolist() == [[0, 153], [51, 204]]
    assert (images[:30, :30] == 0).all() and (images[32:, 32:] == 204).all()
    assert (titles[:, :30] < 128).any()
    assert (titles[:, 32:] < 128).any()


def find_texts(strip: np.ndarray, starts: range, width: int) -> list[bool]:
    """Whether a strip of pixels has a text, dark pixels, in the columns from each start on."""
    return [bool((strip[:, start : start + width] < 128).any()) for start in starts]


def test_titles_of_a_grid_stand_above_its_images() -> None:
    """Red if a title covers an image, stands above another one, or is repeated where the first row names columns."""
    images, high = make_greys(4, (30, 30)), pictures.LINE
    heads = pictures.make_grid(images, columns=2, titles=["a", "b"] * 2, scale=1).squeeze()
    each = pictures.make_grid(images, columns=2, titles=["a", "", "c", "d"], scale=1).squeeze()
    assert heads.shape == (high + 30 + 2 + 30, 62)
    assert each.shape == (high + 30 + high + 30, 62)
    assert find_texts(heads[:high], range(0, 62, 32), 30) == [True, True]
    assert find_texts(each[:high], range(0, 62, 32), 30) == [True, False]
    assert find_texts(each[high + 30 : -30], range(0, 62, 32), 30) == [True, True]
    for grid in (heads, each):
        assert (grid[high : high + 30, 32:] == 51).all() and (grid[-30:, :30] == 102).all()


@pytest.mark.parametrize("text", ["cat → dog", "é", "кот"])
def test_texts_have_glyphs(text: str) -> None:
    """Red if the font draws an empty box for accents, arrows and other alphabets."""
    font = pictures.load_font(13)
    box = font.getmask("\U000f0000")
    assert all(bytes(font.getmask(letter)) != bytes(box) for letter in text if letter != " ")


def test_a_long_title_is_cut() -> None:
    """Red if a name longer than its column runs into the next column's."""
    strip = pictures.make_grid(make_greys(2, (30, 40)), columns=2, titles=["Maltese dog " * 5, ""], scale=1)
    assert find_texts(strip[: pictures.LINE, :, 0], range(0, 82, 42), 40) == [True, False]


def test_many_rows_stand_in_blocks() -> None:
    """Red if 7 rows of 2 images become a ribbon, a block lacks its titles, or a row's title stands beside another."""
    stages = {"one": make_greys(7, (50, 50)), "two": make_greys(7, (50, 50)) / 2}
    titles = ["", "", "", "", "", "", "title"]
    panel = pictures.make_panel(stages, rows=titles, scale=1).squeeze()
    assert panel.shape[0] == pictures.LINE + 4 * 52 - 2  # two blocks: of four rows and of three
    second = panel[:, panel.shape[1] // 2 + pictures.BLOCK_GAP // 2 :]
    left = second.shape[1] - 102  # where its images begin
    assert find_texts(second[: pictures.LINE], range(left, left + 104, 52), 50) == [True, True]
    rows = [second[pictures.LINE + 52 * i :][:50] for i in range(4)]
    assert [row[25, left + 25] for row in rows] == [204, 0, 51, 255]  # images 4, 5, 6, and none
    assert [bool((row[:, :left] < 128).any()) for row in rows] == [False, False, True, False]


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 64, 64), (1, 128, 128)])
@pytest.mark.parametrize(("rows", "columns"), [(20, 3), (100, 22), (900, 40), (20, 6), (10, 2), (6, 8), (8, 3)])
@pytest.mark.parametrize("title", ["7", "a title of several words and numbers"])
def test_panels_are_no_ribbons(shape: tuple[int, int, int], rows: int, columns: int, title: str) -> None:
    """Red if a picture is far longer than wide or too large to look at, with few or many images of any size."""
    images = torch.zeros(1, 1, 1, 1).expand(rows, *shape)
    panel = pictures.make_panel(dict.fromkeys(map(str, range(columns)), images), rows=[title] * rows)
    height, width = panel.shape[:2]
    assert max(height, width) <= 1.2 * pictures.SIDE
    assert max(height, width) >= 0.75 * pictures.LEAST_SIDE
    assert 1 / 2 <= width / height <= 2.2


def test_rows_without_room_are_left_out_in_words() -> None:
    """Red if a picture of very many rows shows them too small to see, or leaves some out without a word."""
    stages = {str(k): make_greys(900, (8, 8)) for k in range(40)}
    whole, part = (pictures.make_panel({k: v[:n] for k, v in stages.items()}) for n in (40, 900))
    assert part.shape[1] == whole.shape[1] and 0 < part.shape[0] - whole.shape[0] <= 2 * 50 + pictures.LINE
    assert (part[-pictures.LINE :] < 128).any()


@pytest.mark.parametrize(
    ("number", "classes", "columns"), [(100, 10, 10), (40, 10, 10), (64, 3, 9), (16, 0, 4), (5, 100, 3), (1, 1, 1)]
)
def test_columns_of_a_grid(number: int, classes: int, columns: int) -> None:
    """Red if a grid is a ribbon, or its columns are not of one class each where they can be."""
    assert pictures.choose_columns(number, classes) == columns


@pytest.mark.parametrize("channels", [1, 3])
def test_gif_has_every_frame_in_order(tmp_path, channels: int) -> None:
    """Red if frames are lost or reordered, the speed or a pause is wrong, or the GIF stops after one round."""
    frames = [pictures.make_grid(torch.full((1, channels, 4, 4), level), columns=1) for level in (0.0, 0.4, 0.6, 0.8)]
    with Image.open(pictures.save_gif(frames, tmp_path / "a" / "sample.gif", fps=20)) as gif:
        shown = [(frame.convert("L").getpixel((1, 1)), frame.info["duration"]) for frame in ImageSequence.Iterator(gif)]
        assert gif.info["loop"] == 0
    assert shown == [(0, 500), (102, 50), (153, 50), (204, 2000)]


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures that the plots of a test write, to look at their axes."""
    from matplotlib.figure import Figure

    seen, save = [], Figure.savefig

    def savefig(figure, *args, **kwargs):
        seen.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return seen


def legend(axis) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_lines_are_stacked_over_one_x_axis(tmp_path, figures) -> None:
    """Red if a panel, a line or its name is lost; the eighth line comes after the last colour, and must look new."""
    steps = np.arange(5)
    energies = {f"line {i}": (steps, steps * i) for i in range(8)}
    distances = {"CFD": (steps, torch.arange(5) + 1)}
    path = pictures.plot_lines(
        {"energy": energies, "distance": distances}, tmp_path / "new" / "curves.png", xlabel="iteration", title="run"
    )
    upper, lower = figures[0].axes
    assert legend(upper) == list(energies)
    assert len({(line.get_color(), line.get_linestyle()) for line in upper.lines}) == 8
    assert upper.lines[7].get_ydata().tolist() == [0, 7, 14, 21, 28]
    assert (upper.get_ylabel(), lower.get_ylabel(), lower.get_xlabel()) == ("energy", "distance", "iteration")
    assert read(path).std() > 0


def test_few_points_are_dots(tmp_path, figures) -> None:
    """Red if a line of a single point cannot be seen, or a long one is a string of beads."""
    pictures.plot_lines({"y": {"one": ([3], [1]), "many": (range(99), range(99))}}, tmp_path / "dots.png", xlabel="x")
    assert [line.get_marker() for line in figures[0].axes[0].lines] == [".", ""]


def test_lines_on_a_logarithmic_axis(tmp_path, figures) -> None:
    """Red if `log` or `shares` is ignored, meets another axis, or hides values that have no logarithm."""
    panels = {"y": {"a": ([1, 2], [1, 100])}, "other": {"a": ([1, 2], [1, 2])}, "sign": {"a": ([1, 2], [-1, 1])}}
    pictures.plot_lines(panels, tmp_path / "log.png", xlabel="x", log=["y", "sign", "x"], shares=["other"])
    assert [axis.get_yscale() for axis in figures[0].axes] == ["log", "linear", "linear"]
    assert figures[0].axes[0].get_xscale() == "log"
    assert [round(limit) for limit in figures[0].axes[1].get_ylim()] == [0, 1]


def test_noisy_lines_are_shown_with_their_means(tmp_path, figures) -> None:
    """Red if the values are hidden by their mean, the mean is shifted or bent at the ends, or nothing says so."""
    x = np.arange(200)
    panels = {"y": {"a": (x, x + 5.0 * (-1) ** x), "b": (x[:9], x[:9])}}
    pictures.plot_lines(panels, tmp_path / "s.png", xlabel="x", smooth=True)
    (axis,) = figures[0].axes
    values, mean, short = (line.get_ydata() for line in axis.lines)
    assert np.array_equal(values, panels["y"]["a"][1]) and len(short) == 9
    assert abs(mean[5:-5] - x[5:-5]).max() < 0.5 and mean[0] == pytest.approx(2.5, abs=1)
    assert axis.get_xlabel().startswith("x\npale: every value") and legend(axis) == ["a", "b"]


def test_many_noisy_lines_do_not_hide_their_means(tmp_path, figures) -> None:
    """Red if the values of many long lines cover all means, or the axis tells of values that are not drawn."""
    x = np.arange(200)
    panels = {"y": {f"line {k}": (x, k + 50.0 * (-1) ** x) for k in range(pictures.MOST_PALE + 1)}}
    pictures.plot_lines(panels, tmp_path / "many.png", xlabel="x", smooth=True)
    (axis,) = figures[0].axes
    assert len(axis.lines) == pictures.MOST_PALE + 1 and axis.get_ylim()[1] < 50
    assert axis.get_xlabel() == "x\nmeans over a twentieth of the run"


def test_lines_that_coincide_can_all_be_seen(tmp_path, figures) -> None:
    """Red if a line is drawn over an equal one so that this is hidden."""
    pictures.plot_lines({"y": {name: ([1, 2], [1, 2]) for name in "abc"}}, tmp_path / "same.png", xlabel="x")
    first, *others = figures[0].axes[0].lines
    assert all(line.get_linewidth() < first.get_linewidth() and line.get_linestyle() != "-" for line in others)


def test_ticks_of_counts_are_whole(tmp_path, figures) -> None:
    """Red if an axis that counts has ticks between its numbers, or one that does not has lost its own."""
    counts: list[float] = [1, 2, 3, 4]
    for k, x in enumerate((counts, [0.0, 0.5, 1.0])):
        pictures.plot_lines({"y": {"a": (x, x)}}, tmp_path / f"{k}.png", xlabel="x")
    whole, fractions = (figure.axes[0].get_xticks() for figure in figures)
    assert (whole == whole.round()).all() and len(whole) >= 4
    assert (fractions != fractions.round()).any()


def test_histograms_share_bins_and_are_densities(tmp_path, figures) -> None:
    """Red if sets of different size or place are binned each for itself: then their areas do not compare."""
    inside, outside = np.linspace(0, 1, 1000), torch.linspace(1, 4, 50)
    path = pictures.plot_histograms({"in": inside, "out": outside}, tmp_path / "h.png", xlabel="energy", bins=4)
    (axis,) = figures[0].axes
    in_outline, out_outline = (patch.get_path().vertices for patch in axis.patches)
    assert legend(axis) == ["in", "out"]
    assert in_outline[:, 0].min() == out_outline[:, 0].min() == 0
    assert in_outline[:, 0].max() == out_outline[:, 0].max() == 4
    assert in_outline[:, 1].max() == pytest.approx(1, abs=0.01)
    assert path.exists()


def test_roc_names_the_auroc(tmp_path, figures) -> None:
    """Red if in and out are swapped, or the curve is not the one that the legend measures."""
    path = pictures.plot_roc({"SVHN": ([3.0, 2.0, 1.0], [1.0, 2.5])}, tmp_path / "roc.png")
    (axis,) = figures[0].axes
    x, y = axis.lines[0].get_data()
    assert legend(axis) == ["SVHN, AUROC 0.583", "by chance, AUROC 0.5"]
    assert np.trapezoid(y, x) == pytest.approx(3.5 / 6)
    assert path.exists()


def test_plots_leave_pyplot_alone(tmp_path, monkeypatch) -> None:
    """Red if a plot goes through pyplot, whose open figures pile up over a long training run."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # makes importing it an error
    pictures.plot_lines({"y": {"a": ([1, 2], [1, 2])}}, tmp_path / "lines.png", xlabel="x")
    pictures.plot_histograms({"a": [1, 2]}, tmp_path / "histograms.png", xlabel="x")
    assert pictures.plot_roc({"a": ([1.0], [2.0])}, tmp_path / "roc.png").exists()
