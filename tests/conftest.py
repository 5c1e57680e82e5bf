"""What several files of tests use: places and environments, ways to run programs, small networks, files of data."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import io
import json
import math
import os
import pathlib
import pickle
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import checkpoint
import data
import models
from ebm.readers import dsprites
from ebm.readers.downloads import import_torchvision
from ebm.readers.streaming import SIDE
from ebm.settings import SandboxSettings, TrainSettings
from ebm.support.errors import UsageError
from ebm.support.launch import Launch
from ebm.support.progress import Progress
from ebm.tasks.examined_model import ExaminedModel
from ebm.tasks.results import Results
from ebm.tasks.sandbox_run import SandboxRun
from ebm.training import distributed
from ebm.training.acceleration import Acceleration
from ebm.training.run import Run
from ebm.training.state import State, Step
from train import start_chains, train_step
from utils import ClippedAdam, ReplayBuffer

# Under nohup, or behind a shell's &, signals are ignored that tests send.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
BINARIES = pathlib.Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # tiny networks: threads would only wait for each other
WORKERS = ENVIRONMENT | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
WORKERS |= {"PATH": f"{BINARIES}:{os.environ['PATH']}"}

# Flags of train.py for a run of seconds.
SMALL_RUN = ["--dataset=digits", "--cclass", "--replay_batch", "--zero_kl", "--num_steps=2", "--step_lr=100"]
SMALL_RUN += ["--lr=1e-3", "--batch_size=16", "--num_filters=4", "--num_samples=10", "--sample_steps=2"]
SMALL_RUN += ["--notune"]  # timing may choose another way in another run, which has other bits
SMALL_RUN += ["--ema_decay=0.9"]  # off by default; here so that everything below happens to averaged weights too

SHAPE = (1, 28, 28)
CONFIG = models.ModelConfig("MnistNet", SHAPE, num_filters=4)


# Files that take minutes; two workers start with them, so that neither waits for the other at the end.
LONG_FILES = ("test_readme.py", "test_train.py", "test_faults.py", "test_shipped.py", "test_measure_gpu.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of long files first."""
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


# ---------------------------------------------------------------------------------------------------------------------
# Programs


