"""Data parallel training: one small interface over Horovod, torch.distributed, or a single process.

    workers = distributed.start()              # finds out how the run was launched
    workers.broadcast([p.data for p in model.parameters()])
    gradients = distributed.GradientAverager(workers, model.parameters())
    ...
    loss.backward()                            # sends gradients to the other workers while it runs
    gradients.finish()                         # every worker holds the mean gradients
    ...
    workers.close()

Run as `mpiexec -n 2 python train.py ...` or `torchrun --nproc_per_node=2 train.py ...`.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import datetime
import importlib.util
import io
import json
import os
import secrets
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
import torch.distributed as dist

# Its functions have the process group as a default value. Loaded later, as torch.func does, they would keep the group
# and its threads alive beyond `close`, and a thread that lets go of a tensor while Python ends aborts the process.
import torch.distributed.nn.functional
from torch import Tensor

from errors import UsageError

BACKENDS = ("auto", "horovod", "torch", "none")
BUCKET_BYTES = 8 << 20  # few messages, yet enough of them to overlap with the backward pass of a 20 MB network
INSTALL = "pip install -r requirements.txt"


class Launch(NamedTuple):
    """How a process was started, and its place among the workers."""

    launcher: str = ""
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


# What launchers tell their processes: rank, size, local rank, local size. The first row that is complete counts.
_LAUNCHERS = (
    ("horovodrun", "HOROVOD_RANK HOROVOD_SIZE HOROVOD_LOCAL_RANK HOROVOD_LOCAL_SIZE"),
    ("mpiexec", "OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_RANK OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("mpiexec", "PMI_RANK PMI_SIZE MPI_LOCALRANKID MPI_LOCALNRANKS"),  # MPICH, Intel MPI
    ("torchrun", "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE"),
)


def find_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Return how this process was started, from the variables that launchers set; alone where there are none."""
    for launcher, variables in _LAUNCHERS:
        values = [environment.get(name) for name in variables.split()]
        if None not in values:
            return Launch(launcher, *(int(value) for value in values if value is not None))
    return Launch()


def choose_engine(backend: str, launch: Launch, horovod_problem: Callable[[], str]) -> tuple[str, str]:
    """Return ("horovod", "torch" or "none", why).

    horovod_problem() says in a clause why Horovod cannot serve this run, or nothing; it is only asked where it matters.
    Raises UsageError for a backend that cannot run here.
    """
    if backend not in BACKENDS:
        raise UsageError(f"`backend`={backend} is unknown; use one of {', '.join(BACKENDS)}")
    launcher, size = launch.launcher, launch.size
    asked = f"backend={backend}"
    if backend == "none":
        if size > 1:
            raise UsageError(
                f"`backend`=none with {size} workers: each would train alone and overwrite the files of the others; "
                f"start one process without {launcher}, or drop the flag"
            )
        return "none", asked
    if backend == "auto" and size == 1:
        return "none", "one worker"
    if backend == "torch" and launcher == "horovodrun":
        raise UsageError("`backend`=torch under horovodrun: start the workers with mpiexec or torchrun")
    if backend == "horovod" and launcher == "torchrun":
        raise UsageError("`backend`=horovod under torchrun: start the workers with mpiexec or horovodrun")
    if backend == "torch":
        return "torch", asked
    if launcher == "torchrun":
        return "torch", "started by torchrun"
    problem = horovod_problem()
    if not problem:
        return "horovod", asked if backend == "horovod" else f"started by {launcher}"
    if backend == "horovod" or launcher == "horovodrun":
        raise UsageError(f"{problem}; run scripts/install_horovod.sh, or start with mpiexec and `backend`=torch")
    return "torch", f"started by {launcher}, {problem}"


