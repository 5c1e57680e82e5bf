"""ImageNet in the formats it comes in, on small files written here: pickles, .npz, TFRecords, class folders."""

import contextlib
import functools
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import data
import models
from conftest import (
    IMAGENET_BATCHES,
    ROOT,
    Bomb,
    draw_imagenet_batch,
    draw_noise,
    encode_example,
    encode_field,
    encode_image,
    encode_noise,
    flip_bit,
    make_model,
    train_once,
    write_pickle,
    write_records,
)
from ebm.readers import imagenet, streaming, tf_images
from ebm.readers.imagenet import open_imagenet, read_imagenet32
from ebm.readers.streaming import SIDE
from ebm.settings import AisSettings, TrainSettings
from ebm.support.errors import UsageError
from ebm.support.pixels import dequantise
from ebm.tasks.trained_models import TrainedModel, load_split
from ebm.training.run import read_batch
from ebm.training.state import State, Step
from golden.tasks import recipe_tasks
from utils import ClippedAdam, ReplayBuffer

pytest.importorskip("google_crc32c")


# ---------------------------------------------------------------------------------------------------------------------
# 32x32


def write_npz(path: pathlib.Path, value: dict) -> None:
    np.savez(path.with_suffix(".npz"), **value)


@pytest.mark.parametrize("write", [write_pickle, write_npz])
@pytest.mark.parametrize("below", [".", "Imagenet32_train"])
def test_training_set_of_ten_files(tmp_path, write, below) -> None:
    """Red if files are missed or sorted as text (1, 10, 2), pixels permuted, or the labels not lowered by 1."""
    (tmp_path / below).mkdir(exist_ok=True)
    files = [draw_imagenet_batch(seed) for seed in range(10)]
    for name, value in zip(IMAGENET_BATCHES, files, strict=True):
        write(tmp_path / below / name, value)
    images, classes, names = read_imagenet32(tmp_path, "train")
    assert images.dtype == torch.uint8
    expected = np.concatenate([value["data"] for value in files]).reshape(30, 3, 32, 32)
    assert np.array_equal(images.numpy(), expected)
    assert (classes + 1).tolist() == [label for value in files for label in value["labels"]]
    assert (names[0], names[-1], len(names)) == ("0", "999", 1000)


def test_validation_set(tmp_path) -> None:
    """Red if the validation set is another file than val_data, or the extreme labels 1 and 1000 are refused."""
    write_pickle(tmp_path / "val_data", draw_imagenet_batch(0, n=2) | {"labels": [1, 1000]})
    images, classes, _ = read_imagenet32(tmp_path, "test")
    assert images.shape == (2, 3, 32, 32)
    assert classes.tolist() == [0, 999]


def test_what_is_missing_is_said(tmp_path, capsys) -> None:
    """Red if a training set with files missing passes without a word, or none at all is no clear error."""
    with pytest.raises(UsageError, match=r"`imagenet_path`=.* holds no train_data_batch_1"):
        read_imagenet32(tmp_path, "train")
    for name in IMAGENET_BATCHES[:8]:
        write_pickle(tmp_path / name, draw_imagenet_batch(0))
    assert len(read_imagenet32(tmp_path, "train")[0]) == 24
    assert "lacks train_data_batch_9, train_data_batch_10" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [0, 1, 2]}, "from 1 to 1000"),
        ({"labels": [1, 2, 1001]}, "from 1 to 1000"),
        ({"labels": [1.5, 2.0, 3.0]}, "whole numbers"),
        ({"labels": [1, 2]}, r"data is uint8 \(3, 3072\), not uint8 \(2, 3072\)"),
        ({"data": np.zeros((3, 3072))}, "data is float64"),
        ({"data": np.zeros((3, 12287), np.uint8)}, r"data is uint8 \(3, 12287\)"),
    ],
)
@pytest.mark.parametrize("write", [write_pickle, write_npz])
def test_wrong_contents(tmp_path, write, change, message) -> None:
    """Red if labels out of range, or images of another size or type, are taken for ImageNet."""
    write(tmp_path / "val_data", draw_imagenet_batch(0) | change)
    with pytest.raises(UsageError, match=rf"val_data\S* is damaged.*{message}"):
        read_imagenet32(tmp_path, "test")


