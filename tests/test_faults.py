"""Runs that are killed, and runs of two workers: nothing is lost, and all workers agree."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from conftest import (
    BINARIES,
    ENVIRONMENT,
    ROOT,
    SMALL_RUN,
    WORKERS,
    is_same_state,
    load_state,
    run_python,
    skip_without_horovod,
)

pytestmark = pytest.mark.slow

KILLS = os.environ.get("KILLS", "20")  # raise it to look for rare moments, for example before a release
KILLED_AT_RANDOM = """
# One process that has loaded everything forks a training process per life, so that 20 lives take seconds.
import io, os, pathlib, random, signal, sys, time
root, logdir, *flags = sys.argv[1:]
sys.path.insert(0, root)
import torch
torch.set_num_threads(1)
import checkpoint
from ebm.support import cli
import train
from ebm.settings import TrainSettings
from sklearn.datasets import load_digits
from torch.utils.tensorboard import SummaryWriter

def die_in_a_save():
    # The process ends at one of the next calls of the functions by which files get to the disk: before it, after it, or
    # with half a checkpoint written.
    left = random.randint(1, 40)
    def intercept(module, name, end_in_between=None):
        function = getattr(module, name)
        def call(*arguments, **settings):
            nonlocal left
            left -= 1
            if left <= 0:  # less after a call that failed
                moment = random.choice(["before", "after", "between"])
                if moment == "after":
                    function(*arguments, **settings)
                elif moment == "between" and end_in_between:
                    end_in_between(function, *arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **settings)
        setattr(module, name, call)
    def write_half(save, state, file, *arguments):
        whole = io.BytesIO()
        save(state, whole)
        file.write(whole.getvalue()[: random.randrange(len(whole.getvalue()))])
        file.flush()
    for name in ("fsync", "replace", "rename", "mkdir", "unlink"):
        intercept(os, name)
    intercept(torch, "save", write_half)