def choose_device(name: str, launch: Launch) -> torch.device:
    """Return the device of this worker: "auto", "cpu" or "cuda", which is `cuda:<local rank>`.

    A single GPU is this worker's, whatever its rank: launchers may show each its own, see `refuse_shared_gpu`.
    Raises UsageError where there are more workers on this machine than GPUs, or no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"`device`={name} is unknown; use auto, cpu or cuda") from None
    if device.type != "cuda":
        return device
    gpus = torch.cuda.device_count()
    if launch.local_size > gpus > 1:
        raise UsageError(
            f"{launch.local_size} worker(s) on this machine but {gpus} GPU(s): "
            "start at most one worker per GPU, or use `device`=cpu"
        )
    if device.index is not None and launch.local_size > 1:
        raise UsageError(f"`device`={name} would put every worker on one GPU; use `device`=cuda")
    if (device.index or 0) >= gpus:
        raise UsageError(f"`device`={name}: there are {gpus} GPU(s) here, counted from 0")
    own = launch.local_rank if gpus > 1 else 0
    return torch.device("cuda", own if device.index is None else device.index)


def refuse_shared_gpu(identities: Sequence[str]) -> None:
    """Raise UsageError naming two ranks whose GPU has the same identity; identities are in the order of ranks."""
    for rank, identity in enumerate(identities):
        first = identities.index(identity)
        if first != rank:
            raise UsageError(
                f"ranks {first} and {rank} would share one GPU: start at most one worker per GPU, or use `device`=cpu"
            )


def _horovod_problem(launch: Launch, device: torch.device) -> str:
    if importlib.util.find_spec("horovod") is None:
        return "Horovod is not installed"
    try:
        import horovod.torch as hvd
    except Exception as error:  # built for another torch: the loader's error can be of any type
        return f"Horovod does not load ({str(error).splitlines()[0]})"
    if launch.launcher == "mpiexec" and not hvd.mpi_built():
        return "Horovod was built without MPI"
    if device.type == "cuda" and not hvd.nccl_built():
        return "Horovod was built without NCCL"
    return ""


class _Engine(Protocol):
    """What carries bytes between workers. Every worker makes the same calls in the same order."""

    def start_sum(self, flat: Tensor) -> Callable[[], object]:
        """Start to sum a flat tensor over workers in place; the result is there after the returned call."""

    def broadcast(self, flat: Tensor) -> None:
        """Overwrite a flat tensor with that of rank 0."""

    def exchange(self, pieces: list[Tensor]) -> list[Tensor]:
        """Send piece i, flat uint8 on the CPU, to rank i; return what every rank sent here."""

    def close(self) -> None:
        """Say goodbye."""


class _Alone:
    def start_sum(self, flat: Tensor) -> Callable[[], object]:
        return lambda: None

    def broadcast(self, flat: Tensor) -> None:
        pass

    def exchange(self, pieces: list[Tensor]) -> list[Tensor]:
        return pieces

    def close(self) -> None:
        pass


class _Horovod:
    def __init__(self) -> None:
        # Buckets are made here, in an order that never changes, so that the sums do not depend on timing; and the
        # watch knows better than Horovod's own check whether a worker is stuck or rank 0 is saving.
        os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", "0")
        os.environ.setdefault("HOROVOD_STALL_CHECK_DISABLE", "1")
        import horovod.torch as hvd

        hvd.init()
        self._hvd = hvd
        self._in_flight = 0

    def start_sum(self, flat: Tensor) -> Callable[[], object]:
        # Horovod matches messages by name, and remembers the names it has seen: reuse few of them.
        handle = self._hvd.allreduce_async_(flat, name=f"sum.{self._in_flight}", op=self._hvd.Sum)
        self._in_flight += 1

        def wait() -> None:
            self._hvd.synchronize(handle)
            self._in_flight -= 1

        return wait

    def broadcast(self, flat: Tensor) -> None:
        self._hvd.broadcast_(flat, root_rank=0, name="broadcast")

    def exchange(self, pieces: list[Tensor]) -> list[Tensor]:
        sizes = torch.tensor([len(piece) for piece in pieces], dtype=torch.int32)
        received, received_sizes = self._hvd.alltoall(torch.cat(pieces), splits=sizes, name="exchange")
        return list(received.split(received_sizes.tolist()))

    def close(self) -> None:
        self._hvd.shutdown()


class _Torch:
    # How long a worker may wait for another is for the watch to judge: rank 0 may test for hours while others wait.
    PATIENCE = datetime.timedelta(days=365)

    def __init__(self, launch: Launch, device: torch.device) -> None:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if launch.launcher == "torchrun":
            dist.init_process_group(backend, timeout=self.PATIENCE)
        else:
            store = self._store(launch)
            dist.init_process_group(
                backend, store=store, rank=launch.rank, world_size=launch.size, timeout=self.PATIENCE
            )

    def _store(self, launch: Launch) -> dist.Store:
        """Return where the workers of `mpiexec` meet: rank 0 opens it and MPI tells the others its address."""
        if launch.size == 1:
            return dist.HashStore()
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise UsageError(f"mpiexec without Horovod needs mpi4py ({error}); run {INSTALL}") from None
        world = MPI.COMM_WORLD
        if world.size != launch.size:
            raise UsageError(
                f"mpiexec started {launch.size} workers but mpi4py sees {world.size}: they belong to different MPI "
                f"installations; run {INSTALL} and use the mpiexec it brings"
            )
        host = _host(launch)
        if launch.rank == 0:
            store = dist.TCPStore(host, 0, launch.size, is_master=True, wait_for_workers=False)
            world.bcast((host, store.port))
        else:
            host, port = world.bcast(None)
            store = dist.TCPStore(host, port, launch.size, is_master=False)
        # MPI has done its part. Finalized at exit instead, it would keep a worker that failed waiting for the others.
        MPI.Finalize()
        return store

    def start_sum(self, flat: Tensor) -> Callable[[], object]:
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None, "this worker is not in the process group"
        return work.wait

    def broadcast(self, flat: Tensor) -> None:
        dist.broadcast(flat, src=0)

    def exchange(self, pieces: list[Tensor]) -> list[Tensor]:
        sizes = torch.tensor([len(piece) for piece in pieces])
        received_sizes = torch.empty_like(sizes)
        dist.all_to_all_single(received_sizes, sizes)
        received = torch.empty(int(received_sizes.sum()), dtype=torch.uint8)
        dist.all_to_all_single(received, torch.cat(pieces), received_sizes.tolist(), sizes.tolist())
        return list(received.split(received_sizes.tolist()))

    def close(self) -> None:
        dist.destroy_process_group()


def _host(launch: Launch) -> str:
    """Return the name under which the other workers reach this machine."""
    return "127.0.0.1" if launch.local_size == launch.size else socket.gethostname()


class Workers:
    """The processes that train together, seen from one of them. Make it with `start`.

    rank, size, local_rank: this worker's place; engine: "horovod", "torch" or "none", and why, in a clause;
    device: where this worker computes. Every method but `print` and `busy` is called by all workers, in the same order.
    """

    def __init__(self, launch: Launch, engine: str, why: str, device: torch.device, timeout: float):
        self.rank, self.size, self.local_rank = launch.rank, launch.size, launch.local_rank
        self.engine, self.why, self.device = engine, why, device
        self._engine: _Engine = (
            _Horovod() if engine == "horovod" else _Torch(launch, device) if engine == "torch" else _Alone()
        )
        self._watch = _Watch(launch, timeout, self._engine.broadcast) if launch.size > 1 else None

    def __str__(self) -> str:
        """Return the start-up line."""
        name = {"horovod": "Horovod", "torch": "torch.distributed", "none": "no data parallelism"}[self.engine]
        return f"{self.size} worker{'s' * (self.size > 1)} on {self.device.type}, {name} ({self.why})"

    def print(self, *words: object) -> None:
        """Print once: on rank 0."""
        if self.rank == 0:
            print(*words, flush=True)

    @torch.no_grad()
    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors of any type with those of rank 0, bit for bit, in few messages."""
        self._meet()
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in bucket])
            self._engine.broadcast(flat)
            if self.rank > 0:
                for tensor, part in zip(bucket, flat.split([tensor.nbytes for tensor in bucket]), strict=True):
                    tensor.copy_(part.clone().view(tensor.dtype).view_as(tensor))  # the clone aligns the bytes

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace float tensors by their mean over workers, in few messages."""
        for finish in [self.start_average(bucket) for bucket in _buckets(tensors)]:
            finish()

    @torch.no_grad()
    def start_average(self, tensors: Sequence[Tensor]) -> Callable[[], None]:
        """Start to average tensors of one type and device as one message; they change in the returned call."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        wait = self._engine.start_sum(flat)

        @torch.no_grad()
        def finish() -> None:
            self._meet()
            wait()
            flat.div_(self.size)
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))
            if self._watch is not None:
                self._watch.averaged = True

        return finish

    def gather(self, item: Any) -> list[Any] | None:
        """Return on rank 0 the item of every worker, in order, and None elsewhere.

        Items are tensors and plain values (what `torch.load` reads with weights_only=True); tensors arrive on the CPU.
        """
        empty = [torch.empty(0, dtype=torch.uint8)] * (self.size - 1)
        received = self._exchange([_pack(item), *empty])
        return [_unpack(piece) for piece in received] if self.rank == 0 else None

    def scatter(self, items: Sequence[Any] | None) -> Any:
        """Return this worker's item of those that rank 0 holds, one per worker; the others give None."""
        if self.rank == 0:
            assert items is not None and len(items) == self.size, f"one item per worker ({self.size}), not {items!r}"
            pieces = [_pack(item) for item in items]
        else:
            pieces = [torch.empty(0, dtype=torch.uint8)] * self.size
        return _unpack(self._exchange(pieces)[0])

    def share(self, item: Any) -> list[Any]:
        """Return on every worker the item of each, in order; see `gather`."""
        return [_unpack(piece) for piece in self._exchange([_pack(item)] * self.size)]

    def any(self, flag: bool) -> bool:
        """Return on every worker whether the flag is true on one of them."""
        self._meet()
        total = torch.tensor([float(flag)])
        self._engine.start_sum(total)()
        return bool(total.item())

    def barrier(self) -> None:
        """Wait until every worker is here."""
        self.any(False)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Let this worker alone take long (save, test, download): inside, only a standstill counts as hanging."""
        if self._watch is None:
            yield
            return
        self._watch.busy += 1
        try:
            yield
        finally:
            self._watch.busy -= 1

    def close(self) -> None:
        """Leave together at the end of a run. A worker that leaves without it ends the whole job with an error."""
        self.barrier()
        self._engine.close()
        if self._watch is not None:
            self._watch.close()

    def _exchange(self, pieces: list[Tensor]) -> list[Tensor]:
        self._meet()
        return self._engine.exchange(pieces)

    def _meet(self) -> None:
        if self._watch is not None:
            self._watch.meetings += 1


def start(backend: str = "auto", device: str = "auto", timeout: float = 40.0) -> Workers:
    """Join the workers that this process was launched with, or work alone.

    backend: auto takes Horovod under mpiexec or horovodrun where it is installed, else torch.distributed (NCCL on GPUs,
    Gloo on CPUs) under mpiexec or torchrun, else none. device: auto, cpu or cuda (`cuda:<local rank>`).
    timeout: seconds after which a worker that has died, hangs or stays behind the others ends the job.
    Raises UsageError for what cannot run here.
    """
    launch = find_launch()
    place = choose_device(device, launch)
    engine, why = choose_engine(backend, launch, lambda: _horovod_problem(launch, place))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    workers = Workers(launch, engine, why, place, timeout)
    if place.type == "cuda" and workers.size > 1:
        refuse_shared_gpu(workers.share(f"{socket.gethostname()} {torch.cuda.get_device_properties(place).uuid}"))
    return workers


class GradientAverager:
    """Averages the gradients of a backward pass over workers, while that pass is still running.

    Buckets are filled from the last parameter to the first, about the order in which gradients become ready, and sent
    in that order on every worker. A parameter without a gradient is left out, as the same loss leaves it out on every
    worker; from the second pass on it no longer holds up the others.
    """

    def __init__(self, workers: Workers, parameters: Iterable[Tensor], bucket_bytes: int = BUCKET_BYTES):
        self._workers = workers
        self._bucket_bytes = bucket_bytes
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad][::-1]
        self._begin(set())
        if workers.size > 1:
            for parameter in self._parameters:
                parameter.register_post_accumulate_grad_hook(self._ready)

    def finish(self) -> None:
        """Wait until every gradient is the mean over workers: once after each `backward()`."""
        if self._workers.size == 1:
            return
        while self._sent < len(self._buckets):
            self._send()
        for finish in self._in_flight:
            finish()
        self._begin({parameter for parameter in self._parameters if parameter.grad is None})

    def _begin(self, unreached: set[Tensor]) -> None:
        """Fill the buckets anew, the parameters that the loss does not reach last."""
        order = sorted(self._parameters, key=lambda parameter: parameter in unreached)
        self._buckets = _buckets(order, self._bucket_bytes)
        self._bucket_of = {parameter: i for i, bucket in enumerate(self._buckets) for parameter in bucket}
        self._missing = [len(bucket) for bucket in self._buckets]
        self._sent = 0
        self._in_flight: list[Callable[[], None]] = []

    def _ready(self, parameter: Tensor) -> None:
        bucket = self._bucket_of[parameter]
        self._missing[bucket] -= 1
        assert self._missing[bucket] >= 0, "a second backward() before finish()"
        while self._sent < len(self._buckets) and self._missing[self._sent] == 0:
            self._send()

    def _send(self) -> None:
        gradients = [parameter.grad for parameter in self._buckets[self._sent] if parameter.grad is not None]
        if gradients:
            self._in_flight.append(self._workers.start_average(gradients))
        self._sent += 1


def _buckets(tensors: Iterable[Tensor], size: int = BUCKET_BYTES) -> list[list[Tensor]]:
    """Return the tensors in their order, in runs of one type and device that hold about `size` bytes."""
    buckets: list[list[Tensor]] = []
    kind, room = None, 0
    for tensor in tensors:
        if (tensor.dtype, tensor.device) != kind or tensor.nbytes > room:
            kind, room = (tensor.dtype, tensor.device), size
            buckets.append([])
        buckets[-1].append(tensor)
        room -= tensor.nbytes
    return buckets


def _pack(item: Any) -> Tensor:
    file = io.BytesIO()
    torch.save(item, file)
    return torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.uint8)


def _unpack(piece: Tensor) -> Any:
    return torch.load(io.BytesIO(piece.numpy().tobytes()), weights_only=True, map_location="cpu")


@dataclasses.dataclass
class _Peer:
    """What the watch knows of another worker."""

    connection: socket.socket
    pid: int
    unread: bytes = b""
    quiet: float = 0.0  # seconds since it was heard
    done: bool = False


class _Watch(threading.Thread):
    """Ends the job, in one line that names the rank, when a worker dies or hangs.

    Every worker holds a connection to rank 0 and says at each beat how often it has met the others (to average, gather,
    ...). A connection that breaks is a worker that died; one that is silent for `timeout` seconds is stopped; a worker
    that the others have left behind for so long hangs, unless it shows signs of life: while it is `busy`, and until the
    first gradients are averaged (compilation, cold files), each beat in which its main thread computes is one.
    Waiting for others is never an offence, so that rank 0 may save and test for as long as it takes. Time is counted
    in beats, so that a job which is suspended as a whole can be resumed.
    """

    BEAT = 0.25  # seconds
    GRACE = 3.0  # seconds in which a worker may end with its own message, once another one has ended
    BEATING, DONE, ENDING = range(3)
    MESSAGE = struct.Struct("!BIQQ")  # one of these three, the rank it began with, meetings, signs of life
    HELLO = struct.Struct("!16sII")  # the job's token, rank, process id
    NOTE_BYTES = 512

    def __init__(self, launch: Launch, timeout: float, broadcast: Callable[[Tensor], None]):
        super().__init__(name="watch", daemon=True)
        self.meetings = 0
        self.busy = 0
        self.averaged = False
        self._launch, self._timeout = launch, timeout
        self._parent = os.getppid()
        self._clock = time.pthread_getcpuclockid(threading.main_thread().ident or 0)
        self._computed = 0.0
        self._signs = 0
        self._state, self._culprit = self.BEATING, launch.rank
        self._leaving, self._told = threading.Event(), threading.Event()
        self._news = dict.fromkeys(range(launch.size), (0, 0))  # rank -> its meetings and signs of life
        self._behind = dict.fromkeys(range(launch.size), 0.0)  # rank -> seconds without news while others are ahead
        self._peers = self._call_rank_0(broadcast) if launch.rank > 0 else self._receive_calls(broadcast)
        atexit.register(self._leave_early)
        self.start()

    def close(self) -> None:
        """Stop watching: the work of every worker is done."""
        self._leave(self.DONE)

    def _call_rank_0(self, broadcast: Callable[[Tensor], None]) -> dict[int, _Peer]:
        note = torch.zeros(self.NOTE_BYTES, dtype=torch.uint8)
        broadcast(note)
        host, port, token, pid = json.loads(bytes(note.tolist()).rstrip(b"\0"))
        connection = socket.create_connection((host, port), self._timeout)
        connection.sendall(self.HELLO.pack(bytes.fromhex(token), self._launch.rank, os.getpid()))
        connection.setblocking(False)
        return {0: _Peer(connection, pid)}

    def _receive_calls(self, broadcast: Callable[[Tensor], None]) -> dict[int, _Peer]:
        host, token = _host(self._launch), secrets.token_bytes(16)
        peers: dict[int, _Peer] = {}
        with socket.create_server(("127.0.0.1" if self._is_local() else "", 0), backlog=self._launch.size) as server:
            text = json.dumps([host, server.getsockname()[1], token.hex(), os.getpid()]).encode()
            broadcast(torch.tensor(list(text.ljust(self.NOTE_BYTES, b"\0")), dtype=torch.uint8))
            server.settimeout(self._timeout)
            while len(peers) < self._launch.size - 1:
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    missing = min(set(range(1, self._launch.size)) - set(peers))
                    _exit(f"error: rank {missing} has not arrived within {self._timeout:g} s; the job ends")
                connection.settimeout(self._timeout)
                hello = connection.recv(self.HELLO.size, socket.MSG_WAITALL)
                if hello.startswith(token) and len(hello) == self.HELLO.size:
                    _, rank, pid = self.HELLO.unpack(hello)
                    connection.setblocking(False)
                    peers[rank] = _Peer(connection, pid)
        return peers

    def run(self) -> None:
        while not self._leaving.wait(self.BEAT):
            self._beat(self.BEAT)
        self._beat(0.0)
        while self._state == self.DONE and self._launch.rank == 0 and not all(p.done for p in self._peers.values()):
            time.sleep(0.01)  # rank 0 hangs up last, so that its end cannot be mistaken for a death
            self._beat(0.01)

    def _beat(self, seconds: float) -> None:
        """Hear and tell the news of the last seconds, and judge them."""
        if os.getppid() != self._parent:
            _exit("error: the launcher has died; the job ends")
        computed = time.clock_gettime(self._clock)
        self._signs += (self.busy > 0 or not self.averaged) and computed > self._computed
        self._computed = computed
        news = {self._launch.rank: (self.meetings, self._signs)}
        for rank, peer in self._peers.items():
            if not peer.done:
                news[rank] = self._listen(rank, peer, seconds)
        if self._launch.rank == 0:
            self._judge(news, seconds)
        self._tell()

    def _listen(self, rank: int, peer: _Peer, seconds: float) -> tuple[int, int]:
        """Return the latest meetings and signs of life of a worker."""
        try:
            data = peer.connection.recv(1 << 16)
        except BlockingIOError:
            peer.quiet += seconds
            if peer.quiet > self._timeout:
                if self._is_local():  # stopped: it will not hear a launcher's SIGTERM
                    with contextlib.suppress(OSError):
                        os.kill(peer.pid, signal.SIGKILL)
                self._end_job(rank, f"has been silent for {self._timeout:g} s")
            return self._news[rank]
        except OSError:
            data = b""
        if not data:
            self._end_job(rank, "has died")
        peer.quiet = 0.0
        peer.unread += data
        whole = len(peer.unread) // self.MESSAGE.size * self.MESSAGE.size
        messages = list(self.MESSAGE.iter_unpack(peer.unread[:whole]))
        peer.unread = peer.unread[whole:]
        if not messages:
            return self._news[rank]
        state, culprit, meetings, signs = messages[-1]
        peer.done = state != self.BEATING
        if state == self.ENDING:
            self._end_with(culprit)
        return meetings, signs

    def _judge(self, news: dict[int, tuple[int, int]], seconds: float) -> None:
        front = max(meetings for meetings, _ in news.values())
        for rank, (meetings, signs) in news.items():
            moved = (meetings, signs) != self._news[rank]
            self._behind[rank] = 0.0 if moved or meetings == front else self._behind[rank] + seconds
            if self._behind[rank] > self._timeout:
                self._end_job(rank, f"hangs: the others have waited for it for {self._timeout:g} s")
        self._news.update(news)

    def _tell(self) -> None:
        message = self.MESSAGE.pack(self._state, self._culprit, self.meetings, self._signs)
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # gone or stopped: listening will tell
                peer.connection.send(message)

    def _end_job(self, rank: int, what: str) -> NoReturn:
        """End every worker because of what one of them has done."""
        self._state, self._culprit = self.ENDING, rank
        self._tell()
        _exit(f"error: rank {rank} {what}; the job ends, the last checkpoint resumes it")

    def _end_with(self, rank: int) -> None:
        """End because a worker has ended, unless this one is about to do so by itself."""
        self._state, self._culprit = self.ENDING, rank
        self._tell()
        self._told.set()
        if not self._leaving.wait(self.GRACE):
            _exit(self._farewell() if 0 in (rank, self._launch.rank) else "")

    def _farewell(self) -> str:
        fate = "failed, see above" if self._culprit == self._launch.rank else "ended before the others"
        return f"error: rank {self._culprit} has {fate}; the job ends"

    def _leave(self, state: int) -> None:
        self._state = state
        self._leaving.set()
        self.join(self._timeout)

    def _leave_early(self) -> None:
        """Take the others along when this process ends without `close`."""
        if self._state == self.DONE:
            return
        failed = getattr(sys, "last_value", None) is not None  # an error that nobody caught: Python has printed it
        if failed:
            self._told.wait(2.5 * self.BEAT)  # it may follow from the end of another worker, which is yet to be told
        self._leave(self.ENDING)
        if failed:
            print(self._farewell(), file=sys.stderr)

    def _is_local(self) -> bool:
        return self._launch.local_size == self._launch.size


def _exit(message: str = "") -> NoReturn:
    """End this process at once, whatever its main thread is stuck in, and whether or not anybody reads its output."""
    try:
        if message:
            print(message, file=sys.stderr)
        sys.stderr.flush()
        sys.stdout.flush()
    finally:
        os._exit(1)
