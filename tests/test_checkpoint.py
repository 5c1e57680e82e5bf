"""Checkpoints: written whole or not at all, found by name, refused in one line when they are not what they claim."""

import dataclasses
import os
import pathlib
import pickle

import pytest
import torch

import checkpoint
import models
from conftest import CONFIG, Bomb, flip_bit, make_model, write_checkpoint
from ebm.support.errors import UsageError
from ebm.support.experiments import (
    SHIPPED,
    find_model_folder,
    find_output_folder,
    report_missing_experiment,
)
from utils import ReplayBuffer


def test_round_trip(tmp_path):
    """Breaks when a loaded network has other weights or config, is in training mode, or its folder is not made."""
    model = write_checkpoint(tmp_path / "new" / "model_7.pt")
    loaded = checkpoint.load_energy(tmp_path / "new" / "model_7")
    images = torch.rand(2, 1, 28, 28)
    assert torch.equal(loaded(images), model.eval()(images))
    assert loaded.config == CONFIG and not loaded.training


def test_names_of_models(tmp_path, monkeypatch, capsys):
    """Breaks when Python finds another model by a name than scripts do, or old paths of shipped models lead nowhere."""
    monkeypatch.chdir(tmp_path)
    shipped = SHIPPED / "digits_cond/model_500.pt"
    old = ("cachedir/digits_cond/model_500", "cachedir/digits_cond/model_500.pt", "pretrained/digits_cond")
    for name in ("digits_cond", SHIPPED / "digits_cond", *old):
        assert checkpoint.locate(pathlib.Path(name)).with_suffix(".pt") == shipped
    (tmp_path / "cachedir/digits_cond").mkdir(parents=True)
    assert checkpoint.locate(pathlib.Path("digits_cond")) == shipped
    assert "note: cachedir/digits_cond holds no checkpoint; the model is the shipped one" in capsys.readouterr().out
    assert find_model_folder("digits_cond", (str(SHIPPED),)) == SHIPPED / "digits_cond"
    assert capsys.readouterr().out == ""  # the folder that was asked for
    for iteration in (5, 10):
        contents = {"flags": {"step_lr": 7.0}, "class_names": ["a", "b", "c"]} if iteration == 10 else {}
        model = make_model(dataclasses.replace(CONFIG, label_size=3)) if iteration == 10 else make_model()
        write_checkpoint(pathlib.Path(f"cachedir/digits_cond/model_{iteration}.pt"), model, iteration, **contents)
    for name in ("digits_cond", "cachedir/digits_cond"):
        loaded = checkpoint.load_energy(name)
        assert loaded.settings == {"step_lr": 7.0} and loaded.class_names == ("a", "b", "c")
    assert f"modeldir={SHIPPED} takes the shipped one" in capsys.readouterr().out
    assert checkpoint.load_energy("cachedir/digits_cond/model_5").settings == {}
    with pytest.raises(
        UsageError, match=r"no experiment folder cachedir/digit_cond; cachedir has digits_cond; .*fashion"
    ):
        checkpoint.load_energy("digit_cond")
    with pytest.raises(UsageError, match=r"cachedir/digits_cond/model_500\.pt cannot be read"):
        checkpoint.load_energy("cachedir/digits_cond/model_500")


