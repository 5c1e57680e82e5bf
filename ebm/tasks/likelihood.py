"""Lower and upper bounds of the log-likelihood of densities exp(−E), by annealed importance sampling.

    log_z = bound_log_z(energy, (16, 1, 28, 28), num_distributions=1000, step_size=0.0065, seed=0, device=device)
    # −E(x) − log_z.upper ≤ log p(x) ≤ −E(x) − log_z.lower, in nats

Images are in a box with steep walls instead of hard ones: the density is exp(−E(x) − walls(x)).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data import find_class
from ebm.settings import AisSettings
from ebm.support.errors import UsageError
from ebm.support.sharing import ShareOut, compute_all, derive_seed, fold_seed
from ebm.tasks.examined_model import ExaminedModel, count_most_images
from ebm.tasks.trained_models import TrainedModel, load_split, match_labels, note_contradictions
from ebm.training.distributed import Workers
from models import freeze_energy
from sampling import Energy, draw_hmc_move, make_hmc_move

# ---------------------------------------------------------------------------------------------------------------------
# Annealed importance sampling (Neal 2001) between a box of images and an energy

WALL = 100.0  # outside the box the energy grows by (WALL · distance)²
SPILL = math.sqrt(math.pi) / WALL  # the walls widen each dimension of the box by ∫ exp(−(WALL·u)²) du


class AnnealingResult(NamedTuple):
    """The result of annealed importance sampling."""

    x: Tensor  # (N, ...), the end points of the chains
    log_weights: Tensor  # (N,) float64, in nats
    acceptance: Tensor  # (num_distributions,), share of accepted moves, in the order from the box to the energy


def compute_wall_energy(x: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Return the energy of the walls for images x, (N,): Σ (WALL · distance to the bounds)², which is 0 inside."""
    return (WALL * (x - x.clamp(*bounds))).square().flatten(1).sum(1)


def draw_box_images(shape: tuple[int, ...], bounds: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Draw exact samples from the density exp(−walls(x)), which is uniform within the bounds and Gaussian outside."""
    lower, upper = bounds
    x = lower + (upper - lower + SPILL) * torch.rand(shape, generator=generator, device=generator.device)
    distance = torch.randn(shape, generator=generator, device=generator.device) / (WALL * math.sqrt(2))
    return torch.where(x < upper, x, torch.where(distance > 0, upper, lower) + distance)


def anneal(
    energy: Energy,
    x: Tensor,
    *,
    num_distributions: int,
    step_size: float,
    num_steps: int = 10,
    bounds: tuple[float, float] = (0.0, 1.0),
    reverse: bool = False,
    draw: Callable[[Tensor], tuple[Tensor, Tensor]] = draw_hmc_move,
    progress: Callable[[], object] = lambda: None,
) -> AnnealingResult:
    """Run annealed importance sampling (Neal 2001) on images (N, ...), from the box to the density exp(−E) or back.

    The chains pass the densities exp(−alpha·E − walls), alpha = k / num_distributions. At each change of alpha they are
    weighed where they are and then make one HMC move at the new density. As in the reference, its step size is
    step_size·5^(−2.5·alpha) for the alpha before the change, in both directions. If x are samples of the box, the
    expected log weight is at most log ∫ exp(−E − walls) − log ∫ exp(−walls). With `reverse`, and if x are samples of
    exp(−E − walls), it is at least that. num_steps: leapfrog steps of a move. draw: returns the random numbers of a
    move of images. progress: called after each move.
    """
    log_weights, acceptance = torch.zeros(len(x), dtype=torch.float64, device=x.device), []
    alphas = [k / num_distributions for k in range(num_distributions + 1)]

    def density(alpha: float) -> Energy:
        return lambda x: alpha * energy(x) + compute_wall_energy(x, bounds)

    for alpha, new_alpha in itertools.pairwise(reversed(alphas) if reverse else alphas):
        with torch.no_grad():
            log_weights -= energy(x).double() / num_distributions
        step = step_size * 5 ** (-2.5 * alpha)
        x, is_accepted = make_hmc_move(density(new_alpha), x, *draw(x), step_size=step, num_steps=num_steps)
        acceptance.append(is_accepted.float().mean())
        progress()
    return AnnealingResult(x, log_weights, torch.stack(acceptance[::-1] if reverse else acceptance))


# ---------------------------------------------------------------------------------------------------------------------
# Bounds of log Z and of the log-likelihood

ACCEPTANCES = ("acceptance", "reverse_acceptance")


class LogZBounds(NamedTuple):
    """Bounds of log ∫ exp(−E) in nats, each with its standard error over chains, and the shares of accepted moves."""

    lower: float
    lower_error: float
    upper: float
    upper_error: float
    acceptance: Tensor  # (num_distributions,), of the forward run's moves at alpha = 1/n, …, 1
    reverse_acceptance: Tensor  # (num_distributions,), of the reverse run's moves at alpha = 0, …, (n − 1)/n

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values by name."""
        return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in self._asdict().items()}


