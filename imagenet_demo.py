"""Show a trained model sample: a GIF of Langevin chains from noise, one frame per step.

    python imagenet_demo.py --exp=imagenet128_cond --resume_iter=2238000 --swish_act
    python imagenet_demo.py --exp=imagenet128_cond --resume_iter=latest --classes=153,207 --every=5 --seed=3
    python imagenet_demo.py --exp=cifar10_cond --step_lr=10 --num_steps=60 --batch_size=25

Any model below --logdir will do, a published TF1 checkpoint too. sample.gif, its last frame sample.png and, where
ffmpeg is installed, sample.mp4 go to --savedir/<exp>/.
"""

from __future__ import annotations

import difflib
import math
import pathlib
import shutil
import subprocess
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

import checkpoint
import cli
import models
import pictures
from acceleration import PRECISIONS, products_in
from ebm.settings import DemoSettings
from errors import UsageError
from evaluation import choose_device, note_contradictions, open_model
from models import spectral_norm_once
from sampling import langevin
from training import noise_images
from utils import Progress

FPS = 20  # frames per second


def read_names(path: pathlib.Path, classes: int) -> list[str]:
    """Read the names of so many classes, one per line. Raises UsageError where the file does not hold them."""
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no text in UTF-8"
        raise UsageError(f"`class_names`={path} cannot be read: {reason}") from None
    if len(names) != classes:
        raise UsageError(f"`class_names`={path} has {len(names)} lines and the network {classes} classes; one per line")
    return names


def find_class(word: str, names: Sequence[str], classes: int) -> int:
    """Return the number of a class given as number or name; commas separate several names of one class.

    Raises UsageError for what is no class, or the name of several.
    """
    if word.isdecimal():
        if int(word) >= classes:
            raise UsageError(f"`classes`: there is no class {word}; the network has 0 to {classes - 1}")
        return int(word)
    if not names:
        remedy = f"give numbers from 0 to {classes - 1}, or `class_names`=FILE"
        raise UsageError(f"`classes`: {word!r} cannot be looked up, no names are known here; {remedy}")
    numbers: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        for synonym in name.casefold().split(","):
            numbers.setdefault(synonym.strip(), []).append(number)
    found = numbers.get(word.casefold(), [])
    if len(found) > 1:
        raise UsageError(f"`classes`: {word!r} is the name of the classes {', '.join(map(str, found))}; give a number")
    if not found:
        near = ", ".join(difflib.get_close_matches(word.casefold(), numbers, 3))
        raise UsageError(f"`classes`: no class is called {word!r}" + (f"; did you mean {near}?" if near else ""))
    return found[0]


def choose_classes(settings: DemoSettings, names: Sequence[str], classes: int) -> list[int]:
    """Return the class of each image: those of `classes`, repeated, or random ones."""
    number = settings.batch_size
    if settings.classes is None:
        return torch.randint(classes, (number,), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    given = [find_class(word.strip(), names, classes) for word in settings.classes.split(",")]
    if len(given) > number:
        raise UsageError(f"`classes` names {len(given)} and `batch_size`={number} is less; raise it")
    return [given[i % len(given)] for i in range(number)]


def chain(
    model: models.EnergyNetwork,
    labels: Tensor | None,
    number: int,
    *,
    num_steps: int,
    every: int,
    step_lr: float,
    rescale: float,
    generator: torch.Generator,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield how many Langevin steps are done, and the images (number, C, H, W) in [0, 1], after each `every` steps.

    Images start as noise; labels are (number, label_size) or None. The network's images are in [0, rescale]. dtype:
    what its energies are computed in.
    """
    shape = (number, *model.config.image_shape)
    x = noise_images(shape, generator, network=model.config.network, rescale=rescale)
    weights = spectral_norm_once(model, dtype)
    done = 0
    while done < num_steps:
        steps = min(every, num_steps - done)
        x = langevin(
            lambda x: model.energy(weights, x, labels),
            x,
            num_steps=steps,
            step_lr=step_lr * rescale,
            noise_std=0.005 * rescale,
            bounds=(0.0, rescale),
            generator=generator,
        )
        done += steps
        yield done, x / rescale


def save_mp4(frames: Sequence[np.ndarray], path: pathlib.Path) -> pathlib.Path | None:
    """Write uint8 frames (height, width, 1 or 3) with ffmpeg; None, having said why, where it is missing or fails."""
    program = shutil.which("ffmpeg")
    if program is None:
        print(f"note: no {path.name}, ffmpeg is not installed")
        return None
    height, width, channels = frames[0].shape
    kind = "gray" if channels == 1 else "rgb24"
    source = f"-f rawvideo -pix_fmt {kind} -s {width}x{height} -r {FPS} -i -"
    even = "-vf pad=ceil(iw/2)*2:ceil(ih/2)*2 -pix_fmt yuv420p"  # what players take
    command = [program, *f"-y -loglevel error {source} {even}".split(), str(path)]
    pixels = b"".join(frame.tobytes() for frame in frames)
    done = subprocess.run(command, input=pixels, capture_output=True, check=False)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().split("\n")[-1]
        print(f"note: no {path.name}, ffmpeg failed ({reason})")
        return None
    return path


def main(settings: DemoSettings) -> None:
    device = choose_device(settings.device)
    path = checkpoint.find(pathlib.Path(settings.logdir) / settings.exp, settings.resume_iter)
    trained = open_model(path, device, swish_act=settings.swish_act, ema=settings.ema)
    note_contradictions(settings, trained)
    config = trained.model.config
    if config.network == "DspritesNet" and 0 < config.label_size < 3:
        raise UsageError(f"{path} is conditioned on a size, position or rotation; ebm_combine.py shows such models")
    if settings.classes and not config.label_size:
        raise UsageError(f"`classes`: {path} has no classes; leave it out")
    folder = pathlib.Path(settings.savedir) / settings.exp
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"`savedir`={settings.savedir}: cannot make {folder} ({error.strerror})") from None

    columns = math.ceil(math.sqrt(settings.batch_size))
    labels = None
    if config.label_size:
        names: Sequence[str] = trained.class_names
        if settings.class_names:
            names = read_names(pathlib.Path(settings.class_names), config.label_size)
        classes = choose_classes(settings, names, config.label_size)
        labels = torch.nn.functional.one_hot(torch.tensor(classes), config.label_size).float().to(device)
        for row in range(0, settings.batch_size, columns):
            said = [f"{number} {names[number]}" if names else str(number) for number in classes[row : row + columns]]
            print(f"classes of row {row // columns + 1}: {', '.join(said)}")

    progress = Progress(settings.num_steps, what="Langevin step")
    frames = []
    with products_in(settings.precision):
        for done, images in chain(
            trained.model,
            labels,
            settings.batch_size,
            num_steps=settings.num_steps,
            every=settings.every,
            step_lr=settings.step_lr,
            rescale=trained.rescale,
            generator=torch.Generator(device).manual_seed(settings.seed),
            dtype=PRECISIONS[settings.precision],
        ):
            frames.append(pictures.grid(images, columns=columns, padding=0))
            progress.update(done)
    progress.close()
    print(f"{len(frames)} frames: {pictures.save_gif(frames, folder / 'sample.gif', fps=FPS)}")
    print(f"the last one: {pictures.save_pixels(frames[-1], folder / 'sample.png')}")
    film = save_mp4(frames, folder / "sample.mp4")
    if film is not None:
        print(f"the film: {film}")


if __name__ == "__main__":
    cli.run(main, DemoSettings, __doc__)
