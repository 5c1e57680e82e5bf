"""Workers that train or evaluate together: one small interface over Horovod, torch.distributed, or a single process.

    workers = distributed.join_workers()              # finds out how the run was launched
    workers.broadcast([p.data for p in model.parameters()])
    gradients = distributed.GradientAverager(workers, model.parameters())
    ...
    loss.backward()                            # sends gradients to the other workers while it runs
    gradients.finish()                         # every worker holds the mean gradients
    ...
    workers.close()

Run as `mpiexec -n 2 python train.py ...`, `torchrun --nproc_per_node=2 train.py ...`, `srun -n 2 python train.py ...`.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import io
import itertools
import os
import pathlib
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

# Its functions have the process group as a default value. If this module were imported later, as torch.func does, they
# would keep the group and its threads alive after `close`. A thread that frees a tensor while Python ends aborts the
# process.
import torch.distributed.nn.functional
from torch import Tensor

from ebm.support.errors import UsageError
from ebm.support.interruption import Interruption, announce_end
from ebm.support.launch import Launch, describe_remedy, find_address, find_launch
from ebm.training.stopping import StopSignals
from ebm.training.watch import Watch, find_host

Result = TypeVar("Result")
Item = TypeVar("Item")

BACKENDS = ("auto", "horovod", "torch", "none")
ARRIVALS = 3.0  # times the timeout in which all workers have to arrive: some load PyTorch from a cold disk
BUCKET_BYTES = 8 << 20  # few messages, yet enough of them to overlap with the backward pass of a 20 MB network
ALONE = Launch()  # one process, started by nobody
INSTALL = "pip install -e '.[mpi]'"


def choose_engine(backend: str, launch: Launch, horovod_problem: Callable[[], str]) -> tuple[str, str]:
    """Return the engine, "horovod", "torch" or "none", and the reason for it.

    horovod_problem: returns a clause that says why Horovod cannot serve this run, or ""; it is called only if Horovod
    is a candidate. Raises UsageError if the backend cannot run here.
    """
    if backend not in BACKENDS:
        raise UsageError(f"`backend`={backend} is unknown; use one of {', '.join(BACKENDS)}")
    launcher, size = launch.launcher, launch.size
    setting = f"backend={backend}"
    if backend == "none":
        if size > 1:
            raise UsageError(
                f"`backend`=none with {size} workers: each would train alone and overwrite the files of the others; "
                f"start one process without {launcher}, or leave out `backend`"
            )
        return "none", setting
    if backend == "auto" and size == 1:
        return "none", "one worker"
    if backend == "torch" and launcher == "horovodrun":
        raise UsageError("`backend`=torch under horovodrun: start the workers with mpiexec or torchrun")
    if backend == "horovod" and launcher in ("torchrun", "srun"):
        raise UsageError(f"`backend`=horovod under {launcher}: start the workers with mpiexec or horovodrun")
    if backend == "torch":
        return "torch", setting
    if launcher in ("torchrun", "srun"):
        return "torch", f"started by {launcher}"
    problem = horovod_problem()
    if not problem:
        return "horovod", setting if backend == "horovod" else f"started by {launcher}"
    if backend == "horovod" or launcher == "horovodrun":
        raise UsageError(f"{problem}; run scripts/install_horovod.sh, or start with mpiexec and `backend`=torch")
    return "torch", f"started by {launcher}, {problem}"


def choose_device(name: str, launch: Launch = ALONE) -> torch.device:
    """Return the device of this worker, which for "cuda" is `cuda:<local rank>`.

    name: "auto", "cpu", "cuda" or "cuda:<number>". If this process sees a single GPU, it takes that one whatever its
    rank, because a launcher may show each worker a GPU of its own; see `refuse_shared_gpu`. Raises UsageError if this
    machine has more workers than GPUs, or lacks the device.
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
    default_index = launch.local_rank if gpus > 1 else 0
    return torch.device("cuda", default_index if device.index is None else device.index)


