"""Damaged and hostile files: whatever a file holds, it is read as it was written or refused in one line, soon.

MUTATIONS=600 pytest tests/test_hostile.py changes each file as many times; the default suits every day.
"""

import dataclasses
import gzip
import json
import os
import pickle
import random
import resource
import shutil
import struct
import time
import tracemalloc
import zipfile
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
from conftest import (
    CONFIG,
    GOLDEN,
    draw_bytes,
    draw_imagenet_batch,
    encode_example,
    encode_idx,
    encode_noise,
    make_model,
    make_run,
    make_state,
    write_checkpoint,
    write_colour_sets,
    write_mnist,
    write_records,
    write_sprites,
)
from ebm.measures.features import load_or_compute
from ebm.readers import bounded, dsprites, folders, image_files, imagenet, tensorflow
from ebm.readers.bounded import read_json, report_unreadable_file
from ebm.readers.pickles import to_texts
from ebm.readers.streaming import decode_image
from ebm.readers.torch_files import read_torch_file
from ebm.settings import TrainSettings
from ebm.support import cli
from ebm.support.errors import UsageError
from ebm.tasks.trained_models import check_training_flags, read_names
from ebm.training import tuning

MUTATIONS = int(os.environ.get("MUTATIONS", "15"))  # of each file
SECONDS, MEGABYTES = 2.0, 1024  # within which each is answered


def assert_same(found, wanted):
    """Compare structures of tensors, arrays and plain values."""
    if isinstance(wanted, torch.Tensor | np.ndarray):
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(wanted))
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert_same(found[key], value)
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    else:
        assert found == wanted


def assert_classes(contents, classes, shape):
    """Check what a reader of images returned from a file without checksums: types, shapes and ranges hold."""
    images, numbers = torch.as_tensor(contents[0]), torch.as_tensor(contents[1])
    assert images.dtype == torch.uint8 and images.shape == (len(numbers), *shape)
    assert numbers.dtype == torch.int64 and len(numbers) and 0 <= numbers.min() <= numbers.max() < classes


