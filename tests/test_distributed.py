"""Workers agree on tensors, gradients and items, and a broken worker ends the job: under every engine, two workers.

The tests that need workers start this same file as a script, with a scenario.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import ROOT, WORKERS, skip_without_horovod
from ebm.support.errors import UsageError
from ebm.support.launch import Launch, find_address, find_launch, remove_launch
from ebm.training import distributed, stopping
from ebm.training.stopping import STOP_SIGNALS, StopSignals

TIMEOUT = 3.0  # seconds until the watch ends a job here
DEADLINE = 100.0  # seconds after which a test gives up on a job

MPI = Launch("mpiexec", 1, 2, 1, 2)
HOROVODRUN = Launch("horovodrun", 1, 2, 1, 2)
TORCHRUN = Launch("torchrun", 1, 2, 1, 2)
SRUN = Launch("srun", 1, 2, 1, 2)
ALONE = Launch()

STEP = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}
STEP |= {"SLURM_STEP_TASKS_PER_NODE": "1,3", "SLURM_NODEID": "1", "SLURM_NNODES": "2", "SLURM_STEP_ID": "0"}
STEP |= {"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "gpu[08-09,12]-ib,cpu1"}
TORCHRUN_INSIDE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def horovod_works() -> str:
    return ""


def horovod_is_missing() -> str:
    return "Horovod is not installed"


def must_not_ask() -> str:
    raise AssertionError("Horovod was imported where it cannot be used")


# ------------------------------------------------------------------------------------------------ what runs, and why


@pytest.mark.parametrize(
    ("environment", "launch"),
    [
        ({}, ALONE),
        (
            {
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
                "RANK": "0",
            },
            Launch("mpiexec", 3, 4, 1, 2),
        ),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
            Launch("mpiexec", 1, 2, 1, 2),
        ),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
            Launch("torchrun", 5, 8, 1, 4),
        ),
        (
            {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2", "HOROVOD_LOCAL_RANK": "0", "HOROVOD_LOCAL_SIZE": "1"},
            Launch("horovodrun", 1, 2, 0, 1),
        ),
        ({"RANK": "5", "WORLD_SIZE": ""}, ALONE),
        ({"RANK": "0", "WORLD_SIZE": "1"}, ALONE),
        ({"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "pod-0"}, Launch("torchrun", 5, 8, 0, 1)),  # Kubernetes
        (STEP, Launch("srun", 2, 4, 1, 3)),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": ""}, Launch("srun", 2, 4, 1, 2)),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "", "SLURM_NNODES": "1"}, Launch("srun", 2, 4, 1, 4)),
        (STEP | {"SLURM_STEP_NUM_TASKS": ""}, Launch("srun", 2, 4, 1, 3)),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, ALONE),  # a shell by srun --pty
        (STEP | {"SLURM_STEP_ID": ""}, ALONE),  # the script of sbatch
        (STEP | {"SLURM_STEP_ID": str(0xFFFFFFFA)}, ALONE),  # the shell of salloc
        (STEP | {"PMI_RANK": "2", "PMI_SIZE": "4"}, Launch("srun", 2, 4, 1, 3)),  # srun --mpi=pmi2
        (STEP | TORCHRUN_INSIDE, Launch("torchrun", 1, 2, 1, 2)),
    ],
)
def test_launch_is_read_from_the_environment(environment: dict[str, str], launch: Launch) -> None:
    """Breaks when a launcher's variables are misread, or when half of them pass for a launch."""
    assert find_launch(environment) == launch


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE=many is not a number; unset it"),
        ({"RANK": "-1"}, "RANK=-1 is not a number"),
        ({"RANK": "2"}, "RANK=2 does not go with WORLD_SIZE=2.* unset RANK"),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK=3 does not go with LOCAL_WORLD_SIZE=2"),
        ({"LOCAL_RANK": ""}, "WORLD_SIZE=2 .* MASTER_ADDR is not set; start all workers with torchrun, or unset RANK"),
        ({"LOCAL_RANK": "x", "LOCAL_WORLD_SIZE": "", "MASTER_ADDR": "pod-0"}, "LOCAL_RANK=x is not a number"),
        ({"WORLD_SIZE": "", "PMI_RANK": "0", "PMI_SIZE": "2"}, "MPI_LOCALRANKID is not set; .* unset PMI_RANK"),
        ({"WORLD_SIZE": "", **STEP, "SLURM_PROCID": "4"}, "SLURM_PROCID=4 .* unset SLURM_PROCID"),
    ],
)
def test_contradictory_launch_is_refused(changes: dict[str, str], words: str) -> None:
    """Breaks when variables left over from elsewhere end in a traceback, or let a copy train alone."""
    with pytest.raises(UsageError, match=words):
        find_launch(TORCHRUN_INSIDE | changes)