def test_no_file_runs_code(tmp_path) -> None:
    """Red if a pickle, or a pickled object in an .npz, is executed; either would make the witness."""
    witness = tmp_path / "witness"
    bomb = Bomb(os.mkdir, str(witness))
    write_pickle(tmp_path / "val_data", draw_imagenet_batch(0) | {"mean": bomb})
    with pytest.raises(UsageError, match="mkdir has no place"):
        read_imagenet32(tmp_path, "test")
    write_npz(tmp_path / "val_data", draw_imagenet_batch(0) | {"labels": np.array([bomb] * 3)})
    with pytest.raises(UsageError, match="pickled objects are not read"):
        read_imagenet32(tmp_path, "test")
    assert not witness.exists()


def test_damaged_files_are_refused_in_one_line(tmp_path) -> None:
    """Red if a file that is cut short, or noise, ends in anything but one line that names it."""
    write_pickle(tmp_path / "val_data", draw_imagenet_batch(0))
    whole = (tmp_path / "val_data").read_bytes()
    for damaged in (whole[:-100], whole[:50], b"", b"PK\3\4" + bytes(100), bytes(range(256))):
        for name in ("val_data", "val_data.npz"):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(UsageError, match=f"{name} is damaged") as caught:
                read_imagenet32(tmp_path, "test")
            assert "\n" not in str(caught.value)
            (tmp_path / name).unlink()


# ---------------------------------------------------------------------------------------------------------------------
# 128x128: TFRecords


def middle(seed: int) -> np.ndarray:
    return draw_noise(seed)[:, 20:-20].transpose(2, 0, 1)


COUNTS = (3, 4, 2)


@pytest.fixture
def records(tmp_path) -> pathlib.Path:
    """Nine images in three files and index.json; image i is draw_noise(i) of label i + 1."""
    seed, names = 0, {}
    for file, count in enumerate(COUNTS):
        names[f"train-{file:05}-of-00003"] = count
        seeds = range(seed, seed + count)
        write_records(tmp_path / f"train-{file:05}-of-00003", [encode_example(encode_noise(i), i + 1) for i in seeds])
        seed += count
    write_records(tmp_path / "validation-00000-of-00001", [encode_example(encode_noise(100), 1000)])
    names["validation-00000-of-00001"] = 1
    (tmp_path / "index.json").write_text(json.dumps({"record_counts": names}))
    return tmp_path


def assert_is(dataset: streaming.StreamedImages, index: list[int], expected: list[int]) -> None:
    """Compare a batch, bit for bit, with the images that it should hold."""
    images, labels = dataset.batch(torch.tensor(index), torch.Generator().manual_seed(1), rescale=2.0)
    stored = torch.from_numpy(np.stack([middle(seed) for seed in expected]))
    assert torch.equal(images, dequantise(stored, torch.Generator().manual_seed(1), 2.0))
    assert labels is not None and labels.argmax(1).tolist() == expected
    assert labels.shape == (len(index), 1000)
    assert labels.sum() == len(index)


def test_example_written_by_protobuf() -> None:
    """Red if the parser's idea of tf.train.Example, shared by `encode_example`, is not that of the real one."""
    serialised = (
        b"\n\x9d\x01\n\x1b\n\x11image/class/label\x12\x06\x1a\x04\n\x02\xac\x02\n#\n\x12image/class/synset\x12\r\n\x0b\n\t"
        b"n01440764\n\x19\n\rimage/encoded\x12\x08\n\x06\n\x04JPEG\n\x16\n\x0cimage/height\x12\x06\x1a\x04\n\x02\xf7\x02"
        b"\n&\n\x16image/object/bbox/xmin\x12\x0c\x12\n\n\x08\x00\x00\x80>\x00\x00\x00?"
    )
    assert imagenet.parse_example(serialised) == (b"JPEG", 300)


