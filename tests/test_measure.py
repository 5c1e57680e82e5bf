"""How a training run measures its samples: by Inception if its weights are at hand, else by a classifier."""

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import data
from conftest import draw_sides, load_state, make_run, make_state, write_random_inception
from ebm.measures import features
from ebm.settings import TrainSettings
from ebm.support import metrics
from ebm.support.logs import read_log
from ebm.training import samples
from ebm.training.records import Recorder
from ebm.training.samples import choose_measure, choose_number, choose_test_number

COLOUR = (3, 28, 28)


def make_colour_run(tmp_path, **settings):
    state = make_state(image_shape=COLOUR)
    run = make_run(state, tmp_path / "run", quality=True, **settings)
    run.settings.folder.mkdir(exist_ok=True)
    run.prepare_measure()
    run.recorder = Recorder(state, run.settings, run.sampler, run.measure, stop=1)
    return run


@pytest.mark.slow
def test_inception_chooses_the_best_model(tmp_path, monkeypatch, capsys):
    """Breaks when a test does not log the Inception score, when the best model is not that of the largest score, or
    when the end does not sample and measure --num_samples images.
    """
    path = tmp_path / "weights.pth"
    write_random_inception(path)
    monkeypatch.setattr(metrics, "frechet_distance", lambda *statistics: float(len(statistics[0])))  # takes minutes
    monkeypatch.setattr(features, "MAX_COMPARED", 2)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    run = make_colour_run(tmp_path, inception_weights=str(path), inception_sha256=sha256)
    for iteration, scale in ((0, 0.0), (1, 1.0), (2, 0.5)):  # scale: how much the classes of the images differ
        run.state.iteration, run.sampler.latest = iteration, None
        monkeypatch.setattr(metrics, "inception_score", lambda probabilities, splits, k=scale: (1 + k, 0.1))
        run.measure_samples()
    run.recorder.close()
    logged = {line["iteration"]: line for line in read_log(run.settings.folder) if "inception_score" in line}
    assert {k: line["inception_score"] for k, line in logged.items()} == {0: 1.0, 1: 2.0, 2: 1.5}
    assert all(line["fid"] == 2048 and line["inception_score_std"] == 0.1 for line in logged.values())
    best = load_state(run.settings.folder / "model_best.pt")
    assert (best["iteration"], best["best"]) == (1, {"inception": -2.0})

    run.report()
    printed = capsys.readouterr().out
    assert "3 samples" in printed and "Inception score 1.50 ± 0.10, FID 2048.00, patch distance" in printed
    report = json.loads((run.settings.folder / "quality_2.json").read_text())
    assert report["samples"] == 3 and report["inception_score"] == 1.5 and 0 <= report["tone_distance"] <= 1


def test_how_many_samples():
    """Breaks when the end of a run does not take the reference's 50,000 samples where Inception can measure them."""
    assert choose_number(TrainSettings(), has_inception=True) == 50_000
    assert choose_number(TrainSettings(), has_inception=False) == 100
    assert choose_number(TrainSettings(num_samples=7), has_inception=True) == 7


def test_many_samples_come_in_parts(tmp_path, monkeypatch):
    """Breaks when a sample is lost or drawn twice where there are many, or a test measures all of them."""
    monkeypatch.setattr(samples, "PART", 3)
    run = make_run(make_state(), tmp_path / "run", num_steps=1)
    images = run.sampler.draw_bytes(7, run.workers)
    assert images.shape == (7, 1, 28, 28) and images.dtype == torch.uint8
    assert len(images.flatten(1).unique(dim=0)) == 7
    with_inception = SimpleNamespace(has_inception=True)
    assert choose_test_number(TrainSettings(), with_inception) == 1_000
    assert choose_test_number(TrainSettings(num_samples=20), with_inception) == 20


def test_the_best_model_is_that_of_one_measure(tmp_path):
    """Breaks when a run that goes on with another measure compares its figures with those of the earlier one."""
    state = make_state()
    for saved, best in ((12.5, {"classifier": 12.5}), ({"inception": -6.5}, {"inception": -6.5})):
        checkpoint.save(tmp_path / "model_0.pt", state.get_shared_state() | {"best": saved})
        run = make_run(make_state(), tmp_path / "run")
        run.resume(tmp_path / "model_0.pt")
        assert run.best == best


def test_a_classifier_stands_in(tmp_path, monkeypatch, capsys):
    """Breaks when a colour run without Inception weights measures nothing, or does not say what it measures instead;
    when a run that the reference does not measure trains a classifier unasked.
    """
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    dataset = data.StoredImages("cifar10", *draw_sides(60, (3, 8, 8)), ("left", "right"))
    settings = TrainSettings(dataset="cifar10", logdir=str(tmp_path), num_samples=4)
    make = choose_measure(settings, dataset, torch.device("cpu"))
    assert "the classifier Fréchet distance stands in for Inception score and FID" in capsys.readouterr().out
    assert not list(settings.folder.parent.iterdir())
    assert make is not None and make().extractor.name != features.Inception.name
    unlabelled = data.StoredImages("imagenetfull", dataset.images, None)
    assert choose_measure(TrainSettings(dataset="imagenetfull"), unlabelled, torch.device("cpu")) is None
    printed = capsys.readouterr().out
    assert "samples are not measured" in printed and "stands in" not in printed
    for words in ({"quality": False}, {"dataset": "mnist"}):
        others = TrainSettings(**{"dataset": "cifar10", **words})
        assert choose_measure(others, dataset, torch.device("cpu")) is None
