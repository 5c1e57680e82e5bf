"""Show how a trained model samples: make a GIF of Langevin chains, what they start from and a frame per step.

    python imagenet_demo.py --exp=imagenet128_cond --resume_iter=2238000 --swish_act
    python imagenet_demo.py --exp=imagenet128_cond --resume_iter=latest --classes=153,207 --every=5 --seed=3
    python imagenet_demo.py --exp=cifar10_cond --step_lr=10 --num_steps=60 --batch_size=25

The model can be any, also a published TF1 checkpoint. sample.gif, its last frame sample.png and, if ffmpeg is
installed, sample.mp4 go to <logdir>/<exp>/demo/, or to <savedir>/<exp>/demo/ if --savedir is given.
"""

from __future__ import annotations

from ebm.support import interruption

if __name__ == "__main__":
    interruption.guard_start()  # first of all, because importing PyTorch takes seconds

import dataclasses
import math
import pathlib
from collections.abc import Sequence

import torch
from torch import Tensor

from data import find_class, name_classes
from ebm.settings import DemoSettings
from ebm.support import cli, pictures
from ebm.support.errors import UsageError
from ebm.support.hardware import set_up_process
from ebm.support.pixels import to_bytes
from ebm.support.progress import Progress
from ebm.support.sharing import derive_seed
from ebm.tasks.results import Results, own_results
from ebm.tasks.trained_models import (
    TrainedModel,
    find_checkpoint,
    note_contradictions,
    open_model,
    read_names,
    refuse_concept_model,
)
from ebm.training.acceleration import accelerate_chains
from ebm.training.distributed import Workers, share_evaluation
from ebm.training.tuning import settle_precision
from models import draw_starts, freeze_energy
from sampling import check_finite


def choose_classes(settings: DemoSettings, names: Sequence[str], classes: int) -> list[int]:
    """Return the class of each image: those of the setting `classes`, repeated, or random ones.

    names: of the classes. classes: the number of classes of the network.
    """
    number = settings.batch_size
    if settings.classes is None:
        return torch.randint(classes, (number,), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    numbers = [find_class("classes", word.strip(), names, classes) for word in settings.classes.split(",")]
    if len(numbers) > number:
        raise UsageError(f"`classes` names {len(numbers)} and `batch_size`={number} is less; raise it")
    return [numbers[i % len(numbers)] for i in range(number)]


def main(settings: DemoSettings) -> None:
    set_up_process()
    with (
        share_evaluation(settings.device) as workers,
        own_results(settings.results_folder / "demo", workers, settings.results_setting) as results,
    ):
        show_chains(settings, workers, results)


def show_chains(settings: DemoSettings, workers: Workers, results: Results) -> None:
    """Run the chains, each worker its share of the images, and write them as a GIF, a picture and a film."""
    trained = open_model(find_checkpoint(settings), workers.device, settings, ema=settings.ema)
    note_contradictions(settings, trained)
    refuse_concept_model(trained)
    settings = settle_precision(settings, trained.model, workers)
    settings = dataclasses.replace(settings, num_steps=trained.choose_num_steps(settings.num_steps))
    if settings.classes and not trained.model.config.label_size:
        raise UsageError(f"`classes`: {trained.path} has no classes; leave it out")
    step_lr = trained.choose_step_lr(settings.step_lr, published=180.0)
    chains = f"{settings.batch_size} images, {settings.num_steps} Langevin steps with step_lr {step_lr:g}"
    print(f"model: {trained.path}; {chains}")
    columns = math.ceil(math.sqrt(settings.batch_size))
    labels, titles = choose_labels(settings, trained)
    for row in range(0, len(titles), columns):
        print(f"row {row // columns + 1}: {', '.join(titles[row : row + columns])}")
    shares = torch.arange(settings.batch_size).chunk(workers.size)
    parts = workers.share_out(
        shares, lambda numbers: record_frames(settings, trained, labels, numbers, step_lr, workers.rank > 0)
    )
    if workers.rank > 0:
        return
    frames = [pictures.make_grid(images / 255, columns=columns, titles=titles) for images in torch.cat(parts, 1)]
    print(f"{len(frames)} frames: the first is the start, the picture sample.png the last")
    pictures.save_gif(frames, results.add_file("sample.gif"))
    pictures.save_pixels(frames[-1], results.add_file("sample.png"))
    pictures.save_film(frames, results.add_file("sample.mp4"))
    results.print_paths()


def choose_labels(settings: DemoSettings, trained: TrainedModel) -> tuple[Tensor, list[str]]:
    """Return the labels (batch_size, label_size) of the images, and their names; [] for an unconditional model."""
    classes = trained.model.config.label_size
    if not classes:
        return torch.zeros(settings.batch_size, 0), []
    names: Sequence[str] = trained.class_names
    if settings.class_names:
        names = read_names(pathlib.Path(settings.class_names), classes)
    numbers = choose_classes(settings, names, classes)
    return torch.nn.functional.one_hot(torch.tensor(numbers), classes).float(), name_classes(numbers, names)


def record_frames(
    settings: DemoSettings, trained: TrainedModel, labels: Tensor, numbers: Tensor, step_lr: float, quiet: bool
) -> Tensor:
    """Return the frames of the chains with these numbers (n,), as bytes (frames, n, C, H, W) on the CPU.

    The first frame is what they start from, which depends on `seed`, the label and the number of the image alone.
    labels: of all images. step_lr: the step size. quiet: print no progress.
    """
    device = next(trained.model.parameters()).device
    acceleration = accelerate_chains(settings)
    energy = freeze_energy(trained.model, precision=acceleration.precision, rescale=trained.rescale)
    generators = [torch.Generator(device).manual_seed(derive_seed(settings.seed, i)) for i in numbers.tolist()]
    labels = labels[numbers].to(device)
    start = draw_starts(trained.model, len(labels), labels, generators)
    progress, frames = Progress(settings.num_steps, what="Langevin step", quiet=quiet), [to_bytes(start).cpu()]

    def add_frame(images: Tensor) -> None:
        progress.advance()
        if progress.done % settings.every == 0 or progress.done == settings.num_steps:
            frames.append(to_bytes(images).cpu())

    with progress:
        end = acceleration.descend(
            energy.under(labels),
            start,
            num_steps=settings.num_steps,
            step_lr=step_lr / trained.rescale,  # for images in [0, 1] the gradient is `rescale` times larger
            generator=generators,
            after_step=add_frame,
        )
    check_finite(end, "lower `step_lr`")
    return torch.stack(frames)


if __name__ == "__main__":
    cli.run(main, DemoSettings, __doc__)