@pytest.mark.parametrize("with_index", [True, False])
def test_records_by_number(records, with_index) -> None:
    """Red if an image is not found by its number, in the order of the files, or gets another one's label."""
    if not with_index:
        (records / "index.json").unlink()
    dataset = open_imagenet(records, "train", workers=0)
    assert len(dataset) == 9
    assert (dataset.image_shape, dataset.label_size) == ((3, SIDE, SIDE), 1000)
    assert_is(dataset, [8, 0, 3, 2, 3], [8, 0, 3, 2, 3])
    validation = open_imagenet(records, "test", workers=0)
    _, labels = validation.batch(torch.tensor([0]), None)
    assert labels is not None and (len(validation), labels.argmax().item()) == (1, 999)


def test_decode_workers_give_the_same_batches(records) -> None:
    """Red if batches decoded ahead are mixed up or given up, or those never asked for pile up."""
    dataset = open_imagenet(records, "train", workers=2)
    order = [[4, 1], [8, 8], [0, 7], [5, 2]]
    for index in order[:3]:
        dataset.prefetch(torch.tensor(index))
    for index in [order[1], order[3], order[0]]:
        assert_is(dataset, index, index)
    assert list(dataset.pending) == [(0, 7)]
    for first in range(9):  # as where a run is rolled back
        dataset.prefetch(torch.tensor([first, first, first]))
    assert len(dataset.pending) == streaming.MAX_PENDING
    assert_is(dataset, order[3], order[3])
    dataset.close()


def test_a_killed_worker_is_replaced(records, capsys) -> None:
    """Red if a run hangs or ends because a decode worker was killed, with a result half sent, or between images."""
    dataset = open_imagenet(records, "train", workers=1)
    (worker,) = dataset.workers
    assert_is(dataset, [1], [1])
    assert worker.process is not None
    os.kill(worker.process.pid or 0, signal.SIGSTOP)
    dataset.prefetch(torch.tensor([3, 4]))
    worker.process.kill()
    assert_is(dataset, [3, 4], [3, 4])
    worker.process.kill()
    worker.process.join()
    assert_is(dataset, [5], [5])
    dataset.close()
    assert capsys.readouterr().out.count("note: a decode worker was killed") == 2


def test_an_image_that_kills_workers_is_bad(records, capsys, monkeypatch) -> None:
    """Red if an image that crashes the decoder ends the run, or is tried for ever."""
    dataset = open_imagenet(records, "train", workers=1)
    dataset.places = [Deadly(), *dataset.places]
    assert_is(dataset, [0], [0])
    dataset.close()
    assert "an image that kills the process that decodes it; the next image" in capsys.readouterr().out


class Deadly:
    def __str__(self) -> str:
        return "an image that"

    def load(self) -> tuple[bytes, int]:
        os._exit(1)