def refuse_shared_gpu(identities: Sequence[str]) -> None:
    """Raise UsageError if two ranks use the same GPU. identities: a name of the GPU of each rank, in order."""
    for rank, identity in enumerate(identities):
        first = identities.index(identity)
        if first != rank:
            raise UsageError(
                f"ranks {first} and {rank} would share one GPU: start at most one worker per GPU, or use `device`=cpu"
            )


def find_horovod_problem(launch: Launch, device: torch.device) -> str:
    """Return a clause that says why Horovod cannot serve this run, or "" if it can."""
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


class Engine(Protocol):
    """The interface of a library that sends tensors between workers.

    Every worker makes the same calls in the same order.
    """

    def start_sum(self, flat: Tensor) -> Callable[[], object]:
        """Start to sum a flat tensor over workers in place; return a function that waits for the sum."""

    def broadcast(self, flat: Tensor) -> None:
        """Overwrite a flat tensor with that of rank 0."""

    def exchange(self, pieces: list[Tensor]) -> list[Tensor]:
        """Send piece i, flat uint8 on the CPU, to rank i; return the pieces that every rank sent here, in order."""

    def close(self) -> None:
        """Leave the group of workers."""


class SingleEngine:
    """The engine of a single worker, which sends nothing."""

    def start_sum(self, flat: Tensor) -> Callable[[], object]:
        return lambda: None

    def broadcast(self, flat: Tensor) -> None:
        pass

    def exchange(self, pieces: list[Tensor]) -> list[Tensor]:
        return pieces

    def close(self) -> None:
        pass


class HorovodEngine:
    """The engine that sends tensors by Horovod."""

    def __init__(self, launch: Launch) -> None:
        # This module fills buckets itself, in an order that never changes, so that the sums do not depend on timing.
        # The watch knows better than Horovod's own check whether a worker is stuck or rank 0 is saving.
        os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", "0")
        os.environ.setdefault("HOROVOD_STALL_CHECK_DISABLE", "1")
        import horovod.torch as hvd

        if launch.launcher == "horovodrun":
            check_rendezvous(os.environ)
        hvd.init()
        if hvd.size() != launch.size:
            raise UsageError(
                f"{launch.launcher} started {launch.size} workers but Horovod sees {hvd.size()}: the variables are of "
                f"another job, or Horovod was built for another MPI; {describe_remedy(launch.launcher)}"
            )
        self._hvd = hvd
        self._in_flight = 0

    def start_sum(self, flat: Tensor) -> Callable[[], object]:
        # Horovod matches messages by name and remembers every name, so that few names are used again and again.
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


def check_rendezvous(environment: Mapping[str, str]) -> None:
    """Raise UsageError if horovodrun, where its workers find each other, is gone; Horovod would abort the process."""
    host, port = (environment.get(f"HOROVOD_GLOO_RENDEZVOUS_{name}", "") for name in ("ADDR", "PORT"))
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10.0).close()
        except OSError as error:
            raise UsageError(
                f"no horovodrun answers at {host}:{port} ({error}); {describe_remedy('horovodrun', environment)}"
            ) from None


class TorchEngine:
    """The engine that sends tensors by torch.distributed: NCCL for those on GPUs, Gloo for those on CPUs."""

    # The watch decides how long a worker may wait for another; rank 0 may test for hours while others wait.
    PATIENCE = datetime.timedelta(days=365)

    def __init__(self, launch: Launch, device: torch.device, timeout: float) -> None:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if launch.size == 1:
            store: dist.Store = dist.HashStore()
        elif launch.launcher == "mpiexec":
            store = self._open_store_by_mpi(launch)
        else:
            store = open_store(launch, ARRIVALS * timeout)
        dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.size, timeout=self.PATIENCE)

    def _open_store_by_mpi(self, launch: Launch) -> dist.Store:
        """Return the store by which workers of `mpiexec` find each other: rank 0 opens it, MPI sends its address."""
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise UsageError(f"mpiexec without Horovod needs mpi4py ({error}); run {INSTALL}") from None
        world = MPI.COMM_WORLD
        if world.size != launch.size:
            raise UsageError(
                f"mpiexec started {launch.size} workers but mpi4py sees {world.size}: mpi4py belongs to another MPI "
                f"installation, or the variables to another job; run {INSTALL} and use the mpiexec it brings, or "
                f"{describe_remedy(launch.launcher)}"
            )
        host = find_host(launch)
        if launch.rank == 0:
            store = dist.TCPStore(host, 0, launch.size, is_master=True, wait_for_workers=False)
            world.bcast((host, store.port))
        else:
            host, port = world.bcast(None)
            store = dist.TCPStore(host, port, launch.size, is_master=False)
        # MPI is not needed any more. If it were finalized at exit, a worker that failed would wait for the others.
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


