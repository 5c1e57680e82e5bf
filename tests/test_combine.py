"""Combination: expressions and chains in closed form, sprites recognised exactly, every task end to end, its flags."""

import dataclasses
import json
import math
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import checkpoint
import models
from conftest import GOLDEN, ROOT, Planted, make_generator, make_model, make_progress, run_commands, write_checkpoint
from ebm.readers import dsprites
from ebm.readers.dsprites import CONCEPTS
from ebm.settings import CombineSettings, TrainSettings
from ebm.support import cli, reports
from ebm.support.errors import UsageError
from ebm.support.experiments import get_shipped_root
from ebm.tasks import concepts, unseen
from ebm.tasks.concept_models import ConceptModel, find_starts, load_model
from ebm.tasks.concepts import ConceptRun, anneal_linearly
from ebm.tasks.expressions import parse_expression
from ebm.tasks.results import Results
from ebm.training.distributed import work_alone
from sampling import langevin
from utils import ClippedAdam

SIZES = {name: concept.label_size for name, concept in CONCEPTS.items()}


# ---- expressions ----


def values(**energies):
    return {name: torch.tensor(value) for name, value in energies.items()}


def test_energies_of_expressions():
    """Breaks when an operator means something else, or binds less or more tightly than another."""
    given = values(a=[1.0, -2.0], b=[0.5, 3.0], c=[-1.0, 0.25])
    a, b, c = given.values()
    mixture = lambda x, y: -torch.log(torch.exp(-x) + torch.exp(-y))  # noqa: E731
    expected = {
        "a": a,
        "a & b & c": a + b + c,
        "2*a & .5*b": 2 * a + 0.5 * b,
        "a & ~b": a - b,
        "a & 0.3*~b": a - 0.3 * b,
        "~0.3*b": -0.3 * b,
        "1e-2*(2e1*a)": 0.2 * a,
        "~~a": a,
        "a | b": mixture(a, b),
        "a | b | c": -torch.log(torch.exp(-a) + torch.exp(-b) + torch.exp(-c)),
        "a & b | c": mixture(a + b, c),
        "a & (b | c)": a + mixture(b, c),
        " 2 *( a|b )&c ": 2 * mixture(a, b) + c,
        "~(a & b)": -(a + b),
    }
    for text, energies in expected.items():
        torch.testing.assert_close(parse_expression(text).energy(given), energies, msg=text)
    assert parse_expression("b & (a | b2) & ~b").names == ["b", "a", "b2", "b"]


def test_logic_of_expressions():
    """Breaks when an image is called right that does not fulfil the expression, as its plain logic reads."""
    given = values(a=[True, True, False, False], b=[True, False, True, False])
    expected = {
        "a & b": [True, False, False, False],
        "a | b": [True, True, True, False],
        "2*a & ~b": [False, True, False, False],
        "~(a | b)": [False, False, False, True],
    }
    for text, truths in expected.items():
        assert parse_expression(text).is_fulfilled(given).tolist() == truths, text


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("shape & & pos", 8, "expected a name, a weight, ~ or (, not &"),
        ("shape pos", 6, "expected & or |, not pos"),
        ("2 shape", 2, "expected *, not shape"),
        ("3*", 2, "not the end"),
        ("(a & b", 6, "expected ), not the end"),
        ("a)", 1, "not )"),
        ("a $ b", 2, "not $"),
        ("", 0, "not the end"),
        ("a & ", 4, "not the end"),
        ("a & -b", 4, "not -"),
    ],
)
def test_mistakes_in_expressions(text, place, message):
    """Breaks when a mistake is not found, or the caret does not stand under it."""
    with pytest.raises(UsageError) as error:
        parse_expression(text)
    first, shown, caret = str(error.value).split("\n")
    assert first.startswith("`combine`: ") and message in first
    assert shown == f"  {text}" and caret == " " * (place + 2) + "^"


# ---- chains ----

A, B, K1, K2 = 0.2, 0.7, 1.0, 3.0
QUADRATIC = {
    "a": lambda x: K1 / 2 * (x - A).square().flatten(1).sum(1),
    "b": lambda x: K2 / 2 * (x - B).square().flatten(1).sum(1),
}


def end_of_chain(energies, start=0.9, **settings):
    """Return where a chain without noise ends, in every pixel."""
    x = torch.full((2, 1, 3, 3), start)
    settings = {"num_steps": 200, "step_lr": 0.1, "noise_std": 0.0, "generator": make_generator()} | settings
    end = langevin(energies, x, gradient_first=True, **settings)
    assert end.max() - end.min() < 1e-6
    return end.mean().item()


def composed(text):
    expression = parse_expression(text)
    return lambda x: expression.energy({name: energy(x) for name, energy in QUADRATIC.items()})


def test_modes_of_composed_quadratics():
    """Breaks when a chain on a composed energy ends elsewhere than in its mode: known for quadratic energies."""
    assert end_of_chain([composed("a & b")]) == pytest.approx((K1 * A + K2 * B) / (K1 + K2), abs=1e-5)
    assert end_of_chain([composed("2*a & b")]) == pytest.approx((2 * K1 * A + K2 * B) / (2 * K1 + K2), abs=1e-5)
    # The negated energy pushes away from its own mode: (k2·b − w·k1·a)/(k2 − w·k1).
    expected = (K2 * B - 0.5 * K1 * A) / (K2 - 0.5 * K1)
    assert end_of_chain([composed("b & ~0.5*a")]) == pytest.approx(expected, abs=1e-5)
    assert end_of_chain([composed("~a")], start=0.3) == 1.0  # up to the bound
    # A mixture has both modes: a chain ends in the nearer one. Sharp energies, so that the other's pull is nothing.
    assert end_of_chain([composed("50*a | 50*b")], start=0.25, step_lr=0.002) == pytest.approx(A, abs=1e-3)
    assert end_of_chain([composed("50*a | 50*b")], start=0.6, step_lr=0.002) == pytest.approx(B, abs=1e-3)


def test_alternating_chain():
    """Breaks when alternate does not step on one energy after the other, in order: its fixed point is known."""
    step = 0.1
    first, second = 1 - step * K1, 1 - step * K2
    after_b = (second * step * K1 * A + step * K2 * B) / (1 - first * second)
    assert end_of_chain([composed("a"), composed("b")], step_lr=step) == pytest.approx(after_b, abs=1e-5)
    after_a = (first * step * K2 * B + step * K1 * A) / (1 - first * second)
    assert end_of_chain([composed("b"), composed("a")], step_lr=step) == pytest.approx(after_a, abs=1e-5)


# ---- recognising sprites ----


