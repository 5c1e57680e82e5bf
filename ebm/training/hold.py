"""A program that halts the launcher of a training run while the run saves: `python hold.py PID NAME < signals`.

mpiexec kills its workers half a second after it has sent them SIGTERM, and horovodrun after five seconds. A worker
starts this program when it begins to train, and sends it a byte for each signal it receives. From the first SIGTERM on,
the launcher is stopped; when the worker closes the pipe or dies, whatever the cause, the launcher goes on and ends.
This is a process of its own because it has to outlive a worker that is killed. It needs the standard library only.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys

# What schedulers and people send: SIGUSR1 and SIGUSR2 announce the end of a job, SIGXCPU the end of its CPU time.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
INTERVAL = 0.05  # seconds after which the launcher is stopped again, as schedulers send SIGCONT beside SIGTERM


def hold_launcher(pid: int, name: str) -> None:
    """Stop the process of the launcher from the first SIGTERM that is read from stdin until stdin is closed."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # schedulers signal every process of a job
    is_held = False
    while True:
        ready, _, _ = select.select([0], [], [], INTERVAL if is_held else None)
        numbers = os.read(0, 64) if ready else b""
        if ready and not numbers:
            break
        if is_held or signal.SIGTERM in numbers:
            os.kill(pid, signal.SIGSTOP)
        if not is_held and signal.SIGTERM in numbers:
            is_held = True
            tell_user(pid, f"note: {name} halts until what was done is saved; then the job ends")
    if is_held:
        os.kill(pid, signal.SIGCONT)


def tell_user(pid: int, message: str) -> None:
    """Print a line where the launcher prints its own, which passes on no output while it is stopped."""
    with contextlib.suppress(OSError):  # a socket, or a pipe that nobody empties
        descriptor = os.open(f"/proc/{pid}/fd/2", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY)
        os.write(descriptor, f"{message}\n".encode())


if __name__ == "__main__":
    with contextlib.suppress(ProcessLookupError):  # the launcher has died
        hold_launcher(int(sys.argv[1]), sys.argv[2])