def measure_memory():
    """Return the most memory that this process has held, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def mutate(contents, rng):
    """Return bytes with bits flipped, cut short, with a run inserted, blocks swapped, or an extreme number inside."""
    changed = bytearray(contents)
    start, other = sorted(rng.randrange(len(changed) + 1) for _ in range(2))
    kind = rng.choice(("flip", "flip", "flips", "cut", "insert", "swap", "number", "number"))
    if kind == "cut":
        del changed[start:]
    elif kind == "insert":
        changed[start:start] = rng.choice((bytes(rng.randrange(1, 200)), bytes(changed[start : start + 50])))
    elif kind == "swap":
        size = rng.randrange(1, 100)
        changed[start : start + size], changed[other : other + size] = changed[other:][:size], changed[start:][:size]
    elif kind == "number":
        number = rng.choice(
            (b"\xff\xff\xff\x7f", b"\xff" * 8, bytes(4), b"\0\0\0\x80", b"\x7f\xff\xff\xff", b"\x01\0" * 4)
        )
        changed[start : start + len(number)] = number
    else:
        for _ in range(1 if kind == "flip" else 8):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


# ---------------------------------------------------------------------------------------------------------------------
# Every reader, with damage at random. A reader writes its files into a folder and returns the path of one of them, a
# function that reads it, and a check of what that returns; without a check it must be what was written.


def fuzz_checkpoint(folder):
    write_checkpoint(folder / "model_1.pt", flags={"lr": 0.1}, class_names=["a"])
    return folder / "model_1.pt", lambda: checkpoint.load(folder / "model_1.pt"), None


def fuzz_network(folder):
    write_checkpoint(folder / "model_1.pt")
    return folder / "model_1.pt", lambda: checkpoint.load_energy(folder / "model_1").state_dict(), None


def fuzz_safetensors(folder):
    state = {"config": dataclasses.asdict(CONFIG), "model": make_model().state_dict(), "iteration": 1}
    checkpoint.save(folder / "x.safetensors", state | {"flags": {"lr": 0.1}, "class_names": ["a"]})
    return folder / "x.safetensors", lambda: checkpoint.load(folder / "x.safetensors"), None


def fuzz_cache(folder):
    """A damaged cache is made again, so that whatever happens to its file, the result is the same."""

    def read():
        made = {"numbers": torch.arange(1000.0)}
        return load_or_compute(folder / "cache.pt", {"of": "x"}, lambda: made, lambda contents: contents["numbers"])

    read()
    return next(folder.glob("*.pt")), read, None


def fuzz_tf_index(folder):
    shutil.copytree(GOLDEN / "tf_checkpoints/dsprites_cond_pos", folder, dirs_exist_ok=True)
    return folder / "model_8000.index", lambda: tensorflow.read_tf_checkpoint(folder / "model_8000"), None


def fuzz_tf_shard(folder):
    _, read, check = fuzz_tf_index(folder)
    return folder / "model_8000.data-00000-of-00001", read, check


def fuzz_imagenet_pickle(folder, protocol=4):
    batch = draw_imagenet_batch(0)
    (folder / "val_data").write_bytes(pickle.dumps(batch, protocol))
    return folder / "val_data", lambda: imagenet.read_imagenet32_file(folder / "val_data"), check_imagenet


def check_imagenet(contents):
    assert_classes((contents[0].reshape(-1, 3072), contents[1]), 1000, (3072,))


def fuzz_imagenet_pickle_0(folder):
    return fuzz_imagenet_pickle(folder, 0)


def fuzz_imagenet_pickle_2(folder):
    return fuzz_imagenet_pickle(folder, 2)


def fuzz_imagenet_pickle_5(folder):
    return fuzz_imagenet_pickle(folder, 5)


def fuzz_imagenet_npz(folder):
    np.savez_compressed(folder / "val_data.npz", **draw_imagenet_batch(0))
    return folder / "val_data.npz", lambda: imagenet.read_imagenet32_file(folder / "val_data.npz"), None


def fuzz_cifar(folder):
    write_colour_sets(folder)
    path = folder / "cifar-10-batches-py/test_batch"
    return (
        path,
        lambda: image_files.read_cifar10(folder, "test", 1),
        lambda found: assert_classes(found, 10, (3, 32, 32)),
    )


def fuzz_cifar_meta(folder):
    _, read, check = fuzz_cifar(folder)
    return folder / "cifar-10-batches-py/batches.meta", read, check


def fuzz_idx(folder):
    write_mnist(folder / "MNIST/raw")
    path = folder / "MNIST/raw/train-images-idx3-ubyte"
    return (
        path,
        lambda: image_files.read_mnist(folder, "train", 1),
        lambda found: assert_classes(found, 10, (1, 28, 28)),
    )


def fuzz_idx_gz(folder):
    write_mnist(folder / "MNIST/raw", compressed=True)
    path = folder / "MNIST/raw/train-labels-idx1-ubyte.gz"
    return path, lambda: image_files.read_mnist(folder, "train", 1), None


def fuzz_svhn(folder, compressed=False):
    from scipy.io import savemat

    path = folder / "test_32x32.mat"
    pixels = draw_bytes(32, 32, 3, 4).numpy()
    savemat(path, {"X": pixels, "y": np.array([[10], [1], [9], [3]], np.uint8)}, do_compression=compressed)
    return path, lambda: image_files.read_svhn(folder, "test", 1), lambda found: assert_classes(found, 10, (3, 32, 32))


def fuzz_svhn_compressed(folder):
    return fuzz_svhn(folder, compressed=True)


def fuzz_dsprites(folder):
    write_sprites(folder / "d.npz", range(0, dsprites.SIZE, 73_728))
    return folder / "d.npz", lambda: dsprites.read_published(folder / "d.npz"), None


def fuzz_records(folder):
    """Records that are damaged give a message of their own each, which a run prints as a note."""
    path = folder / "train-00000-of-00001"
    write_records(path, [encode_example(encode_noise(i, "JPEG"), i + 1) for i in range(3)])

    def read():
        return [decode_image(place, antialias=False) for place in imagenet.open_records(folder, "train")]

    intact = read()

    def check(found):
        for result in found:
            assert isinstance(result, str) or any(np.array_equal(result.pixels, image.pixels) for image in intact)

    return path, read, check


def fuzz_index(folder):
    write_records(folder / "train-00000-of-00001", [encode_example(b"", 1)] * 3)
    (folder / "index.json").write_text(json.dumps({"record_counts": {"train-00000-of-00001": 3}}))
    return folder / "index.json", lambda: len(imagenet.open_records(folder, "train")), lambda count: None


def fuzz_picture(folder, kind="PNG"):
    for name in ("a", "b"):
        (folder / name).mkdir()
        picture = Image.fromarray(draw_bytes(12, 12, 3).numpy())
        picture.save(folder / name / f"{name}.{kind.lower()}", kind)

    def read():
        return folders.read_folder(folder, split="train", image_size=(8, 8), channels=3, workers=1)

    return folder / f"a/a.{kind.lower()}", read, lambda found: assert_classes(found, 2, (3, 8, 8))


def fuzz_picture_jpeg(folder):
    return fuzz_picture(folder, "JPEG")


def fuzz_picture_tiff(folder):
    return fuzz_picture(folder, "TIFF")


def fuzz_picture_gif(folder):
    return fuzz_picture(folder, "GIF")


def fuzz_names(folder):
    (folder / "names").write_text("one\ntwo\nthree\n")
    return folder / "names", lambda: read_names(folder / "names", 3), lambda names: None


FUZZED = {
    name.removeprefix("fuzz_"): function for name, function in list(globals().items()) if name.startswith("fuzz_")
}


@pytest.mark.parametrize("name", FUZZED)
def test_random_damage(tmp_path, capsys, name):
    """Breaks if a damaged file gives a traceback, other contents without a word, or takes seconds or gigabytes."""
    path, read, check = FUZZED[name](tmp_path)
    wanted, intact, rng = read(), path.read_bytes(), random.Random(name)
    memory, refused = measure_memory(), 0
    for number in range(MUTATIONS):
        path.write_bytes(mutate(intact, rng))
        start = time.process_time()
        try:
            found = read()
        except UsageError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 600 and str(error).isprintable(), error
        else:
            check(found) if check else assert_same(found, wanted)
        assert time.process_time() - start < SECONDS, f"mutation {number}"
        assert measure_memory() - memory < MEGABYTES, f"mutation {number}"
    with capsys.disabled():
        if MUTATIONS > 100:
            print(f"\n{name}: {MUTATIONS} changes, {refused} refused, {MUTATIONS - refused} read")


# ---------------------------------------------------------------------------------------------------------------------
# Files of the wrong kind


READERS = {
    "checkpoint": checkpoint.load,
    "network": checkpoint.load_energy,
    "safetensors": checkpoint.load_energy,
    "pickle": imagenet.read_imagenet32_file,
    "npz": imagenet.read_imagenet32_file,
    "dsprites": dsprites.read_published,
    "names": lambda path: read_names(path, 3),
}


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "missing", "empty"])
def test_what_is_no_file(tmp_path, kind):
    """Breaks if a pipe is waited for, a device read without end, or the answer is a traceback."""
    for name, read in READERS.items():
        path = tmp_path / f"{name}{f'.{name}' if name in ('npz', 'safetensors') else '.pt'}"
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "empty":
            path.touch()
        with pytest.raises(UsageError, match=path.name):
            read(path)


# ---------------------------------------------------------------------------------------------------------------------
# Bombs: small files that claim or unfold to much


def nest_shared(depth, width):
    """Return a pickle's instructions for a list of lists of ... of the number 1, `width` times wider at each level."""
    parts = [b"K\x01q\x000"]
    parts += [b"](" + (b"h" + bytes([k])) * width + b"eq" + bytes([k + 1]) + b"0" for k in range(depth)]
    return b"".join(parts) + b"h" + bytes([depth])


