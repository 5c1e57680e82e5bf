"""What people really have as data: pixels of every kind, layouts of folders, names, sizes, and labels by name."""

import dataclasses
import inspect
import json
import os
import pathlib
import struct
import sys
import tempfile
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import models
from conftest import (
    IMAGENET_BATCHES,
    draw_bytes,
    encode_example,
    encode_feature,
    encode_field,
    encode_noise,
    make_model,
    write_mnist,
    write_pickle,
    write_records,
)
from data import find_class
from ebm.measures.features import RealImages
from ebm.readers import decoding, folders, imagenet, streaming, tf_images
from ebm.settings import AisSettings, SandboxSettings, TrainSettings
from ebm.support import hardware
from ebm.support.errors import UsageError
from ebm.tasks import sandbox_data
from ebm.tasks.trained_models import TrainedModel, load_split, match_labels
from ebm.training.setup import choose_network

CPU = torch.device("cpu")


def load_folder(path: pathlib.Path, **settings) -> data.StoredImages:
    dataset = data.load_dataset("folder", path=path, workers=1, **settings)
    assert isinstance(dataset, data.StoredImages)
    return dataset


def save(path: pathlib.Path, image: np.ndarray | Image.Image | None = None, **settings) -> None:
    """Write an image, by default a small colour one, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = draw_bytes(8, 8, 3, seed=len(path.name)).numpy() if image is None else image
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **settings)


# ---- pixels ----

RAMP = np.linspace(0, 65535, 64).reshape(8, 8)
SHADES = np.round(RAMP / 257).astype(int)


def make_green_under_transparency(mode: str) -> Image.Image:
    """Return an image whose left half is transparent, and red on the right; green (or grey) hides on the left."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :4] = 0, 200, 0, 0
    pixels[:, 4:] = 255, 0, 0, 255
    image = Image.fromarray(pixels)
    if mode == "P":
        image = Image.fromarray((np.arange(8) > 3).astype(np.uint8).repeat(8).reshape(8, 8).T.copy(), "P")
        image.putpalette([0, 200, 0, 255, 0, 0])
        image.info["transparency"] = 0
    return image.convert(mode) if mode in ("LA", "RGB") else image


def write_ramp(path: pathlib.Path, kind: str) -> None:
    """Write RAMP, which has 16 bits, as files of one kind."""
    deep = RAMP.round().astype(np.uint16)
    if kind == "16-bit PNG":
        save(path / "0.png", deep)
    elif kind == "16-bit TIFF":
        save(path / "0.tif", deep)
    elif kind == "16-bit big-endian TIFF":
        save(path / "0.tif", Image.fromarray(deep.astype(">u2")))
    elif kind == "16-bit PGM":
        path.mkdir()
        (path / "0.pgm").write_bytes(b"P5 8 8 65535\n" + deep.astype(">u2").tobytes())
    elif kind == "negative TIFF":
        save(path / "0.tif", 65535 - deep, tiffinfo={262: 0})
    elif kind == "16-bit colour PNG":
        path.mkdir()
        (path / "0.png").write_bytes(encode_deep_colour(deep))
    else:
        assert kind == "8 bits with a wrong suffix"
        save(path / "0.jpg", SHADES.astype(np.uint8), format="PNG")


def encode_chunk(kind: bytes, contents: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(contents)) + kind + contents + struct.pack(">I", zlib.crc32(kind + contents))


def encode_deep_colour(grey: np.ndarray) -> bytes:
    """Return a PNG of 16 bits in each of three equal channels, which Pillow does not write."""
    height, width = grey.shape
    rows = np.repeat(grey[:, :, None], 3, 2).astype(">u2").tobytes()
    lines = b"".join(b"\0" + rows[i * width * 6 : (i + 1) * width * 6] for i in range(height))
    header = encode_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + encode_chunk(b"IDAT", zlib.compress(lines)) + encode_chunk(b"IEND", b"")


def encode_flood(side: int, bits: int = 1, colour: int = 0) -> bytes:
    """Return a PNG that claims so many pixels a side; a real one of one shade has a few kB. colour: 2 for RGB."""
    header = encode_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + encode_chunk(b"IDAT", zlib.compress(b""))


@pytest.mark.parametrize(
    "kind",
    [
        "16-bit PNG",
        "16-bit TIFF",
        "16-bit big-endian TIFF",
        "16-bit PGM",
        "negative TIFF",
        "16-bit colour PNG",
        "8 bits with a wrong suffix",
    ],
)
def test_a_ramp_stays_a_ramp(tmp_path, capsys, kind):
    """Breaks when 16 bits are cut to white, also in the readers of imagenetfull, or that they were scaled is unsaid."""
    write_ramp(tmp_path / "d", kind)
    images = load_folder(tmp_path / "d").raw(torch.tensor([0]))[0].int().numpy()
    assert abs(images - SHADES).max() <= 1
    assert ("holds 16 bits per pixel: 0 to 65535 become 0 to 255" in capsys.readouterr().out) == (
        kind.startswith(("16-bit", "negative")) and "colour" not in kind
    )
    (path,) = (tmp_path / "d").iterdir()
    large = streaming.read_antialiased_pixels(path.read_bytes())
    assert abs(large[:, 8::16, 8::16].astype(int) - SHADES).max() <= 3
    assert abs(tf_images.read_tf_pixels(path.read_bytes(), 8) - SHADES).max() <= 1


