"""The networks, chains, losses, gradients and the optimizer against results of the reference graph itself.

The files of tests/golden hold what the TensorFlow 1 graph computed; weights and inputs come from seeds (recipe.py).
"""

import numpy as np
import pytest
import torch

import checkpoint
import sampling
from conftest import GOLDEN
from ebm.settings import TrainSettings
from golden import recipe
from golden_cases import assert_close, assert_digests_close, build_network, compute_gradients, to_ours, to_theirs
from models import WeightForm, detach
from train import contrastive_loss
from utils import ClippedAdam

CASES = sorted(path.stem for path in GOLDEN.glob("*.npz") if "net" in path.stem or path.stem[:5] in ("mnist", "dspri"))
CASES = [case for case in CASES if case != "dsprites_frames"]


def load_case(name):
    """Return the golden case, its model with the weights loaded, and images and labels in our layout."""
    case, variables, x, labels, x_pos = recipe.load(GOLDEN / f"{name}.npz")
    settings = recipe.json.loads(str(case["config"]))
    flags = settings.get("flags", {})
    height, width, *channels = settings["shape"]
    label_size = settings.get("classes", 1) if flags.pop("cclass", False) else 0
    shape = (*(channels or [1]), height, width)
    model = build_network(
        settings["net"],
        variables,
        num_filters=settings["kw"]["num_filters"],
        label_size=label_size,
        image_shape=shape,
        **flags,
    )
    labels = torch.from_numpy(labels) if label_size else None
    return case, settings, model, to_ours(x), labels, to_ours(x_pos)


@pytest.mark.parametrize(
    ("name", "fold"), [(name, True) for name in CASES] + [(name, False) for name in ("resnet32", "resnet32_cclass")]
)
def test_network(name, fold):
    """Breaks when any layer, its padding, activation, normalisation or the chain departs from the reference."""
    case, settings, model, x, labels, x_pos = load_case(name)
    differentiable = model.prepare(form=WeightForm(fold=fold, patches=fold), update_u=True)
    frozen = detach(differentiable)
    chain = {
        "num_steps": settings.get("steps", 5),
        "step_lr": settings.get("step_lr", 10.0),
        "proj_norm": settings.get("proj_norm", 0.01),
        "noise_std": 0.0,
    }

    assert_close(model.energy(frozen, x, labels), case["energy"])
    gradient = sampling.compute_input_gradient(lambda x: model.energy(frozen, x, labels), x)
    samples = sampling.langevin(lambda x: model.energy(frozen, x, labels), x, **chain)
    if settings.get("store_x", True):
        assert_close(to_theirs(gradient), case["grad_x"], 1e-3)
        assert_close(to_theirs(samples), case["x_chain"], 1e-3)
    else:
        assert_close(gradient.flatten(1).norm(dim=1), case["grad_x_norm"])
        assert_close(samples.sum(dim=(1, 2, 3)), case["x_chain_sum"])
        assert_close(samples.square().sum(dim=(1, 2, 3)), case["x_chain_sq"])

    e_pos, e_neg = model.energy(differentiable, x_pos, labels), model.energy(differentiable, samples, labels)
    likelihood, regulariser = contrastive_loss(e_pos, e_neg, TrainSettings())
    assert_close((likelihood + regulariser).item(), case["loss_cd"])
    assert_digests_close(compute_gradients(model, likelihood + regulariser), case, "grad_cd")

    chain["differentiable_in"] = differentiable.values()
    through = sampling.langevin(lambda x: model.energy(differentiable, x, labels), x, **chain)
    kl = model.energy(frozen, through, labels).mean()
    assert_close(kl.item(), case["loss_kl"])
    assert_digests_close(compute_gradients(model, likelihood + regulariser + kl), case, "grad_cd_kl")

    state = model.state_dict()
    ours = {checkpoint.to_tf_name(key): value for key, value in state.items() if key.endswith(".u")}
    for name, first, norm in zip(case["u_names"], case["u_first"], case["u_norm"], strict=True):
        if str(name) in ours:
            assert_close(ours[str(name)].flatten()[0], first)
            assert_close(ours[str(name)].norm(), norm)


def test_optimizer():
    """Breaks when the clip uses another second moment, or epsilon moves inside the bias correction."""
    case = np.load(GOLDEN / "adam_clip.npz")
    parameter = torch.nn.Parameter(torch.zeros(case["grads"].shape[1]))
    optimizer = ClippedAdam([parameter])
    for gradient, expected in zip(case["grads"], case["params"], strict=True):
        parameter.grad = torch.from_numpy(gradient.astype(np.float32))
        optimizer.step()
        np.testing.assert_allclose(parameter.detach(), expected, rtol=1e-5, atol=1e-8)


def test_leapfrog():
    """Breaks when the order or the number of half and full steps changes."""
    case = np.load(GOLDEN / "hmc_leapfrog.npz")
    curvature = torch.tensor([2.0, 0.5])

    def energy(x):
        return (0.5 * curvature * x.square()).flatten(1).sum(1)

    x0, v0 = torch.from_numpy(case["x0"]).float(), torch.from_numpy(case["v0"]).float()
    x, v = sampling.leapfrog(energy, x0, v0, step_size=0.2, num_steps=7)
    np.testing.assert_allclose(x, case["x"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(v, case["v"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sampling.compute_hamiltonian(energy, x0, v0), case["h0"], rtol=1e-5)
    np.testing.assert_allclose(sampling.compute_hamiltonian(energy, x, v), case["h1"], rtol=1e-5)
