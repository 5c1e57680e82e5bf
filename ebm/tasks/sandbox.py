"""The tasks of ebm_sandbox.py: each examines a model, writes pictures, plots and arrays, and returns its figures."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import have_same_images, name_classes
from ebm.support import metrics, pictures
from ebm.support.interruption import Interruption, keep_what_is_done
from ebm.support.progress import Progress, show_waiting
from ebm.tasks.analysis import (
    add_salt_and_pepper,
    find_feature_directions,
    find_hessian_directions,
    find_neighbours,
    read_images,
)
from ebm.tasks.attacks import restrict_to_lower_half
from ebm.tasks.label_tasks import classify_images, finetune_classifier
from ebm.tasks.mixing import measure_mixing
from ebm.tasks.outliers import compare_scores, detect_outliers
from ebm.tasks.sandbox_run import ROWS, Report, SandboxRun

LONG = 50  # rounds of a long chain, 1,000 steps by default
SHOWN_ROUNDS = (0, 1, LONG // 10, LONG // 2, LONG)  # rounds after which figures and pictures are reported
ROUNDS = {
    "anticorrupt": 5,
    "boxcorrupt": 10,
    "crossclass": 10,
    "cycleclass": 20,
    "democlass": 1,
    "diagnose": LONG,
    "nearestneighbor": 10,
}
DIRECTIONS = 3  # number of directions in which task latent moves an image
STAGES_NOTE = "columns: Langevin steps"
MOVES = 7  # of task latent: from the image itself, then six from where the last one led


# ---------------------------------------------------------------------------------------------------------------------
# Energies


def compare_energies(run: SandboxRun) -> Report:
    """Compare the energies of training and test images: a model that generalises does not separate them."""
    energies: dict[str, np.ndarray] = {}
    figures: dict[str, object] = {}
    run.announce("energies of " + describe_splits(run, run.choose_number()))
    with keep_what_is_done(energies):
        for split in ("train", "test"):
            examples = run.draw_examples(split, run.choose_number())
            values = run.model.compute_energies(*examples, progress=f"energies of {split}")
            energies[split] = run.write_array(f"energies_{split}", values)
            figures |= {f"{split} mean": values.mean().item(), f"{split} std": values.std(correction=0).item()}
    auroc, verdict = measure_memorisation(run, energies)
    pictures.plot_histograms(energies, run.add_file("energies.png"), xlabel="energy", title=verdict)
    return Report({**figures, "AUROC train/test": auroc, "verdict": verdict})


def describe_splits(run: SandboxRun, number: int) -> str:
    """Return a phrase for the training and the test images of a task, of each `number` or all there are."""
    train, test = (run.count_images(split, number) for split in ("train", "test"))
    return f"{train:,} training and {test:,} test images"


def measure_memorisation(run: SandboxRun, values: Mapping[str, np.ndarray]) -> tuple[float | None, str]:
    """Return how well values, by split, separate training from test images, as an AUROC and in words.

    A low value means that an image resembles the training images. The AUROC is None if both splits are the same, or if
    one is missing because a signal has ended the work.
    """
    if "test" not in values:
        return None, "stopped before the test images"
    with show_waiting("comparing the images of the two splits"):
        is_same = have_same_images(run.load("train"), run.load("test"))
    if is_same:
        return None, "train and test are the same images: this data set has no split"
    auroc = metrics.auroc(-values["train"], -values["test"])
    return auroc, f"AUROC of train against test {auroc:.3f} (0.5: alike, 1: memorised)"


class ChainRecord(NamedTuple):
    """Energies, distances and images along chains of R rounds."""

    energies: Tensor  # (R + 1, N), after each round
    moved: list[float]  # mean distance of a pixel from its start, after each round
    shown: dict[int, Tensor]  # round of SHOWN_ROUNDS -> the first images (ROWS, C, H, W) after it


def follow_chains(run: SandboxRun, starts: Mapping[str, Tensor], labels: Tensor) -> dict[str, ChainRecord]:
    """Run chains of LONG rounds, after a signal fewer, from batches of images (N, C, H, W), and record each batch.

    labels: of each batch, (N, label_size).
    """
    start, labels = torch.cat(list(starts.values())), labels.repeat(len(starts), 1)
    energies, moved, shown = [], [], {}
    quiet = Progress(0, what="energies", quiet=True)
    for k, x in enumerate(run.model.run_stages(start, labels, rounds=LONG, progress="diagnose")):
        try:
            values = run.model.compute_energies(x, labels, progress=quiet)
            run.model.require_all()
        except Interruption:
            if k < 2:  # no round has energies before and after it
                raise
            break
        energies.append(values)
        moved.append((x - start).abs().flatten(1).mean(1))
        if k in SHOWN_ROUNDS:
            shown[k] = x
    workers = run.results.workers
    workers.unfinished.clear()  # of the round that is left out
    workers.note_part("rounds", len(energies) - 1, LONG)

    def split(values: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
        return values.chunk(len(starts), dim)

    distances = [values.mean(1).tolist() for values in split(torch.stack(moved), 1)]
    images = {k: split(x) for k, x in shown.items()}
    return {
        name: ChainRecord(values, distances[i], {k: parts[i][:ROWS] for k, parts in images.items()})
        for i, (name, values) in enumerate(zip(starts, split(torch.stack(energies), 1), strict=True))
    }


def diagnose_chains(run: SandboxRun) -> Report:
    """Follow chains of 50 rounds from where training starts them and from test images: their energies and moves."""
    examples = run.draw_examples("test", run.choose_number(100))
    run.announce(f"{2 * len(examples.images):,} chains, from new starts and from test images", LONG)
    starts = {"starts": run.draw_starts(examples.labels), "images": examples.images}
    chains = follow_chains(run, starts, examples.labels)
    for name, followed in chains.items():
        run.write_array(f"energies_from_{name}", followed.energies)
    of_data = chains["images"].energies[0]
    low, high = of_data.quantile(torch.tensor([0.05, 0.95], device=of_data.device)).tolist()
    of_starts = chains["starts"].energies
    within = ((low <= of_starts) & (of_starts <= high)).double().mean(1).tolist()
    plot_chains(run, chains, (low, high), within)
    columns = {
        f"{name}, {k * run.model.num_steps}": x for name, followed in chains.items() for k, x in followed.shown.items()
    }
    titles = run.describe_labels(examples.first(ROWS).labels)
    note = "chains from new starts and from test images, after so many Langevin steps"
    run.write_panel("images", columns, titles, note)
    rows = {
        f"step {k * run.model.num_steps}": {
            **{f"E from {name}": followed.energies[k].mean().item() for name, followed in chains.items()},
            "within data": within[k],
            **{f"moved from {name}": followed.moved[k] for name, followed in chains.items()},
        }
        for k in chains["starts"].shown
    }
    verdict = f"{within[-1]:.0%} of the chains from new starts end within the middle 90 % of the data's energies"
    return Report({"data mean": of_data.mean().item(), "verdict": verdict, **rows})


def plot_chains(
    run: SandboxRun, chains: Mapping[str, ChainRecord], data_range: tuple[float, float], within: Sequence[float]
) -> None:
    """Plot energies and distances over Langevin steps, and histograms of energies.

    data_range: the middle 90 % of the data's energies. within: share of the chains from new starts inside this range,
    after each round.
    """
    steps = [k * run.model.num_steps for k in range(len(within))]
    lines = {f"from {name}": (steps, followed.energies.mean(1).cpu()) for name, followed in chains.items()}
    band = {
        f"{name} of the data": (steps, [edge] * len(steps))
        for name, edge in zip(("lowest 5 %", "highest 5 %"), data_range, strict=True)
    }
    share = "share of chains within\nthe data's middle 90 %"
    panels: dict[str, Any] = {
        "mean energy": lines | band,
        "mean pixel change": {f"from {name}": (steps, followed.moved) for name, followed in chains.items()},
        share: {"from starts": (steps, within)},
    }
    pictures.plot_lines(panels, run.add_file("chains.png"), xlabel="Langevin steps", shares=[share])
    ends = {f"starts, {steps[k]} steps": chains["starts"].energies[k].cpu() for k in (1, -1)}
    of_data = chains["images"].energies[0].cpu()
    pictures.plot_histograms({"data": of_data, **ends}, run.add_file("energies.png"), xlabel="energy")


# ---------------------------------------------------------------------------------------------------------------------
# Restoring images


def measure_mean_squares(images: Tensor, real: Tensor) -> Tensor:
    """Return the mean squared error of each image to the real one, (N,)."""
    return (images - real).square().flatten(1).mean(1)


def denoise_images(run: SandboxRun) -> Report:
    """Remove salt-and-pepper noise from test images by 5 rounds of Langevin steps."""
    real, labels = run.draw_examples("test", run.choose_number(ROWS))
    run.announce(f"{len(real):,} test images", ROUNDS["anticorrupt"])
    corrupt = add_salt_and_pepper(real, run.model.generator)
    restored = run.model.run_chain(corrupt, labels, rounds=ROUNDS["anticorrupt"], progress="anticorrupt")
    columns = {"corrupt": corrupt[: len(restored)], "restored": restored, "real": real[: len(restored)]}
    titles = run.describe_labels(labels[: min(ROWS, len(restored))])
    run.write_panel("restored", {name: images[:ROWS] for name, images in columns.items()}, titles)
    errors = {name: measure_mean_squares(columns[name], columns["real"]) for name in ("corrupt", "restored")}
    return Report({f"MSE {name}": values.mean().item() for name, values in errors.items()})


def inpaint_images(run: SandboxRun) -> Report:
    """Inpaint the lower half of images; smaller errors on training than on test images would show memorisation.

    As in the reference, errors are means over the whole image, of which the upper half is kept.
    """
    errors: dict[str, np.ndarray] = {}
    columns: dict[str, Tensor] = {}
    figures: dict[str, object] = {}
    run.announce(describe_splits(run, run.choose_number(10_000)), ROUNDS["boxcorrupt"])
    with keep_what_is_done(errors):
        for split in ("train", "test"):
            real, labels = run.draw_examples(split, run.choose_number(10_000))
            half = real.shape[2] // 2
            is_lower = (torch.arange(real.shape[2], device=real.device) >= half).float()[:, None]
            corrupt = torch.cat([real[:, :, :half], run.draw_starts(labels)[:, :, half:]], 2)
            restored = run.model.run_chain(
                corrupt,
                labels,
                rounds=ROUNDS["boxcorrupt"],
                restrict=restrict_to_lower_half,
                noise=is_lower,  # as in the reference, gradients are taken at the upper half as it is
                progress=f"inpaint {split}",
            )
            real = real[: len(restored)]
            values = measure_mean_squares(restored, real)
            errors[split] = run.write_array(f"mse_{split}", values)
            figures |= {f"{split} MSE mean": values.mean().item(), f"{split} MSE std": values.std(correction=0).item()}
            lower = measure_mean_squares(restored[:, :, half:], real[:, :, half:])
            figures[f"{split} MSE of the lower half"] = lower.mean().item()
            batches = {"start": corrupt, "restored": restored, "real": real}
            columns |= {f"{split} {name}": images for name, images in batches.items()}
    auroc, verdict = measure_memorisation(run, errors)
    xlabel = "mean squared error of the restored image"
    pictures.plot_histograms(errors, run.add_file("mse.png"), xlabel=xlabel, title=verdict)
    rows = min(ROWS, *map(len, errors.values()))
    run.write_panel("restored", {name: images[:rows] for name, images in columns.items()})
    return Report({**figures, "AUROC train/test": auroc, "verdict": verdict})


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def measure_recognition(run: SandboxRun, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the share of images whose class of lowest energy is that of their label.

    Returns no figure if the model is not conditioned on classes, or if a signal has come before.
    """
    with contextlib.suppress(Interruption):
        if run.find_class_names():
            classes = run.model.compute_logits(images, progress="recognise").argmax(1)
            is_right = classes == labels[: len(classes)].argmax(1)
            return {"recognised as their class": is_right.double().mean().item()}
    return {}


