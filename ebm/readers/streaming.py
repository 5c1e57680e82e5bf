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
import copy
import io
import multiprocessing
import multiprocessing.resource_tracker
import os
import queue
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from ebm.readers.bounded import Fault, describe_failure, make_printable
from ebm.readers.decoding import convert_image, open_image
from ebm.readers.folders import note_remarks
from ebm.readers.tf_images import read_tf_pixels
from ebm.support.errors import UsageError
from ebm.support.pixels import dequantise
from ebm.support.progress import SHORT, Progress

SIDE = 128  # height and width of an image, in pixels
MAX_BAD = 100  # largest number of damaged images in a run
MANY = 1_000  # images of a batch that is an evaluation's, not training's, and may take long
MAX_PENDING = 8  # largest number of batches that are decoded ahead
LONGEST_FOLDER = 70  # bytes of a folder's path that leave room for the names of multiprocessing's sockets
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


class Place(Protocol):
    """The place of an encoded image; str() of it names the image in messages."""

    def load(self) -> tuple[bytes, int | None]:
        """Return the encoded image and its class, None without labels, or raise Fault or OSError."""
        ...


class DecodedImage(NamedTuple):
    """The pixels (3, SIDE, SIDE) of an image, its class, and what a user should know about its pixels."""

    pixels: np.ndarray
    label: int | None
    remarks: set[str]


Decoded = DecodedImage | str  # or an error message


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
    remarks: set[str] = set()
    try:
        if antialias:
            return DecodedImage(read_antialiased_pixels(encoded, remarks), label, remarks)
        return DecodedImage(read_tf_pixels(encoded, SIDE, remarks), label, remarks)
    except Fault as fault:
        return str(fault)
    except Exception as error:  # Pillow raises many types for damaged files
        return f"cannot be decoded as an image ({describe_failure(error)})"


def read_antialiased_pixels(encoded: bytes, remarks: set[str] | None = None) -> np.ndarray:
    """Decode an image to colour, resize its shorter side to SIDE and cut out the middle: uint8 (3, SIDE, SIDE).

    The interpolation is bilinear with antialiasing. A JPEG at least twice too large is decoded at a half, quarter or
    eighth of its size, which saves most of the work. remarks: see `convert_image`.
    """
    with open_image(io.BytesIO(encoded)) as image:
        image.draft("RGB", (SIDE, SIDE))
        colour = convert_image(image, "RGB", remarks)
        fitted = ImageOps.fit(colour, (SIDE, SIDE), Image.Resampling.BILINEAR)
    return np.asarray(fitted).transpose(2, 0, 1)