@pytest.mark.slow
def test_decode_workers_end_with_the_run(tmp_path) -> None:
    """Red if decode workers outlive a run that was killed, as processes that wait for work do."""
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(encode_noise(0))
    script = f"""
import os
import pathlib
import signal
import torch
from ebm.readers import imagenet
if __name__ == "__main__":
    dataset = imagenet.open_imagenet(pathlib.Path({str(tmp_path)!r}), "train", workers=1)
    dataset.batch(torch.tensor([0]), None)
    print(dataset.workers[0].process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "run.py").write_text(script)
    run = subprocess.run(
        [sys.executable, tmp_path / "run.py"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert run.returncode == -signal.SIGKILL
    worker = int(run.stdout)
    deadline = time.monotonic() + 60
    with contextlib.suppress(OSError):  # the file of a process that has ended can no longer be read
        while time.monotonic() < deadline:
            if pathlib.Path(f"/proc/{worker}/stat").read_text().split(")")[1].split()[0] == "Z":
                break
            time.sleep(0.05)
    assert time.monotonic() < deadline, "the decode worker still runs"


def test_a_damaged_record_is_named_and_replaced(records, capsys) -> None:
    """Red if a flipped bit passes, is not named once by file and offset, or costs more than this image."""
    path = records / "train-00001-of-00003"
    offsets = write_records(path, [encode_example(encode_noise(i), i + 1) for i in range(3, 7)])
    flip_bit(path, offsets[2] + 500)
    dataset = open_imagenet(records, "train", workers=0)
    for _ in range(2):
        assert_is(dataset, [4, 5, 0], [4, 6, 0])
    said = capsys.readouterr().out
    assert said.count("note:") == 1
    assert f"{path} at byte {offsets[2]} is damaged: the record fails its checksum" in said


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (encode_example(encode_noise(0), 1001), "class label 1001"),
        (encode_example(b"\xff\xd8\xff\xe0 no JPEG", 1), "cannot be decoded"),
        (encode_example(encode_noise(0, "JPEG")[:-2000], 1), "truncated"),
        (encode_field(1, b""), "holds no image/encoded"),
        (encode_example(encode_noise(0), None), "holds no image/class/label"),
        (b"\x0a\xff", "is damaged"),
        (b"", "holds no image/encoded"),
    ],
)
def test_bad_records_of_all_kinds(records, capsys, record, message) -> None:
    """Red if one of them is taken for an image, or ends the run."""
    write_records(records / "train-00000-of-00003", [record, *[encode_example(encode_noise(i), i + 1) for i in (1, 2)]])
    assert_is(open_imagenet(records, "train", workers=0), [0], [1])
    assert message in capsys.readouterr().out


def test_too_many_bad_records_end_the_run(records, monkeypatch) -> None:
    """Red if a run goes on among damaged files, or searches for ever where all are damaged."""
    broken = [encode_example(b"", i) for i in range(1, 5)]
    write_records(records / "train-00001-of-00003", broken)
    monkeypatch.setattr(streaming, "MAX_BAD", 3)
    with pytest.raises(UsageError, match=r"train-00001-of-00003 at byte \d+ cannot be decoded.*image number 4 of 9"):
        open_imagenet(records, "train", workers=0).batch(torch.tensor([3]), None)
    monkeypatch.setattr(streaming, "MAX_BAD", 100)
    for file, count in enumerate(COUNTS):
        write_records(records / f"train-{file:05}-of-00003", broken[:1] * count)
    with pytest.raises(UsageError, match="image number 9 of 9"):
        open_imagenet(records, "train", workers=0).batch(torch.tensor([3]), None)


def test_files_that_cannot_be_indexed(records) -> None:
    """Red if damaged lengths, cut, missing or unlisted records pass, or are not named by file and offset."""
    path = records / "train-00001-of-00003"
    offsets = write_records(path, [encode_example(encode_noise(i), i + 1) for i in range(3, 7)])
    whole = path.read_bytes()

    flip_bit(path, offsets[2] + 1)
    with pytest.raises(UsageError, match=f"{path} at byte {offsets[2]} is damaged: a record's length fails its check"):
        open_imagenet(records, "train", workers=0)
    path.write_bytes(whole[:-1])
    with pytest.raises(UsageError, match=f"{path} at byte {offsets[3]} is cut short"):
        open_imagenet(records, "train", workers=0)
    path.write_bytes(whole[: offsets[3] + 5])
    with pytest.raises(UsageError, match=f"{path} at byte {offsets[3]} is damaged"):
        open_imagenet(records, "train", workers=0)
    path.write_bytes(whole[: offsets[3]])
    with pytest.raises(UsageError, match=f"{path} holds 3 records and index.json says 4"):
        open_imagenet(records, "train", workers=0)
    path.unlink()
    with pytest.raises(UsageError, match=f"{path} at byte 0 cannot be read .No such file"):
        open_imagenet(records, "train", workers=0)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"record_counts": {"train-1-of-1": "many"}}', "\xff"])
def test_damaged_index(records, text) -> None:
    """Red if index.json that holds something else ends in a traceback."""
    (records / "index.json").write_bytes(text.encode("latin1"))
    with pytest.raises(UsageError, match=r"index\.json is damaged"):
        open_imagenet(records, "train", workers=0)


def test_index_without_the_split(records) -> None:
    """Red if an index that lists no training files, or only paths out of its folder, gives an empty data set."""
    (records / "index.json").write_text('{"record_counts": {"../train-00000-of-00003": 3}}')
    with pytest.raises(UsageError, match=r"index\.json lists no files train-"):
        open_imagenet(records, "train", workers=0)


# ---------------------------------------------------------------------------------------------------------------------
# 128x128: folders and decoding


@pytest.fixture
def tree(tmp_path) -> pathlib.Path:
    """Class folders as people have them, some with an inner folder; image i is draw_noise(i)."""
    names = ["train/n01/b.png", "train/n01/a.PNG", "train/n02/images/c.png", "val/n01/x.png", "val/n02/y.png"]
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encode_noise(i))
    (tmp_path / "train" / "n02" / "list.txt").write_text("no image")
    (tmp_path / "train" / ".cache").mkdir()
    return tmp_path


def assert_tree(dataset: streaming.StreamedImages, seeds: list[int], classes: list[int]) -> None:
    images, labels = dataset.batch(torch.arange(len(dataset)), torch.Generator().manual_seed(1))
    stored = torch.from_numpy(np.stack([middle(seed) for seed in seeds]))
    assert torch.equal(images, dequantise(stored, torch.Generator().manual_seed(1), 1.0))
    assert labels is not None and labels.tolist() == torch.eye(2)[classes].tolist()


def test_class_folders(tree, monkeypatch) -> None:
    """Red if images are unsorted, missed, doubled or given the class of another folder, or the splits are swapped."""
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda top: ((*where, sorted(files)[::-1]) for *where, files in walk(top)))
    dataset = open_imagenet(tree, "train", workers=0)
    assert dataset.class_names == ("n01", "n02")
    assert_tree(dataset, [1, 0, 2], [0, 0, 1])
    assert_tree(open_imagenet(tree, "test", workers=0), [3, 4], [0, 1])
    assert_tree(open_imagenet(tree / "train", "train", workers=0), [1, 0, 2], [0, 0, 1])


def test_folders_that_do_not_do(tree) -> None:
    """Red if a class without images, a missing split or a missing folder is not explained."""
    with pytest.raises(UsageError, match=r"no validation images; put class folders below .*/val"):
        open_imagenet(tree / "train", "test", workers=0)
    (tree / "train" / "n03").mkdir()
    with pytest.raises(UsageError, match="n03 holds no images"):
        open_imagenet(tree, "train", workers=0)
    (tree / "none").mkdir()
    with pytest.raises(UsageError, match="none holds no images"):
        open_imagenet(tree / "none", "train", workers=0)
    with pytest.raises(UsageError, match=r"`imagenet_datadir`=.*nowhere: no such folder"):
        open_imagenet(tree / "nowhere", "train", workers=0)


def test_a_vanished_file_is_a_bad_image(tree, capsys) -> None:
    """Red if a file that is deleted during a run ends it."""
    dataset = open_imagenet(tree, "train", workers=0)
    (tree / "train" / "n01" / "a.PNG").unlink()
    dataset.batch(torch.tensor([0]), None)
    assert f"{tree}/train/n01/a.PNG cannot be read (No such file" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(("width", "height"), [(512, 384), (384, 1100), (300, 200), (96, 64)])
def test_resize_and_crop(kind, width, height) -> None:
    """Red if the middle is missed, the aspect ratio changed or a JPEG decoded at a wrong scale: a ramp stays a ramp."""
    x, y = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    ramp = np.stack(np.broadcast_arrays(255 * x / width, 255 * y / height, 100.0), -1).round().astype(np.uint8)
    shorter = min(width, height)
    along = (np.arange(SIDE) + 0.5) * shorter / SIDE
    expected = np.stack(
        np.broadcast_arrays(
            255 * (along + (width - shorter) / 2) / width,
            255 * (along[:, None] + (height - shorter) / 2) / height,
            100.0,
        )
    )
    decoded = streaming.read_antialiased_pixels(encode_image(ramp, kind))
    inner = (slice(None), slice(4, -4), slice(4, -4))  # at the edges there is nothing beyond to average
    assert abs(decoded.astype(float) - expected)[inner].max() < 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_detail(kind) -> None:
    """Red if stripes wide enough are blurred, as by decoding at too small a scale; or finer ones alias."""

    def stripes(period: int) -> np.ndarray:
        line = np.where(np.arange(4 * SIDE) % period < period // 2, 230, 30).astype(np.uint8)
        return streaming.read_antialiased_pixels(
            encode_image(np.broadcast_to(line[:, None], (4 * SIDE, 4 * SIDE, 3)), kind)
        )

    assert stripes(period=16).std() > 65
    assert abs(stripes(period=2).astype(int) - 130).max() < 15


READERS = [streaming.read_antialiased_pixels, functools.partial(tf_images.read_tf_pixels, side=SIDE)]


@pytest.mark.parametrize("read", READERS)
def test_no_image_runs_a_program(monkeypatch, read) -> None:
    """Red if Pillow may read PostScript, which it hands to Ghostscript whatever a file is called."""
    from PIL import EpsImagePlugin

    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given, **named: started.append(given))
    with pytest.raises(ValueError, match="of no known format"):
        read(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    assert not started


@pytest.mark.parametrize("read", READERS)
def test_grey_and_cmyk_become_colour(read) -> None:
    """Red if ImageNet's few grey, CMYK and transparent files are refused or come out in other colours."""
    for mode, value in (("L", 128), ("CMYK", (127, 127, 127, 0)), ("P", 1), ("RGBA", (128, 128, 128, 255))):
        image = Image.new(mode, (150, 150), value)
        if mode == "P":
            image.putpalette([0, 0, 0, 128, 128, 128])
        file = io.BytesIO()
        image.save(file, "JPEG" if mode in ("L", "CMYK") else "PNG")
        decoded = read(file.getvalue())
        assert decoded.shape == (3, SIDE, SIDE)
        assert abs(decoded.astype(int) - 128).max() <= 3, mode


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_images_are_resized_as_asked(tmp_path, antialias, workers) -> None:
    """Breaks when the setting does not reach the decoder, or fractions of a byte are lost before the noise is added."""
    encoded = encode_image(recipe_tasks.picture(0, 200, 300), "JPEG")
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.jpg").write_bytes(encoded)
    dataset = open_imagenet(tmp_path, "train", workers=workers, antialias=antialias)
    images, _ = dataset.batch(torch.tensor([0]), torch.Generator().manual_seed(1))
    bytes_of_image = dataset.raw(torch.tensor([0]))
    dataset.close()
    stored = torch.tensor(READERS[1 - antialias](encoded)[None])
    assert torch.equal(images, dequantise(stored, torch.Generator().manual_seed(1), 1.0))
    assert bytes_of_image.dtype == torch.uint8
    assert (bytes_of_image - stored).abs().max() <= (0 if antialias else 0.5)


