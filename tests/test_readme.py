"""Every training command in the README runs as it is written, on tiny data and with a tiny network."""

import pickle
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

import test_data
import test_imagenet
from test_train import ENVIRONMENT, ROOT

pytestmark = pytest.mark.slow
COMMANDS = re.findall(r"^python train\.py .*", (ROOT / "README.md").read_text(), re.MULTILINE)
# Behind the command's own flags, so that these win; everything that makes the command what it is stays.
SMALL = ["--max_iter=2", "--num_steps=2", "--batch_size=4", "--num_filters=8", "--num_samples=2", "--sample_steps=2"]


def write_cifar10(root):
    """The batches of CIFAR-10, a few images each, as the archive unpacks."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in [f"data_batch_{k}" for k in range(1, 6)]:
        rows = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": [0, 1, 2, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


def write_imagenet(folder):
    folder.mkdir()
    for name in test_imagenet.BATCHES:
        test_imagenet.write_pickle(folder / name, test_imagenet.contents(0))


def write_imagenetfull(folder):
    folder.mkdir()
    encoded = [test_imagenet.example(test_imagenet.noise_file(seed, "JPEG"), seed + 1) for seed in range(8)]
    test_imagenet.write_records(folder / "train-00000-of-00001", encoded)
    (folder / "index.json").write_text('{"record_counts": {"train-00000-of-00001": 8}}')


@pytest.mark.parametrize("command", COMMANDS)
def test_command(tmp_path, command):
    """Breaks when a published command is refused, or a spelling of it does not take effect."""
    write_cifar10(tmp_path / "data")
    test_data.write_mnist(tmp_path / "data" / "FashionMNIST" / "raw")
    write_imagenet(tmp_path / "imagenet")
    write_imagenetfull(tmp_path / "imagenetfull")
    command = command.replace("<imagenet32x32 path>", "imagenet").replace("<full imagenet path>", "imagenetfull")
    words = shlex.split(command)[2:]
    result = subprocess.run(
        [sys.executable, ROOT / "train.py", *words, *SMALL, "--data_workers=1"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    exp = re.search(r"--exp=(\S+)", command)[1]
    assert (tmp_path / "cachedir" / exp / "model_2.pt").exists()
    settings = dict(
        word.split("=", 1) for word in re.search(r"^settings: (.*)", result.stdout, re.MULTILINE)[1].split()
    )
    assert float(settings["step_lr"]) == float(re.search(r"step_lr=(\S+)", command)[1])
    assert settings["dataset"] == re.search(r"--dataset=(\S+)", command)[1]


def test_the_commands_are_there():
    """Breaks when the README loses its commands, and the tests above with them."""
    assert len(COMMANDS) >= 5
