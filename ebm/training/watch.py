"""The watch over workers that train together, which ends the job if one of them dies or hangs."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import secrets
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from ebm.support.launch import Launch


def find_host(launch: Launch) -> str:
    """Return the host name or address under which the other workers reach this machine."""
    return "127.0.0.1" if launch.local_size == launch.size else socket.gethostname()


@dataclasses.dataclass
class Peer:
    """Another worker, as the watch knows it."""

    connection: socket.socket
    pid: int
    unread: bytes = b""
    quiet: float = 0.0  # seconds since its last message
    done: bool = False  # whether it has announced its end


class Watch(threading.Thread):
    """A thread that ends the job if a worker dies or hangs, with one line that names the worker's rank.

    Every worker holds a connection to rank 0 and reports at each beat how often it has met the others (to average,
    gather, ...). If the connection breaks, the worker has died. If it is silent for `timeout` seconds, the worker was
    stopped. If the others have been ahead of a worker for as long, it hangs, unless it shows signs of life. A sign of
    life is a beat in which its main thread computes; it counts while the worker is `busy` and until the first gradients
    are averaged (compilation, cold files).

    A worker that waits for others does not hang, so that rank 0 may save and test for as long as it takes. Time is
    counted in beats, so that a job which is suspended as a whole can be resumed.
    """

    BEAT = 0.25  # seconds
    GRACE = 3.0  # seconds in which a worker may end with its own message after another one has ended
    BEATING, DONE, ENDING = range(3)
    MESSAGE = struct.Struct("!BIQQ")  # one of these states, the rank that caused the end, meetings, signs of life
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
        self._behind = dict.fromkeys(range(launch.size), 0.0)  # rank -> seconds without progress while others are ahead
        self._peers = self._call_rank_0(broadcast) if launch.rank > 0 else self._receive_calls(broadcast)
        atexit.register(self._leave_early)
        self.start()

    def close(self) -> None:
        """Stop the watch because the work of every worker is done."""
        self._leave(self.DONE)

    def _call_rank_0(self, broadcast: Callable[[Tensor], None]) -> dict[int, Peer]:
        note = torch.zeros(self.NOTE_BYTES, dtype=torch.uint8)
        broadcast(note)
        host, port, token, pid = json.loads(bytes(note.tolist()).rstrip(b"\0"))
        connection = socket.create_connection((host, port), self._timeout)
        connection.sendall(self.HELLO.pack(bytes.fromhex(token), self._launch.rank, os.getpid()))
        connection.setblocking(False)
        return {0: Peer(connection, pid)}

    def _receive_calls(self, broadcast: Callable[[Tensor], None]) -> dict[int, Peer]:
        host, token = find_host(self._launch), secrets.token_bytes(16)
        peers: dict[int, Peer] = {}
        with socket.create_server(("127.0.0.1" if self._is_local() else "", 0), backlog=self._launch.size) as server:
            text = json.dumps([host, server.getsockname()[1], token.hex(), os.getpid()]).encode()
            broadcast(torch.tensor(list(text.ljust(self.NOTE_BYTES, b"\0")), dtype=torch.uint8))
            server.settimeout(self._timeout)
            while len(peers) < self._launch.size - 1:
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    missing = min(set(range(1, self._launch.size)) - set(peers))
                    end_process(f"error: rank {missing} has not arrived within {self._timeout:g} s; the job ends")
                connection.settimeout(self._timeout)
                hello = connection.recv(self.HELLO.size, socket.MSG_WAITALL)
                if hello.startswith(token) and len(hello) == self.HELLO.size:
                    _, rank, pid = self.HELLO.unpack(hello)
                    connection.setblocking(False)
                    peers[rank] = Peer(connection, pid)
        return peers

    def run(self) -> None:
        """Exchange news with the other workers at each beat, until this worker leaves."""
        while not self._leaving.wait(self.BEAT):
            self._beat(self.BEAT)
        self._beat(0.0)
        while self._state == self.DONE and self._launch.rank == 0 and not all(p.done for p in self._peers.values()):
            time.sleep(0.01)  # rank 0 leaves last, so that the others do not mistake its end for a death
            self._beat(0.01)

    def _beat(self, seconds: float) -> None:
        """Receive, judge and send the news of the last seconds."""
        if os.getppid() != self._parent:
            end_process("error: the launcher has died; the job ends")
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

    def _listen(self, rank: int, peer: Peer, seconds: float) -> tuple[int, int]:
        """Return the latest meetings and signs of life of a worker."""
        try:
            data = peer.connection.recv(1 << 16)
        except BlockingIOError:
            peer.quiet += seconds
            if peer.quiet > self._timeout:
                if self._is_local():  # a stopped process would not react to a launcher's SIGTERM
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
            has_moved = (meetings, signs) != self._news[rank]
            self._behind[rank] = 0.0 if has_moved or meetings == front else self._behind[rank] + seconds
            if self._behind[rank] > self._timeout:
                self._end_job(rank, f"hangs: the others have waited for it for {self._timeout:g} s")
        self._news.update(news)

    def _tell(self) -> None:
        message = self.MESSAGE.pack(self._state, self._culprit, self.meetings, self._signs)
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # the peer is dead or stopped, which `_listen` will notice
                peer.connection.send(message)

    def _end_job(self, rank: int, what: str) -> NoReturn:
        """End every worker because one of them has died or hangs. what: a clause that says so."""
        self._state, self._culprit = self.ENDING, rank
        self._tell()
        end_process(f"error: rank {rank} {what}; the job ends, the last checkpoint resumes it")

    def _end_with(self, rank: int) -> None:
        """End this worker because another one has ended, unless it is about to end by itself."""
        self._state, self._culprit = self.ENDING, rank
        self._tell()
        self._told.set()
        if not self._leaving.wait(self.GRACE):
            end_process(self._farewell() if self._launch.rank == 0 else "")  # an end of rank 0 has a line of its own

    def _farewell(self) -> str:
        fate = "failed, see above" if self._culprit == self._launch.rank else "ended before the others"
        return f"error: rank {self._culprit} has {fate}; the job ends"

    def _leave(self, state: int) -> None:
        self._state = state
        self._leaving.set()
        self.join(self._timeout)

    def _leave_early(self) -> None:
        """End the other workers if this process ends without `close`."""
        if self._state == self.DONE:
            return
        has_failed = getattr(sys, "last_value", None) is not None  # Python has printed an error that nobody caught
        if has_failed:
            self._told.wait(2.5 * self.BEAT)  # another worker's end, of which no news has come yet, may be the cause
        self._leave(self.ENDING)
        if has_failed:
            print(self._farewell(), file=sys.stderr)

    def _is_local(self) -> bool:
        return self._launch.local_size == self._launch.size


def end_process(message: str = "") -> NoReturn:
    """End this process at once, even if its main thread is stuck or nobody reads its output."""
    try:
        if message:
            print(message, file=sys.stderr)
        sys.stderr.flush()
        sys.stdout.flush()
    finally:
        os._exit(1)