OF_EARLIER_VERSION = {"dataset": "imagenetfull"}


@pytest.mark.parametrize(
    ("flags", "given", "expected"),
    [
        ({}, None, False),  # a TensorFlow checkpoint
        (OF_EARLIER_VERSION, None, True),
        (OF_EARLIER_VERSION, False, False),
        (OF_EARLIER_VERSION | {"antialias": False}, None, False),
        (OF_EARLIER_VERSION | {"antialias": True}, None, True),
        (OF_EARLIER_VERSION | {"antialias": True}, False, False),
        ({"dataset": "folder"}, None, False),
        ({"dataset": "folder"}, True, True),
    ],
)
def test_a_model_is_examined_on_images_as_in_training(tree, capsys, flags, given, expected) -> None:
    """Breaks when a model gets images that are resized otherwise than in its training, or that is assumed silently."""
    model = models.build_model(models.ModelConfig("ResNet128", (3, SIDE, SIDE), num_filters=4))
    trained = TrainedModel(model, tree / "model_1.pt", flags, ())
    settings = AisSettings(dataset="imagenetfull", imagenet_datadir=str(tree), antialias=given, data_workers=0)
    for split in ("train", "test"):
        dataset = load_split(split, trained, settings, torch.device("cpu"))
        assert isinstance(dataset, streaming.StreamedImages)
        assert dataset.antialias == expected
    is_assumed = flags == OF_EARLIER_VERSION and given is None
    assert capsys.readouterr().out.count("model_1.pt was trained before this was a setting") == is_assumed