@pytest.fixture
def small_grid(monkeypatch):
    """Sprites at 9 places only: everything that goes through the grid is fast."""
    places = tuple(k / 31 for k in (0, 16, 31))
    monkeypatch.setattr(dsprites, "LATENTS", dsprites.LATENTS | {"x": places, "y": places})
    return dsprites.Sprites(dsprites.compute_latents(torch.arange(3 * 6 * 40 * 9)))


def test_nearest_is_exact(small_grid):
    """Breaks when another sprite is nearer than the one found, for sprites with much noise and for no sprites."""
    every = dsprites.render_sprites(*small_grid.latents.unbind(1))
    clean = every[torch.randint(len(every), (6,), generator=make_generator())]
    noisy = clean + 0.7 * torch.randn(clean.shape, generator=make_generator(1))
    blurred = torch.nn.functional.avg_pool2d(clean, 9, stride=1, padding=4)
    queries = torch.cat([clean, noisy, blurred, torch.rand(3, 1, 64, 64, generator=make_generator(2))])
    nearest = dsprites.find_nearest_sprites(queries)
    brute = torch.cdist(queries.flatten(1).double(), every.flatten(1).double())
    torch.testing.assert_close(nearest.distances.double(), brute.amin(1), rtol=1e-5, atol=1e-4)
    found = dsprites.render_sprites(*nearest.latents.unbind(1))
    torch.testing.assert_close((queries - found).flatten(1).norm(dim=1), nearest.distances, rtol=1e-5, atol=1e-4)


def test_real_sprites_are_right():
    """Breaks when a rendered sprite, on the whole grid, is taken for another one, for none, or not called right.

    Noise as that of a Langevin step must not matter.
    """
    latents = dsprites.compute_latents(torch.randint(dsprites.SIZE, (24,), generator=make_generator(5)))
    images = dsprites.render_sprites(*latents.unbind(1))
    noisy = images + 0.005 * torch.randn(images.shape, generator=make_generator(6))
    nearest = dsprites.find_nearest_sprites(torch.cat([images, noisy]))
    assert torch.equal(dsprites.render_sprites(*nearest.latents.unbind(1)), images.repeat(2, 1, 1, 1))
    assert nearest[:24].distances.max() == 0 and (nearest.overlaps == 1).all()
    assert all(truth.all() for truth in concepts.judge_concepts(nearest, latents.repeat(2, 1)).values())


SQUARE = torch.tensor([[1.0, 1.0, 0.0, 16 / 31, 16 / 31]])  # the largest one, upright, in the middle


def draw_disc(latents):
    """Draw a disc (1, 1, 64, 64) in place of a square of latents (1, 5), with the same area."""
    _, scale, _, x, y = latents[0].tolist()
    radius = 2 * 9.599 * scale / math.sqrt(math.pi)
    across, down = (torch.arange(64) + 0.5 - 16 - 32 * place for place in (x, y))
    return (across**2 + down[:, None] ** 2 <= radius**2).float()[None, None]


def test_overlaps_in_closed_form():
    """Breaks when the overlap is not intersection over union of the lit pixels, or other pixels count as lit.

    A square of n×n pixels shares n·(n − k) of n·(n + k) pixels with itself moved by k. A disc with the area 4 of a
    square of side 2 leaves out four segments of r²·acos(1/r) − √(r² − 1), where r² = 4/π.
    """
    square = dsprites.render_sprites(*SQUARE.unbind(1))
    side = int(square.sum().sqrt())
    for k in (0, 1, 5, side):
        moved = dsprites.measure_overlaps(square.roll(k, 3), SQUARE)
        assert moved.item() == pytest.approx((side - k) / (side + k))
    for brightness, overlap in ((0.0, 0.0), (0.5, 0.0), (0.6, 1.0), (2.0, 1.0)):
        assert dsprites.measure_overlaps(brightness * square, SQUARE).item() == overlap
    grey = square.where(square > 0, torch.tensor(0.4))  # a bright background is not lit
    assert dsprites.measure_overlaps(grey, SQUARE).item() == 1.0
    r = 2 / math.sqrt(math.pi)
    left_out = 4 * (r**2 * math.acos(1 / r) - math.sqrt(r**2 - 1))
    overlap = dsprites.measure_overlaps(draw_disc(SQUARE), SQUARE).item()
    assert overlap == pytest.approx((4 - left_out) / (4 + left_out), abs=0.02)


def test_sprites_between_steps_are_sprites():
    """Breaks when a sprite between two of the data set's does not count, or one a whole step away is as good."""
    latents = dsprites.compute_latents(torch.randint(dsprites.SIZE, (200,), generator=make_generator(5)))
    latents[:, 1] = latents[:, 1].clamp(0.7, 0.9)  # smaller ones can overlap a little less, having fewer pixels
    signs = torch.randint(-1, 2, (200, 5), generator=make_generator(6))
    halfway = latents + torch.tensor(dsprites.HALF_STEPS) * signs
    assert (dsprites.measure_best_overlaps(dsprites.render_sprites(*halfway.unbind(1)), latents) == 1).all()
    quarter = latents + torch.tensor(dsprites.HALF_STEPS) / 2 * signs
    overlaps = dsprites.measure_best_overlaps(dsprites.render_sprites(*quarter.unbind(1)), latents)
    assert overlaps.min() >= dsprites.LEAST_OVERLAP
    larger = latents + torch.tensor([0.0, 0.1, 0.0, 0.0, 0.0])
    overlaps = dsprites.measure_best_overlaps(dsprites.render_sprites(*larger.unbind(1)), latents)
    assert overlaps.max() < 0.95


def test_blobs_are_no_sprites(small_grid):
    """Breaks when an image counts as a sprite because one is nearest to it: a disc, a black one, one of half the light.

    All concepts of the disc's nearest sprite are those of the target.
    """
    square = dsprites.render_sprites(*SQUARE.unbind(1))
    nearest = dsprites.find_nearest_sprites(torch.cat([square, draw_disc(SQUARE), 0 * square, 0.5 * square]))
    assert nearest.is_sprite.tolist() == [True, False, False, False]
    assert 0.8 < nearest.overlaps[1] < 0.9
    assert all(
        error[1] <= CONCEPTS[name].tolerance for name, error in concepts.measure_errors(nearest.latents, SQUARE).items()
    )
    for truth in concepts.judge_concepts(nearest, SQUARE).values():
        assert truth.tolist() == [True, False, False, False]


