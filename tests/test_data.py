"""Data sets in their real file formats, batches of them, what is done to a batch, and what a user can get wrong."""

import io
import itertools
import os
import pathlib
import pickle
import pickletools
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
from conftest import Bomb, draw_bytes, encode_idx, make_generator, write_mnist, write_sprites
from ebm.readers import bounded, downloads, dsprites, pickles
from ebm.support.errors import UsageError

# ---- batches from bytes ----


def test_dequantised_in_steps():
    """Breaks if a byte leaves its step of 1/256, fills it unevenly, or rescale is applied to only one of both."""
    images = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(-1, 1, 28, 28)
    for rescale in (1.0, 8.0):
        batch, labels = data.StoredImages("steps", images, None).batch(torch.arange(256), make_generator(), rescale)
        noise = batch / rescale * 256 - images
        assert labels is None
        assert batch.shape == (256, 1, 28, 28)
        assert -1e-4 < noise.min() < 0.001
        assert 0.999 < noise.max() < 1 + 1e-4
        assert noise.mean().item() == pytest.approx(0.5, abs=0.003)
        assert noise.var().item() == pytest.approx(1 / 12, abs=0.001)


def test_dequantised_around_the_value():
    """Breaks if the noise of svhn, cifar100 and textures is not U(−1/512, 1/512) around byte/255."""
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(-1, 3, 32, 32)
    batch, _ = data.StoredImages("centred", images, None, noise="centred").batch(torch.arange(3), make_generator(), 2.0)
    noise = batch / 2 - torch.tensor([0.0, 0.2, 1.0]).view(3, 1, 1, 1)
    assert noise.abs().max().item() == pytest.approx(1 / 512, rel=0.01)
    assert noise.mean().item() == pytest.approx(0, abs=3e-5)


def test_batch_follows_its_index():
    """Breaks if images and labels of a batch are of other numbers than asked for, or classes are not one-hot."""
    images = draw_bytes(5, 3, 4, 4)
    dataset = data.StoredImages("five", images, torch.tensor([2, 0, 1, 1, 2]), ("a", "b", "c"), noise="none")
    batch, labels = dataset.batch(torch.tensor([4, 1, 1]), None)
    assert torch.equal((batch * 255).round().to(torch.uint8), images[[4, 1, 1]])
    assert labels is not None
    assert labels.tolist() == [[0, 0, 1], [1, 0, 0], [1, 0, 0]]
    assert (len(dataset), dataset.image_shape, dataset.label_size) == (5, (3, 4, 4), 3)


def test_same_generator_same_batch():
    """Breaks if a batch draws from anything but the generator it is given."""
    dataset = data.StoredImages("twice", draw_bytes(9, 1, 8, 8), None)
    index = torch.arange(9)
    assert torch.equal(dataset.batch(index, make_generator(3))[0], dataset.batch(index, make_generator(3))[0])


# ---- digits ----


def test_digits():
    """Breaks if the splits overlap or leave images out, a class is rare in one, or an image is not enlarged evenly."""
    from sklearn.datasets import load_digits

    train, test = data.load_dataset("digits"), data.load_dataset("digits", split="test")
    assert (len(train), len(test)) == (1618, 179)
    assert train.image_shape == (1, 28, 28)
    assert isinstance(train.images, torch.Tensor) and isinstance(test.images, torch.Tensor)
    assert train.labels is not None and test.labels is not None
    assert min(test.labels.bincount()) >= 17
    original = torch.from_numpy(load_digits().images).float()
    assert len({bytes(image.numpy()) for image in torch.cat([train.images, test.images])}) == len(
        original.unique(dim=0)
    )
    enlarged = torch.nn.functional.interpolate(original[None] / 16, size=28, mode="bilinear")[0]
    nearest = torch.cdist(test.images[:20].flatten(1) / 255, enlarged.flatten(1))
    assert nearest.min(1).values.max() < 28 / 255 / 2 + 1e-4  # rounded to a byte: half a step in each of 28·28 pixels
    assert torch.equal(torch.from_numpy(load_digits().target)[nearest.argmin(1)], test.labels[:20])


# ---- files in torchvision's formats ----


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST/raw"), ("fashion_mnist", "FashionMNIST/raw")])
def test_mnist(tmp_path, name, folder, compressed):
    """Breaks if an IDX file is not read as it is, plain or packed, or the splits change places."""
    contents = write_mnist(tmp_path / folder, compressed=compressed)
    for split, (images, classes) in contents.items():
        dataset = data.load_dataset(name, split=split, root=tmp_path)
        assert torch.equal(torch.as_tensor(dataset.images), images[:, None])
        assert dataset.labels is not None
        assert torch.equal(dataset.labels, classes.long())
        assert (dataset.label_size, len(dataset.class_names), dataset.noise) == (10, 10, "steps")


