"""The command line: the published spellings take effect, mistakes are answered in one line."""

import dataclasses
import importlib
import json
import pathlib
import re
import shlex
import subprocess
import sys
import types
import typing

import numpy as np
import pytest
import torch

from conftest import GOLDEN, ROOT, run_python
from data import DATASETS
from ebm.presets import PRESETS
from ebm.settings import SandboxSettings, TrainSettings
from ebm.support import cli
from ebm.support.errors import UsageError
from ebm.tasks.trained_models import TrainedModel
from ebm.training.setup import UNUSED, check_settings, choose_acceleration, choose_network, choose_precision
from models import ModelConfig, build_model


def parse(*words):
    return cli.parse(["train.py", *words], TrainSettings)


def test_published_spellings(capsys):
    """Breaks when a word without dashes is dropped as the reference did, or a boolean's short forms are refused."""
    words = ["step_lr=10.0", "-cclass", "--nospec_norm", "--zero_kl", "--cond_scale", "--use_attention=False"]
    settings = parse(*words)
    assert settings.step_lr == 10.0 and settings.cclass and not settings.spec_norm
    assert settings.zero_kl and settings.cond_size and not settings.use_attention
    assert "step_lr=10.0 has no dashes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("--exp b --lr 0.5 --num_steps 3", {"exp": "b", "lr": 0.5, "num_steps": 3}),
        ("--ml_coeff -1", {"ml_coeff": -1}),
        ("--ml_coeff -.5e1", {"ml_coeff": -5}),
        ("--cclass True --exp=b", {"cclass": True, "exp": "b"}),
        (
            "--cclass=yes --zero_kl on --train no --guard=0",
            {"cclass": True, "zero_kl": True, "train": False, "guard": 0},
        ),
        ("-cclass --notrain -exp b", {"cclass": True, "train": False, "exp": "b"}),
        ("--compile False", {"compile": False}),
        ("--cond_scale --", {"cond_size": True}),
        ("--seed=3 -- --exp=b", {"seed": 3, "exp": "b"}),
        ("lr=2 --exp b", {"lr": 2, "exp": "b"}),
    ],
)
def test_forms_of_flags(words, values):
    """Breaks when a form in which people write flags is refused, read as another value or dropped without a word."""
    settings = cli.to_dict(parse(*words.split()))
    expected = cli.to_dict(TrainSettings()) | values
    assert settings == expected


def test_a_word_that_stands_alone():
    """Breaks when a word without a name is taken for the value of another flag, or sets a flag that needs its name."""

    @dataclasses.dataclass(frozen=True)
    class Settings:
        """Rows"""

        row: str | None = cli.flag(None, "the row", takes_word=True)
        folder: str = cli.flag("data", "a folder")
        quick: bool = cli.flag(False, "be quick")

    for words in (["a", "--quick"], ["--quick", "a"], ["--folder", "b", "a"], ["--row=a"]):
        assert cli.parse(["script", *words], Settings).row == "a"
    assert cli.parse(["script", "--folder", "b"], Settings) == Settings(folder="b")
    with pytest.raises(UsageError, match="unexpected word"):
        parse("a")


def test_the_word_auto():
    """Breaks when --num_steps=auto is refused, does not come last or first as it was given, or is written otherwise;
    when other flags or other words take it; when rounds of steps do not have the length of training's samples."""

    def read(*words):
        return cli.parse(["ebm_sandbox.py", *words], SandboxSettings)

    settings = read("--num_steps=auto")
    assert settings.num_steps == cli.AUTO and cli.write_flags(settings) == "--num_steps=auto"
    assert read("--num_steps=3", "--num_steps=auto").num_steps == cli.AUTO
    assert read("--num_steps=auto", "--num_steps=3").num_steps == 3
    for words in ("--num_steps=-1", "--num_steps=often", "--batch_size=auto"):
        with pytest.raises(UsageError, match=words[2:9]):
            read(words)
    model = TrainedModel(
        build_model(ModelConfig("MnistNet", (1, 8, 8), 2)), pathlib.Path("m"), {"sample_steps": 40, "num_steps": 20}, ()
    )
    lengths = [model.choose_num_steps(cli.AUTO, rounds) for rounds in (1, 5, 20, 100)]
    assert lengths == [40, 8, 2, 1] and model.choose_num_steps(7, 5) == 7
    assert model._replace(flags={"num_steps": 6}).choose_num_steps(cli.AUTO) == 60
    assert model._replace(flags={"sample_steps": 0, "num_steps": None}).sample_steps == 0
    assert model._replace(flags={"sample_steps": None, "num_steps": None}).sample_steps == 200


