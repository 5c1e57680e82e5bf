"""Task mixing: whether chains of a trained energy, of Langevin dynamics or of MALA, forget where they started."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data import find_class
from ebm.support import metrics, pictures
from ebm.support.hardware import allow_tf32
from ebm.support.interruption import Interruption
from ebm.support.progress import Progress, show_waiting
from ebm.support.sharing import derive_seed
from ebm.tasks.sandbox_run import ROWS, Report, SandboxRun
from sampling import draw_hmc_move, evaluate_mala_state, langevin, make_mala_move

CHAINS = 8  # usual number of chains from new starts, and as many from test images
PROJECTIONS = 3  # random directions along which images are followed
QUANTITIES = ("energy", "mean pixel", *(f"projection {k + 1}" for k in range(PROJECTIONS)))  # of each image, each step
STAGES = 100  # parts of the chains between which a signal can end them
SHOWN_STAGES = (1, 10, 100)  # after which images are shown
WARM_UP = 5  # the first fifth of the steps is not judged; MALA finds its step size there
WISHED_RATE = 0.574  # share of accepted moves at which MALA is fastest in many dimensions (Roberts & Rosenthal 1998)
MOST_NOISE = 0.2  # the largest noise of a move, a fifth of the box, see `make_mala_move`
SLOWEST_TUNING = 0.1  # least change of the logarithm of MALA's step size by a move
LEAST_DRAWS = 8  # steps that R-hat needs after the warm-up
MOST_EXAMPLES = 2_000  # test images among which those of a class are looked for
# Vehtari et al. (2021) ask for an R-hat below 1.01 and 400 effective samples; 1.1 was the usual limit before.
MIXED_RHAT, MIXED_ESS, STUCK_RHAT = 1.01, 400, 1.1
DRAWN_POINTS, RATE_POINTS = 300, 40  # of a line in the plot, and of one of acceptance

Watch: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # images and labels of n chains -> (n, len(QUANTITIES))


class ChainTraces(NamedTuple):
    """What N chains went through in S steps."""

    values: Tensor  # (N, S + 1, len(QUANTITIES)), at the start and after each step
    accepted: Tensor  # (N, S), 1 for an accepted step, else 0; all steps of Langevin dynamics are
    scale: Tensor  # (N,), the factor of MALA's step size at the end
    shown: dict[int, Tensor]  # number of steps -> the images (N, C, H, W) after it


def measure_mixing(run: SandboxRun) -> Report:
    """Run long chains of one class from new starts and from test images: R-hat, effective samples, autocorrelation."""
    settings = run.settings
    number = run.choose_number(CHAINS)
    labels, images = choose_condition(run, number)
    starts = {"starts": run.draw_starts(labels), "images": images}
    factor = compute_energy_factor(run)
    moves = {"langevin": "Langevin steps", "mala": "moves of MALA"}[settings.sampler]
    title = run.describe_labels(labels[:1])
    print(
        f"work: {settings.chain_steps:,} {moves} of {2 * number:,} chains, from {number:,} new starts and as many test "
        f"images{f', class {title[0]}' if title else ''}; density exp(−{factor:.3g}·E) in the box [0, 1]",
        flush=True,
    )
    traces = follow_mixing(run, torch.cat(list(starts.values())), labels.repeat(2, 1))
    values = run.write_array("traces", traces.values)
    kept = values[:, 1 + count_warm_up(settings.chain_steps) :]
    with show_waiting(f"comparing {len(kept):,} chains of {kept.shape[1]:,} steps"):
        figures = {name: metrics.measure_chains(kept[..., k]) for k, name in enumerate(QUANTITIES)}
    verdict = judge_mixing(figures, kept[..., 0].size)
    with show_waiting("plotting energies and autocorrelations"):
        plot_mixing(run, traces, f"{settings.sampler}: {verdict}")
    columns = {f"{name}, {k}": x.chunk(2)[i][:ROWS] for i, name in enumerate(starts) for k, x in traces.shown.items()}
    run.write_panel("images", columns, note="chains from new starts and from test images, after so many steps")
    rows = {
        name: {
            "R-hat": one.rhat,
            "effective samples": one.ess,
            "steps per sample": one.tau,
            "from starts": float(kept[:number, :, k].mean()),
            "from images": float(kept[number:, :, k].mean()),
            "test images": float(values[number:, 0, k].mean()),
        }
        for k, (name, one) in enumerate(figures.items())
    }
    found = {"verdict": verdict, "factor of the energy": factor}
    if settings.sampler == "mala":
        rate = traces.accepted[:, count_warm_up(settings.chain_steps) :].mean().item()
        noise = settings.noise_scale * traces.scale.sqrt().median().item()
        found |= {"accepted": rate, "median noise of a move": noise}
    return Report({**found, **rows})


def compute_energy_factor(run: SandboxRun) -> float:
    """Return the factor β of the energy in the density exp(−β·E) of the chains, images being in [0, 1].

    Langevin steps sample it approximately: β is 2·step_lr / noise². The step size is that for gradients with respect to
    images in [0, 1], as in `ExaminedModel.run_round`.
    """
    return 2 * run.model.step_lr / run.model.rescale / run.settings.noise_scale**2


def count_warm_up(steps: int) -> int:
    """Return how many of the steps that were wanted come before those that are judged."""
    return steps // WARM_UP


def choose_condition(run: SandboxRun, number: int) -> tuple[Tensor, Tensor]:
    """Return labels (number, label_size), all equal, and test images (number, C, H, W) from which chains start.

    Chains under different labels have different densities, so that they could not be compared. If the labels are
    classes, the class is `label`, and the images are of this class, as far as there are enough of it.
    """
    names, classes, word = run.find_class_names(), run.model.classes, run.settings.label
    chosen = 0 if word is None else find_class("label", word, names, classes if names else 0)
    examples = run.draw_examples("test", max(number, min(4 * number * max(classes, 1), MOST_EXAMPLES)))
    if names:
        order = (examples.classes != chosen).to(torch.int8).argsort(stable=True)
        label = torch.eye(classes, device=run.model.device)[chosen]
    else:
        order, label = torch.arange(len(examples.images), device=run.model.device), examples.labels[0]
    place = torch.arange(number, device=run.model.device) % len(order)  # from the first again if there are too few
    return label.expand(number, -1), examples.images[order[place]]


def follow_mixing(run: SandboxRun, x: Tensor, labels: Tensor) -> ChainTraces:
    """Run chains from images x (N, C, H, W) under labels (N, label_size) and record them.

    After a signal, the stage that is not complete is left out; Interruption is raised if too few steps remain.
    """
    model, steps, watch = run.model, run.settings.chain_steps, make_watch(run)
    length = math.ceil(steps / STAGES)
    bar, quiet = Progress(steps * len(x), what="chain step"), Progress(0, what="starts", quiet=True)
    with torch.no_grad():
        first_values = model.compute_in_batches(lambda part: watch(x[part], labels[part]), len(x), quiet)
    model.require_all()
    values, accepted, shown, scale = [first_values[:, None]], [], {0: x}, x.new_ones(len(x))
    for stage, first in enumerate(range(0, steps, length), start=1):
        last = min(first + length, steps)
        run_part = functools.partial(run_mixing_stage, run, watch, x, labels, scale, range(first, last), bar)
        try:
            packed = model.compute_in_batches(run_part, len(x), bar, rounds=last - first)
            model.require_all()
        except Interruption:
            if first < count_warm_up(steps) + LEAST_DRAWS:
                raise
            model.workers.unfinished.clear()  # of the stage that is left out
            model.workers.note_part("steps", first, steps)
            break
        end, scale, recorded = packed.split([x[0].numel(), 1, (last - first) * (len(QUANTITIES) + 1)], 1)
        x, scale, recorded = end.view_as(x), scale[:, 0], recorded.view(len(x), last - first, -1)
        values.append(recorded[..., :-1])
        accepted.append(recorded[..., -1])
        if stage in SHOWN_STAGES:
            shown[last] = x
    bar.close()
    traces = ChainTraces(torch.cat(values, 1), torch.cat(accepted, 1), scale, shown)
    shown.setdefault(traces.accepted.shape[1], x)
    return traces


def make_watch(run: SandboxRun) -> Watch:
    """Return the function that measures the QUANTITIES of images. The random directions are those of the seed."""
    pixels = math.prod(run.config.image_shape)
    generator = torch.Generator().manual_seed(derive_seed(run.settings.seed, 1))
    directions = F.normalize(torch.randn(PROJECTIONS, pixels, generator=generator), dim=1)
    weights = torch.cat([torch.full((1, pixels), 1 / pixels), directions]).T.to(run.model.device)
    return lambda x, labels: torch.cat([run.model.energy(x, labels)[:, None], x.flatten(1) @ weights], 1)


def run_mixing_stage(
    run: SandboxRun, watch: Watch, x: Tensor, labels: Tensor, scale: Tensor, steps: range, bar: Progress, part: slice
) -> Tensor:
    """Return, for a part of the chains, what a stage of these steps leads to, packed into a row for each chain.

    A row has the image at the end, the factor of MALA's step size, and for each step the QUANTITIES and whether it was
    accepted. x, labels, scale: of all chains, at the beginning of the stage.
    """
    x, labels, scale = x[part], labels[part], scale[part]
    rows: list[Tensor] = []

    def record(x: Tensor, is_accepted: Tensor) -> None:
        with torch.no_grad():
            rows.append(torch.cat([watch(x, labels), is_accepted.to(x.dtype)[:, None]], 1))
        if len(rows) < len(steps):  # the last step is counted by whoever called this
            bar.advance(len(x) * run.model.workers.size)

    if run.settings.sampler == "mala":
        x, scale = run_mala(run, x, labels, scale, steps, record)
    else:
        always = torch.ones(len(x), device=x.device)
        with allow_tf32(run.model.precision):
            x = langevin(
                run.model.chain_energy.under(labels),
                x,
                num_steps=len(steps),
                step_lr=run.model.step_lr / run.model.rescale,
                noise_std=run.settings.noise_scale,
                proj_norm=run.model.proj_norm * run.model.rescale,
                generator=run.model.generator,
                after_step=lambda x: record(x, always),
            )
    return torch.cat([x.flatten(1), scale[:, None], torch.stack(rows, 1).flatten(1)], 1)


def run_mala(
    run: SandboxRun,
    x: Tensor,
    labels: Tensor,
    scale: Tensor,
    steps: range,
    record: Callable[[Tensor, Tensor], None],
) -> tuple[Tensor, Tensor]:
    """Make one move of MALA for each of these steps; return the images and the factors of their step sizes, (n,).

    During the warm-up each chain's factor grows with an accepted move and shrinks with a rejected one, so that
    WISHED_RATE of them are accepted; it then stays, as it must for the density to be kept (Andrieu & Thoms 2008).
    """
    step_lr, noise_std = run.model.step_lr / run.model.rescale, run.settings.noise_scale
    largest = (MOST_NOISE / noise_std) ** 2
    energy = run.model.energy.under(labels)  # in float32 whatever the precision: small differences decide
    state = evaluate_mala_state(energy, x)
    for step in steps:
        numbers = draw_hmc_move(x, run.model.generator)
        state, is_accepted = make_mala_move(energy, state, *numbers, step_lr=step_lr, noise_std=noise_std, scale=scale)
        if step < count_warm_up(run.settings.chain_steps):
            rate = max((step + 1) ** -0.5, SLOWEST_TUNING)
            scale = (scale * (rate * (is_accepted.to(scale.dtype) - WISHED_RATE)).exp()).clamp(max=largest)
        record(state.x, is_accepted)
    return state.x, scale


def judge_mixing(figures: Mapping[str, metrics.ChainFigures], draws: int) -> str:
    """Return in words whether chains mix, by the worst of their quantities. draws: those of all chains together."""
    rhats = [one.rhat for one in figures.values() if one.rhat is not None]  # a constant energy has none
    sizes = [one.ess for one in figures.values() if one.ess is not None]
    if not rhats or not sizes:
        return "stuck: the chains do not move"
    rhat, ess = max(rhats), min(sizes)
    word = "mixes" if rhat <= MIXED_RHAT and ess >= MIXED_ESS else "stuck" if rhat > STUCK_RHAT else "not mixed yet"
    effective = f"{ess:,.0f}" if ess >= 100 else f"{ess:.1f}"
    return f"{word}: R-hat {rhat:.{2 if word == 'stuck' else 3}f}, {effective} effective samples of {draws:,}"


def plot_mixing(run: SandboxRun, traces: ChainTraces, title: str) -> None:
    """Plot energies and shares of accepted moves along the steps, and autocorrelations over the lag."""
    energies = traces.values[..., 0].cpu().numpy()  # (N, S + 1)
    steps = energies.shape[1] - 1
    points = choose_points(steps, DRAWN_POINTS)
    halves = dict(zip(("starts", "images"), np.split(energies, 2), strict=True))
    forms: dict[str, Callable[..., np.ndarray]] = {"mean": np.mean, "lowest": np.min, "highest": np.max}
    kept = traces.values[:, 1 + count_warm_up(run.settings.chain_steps) :].cpu().numpy()
    lags = choose_points(kept.shape[1] // 2, DRAWN_POINTS)
    panels: dict[str, Any] = {
        "energy": {
            f"from {name}, {form}": (points, reduce(half, 0)[points])
            for name, half in halves.items()
            for form, reduce in forms.items()
        },
        "autocorrelation\nafter the warm-up": {
            name: (lags, metrics.compute_autocorrelation(kept[..., k])[lags]) for k, name in enumerate(QUANTITIES)
        },
    }
    share = "share of accepted moves"
    if run.settings.sampler == "mala":
        edges = choose_points(steps, RATE_POINTS)
        sums = np.pad(traces.accepted.cpu().numpy().cumsum(1), ((0, 0), (1, 0)))[:, edges]
        rates = np.diff(sums, axis=1) / np.diff(edges)
        panels[share] = {
            f"from {name}": (edges[1:], half.mean(0)) for name, half in zip(halves, np.split(rates, 2), strict=True)
        }
    xlabel = "steps; for the autocorrelation, steps between two images of a chain"
    pictures.plot_lines(panels, run.add_file("mixing.png"), xlabel=xlabel, title=title, log=[xlabel], shares=[share])


def choose_points(most: int, number: int) -> np.ndarray:
    """Return about so many whole numbers from 1 to `most`, in equal proportions."""
    return np.unique(np.geomspace(1, most, number).round().astype(int))