def python2_pickle(value):
    """Return the pickle that Python 2 made of a value, in which bytes and text are strings of one kind."""
    contents = pickle.dumps(value, protocol=3)
    parts = [(opcode.name, argument, start) for opcode, argument, start in pickletools.genops(contents)]
    result = bytearray()
    for (name, argument, start), (_, _, end) in itertools.pairwise([*parts, ("", None, len(contents))]):
        if name in ("BINBYTES", "SHORT_BINBYTES", "BINUNICODE"):
            text = argument if isinstance(argument, bytes) else str(argument).encode()
            result += pickle.BINSTRING + struct.pack("<i", len(text)) + text
        else:
            result += contents[start:end]
    return bytes(result).replace(b"numpy._core", b"numpy.core").replace(b"\x80\x03", b"\x80\x02", 1)


def write_pickle(path, contents, python2=True):
    path.write_bytes(python2_pickle(contents) if python2 else pickle.dumps(contents, protocol=4))


def write_cifar(folder, *, python2=True, meta="batches.meta", label_key="labels", names_key="label_names", files=()):
    """Write batches of four images each; return all images (n, 3, 32, 32) and classes."""
    folder.mkdir(parents=True)
    images, classes = [], []
    for n, file in enumerate(files):
        rows = draw_bytes(4, 3072, seed=n)
        labels = [n % 3, 2, 0, 1]
        write_pickle(folder / file, {"batch_label": file, "data": rows.numpy(), label_key: labels}, python2)
        images.append(rows.view(4, 3, 32, 32))  # red, green and blue follow one another
        classes += labels
    write_pickle(folder / meta, {names_key: ["cat", "dog", "frog"]}, python2)
    return torch.cat(images), torch.tensor(classes)


@pytest.mark.parametrize("python2", [True, False])
def test_cifar10(tmp_path, python2):
    """Breaks if the pickles of Python 2 or 3 are not read, batches are out of order, or colours change places."""
    files = [f"data_batch_{n}" for n in range(1, 6)]
    images, classes = write_cifar(tmp_path / "cifar-10-batches-py", python2=python2, files=files)
    dataset = data.load_dataset("cifar10", root=tmp_path)
    assert torch.equal(torch.as_tensor(dataset.images), images)
    assert dataset.labels is not None
    assert torch.equal(dataset.labels, classes)
    assert (dataset.class_names, dataset.noise) == (("cat", "dog", "frog"), "steps")


PLAIN_VALUES = {
    "data": draw_bytes(3, 3072).numpy(),
    "labels": [np.int64(1), np.int32(7), np.uint16(1000), 3],
    "label array": np.array([1, 1000], ">i4"),
    "mean": np.linspace(0, 255, 3072),
    "columns first": np.asfortranarray(draw_bytes(3, 8).numpy()),
    "permuted": draw_bytes(2, 3, 4).permute(1, 0, 2).numpy(),
    "every second": draw_bytes(3, 8).numpy()[:, ::2],
    "names": np.array(["cat", "dog"]),
    "name": np.str_("frog"),
    "bytes": bytes(range(256)),
    "nothing": b"",
}


@pytest.mark.parametrize("keys_are_bytes", [False, True])
@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_all_protocols(tmp_path, protocol, keys_are_bytes):
    """Breaks when plain values or arrays that Python 3 wrote are refused or changed, in any protocol."""
    written = {key.encode() if keys_are_bytes else key: value for key, value in PLAIN_VALUES.items()}
    (tmp_path / "batch").write_bytes(pickle.dumps(written, protocol))
    read = pickles.read_pickle(tmp_path / "batch", list(PLAIN_VALUES))
    for found, wanted in zip(read, PLAIN_VALUES.values(), strict=True):
        assert isinstance(found, np.ndarray) == isinstance(wanted, np.ndarray)
        assert np.array_equal(found, wanted)
    torch.from_numpy(read[2])  # which takes the byte order of the machine only


def test_small_pickles_fill_no_memory():
    """Breaks when a text or the bytes of an array are copied each time that a pickle of many short calls names them."""
    contents = bytes(1000)
    views = [Bomb(np._core.numeric._frombuffer, contents, np.dtype("u1"), (1000,), "C") for _ in range(2)]
    arrays = pickles.PlainUnpickler(io.BytesIO(pickle.dumps(views, 5))).load()
    assert np.shares_memory(arrays[0].view, arrays[1].view)
    texts = pickles.PlainUnpickler(io.BytesIO(pickle.dumps([bytes(9), bytes(bytearray(9))], 2))).load()
    assert texts[0] == bytes(9) and texts[0] is texts[1]


