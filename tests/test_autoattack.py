"""AutoAttack's attacks where their best result is known, the checks of masked gradients, and the report."""

import json
import math
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import data
import models
from conftest import Planted, make_generator, make_sandbox, make_sandbox_run
from ebm.settings import SandboxSettings
from ebm.support.errors import UsageError
from ebm.tasks import label_tasks, robustness
from ebm.tasks.autoattack import AttackPlan, ClassLogits, attack_in_ball, count_evaluations, plan_attacks
from ebm.tasks.examined_model import ExaminedModel
from ebm.tasks.label_tasks import classify_images

SHAPE = (1, 8, 8)
METHODS = ("APGD-CE", "APGD-DLR", "APGD-T", "FAB", "Square")
RADII = {"Linf": 0.05, "L2": 0.3}


def draw_weights(classes=5):
    return torch.randn(classes, *SHAPE, generator=make_generator())


def plant(energy, classes, **settings):
    """Return the examination of a model with this energy(images, labels)."""
    model = Planted(energy, models.ModelConfig("MnistNet", SHAPE, 1, classes))
    return ExaminedModel(model, make_generator(), **settings)  # type: ignore[arg-type]


def plant_linear(weights, wave=lambda x: x, **settings):
    """Return the examination of a model with the energies E(x, y) = −w_y·(x − 0.5); pixels pass a wave first."""

    def energy(x, y):
        return -((y @ weights.flatten(1)) * (wave(x) - 0.5).flatten(1)).sum(1)

    return plant(energy, len(weights), **settings)


def draw_images(count=40):
    """Return images so far from 0 and 1 that no ball is cut off there."""
    return 0.5 + 0.12 * torch.randn(count, *SHAPE, generator=make_generator(1)).clamp(-2, 2)


def attack(classifier, images, classes, method, norm="Linf", radius=0.05, steps=30, seed=0, draws=1):
    return attack_in_ball(classifier, images, classes, AttackPlan(method, norm, radius, steps, draws), seed=seed)


# ---- attacks ----


@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize(
    ("method", "count"), [("APGD-CE", 2), ("APGD-DLR", 3), ("APGD-T", 5), ("FAB", 5), ("Square", 2)]
)
def test_attacks_on_a_linear_classifier(method, count, norm):
    """Breaks when an attack misses an image that can be misled, is wired to another one's loss, or leaves its ball.

    Logits w_k·x can be misled within a radius r if and only if for some k (w_y − w_k)·x < r · |w_y − w_k|, by the L1
    norm for the L∞ ball and by the L2 norm for the L2 ball. That margin divided by that norm is the distance. With more
    than two classes an attack without a target may go for one that is not the nearest.
    """
    weights, images = draw_weights(count), draw_images()
    classifier = ClassLogits(plant_linear(weights))
    logits = classifier(images)
    classes = logits.argmax(1)
    apart = weights[classes][:, None] - weights  # (N, classes, ...)
    length = apart.flatten(2).norm(dim=2, p=1 if norm == "Linf" else 2)
    ratio = (logits.gather(1, classes[:, None]) - logits) / length
    distance = ratio.scatter(1, classes[:, None], math.inf).amin(1)
    radius = distance.median().item()  # half of the images can be misled
    attacked = attack(classifier, images, classes, method, norm, radius, steps=1000 if method == "Square" else 60)
    is_right = classifier(attacked).argmax(1) == classes
    moved = (attacked - images).flatten(1).norm(dim=1, p=math.inf if norm == "Linf" else 2)
    if method == "FAB":
        assert not is_right.any()
        torch.testing.assert_close(moved, distance, rtol=0.06, atol=1e-4)
        assert (moved > 0.999 * distance).all()
    else:
        assert moved.max() < radius * 1.0001
        assert is_right[distance > 1.001 * radius].all()
        found = (~is_right[distance < (0.9 if norm == "L2" else 0.98) * radius]).double().mean()
        assert found >= {"APGD-DLR": 0.8, "Square": 0.5}.get(method, 1)  # a random search is not as thorough