def test_flag_files(tmp_path):
    """Breaks when a --flagfile, which every program with absl takes, is ignored or ends in a traceback."""
    path = tmp_path / "flags"
    path.write_text("--exp=b\n# a comment\n--lr=2\n", encoding="utf-8")
    settings = parse(f"--flagfile={path}", "--seed=3")
    assert (settings.exp, settings.lr, settings.seed) == ("b", 2, 3)
    path.write_bytes(b"--exp=\xff\n")
    for bad in (path, tmp_path, tmp_path / "none"):
        with pytest.raises(UsageError, match="--flagfile"):
            parse(f"--flagfile={bad}")


@pytest.mark.parametrize(
    ("words", "note"),
    [
        ("--lr=1 --lr=2", "note: --lr=1 has no effect: --lr=2 comes after it"),
        ("--cclass --exp=a --nocclass", "note: --cclass=true has no effect: --cclass=false comes after it"),
        ("--cond_scale --cond_size=no", "note: --cond_size=true has no effect: --cond_size=false comes after it"),
        ("--lr=1 --lr=1", ""),
    ],
)
def test_flags_given_twice(capsys, words, note):
    """Breaks when the first of two values of a flag is dropped without a word, or the second one."""
    settings = parse(*words.split())
    assert capsys.readouterr().out.strip() == note
    assert settings.lr in (2, 1 if "--lr=1 --lr=1" in words else 2, TrainSettings.lr) and not settings.cond_size


@pytest.mark.parametrize(
    ("words", "device", "precision"),
    [
        (["--zero_kl"], "cpu", "float32"),
        (["--zero_kl"], "cuda", "fp16"),
        (["--zero_kl", "--hmc"], "cuda", "tf32"),
        ([], "cuda", "tf32"),
        (["--precision=float32", "--zero_kl"], "cuda", "float32"),
        (["--precision=tf32", "--zero_kl"], "cpu", "tf32"),
        (["--precision=fp16", "--zero_kl"], "cuda", "fp16"),
        (["--precision=fp16"], "cuda", "tf32"),
    ],
)
def test_usual_precisions(words, device, precision):
    """Breaks when a run rounds more than its kind of device and chains allow, or otherwise than it was asked to."""
    assert choose_precision(parse(*words), device) == precision


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
    chosen = choose_acceleration(parse(*words), device)
    assert (chosen.compiled, chosen.captured, set(chosen.asked)) == expected


def test_without_a_compiler(monkeypatch, capsys):
    """Breaks when a GPU's default needs a C compiler where there is none, or --compile goes without."""
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not choose_acceleration(parse("--zero_kl"), "cuda").compiled
    assert "no C compiler is on the PATH" in capsys.readouterr().out
    with pytest.raises(UsageError, match="`compile` needs a C compiler"):
        choose_acceleration(parse("--zero_kl", "--compile"), "cuda")


@pytest.mark.parametrize(
    ("flag", "words", "told"),
    [
        ("--replay_rate=0.5", ["--replay_batch"], 0),
        ("--replay_rate=0.5", [], 1),
        ("--compile", ["--zero_kl"], 0),
        ("--compile", [], 1),
        ("--compile", ["--zero_kl", "--hmc"], 1),
        ("--cutout_prob=0.5", ["--cutout"], 0),
        ("--cutout_prob=0.5", [], 1),
        ("--image_size=32", ["--dataset=folder", "--data_path=x"], 0),
        ("--image_size=32", ["--dataset=cifar10"], 1),
        ("--imagenet_path=x", ["--dataset=cifar10"], 1),
        ("--datadir=x", ["--dataset=svhn"], 0),
        ("--datadir=x", ["--dataset=digits"], 1),
        ("--epoch_num=3", [], 0),
        ("--epoch_num=3", ["--preset=digits_cpu"], 1),
        ("--step_lr=3", ["--hmc", "--zero_kl"], 1),
        ("--lr=3", ["--train=False", "--resume_iter=1"], 1),
        ("--max_rollbacks=3", ["--noguard"], 1),
        ("--spec_iter=3", ["--nospec_norm"], 1),
    ],
)
def test_a_flag_without_effect_says_so(capsys, flag, words, told):
    """Breaks when a flag that has no effect beside others is taken without a word, or complained about where it has."""
    settings = parse(flag, *words)
    cli.note_flags_without_effect(settings, settings.given_names)
    name = flag.split("=")[0].removeprefix("--")
    assert capsys.readouterr().out.count(f"{name} has no effect") == told