def test_cifar100(tmp_path):
    """Breaks if the fine classes are not the labels, or the test split is not the file `test`."""
    names = {"meta": "meta", "label_key": "fine_labels", "names_key": "fine_label_names"}
    images, classes = write_cifar(tmp_path / "cifar-100-python", files=["train", "test"], **names)
    dataset = data.load_dataset("cifar100", root=tmp_path, split="test")
    assert torch.equal(torch.as_tensor(dataset.images), images[4:])
    assert dataset.labels is not None
    assert torch.equal(dataset.labels, classes[4:])
    assert dataset.noise == "centred"


def write_svhn(path):
    """Write three images of the digits 0, 1 and 9 as a MATLAB file of SVHN; return them (3, 3, 32, 32)."""
    from scipy.io import savemat

    images = draw_bytes(3, 3, 32, 32)
    savemat(path, {"X": images.permute(2, 3, 1, 0).numpy(), "y": np.array([[10], [1], [9]], np.uint8)})
    return images


def test_svhn(tmp_path):
    """Breaks if the axes of the MATLAB file are taken in another order, or label 10 is not the digit 0."""
    images = write_svhn(tmp_path / "test_32x32.mat")
    dataset = data.load_dataset("svhn", root=tmp_path, split="test")
    assert torch.equal(torch.as_tensor(dataset.images), images)
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 1, 9]
    assert dataset.noise == "centred"


def test_textures(tmp_path):
    """Breaks if anything but the upper left 32x32 pixels is taken."""
    pixels = draw_bytes(50, 40, 3)
    folder = tmp_path / "dtd/dtd/images/banded"
    folder.mkdir(parents=True)
    Image.fromarray(pixels.numpy()).save(folder / "banded_0001.png")
    dataset = data.load_dataset("textures", root=tmp_path)
    assert torch.equal(torch.as_tensor(dataset.images)[0], pixels[:32, :32].permute(2, 0, 1))
    assert (dataset.class_names, dataset.noise) == (("banded",), "centred")


@pytest.mark.parametrize("place", ["celeba/img_align_celeba", "img_align_celeba"])
def test_celeba(tmp_path, place):
    """Breaks when a face is cut instead of squeezed, resized without averaging, or gets noise or a label."""
    (tmp_path / place).mkdir(parents=True)
    y, x = np.mgrid[0:218, 0:178]
    face = np.stack([y, x, 255 * (x % 2)], 2).astype(np.uint8)  # two ramps, and stripes that average to grey
    for name in ("000001.png", "000002.png"):
        Image.fromarray(face).save(tmp_path / place / name)
    dataset = data.load_dataset("celeba", root=tmp_path)
    images, labels = dataset.batch(torch.tensor([1]), make_generator(), rescale=2.0)
    assert (len(dataset), dataset.image_shape, labels) == (2, (3, 32, 32), None)
    assert torch.allclose(images * 127.5, dataset.raw(torch.tensor([1])).float(), atol=1e-4)
    middle = (torch.arange(32) + 0.5) / 32
    inner = slice(1, -1)  # at the edges there is less to average
    assert ((images[0, 0] * 127.5 - (218 * middle[:, None] - 0.5)).abs()[inner] <= 0.51).all()
    assert ((images[0, 1] * 127.5 - (178 * middle - 0.5)).abs()[:, inner] <= 0.51).all()
    assert ((images[0, 2] - 1).abs()[:, inner] < 0.1).all()


def stand_in_torchvision(**datasets):
    """Return what stands in for the module torchvision, with these data sets."""
    return SimpleNamespace(datasets=SimpleNamespace(**datasets))


def test_missing_files_are_downloaded(tmp_path, monkeypatch):
    """Breaks if missing files do not lead to a download, or what it brings is not read."""
    asked = []

    def download_mnist(root, **settings):
        asked.append((root, settings))
        write_mnist(root / "MNIST/raw")

    def download_svhn(root, **settings):
        asked.append((root, settings))
        write_svhn(root / "test_32x32.mat")

    stand_in = stand_in_torchvision(MNIST=download_mnist, SVHN=download_svhn)
    monkeypatch.setattr(data, "import_torchvision", lambda: stand_in)
    assert len(data.load_dataset("mnist", root=tmp_path)) == 7
    assert len(data.load_dataset("svhn", split="test", root=tmp_path)) == 3
    assert asked == [(tmp_path, {"download": True}), (tmp_path, {"split": "test", "download": True})]


