"""Every command in the README and in docs/ runs as written: on tiny data, with tiny networks or the shipped ones."""

import math
import re
import shlex
import shutil
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch

import checkpoint
import data
import models
from conftest import (
    IMAGENET_BATCHES,
    ROOT,
    WORKERS,
    draw_bytes,
    draw_imagenet_batch,
    encode_example,
    encode_noise,
    find_unnamed_files,
    make_sandbox,
    make_sandbox_run,
    write_colour_sets,
    write_mnist,
    write_pickle,
    write_records,
)
from ebm.settings import TrainSettings
from ebm.support import cli
from ebm.support.reports import write_json
from ebm.tasks import sandbox

pytestmark = pytest.mark.slow
README = (ROOT / "README.md").read_text()
EXTENDING = (ROOT / "docs/extending.md").read_text()
PAGES = [README, *(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))]
BLOCKS = [block for page in PAGES for block in re.findall(r"^```\w*\n(.*?)^```", page, re.MULTILINE | re.DOTALL)]
COMMAND = re.compile(r"^(?:mpiexec -n \d+ )?python \S+\.py.*", re.MULTILINE)
DOCUMENTED = list(dict.fromkeys(command for block in BLOCKS for command in COMMAND.findall(block)))
NOT_RUN = {  # command -> why it cannot run here
    "python train.py --preset=dsprites_pos_cpu --resume_iter=latest --max_iter=2500 --lr=2e-2 --batch_size=64 "
    "--num_chains=16 --mismatch=2 --ema_decay=0.995": "it resumes a run of 2,000 iterations",
}
COMMANDS = [command for command in DOCUMENTED if command not in NOT_RUN]

# Behind a command's own flags, so that these win; everything that makes the command what it is stays.
TRAIN = ["--max_iter=2", "--num_steps=2", "--batch_size=4", "--num_filters=8", "--num_samples=2", "--sample_steps=2"]
TRAIN += ["--logdir=trained"]  # so that no other command takes what was trained
QUICK = "--train_flags=--num_filters=4 --num_samples=20 --sample_steps=2"  # of the runs that recipes.py starts
LIMIT = ["--limit_size=64"]  # of the matrix products that are a machine's limit
SMALL = {
    "train.py": [*TRAIN, "--data_workers=1"],
    "ebm_sandbox.py": [
        "--num_steps=1",
        "--limit=4",
        "--batch_size=4",
        "--chain_steps=50",
        "--attack_steps=1",
        "--attack_queries=1",
    ],
    "ebm_combine.py": ["--num_steps=1", "--limit=2", "--batch_size=2", "--break_steps=1", "--precision=float32"],
    "imagenet_demo.py": ["--num_steps=2", "--batch_size=2"],
    "sample.py": ["--num_steps=1", "--num=2"],
    "eval_inception.py": ["--num_steps=1", "--im_number=20", "--repeat_scale=1", "--real_number=100", "--nodownload"],
    "ais.py": ["--pdist=1,2", "--limit=4", "--batch_size=2"],
    "scripts/compare.py": ["--logdir=compared"],
    "scripts/convert_checkpoint.py": [],
    "scripts/reproduce.py": ["--call_flags=--limit=20"],
    "scripts/export.py": [],
    "benchmarks/langevin.py": [
        "--networks=MnistNet",
        "--batch_size=1",
        "--steps=1",
        "--rounds=1",
        "--nocompile",
        *LIMIT,
    ],
    "benchmarks/iteration.py": ["--num_filters=4", "--steps=1", "--batch_sizes=1", "--scales=1,2", "--rounds=1"],
    "benchmarks/kernels.py": ["--num_filters=4", "--batch_size=1", "--steps=1"],
    "benchmarks/machine.py": ["--size=64"],
    "benchmarks/loader.py": ["--workers=1", "--files=4", "--batch_size=2", "--batches=1", "--rounds=1"],
    "benchmarks/tasks.py": ["--commands=sample"],
    "benchmarks/evaluation_precision.py": [
        *("--seeds=2", "--jobs=1", "--precisions=float32,bf16", "--evaluations=democlass", "--call_flags=--num_steps=1")
    ],
    "benchmarks/measures.py": ["--samples=20", "--fit_steps=1"],
    "benchmarks/time_to_quality.py": ["--libraries=project", "--minutes=0", "--samples=20", "--num_filters=4"],
    "benchmarks/leave_one_out.py": [
        "--classes=3",
        "--train_flags=--max_iter=1 --num_steps=1 --num_filters=2 --batch_size=4 --sample_steps=1 --notune",
        "--ood_flags=--limit=10 --repeats=1 --num_steps=1",
    ],
    "benchmarks/recipes.py": ["--max_iter=1", "--test_interval=1", "--recipes=1", "--seeds=2", QUICK],
}
TRAINED = {  # the published checkpoints: experiment -> network, iteration, shape of the images, label size
    "cifar10_large_model_uncond": ("ResNet32Large", 121200, (3, 32, 32), 0),
    "cifar10_wider_model_cond": ("ResNet32Wider", 21600, (3, 32, 32), 10),
    "imagenet128_cond": ("ResNet128", 2238000, (3, 128, 128), 1000),
}
PLACES = {
    "<imagenet32x32 path>": "imagenet",
    "<full imagenet path>": "imagenetfull",
    "<number of pgd steps>": "1",
    "<li bound value>": "4",
}