def test_effects_that_depend_on_others(monkeypatch, capsys):
    """Breaks when a flag's need of a flag that has no effect itself, a task's flag or an unknown value is misjudged."""
    sandbox = settings_of(monkeypatch, "ebm_sandbox.py")

    def notes(words):
        cli.parse(["ebm_sandbox.py", *words.split()], sandbox)
        return capsys.readouterr().out.strip()

    assert notes("--pgd=3 --lnorm=2 --l2val=3 --refine=3 --antialias") == ""  # the model's data set is not known yet
    assert notes("--lival=3 --lnorm=2 --pgd=3") == "note: --lival has no effect without --lnorm=-1"
    needs = "has no effect without --task=label|labelfinetune"
    assert notes("--task=latent --pgd=3 --lnorm=2").splitlines() == [f"note: --pgd {needs}", f"note: --lnorm {needs}"]
    assert notes("--attack=autoattack --lnorm=2 --l2val=3 --adaptive=2 --attack_steps=3 --attack_queries=3") == ""
    given = "--attack=autoattack --pgd=3 --labelgrid --l2_per_step --lnorm=2"
    unused = ("--pgd", "--l2_per_step", "--labelgrid")
    expected = [f"note: {flag} has no effect with --attack=autoattack" for flag in unused]
    assert notes(given).splitlines() == expected
    assert notes("--attack_steps=3") == "note: --attack_steps has no effect without --attack=autoattack"
    assert notes("--task=mixenergy --svhnmix") == ""
    assert notes("--task=mixenergy --num_steps=3") == "note: --num_steps has no effect with --task=mixenergy"
    assert notes("--imagenet_path=x --dataset=svhn --mixset=imagenet --task=mixenergy") == ""


@pytest.mark.parametrize("name", UNUSED)
@pytest.mark.parametrize(("shape", "words"), [((1, 28, 28), []), ((3, 32, 32), []), ((3, 32, 32), ["--wider_model"])])
def test_switches_that_a_network_lacks(capsys, name, shape, words):
    """Breaks when a switch of the network that changes nothing is taken without a word, or blamed where it does."""
    dataset = types.SimpleNamespace(name="images", image_shape=shape, label_size=0)
    config = choose_network(parse(f"--{name}", "--num_filters=4", *words), dataset)
    plain = dataclasses.replace(config, **{name: False})
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    energies = [build_model(each, torch.Generator().manual_seed(0)).eval()(x, None) for each in (config, plain)]
    assert (f"{name} has no effect" in capsys.readouterr().out) == torch.equal(*energies)


