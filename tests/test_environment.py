"""What surrounds a script: signals, streams, encodings, screens, folders that cannot be written, large seeds."""

import ast
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch

from conftest import CONFIG, ENVIRONMENT, ROOT, make_run, make_state, run_python
from ebm.readers.streaming import DecodeWorker
from ebm.settings import TrainSettings
from ebm.support import cli, hardware, pictures
from ebm.support.errors import UsageError
from ebm.support.reports import write_json
from ebm.tasks.expressions import MOST_TOKENS, parse_expression
from ebm.training import distributed, setup

# ---- signals ----

WORK = """
import sys, time
from ebm.support import interruption
{}
try:
    print("ready", flush=True)
    time.sleep(30)
except interruption.Interruption as error:
    interruption.say_interrupted(error.number)
    sys.exit(128 + error.number)
finally:
    print("files closed", flush=True)
"""
IN_A_DESTRUCTOR = """
class Slow:
    def __del__(self):
        print("ready", flush=True)
        time.sleep(30)
        print("went on", flush=True)

interruption.raise_on_signals()
Slow()
"""


def hear_all(ignored=()):
    """Return a function for a child process that lets it hear all signals but the ignored ones."""

    def prepare():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    return prepare


def interrupt(command, number, ready="ready", seconds=0.0, ignored=()):
    """Start a command, send it a signal when it has printed a word; return its status, output and error output."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT, "cwd": ROOT}
    process = subprocess.Popen([sys.executable, *command], preexec_fn=hear_all(ignored), **streams)
    while ready and ready not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    time.sleep(seconds)
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    return process.returncode, out, errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_with_one_line(number):
    """Breaks when a signal outside training is a traceback, has another status, or leaves no time to close files."""
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    for guard, closes in (("guard_start", ""), ("raise_on_signals", "files closed\n")):
        program = WORK.format(f"interruption.{guard}()")
        assert interrupt(["-c", program], number) == (128 + number, closes, f"stopped by {name}\n")


def test_signals_that_python_would_lose():
    """Breaks when a signal in a destructor, where Python drops errors, is a traceback and the work goes on."""
    found = interrupt(["-c", WORK.format(IN_A_DESTRUCTOR)], signal.SIGINT)
    assert found == (130, "", "stopped by Ctrl-C\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ignored_signals_stay_ignored(number):
    """Breaks when nohup, or a shell that starts a job in the background, no longer protects a script."""
    program = WORK.format("interruption.guard_start(); interruption.raise_on_signals()").replace("(30)", "(0.5)")
    assert interrupt(["-c", program], number, ignored=(number,)) == (0, "files closed\n", "")


@pytest.mark.parametrize(
    "script", ["train", "sample", "ebm_sandbox", "ebm_combine", "imagenet_demo", "eval_inception", "ais"]
)
def test_scripts_are_guarded_first(script):
    """Breaks when Ctrl-C during the seconds in which PyTorch is imported is a traceback again."""
    tree = ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8"))
    first = [node for node in tree.body if not isinstance(node, ast.Expr)][1:3]  # after `from __future__`
    assert [ast.unparse(node) for node in first] == [
        "from ebm.support import interruption",
        "if __name__ == '__main__':\n    interruption.guard_start()",
    ]


@pytest.mark.slow
def test_interrupted_scripts():
    """Breaks when Ctrl-C while a script imports PyTorch, or while it samples, is a traceback."""
    expected = (130, "stopped by Ctrl-C\n")
    status, _, errors = interrupt(["train.py", "--dataset=digits"], signal.SIGINT, ready="", seconds=0.8)
    assert (status, errors) == expected
    chain = ["--exp=fashion_cond", "--device=cpu", "--num=100", "--num_steps=5000"]
    status, _, errors = interrupt(["sample.py", *chain], signal.SIGINT, ready="model:", seconds=0.3)
    assert (status, errors) == expected


@pytest.mark.slow
def test_decode_workers_do_not_hear_ctrl_c():
    """Breaks when Ctrl-C prints a traceback of each process that decodes images beside the run's one line."""
    worker = DecodeWorker()
    worker.start()
    status = pathlib.Path(f"/proc/{worker.process.pid}/status").read_text(encoding="utf-8")
    server = pathlib.Path(f"/proc/{worker.process.pid}/stat").read_text(encoding="utf-8").split()[3]
    for text in (status, pathlib.Path(f"/proc/{server}/status").read_text(encoding="utf-8")):
        blocked = int(next(line for line in text.splitlines() if line.startswith("SigBlk")).split()[1], 16)
        assert blocked >> (signal.SIGINT - 1) & 1
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])  # but the run does
    worker.stop()