class Target(NamedTuple):
    """The density exp(−E) over images in [0, rescale] to be measured; a conditional model has one for each class."""

    energies: dict[str, Energy]  # name of the class -> energy
    shape: tuple[int, ...]  # the shape of an image
    share: dict[str, float]  # name of the class -> its share of the test images
    values: Tensor | None  # (n,), the energies of the test images
    samples: Tensor | None  # (batch_size, ...), exact samples of the density if they can be drawn
    rescale: float
    alr: float  # step size of HMC
    about: dict[str, Any]  # a description for the report


def bound_log_z(
    energy: Energy,
    shape: tuple[int, ...],
    *,
    num_distributions: int,
    step_size: float,
    bounds: tuple[float, float] = (0.0, 1.0),
    samples: Tensor | None = None,
    seed: int,
    device: torch.device,
    progress: Callable[[], object] = lambda: None,
    parts: int = 1,
    share_out: ShareOut = compute_all,
) -> LogZBounds:
    """Return lower and upper bounds of log ∫ exp(−E − walls), from forward and reverse runs of `anneal`.

    shape: of the chains (N, ...). samples: exact samples of the energy, from which the reverse run starts. Without them
    it starts at the end points of the forward run; the upper bound is then valid only if these are samples of the
    energy (Grosse et al. 2015). share_out: distributes the chains in so many parts; a chain draws the same numbers in
    any number of parts.
    """

    def run_part(chains: Tensor) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(seed)

        def draw(x: Tensor) -> tuple[Tensor, ...]:
            return tuple(drawn[chains] for drawn in draw_hmc_move(x.new_empty(shape), generator))

        settings: dict[str, Any] = {"num_distributions": num_distributions, "step_size": step_size, "bounds": bounds}
        settings |= {"draw": draw, "progress": progress}
        forward = anneal(energy, draw_box_images(shape, bounds, generator)[chains], **settings)
        back = anneal(energy, forward.x if samples is None else samples[chains], reverse=True, **settings)
        accepted = (result.acceptance * len(chains) for result in (forward, back))
        return forward.log_weights, back.log_weights, *accepted

    results = share_out(torch.arange(shape[0], device=device).chunk(parts), run_part)
    *log_weights, acceptance, reverse_acceptance = map(list, zip(*results, strict=True))
    box = math.prod(shape[1:]) * math.log(bounds[1] - bounds[0] + SPILL)
    (lower, lower_error), (upper, upper_error) = (
        (box + w.mean().item(), (w.std() / len(w) ** 0.5).item()) for w in map(torch.cat, log_weights)
    )
    shares = (torch.stack(counts).sum(0) / shape[0] for counts in (acceptance, reverse_acceptance))
    return LogZBounds(lower, lower_error, upper, upper_error, *shares)


def bound_log_z_of_classes(
    target: Target, settings: AisSettings, num_distributions: int, progress: Callable[[], object], workers: Workers
) -> dict[str, LogZBounds]:
    """Return the bounds of log Z for each class of a target by name, from `batch_size` chains for each class."""
    return {
        name: bound_log_z(
            energy,
            (settings.batch_size, *target.shape),
            num_distributions=num_distributions,
            step_size=target.alr,
            bounds=(0.0, target.rescale),
            samples=target.samples,
            seed=derive_seed(settings.seed, k),
            device=workers.device,
            progress=progress,
            parts=workers.size,
            share_out=workers.share_out_all,
        )
        for k, (name, energy) in enumerate(target.energies.items())
    }