def change_classes(run: SandboxRun) -> Report:
    """Turn test images into another class: 10 rounds of Langevin steps from one image under the label of the next."""
    run.require_class_names("crossclass")
    target = run.draw_examples("test", run.choose_number(ROWS))
    run.announce(f"{len(target.images):,} test images", ROUNDS["crossclass"])
    start = target.images.roll(1, 0)
    stages = list(run.model.run_stages(start, target.labels, rounds=ROUNDS["crossclass"], progress="crossclass"))
    names = run.describe_labels(target.labels)
    titles = [f"{start} → {end}" for start, end in zip(names[-1:] + names[:-1], names, strict=True)]
    run.write_panel("crossclass", number_stages(run, stages) | {"real": target.images}, titles, STAGES_NOTE)
    return Report(measure_recognition(run, stages[-1], target.labels))


def number_stages(run: SandboxRun, stages: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the stages of a chain by title: the number of Langevin steps before each stage."""
    return {str(i * run.model.num_steps) if i else "start": stage for i, stage in enumerate(stages)}


def sample_stages(run: SandboxRun) -> Report:
    """Sample by 20 rounds of Langevin steps under the labels of test images; show all rounds and images."""
    real = run.draw_examples("test", run.choose_number(100))
    run.announce(f"{len(real.images):,} images", ROUNDS["cycleclass"])
    start = run.draw_starts(real.labels)
    stages = list(run.model.run_stages(start, real.labels, rounds=ROUNDS["cycleclass"], progress="cycleclass"))
    columns = number_stages(run, stages) | {"real": real.images}
    run.write_panel("cycleclass", columns, run.describe_labels(real.labels), STAGES_NOTE)
    return Report(measure_recognition(run, stages[-1], real.labels))


def sample_classes(run: SandboxRun) -> Report:
    """Sample 5 images of each class, of at most 10 random classes, by a round of Langevin steps."""
    names = run.require_class_names("democlass")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(run.settings.seed))
    classes = order[:10].sort().values
    labels = torch.eye(len(names))[classes.repeat_interleave(5)].to(run.model.device)
    run.announce(f"{len(labels)} images", ROUNDS["democlass"])
    samples = run.model.run_chain(run.draw_starts(labels), labels, rounds=ROUNDS["democlass"], progress="democlass")
    samples = samples[: len(samples) // 5 * 5]  # the images of the last class may not all be done
    if not len(samples):
        run.model.require_all()
    titles = name_classes(classes.tolist(), names)
    run.write_panel("democlass", dict(zip(titles, samples.split(5), strict=False)))
    return Report(measure_recognition(run, samples, labels))


def find_training_neighbours(run: SandboxRun) -> Report:
    """Sample 10 images and find the 5 nearest training images of each in L2; do the same for test images."""
    train, rows = run.load("train"), run.choose_number(10)
    search = f"the nearest of {len(train):,} training images to {rows} test images and {rows} samples"
    run.announce(search, ROUNDS["nearestneighbor"])
    labels = run.sample_labels(rows)
    samples = run.model.run_chain(
        run.draw_starts(labels), labels, rounds=ROUNDS["nearestneighbor"], progress="nearestneighbor"
    )
    run.model.require_all()
    distances, indices = find_neighbours(torch.cat([samples, run.draw_examples("test", rows).images]), train, 5)
    neighbours = read_images(train, indices[:rows].flatten()).view(rows, -1, *train.image_shape)
    columns = {f"nearest {k + 1}": neighbours[:, k] for k in range(neighbours.shape[1])}
    run.write_panel("neighbours", {"sample": samples, **columns}, run.describe_labels(labels))
    closest = {"samples": distances[:rows, 0], "test images": distances[rows:, 0]}
    return Report({f"L2 distance of {name} to the nearest": value.mean().item() for name, value in closest.items()})


def traverse_directions(run: SandboxRun) -> Report:
    """Move an image along the directions in which its energy curves most downwards: 7 moves, each followed by a round.

    Each of three directions has a row that goes backwards along it and one that goes forwards. After each round every
    row takes its direction anew, at the image where it is.
    """
    images, labels = run.draw_examples("test", run.choose_number(1))
    x, labels = images.repeat_interleave(2 * DIRECTIONS, 0), labels.repeat_interleave(2 * DIRECTIONS, 0)
    kind = "the energy's Hessian" if run.settings.hessian else "the features' Jacobian"
    directions_and_moves = f"{2 * DIRECTIONS * len(images)} rows of {MOVES} moves along directions of {kind}"
    run.announce(f"{directions_and_moves}, each followed by {run.model.num_steps} Langevin steps")
    progress = Progress(len(images) + (2 * MOVES - 1) * len(x), what="latent")
    values, vectors = find_directions(run, images, labels[:: 2 * DIRECTIONS], progress)
    directions = vectors.repeat_interleave(2, 1).flatten(0, 1)  # (N, 3, C, H, W) -> (6·N, C, H, W)
    columns = {"image": x, "move 1": move_images(run, x, labels, directions, progress)}
    rows = torch.arange(len(x), device=x.device)
    for move in range(2, MOVES + 1):
        x = columns[f"move {move - 1}"]
        _, vectors = find_directions(run, x, labels, progress)
        directions = align_signs(vectors[rows, rows // 2 % DIRECTIONS], directions)
        columns[f"move {move}"] = move_images(run, x, labels, directions, progress, bounded=True)
    kind, source = ("eigenvalue", "energy's Hessian") if run.settings.hessian else ("singular value", "features")
    pairs = [(k, value) for row in values.tolist() for k, value in enumerate(row, 1)]
    titles = [f"{arrow} {k} ({value:.3g})" for k, value in pairs for arrow in "←→"]
    note = f"← k, → k: backwards and forwards along direction k; in brackets the {kind} of the {source} at the image"
    run.write_panel("traversals", columns, titles, note)
    figures = {
        f"image {i + 1}": {f"{kind} {k + 1}": v for k, v in enumerate(row)} for i, row in enumerate(values.tolist())
    }
    return Report(figures)


def find_directions(run: SandboxRun, images: Tensor, labels: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
    """Return 3 directions (N, 3, C, H, W) of length 1 at each image (N, C, H, W), and their values (N, 3).

    They are eigenvectors and eigenvalues of the energy's Hessian, smallest first, or singular vectors and values of the
    features' Jacobian, largest first, with `hessian`=False.
    """
    model = run.model

    def find(part: slice) -> Tensor:
        rows = []
        for image, label in zip(images[part], labels[part].split(1), strict=True):
            if run.settings.hessian:
                energy = model.energy.under(label)
                values, vectors = find_hessian_directions(energy, image, DIRECTIONS, model.generator)
            else:
                features = functools.partial(model.compute_features, labels=label)
                values, vectors = find_feature_directions(features, image, DIRECTIONS)
            rows.append(torch.cat([values[:, None], vectors.flatten(1)], 1))
        return torch.stack(rows)

    found = model.compute_in_batches(find, len(images), progress, each=1000)  # one image at a time
    model.require_all()
    return found[..., 0], found[..., 1:].reshape(-1, DIRECTIONS, *images.shape[1:])


def align_signs(vectors: Tensor, reference: Tensor) -> Tensor:
    """Return vectors (N, ...), each with the sign, which is arbitrary, that takes it nearer to its reference."""
    backwards = (vectors * reference).flatten(1).sum(1) < 0
    return torch.where(backwards.view(-1, *[1] * (vectors.dim() - 1)), -vectors, vectors)


def move_images(
    run: SandboxRun, x: Tensor, labels: Tensor, directions: Tensor, progress: Progress, *, bounded: bool = False
) -> Tensor:
    """Return images (N, C, H, W) after a move along directions of the same shape, and a round of 4 times the step size.

    Images move backwards and forwards by turns. bounded: clip them to [0, 1] before the round, as the reference does
    after each move but the first.
    """
    signs = torch.tensor([-1.0, 1.0], device=x.device).repeat(len(x) // 2).view(-1, 1, 1, 1)
    start = x + signs * directions
    start = start.clamp(0, 1) if bounded else start
    moved = run.model.run_chain(start, labels, rounds=1, pull=4.0, progress=progress)
    run.model.require_all()
    return moved


TASKS: dict[str, Callable[[SandboxRun], Report]] = {
    "label": classify_images,
    "labelfinetune": finetune_classifier,
    "energyeval": compare_energies,
    "diagnose": diagnose_chains,
    "mixing": measure_mixing,
    "mixenergy": detect_outliers,
    "ood": compare_scores,
    "anticorrupt": denoise_images,
    "boxcorrupt": inpaint_images,
    "crossclass": change_classes,
    "cycleclass": sample_stages,
    "democlass": sample_classes,
    "nearestneighbor": find_training_neighbours,
    "latent": traverse_directions,
}
