"""Pictures read back from the files, and plots by what stands on their axes."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from ebm.support import pictures


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_grid_places_every_pixel(tmp_path) -> None:
    """Red if rows and columns, the scale, the gap or the unfilled place are off by one; five 2x3 images of one grey."""
    levels = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8])
    path = pictures.save_grid(
        levels.view(5, 1, 1, 1).expand(5, 1, 2, 3), tmp_path / "new" / "grid.png", columns=3, padding=1, scale=2
    )
    expected = np.full((2 * 4 + 1, 3 * 6 + 2), 255)
    for i, level in enumerate((0, 51, 102, 153, 204)):
        top, left = i // 3 * 5, i % 3 * 7
        expected[top : top + 4, left : left + 6] = level
    assert path == tmp_path / "new" / "grid.png"
    assert np.array_equal(read(path), expected)


def test_grid_keeps_colour_and_orientation(tmp_path) -> None:
    """Red if channels, height and width are permuted or the image is flipped, or values outside [0, 1] wrap."""
    image = torch.zeros(1, 3, 2, 3)
    image[0, :, 0, 2] = torch.tensor([1.5, 0.5, -0.5])
    written = read(pictures.save_grid(image, tmp_path / "colour.png", columns=1))
    assert written.shape == (2, 3, 3)
    assert written[0, 2].tolist() == [255, 128, 0]
    assert written.sum() == 255 + 128


def test_grid_without_gaps_has_the_size_of_its_images() -> None:
    """Red if an outer border is added: imagenet_demo's 4x4 frames of 128x128 are 512x512."""
    assert pictures.make_grid(torch.rand(16, 3, 128, 128), columns=4, padding=0).shape == (512, 512, 3)


def test_panel_is_a_row_per_image_under_the_names(tmp_path) -> None:
    """Red if rows and columns are swapped, or the names missing."""
    start, real = torch.tensor([0.0, 0.2]), torch.tensor([0.6, 0.8])
    stages = {name: v.view(2, 1, 1, 1).expand(2, 1, 30, 30) for name, v in {"start": start, "real": real}.items()}
    written = read(pictures.save_panel(stages, tmp_path / "panel.png", padding=2))
    titles, images = written[:-62], written[-62:]
    assert images[[15, 47]][:, [15, 47]].tolist() == [[0, 153], [51, 204]]
    assert (titles[:, :30] < 128).any()
    assert (titles[:, 32:] < 128).any()


@pytest.mark.parametrize("channels", [1, 3])
def test_gif_has_every_frame_in_order(tmp_path, channels: int) -> None:
    """Red if frames are lost or reordered, the speed is wrong or the GIF stops after one round."""
    frames = [pictures.make_grid(torch.full((1, channels, 4, 4), level), columns=1) for level in (0.0, 0.4, 0.8)]
    with Image.open(pictures.save_gif(frames, tmp_path / "a" / "sample.gif", fps=20)) as gif:
        shown = [(frame.convert("L").getpixel((1, 1)), frame.info["duration"]) for frame in ImageSequence.Iterator(gif)]
        assert gif.info["loop"] == 0
    assert shown == [(0, 50), (102, 50), (204, 50)]


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
    """Red if `log` is ignored."""
    pictures.plot_lines({"y": {"a": ([1, 2], [1, 100])}}, tmp_path / "log.png", xlabel="x", log=True)
    assert figures[0].axes[0].get_yscale() == "log"


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
    assert legend(axis) == ["SVHN, AUROC 0.583"]
    assert np.trapezoid(y, x) == pytest.approx(3.5 / 6)
    assert path.exists()


def test_plots_leave_pyplot_alone(tmp_path, monkeypatch) -> None:
    """Red if a plot goes through pyplot, whose open figures pile up over a long training run."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # makes importing it an error
    pictures.plot_lines({"y": {"a": ([1, 2], [1, 2])}}, tmp_path / "lines.png", xlabel="x")
    pictures.plot_histograms({"a": [1, 2]}, tmp_path / "histograms.png", xlabel="x")
    assert pictures.plot_roc({"a": ([1.0], [2.0])}, tmp_path / "roc.png").exists()
