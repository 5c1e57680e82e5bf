"""Trackers of experiments: what they are told about a run, and that nothing they do harms it."""

import importlib.metadata
import json
import os
import sqlite3
import sys
import types

import pytest

import data
from conftest import ROOT, SMALL_RUN, load_state, make_run, make_state, run_commands, run_python
from ebm.support import trackers
from ebm.support.errors import UsageError
from ebm.support.logs import read_log
from ebm.support.trackers import TrackedRun, import_packages, start_trackers
from train import train

PROJECTS = {"wandb": "p", "trackio": "p"}


def is_installed(name):
    """Return whether the real package is installed."""
    return bool([*importlib.metadata.distributions(name=name)])


class Package(types.ModuleType):
    """A package of the form of wandb and Trackio, which remembers what it is told.

    failing: the calls that raise an error, such as "log", or "online", the start of a run that is not offline.
    """

    def __init__(self, name, *failing):
        super().__init__(name)
        self.failing, self.inits, self.logged, self.ended = failing, [], [], 0
        self.offline, self.url = "online" in failing, "https://host/run"
        self.Image = lambda path: f"picture {path}"

    def fail(self, name):
        if name in self.failing:
            raise ConnectionError(f"{name}: no\nnetwork")

    class Settings:
        init_timeout = login_timeout = console = silent = None  # as of a version without `finish_timeout`

        def __init__(self, **values):
            vars(self).update(values)

    def setup(self):
        return types.SimpleNamespace(settings=types.SimpleNamespace(mode=os.environ.get("WANDB_MODE", "online")))

    def login(self, timeout, verify):
        assert timeout == trackers.LOGIN_SECONDS and not verify
        self.fail("login")
        return "key" not in self.failing

    def init(self, **options):
        self.inits.append(options)
        self.fail("init")
        if options.get("mode") != "offline":
            self.fail("online")
        return self

    def define_metric(self, pattern, step_metric):
        self.metric = (pattern, step_metric)

    def log(self, values, step=None):
        self.fail("log")
        self.logged.append((values.pop("iteration", step), values))

    def teardown(self):
        self.inits.append("teardown")

    def finish(self):
        self.fail("finish")
        self.ended += 1
        print("the package's own words")


@pytest.fixture
def install(monkeypatch):
    """A function that puts packages in the place of wandb and Trackio, and returns them."""
    monkeypatch.setenv(trackers.TRACKIO_DIR, "")
    monkeypatch.delenv(trackers.TRACKIO_DIR)
    for name in ("WANDB_DIR", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)

    def put(**failing):
        packages = [Package(name, *failing.get(name, ())) for name in PROJECTS]
        for package in packages:
            monkeypatch.setitem(sys.modules, package.__name__, package)
        return packages

    return put


def train_tracked(folder, **settings):
    """Train for two iterations with both trackers; return the run."""
    chosen = {"wandb": "p", "trackio": "p", "tag": ("x", "y"), "max_iter": 2, "log_interval": 1, "test_interval": 1}
    state = make_state()
    state.batches = data.Batches(24, 8, seed=0)
    run = make_run(state, folder, **chosen | settings)
    import_packages(run.settings.projects, run.settings.folder)
    train(run)
    run.report()
    run.finish()
    return run


def test_trackers_get_the_log(tmp_path, install, capsys):
    """Breaks when a tracker lacks a figure, a picture, a setting or a tag, or has its files elsewhere."""
    wandb, trackio = install()
    run = train_tracked(tmp_path / "run")
    lines = [entry for entry in read_log(tmp_path / "run") if len(entry) > 1 and "energy_histogram" not in entry]
    expected = [(line.pop("iteration"), line) for line in lines]
    for package in (wandb, trackio):
        figures = [pair for pair in package.logged if not any(isinstance(value, str) for value in pair[1].values())]
        shown = [(iteration, *values) for iteration, values in package.logged if (iteration, values) not in figures]
        assert figures == expected and [iteration for iteration, _ in figures] == [1, 1, 2, 2]
        names = ("train_gen", "val_gen")
        assert shown == [(k, name) for k in (1, 2) for name in names] + [(2, "samples")]
        assert (2, {"val_gen": f"picture {tmp_path}/run/pictures/val_gen_2.png"}) in package.logged
        (options,) = package.inits
        assert (options["project"], options["name"]) == ("p", "run") and options["config"]["lr"] == run.settings.lr
        assert package.ended == 1
    assert wandb.inits[0]["dir"] == str(tmp_path / "run") and wandb.inits[0]["tags"] == ("x", "y")
    assert wandb.metric == ("*", "iteration") and trackio.inits[0]["resume"] == "never"
    assert os.environ[trackers.TRACKIO_DIR] == str(tmp_path / "run" / "trackio")
    printed = capsys.readouterr().out
    assert "wandb: https://host/run" in printed and f"TRACKIO_DIR={tmp_path}/run/trackio trackio show" in printed