TRUE_LABELS = {
    "augment": {"fashion_mnist", "cifar10", "cifar100", "celeba", "imagenet", "imagenetfull", "textures", "folder"},
    "cutout": {"cifar10", "cifar100", "celeba", "imagenet", "imagenetfull", "textures", "folder", "svhn"},
}


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("name", TRUE_LABELS)
def test_labels_stay_true(name, dataset):
    """Breaks when images are changed under labels that no longer fit, or an augmentation is refused that harms none."""
    words = [f"--{name}", f"--dataset={dataset}", "--data_path=images"]
    check_settings(parse(*words))
    if dataset in TRUE_LABELS[name]:
        check_settings(parse(*words, "--cclass"))
    else:
        with pytest.raises(UsageError, match=f"`{name}` makes labels of `dataset`={dataset} false"):
            check_settings(parse(*words, "--cclass"))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--num_stps=3", "unknown flag --num_stps; did you mean --num_steps?"),
        ("stp_lr=3", "unexpected word 'stp_lr=3', did you mean --step_lr?"),
        ("digits", "unexpected word 'digits'"),
        ("--num_steps=-1", "--num_steps"),
        ("--batch_size=0", "--batch_size"),
        ("--step_lr=fast", "--step_lr=fast: give a number"),
        ("--lr=1,5", "--lr=1,5: give a number"),
        ("--num_steps=1e3", "--num_steps=1e3: give a whole number"),
        ("--num-steps=3", "did you mean --num_steps?"),
        ("--EXP=b", "did you mean --exp?"),
        ("--flagfile=", "--flagfile is empty"),
        ("--proj_norm_type=l3", "--proj_norm_type"),
        ("--dataset=cifer10", "--dataset"),
        ("--exp", "--exp has no value"),
        ("--cclass=maybe", "--cclass=maybe: give True or False"),
        ("--nocclass=1", "write --cclass=False"),
        ("--undefok=x", "unknown flag --undefok"),
        ("–lr=3", "did you mean --lr?"),  # with the dash of a text processor
        ("---lr=3", "did you mean --lr?"),
        ("--exp=a\r", "carriage return"),
        ("-", "unexpected word '-'"),
        ("--exp=", "--exp is empty"),
        ("--logdir= ", "--logdir is empty"),
        ("--data_path=", "--data_path is empty"),
        ("--seed=", "--seed"),
        (f"--seed={2**64}", "--seed"),
        ("--save_interval=0", "--save_interval"),
        ("--logdir=~nobody9/x", "no home folder is known for ~nobody9"),
        ("--logdir=$HOME/x", "quotes kept the shell"),
    ],
)
def test_mistakes(word, message):
    """Breaks when a mistake is swallowed, or its message does not name the flag."""
    with pytest.raises(UsageError) as error:
        parse(word)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_values_that_are_missing():
    """Breaks when a flag is taken for the value of the flag before it."""
    for words in (["--exp", "--cclass"], ["--exp", "-cclass"], ["--exp", "--"]):
        with pytest.raises(UsageError, match="--exp has no value"):
            parse(*words)


def test_help():
    """Breaks when --help fails, or leaves flags out."""
    result = run_python("train.py", "--help", cwd=ROOT)
    assert result.returncode == 0
    for name in cli.to_dict(TrainSettings()):
        assert f"--{name}" in result.stdout or f"--[no]{name}" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 120


@pytest.mark.parametrize("rank", [0, 1])
def test_notes_of_many_workers(monkeypatch, capsys, rank):
    """Breaks when each of a hundred workers prints the same notes about flags, or none of them does."""
    monkeypatch.setattr("ebm.support.interruption.raise_on_signals", lambda: None)
    monkeypatch.setattr("sys.argv", ["train.py", "--lr=1", "--lr=2"])
    for name, value in (("RANK", rank), ("SIZE", 2), ("LOCAL_RANK", rank), ("LOCAL_SIZE", 2)):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", str(value))
    cli.run(lambda settings: print(f"trains with {settings.lr}"), TrainSettings, "")
    notes = ["note: --lr=1 has no effect: --lr=2 comes after it"] if rank == 0 else []
    assert capsys.readouterr().out.splitlines() == [*notes, "trains with 2.0"]


def test_reader_that_leaves():
    """Breaks when `train.py --help | head -1` ends in a traceback."""
    command = f"{sys.executable} train.py --help | head -1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.stdout.endswith("\n141\n") or result.stdout.endswith("\n0\n")  # head may read it all first
    assert not result.stderr


def test_preset():
    """Breaks when a preset is not taken, or beats the flags given beside it."""
    settings = parse("--lr=0.5", "--preset=cifar10_cond", "--num_steps=7")
    assert settings.exp == "cifar10_cond" and settings.step_lr == 10 and settings.cclass
    assert (settings.num_steps, settings.lr) == (7, 0.5)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_flags(name):
    """Breaks when a row of the table holds a flag or a value that train.py does not take."""
    settings = parse(f"--preset={name}")
    check_settings(settings)
    assert settings.exp != "default"


def values_of(*words):
    paths = {source.path_setting for source in DATASETS.values()}
    return {name: value for name, value in cli.to_dict(parse(*words)).items() if name not in {"preset", *paths}}