def test_a_download_replaces_nothing(tmp_path, monkeypatch):
    """Breaks if the batches that somebody wrote, one of which is missing, are overwritten by the published ones."""

    def download_cifar(root, **settings):
        files = [f"data_batch_{n}" for n in range(1, 6)]
        write_cifar(root / "cifar-10-batches-py", files=files)

    monkeypatch.setattr(data, "import_torchvision", lambda: stand_in_torchvision(CIFAR10=download_cifar))
    assert len(data.load_dataset("cifar10", root=tmp_path)) == 20
    (tmp_path / "cifar-10-batches-py/data_batch_5").unlink()
    message = "data_batch_5 is missing and cannot be downloaded .*holds other files, which the download would replace"
    with pytest.raises(UsageError, match=message):
        data.load_dataset("cifar10", root=tmp_path)


def test_torchvision():
    """Breaks if torchvision does not import beside this torch, with its operators or without."""
    torchvision = downloads.import_torchvision()
    assert torchvision.utils.make_grid(torch.zeros(2, 3, 4, 4)).shape[0] == 3
    assert torchvision.datasets.FashionMNIST.mirrors


# ---- folders of images ----


def write_images(folder, count, size=(5, 4), mode="RGB", seed=0):
    """Write PNG images of random pixels; return them (count, C, H, W)."""
    folder.mkdir(parents=True, exist_ok=True)
    width, height = size
    pixels = draw_bytes(count, height, width, len(mode), seed=seed)
    if mode == "L":
        pixels = pixels[:, :, :, :1]
    for n, image in enumerate(pixels):
        Image.fromarray(image.squeeze(2).numpy()).save(folder / f"{n:03}.png")
    return pixels.permute(0, 3, 1, 2)


def test_folder_of_classes(tmp_path):
    """Breaks if a class's images get another's label, order depends on the disk, or hidden and other files count."""
    images = {name: write_images(tmp_path / name, 105 + n, seed=n) for n, name in enumerate(("dog", "ant", "cat"))}
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    (tmp_path / "ant" / "._000.png").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    dataset = data.load_dataset("folder", path=tmp_path)
    assert dataset.class_names == ("ant", "cat", "dog")
    assert torch.equal(torch.as_tensor(dataset.images), torch.cat([images[name] for name in dataset.class_names]))
    assert dataset.labels is not None
    assert dataset.labels.bincount().tolist() == [106, 107, 105]
    test = data.load_dataset("folder", path=tmp_path, split="test", workers=0)
    assert torch.equal(torch.as_tensor(test.images), torch.as_tensor(dataset.images))


def test_folder_with_splits(tmp_path):
    """Breaks if folders train and test are taken for classes, or for one another."""
    train, test = write_images(tmp_path / "train/cat", 3), write_images(tmp_path / "test/cat", 2, seed=1)
    for split, images in (("train", train), ("test", test)):
        dataset = data.load_dataset("folder", path=tmp_path, split=split)
        assert torch.equal(torch.as_tensor(dataset.images), images)
        assert dataset.class_names == ("cat",)


def test_folder_without_classes(tmp_path):
    """Breaks if images without class folders get labels, or grey ones become colour."""
    images = write_images(tmp_path, 2, mode="L")
    dataset = data.load_dataset("folder", path=tmp_path)
    assert torch.equal(torch.as_tensor(dataset.images), images)
    assert (dataset.labels, dataset.label_size, dataset.class_names) == (None, 0, ())
    assert dataset.batch(torch.tensor([0]), make_generator())[1] is None


def test_image_size_and_channels(tmp_path):
    """Breaks if an image is squeezed instead of cut to its middle, or channels is not followed."""
    stripes = np.zeros((8, 24, 3), np.uint8)
    stripes[:, 8:16] = 200  # the middle third
    Image.fromarray(stripes).save(tmp_path / "wide.png")
    Image.fromarray(stripes[:, 8:16].repeat(4, 0).repeat(4, 1)).save(tmp_path / "large.png")
    dataset = data.load_dataset("folder", path=tmp_path, image_size=4, channels=1)
    assert dataset.image_shape == (1, 4, 4)
    assert (torch.as_tensor(dataset.images) > 180).all()  # the filter sees a little of the black beside


# ---- sprites ----


