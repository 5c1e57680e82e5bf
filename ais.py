"""Bound the log-likelihood of a trained model on test images by annealed importance sampling.

    python ais.py --exp=mnist --resume_iter=latest --pdist=1000
    python ais.py --exp=cifar10_uncond --temperature=1000 --pdist=100,1000,10000
    python ais.py --dataset=gauss --pdist=10,100,1000

The model is the density exp(−temperature·E(x) − Σ (100·distance to the box)²) / Z over images in [0, rescale], one
under each class where it is conditional. Chains from the box to the model bound log Z from below; those from where
they end back to the box bound it from above, as far as they do end in samples of the model. The more distributions
lie between (--pdist), the closer the bounds. --dataset=gauss checks this on a Gaussian whose log Z and samples are
known exactly. Langevin dynamics with noise of 0.005 draws from about temperature = 2·step_lr / 0.005², not 1.

Test images are bytes plus noise U(0, 1), over 256: with p their density on [0, 1]ᵈ, the 256 values of a byte take
8 − log₂ p(x)/d bits per dimension, on average an upper bound (Theis et al. 2016).
Figures and, for several --pdist, a plot go to --logdir/<exp>/ais/.
"""

from __future__ import annotations

import math
import pathlib
from typing import Any

import torch
from torch import Tensor

import cli
import pictures
from ebm.settings import AisSettings
from errors import UsageError
from evaluation import TrainedModel, choose_device, find_checkpoint, load_split, note_contradictions, open_model
from likelihood import Target, figures_of, gauss_log_z, gauss_samples, log_z
from reports import format_table, write_json
from sampling import Energy, beyond
from sandbox import Sandbox
from utils import Progress


def build_gauss(settings: AisSettings, device: torch.device) -> Target:
    """Return the Gaussian around the middle of the box, of `gauss_dim` dimensions and precision `temperature`."""
    precision, rescale = settings.temperature or 1.0, settings.rescale or 1.0

    def energy(x: Tensor) -> Tensor:
        return 0.5 * precision * (x - rescale / 2).square().sum(1)

    shape = settings.batch_size, settings.gauss_dim
    samples = gauss_samples(shape, precision, rescale, torch.Generator(device).manual_seed(settings.seed + 1))
    known = {"log Z": gauss_log_z(settings.gauss_dim, precision, rescale)}
    alr = 0.0085 if settings.alr is None else settings.alr
    return Target({"gauss": energy}, shape[1:], {"gauss": 1.0}, None, samples, rescale, alr, known)


def build_target(settings: AisSettings, device: torch.device) -> Target:
    """Return the density of the model that the flags name, and its energies of test images.

    Raises UsageError for what is missing, does not fit, or has no density.
    """
    trained = open_model(find_checkpoint(settings), device, swish_act=settings.swish_act, ema=settings.ema)
    note_contradictions(settings, trained)
    model, path = trained.model, trained.path
    temperature = trained.flags.get("temperature", 1.0) if settings.temperature is None else settings.temperature
    rescale = trained.rescale if settings.rescale is None else settings.rescale
    usual = 0.0065 if model.config.image_shape[0] == 1 else 0.0085 if rescale == 8 else 0.0045
    images, labels, said = load_test(settings, trained, device)
    print(f"model: {path}, {model.config.network}, temperature {temperature:g}; {said}")

    sandbox = Sandbox(model, torch.Generator(device).manual_seed(settings.seed), rescale=rescale, batch_size=100)
    values = temperature * sandbox.energies(images, labels) + beyond(rescale * images, (0.0, rescale))
    classes = labels.argmax(1).tolist() if model.config.label_size else [None] * len(images)

    def energy_under(c: int | None) -> Energy:
        def energy(x: Tensor) -> Tensor:
            label = None if c is None else torch.eye(model.config.label_size, device=device)[c].expand(len(x), -1)
            return temperature * model.energy(sandbox.weights, x, label)

        return energy

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
        {"checkpoint": str(path), "images": said, "temperature": temperature},
    )