def test_what_is_no_sprite_fulfils_nothing():
    """Breaks when a blob fulfils the negation of what it does not show, or a verdict is another image's."""
    found = dsprites.NearestSprites(SQUARE.repeat(3, 1), torch.zeros(3), torch.tensor([1.0, 0.89, 0.9]))
    heart = torch.tensor([[3.0, *SQUARE[0, 1:]]]).repeat(3, 1)
    judge = concepts.Judge({"shape": "shape", "pos": "pos"}, {"shape": heart, "pos": SQUARE.repeat(3, 1)})
    for text, verdict in {"shape": "wrong", "~shape": "right", "shape | pos": "right", "pos": "right"}.items():
        assert judge.name_verdicts([parse_expression(text)], found) == [verdict, "no sprite", verdict], text
    assert judge.name_verdicts([parse_expression("pos & net")], found) == ["a sprite", "no sprite", "a sprite"]
    shares = concepts.tabulate_shares(judge, [parse_expression("pos & ~shape")], found)
    assert [shares[name] for name in ("pos", "shape", "jointly", "no sprite")] == pytest.approx(
        [2 / 3, 0, 2 / 3, 1 / 3]
    )


def test_errors_and_tolerances():
    """Breaks with another unit, tolerance or symmetry: 90° of a square, 180° of an ellipse, 360° of a heart."""
    target = torch.tensor([[1.0, 0.7, 0.5, 0.5, 0.5]])

    def error(concept, **changes):
        found = target.clone()
        for name, value in changes.items():
            found[:, list(dsprites.LATENTS).index(name)] = value
        how_far = concepts.measure_errors(found, target)
        is_right = concepts.judge_concepts(dsprites.NearestSprites.of_sprites(found), target)
        return how_far[concept].item(), is_right[concept].item()

    def turned(shape, degrees):
        return error("rot", shape=shape, orientation=0.5 + math.radians(degrees))

    assert error("size", scale=0.8) == (pytest.approx(1.0, abs=1e-5), True)
    assert error("size", scale=0.5) == (pytest.approx(2.0, abs=1e-5), False)
    assert error("shape", shape=2.0) == (1.0, False)
    assert error("pos", x=0.5 + 3 / 32, y=0.5 - 4 / 32) == (pytest.approx(5.0), False)
    assert error("pos", x=0.5 + 1.9 / 32) == (pytest.approx(1.9, abs=1e-4), True)
    for shape, period in ((1, 90), (2, 180), (3, 360)):
        assert turned(shape, period) == (pytest.approx(0, abs=1e-3), True)
        assert turned(shape, period - 9) == (pytest.approx(9, abs=1e-3), True)
        assert turned(shape, period / 2) == (pytest.approx(period / 2, abs=1e-3), False)
    assert not turned(3, 11)[1]


def test_shares_by_shape():
    """Breaks when a share is of other images than those of its shape, or one of none is a number."""
    latents = torch.tensor([[1.0, 0.5, 0, 0, 0], [1.0, 0.6, 0, 0, 0], [3.0, 0.5, 0, 0, 0]])
    shares = concepts.split_by_shape(torch.tensor([True, False, True]), latents)
    assert shares == {"square": 0.5, "ellipse": None, "heart": 1.0}


# ---- tasks ----


def plant(energy, label_size, condition):
    """Return a concept whose energy is a given function of images and labels."""
    model = Planted(energy, models.ModelConfig("DspritesNet", (1, 64, 64), 8, label_size))
    return ConceptModel(models.freeze_energy(model), condition)  # type: ignore[arg-type]


def run_on(models_by_name, sprites, folder, labels=None, weights=None, **settings):
    defaults = {"batch_size": 8, "num_steps": 2, "num_filters": 4, "break_steps": 3}
    chosen = CombineSettings(**defaults | settings)
    return ConceptRun(
        chosen, models_by_name, labels or {}, weights or {}, sprites, make_generator(), Results(folder, work_alone())
    )


def tiny():
    """Return four untrained concept models."""
    models_by_name = {}
    for name, size in SIZES.items():
        model = make_model(models.ModelConfig("DspritesNet", (1, 64, 64), 4, size), size)
        models_by_name[name] = ConceptModel(models.freeze_energy(model), name)
    return models_by_name


def drawn_to(sprites, offset=None):
    """Return concept models that know the sprites: each draws images to the one of its own label, or offset by (5,).

    Each picture is of the sprite of the other concepts' most common latents where its label does not say.
    """

    def planted(condition):
        def energy(images, labels):
            latents = torch.tensor([[3.0, 0.7, 0.0, 0.0, 0.0]]).repeat(len(images), 1)
            columns = list(CONCEPTS[condition].columns)
            if condition == "shape":
                labels = labels.argmax(1, keepdim=True) + 1.0
            elif condition == "rot":
                labels = torch.atan2(labels[:, 1:], labels[:, :1])
            latents[:, columns] = labels
            if offset is not None:
                latents += offset
            return (images - dsprites.render_sprites(*latents.unbind(1))).square().flatten(1).sum(1) / 2

        return plant(energy, SIZES[condition], condition)

    return {condition: planted(condition) for condition in ("size", "shape", "pos", "rot")}


def test_conceptcombine_measures_what_it_samples(small_grid, tmp_path):
    """Breaks when labels, targets and samples get mixed up, or what is measured is not what was sampled.

    Each energy has one mode, a sprite that has the label's concept; alone, each concept must come out right.
    """
    run = run_on(drawn_to(small_grid), small_grid, tmp_path, limit=20, step_lr=1.0)
    figures = concepts.combine_concepts(run)
    for name in SIZES:
        assert figures[f"right, {name}"][name] == figures[f"right, {name}"]["jointly"] == 1.0
        assert figures["right, real sprites"][name] == 1.0
    assert figures["right, real sprites"]["jointly"] == 1.0
    assert figures["right, real sprites"]["MSE to sprite"] == 0.0
    assert figures["right, pos"]["MSE to sprite"] == pytest.approx(0.005**2 / 2, rel=0.2)  # noise, half of it clipped
    assert figures["rot / degrees"]["right"] == 1.0  # the last step is on the rotation's energy
    assert figures["pos / pixels"]["right"] < 0.5 and figures["jointly"]["right"] < 0.5
    assert figures["right, size & shape"]["pos"] is None
    latents = small_grid.latents[run_on({}, small_grid, tmp_path).draw_targets(1, 20)[0]]  # of the same seed
    shares = figures["right by shape, size & shape & pos & rot"]
    assert figures["right, rot"]["no sprite"] == 0.0
    counts = [int((latents[:, 0] == k).sum()) for k in (1, 2, 3)]
    assert sum(n * (share or 0) for n, share in zip(counts, shares.values(), strict=True)) == pytest.approx(
        20 * figures["jointly"]["right"]
    )
    assert {path.name for path in run.results.files} == {"im_condscale_condshape_condpos_condrot.png", "accuracy.png"}
    assert all(path.stat().st_size for path in run.results.files)
    assert figures["shape / share wrong"]["by chance"] == pytest.approx(1 / 3, rel=0.01)
    json.dumps(figures, allow_nan=False)