def test_workers_of_srun_have_an_address() -> None:
    """Breaks when tasks of one step look for each other at different places, or those of two jobs at one port."""
    srun = find_launch(STEP)
    host, port = find_address(srun, STEP)
    assert host == "gpu08-ib" and 1024 < port < 32768
    assert find_address(srun, STEP | {"SLURM_PROCID": "3"}) == (host, port)
    assert find_address(srun, STEP | {"SLURM_JOB_ID": "78"})[1] != port
    assert find_address(srun, STEP | {"MASTER_ADDR": "a", "MASTER_PORT": "29500"}) == ("a", 29500)
    assert find_address(srun._replace(local_size=4), STEP)[0] == "127.0.0.1"
    with pytest.raises(UsageError, match="MASTER_PORT=x is not a port"):
        find_address(TORCHRUN, {"MASTER_ADDR": "a", "MASTER_PORT": "x"})
    with pytest.raises(UsageError, match="MASTER_ADDR is not set; start all workers with torchrun, or unset RANK"):
        find_address(TORCHRUN, TORCHRUN_INSIDE)


def test_command_inside_a_job_is_alone() -> None:
    """Breaks when a training that a worker starts takes the worker's place among the others for its own."""
    assert find_launch(remove_launch(STEP | TORCHRUN_INSIDE)) == ALONE


def test_missing_worker_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a worker waits for ever for others that never come, or does not say for which."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(port))):
            monkeypatch.setenv(name, value)
        with pytest.raises(UsageError, match=f"rank 0 cannot listen at 127.0.0.1:{port} .* set MASTER_ADDR"):
            distributed.open_store(TORCHRUN._replace(rank=0), 0.2)
    with pytest.raises(UsageError, match=f"rank 1 cannot reach rank 0 at 127.0.0.1:{port}"):
        distributed.open_store(TORCHRUN, 0.2)
    with pytest.raises(UsageError, match=r"rank 1 of 2 has not arrived within 0\.2 s"):
        distributed.open_store(TORCHRUN._replace(rank=0), 0.2)


@pytest.mark.parametrize(
    ("backend", "launch", "problem", "engine", "why"),
    [
        ("auto", ALONE, must_not_ask, "none", "one worker"),
        ("auto", MPI, horovod_works, "horovod", "started by mpiexec"),
        ("auto", MPI, horovod_is_missing, "torch", "started by mpiexec, Horovod is not installed"),
        ("auto", HOROVODRUN, horovod_works, "horovod", "started by horovodrun"),
        ("auto", TORCHRUN, must_not_ask, "torch", "started by torchrun"),
        ("auto", MPI._replace(rank=0, size=1), must_not_ask, "none", "one worker"),
        ("horovod", MPI, horovod_works, "horovod", "backend=horovod"),
        ("horovod", ALONE, horovod_works, "horovod", "backend=horovod"),
        ("torch", MPI, must_not_ask, "torch", "backend=torch"),
        ("torch", TORCHRUN, must_not_ask, "torch", "backend=torch"),
        ("auto", SRUN, must_not_ask, "torch", "started by srun"),
        ("torch", ALONE, must_not_ask, "torch", "backend=torch"),
        ("none", ALONE, must_not_ask, "none", "backend=none"),
    ],
)
def test_engine_choice(backend: str, launch: Launch, problem: Callable[[], str], engine: str, why: str) -> None:
    """Breaks when `auto` prefers the wrong engine, a flag is not obeyed, or Horovod is imported for nothing."""
    assert distributed.choose_engine(backend, launch, problem) == (engine, why)