def make_entries(**values):
    """Return a pickle of a dictionary whose values are given as instructions."""
    entries = b"".join(b"X" + struct.pack("<I", len(name)) + name.encode() + value for name, value in values.items())
    return b"\x80\x02}(" + entries + b"u."


DEEP = 100_000
SHARED, NESTED = nest_shared(10, 10), b"]" * DEEP + b"a" * (DEEP - 1)
TUPLES = b")" + b"\x85" * DEEP
ITSELF = b"]q\x00h\x00a"
VALUES = {
    "shared": SHARED,
    "nested": NESTED,
    "tuples": TUPLES,
    "itself": ITSELF,
    "a deep key": b"}" + TUPLES + b"K\x01s",
    "a key that is wide": b"}" + nest_shared(9, 10).replace(b"](", b"(").replace(b"eq", b"tq") + b"K\x01s",
    "a set": b"\x8f(" + TUPLES + b"\x90",
    "a long number": b"\x8b" + struct.pack("<I", 100_000) + b"\x7f" * 100_000,
    "text of a number": b"L" + b"9" * 100_000 + b"L\n",
    "an array of lists": b"cnumpy\nndarray\n)R(K\x01K\x01\x85cnumpy\ndtype\n" + SHARED + b"\x85R\x89U\x01atb",
    "a shape of lists": b"cnumpy\nndarray\n)R(K\x01" + SHARED + b"\x85cnumpy\ndtype\nU\x02u1\x85R\x89U\x01atb",
    "bytes that are not there": b"\x96" + struct.pack("<Q", 3 << 30),
    "text that is not there": b"\x8d" + struct.pack("<Q", 1 << 62),
    "a name of torch": b"ctorch\nload\nX\x01\x00\x00\x00x\x85R",
    "an object": b"cnumpy\nndarray\n)\x81",
    "a reference": b"K\x01Q",
    "a state of a number": b"K\x01}b",
}


