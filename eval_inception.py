"""Measure the quality of a trained model's samples: Inception score, FID, KID, precision and recall.

    python eval_inception.py --exp=cifar10_large_model_uncond --resume_iter=121200 --step_lr=10.0
    python eval_inception.py --exp=fashion_mnist --im_number=1000 --repeat_scale=10 --ensemble=1 --num_steps=10
    python eval_inception.py --exp=cifar10_cond --iterations=10000,20000,30000 --im_number=5000 --ensemble=1

Images are sampled from pools of persistent chains under an ensemble of the last checkpoints. Colour images are
compared with real ones in the features of the Inception-2015-12-05 network, like published figures. Its weights are
read from --inception_weights or torch's cache folder, or downloaded. Grey images, and all images if these weights are
missing, are compared in the features of a small classifier that is trained on the data set itself; these figures have
other names, because they cannot be compared with any FID. eval_inception.json, a grid of samples and the curve over
--iterations go to <logdir>/<exp>/eval_inception_<idx>/.
"""

from __future__ import annotations

from ebm.support import interruption

if __name__ == "__main__":
    interruption.guard_start()  # first of all, because importing PyTorch takes seconds

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ebm.measures import features
from ebm.measures.patches import MAX_IMAGES
from ebm.settings import InceptionSettings
from ebm.support import cli, pictures
from ebm.support.hardware import set_up_process
from ebm.support.interruption import keep_what_is_done
from ebm.support.reports import format_table
from ebm.tasks.quality import (
    PAPER,
    check_pool,
    choose_iterations,
    describe_quality_settings,
    draw_samples,
    find_ensemble,
    load_extractor,
    load_reference,
)
from ebm.tasks.results import Results, own_results
from ebm.tasks.trained_models import TrainedModel, note_contradictions, open_model, refuse_concept_model
from ebm.training.distributed import Workers, share_evaluation
from ebm.training.tuning import settle_precision


def format_results(contents: dict[str, Any]) -> str:
    """Return a table of the figures, one row per iteration, followed by their settings and the published figures."""
    results, of_real = contents["results"], contents["Fréchet distance of real images"]
    sizes = "/".join(str(size) for size in sorted({len(result["ensemble"]) for result in results}))
    settings = ", ".join(f"{name}={value}" for name, value in contents["settings"].items())
    lines = [format_table({f"iteration {result['iteration']}": result["figures"] for result in results})]
    lines += [f"Fréchet distance of {of_real['images']:,} images of the reference itself: {of_real['distance']:.4f}"]
    lines += [", ".join(f"{name} of other real images: {value:.4f}" for name, value in contents["real images"].items())]
    lines += [f"settings: ensemble={sizes}, {settings}"]
    return "\n".join(lines + [f"paper, {name}: {text}" for name, text in contents["paper"].items()])


def main(settings: InceptionSettings) -> None:
    set_up_process()
    with (
        share_evaluation(settings.device) as workers,
        own_results(settings.results_folder / f"eval_inception_{settings.idx}", workers, "logdir") as results,
    ):
        evaluate_samples(settings, workers, results)


def evaluate_samples(settings: InceptionSettings, workers: Workers, results: Results) -> None:
    """Sample from each ensemble, each worker its share of the pools; measure and report the samples on rank 0."""
    check_pool(settings)
    experiment = settings.locate_model(settings.exp)
    ensembles = [
        find_ensemble(experiment, iteration, settings.ensemble) for iteration in choose_iterations(settings, experiment)
    ]
    trained = open_model(ensembles[-1][0], workers.device, settings, ema=settings.ema)
    note_contradictions(settings, trained)
    refuse_concept_model(trained)
    settings = settle_precision(settings, trained.model, workers)
    settings = dataclasses.replace(settings, num_steps=trained.choose_num_steps(settings.num_steps))
    report = QualityReport(settings, trained, results) if workers.rank == 0 else None
    measured: list[str] = []
    with keep_what_is_done(measured):
        for paths in ensembles:
            print(f"ensemble of {len(paths)}: {', '.join(map(str, paths))}")
            images = draw_samples(settings, paths, trained, workers)
            if report is not None:
                report.add(paths, images)
            measured.append(paths[0].stem)
    workers.note_part("iterations", len(measured), len(ensembles))
    if report is not None:
        report.finish()


class QualityReport:
    """The figures of samples, and the files that they are written to."""

    def __init__(self, settings: InceptionSettings, trained: TrainedModel, results: Results):
        device, self.results = results.workers.device, results
        cache = pathlib.Path(settings.cache or pathlib.Path(settings.logdir) / "statistics")
        reference = load_reference(settings, trained, device)
        self.settings, self.extractor = settings, load_extractor(settings, reference, cache, device)
        self.real = features.load_or_compute_statistics(self.extractor, reference, cache)
        number = min(MAX_IMAGES, len(reference) // 2)
        self.patches = features.load_or_compute_patches(reference, cache, number)
        others = reference.take(min(settings.im_number, number), start=number)
        of_real = dict(zip(("images", "distance"), features.measure_real(self.real, settings.im_number), strict=True))
        published = PAPER.get((reference.datasets[0].name, trained.model.config.label_size > 0), {})
        self.contents: dict[str, Any] = {
            "settings": describe_quality_settings(settings, trained, reference, self.extractor),
            "flags": cli.to_dict(settings),
            "network": dataclasses.asdict(trained.model.config),
            "results": [],
            "Fréchet distance of real images": of_real,
            "real images": features.describe_patches(others, self.patches),
            "paper": published if self.extractor.name == "inception" else {},
        }

    def add(self, paths: Sequence[pathlib.Path], images: Tensor) -> None:
        """Measure the images uint8 (N, C, H, W) of an ensemble of checkpoints; write them as a grid, and the report."""
        iteration = paths[0].stem.removeprefix("model_")
        pictures.save_grid(images[:100] / 255, self.results.add_file(f"samples_{iteration}.png"), columns=10)
        figures = features.measure_quality(self.extractor, images, self.real, self.patches, splits=self.settings.splits)
        result = {"iteration": iteration, "ensemble": list(map(str, paths)), "figures": figures}
        self.contents["results"].append(result | {"images": len(images)})
        self.results.write_report("eval_inception.json", self.contents | {"complete": False})
        self.results.workers.note_part(f"images of iteration {iteration}", len(images), self.settings.im_number)

    def finish(self) -> None:
        """Write and print the report and the paths of all files; plot the figures if they are of several iterations."""
        results = self.contents["results"]
        if len(results) > 1:
            iterations = [int(result["iteration"]) for result in results]
            names, path = list(results[0]["figures"]), self.results.add_file("curve.png")
            curves = {name: {name: (iterations, [result["figures"][name] for result in results])} for name in names}
            log = [name for name in names if name == "FID" or "distance" in name]
            shares = [name for name in names if name.endswith(("precision", "recall"))]
            pictures.plot_lines(curves, path, xlabel="iteration", log=log, shares=shares)
        self.results.write_report("eval_inception.json", self.contents | self.results.describe_state())
        print(format_results(self.contents))
        self.results.print_paths()


if __name__ == "__main__":
    cli.run(main, InceptionSettings, __doc__)
