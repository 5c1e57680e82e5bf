"""The sandbox: attacks, chains and directions with known answers, every task end to end, the published commands."""

import functools
import json
import math
import pathlib

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import data
import ebm_sandbox
import models
import sampling
from conftest import (
    ROOT,
    Planted,
    draw_bytes,
    load_state,
    make_dataset,
    make_generator,
    make_model,
    make_progress,
    make_sandbox,
    make_sandbox_run,
    run_commands,
    run_python,
    write_checkpoint,
    write_colour_sets,
)
from ebm.settings import SandboxSettings
from ebm.support import cli
from ebm.support.errors import UsageError
from ebm.tasks import analysis, attacks, label_tasks, outliers, sandbox, sandbox_data
from ebm.tasks.attacks import Attack, ascend_loss, draw_offset, restrict_to_ball
from ebm.tasks.examined_model import ExaminedModel
from ebm.tasks.trained_models import TrainedModel, find_subset, load_split


def planted(energy, image_shape=(1, 4, 4), label_size=0, **settings):
    model = Planted(energy, models.ModelConfig("MnistNet", image_shape, 1, label_size))
    return ExaminedModel(model, make_generator(), **settings)  # type: ignore[arg-type]


def no_labels(images):
    return images.new_zeros(len(images), 0)


# ---- attacks ----


@pytest.mark.parametrize("norm", ["li", "l2"])
def test_attack_stays_in_its_ball(norm):
    """Breaks when an attack leaves its ball, makes no use of it, or is clipped to [0, 1]."""
    images = torch.rand(5, 3, 4, 4, generator=make_generator()).round()
    slope = torch.randn(3, 4, 4, generator=make_generator(1))
    loss = lambda x: (slope * x).flatten(1).sum(1)  # noqa: E731
    attack = Attack(norm, 0.05, 20)
    attacked = ascend_loss(loss, images, draw_offset(images, attack, make_generator()), attack)
    offset = (attacked - images).flatten(1)
    length = offset.abs().amax(1) if norm == "li" else offset.norm(dim=1)
    torch.testing.assert_close(length, torch.full((5,), 0.05))
    assert attacked.min() < 0 and attacked.max() > 1
    assert (loss(attacked) > loss(images)).all()


def test_starts_of_attacks():
    """Breaks when an L∞ attack does not start at −8 … 8 shades, whatever the radius, or an L2 one in its ball."""
    images = torch.zeros(200, 3, 8, 8)
    for attack in (Attack("li", 1 / 255, 1), Attack("l2", 1 / 255, 1, per_step=True)):
        shades, counts = (255 * draw_offset(images, attack, make_generator())).round().unique(return_counts=True)
        assert shades.tolist() == list(range(-8, 9)) and counts.max() < 1.1 * counts.min()
    length = draw_offset(images, Attack("l2", 0.1, 1), make_generator()).flatten(1).norm(dim=1)
    assert 0.09 < length.mean() < length.max() <= 0.1


def test_limit_of_each_step():
    """Breaks when --l2_per_step limits the sum of all steps, as the honest attack does."""
    images = torch.zeros(2, 1, 4, 4)
    uphill = lambda x: x.flatten(1).sum(1)  # noqa: E731
    for per_step, length in ((True, 5 * 0.01), (False, 0.01)):
        attack = Attack("l2", 0.01, 5, per_step=per_step)
        attacked = ascend_loss(uphill, images, torch.zeros_like(images), attack)
        torch.testing.assert_close(attacked.flatten(1).norm(dim=1), torch.full((2,), length))


def attack_all(examined, images, classes, attack, refine=None):
    """Attack images in one batch from a random start."""
    offset = draw_offset(images, attack, examined.generator)
    return examined.attack_batch(images, classes, attack, offset, refine)


@pytest.mark.parametrize(("norm", "radius"), [("li", 0.1), ("l2", 0.4)])
def test_attack_on_a_linear_energy(norm, radius):
    """Breaks when a step has the wrong sign, is not projected, or ends short of the best point of the ball.

    With E(x, y) = w_y·x and two classes the loss of class 0 climbs along w_0 − w_1 everywhere.
    """
    weights = torch.randn(2, 1, 4, 4, generator=make_generator())
    examined = planted(lambda x, y: ((y @ weights.flatten(1)) * x.flatten(1)).sum(1), label_size=2, batch_size=4)
    images = torch.full((6, 1, 4, 4), 0.5)
    classes = torch.zeros(6, dtype=torch.long)
    attacked = attack_all(examined, images, classes, Attack(norm, radius, steps=60))
    uphill, offset = (weights[0] - weights[1]).flatten(), (attacked - images).flatten(1)
    if norm == "li":
        torch.testing.assert_close(offset, (radius * uphill.sign()).expand(6, -1))
    else:  # 2.5 radii of travel from a random start do not quite end there
        torch.testing.assert_close(offset.norm(dim=1), torch.full((6,), radius))
        assert F.cosine_similarity(offset, uphill[None]).min() > 0.95
    margin = lambda x: examined.compute_logits(x).diff(dim=1)[:, 0]  # noqa: E731
    assert (margin(attacked) > margin(images)).all()  # the true class's logit falls against the other's


def test_attack_without_steps_or_radius():
    """Breaks when --pgd=0 moves images, or a ball of radius 0 does not hold them."""
    images = torch.rand(2, 1, 4, 4, generator=make_generator())
    examined = planted(lambda x, y: x.flatten(1).sum(1) * y[:, 0], label_size=2)
    classes = torch.zeros(2, dtype=torch.long)
    assert torch.equal(attack_all(examined, images, classes, Attack("li", 0.1, steps=0)), images)
    assert torch.equal(attack_all(examined, images, classes, Attack("l2", 0.0, steps=2)), images)