def test_working_directory_that_is_gone(tmp_path):
    """Breaks when a script in a deleted folder ends in a message about a library."""
    folder = tmp_path / "gone"
    folder.mkdir()
    command = f"cd {folder}; rmdir {folder}; {sys.executable} {ROOT}/train.py"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: the working directory is gone")


# ---- streams and encodings ----

PRINTS = """
import os, sys
from ebm.support.streams import note_dropped_output, replace_standard_streams
files = replace_standard_streams()
with open("taken", "w") as file:
    print("L\\u221e \\u2264 1", os.fsdecode(b"caf\\xe9"))
    print("an error", file=sys.stderr)
    assert not sys.stderr.isatty()
    note_dropped_output(files)
    assert file.fileno() > 2 and os.fstat(file.fileno()).st_size == 0
"""


@pytest.mark.parametrize(
    ("closed", "environment", "expected"),
    [
        ("", {"PYTHONIOENCODING": "utf-8"}, "L∞ ≤ 1 caf\\udce9"),
        ("", {"PYTHONIOENCODING": "latin-1"}, "L\\u221e \\u2264 1 caf\\udce9"),
        ("", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "L\\u221e \\u2264 1 caf\\udce9"),
        (">&-", {}, ""),
        (">&- 2>&- <&-", {}, ""),
        ("> /dev/full", {}, ""),
    ],
)
def test_any_text_goes_to_any_stream(tmp_path, closed, environment, expected):
    """Breaks when a character, a closed stream or a full disk behind one ends a script, or output goes into a file."""
    command = f"exec {sys.executable} -c '{PRINTS}' {closed}"
    settings = {"env": ENVIRONMENT | environment | {"PYTHONPATH": str(ROOT)}, "cwd": tmp_path, "check": False}
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, **settings)
    assert (result.returncode, result.stdout.strip()) == (0, expected), result.stderr
    assert (tmp_path / "taken").read_bytes() == b""