@pytest.mark.parametrize(
    ("backend", "launch", "words"),
    [
        ("none", MPI, "overwrite the files of the others"),
        ("horovod", MPI, "Horovod is not installed; run scripts/install_horovod.sh"),
        ("horovod", TORCHRUN, "start the workers with mpiexec"),
        ("horovod", SRUN, "start the workers with mpiexec"),
        ("torch", HOROVODRUN, "start the workers with mpiexec"),
        ("auto", HOROVODRUN, "Horovod is not installed"),
        ("nccl", MPI, "use one of auto, horovod, torch, none"),
    ],
)
def test_impossible_backend_is_refused(backend: str, launch: Launch, words: str) -> None:
    """Breaks when a backend that cannot run is replaced in silence, or refused without a remedy."""
    with pytest.raises(UsageError, match=words):
        distributed.choose_engine(backend, launch, horovod_is_missing)


def test_one_gpu_per_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a worker takes another GPU than its local rank, or when two would share one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    four = Launch("mpiexec", 5, 8, 1, 4)

    assert distributed.choose_device("auto", MPI) == torch.device("cuda:1")
    assert distributed.choose_device("cuda", ALONE) == torch.device("cuda:0")
    assert distributed.choose_device("cuda:1", ALONE) == torch.device("cuda:1")
    assert distributed.choose_device("cpu", four) == torch.device("cpu")
    for name in ("auto", "cuda"):
        with pytest.raises(UsageError, match=r"4 worker\(s\) on this machine but 2 GPU\(s\)"):
            distributed.choose_device(name, four)
    with pytest.raises(UsageError, match="every worker on one GPU"):
        distributed.choose_device("cuda:1", MPI)
    with pytest.raises(UsageError, match="`device`=cuda:2"):
        distributed.choose_device("cuda:2", ALONE)
    with pytest.raises(UsageError, match="`device`=gpu is unknown"):
        distributed.choose_device("gpu", ALONE)


def test_the_only_gpu_is_the_own_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when launchers that show each worker one GPU are refused, or two workers on one GPU are not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert distributed.choose_device("auto", MPI) == torch.device("cuda:0")
    distributed.refuse_shared_gpu(["here a", "here b", "there a"])
    with pytest.raises(UsageError, match="ranks 1 and 2 would share one GPU"):
        distributed.refuse_shared_gpu(["here a", "here b", "here b"])