def test_draws_average_the_noise_of_a_gradient():
    """Breaks when the gradients of the draws are not averaged: one draw alone points almost anywhere."""
    slope = torch.randn(100, generator=make_generator())
    noise = make_generator(1)

    def loss(x):
        return ((slope + 3 * torch.randn(100, generator=noise)) * x.flatten(1)).sum(1)

    image = torch.full((1, 1, 10, 10), 0.5)
    moved = ascend_loss(loss, image, torch.zeros_like(image), Attack("l2", 0.1, steps=3, draws=40)) - image
    assert F.cosine_similarity(moved.flatten(), slope, dim=0) > 0.75


def test_adaptive_attack_goes_through_the_refinement():
    """Breaks when --adaptive attacks the logits before the refinement, or takes the refinement for a constant shift.

    Pixel 0 decides most, but one Langevin step takes it to the same place from anywhere: only an attacker who does not
    know moves it. That step mirrors pixel 1, which decides less; the way up is the same before and behind the mirror.
    """

    def energy(x, y):
        x, side = x.flatten(1) - 0.5, y[:, 0] - y[:, 1]
        return 0.5 * x[:, 0] ** 2 + x[:, 1] ** 2 + side * (0.1 * x[:, 0] + 0.02 * x[:, 1])

    examined = planted(energy, (1, 1, 2), 2, num_steps=1, step_lr=1.0)
    image, classes = torch.full((1, 1, 1, 2), 0.5), torch.zeros(1, dtype=torch.long)
    plain = (attack_all(examined, image, classes, Attack("l2", 0.1, steps=40), refine=1.0) - image).flatten()
    adaptive = (
        attack_all(examined, image, classes, Attack("l2", 0.1, steps=40, draws=2), refine=1.0) - image
    ).flatten()
    assert plain[0] > 0.09 and abs(plain[1]) < 0.04
    assert adaptive[1] > 0.09 and abs(adaptive[0]) < 0.04


@pytest.mark.parametrize("network", ["MnistNet", "ResNet32"])
def test_attack_through_the_refinement_without_second_derivatives(network, monkeypatch):
    """Breaks when leaving out the second derivatives of a piecewise linear network changes an adaptive attack, or they
    are computed: a step of the attack takes one gradient for each step of the refinement, and one for the logits.
    """
    config = models.ModelConfig(network, (1, 8, 8), 4, 3)
    images, classes, counts, attacked = torch.rand(2, 1, 8, 8, generator=make_generator()), torch.tensor([0, 2]), [], []
    for is_linear in (True, False):
        model = make_model(config)
        assert model.is_piecewise_linear
        monkeypatch.setattr(models.EnergyNetwork, "is_piecewise_linear", is_linear)
        calls, energy = [], model.energy
        model.energy = lambda *inputs, calls=calls, energy=energy: calls.append(len(inputs[1])) or energy(*inputs)
        examined = ExaminedModel(model, make_generator(), num_steps=3, step_lr=10.0)
        attack = Attack("l2", 0.5, steps=2, draws=1)
        attacked.append(examined.attack_batch(images, classes, attack, torch.zeros_like(images), 8 / 255))
        counts.append(len(calls))
        monkeypatch.undo()
    torch.testing.assert_close(*attacked)
    assert (attacked[0] - images).abs().max() > 0 and counts[0] == 2 * (3 + 1) < counts[1]


def test_attack_describes_itself():
    """Breaks when the output does not say which attack was run."""
    assert str(Attack("li", 8 / 255, 0)) == "none"
    assert str(Attack("li", 1 / 255, 20)).startswith(
        "PGD, L∞ ball of 1/255, random start within ±8/255, 20 steps of 2/255"
    )
    assert "each step but not their sum within an L2 ball of 40/255" in str(Attack("l2", 40 / 255, 20, per_step=True))
    assert "not through" in str(Attack("li", 8 / 255, 20))
    assert "20 steps of 5/255, gradient through the refinement, mean of 3 draws" in str(Attack("l2", 40 / 255, 20, 3))


def test_flags_of_the_attack():
    """Breaks when --l2val, --lival, --pgd, --lnorm, --l2_per_step or --adaptive do not reach the attack."""
    settings = SandboxSettings(lival=4, l2val=20, pgd=3, adaptive=2)
    assert label_tasks.choose_attack(settings) == Attack("li", 4 / 255, 3, 2)
    settings = SandboxSettings(lival=4, l2val=20, pgd=3, lnorm="2")
    assert label_tasks.choose_attack(settings) == Attack("l2", 20 / 255, 3)
    assert label_tasks.choose_attack(settings, 7) == Attack("l2", 7 / 255, 3)
    settings = SandboxSettings(pgd=3, lnorm="2", l2_per_step=True)
    assert label_tasks.choose_attack(settings) == Attack("l2", 40 / 255, 3, per_step=True)
    with pytest.raises(UsageError, match="`l2_per_step` needs an L2 attack, `lnorm`=2"):
        label_tasks.choose_attack(SandboxSettings(l2_per_step=True))


# ---- chains ----


def test_inpainting_leaves_the_kept_half_alone():
    """Breaks when a single bit of the upper half changes, or the lower half is kept, too."""
    images = torch.rand(3, 2, 5, 4, generator=make_generator())
    examined = planted(
        lambda x, y: 30 * x.flatten(1).square().sum(1), (2, 5, 4), num_steps=4, step_lr=0.01, batch_size=2
    )
    restored = examined.run_chain(images, no_labels(images), rounds=2, restrict=attacks.restrict_to_lower_half)
    assert torch.equal(restored[:, :, :2], images[:, :, :2])
    assert (restored[:, :, 2:] != images[:, :, 2:]).float().mean() > 0.9