def test_conditions():
    """Breaks if a condition's labels are not those of the sprite, or noise or another range gets into the images."""
    index = torch.tensor([5, 400_000, 737_279])
    sizes = {"shape": 3, "size": 1, "pos": 2, "rot": 2, None: 3}
    for condition, size in sizes.items():
        dataset = data.load_dataset("dsprites", condition=condition)
        images, labels = dataset.batch(index, make_generator(), 2.0)
        latents = dsprites.compute_latents(index)
        assert torch.equal(images, 2 * dsprites.render_sprites(*latents.unbind(1)))
        assert labels is not None
        assert torch.equal(labels, dsprites.compute_labels(latents, condition or "shape"))
        assert dataset.label_size == labels.shape[1] == size
        assert dataset.class_names == (dsprites.SHAPES if size == 3 else ())
    assert len(dataset) == 737_280


def test_restricted_sprites():
    """Breaks if a subset's labels are not its free latent, positions lack their 0.5, or it cannot fill a batch."""
    sizes = {"shape": 3, "pos": 2, "size": 1, "rot": 2, "restrict": 3}
    for subset, size in sizes.items():
        dataset = data.load_dataset("dsprites", subset=subset)
        assert dataset.label_size == size
        assert len(dataset) >= 10_000
    positions = data.load_dataset("dsprites", subset="pos").batch(torch.arange(1024), None)[1]
    assert positions is not None
    assert (positions.min(), positions.max()) == (0.5, 1.5)
    scales = data.load_dataset("dsprites", subset="pos", condition="size").batch(torch.arange(9), None)[1]
    assert scales is not None
    assert torch.equal(scales, torch.full((9, 1), 0.5))


def test_sprites_of_the_published_file(tmp_path):
    """Breaks if the file's images are not used, or a subset that it lacks is not refused."""
    path = tmp_path / "dsprites.npz"
    write_sprites(path, torch.arange(100))
    dataset = data.load_dataset("dsprites", path=path, condition="pos")
    assert isinstance(dataset.images, dsprites.Sprites) and dataset.images.bits is not None
    images, labels = dataset.batch(torch.tensor([33, 133]), None)
    wanted = dsprites.compute_latents(torch.tensor([33, 33]))
    assert torch.equal(images, dsprites.render_sprites(*wanted.unbind(1)))
    assert labels is not None
    assert torch.equal(labels, wanted[:, 3:])
    with pytest.raises(UsageError, match="holds no sprite of the chosen subset"):
        data.load_dataset("dsprites", path=path, subset="size")


# ---- shuffled batches ----


def epoch_of(batches, count):
    return torch.cat([batches.next() for _ in range(count)])


def test_epochs():
    """Breaks if an image comes twice in an epoch, a short tail becomes a batch, or two epochs have one order."""
    batches = data.Batches(103, 10, seed=1)
    first, second = epoch_of(batches, 10), epoch_of(batches, 10)
    assert len(first.unique()) == len(second.unique()) == 100
    assert not torch.equal(first, second)
    assert (batches.epoch, batches.position) == (1, 100)
    assert not torch.equal(first, epoch_of(data.Batches(103, 10, seed=2), 10))


def test_workers_share_an_epoch():
    """Breaks if workers together do not see what one worker with their common batch size sees, in rank order."""
    alone = data.Batches(50, 12, seed=3)
    together = [data.Batches(50, 4, seed=3, rank=rank, world=3) for rank in range(3)]
    for _ in range(9):  # more than two epochs
        assert torch.equal(alone.next(), torch.cat([worker.next() for worker in together]))


def test_resume():
    """Breaks if a run goes on with other images than it would have seen, also with another number of workers."""
    batches = data.Batches(103, 10, seed=1)
    epoch_of(batches, 13)
    state = pickle.loads(pickle.dumps(batches.state_dict()))
    wanted = epoch_of(batches, 8)
    again = data.Batches(103, 10, seed=99)
    again.load_state_dict(state)
    assert torch.equal(epoch_of(again, 8), wanted)
    pair = [data.Batches(103, 5, seed=99, rank=rank, world=2) for rank in range(2)]
    for worker in pair:
        worker.load_state_dict(state)
    assert torch.equal(torch.cat([worker.next() for _ in range(8) for worker in pair]), wanted)


def test_single_batch_fits():
    """Breaks if a batch of the whole data set is refused, or one image more accepted."""
    assert len(data.Batches(10, 5, seed=0, world=2).next()) == 5
    with pytest.raises(UsageError, match="`batch_size`=5 on 3 workers is more than the 14 images"):
        data.Batches(14, 5, seed=0, world=3)