def test_alone() -> None:
    """Breaks when code written for workers does not run, or changes a number, in a single process."""
    workers = distributed.join_workers("none", "cpu")
    tensor = torch.tensor([1.0, 2.0])
    layer = nn.Linear(2, 1)
    averager = distributed.GradientAverager(workers, layer.parameters())
    layer(tensor).sum().backward()
    averager.finish()
    workers.broadcast([tensor])
    workers.average([tensor])
    workers.barrier()
    with workers.busy():
        pass

    assert (workers.size, workers.engine, workers.why) == (1, "none", "backend=none")
    assert tensor.tolist() == [1.0, 2.0]
    assert layer.weight.grad is not None and layer.weight.grad.tolist() == [[1.0, 2.0]]
    assert workers.gather({"a": 1}) == [{"a": 1}]
    assert workers.share("a") == ["a"]
    assert workers.any(True) and not workers.any(False)
    workers.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_mistake_of_rank_0_reaches_all(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Breaks when a wrong path of data is one line on rank 0 and a traceback of the connection on the others."""
    workers = distributed.work_alone()
    workers.rank = rank
    calls: list[str] = []

    def share(problem: str) -> list[str]:
        calls.append(f"told {problem}" if rank == 0 else "heard")
        return ["no images there"]

    def read() -> None:
        calls.append("read")
        raise UsageError("no images there")

    monkeypatch.setattr(workers, "share", share)
    with pytest.raises(UsageError, match="no images there"):
        workers.take_turns(read)
    assert calls == (["read", "told no images there"] if rank == 0 else ["heard"])
    monkeypatch.setattr(workers, "share", lambda problem: [""])
    assert workers.take_turns(lambda: "images") == "images"


@pytest.mark.parametrize("rank", [0, 1])
def test_notes_are_printed_once(capsys: pytest.CaptureFixture[str], rank: int) -> None:
    """Breaks when each worker prints the same note about its data or its network, or rank 0 prints none."""
    workers = distributed.work_alone()
    workers.rank = rank
    with workers.print_once():
        print("note: five images are left out")
    print("done")
    assert capsys.readouterr().out == "note: five images are left out\n" * (rank == 0) + "done\n"


def test_foreign_objects_are_not_unpickled() -> None:
    """Breaks when what another process sent is unpickled without limits."""
    with pytest.raises(Exception, match="weights_only"):
        distributed.unpack(distributed.pack(pathlib.Path("x")))


# ------------------------------------------------------------------------------------------------- signals


@pytest.fixture
def launcher() -> Iterator[subprocess.Popen[bytes]]:
    """A process in the place of a launcher."""
    with subprocess.Popen(["sleep", "100"]) as process:
        yield process
        process.kill()


def is_stopped(pid: int) -> bool:
    """Return whether a process is stopped by a signal."""
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def wait_until(condition: Callable[[], bool], seconds: float = DEADLINE) -> None:
    """Wait until the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_launcher_is_released_without_its_holder(
    monkeypatch: pytest.MonkeyPatch, launcher: subprocess.Popen[bytes]
) -> None:
    """Breaks when mpiexec stays stopped for ever because somebody has killed the program that halts it."""
    monkeypatch.setattr(os, "getppid", lambda: launcher.pid)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    signals = StopSignals(MPI._replace(local_rank=0), lambda number: None)
    signal.raise_signal(signal.SIGTERM)
    wait_until(lambda: is_stopped(launcher.pid))
    assert signals._hold is not None
    signals._hold.kill()
    signals.restore()
    wait_until(lambda: not is_stopped(launcher.pid))


def test_launcher_is_held_while_a_run_saves(monkeypatch: pytest.MonkeyPatch, launcher: subprocess.Popen[bytes]) -> None:
    """Breaks when mpiexec can kill its workers before they have saved, stays stopped, or is stopped for nothing."""
    monkeypatch.setattr(os, "getppid", lambda: launcher.pid)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    asked: list[int] = []
    signals = StopSignals(MPI._replace(local_rank=0), asked.append)
    signal.raise_signal(signal.SIGUSR1)
    assert asked == [signal.SIGUSR1] and not is_stopped(launcher.pid)
    signal.raise_signal(signal.SIGTERM)
    wait_until(lambda: is_stopped(launcher.pid))
    assert signals._hold is not None
    signals._hold.terminate()  # a scheduler that signals all processes of a job, and wakes them up
    launcher.send_signal(signal.SIGCONT)
    wait_until(lambda: not is_stopped(launcher.pid))
    wait_until(lambda: is_stopped(launcher.pid))
    signals.release_launcher()
    wait_until(lambda: not is_stopped(launcher.pid))
    signals.restore()
    assert asked == [signal.SIGUSR1, signal.SIGTERM]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_first_signal_asks_and_second_ends(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    """Breaks when a signal ends a run without a save, when its echo from the launcher does, or when nothing ends it."""
    asked: list[int] = []
    ended: list[int] = []
    before = signal.getsignal(number)
    signals = StopSignals(ALONE, asked.append)
    try:
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert asked == [number, number]
        monkeypatch.setattr(stopping, "ECHO", 0.0)
        monkeypatch.setattr(signal, "raise_signal", ended.append)
        os.kill(os.getpid(), number)
        assert ended == [number] and signal.getsignal(number) == signal.SIG_DFL
    finally:
        signals.restore()
    assert signal.getsignal(number) == before


def test_nohup_is_obeyed() -> None:
    """Breaks when a run under nohup ends with its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals = StopSignals(ALONE, lambda number: pytest.fail("SIGHUP has ended the run"))
    signal.raise_signal(signal.SIGHUP)
    signals.restore()
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


# ------------------------------------------------------------------------------------------------- jobs of two workers


@dataclasses.dataclass
class Job:
    """A launcher and its workers, running one scenario of this file."""

    process: subprocess.Popen[str]
    output: pathlib.Path

    def finish(self) -> tuple[int, str]:
        """Return the exit status and everything printed."""
        try:
            status = self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the job did not end; it printed {self.output.read_text()}")
        return status, self.output.read_text()

    def workers(self) -> list[int]:
        """Return the process ids of the workers that are still there."""
        pids = []
        for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if str(self.output).encode() in words and int(path.parent.name) != self.process.pid:
                pids.append(int(path.parent.name))
        return pids

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds."""
        end = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < end, f"the job printed {self.output.read_text()}"
            time.sleep(0.1)


StartJob = Callable[[str, str], Job]

WITHOUT_LAUNCHER = """
free_port='import socket; print(socket.create_server(("", 0)).getsockname()[1])'
export MASTER_ADDR=127.0.0.1 MASTER_PORT=$(python -c "$free_port") WORLD_SIZE=2 LOCAL_WORLD_SIZE=2
RANK=1 LOCAL_RANK=1 python "$@" &
RANK=0 LOCAL_RANK=0 exec python "$@"
"""
LAUNCHERS = {
    "sh": ["sh", "-c", WITHOUT_LAUNCHER, "sh"],  # nobody to clean up: what torchrun sets, but no torchrun
    "mpiexec": ["mpiexec", "-n", "2", "--oversubscribe", "python"],
    "torchrun": ["torchrun", "--nproc_per_node=2"],
}


@pytest.fixture(scope="module")
def start_job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartJob]:
    """Start `start_job("mpiexec torch", "agree")`: a launcher, an engine and a scenario; kill what is left."""
    jobs = []
    environment = remove_launch(WORKERS) | {"PYTHONPATH": str(ROOT)}

    def start(way: str, scenario: str) -> Job:
        launcher, engine = way.split()
        if shutil.which(launcher, path=WORKERS["PATH"]) is None:
            pytest.skip(f"no {launcher} here: {distributed.INSTALL}")
        if engine == "horovod":
            skip_without_horovod()
        output = tmp_path_factory.mktemp("job") / "output"
        command = [*LAUNCHERS[launcher], __file__, engine, scenario, str(output)]
        with output.open("w") as file:
            process = subprocess.Popen(command, env=environment, text=True, stdout=file, stderr=subprocess.STDOUT)
        jobs.append(Job(process, output))
        return jobs[-1]

    yield start
    for job in jobs:
        for pid in [*job.workers(), *([job.process.pid] if job.process.poll() is None else [])]:
            os.kill(pid, signal.SIGKILL)


ENGINES = ["mpiexec horovod", "mpiexec torch"]


@pytest.fixture(scope="module", params=ENGINES)
def results(request: pytest.FixtureRequest, start_job: StartJob) -> list[dict[str, Any]]:
    """What rank 0 and rank 1 saw in the scenario "agree"."""
    job = start_job(request.param, "agree")
    status, text = job.finish()
    assert status == 0, text
    name = "horovod" if "horovod" in request.param else "torch"
    assert text.count(f"2 workers on cpu, {name} (backend=") == 1, text  # the start-up line, printed once
    return [torch.load(f"{job.output}.{rank}", weights_only=True) for rank in range(2)]


def tensors_of(rank: int) -> list[Tensor]:
    """Tensors of many types and layouts, which differ between ranks."""
    generator = torch.Generator().manual_seed(rank)
    weights = torch.randn(4, 3, 3, 3, generator=generator)
    return [
        weights.clone(memory_format=torch.channels_last),
        torch.tensor(rank == 0),
        torch.tensor([rank, 7]),
        torch.randn(5, generator=generator, dtype=torch.float64),
        torch.randn(3, generator=generator).bfloat16(),
        torch.empty(0),
    ]


def floats_of(rank: int) -> list[Tensor]:
    """Sixty small tensors, then some that fill more than one bucket."""
    generator = torch.Generator().manual_seed(10 + rank)
    sizes = [1 + i % 7 for i in range(60)] + [distributed.BUCKET_BYTES // 4 - 5, 3, distributed.BUCKET_BYTES // 2]
    return [torch.randn(size, generator=generator) for size in sizes]


class Network(nn.Module):
    """Three layers, each of which fills a bucket of the scenario, and a parameter that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList([0.1 * torch.randn(50, 50, generator=generator) for _ in range(3)])
        self.unused = nn.Parameter(torch.ones(2))

    def loss(self, rank: int, step: int, at_middle: Callable[[], None] = lambda: None) -> Tensor:
        """Return a loss whose backward pass calls at_middle() once the last layer is behind it."""
        images = torch.randn(rank + 2, 50, generator=torch.Generator().manual_seed(100 * step + rank))
        first, middle, last = self.weights
        images = (images @ first).tanh() @ middle
        images.register_hook(lambda _: at_middle())
        return (images.tanh() @ last).square().sum()

    def gradients(self) -> list[Tensor]:
        return [weight.grad.clone() for weight in self.weights if weight.grad is not None]


def item_of(rank: int) -> dict[str, Any]:
    """A worker's state in a checkpoint: of another size on each."""
    return {"rank": rank, "images": torch.full((1000 * rank, 3), rank, dtype=torch.uint8), "rng": [1.5, {"a": None}]}


@pytest.mark.slow
def test_broadcast_is_bitwise(results: list[dict[str, Any]]) -> None:
    """Breaks when a tensor of some type or layout is not that of rank 0, bit for bit."""
    for result in results:
        for received, expected in zip(result["broadcast"], tensors_of(0), strict=True):
            assert received.dtype == expected.dtype and received.shape == expected.shape
            assert torch.equal(received, expected)


@pytest.mark.slow
def test_average_is_the_mean_in_few_messages(results: list[dict[str, Any]]) -> None:
    """Breaks when the mean is wrong, differs between workers, or every small tensor is a message of its own."""
    expected = [(a + b) / 2 for a, b in zip(floats_of(0), floats_of(1), strict=True)]
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result["average"], expected, strict=True))
        assert result["messages"] == 3


