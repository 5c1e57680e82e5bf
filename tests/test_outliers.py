"""Tests of task ood: scores, sets and measures with known answers, and classes that training leaves out."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import math
import pathlib

import numpy as np
import pytest
import torch

import data
import models
import train
from conftest import Planted, make_dataset, make_generator, make_sandbox_run
from ebm.settings import SandboxSettings
from ebm.support.errors import UsageError
from ebm.tasks import outliers
from ebm.tasks.examined_model import EnergyTraits, ExaminedModel
from ebm.tasks.outliers import MADE, SCORES, compare_scores, find_group
from ebm.tasks.trained_models import TrainedModel, load_split


def examine(energy, image_shape=(1, 8, 8), **settings):
    model = Planted(energy, models.ModelConfig("MnistNet", image_shape, 1, 0))
    return ExaminedModel(model, make_generator(), **{"num_steps": 2, "step_lr": 0.25} | settings)


def read_measures(folder):
    with (folder / "measures.csv").open(newline="") as file:
        return {(row["set"], row["score"], row["measure"]): float(row["mean"]) for row in csv.DictReader(file)}


def test_scores_of_a_planted_energy(tmp_path, monkeypatch):
    """Breaks when a score has another sign, another gradient, another chain, or is compared with other images.

    The energy is |x − ½|². A chain without noise halves the distance from ½ in each step of size ¼. Bright images are
    farther from ½ than the data, grey ones nearer: −E and its kin accept these; typicality and density refuse both.
    """
    examined = examine(lambda x, y: (x - 0.5).square().flatten(1).sum(1), noise_std=0.0)
    images = torch.rand(5, 1, 8, 8, generator=make_generator())
    traits = examined.measure_traits(images)
    squares = (images - 0.5).square().flatten(1).sum(1).double().numpy()
    np.testing.assert_allclose(traits.energy, squares, rtol=1e-5)
    np.testing.assert_allclose(traits.slope, 2 * np.sqrt(squares), rtol=1e-5)
    np.testing.assert_allclose(traits.end, squares / 16, rtol=1e-5)
    np.testing.assert_allclose(traits.features, images.flatten(1))

    monkeypatch.setattr(outliers, "MADE", {"bright": lambda x, g: x * 0 + 1, "grey": lambda x, g: x * 0.1 + 0.45})
    report = compare_scores(make_sandbox_run(examined, tmp_path, classes=0, repeats=2))
    found = read_measures(tmp_path)
    for score in SCORES:
        of_bright = [found["bright", score, measure] for measure in outliers.MEASURES]
        assert of_bright == pytest.approx([1, 1, 1, 0])
        if score != "features":
            assert found["grey", score, "AUROC"] == (score in ("typicality", "density"))
    assert report.figures["bright"] == {"group": "made", "images": 24} | dict.fromkeys(SCORES, "1.000 ± 0.000")


def test_density_of_states():
    """Breaks when a figure, or how figures go together, is left out of the density, or one that never varies ends it.

    Training figures are on two lines that cross: a point between the arms is unusual, though none of its figures is.
    """
    draw = np.random.default_rng(0)
    line = draw.normal(size=(2_000, 1))
    train = np.concatenate([line, np.sign(draw.normal(size=line.shape)) * line], 1) + 0.05 * draw.normal(
        size=(2_000, 2)
    )
    density = lambda *point: outliers.estimate_log_density(np.array([point]), train)[0]  # noqa: E731
    assert min(density(1.0, 1.0), density(1.0, -1.0), density(-1.0, 1.0)) > density(1.5, 0.0) + 5
    assert density(0.0, 0.0) > density(0.0, 3.0) + 5 and density(0.0, 0.0) > density(9.0, 9.0) + 5
    constant = np.concatenate([train, np.full((2_000, 1), 7.0)], 1)
    assert np.isfinite(outliers.estimate_log_density(constant, constant)).all()
    assert np.isfinite(outliers.estimate_log_density(train, train[:3])).all()


def test_feature_distance():
    """Breaks when distances are measured from another class, or without the covariance of the features within classes.

    Classes lie 100 apart; within them the first feature varies by 1 and the second by 10.
    """
    draw = np.random.default_rng(0)
    classes = draw.integers(0, 2, 5_000)
    features = draw.normal(size=(5_000, 2)) * [1, 10] + 100 * classes[:, None]
    none = np.zeros(5_000)
    train = EnergyTraits(none, none, none, -np.eye(2)[classes], features)
    points = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 20.0], [100.0, 100.0], [100.0, 100.0]])
    found = EnergyTraits(none[:5], none[:5], none[:5], -np.eye(2)[[0, 0, 0, 1, 0]], points)
    distances = outliers.measure_feature_distance(found, train)
    assert distances[:4] == pytest.approx([0, 4, 4, 0], abs=0.3) and distances[4] > 5_000


def test_measures_are_those_of_scikit_learn(tmp_path):
    """Breaks when inside and outside change places, or the area of outliers counts the data as positives."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    examined = examine(lambda x, y: x.mean((1, 2, 3)))
    bright = data.StoredImages("bright", make_dataset((1, 8, 8)).images[:10] // 2 + 70, None, noise="floor")
    load_mix = lambda name, download: bright  # noqa: E731
    run = make_sandbox_run(examined, tmp_path, classes=0, load_mix=load_mix, mixset=("bright",), repeats=1)
    run.load = lambda split: dataclasses.replace(make_dataset((1, 8, 8), 0, seed=1), noise="floor")
    compare_scores(run)
    found = read_measures(tmp_path)
    inside, outside = (-dataset.images.float().mean((1, 2, 3)).numpy() for dataset in (run.load("test"), bright))
    scores, is_in = np.concatenate([inside, outside]), np.repeat([1, 0], [24, 10])
    assert found["bright", "−E", "AUROC"] == pytest.approx(roc_auc_score(is_in, scores))
    assert found["bright", "−E", "AUPR in"] == pytest.approx(average_precision_score(is_in, scores))
    assert found["bright", "−E", "AUPR out"] == pytest.approx(average_precision_score(1 - is_in, -scores))


def test_repeats_have_noise_of_their_own(tmp_path):
    """Breaks when every repeat draws the same noise, or the same call does not give the same figures again."""
    tables = []
    for name in ("first", "again"):
        (tmp_path / name).mkdir()
        examined = examine(lambda x, y: x.mean((1, 2, 3)))
        compare_scores(make_sandbox_run(examined, tmp_path / name, classes=0, repeats=3))
        tables.append((tmp_path / name / "measures.csv").read_text())
    rows = [row for row in csv.DictReader(tables[0].splitlines()) if row["measure"] == "AUROC"]
    deviations = {row["set"]: float(row["standard deviation"]) for row in rows if row["score"] == "−E"}
    assert deviations["uniform noise"] > 0 and {row["repeats"] for row in rows} == {"3"}
    assert tables[0] == tables[1]


def test_sets_made_of_test_images():
    """Breaks when a set leaves [0, 1], repeats itself, or is not what its name says."""
    images = torch.rand(6, 3, 14, 14, generator=make_generator())
    made = {name: make(images, make_generator(1)) for name, make in MADE.items()}
    for each in made.values():
        assert each.shape == images.shape and each.min() >= 0 and each.max() <= 1
        assert len({tuple(image.flatten().tolist()) for image in each}) == 6
    assert (made["constant"] == made["constant"][:, :, :1, :1]).all()
    as_rows = lambda x: x.flatten(2).transpose(1, 2)  # noqa: E731
    for before, after in zip(as_rows(images), as_rows(made["shuffled"]), strict=True):
        assert sorted(before.tolist()) == sorted(after.tolist()) and not torch.equal(before, after)
    point = torch.zeros(1, 1, 29, 29)
    point[0, 0, 14, 14] = 1
    blurred = outliers.blur_images(point)[0, 0]
    sigma = 29 / 14
    assert blurred[14, 14].item() == pytest.approx(1 / (2 * math.pi * sigma**2), rel=0.01)
    assert (blurred[14, 16] / blurred[14, 14]).item() == pytest.approx(math.exp(-2 / sigma**2), rel=1e-3)


def test_groups():
    """Breaks when a near set is called far, or the other way round."""
    groups = {name: find_group(name, "fashion_mnist") for name in ("mnist", "notMNIST_small", "digits", "svhn")}
    assert groups == {"mnist": "near", "notMNIST_small": "near", "digits": "near", "svhn": "far"}
    assert find_group("cifar100", "cifar10") == find_group("mnist", "digits") == "near"
    assert find_group("mnist", "cifar10") == find_group("mnist", "a folder") == "far"
    assert find_group("left out: 3", "mnist") == "left out"


def test_means_of_groups():
    """Breaks when a mean is that of other sets, or the mean of the near sets counts as a set itself."""
    near, far = ("mnist", "kmnist"), ("svhn", "textures")
    sets = {name: outliers.OutlierSet("near" if name in near else "far", None) for name in near + far}
    scored = {name: {score: np.zeros(5) for score in SCORES} for name in sets}
    values = {"mnist": [0.2, 0.4], "kmnist": [0.6, 0.8], "svhn": [1.0, 1.0], "textures": [0.5, 0.5]}
    measures = {(name, score, "AUROC"): values[name] for name in sets for score in SCORES}
    rows = outliers.tabulate_auroc(sets, scored, measures)
    assert (
        rows["mean of the near sets"]["−E"] == "0.500 ± 0.141" and rows["mean of the far sets"]["−E"] == "0.750 ± 0.000"
    )
    assert rows["mean of the far sets"]["images"] == 10 and len(rows) == 6


@pytest.mark.parametrize(
    ("settings", "steps", "message"),
    [
        ({"mixset": ("toy",)}, 1, "`mixset`=toy: the model is of this data set"),
        ({"mixfolder": ("folder/constant",)}, 1, "itself makes a set called constant; rename the folder"),
        ({"mixfolder": ("folder/test images",)}, 1, "itself makes a set called test images"),
        ({}, 0, "`num_steps`=0: task ood"),
        ({"limit": 1}, 1, "take more than one"),
    ],
)
def test_sets_that_cannot_be_compared(settings, steps, message, tmp_path):
    """Breaks when a set takes the place of another one without a word, or figures of nothing are reported."""
    load_mix = lambda name, **_: dataclasses.replace(make_dataset((1, 8, 8), 0), name=name.split("/")[-1])  # noqa: E731
    examined = examine(lambda x, y: x.mean((1, 2, 3)), num_steps=steps)
    with pytest.raises(UsageError, match=message):
        compare_scores(make_sandbox_run(examined, tmp_path, classes=0, load_mix=load_mix, **settings))


def test_a_class_is_left_out_of_its_own_data_set_alone():
    """Breaks when another data set, whole, passes for the class that the training left out."""
    trained = TrainedModel(None, pathlib.Path(), {"dataset": "digits", "leave_out": "3"}, ())
    assert [trained.find_left_out(name) for name in (None, "digits", "mnist")] == ["3", "3", None]
    settings = SandboxSettings(datadir="nowhere")
    trained = trained._replace(model=Planted(lambda x, y: x, models.ModelConfig("MnistNet", (1, 28, 28), 1)))
    three = load_split("test", trained, settings, torch.device("cpu"), left_out=True)
    others = load_split("test", trained, settings, torch.device("cpu"))
    whole = data.load_dataset("digits", split="test")
    assert torch.equal(three.images, whole.images[whole.labels == 3]) and len(three) + len(others) == len(whole)


def test_missing_sets(tmp_path, capsys):
    """Breaks when a data set that is not there ends the task, is downloaded unasked, or is missing though asked for."""
    calls = []

    def load_mix(name, download):
        calls.append((name, download))
        raise UsageError(f"{name} is missing")

    examined = examine(lambda x, y: x.mean((1, 2, 3)))
    compare_scores(make_sandbox_run(examined, tmp_path, classes=0, load_mix=load_mix, repeats=1))
    assert "kmnist" in capsys.readouterr().out and not any(download for _, download in calls)
    asked = make_sandbox_run(examined, tmp_path, classes=0, load_mix=load_mix, mixset=("kmnist",))
    with pytest.raises(UsageError, match="kmnist is missing"):
        compare_scores(asked)
    assert calls[-1] == ("kmnist", True)


def test_splitting_a_class_off():
    """Breaks when images of the class stay, others go, or labels no longer fit their names."""
    dataset = make_dataset((1, 4, 4), classes=4)
    kept, left_out = data.split_class_off(dataset, "class 1")
    labels = dataset.labels
    assert torch.equal(left_out.images, dataset.images[labels == 1]) and left_out.name == "left out: class 1"
    assert torch.equal(kept.images, dataset.images[labels != 1])
    names = [kept.class_names[label] for label in kept.labels.tolist()]
    assert names == [dataset.class_names[label] for label in labels[labels != 1].tolist()]
    assert torch.equal(data.split_class_off(dataset, "1")[1].images, left_out.images)
    with pytest.raises(UsageError, match="`leave_out`: no class is called 'dog'; the classes are class 0, class 1"):
        data.split_class_off(dataset, "dog")
    with pytest.raises(UsageError, match="at least two must be left"):
        data.split_class_off(make_dataset((1, 4, 4), classes=2), "0")
    with pytest.raises(UsageError, match="has no images of classes in memory"):
        data.split_class_off(make_dataset((1, 4, 4), classes=0), "0")


def test_leaving_each_class_out(tmp_path, monkeypatch, capsys):
    """Breaks when a model sees the class it was to leave out, its test images are not those, or the table lacks one."""
    monkeypatch.syspath_prepend(str(train.__file__).replace("train.py", "benchmarks"))
    leave_one_out = importlib.import_module("leave_one_out")
    flags = "--max_iter=1 --num_steps=1 --num_filters=2 --batch_size=4 --sample_steps=1 --notune --threads=1"
    settings = leave_one_out.Settings(
        preset="digits_cpu",
        train_flags=flags,
        ood_flags="--limit=20 --repeats=1 --num_steps=1",
        classes=("3",),
        datadir=str(tmp_path),
        logdir=str(tmp_path / "runs"),
        output=str(tmp_path / "figures.json"),
    )
    leave_one_out.main(settings)
    table = capsys.readouterr().out
    assert "without 3" in table and "mean" in table and (tmp_path / "figures.png").exists()
    saved = torch.load(tmp_path / "runs/without_3/model_1.pt", weights_only=True)
    assert saved["config"]["label_size"] == 9 and "3" not in saved["class_names"]
    row = leave_one_out.read_auroc(settings, "3")
    assert set(row) == set(SCORES) and all(0 <= value <= 1 for value in row.values())