@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("method", METHODS)
def test_attacked_images_are_images(method, norm):
    """Breaks when an attack leaves its ball or [0, 1], moves PyTorch's generator, or ignores its seed."""
    images = torch.rand(6, *SHAPE, generator=make_generator()).round()
    classifier = ClassLogits(plant_linear(draw_weights()))
    classes = classifier(images).argmax(1)
    state = torch.get_rng_state()
    one, same, other = (
        attack(classifier, images, classes, method, norm, 5 * RADII[norm], steps=10, seed=seed) for seed in (3, 3, 4)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one, same) and (method != "Square" or not torch.equal(one, other))
    assert one.min() >= 0 and one.max() <= 1 and not torch.equal(one, images)
    if method != "FAB":
        moved = (one - images).flatten(1).norm(dim=1, p=math.inf if norm == "Linf" else 2)
        assert moved.max() < 5 * RADII[norm] * 1.0001


def test_strongest_image_of_a_failed_attack():
    """Breaks when an image that could not be misled is returned as it was, so that it attacks no other classifier."""
    weights = draw_weights(3)
    images = 0.5 + 0.3 * weights[:1].sign()
    classifier = ClassLogits(plant_linear(weights))
    attacked = attack(classifier, images, torch.zeros(1, dtype=torch.long), "APGD-CE", radius=0.01)
    assert classifier(attacked).argmax() == 0
    losses = [F.cross_entropy(classifier(x), torch.zeros(1, dtype=torch.long)) for x in (images, attacked)]
    assert losses[1] > losses[0] and (attacked - images).abs().min() > 0.009


class NoisyClassifier(nn.Module):
    """Logits of two classes, whose slope is drowned by noise of its own at each call."""

    def __init__(self, slope, bias, noise):
        super().__init__()
        self.slope, self.bias, self.noise = nn.Parameter(slope), bias, noise
        self.generator = make_generator(7)

    def forward(self, x):
        blur = self.noise * torch.randn(len(x), self.slope.numel(), generator=self.generator)
        offset = (x - 0.5).flatten(1)
        margin = self.bias + offset @ self.slope.flatten() + (blur * offset).sum(1)
        return torch.stack([margin, torch.zeros_like(margin)], 1)


def test_draws_reveal_a_gradient_that_noise_masks():
    """Breaks when the gradients of several draws are not averaged: then the noise, not the slope, leads the attack.

    The margin b + s·(x − 0.5) falls at most by r · |s|₁, which is three times b here.
    """
    slope, radius = torch.randn(SHAPE, generator=make_generator()), 0.1
    bias = radius * slope.abs().sum().item() / 3
    images, classes = torch.full((20, *SHAPE), 0.5), torch.zeros(20, dtype=torch.long)
    noisy, clean = NoisyClassifier(slope, bias, 10.0), NoisyClassifier(slope, bias, 0.0)
    accuracy = {}
    for draws in (1, 200):
        attacked = attack(noisy, images, classes, "APGD-CE", radius=radius, steps=5, draws=draws)
        accuracy[draws] = (clean(attacked).argmax(1) == classes).double().mean().item()
    assert accuracy[1] > 0.8 and accuracy[200] < 0.2


def test_missing_package(monkeypatch, tmp_path):
    """Breaks when the missing package is not named, or only after the images are read."""
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    run = make_sandbox_run(make_sandbox("MnistNet", (1, 12, 12), 3), tmp_path, attack="autoattack")
    monkeypatch.setattr(run, "draw_examples", None)
    with pytest.raises(UsageError, match=r"^`attack`=autoattack needs torchattacks; pip install -e '\.\[attacks\]'$"):
        classify_images(run)


# ---- plans ----