@pytest.mark.slow
def test_gradients_are_averaged_during_the_backward_pass(results: list[dict[str, Any]]) -> None:
    """Breaks when gradients are not the plain mean, in a second step either, or are sent only after the pass."""
    for step in range(2):
        expected = []
        for rank in range(2):
            model = Network()
            model.loss(rank, step).backward()
            expected.append(model.gradients())
        for result in results:
            for received, a, b in zip(result["gradients"][step], *expected, strict=True):
                torch.testing.assert_close(received, (a + b) / 2, rtol=1e-6, atol=1e-7)
    for result in results:
        # Messages on their way when the gradient reaches the middle layer. The first pass waits for the parameter
        # that no loss reaches.
        assert result["in_flight"] == [0, 1]
        assert result["unused"] is None


@pytest.mark.slow
def test_items_are_gathered(results: list[dict[str, Any]]) -> None:
    """Breaks when a worker's state is lost, mixed up or rounded on its way to or from the checkpoint."""
    gathered, elsewhere = (result["gathered"] for result in results)
    assert [result["shared"] for result in results] == [["", "a"]] * 2
    assert elsewhere is None
    for rank, item in enumerate(gathered):
        expected = item_of(rank)
        assert torch.equal(item.pop("images"), expected.pop("images"))
        assert item == expected