def test_conceptcombine_counts_what_is_no_sprite(small_grid, tmp_path):
    """Breaks when samples that are discs count as squares, have errors, or make the report something else than JSON."""
    disc = draw_disc(SQUARE)
    models_by_name = {"shape": plant(lambda x, y: (x - disc).square().flatten(1).sum(1) / 2, SIZES["shape"], "shape")}
    run = run_on(models_by_name, small_grid, tmp_path, {"shape": "square"}, limit=5, step_lr=1.0, combine="shape")
    figures = json.loads(json.dumps(concepts.combine_concepts(run), allow_nan=False))
    assert figures["right, shape"].items() >= {"shape": 0.0, "jointly": 0.0, "no sprite": 1.0}.items()
    assert figures["shape / share wrong"].items() >= {"mean error": None, "median": None, "right": 0.0}.items()
    assert figures["no sprite by shape, shape"] == {"square": 1.0, "ellipse": None, "heart": None}
    assert figures["right, real sprites"].items() >= {"shape": 1.0, "no sprite": 0.0}.items()


def test_chance_is_that_of_random_sprites(small_grid, tmp_path):
    """Breaks when chance depends on the images or on targets that are alike, or counts a concept without the others.

    The target is a heart of the smallest size, not turned, in a corner of 3x3 places. Of 6 sizes 2 are right. Of 40
    turns 10 are right for squares, 6 for ellipses and 4 for hearts (the last turn is the first one).
    """
    run = run_on({}, small_grid, tmp_path)
    target = torch.tensor([[3.0, 0.5, 0.0, 0.0, 0.0]]).repeat(5, 1)
    judge = concepts.Judge({name: name for name in SIZES}, dict.fromkeys(SIZES, target))
    plan = [parse_expression(" & ".join(SIZES))]
    figures = concepts.tabulate_errors(judge, plan, dsprites.NearestSprites.of_sprites(target), run.draw_by_chance(5))
    chances = {name.split(" / ")[0]: row["by chance"] for name, row in figures.items()}
    assert chances["jointly"] == pytest.approx(2 / 6 / 3 / 9 * 4 / 40, rel=0.15)
    expected = {"size": 2 / 6, "shape": 1 / 3, "pos": 1 / 9, "rot": 20 / 120}
    assert {name: chances[name] for name in SIZES} == pytest.approx(expected, rel=0.01)
    assert all(row["right"] == 1.0 for row in figures.values())


def test_steps_fall_from_the_first_rounds_to_the_last():
    """Breaks when annealed steps start at another size, do not fall in a line, or end below the usual one."""

    def slope(x):
        return 0.01 * x.flatten(1).sum(1)

    ends = [
        langevin(
            slope, torch.ones(1, 1, 8, 8), num_steps=n, step_lr=anneal_linearly(2.0, 0.25, n), noise_std=0.0,
            generator=make_generator(), gradient_first=True,
        ).mean().item()
        for n in (1, 5, 10)
    ]  # fmt: skip
    # The gradient is 0.01; in ten rounds the steps are 2, 1.75, ... 0.25, which sum to 9, and twice 0.25.
    assert ends == pytest.approx([0.98, 1 - 0.01 * (2 + 1.5 + 1 + 0.5 + 0.25), 1 - 0.01 * (9 + 0.25 * 2)], abs=1e-6)


def test_noise_falls_from_the_first_rounds_to_the_last():
    """Breaks when annealed noise starts at another size, does not fall in a line, or ends below the usual one."""
    seen = []

    def flat(x):
        seen.append(x)
        return 0 * x.flatten(1).sum(1)

    x = torch.full((4, 1, 64, 64), 0.5)
    settings = {"num_steps": 10, "step_lr": 1.0, "noise_std": anneal_linearly(0.04, 0.005, 10)}
    end = langevin(flat, x, generator=make_generator(), gradient_first=True, **settings)
    stds = [(new - old).std().item() for old, new in zip(seen, [*seen[1:], end], strict=True)]
    assert stds == pytest.approx([0.04, 0.035, 0.03, 0.025, 0.02, 0.015, 0.01, 0.005, 0.005, 0.005], rel=0.03)


@pytest.mark.parametrize(("combine_", "mode"), [("sum", 0.65), ("alternate", 0.496 / 0.68)])
def test_weights(small_grid, tmp_path, combine_, mode):
    """Breaks when a weight reaches another concept or none: quadratic energies around 0.2 and, three times, 0.8.

    Their sum is lowest at (0.2 + 3·0.8)/4. Steps of 0.2 in turn end at the fixed point of 0.8x + 0.2·0.2 followed by
    0.4x + 0.6·0.8.
    """

    def around(value):
        return lambda images, labels: (images - value).square().flatten(1).sum(1) / 2

    values = {"size": 0.2, "pos": 0.8}
    models_by_name = {name: plant(around(value), SIZES[name], name) for name, value in values.items()}
    run = run_on(
        models_by_name, small_grid, tmp_path, combine=combine_, weights={"pos": 3.0}, num_steps=60, step_lr=0.2
    )
    plans = concepts.build_plans(run.settings.combine, list(models_by_name), run.weights)
    images = run.sample_images(plans["size & pos"], torch.zeros(1, 2, 5) + 1, make_progress(60))
    assert images.mean().item() == pytest.approx(mode, abs=1e-3)


def test_first_round_is_as_asked_for(small_grid, tmp_path):
    """Breaks when the first noise or the first step size does not reach the chain.

    A step of 1 on (x − 0.5)²/2 arrives at 0.5 whatever the start; what is left there is the noise.
    """

    def around(images, labels):
        return (images - 0.5).square().flatten(1).sum(1) / 2

    models_by_name = {"size": plant(around, SIZES["size"], "size")}
    run = run_on(models_by_name, small_grid, tmp_path, num_steps=1, step_lr=0.0, first_step_lr=1.0, first_noise=0.1)
    plans = concepts.build_plans(run.settings.combine, list(models_by_name), run.weights)
    images = run.sample_images(plans["size"], torch.zeros(1, 2, 5) + 1, make_progress(1))
    assert images.mean().item() == pytest.approx(0.5, abs=0.01)
    assert images.std().item() == pytest.approx(0.1, rel=0.05)


def test_gradient_is_taken_before_the_noise(small_grid, tmp_path):
    """Breaks when the noise moves the point whose gradient is taken: half of it would be gone after this step."""
    models_by_name = {"size": plant(lambda images, labels: QUADRATIC["a"](images), SIZES["size"], "size")}
    run = run_on(models_by_name, small_grid, tmp_path, num_steps=1, step_lr=0.5 / K1)
    start = torch.rand(4, 1, 64, 64, generator=make_generator(1))
    end = run.run_chain([composed("a")], start, make_progress())
    offset = end - (start + A) / 2  # no bound is near the end
    assert offset.mean().item() == pytest.approx(0, abs=1e-3)
    assert offset.std().item() == pytest.approx(0.005, rel=0.06)


