"""Chains with known answers: quadratic energies in closed form, Gaussians, and the gradient through a whole chain."""

import math

import pytest
import torch

import models
import sampling


def quadratic(curvature):
    return lambda x: 0.5 * curvature * x.square().flatten(1).sum(1)


def test_noise_free_langevin_on_a_quadratic():
    """Breaks when a step is not x − step_lr·gradient: (1 − step_lr·a)^K shrinks the start exactly."""
    x = torch.full((3, 2), 0.8, dtype=torch.float64)
    end = sampling.langevin(quadratic(2.0), x, num_steps=5, step_lr=0.1, noise_std=0.0)
    torch.testing.assert_close(end, x * 0.8**5)


def test_gradient_is_taken_at_the_noised_point():
    """Breaks when the noise comes after the gradient: one step of rate 1 / a lands exactly on 0 only behind it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, dtype=torch.float64)
    end = sampling.langevin(
        quadratic(4.0), x, num_steps=1, step_lr=0.25, noise_std=0.3, bounds=(-9, 9), generator=generator
    )
    torch.testing.assert_close(end, torch.zeros_like(x))


def test_bounds_and_elementwise_clip():
    """Breaks when images leave their range or proj_norm does not bound each element's gradient."""
    x = torch.tensor([[0.5, 0.5]])
    steep = lambda x: (torch.tensor([[100.0, -100.0]]) * x).sum(1)  # noqa: E731
    assert sampling.langevin(steep, x, num_steps=1, step_lr=1.0, noise_std=0.0).tolist() == [[0.0, 1.0]]
    clipped = sampling.langevin(steep, x, num_steps=1, step_lr=1.0, noise_std=0.0, proj_norm=0.25)
    assert clipped.tolist() == [[0.25, 0.75]]


def test_projection_takes_the_place_of_the_bounds():
    """Breaks when a restriction is applied before a step instead of behind it, or the bounds clip besides."""
    x = torch.tensor([[0.5, 0.5]])
    steep = lambda x: (torch.tensor([[100.0, -100.0]]) * x).sum(1)  # noqa: E731
    keep_first = lambda y: torch.stack([x[:, 0], y[:, 1]], 1)  # noqa: E731
    end = sampling.langevin(steep, x, num_steps=2, step_lr=1.0, noise_std=0.0, project=keep_first)
    assert end.tolist() == [[0.5, 200.5]]


def test_l2_clip_is_over_the_whole_tensor():
    """Breaks when the L2 clip works per image, or lengthens a short gradient."""
    gradient = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    torch.testing.assert_close(sampling.clip_gradient(gradient, 1.0, "l2"), gradient / 5)
    assert torch.equal(sampling.clip_gradient(gradient, 10.0, "l2"), gradient)
    with pytest.raises(ValueError, match="proj_norm_type"):
        sampling.clip_gradient(gradient, 1.0, "l1")


def test_stationary_distribution():
    """Breaks when noise or step size are off: the chain's variance is sigma² / (1 − (1 − step·a)²) for a quadratic."""
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(20000, 1)
    end = sampling.langevin(
        quadratic(1.0), x, num_steps=60, step_lr=0.1, noise_std=0.2, bounds=(-9, 9), generator=generator
    )
    # y = x + noise, then x' = (1 − 0.1)·y: the noise, too, is shrunk once.
    expected = 0.2**2 * 0.9**2 / (1 - 0.9**2)
    assert end.var().item() == pytest.approx(expected, rel=0.05)


def test_same_generator_same_images_and_global_state_untouched():
    """Breaks when a chain draws from torch's global generator."""
    state = torch.get_rng_state()
    runs = [
        sampling.langevin(
            quadratic(1.0),
            torch.full((2, 3), 0.5),
            num_steps=3,
            step_lr=0.1,
            generator=torch.Generator().manual_seed(1),
        )
        for _ in range(2)
    ]
    assert torch.equal(*runs)
    assert torch.equal(torch.get_rng_state(), state)