def test_inpainting_sees_the_kept_half_as_it_is(tmp_path, monkeypatch):
    """Breaks when noise is added to the upper half before the gradient is taken, although it is taken away later."""
    seen = []

    def energy(x, y):
        seen.extend(image.numpy().tobytes() for image in x.detach()[:, :, :4])
        return x.flatten(1).square().sum(1)

    monkeypatch.setattr(sandbox.pictures, "plot_histograms", lambda *_, **__: None)
    run = make_sandbox_run(planted(energy, (1, 8, 8), num_steps=2, step_lr=0.01), tmp_path, classes=0, limit=3)
    run.write_panel = lambda name, columns: panels.update(columns)
    panels = {}
    sandbox.inpaint_images(run)
    kept = {image.numpy().tobytes() for split in ("train", "test") for image in panels[f"{split} start"][:, :, :4]}
    assert len(seen) > 100 and set(seen) == kept


def test_refinement_stays_in_its_ball():
    """Breaks when the ball moves along with the chain from one step to the next."""
    examined = planted(lambda x, y: 100 * x.flatten(1).sum(1), label_size=2, num_steps=5, step_lr=1.0)
    images = torch.full((1, 1, 4, 4), 0.5)
    torch.testing.assert_close(examined.compute_logits(images, refine=0.1), torch.full((1, 2), -100 * 16 * 0.4))


def test_stages_continue_one_another():
    """Breaks when a round starts anew, or the restriction forgets where the whole chain started."""
    images = torch.full((3, 1, 4, 4), 0.5)
    examined = planted(lambda x, y: x.flatten(1).sum(1), num_steps=1, step_lr=0.05, batch_size=2)
    ball = functools.partial(restrict_to_ball, radius=0.12)
    means = [stage.mean().item() for stage in examined.run_stages(images, no_labels(images), rounds=4, restrict=ball)]
    assert means == pytest.approx([0.5, 0.45, 0.4, 0.38, 0.38], abs=3e-3)


def test_other_ranges_of_images():
    """Breaks when a model trained on images in [0, 4] is run at another step size, noise or clip than in training."""
    energy = lambda x, y: 0.3 * (x - 1).square().flatten(1).sum(1)  # noqa: E731
    images = torch.rand(2, 1, 4, 4, generator=make_generator())
    settings = {"num_steps": 3, "step_lr": 0.2, "proj_norm": 0.4}
    examined = planted(energy, rescale=4.0, **settings)
    ours = examined.run_round(images, no_labels(images), images, attacks.restrict_to_bounds)
    trained = sampling.langevin(
        lambda x: energy(x, None),
        4 * images,
        num_steps=3,
        step_lr=0.2 * 4,  # as ebm.training.chains does
        noise_std=0.005 * 4,
        proj_norm=0.4,
        bounds=(0.0, 4.0),
        generator=make_generator(),
    )
    torch.testing.assert_close(4 * ours, trained)


def test_batches_shrink_until_memory_holds_them():
    """Breaks when an image is lost or done twice, the noise of a failed batch is used up, or the limit is forgotten."""

    def draw(examined, limit, sizes):
        def function(part):
            noise = torch.rand(part.stop - part.start, generator=examined.generator)
            if len(noise) > limit:
                raise torch.OutOfMemoryError("out of memory")
            sizes.append(len(noise))
            return noise

        return function

    roomy, large = planted(None, batch_size=8), planted(None, batch_size=8)
    expected = roomy.compute_in_batches(draw(roomy, 9, []), 7, make_progress(7))
    sizes: list[int] = []
    found = large.compute_in_batches(draw(large, 3, sizes), 7, make_progress(7))
    assert torch.equal(found, expected) and sizes == [2, 2, 2, 1] and large.images_at_a_time == 2
    assert torch.equal(roomy.generator.get_state(), large.generator.get_state())
    with pytest.raises(UsageError, match="memory"):
        large.compute_in_batches(draw(large, 0, []), 7, make_progress(7))


def test_other_errors_and_divergence_are_not_swallowed():
    """Breaks when any RuntimeError counts as short memory, or figures that are not finite reach a report."""
    images = torch.zeros(2, 1, 4, 4)
    with pytest.raises(RuntimeError, match="must match"):
        planted(lambda x, y: (x + torch.ones(3)).flatten(1).sum(1)).compute_scores(images)
    with pytest.raises(UsageError, match="diverged"):
        planted(lambda x, y: x.flatten(1).sum(1) / 0).compute_scores(images)


def test_scores_take_the_class_of_lowest_energy():
    """Breaks when a conditional model is scored under another class than its best."""
    images = torch.rand(5, 1, 4, 4, generator=make_generator())
    centres = torch.tensor([0.2, 0.5, 0.9])
    examined = planted(lambda x, y: (x.mean((1, 2, 3)) - y @ centres).abs(), label_size=3)
    expected = -(images.mean((1, 2, 3))[:, None] - centres).abs().amin(1)
    torch.testing.assert_close(examined.compute_scores(images), expected)


# ---- images ----


def test_salt_and_pepper():
    """Breaks when the shares or values are off, or channels of a pixel are corrupted apart."""
    images = torch.full((40, 3, 32, 32), 0.5)
    corrupt = analysis.add_salt_and_pepper(images, make_generator())
    assert torch.equal(corrupt, corrupt[:, :1].expand(-1, 3, -1, -1))
    shares = [(corrupt == value).float().mean().item() for value in (0.1, 0.9, 0.5)]
    assert shares == pytest.approx([0.05, 0.05, 0.9], abs=0.005)