def test_restarts_keep_the_lowest_energy(small_grid, tmp_path):
    """Breaks when the chain that is kept is not that with the lowest sum of energies, or is another image's.

    Without steps the chains are the noise they start from: drawn once more by hand, the choice is known.
    """
    run = run_on(drawn_to(small_grid), small_grid, tmp_path, limit=5, num_steps=0, restarts=4)
    plan = [parse_expression("size"), parse_expression("pos")]
    targets = small_grid.latents[run.draw_targets(1, 5)]
    images = run.sample_images(plan, targets, make_progress(1))
    again = make_generator()
    starts = [models.draw_noise_images(next(iter(run.concepts.values())).config, 5, again) for _ in range(4)]
    totals = torch.stack([run.build_energy(parse_expression("size & pos"), targets)(start) for start in starts])
    assert len(totals.argmin(0).unique()) > 1
    for place, best in enumerate(totals.argmin(0)):
        assert torch.equal(images[place], starts[best][place])


def test_expression_with_two_targets(small_grid, tmp_path):
    """Breaks when pos2 does not have a label of its own, --labels do not fix it, or the logic is not the expression's.

    The chain follows pos2 alone, at the place that is given; the mixture pos | pos2 is then fulfilled, pos is not.
    """
    concept = drawn_to(small_grid)["pos"]
    labels = {"pos": "0,0", "pos2": "1,1", "shape": "heart", "rot": "0", "size": "0.72"}
    models_by_name = {"pos": concept, "pos2": concept}
    options = {"combine": "1e-6*pos & pos2", "labels": labels, "step_lr": 1.0, "limit": 4}
    run = run_on(models_by_name, small_grid, tmp_path, **options)
    figures = concepts.combine_concepts(run)
    assert figures["pos2 / pixels"]["right"] == 1.0 and figures["pos / pixels"]["right"] == 0.0
    assert figures["jointly"]["right"] == 0.0
    latents = small_grid.latents[run.draw_targets(2, 5)]
    heart = torch.tensor([3.0, 0.7, 0.0, 0.0, 0.0])
    torch.testing.assert_close(latents[0], heart.expand(5, -1))
    torch.testing.assert_close(latents[1, :, 3:], torch.ones(5, 2))
    assert len(latents[1, :, 2].unique()) > 1  # only the first target's rotation is fixed
    truths = {"pos": torch.tensor([False]), "pos2": torch.tensor([True])}
    assert parse_expression("pos | pos2").is_fulfilled(truths).all()


def test_models_of_other_labels(small_grid, tmp_path):
    """Breaks when a class or a vector of numbers does not reach a model that is no concept of sprites."""
    seen = []

    def energy(images, labels):
        seen.append(labels)
        return images.square().flatten(1).sum(1)

    other = plant(energy, 5, None)
    for label, row in (("3", [0.0, 0.0, 0.0, 1.0, 0.0]), ("1,2,3,4,5.5", [1.0, 2.0, 3.0, 4.0, 5.5])):
        run = run_on({"net": other}, small_grid, tmp_path, combine="net", labels={"net": label}, limit=2)
        assert concepts.combine_concepts(run) == {"images": 2}
        assert seen[-1].tolist() == [row, row]
    for label in ("5", "heart", "1,2"):
        with pytest.raises(UsageError, match="a class below 5, or 5 numbers"):
            concepts.combine_concepts(
                run_on({"net": other}, small_grid, tmp_path, combine="net", labels={"net": label})
            )


@pytest.mark.parametrize("text", ["shape=cube", "size=big", "size=2", "pos=0.5", "pos=0,nan", "rot=1,0", "cube=1"])
def test_mistakes_in_labels(text, small_grid, tmp_path):
    """Breaks when a label that cannot be read is passed over."""
    name, value = text.split("=")
    with pytest.raises(UsageError, match=f"`labels`={name}="):
        run_on(tiny(), small_grid, tmp_path, labels={name: value}).draw_targets(1, 1)


