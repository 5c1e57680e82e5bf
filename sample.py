"""Sample images from a trained model, each a Langevin chain from noise.

    python sample.py --exp=cifar10_cond --resume_iter=latest --num=64
    python sample.py --exp=cifar10_cond --num=1000 --label=ship --num_steps=200 --seed=3
    python sample.py --exp=fashion_mnist --num=20 --label=3 --folder

samples.png (a grid) and samples.npz go to --logdir/<exp>/sample/; with --folder single PNGs, too. The .npz holds
`images`, uint8 (N, height, width, channels), and, where the model knows classes, `labels`, int64 (N,). Every image has
noise of its own, by seed and place: the same seed gives the same images whatever --batch_size and --num, on one kind of
device and up to the rounding of the network's arithmetic.
"""

from __future__ import annotations

import difflib
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import cli
import pictures
import quality
from acceleration import PRECISIONS, products_in
from ebm.settings import SampleSettings
from errors import UsageError
from evaluation import choose_device, find_checkpoint, note_contradictions, open_model
from utils import Progress

GRID = 400  # images of the grid at most


def find_class(word: str, names: Sequence[str], classes: int) -> int:
    """Return the number of a class given by number or name. Raises UsageError for what is neither."""
    if not classes:
        raise UsageError(f"`label`={word}: the model knows no classes; leave it out")
    if word.isdecimal() and int(word) < classes:
        return int(word)
    numbers = {name.casefold(): number for number, name in enumerate(names)}
    if word.casefold() in numbers:
        return numbers[word.casefold()]
    near = difflib.get_close_matches(word.casefold(), numbers, 3)
    known = f"did you mean {', '.join(near)}?" if near else f"use 0 to {classes - 1}" + (" or a name" if names else "")
    raise UsageError(f"`label`={word} is no class of this model; {known}")


def main(settings: SampleSettings) -> None:
    device = choose_device(settings.device)
    trained = open_model(find_checkpoint(settings), device, swish_act=settings.swish_act, ema=settings.ema)
    note_contradictions(settings, trained)
    model, path, config = trained.model, trained.path, trained.model.config
    if config.network == "DspritesNet" and 0 < config.label_size < 3:
        raise UsageError(f"{path} is conditioned on a size, position or rotation; ebm_combine.py shows such models")
    classes, rescale = config.label_size, trained.rescale
    numbers = torch.arange(settings.num) % max(classes, 1)
    if settings.label is not None:
        numbers.fill_(find_class(settings.label, trained.class_names, classes))
    num_steps = trained.flags.get("sample_steps") or 10 * trained.flags.get("num_steps", 20)
    num_steps = num_steps if settings.num_steps is None else settings.num_steps
    step_lr = trained.choose_step_lr(settings.step_lr)
    steps = f"{num_steps} Langevin steps of {step_lr:g}"
    print(f"model: {path}; {settings.num} images, {steps}, seed {settings.seed}, on {device}")

    progress = Progress(num_steps * -(-settings.num // settings.batch_size), what="Langevin step")
    with quality.within_memory(settings.batch_size), products_in(settings.precision):
        images = quality.fresh_images(
            quality.energy_of(model, rescale, PRECISIONS[settings.precision]),
            torch.eye(classes)[numbers].to(device) if classes else torch.zeros(settings.num, 0, device=device),
            config,
            num_steps=num_steps,
            step_lr=step_lr / rescale,  # gradients to images in [0, 1] are `rescale` times the network's
            noise_std=settings.noise_scale,
            proj_norm=settings.proj_norm * rescale,
            seed=settings.seed,
            batch_size=settings.batch_size,
            progress=progress,
        )
    progress.close()

    folder = pathlib.Path(settings.logdir) / settings.exp / "sample"
    shown, columns = (
        images[:GRID] / 255,
        10 if classes == 10 else min(20, max(1, round(min(settings.num, GRID) ** 0.5))),
    )
    scale = max(1, 64 // images.shape[3])
    print(f"wrote {pictures.save_grid(shown, folder / 'samples.png', columns=columns, scale=scale)}")
    pixels = images.permute(0, 2, 3, 1).numpy()
    arrays: dict[str, Any] = {"images": pixels} | ({"labels": numbers.numpy()} if classes else {})
    np.savez_compressed(folder / "samples.npz", **arrays)
    print(f"wrote {folder / 'samples.npz'}")
    if settings.folder:
        for path in (folder / "images").glob("[0-9]*.png"):  # those of a run with more of them
            path.unlink()
        for i, image in enumerate(pixels):
            pictures.save_pixels(image, folder / "images" / f"{i:06}.png")
        print(f"wrote {folder / 'images'}/")


if __name__ == "__main__":
    cli.run(main, SampleSettings, __doc__)