def test_sides_are_rounded_up() -> None:
    """Breaks when a side is rounded to the nearest number, or not in float32, where 390·(128/104) exceeds 480."""
    assert tf_images.compute_tf_size(300, 310, 128) == (128, 133)  # 132.27
    assert tf_images.compute_tf_size(310, 300, 128) == (133, 128)
    assert tf_images.compute_tf_size(104, 390, 128) == (128, 481)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_colours_of_jpegs(subsampling) -> None:
    """Breaks when colours that a JPEG stores at half the width or height are put elsewhere, or are not smoothed."""
    hue = 128 + 100 * np.sin(np.mgrid[0:61, 0:83].sum(0) / 2)  # waves along both axes
    file = io.BytesIO()
    Image.fromarray(np.stack([hue, 255 - hue, hue * 0 + 128], 2).astype(np.uint8)).save(
        file, "JPEG", quality=95, subsampling=subsampling
    )
    exact = np.asarray(Image.open(file)).transpose(2, 0, 1).astype(int)
    found = tf_images.look_up_pixels(Image.open(file), np.arange(61), np.arange(83))
    assert abs(found - exact).mean() < 3  # the fast cosine transform; 11 and more where colours are not smoothed


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train_network(network: str, dataset) -> Step:
    """Make one step of the published kind on a narrow network."""
    config = models.ModelConfig(network, dataset.image_shape, num_filters=4, label_size=1000, swish_act=True)
    model = make_model(config)
    settings = TrainSettings(batch_size=2, num_steps=1, step_lr=10.0, replay_batch=True, zero_kl=True)
    batches = data.Batches(len(dataset), 2, seed=0)
    buffer = ReplayBuffer(10, config.image_shape)
    state = State(model, ClippedAdam(model.parameters()), buffer, batches, torch.Generator())
    return train_once(state, settings, *read_batch(state, settings, dataset))


def test_networks_train(tmp_path, records) -> None:
    """Red if a batch of either data set does not fit the network and the step that its published command trains."""
    write_pickle(tmp_path / "train_data_batch_1", draw_imagenet_batch(0))
    images, classes, names = read_imagenet32(tmp_path, "train")
    small = data.StoredImages("imagenet", images, classes, names, noise="centred")
    for network, dataset in (("ResNet32Wider", small), ("ResNet128", open_imagenet(records, "train", workers=0))):
        step = train_network(network, dataset)
        assert torch.isfinite(step.loss)
        assert step.labels is not None
        assert step.labels.shape == (2, 1000)


def test_batches_for_a_gpu_are_pinned(monkeypatch):
    """Breaks when a copy to a GPU makes the CPU wait for it; there is none here, so calls are looked at."""
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *where, **how: calls.append((*where, how)) or self)
    for device in ("cpu", "cuda"):
        streaming.StreamedImages([], (), device=device, workers=0).to_device(torch.zeros(1))
    assert calls == [("cpu", {"non_blocking": True}), "pinned", ("cuda", {"non_blocking": True})]