def test_own_folders_of_the_packages_are_kept(tmp_path, install, monkeypatch, capsys):
    """Breaks when the variables by which the packages' users choose one folder for all runs are overridden."""
    monkeypatch.setenv(trackers.TRACKIO_DIR, "all runs")
    monkeypatch.setenv("WANDB_DIR", "elsewhere")
    wandb, _ = install()
    import_packages(PROJECTS, tmp_path)
    start_trackers(PROJECTS, TrackedRun("a", tmp_path, {}), print)
    assert wandb.inits[0]["dir"] == "elsewhere" and os.environ[trackers.TRACKIO_DIR] == "all runs"
    assert "TRACKIO_DIR='all runs'" in capsys.readouterr().out


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_a_failing_tracker_ends_alone(tmp_path, install, call, capsys):
    """Breaks when an error of a tracker ends the run, is told twice or not at all, or takes the other tracker along."""
    wandb, trackio = install(trackio=[call])
    train_tracked(tmp_path / "run", max_iter=4)
    printed = capsys.readouterr().out
    assert printed.count("note: trackio") == printed.count(f"({call}: no network)") == 1
    assert (tmp_path / "run" / "model_4.pt").exists() and (tmp_path / "run" / "curves.png").exists()
    assert wandb.ended == 1 and {iteration for iteration, _ in wandb.logged} == {1, 2, 3, 4}
    assert bool(trackio.logged) == (call == "finish") and not trackio.ended
    assert printed.count("own words") == 1  # those of wandb, which is told to be silent by its settings


def test_trackers_change_nothing(tmp_path, install):
    """Breaks when a run with trackers is another one than without: its log or its weights."""
    install(trackio=["log"])
    train_tracked(tmp_path / "with")
    train_tracked(tmp_path / "without", wandb="", trackio="")
    one, other = (load_state(tmp_path / name / "model_2.pt")["model"] for name in ("with", "without"))
    assert all((one[name] == other[name]).all() for name in one)
    assert read_log(tmp_path / "with") == read_log(tmp_path / "without")
    assert not (tmp_path / "without" / trackers.IDS_NAME).exists()


def test_without_a_network_wandb_keeps_files(tmp_path, install, capsys):
    """Breaks when a server that cannot be reached costs the record, or `wandb` waits for it without a limit."""
    wandb, _ = install(wandb=["online"])
    (tracker,) = start_trackers({"wandb": "p"}, TrackedRun("a", tmp_path, {}), print)
    first, middle, second = wandb.inits
    assert middle == "teardown" and second == first | {"mode": "offline"}
    assert first["settings"].init_timeout == trackers.START_SECONDS
    assert not hasattr(first["settings"], "finish_timeout")  # this version would refuse it
    assert "wandb stays offline (online: no network)" in capsys.readouterr().out
    tracker.log_figures(3, {"e_pos": 1.0})
    assert wandb.logged == [(3, {"e_pos": 1.0})]


@pytest.mark.parametrize("problem", ["login", "key"])
def test_without_a_key_wandb_keeps_files(tmp_path, install, monkeypatch, capsys, problem):
    """Breaks when `wandb` asks for a key without a limit of time, or asks for one although it is to stay offline."""
    wandb, _ = install(wandb=[problem])
    assert start_trackers({"wandb": "p"}, TrackedRun("a", tmp_path, {}), print)
    assert wandb.inits[0] == "teardown" and wandb.inits[1]["mode"] == "offline"
    assert "wandb stays offline" in capsys.readouterr().out
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert start_trackers({"wandb": "p"}, TrackedRun("a", tmp_path, {}), print)
    assert len(wandb.inits) == 3 and "stays offline" not in capsys.readouterr().out


def test_a_resumed_run_is_the_same_to_its_trackers(tmp_path, install):
    """Breaks when a resumed run is a new one to a tracker, or one of another name or project goes on with the old."""
    wandb, trackio = install()
    import_packages(PROJECTS, tmp_path)
    for name, project in (("a", "p"), ("a", "p"), ("a", "q"), ("copy", "q")):
        start_trackers(dict.fromkeys(PROJECTS, project), TrackedRun(name, tmp_path, {}), lambda message: None)
    ids = [options["id"] for options in wandb.inits]
    assert ids[0] == ids[1] and len(set(ids)) == 3
    assert [options["resume"] for options in wandb.inits] == [None, "allow", None, None]
    assert [options["resume"] for options in trackio.inits] == ["never", "allow", "never", "never"]


