"""Sample images from a trained model by one new Langevin chain per image.

    python sample.py --exp=cifar10_cond --resume_iter=latest --num=64
    python sample.py --exp=cifar10_cond --num=1000 --label=ship --num_steps=200 --seed=3
    python sample.py --exp=fashion_mnist --num=20 --label=3 --folder

samples.png (a grid) and samples.npz go to <logdir>/<exp>/sample/; --folder adds a PNG file per image. The .npz file
holds `images`, uint8 (N, height, width, channels), and, if the model is conditioned on classes, `labels`, int64 (N,).
The noise of an image depends only on --seed and the image's number: on one kind of device the same seed gives the same
images for any --batch_size and --num, up to rounding in the network. --precision=auto may round otherwise on another
machine.
"""

from __future__ import annotations

from ebm.support import interruption

if __name__ == "__main__":
    interruption.guard_start()  # first of all, because importing PyTorch takes seconds

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data import find_class, name_classes
from ebm.settings import SampleSettings
from ebm.support import cli, pictures
from ebm.support.files import write_file
from ebm.support.hardware import set_up_process
from ebm.support.progress import SHORT, Progress, show_waiting
from ebm.tasks.quality import draw_fresh_images, report_memory_shortage
from ebm.tasks.results import Results, own_results
from ebm.tasks.trained_models import (
    find_checkpoint,
    note_contradictions,
    open_model,
    refuse_concept_model,
)
from ebm.training.acceleration import accelerate_chains
from ebm.training.distributed import Workers, share_evaluation
from ebm.training.tuning import settle_precision
from models import freeze_energy

GRID = 400  # largest number of images in the grid


def main(settings: SampleSettings) -> None:
    set_up_process()
    with (
        share_evaluation(settings.device) as workers,
        own_results(settings.results_folder / "sample", workers, "logdir") as results,
    ):
        sample_images(settings, workers, results)


def sample_images(settings: SampleSettings, workers: Workers, results: Results) -> None:
    """Sample the images, each worker its share of the batches, and write them."""
    device = workers.device
    trained = open_model(find_checkpoint(settings), device, settings, ema=settings.ema)
    note_contradictions(settings, trained)
    model, path, config = trained.model, trained.path, trained.model.config
    refuse_concept_model(trained)
    settings = settle_precision(settings, model, workers)
    classes, rescale = config.label_size, trained.rescale
    numbers = torch.arange(settings.num) % max(classes, 1)
    if settings.label is not None:
        numbers.fill_(find_class("label", settings.label, trained.class_names, classes))
    num_steps = trained.choose_num_steps(cli.AUTO if settings.num_steps is None else settings.num_steps)
    step_lr = trained.choose_step_lr(settings.step_lr)
    steps = f"{num_steps} Langevin steps with step_lr {step_lr:g}"
    print(f"model: {path}; {settings.num} images, {steps}, seed {settings.seed}, on {device}")

    batches = workers.count_share(-(-settings.num // settings.batch_size))
    progress = Progress(num_steps * batches, what="Langevin step")
    acceleration = accelerate_chains(settings)
    with report_memory_shortage(settings.batch_size), progress:
        images = draw_fresh_images(
            freeze_energy(model, precision=acceleration.precision, rescale=rescale),
            torch.eye(classes)[numbers].to(device) if classes else torch.zeros(settings.num, 0, device=device),
            model,
            num_steps=num_steps,
            step_lr=step_lr / rescale,  # the gradient for images in [0, 1] is `rescale` times the network's
            noise_std=settings.noise_scale,
            proj_norm=settings.proj_norm * rescale,
            seed=settings.seed,
            batch_size=settings.batch_size,
            progress=progress,
            share_out=workers.share_out,
            descend=acceleration.descend,
        )
    if workers.rank == 0:
        if len(images) < settings.num:
            print(f"stopped early: {len(images)} of {settings.num} images are done")
        done = numbers[: len(images)] if classes else None
        write_images(settings, images, done, trained.class_names, results)


def write_images(
    settings: SampleSettings, images: Tensor, numbers: Tensor | None, names: Sequence[str], results: Results
) -> None:
    """Write images uint8 (N, C, H, W) as a grid, as an .npz file and, if asked for, as single files.

    numbers: their classes (N,), None of an unconditional model. names: of all classes, empty if they are not known.
    """
    titles = [] if numbers is None else name_classes(numbers[:GRID].tolist(), names)
    grid, columns = images[:GRID] / 255, pictures.choose_columns(min(settings.num, GRID), len(set(titles)))
    pictures.save_grid(grid, results.add_file("samples.png"), columns=columns, titles=titles)
    pixels = images.permute(0, 2, 3, 1).numpy()
    arrays: dict[str, Any] = {"images": pixels} | ({} if numbers is None else {"labels": numbers.numpy()})
    path = results.add_file("samples.npz")
    with show_waiting(f"packing {len(images):,} images into {path}"):
        write_file(path, lambda file: np.savez_compressed(file, **arrays))
    if settings.folder:
        folder = results.add_file("images")
        with Progress(len(pixels), what="writing image", patience=SHORT) as progress:
            for i, image in enumerate(pixels):
                pictures.save_pixels(image, folder / f"{i:06}.png", sync=False)
                progress.advance()
    results.print_paths()


if __name__ == "__main__":
    cli.run(main, SampleSettings, __doc__)
