"""A data set whose images are decoded batch by batch, by processes that work ahead of the training.

    dataset = StreamedImages(places, class_names, device="cuda", workers=4)
    images, labels = dataset.batch(index, generator)  # (n, 3, 128, 128) in [0, 1], one-hot
    dataset.prefetch(next_index)  # decoded while the network trains

Images are resized as in the reference, or with antialiasing, a better picture (`antialias`).

Any image can be read by its number. So each epoch shuffles all images, all workers share one permutation, and a resumed
run sees the same images as an uninterrupted one. The reference gives each worker a contiguous share of the records and
shuffles within the next 10,000 of them, a state that no checkpoint can hold.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import multiprocessing
import multiprocessing.resource_tracker
import queue
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from ebm.readers import image_files
from ebm.readers.tensorflow import Fault
from ebm.readers.tf_images import read_tf_pixels
from ebm.support.errors import UsageError
from ebm.support.pixels import dequantise

SIDE = 128  # height and width of an image, in pixels
MAX_BAD = 100  # largest number of damaged images in a run
MAX_PENDING = 8  # largest number of batches that are decoded ahead


class Place(Protocol):
    """The place of an encoded image; str() of it names the image in messages."""

    def load(self) -> tuple[bytes, int]:
        """Return the encoded image and its class, or raise Fault or OSError."""
        ...


Decoded = tuple[np.ndarray, int] | str  # pixels (3, SIDE, SIDE) and class, or an error message


def decode_image(place: Place, antialias: bool) -> Decoded:
    """Read and decode one image; return its pixels and class, or an error message. This runs in a decode worker.

    The pixels are uint8 with antialiasing, and float32 in [0, 255] without.
    """
    try:
        encoded, label = place.load()
    except Fault as fault:
        return str(fault)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    try:
        return read_antialiased_pixels(encoded) if antialias else read_tf_pixels(encoded, SIDE), label
    except Exception as error:  # Pillow raises many types for damaged files
        return f"is no image that can be decoded ({' '.join(str(error).split()) or type(error).__name__})"


def read_antialiased_pixels(encoded: bytes) -> np.ndarray:
    """Decode an image to colour, resize its shorter side to SIDE and cut out the middle: uint8 (3, SIDE, SIDE).

    The interpolation is bilinear with antialiasing. A JPEG at least twice too large is decoded at a half, quarter or
    eighth of its size, which saves most of the work.
    """
    with Image.open(io.BytesIO(encoded), formats=image_files.FORMATS) as image:
        image.draft("RGB", (SIDE, SIDE))
        fitted = ImageOps.fit(image.convert("RGB"), (SIDE, SIDE), Image.Resampling.BILINEAR)
    return np.asarray(fitted).transpose(2, 0, 1)


def serve_images(connection: Connection) -> None:
    """Decode the images that a connection asks for until it closes; ignore Ctrl-C, which the run itself handles."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Freeing 16 MB once makes glibc keep what is freed later. Else the system clears the same 4 MB anew for each image,
    # which takes longer than decoding it.
    np.empty(1 << 24, np.uint8)
    with contextlib.suppress(EOFError, OSError):
        while True:
            connection.send(decode_image(*connection.recv()))


class DecodeWorker:
    """A process that decodes images; it starts when first needed, and again if it was killed.

    It is forked from a server process, so it shares no threads, GPU or MPI state with the run. Its pipe tells each side
    if the other has died, even in the middle of a message.
    """

    def __init__(self) -> None:
        self.process: BaseProcess | None = None

    def start(self) -> None:
        """Start the process."""
        context = multiprocessing.get_context("forkserver")
        # This module is not preloaded: the server would look for it in the working directory and could find another.
        context.set_forkserver_preload(["torch", "PIL.Image"])
        self.connection, other_end = context.Pipe()
        self.process = context.Process(target=serve_images, args=(other_end,), daemon=True)
        # Ctrl-C also goes to the server process, which inherits this; it would end with a traceback while it starts.
        multiprocessing.resource_tracker.ensure_running()  # whose start ends such a block
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        other_end.close()

    def decode(self, place: Place, antialias: bool) -> Decoded:
        """Return the result of `decode_image`; give up an image that kills the process twice."""
        for _ in range(2):
            try:
                if self.process is None:
                    self.start()
                self.connection.send((place, antialias))
                return self.connection.recv()
            except (EOFError, OSError) as error:
                print(f"note: a decode worker was killed ({error or 'out of memory?'}); a new one starts", flush=True)
                self.process = None
        return "kills the process that decodes it"

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.connection.close()
            self.process.join()


