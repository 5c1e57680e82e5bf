"""Sprites against real frames of the dataset, and the published file's format."""

import os
import struct
import zipfile

import numpy as np
import pytest
import torch

from conftest import GOLDEN, SPRITE_BOMB, write_sprites
from ebm.readers import dsprites
from ebm.support.errors import UsageError

FRAMES = GOLDEN / "dsprites_frames.npz"


def frame_latents():
    """Return the latents (320, 5) of the frames in FRAMES: see golden/DSPRITES.md."""
    up, down, places = [*range(6)], [*range(5, -1, -1)], [*range(32)]
    scales = [(scale, 0, 0, 0) for scale in [*up, *down, *up]]
    turns = [(5, turn, 0, 0) for turn in range(40)]
    walk = [(5, 0, 0, y) for y in places] + [(5, 0, x, 31) for x in places]
    walk += [(5, 0, 31, y) for y in reversed(places)] + [(5, 0, x, 0) for x in reversed(places)]
    end = [(scale, 0, 0, 0) for scale in down]
    numbers = [(2, *step) for step in scales + turns + walk + end]
    numbers += [(shape, *step) for shape in (1, 0) for step in scales + turns + end]
    grid = list(dsprites.LATENTS.values())
    return torch.tensor([[values[n] for values, n in zip(grid, row, strict=True)] for row in numbers])


@pytest.mark.parametrize(("shape", "frames"), [("heart", (0, 192)), ("ellipse", (192, 256)), ("square", (256, 320))])
def test_published_frames(shape, frames):
    """Breaks with any change of an outline, of the sense of rotation or of the place on the canvas by 1/1000 pixel."""
    real = torch.from_numpy(np.load(FRAMES)["frames"])[slice(*frames)]
    drawn = dsprites.render_sprites(*frame_latents()[slice(*frames)].unbind(1))[:, 0].bool()
    overlap = (drawn & real).sum((1, 2)) / (drawn | real).sum((1, 2))
    assert overlap.min() == 1.0, f"{shape}: mean IoU {overlap.mean():.4f}"


def test_order():
    """Breaks if y does not vary fastest, then x, orientation, scale and shape."""
    strides = {"y": 1, "x": 32, "orientation": 32 * 32, "scale": 40 * 32 * 32, "shape": 6 * 40 * 32 * 32}
    first = dsprites.compute_latents(torch.tensor([0]))[0]
    for column, (name, values) in enumerate(dsprites.LATENTS.items()):
        changed = dsprites.compute_latents(torch.tensor([strides[name]]))[0]
        assert changed[column] == torch.tensor(values[1])
        assert (changed != first).sum() == 1
    last = dsprites.compute_latents(torch.tensor([dsprites.SIZE - 1]))[0]
    assert torch.equal(last, torch.tensor([values[-1] for values in dsprites.LATENTS.values()]))
    assert dsprites.SIZE == 737_280


def test_rendering_does_not_depend_on_the_batch():
    """Breaks if sprites drawn together get mixed up, also over the parts that a long batch is drawn in."""
    latents = dsprites.compute_latents(
        torch.randint(dsprites.SIZE, (1200,), generator=torch.Generator().manual_seed(0))
    )
    together = dsprites.render_sprites(*latents.unbind(1))
    for n in (0, 511, 512, 1199):
        assert torch.equal(together[n : n + 1], dsprites.render_sprites(*latents[n : n + 1].unbind(1)))


def test_window_holds_every_sprite(monkeypatch):
    """Breaks if the pixels that are looked at leave out a corner of the largest sprites."""
    latents = dsprites.compute_latents(torch.arange(dsprites.SIZE).view(3, 6, -1)[:, 5, ::61].flatten())  # of scale 1
    drawn = dsprites.render_sprites(*latents.unbind(1))
    monkeypatch.setattr(dsprites, "WINDOW", 32)
    assert torch.equal(drawn, dsprites.render_sprites(*latents.unbind(1)))


def test_subsets():
    """Breaks if a restricted subset fixes another latent or another value than the reference's."""
    latents = dsprites.compute_latents(torch.arange(dsprites.SIZE))
    turned, middle = 30 * np.pi / 39, 16 / 31
    free = {"shape": [0], "pos": [3, 4], "size": [1], "rot": [2], "restrict": [1, 3, 4]}
    values: dict[str, list[float | None]] = {
        "shape": [None, 0.5, turned, middle, middle],
        "pos": [1, 0.5, turned, None, None],
        "size": [1, None, turned, middle, middle],
        "rot": [1, 0.5, None, middle, middle],
        "restrict": [1, None, 0, None, None],
    }
    counts = {"shape": 3, "pos": 32 * 32, "size": 6, "rot": 40, "restrict": 6 * 32 * 32}
    for subset, wanted in values.items():
        kept = latents[dsprites.is_in_subset(latents, subset)]
        assert len(kept) == counts[subset] == len(kept[:, free[subset]].unique(dim=0))
        for column, value in enumerate(wanted):
            assert value is None or torch.allclose(kept[:, column], torch.tensor(float(value)), atol=1e-6)
    assert dsprites.is_in_subset(latents, None).all()