def write_imagenet(folder):
    folder.mkdir()
    for name in IMAGENET_BATCHES:
        write_pickle(folder / name, draw_imagenet_batch(0))


def write_imagenetfull(folder):
    folder.mkdir()
    encoded = [encode_example(encode_noise(seed, "JPEG"), seed + 1) for seed in range(8)]
    write_records(folder / "train-00000-of-00001", encoded)
    (folder / "index.json").write_text('{"record_counts": {"train-00000-of-00001": 8}}')


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with small data in the real formats, and tiny models for the published ones."""
    root = tmp_path_factory.mktemp("readme")
    write_colour_sets(root / "data", count=40)
    for name in ("MNIST", "FashionMNIST"):
        write_mnist(root / "data" / name / "raw", count=200)
    write_imagenet(root / "imagenet")
    write_imagenetfull(root / "imagenetfull")
    shutil.copytree(ROOT / "tests/golden/tf_checkpoints/cifar10_cond", root / "cachedir" / "cifar10_cond")
    for name in ("compared/steps20", "compared/steps5", "cachedir/steps20", "cachedir/steps5"):
        write_json(root / name / "config.json", {"flags": {"tag": ["steps"], "max_iter": 10}})
        (root / name / "log.jsonl").write_text('{"iteration": 10, "e_diff": 0.1}\n')
    for exp, (network, iteration, shape, label_size) in TRAINED.items():
        config = models.ModelConfig(network, shape, 2, label_size, swish_act=network == "ResNet128")
        state = {"config": config.__dict__, "model": models.build_model(config).state_dict(), "iteration": iteration}
        checkpoint.save(root / "cachedir" / exp / f"model_{iteration}.pt", state)
        checkpoint.save(root / "fashion_cond.safetensors", state)
    return root


def run(place, command):
    """Run a command of the README or of docs/, made small, and return what it printed: every file that it wrote."""
    for words, value in PLACES.items():
        command = command.replace(words, value)
    launcher, script, words = re.fullmatch(r"(mpiexec -n \d+ )?python (\S+)(.*)", command).groups()
    words = shlex.split(words, comments=True) + SMALL[script]
    if script == "benchmarks/recipes.py" and "precision_digits" not in command:
        words.append("--seeds=1")  # one command with several seeds is enough: each run trains a classifier
    elif script == "benchmarks/recipes.py":
        words.append("--precisions=float32")  # the other command has both
    if script == "ebm_combine.py":
        words += [f"--train_flags={shlex.join(TRAIN)}"]
    train_flags = [word.removeprefix("--train_flags=") for word in words if word.startswith("--train_flags=")]
    words += [f"--train_flags={' '.join(train_flags)}"] if train_flags else []  # the last one counts: it has them all
    program = [*shlex.split(launcher or ""), *(["--oversubscribe"] if launcher else [])]
    start = time.time()
    result = subprocess.run(
        [*program, sys.executable, ROOT / script, *words],
        cwd=place, env=WORKERS, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr
    new = [path for path in place.rglob("*") if path.is_file() and path.stat().st_mtime >= start]
    assert not find_unnamed_files(new, result.stdout, place), result.stdout
    return result.stdout


@pytest.mark.parametrize("command", [command for command in COMMANDS if "train.py" in command])
def test_training_command(place, command):
    """Breaks when a training command is refused, or a spelling of it does not take effect."""
    printed = run(place, command)
    words = shlex.split(re.search(r"^settings: (.*)", printed, re.MULTILINE)[1])
    settings = cli.parse(["train.py", *words], TrainSettings)
    assert (place / "trained" / settings.exp / "model_2.pt").exists()
    for name, value in re.findall(r"(step_lr|dataset|exp|preset)=(\S+)", command):
        assert str(getattr(settings, name)) == value or float(getattr(settings, name)) == float(value)


@pytest.mark.parametrize("command", [command for command in COMMANDS if "train.py" not in command])
def test_command(place, command):
    """Breaks when a command is refused, hides where its files are, or lets them lie in the working directory."""
    before = set(place.iterdir())
    printed = run(place, command)
    assert "benchmarks/" in command or "wrote " in printed
    assert set(place.iterdir()) - before <= {place / name for name in ("sandbox_cachedir", "benchmarks", "trained")}


def test_snippets(tmp_path):
    """Breaks when a network, a data set or a task as docs/extending.md writes them no longer runs."""
    network, dataset, task = re.findall(r"```python\n(.*?)```", EXTENDING, re.DOTALL)
    with mock.patch.dict(models.NETWORKS):
        exec(network, vars(models).copy())
        box = make_sandbox("SmallNet", (3, 8, 8))
    with mock.patch.dict(data.DATASETS):
        exec(dataset, vars(data).copy())
        images = draw_bytes(4, 3, 8, 8)
        torch.save((images, torch.tensor([0, 1, 1, 0])), tmp_path / "test.pt")
        pets = data.load_dataset("pets", split="test", root=tmp_path)
        _, labels = pets.batch(torch.tensor([2, 3]), None)
    assert torch.equal(pets.raw(torch.arange(4)), images)
    assert labels is not None and labels.tolist() == [[0, 1], [1, 0]]
    with mock.patch.dict(sandbox.TASKS):
        exec(task, vars(sandbox).copy())
        report = sandbox.TASKS["brightness"](make_sandbox_run(box, tmp_path, classes=0))
    assert len(report.figures) == 3 and all(map(math.isfinite, report.figures.values()))


def test_python(tmp_path, monkeypatch):
    """Breaks when the README's lines of Python no longer run, or their samples are all alike, noise or flat."""
    (lines,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(lines, names := {})
    images, trouser = names["images"], names["model"].class_names.index("trouser")
    corners, middle = images[trouser::10, :, :8, :4], images[trouser::10, :, :8, 11:17]
    assert corners.mean() < 0.1 and middle.mean() > 0.4  # dark beside the waistband
    assert (tmp_path / "garments.png").exists()


def test_the_commands_are_there():
    """Breaks when the pages lose their commands, and the tests above with them, or one is of a script unknown here."""
    scripts = {re.search(r"python (\S+)", command)[1] for command in COMMANDS}
    assert set(SMALL) >= scripts >= {path.name for path in ROOT.glob("*.py") if "__main__" in path.read_text()}


def test_commands_not_run_are_documented():
    """Breaks when a command that is not run here has left the README and docs/, or gives no reason."""
    assert set(NOT_RUN) <= set(DOCUMENTED) and all(NOT_RUN.values())
