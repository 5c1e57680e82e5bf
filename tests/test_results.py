"""The results of calls: each call's files are a set of their own; a signal ends the work with the results so far."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest
import torch
from torch import Tensor

import ebm_sandbox
from conftest import ROOT, Planted, make_generator, make_model, make_sandbox_run
from ebm.readers import dsprites
from ebm.settings import CombineSettings
from ebm.support import progress
from ebm.support.errors import UsageError
from ebm.support.interruption import Interruption
from ebm.support.progress import Progress, describe_time
from ebm.tasks import concepts, sandbox
from ebm.tasks.concept_models import ConceptModel
from ebm.tasks.concepts import ConceptRun
from ebm.tasks.examined_model import ExaminedModel
from ebm.tasks.results import Results, own_results
from ebm.training.distributed import work_alone
from models import ModelConfig, freeze_energy


def list_names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# ---- sets of files ----


def test_each_call_has_a_set_of_its_own(tmp_path, capsys):
    """Breaks when the files of two calls mix, an earlier set is lost or moved for nothing, or two calls write."""
    folder, workers = tmp_path / "digits" / "label", work_alone()
    for call in ("a", "b"):
        with own_results(folder, workers, "logdir") as results:
            for name in (call, "common"):
                results.add_file(name).write_text(call)
            results.add_file("common")
            assert [path.name for path in results.files] == [call, "common"]
            assert (folder / ".lock").exists()  # another process is refused
        with own_results(folder, workers, "logdir"):
            pass  # a call without results changes nothing
    assert list_names(tmp_path) == {
        f"digits/{name}" for name in ("label/b", "label/common", "label.1/a", "label.1/common")
    }
    assert (folder / "common").read_text() == "b" and (tmp_path / "digits/label.1/common").read_text() == "a"
    assert capsys.readouterr().out == f"note: the results of an earlier call are now in {folder}.1\n"
    (folder / "config.json").touch()
    with pytest.raises(UsageError, match="folder of a training run"), own_results(folder, workers, "logdir"):
        pytest.fail("the folder of a run is owned")


def test_a_call_replaces_the_whole_set(tmp_path, capsys):
    """Breaks when the JSON lists other files than the folder has, a file of an earlier call stays, or a chain is
    announced where none runs.
    """
    for words in ({"randommix": True}, {"limit": 5}):
        ebm_sandbox.main(
            ebm_sandbox.Settings(
                task="mixenergy", modeldir=str(ROOT / "cachedir"), exp="digits_cond", logdir=str(tmp_path), **words
            )
        )
    folder = tmp_path / "digits_cond" / "mixenergy"
    report = json.loads((folder / "mixenergy.json").read_text())
    assert list_names(folder) == set(report["files"]) and report["complete"]
    assert len(np.load(folder / "scores_interpolation.npy")) == 5 and not (folder / "scores_random.npy").exists()
    assert len(np.load(tmp_path / "digits_cond" / "mixenergy.1" / "scores_random.npy")) > 100
    printed = capsys.readouterr().out
    assert "energies of 5 test images and as many for comparison (interpolation), under each of 10 classes" in printed
    assert "Langevin" not in printed


# ---- signals ----


def test_results_so_far():
    """Breaks when a signal destroys what was computed or written, lets more begin, is forgotten, or ends what must be
    finished.
    """
    workers, started = work_alone(), []

    def compute(item):
        started.append(item)
        if item == 2:
            signal.raise_signal(signal.SIGTERM)
        return item

    with pytest.raises(Interruption) as caught, workers.keep_results():  # the end of a script
        assert workers.share_out(range(5), compute) == [0, 1] and started == [0, 1, 2]
        with pytest.raises(Interruption):
            workers.share_out(range(2), compute)
        with pytest.raises(Interruption):
            workers.share_out_all(range(2), compute)
        with workers.finish_results():
            assert workers.share_out(range(2), compute) == [0, 1]
        assert not list(workers.until_signal(range(3))) and workers.is_asked_to_end()
    assert caught.value.number == signal.SIGTERM
    with pytest.raises(Interruption), workers.keep_results():
        assert [(item, compute(item)) for item in workers.until_signal(range(5))] == [(0, 0), (1, 1), (2, 2)]
    with pytest.raises(Interruption), workers.keep_results():
        workers.share_out([2], compute)
        pytest.fail("there are no results")
    with pytest.raises(Interruption), workers.keep_results():
        workers.share_out([0], compute)
        signal.raise_signal(signal.SIGTERM)  # while the results are written
        assert not workers.is_cut_short
    with workers.keep_results():
        assert workers.share_out([], compute) == []


def test_results_of_two_workers_are_the_first_ones(monkeypatch):
    """Breaks when workers that a signal stops at different items get results out of order, or with a gap."""
    workers = work_alone()
    workers.size = 2
    others = {(): [None, None], (0,): [10], (0, 20): [10], (0, 20, 40): [10, 30]}

    def share(item):  # with what the other worker has, which computes the odd items
        return [item, others[tuple(item)]] if isinstance(item, list) else [item, signal.SIGTERM]

    monkeypatch.setattr(workers, "share", share)
    for count, expected in ((1, [0, 10]), (2, [0, 10, 20]), (3, [0, 10, 20, 30, 40])):
        workers.signal = None
        assert workers.share_out(range(2 * count), lambda item: 10 * item) == expected[: 2 * count]
        assert workers.signal == signal.SIGTERM


def stop_in_batch(monkeypatch, number):
    """Let a signal come while an examined model computes its n-th batch."""
    compute, calls = ExaminedModel.compute_in_pieces, []

    def compute_in_pieces(*words):
        calls.append(1)
        if len(calls) == number:
            signal.raise_signal(signal.SIGTERM)
        return compute(*words)

    monkeypatch.setattr(ExaminedModel, "compute_in_pieces", compute_in_pieces)


# Task, its settings, the batch of 8 images in which a signal comes (24 images make three), what is done, the figures.
CASES = [
    ("energyeval", {}, 5, {"energies of test": "8 of 24"}, {"train mean", "test mean", "AUROC train/test"}),
    ("energyeval", {}, 4, {}, {"train mean", "verdict"}),
    ("democlass", {}, 2, {"democlass": "8 of 15"}, set()),
    ("diagnose", {"limit": 4}, 15, {"rounds": "6 of 50"}, {"step 5"}),
    ("mixing", {"limit": 4, "chain_steps": 50}, 30, {"steps": "28 of 50"}, {"energy", "verdict"}),
    ("mixenergy", {}, 6, {"scores of interpolation": "16 of 24"}, {"interpolation"}),
    ("mixenergy", {}, 2, {"scores of test": "8 of 24"}, set()),
    ("boxcorrupt", {}, 3, {"inpaint train": "16 of 24"}, {"train MSE mean", "verdict"}),
    ("boxcorrupt", {}, 5, {"inpaint train": "24 of 24", "inpaint test": "8 of 24"}, {"test MSE mean"}),
    ("anticorrupt", {"limit": 24}, 3, {"anticorrupt": "16 of 24"}, {"MSE restored"}),
    ("label", {"pgd": 1}, 3, {"classify": "16 of 24"}, {"clean", "clean, refined", "attacked", "attacked, refined"}),
    ("label", {"pgd": 1, "labelgrid": True}, 8, {"radii": "2 of 31"}, {"0/255", "1/255"}),
    (
        "label",
        {"attack": "autoattack", "attack_steps": 1},
        8,
        {"attacks": "1 of 6"},
        {"no attack", "APGD-CE", "verdict"},
    ),
    ("cycleclass", {}, 8, {"rounds of cycleclass": "2 of 20"}, set()),
]


@pytest.mark.parametrize(("task", "settings", "number", "done", "figures"), CASES)
def test_tasks_report_what_is_done(tmp_path, monkeypatch, task, settings, number, done, figures):
    """Breaks when a task that is stopped loses what it has measured, or takes images for done that are not."""
    box = ExaminedModel(make_model(ModelConfig("MnistNet", (1, 8, 8), 2, 3)), make_generator(), 1, batch_size=8)
    run = make_sandbox_run(box, tmp_path, mixes=["interpolation", "random"], **settings)
    stop_in_batch(monkeypatch, number)
    with pytest.raises(Interruption), box.workers.keep_results():
        report = sandbox.TASKS[task](run)
        state = run.results.describe_state()
    assert {name: part for name, part in done.items() if part != "24 of 24"}.items() <= state["done"].items()
    assert figures <= report.figures.keys() and not state["complete"]
    assert "test mean" not in report.figures or "test mean" in figures
    assert any(path.suffix == ".png" for path in run.results.files)
    assert all(path.stat().st_size for path in run.results.files) and json.dumps(report.figures, allow_nan=False)


def test_nothing_done_is_no_result(tmp_path, monkeypatch):
    """Breaks when a signal in the first batch, or in work whose parts cannot be told apart, leaves results."""
    box = ExaminedModel(make_model(ModelConfig("MnistNet", (1, 8, 8), 2, 3)), make_generator(), 1, batch_size=8)
    for task, number in (("energyeval", 1), ("diagnose", 9), ("mixing", 19), ("crossclass", 2)):
        run = make_sandbox_run(box, tmp_path, limit=4 if task == "mixing" else 24, chain_steps=50)
        with monkeypatch.context() as patch, pytest.raises(Interruption), box.workers.keep_results():
            stop_in_batch(patch, number)
            sandbox.TASKS[task](run)
            pytest.fail("there is a report")
        assert not run.results.files and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("stop_at", "titles", "done"), [(3, ["size & pos"], 3), (9, ["size & pos", "size"], 4)], ids=str
)
def test_combinations_so_far(tmp_path, monkeypatch, stop_at, titles, done):
    """Breaks when samples of a combination that is not done are judged, or judged by the targets of other images."""
    sprites = dsprites.Sprites(dsprites.compute_latents(torch.arange(0, dsprites.SIZE, 1000)))
    sampled: list[Tensor] = []

    def sample_images(run, plan, targets, progress):  # the targets themselves
        if len(sampled) == stop_at:
            signal.raise_signal(signal.SIGTERM)
        sampled.append(targets)
        return dsprites.render_sprites(*targets[0].unbind(1))

    monkeypatch.setattr(ConceptRun, "sample_images", sample_images)
    compared: list[Tensor] = []

    def find_nearest_sprites(images):
        compared.append(images)
        return dsprites.NearestSprites.of_sprites(torch.ones(len(images), 5))

    monkeypatch.setattr(dsprites, "find_nearest_sprites", find_nearest_sprites)
    judged = []
    monkeypatch.setattr(
        concepts, "judge_samples", lambda run, judge, nearest, plans, targets, real: judged.append((nearest, targets))
    )
    model = Planted(lambda images, labels: images.flatten(1).sum(1), ModelConfig("DspritesNet", (1, 64, 64), 8, 1))
    models = {name: ConceptModel(freeze_energy(model), name) for name in ("size", "pos")}
    results = Results(tmp_path, work_alone())
    run = ConceptRun(CombineSettings(limit=4, batch_size=1), models, {}, {}, sprites, make_generator(), results)
    with pytest.raises(Interruption), run.workers.keep_results():
        concepts.combine_concepts(run)
    nearest, targets = judged.pop()
    assert list(nearest) == titles and all(len(part) == done for part in nearest.values())
    assert len(compared[0]) == done * (len(titles) + 1)  # with the targets themselves
    for images in compared.pop().split(done):
        assert torch.equal(images, dsprites.render_sprites(*targets[0].unbind(1)))
    assert run.workers.unfinished["combinations"] == f"{len(titles)} of 3"


# ---- progress ----


def test_times_as_people_say_them():
    """Breaks when hours are left in seconds, or a rounded minute makes 60 of them."""
    seconds = (0.123, 40.4, 98, 100, 3599, 12000, 86_390, 190_000)
    expected = ["0.12 s", "40 s", "98 s", "2 min", "1 h 0 min", "3 h 20 min", "1 d 0 h", "2 d 5 h"]
    assert list(map(describe_time, seconds)) == expected


def test_time_left_follows_the_recent_speed(monkeypatch, capsys):
    """Breaks when the first line is late, or the time left is computed from the mean speed since the start."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = Progress(1000, what="image")
    for done in range(1, 11):  # one in a second, then one in ten
        now[0] += 1
        bar.update(done)
    for done in range(11, 31):
        now[0] += 10
        bar.update(done)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "image 2/1000 | 1/s | 17 min left"
    assert lines[-1] == "image 30/1000 | 10 s each | 2 h 42 min left"
    bar.update(1000)
    assert capsys.readouterr().out == "image 1000/1000 | took 4 min\n"
