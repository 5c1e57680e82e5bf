"""What Ctrl-C, SIGTERM and SIGHUP do outside training: the program ends with one line and the usual exit status.

    if __name__ == "__main__":
        interruption.guard_start()  # first of all, because importing PyTorch takes seconds
    ...
    interruption.raise_on_signals()  # when the work begins: it raises Interruption, so that files are closed on the way

A training run takes the signals over while it trains (`Run.catch_signals`), and saves first; an evaluation writes the
results so far (`Workers.keep_results`). Otherwise a signal that is ignored when the program starts stays ignored: that
is how nohup and a shell's background jobs protect a program.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interruption(KeyboardInterrupt):
    """The error by which a signal ends the work. number: of the signal."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Break(Interruption):
    """The error by which a signal breaks off an iteration of training, which is then undone."""


def guard_start() -> None:
    """Let signals end the process at once while it starts; end it now if its working directory has been deleted.

    There PyTorch cannot be imported, and would not say why.
    """
    end_on_signals()
    try:
        os.getcwd()
    except OSError as error:
        print(f"error: the working directory is gone ({error.strerror}); change to another one", file=sys.stderr)
        sys.exit(2)


def end_on_signals() -> None:
    """Let signals end the whole process at once, which is right as long as it has no files open."""
    set_handlers(end_interrupted)


def raise_on_signals() -> None:
    """Let a first signal raise Interruption in the main thread, and a second one end the process at once."""
    set_handlers(raise_interruption)
    sys.unraisablehook = end_if_lost


def set_handlers(handler: Callable[[int, FrameType | None], object]) -> None:
    """Set the handler of all signals that are not ignored."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def raise_interruption(number: int, frame: FrameType | None) -> NoReturn:
    """Handle a signal: raise Interruption; from now on signals end the process at once."""
    end_on_signals()
    raise Interruption(number)


def end_interrupted(number: int, frame: FrameType | None = None) -> NoReturn:
    """Handle a signal: say which one it was and end the process at once."""
    try:
        say_interrupted(number)
        sys.stdout.flush()
    finally:
        os._exit(128 + number)


@contextlib.contextmanager
def keep_what_is_done(done: Collection[Any]) -> Iterator[None]:
    """Let an Interruption end the block, a loop that fills a collection, unless the collection is still empty."""
    try:
        yield
    except Interruption:
        if not done:
            raise


def name_signal(number: int) -> str:
    """Return the name of a signal as people know it."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def say_interrupted(number: int) -> None:
    """Print the line that names the signal; on a terminal it goes below the progress bar."""
    print("\n" * sys.stderr.isatty() + f"stopped by {name_signal(number)}", file=sys.stderr, flush=True)


def say_at_once(message: str) -> None:
    """Write a line to stderr in the handler of a signal, which may have come in the middle of a print."""
    with contextlib.suppress(OSError):  # the terminal has gone
        os.write(sys.stderr.fileno(), ("\n" * sys.stderr.isatty() + message + "\n").encode())


def announce_end(number: int) -> None:
    """Print, from the handler of a signal, what follows now; the program may be just printing something else."""
    name = name_signal(number)
    say_at_once(f"{name}: what is done so far will be written; a second {name} ends at once")


def end_if_lost(unraisable: Any) -> None:
    """Handle an error that Python cannot raise, in a destructor for example: end the process if a signal caused it."""
    if isinstance(unraisable.exc_value, Break):
        return  # it is raised again at the end of what it should break off
    if isinstance(unraisable.exc_value, Interruption):
        end_interrupted(unraisable.exc_value.number)
    sys.__unraisablehook__(unraisable)
