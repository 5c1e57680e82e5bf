"""The tasks of the sandbox against results of the reference's own graphs, see tests/golden/tasks/README.md."""

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import checkpoint
from conftest import make_dataset, make_generator, make_progress
from ebm.settings import SandboxSettings
from ebm.support import metrics
from ebm.tasks import label_tasks, outliers, sandbox
from ebm.tasks.attacks import restrict_to_ball, restrict_to_lower_half
from ebm.tasks.examined_model import ExaminedModel
from ebm.tasks.results import Results
from ebm.tasks.sandbox_run import Examples, SandboxRun
from golden_cases import (
    assert_close,
    assert_digests_close,
    build_network,
    compute_share_of_rows,
    load_task,
    read_variables,
    to_ours,
    to_theirs,
)
from models import EnergyNetwork

CLASSES = 10


def build_colour_network(config, variables, label_size: int = CLASSES) -> EnergyNetwork:
    """Return the ResNet32 of a golden case."""
    return build_network(config["net"], variables, num_filters=config["kw"]["num_filters"], label_size=label_size)


def examine(model: EnergyNetwork, config, **settings: Any) -> ExaminedModel:
    """Return a network with the chains of a golden case, which are free of noise."""
    chains = {name: config[name] for name in ("num_steps", "step_lr", "proj_norm") if name in config}
    return ExaminedModel(model, make_generator(), noise_std=0.0, **chains | settings)


@dataclasses.dataclass
class GoldenRun(SandboxRun):
    """A task on given examples by split, and given noise in its order; `panels` keeps the columns that it shows."""

    examples: dict[str, Examples] = dataclasses.field(default_factory=dict)
    noise: list[Tensor] = dataclasses.field(default_factory=list)
    panels: dict[str, dict[str, Tensor]] = dataclasses.field(default_factory=dict)

    def draw_examples(self, split, number):
        return self.examples[split]

    def draw_starts(self, labels):
        return self.noise.pop(0)

    def write_panel(self, name, columns, rows=(), note=""):
        self.panels[name] = dict(columns)


def make_golden_run(examined: ExaminedModel, folder=None, examples=None, noise=(), **settings: Any) -> GoldenRun:
    """Return a run of a task on these examples, split -> (images, labels), and this noise."""
    splits = {split: Examples(images, torch.from_numpy(labels)) for split, (images, labels) in (examples or {}).items()}
    return GoldenRun(
        examined,
        SandboxSettings(**settings),
        load=lambda split: make_dataset(
            (3, 32, 32)
        ),  # what a task looks up besides images: a name, whether splits differ
        load_mix=lambda name: make_dataset((3, 32, 32)),
        mixes=["interpolation"],
        results=Results(folder, examined.workers),
        names=tuple(map(str, range(CLASSES))),
        examples=splits,
        noise=list(noise),
    )


@pytest.fixture
def without_plots(monkeypatch):
    """Leave plots out, which are slow, and are tested with all tasks."""
    for name in ("plot_histograms", "plot_roc"):
        monkeypatch.setattr(sandbox.pictures, name, lambda *_, **__: None)


# ---- label and labelfinetune ----

LABEL = load_task("label")
LABEL_NETWORK = build_colour_network(*LABEL[1:3])


@pytest.mark.parametrize("name", LABEL[1]["runs"])
def test_classification(name):
    """Breaks when an attack starts, steps or ends elsewhere, or it or the refinement is clipped to [0, 1]."""
    case, config, _, inputs = LABEL
    flags = config["runs"][name]
    images, offset = to_ours(inputs["x"]), to_ours(inputs["start"]) / 255
    run = make_golden_run(
        examine(LABEL_NETWORK, flags),
        lnorm=str(flags["lnorm"]),
        pgd=flags["pgd"],
        lival=flags["lival"],
        l2val=flags["l2val"],
        l2_per_step=flags["lnorm"] == 2,
    )
    examined, attack = run.model, label_tasks.choose_attack(run.settings)
    attacked = examined.attack_batch(images, torch.from_numpy(inputs["y"]).argmax(1), attack, offset)
    if attack.steps:
        assert_close(examined.compute_logits(images + offset), case[f"{name}_start_logits"], 1e-4)
        expected = case[f"{name}_delta"]
        same = np.abs(to_theirs(255 * (attacked - images))[: len(expected)] - expected) < 0.01
        assert same.mean() > (0.999 if attack.steps == 1 else 0.9)  # the sign of a gradient near 0 is uncertain
    else:
        assert torch.equal(attacked, images)
    logits = examined.compute_logits(attacked, run.refine if examined.num_steps else None)
    assert_close(logits, case[f"{name}_logits"], 1e-4 if attack.steps <= 1 else 1e-2)
    if examined.num_steps:
        ball = functools.partial(restrict_to_ball, radius=run.refine)
        starts, labels = attacked.repeat_interleave(CLASSES, 0), torch.eye(CLASSES).repeat(len(images), 1)
        refined = examined.run_chain(starts, labels, rounds=1, restrict=ball)
        assert compute_share_of_rows(refined, case[f"{name}_refined_rows"]) > 0.6