def test_names_of_experiments(tmp_path, capsys):
    """Breaks when a missing experiment is not answered with those there are, or results go among shipped models."""
    for number in range(12):
        write_checkpoint(tmp_path / f"study/run{number}/model_1.pt")
    write_checkpoint(tmp_path / "mine/abandoned_1/model_1.pt")
    write_checkpoint(tmp_path / "mine/model_1.pt")
    roots = (str(tmp_path / "empty"), str(tmp_path))
    assert find_model_folder("mine", roots) == tmp_path / "mine" and not capsys.readouterr().out
    assert find_model_folder("fashion_cond", (str(SHIPPED),)).resolve() == SHIPPED / "fashion_cond"
    with pytest.raises(
        UsageError, match=r"empty/study/ru or .*/study/ru; .* has study/run\d, .* and 5 more; .*: choose"
    ):
        find_model_folder("study/ru", roots)
    assert "abandoned" not in str(report_missing_experiment("mane", roots))
    assert "train a model first" in str(report_missing_experiment("mine", (tmp_path / "empty",)))
    (tmp_path / "link").symlink_to(SHIPPED)
    for root in (SHIPPED, tmp_path / "link"):
        with pytest.raises(UsageError, match=r"`logdir`=.*is kept for the shipped models"):
            find_output_folder(root, "new")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    """Breaks when a save that fails half way destroys the checkpoint before it, or leaves its pieces behind."""
    path = tmp_path / "model_7.pt"
    write_checkpoint(path)
    before = path.read_bytes()

    def full_disk(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_checkpoint(path, make_model(seed=1))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model_7.pt"]


def test_find(tmp_path):
    """Breaks when `latest` sorts names as text, takes half-written files, or a missing one is not explained."""
    for iteration in (90, 1000):
        write_checkpoint(tmp_path / f"model_{iteration}.pt")
    (tmp_path / ".model_2000.pt.tmp").write_bytes(b"half")
    (tmp_path / "model_best.pt").write_bytes(b"")
    assert checkpoint.find(tmp_path, "latest").name == checkpoint.find(tmp_path, "-1").name == "model_1000.pt"
    assert checkpoint.find(tmp_path, "90").name == "model_90.pt"
    with pytest.raises(UsageError, match=r"no checkpoint model_5 .*it has 90, 1000"):
        checkpoint.find(tmp_path, "5")
    with pytest.raises(UsageError, match="no experiment folder"):
        checkpoint.find(tmp_path / "other", "latest")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no checkpoint in"):
        checkpoint.find(tmp_path / "empty", "latest")


def test_a_buffer_of_no_images_takes_over_a_full_one():
    """Breaks when a run without --replay_batch, whose buffer is empty, cannot load a checkpoint with one."""
    full, none = ReplayBuffer(3, (1, 2, 2)), ReplayBuffer(0, (1, 2, 2))
    for level in (0.2, 0.4):  # the ring's oldest image is not its first
        full.push(torch.full((2, 1, 2, 2), level))
    none.load_state_dict(full.state_dict())
    assert len(full) == 3 and len(none) == none.position == 0 and none.images.shape == (0, 1, 2, 2)


def test_code_in_a_pickle_does_not_run(tmp_path):
    """Breaks when a checkpoint may execute what it holds."""
    witness = tmp_path / "witness"
    bomb = Bomb(os.mkdir, str(witness))
    torch.save({"config": bomb, "model": {}, "iteration": 1}, tmp_path / "model_1.pt")
    (tmp_path / "model_2.pt").write_bytes(pickle.dumps(bomb))
    for name in ("model_1", "model_2"):
        with pytest.raises(UsageError, match="model_"):
            checkpoint.load_energy(tmp_path / name)
    assert not witness.exists()


@pytest.mark.parametrize("cut", [0, 10, 1000, -1])
def test_truncated_file(tmp_path, cut):
    """Breaks when half a checkpoint is loaded, or gives a traceback of torch's."""
    path = tmp_path / "model_1.pt"
    write_checkpoint(path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UsageError, match=r"model_1\.pt"):
        checkpoint.load(path)


def test_flipped_bytes_are_noticed(tmp_path):
    """Breaks when a damaged tensor is loaded as if nothing had happened: torch itself does not compare checksums."""
    path = tmp_path / "model_1.pt"
    write_checkpoint(path)
    flip_bit(path, path.stat().st_size // 2)  # inside a tensor's bytes
    with pytest.raises(UsageError, match="damaged"):
        checkpoint.load(path)


def test_foreign_files(tmp_path):
    """Breaks when a file of other contents, or of a network that does not fit its own config, is not named."""
    with pytest.raises(UsageError, match="missing"):
        checkpoint.load_energy(tmp_path / "missing")
    torch.save({"weights": torch.ones(2)}, tmp_path / "model_1.pt")
    with pytest.raises(UsageError, match="not a checkpoint of this project"):
        checkpoint.load(tmp_path / "model_1.pt")
    model = models.build_model(CONFIG)
    wider = dataclasses.asdict(dataclasses.replace(CONFIG, num_filters=8))
    checkpoint.save(tmp_path / "model_2.pt", {"config": wider, "model": model.state_dict(), "iteration": 2})
    with pytest.raises(UsageError, match="does not fit its own configuration"):
        checkpoint.load_energy(tmp_path / "model_2")


def test_another_architecture_is_described(tmp_path):
    """Breaks when resuming with other flags does not say which fields of the network differ, and how."""
    other = dataclasses.replace(CONFIG, num_filters=8, swish_act=True)
    with pytest.raises(UsageError, match="num_filters is 4 there and 8 here; swish_act is False there and True here"):
        checkpoint.check_config(CONFIG, other, tmp_path / "model_1.pt")


def test_retention(tmp_path):
    """Breaks when more or fewer than the newest 30 stay, or the one of every six hours goes."""
    hour = 3600.0
    for i in range(40):
        path = tmp_path / f"model_{i * 100}.pt"
        path.write_bytes(b"")
        os.utime(path, (i * hour, i * hour))
    (tmp_path / "model_best.pt").write_bytes(b"")
    for name in (".model_3900.pt.1f.tmp", ".config.json.2e.tmp"):  # pieces that a killed process left
        (tmp_path / name).write_bytes(b"half")
    for _ in range(2):  # once more changes nothing
        checkpoint.prune(tmp_path)
        assert checkpoint.list_iterations(tmp_path) == [0, 600, *range(1000, 4000, 100)]
    assert (tmp_path / "model_best.pt").exists() and not list(tmp_path.glob(".*"))


def test_links_to_a_disk_that_is_away(tmp_path, monkeypatch):
    """Breaks when a link that leads nowhere keeps old checkpoints from being deleted, or a message calls it missing."""
    monkeypatch.setattr(checkpoint, "KEEP", 1)
    for i in range(4):
        (tmp_path / f"model_{i}.pt").write_bytes(b"")
        os.utime(tmp_path / f"model_{i}.pt", (i, i))
    (tmp_path / ".of_another_program.tmp").mkdir()
    (tmp_path / "model_9.pt").symlink_to("nowhere")
    checkpoint.prune(tmp_path)
    assert checkpoint.list_iterations(tmp_path) == [0, 3, 9]
    with pytest.raises(UsageError, match=r"model_9\.pt cannot be read \(No such file"):
        checkpoint.load(checkpoint.find(tmp_path, "latest"))
