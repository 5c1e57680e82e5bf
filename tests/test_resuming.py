"""A resumed run goes on as it was: its settings come from the checkpoint, and what is given now is told or refused."""

import dataclasses
import pathlib

import pytest

import checkpoint
from conftest import CONFIG, make_run, make_state, write_checkpoint
from ebm.presets import PRESETS
from ebm.settings import TrainSettings
from ebm.support import cli
from ebm.support.errors import UsageError
from ebm.training.resuming import check_folder, choose_checkpoint, name_resumption, recall_settings
from train import train

PATH = pathlib.Path("x/model_1.pt")
STORED = {"dataset": "digits", "cclass": True, "num_steps": 40, "lr": 0.01, "max_iter": 20}


def parse(*words):
    return cli.parse(["train.py", *words], TrainSettings)


def recall(*words, flags=STORED):
    """Return the settings of a run with these flags that is resumed by these words."""
    return recall_settings(parse(*words), PATH, {"flags": flags, "config": {"num_filters": 64}})


def test_settings_are_those_of_the_run(capsys):
    """Breaks when a setting of the run is forgotten, a name of another version is taken, or a place is not that of the
    call."""
    merged = recall("--exp=x", "--resume_iter=latest", flags=STORED | {"colour": "red", "exp": "y", "device": "cuda"})
    assert merged == TrainSettings(exp="x", resume_iter="latest", **STORED)
    assert capsys.readouterr().out == "note: this run goes on from x/model_1.pt with its settings\n"


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("--lr=0.003 --num_steps=40", "lr: 0.01 → 0.003"),
        ("--max_iter=30 --device=cpu", "max_iter: 20 → 30"),
        ("--epoch_num=3", "max_iter: 20 → unset; epoch_num: 10000 → 3"),
        ("--num_filters=64 --replay_rate=0.5 --image_size=32", ""),  # the usual width; the others have no effect
        (
            "--swish_act --dataset=mnist --seed=3 --change",
            "seed: 0 → 3; dataset: digits → mnist; swish_act: False → True",
        ),
    ],
)
def test_given_settings_win_and_are_told(capsys, words, changes):
    """Breaks when a flag that is given does not win, is not told, or is told although nothing changes."""
    merged, told = recall(*words.split()), f", but for {changes}" if changes else ""
    assert capsys.readouterr().out == f"note: this run goes on from x/model_1.pt with its settings{told}\n"
    for name in merged.given_names:
        assert getattr(merged, name) == getattr(parse(*words.split()), name)
    assert (merged.max_iter is None) == ("epoch_num" in words)


def test_presets(capsys):
    """Breaks when the preset that a run had undoes what overrode it, or another preset has no effect."""
    stored = cli.to_dict(parse("--preset=digits_cpu", "--num_steps=40"))
    for words in (["--preset=digits_cpu"], []):
        merged = recall(*words, flags=stored)
        assert (merged.num_steps, merged.step_lr, merged.preset) == (40, 30, "digits_cpu")
        assert "but for" not in capsys.readouterr().out
    merged = recall("--preset=fashion_cpu", "--change", flags=stored | {"num_filters": 32})
    assert (merged.dataset, merged.num_steps, merged.max_iter, merged.exp) == (
        "fashion_mnist",
        20,
        4500,
        "fashion_cpu",
    )
    assert recall(flags=stored | {"preset": ["of another version"]}).preset is None
    with pytest.raises(
        UsageError, match=r"datasource: gauss → random; leave out `datasource`; the weights fit no other"
    ):
        recall("--datasource=random", flags=stored)
    with pytest.raises(UsageError, match=r"dataset: digits → dsprites.*; leave out `preset`, or add `change`"):
        recall("--preset=dsprites_pos_cpu", flags=stored)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "--dataset=mnist --swish_act",
            "dataset: digits → mnist; swish_act: False → True; leave out `dataset` and `swish",
        ),
        (
            "--num_filters=8 --lr=1",
            "num_filters: 64 → 8; leave out `num_filters`; the weights fit no other `num_filters`",
        ),
    ],
)
def test_another_network_or_data_is_refused(words, told):
    """Breaks when what a run has learnt can be spoilt by a flag, or the message lacks a difference or the remedy."""
    with pytest.raises(UsageError) as error:
        recall(*words.split())
    assert f"this would change the network or the data of {PATH}: {told}" in str(error.value)
    assert "lr" not in str(error.value) and "\n" not in str(error.value)


