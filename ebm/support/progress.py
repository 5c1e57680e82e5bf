"""Progress of long computations: a bar with speed and time left on a terminal, plain lines elsewhere.

with Progress(len(parts), what="part", patience=SHORT) as progress:    # speaks also while a single part takes long
    for part in parts:
        ...
        progress.advance()
with show_waiting("fitting the mixture"):                              # work that cannot be counted
    ...
"""

from __future__ import annotations

import collections
import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

RECENT = 60.0  # seconds over which the speed is measured
FIRST = 2.0  # seconds after which the first line is due, so that the time left is known early
SHORT = 3.0  # seconds: work that is usually shorter says nothing unless it takes longer
SPACING = 0.5  # seconds between two times that are remembered
EVERY = 10.0  # seconds between two lines
LONGEST = 60.0  # the same while a single item takes long: each such line comes after twice as long a time as the last


def describe_time(seconds: float) -> str:
    """Return a time as people say it, such as "40 s", "12 min", "3 h 20 min" or "2 d 5 h"."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 99:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24:,} d {hours % 24} h"


def describe_energies(of_data: float, of_samples: float) -> str:
    """Return mean energies in words, for the text of a training's progress."""
    return f"energy of data {of_data:+.4f}, of samples {of_samples:+.4f}"


class Progress:
    """A progress bar with speed and time left on a terminal; elsewhere a plain line every `every` seconds.

    As a context manager it also speaks while a single item takes long, see `keep_talking`, and closes at the end.
    total: the number of items. start: how many of them are done already. what: the name of the work or of an item.
    quiet: print nothing. patience: seconds before which nothing is shown, so that shorter work passes in silence.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        what: str,
        every: float = EVERY,
        quiet: bool = False,
        patience: float = 0.0,
    ):
        self.total, self.what, self.every, self.quiet, self.patience = total, what, every, quiet, patience
        self.done = start
        self.start_time = self.last_change = self.last_print = time.monotonic()
        self.next_print = self.start_time + max(FIRST, patience)
        self.pause = every  # seconds of silence until the next reminder
        self.recent = collections.deque([(self.start_time, start)])  # (time, items done then)
        self.text = ""
        self.bar = None
        self.talk = contextlib.ExitStack()
        if sys.stderr.isatty() and not quiet:
            from tqdm import tqdm

            layout = "{desc} {n_fmt}/{total_fmt} |{bar}|{postfix}"
            # A bar that is not the first on the screen, as of a test during training, goes away at its end.
            self.bar = tqdm(
                total=total,
                initial=start,
                desc=what,
                bar_format=layout,
                dynamic_ncols=True,
                delay=patience,
                leave=None if patience else True,
            )

    def __enter__(self) -> Progress:
        self.talk.enter_context(self.keep_talking())
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.talk.close()
        self.close()

    def update(self, done: int) -> None:
        """Set the number of items that are done."""
        now, new = time.monotonic(), done - self.done
        self.done = done
        if self.bar is not None:
            self.bar.set_postfix_str(self.describe_speed(now), refresh=False)
            self.bar.update(new)
        elif not self.quiet and (now >= self.next_print or (done == self.total and self.is_shown(now))):
            self.print_state(self.describe_speed(now), now)
        if new:
            self.last_change, self.pause = now, self.every
        if now - self.recent[-1][0] >= SPACING:
            self.recent.append((now, done))
            while len(self.recent) > 2 and self.recent[1][0] <= now - RECENT:
                self.recent.popleft()

    def is_shown(self, now: float) -> bool:
        """Return whether the work has taken longer than `patience`, so that it is worth a line."""
        return now - self.start_time >= self.patience

    def print_state(self, words: str, now: float) -> None:
        """Print a line: how many items are done, and these words."""
        print_line(f"{self.what} {self.done}/{self.total} | {words}")
        self.last_print, self.next_print = now, now + self.every

    @contextlib.contextmanager
    def keep_talking(self) -> Iterator[None]:
        """Report from time to time, inside the block, that an item still goes on which takes long."""
        self.last_change = time.monotonic()
        with contextlib.nullcontext() if self.quiet else call_meanwhile(self.remind):
            yield

    def remind(self) -> float:
        """Say for how long an item has been going on, if it is time; return the seconds until that may be so next."""
        now = time.monotonic()
        due = max(self.last_print, self.last_change) + self.pause
        if now < due or self.done >= self.total:
            return max(due - now, 0.1)
        waited = describe_time(now - self.last_change)
        words = f"{self.describe_speed(now)} | {waited} for the next" if self.done else f"{waited} so far"
        self.pause = min(2 * self.pause, LONGEST)
        if self.bar is None:
            self.print_state(words, now)
        else:
            self.bar.set_postfix_str(words)
            self.last_print = now
        return self.pause

    def describe_speed(self, now: float) -> str:
        """Return the recent speed, the time left at this speed or, at the end, the time taken, and `text`."""
        since, before = self.recent[0]
        rate = (self.done - before) / max(now - since, 1e-9)
        parts = [f"{rate:.3g}/s" if rate >= 1 else f"{describe_time(1 / rate)} each"] if rate > 0 else []
        if self.done >= self.total:
            parts = [f"took {describe_time(now - self.start_time)}"]
        elif rate > 0:
            parts.append(f"{describe_time((self.total - self.done) / rate)} left")
        return " | ".join(parts + [self.text] * bool(self.text))

    def advance(self, count: int = 1) -> None:
        """Add to the number of items that are done."""
        self.update(self.done + count)

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        if self.bar is not None:
            self.bar.write(message)
        elif not self.quiet:
            print_line(message)

    def close(self) -> None:
        """End the bar; later output goes below it."""
        if self.bar is not None:
            self.bar.close()


@contextlib.contextmanager
def show_waiting(what: str, usual: str = "", *, quiet: bool = False) -> Iterator[None]:
    """Report on work inside the block that cannot be counted: once it takes long, what it is, later for how long.

    what: the work, such as "reading model_5.pt". usual: how long it usually takes, such as "about a minute". quiet:
    print nothing.
    """
    start, said = time.monotonic(), list[str]()

    def speak() -> float:
        waited = time.monotonic() - start
        if waited < SHORT:
            return SHORT - waited
        said.append(f"{describe_time(waited)} so far" if said else usual)
        print_line(" | ".join(filter(None, [what, said[-1]])))
        return min(max(waited, EVERY - SHORT), LONGEST)

    with contextlib.nullcontext() if quiet else call_meanwhile(speak):
        yield
    if said:
        print_line(f"{what} | took {describe_time(time.monotonic() - start)}")


@contextlib.contextmanager
def call_meanwhile(report: Callable[[], float]) -> Iterator[None]:
    """Call a function in a thread again and again, inside the block; it returns the seconds until its next call."""
    is_over = threading.Event()

    def talk() -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads the output any more
            while not is_over.wait(report()):
                pass

    thread = threading.Thread(target=talk, name="progress", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the system gives no more threads: the work goes on in silence
        yield
        return
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def print_line(message: str) -> None:
    """Print a line, in one piece, above the bars if there are any."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.write(message)
    else:
        sys.stdout.write(f"{message}\n")
    sys.stdout.flush()
