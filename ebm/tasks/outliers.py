"""The sandbox task that tells out-of-distribution images from those of the model's data set: mixenergy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ebm.support import metrics, pictures
from ebm.support.interruption import Interruption
from ebm.tasks.analysis import average_with_next, fit_images
from ebm.tasks.sandbox_run import Report, SandboxRun

# The AUROC of an unconditional model in the paper, for CIFAR-10, as later papers quote it. "?": not verified.
PAPER_AUROC = {
    "svhn": "0.63",
    "textures": "0.48",
    "cifar100": "0.50",
    "interpolation": "0.70",
    "random": "1.0 ? (uniform noise)",
}


def detect_outliers(run: SandboxRun) -> Report:
    """Detect out-of-distribution images by −E (of a conditional model: under the class of lowest energy)."""
    if run.model.classes:
        run.require_class_names("mixenergy")
    images = run.draw_examples("test", run.choose_number()).images
    classes = f", under each of {run.model.classes} classes" if run.model.classes else ""
    others = f"as many for comparison ({', '.join(run.mixes)})"
    run.announce(f"energies of {len(images):,} test images and {others}{classes}")
    in_scores = run.write_array("scores_in_distribution", run.model.compute_scores(images, progress="scores of test"))
    scores: dict[str, np.ndarray] = {}
    with contextlib.suppress(Interruption):
        for name, outsiders in load_outliers(run, images):
            found = run.model.compute_scores(outsiders, progress=f"scores of {name}")
            scores[name] = run.write_array(f"scores_{name}", found)
    run.results.workers.note_part("data sets", len(scores), len(run.mixes))
    figures = {
        name: {
            "images": len(out_scores),
            "AUROC": metrics.auroc(in_scores, out_scores),
            "AUPR": metrics.aupr(in_scores, out_scores),
            "FPR at 95 % TPR": metrics.fpr_at_95_tpr(in_scores, out_scores),
        }
        for name, out_scores in scores.items()
    }
    xlabel = "score −E (higher: more like the data of training)"
    pictures.plot_histograms({"in distribution": in_scores, **scores}, run.add_file("scores.png"), xlabel=xlabel)
    if scores:
        curves = {name: (in_scores, out_scores) for name, out_scores in scores.items()}
        pictures.plot_roc(curves, run.add_file("roc.png"))
    return Report(figures, run.get_published({} if run.model.classes else PAPER_AUROC))


def load_outliers(run: SandboxRun, images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the images (M, C, H, W) of each out-of-distribution set.

    The images are converted to the shape of the test images.
    """
    generator = run.model.generator
    for name in run.mixes:
        if name == "interpolation":
            yield name, average_with_next(images)
        elif name == "random":
            yield name, 0.5 + 0.5 * torch.randn(images.shape, generator=generator, device=images.device)
        else:
            dataset = run.load_mix(name)
            outsiders, _ = dataset.batch(run.draw_index(dataset, run.choose_number(), dataset.name), generator)
            yield dataset.name, fit_images(outsiders, run.config.image_shape)