def test_images_of_other_sets_fit_the_model():
    """Breaks when colour is not made grey by luminance, grey not colour, or a constant changes with the size."""
    red = torch.zeros(2, 3, 8, 6)
    red[:, 0] = 0.5
    grey = analysis.fit_images(red, (1, 4, 4))
    torch.testing.assert_close(grey, torch.full((2, 1, 4, 4), 0.1495))
    torch.testing.assert_close(analysis.fit_images(grey, (3, 7, 5)), torch.full((2, 3, 7, 5), 0.1495))
    assert torch.equal(analysis.fit_images(red, (3, 8, 6)), red)


def test_nearest_neighbours_of_training_images_are_themselves():
    """Breaks when blocks are joined wrongly, indices are of a block, or distances lose precision."""
    images = draw_bytes(50, 3, 8, 8)
    chosen = torch.tensor([0, 49, 16, 33])
    queries = images[chosen].float() / 255
    distances, indices = analysis.find_neighbours(queries, data.StoredImages("train", images, None), 5, block=16)
    assert indices[:, 0].tolist() == chosen.tolist() and (distances[:, 0] == 0).all()
    every = (queries.double().flatten(1)[:, None] - images.double().flatten(1) / 255).norm(dim=2)
    best, order = every.topk(5, largest=False)
    assert torch.equal(indices, order)
    torch.testing.assert_close(distances.double(), best, rtol=1e-5, atol=1e-5)


# ---- directions ----