def test_presets_hold_the_published_commands():
    """Breaks when a published command of the README has no row in the table, or one with other settings."""
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"^python train\.py (?!--preset)(.*)", readme, re.MULTILINE)
    rows = [values_of(f"--preset={name}") for name in PRESETS]
    assert len(commands) >= 5
    for command in commands:
        assert values_of(*shlex.split(re.sub("<.*?>", "PATH", command))) in rows, command


def test_rows_of_a_benchmark(monkeypatch, tmp_path):
    """Breaks when rows or settings do not reach the file, or a place that cannot be written is a traceback."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    timing = importlib.import_module("timing")
    settings = timing.BenchmarkDevice(output=str(tmp_path / "new" / "rows.json"), device="cuda")
    path = timing.write_rows(settings, [{"ms": 1.5}], cores=2)
    written = json.loads(path.read_text())
    assert written["rows"] == [{"ms": 1.5}] and written["settings"]["cores"] == 2
    assert written["settings"]["device"] == "cuda"
    with pytest.raises(UsageError, match=r"`output`=.*cannot be written"):
        timing.write_rows(timing.BenchmarkOutput(output=str(path / "below_a_file.json")), [])


def test_learners_of_a_benchmark(monkeypatch):
    """Breaks when other libraries train another network than this project, or evaluation counts as their training."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    learners = importlib.import_module("learners")
    ours = build_model(ModelConfig("MnistNet", (1, 28, 28), 2, spec_norm=False), torch.Generator().manual_seed(0))
    theirs = learners.build_network(2, spectral_norm=False)
    weights = dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True))
    weights["10.weight"] = weights["10.weight"].view(4, 4, 4, 8).permute(0, 3, 1, 2).flatten(1)  # ours are (H, W, C)
    theirs.load_state_dict(weights)
    images = torch.rand(3, 1, 28, 28)
    torch.testing.assert_close(theirs(images), ours(images, None))

    times = iter([0, 60, 600, 660, 720])  # seconds; keeping the first weights takes nine minutes
    monkeypatch.setattr(learners, "CLOCKS", {"wall": lambda: next(times)})
    watch = learners.Watch([1, 2], "wall")
    while not watch.is_over:
        watch.count_iteration(dict)
    assert [(row["wall"], row["iterations"]) for row in watch.kept] == [(1, 1), (2, 2)]


# ---- the flags of the release ----

# script -> flag of the release's script -> its default there, None for paths of its authors' machine
RELEASED = json.loads((GOLDEN / "release_flags.json").read_text())


@pytest.mark.parametrize("script", RELEASED)
def test_flags_of_the_release(monkeypatch, script):
    """Breaks when a flag of the release's script is unknown, or does not take the value that the release gives it."""
    kind = settings_of(monkeypatch, script)
    for name, value in RELEASED[script].items():
        spellings = [f"--{name}={'path' if value is None else value}"]
        if isinstance(value, bool):
            spellings += [f"--{name}", f"--no{name}", f"-{name}"]
        for word in spellings:
            found = cli.to_dict(cli.parse([script, word], kind))[{"cond_scale": "cond_size"}.get(name, name)]
            if not isinstance(value, bool):
                assert str(found) == ("path" if value is None else str(value)) or float(np.ravel(found)[0]) == value, (
                    name
                )
            else:
                assert found == (value if "=" in word else not word.startswith("--no")), word


@pytest.mark.parametrize("script", RELEASED)
def test_numbers_that_are_none(monkeypatch, script):
    """Breaks when a flag takes nan, which passes every comparison, infinity, or an integer that no machine can hold."""
    kind = settings_of(monkeypatch, script)
    hints = typing.get_type_hints(kind)
    numbers = [name for name in cli.to_dict(kind()) if cli.split_type(hints[name])[0] in (int, float)]
    assert numbers
    for name in numbers:
        for value in ("nan", "inf", "-inf", str(10**30)):
            with pytest.raises(UsageError, match=f"--{name}="):
                cli.parse([script, f"--{name}={value}"], kind)


