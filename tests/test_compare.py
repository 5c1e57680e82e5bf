"""scripts/compare.py: which runs are compared, what their tables say, and what its pictures show."""

import dataclasses
import json
import os
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

import compare
from conftest import ROOT, run_commands, run_python
from ebm.settings import TrainSettings
from ebm.support import cli, logs, pictures
from ebm.support.errors import UsageError
from ebm.support.logs import RunLog, RunTimes, measure_times
from ebm.tasks import comparison
from ebm.tasks.comparison import find_runs, gather_curves, list_differences, read_run, summarise_run
from ebm.training.ownership import FolderLock

SCRIPT = ROOT / "scripts/compare.py"


def write_run(folder, entries=(), config=None, **settings):
    """Write the files of a run with these settings, and entries of its log; return its folder."""
    folder.mkdir(parents=True)
    flags = cli.to_dict(dataclasses.replace(TrainSettings(exp=folder.name, max_iter=20), **settings))
    (folder / "config.json").write_text(json.dumps({"flags": flags, "last_iteration": 20, **(config or {})}))
    if entries:
        (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


def read_runs(*folders):
    return [read_run(folder.name, folder) for folder in folders]


def call(*words):
    """Run the script in this process."""
    compare.main(cli.parse(["compare.py", *map(str, words)], compare.Settings))


# ---- which runs ----


def test_words_are_folders_or_experiments(tmp_path, monkeypatch):
    """Breaks when a folder, an experiment, one with an equals sign or one given twice is not found under its name."""
    monkeypatch.chdir(tmp_path)
    for name in ("cachedir/a", "cachedir/study/lr=3", "elsewhere/b"):
        write_run(tmp_path / name)
    words = ["a", "cachedir/study/lr=3", "elsewhere/b", "cachedir/a/", str(tmp_path / "cachedir/a")]
    assert [*find_runs([str(tmp_path / "cachedir/a")], pathlib.Path("cachedir"), ())] == ["a"]
    settings = cli.parse(["compare.py", *words], compare.Settings)
    found = find_runs(settings.runs, pathlib.Path(settings.logdir), ())
    assert {name: str(folder) for name, folder in found.items()} == {
        "a": "cachedir/a",
        "study/lr=3": "cachedir/study/lr=3",
        "elsewhere/b": "elsewhere/b",
    }


def test_runs_are_found_by_tags(tmp_path, capsys):
    """Breaks when a tagged run in a folder of a study is missed, one of two tags is enough, or a damaged run stops."""
    write_run(tmp_path / "a", tag=("x",))
    inner = write_run(tmp_path / "study/first", tag=("x", "y"))
    write_run(inner / "abandoned_1", tag=("x", "y"))  # a part of the run around it
    write_run(tmp_path / "b")
    write_run(tmp_path / "broken", tag=("x",)).joinpath("config.json").write_text("{")
    assert [*find_runs((), tmp_path, ("x",))] == ["a", "study/first"]
    assert "broken/config.json is damaged" in capsys.readouterr().out
    assert [*find_runs((), tmp_path, ("y", "x"))] == ["study/first"]
    assert [*find_runs(("b",), tmp_path, ("y",))] == ["b", "study/first"]
    with pytest.raises(UsageError, match=r"no run in .* has it; its runs have x, y"):
        find_runs((), tmp_path, ("z",))


def test_links_in_a_circle(tmp_path):
    """Breaks when links to folders above are followed without end, or give a run a second name."""
    write_run(tmp_path / "study/a", tag=("x",))
    for name in ("again", "back", "circle"):
        (tmp_path / name).symlink_to(tmp_path)
    assert [*find_runs((), tmp_path, ("x",))] == ["study/a"]


@pytest.mark.parametrize(
    ("words", "contents", "message"),
    [
        (["nothing"], "{}", "there is no run nothing; .* has a"),
        ([], "{}", "give the runs to compare, .*`tag`; .* has a"),
        (["."], "{}", "is no training run, it has no config.json"),
        (["a"], "{", "a/config.json is damaged"),
        (["a"], "[]", "a/config.json is damaged.*no settings"),
        (["a"], '{"flags": {"lr": {}}}', "a/config.json is damaged.*no settings"),
        (["a"], "[" * 100_000, "a/config.json is damaged"),
        (["a"], " " * 2_000_000, "a/config.json is damaged.*bytes"),
    ],
)
def test_what_is_no_run(tmp_path, monkeypatch, words, contents, message):
    """Breaks when a folder without a run, or with damaged settings, is compared, or does not say what it lacks."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "cachedir/a").joinpath("config.json").write_text(contents)
    with pytest.raises(UsageError, match=message) as caught:
        call(*words)
    assert "\n" not in str(caught.value) and not (tmp_path / "sandbox_cachedir").exists()


def test_a_mistake_is_one_line(tmp_path):
    """Breaks when a wrong name or tag ends in a traceback, or with the exit status of success."""
    for words in (["nothing"], ["--tag=a b"]):
        result = run_python(SCRIPT, *words, cwd=tmp_path)
        assert result.returncode == 2 and result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")


# ---- tables ----


def test_only_settings_that_differ_are_listed(tmp_path):
    """Breaks when an equal setting is listed, a differing one is not, or one that an older version lacked differs."""
    one = write_run(tmp_path / "one", lr=1e-4, threads=1, config={"workers": 1, "torch": "2.6"})
    two = write_run(tmp_path / "two", lr=3e-5, zero_kl=True, config={"workers": 2, "torch": "2.7"})
    older = json.loads((two / "config.json").read_text())
    del older["flags"]["num_steps"], older["flags"]["tag"]
    (two / "config.json").write_text(json.dumps(older))
    assert list_differences(read_runs(one, two)) == {
        "lr": {"one": "0.0001", "two": "3e-05"},
        "zero_kl": {"one": "False", "two": "True"},
        "workers": {"one": "1", "two": "2"},
    }
    assert list_differences(read_runs(one)) == {}


def test_places_are_listed_if_nothing_else_differs(tmp_path):
    """Breaks when runs that differ in their threads and names alone seem to be the same."""
    runs = read_runs(write_run(tmp_path / "one", threads=1), write_run(tmp_path / "two"))
    assert list_differences(runs) == {"exp": {"one": "one", "two": "two"}, "threads": {"one": "1", "two": "–"}}


def test_figures_of_a_run(tmp_path):
    """Breaks when the last gap, or the best value of a measure and its iteration, is another one."""
    entries = [
        {"iteration": 0, "feature_distance": 9.0, "inception_score": 1.0},
        {"iteration": 10, "e_diff": 0.5, "feature_distance": 2.0, "inception_score": 3.0, "test_accuracy": 0.7},
        {"iteration": 10, "note": "no figures"},
        {"iteration": 15, "e_diff": -0.25, "feature_distance": 4.0, "inception_score": 2.0, "fid": float("nan")},
        {"iteration": 16, "e_diff": float("nan"), "patch_distance": "many"},
    ]
    about = summarise_run(read_run("a", write_run(tmp_path / "a", entries, tag=("x",))))
    assert about["e_diff"] == -0.25 and about["test_accuracy"] == 0.7 and about["tag"] == ["x"]
    assert about["best"] == {
        "feature_distance": {"value": 2.0, "iteration": 10},
        "inception_score": {"value": 3.0, "iteration": 10},
    }
    (row,) = comparison.describe_summaries({"a": about}).values()
    assert row == {
        "state": "stopped",
        "iteration": "16 of 20",
        "e_diff": "-0.25",
        "inception_score": "3 at 10",
        "feature_distance": "2 at 10",
        "test_accuracy": "0.7",
        "tag": "x",
    }


def test_states_of_runs(tmp_path):
    """Breaks when a run is called finished before its end, stopped while it runs, or has no row without a log."""
    fresh, ended = write_run(tmp_path / "fresh"), write_run(tmp_path / "ended", [{"iteration": 20}])
    saved = write_run(tmp_path / "saved", [{"iteration": 5}])
    (saved / "model_7.pt").touch()
    old = write_run(tmp_path / "old", [{"iteration": 9}], config={"last_iteration": None}, max_iter=None)
    lock = FolderLock(write_run(tmp_path / "busy"))  # of this process, so that it is asked in another one
    program = (
        f"from ebm.tasks.comparison import *; print(find_state(read_run('', pathlib.Path({str(lock.path.parent)!r}))))"
    )
    assert run_python("-c", program, cwd=ROOT).stdout == "running\n"
    lock.release()
    found = {run.name: (comparison.find_state(run), run.iteration) for run in read_runs(fresh, ended, saved, old)}
    assert found == {"fresh": ("stopped", 0), "ended": ("finished", 20), "saved": ("stopped", 7), "old": ("stopped", 9)}
    (old / "samples_9.png").touch()  # its report, as the end of older runs is known by it alone
    assert comparison.find_state(read_run("old", old)) == "finished"


def test_times_of_a_run(tmp_path, monkeypatch):
    """Breaks when the pause before a resumption counts, or a test in between as the time of an iteration."""
    clock = [1000.0]
    monkeypatch.setattr(logs.time, "time", lambda: clock[0])
    assert measure_times(tmp_path) == RunTimes(None, None)
    for start in (0, 40):
        log = RunLog(tmp_path, start)
        for iteration in (10, 20, 30):
            clock[0] += 5  # half a second for each iteration
            log.write_scalars(start + iteration, {"e_pos": 0.0})
            clock[0] += 100 * (iteration == 20)
            log.write_scalars(start + iteration, {"long_chain_e": 0.0})
        clock[0] += 3600
    assert measure_times(tmp_path) == RunTimes(230.0, 0.5)
    path = next((tmp_path / "tensorboard").iterdir())
    path.write_bytes(path.read_bytes()[:-7])  # as of a run that is just writing
    assert measure_times(tmp_path) == RunTimes(230.0, 0.5)
    path.write_bytes((2**64 - 1).to_bytes(8, "little") + bytes(4) + b"\x09" + bytes(100))  # of a length that none has
    assert measure_times(tmp_path) == RunTimes(115.0, 0.5)
    log = RunLog(tmp_path / "new")
    clock[0] += 60
    log.write_scalars(10, {"e_pos": 0.0})
    assert measure_times(tmp_path / "new").per_iteration is None  # what came before this entry was no iteration alone


def test_wide_tables_are_cut(monkeypatch):
    """Breaks when a table is wider than the terminal although its columns can stand below each other, or loses one."""
    monkeypatch.setattr(compare.shutil, "get_terminal_size", lambda fallback: os.terminal_size((80, 24)))
    table = {name: {f"setting {k}": f"{name}{k}" for k in range(12)} for name in ("one", "two")}
    lines = compare.format_wide_table(table).split("\n")
    assert max(map(len, lines)) <= 80 and len(lines) == 6
    assert all(f" {name}{k}" in "\n".join(lines) for name in table for k in range(12))
    assert compare.transpose_table({"lr": {"one": "1", "two": "2"}}) == {"one": {"lr": "1"}, "two": {"lr": "2"}}


# ---- pictures ----


def test_panels_of_what_some_run_has(tmp_path):
    """Breaks when a figure of one run alone gets no panel, one of no run gets an empty one, or an axis is another."""
    one = write_run(tmp_path / "one", [{"iteration": k, "e_diff": k / 10, "x_grad": 1e-3} for k in (1, 2, 3)])
    two = write_run(tmp_path / "two", [{"iteration": 4, "test_accuracy": 0.5, "e_diff": 1e300}])
    panels = gather_curves(read_runs(one, two))
    assert [*panels.curves] == ["energy gap", "mean energy gradient\nwhere chains end", "accuracy\nof test images"]
    assert panels.curves["energy gap"] == {"one": ([1, 2, 3], [0.1, 0.2, 0.3]), "two": ([], [])}
    assert panels.log == ["mean energy gradient\nwhere chains end"] and panels.shares == ["accuracy\nof test images"]


def test_a_run_has_one_look_in_all_panels(tmp_path, monkeypatch):
    """Breaks when a run that lacks a figure leaves its colour to another one, or the legend lacks a run."""
    from matplotlib.figure import Figure

    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: seen.append(figure))
    both, second = {"a": ([1, 2], [1, 2]), "b": ([1, 2], [2, 3])}, {"a": ([], []), "b": ([3], [4])}
    pictures.plot_lines({"x": both, "y": second, "z": both}, tmp_path / "lines.png", xlabel="iteration", columns=2)
    (figure,) = seen
    assert len(figure.axes) == 3 and all(axis.get_legend() is None for axis in figure.axes)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    looks = {tuple((line.get_color(), line.get_linestyle()) for line in axis.lines) for axis in figure.axes}
    assert len(looks) == 1
    assert [axis.get_xlabel() for axis in figure.axes] == ["", "iteration", "iteration"]


def test_newest_samples_are_shown(tmp_path, capsys):
    """Breaks when older samples are shown, those of tests in place of the last ones, or a damaged file stops it."""
    one, two, three = (write_run(tmp_path / name) for name in ("one", "two", "three"))
    for path in ("samples_9.png", "samples_100.png", "pictures/val_gen_200.png"):
        (one / path).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4)).save(one / path)
    (two / "pictures").mkdir()
    Image.new("RGB", (4, 4)).save(two / "pictures/val_gen_30.png")
    (three / "samples_1.png").write_bytes(b"no picture")
    assert [*comparison.read_samples(read_runs(one, two, three))] == ["one: iteration 100", "two: iteration 30"]
    assert "three/samples_1.png is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_gallery(tmp_path, count):
    """Breaks when a picture is left out, stands in another order, or is cut instead of made smaller."""
    shades = [10 * k for k in range(count)]
    gallery = {f"run {k}": Image.new("RGB", (3000 if k % 2 else 30, 30 if k % 2 else 3000), (shade,) * 3)
               for k, shade in enumerate(shades)}  # fmt: skip
    pixels = np.asarray(Image.open(pictures.save_gallery(gallery, tmp_path / "g.png")))
    columns = pictures.choose_columns(count)
    room = pictures.SIDE // columns
    assert max(pixels.shape) <= pictures.SIDE + columns * (pictures.LINE + pictures.BLOCK_GAP)
    for k, shade in enumerate(shades):
        row, column = divmod(k, columns)  # each row has a tall picture
        top = row * (pictures.LINE + room + pictures.BLOCK_GAP) + pictures.LINE
        assert (pixels[top, column * (room + pictures.BLOCK_GAP)] == shade).all()


# ---- the script ----


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A working directory with three runs: a long one with samples, a short one, and one that has just begun."""
    monkeypatch.chdir(tmp_path)
    entries = [{"iteration": k, "e_pos": 0.1, "e_neg": 0.2, "e_diff": -0.1} for k in range(10, 600, 10)]
    one = write_run(tmp_path / "cachedir/one", entries, {"last_iteration": 590}, tag=("x",))
    Image.new("L", (40, 40)).save(one / "samples_600.png")
    write_run(tmp_path / "cachedir/two", entries[:3], {"last_iteration": 590}, lr=0.5, tag=("x",))
    write_run(tmp_path / "cachedir/three", lr=0.25, batch_size=7)
    return tmp_path


def test_comparison(runs, capsys):
    """Breaks when tables, pictures or the report of a call lack a run, or an earlier call's are overwritten."""
    call("one", "two", "three")
    printed = capsys.readouterr().out
    tables = [re.sub(" +", " ", line) for line in printed.splitlines()]
    assert tables[1:5] == [" batch_size lr", "one 256 0.0003", "two 256 0.5", "three 7 0.25"]
    assert tables[7:10] == [
        "one finished 590 of 590 -0.1 x",
        "two stopped 30 of 590 -0.1 x",
        "three stopped 0 of 20 – –",
    ]
    folder, names = runs / "sandbox_cachedir/compare", [compare.CURVES_NAME, compare.SAMPLES_NAME, compare.REPORT_NAME]
    assert re.findall(r"^wrote (.*)", printed, re.MULTILINE) == [f"sandbox_cachedir/compare/{name}" for name in names]
    report = json.loads((folder / compare.REPORT_NAME).read_text())
    assert report["differences"] == ["batch_size", "lr"] and [*report["runs"]] == ["one", "two", "three"]
    assert report["runs"]["three"]["settings"]["lr"] == 0.25 and report["files"] == names
    assert all((folder / name).exists() for name in names)
    before = (folder / compare.REPORT_NAME).read_bytes()
    call("--tag=x")
    assert (folder.with_name("compare.1") / compare.REPORT_NAME).read_bytes() == before
    assert [*json.loads((folder / compare.REPORT_NAME).read_text())["runs"]] == ["one", "two"]


def test_one_run_and_many(runs, capsys):
    """Breaks when a run alone, one without anything to show, or more runs than a picture can show end the work."""
    call("three", "--output=alone")
    assert "no run has logged anything yet" in capsys.readouterr().out
    assert {path.name for path in (runs / "alone").iterdir()} == {compare.REPORT_NAME}
    for k in range(22):
        write_run(runs / f"cachedir/many/{k:02}", [{"iteration": 10, "e_diff": k / 10}], seed=k, tag=("many",))
    call("--tag=many", "--output=many")
    printed = capsys.readouterr().out
    assert "the first 20 of 22 runs" in printed and re.search(r"many/21 +21\n", printed)
    assert len(json.loads((runs / "many" / compare.REPORT_NAME).read_text())["runs"]) == 22


def test_a_folder_with_other_files_is_left_alone(runs):
    """Breaks when --output sets aside a folder of other things, such as the working directory."""
    for output in (".", "cachedir/one"):
        with pytest.raises(UsageError, match=r"`output`=.* holds other files than a comparison"):
            call("one", f"--output={output}")
    assert (runs / "cachedir/one/config.json").exists()


def test_a_run_keeps_its_tags(tmp_path):
    """Breaks when tags are not kept by config.json or a resumed run, cannot be replaced, or are not printed."""
    words = ["--dataset=digits", "--zero_kl", "--num_steps=1", "--num_filters=4", "--batch_size=8", "--num_samples=1"]
    words += ["--notune", "--sample_steps=1", f"--logdir={tmp_path}", "--exp=a", "--resume_iter=auto"]
    commands = {
        "new": ["--tag=x,y", "--max_iter=1"],
        "kept": ["--max_iter=2"],
        "other": ["--max_iter=3", "--tag=z"],
        "none": ["--max_iter=4", "--tag="],
        "bad": ["--tag=a/b"],
    }
    printed = run_commands("train", {name: [*words, *more] for name, more in commands.items()})
    settings = {name: re.search(r"^settings: (.*)", text, re.MULTILINE) for name, (text, _) in printed.items()}
    assert "--tag=x,y " in settings["new"][1] and "--tag=x,y " in settings["kept"][1]
    assert "--tag=z " in settings["other"][1] and "tag: x,y → z" in printed["other"][0]
    assert "--tag" not in settings["none"][1] and "tag: z → unset" in printed["none"][0]
    assert printed["bad"][1].startswith("--tag='a/b' is no word")
    run = read_run("a", tmp_path / "a")
    assert run.tags == () and run.last_iteration == run.iteration == 4