def drop_variable(case, key: str, name: str) -> dict[str, np.ndarray]:
    """Return the digests `key` of a case without those of one variable."""
    keep = case[f"{key}_names"] != name
    return {entry: case[entry][keep] for entry in (f"{key}_names", f"{key}_norm", f"{key}_dot")}


def test_finetuning():
    """Breaks when the mean over a batch is differentiated, a bias is trained, or Adam's epsilon or betas are others."""
    case, config, variables, inputs = load_task("labelfinetune")
    batches = [(to_ours(inputs[f"x{k}"]), torch.from_numpy(inputs[f"y{k}"])) for k in ("", "2")]
    before = build_colour_network(config, variables).state_dict()
    for step in (1, 2):
        model = build_colour_network(config, variables)
        examined = examine(model, config, batch_size=config["n"])
        loss = examined.finetune(*map(torch.cat, zip(*batches[:step], strict=True)), lr=config["lr"])
        assert loss == pytest.approx(np.mean([case[f"step{k + 1}_losses"] for k in range(step)]), rel=1e-4)
        found: dict[str, dict[str, Tensor]] = {"value": {}, "change": {}, "grad": {}}
        for name, value in model.named_parameters():
            tensors = value, value.double() - before[name].double(), value.grad
            for named, tensor in zip(found.values(), tensors, strict=True):
                named[checkpoint.to_tf_name(name)] = tensor
        for key, named in found.items():
            del named["context_0/fc5/b"]  # its gradient is rounding, so it moves anywhere, and with it all logits alike
            assert_digests_close(
                named, drop_variable(case, f"step{step}_{key}", "context_0/fc5/b"), f"step{step}_{key}"
            )
        before = model.state_dict()
    logits, expected = examined.compute_logits(batches[0][0]), torch.from_numpy(case["after_logits"])
    assert_close(logits - logits.mean(), expected - expected.mean(), 1e-3)


# ---- energyeval and mixenergy ----


@pytest.mark.parametrize("prefix", ["cond", "uncond", "cond_updating"])
@pytest.mark.usefixtures("without_plots")
def test_energies(prefix, tmp_path):
    """Breaks when energies are taken under other labels or weights, or scores mix images in another way."""
    case, config, variables, inputs = load_task("energies")
    if prefix == "uncond":
        variables = read_variables(case, "uncond_", config["seed"])
    model = build_colour_network(config, variables, CLASSES * (prefix != "uncond"))
    examined = examine(model, config, num_steps=config["num_steps"] - 1)
    examples = {split: (to_ours(inputs[split]), inputs[f"y_{split}"]) for split in ("train", "test")}
    # Where the vectors of the power iteration move on with every run, the first run alone has the stored ones.
    stored = {"energies_test": "eval_test", "scores_in_distribution": "mix_scores"}
    size, total = config["batch_size"], config["batch_size"]
    if prefix != "cond_updating":
        stored |= {"energies_train": "eval_train", "scores_interpolation": "mix_scores_mixed"}
        total = config["n"]
    scores: dict[str, list[float]] = {name: [] for name in stored}
    for first in range(0, total, size):
        part = slice(first, first + size)
        batch = {split: (images[part], labels[part]) for split, (images, labels) in examples.items()}
        run = make_golden_run(examined, tmp_path, batch)
        sandbox.compare_energies(run)
        outliers.detect_outliers(run)
        for name, key in stored.items():
            scores[name].extend(np.load(tmp_path / f"{name}.npy"))
            assert_close(scores[name][first:], case[f"{prefix}_{key}"][part], 1e-4)
        images, labels = run.examples["test"]
        end = examined.run_chain(images, labels, rounds=1)
        assert_close(examined.compute_energies(end, labels), case[f"{prefix}_energy_end"][part], 1e-4)
    if total == config["n"]:
        auroc = metrics.auroc(*(np.array(scores[f"scores_{name}"]) for name in ("in_distribution", "interpolation")))
        assert auroc == pytest.approx(case[f"{prefix}_mix_auroc"], abs=1e-6)


# ---- boxcorrupt, crossclass and cycleclass ----

