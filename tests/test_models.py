"""Networks: what the golden cases do not cover. Padding, folding, initial values, shapes of the whole registry."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

import checkpoint
import models
from conftest import make_model
from ebm.support.errors import UsageError
from models import ModelConfig

SHAPES = {"MnistNet": (1, 28, 28), "DspritesNet": (1, 64, 64), "ResNet128": (3, 128, 128)}
CONFIGS = [
    ModelConfig(network, image_shape=SHAPES.get(network, (3, 32, 32)), num_filters=4, label_size=label_size)
    for network in models.NETWORKS
    for label_size in (0, 3)
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.network}-{c.label_size}")
def test_registry(config):
    """Breaks when a network does not give one finite energy per image, or a state does not survive a round trip."""
    model = make_model(config)
    images = torch.rand(2, *config.image_shape, requires_grad=True)
    labels = torch.eye(3)[:2] if config.label_size else None
    energies = model(images, labels)
    assert energies.shape == (2,)
    gradient = torch.autograd.grad(energies.sum(), images)[0]
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    twin = make_model(config, seed=1).eval()
    assert not torch.equal(twin(images, labels), energies)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(images, labels), model.eval()(images, labels))


def test_labels_matter_and_are_checked():
    """Breaks when a conditional network ignores its label, or takes labels of another width."""
    model = make_model(CONFIGS[3])
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, models.Conv) and layer.gb is not None:
                layer.gb.normal_(generator=torch.Generator().manual_seed(0))
    images = torch.rand(2, *CONFIGS[3].image_shape)
    assert not torch.allclose(model(images, torch.eye(3)[[0, 0]]), model(images, torch.eye(3)[[1, 1]]))
    with pytest.raises(ValueError, match="labels of shape"):
        model(images, torch.eye(4)[:2])
    with pytest.raises(ValueError, match="labels of shape None"):
        model(images)
    with pytest.raises(ValueError, match="images of shape"):
        model(images[:, :, 1:], torch.eye(3)[:2])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.network}-{c.label_size}")
def test_frozen_weights_do_not_follow_an_update(config):
    """Breaks when frozen weights share memory with parameters: an update would then change what a chain descends."""
    model = make_model(dataclasses.replace(config, spec_norm=False))
    frozen = models.detach(model.prepare())
    before = {name: tensor.clone() for name, tensor in frozen.items()}
    with torch.no_grad():
        torch._foreach_add_(list(model.parameters()), 1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen.items())


@pytest.mark.parametrize("config", [CONFIGS[1], CONFIGS[3], CONFIGS[5]], ids=lambda c: c.network)
def test_energies_of_bound_images(config, monkeypatch):
    """Breaks when energies or their slopes over labels are others where the first stages are computed once.

    In DspritesNet a label then takes the last three of its five convolutions.
    """
    model, convolved, convolve = make_model(config).double().eval(), [], models.Conv.convolve
    with torch.no_grad():
        for layer in model.modules():
            for table in (getattr(layer, "gb", None), getattr(layer, "cb", None)):
                if table is not None:
                    table.normal_(generator=torch.Generator().manual_seed(0))
    images = torch.rand(2, *config.image_shape, dtype=torch.float64)
    energy = models.PreparedEnergy(model, models.detach(model.prepare()), rescale=2.0, temperature=3.0)
    labels = torch.rand(6, 3, dtype=torch.float64, requires_grad=True)
    expected = energy(images.repeat_interleave(3, 0), labels)
    bound = energy.at(images)
    monkeypatch.setattr(models.Conv, "convolve", lambda *inputs: convolved.append(1) or convolve(*inputs))
    found = bound(labels)
    torch.testing.assert_close(found, expected)
    slopes = (torch.autograd.grad(energies.sum(), labels)[0] for energies in (found, expected))
    torch.testing.assert_close(*slopes)
    assert config.network != "DspritesNet" or len(convolved) == 3


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [(28, 4, 2, (1, 1)), (7, 4, 2, (1, 2)), (32, 3, 1, (1, 1)), (7, 4, 1, (1, 2))],
)
def test_same_padding(size, kernel, stride, padding):
    """Breaks when the odd pixel of TensorFlow's SAME padding moves to the front."""
    assert models.compute_same_padding(size, kernel, stride) == padding


@pytest.mark.parametrize("size", [8, 7])
def test_folded_pooling(size):
    """Breaks when the folded 4x4 kernel is not the 3x3 convolution followed by average pooling, odd sizes included."""
    x, kernel = torch.randn(2, 3, size, size, dtype=torch.float64), torch.randn(5, 3, 3, 3, dtype=torch.float64)
    pooled = F.avg_pool2d(F.conv2d(x, kernel, padding=1), 2)
    torch.testing.assert_close(F.conv2d(x, models.fold_average_pooling(kernel), stride=2, padding=1), pooled)


