"""The command line: the published spellings take effect, mistakes are answered in one line."""

import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from absl import flags

import cli
import train
from cli import PATHS
from errors import UsageError
from presets import PRESETS

FLAGS = flags.FLAGS


@pytest.fixture(autouse=True)
def fresh_flags():
    saved = {name: (FLAGS[name].value, FLAGS[name].present) for name in FLAGS}
    yield
    for name, (value, present) in saved.items():
        FLAGS[name].value, FLAGS[name].present = value, present


def parse(*words):
    cli.parse(["train.py", *words], "")


def test_published_spellings(capsys):
    """Breaks when a word without dashes is dropped as the reference did, or a boolean's short forms are refused."""
    parse("step_lr=10.0", "-cclass", "--nospec_norm", "--zero_kl", "--cond_scale", "--use_attention=False")
    assert FLAGS.step_lr == 10.0 and FLAGS.cclass and not FLAGS.spec_norm and FLAGS.zero_kl and FLAGS.cond_size
    assert "step_lr=10.0 has no dashes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "device", "network", "tiles", "precision"),
    [
        (["--zero_kl"], "cpu", "MnistNet", True, "bf16"),
        (["--zero_kl"], "cpu", "MnistNet", False, "float32"),
        (["--zero_kl"], "cpu", "ResNet32", True, "float32"),
        (["--zero_kl"], "cuda", "ResNet32", False, "fp16"),
        (["--zero_kl", "--hmc"], "cuda", "ResNet32", False, "tf32"),
        ([], "cuda", "ResNet32", False, "tf32"),
        (["--precision=float32", "--zero_kl"], "cuda", "ResNet32", False, "float32"),
        (["--zero_kl", "--hmc"], "cpu", "MnistNet", True, "float32"),
        ([], "cpu", "MnistNet", True, "float32"),
        (["--precision=tf32", "--zero_kl"], "cpu", "MnistNet", True, "tf32"),
        (["--precision=fp16", "--zero_kl"], "cuda", "ResNet32", False, "fp16"),
        (["--precision=fp16"], "cuda", "ResNet32", False, "tf32"),
    ],
)
def test_rounded_energies_only_where_compared(monkeypatch, words, device, network, tiles, precision):
    """Breaks when a run rounds to bf16 by itself where that was not compared with float32, or is slower."""
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: tiles)
    parse(*words)
    assert train.precision_on(device, network) == precision


@pytest.mark.parametrize(
    ("words", "device", "expected"),
    [
        (["--zero_kl"], "cuda", (True, True, set())),
        (["--zero_kl"], "cpu", (False, False, set())),
        ([], "cuda", (False, False, set())),
        (["--zero_kl", "--hmc"], "cuda", (False, False, set())),
        (["--zero_kl", "--num_steps=0"], "cuda", (True, False, set())),
        (["--zero_kl", "--deterministic"], "cuda", (False, True, set())),
        (["--zero_kl", "--nocompile", "--nocuda_graph"], "cuda", (False, False, set())),
        (["--zero_kl", "--compile", "--precision=bf16"], "cpu", (True, False, {"compile", "precision"})),
        (["--zero_kl", "--cuda_graph"], "cuda", (True, True, {"cuda_graph"})),
        (["--compile"], "cuda", (False, False, {"compile"})),
    ],
)
def test_how_chains_run(monkeypatch, words, device, expected):
    """Breaks when a GPU runs slower than it could by default, or what was asked for is not known as such."""
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    parse(*words)
    chosen = train.choose_acceleration(device, "ResNet32")
    assert (chosen.compiled, chosen.captured, set(chosen.asked)) == expected


def test_without_a_compiler(monkeypatch, capsys):
    """Breaks when a GPU's default needs a C compiler where there is none, or --compile goes without."""
    monkeypatch.setattr("shutil.which", lambda name: None)
    parse("--zero_kl")
    assert not train.choose_acceleration("cuda", "ResNet32").compiled
    assert "no C compiler is on the PATH" in capsys.readouterr().out
    parse("--zero_kl", "--compile")
    with pytest.raises(UsageError, match="--compile needs a C compiler"):
        train.choose_acceleration("cuda", "ResNet32")