def load_test(settings: AisSettings, trained: TrainedModel, device: torch.device) -> tuple[Tensor, Tensor, str]:
    """Return test images in [0, 1], label vectors (of width 0 where there are none), and in words what they are.

    Raises UsageError where they do not fit the model, or are not dequantised.
    """
    dataset, label_size = load_split("test", trained, settings, device), trained.model.config.label_size
    if dataset.name == "dsprites":
        raise UsageError("`dataset`=dsprites has black and white pixels without noise: a density says nothing of them")
    if label_size not in (0, dataset.label_size):
        raise UsageError(f"`dataset`={dataset.name} has {dataset.label_size} classes, the model takes {label_size}")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(settings.seed))[: settings.limit]
    images, labels = dataset.batch(order.to(device), torch.Generator(device).manual_seed(settings.seed))
    if labels is None or not label_size:
        labels = images.new_zeros(len(images), 0)
    return images, labels, f"{len(images)} of {len(dataset)} test images of {dataset.name}"


def main(settings: AisSettings) -> None:
    numbers = sorted(set(settings.pdist))
    device = choose_device(settings.device)
    is_gauss = settings.dataset == "gauss"
    target = build_gauss(settings, device) if is_gauss else build_target(settings, device)
    folder = pathlib.Path(settings.logdir) / ("gauss" if is_gauss else settings.exp) / "ais"
    contents: dict[str, Any] = {
        "flags": cli.to_dict(settings),
        "alr": target.alr,
        "rescale": target.rescale,
    } | target.about
    if target.values is not None:
        mean, std = target.values.mean().item(), target.values.std(correction=0).item()
        contents |= {"−T·E of test images": -mean, "its std": std}
    contents |= {"bounds": {}, "by class": {}}
    progress = Progress(2 * sum(numbers) * len(target.energies), what="HMC move")
    for number in numbers:
        generator = torch.Generator(device).manual_seed(settings.seed)
        brackets = {
            name: log_z(
                energy,
                (settings.batch_size, *target.shape),
                num_distributions=number,
                step_size=target.alr,
                bounds=(0.0, target.rescale),
                samples=target.samples,
                generator=generator,
                progress=lambda: progress.update(progress.done + 1),
            )
            for name, energy in target.energies.items()
        }
        contents["bounds"][f"pdist {number}"] = figures = figures_of(target, brackets)
        if not all(map(math.isfinite, figures.values())):
            raise UsageError("energies are not finite: this model has diverged; use an earlier checkpoint")
        contents["by class"][f"pdist {number}"] = {
            name: {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in bracket._asdict().items()}
            for name, bracket in brackets.items()
        }
        write_json(folder / "ais.json", contents)
    progress.close()
    shown = {name: contents[name] for name in ("log Z", "−T·E of test images", "its std") if name in contents}
    print(format_table(shown | contents["bounds"]))
    if target.samples is None:
        print("note: log Z ≤, log p ≥ and bits/dim ≤ suppose that chains reached the model: trust them only where")
        print("they stay as they are with ten times the --pdist; the other bounds hold in any case")
    least = min(figures["accepted"], figures["back"])
    if least < 0.5:
        print(f"note: only {least:.0%} of the moves were accepted; a smaller --alr than {target.alr:g} may bring more")
    print(f"wrote {folder / 'ais.json'}")
    if len(numbers) > 1:
        rows = list(contents["bounds"].values())
        at = [math.log10(number) for number in numbers]
        lines = {name: (at, [row[name] for row in rows]) for name in ("log Z ≤", "log Z ≥")}
        if "log Z" in contents:
            lines["exact"] = (at, [contents["log Z"]] * len(at))
        accepted = {name: (at, [row[name] for row in rows]) for name in ("accepted", "back")}
        plot = pictures.plot_lines(
            {"nats": lines, "moves": accepted}, folder / "ais.png", xlabel="log₁₀ of the distributions between"
        )
        print(f"wrote {plot}")


if __name__ == "__main__":
    cli.run(main, AisSettings, __doc__)