def run_python(*words: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run Python with these words, and settings of subprocess.run; return the process and what it printed."""
    options: dict[str, Any] = {"env": ENVIRONMENT, "check": False} | settings
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, **options)


DRIVER = """
import contextlib, importlib, io, json, sys, typing
from ebm.support import cli
from ebm.support.errors import UsageError
script = importlib.import_module(sys.argv[1])
kind = typing.get_type_hints(script.main)["settings"]
exec(sys.argv[2])
results = []
for words in json.load(sys.stdin):
    printed, error = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        try:
            script.main(cli.parse([f"{sys.argv[1]}.py", *words], kind))
        except UsageError as mistake:
            error = cli.name_flags(str(mistake), kind)
    results.append([printed.getvalue(), error])
print(json.dumps(results))
"""


def run_commands(script: str, commands: dict[str, list[str]], setup: str = "", **settings: Any) -> dict[str, list[str]]:
    """Run a script with the words of each command, all in one process; return what each printed and its error."""
    words = json.dumps(list(commands.values()))
    result = run_python("-c", DRIVER, script, setup, input=words, cwd=ROOT, **settings)
    assert result.returncode == 0, result.stderr
    return dict(zip(commands, json.loads(result.stdout.splitlines()[-1]), strict=True))


def find_unnamed_files(paths: Iterable[pathlib.Path], printed: str, place: pathlib.Path = ROOT) -> list[pathlib.Path]:
    """Return the files that an output does not name: neither their path nor a folder with its number of files.

    Hidden files, such as locks, are left out. A folder that is named with another number of files names none. place:
    the working directory of the program.
    """
    folders = {
        place / folder
        for folder, number in re.findall(r"^wrote (.*)/ \(([\d,]+) files?\)$", printed, re.MULTILINE)
        if int(number.replace(",", ""))
        == sum(path.is_file() and not path.name.startswith(".") for path in (place / folder).rglob("*"))
    }
    named = {place / name for name in re.findall(r"^wrote (.*)$", printed, re.MULTILINE)}
    return [
        path
        for path in paths
        if not path.name.startswith(".") and path not in named and not folders & set(path.parents)
    ]


def skip_without_horovod() -> None:
    """Skip the test that calls this where Horovod does not work under mpiexec."""
    if problem := distributed.find_horovod_problem(Launch("mpiexec"), torch.device("cpu")):
        pytest.skip(f"{problem}: run scripts/install_horovod.sh")


# ---------------------------------------------------------------------------------------------------------------------
# Networks, their states and checkpoints


def make_generator(seed: int = 0) -> torch.Generator:
    """Return a generator on the CPU that starts from this seed."""
    return torch.Generator().manual_seed(seed)


def make_progress(total: int = 1) -> Progress:
    """Return a progress line that shows nothing."""
    return Progress(total, what="test", quiet=True)


def make_model(config: models.ModelConfig = CONFIG, seed: int = 0) -> models.EnergyNetwork:
    """Return an untrained network whose initial values follow from the seed."""
    return models.build_model(config, make_generator(seed))


class Planted:
    """A model whose energy is a given function of images and labels."""

    is_piecewise_linear = False
    starts = None

    def __init__(self, energy: Callable[[Tensor, Tensor], Tensor], config: models.ModelConfig):
        self.config = config
        self.settings: dict[str, Any] = {}
        self.stages: dict[str, Any] = {}  # without layers, the features are the pixels
        self.energy = lambda weights, images, labels: energy(images, labels)
        self.bind_images = lambda weights, images: (
            lambda labels: energy(models.repeat_each(images, len(labels)), labels)
        )

    def prepare(self) -> dict[str, Tensor]:
        """Return no weights."""
        return {}


def make_state(label_size: int = 3, precision: str = "float32", **config: Any) -> State:
    """Return the state of a run that is about to begin, on a small network for grey images."""
    model = make_model(dataclasses.replace(CONFIG, label_size=label_size, **config))
    return State(
        model=model.train(),
        optimizer=ClippedAdam(model.parameters(), lr=1e-3),
        buffer=ReplayBuffer(100, SHAPE),
        batches=data.Batches(100, 8, seed=0),
        generator=make_generator(),
        acceleration=Acceleration(precision),
    )


def make_run(state: State, folder: pathlib.Path, said: list[str] | None = None, **settings: Any) -> Run:
    """Return a run of one iteration in this folder, with settings besides, that appends what it says to a list."""
    workers: Any = distributed.join_workers("none", "cpu")
    workers.print = [].append if said is None else said.append
    images = draw_bytes(24, *state.model.config.image_shape)
    dataset = data.StoredImages("toy", images, torch.arange(24) % 3, ("a", "b", "c"))
    chosen = {"max_iter": 1, "num_steps": 1, "num_samples": 3, "sample_steps": 1, "lr": 1e-3} | settings
    return Run(TrainSettings(logdir=str(folder.parent), exp=folder.name, **chosen), state, dataset, workers)


def train_once(state: State, settings: TrainSettings, images: Tensor, labels: Tensor | None) -> Step:
    """Make one iteration on a batch, as a run of one worker does."""
    return train_step(state, settings, images, labels, start_chains(state, settings, images, labels), lambda: None)


def train_on_noise(state: State, settings: TrainSettings, iterations: int = 3, seed: int = 1) -> Tensor:
    """Train on batches of 8 random images of 3 classes; return the chains' end points (iterations, n, C, H, W)."""
    device = state.generator.device
    draws, ends = torch.Generator(device).manual_seed(seed), []
    for _ in range(iterations):
        images = torch.rand(8, *state.model.config.image_shape, generator=draws, device=device)
        labels = torch.eye(3, device=device)[torch.randint(3, (8,), generator=draws, device=device)]
        ends.append(train_once(state, settings, images, labels).samples)
    return torch.stack(ends)


def write_checkpoint(
    path: pathlib.Path, model: models.EnergyNetwork | None = None, iteration: int = 1, **contents: object
) -> models.EnergyNetwork:
    """Write a network, or a new small one, as a checkpoint that holds these contents besides; return the network."""
    model = make_model() if model is None else model
    state = {"config": dataclasses.asdict(model.config), "model": model.state_dict(), "iteration": iteration}
    checkpoint.save(path, state | contents)
    return model


def write_random_inception(path: pathlib.Path) -> None:
    """Write weights of the size of Inception's, drawn at random so that its features are of order 1."""
    import_torchvision()
    from torch_fidelity import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            pass

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    state = Unloaded("inception-v3-compat", ["2048"], nothing).state_dict()
    draw = make_generator()
    for tensor in state.values():
        if tensor.dim() > 1:
            tensor.normal_(0, math.sqrt(2 / tensor[0].numel()), generator=draw)
    state["fc.weight"] *= 30  # predictions that differ
    torch.save(state, path)


def load_state(path: pathlib.Path) -> Any:
    """Return what a file that torch.save wrote holds."""
    return torch.load(path, weights_only=True)


def is_same_state(one: Any, other: Any) -> bool:
    """Return whether two nested states are the same, bit for bit, but for their flags."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same_state(one[key], other[key]) for key in one if key != "flags")
    if isinstance(one, list):
        return len(one) == len(other) and all(map(is_same_state, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


# ---------------------------------------------------------------------------------------------------------------------
# The sandbox


def make_dataset(image_shape: tuple[int, ...], classes: int = 3, seed: int = 0) -> data.StoredImages:
    """Return a data set of 24 random images whose classes take turns."""
    names = tuple(f"class {k}" for k in range(classes))
    labels = torch.arange(24) % classes if classes else None
    return data.StoredImages("toy", draw_bytes(24, *image_shape, seed=seed), labels, names)


def make_sandbox(
    network: str, image_shape: tuple[int, int, int], label_size: int = 0, **settings: Any
) -> ExaminedModel:
    """Return a small untrained network to be examined."""
    config = models.ModelConfig(network, image_shape, 2, label_size, swish_act=network == "MnistNet")
    return ExaminedModel(make_model(config), make_generator(), **{"num_steps": 2, "batch_size": 16} | settings)


def refuse_set(name: str, **options: Any) -> data.Dataset:
    """Raise UsageError, as loading an out-of-distribution set does whose files are missing."""
    raise UsageError(f"{name} is missing")


def make_sandbox_run(
    box: ExaminedModel,
    folder: pathlib.Path,
    *,
    classes: int = 3,
    mixes: Sequence[str] = (),
    load_mix: Any = refuse_set,
    **settings: Any,
) -> SandboxRun:
    """Return a run of a sandbox's tasks on small random data sets."""
    shape = box.model.config.image_shape
    splits = {split: make_dataset(shape, classes, seed) for seed, split in enumerate(["train", "test"])}
    return SandboxRun(
        box, SandboxSettings(**settings), splits.__getitem__, load_mix, mixes, Results(folder, box.workers)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Images


def draw_bytes(*shape: int, seed: int = 0) -> Tensor:
    """Return random bytes of this shape."""
    return torch.randint(256, shape, dtype=torch.uint8, generator=make_generator(seed))


def draw_sides(count: int, shape: tuple[int, int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return noise with a brighter left (class 0) or right (class 1) half, and the classes."""
    labels = torch.arange(count) % 2
    images = torch.randint(0, 128, (count, *shape), generator=make_generator(seed), dtype=torch.uint8)
    half = shape[-1] // 2
    images[labels == 0, ..., :half] += 100
    images[labels == 1, ..., half:] += 100
    return images, labels


def draw_noise(seed: int) -> np.ndarray:
    """Return pixels of an image that keeps its values when it is cut out: its shorter side is SIDE already."""
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE + 40, 3), dtype=np.uint8)


def encode_image(image: np.ndarray, kind: str = "PNG") -> bytes:
    """Return pixels uint8 (H, W, 3) as the bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, quality=95)
    return file.getvalue()


@functools.cache
def encode_noise(seed: int, kind: str = "PNG") -> bytes:
    """Return draw_noise(seed) as the bytes of an image file."""
    return encode_image(draw_noise(seed), kind)


# ---------------------------------------------------------------------------------------------------------------------
# Files of data


class Bomb:
    """What calls a function with these arguments when it is unpickled."""

    def __init__(self, function: Callable, *arguments: object):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable, tuple[object, ...]]:
        """Return the call, as pickle wants it."""
        return self.call


SPRITE_BOMB = Bomb(exec, "import os; os.environ['DSPRITES_BOMB'] = '1'")


def flip_bit(path: pathlib.Path, place: int) -> None:
    """Damage one bit of a file, in the byte at this place."""
    contents = bytearray(path.read_bytes())
    contents[place] ^= 1
    path.write_bytes(contents)


def encode_idx(array: Tensor) -> bytes:
    """Return an array of bytes as an IDX file."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.numpy().tobytes()


def write_mnist(folder: pathlib.Path, *, compressed: bool = False, count: int = 7) -> dict[str, tuple[Tensor, Tensor]]:
    """Write the four files of MNIST; return images and classes by split."""
    folder.mkdir(parents=True)
    contents = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = draw_bytes(count, 28, 28, seed=len(prefix))
        classes = torch.arange(count, dtype=torch.uint8) % 10
        contents[split] = images, classes
        for array, name in ((images, "images-idx3"), (classes, "labels-idx1")):
            path = folder / f"{prefix}-{name}-ubyte"
            if compressed:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(encode_idx(array)))
            else:
                path.write_bytes(encode_idx(array))
    return contents


def write_colour_sets(root: pathlib.Path, count: int = 6) -> None:
    """Write a few images in each file of CIFAR-10, in its own format, and four of SVHN's test set in theirs."""
    from scipy.io import savemat

    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    for name in ["test_batch", *(f"data_batch_{k}" for k in range(1, 6))]:
        rows = np.random.default_rng(len(name)).integers(0, 256, (count, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": [k % 10 for k in range(count)]}))
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    savemat(root / "test_32x32.mat", {"X": pixels, "y": np.arange(1, 5)})


def write_sprites(path: pathlib.Path, index: Any, **changes: np.ndarray) -> Tensor:
    """Write sprites of these numbers as the published file holds them; its metadata is a pickle. Return the images."""
    latents = dsprites.compute_latents(torch.as_tensor(index))
    images = dsprites.render_sprites(*latents.unbind(1))
    values = np.concatenate([np.ones((len(latents), 1)), latents.double().numpy()], 1)
    arrays: dict[str, Any] = {
        "metadata": np.array(SPRITE_BOMB, dtype=object),
        "imgs": images[:, 0].to(torch.uint8).numpy(),
    }
    np.savez_compressed(path, **(arrays | {"latents_values": values} | changes))
    return images


IMAGENET_BATCHES = [f"train_data_batch_{k}" for k in range(1, 11)]


def draw_imagenet_batch(seed: int, n: int = 3) -> dict[str, Any]:
    """Return a file of ImageNet 32x32 as the authors wrote it: rows of bytes, labels from 1, the mean image."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
    return {"data": rows, "labels": rng.integers(1, 1001, n).tolist(), "mean": rows.mean(0)}


def write_pickle(path: pathlib.Path, value: object) -> None:
    """Write a pickle as Python 3.5 and numpy 1 did, whose module names have no underscore."""
    path.write_bytes(pickle.dumps(value, protocol=3).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))


def encode_varint(number: int) -> bytes:
    """Return a number, 0 or more, as protobuf writes it."""
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + encode_varint(number >> 7)


def encode_field(number: int, value: bytes) -> bytes:
    """Return a protobuf field that holds bytes or a message."""
    return encode_varint(number << 3 | 2) + encode_varint(len(value)) + value


def encode_feature(key: bytes, kind: int, value: bytes | int) -> bytes:
    """Return an entry of the features of a tf.train.Example; kind: 1 for bytes, 3 for whole numbers."""
    encoded = encode_varint(value) if isinstance(value, int) else value
    return encode_field(1, encode_field(1, key) + encode_field(2, encode_field(kind, encode_field(1, encoded))))


def encode_example(encoded: bytes, label: int | None) -> bytes:
    """Return a tf.train.Example as ImageNet's TFRecords hold them; label: None for one without."""
    features = encode_feature(b"image/height", 3, 375) + encode_feature(b"image/encoded", 1, encoded)
    return encode_field(1, features + (b"" if label is None else encode_feature(b"image/class/label", 3, label)))


def write_records(path: pathlib.Path, records: list[bytes]) -> list[int]:
    """Write a TFRecord file with TensorBoard's writer; return where each record starts."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    with path.open("wb") as file:
        offsets = []
        for record in records:
            offsets.append(file.tell())
            RecordWriter(file).write(record)
            file.flush()
    return offsets
