"""Measure how many JPEGs per second a decode worker of --dataset=imagenetfull delivers.

    python benchmarks/loader.py
    python benchmarks/loader.py --workers=1,4,16 --batch_size=64 --output=loader.json

The JPEGs are made here, of ImageNet's usual size; beside it torchvision's ImageFolder in a DataLoader, in turns, in one
run; the best of --rounds counts. A training run needs batch size times iterations per second.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile
import time
from collections.abc import Callable

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import cli

FLAGS = flags.FLAGS

with cli.group("Benchmark"):
    flags.DEFINE_list("workers", "1,2", "numbers of decode workers")
    flags.DEFINE_integer("batch_size", 16, "images per batch", lower_bound=1)
    flags.DEFINE_integer("batches", 30, "batches per timing", lower_bound=1)
    flags.DEFINE_integer("rounds", 3, "timings per variant", lower_bound=1)
    flags.DEFINE_integer("width", 500, "of a JPEG, in pixels", lower_bound=1)
    flags.DEFINE_integer("height", 375, "of a JPEG, in pixels", lower_bound=1)
    flags.DEFINE_integer("files", 64, "JPEGs to make", lower_bound=1)
    flags.DEFINE_string("output", "", "also write the figures to this JSON file")


def make_jpegs(folder: pathlib.Path) -> float:
    """Write pictures with detail at all scales, like photographs, to two class folders; return the mean size in kB."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    size = FLAGS.width, FLAGS.height
    for number in range(FLAGS.files):
        picture = np.full((FLAGS.height, FLAGS.width, 3), 128.0)
        for scale in (2, 4, 8, 16, 32, 64, 128):  # pixels between independent values
            noise = generator.normal(128, 30, (FLAGS.height // scale + 2, FLAGS.width // scale + 2, 3))
            layer = Image.fromarray(noise.clip(0, 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
            picture += (np.asarray(layer) - 128.0) * (scale / 32) ** 0.3
        path = folder / f"class_{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path, quality=95)
    return sum(path.stat().st_size for path in folder.glob("*/*")) / FLAGS.files / 1000


def main() -> None:
    import torch

    import data
    import imagenet

    torchvision = data.import_torchvision()
    transforms = torchvision.transforms

    def ours(folder: pathlib.Path, workers: int) -> tuple[Callable[[], object], Callable[[], None]]:
        """Return what gives the next batch, and what ends the workers."""
        dataset = imagenet.open_imagenet(folder, "train", workers=workers)
        generator = torch.Generator().manual_seed(0)
        ahead = [torch.randint(FLAGS.files, (FLAGS.batch_size,), generator=generator) for _ in range(3)]

        def batch() -> object:
            for index in ahead:
                dataset.prefetch(index)
            ahead.append(torch.randint(FLAGS.files, (FLAGS.batch_size,), generator=generator))
            return dataset.batch(ahead.pop(0), generator)

        return batch, dataset.close

    def theirs(folder: pathlib.Path, workers: int) -> tuple[Callable[[], object], Callable[[], None]]:
        change = [transforms.Resize(imagenet.SIDE), transforms.CenterCrop(imagenet.SIDE), transforms.ToTensor()]
        images = torchvision.datasets.ImageFolder(folder, transforms.Compose(change))
        sampler = torch.utils.data.RandomSampler(images, replacement=True, num_samples=2**20)
        loader = torch.utils.data.DataLoader(images, FLAGS.batch_size, sampler=sampler, num_workers=workers)
        batches = iter(loader)  # whose workers end with it
        return lambda: next(batches), lambda: None

    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        kilobytes = make_jpegs(folder)
        print(f"{FLAGS.files} JPEGs of {FLAGS.width}x{FLAGS.height} pixels, {kilobytes:.0f} kB on average")
        places = imagenet.ClassFolders(folder)
        begun = time.process_time()
        for place in places:
            imagenet.decode(place)
        processor = 1000 * (time.process_time() - begun) / len(places)
        print(f"one image takes {processor:.2f} ms of a processor: at best {1000 / processor:.0f} images/s per worker")
        for workers in map(int, FLAGS.workers):
            best = {"this project": 0.0, "torchvision": 0.0}
            for _ in range(FLAGS.rounds):
                for variant, start in (("this project", ours), ("torchvision", theirs)):
                    batch, stop = start(folder, workers)
                    for _ in range(4):  # the workers start
                        batch()
                    begun = time.perf_counter()
                    for _ in range(FLAGS.batches):
                        batch()
                    rate = FLAGS.batch_size * FLAGS.batches / (time.perf_counter() - begun)
                    best[variant] = max(best[variant], rate)
                    stop()
            for variant, rate in best.items():
                row = {"variant": variant, "workers": workers, "images per s": rate, "per worker": rate / workers}
                rows.append(row)
                print(f"{variant:13} {workers:3} workers {rate:7.0f} images/s {rate / workers:7.0f} each", flush=True)
    if FLAGS.output:
        measured = {"torch": torch.__version__, "kilobytes": kilobytes, "processor ms": processor}
        print(f"wrote {cli.write_rows(FLAGS.output, rows, **measured)}")


if __name__ == "__main__":
    cli.run(main, __doc__)