# ---- changes to a batch ----


def test_augment_shifts_and_mirrors():
    """Breaks if a result is not a crop of the padded image or its mirror image, or one of these never comes."""
    image = torch.rand(2, 6, 7, generator=make_generator()) + 0.1
    results = data.augment(image.expand(3000, -1, -1, -1), make_generator(1), crop_padding=2)
    padded = torch.nn.functional.pad(image, [2] * 4)
    crops = torch.stack([padded[:, i : i + 6, j : j + 7] for i in range(5) for j in range(5)])
    wanted = torch.cat([crops, crops.flip(3)])
    equal = (results[:, None] == wanted).flatten(2).all(2)
    assert (equal.sum(1) == 1).all()
    assert (equal.sum(0) > 20).all()  # 60 of each expected
    plain = data.augment(image.expand(100, -1, -1, -1), make_generator(1), crop_padding=0, flip=False)
    assert torch.equal(plain, image.expand(100, -1, -1, -1))


@pytest.mark.parametrize("size", [4, 5])
def test_cutout(size):
    """Breaks if the square has another size, leaves the image when it must not, or never touches the border."""
    images = torch.ones(4000, 3, 9, 11)
    black = data.cutout(images, make_generator(), size=size, inside=True) == 0
    assert (black.sum((1, 2, 3)) == 3 * size * size).all()
    assert black[:, 0, 0, 0].any() and black[:, 0, -1, -1].any()
    black = data.cutout(images, make_generator(), size=size) == 0
    assert black.sum((1, 2, 3)).max() == 3 * size * size
    assert black.sum((1, 2, 3)).min() == 3 * ((size + 1) // 2) ** 2  # the centre in a corner
    assert torch.equal(black[:, 0], black[:, 2])
    half = data.cutout(images, make_generator(), size=size, probability=0.5).flatten(1).min(1).values
    assert half.mean().item() == pytest.approx(0.5, abs=0.05)


def test_mixup():
    """Breaks if images are not mixed with a permutation of the batch, or weights are not uniform in [0, 1]."""
    n = 1000
    mixed = data.mixup(torch.eye(n).view(n, n, 1, 1), make_generator())[:, :, 0, 0]
    own = mixed.diagonal()
    assert torch.allclose(mixed.sum(0), own + (mixed.sum(0) - own))
    assert torch.allclose(mixed.sum(1), torch.ones(n))
    others = mixed - torch.diag(own)
    assert ((others > 0).sum(0) <= 1).all() and ((others > 0).sum(1) <= 1).all()
    own = own[own < 1]  # an image mixed with itself stays as it is
    assert own.mean().item() == pytest.approx(0.5, abs=0.03)
    assert own.var().item() == pytest.approx(1 / 12, abs=0.01)


# ---- what a user can get wrong ----


def damage(root, kind):
    """Write data below root with one thing wrong; return what to load, and what the message must name."""
    mnist, cifar = root / "MNIST/raw", root / "cifar-10-batches-py"
    if kind == "missing":
        return {"name": "mnist", "download": False}, r"MNIST.raw.train-images-idx3-ubyte is missing; .*`datadir`"
    if kind == "truncated":
        write_mnist(mnist)
        path = mnist / "train-images-idx3-ubyte"
        path.write_bytes(path.read_bytes()[:-1])
        return {"name": "mnist"}, "train-images-idx3-ubyte is damaged or of another format"
    if kind == "truncated .gz":
        write_mnist(mnist, compressed=True)
        path = mnist / "train-labels-idx1-ubyte.gz"
        path.write_bytes(path.read_bytes()[:-9])
        return {"name": "mnist"}, r"train-labels-idx1-ubyte.gz is damaged or of another format"
    if kind == "foreign":
        write_mnist(mnist)
        (mnist / "train-images-idx3-ubyte").write_bytes(b"<html>not found</html>")
        return {"name": "mnist"}, "not an IDX file of bytes"
    if kind == "two bytes per value":
        write_mnist(mnist)
        path = mnist / "train-images-idx3-ubyte"
        path.write_bytes(path.read_bytes().replace(b"\x08", b"\x0b", 1))
        return {"name": "mnist"}, "not an IDX file of bytes"
    if kind == "class 10":
        write_mnist(mnist)
        (mnist / "train-labels-idx1-ubyte").write_bytes(encode_idx(torch.arange(4, 11, dtype=torch.uint8)))
        return {"name": "mnist"}, "train-labels-idx1-ubyte is damaged .*classes up to 10"
    if kind == "empty file":
        write_mnist(mnist)
        (mnist / "train-labels-idx1-ubyte").write_bytes(b"")
        return {"name": "mnist"}, "train-labels-idx1-ubyte is damaged"
    if kind == "no images":
        write_mnist(mnist)
        (mnist / "train-images-idx3-ubyte").write_bytes(encode_idx(torch.zeros(0, 28, 28, dtype=torch.uint8)))
        (mnist / "train-labels-idx1-ubyte").write_bytes(encode_idx(torch.zeros(0, dtype=torch.uint8)))
        return {"name": "mnist"}, r"labels \(0,\) do not fit images \(0, 28, 28\)"
    if kind == "other count":
        write_mnist(mnist)
        (mnist / "train-labels-idx1-ubyte").write_bytes(encode_idx(torch.zeros(8, dtype=torch.uint8)))
        return {"name": "mnist"}, r"labels \(8,\) do not fit images \(7, 28, 28\)"
    if kind == "code in a pickle":
        write_cifar(cifar, files=[f"data_batch_{n}" for n in range(1, 6)])
        bomb = Bomb(exec, "import os; os.environ['DATA_BOMB'] = '1'")
        (cifar / "data_batch_3").write_bytes(pickle.dumps({"data": bomb, "labels": [0]}))
        return {"name": "cifar10"}, "data_batch_3 is damaged .*builtins.exec has no place in a data file"
    if kind == "a call that claims memory":
        write_cifar(cifar, files=[f"data_batch_{n}" for n in range(1, 6)])
        (cifar / "data_batch_3").write_bytes(pickle.dumps({"data": Bomb(bytes, 1 << 40), "labels": [0]}, protocol=2))
        return {"name": "cifar10"}, "data_batch_3 is damaged .*'int'"  # refused for its type, not for want of memory
    if kind == "a type that is no name":
        write_cifar(cifar, files=[f"data_batch_{n}" for n in range(1, 6)])
        kinds = Bomb(np.dtype, [["u1"], ["u1"]])
        (cifar / "data_batch_3").write_bytes(pickle.dumps({"data": kinds, "labels": [0]}))
        return {"name": "cifar10"}, "data_batch_3 is damaged .*the type of an array is not a name"
    if kind == "objects in a pickle":
        write_cifar(cifar, files=[f"data_batch_{n}" for n in range(1, 6)])
        objects = {"data": np.array([None, 1], dtype=object), "labels": [0]}
        (cifar / "data_batch_3").write_bytes(pickle.dumps(objects, protocol=4))
        return {"name": "cifar10"}, "data_batch_3 is damaged"
    if kind == "truncated pickle":
        write_cifar(cifar, files=[f"data_batch_{n}" for n in range(1, 6)])
        (cifar / "data_batch_5").write_bytes((cifar / "data_batch_5").read_bytes()[:-2000])
        return {"name": "cifar10"}, "data_batch_5 is damaged"
    if kind == "class without a name":
        write_cifar(cifar, files=[f"data_batch_{n}" for n in range(1, 6)])
        write_pickle(cifar / "data_batch_2", {"data": draw_bytes(1, 3072).numpy(), "labels": [3]})
        return {"name": "cifar10"}, "data_batch_2 is damaged .*class without a name"
    if kind == "colours side by side":
        write_cifar(cifar, files=[f"data_batch_{n}" for n in range(1, 6)])
        write_pickle(cifar / "data_batch_4", {"data": draw_bytes(2, 32, 32, 3).numpy(), "labels": [1, 2]})
        return {"name": "cifar10"}, r"data_batch_4 is damaged .*data is \(2, 32, 32, 3\), not \(2, 3072\)"
    if kind == "MATLAB":
        (root / "train_32x32.mat").write_bytes(b"MATLAB" * 99)
        return {"name": "svhn"}, "train_32x32.mat is damaged"
    return damage_folder(root, kind)


def damage_folder(root, kind):
    """The same for --dataset=folder."""
    if kind == "no folder":
        return {"name": "folder", "path": root / "nowhere"}, "`data_path`=.*nowhere: no such folder"
    if kind == "empty folder":
        return {"name": "folder", "path": root}, "holds no images"
    write_images(root / "cat", 2)
    if kind == "unreadable image":
        (root / "cat" / "broken.jpg").write_bytes(b"\xff\xd8\xff nonsense")
        return {"name": "folder", "path": root}, r"broken.jpg is damaged .*\(of no known format\)"
    if kind == "truncated image":
        (root / "cat" / "short.png").write_bytes((root / "cat" / "000.png").read_bytes()[:-30])
        return {"name": "folder", "path": root}, "short.png is damaged"
    if kind == "lost link":
        (root / "cat" / "lost.png").symlink_to(root / "nowhere.png")
        return {"name": "folder", "path": root}, "lost.png is missing, or a link to nothing"
    if kind == "empty class":
        (root / "dog").mkdir()
        return {"name": "folder", "path": root}, "dog holds no images"
    if kind == "loose images":
        write_images(root, 1)
        return {"name": "folder", "path": root}, "beside subfolders"
    assert kind == "two sizes"
    write_images(root / "dog", 1, size=(9, 9))
    return {"name": "folder", "path": root}, r"images of \(5, 4\) and of \(9, 9\) pixels; choose one `image_size`"


@pytest.mark.parametrize(
    "kind",
    [
        "missing",
        "truncated",
        "truncated .gz",
        "foreign",
        "two bytes per value",
        "class 10",
        "empty file",
        "no images",
        "other count",
        "code in a pickle",
        "a call that claims memory",
        "a type that is no name",
        "objects in a pickle",
        "truncated pickle",
        "class without a name",
        "colours side by side",
        "MATLAB",
        "no folder",
        "empty folder",
        "unreadable image",
        "truncated image",
        "lost link",
        "empty class",
        "loose images",
        "two sizes",
    ],
)
def test_bad_files(tmp_path, kind):
    """Breaks if bad files are read, run code, or are answered with anything but one line that names them."""
    arguments, message = damage(tmp_path, kind)
    with pytest.raises(UsageError, match=message) as error:
        data.load_dataset(**({"root": tmp_path} | arguments))
    assert "\n" not in str(error.value)
    assert "DATA_BOMB" not in os.environ


def test_no_network(tmp_path, monkeypatch):
    """Breaks if a failed download is not answered with what is missing, why, and what to do, in one line."""

    def fail(*arguments, **settings):
        raise OSError("Name or service\nnot known")

    monkeypatch.setattr(data, "import_torchvision", lambda: stand_in_torchvision(FashionMNIST=fail))
    wanted = r"train-images-idx3-ubyte is missing and cannot be downloaded \(Name or service not known\); .*http://fashion-mnist.*`datadir`"
    with pytest.raises(UsageError, match=wanted):
        data.load_dataset("fashion_mnist", root=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "imagenot"}, "`dataset`=imagenot is unknown; use one of digits, mnist"),
        ({"name": "digits", "condition": "pos"}, "a condition .* is for `dataset`=dsprites, not digits"),
        ({"name": "mnist", "subset": "size"}, "a subset .*is for `dataset`=dsprites, not mnist"),
        ({"name": "digits", "image_size": 32}, "`image_size` and `channels` are for `dataset`=folder"),
        ({"name": "folder"}, "`dataset`=folder needs `data_path`"),
        ({"name": "folder", "path": pathlib.Path(), "channels": 2}, "`channels`=2 must be 1"),
        ({"name": "dsprites", "path": "nowhere.npz"}, "`dsprites_path`=nowhere.npz: no such file"),
        ({"name": "celeba", "root": "nowhere"}, "nowhere/celeba/img_align_celeba is missing; unpack .*`datadir`"),
        ({"name": "digits", "antialias": True}, "`antialias` is for `dataset`=imagenetfull; the images of digits"),
    ],
)
def test_what_does_not_go_together(arguments, message):
    """Breaks if arguments that make no sense are ignored, or answered with a traceback."""
    with pytest.raises(UsageError, match=message):
        data.load_dataset(**arguments)


def test_cutout_larger_than_the_image():
    """Breaks if the square is silently made smaller."""
    with pytest.raises(UsageError, match="`cutout_mask_size`=16 is larger than the images of 8x8"):
        data.cutout(torch.ones(1, 1, 8, 8), make_generator())


def test_folder_reads_no_format_that_runs_a_program(tmp_path):
    """Breaks if Pillow may choose the format: PostScript under another name goes to Ghostscript."""
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(UsageError, match=r"x\.png"):
        data.load_dataset("folder", path=tmp_path, image_size=8, channels=3)


def test_a_pickle_cannot_claim_memory(tmp_path):
    """Breaks if a few bytes can make the reader reserve gigabytes, as C's unpickler does for a huge memo index."""
    path = tmp_path / "huge"
    path.write_bytes(b"\x80\x02Nr\xff\xff\xff\x7f.")
    with pytest.raises(UsageError, match="huge"), bounded.report_unreadable_file(path):
        pickles.read_pickle(path, ["data"])
