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

from absl import flags

import cli
import evaluation
from errors import UsageError

FLAGS = flags.FLAGS
GRID = 400  # images of the grid at most

with cli.group("Main"):
    evaluation.define_model_flags()
    flags.DEFINE_integer("num", 100, "images", lower_bound=1)
    flags.DEFINE_string("label", None, "class of all images, by number or name; default one class after the other")
    flags.DEFINE_bool("folder", False, "write every image as a PNG, too")

with cli.group("Sampling"):
    flags.DEFINE_integer("num_steps", None, "Langevin steps; default as the run's own samples, or 200", lower_bound=0)
    flags.DEFINE_float("step_lr", None, "step size of the gradient; default the model's in training, or 10", 0)
    flags.DEFINE_float("proj_norm", 0.0, "clip the gradient elementwise to this; 0: no clip", lower_bound=0)
    flags.DEFINE_float("noise_scale", 0.005, "standard deviation of a step's noise", lower_bound=0)
    flags.DEFINE_integer("batch_size", 100, "images at a time", lower_bound=1)
    evaluation.define_precision_flag()

with cli.group("Network (the checkpoint knows all but --swish_act of a TF1 file)"):
    evaluation.define_network_flags()


def class_of(word: str, names: Sequence[str], classes: int) -> int:
    """Return the number of a class given by number or name. Raises UsageError for what is neither."""
    if not classes:
        raise UsageError(f"--label={word}: the model knows no classes; leave it out")
    if word.isdecimal() and int(word) < classes:
        return int(word)
    numbers = {name.casefold(): number for number, name in enumerate(names)}
    if word.casefold() in numbers:
        return numbers[word.casefold()]
    near = difflib.get_close_matches(word.casefold(), numbers, 3)
    known = f"did you mean {', '.join(near)}?" if near else f"use 0 to {classes - 1}" + (" or a name" if names else "")
    raise UsageError(f"--label={word} is no class of this model; {known}")


def main() -> None:
    import numpy as np
    import torch

    import pictures
    import quality
    from acceleration import PRECISIONS, products_in
    from utils import Progress

    device = evaluation.start()
    saved = evaluation.open_model(evaluation.find_checkpoint(), device)
    model, path, trained, config = saved.model, saved.path, saved.flags, saved.model.config
    if config.network == "DspritesNet" and 0 < config.label_size < 3:
        raise UsageError(f"{path} is conditioned on a size, position or rotation; ebm_combine.py shows such models")
    classes, rescale = config.label_size, trained.get("rescale", 1.0)
    chosen = torch.arange(FLAGS.num) % max(classes, 1)
    if FLAGS.label is not None:
        chosen.fill_(class_of(FLAGS.label, saved.class_names, classes))
    num_steps = trained.get("sample_steps") or 10 * trained.get("num_steps", 20)
    num_steps = num_steps if FLAGS.num_steps is None else FLAGS.num_steps
    step_lr = trained.get("step_lr", 10.0) if FLAGS.step_lr is None else FLAGS.step_lr
    print(
        f"model: {path}; {FLAGS.num} images, {num_steps} Langevin steps of {step_lr:g}, seed {FLAGS.seed}, on {device}"
    )

    progress = Progress(num_steps * -(-FLAGS.num // FLAGS.batch_size), what="Langevin step")
    with quality.within_memory(FLAGS.batch_size), products_in(FLAGS.precision):
        images = quality.fresh_images(
            quality.energy_of(model, rescale, PRECISIONS[FLAGS.precision]),
            torch.eye(classes)[chosen].to(device) if classes else torch.zeros(FLAGS.num, 0, device=device),
            config,
            num_steps=num_steps,
            step_lr=step_lr / rescale,  # gradients to images in [0, 1] are `rescale` times the network's
            noise_std=FLAGS.noise_scale,
            proj_norm=FLAGS.proj_norm * rescale,
            seed=FLAGS.seed,
            batch_size=FLAGS.batch_size,
            progress=progress,
        )
    progress.close()

    folder = pathlib.Path(FLAGS.logdir) / FLAGS.exp / "sample"
    shown, columns = images[:GRID] / 255, 10 if classes == 10 else min(20, max(1, round(min(FLAGS.num, GRID) ** 0.5)))
    scale = max(1, 64 // images.shape[3])
    print(f"wrote {pictures.save_grid(shown, folder / 'samples.png', columns=columns, scale=scale)}")
    pixels = images.permute(0, 2, 3, 1).numpy()
    arrays: dict[str, Any] = {"images": pixels} | ({"labels": chosen.numpy()} if classes else {})
    np.savez_compressed(folder / "samples.npz", **arrays)
    print(f"wrote {folder / 'samples.npz'}")
    if FLAGS.folder:
        for path in (folder / "images").glob("[0-9]*.png"):  # those of a run with more of them
            path.unlink()
        for i, image in enumerate(pixels):
            pictures.save_pixels(image, folder / "images" / f"{i:06}.png")
        print(f"wrote {folder / 'images'}/")


if __name__ == "__main__":
    cli.run(main, __doc__)