class StreamedImages:
    """A `data.Dataset` whose images are read and decoded batch by batch by worker processes.

    places: of the images. device: where batches are put. workers: number of processes; 0 decodes in a thread of this
    process. antialias: whether images are resized with antialiasing, or as in the reference. A damaged image is
    replaced by the next one, and a note names it. UsageError is raised if more than MAX_BAD images, or all of them, are
    damaged.
    """

    name = "imagenetfull"
    image_shape = (3, SIDE, SIDE)
    labels: Tensor | None = None  # labels are on the disk
    noise = "steps"
    index_device = torch.device("cpu")  # reading an index from a GPU would wait for all its work

    def __init__(
        self,
        places: Sequence[Place],
        class_names: tuple[str, ...],
        *,
        device: torch.device | str = "cpu",
        workers: int = 4,
        antialias: bool = False,
    ):
        self.places, self.class_names, self.device, self.antialias = places, class_names, device, antialias
        self.workers = [DecodeWorker() for _ in range(workers)]
        self.idle: queue.SimpleQueue[DecodeWorker] = queue.SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)
        self.threads = concurrent.futures.ThreadPoolExecutor(max(1, workers))  # each waits for a worker
        self.pending: dict[tuple[int, ...], list[concurrent.futures.Future[Decoded]]] = {}
        self.bad: set[int] = set()

    def __len__(self) -> int:
        return len(self.places)

    @property
    def label_size(self) -> int:
        """The width of the label vectors of a batch."""
        return len(self.class_names)

    def prefetch(self, index: Tensor) -> None:
        """Start to decode the images of an index (n,) for a later `batch`.

        If more than MAX_PENDING batches are waiting, the oldest are dropped.
        """
        numbers = tuple(index.tolist())
        if numbers in self.pending:
            return
        self.pending[numbers] = [self.threads.submit(self.decode, number) for number in numbers]
        while len(self.pending) > MAX_PENDING:
            for future in self.pending.pop(next(iter(self.pending))):
                future.cancel()

    def batch(self, index: Tensor, generator: torch.Generator | None, rescale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return the images (n, 3, 128, 128) in [0, rescale] and one-hot labels (n, label_size) of an index (n,)."""
        stored, labels = self.decode_batch(index)
        return dequantise(stored, generator, rescale), F.one_hot(labels, self.label_size).float()

    def raw(self, index: Tensor) -> Tensor:
        """Return the images uint8 (n, 3, 128, 128) of an index (n,), fractions rounded to the nearest byte."""
        stored, _ = self.decode_batch(index)
        return stored.round().to(torch.uint8) if stored.is_floating_point() else stored

    def decode_batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images (n, 3, 128, 128) and classes (n,) of an index (n,), on the device.

        The images are uint8 with antialiasing, and float32 in [0, 255] without.
        """
        self.prefetch(index)
        numbers = tuple(index.tolist())
        futures = zip(numbers, self.pending.pop(numbers), strict=True)
        images = [self.get_undamaged(number, future.result()) for number, future in futures]
        return (
            self.to_device(torch.from_numpy(np.stack([pixels for pixels, _ in images]))),
            self.to_device(torch.tensor([label for _, label in images])),
        )

    def to_device(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the device of batches; a GPU copies it from pinned memory while the CPU continues."""
        if torch.device(self.device).type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def close(self) -> None:
        """End the decode workers."""
        self.threads.shutdown(cancel_futures=True)
        for worker in self.workers:
            worker.stop()

    def decode(self, number: int) -> Decoded:
        """Decode the image of this number, in a worker process if there are any."""
        if not self.workers:
            return decode_image(self.places[number], self.antialias)
        worker = self.idle.get()
        try:
            return worker.decode(self.places[number], self.antialias)
        finally:
            self.idle.put(worker)

    def get_undamaged(self, number: int, result: Decoded) -> tuple[np.ndarray, int]:
        """Return the pixels and class of an image; if it is damaged, print a note and return the next undamaged one.

        result: of decoding the image `number`.
        """
        while isinstance(result, str):
            if number not in self.bad:
                self.bad.add(number)
                if len(self.bad) > min(MAX_BAD, len(self) - 1):
                    raise UsageError(
                        f"{self.places[number]} {result}; it is damaged image number {len(self.bad)} of "
                        f"{len(self):,}, too many to continue: replace the files that the notes name"
                    )
                print(f"note: {self.places[number]} {result}; the next image takes its place", flush=True)
            number = (number + 1) % len(self)
            result = self.decode(number)
        return result
