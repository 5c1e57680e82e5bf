"""Measure how many JPEGs per second a decode worker of --dataset=imagenetfull delivers.

    python benchmarks/loader.py
    python benchmarks/loader.py --workers=1,4,16 --batch_size=64 --output=loader.json

The JPEGs are generated, in the usual size of ImageNet's. torchvision's ImageFolder in a DataLoader is measured for
comparison, in turns with this project's loader in one run; the best of --rounds counts. A training run needs batch size
times iterations per second.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import timing
from ebm.readers import imagenet, streaming
from ebm.readers.downloads import import_torchvision
from ebm.support import cli
from ebm.support.cli import flag
from ebm.support.progress import SHORT, Progress
from ebm.support.reports import print_written

Loader = tuple[Callable[[], object], Callable[[], None]]  # a call that reads the next batch, one that ends the workers


@dataclasses.dataclass(frozen=True)
class Settings(timing.BenchmarkOutput):
    """Benchmark"""

    workers: tuple[int, ...] = flag((1, 2), "numbers of decode workers", at_least=1)
    batch_size: int = flag(16, "images per batch", at_least=1)
    batches: int = flag(30, "batches per timing", at_least=1)
    rounds: int = flag(3, "timings per variant", at_least=1)
    width: int = flag(500, "width of a JPEG, in pixels", at_least=1)
    height: int = flag(375, "height of a JPEG, in pixels", at_least=1)
    files: int = flag(64, "JPEGs to make", at_least=1)
    antialias: bool = flag(False, "resize with antialiasing, as torchvision does; else as TensorFlow 1")


def make_jpegs(settings: Settings, folder: pathlib.Path) -> float:
    """Write pictures with detail at all scales, like photographs, to two class folders; return the mean size in kB."""
    generator = np.random.default_rng(0)
    size = settings.width, settings.height
    with Progress(settings.files, what="making JPEG", patience=SHORT) as progress:
        for number in range(settings.files):
            picture = np.full((settings.height, settings.width, 3), 128.0)
            for scale in (2, 4, 8, 16, 32, 64, 128):  # pixels between independent values
                noise = generator.normal(128, 30, (settings.height // scale + 2, settings.width // scale + 2, 3))
                layer = Image.fromarray(noise.clip(0, 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
                picture += (np.asarray(layer) - 128.0) * (scale / 32) ** 0.3
            path = folder / f"class_{number % 2}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path, quality=95)
            progress.advance()
    return sum(path.stat().st_size for path in folder.glob("*/*")) / settings.files / 1000


def start_own_loader(settings: Settings, folder: pathlib.Path, workers: int) -> Loader:
    """Return a loader of this project."""
    dataset = imagenet.open_imagenet(folder, "train", workers=workers, antialias=settings.antialias)
    generator = torch.Generator().manual_seed(0)

    def draw_index() -> torch.Tensor:
        return torch.randint(settings.files, (settings.batch_size,), generator=generator)

    ahead = [draw_index() for _ in range(3)]

    def read_batch() -> object:
        for index in ahead:
            dataset.prefetch(index)
        ahead.append(draw_index())
        return dataset.batch(ahead.pop(0), generator)

    return read_batch, dataset.close


def start_torchvision_loader(settings: Settings, folder: pathlib.Path, workers: int) -> Loader:
    """Return a DataLoader of torchvision's ImageFolder."""
    torchvision = import_torchvision()
    transforms = torchvision.transforms
    change = [transforms.Resize(streaming.SIDE), transforms.CenterCrop(streaming.SIDE), transforms.ToTensor()]
    images = torchvision.datasets.ImageFolder(folder, transforms.Compose(change))
    sampler = torch.utils.data.RandomSampler(images, replacement=True, num_samples=2**20)
    loader = torch.utils.data.DataLoader(images, settings.batch_size, sampler=sampler, num_workers=workers)
    batches = iter(loader)  # its workers end when it is deleted
    return lambda: next(batches), lambda: None


def main(settings: Settings) -> None:
    timing.prepare_output(settings)
    import_torchvision()  # so that a missing torchvision is reported before the JPEGs are made
    starts = {"this project": start_own_loader, "torchvision": start_torchvision_loader}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        kilobytes = make_jpegs(settings, folder)
        print(f"{settings.files} JPEGs of {settings.width}x{settings.height} pixels, {kilobytes:.0f} kB on average")
        places = imagenet.find_images(folder, "train")
        start_time = time.process_time()
        for place in places:
            streaming.decode_image(place, settings.antialias)
        processor = 1000 * (time.process_time() - start_time) / len(places)
        print(f"one image takes {processor:.2f} ms of a processor: at best {1000 / processor:.0f} images/s per worker")
        for workers in settings.workers:
            best = dict.fromkeys(starts, 0.0)
            for _ in range(settings.rounds):
                for variant, start in starts.items():
                    read_batch, stop = start(settings, folder, workers)
                    for _ in range(4):  # until the workers have started
                        read_batch()
                    start_time = time.perf_counter()
                    for _ in range(settings.batches):
                        read_batch()
                    rate = settings.batch_size * settings.batches / (time.perf_counter() - start_time)
                    best[variant] = max(best[variant], rate)
                    stop()
            for variant, rate in best.items():
                row = {"variant": variant, "workers": workers, "images per s": rate, "per worker": rate / workers}
                rows.append(row)
                print(f"{variant:13} {workers:3} workers {rate:7.0f} images/s {rate / workers:7.0f} each", flush=True)
    if settings.output:
        figures = {"torch": torch.__version__, "kilobytes": kilobytes, "processor ms": processor}
        print_written([timing.write_rows(settings, rows, **figures)])


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
