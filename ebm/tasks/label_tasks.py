"""The sandbox tasks that classify images by their energies, also under attack: label and labelfinetune."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping

import torch
from torch import Tensor

import checkpoint
from data import name_classes
from ebm.settings import SandboxSettings
from ebm.support import metrics, pictures
from ebm.support.errors import UsageError
from ebm.support.interruption import Interruption, keep_what_is_done
from ebm.support.progress import Progress
from ebm.tasks.attacks import SHADES, Attack, draw_offset, restrict_to_ball
from ebm.tasks.robustness import measure_robustness
from ebm.tasks.sandbox_run import ROWS, Examples, Report, SandboxRun

# The accuracy of a conditional model in the paper, for CIFAR-10, as later papers quote it.
PAPER_ACCURACY = "0.491"


def classify_images(run: SandboxRun) -> Report:
    """Classify test images by −E(x, y), also under attack: `pgd`, `labelgrid` (growing radii), `attack`=autoattack."""
    run.require_class_names("label")
    trained = run.model.model.settings
    scale = (trained.get("classify") and trained.get("classify_scale")) or 1.0
    if run.settings.attack == "autoattack":
        return measure_robustness(run, scale)
    if run.settings.labelgrid:
        return classify_in_balls(run)
    name = "lival" if run.settings.lnorm == "-1" else "l2val"
    value, usual = getattr(run.settings, name), getattr(SandboxSettings, name)
    if run.settings.pgd and value != usual:
        print(f"note: {name}={value:g} takes effect; the reference attacks with {usual:g}, except in a grid")
    return classify_test_images(run, scale)


def finetune_classifier(run: SandboxRun) -> Report:
    """Train the model for one epoch as a classifier, or load it with `train`=False, then classify as task label."""
    run.require_class_names("labelfinetune")
    model, path = run.model, run.results.folder / "model_supervised.pt"
    if not run.settings.train:
        if not path.exists():
            raise UsageError(f"`train`=False loads {path}, which is missing; run once with `train`")
        contents = checkpoint.load(path)
        if "bias" in contents:
            raise UsageError(f"{path} is of an earlier version, which trained a bias, too; run again with `train`")
        finetuned = checkpoint.load_energy(path, device=model.device)
        checkpoint.check_config(finetuned.config, model.model.config, path)
        run.model = dataclasses.replace(model, model=finetuned)
        report = classify_test_images(run)
        checkpoint.save(run.add_file(path.name), contents)  # the earlier results, with their copy, are now elsewhere
        return report
    number = run.count_images("train", run.choose_number())
    run.announce(f"one epoch of {number:,} training images under each of {model.classes} classes")
    loss = model.finetune(*run.draw_examples("train", run.choose_number()))
    contents = {"config": dataclasses.asdict(model.model.config), "model": model.model.state_dict(), "iteration": 0}
    checkpoint.save(run.add_file(path.name), contents)
    return Report({"mean loss of the epoch": loss, **classify_test_images(run).figures})


def classify_test_images(run: SandboxRun, scale: float = 1.0) -> Report:
    """Measure accuracy and calibration on test images, with and without refinement, and the same after the attack.

    scale: the factor of the energies in the probabilities of the classes, softmax(−scale · E).
    """
    examples = run.draw_examples("test", run.choose_number())
    attack = choose_attack(run.settings)
    announce_classification(run, f"{len(examples.images):,} test images", attack)
    progress = Progress(len(examples.images), what="classify")
    logits, attacked = classify_under_attack(run, examples, attack, progress, is_clean_measured=True)
    figures: dict[str, object] = {"attack": str(attack), "refinement": run.describe_refinement()}
    figures |= measure_accuracies(logits, examples.classes) | measure_calibration(run, logits, examples.classes, scale)

    rows = examples.first(min(ROWS, len(attacked)))
    columns = {"real": rows.images} | ({"attacked": attacked[:ROWS]} if attack.steps else {})
    with contextlib.suppress(Interruption):
        ball = functools.partial(restrict_to_ball, radius=run.refine)
        refined = run.model.run_chain(attacked[:ROWS], rows.labels, rounds=1, restrict=ball, progress="images to show")
        run.model.require_all()
        change = refined - rows.images
        columns |= {"refined": refined} if run.model.num_steps else {}
        columns |= {"change": 0.5 + 0.5 * change / change.abs().amax().clamp(min=1e-12)}
    true = run.describe_labels(rows.labels)
    last, values = list(logits.items())[-1]
    names = name_classes(values[:ROWS].argmax(1).tolist(), run.find_class_names())
    titles = [f"{one} → {other}" for one, other in zip(true, names, strict=True)]
    note = f"true class → predicted class ({last})"
    note += "; change: from the real image, grey where there is none, black or white where it is largest" * (
        "change" in columns
    )
    run.write_panel("images", columns, titles, note)
    return Report(figures, run.get_published({"clean": PAPER_ACCURACY}))


def classify_in_balls(run: SandboxRun) -> Report:
    """Measure the accuracy on attacked images as a function of the radius: L∞ 0 … 30/255, or L2 0 … 95/255."""
    if not run.settings.pgd:
        raise UsageError("`labelgrid` needs an attack; give its number of steps with `pgd`")
    examples = run.draw_examples("test", run.choose_number())
    radii = list(range(31) if run.settings.lnorm == "-1" else range(0, 100, 5))
    several = f"{len(examples.images):,} test images, attacked in balls of {len(radii)} radii"
    announce_classification(run, several, choose_attack(run.settings, radii[-1]))
    progress = Progress(len(radii) * len(examples.images), what="images under attacks of growing radius")
    rows: dict[str, dict[str, float]] = {}
    with keep_what_is_done(rows):
        for radius in radii:
            logits, _ = classify_under_attack(run, examples, choose_attack(run.settings, radius), progress)
            run.model.require_all()
            rows[f"{radius}/255"] = measure_accuracies(logits, examples.classes)
    run.results.workers.note_part("radii", len(rows), len(radii))
    radii = radii[: len(rows)]
    curves = {name: [row[name] for row in rows.values()] for name in rows["0/255"]}
    run.write_array("accuracies", torch.tensor([radii, *curves.values()]))
    lines = {name: (radii, values) for name, values in curves.items()}
    xlabel = f"radius of the {'L∞' if run.settings.lnorm == '-1' else 'L2'} ball / (1/255)"
    pictures.plot_lines({"accuracy": lines}, run.add_file("accuracies.png"), xlabel=xlabel, shares=["accuracy"])
    largest = {"attack in the largest ball": str(choose_attack(run.settings, radii[-1]))}
    return Report({**largest, "refinement": run.describe_refinement(), **rows})


def choose_attack(settings: SandboxSettings, radius: float | None = None) -> Attack:
    """Return the attack that the settings describe. radius: replaces that of the settings, in units of 1/255."""
    norm, usual = ("li", settings.lival) if settings.lnorm == "-1" else ("l2", settings.l2val)
    if settings.l2_per_step and norm == "li":
        raise UsageError("`l2_per_step` needs an L2 attack, `lnorm`=2")
    radius = (usual if radius is None else radius) / SHADES
    return Attack(norm, radius, settings.pgd, settings.adaptive, settings.l2_per_step)


def announce_classification(run: SandboxRun, images: str, attack: Attack) -> None:
    """Print how much work a classification of these images is."""
    refinement = run.describe_refinement()
    run.announce(f"{images}, under each of {run.model.classes} classes; attack: {attack}; refinement: {refinement}")


def classify_under_attack(
    run: SandboxRun, examples: Examples, attack: Attack, progress: Progress, *, is_clean_measured: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the class logits (N, classes) of images after an attack, also after refinement, and these images.

    The refinement is left out if `num_steps` is 0.
    is_clean_measured: measure the images as they are, too, and only these if the attack has no steps. Each batch is
    attacked and classified before the next one, so that after a signal the figures are those of the images done so far.
    """
    model, (images, classes) = run.model, (examples.images, examples.classes)
    kinds = ["clean"] * is_clean_measured + ["attacked"] * (attack.steps > 0 or not is_clean_measured)
    refinements = {"": None} | ({", refined": run.refine} if model.num_steps else {})

    @torch.no_grad()
    def examine(part: slice) -> Tensor:
        moved = images[part]
        if attack.steps:
            offset = draw_offset(moved, attack, model.generator)
            moved = model.attack_batch(moved, classes[part], attack, offset, run.refine)
        batches = {"clean": images[part], "attacked": moved}
        logits = [model.classify_batch(batches[kind], radius) for kind in kinds for radius in refinements.values()]
        return torch.cat([moved.flatten(1), *logits], 1)

    found = model.compute_in_batches(examine, len(images), progress, each=model.classes)
    attacked, *logits = found.split([images[0].numel()] + [model.classes] * len(kinds) * len(refinements), 1)
    names = [kind + words for kind in kinds for words in refinements]
    return dict(zip(names, logits, strict=True)), attacked.view(-1, *images.shape[1:])


def measure_accuracies(logits: Mapping[str, Tensor], classes: Tensor) -> dict[str, float]:
    """Return how often each set of logits (n, classes) is largest for the true class, of the first n images.

    classes: of all images, (N,).
    """
    return {
        name: (values.argmax(1) == classes[: len(values)]).double().mean().item() for name, values in logits.items()
    }


def measure_calibration(
    run: SandboxRun, logits: Mapping[str, Tensor], classes: Tensor, scale: float
) -> dict[str, float]:
    """Return the expected calibration error of each set of logits (n, classes), and draw the reliability diagram.

    classes: the true ones of all images, (N,); n are the first. scale: the factor of the logits.
    """
    found = {
        name: metrics.measure_reliability(scale * values, classes[: len(values)]) for name, values in logits.items()
    }
    pictures.plot_reliability(found, run.add_file("reliability.png"))
    return {f"calibration error, {name}": each.expected_error for name, each in found.items()}