def compute_figures(target: Target, bounds_by_class: dict[str, LogZBounds]) -> dict[str, float]:
    """Return the bounds of log Z and, for test images, those of log p in nats and in bits per dimension.

    Bounds of several classes are averaged over the test images. Raises UsageError if a figure is not finite.
    """

    def mean(field: str) -> float:
        return sum(part * getattr(bounds_by_class[name], field) for name, part in target.share.items())

    def error(field: str) -> float:
        return math.sqrt(
            sum((part * getattr(bounds_by_class[name], field)) ** 2 for name, part in target.share.items())
        )

    low, high = mean("lower"), mean("upper")
    figures = {"log Z ≥": low, "log Z ≤": high, "error": max(error("lower_error"), error("upper_error"))}
    if target.values is not None:
        energy, dimensions = target.values.double().mean().item(), math.prod(target.shape)
        per_image = {"log p ≥": -energy - high, "log p ≤": -energy - low}
        # The density on [0, rescale]ᵈ is rescale⁻ᵈ of that on [0, 1]ᵈ, and a byte is 1/256 of that range.
        bits = [8 - (p / dimensions + math.log(target.rescale)) / math.log(2) for p in per_image.values()]
        figures |= per_image | {"bits/dim ≥": bits[1], "bits/dim ≤": bits[0]}
    accepted = [
        sum(getattr(b, name).mean().item() for b in bounds_by_class.values()) / len(bounds_by_class)
        for name in ACCEPTANCES
    ]
    figures |= dict(zip(("accepted", "accepted back"), accepted, strict=True))
    if not all(map(math.isfinite, figures.values())):
        raise UsageError("energies are not finite: this model has diverged; use an earlier checkpoint")
    return figures


