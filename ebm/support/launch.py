"""How this process was started: its place among the workers of a job, from the variables that launchers set."""

from __future__ import annotations

import os
import re
import signal
import time
import zlib
from collections.abc import Mapping
from typing import NamedTuple

from ebm.support.errors import UsageError


class Launch(NamedTuple):
    """The launcher that started a process, and its place among the workers."""

    launcher: str = ""
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


# The environment variables in which launchers pass rank, size, local rank and local size. The first complete row is
# used: a launcher inside a job of another one comes first.
LAUNCHERS = (
    ("horovodrun", "HOROVOD_RANK HOROVOD_SIZE HOROVOD_LOCAL_RANK HOROVOD_LOCAL_SIZE"),
    ("mpiexec", "OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_RANK OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("mpiexec", "PMI_RANK PMI_SIZE MPI_LOCALRANKID MPI_LOCALNRANKS"),  # MPICH, Intel MPI
    ("torchrun", "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE"),
)
SLURM = "SLURM_PROCID SLURM_STEP_NUM_TASKS SLURM_LOCALID SLURM_STEP_TASKS_PER_NODE SLURM_STEP_ID"
SLURM_STEPS = 0xFFFFFFF0  # numbers from here on are not of steps of srun, but of batch scripts and login shells
LOWEST_PORT, PORTS = 20_000, 10_000  # below the ports that Linux gives to programs which ask for any


def find_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Return how this process was started, from the variables that launchers set; without them, as the only worker.

    A variable that is empty counts as not set. Raises UsageError if the variables contradict each other.
    """
    given = {name: value for name, value in environment.items() if value.strip()}
    rows = [(launcher, variables.split()) for launcher, variables in LAUNCHERS]
    for launcher, names in rows:
        if all(name in given for name in names):
            return read_launch(launcher, names, given)
    if is_slurm_step(given):
        return find_slurm_launch(given)
    for launcher, names in rows:
        if all(name in given for name in names[:2]) and read_number(names[1], given) > 1:
            return read_partial_launch(launcher, names, given)
    return Launch()


def read_launch(launcher: str, names: list[str], given: Mapping[str, str]) -> Launch:
    """Return the launch that four variables describe. Raises UsageError if they are not numbers or out of range."""
    rank, size, local_rank, local_size = (read_number(name, given) for name in names)
    for index, number, limit in ((0, rank, size), (2, local_rank, local_size)):
        if number >= limit:
            clash = f"{names[index]}={number} does not go with {names[index + 1]}={limit}, as ranks are counted from 0"
            raise UsageError(f"{clash}; {describe_remedy(launcher, given)}")
    return Launch(launcher, rank, size, local_rank, local_size)


def read_partial_launch(launcher: str, names: list[str], given: Mapping[str, str]) -> Launch:
    """Return the launch of a process that knows its rank among several, but not its place on its machine.

    Kubernetes starts one such worker per machine, and sets the address of the first. Raises UsageError elsewhere.
    """
    if launcher == "torchrun" and "MASTER_ADDR" in given:
        given = {"LOCAL_RANK": "0"} | dict(given)
        local_size = read_number("LOCAL_RANK", given) + 1
        return read_launch(launcher, names, {"LOCAL_WORLD_SIZE": str(local_size)} | given)
    missing = "MASTER_ADDR" if launcher == "torchrun" else next(name for name in names if name not in given)
    raise UsageError(
        f"{names[1]}={given[names[1]]} says that this is one of several workers, but {missing} is not set; "
        f"{describe_remedy(launcher, given)}"
    )


def read_number(name: str, given: Mapping[str, str]) -> int:
    """Return the value of a variable, a whole number of at least 0. Raises UsageError if it is anything else."""
    value = given[name].strip()
    if not (value.isascii() and value.isdigit() and len(value) < 10):
        raise UsageError(f"the environment variable {name}={value} is not a number; unset it, or let a launcher set it")
    return int(value)


def describe_remedy(launcher: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return a clause that says how to start workers with this launcher, and how to work without it."""
    ranks = [variables.split()[0] for name, variables in (*LAUNCHERS, ("srun", SLURM)) if name == launcher]
    unset = " ".join(name for name in ranks if name in environment)
    return f"start all workers with {launcher}, or unset {unset} to work alone"


def is_first_worker() -> bool:
    """Return whether this process is rank 0, or cannot know its rank because the variables contradict each other."""
    try:
        return find_launch().rank == 0
    except UsageError:
        return True


def let_rank_0_speak() -> None:
    """Wait a few seconds on all ranks but 0, which makes the same mistake: its end then ends this worker in silence."""
    if not is_first_worker():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(6.0)


def remove_launch(environment: Mapping[str, str]) -> dict[str, str]:
    """Return environment variables without those of launchers, for a process that is a job of its own."""
    of_launchers = {name for _, variables in (*LAUNCHERS, ("srun", SLURM)) for name in variables.split()}
    return {name: value for name, value in environment.items() if name not in of_launchers}


# ---- SLURM ----


def is_slurm_step(given: Mapping[str, str]) -> bool:
    """Return whether this process is a task of srun, rather than a batch script or a shell inside an allocation.

    These have SLURM_NTASKS, too, but no step of their own, or one with a number that stands for such a shell.
    """
    return (
        "SLURM_PROCID" in given
        and given.get("SLURM_STEP_ID", "").isdigit()
        and (int(given["SLURM_STEP_ID"]) < SLURM_STEPS)
    )


def find_slurm_launch(given: Mapping[str, str]) -> Launch:
    """Return the place of this task among those of its step of srun."""
    given = {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1"} | dict(given)
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in given else "SLURM_NTASKS"
    if size not in given or read_number(size, given) == 1:
        return Launch()
    counts = expand_counts(given.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = read_number("SLURM_NODEID", given)
    if node < len(counts):
        local_size = counts[node]
    elif given.get("SLURM_STEP_NUM_NODES", given["SLURM_NNODES"]) == "1":
        local_size = read_number(size, given)
    else:
        local_size = read_number("SLURM_LOCALID", given) + 1
    values = dict(given) | {"LOCAL": str(local_size)}
    return read_launch("srun", ["SLURM_PROCID", size, "SLURM_LOCALID", "LOCAL"], values)


def expand_counts(text: str) -> list[int]:
    """Return the numbers of tasks on each node, which SLURM writes like "2(x3),1"."""
    counts = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


def find_first_node(nodes: str) -> str:
    """Return the first name in a list of nodes, which SLURM writes like "node[01-03,7],other"."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0] if first else "")


def find_address(launch: Launch, environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Return host and port at which the workers of torchrun and srun find each other.

    They stand in MASTER_ADDR and MASTER_PORT. Under srun the defaults are the first node and a port derived from the
    names of job and step, so that jobs on one machine differ. Raises UsageError if there is none, or no such port.
    """
    given = {name: value for name, value in environment.items() if value.strip()}
    host, port = given.get("MASTER_ADDR", ""), given.get("MASTER_PORT", "")
    if launch.launcher == "srun":
        is_local = launch.size == launch.local_size
        nodes = given.get("SLURM_STEP_NODELIST") or given.get("SLURM_JOB_NODELIST", "")
        host = host or ("127.0.0.1" if is_local else find_first_node(nodes))
        step = f"{given.get('SLURM_JOB_ID')}.{given.get('SLURM_STEP_ID')}"
        port = port or str(LOWEST_PORT + zlib.crc32(step.encode()) % PORTS)
    for name, value in (("MASTER_ADDR", host), ("MASTER_PORT", port)):
        if not value:
            remedy = describe_remedy(launch.launcher, given)
            raise UsageError(f"this is one of {launch.size} workers, but {name} is not set; {remedy}")
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65_536):
        raise UsageError(f"the environment variable MASTER_PORT={port} is not a port; unset it, or give 1024 to 65535")
    return host, int(port)