def test_several_energies_take_turns():
    """Breaks when energies are summed or visited in another order, or a round on all is not one step."""
    start, rate, rounds = torch.tensor([[0.9], [0.1]], dtype=torch.float64), 0.1, 7
    (low, a), (high, b) = (0.2, 2.0), (0.7, 4.0)  # centre and curvature of two quadratics
    energies = [lambda x: quadratic(a)(x - low), lambda x: quadratic(b)(x - high)]
    told = []
    end = sampling.langevin(
        energies,
        start,
        num_steps=rounds,
        step_lr=rate,
        noise_std=0.0,
        gradient_first=True,
        after_step=told.append,
    )
    # A step on one is c + (1 − rate·a)·(x − c), so that a round on both shrinks the way to a fixed point.
    p, q = 1 - rate * a, 1 - rate * b
    fixed = (q * (1 - p) * low + (1 - q) * high) / (1 - p * q)
    torch.testing.assert_close(end, fixed + (p * q) ** rounds * (start - fixed))
    for k, images in enumerate(told, start=1):
        torch.testing.assert_close(images, fixed + (p * q) ** k * (start - fixed))
    assert len(told) == rounds


def test_gradient_before_the_noise():
    """Breaks when gradient_first does nothing, or visits share noise: a step of rate 1 / a leaves the noise alone."""
    x = torch.rand(4, 3, dtype=torch.float64)
    draws = torch.Generator().manual_seed(0)
    first, second = (0.3 * torch.randn(4, 3, generator=draws, dtype=torch.float64) for _ in range(2))
    for energies, expected in ((quadratic(4.0), first), ([quadratic(4.0)] * 2, second)):
        end = sampling.langevin(
            energies,
            x,
            num_steps=1,
            step_lr=0.25,
            noise_std=0.3,
            bounds=(-9, 9),
            generator=torch.Generator().manual_seed(0),
            gradient_first=True,
        )
        torch.testing.assert_close(end, expected)


def test_schedules():
    """Breaks when step size or noise is that of another step: each step has its factor, and one alone its noise."""
    x = torch.full((3, 2), 0.8, dtype=torch.float64)
    end = sampling.langevin(quadratic(2.0), x, num_steps=4, step_lr=lambda k: 0.1 * (k + 1), noise_std=0.0)
    torch.testing.assert_close(end, x * 0.8 * 0.6 * 0.4 * 0.2)
    draws = torch.Generator().manual_seed(0)
    noise = [torch.randn(3, 2, generator=draws, dtype=torch.float64) for _ in range(3)]
    end = sampling.langevin(
        quadratic(2.0),
        x,
        num_steps=3,
        step_lr=0.1,
        noise_std=lambda k: [0.0, 0.3, 0.0][k],
        bounds=(-9, 9),
        generator=torch.Generator().manual_seed(0),
    )
    torch.testing.assert_close(end, 0.8**3 * x + 0.8**2 * 0.3 * noise[1])


def test_a_generator_per_image():
    """Breaks when an image's chain depends on the images beside it, or two images share their noise."""
    x = torch.full((4, 2, 3), 0.5)

    def chains(first, last):
        generators = [torch.Generator().manual_seed(seed) for seed in range(first, last)]
        return sampling.langevin(
            [quadratic(1.0), quadratic(3.0)],
            x[first:last],
            num_steps=5,
            step_lr=0.1,
            noise_std=0.1,
            generator=generators,
        )

    together = chains(0, 4)
    assert torch.equal(together, torch.cat([chains(0, 1), chains(1, 4)]))
    assert torch.equal(together, torch.cat([chains(k, k + 1) for k in range(4)]))
    assert len(together.unique(dim=0)) == 4
    with pytest.raises(ValueError, match="zip"):
        sampling.langevin(quadratic(1.0), x, num_steps=1, step_lr=0.1, generator=[torch.Generator()] * 3)


def test_gradient_through_the_chain():
    """Breaks when recomputation changes the gradient of x_K = x_0 (1 − step·a)^K with respect to a."""
    a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x = torch.full((1, 1), 0.9, dtype=torch.float64)
    end = sampling.langevin(quadratic(a), x, num_steps=6, step_lr=0.1, noise_std=0.0, differentiable_in=[a])
    (gradient,) = torch.autograd.grad(end.sum(), a)
    assert gradient.item() == pytest.approx(-0.1 * 6 * 0.9 * 0.8**5)


