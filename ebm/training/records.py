"""The records of a run: its log, its pictures, the quality of its samples, and the report at its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

import data
from checkpoint import to_tf_name
from ebm.measures.features import DISTANCE, IMAGES_PER_SPLIT, SampleMeasure
from ebm.settings import TrainSettings
from ebm.support import cli, pictures
from ebm.support.logs import RunLog, read_series
from ebm.support.progress import Progress, describe_energies
from ebm.support.reports import format_table, write_json
from ebm.support.trackers import TrackedRun, start_trackers
from ebm.training.classification import LabelledImages, measure_classification
from ebm.training.samples import FreshChains, Sampler, choose_test_number
from ebm.training.state import State, Step
from sampling import compute_input_gradient

# The panels of curves.png: y label -> {line: name of the figure in the log}. docs/figures.md explains them.
CURVES = {
    "energy": {"energy of data": "e_pos", "energy of samples": "e_neg"},
    "energy gap": {"data − samples": "e_diff"},
    "mean pixel difference": {"pixel change by the chain": "x_moved", "from sample to data": "x_off"},
    "mean energy gradient": {"where chains start": "x_grad_first", "where chains end": "x_grad"},
}
INCEPTION_CURVES = {"Inception score": {"Inception score": "inception_score"}, "FID": {"FID": "fid"}}
CLASSIFICATION_CURVES = {
    "accuracy": {"of the batch": "accuracy", "of test images": "test_accuracy"},
    "cross-entropy of the classes": {"of the batch": "loss_classify"},
}
CLASSIFIER_CURVES = {
    DISTANCE: {DISTANCE: "feature_distance"},
    "share": {"classifier precision": "feature_precision", "classifier recall": "feature_recall"},
}
PATCH_CURVES = {"distance": {"of patches": "patch_distance", "of tones": "tone_distance"}}
LOG_AXES = ("mean energy gradient", "FID", DISTANCE, "distance")
SHARE_AXES = ("share", "accuracy")  # the labels of axes from 0 to 1
PANELS = 20  # rows of start | sample | real
GRID = 200  # images of the picture of samples, at most
BINS = 40  # of the histograms of energies in the log
MAX_HISTOGRAM_ENERGY = 1e9  # the size of energies from which on no histogram is made


def compute_label_entropy(labels: Tensor) -> Tensor:
    """Return the entropy, in nats, of the mean of one-hot labels (N, classes): at most the logarithm of the classes."""
    share = labels.mean(0)
    return -(share * (share + 1e-7).log()).sum()


def compute_statistics(state: State, settings: TrainSettings, step: Step) -> dict[str, float]:
    """Return the figures of an iteration, under the reference's names. It copies them from the device.

    Energies are those of the network; gradients are those that chains descend, `temperature` times larger.
    """
    energy = dataclasses.replace(step.energy, temperature=settings.temperature).under(step.chain_labels)
    with torch.no_grad():
        loss_e = step.energy(step.samples, step.labels).mean() if settings.zero_kl else step.loss_kl
    figures = {
        "e_pos": step.e_pos.mean(),
        "e_pos_std": step.e_pos.std(correction=0),
        "e_neg": step.e_neg.mean(),
        "e_neg_std": step.e_neg.std(correction=0),
        "e_diff": step.e_pos.mean() - step.e_neg.mean(),
        "loss_e": loss_e,
        "loss_ml": step.loss_ml,
        "loss_total": step.loss,
        "x_grad": compute_input_gradient(energy, step.samples).abs().mean(),
        "x_grad_first": compute_input_gradient(energy, step.start).abs().mean(),
        "x_off": (step.samples - step.images).abs().mean(),
        "x_moved": (step.samples - step.start).abs().mean(),
    }
    if step.e_wrong is not None:
        figures["e_wrong"] = step.e_wrong.mean()
    if step.is_recognised is not None:
        figures |= {"loss_classify": step.loss_classify, "accuracy": step.is_recognised.float().mean()}
    if step.chain_labels is not None and state.model.config.has_classes:
        figures["label_ent"] = compute_label_entropy(step.chain_labels)
    if step.acceptance is not None:
        figures["hmc_acceptance"] = step.acceptance
    if "atten.gamma" in step.energy.weights:
        figures["gamma"] = step.energy.weights["atten.gamma"].squeeze()
    for name, parameter in state.model.named_parameters():
        if parameter.grad is not None:
            figures[f"max_grad/{to_tf_name(name).removeprefix('context_0/')}"] = parameter.grad.abs().max()
    values = torch.stack(list(figures.values())).tolist()  # one transfer
    return dict(zip(figures, values, strict=True)) | {"temp": float(settings.temperature)}


class Recorder:
    """The writer of a run's log and pictures, on its first worker.

    measure: the measure of samples, or None. stop: the last iteration. is_branch: see `RunLog`.
    """

    def __init__(
        self,
        state: State,
        settings: TrainSettings,
        sampler: Sampler,
        measure: SampleMeasure | None,
        stop: int,
        *,
        is_branch: bool = False,
    ):
        self.state, self.settings, self.sampler, self.measure = state, settings, sampler, measure
        self.folder = settings.folder
        about = TrackedRun(settings.exp, self.folder, cli.to_dict(settings), settings.tag)
        self.trackers = start_trackers(settings.projects, about, print)  # may take a while, which is no iteration's
        self.progress = Progress(stop, state.iteration, what="iteration")
        for tracker in self.trackers:
            tracker.say = self.progress.say
        self.log = RunLog(
            self.folder, state.iteration, is_branch=is_branch, say=self.progress.say, trackers=self.trackers
        )
        self.log.write_table(state.iteration, "settings", cli.to_dict(settings))

    def record_step(self, step: Step) -> None:
        """Write the figures of an iteration to the log and the console."""
        figures = compute_statistics(self.state, self.settings, step)
        self.log.write_scalars(self.state.iteration, figures)
        self.progress.text = describe_energies(figures["e_pos"], figures["e_neg"])

    def record_rollback(self, failed: int, cause: str, lr: float) -> None:
        """Print and log that the run went back from a failed iteration to the one of the state."""
        iteration = self.state.iteration
        place = f"back to iteration {iteration}, learning rate {lr:.3g}"
        self.progress.say(f"diverged at iteration {failed}: {cause}; {place}")
        self.progress.update(iteration)
        self.log.write_event(iteration, {"rollback_from": failed, "cause": cause, "lr": lr})

    def draw_panel(self, name: str, columns: Mapping[str, Tensor], labels: Tensor | None, note: str = "") -> None:
        """Save a picture of images (N, C, H, W) in [0, 1], a column for each name.

        labels: (N, label_size), which title the rows, None for an unconditional model. note: about these titles.
        """
        iteration = self.state.iteration
        rows = min(PANELS, *map(len, columns.values()))
        shown = {title: images[:rows] for title, images in columns.items()}
        path = self.folder / "pictures" / f"{name}_{iteration}.png"
        titles = data.describe_labels(None if labels is None else labels[:rows], self.sampler.dataset)
        pictures.save_panel(shown, path, rows=titles, note=note if titles else "")
        self.log.write_picture(iteration, name, path)
        self.progress.say(f"pictures: {path}")

    def draw_panels(self, step: Step) -> None:
        """Save a picture of training's chains and one of fresh chains: their starts, their ends and real images."""
        rescale = self.settings.rescale
        real, chains = step.images / rescale, self.draw_fresh_chains()
        shown = {"start": step.start / rescale, "sample": step.samples / rescale, "real": real}
        self.draw_panel("train_gen", shown, step.chain_labels)
        shown = {"start": chains.start, "sample": chains.images, "real": real}
        note = "The titles are the labels of the samples, not of the real images."
        self.draw_panel("val_gen", shown, chains.labels, note)

    def draw_fresh_chains(self) -> FreshChains:
        """Return the fresh chains of this test: as many as are measured, or as a picture shows."""
        return self.sampler.draw_chains(
            PANELS if self.measure is None else choose_test_number(self.settings, self.measure)
        )

    def measure_samples(self) -> float | None:
        """Log the figures of fresh chains; return the key figure, smaller is better, or None if nothing is measured."""
        if self.measure is None:
            return None
        figures = self.measure.measure(self.draw_fresh_chains().images)
        self.log.write_scalars(self.state.iteration, figures)
        self.progress.say(f"iteration {self.state.iteration}: {self.measure.describe(figures)}")
        return self.measure.get_key_figure(figures)

    def record_classification(self, examples: LabelledImages) -> None:
        """Log and print how well the model classifies test images, and plot how far its confidence can be trusted."""
        iteration = self.state.iteration
        with self.sampler.freeze_model() as energy:
            found = measure_classification(energy, examples, self.settings.classify_scale)
        accuracy, error = found.total_accuracy, found.expected_error
        self.log.write_scalars(iteration, {"test_accuracy": accuracy, "test_calibration_error": error})
        number = len(examples.images)
        what = f"{number:,} test images: accuracy {accuracy:.1%}, calibration error {error:.3f}"
        path = pictures.plot_reliability({f"iteration {iteration}": found}, self.folder / "reliability.png")
        self.progress.say(f"iteration {iteration}: {what}, {path}")

    def record_energies(self, step: Step) -> None:
        """Log histograms of the energies of data, negatives and fresh chains, and how far the fresh chains moved."""
        iteration = self.state.iteration
        chains = self.draw_fresh_chains()
        with self.sampler.freeze_model() as energy, torch.no_grad():
            tensors = {"data": energy(step.images, step.labels), "negatives": energy(step.samples, step.chain_labels)}
        tensors["long_chains"] = chains.energies
        energies = {name: values.double().cpu().numpy() for name, values in tensors.items()}
        if not all((abs(values) < MAX_HISTOGRAM_ENERGY).all() for values in energies.values()):
            return  # without the guard, a run may go on with energies that have no histogram
        edges = np.histogram_bin_edges(np.concatenate(list(energies.values())), BINS)
        counts = {name: np.histogram(values, edges)[0].tolist() for name, values in energies.items()}
        for name, values in energies.items():
            self.log.write_histogram(iteration, f"energy/{name}", values, edges)
        self.log.write_event(iteration, {"energy_histogram": {"edges": edges.tolist(), **counts}})
        self.log.write_scalars(
            iteration, {"long_chain_e": chains.energies.mean().item(), "long_chain_moved": chains.moved}
        )

    def close(self) -> None:
        """Close the progress line."""
        self.progress.close()

    def finish_trackers(self) -> None:
        """Let the trackers send what is left."""
        for tracker in self.trackers:
            tracker.finish()