def test_settings_reach_the_attacks():
    """Breaks when a setting does not reach its attack, or the refined classifier is attacked without `adaptive`."""
    settings = SandboxSettings(attack_steps=7, attack_queries=9, lival=4, adaptive=3)
    plans = plan_attacks(settings, SHAPE, 10, chain=2)
    refined = {row: columns["refined"] for row, columns in plans.items() if "refined" in columns}
    assert plans["APGD-T"] == {"plain": AttackPlan("APGD-T", "Linf", 4 / 255, 7)}
    assert plans["FAB"] == {"plain": AttackPlan("FAB", "Linf", 4 / 255, 7)}
    assert plans["Square"] == {"plain": AttackPlan("Square", "Linf", 4 / 255, 9)}
    assert plans["APGD-CE"] == {
        "plain": AttackPlan("APGD-CE", "Linf", 4 / 255, 7),
        "refined": AttackPlan("APGD-CE", "Linf", 4 / 255, 7, 3),
    }
    assert refined["APGD-DLR"] == AttackPlan("APGD-DLR", "Linf", 4 / 255, 7, 3)
    assert refined["APGD-CE, twice the steps"].steps == 14
    assert refined["APGD-CE, large ball"].radius == 128 / 255
    for other, chain in ((SandboxSettings(), 2), (settings, 0)):
        assert all(list(columns) == ["plain"] for columns in plan_attacks(other, SHAPE, 10, chain).values())
    ball = plan_attacks(SandboxSettings(lnorm="2", l2val=20), SHAPE, 3, 0)
    assert ball["FAB"]["plain"].norm == "L2" and ball["FAB"]["plain"].radius == 20 / 255 and "APGD-T" not in ball
    assert ball["APGD-CE, large ball"]["plain"].radius == pytest.approx(8 * 128 / 255)  # the L2 norm of 64 such pixels