def test_folder_of_data(tmp_path, capsys):
    """Breaks when images of another folder are taken for those of the run, or a folder that was moved is refused."""
    (tmp_path / "images").mkdir()
    flags = {"dataset": "folder", "data_path": f"{tmp_path}/images"}
    recall(f"--data_path={tmp_path}/other/../images", flags=flags)
    assert "but for" not in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"data_path: .*/images → elsewhere; leave out `data_path`, or add `change`"):
        recall("--data_path=elsewhere", flags=flags)
    for changed in (flags | {"data_path": f"{tmp_path}/gone"}, flags | {"data_path": None}):
        assert recall("--data_path=elsewhere", flags=changed).data_path == "elsewhere"
        assert "→ elsewhere" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words", "told"),
    [
        ({}, "--noantialias", "antialias: True → False"),  # it was always on before it could be chosen
        ({}, "--antialias", ""),
        ({"antialias": False}, "--noantialias", ""),
        ({"antialias": False}, "--antialias", "antialias: False → True"),
        ({"dataset": "cifar10"}, "--antialias", ""),
    ],
)
def test_images_that_are_resized_otherwise(capsys, flags, words, told):
    """Breaks when a run of an earlier version goes on with images that are resized otherwise than before."""
    flags = {"dataset": "imagenetfull"} | flags
    assert recall(flags=flags).antialias == flags.get("antialias", flags["dataset"] == "imagenetfull")
    recall(words, "--change", flags=flags)
    assert told in capsys.readouterr().out
    if told:
        with pytest.raises(UsageError, match=told):
            recall(words, flags=flags)


@pytest.mark.parametrize(
    "odd",
    [{"lr": "x"}, {"lr": True}, {"lr": -1.0}, {"batch_size": [3]}, {"dataset": 5}, {"data_path": ""}, {"lr": 1e300}],
    ids=str,
)
def test_odd_settings_of_a_checkpoint(odd):
    """Breaks when a value that no command line takes gets into a run, or a given one does not replace it."""
    (name,) = odd
    with pytest.raises(UsageError, match=f"{PATH} holds a setting that cannot be used .*{name}") as error:
        recall(flags=STORED | odd)
    assert "\n" not in str(error.value)
    value = {"lr": 0.5, "batch_size": 4, "dataset": "digits", "data_path": "x"}[name]
    assert getattr(recall(f"--{name}={value}", "--change", flags=STORED | odd), name) == value


def test_odd_texts_of_a_checkpoint(capsys):
    """Breaks when a stranger's text steers the terminal, fills it, or ends a comparison of paths in a traceback."""
    flags = {"objective": "\x1b[2J" * 500, "data_path": "a\0b", "dataset": "folder"}
    recall("--objective=cd", "--data_path=x", "--change", flags=flags)
    told = capsys.readouterr().out
    assert "\\x1b[2J" in told and told.strip().isprintable() and len(told) < 500


def test_checkpoints_without_settings(capsys):
    """Breaks when a run from TensorFlow's weights does not take the settings that are given, or does not say so."""
    settings = parse("--lr=0.5", "--swish_act")
    assert recall_settings(settings, PATH, {}) == settings
    assert "x/model_1.pt, which holds no settings" in capsys.readouterr().out


def test_auto(tmp_path):
    """Breaks when a scheduler's command starts anew beside a checkpoint, or fails where there is none."""
    settings = parse(f"--logdir={tmp_path}", "--exp=x", "--resume_iter=auto")
    assert choose_checkpoint(settings) is None
    check_folder(settings)
    write_checkpoint(tmp_path / "x" / "model_3.pt")
    assert choose_checkpoint(settings) == tmp_path / "x" / "model_3.pt"
    assert choose_checkpoint(dataclasses.replace(settings, resume_iter="-1")) is None
    with pytest.raises(UsageError, match="no experiment folder"):
        check_folder(dataclasses.replace(settings, exp="y", train=False))


def test_command_that_goes_on():
    """Breaks when what a message tells a user to type does not lead to the run."""
    settings = parse("--exp=a b", "--logdir=c")
    assert name_resumption(settings) == "'--exp=a b' --logdir=c --resume_iter=latest"
    assert name_resumption(parse("--exp=d")) == "--exp=d --resume_iter=latest"


def test_a_changed_network_keeps_the_weights(tmp_path):
    """Breaks when `change` is refused although the weights fit, or taken although they do not."""
    make_run(make_state(), tmp_path / "x").save()
    path = tmp_path / "x" / "model_0.pt"
    with pytest.raises(UsageError, match="swish_act is False there and True here"):
        make_run(make_state(swish_act=True), tmp_path / "x").resume(path)
    make_run(make_state(swish_act=True), tmp_path / "x", change=True).resume(path)
    with pytest.raises(UsageError, match="num_filters is 4 there and 8 here"):
        make_run(make_state(num_filters=8), tmp_path / "x", change=True).resume(path)
    assert checkpoint.load(path)["config"] == dataclasses.asdict(dataclasses.replace(CONFIG, label_size=3))


def test_a_run_that_is_over(tmp_path, capsys):
    """Breaks when a finished run is resumed without a word, or a new one of no iterations is taken for one."""
    run = make_run(make_state(), tmp_path / "x", max_iter=0)
    train(run)
    assert "is the last" not in capsys.readouterr().out
    run.save()
    run.resume(tmp_path / "x" / "model_0.pt")
    train(run)
    assert "note: iteration 0 is the last of this run; a larger max_iter goes on" in capsys.readouterr().out


def test_every_preset_goes_on():
    """Breaks when a preset has a setting that cannot be recalled from a checkpoint."""
    for name in PRESETS:
        settings = parse(f"--preset={name}")
        assert recall(f"--exp={settings.exp}", flags=cli.to_dict(settings)) == settings