def open_store(launch: Launch, timeout: float) -> dist.Store:
    """Return the store by which the workers of torchrun and srun find each other, when all of them have arrived.

    Raises UsageError if one of them has not arrived within `timeout` seconds.
    """
    host, port = find_address(launch)
    # torchrun's own store serves the workers of every attempt to run them.
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_server = launch.rank == 0 and not has_agent
    patience = datetime.timedelta(seconds=timeout)
    try:
        if not is_server:
            wait_for_server(host, port, timeout)  # PyTorch would print pages
        store = dist.TCPStore(host, port, launch.size, is_server, patience, wait_for_workers=False)
    except (RuntimeError, ValueError, OSError) as error:
        obstacle = "cannot listen" if is_server else "cannot reach rank 0"
        raise UsageError(
            f"rank {launch.rank} {obstacle} at {host}:{port} ({str(error).splitlines()[0]}); set MASTER_ADDR and "
            f"MASTER_PORT to rank 0's machine and a free port, or {describe_remedy(launch.launcher)}"
        ) from None
    arrivals = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    try:
        wait_for_arrivals(arrivals, launch, timeout)
    except RuntimeError:
        raise UsageError("rank 0 has ended before all workers had arrived; its message says why") from None
    return arrivals


def wait_for_arrivals(arrivals: dist.Store, launch: Launch, timeout: float) -> None:
    """Announce this worker and wait for the others.

    Raises UsageError that names a rank which is missing after `timeout` seconds.
    """
    arrivals.set(f"rank {launch.rank}", "")
    end = time.monotonic() + timeout
    for rank in range(launch.size):
        while not arrivals.check([f"rank {rank}"]):
            if time.monotonic() > end:
                remedy = describe_remedy(launch.launcher)
                raise UsageError(f"rank {rank} of {launch.size} has not arrived within {timeout:g} s; {remedy}")
            time.sleep(0.1)


def wait_for_server(host: str, port: int, timeout: float) -> None:
    """Wait until a server listens there, whose name may become known later; raise OSError after `timeout` seconds."""
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=5.0).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(0.5)


