"""Progress of long computations: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time


class Progress:
    """A progress bar with rate and time left on a terminal; elsewhere a plain line every `every` seconds.

    total: the number of items. start: how many of them are done already. what: the name of the work or of an item.
    quiet: print nothing.
    """

    def __init__(self, total: int, start: int = 0, *, what: str, every: float = 10.0, quiet: bool = False):
        self.total, self.what, self.every, self.quiet = total, what, every, quiet
        self.start = self.done = start
        self.start_time = self.print_time = time.monotonic()
        self.text = ""
        self.bar = None
        if sys.stderr.isatty() and not quiet:
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=start, desc=what, dynamic_ncols=True)

    def update(self, done: int) -> None:
        """Set the number of items that are done."""
        if self.bar is not None:
            self.bar.set_postfix_str(self.text, refresh=False)
            self.bar.update(done - self.done)
        self.done = done
        now = time.monotonic()
        if self.bar is None and not self.quiet and (now - self.print_time >= self.every or done == self.total):
            rate = (done - self.start) / max(now - self.start_time, 1e-9)
            left = (self.total - done) / max(rate, 1e-9)
            print(f"{self.what} {done}/{self.total} | {rate:.3g}/s | {left:.0f} s left | {self.text}", flush=True)
            self.print_time = now

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


def describe_duration(seconds: float) -> str:
    """Return a duration as people say it, with two digits: 0.12 s, 45 s, 14 min, 3.5 h, 12 days."""
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            value = seconds / size
            return f"{value:,.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
