"""One iteration of train.py against the graph of the reference's: chains, energies, losses, gradients, figures."""

import dataclasses
from unittest import mock

import pytest
import torch

import train
from checkpoint import to_tf_name
from conftest import make_generator
from data import Batches
from ebm.settings import TrainSettings
from ebm.training.chains import draw_classes
from ebm.training.records import compute_statistics
from ebm.training.state import State
from golden.tasks import recipe_tasks
from golden_cases import (
    assert_close,
    assert_digests_close,
    build_network,
    compute_share_of_rows,
    load_task,
    read_variables,
    to_ours,
)
from models import compute_class_logits
from sampling import compute_input_gradient
from utils import ClippedAdam, ReplayBuffer

CASE, CONFIG, _, _ = load_task("train")


def make_golden_state(flags):
    """Return the state of a run with the golden weights of its data set."""
    conditional, dataset = flags["cclass"], flags["dataset"]
    network = CONFIG["networks"][dataset]
    key = next(key for key in CASE.files if key.endswith("var_names") and key.startswith(dataset[:5]))
    variables = read_variables(CASE, key.removesuffix("var_names"), CONFIG["seed"])
    model = build_network(network["net"], variables, **network["kw"], label_size=10 if conditional else 0)
    return State(
        model=model,
        optimizer=ClippedAdam(model.parameters()),
        buffer=ReplayBuffer(0, model.config.image_shape),
        batches=Batches(CONFIG["n"], CONFIG["n"], seed=0),
        generator=make_generator(),
    )


def read_settings(flags):
    """Return our settings for flags of the reference, without noise; its step_lr is multiplied by rescale already."""
    known = {field.name for field in dataclasses.fields(TrainSettings)}
    values = {name: value for name, value in flags.items() if name in known - {"noise_scale", "resume_iter"}}
    return TrainSettings(**values | {"noise_scale": 0.0, "step_lr": flags["step_lr"] / flags["rescale"]})


@pytest.mark.parametrize("run", CONFIG["runs"])
def test_iteration(run):
    """Breaks when temperature gets into the regulariser or out of the contrast and the chains, when model_cclass infers
    labels for the data instead of the chains, or when any loss, gradient or logged figure departs from the reference.
    """
    flags = CONFIG["base"] | CONFIG["runs"][run]
    settings, state = read_settings(flags), make_golden_state(flags)
    draws = recipe_tasks.draws(CONFIG[f"inputs_{flags['dataset']}"], CONFIG["seed"])
    images, start = (flags["rescale"] * to_ours(draws[name]) for name in ("x", "noise"))
    y, y_chain = (
        torch.from_numpy(draws.get(name, draws["y"])) if flags["cclass"] else None for name in ("y", "y_chain")
    )

    def infer_labels(state, energy, images):
        return draw_classes(compute_class_logits(energy, images, 10), torch.from_numpy(draws["gumbel_uniform"]))

    def compute_data_energies(energy, images, labels, settings, compute=train.compute_data_energies):
        return compute(energy, images, y, settings)  # the case has other labels for data than for chains

    with (
        mock.patch.object(train, "infer_labels", infer_labels),
        mock.patch.object(train, "compute_data_energies", compute_data_energies),
    ):
        step = train.train_step(state, settings, images, y_chain, start, lambda: None)

    assert_close(step.e_pos.flatten(), CASE[f"{run}_e_pos"].flatten(), 1e-4)
    if f"{run}_inferred" in CASE:
        assert step.chain_labels.argmax(1).tolist() == CASE[f"{run}_inferred"].tolist()
    figures = compute_statistics(state, settings, step)
    assert_close(figures["e_pos"], CASE[f"{run}_e_pos"].mean(), 1e-4)
    assert figures.get("label_ent", 0) == pytest.approx(CASE[f"{run}_label_ent"].item(), abs=1e-5)
    energy = dataclasses.replace(step.energy, temperature=settings.temperature).under(step.chain_labels)
    gradient = compute_input_gradient(energy, step.samples)
    assert figures["x_grad"] == pytest.approx(gradient.abs().mean().item())
    assert compute_share_of_rows(gradient, CASE[f"{run}_x_grad_rows"]) >= 0.5

    # A pixel whose gradient changes sign within rounding moves a whole chain, and with it all that follows.
    share_of_chains = compute_share_of_rows(step.samples, CASE[f"{run}_x_rows"])
    assert share_of_chains >= 0.5
    tolerance = 1e-4 if share_of_chains == 1 else 0.1
    assert_close(step.e_neg, CASE[f"{run}_e_neg"].flatten(), tolerance)
    gradients = {to_tf_name(name): p.grad for name, p in state.model.named_parameters() if p.grad is not None}
    assert_digests_close(gradients, CASE, f"{run}_grad", tolerance)
    assert_close(figures["loss_e"], CASE[f"{run}_loss_energy"].mean(), tolerance)
    if share_of_chains == 1:
        assert_close(step.loss_ml, CASE[f"{run}_loss_ml"].mean(), 1e-4)
        assert_close(step.loss, CASE[f"{run}_loss_total"], 1e-4)
        assert_close(figures["x_off"], CASE[f"{run}_x_off"], 1e-4)