@pytest.mark.slow
def test_no_thread_outlives_close(results: list[dict[str, Any]]) -> None:
    """Breaks when a thread of Gloo goes on while Python ends: now and then that aborts a run that was complete."""
    for result in results:
        assert not [name for name in result["threads"] if "gloo" in name]


@pytest.mark.slow
def test_any(results: list[dict[str, Any]]) -> None:
    """Breaks when one worker's flag does not reach the others, or when none sets it off."""
    assert [result["any"] for result in results] == [[True, True, False]] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "scenario", "words"),
    [
        ("mpiexec horovod", "dies", "rank 1"),
        ("sh torch", "dies", "rank 1 has died"),
        ("mpiexec horovod", "fails", "rank 1 has failed"),
        ("mpiexec torch", "fails", "rank 1 has failed"),
        ("mpiexec horovod", "sleeps", "rank 1 hangs"),
        ("mpiexec torch", "loops", "rank 1 hangs"),
        ("torchrun torch", "stops", "rank 1 has been silent"),
        ("mpiexec torch", "sleeps while busy", "rank 1 hangs"),
        ("torchrun torch", "leaves", "rank 1 has ended before the others"),
    ],
)
def test_broken_worker_ends_the_job(start_job: StartJob, way: str, scenario: str, words: str) -> None:
    """Breaks when a job outlives a worker that died or hangs, does not name it, or leaves a process behind."""
    job = start_job(way, scenario)
    status, text = job.finish()
    assert status != 0
    assert words in text
    job.wait_until(lambda: not job.workers())