def find_eigenvectors(curvatures):
    """Return the smallest eigenvalues of a quadratic energy, and each vector's overlap with all axes, as found."""
    size = len(curvatures)
    basis = torch.linalg.qr(torch.randn(size, size, generator=make_generator(), dtype=torch.float64))[0].float()
    energy = lambda x: 0.5 * ((x.flatten(1) @ basis).square() * curvatures).sum(1)  # noqa: E731
    image = torch.rand(1, 4, size // 4, generator=make_generator())
    values, vectors = analysis.find_hessian_directions(energy, image, 3, make_generator())
    return values, (vectors.flatten(1) @ basis).abs()


def test_eigenvectors_of_a_quadratic_energy():
    """Breaks when the Hessian's eigenvectors of smallest eigenvalue, not magnitude, are not recovered in order."""
    curvatures = torch.linspace(-1, 1, 80)
    curvatures[[3, 8, 12, 40]] = torch.tensor([-3.0, 5.0, -4.0, -2.0])
    values, overlaps = find_eigenvectors(curvatures)
    torch.testing.assert_close(values, torch.tensor([-4.0, -3.0, -2.0]), rtol=1e-3, atol=0)
    torch.testing.assert_close(overlaps[range(3), [12, 3, 40]], torch.ones(3), rtol=1e-3, atol=0)


def test_eigenvectors_where_many_eigenvalues_are_zero():
    """Breaks when the search for the smallest eigenvalues of a flat energy does not end, or ends elsewhere."""
    values, overlaps = find_eigenvectors(torch.exp(-torch.arange(100.0)))
    assert values.abs().max() < 1e-4 and overlaps[:, :5].max() < 1e-2


def test_piecewise_linear_energies_have_no_hessian():
    """Breaks when rounding noise is shown as directions of a leaky ReLU network."""
    model = make_model(models.ModelConfig("MnistNet", (1, 8, 8), 2))
    examined = ExaminedModel(model, make_generator())
    with pytest.raises(UsageError, match="`hessian`=False"):
        analysis.find_hessian_directions(
            lambda x: examined.energy(x, no_labels(x)), torch.rand(1, 8, 8), 3, make_generator()
        )


def test_directions_of_linear_features():
    """Breaks when the directions are not the right singular vectors of the Jacobian, by descending values."""
    left = torch.linalg.qr(torch.randn(6, 3, generator=make_generator()))[0]
    right = torch.linalg.qr(torch.randn(16, 3, generator=make_generator(1)))[0]
    matrix = left @ torch.diag(torch.tensor([1.0, 3.0, 2.0])) @ right.T
    values, vectors = analysis.find_feature_directions(lambda x: x.flatten(1) @ matrix.T, torch.rand(1, 4, 4), 3)
    torch.testing.assert_close(values, torch.tensor([3.0, 2.0, 1.0]), rtol=1e-4, atol=0)
    overlap = (vectors.flatten(1) * right[:, [1, 2, 0]].T).sum(1).abs()
    torch.testing.assert_close(overlap, torch.ones(3), rtol=1e-4, atol=0)


def test_traversals_go_on_in_their_direction(tmp_path):
    """Breaks when a row turns round at a move, whose eigenvector has any sign, its moves are not 7 of length 1, or its
    title is that of another direction.
    """
    from scipy.linalg import hadamard

    basis = torch.from_numpy(hadamard(256)).float() / 16
    curvatures = torch.linspace(0, 1, 256)
    curvatures[[9, 5, 11]] = torch.tensor([-3.0, -2.0, -1.0])
    energy = lambda x, y: 0.5 * ((x.flatten(1) @ basis).square() * curvatures).sum(1)  # noqa: E731
    run = make_sandbox_run(planted(energy, (1, 16, 16), step_lr=0.0, noise_std=0.0), tmp_path, classes=0)
    grey = torch.full((1, 1, 16, 16), 128, dtype=torch.uint8)
    run.load = lambda split: data.StoredImages("grey", grey, None, noise="floor")
    panels = {}
    titles = []
    run.write_panel = lambda name, columns, rows, note: (panels.update(columns), titles.extend(rows))
    report = sandbox.traverse_directions(run)
    assert list(report.figures["image 1"].values()) == pytest.approx([-3, -2, -1], rel=1e-3)
    assert list(panels) == ["image", *(f"move {k}" for k in range(1, 8))]
    assert titles == ["← 1 (-3)", "→ 1 (-3)", "← 2 (-2)", "→ 2 (-2)", "← 3 (-1)", "→ 3 (-1)"]
    for move in range(1, 8):
        way = (panels[f"move {move}"] - 0.5).flatten(1) @ basis
        moved = way[range(6), [9, 9, 5, 5, 11, 11]]
        torch.testing.assert_close(moved.abs(), torch.full((6,), float(move)), rtol=1e-3, atol=0)
        assert (moved[::2] * moved[1::2] < 0).all()


def test_directions_are_taken_anew(tmp_path, monkeypatch):
    """Breaks when a move takes the direction of an earlier image, or a row that of another image or eigenvalue."""
    taken, steps = [], []

    def find_directions(run, images, labels, progress):
        taken.append(images)
        numbers = 100 * len(taken) + 10 * torch.arange(len(images))[:, None] + torch.arange(3)
        return torch.zeros(len(images), 3), numbers.view(-1, 3, 1, 1, 1) * torch.ones(1, 8, 8)

    def move_images(run, x, labels, directions, progress, bounded=False):
        steps.append(directions[:, 0, 0, 0].tolist())
        return x + len(steps)

    monkeypatch.setattr(sandbox, "find_directions", find_directions)
    monkeypatch.setattr(sandbox, "move_images", move_images)
    run = make_sandbox_run(planted(None, (1, 8, 8)), tmp_path, classes=0)
    run.write_panel = lambda *_: None
    sandbox.traverse_directions(run)
    assert steps[0] == [100, 100, 101, 101, 102, 102] and len(steps) == len(taken) == 7
    for move in range(1, 7):
        assert steps[move] == [100 * (move + 1) + 10 * row + row // 2 for row in range(6)]
        torch.testing.assert_close(taken[move], taken[0].expand(6, -1, -1, -1) + sum(range(1, move + 1)))


# ---- tasks ----


def test_rows_say_what_they_show(tmp_path, monkeypatch):
    """Breaks when a row of a picture is named after another image, or a prediction is not that of the row's image."""
    rows = {}
    monkeypatch.setattr(sandbox.pictures, "plot_histograms", lambda *_, **__: None)
    for task in ("crossclass", "cycleclass", "label", "nearestneighbor"):
        examined = planted(
            lambda x, y: 0 * x.flatten(1).sum(1) - y[:, 2], label_size=3, num_steps=1
        )  # 2 has the lowest energy
        run = make_sandbox_run(examined, tmp_path, limit=4)
        run.names = ("tench, Tinca tinca", "hen", "crane")
        run.write_panel = lambda name, columns, titles, *_, task=task: rows.update({task: list(titles)})
        names = ["tench" if k == 0 else run.names[k] for k in run.draw_examples("test", 4).classes.tolist()]
        sandbox.TASKS[task](run)
        expected = {
            "crossclass": [f"{start} → {end}" for start, end in zip(names[-1:] + names[:3], names, strict=True)],
            "cycleclass": names,
            "label": [f"{name} → crane" for name in names],
            "nearestneighbor": ["tench", "tench", "hen", "crane"],
        }
        assert rows[task] == expected[task]


def test_rounds_of_tasks(tmp_path):
    """Breaks when a task without golden results runs other rounds than the reference: 1, 5 or 10."""
    shown = {}
    for task, rounds in (("democlass", 1), ("anticorrupt", 5), ("nearestneighbor", 10)):
        examined = planted(lambda x, y: x.flatten(1).sum(1), label_size=3, num_steps=1, step_lr=0.01, noise_std=0.0)
        run = make_sandbox_run(examined, tmp_path)
        run.draw_starts = lambda labels: torch.full((len(labels), 1, 4, 4), 0.5)
        run.write_panel = lambda name, columns, *_: shown.update(columns)
        sandbox.TASKS[task](run)
        if task == "anticorrupt":
            moved = (shown["corrupt"] - shown["restored"]).max()
        else:
            moved = 0.5 - shown["sample" if task == "nearestneighbor" else "class 0"].mean()
        assert moved.item() == pytest.approx(0.01 * rounds, abs=1e-5)


def test_images_without_steps_of_noise(tmp_path):
    """Breaks when images carry the noise U(0, 1/256) of training, or those of SVHN lack theirs, which is centred."""
    write_colour_sets(tmp_path)
    settings = SandboxSettings(datadir=str(tmp_path), download=False)
    config, index = models.ModelConfig("ResNet32", (3, 32, 32), 2), torch.arange(4)
    trained = TrainedModel(make_model(config), tmp_path, {}, ())
    own = sandbox_data.load_model_split("test", settings, trained, torch.device("cpu"))
    assert torch.equal(own.batch(index, make_generator())[0], own.raw(index) / 256)
    svhn = sandbox_data.load_outlier_set("svhn", settings, config, torch.device("cpu"))
    noise = svhn.batch(index, make_generator())[0] - svhn.raw(index) / 255
    assert 0.49 / 256 < noise.max() <= 0.5 / 256 + 1e-6


def test_chains_in_16_bits_and_energies_in_32():
    """Breaks when the precision does not reach the chains, changes what they find, or touches energies and logits."""
    both = [make_sandbox("ResNet32", (3, 8, 8), 3, step_lr=100.0, precision=p) for p in ("float32", "bf16")]
    images, labels = torch.rand(4, 3, 8, 8, generator=make_generator()), torch.eye(3)[[0, 1, 2, 0]]
    assert torch.equal(*(examined.compute_energies(images, labels) for examined in both))
    assert torch.equal(*(examined.compute_logits(images) for examined in both))
    ends = [examined.run_chain(images, labels, rounds=1) for examined in both]
    moved, apart = (ends[0] - images).norm(), (ends[0] - ends[1]).norm()
    assert 0 < apart < 0.02 * moved and ends[1].dtype == torch.float32


NEED_CLASSES = {"label", "labelfinetune", "crossclass", "democlass"}


@pytest.mark.parametrize("task", sandbox.TASKS)
def test_task_on_a_conditional_model_of_grey_images(task, tmp_path):
    """Breaks when a task does not run, writes no picture, or reports what JSON cannot hold."""
    settings = {"limit": 1 if task == "latent" else 8, "hessian": False, "chain_steps": 50}
    run = make_sandbox_run(
        make_sandbox("MnistNet", (1, 12, 12), 3), tmp_path, mixes=["random", "interpolation"], pgd=2, **settings
    )
    report = sandbox.TASKS[task](run)
    assert any(path.suffix == ".png" for path in run.results.files)
    assert all(path.stat().st_size > 0 for path in run.results.files)
    assert json.dumps(report.figures, allow_nan=False)


def test_samples_of_classes_need_no_data(tmp_path):
    """Breaks when democlass asks for a data set though the checkpoint names its classes."""
    run = make_sandbox_run(make_sandbox("MnistNet", (1, 12, 12), 3), tmp_path)
    run.load, run.names = None, ("a", "b", "c")
    sandbox.sample_classes(run)
    assert run.sample_labels(3).tolist() == torch.eye(3).tolist()


@pytest.mark.parametrize("task", sandbox.TASKS)
def test_task_on_an_unconditional_model_of_colour_images(task, tmp_path):
    """Breaks when a task needs labels for nothing, or one that does need them fails without saying so."""
    examined = make_sandbox("ResNet32", (3, 16, 16), num_steps=1)
    run = make_sandbox_run(
        examined, tmp_path, classes=0, mixes=["interpolation"], limit=2, hessian=False, chain_steps=50
    )
    if task in NEED_CLASSES:
        with pytest.raises(UsageError, match=f"`task`={task} needs a model conditioned on classes"):
            sandbox.TASKS[task](run)
    else:
        sandbox.TASKS[task](run)
        assert any(path.suffix == ".png" for path in run.results.files)


def test_diagnosis_of_chains_that_are_known(tmp_path):
    """Breaks when energies, ways or the share within the data's are those of other steps, chains or images.

    Down a steep slope every pixel is 0 after a round; on a plane chains walk at random at the energy of the data.
    """
    for name in ("steep", "plane"):
        (tmp_path / name).mkdir()
    steep = planted(lambda x, y: x.flatten(1).sum(1), (1, 8, 8), num_steps=1, step_lr=9.0)
    figures = sandbox.diagnose_chains(make_sandbox_run(steep, tmp_path / "steep", classes=0)).figures
    start = np.load(tmp_path / "steep" / "energies_from_images.npy")[0]
    row = figures["step 50"]
    assert figures["data mean"] == pytest.approx(start.mean()) and row["E from starts"] == row["within data"] == 0
    assert row["moved from images"] == pytest.approx(start.mean() / 64) and figures["verdict"].startswith("0%")
    plane = planted(lambda x, y: 0 * x.flatten(1).sum(1) + 3.0, (1, 8, 8), num_steps=2)
    row = sandbox.diagnose_chains(make_sandbox_run(plane, tmp_path / "plane", classes=0)).figures["step 100"]
    assert row["E from starts"] == row["E from images"] == 3.0 and row["within data"] == 1.0
    assert row["moved from starts"] == pytest.approx(0.005 * 10 * math.sqrt(2 / math.pi), rel=0.1)


def test_outlier_figures_against_scikit_learn(tmp_path):
    """Breaks when the signs of scores are confused: energies are planted, low in the data and high outside."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    examined = planted(lambda x, y: x.mean((1, 2, 3)), (1, 4, 4))
    bright = data.StoredImages("bright", (make_dataset((3, 5, 5)).images // 2 + 90), None)
    run = make_sandbox_run(examined, tmp_path, classes=0, mixes=["bright"], load_mix=lambda name: bright)
    figures = outliers.detect_outliers(run).figures["bright"]
    inside, outside = (np.load(tmp_path / f"scores_{name}.npy") for name in ("in_distribution", "bright"))
    truth, scores = np.repeat([1, 0], 24), np.concatenate([inside, outside])
    assert figures["images"] == 24
    assert figures["AUROC"] == pytest.approx(roc_auc_score(truth, scores))
    assert figures["AUPR"] == pytest.approx(average_precision_score(truth, scores))
    assert figures["AUROC"] > 0.6 and inside.mean() > outside.mean()


def test_memorising_shows(tmp_path):
    """Breaks when an energy that knows the training images looks like one that generalises."""
    train = make_dataset((1, 4, 4), 0).images.float() / 255
    examined = planted(lambda x, y: torch.cdist(x.flatten(1), train.flatten(1)).amin(1))
    report = sandbox.compare_energies(make_sandbox_run(examined, tmp_path, classes=0))
    assert report.figures["AUROC train/test"] == 1.0
    shared = make_sandbox_run(examined, tmp_path, classes=0)
    shared.load = lambda split: make_dataset((1, 4, 4), 0)
    assert "no split" in sandbox.compare_energies(shared).figures["verdict"]


def test_finetuning_learns_and_is_kept(tmp_path):
    """Breaks when a training step does not lower the loss or leaves the network alone, or --notrain forgets it."""
    examined = make_sandbox("MnistNet", (1, 12, 12), 3, num_steps=0, batch_size=4)
    run = make_sandbox_run(examined, tmp_path)
    images = run.draw_examples("train", 24).images
    before = {name: parameter.clone() for name, parameter in examined.model.named_parameters()}
    always_first = torch.eye(3)[:1].expand(24, -1)
    losses = [examined.finetune(images, always_first, lr=0.02) for _ in range(5)]
    assert losses[-1] < 0.7 * losses[0]
    assert all(not torch.equal(before[name], parameter) for name, parameter in examined.model.named_parameters())
    trained = label_tasks.finetune_classifier(run).figures
    fresh = make_sandbox_run(make_sandbox("MnistNet", (1, 12, 12), 3, num_steps=0), tmp_path, train=False)
    reloaded = label_tasks.finetune_classifier(fresh).figures
    assert reloaded["clean"] == trained["clean"]
    torch.testing.assert_close(fresh.model.compute_logits(images), examined.compute_logits(images))
    path = tmp_path / "model_supervised.pt"
    torch.save(load_state(path) | {"bias": torch.zeros(3)}, path)
    with pytest.raises(UsageError, match="earlier version, which trained a bias"):
        label_tasks.finetune_classifier(fresh)
    with pytest.raises(UsageError, match="run once with `train`"):
        label_tasks.finetune_classifier(make_sandbox_run(examined, tmp_path / "empty", train=False))


def test_calibration_of_a_joint_model(tmp_path):
    """Breaks when the confidence of task label is not that of softmax(−classify_scale · E), without which a model that
    was not trained to classify has the scale 1; or when the reliability is not drawn.
    """
    lowest = torch.tensor([0.0, math.log(2), math.log(4)]) / 10  # at scale 10: probabilities 4/7, 2/7, 1/7
    box = planted(lambda images, labels: labels @ lowest, label_size=3, num_steps=0)
    for settings, confidence in (({"classify": 0.5, "classify_scale": 10.0}, 4 / 7), ({"classify_scale": 10.0}, None)):
        box.model.settings = settings
        run = make_sandbox_run(box, tmp_path)  # 24 images, of which class 0 has a third
        figures = label_tasks.classify_images(run).figures
        expected = confidence or (-lowest).softmax(0)[0].item()
        assert figures["clean"] == pytest.approx(1 / 3)
        assert figures["calibration error, clean"] == pytest.approx(expected - 1 / 3, rel=1e-5)
        assert (tmp_path / "reliability.png").stat().st_size > 1000


def test_same_seed_same_images(tmp_path):
    """Breaks when the images looked at depend on the task, or on another seed than --seed."""
    examined = make_sandbox("MnistNet", (1, 12, 12))
    index = [
        make_sandbox_run(examined, tmp_path, seed=seed).draw_index(make_dataset((1, 8, 8)), 10, "test")
        for seed in (0, 0, 1)
    ]
    assert torch.equal(index[0], index[1]) and not torch.equal(index[0], index[2])
    assert len(index[0].unique()) == 10


def test_a_task_without_figures(tmp_path, capsys):
    """Breaks when a task that measures nothing, as cycleclass on an unconditional model, ends in a traceback."""
    run = make_sandbox_run(make_sandbox("MnistNet", (1, 12, 12)), tmp_path, classes=0, limit=2)
    report = sandbox.sample_stages(run)
    assert report.figures == {}
    run.results.report_figures("cycleclass.json", {"figures": report.figures, "paper": report.paper})
    path = tmp_path / "cycleclass.json"
    assert json.loads(path.read_text())["files"] == ["cycleclass.png", "cycleclass.json"]
    assert capsys.readouterr().out.endswith(f"wrote {tmp_path / 'cycleclass.png'}\nwrote {path}\n")


# ---- the command line ----

COMMANDS = {
    "crossclass": "--task=crossclass --num_steps=40 --exp=cifar10_cond --resume_iter=74700",
    "mixenergy": "--task=mixenergy --num_steps=40 --exp=cifar10_large_model_uncond --resume_iter=121200 --large_model "
    "--svhnmix --cclass=False",
    "label": "--task=label --exp=cifar10_wider_model_cond --resume_iter=21600 --lnorm=-1 --pgd=2 --num_steps=10 "
    "--lival=4 --wider_model",
    "several": "--task=mixenergy --exp=cifar10_large_model_uncond --randommix --interpolationmix --mixset=svhn,digits "
    "--mixfolder={tmp}/others",
    "inert": "--task=democlass --exp=cifar10_cond --nobn --use_bias=False --datasource=default --num_steps=1",
    "wrong size": "--task=label --exp=cifar10_cond --large_model",
    "right size": "--task=label --exp=cifar10_wider_model_cond --wider_model=False",
    "wrong class": "--task=mixenergy --exp=cifar10_cond --nocclass",
    "no iteration": "--exp=cifar10_cond --resume_iter=5",
    "no experiment": "--exp=cifar11",
    "wrong data": "--exp=cifar10_cond --dataset=digits",
    "wrong norm": "--exp=cifar10_cond --lnorm=1",
    "no folder": "--task=mixenergy --exp=cifar10_cond --mixfolder={tmp}/nowhere",
    "twice": "--task=mixenergy --exp=cifar10_cond --mixfolder={tmp}/others --mixfolder={tmp}/data/../others",
    "no grid": "--exp=cifar10_cond --labelgrid",
    "grid": "--exp=cifar10_cond --labelgrid --lnorm=2 --pgd=1 --num_steps=0 --resume_iter=latest",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each of COMMANDS printed and its error, from one process; and the folder of the results."""
    from PIL import Image

    tmp = tmp_path_factory.mktemp("sandbox")
    write_colour_sets(tmp / "data")
    for exp, network, iteration, label_size in (
        ("cifar10_cond", "ResNet32", 74700, 10),
        ("cifar10_large_model_uncond", "ResNet32Large", 121200, 0),
        ("cifar10_wider_model_cond", "ResNet32Wider", 21600, 10),
    ):
        model = make_model(models.ModelConfig(network, (3, 32, 32), 2, label_size))
        write_checkpoint(tmp / f"models/{exp}/model_{iteration}.pt", model, iteration, flags={"step_lr": 7.5})
    (tmp / "others").mkdir()
    for k in range(3):
        Image.fromarray(np.full((40, 50), 80 * k, np.uint8)).save(tmp / f"others/{k}.png")
    common = [f"--modeldir={tmp}/models", f"--logdir={tmp}/results", f"--datadir={tmp}/data", "--nodownload"]
    words = {name: [*common, "--limit=1", *text.format(tmp=tmp).split()] for name, text in COMMANDS.items()}
    return run_commands("ebm_sandbox", words), tmp / "results"


@pytest.mark.parametrize("name", ["crossclass", "mixenergy", "label"])
def test_published_commands(name, outcomes):
    """Breaks when a command of the published README does not run as written, or hides where its results are."""
    (printed, error), folder = outcomes[0][name], outcomes[1]
    assert error is None
    written = [pathlib.Path(line.removeprefix("wrote ")) for line in printed.splitlines() if line.startswith("wrote ")]
    assert {path.suffix for path in written} >= {".png", ".json"}
    assert all(folder in path.parents and path.exists() for path in written)


def test_settings_take_effect(outcomes):
    """Breaks when --lival or --pgd are ignored, as in the reference, or the training's step size is not taken over."""
    contents = json.loads((outcomes[1] / "cifar10_wider_model_cond/label/label.json").read_text())
    assert contents["figures"]["attack"].startswith("PGD, L∞ ball of 4/255, random start within ±8/255, 2 steps of 2/")
    assert "note: lival=4 takes effect; the reference attacks with 8, except in a grid\n" in outcomes[0]["label"][0]
    assert "10 Langevin steps under each class" in contents["figures"]["refinement"]
    assert contents["settings"]["step_lr"] == 7.5 and contents["network"]["network"] == "ResNet32Wider"
    assert contents["images"]["test"].startswith("1 of 6 images of cifar10, dequantisation: floor")
    assert "paper: 0.491" in outcomes[0]["label"][0]


def test_several_outlier_sets_in_one_run(outcomes):
    """Breaks when only the last set counts, another shape does not fit, or a doubtful figure loses its mark."""
    printed, error = outcomes[0]["several"]
    assert error is None
    contents = json.loads((outcomes[1] / "cifar10_large_model_uncond/mixenergy/mixenergy.json").read_text())
    assert list(contents["figures"]) == ["random", "interpolation", "svhn", "digits", "others"]
    lines = {line.split()[0]: line for line in printed.splitlines() if line.strip()}
    assert lines["random"].endswith("paper: 1.0 ? (uniform noise)") and lines["svhn"].endswith("paper: 0.63")
    assert "paper" not in lines["digits"]


def test_grid_over_radii(outcomes):
    """Breaks when the grid does not vary the radius, or is not kept."""
    printed, error = outcomes[0]["grid"]
    assert error is None and "L2 ball of 95/255" in printed
    assert np.load(outcomes[1] / "cifar10_cond/label/accuracies.npy").shape == (2, 20)


def test_inert_flags_say_so(outcomes):
    """Breaks when a flag without effect is refused, or taken without a word."""
    printed, error = outcomes[0]["inert"]
    assert error is None
    for name in ("bn", "use_bias", "datasource"):
        assert f"note: --{name} has no effect" in printed


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wrong size", ["--large_model=True", "model_74700.pt", "ResNet32;"]),
        ("right size", ["--wider_model=False", "ResNet32Wider (--wider_model)"]),
        ("wrong class", ["--cclass=False", "--cclass=True"]),
        ("no iteration", ["model_5", "74700"]),
        ("no experiment", ["cifar11", "--modeldir"]),
        ("wrong data", ["--dataset=digits", "(1, 28, 28)", "(3, 32, 32)"]),
        ("wrong norm", ["--lnorm"]),
        ("no folder", ["--mixfolder", "nowhere"]),
        ("twice", ["others"]),
        ("no grid", ["--labelgrid", "--pgd"]),
    ],
)
def test_mistakes(name, words, outcomes):
    """Breaks when a mistake is not answered by one line that names the flag and what is right."""
    error = outcomes[0][name][1]
    assert error is not None and "\n" not in error
    for word in words:
        assert word in error