@pytest.mark.parametrize(
    "contents", ["", "[]", '{"exp": "a", "wandb": 3}', '{"exp": "a", "wandb": {"id": []}}', "[" * 9999]
)
def test_damaged_ids(tmp_path, install, contents):
    """Breaks when a damaged file of a stranger's run ends the work, or names an id that is none."""
    (tmp_path / trackers.IDS_NAME).write_text(contents)
    wandb, _ = install()
    assert start_trackers({"wandb": "p"}, TrackedRun("a", tmp_path, {}), print)
    assert wandb.inits[0]["resume"] is None
    assert json.loads((tmp_path / trackers.IDS_NAME).read_text())["wandb"]["id"] == wandb.inits[0]["id"]


def test_missing_packages(tmp_path, monkeypatch):
    """Breaks when a missing or broken package is noticed only after the work has begun, or is not called by name."""
    words = [*SMALL_RUN, "--max_iter=1", f"--logdir={tmp_path}", "--exp=a"]
    commands = {name: [*words, f"--{name}=p"] for name in PROJECTS} | {"slash": [*words, "--wandb=team/p"]}
    said = run_commands("train", commands, "sys.modules |= {'wandb': None, 'trackio': None}")
    for name in PROJECTS:
        assert said[name][1] == (
            f"--{name}: the package {name} is not installed: pip install {name}, or leave --{name} empty"
        )
    assert said["slash"][1].startswith("--wandb='team/p' is no word")
    assert not (tmp_path / "a").exists()
    (tmp_path / "trackio").mkdir()  # a folder of files that this package left, no package
    (tmp_path / "wandb.py").write_text("import nothing_of_this_name")
    monkeypatch.syspath_prepend(tmp_path)
    for name in PROJECTS:
        monkeypatch.setitem(sys.modules, name, None)  # what takes its place now leaves with it
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UsageError, match="wandb is not installed, because it needs nothing_of_this_name"):
        import_packages(["wandb"], tmp_path)
    if not is_installed("trackio"):  # a real package comes before a mere folder
        with pytest.raises(UsageError, match="the package trackio is not installed: pip"):
            import_packages(["trackio"], tmp_path)


def test_exported_networks_have_no_trackers(tmp_path):
    """Breaks when a model that is passed on sends the log of another's run to the project of the first."""
    words = [*SMALL_RUN, "--max_iter=1", f"--logdir={tmp_path}", "--exp=a", "--tag=x"]
    assert run_python(ROOT / "train.py", *words, cwd=tmp_path).returncode == 0
    result = run_python(ROOT / "scripts/export.py", tmp_path / "a/model_1.pt", tmp_path / "alone.pt")
    assert result.returncode == 0, result.stderr
    kept, dropped = load_state(tmp_path / "alone.pt")["flags"], {"tag", "wandb", "trackio"}
    assert not dropped & set(kept) and dropped <= set(load_state(tmp_path / "a/model_1.pt")["flags"])


@pytest.mark.parametrize("name", PROJECTS)
def test_real_packages(tmp_path, name):
    """Breaks when a version of a package no longer takes what it is given, or its files lie elsewhere."""
    if not is_installed(name):
        pytest.skip(f"{name} is not installed")
    words = [*SMALL_RUN, "--max_iter=2", "--log_interval=1", "--test_interval=1", "--exp=study/a", f"--{name}=p"]
    environment = {**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    environment.pop(trackers.TRACKIO_DIR, None)
    for more in ([], ["--resume_iter=latest", "--max_iter=3"]):
        result = run_python(ROOT / "train.py", *words, *more, cwd=tmp_path, env=environment)
        assert result.returncode == 0 and "note: wandb" not in result.stdout and "note: trackio" not in result.stdout
        assert f"{name}: " in result.stdout and "* " not in result.stdout
    folder = tmp_path / "cachedir/study/a"
    assert {path.name for path in tmp_path.iterdir()} == {"cachedir"}
    if name == "wandb":
        ids = {path.name.split("-")[-1] for path in folder.glob("wandb/offline-run-*/")}
        assert len(ids) == 1 and len([*folder.glob("wandb/offline-run-*/files/media/images/*.png")]) == 8
        return
    with sqlite3.connect(folder / "trackio/p.db") as database:
        rows = database.execute("select run_id, step, metrics from metrics").fetchall()
    found = {(step, key): value for _, step, text in rows for key, value in json.loads(text).items()}
    assert len({run for run, _, _ in rows}) == 1 and {step for step, _ in found} == {1, 2, 3}
    logged = {
        (entry["iteration"], key): entry[key] for entry in read_log(folder) for key in entry if key in ("e_diff", "lr")
    }
    assert logged and all(found[place] == value for place, value in logged.items())
    assert found[3, "val_gen"]["_type"] == "trackio.image"