@pytest.mark.parametrize("kind", ["F", "I"])
def test_numbers_of_unknown_range_are_refused(tmp_path, kind):
    """Breaks when a range is guessed for floating-point or 32-bit pixels, or the file is called damaged."""
    save(
        tmp_path / "0.tif", Image.fromarray((RAMP / 65535).astype(np.float32) if kind == "F" else RAMP.astype(np.int32))
    )
    with pytest.raises(UsageError, match=r"0\.tif holds .*; save it with 8 or 16 bits per pixel"):
        load_folder(tmp_path)
    dataset = imagenet.open_imagenet(tmp_path, "train", workers=0)
    with pytest.raises(UsageError, match="save it with 8 or 16 bits"):
        dataset.raw(torch.tensor([0]))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparent_pixels_are_white(tmp_path, capsys, mode):
    """Breaks when the colours hidden under transparent pixels are trained on, or the background is unsaid."""
    settings = {"transparency": (0, 200, 0)} if mode == "RGB" else {}
    save(tmp_path / "0.png", make_green_under_transparency(mode), **settings)
    image = load_folder(tmp_path, channels=3).raw(torch.tensor([0]))[0]
    assert (image[:, :, :4] == 255).all()
    shade = [76, 76, 76] if mode == "LA" else [255, 0, 0]
    assert image[:, 0, 7].tolist() == shade
    assert "has transparent pixels, which become white" in capsys.readouterr().out
    encoded = (tmp_path / "0.png").read_bytes()
    for read in (streaming.read_antialiased_pixels, lambda encoded: tf_images.read_tf_pixels(encoded, 128)):
        assert (read(encoded)[:, :, :48] == 255).all()


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (7, 3)), (6, (0, 7)), (8, (3, 0))])
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_photos_are_upright(tmp_path, orientation, corner, suffix):
    """Breaks when the turn in a photo's EXIF entry is not made, or made twice, by one of the readers."""
    pixels = np.full((8, 4, 3), 250, np.uint8)
    pixels[:4, :2] = 0  # stored at the upper left
    exif = Image.Exif()
    exif[274] = orientation
    settings = {"lossless": True} if suffix == "webp" else {"quality": 100} if suffix == "jpg" else {}
    save(tmp_path / f"0.{suffix}", Image.fromarray(pixels), exif=exif, **settings)
    image = load_folder(tmp_path).raw(torch.tensor([0]))[0, 0]
    assert image.shape == ((4, 8) if orientation in (6, 8) else (8, 4))
    assert image[corner] < 40
    assert (image < 128).sum() == 8
    encoded = (tmp_path / f"0.{suffix}").read_bytes()
    for read in (streaming.read_antialiased_pixels, lambda encoded: tf_images.read_tf_pixels(encoded, 128)):
        square = read(encoded).mean(0)  # the middle 4x4 pixels
        rows, columns = square.mean(1), square.mean(0)
        if orientation in (6, 8):
            assert (rows[:60].mean() < rows[68:].mean()) == (corner[0] == 0)
        else:
            assert (columns[:60].mean() < columns[68:].mean()) == (corner[1] == 0)