@pytest.mark.slow
def test_waiting_for_a_busy_worker_is_no_offence(start_job: StartJob) -> None:
    """Breaks when a rank 0 that saves or tests for longer than the timeout costs the job its life."""
    status, text = start_job("mpiexec torch", "works long").finish()
    assert status == 0, text
    assert "error" not in text


@pytest.mark.slow
def test_no_worker_outlives_its_launcher(start_job: StartJob) -> None:
    """Breaks when workers train on as orphans after their launcher was killed."""
    job = start_job("mpiexec torch", "all sleep")
    job.wait_until(lambda: "asleep" in job.output.read_text())
    assert len(job.workers()) == 2
    job.process.kill()
    job.wait_until(lambda: not job.workers())


# ------------------------------------------------------------------------------------------ what a worker does in a job


def agree(workers: distributed.Workers) -> dict[str, Any]:
    rank, result = workers.rank, dict[str, Any]()
    result["broadcast"] = tensors_of(rank)
    workers.broadcast(result["broadcast"])

    messages = 0
    start_sum = workers._engine.start_sum

    def count(flat: Tensor) -> Callable[[], object]:
        nonlocal messages
        messages += 1
        return start_sum(flat)

    workers._engine.start_sum = count  # type: ignore[method-assign]
    result["average"] = floats_of(rank)
    workers.average(result["average"])
    result["messages"] = messages

    model = Network()
    parameters = [*model.weights, model.unused]
    averager = distributed.GradientAverager(workers, parameters, bucket_bytes=model.weights[0].nbytes)
    result["in_flight"] = in_flight = []
    result["gradients"] = []
    for step in range(2):
        model.zero_grad()
        model.loss(rank, step, lambda: in_flight.append(len(averager._in_flight))).backward()
        averager.finish()
        result["gradients"].append(model.gradients())
    result["unused"] = model.unused.grad

    result["gathered"] = workers.gather(item_of(rank))
    result["shared"] = workers.share(rank * "a")
    result["any"] = [workers.any(rank == 0), workers.any(rank == 1), workers.any(False)]

    torch.func.grad(torch.sum)(torch.ones(2))  # what a chain calls; it loads parts of torch only now
    workers.close()
    result["threads"] = list_threads()
    return result


def list_threads() -> list[str]:
    """Return the names of this process's threads; one that ends while they are listed is left out."""
    names = []
    for path in pathlib.Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):
            names.append(path.read_text().strip())
    return names


def misbehave(workers: distributed.Workers, scenario: str) -> None:
    """What rank 1 does while rank 0 waits for it."""
    if scenario == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    elif scenario == "fails":
        raise RuntimeError("broken")
    elif scenario == "sleeps":
        time.sleep(10 * DEADLINE)
    elif scenario == "loops":
        while True:
            pass
    elif scenario == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif scenario == "sleeps while busy":
        with workers.busy():
            time.sleep(10 * DEADLINE)
    elif scenario == "leaves":
        sys.exit(0)


def compute(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        torch.ones(100, 100).matmul(torch.ones(100, 100))


def main(engine: str, scenario: str, output: str) -> None:
    workers = distributed.join_workers(engine, "cpu", TIMEOUT)
    workers.print(f"{workers.size} workers on {workers.device.type}, {workers.engine} ({workers.why})")
    workers.average([torch.ones(1)])  # from here on the watch is strict
    if scenario == "agree":
        torch.save(agree(workers), f"{output}.{workers.rank}")
        return
    if scenario == "works long" and workers.rank == 0:
        with workers.busy():
            compute(2.5 * TIMEOUT)
    elif scenario == "all sleep":
        workers.print("asleep")
        time.sleep(10 * DEADLINE)
    elif workers.rank == 1:
        misbehave(workers, scenario)
    workers.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
