"""What only a GPU shows; skipped without one. `make gpu` runs these there."""

import dataclasses
import os

import numpy as np
import pytest
import torch

import data
import models
from conftest import (
    ENVIRONMENT,
    ROOT,
    SMALL_RUN,
    is_same_state,
    load_state,
    make_model,
    make_progress,
    run_python,
    train_on_noise,
)
from ebm.settings import TrainSettings
from ebm.support import hardware, pictures
from ebm.tasks import quality
from ebm.training import acceleration, guard
from ebm.training.acceleration import Acceleration
from ebm.training.chains import run_chains
from ebm.training.state import State
from utils import ClippedAdam, ReplayBuffer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GREY, COLOUR = (1, 28, 28), (3, 32, 32)
PLAIN = TrainSettings(num_steps=5, step_lr=10.0, batch_size=8, zero_kl=True, replay_batch=True)


@pytest.fixture(autouse=True)
def exact_products():
    """Compute in float32 proper, whatever the test before has left behind."""
    hardware.set_tf32(False)


def build_model(network, shape):
    """Return a network that residual branches and labels have an effect on, which they begin without."""
    model = make_model(models.ModelConfig(network, shape, 8, label_size=3))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("c2.weight"):
                parameter.normal_(generator=generator)
            elif name.rpartition(".")[2] in ("g", "gb", "cb"):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model


def make_state(network="MnistNet", shape=GREY, seed=0, **ways):
    """Return the state of a run that is about to begin on the GPU, and fails where a way to be fast does."""
    model = build_model(network, shape).cuda().train()
    return State(
        model=model,
        optimizer=ClippedAdam(model.parameters(), lr=1e-3),
        buffer=ReplayBuffer(100, shape, "cuda"),
        batches=data.Batches(100, 8, seed=0, device="cuda"),
        generator=torch.Generator("cuda").manual_seed(seed),
        acceleration=Acceleration(**ways, asked=frozenset(acceleration.REMEDIES)),
    )


def train(state, iterations=3, settings=PLAIN, seed=1):
    """Train on random images; return the end points of the chains (iterations, 8, C, H, W)."""
    with hardware.allow_tf32(state.acceleration.precision):
        return train_on_noise(state, settings, iterations, seed)


def assert_close(found, expected, tolerance=1e-3):
    """Allow for rounding: single pixels move far where a gradient jumps, most hardly at all."""
    assert (found - expected).abs().median() < tolerance / 10
    assert (found - expected).abs().mean() < tolerance


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("network", "shape"), [("MnistNet", GREY), ("ResNet32", COLOUR)])
def test_captured_chains(network, shape, compiled):
    """Breaks when a replayed chain keeps its first weights, labels, images or noise, or draws noise of its own."""
    expected = train(make_state(network, shape, compiled=compiled))
    captured = train(make_state(network, shape, compiled=compiled, captured=True))
    assert_close(captured, expected)
    assert (captured[0] - captured[1]).abs().mean() > 0.01
    other_noise = train(make_state(network, shape, seed=1, compiled=compiled, captured=True))
    assert (captured - other_noise).abs().mean() > 0.01


def test_the_default_on_a_gpu():
    """Breaks when fp16, compiled and captured, leads chains elsewhere than float32 by more than its rounding."""
    expected = train(make_state("ResNet32", COLOUR), iterations=1)
    found = train(make_state("ResNet32", COLOUR, precision="fp16", compiled=True, captured=True), iterations=1)
    assert found.dtype == torch.float32 and not torch.equal(found, expected)
    assert_close(found, expected, tolerance=0.01)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_precisions(precision):
    """Breaks when lower precision changes where chains go by more than its rounding, or changes nothing."""
    exact = train(make_state(), iterations=1)
    rounded = train(make_state(precision=precision), iterations=1)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    assert (rounded - exact).abs().mean() < 0.01