@pytest.mark.parametrize("refine", [None, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_expected_calls_are_those_of_the_attack(method, refine):
    """Breaks when the progress bar expects many more evaluations than an attack on hard images takes, or fewer."""
    weights, evaluations = draw_weights(), []
    chain = 2 if refine else 0
    examined = plant_linear(weights, num_steps=2)
    expected = count_evaluations(AttackPlan(method, "Linf", 1e-6, 10), 5, chain)
    classifier = ClassLogits(
        examined,
        refine=refine,
        note_call=lambda count: evaluations.append(
            count * (expected.differentiable_call if torch.is_grad_enabled() else expected.plain_call)
        ),
    )
    images = 0.5 + 0.4 * weights[:2].sign()
    attack(classifier, images, torch.tensor([0, 1]), method, radius=1e-6, steps=10)
    assert 0.85 * 2 * expected.total < sum(evaluations) < 1.15 * 2 * expected.total


# ---- checks ----


def make_judgements(**shares):
    """Return judgements of 100 images for the classifier "plain", by row: the first ones are wrong, then all right."""
    rows = {"APGD-CE": 40, "Square": 30, "transfer of APGD-CE": 30, "APGD-CE, another start": 40}
    rows |= {"no attack": 10, "APGD-CE, twice the steps": 42, "APGD-CE, large ball": 100}
    place = torch.arange(100)
    found = {row: {"plain": place >= wrong} for row, wrong in rows.items()}
    for row, wrong in shares.items():
        found[row]["plain"] = wrong if isinstance(wrong, torch.Tensor) else place >= wrong
    return found


def test_robust_accuracy_is_the_worst_case_of_each_image():
    """Breaks when the least of the accuracies is reported, the large ball counts, or checks fail without a reason."""
    found = make_judgements(Square=torch.arange(100) < 97)  # three that no other attack finds
    found["no attack"]["refined"] = found["transfer of APGD-CE"]["refined"] = torch.ones(100, dtype=torch.bool)
    figures = robustness.summarise_attacks(found, ["plain", "refined"])
    assert figures["robust accuracy"] == {"plain": pytest.approx(0.55), "refined": None}
    assert figures["APGD-CE"] == {"plain": pytest.approx(0.6), "refined": None}
    assert figures["transfer of APGD-CE"] == {"plain": pytest.approx(0.7), "refined": 1}
    assert figures["verdict"].startswith("no check failed, of ")
    only_clean = {"no attack": found["no attack"]}
    assert robustness.summarise_attacks(only_clean, ["plain", "refined"])["verdict"] == "no check was made"
    checks = [row for name, row in figures.items() if name.startswith("check: ")]
    assert checks == [{"plain": "passed", "refined": None}] * 5


@pytest.mark.parametrize(
    ("check", "row", "wrong"),
    [
        ("another start", "APGD-CE, another start", 46),
        ("another start", "APGD-CE, another start", 34),
        ("more steps", "APGD-CE, twice the steps", 46),
        ("large ball", "APGD-CE, large ball", 99),
        ("no gradients", "Square", torch.arange(100) < 94),
        ("transfer", "transfer of APGD-CE", torch.arange(100) < 94),
    ],
)
def test_checks_of_the_attacks(check, row, wrong):
    """Breaks when a check of the literature is not made, or on other attacks than its own."""
    checks = robustness.check_attacks(make_judgements(**{row: wrong}), "plain")
    assert [name for name, passed in checks.items() if not passed] == [check]
    figures = robustness.summarise_attacks(make_judgements(**{row: wrong}), ["plain"])
    assert figures[f"check: {check}"] == {"plain": "failed"}
    assert figures["verdict"].startswith(f"failed: {check} (plain); do not trust the robust accuracy")


def test_one_image_fails_no_check():
    """Breaks when with few images chance alone makes a check fail, or two of them pass for chance."""
    for wrong, passes in ((4, True), (5, False)):
        found = make_judgements(**{"APGD-CE, another start": wrong, "APGD-CE": 3, "APGD-CE, twice the steps": wrong})
        few = {row: {name: is_right[:10] for name, is_right in columns.items()} for row, columns in found.items()}
        checks = robustness.check_attacks(few, "plain")
        assert checks["another start"] is checks["more steps"] is passes


# ---- the task ----


def test_scale_of_the_logits(tmp_path, monkeypatch):
    """Breaks when the attacks see other logits than those that the model was trained with."""
    examined, scales = plant_linear(draw_weights()), []
    images = draw_images(2)
    torch.testing.assert_close(ClassLogits(examined, scale=3.0)(images), 3 * examined.compute_logits(images))
    monkeypatch.setattr(label_tasks, "measure_robustness", lambda run, scale: scales.append(scale))
    run = make_sandbox_run(examined, tmp_path, attack="autoattack")
    for settings in ({}, {"classify": 0.1, "classify_scale": 50.0}, {"classify": 0.0, "classify_scale": 50.0}):
        examined.model.settings = settings
        classify_images(run)
    assert scales == [1, 50, 1]


def report_on(examined, folder, images, classes, **settings):
    """Return the figures of the task on these images; they become bytes first."""
    run = make_sandbox_run(examined, folder, attack="autoattack", **settings)
    names = tuple(f"class {k}" for k in range(examined.classes))
    stored = data.StoredImages("toy", (256 * images).byte(), classes, names)
    run.load = lambda split: stored
    report = classify_images(run)
    assert json.dumps(report.figures, allow_nan=False)
    assert {path.name for path in run.results.files} == {"images.png", "accuracies.png"}
    return report.figures


def test_masked_gradients_are_recognised(tmp_path):
    """Breaks when the checks trust attacks on a classifier without gradients, or distrust them on the same with them.

    The pixels pass a staircase, whose gradient is zero, but which lets as much through as before.
    """
    weights, images = draw_weights(), draw_images(30)
    settings = {"num_steps": 0, "attack_steps": 20, "attack_queries": 300, "lival": 3}
    figures = {}
    for name, wave in {"open": lambda x: x, "masked": lambda x: (x * 128).round() / 128}.items():
        (tmp_path / name).mkdir()
        examined = plant_linear(weights, wave, num_steps=0)
        classes = examined.compute_logits(images).argmax(1)
        figures[name] = report_on(examined, tmp_path / name, images, classes, **settings)
    assert figures["open"]["verdict"].startswith("no check failed, of ")
    assert figures["open"]["FAB"]["plain"] == pytest.approx(8 / 30)  # eight are farther from another class than 3/255
    assert figures["masked"]["APGD-CE"]["plain"] > figures["masked"]["Square"]["plain"] + 0.2
    for check in ("large ball", "no gradients"):
        assert figures["masked"][f"check: {check}"] == {"plain": "failed"}
    assert "large ball (plain), no gradients (plain); do not trust" in figures["masked"]["verdict"]
    assert figures["masked"]["images"] == 30


def test_only_an_adaptive_attack_measures_the_refined_classifier(tmp_path):
    """Breaks when an attack that does not know of the refinement counts as its robust accuracy, or `adaptive` does not
    go through it.

    Pixel 0 decides most, but a Langevin step takes it to the same place from anywhere. The step mirrors pixel 1, which
    decides less: the refined margin is −0.04·x₁, the plain one −0.2·x₀ − 0.04·x₁. At x = −0.05 a change of length 0.07
    along the plain slope moves x₁ by 0.014 only, too little for the refined classifier.
    """

    def energy(x, y):
        x, side = x.flatten(1) - 0.5, y[:, 0] - y[:, 1]
        return 0.5 * x[:, 0] ** 2 + x[:, 1] ** 2 + side * (0.1 * x[:, 0] + 0.02 * x[:, 1])

    images = torch.full((4, *SHAPE), 0.5)
    images[:, 0, 0, :2] = 0.45
    figures = {}
    for adaptive in (0, 2):
        (tmp_path / f"{adaptive}").mkdir()
        figures[adaptive] = report_on(
            plant(energy, 2, num_steps=1, step_lr=1.0, noise_std=1e-4),
            tmp_path / f"{adaptive}",
            images,
            torch.zeros(4, dtype=torch.long),
            lnorm="2",
            l2val=0.07 * 255,
            refine=255,
            adaptive=adaptive,
            attack_steps=30,
            attack_queries=20,
        )
    assert figures[0]["no attack"] == figures[2]["no attack"] == {"plain": 1, "refined": 1}
    assert figures[0]["transfer of APGD-CE"] == {"plain": None, "refined": 1}
    assert figures[0]["robust accuracy"] == {"plain": 0, "refined": None}
    assert figures[2]["transfer of APGD-CE"]["refined"] == 1
    assert figures[2]["robust accuracy"] == {"plain": 0, "refined": 0}
    assert "not through the refinement" in figures[0]["attack"] and "mean of 2 draws" in figures[2]["attack"]


@pytest.mark.parametrize("network", ["MnistNet", "ResNet32"])
def test_report_on_a_network(tmp_path, network, capsys):
    """Breaks when attacks cannot differentiate a network and its refinement, or the bar does not end at 100 %."""
    shape = (1, 12, 12) if network == "MnistNet" else (3, 16, 16)
    run = make_sandbox_run(
        make_sandbox(network, shape, 4, num_steps=1, step_lr=10.0),
        tmp_path,
        classes=4,
        attack="autoattack",
        attack_steps=2,
        attack_queries=5,
        adaptive=1,
        limit=6,
    )
    figures = classify_images(run).figures
    assert figures["robust accuracy"]["refined"] is not None and figures["APGD-T"]["plain"] is not None
    last = [line for line in capsys.readouterr().out.splitlines() if line.startswith("evaluations under attack")][-1]
    done, total = last.split()[3].split("/")
    assert done == total and "took" in last