SLOW = ("nested", "tuples", "a deep key")  # many instructions


@pytest.mark.parametrize("name", VALUES)
def test_bombs_in_pickles(tmp_path, name):
    """Breaks if something walks into lists in lists, hashes what is deep, or reserves what a file only claims."""
    memory, start = measure_memory(), time.process_time()
    good = b"](K\x01K\x02e"
    for key in ("labels",) if name in SLOW else ("data", "labels"):
        contents = make_entries(**({"data": good, "labels": good} | {key: VALUES[name]}))
        (tmp_path / "val_data").write_bytes(contents)
        with pytest.raises(UsageError, match="val_data is damaged"):
            imagenet.read_imagenet32_file(tmp_path / "val_data")
    for key in ("flags",) if name in SLOW else ("config", "model", "iteration", "flags"):
        entries = {"config": b"}", "model": b"}", "iteration": b"K\x01"} | {key: VALUES[name]}
        write_structure(tmp_path / "model_1.pt", make_entries(**entries))
        with pytest.raises(UsageError, match=r"model_1\.pt") as caught:
            checkpoint.load(tmp_path / "model_1.pt")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert time.process_time() - start < 2 * SECONDS and measure_memory() - memory < MEGABYTES


def test_a_pickle_of_many_instructions(tmp_path, monkeypatch):
    """Breaks if a list per byte of a file, sixty times its size, is built to the end."""
    monkeypatch.setattr("ebm.readers.pickles.MAX_STEPS", 1000)
    (tmp_path / "val_data").write_bytes(b"\x80\x02" + b"]" * 2000 + b".")
    with pytest.raises(UsageError, match="more than 1,000 instructions"):
        imagenet.read_imagenet32_file(tmp_path / "val_data")