@pytest.mark.parametrize("gradient_first", [False, True])
def test_recomputed_chain_has_the_gradients_of_a_kept_one(gradient_first):
    """Breaks when recomputing misses noise, clips, walls or dropout, or draws other numbers afterwards.

    The same chain in plain autograd, which keeps all activations, has equal end points and gradients.
    """
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    start = torch.rand(4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    energies = [
        lambda x: torch.nn.functional.dropout(torch.tanh(x @ weight), 0.5).square().sum(1),
        lambda x: torch.sin(3 * x @ weight.T).sum(1),
    ]

    def run_chain(chain):
        torch.manual_seed(0)
        end = chain(torch.Generator().manual_seed(4))
        gradients = torch.autograd.grad(end.square().sum(), (weight, start))
        return end, *gradients, torch.rand(3)

    def keep_all(generator):
        x = start
        for _ in range(3):
            for energy in energies:
                noised = x + 0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
                place = x if gradient_first else noised
                gradient = torch.autograd.grad(energy(place).sum(), place, create_graph=True)[0]
                x = (noised - 0.2 * gradient.clamp(-0.8, 0.8)).clamp(0.0, 1.0)
        return x

    def recompute(generator):
        settings = {"num_steps": 3, "step_lr": 0.2, "noise_std": 0.1, "proj_norm": 0.8}
        return sampling.langevin(
            energies, start, generator=generator, gradient_first=gradient_first, differentiable_in=[weight], **settings
        )

    for ours, theirs in zip(run_chain(recompute), run_chain(keep_all), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_gradient_through_the_chain_to_its_start():
    """Breaks when a differentiable chain forgets where it started: dx_K / dx_0 = (1 − step·a)^K."""
    x = torch.full((2, 1), 0.9, dtype=torch.float64, requires_grad=True)
    end = sampling.langevin(quadratic(2.0), x, num_steps=6, step_lr=0.1, differentiable_in=())
    (gradient,) = torch.autograd.grad(end.sum(), x)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 0.8**6))


def test_frozen_chain_leaves_weights_alone():
    """Breaks when an ordinary chain keeps a graph or fills in gradients of weights."""
    a = torch.tensor(2.0, requires_grad=True)
    end = sampling.langevin(quadratic(a), torch.rand(2, 2), num_steps=2, step_lr=0.1)
    assert not end.requires_grad and a.grad is None


def test_hmc_samples_a_gaussian():
    """Breaks when the Metropolis test uses the wrong sign: variance 1/a, acceptance near the known rate."""
    generator = torch.Generator().manual_seed(0)
    x, rates = torch.zeros(8000, 1), []
    for _ in range(30):
        x, accepted = sampling.hmc(quadratic(4.0), x, step_size=0.3, num_steps=2, generator=generator)
        rates.append(accepted.float().mean().item())
    assert x.var().item() == pytest.approx(0.25, rel=0.06)
    assert 0.8 < sum(rates) / len(rates) < 1.0


def test_leapfrog_conserves_energy_to_second_order():
    """Breaks when a half step is missing: halving the step then no longer quarters the drift."""
    x, v = torch.tensor([[1.0]], dtype=torch.float64), torch.tensor([[0.3]], dtype=torch.float64)
    before = sampling.compute_hamiltonian(quadratic(1.0), x, v)
    drift = []
    for halvings in (0, 1):
        step, count = 0.2 / 2**halvings, 10 * 2**halvings
        after = sampling.compute_hamiltonian(
            quadratic(1.0), *sampling.leapfrog(quadratic(1.0), x, v, step_size=step, num_steps=count - 1)
        )
        drift.append((after - before).abs().item())
    assert math.log2(drift[0] / drift[1]) == pytest.approx(2, abs=0.2)


@pytest.mark.slow
def test_compiled_chain():
    """Breaks when the compiled step differs from the eager one, keeps the first chain's weights or labels, or is
    compiled anew for each chain or for each step size of a schedule."""
    config = models.ModelConfig("MnistNet", (1, 28, 28), num_filters=2, label_size=3)
    x = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    torch._dynamo.utils.counters.clear()
    ends = []
    for seed in range(3):
        model = models.build_model(config, torch.Generator().manual_seed(seed))
        weights, labels = models.spectral_norm_once(model), torch.eye(3)[[seed] * 4]

        def chain(compiled, model=model, weights=weights, labels=labels):
            def energy(x):
                return model.energy(weights, x, labels)

            generator = torch.Generator().manual_seed(1)
            return sampling.langevin(
                energy,
                x,
                num_steps=3,
                step_lr=lambda k: 100.0 / (k + 1),
                proj_norm=0.01,
                generator=generator,
                compiled=compiled,
            )

        ends.append(chain(compiled=True))
        torch.testing.assert_close(ends[-1], chain(compiled=False), rtol=0, atol=1e-5)
    assert not torch.allclose(ends[0], ends[1], rtol=0, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