def test_label_vectors():
    """Breaks if a condition's label takes another latent, or cosine and sine change places."""
    latents = torch.tensor([[3.0, 0.7, np.pi / 2, 0.25, 0.75]])
    wanted = {"shape": [0.0, 0.0, 1.0], "size": [0.7], "pos": [0.25, 0.75], "rot": [0.0, 1.0]}
    for condition, label in wanted.items():
        assert torch.allclose(dsprites.compute_labels(latents, condition), torch.tensor([label]), atol=1e-6)


def test_labels_in_words():
    """Breaks when a picture of sprites has another label in its title, or one in numbers that nobody reads."""
    latents = torch.tensor([[1, 0.5, 0.0, 0, 1], [3, 0.7, 1.5 * np.pi, 0.25, 0.5]])
    words = {
        name: dsprites.describe_sprite_labels(dsprites.compute_labels(latents, name), name)
        for name in dsprites.CONCEPTS
    }
    assert words == {
        "size": ["size 0.5", "size 0.7"],
        "shape": ["square", "heart"],
        "pos": ["(0.00, 1.00)", "(0.25, 0.50)"],
        "rot": ["0°", "270°"],
    }


def test_published_file(tmp_path):
    """Breaks if rows and latents get out of step, also over the parts the file is read in, or metadata is unpickled."""
    path = tmp_path / "dsprites.npz"
    index = torch.arange(0, dsprites.SIZE, 149)  # 4,949: more than one part
    images = write_sprites(path, index)
    latents, bits = dsprites.read_published(path)
    assert torch.allclose(latents, dsprites.compute_latents(index))
    assert torch.equal(dsprites.unpack_bits(bits), images)
    kept, kept_bits = dsprites.read_published(path, lambda latents: latents[:, 0] == 2)
    assert torch.equal(kept, latents[latents[:, 0] == 2])
    assert torch.equal(dsprites.unpack_bits(kept_bits), images[latents[:, 0] == 2])
    assert "DSPRITES_BOMB" not in os.environ


def test_sprites_are_the_same_drawn_or_read(tmp_path):
    """Breaks if images from bits and from latents differ in anything: values, shape or kind."""
    write_sprites(tmp_path / "dsprites.npz", range(0, dsprites.SIZE, 7919))
    latents, bits = dsprites.read_published(tmp_path / "dsprites.npz")
    index = torch.tensor([3, 3, 0, 50])
    read, drawn = dsprites.Sprites(latents, bits)[index], dsprites.Sprites(latents)[index]
    assert read.dtype == torch.uint8
    assert torch.equal(read, drawn)
    assert read.unique().tolist() == [0, 255]


def damage(path, kind):
    """Make the file at path one that must be refused."""
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "foreign":
        path.write_bytes(b"GIF89a" * 100)
    elif kind == "checksum":
        with zipfile.ZipFile(path) as archive:
            checksum = archive.getinfo("imgs.npy").CRC
        path.write_bytes(path.read_bytes().replace(struct.pack("<I", checksum), struct.pack("<I", checksum ^ 1)))
    elif kind == "longer":
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, contents in members.items():
                archive.writestr(name, contents + b"\0" * (name == "imgs.npy"))
    elif kind == "no images":
        np.savez(path, latents_values=np.array([[1, 1, 0.5, 0, 0, 0]] * 4))
    elif kind == "other size":
        write_sprites(path, range(4), imgs=np.zeros((4, 32, 32), np.uint8))
    elif kind == "other count":
        write_sprites(path, range(4), imgs=np.zeros((3, 64, 64), np.uint8))
    elif kind == "pickled":
        write_sprites(path, range(4), latents_values=np.array([SPRITE_BOMB], dtype=object))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "no such file"),
        ("truncated", "not a zip file"),
        ("foreign", ""),
        ("checksum", "Bad CRC-32"),
        ("longer", "imgs is longer than its header says"),
        ("no images", "imgs"),
        ("other size", r"imgs is uint8 \(4, 32, 32\), not uint8 \(4, 64, 64\)"),
        ("other count", r"imgs is uint8 \(3, 64, 64\), not uint8 \(4, 64, 64\)"),
        ("pickled", "pickled objects are not read"),
    ],
)
def test_bad_file(tmp_path, kind, reason):
    """Breaks if a bad file is read, runs code, or is answered with anything but one line that names it."""
    path = tmp_path / "dsprites.npz"
    write_sprites(path, range(0, dsprites.SIZE, 2000))
    damage(path, kind)
    with pytest.raises(UsageError, match=rf"`dsprites_path`=.*dsprites\.npz.*{reason}") as error:
        dsprites.read_published(path)
    assert "\n" not in str(error.value)
    assert "DSPRITES_BOMB" not in os.environ