@pytest.mark.parametrize("script", RELEASED)
def test_paths_and_conditions(monkeypatch, script):
    """Breaks when `~` becomes a folder's name, or a condition names a flag or value that does not exist."""
    monkeypatch.setenv("HOME", "/home/someone")
    kind, everything = settings_of(monkeypatch, script), {}
    for other in RELEASED:
        for name, about in cli.list_flags(settings_of(monkeypatch, other)).items():
            everything.setdefault(name, set()).update(about.choices)
    for flag, about in cli.list_flags(kind).items():
        is_path = re.search("dir$|path$|folder$|_weights$|^cache$|^class_names$|^output$", flag)
        assert about.is_path == (bool(is_path) and flag != "folder"), flag
        if about.is_path:
            value = getattr(cli.parse([script, f"--{flag}=~/x"], kind), flag)
            assert value in ("/home/someone/x", ("/home/someone/x",))
        for condition in (*about.only_with, *about.not_with):
            name, _, words = condition.partition("=")
            choices = everything[name] | {"True", "False", "gauss", "2d"}
            assert not everything[name] or set(words.split("|")) - {""} <= choices, condition


# ---- what flags meant before settings were dataclasses ----

# script -> the flags of every script at that time, {"defaults": {flag: value}, "commands": {the words of a command line
# of README, docs, docstrings or presets: {flag: value that is not the default}}}
RECORDED = json.loads((ROOT / "tests" / "flag_values.json").read_text())

# Scripts that read a network from its checkpoint now tell apart whether such a flag was given at all: what was given is
# compared with the checkpoint, so the default, which had no effect or was wrong for half of the models, became None.
CHECKED = {"swish_act", "cclass", "large_model", "larger_model", "wider_model", "use_attention", "spec_norm"}
NOT_GIVEN = {
    "ais.py": CHECKED | {"limit"},  # measures all test images now, as the reference does
    "ebm_sandbox.py": CHECKED,
    "eval_inception.py": CHECKED,
    # It did not have the larger networks; it takes the step size of training now, and writes to --logdir.
    "imagenet_demo.py": CHECKED - {"large_model", "larger_model", "wider_model"} | {"step_lr", "savedir"},
    "sample.py": CHECKED,
    "train.py": {"num_samples", "quality"},  # the data set and the weights at hand decide
    # What gentest and genbaseline train has the old defaults where these are None, but for the
    # release's leaky ReLU and its five passes in genbaseline.
    "ebm_combine.py": {"num_filters", "cclass", "spec_norm", "use_attention", "swish_act", "break_steps", "savedir"},
}


def settings_of(monkeypatch, script):
    """Return the settings' class of a script, which its `main` takes."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module(script.removeprefix("benchmarks/").removesuffix(".py"))
    return typing.get_type_hints(module.main)["settings"]


@pytest.mark.parametrize("script", RECORDED)
def test_recorded_command_lines(monkeypatch, script):
    """Breaks when a command line of README, docs, docstrings or presets gives a flag another value than it once did."""
    kind, defaults = settings_of(monkeypatch, script), RECORDED[script]["defaults"]
    types = {name: cli.split_type(hint) for name, hint in typing.get_type_hints(kind).items()}
    assert RECORDED[script]["commands"]
    for command, changes in RECORDED[script]["commands"].items():
        expected = defaults | changes
        if "cond_scale" in expected:  # another name of cond_size, no setting of its own
            assert expected.pop("cond_scale") == expected["cond_size"]
        found = cli.to_dict(cli.parse([script, *shlex.split(command)], kind))
        assert expected.keys() <= found.keys()
        for name, value in expected.items():
            plain, is_list = types[name]
            value = tuple(map(plain, value)) if is_list else value  # lists of words became tuples of what they mean
            if name in NOT_GIVEN.get(script, ()) and name not in changes and found[name] is None:
                continue
            assert (found[name], type(found[name])) == (value, type(value)), f"{script} {command}: --{name}"


@pytest.mark.parametrize("script", RECORDED)
def test_defaults_that_may_differ(monkeypatch, script):
    """Breaks when another default than the listed ones changes, by which commands that nobody recorded would change."""
    kind, defaults = settings_of(monkeypatch, script), RECORDED[script]["defaults"]
    found = {name: list(map(str, v)) if isinstance(v, tuple) else v for name, v in cli.to_dict(kind()).items()}
    differing = {name for name, value in defaults.items() if name != "cond_scale" and found[name] != value}
    assert differing == NOT_GIVEN.get(script, set())
    assert all(found[name] is None for name in differing)