def test_labeldiscover_finds_labels(small_grid, tmp_path):
    """Breaks when a step does not go down the energy, by label_lr, within the range of the labels, after noise; when
    the label of lowest energy is not found, or counted for another image or shape.

    Each planted energy is quadratic around the true label, pulled by 4: a step of 1/4 ends there, whatever the noise.
    """
    latents = small_grid.latents[run_on({}, small_grid, tmp_path).draw_targets(1, 5)[0]]  # of the same seed

    def planted(name):
        true = dsprites.compute_labels(latents, name)

        def energy(images, labels):
            return 2 * (labels - true.repeat_interleave(len(labels) // len(true), 0)).square().sum(1)

        return plant(energy, SIZES[name], name)

    run = run_on({name: planted(name) for name in SIZES}, small_grid, tmp_path, limit=5, num_steps=1, label_lr=0.25)
    figures = concepts.discover_labels(run)
    for name in SIZES:
        row = figures[f"{name} / {CONCEPTS[name].unit}"]
        assert row["right"] == 1.0 and row["error of the label"] < 1e-5, name
        assert row["mean error"] < 0.1 <= row["at the start"], name
        chance = {"shape": 1 / 3, "pos": 1 / 9}.get(name, row["by chance"])
        assert row["by chance"] == pytest.approx(chance, rel=0.01), name
        if name != "pos":
            row = figures[f"{name}, lowest energy"]
            shapes = {shape: 1.0 if k in latents[:, 0] else None for k, shape in enumerate(dsprites.SHAPES, 1)}
            assert row == {"right": 1.0, **shapes}, name


def test_untrained_models_go_through(small_grid, tmp_path):
    """Breaks when a real network does not fit a task, or figures are not what JSON holds."""
    for how in ("sum", "shape & ~0.5*size"):
        used = tiny() if how == "sum" else {name: tiny()[name] for name in ("shape", "size")}
        figures = concepts.combine_concepts(run_on(used, small_grid, tmp_path, combine=how, limit=3))
        assert json.dumps(figures, allow_nan=False) and 0 <= figures["jointly"]["right"] <= 1
    assert (tmp_path / "im_shape_0_5_size.png").exists()
    json.dumps(concepts.discover_labels(run_on(tiny(), small_grid, tmp_path, limit=3)), allow_nan=False)


# ---- unseen combinations ----


@pytest.mark.parametrize(("other", "values"), [("size", 6), ("shape", 3), ("rot", 40)])
def test_slices(other, values):
    """Breaks when the slices are not weighed as in the release or as asked for, or others than its combinations tested.

    The release repeats the position's slice of 1,024; only with size it tests on nothing that training saw.
    """
    latents = dsprites.compute_latents(torch.arange(dsprites.SIZE))
    slices = unseen.select_slices(latents, other, balance=False)
    times = 1024 // values
    assert len(slices.training) == times * 1024 + values and len(slices.training.unique()) == 1024 + values - 1
    in_middle = ((latents[slices.training][:, 3:] - 16 / 31).abs() < 1e-3).all(1)
    assert in_middle.sum() == times + values  # in the other slice the sprite stays in the middle
    column = list(dsprites.LATENTS).index({"size": "scale", "rot": "orientation"}.get(other, other))
    assert (latents[slices.training[:1024]][:, column].unique()).numel() == 1
    assert len(slices.others) == values * 1024 - 1
    is_seen = torch.isin(slices.unseen, slices.training)
    if other == "size":
        assert len(slices.unseen) == (values - 1) * (1024 - 1) and not is_seen.any()
    else:
        assert len(slices.unseen) == values * 1024 and is_seen.sum() == 1024 + values - 1
    labels = unseen.join_labels(latents[slices.unseen], other)
    assert labels.shape[1] == 2 + SIZES[other]
    assert len(labels.unique(dim=0)) == len(slices.unseen) or other == "rot"  # where 0 and 2π are one label

    balanced = unseen.select_slices(latents, other).training
    in_middle = ((latents[balanced][:, 3:] - 16 / 31).abs() < 1e-3).all(1)
    assert len(balanced) == 2 * times * 1024 and in_middle.sum() == times + times * 1024


def test_product_adds_energies():
    """Breaks when a network of a product gets another's weights or labels, or is left out of training."""
    parts = [make_model(models.ModelConfig("DspritesNet", (1, 64, 64), 4, n), n) for n in (2, 1)]
    product = unseen.ProductNetwork(parts)
    images, labels = torch.rand(3, 1, 64, 64, generator=make_generator()), torch.rand(3, 3, generator=make_generator())
    expected = parts[0](images, labels[:, :2]) + parts[1](images, labels[:, 2:])
    torch.testing.assert_close(product(images, labels), expected)
    product(images, labels).sum().backward()
    assert all(next(part.parameters()).grad is not None for part in parts)
    assert product.config.label_size == 3


def test_generator_has_as_many_parameters(small_grid, tmp_path):
    """Breaks when the generator is larger or smaller than the two energy networks, or its seed draws nothing."""
    run = run_on({}, small_grid, tmp_path, num_filters=64)
    count = unseen.count_parameters(unseen.build_product(run, "size"))
    before = torch.get_rng_state()
    made = unseen.build_generator(run, "size")
    assert torch.equal(torch.get_rng_state(), before)
    assert unseen.count_parameters(made) == pytest.approx(count, rel=0.02)
    again = unseen.build_generator(run, "size")
    assert all(torch.equal(one, other) for one, other in zip(made.parameters(), again.parameters(), strict=True))
    assert made(torch.zeros(2, 3)).shape == (2, 1, 64, 64)


def test_generator_learns(small_grid, tmp_path):
    """Breaks when training the generator gets stuck at black images, or does not lead to those of its labels."""
    run = run_on({}, small_grid, tmp_path, num_filters=8, batch_size=2, break_steps=80)
    index = unseen.select_slices(small_grid.latents, "size").training[:1].repeat(64)
    sample = unseen.build_generator_sampler(unseen.train_generator(run, index, "size")[0], "size")
    true = run.render_images(index[:8])
    assert unseen.measure_squared_error(sample(small_grid.latents[index[:8]]), true) < 0.9 * true.square().mean()


@pytest.fixture
def optimizers(monkeypatch):
    """The settings (lr, betas) of each optimizer of gentest and genbaseline, and how many steps each made."""
    found = []

    class Spy(ClippedAdam):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            found.append(self.param_groups[0])

    monkeypatch.setattr(unseen, "ClippedAdam", Spy)
    return found


def test_gentest_and_genbaseline(small_grid, tmp_path, monkeypatch, optimizers):
    """Breaks when a task stops half-way, tests on part of the combinations, does not keep what it trained, or does not
    show the other's figures; when training takes other passes over its list or another optimizer than the release.

    The list has each of the 9 positions once, as often as 6 goes into 9, and 9 sizes: 9 batches of 2.
    """
    folder = tmp_path / "gentest" / "pos_size"
    run = run_on({}, small_grid, folder, batch_size=2, break_steps=None, num_steps=1)
    sampled = []
    sample_product = unseen.sample_product
    monkeypatch.setattr(unseen, "sample_product", lambda *words: sampled.append(words[2]) or sample_product(*words))
    figures = unseen.measure_product(run)
    assert sum(map(len, sampled)) == 5 * 8 + 2  # all unseen combinations, and a batch of seen ones
    assert torch.cat(sampled).std().item() == pytest.approx(1, rel=0.01)
    assert torch.cat(sampled).mean().item() == pytest.approx(0.5, abs=0.01)
    assert {"energy, unseen", "energy, seen"} < set(figures) and figures["share of the unseen that was trained on"] == 0
    assert json.dumps(figures, allow_nan=False) and all(path.exists() for path in run.results.files)
    (folder / "gentest.json").write_text(json.dumps({"figures": figures}))

    kept = checkpoint.load_energy(folder / "pos" / "model_9")
    start = unseen.build_product(run, "size").networks[0]
    moved = [(a - b).abs().max() for a, b in zip(kept.parameters(), start.parameters(), strict=True)]
    assert kept.config.label_size == 2 and max(moved) > 1e-4
    monkeypatch.setattr(unseen, "train_product", None)  # trained models are loaded, not trained again
    unseen.measure_product(run_on({}, small_grid, folder, limit=2, batch_size=2, break_steps=9))

    run = run_on({}, small_grid, tmp_path / "genbaseline" / "pos_size", limit=4, batch_size=5, break_steps=None)
    unseen.measure_generator(run)
    used = [(group["lr"], group["betas"], group["t"]) for group in optimizers]
    assert used == [(1e-3, (0.0, 0.999), 9), (1e-3, (0.9, 0.999), 5 * 3)]

    run = dataclasses.replace(run, settings=dataclasses.replace(run.settings, plot_curve=True, break_steps=1))
    curve = unseen.measure_generator(run)
    assert curve["energy, unseen"] == figures["energy, unseen"] and "100%, seen" in curve
    assert curve["0%, unseen"].keys() == {"MSE", "pos right", "size right", "jointly", "by nearest", "no sprite"}
    stored = np.load(run.results.folder / "curve.npy")
    np.testing.assert_allclose(stored[0], np.arange(11) / 10)
    assert stored[1, 3] == curve["30%, unseen"]["MSE"]

    del figures["energy, unseen"]["no sprite"]  # as an earlier version judged
    (folder / "gentest.json").write_text(json.dumps({"figures": figures}))
    assert unseen.read_energy_figures(run) == {}


def test_gentest_starts_from_the_models(small_grid, tmp_path):
    """Breaks when joint training begins with new networks although there are trained ones, or changes their activation.

    A network that is not there is a new one, as wide as asked for.
    """
    run = run_on({}, small_grid, tmp_path, spec_iter=3, downsample=True)
    new = unseen.build_product(run, "size").networks[0].config
    assert (new.spec_iter, new.downsample, new.spec_norm_val) == (3, True, 1.0)
    config = models.ModelConfig("DspritesNet", (1, 64, 64), 8, 1, swish_act=True)
    known = {"size": ConceptModel(models.freeze_energy(make_model(config, seed=5)), "size")}
    first, second = unseen.build_product(run_on(known, small_grid, tmp_path), "size").networks
    assert second is known["size"].energy.model
    assert (first.config.num_filters, first.config.swish_act) == (4, False)


def test_gentest_finds_its_starts(tmp_path, capsys):
    """Breaks when gentest does not go on from a checkpoint that fits, or does not say why a network is a new one.

    A user's model goes before the shipped one of the same name, which a note says.
    """
    for name, label_size in {"pos": 2, "size": 1, "shape": 3, "rot": 2}.items():
        config = models.ModelConfig("DspritesNet", (1, 64, 64), 4, label_size, swish_act=name == "shape")
        write_checkpoint(tmp_path / f"dsprites_cond_{name}" / "model_5.pt", make_model(config), 5)
    settings = CombineSettings(modeldir=str(tmp_path), exp_size="gone", cond_rot=False, num_filters=4, swish_act=False)
    paths = find_starts(settings, ("pos", "size", "shape", "rot"))
    assert paths == {"pos": tmp_path / "dsprites_cond_pos" / "model_5.pt"}
    note = "note: the model is that of {}/dsprites_cond_{}; modeldir={} takes the shipped one of the same name"
    lines = capsys.readouterr().out.splitlines()
    assert lines.pop(1).startswith(f"model size: starts from new weights: no experiment folder {tmp_path}/gone; ")
    assert lines == [
        note.format(tmp_path, "pos", get_shipped_root()),
        note.format(tmp_path, "shape", get_shipped_root()),
        f"model shape: starts from new weights, because {tmp_path}/dsprites_cond_shape/model_5.pt has swish_act=True, "
        "not False",
        "model rot: starts from new weights, as cond_rot=False says",
    ]


def test_noise_in_joint_chains(small_grid, tmp_path):
    """Breaks when noise is not added twice before the position's step, or also before the other's.

    On flat energies the second step would show any noise; the bounds are far away.
    """
    run = run_on({}, small_grid, tmp_path, num_steps=2)
    product = unseen.build_product(run, "size")
    flat = {name: torch.zeros_like(tensor) for name, tensor in product.prepare().items()}
    start = torch.full((4, 1, 64, 64), 0.5)
    end = unseen.run_product_chain(run, models.PreparedEnergy(product, flat), start, torch.zeros(4, 3))
    assert (end - start).std().item() == pytest.approx(0.005 * math.sqrt(2 * 2), rel=0.03)


def test_chains_of_joint_training_start_from_noise_and_5_percent_replay(small_grid, tmp_path):
    """Breaks when more or fewer of the chains go on from earlier end points, or those are not as they were."""
    config, generator = unseen.build_product(run_on({}, small_grid, tmp_path), "size").config, make_generator()
    noise = unseen.mix_starts(config, 2000, torch.empty(0, 1, 64, 64), generator)
    assert noise.mean().item() == pytest.approx(0.5, abs=0.01) and noise.std().item() == pytest.approx(0.5, abs=0.01)
    starts = unseen.mix_starts(config, 2000, torch.full((10, 1, 64, 64), 0.123456), generator)
    assert 60 < (starts == 0.123456).flatten(1).all(1).sum() < 140


# ---- the command line ----

# A small grid of sprites, and instead of training a line that says which command would train.
SETUP = """
from ebm.tasks import concept_models
from ebm.readers import dsprites
places = (0.0, 16 / 31, 1.0)
dsprites.LATENTS |= {"x": places, "y": places}
dsprites.SIZE = 3 * 6 * 40 * 9

def run_command(command):
    print("started " + json.dumps(command[1:]))
    return 7 if "--max_iter=7" in command else 0

concept_models.run_command = run_command
"""

COMMANDS = {
    "published": "--task=conceptcombine --exp_size=dsprites_cond_size --exp_shape=my_shape --exp_pos=dsprites_cond_pos "
    "--exp_rot=dsprites_cond_rot --resume_size=5 --resume_shape=5 --resume_rot=latest --resume_pos=-1",
    "two": "--cond_scale=False --nocond_rot --combine=sum --exp=two --exp_shape=my_shape --proj_cclass",
    "bf16": "--cond_scale=False --nocond_rot --combine=sum --exp=bf16 --exp_shape=my_shape --precision=bf16",
    "expression": "--combine=shape&(pos|where) --exp=three --exp_shape=my_shape "
    "--models=where=dsprites_cond_pos:5,far=elsewhere --labels=pos=0,1,shape=heart",
    "gentest": "--task=gentest --joint_rot --break_steps=1 --num_filters=4 --batch_size=2 --precision=bf16",
    "missing": "--exp_rot=gone --exp_size=dsprites_cond_size --resume_size=6",
    "unknown": "--combine=shape&colour --exp_shape=my_shape",
    "mistake": "--combine=shape&&pos",
    "swapped": "--exp_pos=dsprites_cond_rot --exp_shape=my_shape",
    "misfit": "--exp_shape=my_shape --num_filters=64",
    "none": "--nocond_size --nocond_rot --nocond_pos --nocond_shape",
    "both": "--task=gentest --joint_rot --joint_shape",
    "not a pair": "--models=pos",
    "weight of nothing": "--weights=rot=2 --nocond_rot",
    "weight of 0": "--weights=pos=2,size=0",
    "steps that rise": "--first_step_lr=50 --step_lr=400",
    "weights twice": "--weights=pos=2 --combine=2*pos",
    "unwritable": "--task=genbaseline --savedir=/dev/null",
    "train": "--task=train --train_flags=--max_iter=9 --exp_shape=new_shape --dsprites_path=some.npz",
    "train fails": "--task=train --train_flags=--max_iter=7",
}


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Run all of COMMANDS in one process; return the folder, and what each printed, its error and what it started."""
    root = tmp_path_factory.mktemp("combine")
    for name, size in SIZES.items():
        config = models.ModelConfig("DspritesNet", (1, 64, 64), 4, size, swish_act=True)
        exp = "my_shape" if name == "shape" else f"dsprites_cond_{name}"
        contents = {"flags": {f"cond_{name}": True}} | ({} if name == "rot" else {"optimizer": {}})
        write_checkpoint(root / exp / "model_5.pt", make_model(config), 5, **contents)
    given = ["--limit=2", "--num_steps=1", f"--logdir={root}", f"--savedir={root}/out", "--device=cpu"]
    # A shell's words; what is given last counts.
    words = {name: [*given, *text.split()] for name, text in COMMANDS.items()}
    done = run_commands("ebm_combine", words, SETUP, timeout=300)
    return root, {name: (printed, error, find_started(printed)) for name, (printed, error) in done.items()}


def find_started(printed):
    """Return the commands that were started, as SETUP has them printed."""
    return [json.loads(line.removeprefix("started ")) for line in printed.splitlines() if line.startswith("started ")]


def test_published_command(commands):
    """Breaks when the published command does not run, or its picture, figures and settings are not to be found."""
    root, results = commands
    printed, error, _ = results["published"]
    assert error is None
    folder = root / "out" / "combine" / "conceptcombine"
    report = json.loads((folder / "conceptcombine.json").read_text())
    assert report["checkpoints"]["shape"] == f"{root}/my_shape/model_5.pt"
    assert report["settings"]["num_steps"] == 1 and report["networks"]["pos"]["num_filters"] == 4
    assert "right, size & shape & pos & rot" in report["figures"]
    for name in ("im_condscale_condshape_condpos_condrot.png", "accuracy.png", "conceptcombine.json"):
        assert f"wrote {folder / name}" in printed and (folder / name).exists()
    for exp, name in {"two": "im_condshape_condpos.png", "three": "im_shape_pos_where.png"}.items():
        assert (root / "out" / exp / "conceptcombine" / name).exists()
    assert "note: --proj_cclass has no effect" in results["two"][0]
    assert results["bf16"][1] is results["two"][1] is results["expression"][1] is results["gentest"][1] is None
    joint = json.loads((root / "out/combine/gentest/pos_rot/gentest.json").read_text())
    assert joint["checkpoints"] == {name: f"{root}/dsprites_cond_{name}/model_5.pt" for name in ("pos", "rot")}
    assert f"model rot: {root}/dsprites_cond_rot/model_5.pt, DspritesNet with 4 filters, swish" in results["gentest"][0]
    reports = [
        json.loads((root / f"out/{exp}/conceptcombine/conceptcombine.json").read_text()) for exp in ("two", "bf16")
    ]
    full, half = (report["figures"]["right, shape & pos"]["MSE to sprite"] for report in reports)
    assert full != half == pytest.approx(full, rel=1e-3)


def test_activation_of_tensorflow_checkpoints():
    """Breaks when a checkpoint that does not tell its activation gets another one than the release's default."""
    path = GOLDEN / "tf_checkpoints" / "dsprites_cond_pos" / "model_8000"
    for settings, is_swish in {CombineSettings(): False, CombineSettings(swish_act=True): True}.items():
        assert load_model(settings, "pos", path, torch.device("cpu")).config.swish_act == is_swish


def test_missing_models(commands):
    """Breaks when a missing model has no line with the command that trains it, or a model that there is has one."""
    _, results = commands
    first, *lines = results["missing"][1].split("\n")
    assert "--task=train" in first and len(lines) == 2
    for line, name, exp in zip(lines, ("size", "rot"), ("dsprites_cond_size", "gone"), strict=True):
        assert line.startswith(f"  {name}: no ")
        assert f"python train.py --preset=dsprites_{name} --exp={exp}" in line
    assert "(it has 5); choose one with --resume_size, or" in lines[0] and "model_6" in lines[0]
    assert "choose with --modeldir and --exp_rot, or" in lines[1]


def test_mistakes_on_the_command_line(commands):
    """Breaks when a mistake is not caught, or its message does not name what is wrong."""
    _, results = commands
    expected = {
        "unknown": "there is no model colour",
        "mistake": "not &\n  shape&&pos\n        ^",
        "swapped": "was trained with --cond_rot, it cannot be pos",
        "misfit": "--num_filters=64 does not fit",
        "none": "no concept is left",
        "both": "exclude each other",
        "not a pair": "--models=pos: expected name=value",
        "weight of nothing": "--weights=rot=2: rot is not combined here",
        "weight of 0": "--weights=size=0: expected a number above 0, at most 1e+18",
        "weights twice": "--weights is for --combine=alternate and sum",
        "steps that rise": "--first_step_lr=50 cannot fall to --step_lr=400",
        "unwritable": "--savedir: cannot write /dev/null/combine/genbaseline",
    }
    for name, message in expected.items():
        assert message in (results[name][1] or ""), name


def test_training_all_four(commands):
    """Breaks when a command is not the published one, a run that can go on starts anew, or failure goes on.

    The model of rot is weights alone, as those that come with the project are.
    """
    root, results = commands
    _, error, ran = results["train"]
    assert error is None and len(ran) == 4
    for (script, *words), name in zip(ran, ("size", "shape", "pos", "rot"), strict=True):
        exp = "new_shape" if name == "shape" else f"dsprites_cond_{name}"
        published = f"--dataset=dsprites --exp={exp} --zero_kl --num_steps=20 --step_lr=500.0 --swish_act --cond_{name}"
        places = [f"--logdir={root}", "--device=cpu", "--dsprites_path=some.npz", "--max_iter=9"]
        places += ["--resume_iter=latest"] if "--resume_iter=latest" in words else []
        meant = [*published.split(), "--replay_batch", "-cclass", *places]
        asked, wanted = (cli.parse(["train.py", *flags], TrainSettings) for flags in (words, meant))
        assert dataclasses.replace(asked, preset=None) == wanted
        assert script.endswith("train.py") and words[-1] == "--max_iter=9"
        assert f"--logdir={root}" in words and "--dsprites_path=some.npz" in words
        assert ("--resume_iter=latest" in words) == (name in ("size", "pos"))
    _, error, ran = results["train fails"]
    assert "training of size failed with status 7" in error and len(ran) == 1


def test_table():
    """Breaks when figures are not to be found below the name of their column, or columns that change get no heads."""
    rows = {"a": {"x": 0.25, "y": None}, "b": {"x": 1.0, "y": 2}, "all": 3, "c": {"long name": 0.5}, "d": {"z": -1e6}}
    lines = [
        "              x         y",
        "a        0.2500         –",
        "b        1.0000         2",
        "all  3",
        "       long name",
        "c         0.5000",
        "                   z",
        "d      -1000000.0000",
    ]
    assert reports.format_table(rows) == "\n".join(lines)


PARENT = """
import sys
from ebm.tasks.concept_models import run_command
sys.exit(run_command([sys.executable, "-c", sys.argv[1]]))
"""


def test_a_signal_lets_training_save():
    """Breaks when SIGTERM ends the command that trains without reaching train.py, or without waiting for it."""
    child = (
        "import signal, sys, time; "
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), print('saved', flush=True), sys.exit(143))); "
        "print('ready', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, child], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "saved\n"
        assert process.wait(timeout=30) == 143