def find_refuted_bounds(figures: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the names of the rows of `compute_figures` whose upper bound of log Z cannot be one.

    It is below the lower bound of another row by more than both errors: the chains of its row did not reach the model.
    """
    highest = max(figures.values(), key=lambda row: row["log Z ≥"])
    return [
        name for name, row in figures.items() if row["log Z ≤"] + row["error"] < highest["log Z ≥"] - highest["error"]
    ]


# ---------------------------------------------------------------------------------------------------------------------
# A density whose log Z is known: a Gaussian in the middle of the box [0, rescale]ᵈ


def compute_gauss_log_z(dimensions: int, precision: float, rescale: float) -> float:
    """Return the exact log ∫ exp(−precision·|x − centre|²/2 − Σ (100·distance to the box)²) dx."""
    half = rescale / 2
    inside = 0.5 * math.log(2 * math.pi / precision) + math.log(math.erf(half * math.sqrt(precision / 2)))
    # Outside a wall: ∫ exp(−precision·(half + u)²/2 − (WALL·u)²) du, the tail of a Gaussian with this curvature.
    curvature = precision / 2 + WALL**2
    z = precision * half / (2 * math.sqrt(curvature))
    tail = torch.special.log_ndtr(torch.tensor(-math.sqrt(2) * z, dtype=torch.float64)).item()
    tail += z**2 - precision * half**2 / 2 + 0.5 * math.log(math.pi / curvature)
    return dimensions * (inside + math.log1p(math.exp(math.log(2) + tail - inside)))


def draw_gauss_samples(shape: tuple[int, ...], precision: float, rescale: float, generator: torch.Generator) -> Tensor:
    """Draw exact samples of this Gaussian with walls, by rejection of normal samples outside the box."""
    number = math.prod(shape)
    accepted = torch.empty(0, device=generator.device)
    while len(accepted) < number:
        x = torch.randn(number, generator=generator, device=generator.device) / precision**0.5 + rescale / 2
        probability = (-compute_wall_energy(x[:, None], (0.0, rescale))).exp()
        is_accepted = torch.rand(number, generator=generator, device=generator.device) < probability
        accepted = torch.cat([accepted, x[is_accepted]])
    return accepted[:number].view(shape)


# ---------------------------------------------------------------------------------------------------------------------
# Targets: this Gaussian, or a trained model


GAUSSIANS = {"gauss": 0.0085, "2d": 0.0045}  # name -> usual step size of HMC


def build_gauss(settings: AisSettings, device: torch.device) -> Target:
    """Return a Gaussian in the middle of the box, of the precision `temperature`, in `gauss_dim` or two dimensions."""
    precision, rescale = settings.temperature or 1.0, settings.rescale or 1.0
    name, dimensions = str(settings.dataset), 2 if settings.dataset == "2d" else settings.gauss_dim

    def energy(x: Tensor) -> Tensor:
        return 0.5 * precision * (x - rescale / 2).square().sum(1)

    shape = settings.batch_size, dimensions
    samples = draw_gauss_samples(
        shape, precision, rescale, torch.Generator(device).manual_seed(fold_seed(settings.seed + 1))
    )
    about = {"log Z": compute_gauss_log_z(dimensions, precision, rescale)}
    alr = GAUSSIANS[name] if settings.alr is None else settings.alr
    return Target({name: energy}, shape[1:], {name: 1.0}, None, samples, rescale, alr, about)


def load_target(settings: AisSettings, trained: TrainedModel, workers: Workers) -> Target:
    """Return the density of a trained model, with the energies of test images.

    Raises UsageError if the data are missing, do not fit the model, or the model has no density.
    """
    device = workers.device
    note_contradictions(settings, trained)
    model, path = trained.model, trained.path
    temperature = trained.flags.get("temperature", 1.0) if settings.temperature is None else settings.temperature
    rescale = trained.rescale if settings.rescale is None else settings.rescale
    usual = 0.0065 if model.config.image_shape[0] == 1 else 0.0085 if rescale == 8 else 0.0045
    images, labels, description = workers.take_turns(lambda: load_test_images(settings, trained, device))
    print(f"model: {path}, {model.config.network}, temperature {temperature:g}; {description}")

    examined = ExaminedModel(
        model, torch.Generator(device).manual_seed(settings.seed), rescale=rescale, batch_size=100, workers=workers
    )
    values = temperature * examined.compute_energies(images, labels) + compute_wall_energy(
        rescale * images, (0.0, rescale)
    )
    classes = labels.argmax(1).tolist() if model.config.label_size else [None] * len(images)

    frozen = freeze_energy(model, temperature=temperature)  # a function of images in [0, rescale]

    def energy_under(c: int | None) -> Energy:
        if c is None:
            return frozen.under(None)
        label = torch.eye(model.config.label_size, device=device)[c]
        return lambda x: frozen(x, label.expand(len(x), -1))

    share = {c: classes.count(c) / len(classes) for c in sorted(set(classes), key=str)}
    name = {c: "images" if c is None else f"class {c}" for c in share}
    return Target(
        {name[c]: energy_under(c) for c in share},
        model.config.image_shape,
        {name[c]: part for c, part in share.items()},
        values,
        None,
        rescale,
        usual if settings.alr is None else settings.alr,
        {"checkpoint": str(path), "images": description, "temperature": temperature},
    )


def load_test_images(settings: AisSettings, trained: TrainedModel, device: torch.device) -> tuple[Tensor, Tensor, str]:
    """Return random test images in [0, 1], their label vectors, and a description of them.

    The labels of an unconditional model have width 0. Raises UsageError if the images do not fit the model, are not
    dequantised, or if there are none of the class `label`.
    """
    dataset = match_labels(load_split("test", trained, settings, device), trained)
    if dataset.name == "dsprites":
        raise UsageError("`dataset`=dsprites has pixels of two values without noise, which have no density")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(settings.seed))
    name = dataset.name
    if settings.label is not None:
        number = find_class("label", settings.label, trained.class_names, trained.model.config.label_size)
        if dataset.labels is None or dataset.labels.dim() != 1:
            raise UsageError(f"`label`={settings.label}: the classes of {name} are not in memory; leave it out")
        order = order[dataset.labels.cpu()[order] == number]
        if not len(order):
            raise UsageError(f"`label`={settings.label}: no test image of {name} is of this class")
        name += f", class {settings.label}"
    found = len(order)
    order = order[: settings.limit or count_most_images(dataset.image_shape)]
    images, labels = dataset.batch(order.to(device), torch.Generator(device).manual_seed(settings.seed))
    if labels is None or not trained.model.config.label_size:
        labels = images.new_zeros(len(images), 0)
    return images, labels, f"{len(images)} of {found} test images of {name}"