def start(exp, *more, dies_in_a_save=False):
    pid = os.fork()
    if pid == 0:
        if dies_in_a_save:
            die_in_a_save()
        out = os.open(f"{logdir}/{exp}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1); os.dup2(out, 2)
        sys.argv = ["train.py", f"--logdir={logdir}", f"--exp={exp}", *flags, *more]
        try:
            cli.run(train.main, TrainSettings, "")
        except SystemExit as leaving:
            os._exit(leaving.code or 0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid

def newest(exp):
    found = checkpoint.list_iterations(pathlib.Path(logdir) / exp)
    return found[-1] if found else 0

random.seed(os.environ.get("KILLS_SEED", "0"))
for life in range(int(os.environ["KILLS"])):
    found = checkpoint.list_iterations(pathlib.Path(logdir) / "killed")
    resumed = random.choice([*found[-4:], "latest", "latest", "auto"]) if found else "auto"
    dies_in_a_save = life % 2 == 1
    pid = start("killed", "--max_iter=1000000", f"--resume_iter={resumed}", dies_in_a_save=dies_in_a_save)
    before = newest("killed")
    while not dies_in_a_save and newest("killed") == before:
        ended, status = os.waitpid(pid, os.WNOHANG)
        assert not ended, f"life {life} ended by itself with {status}"
        time.sleep(0.001)
    if not dies_in_a_save:
        time.sleep(random.uniform(0, 0.2))
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert status == signal.SIGKILL, f"life {life} ended by itself with {status}"
last = f"--max_iter={newest('killed') + 2}"
for exp, more in (("killed", ["--resume_iter=latest"]), ("whole", [])):
    _, status = os.waitpid(start(exp, last, *more), 0)
    assert status == 0, exp
"""


def test_killed_at_random_moments(tmp_path):
    """Breaks when some moment of a kill, in the middle of a save too, leaves a run that does not resume bit for bit.

    Every other life ends in the middle of a save; some lives go on from an earlier iteration than the latest.
    """
    flags = [*SMALL_RUN, "--save_interval=1", "--num_steps=1", "--test_interval=1000000"]
    result = run_python("-c", KILLED_AT_RANDOM, ROOT, tmp_path, *flags, env=ENVIRONMENT | {"KILLS": KILLS})
    printed = (tmp_path / "killed.out").read_text()
    assert result.returncode == 0, result.stderr + printed[-2000:]
    last = f"model_{max(int(path.stem[6:]) for path in (tmp_path / 'whole').glob('model_*.pt'))}.pt"
    assert is_same_state(load_state(tmp_path / "killed" / last), load_state(tmp_path / "whole" / last))
    assert (tmp_path / "killed" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()
    assert not list((tmp_path / "killed").glob(".*"))


# ---------------------------------------------------------------------------------------------------------------------
# Two workers

SAME_NOISE = """
# Every draw for the images of one worker is that worker's part of a draw for the images of all.
import sys
root, output, backend = sys.argv[1:]
sys.path.insert(0, root)
import torch
import data
from ebm.training import distributed
import models
from ebm.settings import TrainSettings
from ebm.training.run import read_batch
from ebm.training.state import State
from train import start_chains, train_step
from utils import ClippedAdam, ReplayBuffer

workers = distributed.join_workers(backend, "cpu")
count = 16 // workers.size
for name in ("rand", "randn"):
    def draw(*shape, whole=getattr(torch, name), **settings):
        shape = tuple(shape[0]) if isinstance(shape[0], (tuple, torch.Size)) else shape
        return whole((count * workers.size, *shape[1:]), **settings)[workers.rank * count :][:count]
    setattr(torch, name, draw)
dataset = data.load_dataset("digits")
model = models.build_model(models.ModelConfig("MnistNet", (1, 28, 28), 4, 10), torch.Generator().manual_seed(0)).train()
gradients = distributed.GradientAverager(workers, model.parameters())
state = State(model, ClippedAdam(model.parameters(), lr=1e-3), ReplayBuffer(0, (1, 28, 28)),
    data.Batches(len(dataset), count, 0, workers.rank, workers.size), torch.Generator().manual_seed(0))
settings = TrainSettings(batch_size=count, num_steps=3, step_lr=10.0, zero_kl=True)
for _ in range(20):
    images, labels = read_batch(state, settings, dataset)
    start = start_chains(state, settings, images, labels)
    train_step(state, settings, images, labels, start, gradients.finish)
if workers.rank == 0:
    torch.save(model.state_dict(), output)
workers.close()
"""

AGREE = """
# train.py itself, which at the end gathers the weights of all workers, and their averages.
import sys
root, output, *flags = sys.argv[1:]
sys.path.insert(0, root)
import torch
from ebm.support import cli
import train
from ebm.settings import TrainSettings
train_alone = train.train
def train_and_gather(run):
    train_alone(run)
    states = run.workers.gather([run.state.model.state_dict(), run.state.ema.state_dict()])
    if states is not None:
        torch.save(states, output)
train.train = train_and_gather
sys.argv = ["train.py", *flags]
cli.run(train.main, TrainSettings, "")
"""


def two_workers(*command):
    return subprocess.run(
        [BINARIES / "mpiexec", "-n", "2", "--oversubscribe", sys.executable, *map(str, command)],
        env=WORKERS, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture(params=["horovod", "torch"])
def engine(request):
    if request.param == "horovod":
        skip_without_horovod()
    return request.param


def test_two_workers_do_what_one_does(tmp_path, engine):
    """Breaks when gradients are summed instead of averaged, clipped before, or the workers see other images."""
    alone = run_python("-c", SAME_NOISE, ROOT, tmp_path / "one", "none", env=WORKERS)
    both = two_workers("-c", SAME_NOISE, ROOT, tmp_path / "two", engine)
    assert alone.returncode == both.returncode == 0, alone.stderr + both.stderr
    one, two = load_state(tmp_path / "one"), load_state(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_all_workers_hold_the_same_weights(tmp_path, engine):
    """Breaks when workers drift apart, though each has chains, replays and noise of its own."""
    flags = [*SMALL_RUN, f"--logdir={tmp_path}", f"--backend={engine}", "--exp=w", "--max_iter=50"]
    result = two_workers("-c", AGREE, ROOT, tmp_path / "states", *flags)
    assert result.returncode == 0, result.stderr
    first, second = load_state(tmp_path / "states")
    assert is_same_state(first, second)
    own = load_state(tmp_path / "w" / "model_50.pt")["workers"]
    assert len(own) == 2 and not torch.equal(own[0]["buffer"]["images"], own[1]["buffer"]["images"])
    assert result.stdout.count("iteration 50/50") == 1


def test_workers_resume(tmp_path):
    """Breaks when SIGTERM to mpiexec loses a worker's state, or another number of workers is refused or not told."""
    few = ["--num_steps=40", "--max_iter=12"]  # an iteration is still running when mpiexec would kill its workers

    def job(*more):
        flags = [*SMALL_RUN, f"--logdir={tmp_path}", "--backend=torch", "--save_interval=20", "--log_interval=1", *more]
        return [BINARIES / "mpiexec", "-n", "2", "--oversubscribe", sys.executable, ROOT / "train.py", *flags]

    def finish(*more):
        result = subprocess.run(job(*more), env=WORKERS, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, result.stderr

    finish("--exp=whole", *few)
    with subprocess.Popen(job("--exp=halves", *few), env=WORKERS) as process:
        log = tmp_path / "halves" / "log.jsonl"
        while not (log.exists() and log.read_text()):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) != 0
    (saved,) = (tmp_path / "halves").glob("model_*.pt")
    assert int(saved.stem[6:]) == log.read_text().count("\n") < 12
    alone = [ROOT / "train.py", f"--logdir={tmp_path}", "--exp=halves", "--resume_iter=latest"]
    result = two_workers(*alone)
    assert result.returncode == 0 and result.stdout.count("with its settings\n") == 1, result.stderr
    assert is_same_state(
        load_state(tmp_path / "whole" / "model_12.pt"), load_state(tmp_path / "halves" / "model_12.pt")
    )
    flags = [*SMALL_RUN, f"--logdir={tmp_path}", "--exp=halves", "--max_iter=14", "--resume_iter=12"]
    result = run_python(ROOT / "train.py", *flags, env=WORKERS)
    assert result.returncode == 0, result.stderr
    assert "was saved by a run of 2 worker(s), and this run has 1" in result.stdout


def test_a_worker_that_dies_ends_the_job(tmp_path, engine):
    """Breaks when the others wait for ever for a dead worker, nobody says which it was, or the run does not resume."""
    flags = [*SMALL_RUN, f"--logdir={tmp_path}", f"--backend={engine}", "--exp=d", "--save_interval=2"]
    command = [BINARIES / "mpiexec", "-n", "2", "--oversubscribe", sys.executable, ROOT / "train.py", *flags]
    with subprocess.Popen(
        [*command, "--max_iter=100000"], env=WORKERS, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "d").glob("model_*.pt")) and time.monotonic() < deadline:
            time.sleep(0.1)
        killed = time.monotonic()
        os.kill(children(process.pid)[1], signal.SIGKILL)
        printed, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - killed < 60
    assert "rank 1" in printed or "worker 1" in printed or "rank: 1" in printed, printed
    newest = max(int(path.stem[6:]) for path in (tmp_path / "d").glob("model_*.pt"))
    result = two_workers(ROOT / "train.py", *flags, f"--max_iter={newest + 2}", "--resume_iter=latest")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "d" / "config.json").read_text())["workers"] == 2


def children(pid):
    """The Python processes below this one, in the order they were started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=True)
    return sorted(map(int, found.stdout.split()))