@pytest.mark.parametrize(
    ("flag", "words", "told"),
    [
        ("--replay_rate=0.5", ["--replay_batch"], 0),
        ("--replay_rate=0.5", [], 1),
        ("--compile", ["--zero_kl"], 0),
        ("--compile", [], 1),
        ("--compile", ["--zero_kl", "--hmc"], 1),
    ],
)
def test_a_flag_without_effect_says_so(capsys, flag, words, told):
    """Breaks when a flag that has no effect beside others is taken without a word, or complained about where it has."""
    parse(flag, *words)
    train.check_flags()
    assert capsys.readouterr().out.count(f"{flag.split('=')[0]} has no effect") == told


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--num_stps=3", "unknown flag --num_stps; did you mean --num_steps?"),
        ("stp_lr=3", "unexpected word 'stp_lr=3', did you mean --step_lr?"),
        ("digits", "unexpected word 'digits'"),
        ("--num_steps=-1", "--num_steps"),
        ("--batch_size=0", "--batch_size"),
        ("--step_lr=fast", "--step_lr"),
        ("--proj_norm_type=l3", "--proj_norm_type"),
        ("--dataset=cifer10", "--dataset"),
    ],
)
def test_mistakes(word, message):
    """Breaks when a mistake is swallowed, or its message does not name the flag."""
    with pytest.raises(UsageError) as error:
        parse(word)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_help():
    """Breaks when --help needs torch (it must be quick), fails, or leaves flags out."""
    command = [sys.executable, "-X", "importtime", "train.py", "--help"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0
    assert "torch" not in result.stderr
    for name in cli.values():
        assert f"--{name}" in result.stdout or f"--[no]{name}" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 120


def test_reader_that_leaves():
    """Breaks when `train.py --help | head -1` ends in a traceback."""
    command = f"{sys.executable} train.py --help | head -1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.stdout.endswith("\n141\n") or result.stdout.endswith("\n0\n")  # head may read it all first
    assert not result.stderr


def test_preset():
    """Breaks when a preset is not taken, or beats the flags given beside it."""
    cli.parse(["train.py", "--lr=0.5", "--preset=cifar10_cond", "--num_steps=7"], "", PRESETS)
    assert FLAGS.exp == "cifar10_cond" and FLAGS.step_lr == 10 and FLAGS.cclass
    assert (FLAGS.num_steps, FLAGS.lr) == (7, 0.5)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_flags(name):
    """Breaks when a row of the table holds a flag or a value that train.py does not take."""
    cli.parse(["train.py", f"--preset={name}"], "", PRESETS)
    train.check_flags()
    assert FLAGS.exp != "default"


def values_of(*words):
    for name in FLAGS:
        FLAGS[name].unparse()
    cli.parse(["train.py", *words], "", PRESETS)
    return {name: value for name, value in cli.values().items() if name not in ("preset", *PATHS.values())}


def test_presets_hold_the_published_commands():
    """Breaks when a published command of the README has no row in the table, or one with other settings."""
    readme = (pathlib.Path(train.__file__).parent / "README.md").read_text()
    commands = re.findall(r"^python train\.py (?!--preset)(.*)", readme, re.MULTILINE)
    rows = [values_of(f"--preset={name}") for name in PRESETS]
    assert len(commands) >= 5
    for command in commands:
        assert values_of(*shlex.split(re.sub("<.*?>", "PATH", command))) in rows, command


def test_rows_of_a_benchmark(tmp_path):
    """Breaks when rows or settings do not reach the file, or a place that cannot be written is a traceback."""
    path = cli.write_rows(str(tmp_path / "new" / "rows.json"), [{"ms": 1.5}], cores=2)
    written = json.loads(path.read_text())
    assert written["rows"] == [{"ms": 1.5}] and written["settings"]["cores"] == 2
    with pytest.raises(UsageError, match=r"--output=.*cannot be written"):
        cli.write_rows(str(path / "below_a_file.json"), [])