def test_the_rest_of_what_people_have(tmp_path, capsys):
    """Breaks when a GIF's first frame, 1 bit, CMYK or a palette is read as something else."""
    red = Image.new("RGB", (8, 8), (250, 0, 0))
    save(tmp_path / "gif/0.gif", red, save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")])
    save(tmp_path / "cmyk/0.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=100)
    save(tmp_path / "palette/0.png", red.convert("P", palette=Image.Palette.ADAPTIVE))
    for name in ("gif", "cmyk", "palette"):
        image = load_folder(tmp_path / name).raw(torch.tensor([0]))[0].int()
        assert abs(image - torch.tensor([250, 0, 0]).view(3, 1, 1)).max() <= 8, name
    assert "several frames, of which the first is taken" in capsys.readouterr().out
    save(tmp_path / "bits/0.png", Image.fromarray(SHADES > 127))
    assert load_folder(tmp_path / "bits").raw(torch.tensor([0]))[0, 0].tolist() == (255 * (SHADES > 127)).tolist()
    save(tmp_path / "bits/1.png", red)
    assert load_folder(tmp_path / "bits").image_shape == (1, 8, 8)
    assert "1 image(s) of" in (said := capsys.readouterr().out) and "become grey like the first; channels=3" in said


# ---- floods of pixels ----


@pytest.mark.filterwarnings("ignore:Image size")  # pytest overrides the filter of the reader
def test_floods_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    """Breaks when an image of a few kB takes gigabytes: in one line, without decoding, whatever `image_size` is."""
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    (tmp_path / "one").mkdir()
    for side, message in (
        (13_000, "13000x13000 pixels are more .*; choose a smaller `image_size`"),
        (60_000, "60000|178"),
    ):
        (tmp_path / "one/0.png").write_bytes(encode_flood(side))
        with pytest.raises(UsageError, match=message):
            load_folder(tmp_path / "one")
    with pytest.raises(UsageError, match=r"0.png is too large: more than 178,956,970 pixels; scale it down"):
        load_folder(tmp_path / "one", image_size=32)
    with pytest.raises(UsageError, match="is too large"):
        imagenet.open_imagenet(tmp_path / "one", "train", workers=0).raw(torch.tensor([0]))
    (tmp_path / "one/0.png").write_bytes(encode_flood(13_000, 8, 2))
    with pytest.raises(UsageError, match=r"0.png is too large: 13000x13000 pixels take more than 268,435,456 bytes"):
        load_folder(tmp_path / "one", image_size=32)
    (tmp_path / "one/0.png").write_bytes(encode_flood(13_000))
    monkeypatch.setattr(decoding, "find_free_memory", lambda: 10**9)
    with pytest.raises(UsageError, match=r"0.png is too large: 13000x13000 pixels take 2.0 GB to decode, and 1.0 are"):
        load_folder(tmp_path / "one", image_size=32)


def test_a_large_photo_is_decoded_at_half_its_size(tmp_path, monkeypatch):
    """Breaks when a camera's photo beyond the limit is refused, or is turned into another picture by one reader."""
    monkeypatch.setattr(decoding, "MOST_BYTES", 4 * 300 * 200 - 1)
    photo = np.zeros((200, 300, 3), np.uint8)
    photo[:, 150:] = 250
    save(tmp_path / "0.jpg", photo)
    encoded = (tmp_path / "0.jpg").read_bytes()
    small = load_folder(tmp_path, image_size=100).raw(torch.tensor([0]))[0].numpy()
    for pixels in (small, streaming.read_antialiased_pixels(encoded), tf_images.read_tf_pixels(encoded, 128)):
        half = pixels.shape[2] // 2
        assert pixels[:, :, : half - 4].max() < 10 and pixels[:, :, half + 4 :].min() > 240


def test_images_that_memory_cannot_hold_are_refused(tmp_path, monkeypatch):
    """Breaks when the decoded size of a data set is not compared with free memory, or `image_size` not named."""
    for i in range(3):
        save(tmp_path / f"{i}.png")
    monkeypatch.setattr(folders, "find_free_memory", lambda: 3 * 3 * 64 - 1)
    with pytest.raises(UsageError, match=r"3 images of 8x8 pixels take 0.0 GB.*; choose a smaller `image_size`"):
        load_folder(tmp_path)
    monkeypatch.setattr(folders, "find_free_memory", lambda: 3 * 3 * 64)
    assert len(load_folder(tmp_path)) == 3


def test_free_memory(monkeypatch):
    """Breaks when a limit of the address space, as batch systems set, or the machine's memory is not looked at."""
    machine = hardware.find_free_memory()
    assert 10**7 < machine < 2**63 - 1
    used = 1024 * hardware.read_system_figures("/proc/self/status")["VmSize"]
    limits = {hardware.resource.RLIMIT_AS: used + 10**6}
    unlimited = hardware.resource.RLIM_INFINITY
    monkeypatch.setattr(hardware.resource, "getrlimit", lambda kind: (limits.get(kind, unlimited), unlimited))
    assert hardware.find_free_memory() <= 10**6


# ---- folders ----


@pytest.mark.parametrize("test_name", ["val", "valid", "validation", "dev", "test", "eval", "Val", "TEST"])
@pytest.mark.parametrize("train_name", ["train", "Train"])
def test_splits_are_no_classes(tmp_path, train_name, test_name):
    """Breaks when folders of splits, as people call them, are taken for classes, in either reader of folders."""
    for split, count in ((train_name, 3), (test_name, 2)):
        for i in range(count):
            save(tmp_path / split / "cat" / f"{i}.png")
    for split, count in (("train", 3), ("test", 2)):
        dataset = load_folder(tmp_path, split=split)
        assert (len(dataset), dataset.class_names) == (count, ("cat",))
        streamed = imagenet.open_imagenet(tmp_path, split, workers=0)
        assert (len(streamed), streamed.class_names) == (count, ("cat",))


def test_other_layouts(tmp_path, capsys):
    """Breaks when a lone train/ is a class, a class called train is a split, or what is left out is not said."""
    save(tmp_path / "lone/train/cat/0.png")
    for split in ("train", "test"):
        assert load_folder(tmp_path / "lone", split=split).class_names == ("cat",)
    assert "no folder of test images" in capsys.readouterr().out
    for name in ("bus", "train"):
        save(tmp_path / f"vehicles/{name}/0.png")
    assert load_folder(tmp_path / "vehicles").class_names == ("bus", "train")
    for name in ("train/cat", "val/cat", "test/cat", "more/cat"):
        save(tmp_path / f"all/{name}/{name[:3]}.png")
    assert len(load_folder(tmp_path / "all")) == 1
    assert "left out: more, val\n" in capsys.readouterr().out
    for name in ("training_set/cat", "training_set/dog", "test_images/dog", "train_data/cat"):
        save(tmp_path / f"longer/{name}/{name[:2]}.png")
    assert load_folder(tmp_path / "longer", split="test").labels.tolist() == [0]
    assert load_folder(tmp_path / "longer").class_names == ("cat",)
    assert capsys.readouterr().out.count("left out: training_set\n") == 2
    save(tmp_path / "outer/Images/cat/0.png")
    assert load_folder(tmp_path / "outer").class_names == ("Images",)
    assert "all images are of the class Images; if its subfolders" in capsys.readouterr().out
    save(tmp_path / "half/val/cat/0.png")
    with pytest.raises(UsageError, match="has no folder train"):
        load_folder(tmp_path / "half")


HIDDEN = (".ipynb_checkpoints/0.png", "__MACOSX/0.png", "@eaDir/0.png", "._x.png", ".cache/deep/0.png", "Thumbs.db")


@pytest.mark.parametrize("read", [load_folder, lambda path: imagenet.open_imagenet(path, "train", workers=0)])
def test_hidden_and_linked_folders(tmp_path, capsys, read):
    """Breaks when copies that programs keep count as images, at any depth, or linked ones do not, or twice; or links
    in a circle hang."""
    for name in ("a", "b"):
        save(tmp_path / f"d/{name}/0.png")
        for hidden in HIDDEN:
            path = tmp_path / "d" / name / hidden
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
    for hidden in HIDDEN:
        save(tmp_path / "d" / hidden, format="PNG")
    save(tmp_path / "store/1.png")
    save(tmp_path / "store/inner/2.png")
    (tmp_path / "d/a/more").symlink_to(tmp_path / "store")
    (tmp_path / "d/a/again").symlink_to(tmp_path / "store")
    (tmp_path / "store/inner/circle").symlink_to(tmp_path / "store")
    (tmp_path / "d/b/up").symlink_to(tmp_path / "d")
    dataset = read(tmp_path / "d")
    assert (len(dataset), dataset.class_names) == (4, ("a", "b"))
    (tmp_path / "d/c").symlink_to(tmp_path / "store")
    assert len(read(tmp_path / "d")) == 6
    assert "note" not in capsys.readouterr().out
    (tmp_path / "d/a/photo").write_bytes(b"")
    read(tmp_path / "d")
    assert "1 files below" in (said := capsys.readouterr().out) and "such as a/photo" in said


def test_names_of_all_kinds(tmp_path, capsys):
    """Breaks when a name with spaces, line ends or bytes that are no UTF-8 ends in anything but an image or a line."""
    odd = os.fsdecode(b"caf\xe9 au\nlait")
    save(tmp_path / "d" / odd / (odd + ".PNG"))
    save(tmp_path / "d" / "new york" / "a b.jpeg")
    dataset = load_folder(tmp_path / "d")
    assert dataset.class_names == ("caf\\udce9 au\\nlait", "new york")
    assert imagenet.open_imagenet(tmp_path / "d", "train", workers=0).raw(torch.arange(2)).shape[0] == 2
    (tmp_path / "d" / odd / (odd + ".PNG")).write_bytes(b"no image")
    with pytest.raises(UsageError, match="is damaged") as caught:
        load_folder(tmp_path / "d")
    str(caught.value).encode("utf-8")
    assert "\n" not in str(caught.value)


def test_what_is_no_file(tmp_path):
    """Breaks when a pipe with the name of an image is waited for."""
    save(tmp_path / "0.png")
    os.mkfifo(tmp_path / "1.png")
    with pytest.raises(UsageError, match=r"1\.png cannot be read \(it is a pipe"):
        load_folder(tmp_path, image_size=8)
    dataset = imagenet.open_imagenet(tmp_path, "train", workers=0)
    dataset.raw(torch.tensor([1]))
    assert dataset.bad == {1}


def test_folders_in_folders(tmp_path):
    """Breaks when folders that lie deep inside each other end in a traceback."""
    save(tmp_path / "a" / ("n/" * 400) / "0.png")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 200)
    try:
        assert len(folders.list_folder(tmp_path).paths) == 1
    finally:
        sys.setrecursionlimit(limit)


@pytest.mark.parametrize("read", [load_folder, lambda path: imagenet.open_imagenet(path, "train", workers=0)])
def test_links_that_lead_nowhere(tmp_path, read):
    """Breaks when a class on a disk that is away is left out without a word, or a link to itself is a traceback."""
    save(tmp_path / "a/0.png")
    for link, target in ((tmp_path / "b", "nowhere"), (tmp_path / "a/more", "more")):
        link.symlink_to(target)
        with pytest.raises(UsageError, match=f"{link.name} is a broken link; repair or remove it"):
            read(tmp_path)
        link.unlink()
    (tmp_path / "a/1.png").symlink_to("nowhere.png")
    with pytest.raises(UsageError, match=r"1\.png"):
        load_folder(tmp_path)


# ---- sizes ----


def test_images_that_are_not_square(tmp_path):
    """Breaks when a model is examined on images whose height was taken for their width."""
    for i in range(2):
        save(tmp_path / f"{i}.png", draw_bytes(20, 32, 3, seed=i).numpy())
    model = make_model(models.ModelConfig("ResNet32", (3, 20, 32), 2))
    trained = TrainedModel(model, tmp_path / "model_1.pt", {"dataset": "folder", "data_path": str(tmp_path)}, ())
    own = load_split("test", trained, SandboxSettings(data_workers=0), CPU)
    assert torch.equal(own.raw(torch.arange(2)), load_folder(tmp_path).raw(torch.arange(2)))
    settings = SandboxSettings(mixfolder=[str(tmp_path)], data_workers=0)
    assert sandbox_data.load_outlier_set(str(tmp_path), settings, model.config, CPU).image_shape == (3, 20, 32)


SIZES = {
    "ResNet32": [(8, 8), (8, 300), (20, 32), (300, 20)],
    "ResNet128": [(65, 32), (300, 40), (128, 128)],
    "": [(7, 7), (1, 1), (4, 4), (300, 7), (7, 300)],
}


@pytest.mark.parametrize(("name", "sizes"), SIZES.items())
def test_the_network_takes_the_images(name, sizes):
    """Breaks when a network is chosen that halves an image away, or one is refused that a network takes."""
    for height, width in sizes:
        dataset = data.StoredImages("folder", draw_bytes(1, 3, height, width), None)
        if not name:
            with pytest.raises(
                UsageError, match=rf"images of {width}x{height} pixels are too small for .*`image_size`"
            ):
                choose_network(TrainSettings(dataset="folder"), dataset)
            continue
        config = choose_network(TrainSettings(dataset="folder", num_filters=2), dataset)
        assert config.network == name
        assert make_model(config)(torch.rand(1, 3, height, width)).isfinite().all()


def test_smallest_sides():
    """Breaks when a network takes no images of its smallest side, or takes smaller ones that are refused."""
    for name in models.NETWORKS:
        side = models.SMALLEST_SIDES.get(name, 1)
        channels = 1 if name in ("MnistNet", "DspritesNet") else 3
        config = models.ModelConfig(name, (channels, side, side), 2)
        assert make_model(config)(torch.rand(1, *config.image_shape)).isfinite().all()
        if side > 1:
            smaller = dataclasses.replace(config, image_shape=(channels, side, side - 1))
            with pytest.raises(RuntimeError):
                make_model(smaller)(torch.rand(1, *smaller.image_shape))


# ---- labels by name ----


def examine(path: pathlib.Path, names: tuple[str, ...], split: str = "test", classes: int = 0) -> data.Dataset:
    """Return a split of a folder as a model with these classes is examined on it."""
    model = make_model(models.ModelConfig("ResNet32", (3, 8, 8), 2, label_size=classes or len(names)))
    trained = TrainedModel(model, path / "model_1.pt", {"dataset": "folder", "data_path": str(path)}, names)
    return match_labels(load_split(split, trained, AisSettings(data_workers=0), CPU), trained)


def write_classes(path: pathlib.Path, *names: str) -> None:
    for i, name in enumerate(names):
        save(path / name / f"{i}.png", np.full((8, 8, 3), i, np.uint8))


def test_labels_follow_names(tmp_path, capsys):
    """Breaks when a class gets its number by its place in another split: other order, fewer classes, other capitals."""
    write_classes(tmp_path / "a", "10", "2", "cat")
    assert torch.equal(examine(tmp_path / "a", ("2", "cat", "10")).labels, torch.tensor([2, 0, 1]))
    assert examine(tmp_path / "a", ("10", "2", "bird", "cat")).labels.tolist() == [0, 1, 3]
    assert examine(tmp_path / "a", ("10", "2", "bird", "cat")).label_size == 4
    assert "note" not in capsys.readouterr().out
    write_classes(tmp_path / "b", "cafe\u0301", "dog")
    assert examine(tmp_path / "b", ("Dog", "caf\xe9")).labels.tolist() == [1, 0]
    assert "dog is Dog" in capsys.readouterr().out
    assert examine(tmp_path / "a", (), classes=3).labels.tolist() == [0, 1, 2]  # a checkpoint without names


def test_a_class_is_found_by_its_name():
    """Breaks when a number is a place although classes are called by numbers, or a name with a comma is not found."""
    folders = ("1", "10", "2", "red, big")
    words = {"1": 0, "10": 1, "2": 2, "red, big": 3, "Big": 3}
    assert {word: find_class("label", word, folders, 4) for word in words} == words
    for word in ("0", "3"):
        with pytest.raises(UsageError, match=f"no class is called '{word}'"):
            find_class("label", word, folders, 4)
    for names in (("0", "1", "2"), ("00", "01", "02"), ("cat", "dog", "2"), ()):
        assert find_class("label", "2", names, 3) == 2


def test_other_classes_are_refused(tmp_path):
    """Breaks when images of classes that a model does not know get labels of those that it knows."""
    write_classes(tmp_path / "a", "cat", "dog")
    with pytest.raises(UsageError, match="has the class 'dog', which is not one of cat, frog"):
        examine(tmp_path / "a", ("cat", "frog"))
    write_classes(tmp_path / "b", "Dog", "DOG")
    with pytest.raises(UsageError, match="several classes that could be 'dog'"):
        examine(tmp_path / "b", ("cat", "dog"))
    save(tmp_path / "c/0.png")
    with pytest.raises(UsageError, match=r"has no labels .* put the images into class folders"):
        examine(tmp_path / "c", ("cat", "dog"))
    write_mnist(tmp_path / "FashionMNIST/raw")
    digits = make_model(models.ModelConfig("MnistNet", (1, 28, 28), 2, label_size=10))
    trained = TrainedModel(digits, tmp_path, {"dataset": "mnist"}, tuple("0123456789"))
    settings = SandboxSettings(dataset="fashion_mnist", datadir=str(tmp_path), download=False)
    with pytest.raises(UsageError, match="`dataset`=fashion_mnist has the class 'T-shirt'"):
        sandbox_data.load_model_split("test", settings, trained, CPU)


def test_splits_that_are_measured_together_have_one_list_of_classes(tmp_path):
    """Breaks when the classifier that compares samples learns the classes of two splits by their places."""
    for name in ("train/cat", "train/dog", "test/dog"):
        save(tmp_path / name / "0.png")
    splits = [load_folder(tmp_path, split=split) for split in ("train", "test")]
    classes = RealImages.choose("folder", "both", splits, 10).classes()
    assert classes is not None and classes.tolist() == [0, 1, 1]


def test_streamed_labels_follow_names(tmp_path):
    """Breaks when class folders of imagenetfull keep their own numbers, or WordNet's are not those of the labels."""
    for i, name in enumerate(("train/cat", "train/dog", "val/dog")):
        save(tmp_path / name / f"{i}.png")
    model = make_model(models.ModelConfig("ResNet128", (3, 128, 128), 2, label_size=2))
    flags = {"dataset": "imagenetfull", "imagenet_datadir": str(tmp_path), "antialias": False}
    trained = TrainedModel(model, tmp_path, flags, ("cat", "dog"))
    settings = AisSettings(data_workers=0)
    dataset = match_labels(load_split("test", trained, settings, CPU), trained)
    _, labels = dataset.batch(torch.tensor([0]), None)
    assert labels is not None and labels.tolist() == [[0, 1]]
    numbered = trained._replace(class_names=("0", "1"))
    save(tmp_path / "val/cat/3.png")
    with pytest.raises(UsageError, match="has the class 'cat'"):
        match_labels(load_split("test", numbered, settings, CPU), numbered)
    for before, after in (("cat", "n00000001"), ("dog", "n00000002")):
        (tmp_path / "val" / before).rename(tmp_path / "val" / after)
    assert match_labels(load_split("test", numbered, settings, CPU), numbered).class_names == ("0", "1")


# ---- ImageNet ----

RECORD_NAMES = (
    ("train-00000-of-00001", "validation-00000-of-00001"),
    ("train-00000-of-00001.tfrecord", "val-00000-of-00001.tfrecord"),
    ("imagenet2012-train.tfrecord-00000-of-00001", "imagenet2012-validation.tfrecord-00000-of-00001"),
    ("train_0.tfrecords", "test_0.tfrecords"),
    ("train/train-00000-of-00001", "validation/validation-00000-of-00001"),
    ("Train/part-00000-of-00001", "val/part-00000-of-00001"),
)


@pytest.mark.parametrize("names", RECORD_NAMES)
def test_records_wherever_they_are(tmp_path, names):
    """Breaks when TFRecords are missed under the names and in the folders of usual conversion scripts."""
    for name, count in zip(names, (3, 2), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_records(tmp_path / name, [encode_example(encode_noise(i), i + 1) for i in range(count)])
    for split, count in (("train", 3), ("test", 2)):
        dataset = imagenet.open_imagenet(tmp_path, split, workers=0)
        assert (len(dataset), dataset.label_size) == (count, 1000)


def test_files_of_records_that_are_missing(tmp_path, capsys):
    """Breaks when a run takes a part of the records for all without a word, or a lost link or a pipe is passed over."""
    for i in (0, 3):
        write_records(tmp_path / f"train-0000{i}-of-00004", [encode_example(encode_noise(i), 1)])
    assert len(imagenet.open_imagenet(tmp_path, "train", workers=0)) == 2
    assert capsys.readouterr().out.startswith("note: 2 of 4 TFRecord files are missing")
    write_records(tmp_path / "train-00001-of-00004", [encode_example(encode_noise(1), 1)])
    path = tmp_path / "train-00002-of-00004"
    path.symlink_to(path.name)
    with pytest.raises(UsageError, match="train-00002-of-00004 is a broken link"):
        imagenet.open_imagenet(tmp_path, "train", workers=0)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UsageError, match=r"train-00002-of-00004 .*cannot be read"):
        imagenet.open_imagenet(tmp_path, "train", workers=0)
    path.unlink()
    write_records(path, [encode_example(b"no image", 1)])
    dataset = imagenet.open_imagenet(tmp_path, "train", workers=0)
    dataset.raw(torch.tensor([2]))
    said = capsys.readouterr().out
    assert "missing" not in said and "cannot be decoded as an image (of no known format)" in said


def test_an_index_with_paths_and_a_byte_order_mark(tmp_path):
    """Breaks when what other programs put before or into index.json makes it unreadable."""
    name = "train-00000-of-00001"
    write_records(tmp_path / name, [encode_example(encode_noise(0), 1)])
    for key in (name, f"/somewhere/{name}", f"train/{name}", f"./{name}"):
        text = json.dumps({"record_counts": {key: 1}})
        (tmp_path / "index.json").write_text(text, encoding="utf-8-sig")
        assert len(imagenet.open_imagenet(tmp_path, "train", workers=0)) == 1


def test_an_index_of_a_million_files(tmp_path, monkeypatch):
    """Breaks when all files of an index are looked for before the first that is missing is named."""
    looked = []
    locate = imagenet.locate_record_file
    monkeypatch.setattr(imagenet, "locate_record_file", lambda *where: looked.append(where) or locate(*where))
    names = {f"train-{i:07}-of-1000000": 1 for i in range(1000)}
    (tmp_path / "index.json").write_text(json.dumps({"record_counts": names}))
    with pytest.raises(UsageError, match="train-0000000-of-1000000 at byte 0 cannot be read"):
        imagenet.open_imagenet(tmp_path, "train")
    assert len(looked) == 1


def read_labels(path: pathlib.Path, split: str) -> list[int] | None:
    dataset = imagenet.open_imagenet(path, split, workers=0)
    _, labels = dataset.batch(torch.arange(len(dataset)), None)
    return None if labels is None else labels.argmax(1).tolist()


def write_labelled(path: pathlib.Path, *labels: int | None) -> None:
    write_records(path, [encode_example(encode_noise(0), label) for label in labels])


def test_where_labels_begin(tmp_path, capsys):
    """Breaks when labels from 0 are taken for damage or are one too low, also in the split that lacks a 0 itself."""
    write_labelled(tmp_path / "train-00000-of-00001", 3, 0, 7)
    write_labelled(tmp_path / "validation-00000-of-00001", 5, 6)
    assert read_labels(tmp_path, "train") == [3, 0, 7]
    assert read_labels(tmp_path, "test") == [5, 6]
    assert capsys.readouterr().out.count("count from 0; the class of an image is its label") == 2
    write_labelled(tmp_path / "train-00000-of-00001", 3, 1, 7)
    assert read_labels(tmp_path, "train") == [2, 0, 6]
    write_labelled(tmp_path / "train-00000-of-00001", 3, 1000)  # which tells as much as a 0 elsewhere
    write_labelled(tmp_path / "validation-00000-of-00001", 0)
    assert read_labels(tmp_path, "train") == [2, 999]
    assert not capsys.readouterr().out


def test_records_without_labels(tmp_path, capsys):
    """Breaks when images without labels are called damaged; an unconditional model needs none."""
    write_labelled(tmp_path / "train-00000-of-00001", None, None)
    assert read_labels(tmp_path, "train") is None
    assert "hold no labels" in capsys.readouterr().out
    dataset = imagenet.open_imagenet(tmp_path, "train", workers=0)
    with pytest.raises(UsageError, match="`cclass` needs labels, and imagenetfull has none"):
        choose_network(TrainSettings(dataset="imagenetfull", cclass=True), dataset)
    features = encode_feature(b"image", 1, encode_noise(0)) + encode_feature(b"label", 3, 0)
    write_records(tmp_path / "train-00000-of-00001", [encode_field(1, features)])
    assert read_labels(tmp_path, "train") == [0]  # as tensorflow_datasets calls them


def test_validation_images_without_folders(tmp_path):
    """Breaks when the validation images, as the archive unpacks them, serve no model that needs no labels."""
    save(tmp_path / "train/n01/0.png")
    for i in range(2):
        save(tmp_path / f"val/ILSVRC2012_val_0000000{i}.JPEG", format="JPEG")
    dataset = imagenet.open_imagenet(tmp_path, "test", workers=0)
    images, labels = dataset.batch(torch.arange(2), None)
    assert (len(images), labels, dataset.label_size) == (2, None, 0)


@pytest.mark.parametrize("side", imagenet.SIDES)
def test_small_imagenet_of_all_sizes(tmp_path, side):
    """Breaks when a published size is refused, its pixels are permuted, or no network takes it."""
    rows = draw_bytes(2, 3 * side * side).numpy()
    (tmp_path / "part1").mkdir()
    write_pickle(tmp_path / "part1" / IMAGENET_BATCHES[0], {"data": rows, "labels": [1, 2]})
    dataset = data.load_dataset("imagenet", path=tmp_path)
    assert torch.equal(dataset.raw(torch.arange(2)), torch.from_numpy(rows).view(2, 3, side, side))
    config = choose_network(TrainSettings(dataset="imagenet", num_filters=2), dataset)
    assert make_model(config)(torch.rand(1, 3, side, side)).isfinite().all()
    other = draw_bytes(2, 3 * 24 * 24 if side == 8 else 192).numpy()
    write_pickle(tmp_path / IMAGENET_BATCHES[1], {"data": other, "labels": [1, 2]})
    with pytest.raises(UsageError, match="different sizes" if side > 8 else r"not uint8 \(2, 3072\), or so"):
        data.load_dataset("imagenet", path=tmp_path)


# ---- MNIST ----


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("mark", [".", "-"])
@pytest.mark.parametrize("folder", ["MNIST/raw", "mnist", "."])
def test_other_names_of_mnist(tmp_path, capsys, folder, mark, compressed):
    """Breaks when the files are missed under the names that other sources give them."""
    place = tmp_path / "d" / folder
    contents = write_mnist(place if folder != "." else tmp_path / "d", compressed=compressed)
    for path in list(place.iterdir()):
        path.rename(path.with_name(path.name.replace("-idx", f"{mark}idx")))
    for split, (images, classes) in contents.items():
        dataset = data.load_dataset("mnist", split=split, root=tmp_path / "d", download=False)
        assert torch.equal(dataset.raw(torch.arange(7)), images[:, None])
        assert dataset.labels is not None and torch.equal(dataset.labels, classes.long())
    assert ("are taken for MNIST" in capsys.readouterr().out) == (folder == ".")


# ---- decode workers ----


def test_temporary_files_in_a_long_path(tmp_path, monkeypatch):
    """Breaks when sockets are made below a folder whose path is too long for them, or the folder stays another."""
    folder = tmp_path / ("job" * 30)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with streaming.set_short_temporary_folder():
        assert len(tempfile.gettempdir()) <= streaming.LONGEST_FOLDER
    assert tempfile.gettempdir() == str(folder)


@pytest.mark.parametrize("trouble", [OSError("AF_UNIX path too long"), EOFError()])
def test_a_worker_that_cannot_start_is_no_fault_of_images(tmp_path, monkeypatch, trouble):
    """Breaks when the machine's trouble is blamed on images, or tried again for every image."""
    save(tmp_path / "0.png")

    def fail(*arguments, **settings):
        raise trouble

    started = SimpleNamespace(start=lambda: None)
    pipe = SimpleNamespace(recv=fail, close=lambda: None)
    context = SimpleNamespace(
        set_forkserver_preload=lambda names: None,
        Pipe=lambda: (pipe, pipe),
        Process=fail if isinstance(trouble, OSError) else lambda **settings: started,
    )
    monkeypatch.setattr(streaming.multiprocessing, "get_context", lambda kind: context)
    dataset = imagenet.open_imagenet(tmp_path, "train", workers=1)
    with pytest.raises(UsageError, match=r"cannot be started \((AF_UNIX|it ended at once).*`data_workers`=0"):
        dataset.raw(torch.tensor([0]))