def test_tf32():
    """Breaks when products round to TF32 where they must be exact, or do not where they may."""
    a, b = torch.randn(2, 1024, 1024, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    image, kernel = a.view(16, 64, 32, 32), b[:64, :576].reshape(64, 64, 3, 3)
    for product in (lambda t: a.to(t) @ b.to(t), lambda t: torch.nn.functional.conv2d(image.to(t), kernel.to(t))):
        exact, errors = product(torch.float64), {}
        for precision in ("float32", "tf32"):
            with hardware.allow_tf32(precision):
                errors[precision] = ((product(torch.float32) - exact).norm() / exact.norm()).item()
        assert errors["float32"] < 1e-5 and 1e-4 < errors["tf32"] < 2e-3


@pytest.mark.parametrize("compiled", [False, True])
def test_dropout_differs_from_replay_to_replay(compiled):
    """Breaks when a graph records one pattern of dropout for good; without noise nothing else is random here."""
    state = make_state("ResNet32Large", COLOUR, compiled=compiled, captured=True)
    settings = dataclasses.replace(PLAIN, noise_scale=0.0, step_lr=1000.0)
    energy, start = models.freeze_energy(state.model), torch.rand(8, *COLOUR, device="cuda")
    ends = [run_chains(state, settings, energy, start, torch.eye(8, 3).cuda())[0] for _ in range(2)]
    assert (ends[0] - ends[1]).abs().max() > 1e-4
    state.model.eval()
    state.acceleration.graph = None
    ends = [run_chains(state, settings, energy, start, torch.eye(8, 3).cuda())[0] for _ in range(2)]
    assert_close(ends[0], ends[1], tolerance=1e-5)


def test_roll_back_and_resume_with_a_captured_chain():
    """Breaks when a graph goes on with the weights or the noise of the state that was given up."""
    state, watch = make_state(captured=True), guard.DivergenceGuard()
    train(state)
    watch.remember(state)
    expected = train(state, seed=2)
    watch.roll_back(state)
    assert_close(train(state, seed=2), expected)
    resumed = make_state(captured=True)
    resumed.load_shared_state(watch.snapshots[-1]["shared"])
    assert resumed.load_worker_state(watch.snapshots[-1]["own"])
    assert_close(train(resumed, seed=2), expected)


def test_a_chain_that_cannot_be_captured_goes_on():
    """Breaks when a recording that breaks off leaves generators, stream or memory unusable, or changes the noise."""

    def chain(weights, x, labels, compiled):
        x = x + torch.randn(x.shape, generator=generator, device="cuda")
        return x + torch.nn.functional.dropout(x * 0 + x.mean().item(), 0.5)  # to wait for the GPU is not allowed

    ends, said = [], []
    for captured in (False, True):
        generator = torch.Generator("cuda").manual_seed(0)
        torch.cuda.manual_seed(0)
        chosen = Acceleration(captured=captured, asked=frozenset(), say=said.append)
        ends.append(
            [chosen.run(chain, {}, torch.ones(4, device="cuda"), None, generator, repeated=True) for _ in "123"]
        )
    assert torch.equal(torch.stack(ends[0]), torch.stack(ends[1]))
    assert len(said) == 1 and "cannot be captured as a CUDA graph" in said[0]
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    held = torch.cuda.memory_reserved()
    spare = torch.empty(2**28, device="cuda")
    del spare
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= held
    assert_close(train(make_state(captured=True)), train(make_state()))


@pytest.mark.parametrize("network", models.NETWORKS)
def test_energies_are_those_of_a_cpu(network):
    """Breaks when a network computes otherwise on a GPU than on the CPU, where the golden cases hold."""
    shape = {"MnistNet": GREY, "DspritesNet": (1, 64, 64), "ResNet128": (3, 128, 128)}.get(network, COLOUR)
    model = build_model(network, shape).eval()
    images, labels = torch.rand(4, *shape, generator=torch.Generator().manual_seed(1)), torch.eye(3)[[0, 1, 2, 0]]
    with torch.no_grad():
        expected = model(images, labels)
        found = model.cuda()(images.cuda(), labels.cuda()).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_same_seed_same_images_whatever_the_batch_size():
    """Breaks when noise drawn on the GPU belongs to the batch instead of the image."""
    model = models.build_model(models.ModelConfig("MnistNet", GREY, 4, label_size=3)).cuda()
    energy, labels = models.freeze_energy(model), torch.eye(3, device="cuda").repeat(4, 1)
    settings = {"num_steps": 3, "step_lr": 10.0, "progress": make_progress()}
    whole, parts = (quality.draw_fresh_images(energy, labels, model, batch_size=n, **settings) for n in (12, 5))
    assert (whole.int() - parts.int()).abs().float().mean() < 0.1
    assert (whole[0] != whole[3]).any()


# ---- train.py ----


def run(logdir, *flags, launcher=(), status=0):
    """Run train.py and return what it printed."""
    result = run_python(*launcher, ROOT / "train.py", f"--logdir={logdir}", *SMALL_RUN, *flags, cwd=logdir)
    assert (result.returncode == 0) == (status == 0), result.stdout + result.stderr
    return result.stdout + result.stderr


def test_a_run_from_end_to_end(tmp_path):
    """Breaks when a GPU is not used as fast as it can be by default, or a run there does not end or go on."""
    printed = run(tmp_path, "--exp=run", "--max_iter=20", "--test_interval=10", "--quality")
    assert "energies in fp16 in chains" in printed
    assert ", steps compiled, a chain launched as one CUDA graph" in printed
    assert "note: the" not in printed  # nothing was given up
    assert "device: cuda" in printed and (tmp_path / "run" / "samples_20.png").exists()
    run(tmp_path, "--exp=run", "--max_iter=22", "--resume_iter=latest")
    run(tmp_path, "--exp=kl", "--max_iter=2", "--nozero_kl")


def test_deterministic_runs_resume_bit_for_bit(tmp_path):
    """Breaks when --deterministic gives other bits in another run, or after a resume, or stops at what has none."""
    for number in range(40):
        path = tmp_path / "images" / f"class_{number % 2}" / f"{number}.png"
        pictures.save_pixels(np.random.default_rng(number).integers(256, size=(32, 32, 3), dtype=np.uint8), path)
    flags = ["--dataset=folder", f"--data_path={tmp_path / 'images'}", "--image_size=32", "--channels=3", "--augment"]
    flags += ["--large_model", "--deterministic", "--save_interval=5", "--test_interval=5", "--quality"]
    run(tmp_path, "--exp=whole", "--max_iter=10", *flags)
    run(tmp_path, "--exp=halves", "--max_iter=5", *flags)
    run(tmp_path, "--exp=halves", "--max_iter=10", "--resume_iter=latest", *flags)
    assert is_same_state(
        load_state(tmp_path / "whole" / "model_10.pt"), load_state(tmp_path / "halves" / "model_10.pt")
    )


def test_a_checkpoint_moves_to_a_gpu_and_back(tmp_path):
    """Breaks when generators' states, which do not fit there, end a run that goes on on another device."""
    run(tmp_path, "--exp=moves", "--device=cpu", "--max_iter=2")
    for device, last in (("cuda", 4), ("cpu", 6)):
        flags = [f"--device={device}", f"--max_iter={last}", "--nocompile", "--resume_iter=latest"]
        assert "the noise starts anew" in run(tmp_path, "--exp=moves", *flags)
    assert load_state(tmp_path / "moves" / "model_6.pt")["iteration"] == 6


def test_two_ranks_on_one_gpu_are_refused(tmp_path, monkeypatch):
    """Breaks when two workers share a GPU without a word, though each sees but one."""
    monkeypatch.setitem(ENVIRONMENT, "CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc_per_node=2"]
    printed = run(tmp_path, "--exp=two", "--max_iter=2", "--backend=torch", launcher=launcher, status=1)
    assert "ranks 0 and 1 would share one GPU" in printed
