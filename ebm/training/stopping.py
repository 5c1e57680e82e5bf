"""How signals ask a training run to end, and how it gets the time to save."""

from __future__ import annotations

import atexit
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from ebm.support.launch import Launch
from ebm.training import hold
from ebm.training.hold import STOP_SIGNALS

ECHO = 2.0  # seconds in which a signal may arrive again, because a launcher passes on what its workers got, too


def set_stop_handlers(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Set the handler of all signals that ask a run to end; return those before. An ignored SIGHUP stays ignored."""
    numbers = [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in numbers}


class StopSignals:
    """The handling of signals while a run trains: the first one asks it to end, by a call of `ask(number)`.

    The same signal again ends the process at once. The launcher may be held until `release_launcher`, see `hold`.
    """

    def __init__(self, launch: Launch, ask: Callable[[int], None]):
        self._ask = ask
        self._times: dict[int, float] = {}  # number -> when the signal came first
        self._launcher = find_killer(launch)
        self._hold = None if self._launcher is None else start_hold(self._launcher, launch.launcher)
        if self._hold is not None and self._hold.stdin is not None:
            os.set_blocking(self._hold.stdin.fileno(), False)
            signal.set_wakeup_fd(self._hold.stdin.fileno(), warn_on_full_buffer=False)
            # Horovod takes leave of the launcher when Python ends, which must find it running.
            atexit.register(self.release_launcher)
        self._earlier = set_stop_handlers(self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._times.setdefault(number, now) > ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._ask(number)

    def release_launcher(self) -> None:
        """Let the launcher go on, which may kill this process at once: what is to be saved has been saved."""
        if self._hold is not None and self._hold.stdin is not None:
            signal.set_wakeup_fd(-1)
            self._hold.stdin.close()
            if self._hold.wait() != 0 and self._launcher is not None:  # it was killed, and may have left it stopped
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._launcher, signal.SIGCONT)
            self._hold = None

    def restore(self) -> None:
        """Give the signals back to whoever had them before."""
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self.release_launcher()
        atexit.unregister(self.release_launcher)


def find_killer(launch: Launch) -> int | None:
    """Return the number of the process that would kill this worker before it has saved, and that it has to halt.

    mpiexec has one such process on each machine, the parent of the workers; horovodrun has one for each worker. None
    under other launchers, which wait, MPICH's mpiexec, too.
    """
    if launch.launcher == "mpiexec" and launch.local_rank == 0 and "OMPI_COMM_WORLD_RANK" in os.environ:
        return os.getppid()
    if launch.launcher == "horovodrun":
        return os.getsid(0)  # the parent is a shell, whose parent leads the session
    return None


def start_hold(pid: int, name: str) -> subprocess.Popen[bytes]:
    """Start the program that can halt the process of a launcher. name: of the launcher."""
    command = [sys.executable, "-I", "-S", str(pathlib.Path(hold.__file__)), str(pid), name]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True)
