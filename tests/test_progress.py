"""Long work shows how far it is and how long it still takes; scripts say at their end what they have written."""

import contextlib
import math
import pathlib
import re
import threading
import time
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.sparse.linalg import ArpackNoConvergence

import checkpoint
import models
from conftest import (
    ROOT,
    SMALL_RUN,
    draw_bytes,
    draw_sides,
    encode_example,
    encode_noise,
    find_unnamed_files,
    make_dataset,
    make_generator,
    make_model,
    make_run,
    make_sandbox,
    make_sandbox_run,
    make_state,
    run_commands,
    run_python,
    write_checkpoint,
    write_records,
)
from ebm.measures.classifier import train_feature_classifier
from ebm.measures.features import RealImages, Statistics, measure_distance
from ebm.measures.patches import compute_patch_statistics
from ebm.readers import bounded, folders, imagenet
from ebm.support import metrics, progress
from ebm.support.progress import SHORT, Progress, show_waiting
from ebm.support.reports import print_written
from ebm.tasks import analysis, outliers
from ebm.training.classification import LabelledImages, measure_classification
from ebm.training.estimate import check_cost
from ebm.training.setup import fit_starts
from train import train_step


@pytest.fixture
def clock(monkeypatch):
    """A list of one number, the time."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


# ---- the lines ----


def test_short_work_passes_in_silence(clock, capsys):
    """Breaks when work that is usually short prints a line although it is, or none when it takes long for once."""
    for seconds in (0.1, 2.0):
        bar = Progress(3, what="part", patience=SHORT)
        for done in (1, 2, 3):
            clock[0] += seconds
            bar.update(done)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["part 2/3 | 2 s each | 2 s left", "part 3/3 | took 6 s"]


def test_an_item_that_takes_long(clock, capsys):
    """Breaks when a single long item is silent, when its reminders come ever more often, or go on after the end."""
    bar = Progress(4, what="round", patience=SHORT)
    pauses = []
    for _ in range(5):
        clock[0] += pauses[-1] if pauses else 10
        pauses.append(bar.remind())
    assert pauses == [20, 40, 60, 60, 60]
    clock[0] += 50
    bar.update(1)
    clock[0] += 4
    assert bar.remind() == 6  # ten seconds after the last line
    clock[0] += 6
    assert bar.remind() == 20
    bar.update(4)
    clock[0] += 1000
    bar.remind()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [f"round 0/4 | {waited} so far" for waited in ("10 s", "30 s", "70 s", "2 min", "3 min")]
    assert re.fullmatch(r"round 1/4 \| 4 min each \| 12 min left", lines[5])
    assert re.fullmatch(r"round 1/4 \| 4 min each \| 12 min left \| 10 s for the next", lines[6])
    assert lines[7:] == ["round 4/4 | took 4 min"]


def test_reminders_come_by_themselves(monkeypatch, capsys):
    """Breaks when nothing speaks while an item is computed, or a thread is left that speaks after an error."""
    monkeypatch.setattr(Progress, "remind", lambda self: print("still there") or 0.01)
    threads = threading.active_count()
    with contextlib.suppress(ZeroDivisionError), Progress(2, what="part") as bar:
        time.sleep(0.1)
        bar.advance(1 // 0)
    assert threading.active_count() == threads
    assert capsys.readouterr().out.count("still there") > 1
    with Progress(2, what="part", quiet=True):
        time.sleep(0.05)
    assert not capsys.readouterr().out


def test_work_that_cannot_be_counted(monkeypatch, capsys):
    """Breaks when long work says nothing at its beginning, meanwhile or at its end, or short work says something."""
    with show_waiting("reading a file"):
        time.sleep(0.05)
    assert not capsys.readouterr().out
    monkeypatch.setattr(progress, "SHORT", 0.02)
    monkeypatch.setattr(progress, "EVERY", 0.04)
    with show_waiting("reading a file", "about a minute"):
        time.sleep(0.2)
    first, *middle, last = capsys.readouterr().out.splitlines()
    assert first == "reading a file | about a minute"
    assert middle and all(re.fullmatch(r"reading a file \| 0\.\d+ s so far", line) for line in middle)
    assert re.fullmatch(r"reading a file \| took 0\.\d+ s", last)
    with show_waiting("reading a file", quiet=True):
        time.sleep(0.05)
    assert not capsys.readouterr().out


# ---- what takes long says so ----


def read_images(tmp_path):
    for number in range(3):
        (tmp_path / "cat").mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), 9, np.uint8)).save(tmp_path / f"cat/{number}.png")
    folders.read_folder(tmp_path, split="train", image_size=None, channels=None, workers=1)


def index_records(tmp_path):
    write_records(tmp_path / "train-00000-of-00001", [encode_example(encode_noise(k), 5) for k in range(2)])
    imagenet.open_records(tmp_path, "train")


def read_large_checkpoint(tmp_path):
    write_checkpoint(tmp_path / "model_1.pt")
    checkpoint.load(tmp_path / "model_1.pt")


def train_classifier(tmp_path):
    train_feature_classifier(*draw_sides(20, (1, 8, 8)))


def filter_patches(tmp_path):
    compute_patch_statistics(draw_bytes(4, 1, 28, 28))


def identify_images(tmp_path):
    RealImages.choose("toy", "train", [make_dataset((1, 28, 28))], 9).settings()


def fit_start_distribution(tmp_path):
    state = make_state(start_rank=1)
    run = make_run(state, tmp_path / "run")
    fit_starts(run.settings, state, run.dataset, run.workers)


def estimate_iteration(tmp_path):
    run = make_run(make_state(), tmp_path / "run", zero_kl=True, batch_size=4)
    check_cost(train_step, run.state, run.settings, run.workers, 1, is_new=True)


def draw_fresh_chains(tmp_path):
    make_run(make_state(), tmp_path / "run", sample_steps=2).sampler.draw_chains(3)


def draw_many_samples(tmp_path):
    run = make_run(make_state(), tmp_path / "run", sample_steps=2)
    run.sampler.draw_bytes(1_100, run.workers)  # a part of four batches, and one of one


def classify_tests(tmp_path):
    model = make_model(models.ModelConfig("MnistNet", (1, 28, 28), 2, 3))
    images = LabelledImages(draw_bytes(6, 1, 28, 28) / 255, torch.arange(6) % 3)
    measure_classification(models.freeze_energy(model), images, 1.0)


def compare_outliers(tmp_path):
    run = make_sandbox_run(make_sandbox("MnistNet", (1, 28, 28)), tmp_path, classes=0, limit=9, repeats=1)
    outliers.compare_scores(run)


def compute_whole_hessian(tmp_path):
    failed = ArpackNoConvergence("no convergence", np.empty(0), np.empty(0))
    with mock.patch("scipy.sparse.linalg.eigsh", side_effect=failed):
        image = torch.ones(1, 5, 5)
        analysis.find_hessian_directions(lambda x: x.square().flatten(1).sum(1), image, 3, make_generator())


def compare_features(tmp_path):
    features = torch.randn(6, 4, generator=make_generator())
    measure_distance(features, Statistics(torch.zeros(4), torch.eye(4), features))
    metrics.precision_recall(features, features[:2])
    metrics.kernel_distance(features, features[:2])


# Work -> the lines that tell of it.
PHASES = {
    read_images: [r"listing the images below .* \| took", r"reading image 3/3 \| took"],
    index_records: [r"index of file 1/1 \| took", r"reading label 2/2 \| took"],
    read_large_checkpoint: [r"writing .*model_1\.pt \| took", r"reading .* \| \d+ MB", r"reading .* \| took"],
    train_classifier: [r"step of the classifier 25/25 \| took"],
    filter_patches: [r"filtering the patches of 4 real images \| took"],
    identify_images: [r"reading 9 images to identify the data set by \| took"],
    fit_start_distribution: [r"fitting the distribution that chains start from to 24 images \| took"],
    estimate_iteration: [r"estimating what an iteration takes \| took"],
    draw_fresh_chains: [r"Langevin step of 3 fresh chains 2/2 \| took"],
    draw_many_samples: [r"Langevin step of 1,100 samples 10/10 \| took"],
    classify_tests: [r"classifying test images 6/6 \| took"],
    compare_outliers: [r"comparing test images with training images \| took", r"measuring how well .* \| took"],
    compare_features: [
        r"computing the Fréchet distance of 6 features .* \| took",
        r"precision and recall, row 16/16 \| took",
        r"kernel distance, row 14/14 \| took",
    ],
    compute_whole_hessian: [r"row of the Hessian 25/25 \| took"],
}


@pytest.mark.parametrize("work", PHASES)
def test_phases_that_can_take_long(work, tmp_path, monkeypatch, capsys):
    """Breaks when a part of the work says nothing, however long it takes: here every part counts as long."""

    @contextlib.contextmanager
    def speak_first(report):
        if report.__name__ == "speak":  # of work that cannot be counted
            report()
        yield

    monkeypatch.setattr(progress, "SHORT", 0.0)
    monkeypatch.setattr(progress, "call_meanwhile", speak_first)
    monkeypatch.setattr(Progress, "is_shown", lambda self, now: True)
    monkeypatch.setattr(bounded, "SLOW_BYTES", 0)
    work(tmp_path)
    printed = capsys.readouterr().out
    for line in PHASES[work]:
        assert re.search(rf"^{line}", printed, re.MULTILINE), printed


def test_samples_are_counted_when_they_are_done(tmp_path, monkeypatch):
    """Breaks when the steps of fresh chains are counted twice, or not all, so that the time left is wrong."""
    seen = []
    monkeypatch.setattr(Progress, "update", lambda self, done: seen.append(done) or setattr(self, "done", done))
    sampler = make_run(make_state(), tmp_path / "run", sample_steps=3).sampler
    sampler.draw_chains(300)  # two batches
    assert seen == [1, 2, 3, 4, 5, 6] and sampler.count_steps(300) == 6


@pytest.mark.parametrize(("seconds", "speaks"), [(math.inf, True), (12.0, True), (0.1, False)])
def test_a_long_iteration(seconds, speaks, tmp_path, monkeypatch, capsys):
    """Breaks when iterations of minutes are silent, the first one included, or short ones start a thread each."""
    monkeypatch.setattr(Progress, "remind", lambda self: print("still there") or 0.01)
    run = make_run(make_state(), tmp_path / "run")
    run.recorder = SimpleNamespace(progress=Progress(2, what="iteration"))
    run.last_seconds = seconds
    with run.surround_iteration():
        time.sleep(0.05)
    assert ("still there" in capsys.readouterr().out) == speaks and 0.05 <= run.last_seconds < 12


# ---- what was written ----


def test_written_paths(tmp_path, capsys):
    """Breaks when a path has another form in one script than in the others, or a folder counts its lock."""
    for name in ("folder/one", "folder/inner/two", "folder/.lock", "file"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    print_written([tmp_path / "file", tmp_path / "folder", tmp_path / "folder/inner"])
    lines = ["file", "folder/ (2 files)", "folder/inner/ (1 file)"]
    assert capsys.readouterr().out.splitlines() == [f"wrote {tmp_path / line}" for line in lines]


SHIPPED = f"--modeldir={ROOT / 'pretrained'}"
WRITING = {
    "train": {"new": [*SMALL_RUN, "--exp=d", "--max_iter=2", "--test_interval=1", "--classify=0.1", "--cclass"]},
    "sample": {"some": ["--exp=digits_cond", SHIPPED, "--num=3", "--num_steps=1", "--folder"]},
    "imagenet_demo": {"film": ["--exp=digits_cond", SHIPPED, "--num_steps=2", "--batch_size=2"]},
    "ais": {"gauss": ["--dataset=gauss", "--pdist=1,2", "--gauss_dim=4"]},
    "ebm_sandbox": {
        task: [f"--task={task}", "--exp=digits_cond", SHIPPED, "--limit=4", "--num_steps=1", "--chain_steps=50"]
        for task in ("label", "mixing", "ood", "mixenergy", "labelfinetune", "energyeval", "nearestneighbor")
    },
    "eval_inception": {
        "digits": ["--exp=digits_cond", SHIPPED, "--im_number=20", "--num_steps=1", "--repeat_scale=1", "--nodownload"]
    },
}


@pytest.mark.parametrize("script", WRITING)
def test_scripts_name_what_they_wrote(script, tmp_path):
    """Breaks when a script writes a file whose path, or whose folder with the number of files, it does not print."""
    commands = {name: [*words, f"--logdir={tmp_path / name}"] for name, words in WRITING[script].items()}
    for name, (printed, error) in run_commands(script, commands).items():
        assert error is None
        written = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        assert written and not find_unnamed_files(written, printed), printed


def test_scripts_of_checkpoints_name_them(tmp_path):
    """Breaks when a script that makes a checkpoint of another does not say at its end where it is."""
    (source,), target = (ROOT / "pretrained/digits_cond").glob("model_*.pt"), tmp_path / "alone" / "model_1.pt"
    result = run_python(ROOT / "scripts/export.py", source, target)
    assert result.stdout.splitlines()[-1] == f"wrote {target}" and target.exists()
    report = run_python(
        *(ROOT / "scripts/reproduce.py", "digits_label", f"--logdir={tmp_path}", "--call_flags=--limit=2"), cwd=ROOT
    ).stdout
    folder = pathlib.Path(re.search(r"^wrote (.*)/ \(\d+ files\)\n\Z", report, re.MULTILINE)[1])
    assert (folder / "label.json").exists()


def test_no_thread_is_left(monkeypatch, capsys):
    """Breaks when work ends because the system gives no more threads to those who report on it."""
    monkeypatch.setattr(threading.Thread, "start", mock.Mock(side_effect=RuntimeError("can't start new thread")))
    with show_waiting("saving"):
        done = True
    assert done and not capsys.readouterr().out