def test_spectral_norm_converges():
    """Breaks when the power iteration's norm is not the largest singular value, or the lower bound is lost."""
    config = ModelConfig("ResNet32", (3, 32, 32), num_filters=8, spec_iter=200)
    model = make_model(config)
    with torch.no_grad():
        model.stages["res_1"].c2.weight.normal_(generator=torch.Generator().manual_seed(3))
    block = model.stages["res_1"]
    for layer in (block.c1, block.c2):
        assert torch.linalg.matrix_norm(layer.normalize_weight(False).flatten(1), 2).item() == pytest.approx(
            1, abs=1e-3
        )
    with torch.no_grad():
        block.c2.weight.mul_(1e-3)
    sigma = torch.linalg.matrix_norm(block.c2.weight.flatten(1), 2).item()
    assert torch.linalg.matrix_norm(block.c2.normalize_weight(False).flatten(1), 2).item() == pytest.approx(
        sigma, rel=1e-3
    )


def test_u_is_written_back_only_when_asked():
    """Breaks when evaluating a model changes it, or training leaves the power iteration where it was."""
    model = make_model(CONFIGS[0])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    models.spectral_norm_once(model)
    model(torch.rand(1, *CONFIGS[0].image_shape))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    model.prepare(update_u=True)
    assert not torch.equal(before["stages.c1.u"], model.state_dict()["stages.c1.u"])


def test_initial_values():
    """Breaks when a network starts elsewhere than the reference's: N(0, 1), 1e-10, Glorot, ones, zeros."""
    state = make_model(
        ModelConfig("ResNet32", (3, 32, 32), num_filters=32, label_size=10, use_attention=True)
    ).state_dict()
    assert state["stages.res_1.c1.weight"].std().item() == pytest.approx(1, abs=0.05)
    assert state["stages.res_1.c2.weight"].std().item() == pytest.approx(1e-10, rel=0.05)
    assert state["stages.fc5.weight"].abs().max() <= (6 / (64 + 1)) ** 0.5
    assert state["stages.fc5.weight"].std().item() == pytest.approx((2 / (64 + 1)) ** 0.5, rel=0.3)
    assert (state["stages.res_1.c2.g"] == 1).all()
    zeros = ("stages.res_1.c2.gb", "stages.res_1.c2.cb", "stages.fc5.b", "stages.atten.gamma")
    assert not any(state[name].any() for name in zeros)


@pytest.mark.parametrize("config", CONFIGS[:4], ids=lambda c: f"{c.network}-{c.label_size}")
def test_downsample(config):
    """Breaks when --downsample changes the sizes that the dense layers expect."""
    model = make_model(dataclasses.replace(config, downsample=True))
    assert model(torch.rand(2, *config.image_shape), torch.eye(3)[:2] if config.label_size else None).shape == (2,)


def test_dropout_is_only_where_the_reference_has_it():
    """Breaks when another network than ResNet32Large draws masks in training, or that one in evaluation."""
    for config in CONFIGS:
        model = make_model(config).train()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("c2.weight"):
                    parameter.normal_(generator=torch.Generator().manual_seed(0))
        images, labels = torch.rand(2, *config.image_shape), torch.eye(3)[:2] if config.label_size else None
        torch.manual_seed(0)
        same = torch.equal(model(images, labels), model(images, labels))
        assert same == (config.network != "ResNet32Large"), config.network
        model.eval()
        assert torch.equal(model(images, labels), model(images, labels))


def test_tf_variables_are_strict():
    """Breaks when a missing or misshapen TF1 variable is passed over, or a surplus one is not reported."""
    model = make_model(CONFIGS[0])
    arrays = {}
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if name.endswith(".weight"):
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        arrays[checkpoint.to_tf_name(name)] = array
    assert checkpoint.load_tf_variables(
        make_model(CONFIGS[0], 1), {**arrays, "context_0/c1/b": arrays["context_0/fc5/b"]}
    ) == ["context_0/c1/b"]
    with pytest.raises(UsageError, match="lacks context_0/fc5/b"):
        checkpoint.load_tf_variables(model, {k: v for k, v in arrays.items() if k != "context_0/fc5/b"})
    with pytest.raises(UsageError, match="context_0/c1/cweight has shape"):
        checkpoint.load_tf_variables(
            model, {**arrays, "context_0/c1/cweight": arrays["context_0/c1/cweight"][:, :, :1]}
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.05), (torch.bfloat16, 0.2)])
def test_half_precision(dtype, tolerance):
    """Breaks when half-precision weights are not used, leave energies in 16 bits, or lose the gradient."""
    model = make_model(ModelConfig("DspritesNet", (1, 64, 64), num_filters=8, label_size=3))
    images, labels = torch.rand(4, 1, 64, 64), torch.eye(3)[[0, 1, 2, 0]]
    gradients = []
    for weights in (models.spectral_norm_once(model), models.spectral_norm_once(model, dtype)):
        x = images.clone().requires_grad_()
        energies = model.energy(weights, x, labels)
        gradients.append(torch.autograd.grad(energies.sum(), x)[0])
        assert energies.dtype == gradients[-1].dtype == torch.float32
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert 1e-5 < error < tolerance