def test_files_are_in_utf_8():
    """Breaks when a text file is written or read in the encoding of the place where a script happens to run."""
    folders = [ROOT / name for name in ("ebm", "scripts", "benchmarks")]
    for path in [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = f".{node.func.attr}" if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            words = [word.value for word in node.args if isinstance(word, ast.Constant)]
            is_open = name in ("open", ".open") and words[-1:] in (["w"], ["a"], ["r"])
            is_text = is_open or name in (".read_text", ".write_text")
            is_written = is_text and "proc" not in ast.unparse(node)  # the kernel's files are in ASCII
            assert not is_written or any(word.arg == "encoding" for word in node.keywords), (path, node.lineno)


def test_names_that_are_no_utf_8(tmp_path):
    """Breaks when a folder's name that is no UTF-8 ends a report or a plot, or a $ in a name makes a formula."""
    name = os.fsdecode(b"caf\xe9")
    path = write_json(tmp_path / "report.json", {"images": name, "L∞": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"images": name, "L∞": 1}
    for text in (name, "$a^$ and $b^$", "_hidden"):
        pictures.plot_lines({"energy": {text: ([1, 2], [3, 4])}}, tmp_path / "lines.png", xlabel="x", title=text)
        pictures.plot_bars({text: {text: 1.0}}, tmp_path / "bars.png", ylabel="y")
        pictures.make_panel({text: torch.zeros(2, 1, 8, 8)})
    assert pictures.escape_text("_a$") == " _a\\$"


# ---- screens and folders ----


@pytest.mark.slow
def test_screens_of_the_environment(tmp_path):
    """Breaks when a notebook's backend, or a style of the user that needs LaTeX, ends a run at its first plot."""
    style = tmp_path / "matplotlibrc"
    style.write_text("text.usetex: True\nbackend: nonsense\n", encoding="utf-8")
    program = (
        "from ebm.support import pictures; import os; pictures.import_figure(); "
        "import matplotlib; print(matplotlib.rcParams['text.usetex'], os.environ['MPLBACKEND'])"
    )
    environment = ENVIRONMENT | {"MPLBACKEND": "module://notebook.backend", "PYTHONPATH": str(ROOT)}
    for folder, style_file in ((ROOT, style), (tmp_path, "")):  # matplotlib first reads that of the working directory
        result = run_python("-c", program, cwd=folder, env=environment | {"MATPLOTLIBRC": str(style_file)})
        assert result.stdout.split() == ["False", "module://notebook.backend"], result.stderr
    style.write_bytes(b"font.size: 9 # caf\xe9\n")
    result = run_python("-c", program, cwd=tmp_path, env=environment)
    assert "UsageError: matplotlib cannot read matplotlibrc" in result.stderr


def test_compiler_cache_that_cannot_be_written(monkeypatch, capsys, tmp_path):
    """Breaks when a run ends because PyTorch's compiler cannot keep its results, or nobody is told that it does not."""
    monkeypatch.setattr("atexit.register", lambda *arguments, **options: None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    hardware.provide_compiler_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "cache") and not capsys.readouterr().out
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    hardware.provide_compiler_cache()
    assert os.listdir(os.environ["TORCHINDUCTOR_CACHE_DIR"]) == []
    assert "note: compiled functions are not kept" in capsys.readouterr().out
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="set TMPDIR to another place"):
        hardware.provide_compiler_cache()


# ---- errors of the machine, extreme values ----


def test_errors_of_the_machine():
    """Breaks when a lack of memory or an unreadable file is a traceback, or a fault of the program a mistake."""
    shortages = [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 80 bytes"),
        RuntimeError("could not create a primitive"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("could not create a primitive descriptor for a convolution forward propagation primitive"),
    ]
    assert [cli.describe_error(error, TrainSettings) for error in shortages] == [
        "the memory does not hold what these settings ask for; lower `batch_size` or `num_filters` or `num_samples`"
    ] * 4 + [None]
    full = OSError(28, "No space left on device", "a.png")
    assert cli.describe_error(full, TrainSettings).startswith("no room for a.png")
    assert cli.describe_error(OSError(13, "Permission denied", "a.png"), TrainSettings) == "a.png: Permission denied"
    assert cli.describe_error(OSError("no number"), TrainSettings) is None


@pytest.mark.parametrize("seed", [1_795_676_524_123_456_789, 2**64 - 1])
def test_seeds_of_a_clock(tmp_path, seed):
    """Breaks when a large seed overflows where others are made from it, or a small one makes others than before."""
    workers = distributed.join_workers("none", "cpu")
    settings = TrainSettings(seed=seed, batch_size=2, precision="float32")
    dataset = make_run(make_state(), tmp_path / "data").dataset
    state = setup.build_state(settings, CONFIG, dataset, workers)
    assert state.generator.initial_seed() == seed * 1_000 % 2**64
    run = make_run(make_state(), tmp_path / "run", seed=seed)
    run.guard.remember(run.state)
    run.roll_back("a test")
    assert run.state.generator.initial_seed() == (seed * 1_000 + 1_000_000) % 2**64
    run.sampler.draw_chains(3)
    small = setup.build_state(TrainSettings(seed=3, batch_size=2, precision="float32"), CONFIG, dataset, workers)
    assert small.generator.initial_seed() == 3_000


@pytest.mark.parametrize("text", ["1e999*shape", "2e18*shape", "~" * MOST_TOKENS + "shape", "(" * 5_000])
def test_extreme_expressions(text):
    """Breaks when a weight that is infinite, or an expression that fills Python's stack, is accepted or a traceback."""
    with pytest.raises(UsageError, match="`combine`"):
        parse_expression(text)