def serve_images(connection: Connection) -> None:
    """Decode the images that a connection asks for until it closes; ignore Ctrl-C, which the run itself handles.

    The first message says that the process has started.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Freeing 16 MB once makes glibc keep what is freed later. Else the system clears the same 4 MB anew for each image,
    # which takes longer than decoding it.
    np.empty(1 << 24, np.uint8)
    with contextlib.suppress(EOFError, OSError):
        connection.send("started")
        while True:
            connection.send(decode_image(*connection.recv()))


start_lock = threading.Lock()


@contextlib.contextmanager
def set_short_temporary_folder() -> Iterator[None]:
    """Inside the block, let temporary files of the whole process lie where paths are short enough for sockets.

    The path of a socket has at most 107 bytes, and batch systems set folders (TMPDIR) that are longer than that.
    """
    with start_lock:
        before = tempfile.gettempdir()
        if len(os.fsencode(before)) > LONGEST_FOLDER:
            tempfile.tempdir = next((folder for folder in SHORT_FOLDERS if os.access(folder, os.W_OK)), before)
        try:
            yield
        finally:
            tempfile.tempdir = before


@contextlib.contextmanager
def block_interrupts() -> Iterator[None]:
    """Inside the block, let a new process be deaf to Ctrl-C, which would end it with a traceback while it starts."""
    multiprocessing.resource_tracker.ensure_running()  # whose start ends such a block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class DecodeWorker:
    """A process that decodes images; it starts when first needed, and again if it was killed.

    It is forked from a server process, so it shares no threads, GPU or MPI state with the run. Its pipe tells each side
    if the other has died, even in the middle of a message.
    """

    def __init__(self) -> None:
        self.process: BaseProcess | None = None

    def start(self) -> None:
        """Start the process; raise UsageError if the machine does not let it live, whatever the images are."""
        context = multiprocessing.get_context("forkserver")
        # This module is not preloaded: the server would look for it in the working directory and could find another.
        context.set_forkserver_preload(["torch", "PIL.Image"])
        try:
            self.connection, other_end = context.Pipe()
            process = context.Process(target=serve_images, args=(other_end,), daemon=True)
            with set_short_temporary_folder(), block_interrupts():
                process.start()
            other_end.close()
            self.connection.recv()
        except (EOFError, OSError) as error:
            reason = f"{str(error) or 'it ended at once'}, temporary files in {os.environ.get('TMPDIR', '/tmp')}"
            raise UsageError(
                f"a process that decodes images cannot be started ({reason}); `data_workers`=0 needs none"
            ) from None
        self.process = process

    def decode(self, place: Place, antialias: bool) -> Decoded:
        """Return the result of `decode_image`; give up an image that kills the process twice."""
        for _ in range(2):
            if self.process is None:
                self.start()
            try:
                self.connection.send((place, antialias))
                return self.connection.recv()
            except (EOFError, OSError) as error:
                print(
                    f"note: a decode worker was killed ({str(error) or 'out of memory?'}); a new one starts", flush=True
                )
                self.process = None
        return "kills the process that decodes it"

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.connection.close()
            self.process.join()


class StreamedImages:
    """A `data.Dataset` whose images are read and decoded batch by batch by worker processes.

    places: of the images. class_names: empty if the images have no labels. device: where batches are put. workers:
    number of processes; 0 decodes in a thread of this process. antialias: whether images are resized with antialiasing,
    or as in the reference. A damaged image is replaced by the next one, and a note names it. UsageError is raised if
    more than MAX_BAD images, or all of them, are damaged.
    """

    name = "imagenetfull"
    image_shape = (3, SIDE, SIDE)
    labels: Tensor | None = None  # labels are on the disk
    concept: str | None = None
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
        self.remarks: set[str] = set()  # on the pixels of images, each printed once
        self.class_numbers: Tensor | None = None  # number that each class of the files has in `class_names`

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

    def with_classes(self, class_names: tuple[str, ...], numbers: Tensor) -> StreamedImages:
        """Return the same images with other class names; numbers: the new number of each old class."""
        dataset = copy.copy(self)
        dataset.class_names, dataset.class_numbers = class_names, numbers
        return dataset

    def batch(
        self, index: Tensor, generator: torch.Generator | None, rescale: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """Return the images (n, 3, 128, 128) in [0, rescale] and one-hot labels (n, label_size) of an index (n,).

        The labels are None if the images have none.
        """
        stored, labels = self.decode_batch(index)
        images = dequantise(stored, generator, rescale)
        return images, None if labels is None else F.one_hot(labels, self.label_size).float()

    def raw(self, index: Tensor) -> Tensor:
        """Return the images uint8 (n, 3, 128, 128) of an index (n,), fractions rounded to the nearest byte."""
        stored, _ = self.decode_batch(index)
        return stored.round().to(torch.uint8) if stored.is_floating_point() else stored

    def decode_batch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the images (n, 3, 128, 128) and classes (n,), or None, of an index (n,), on the device.

        The images are uint8 with antialiasing, and float32 in [0, 255] without.
        """
        self.prefetch(index)
        numbers = tuple(index.tolist())
        futures = zip(numbers, self.pending.pop(numbers), strict=True)
        images = []
        with Progress(len(numbers), what="decoding image", patience=SHORT, quiet=len(numbers) < MANY) as progress:
            for number, future in futures:
                images.append(self.get_undamaged(number, future.result()))
                progress.advance()
        pixels = self.to_device(torch.from_numpy(np.stack([image.pixels for image in images])))
        if not self.class_names:
            return pixels, None
        labels = torch.tensor([image.label for image in images])
        return pixels, self.to_device(labels if self.class_numbers is None else self.class_numbers[labels])

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

    def get_undamaged(self, number: int, result: Decoded) -> DecodedImage:
        """Return a decoded image; if it is damaged, print a note and return the next undamaged one.

        result: of decoding the image `number`.
        """
        while isinstance(result, str):
            if number not in self.bad:
                self.bad.add(number)
                name = make_printable(str(self.places[number]))
                if len(self.bad) > min(MAX_BAD, len(self) - 1):
                    raise UsageError(
                        f"{name} {result}; it is damaged image number {len(self.bad)} of "
                        f"{len(self):,}, too many to continue: replace the files that the notes name"
                    )
                print(f"note: {name} {result}; the next image takes its place", flush=True)
            number = (number + 1) % len(self)
            result = self.decode(number)
        note_remarks(self.places[number], result.remarks, self.remarks)
        return result