STEPS = load_task("steps")
STEPS_MODEL = examine(build_colour_network(*STEPS[1:3]), STEPS[1])


@pytest.mark.usefixtures("without_plots")
def test_inpainting(tmp_path):
    """Breaks when the upper half moves, or the error is not the mean over the whole image."""
    case, _, _, inputs = STEPS
    suffixes = {"train": "_train", "test": ""}
    examples = {split: (to_ours(inputs[f"x{k}"]), inputs[f"y{k}"]) for split, k in suffixes.items()}
    boxes = [F.pad(to_ours(inputs[f"box{k}"]), (0, 0, 16, 0)) for k in suffixes.values()]
    run = make_golden_run(STEPS_MODEL, tmp_path, examples, boxes)
    figures = sandbox.inpaint_images(run).figures
    for split in suffixes:
        start, restored = (run.panels["restored"][f"{split} {name}"] for name in ("start", "restored"))
        labels = run.examples[split].labels
        first = run.model.run_chain(start, labels, rounds=1, restrict=restrict_to_lower_half)
        assert_close(to_theirs(first[:1]), case[f"boxcorrupt_{split}_round1"], 1e-4)
        assert compute_share_of_rows(first, case[f"boxcorrupt_{split}_round1_rows"], 1e-4) == 1
        assert compute_share_of_rows(restored, case[f"boxcorrupt_{split}_round10_rows"], 5e-2) > 0.3
        errors = np.load(tmp_path / f"mse_{split}.npy")
        assert_close(errors, case[f"boxcorrupt_mse_{split}"], 5e-2)
        assert figures[f"{split} MSE mean"] == pytest.approx(errors.mean())
        assert figures[f"{split} MSE of the lower half"] == pytest.approx(2 * errors.mean())


@pytest.mark.parametrize("task", ["crossclass", "cycleclass"])
def test_chains_of_classes(task):
    """Breaks when images start elsewhere, or take other labels, rounds or steps."""
    case, _, _, inputs = STEPS
    images = to_ours(inputs["x"])
    run = make_golden_run(STEPS_MODEL, examples={"test": (images, inputs["y"])}, noise=[images])
    sandbox.TASKS[task](run)
    *stages, shown = run.panels[task].values()
    assert torch.equal(shown, images) and len(stages) == 1 + case[f"{task}_rounds"]
    assert compute_share_of_rows(stages[0], case[f"{task}_start_rows"], 1e-4) == 1
    assert_close(to_theirs(stages[1][:1]), case[f"{task}_round1"], 1e-4)
    assert compute_share_of_rows(stages[1], case[f"{task}_round1_rows"], 1e-4) == 1
    assert compute_share_of_rows(stages[-1], case[f"{task}_last_rows"], 5e-2) > 0.3
    if task == "crossclass":  # without `spec_eval` the first round has the stored vectors of the power iteration, too
        assert compute_share_of_rows(stages[1], case["crossclass_updating_round1_rows"], 1e-4) == 1


# ---- latent ----


def test_traversals():
    """Breaks when directions are not of the smallest eigenvalues, or moves have another length, sign, clip or chain."""
    case, config, variables, inputs = load_task("latent")
    network = build_network(
        config["net"], variables, num_filters=config["kw"]["num_filters"], swish_act=config["flags"]["swish_act"]
    )
    run = make_golden_run(examine(network, config, num_steps=20))
    image, labels = to_ours(inputs["x"])[:1], torch.zeros(6, 0)
    (values,), (directions,) = sandbox.find_directions(run, image, labels[:1], make_progress())
    expected = torch.from_numpy(case["directions"])[:, None]
    assert_close(values, case["eigenvalues"][:3], 1e-4)
    assert (directions * expected).flatten(1).sum(1).abs().min() > 0.99
    step = expected.repeat_interleave(2, 0)
    moved = sandbox.move_images(run, image.expand(6, -1, -1, -1), labels, step, make_progress())
    assert_close(to_theirs(moved[:2]), case["x_stack"], 1e-3)
    assert compute_share_of_rows(moved, case["x_stack_rows"]) == 1

    moved = to_ours(case["x_stack"])  # the first two images, each of which takes its direction anew
    values, directions = sandbox.find_directions(run, moved[:1], labels[:1], make_progress())
    assert_close(values, case["round1_eigenvalues"][:1], 1e-4)
    step = torch.from_numpy(case["round1_direction0"])[None]
    assert (directions[0, 0] * step).sum().abs() > 0.99
    moved = sandbox.move_images(run, moved, labels[:2], step.expand_as(moved), make_progress(), bounded=True)
    assert_close(to_theirs(moved[:1]), case["round1_x"], 1e-3)