def write_structure(path, structure, source=None):
    """Write a checkpoint whose tensors, if any, are those of another file, with this pickle as its structure."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", structure)
        archive.writestr("archive/byteorder", "little")
        for member in zipfile.ZipFile(source).infolist() if source else []:
            if "/data/" in member.filename:
                archive.writestr(member.filename, zipfile.ZipFile(source).read(member))


def test_bombs_in_archives(tmp_path, monkeypatch):
    """Breaks if deflated zeros are inflated whole before anyone asks how many there are."""
    monkeypatch.setattr(bounded, "INFLATED_BASE", 1 << 20)
    zeros = bytes(50 << 20)
    (tmp_path / "MNIST/raw").mkdir(parents=True)
    (tmp_path / "MNIST/raw/train-images-idx3-ubyte.gz").write_bytes(gzip.compress(zeros, 1))
    (tmp_path / "MNIST/raw/train-labels-idx1-ubyte").write_bytes(encode_idx(torch.zeros(1, dtype=torch.uint8)))
    with zipfile.ZipFile(tmp_path / "val_data.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("data.npy", zeros)
        archive.writestr("labels.npy", b"")
    del zeros
    tracemalloc.start()
    with pytest.raises(UsageError, match=r"train-images-idx3-ubyte\.gz is damaged .* more than"):
        image_files.read_mnist(tmp_path, "train", 1)
    with pytest.raises(UsageError, match=r"data\.npy has 52,428,800 bytes, more than"):
        imagenet.read_imagenet32_file(tmp_path / "val_data.npz")
    with pytest.raises(UsageError, match="there is no latents_values"):
        dsprites.read_published(tmp_path / "val_data.npz")
    shutil.copy(tmp_path / "val_data.npz", tmp_path / "model_1.pt")
    with pytest.raises(UsageError, match="compressed"):
        checkpoint.load(tmp_path / "model_1.pt")
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("twice", "share a name"), ("overlap", "overlap"), ("bzip2", "unusual way"), ("encrypted", "unusual way")],
)
def test_archives_that_torch_does_not_write(tmp_path, kind, reason):
    """Breaks if a name may mean two members, members share their bytes, or they are packed in another way."""
    path = tmp_path / "model_1.pt"
    write_checkpoint(path)
    contents = path.read_bytes()
    start = zipfile.ZipFile(path).start_dir
    directory = contents[start:]
    if kind == "twice":
        directory = directory.replace(b"archive/data/1", b"archive/data/0", 1)
    elif kind == "overlap":
        sizes = struct.pack("<II", len(contents), len(contents))
        directory = directory[:20] + sizes + directory[28:]
    elif kind == "bzip2":
        directory = directory[:10] + struct.pack("<H", 12) + directory[12:]
    else:
        directory = directory[:8] + struct.pack("<H", 1) + directory[10:]
    path.write_bytes(contents[:start] + directory)
    with pytest.raises(UsageError, match=rf"model_1\.pt .*{reason}"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("field", "bit"), [(8, 0), (10, 3), (10, 0), (20, 1), (24, 1), (38, 4), (42, 0), (16, 5), (6, 0), (36, 0)]
)
def test_a_flipped_bit_in_the_directory(tmp_path, field, bit):
    """Breaks if the directory of an archive is believed: with one bit flipped torch gives uninitialised memory."""
    path = tmp_path / "model_1.pt"
    write_checkpoint(path)
    contents, wanted = path.read_bytes(), checkpoint.load(path)
    place = zipfile.ZipFile(path).start_dir
    while contents[place : place + 4] == b"PK\1\2":
        flipped = bytearray(contents)
        flipped[place + field] ^= 1 << bit
        path.write_bytes(flipped)
        try:
            assert_same(checkpoint.load(path), wanted)
        except UsageError as error:
            assert "\n" not in str(error)
        place += 46 + sum(struct.unpack("<HHH", contents[place + 28 : place + 34]))


# ---------------------------------------------------------------------------------------------------------------------
# Tensors and values that a checkpoint should not hold


def save_tensors(path, **changes):
    """Write a checkpoint with other tensors in place of some of its weights."""
    model = make_model()
    torch.save({"config": dataclasses.asdict(CONFIG), "model": model.state_dict() | changes, "iteration": 1}, path)


NAME = "stages.c1.weight"
TENSORS = {
    "expanded": lambda weight: torch.zeros(1).expand(1 << 40),
    "overlapping": lambda weight: torch.zeros(100).as_strided((50, 50), (1, 1)),
    "whole numbers": lambda weight: weight.int(),
    "truths": lambda weight: weight.bool(),
    "complex": lambda weight: weight.to(torch.complex64),
    "sparse": lambda weight: weight.to_sparse(),
    "another shape": lambda weight: weight[:1],
    "not finite": lambda weight: weight * float("nan"),
    "none": lambda weight: None,
    "a list": lambda weight: weight.tolist(),
    "on no device": lambda weight: weight.to("meta"),
    "quantised": lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TENSORS)
def test_odd_tensors(tmp_path, kind):
    """Breaks if a weight of another kind is loaded, fills memory, or ends in a traceback."""
    path, weight = tmp_path / "model_1.pt", make_model().state_dict()[NAME]
    save_tensors(path, **{NAME: TENSORS[kind](weight)})
    with pytest.raises(UsageError, match=r"model_1\.pt") as caught:
        checkpoint.load_energy(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("view", ["beyond", "twice", "negative", "many"])
def test_forged_views(tmp_path, view):
    """Breaks if a tensor shows what lies beside its numbers, or many show the same ones."""
    path, forged = tmp_path / "good.pt", tmp_path / "model_1.pt"
    write_checkpoint(path, numbers=torch.arange(200.0))
    structure = zipfile.ZipFile(path).read("archive/data.pkl")
    whole = b"K\x00K\xc8\x85"  # offset 0, the shape (200,)
    assert structure.count(whole) == 1
    other = {
        "beyond": b"K\x64K\xc8\x85",
        "twice": b"K\x00M\xff\xff\x85",
        "negative": b"J\xff\xff\xff\xffK\xc8\x85",
        "many": b"K\x00K\xc7\x85",
    }[view]
    write_structure(forged, structure.replace(whole, other), path)
    if view == "many":  # a smaller view is right
        assert len(checkpoint.load(forged)["numbers"]) == 199
        torch.save([torch.zeros(1000)[: 900 + k] for k in range(50)], tmp_path / "apart.pt")
        numbers = torch.zeros(1000)
        torch.save([numbers[: 900 + k] for k in range(50)], tmp_path / "shared.pt")
        with pytest.raises(ValueError, match="larger than the file"):
            read_torch_file(tmp_path / "shared.pt")
        assert len(read_torch_file(tmp_path / "apart.pt")) == 50
        torch.save(numbers[:1].expand(3), tmp_path / "expanded.pt")
        with pytest.raises(ValueError, match="shows a number twice"):
            read_torch_file(tmp_path / "expanded.pt")
        return
    with pytest.raises(UsageError, match=r"model_1\.pt is damaged.*(beyond its numbers|impossible shape)"):
        checkpoint.load(forged)


CONFIGS = {
    "network": ["Nope", None, 3, ["MnistNet"]],
    "image_shape": [None, (1, 28), (1, -28, 28), (1, 28, 1 << 40), (1.5, 28, 28), "abc", 28],
    "num_filters": [-1, 0, "a", 1 << 40, 4.0, True, None],
    "label_size": [-3, 1 << 40, "x", None],
    "spec_norm": [2, "yes", None],
    "spec_iter": [0, -1, 1 << 40, 1.0],
    "spec_norm_val": [float("nan"), float("inf"), -1.0, "x", None],
    "use_attention": ["x"],
    "unknown": [1],
}


def test_odd_configs(tmp_path):
    """Breaks if a network of an impossible configuration is built, or refused with a traceback."""
    path, model = tmp_path / "model_1.pt", make_model()
    for name, values in CONFIGS.items():
        for value in values:
            config = dataclasses.asdict(CONFIG) | {name: value}
            torch.save({"config": config, "model": model.state_dict(), "iteration": 1}, path)
            with pytest.raises(UsageError, match=r"model_1\.pt describes a network") as caught:
                checkpoint.load_energy(path)
            assert name in str(caught.value) and "\n" not in str(caught.value)
    shared = [1]
    for _ in range(50):
        shared = [shared] * 10
    for config in (None, [], {}, dataclasses.asdict(CONFIG) | {"network": shared}, {"network": "MnistNet"}):
        torch.save({"config": config, "model": model.state_dict(), "iteration": 1}, path)
        with pytest.raises(UsageError, match=r"model_1\.pt"):
            checkpoint.load_energy(path)


def test_a_network_is_measured_before_it_is_built(tmp_path, monkeypatch):
    """Breaks if a file of a few kB that describes a network of terabytes makes the program reserve them."""
    config = dataclasses.asdict(CONFIG) | {"network": "ResNet32", "image_shape": (3, 32, 32), "num_filters": 1 << 16}
    torch.save({"config": config, "model": {}, "iteration": 1}, tmp_path / "model_1.pt")
    with pytest.raises(UsageError, match="does not fit its own configuration"):
        checkpoint.load_energy(tmp_path / "model_1.pt")


GOOD_WORKER: dict[str, Any] = {
    "buffer": {"images": torch.zeros(3, 1, 28, 28, dtype=torch.uint8), "position": 0},
    "generator": torch.get_rng_state(),
    "torch_generator": torch.get_rng_state(),
    "cuda_generator": None,
    "previous": None,
    "guard": {"usual": [(1.0, 2.0)], "suspicious": 0},
}
BUFFERS: list[Any] = [None, {}, {"images": torch.zeros(3, 1, 1, 1, dtype=torch.uint8), "position": 0}]
BUFFERS += [
    {"images": torch.zeros(3, 1, 28, 28), "position": 0},
    {"images": GOOD_WORKER["buffer"]["images"], "position": -1},
]
WAY = tuning.Way()._asdict() | {"on_cpu": True}
ENTRIES: dict[str, list[Any]] = {
    "model": [None, [], {"x": 1}, {1: torch.zeros(1)}],
    "ema": [5, [], {"x": "y"}],
    "iteration": [-1, 1.5, "7", None, True, 1 << 60],
    "flags": [None, [], {1: 2}, {"lr": {"a": 1}}, {"lr": [[1]]}],
    "class_names": [None, 3, "abc", [1, 2], [["a"]]],
    "best": [None, "x", {"classifier": "x"}, [1.0]],
    "rollbacks": [-1, "x", None],
    "precision": [3, None, "int8"],
    "way": [None, {}, WAY | {"precision": "int8"}, WAY | {"threads": 0}, WAY | {"fold": 1}, WAY | {"threads": 1 << 60}],
    "optimizer": [
        None,
        [],
        {"state": []},
        {"state": {}, "param_groups": []},
        {"state": {0: {"m": 1}}, "param_groups": []},
    ],
    "batches": [None, {}, {"seed": 0, "epoch": -1, "position": 0}, {"seed": "a", "epoch": 0, "position": 0}],
    "workers": [None, {}, [1], [{}], *([GOOD_WORKER | {"buffer": buffer}] for buffer in BUFFERS)],
}
ENTRIES["workers"] += [[GOOD_WORKER, GOOD_WORKER]]
ENTRIES["workers"] += [[GOOD_WORKER | {"generator": None}], [GOOD_WORKER | {"previous": torch.zeros(2, 3)}]]
ENTRIES["workers"] += [[GOOD_WORKER | {"guard": {"usual": [(1.0,)], "suspicious": 0}}], [GOOD_WORKER | {"guard": 1}]]


def test_odd_entries(tmp_path):
    """Breaks if a value of another type, shape or range gets past the reader of checkpoints."""
    path = tmp_path / "model_1.pt"
    write_checkpoint(
        path, workers=[GOOD_WORKER], way=WAY, best=1.0, class_names=["a"], flags={"lr": 1e-3, "list": (1, 2)}
    )
    assert checkpoint.load(path)["best"] == 1.0
    for name, values in ENTRIES.items():
        for value in values:
            if name in ("model", "iteration"):
                torch.save({"config": dataclasses.asdict(CONFIG), "model": {}, "iteration": 1} | {name: value}, path)
            else:
                write_checkpoint(path, **{name: value})
            with pytest.raises(UsageError, match=f"has an invalid entry {name}"):
                checkpoint.load(path)


def test_odd_states_are_not_resumed(tmp_path):
    """Breaks if resuming takes moments of another shape or generators of another kind, or ends in a traceback."""
    path = tmp_path / "run/model_1.pt"
    state = make_state()
    shared, worker = state.get_shared_state(), state.get_worker_state()
    moments = shared["optimizer"]
    shape = {"state": {n: {k: m[:0] for k, m in p.items()} for n, p in moments["state"].items()}}
    changes = [
        {"optimizer": {}},
        {"optimizer": moments | shape},
        {"ema": {"x": torch.zeros(1)}},
        {"workers": [worker | {"torch_generator": torch.zeros(5056, dtype=torch.uint8)}]},
        {"workers": [worker | {"generator": torch.zeros_like(worker["generator"])}]},
        {"model": {name: tensor * float("inf") for name, tensor in shared["model"].items()}},
    ]
    for change in changes:
        checkpoint.save(path, shared | {"workers": [worker]} | change)
        run = make_run(make_state() if "ema" not in change else with_average(make_state()), tmp_path / "run")
        with pytest.raises(UsageError, match=r"model_1\.pt") as caught:
            run.resume(path)
        assert "\n" not in str(caught.value)


def with_average(state):
    state.ema = make_model(state.model.config)
    return state


def test_odd_settings_of_training(tmp_path):
    """Breaks if a script takes a step size that is no number, or a data set that is no name, from a checkpoint."""
    odd = {"rescale": [0, -1.0, float("nan"), "1"], "step_lr": [float("inf"), "x"], "num_steps": [1.5, -1]}
    odd |= {"dataset": [3, True], "data_path": [7], "temperature": ["x"], "sample_steps": ["x"]}
    odd |= {"classify": ["x", -1.0], "classify_scale": ["x"]}
    check_training_flags({"rescale": 1.0, "step_lr": 10, "sample_steps": None, "dataset": "mnist"}, tmp_path)
    for name, values in odd.items():
        for value in values:
            with pytest.raises(UsageError, match=f"impossible value of {name}"):
                check_training_flags({name: value}, tmp_path)


def test_deep_json(tmp_path):
    """Breaks if brackets in brackets, numbers of a million digits or a huge file get past the reader of JSON."""
    path = tmp_path / "index.json"
    for contents in ("[" * 100_000, "1" * 100_000, "{", "\ufeff[", " " * 2000):
        path.write_text(contents)
        with pytest.raises(UsageError, match=r"index\.json is damaged"), report_unreadable_file(path):
            read_json(path, 150_000)
    path.write_text("[1]" + " " * 1000)
    with pytest.raises(UsageError, match="more than the 100"), report_unreadable_file(path):
        read_json(path, 100)


def test_texts_of_a_file_do_not_steer_the_terminal(tmp_path):
    """Breaks if a message repeats a file's control characters, or pages of its text."""
    name = b"\x1b[2J" + b"x" * 5000
    (tmp_path / "val_data").write_bytes(b"\x80\x02cnumpy\n" + name + b"\n.")
    with pytest.raises(UsageError) as caught:
        imagenet.read_imagenet32_file(tmp_path / "val_data")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500
    model = make_model(dataclasses.replace(CONFIG, label_size=2))
    write_checkpoint(tmp_path / "model_1.pt", model, class_names=["\x1b[2Jcat", "dog\n"])
    assert checkpoint.load(tmp_path / "model_1.pt")["class_names"] == ["\\x1b[2Jcat", "dog\\n"]
    assert to_texts([b"\x1b[2Jcat", "dog"]) == ("\\x1b[2Jcat", "dog")


