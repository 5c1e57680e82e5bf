"""Trackers of experiments, which get a copy of a run's log: Weights & Biases (wandb) and Trackio.

    import_packages(["trackio"], folder)                                # before the work: are they installed?
    trackers = start_trackers({"trackio": "digits"}, TrackedRun("first", folder, settings), say=print)
    for tracker in trackers:
        tracker.log_figures(10, {"e_pos": 0.3})

Neither package is required. Whatever a tracker does, the run goes on: the first failure is told in a line and ends it.
Its files are in the folder of the run, unless the package's own environment variable names another place.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import pathlib
import secrets
import shlex
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from ebm.readers.bounded import describe_failure, read_json
from ebm.support.errors import UsageError
from ebm.support.reports import write_json

IDS_NAME = "trackers.json"  # in the folder of a run: under which names its trackers know it
MAX_IDS = 1 << 16  # bytes of this file
TRACKIO_DIR = "TRACKIO_DIR"  # the environment variable of the folder where Trackio keeps its database
START_SECONDS = 20  # that wandb may take to reach its server before it goes on without
LOGIN_SECONDS = 60  # that wandb waits for a key to be typed, on a terminal
FINISH_SECONDS = 60  # that wandb may take at the end of a run to send what it has


class TrackedRun(NamedTuple):
    """What a tracker is told about a run. known_id: under which it knows the run already; "" for a new run."""

    name: str
    folder: pathlib.Path
    settings: Mapping[str, Any]
    tags: tuple[str, ...] = ()
    known_id: str = ""


class Session(Protocol):
    """The connection to the server or database of one package. `id`: under which it knows the run."""

    id: str

    def log(self, iteration: int, values: dict[str, Any]) -> None:
        """Keep values by name: numbers, or pictures made by `make_picture`."""

    def make_picture(self, path: pathlib.Path) -> Any:
        """Return the picture in a PNG file as the package takes it."""

    def finish(self) -> None:
        """Send everything, and close the connection."""


class WandbSession:
    """A run of wandb, online if a server can be reached, else in files that `wandb sync` uploads later."""

    def __init__(self, package: Any, project: str, run: TrackedRun, say: Callable[[str], None]):
        self.package, self.id = package, run.known_id or secrets.token_hex(8)
        folder = pathlib.Path(os.environ.get("WANDB_DIR") or run.folder)
        options: dict[str, Any] = {"project": project, "name": run.name, "id": self.id, "dir": str(folder)}
        options |= {"config": dict(run.settings), "tags": run.tags, "resume": "allow" if run.known_id else None}
        wanted = {"console": "off", "silent": True}  # what a run prints is its own
        wanted |= {"init_timeout": START_SECONDS, "finish_timeout": FINISH_SECONDS}
        known = package.Settings()  # versions differ in what they have
        options["settings"] = package.Settings(**{name: wanted[name] for name in wanted if hasattr(known, name)})
        try:
            # Without a key, `init` would wait for an answer on a terminal without a limit.
            is_online = package.setup().settings.mode in ("online", "shared")
            if is_online and not package.login(timeout=LOGIN_SECONDS, verify=False):
                raise TimeoutError("no key was given")
            self.run = package.init(**options)
        except Exception as error:
            reason = describe_failure(error)
            say(f"note: wandb stays offline ({reason}); wandb sync uploads what is in {folder / 'wandb'}")
            package.teardown()  # else the id counts as in use
            self.run = package.init(mode="offline", **options)
        else:
            say(f"wandb: {folder / 'wandb' if self.run.offline else self.run.url or 'switched off'}")
        # Its own count of steps can only grow, but a run may go back to an earlier iteration.
        self.run.define_metric("*", step_metric="iteration")

    def log(self, iteration: int, values: dict[str, Any]) -> None:
        self.run.log({"iteration": iteration, **values})

    def make_picture(self, path: pathlib.Path) -> Any:
        return self.package.Image(str(path))

    def finish(self) -> None:
        self.run.finish()  # its setting `finish_timeout` limits how long


class TrackioSession:
    """A run of Trackio, in a database on this machine unless its environment variables name a server."""

    def __init__(self, package: Any, project: str, run: TrackedRun, say: Callable[[str], None]):
        self.package, self.id = package, run.known_id or run.name
        resume = "allow" if run.known_id else "never"
        with contextlib.redirect_stdout(io.StringIO()):  # it names a command that would look into another folder
            self.run = package.init(project=project, name=self.id, config=dict(run.settings), resume=resume)
        say(f"trackio: TRACKIO_DIR={shlex.quote(os.environ[TRACKIO_DIR])} trackio show")

    def log(self, iteration: int, values: dict[str, Any]) -> None:
        self.run.log(values, step=iteration)

    def make_picture(self, path: pathlib.Path) -> Any:
        return self.package.Image(str(path))

    def finish(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.package.finish()  # waits for half a minute at most


SESSIONS: dict[str, Callable[[Any, str, TrackedRun, Callable[[str], None]], Session]] = {
    "wandb": WandbSession,
    "trackio": TrackioSession,
}


class Tracker:
    """A session that cannot do a run any harm: its first failure is told in a line and ends it."""

    def __init__(self, package: str, session: Session, say: Callable[[str], None]):
        self.package, self.say = package, say
        self.session: Session | None = session

    def attempt(self, act: Callable[[Session], object]) -> None:
        """Do something with the session, unless that has failed before."""
        if self.session is None:
            return
        try:
            act(self.session)
        except Exception as error:
            self.session = None
            self.say(f"note: {self.package} has failed ({describe_failure(error)}); training goes on without it")

    def log_figures(self, iteration: int, values: Mapping[str, float]) -> None:
        """Log numbers by name."""
        self.attempt(lambda session: session.log(iteration, dict(values)))

    def log_picture(self, iteration: int, name: str, path: pathlib.Path) -> None:
        """Log a PNG file."""
        self.attempt(lambda session: session.log(iteration, {name: session.make_picture(path)}))

    def finish(self) -> None:
        """Send what is left; nothing is logged afterwards."""
        self.attempt(lambda session: session.finish())
        self.session = None


def import_packages(names: Collection[str], folder: pathlib.Path) -> dict[str, ModuleType]:
    """Import the packages of trackers and return them by name; set the environment variable of Trackio's folder.

    folder: that of the run, in which Trackio's is, unless the variable is set; Trackio reads it once in a process, when
    it is imported. Raises UsageError, which says how to install it, if a package is missing or does not work.
    """
    if "trackio" in names:
        os.environ.setdefault(TRACKIO_DIR, str(folder / "trackio"))
    return {name: import_package(name) for name in names}


def import_package(name: str) -> ModuleType:
    """Import the package of a tracker, see `import_packages`."""
    advice = f"pip install {name}, or leave `{name}` empty"
    try:
        package = importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = "" if error.name == name else f", because it needs {error.name}"
        raise UsageError(f"`{name}`: the package {name} is not installed{missing}: {advice}") from None
    except Exception as error:  # of packages that do not fit together
        raise UsageError(f"`{name}`: the package {name} does not work ({describe_failure(error)}): {advice}") from None
    if not hasattr(package, "init"):  # a folder of this name, which Python takes for a package
        raise UsageError(f"`{name}`: the package {name} is not installed: {advice}")
    return package


def start_trackers(projects: Mapping[str, str], run: TrackedRun, say: Callable[[str], None]) -> list[Tracker]:
    """Return the trackers of a run, whose packages have been imported; one that cannot be started is left out.

    projects: package -> project. A tracker that knows the run from an earlier call goes on with it. say: prints a line.
    """
    trackers, ids = list[Tracker](), read_ids(run)
    for name, project in projects.items():
        known = ids.get(name, {})
        known_id = known.get("id", "") if known.get("project") == project else ""
        try:
            session = SESSIONS[name](importlib.import_module(name), project, run._replace(known_id=known_id), say)
        except Exception as error:
            say(f"note: {name} cannot be used ({describe_failure(error)}); training goes on without it")
            continue
        ids[name] = {"project": project, "id": session.id}
        trackers.append(Tracker(name, session, say))
    if trackers:
        try:
            write_json(run.folder / IDS_NAME, {"exp": run.name, **ids})
        except OSError as error:
            say(f"note: {error}; resumed, this run will be another one to its trackers")
    return trackers


def read_ids(run: TrackedRun) -> dict[str, dict[str, str]]:
    """Return what a run's folder says about its trackers: package -> its project and the run's id there.

    That of a run with another name, from which this folder was copied, says nothing.
    """
    try:
        found = read_json(run.folder / IDS_NAME, MAX_IDS)
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict) or found.get("exp") != run.name:
        return {}
    entries = {name: entry for name, entry in found.items() if name in SESSIONS and isinstance(entry, dict)}
    return {name: entry for name, entry in entries.items() if all(isinstance(text, str) for text in entry.values())}