def test_subsets_of_sprites():
    """Breaks when --d*_only has no effect beside the subset of training, or none is taken without a word elsewhere."""
    parse = functools.partial(cli.parse, kind=SandboxSettings)
    assert find_subset(parse(["x", "--dpos_only"]), {"dsize_only": True}) == "pos"
    assert find_subset(parse(["x"]), {"dsize_only": True}) == "size"
    assert find_subset(parse(["x"]), {}) is None
    with pytest.raises(UsageError, match="`dpos_only` and `dsize_only` exclude each other"):
        find_subset(parse(["x", "--dpos_only", "--dsize_only"]), {})
    trained = TrainedModel(planted(None).model, pathlib.Path("model_1.pt"), {"dataset": "digits"}, ())
    with pytest.raises(UsageError, match="`dsprites_restrict` is for `dataset`=dsprites, not digits"):
        load_split("test", trained, parse(["x", "--dsprites_restrict"]), torch.device("cpu"))


def test_sprite_conditions():
    """Breaks when a flag, then the training, then the width of the labels do not say what a dSprites model takes."""
    for given, trained, expected in (
        ([], {}, "pos"),
        ([], {"cond_rot": True}, "rot"),
        ([], {"dpos_only": True}, None),
        (["--cond_rot"], {"cond_pos": True}, "rot"),
    ):
        settings = cli.parse(["ebm_sandbox.py", *given], ebm_sandbox.Settings)
        assert sandbox_data.find_condition(settings, 2, trained) == expected


def test_help_lists_all_tasks():
    """Breaks when --help fails, or does not explain a task."""
    result = run_python("ebm_sandbox.py", "--help", cwd=ROOT, check=True)
    assert all(f"\n  {task} " in result.stdout for task in sandbox.TASKS)
    assert max(map(len, result.stdout.splitlines())) <= 120