class Workers:
    """The processes that train together, seen from one of them. `join_workers` returns one.

    launch: how this worker was started. rank, size: its place. engine: "horovod", "torch" or "none". why: a clause with
    the reason for the engine. device: where this worker computes. signal: the signal after which an evaluation ends
    with the results so far; None before. is_cut_short: whether that has left work undone. unfinished: work that it has
    ended in the middle: its name -> how much was done, such as "320 of 1000". All workers must call every method that
    sends something, in the same order: all but `print`, `print_once`, `busy`, `choose_folder`, `count_share`,
    `keep_results`, `until_signal` and `note_part`.
    """

    def __init__(self, launch: Launch, engine: str, why: str, device: torch.device, timeout: float):
        self.launch, self.rank, self.size = launch, launch.rank, launch.size
        self.engine, self.why, self.device = engine, why, device
        self._engine: Engine = (
            HorovodEngine(launch)
            if engine == "horovod"
            else TorchEngine(launch, device, timeout)
            if engine == "torch"
            else SingleEngine()
        )
        self._watch = Watch(launch, timeout, self._engine.broadcast) if launch.size > 1 else None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self.signal: int | None = None
        self.is_cut_short = False
        self.unfinished: dict[str, str] = {}
        # Whether a signal interrupts this worker where it is. Several workers would each be elsewhere. Once there are
        # results they are to be written, and a signal interrupts only a share of a computation.
        self._is_interruptible = launch.size == 1
        self._has_results = False  # whether something has been computed that a signal should not destroy

    def print(self, *words: object) -> None:
        """Print on rank 0 only."""
        if self.rank == 0:
            print(*words, flush=True)

    @contextlib.contextmanager
    def print_once(self) -> Iterator[None]:
        """Inside the block, let only rank 0 print: the others make the same notes."""
        with contextlib.redirect_stdout(io.StringIO()) if self.rank > 0 else contextlib.nullcontext():
            yield

    @torch.no_grad()
    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors of any type with those of rank 0, bit for bit and in few messages."""
        self._meet()
        for bucket in fill_buckets(tensors):
            flat = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in bucket])
            self._engine.broadcast(flat)
            if self.rank > 0:
                for tensor, part in zip(bucket, flat.split([tensor.nbytes for tensor in bucket]), strict=True):
                    tensor.copy_(part.clone().view(tensor.dtype).view_as(tensor))  # the clone aligns the bytes

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace float tensors by their mean over workers, in few messages."""
        for finish in [self.start_average(bucket) for bucket in fill_buckets(tensors)]:
            finish()

    @torch.no_grad()
    def start_average(self, tensors: Sequence[Tensor]) -> Callable[[], None]:
        """Start to average tensors of one type and device, in one message; return a function that finishes it.

        The tensors change only when that function is called.
        """
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
        """Return every worker's item, in order, on rank 0, and None on the other ranks.

        An item holds tensors and plain values, such that `torch.load` reads it with weights_only=True; its tensors
        arrive on the CPU.
        """
        empty = [torch.empty(0, dtype=torch.uint8)] * (self.size - 1)
        received = self._exchange([pack(item), *empty])
        return [unpack(piece) for piece in received] if self.rank == 0 else None

    def share(self, item: Any) -> list[Any]:
        """Return every worker's item, in order, on all of them; see `gather`."""
        return [unpack(piece) for piece in self._exchange([pack(item)] * self.size)]

    def take_turns(self, read: Callable[[], Result]) -> Result:
        """Return read(), which rank 0 calls before the others, so that it downloads files for all of them.

        A UsageError of rank 0 is raised on all workers.
        """
        results: list[Result] = []
        self.call_first(lambda: results.append(read()))
        return results[0] if self.rank == 0 else read()

    def call_first(self, act: Callable[[], object]) -> None:
        """Call a function on rank 0 only; a UsageError that it raises is raised on all workers."""
        problem = ""
        if self.rank == 0:
            try:
                act()
            except UsageError as error:
                problem = str(error)
        problem = self.share(problem)[0]
        if problem:
            raise UsageError(problem)

    def choose_folder(self, folder: pathlib.Path) -> pathlib.Path:
        """Return the folder for a worker's files: this one on rank 0, elsewhere one that is deleted at the end."""
        if self.rank == 0:
            return folder
        self._scratch = self._scratch or tempfile.TemporaryDirectory(prefix="ebm-", ignore_cleanup_errors=True)
        return pathlib.Path(self._scratch.name)

    def count_share(self, items: int) -> int:
        """Return how many of so many items rank 0 computes in `share_out`."""
        return -(-items // self.size)

    def share_out(self, items: Sequence[Any], compute: Callable[[Any], Any]) -> list[Any]:
        """Return compute(item) for all items, in order, on all workers; each worker computes its share of them.

        The results are as in `gather`: with several workers their tensors arrive on the CPU. All workers must have the
        same items. For `compute` see `ebm.support.sharing`. Within `keep_results`, a signal ends the computation of
        items: it returns the results of the first ones then, and raises Interruption if there are none.
        """
        results: list[Any] = []
        with self.busy():
            try:
                with self._let_signals_interrupt(True):
                    for item in items[self.rank :: self.size]:
                        if self.signal is not None:
                            break
                        results.append(compute(item))
            except Interruption:
                if self.signal is None:  # not within `keep_results`
                    raise
                if results or self._has_results:
                    self._announce_end()
            if results:
                self._has_results, self._is_interruptible = True, False
            if self.size > 1:
                shares = self.share(results)
                self.is_asked_to_end()
                places = (divmod(i, self.size) for i in range(len(items)))
                done = itertools.takewhile(lambda place: place[0] < len(shares[place[1]]), places)
                results = [shares[rank][number] for number, rank in done]
        self.is_cut_short |= len(results) < len(items)
        if items and not results:
            assert self.signal is not None, "only a signal leaves all items undone"
            raise Interruption(self.signal)
        return results

    def share_out_all(self, items: Sequence[Any], compute: Callable[[Any], Any]) -> list[Any]:
        """Return the results of `share_out` for all items; raise Interruption if a signal has come before."""
        results = self.share_out(items, compute)
        if len(results) < len(items) and self.signal is not None:
            raise Interruption(self.signal)
        return results

    def until_signal(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items; within `keep_results`, end after the one during whose work a signal arrives."""
        with self._let_signals_interrupt(False):
            for item in items:
                if self.signal is not None:
                    self.is_cut_short = True
                    break
                yield item

    def note_part(self, what: str, done: int, wanted: int) -> None:
        """Note in `unfinished` how much of a work was done, unless all was."""
        if done < wanted:
            self.unfinished[what] = f"{done} of {wanted}"

    def is_asked_to_end(self) -> bool:
        """Return, on all workers, whether a signal has asked one of them to end; see `keep_results`."""
        self.signal = next(filter(None, self.share(self.signal)), None)
        return self.signal is not None

    @contextlib.contextmanager
    def finish_results(self) -> Iterator[None]:
        """Inside the block, share out work although a signal has come: work that is short, and makes results whole."""
        earlier, self.signal = self.signal, None
        try:
            yield
        finally:
            self.signal = self.signal or earlier

    @contextlib.contextmanager
    def keep_results(self) -> Iterator[None]:
        """Inside the block, let a signal end the work with the results so far, and the same signal again end at once.

        A single worker that has no results yet is interrupted where it is. After the block, when all workers
        have arrived there, this one leaves the group, and raises Interruption if there was a signal.
        """
        self.signal, self.is_cut_short, self.unfinished = None, False, {}
        self._has_results, self._is_interruptible = False, self.launch.size == 1
        signals = StopSignals(self.launch, self._handle_signal)
        try:
            yield
            self.barrier()
        finally:
            signals.restore()  # the launcher goes on if it was halted, which Horovod waits for
        self.close()
        if self.signal is not None:
            raise Interruption(self.signal)

    def _handle_signal(self, number: int) -> None:
        if self.signal is not None:
            return
        self.signal = number
        if self._is_interruptible:
            raise Interruption(number)
        self._announce_end()

    def _announce_end(self) -> None:
        if self.rank == 0 and self.signal is not None:
            announce_end(self.signal)

    @contextlib.contextmanager
    def _let_signals_interrupt(self, is_interruptible: bool) -> Iterator[None]:
        """Inside the block, let a signal interrupt this worker where it is, or only be noted."""
        before, self._is_interruptible = self._is_interruptible, is_interruptible
        try:
            yield
        finally:
            self._is_interruptible = before

    def any(self, flag: bool) -> bool:
        """Return on all workers whether the flag is true on at least one of them."""
        self._meet()
        total = torch.tensor([float(flag)])
        self._engine.start_sum(total)()
        return bool(total.item())

    def barrier(self) -> None:
        """Wait until every worker has made this call."""
        self.any(False)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Allow this worker to take long inside the block, for example to save, test or download.

        Only a standstill of its main thread counts as hanging there.
        """
        if self._watch is None:
            yield
            return
        self._watch.busy += 1
        try:
            yield
        finally:
            self._watch.busy -= 1

    def close(self) -> None:
        """Leave the group at the end of a run. A worker that ends without this call ends the job with an error."""
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


def join_workers(backend: str = "auto", device: str = "auto", timeout: float = 40.0) -> Workers:
    """Join the workers that this process was launched with; return them, or a single worker without a launcher.

    backend: auto takes Horovod under mpiexec or horovodrun if it is installed, else torch.distributed (NCCL on GPUs,
    Gloo on CPUs) under mpiexec, torchrun or srun, else none. device: auto, cpu or cuda (`cuda:<local rank>`).
    timeout: seconds after which a worker that has died, hangs or stays behind the others ends the job.
    Raises UsageError if the backend or the device cannot be used here.
    """
    launch = find_launch()
    place = choose_device(device, launch)
    engine, why = choose_engine(backend, launch, lambda: find_horovod_problem(launch, place))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    workers = Workers(launch, engine, why, place, timeout)
    if place.type == "cuda" and workers.size > 1:
        refuse_shared_gpu(workers.share(f"{socket.gethostname()} {torch.cuda.get_device_properties(place).uuid}"))
    return workers


def work_alone(device: torch.device | str = "cpu") -> Workers:
    """Return the only worker of a job, whatever this process was launched with."""
    return Workers(ALONE, "none", "one worker", torch.device(device), timeout=0.0)


@contextlib.contextmanager
def share_evaluation(device: str) -> Iterator[Workers]:
    """Join the workers that evaluate a model together; inside the block all but rank 0 print nothing.

    device: as in `join_workers`. A worker may compute for as long as it takes. A signal ends the work with the results
    so far, see `Workers.keep_results`.
    """
    workers = join_workers(device=device)
    if workers.rank > 0:
        os.environ["TQDM_DISABLE"] = "1"  # progress bars
    with workers.keep_results(), workers.print_once(), workers.busy():
        yield workers


class GradientAverager:
    """The average of gradients over workers, computed while the backward pass is still running.

    Buckets are filled from the last parameter to the first, about the order in which gradients become ready, and sent
    in that order on every worker. A parameter without a gradient is left out, because the same loss leaves it out on
    every worker; from the second pass on the others no longer wait for it.
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
        """Wait until every gradient is the mean over workers; call it once after each `backward()`."""
        if self._workers.size == 1:
            return
        while self._sent < len(self._buckets):
            self._send()
        for finish in self._in_flight:
            finish()
        self._begin({parameter for parameter in self._parameters if parameter.grad is None})

    def _begin(self, unreached: set[Tensor]) -> None:
        """Fill the buckets anew; the parameters that the loss does not reach come last."""
        order = sorted(self._parameters, key=lambda parameter: parameter in unreached)
        self._buckets = fill_buckets(order, self._bucket_bytes)
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


def fill_buckets(tensors: Iterable[Tensor], size: int = BUCKET_BYTES) -> list[list[Tensor]]:
    """Divide tensors, in their order, into buckets of one type and device that hold up to `size` bytes.

    A tensor larger than that has a bucket of its own.
    """
    buckets: list[list[Tensor]] = []
    kind, room = None, 0
    for tensor in tensors:
        if (tensor.dtype, tensor.device) != kind or tensor.nbytes > room:
            kind, room = (tensor.dtype, tensor.device), size
            buckets.append([])
        buckets[-1].append(tensor)
        room -= tensor.nbytes
    return buckets


def pack(item: Any) -> Tensor:
    """Return tensors and plain values as bytes, flat uint8 on the CPU."""
    file = io.BytesIO()
    torch.save(item, file)
    return torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.uint8)


def unpack(piece: Tensor) -> Any:
    """Return the item that `pack` turned into bytes, with tensors on the CPU."""
    return torch.load(io.BytesIO(piece.numpy().tobytes()), weights_only=True, map_location="cpu")
