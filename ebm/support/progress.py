"""Progress of long computations: a bar with speed and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import collections
import sys
import time

RECENT = 60.0  # seconds over which the speed is measured
FIRST = 2.0  # seconds after which the first line is due, so that the time left is known early
SPACING = 0.5  # seconds between two times that are remembered


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

    total: the number of items. start: how many of them are done already. what: the name of the work or of an item.
    quiet: print nothing.
    """

    def __init__(self, total: int, start: int = 0, *, what: str, every: float = 10.0, quiet: bool = False):
        self.total, self.what, self.every, self.quiet = total, what, every, quiet
        self.done = start
        self.start_time = time.monotonic()
        self.next_print = self.start_time + FIRST
        self.recent = collections.deque([(self.start_time, start)])  # (time, items done then)
        self.text = ""
        self.bar = None
        if sys.stderr.isatty() and not quiet:
            from tqdm import tqdm

            layout = "{desc} {n_fmt}/{total_fmt} |{bar}|{postfix}"
            self.bar = tqdm(total=total, initial=start, desc=what, bar_format=layout, dynamic_ncols=True)

    def update(self, done: int) -> None:
        """Set the number of items that are done."""
        now, new = time.monotonic(), done - self.done
        self.done = done
        if self.bar is not None:
            self.bar.set_postfix_str(self.describe_speed(now), refresh=False)
            self.bar.update(new)
        elif not self.quiet and (now >= self.next_print or done == self.total):
            print(f"{self.what} {done}/{self.total} | {self.describe_speed(now)}", flush=True)
            self.next_print = now + self.every
        if now - self.recent[-1][0] >= SPACING:
            self.recent.append((now, done))
            while len(self.recent) > 2 and self.recent[1][0] <= now - RECENT:
                self.recent.popleft()

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
            print(message, flush=True)

    def close(self) -> None:
        """End the bar; later output goes below it."""
        if self.bar is not None:
            self.bar.close()
