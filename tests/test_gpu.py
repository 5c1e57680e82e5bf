"""What only a GPU shows; skipped without one."""

import dataclasses

import pytest
import torch

import data
import models
import sampling
import training
from optimizer import ClippedAdam
from training import Options
from utils import ReplayBuffer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPE = (1, 28, 28)
PLAIN = Options(num_steps=5, step_lr=10.0, batch_size=8, zero_kl=True, replay_batch=True)


@pytest.fixture(autouse=True)
def precision():
    """Leave float32 products as they were."""
    yield
    sampling.set_precision("float32")


def samples_of(options, iterations=3, seed=0):
    """Return the end points (iterations, 8, 1, 28, 28) of a run's chains."""
    sampling.set_precision(options.precision)
    model = models.build_model(models.ModelConfig("MnistNet", SHAPE, 8, label_size=3), torch.Generator().manual_seed(0))
    model.cuda().train()
    state = training.State(
        model=model,
        optimizer=ClippedAdam(model.parameters(), lr=1e-3),
        buffer=ReplayBuffer(100, SHAPE, "cuda"),
        batches=data.Batches(100, 8, seed=0, device="cuda"),
        generator=torch.Generator("cuda").manual_seed(seed),
    )
    draws, ends = torch.Generator("cuda").manual_seed(1), []
    for _ in range(iterations):
        images = torch.rand(8, *SHAPE, generator=draws, device="cuda")
        labels = torch.eye(3, device="cuda")[torch.randint(3, (8,), generator=draws, device="cuda")]
        ends.append(training.train_step(state, options, images, labels, lambda: None).samples)
    return torch.stack(ends)


@pytest.mark.parametrize("compiled", [False, True])
def test_captured_chains(compiled):
    """Breaks when a replayed chain keeps its first weights, labels, images or noise, or draws noise of its own."""
    options = dataclasses.replace(PLAIN, compile=compiled)
    expected = samples_of(options)
    captured = samples_of(dataclasses.replace(options, cuda_graph=True))
    assert (captured - expected).abs().median() < 1e-5
    assert (captured - expected).abs().mean() < 1e-3
    assert (captured[0] - captured[1]).abs().mean() > 0.01
    assert (captured - samples_of(dataclasses.replace(options, cuda_graph=True), seed=1)).abs().mean() > 0.01


@pytest.mark.parametrize("precision", ["tf32", "fp16", "bf16"])
def test_precisions(precision):
    """Breaks when lower precision changes where chains go by more than its rounding, or changes nothing."""
    exact = samples_of(PLAIN, iterations=1)
    rounded = samples_of(dataclasses.replace(PLAIN, precision=precision), iterations=1)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().mean() < 0.01
    assert precision == "tf32" or not torch.equal(rounded, exact)  # small products may do without TF32


@pytest.mark.parametrize("network", models.NETWORKS)
def test_energies_are_those_of_a_cpu(network):
    """Breaks when a network computes otherwise on a GPU than on the CPU, where the golden cases hold."""
    shape = {"MnistNet": SHAPE, "DspritesNet": (1, 64, 64), "ResNet128": (3, 128, 128)}.get(network, (3, 32, 32))
    model = models.build_model(models.ModelConfig(network, shape, 8), torch.Generator().manual_seed(0)).eval()
    images = torch.rand(4, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(images)
        found = model.cuda()(images.cuda()).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