def test_errors_do_not_steer_the_terminal(capsys, monkeypatch):
    """Breaks if the error that ends a script repeats control characters, or a list in it becomes one line."""

    def fail(settings):
        raise UsageError("`exp` is \x1b[2J:\n  missing")

    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setattr("ebm.support.interruption.raise_on_signals", lambda: None)
    with pytest.raises(SystemExit):
        cli.run(fail, TrainSettings, "")
    assert capsys.readouterr().err == "error: --exp is \\x1b[2J:\n  missing\n"


# ---------------------------------------------------------------------------------------------------------------------
# Names as people give them


def test_a_checkpoint_by_one_of_its_files(tmp_path):
    """Breaks if a checkpoint cannot be named by its files, as shells complete them."""
    source = GOLDEN / "tf_checkpoints/dsprites_cond_pos"
    shutil.copytree(source, tmp_path / "exp")
    wanted = checkpoint.load_energy(source / "model_8000").state_dict()
    for ending in (".index", ".data-00000-of-00001", ".meta", ".pt", ""):
        assert_same(checkpoint.load_energy(tmp_path / "exp" / f"model_8000{ending}").state_dict(), wanted)
        assert checkpoint.find(tmp_path / "exp", f"model_8000{ending}") == tmp_path / "exp/model_8000"
    assert checkpoint.find(tmp_path / "exp", str(tmp_path / "exp/model_8000.index")) == tmp_path / "exp/model_8000"
    with pytest.raises(UsageError, match="no checkpoint"):
        checkpoint.find(tmp_path / "exp", "elsewhere/model_8000")
    write_checkpoint(tmp_path / "exp/model_8000.pt")
    assert checkpoint.load_energy(tmp_path / "exp/model_8000.pt").config == CONFIG
    assert checkpoint.load_energy(tmp_path / "exp/model_8000.index").config != CONFIG