def write_samples(settings: TrainSettings, sampler: Sampler, images: Tensor, log: RunLog | None) -> None:
    """Save a picture of samples (N, C, H, W), float in [0, 1] or uint8, add it to a log, and print its path."""
    state, path = sampler.state, settings.folder / f"samples_{sampler.state.iteration}.png"
    grid = images[:GRID] if images.is_floating_point() else images[:GRID] / 255
    titles = sampler.describe_labels(len(grid))
    columns = pictures.choose_columns(len(grid), len(set(titles)))
    pictures.save_grid(grid, path, columns=columns, titles=titles)
    if log is not None:
        log.write_picture(state.iteration, "samples", path)
    print(f"fresh samples, {sampler.num_steps} Langevin steps: {path.name}")


def report_quality(settings: TrainSettings, sampler: Sampler, images: Tensor, measure: SampleMeasure | None) -> None:
    """Measure samples (N, C, H, W), float in [0, 1] or uint8; print the figures, and save those of Inception."""
    state, folder = sampler.state, settings.folder
    if measure is not None and measure.has_inception:
        figures = measure.measure(images, splits=max(1, len(images) // IMAGES_PER_SPLIT))
        steps = f"{sampler.num_steps} Langevin steps"
        print(f"{len(images):,} samples, {steps}: {measure.describe(figures)} (to at most 10,000 training images)")
        about = {"iteration": state.iteration, "samples": len(images), "num_steps": sampler.num_steps}
        write_json(folder / f"quality_{state.iteration}.json", about | figures)
    elif measure is not None:
        logged = {name: dict(zip(*read_series(folder, name), strict=True)) for name in measure.figures}
        rows: dict[str, Mapping[str, float | None]] = {
            "before training": {name: series.get(0) for name, series in logged.items()},
            "now": measure.measure(images),
            "other real images": measure.of_real_images,
        }
        print(f"{len(images)} samples, compared with real images; of distances, smaller is closer:")
        print(format_table({row: {measure.figures[k]: figures[k] for k in figures} for row, figures in rows.items()}))


def draw_curves(settings: TrainSettings, measure: SampleMeasure | None) -> None:
    """Plot the logged figures of a whole run, see docs/figures.md, and print the path of the picture."""
    panels = CURVES
    if measure is not None:
        panels = panels | (INCEPTION_CURVES if measure.has_inception else CLASSIFIER_CURVES) | PATCH_CURVES
    if settings.classify:
        panels = panels | CLASSIFICATION_CURVES
    curves = {
        ylabel: {title: read_series(settings.folder, name) for title, name in lines.items()}
        for ylabel, lines in panels.items()
    }
    path = settings.folder / "curves.png"
    pictures.plot_lines(curves, path, xlabel="iteration", log=LOG_AXES, shares=SHARE_AXES, smooth=True)
    print(f"training curves: {path.name}")
