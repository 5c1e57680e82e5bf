"""Bound the log-likelihood of a trained model on test images by annealed importance sampling.

    python ais.py --exp=mnist --resume_iter=latest --pdist=1000
    python ais.py --exp=cifar10_uncond --temperature=1000 --pdist=100,1000,10000
    python ais.py --exp=fashion_cond --temperature=1000 --pdist=100,1000 --label=sneaker
    python ais.py --dataset=gauss --pdist=10,100,1000

The model is the density exp(−temperature·E(x) − Σ (100·distance to the box)²) / Z over images in the box [0, rescale];
a conditional model has one density for each class. Chains from the box to the model give a lower bound of log Z.
Chains from their end points back to the box give an upper bound, which is valid if the end points are samples of the
model. The bounds become closer with more distributions in between (--pdist). --dataset=gauss checks the method on a
Gaussian, whose log Z and samples are known exactly; --dataset=2d does so in two dimensions. Langevin dynamics with
noise of 0.005 samples from about temperature = 2·step_lr / 0.005², not 1.

Test images are (bytes + noise from U(0, 1)) / 256. If p is their density on [0, 1]ᵈ, the 256 values of a byte take
8 − log₂ p(x)/d bits per dimension; the mean is an upper bound (Theis et al. 2016). Figures and, for several --pdist, a
plot go to <logdir>/<exp>/ais/.
"""

from __future__ import annotations

from ebm.support import interruption

if __name__ == "__main__":
    interruption.guard_start()  # first of all, because importing PyTorch takes seconds

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ebm.settings import AisSettings
from ebm.support import cli, pictures
from ebm.support.experiments import find_output_folder
from ebm.support.hardware import set_up_process
from ebm.support.interruption import keep_what_is_done
from ebm.support.progress import Progress
from ebm.support.reports import format_table
from ebm.tasks.likelihood import (
    GAUSSIANS,
    Target,
    bound_log_z_of_classes,
    build_gauss,
    compute_figures,
    find_refuted_bounds,
    load_target,
)
from ebm.tasks.results import Results, own_results
from ebm.tasks.trained_models import find_checkpoint, open_model
from ebm.training.distributed import Workers, share_evaluation


def describe_target(settings: AisSettings, target: Target) -> dict[str, Any]:
    """Return a description of the model, the test images and the settings for the report."""
    described = {"flags": cli.to_dict(settings), "alr": target.alr, "rescale": target.rescale} | target.about
    if target.values is not None:
        mean, std = target.values.mean().item(), target.values.std(correction=0).item()
        described |= {"−T·E of test images": -mean, "its std": std}
    return described


def plot_bounds(contents: Mapping[str, Any], numbers: Sequence[int], path: pathlib.Path) -> pathlib.Path:
    """Plot bounds and shares of accepted moves over the number of distributions; return the path.

    The bounds are those of log Z and, for a model, of the bits per dimension of its test images.
    """
    rows, xlabel = list(contents["bounds"].values()), "number of distributions"

    def read_columns(columns: Mapping[str, str]) -> dict[str, Any]:
        return {title: (numbers, [row[name] for row in rows]) for title, name in columns.items()}

    panels = {"log Z / nats": read_columns({"upper bound": "log Z ≤", "lower bound": "log Z ≥"})}
    if "log Z" in contents:
        panels["log Z / nats"]["exact"] = (numbers, [contents["log Z"]] * len(numbers))
    if "bits/dim ≤" in rows[0]:
        panels["bits per dimension"] = read_columns({"upper bound": "bits/dim ≤", "lower bound": "bits/dim ≥"})
    ways = {"from box to model": "accepted", "from model to box": "accepted back"}
    panels["share of accepted moves"] = read_columns(ways)
    return pictures.plot_lines(panels, path, xlabel=xlabel, log=[xlabel])


def main(settings: AisSettings) -> None:
    set_up_process()
    name = str(settings.dataset if settings.dataset in GAUSSIANS else settings.exp)
    with (
        share_evaluation(settings.device) as workers,
        own_results(find_output_folder(settings.logdir, name) / "ais", workers, "logdir") as results,
    ):
        measure_likelihood(settings, workers, results)


def measure_likelihood(settings: AisSettings, workers: Workers, results: Results) -> None:
    """Bound log Z and the likelihood of test images, each worker with its share of the chains, and write the report."""
    numbers, is_gauss = sorted(set(settings.pdist)), settings.dataset in GAUSSIANS
    trained = None if is_gauss else open_model(find_checkpoint(settings), workers.device, settings, ema=settings.ema)
    target = build_gauss(settings, workers.device) if trained is None else load_target(settings, trained, workers)
    contents = describe_target(settings, target) | {"bounds": {}, "by class": {}}
    densities = len(target.energies)
    chains = f"{settings.batch_size} chains" + f" for each of {densities} densities" * (densities > 1)
    print(f"work: {2 * sum(numbers):,} Hamiltonian moves of {chains}", flush=True)
    progress = Progress(2 * sum(numbers) * len(target.energies), what="HMC move")
    with keep_what_is_done(contents["bounds"]), progress:
        for number in numbers:
            bounds_by_class = bound_log_z_of_classes(target, settings, number, progress.advance, workers)
            contents["by class"][f"pdist {number}"] = {
                name: bounds_of_class.to_dict() for name, bounds_of_class in bounds_by_class.items()
            }
            contents["bounds"][f"pdist {number}"] = compute_figures(target, bounds_by_class)
            results.write_report("ais.json", contents | {"complete": False})
    rows = list(contents["bounds"].values())
    workers.note_part("values of pdist", len(rows), len(numbers))
    if len(rows) > 1:
        plot_bounds(contents, numbers[: len(rows)], results.add_file("ais.png"))
    results.write_report("ais.json", contents | results.describe_state())
    figures_of_target = {
        name: contents[name] for name in ("log Z", "−T·E of test images", "its std") if name in contents
    }
    print(format_table(figures_of_target | contents["bounds"]))
    if target.samples is None:
        print(
            "note: log Z ≤, log p ≥ and bits/dim ≤ assume that the chains reached the model: trust them only if they do"
        )
        print("not change with ten times the --pdist; the other bounds always hold")
        if refuted := find_refuted_bounds(contents["bounds"]):
            print(f"note: they did not reach it with {', '.join(refuted)}: log Z ≤ is below another row's log Z ≥")
    least = min(rows[-1]["accepted"], rows[-1]["accepted back"])
    if least < 0.5:
        print(f"note: only {least:.0%} of the moves were accepted; try a smaller --alr than {target.alr:g}")
    results.print_paths()


if __name__ == "__main__":
    cli.run(main, AisSettings, __doc__)
