"""The networks, chains, losses, gradients and the optimizer against results of the reference graph itself.

The files of tests/golden hold what the TensorFlow 1 graph computed; weights and inputs come from seeds (recipe.py).
"""

import zlib

import numpy as np
import pytest
import torch

import checkpoint
import models
import sampling
from conftest import GOLDEN
from ebm.settings import TrainSettings
from golden import recipe
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
    label_size = settings.get("classes", 1) if flags.get("cclass") else 0
    config = models.ModelConfig(
        settings["net"],
        image_shape=(*(channels or [1]), height, width),
        num_filters=settings["kw"]["num_filters"],
        label_size=label_size,
        **{key: value for key, value in flags.items() if key != "cclass"},
    )
    model = models.build_model(config).eval()
    checkpoint.load_tf_variables(model, variables)

    def ours(images):
        images = torch.from_numpy(images)
        return (images[..., None] if images.dim() == 3 else images).permute(0, 3, 1, 2).contiguous()

    return case, settings, model, ours(x), torch.from_numpy(labels) if label_size else None, ours(x_pos)


def theirs(images):
    """Images (N, C, H, W) in the reference's layout, (N, H, W[, C])."""
    images = images.detach().permute(0, 2, 3, 1)
    return images.squeeze(3) if images.shape[3] == 1 else images


def assert_close(actual, expected, tolerance=2e-4):
    """Compare relative to the size of the whole array: single gradients jump where a leaky ReLU changes sign."""
    actual, expected = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_network(name, fold):
    """Breaks when any layer, its padding, activation, normalisation or the chain departs from the reference."""
    case, settings, model, x, labels, x_pos = load_case(name)
    differentiable = model.prepare(fold=fold, update_u=True)
    frozen = models.detach(differentiable)
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
        assert_close(theirs(gradient), case["grad_x"], 1e-3)
        assert_close(theirs(samples), case["x_chain"], 1e-3)
    else:
        assert_close(gradient.flatten(1).norm(dim=1), case["grad_x_norm"])
        assert_close(samples.sum(dim=(1, 2, 3)), case["x_chain_sum"])
        assert_close(samples.square().sum(dim=(1, 2, 3)), case["x_chain_sq"])

    e_pos, e_neg = model.energy(differentiable, x_pos, labels), model.energy(differentiable, samples, labels)
    likelihood, regulariser = contrastive_loss(e_pos, e_neg, TrainSettings())
    assert_close((likelihood + regulariser).item(), case["loss_cd"])
    check_gradients(model, likelihood + regulariser, case, "grad_cd")

    through = sampling.langevin(lambda x: model.energy(differentiable, x, labels), x, differentiable=True, **chain)
    kl = model.energy(frozen, through, labels).mean()
    assert_close(kl.item(), case["loss_kl"])
    check_gradients(model, likelihood + regulariser + kl, case, "grad_cd_kl")

    state = model.state_dict()
    ours = {checkpoint.to_tf_name(key): value for key, value in state.items() if key.endswith(".u")}
    for name, first, norm in zip(case["u_names"], case["u_first"], case["u_norm"], strict=True):
        if str(name) in ours:
            assert_close(ours[str(name)].flatten()[0], first)
            assert_close(ours[str(name)].norm(), norm)


def check_gradients(model, loss, case, key):
    """Compare each variable's gradient by its norm and its projection on a fixed random direction."""
    names = [checkpoint.to_tf_name(name) for name, _ in model.named_parameters()]
    gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
    ours = {name: gradient for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
    assert set(ours) == {str(name) for name in case[f"{key}_names"]}
    negligible = 1e-6 * max(case[f"{key}_norm"])  # the gradient of a key's bias is zero but for rounding
    for name, norm, dot in zip(case[f"{key}_names"], case[f"{key}_norm"], case[f"{key}_dot"], strict=True):
        gradient = to_tf_layout(str(name), ours[str(name)])
        direction = np.random.RandomState(zlib.crc32(str(name).encode())).standard_normal(gradient.shape)
        assert abs(np.linalg.norm(gradient) - norm) <= 1e-3 * norm + negligible, name
        assert abs((gradient * direction).sum() - dot) <= 3e-3 * norm + negligible, name


def to_tf_layout(name, gradient):
    array = gradient.detach().double().numpy()
    if name.endswith("weight"):
        return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return array[0] if array.ndim == 2 and array.shape[0] == 1 else array


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
