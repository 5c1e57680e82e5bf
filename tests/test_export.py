"""Networks as files of their own: the round trip through safetensors is exact, and files of strangers are examined."""

import json
import sys
from unittest import mock

import pytest
import safetensors
import torch
from safetensors.torch import save_file

import checkpoint
import export
import models
from conftest import ROOT, load_state, make_model, run_python, write_checkpoint
from ebm.readers.safetensors_files import read_safetensors
from ebm.support.errors import UsageError

CONFIG = models.ModelConfig("MnistNet", (1, 12, 12), 4, 3, start_rank=2)
NAMES = ("cat", "dog", "été")


def run_export(*words):
    return export.main([str(word) for word in words])


def write_run(path, dtype=torch.float32):
    """Write the checkpoint of a run, with averaged weights, starts, an optimizer and places; return the networks."""
    model, averaged = make_model(CONFIG), make_model(CONFIG, seed=1)
    for network in (model, averaged):
        network.starts.fit(torch.rand(9, 1, 12, 12), torch.eye(3).repeat(3, 1))
        network.to(dtype)
    flags = {"lr": 0.1, "rescale": 1 / 3, "noise": 1e-30, "label": None, "datadir": "home", "exp": "x", "sizes": [1, 2]}
    contents = {"ema": averaged.state_dict(), "flags": flags, "class_names": list(NAMES), "optimizer": {}}
    write_checkpoint(path, model, 7, **contents)
    return model, averaged


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("words", [(), ("--ema",)])
def test_round_trip(tmp_path, capsys, dtype, words):
    """Breaks when a tensor, its type, the settings, a name or the starts change on the way, or folders get out."""
    network = write_run(tmp_path / "run/model_7.pt", dtype)[len(words)]
    assert run_export(tmp_path / "run/model_7", tmp_path / "out/x.safetensors", *words) == 0
    assert run_export(tmp_path / "out/x.safetensors", tmp_path / "back/model_7.pt") == 0
    assert capsys.readouterr().out.endswith(f"wrote {tmp_path}/back/model_7.pt\n")
    state = load_state(tmp_path / "back/model_7.pt")
    assert state.keys() == {"config", "model", "iteration", "flags", "class_names"} and state["iteration"] == 7
    assert state["model"].keys() == network.state_dict().keys() >= {"starts.mean", "starts.factor"}
    for name, tensor in network.state_dict().items():
        assert state["model"][name].dtype == dtype and torch.equal(state["model"][name], tensor)
    images, labels = torch.rand(3, 1, 12, 12), torch.eye(3)
    for path in ("out/x.safetensors", "back/model_7.pt"):
        loaded = checkpoint.load_energy(tmp_path / path)
        assert torch.equal(loaded(images, labels), network.float().eval()(images, labels))
        assert loaded.config == CONFIG and loaded.class_names == NAMES and not loaded.training
        assert loaded.settings == {"lr": 0.1, "rescale": 1 / 3, "noise": 1e-30, "label": None, "sizes": [1, 2]}


@pytest.mark.parametrize("name", ["cifar_cond", "dsprites_cond_pos"])
def test_shipped_models(tmp_path, name):
    """Breaks when a shipped model is not the same after the way there and back, or the file is larger."""
    run_python(ROOT / "scripts/export.py", name, "x.safetensors", cwd=tmp_path, check=True)
    run_python(ROOT / "scripts/export.py", "x.safetensors", "back.pt", cwd=tmp_path, check=True)
    (path,) = ROOT.glob(f"pretrained/{name}/model_*.pt")
    before, after = load_state(path), load_state(tmp_path / "back.pt")
    assert all(torch.equal(after["model"][key], tensor) for key, tensor in before.pop("model").items())
    assert all(tensor.dtype == torch.float16 for tensor in after.pop("model").values())
    assert checkpoint.load_energy(path).config == checkpoint.load_energy(tmp_path / "back").config
    assert after.pop("config").items() >= before.pop("config").items()
    before["flags"].pop("download", None)  # older files have this place of the machine
    assert after == before
    assert (tmp_path / "x.safetensors").stat().st_size < 1.01 * path.stat().st_size


def test_other_programs_can_read_it(tmp_path):
    """Breaks when the metadata are not texts in JSON under the documented names, or the format is not announced."""
    write_run(tmp_path / "model_7.pt")
    assert run_export(tmp_path / "model_7.pt", tmp_path / "x.safetensors") == 0
    with safetensors.safe_open(tmp_path / "x.safetensors", "np") as file:
        texts, (width, *_) = file.metadata(), file.get_tensor("stages.c1.weight").shape
    assert texts["format"] == "pt" and width == 4
    assert json.loads(texts["config"])["image_shape"] == [1, 12, 12]
    assert json.loads(texts["class_names"]) == list(NAMES) and json.loads(texts["iteration"]) == 7


def test_half_precision(tmp_path, capsys):
    """Breaks when weights are not rounded, or those that half precision lacks become infinite without a word."""
    model, _ = write_run(tmp_path / "model_7.pt")
    assert run_export(tmp_path / "model_7.pt", tmp_path / "x.safetensors", "--half") == 0
    weights = read_safetensors(tmp_path / "x.safetensors")["model"]
    assert all(torch.equal(weights[name], tensor.half()) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        next(model.parameters()).fill_(1e5)
    write_checkpoint(tmp_path / "model_8.pt", model)
    assert run_export(tmp_path / "model_8.pt", tmp_path / "y.safetensors", "--half") == 2
    assert "in half precision holds weights that are not finite" in capsys.readouterr().err
    assert not (tmp_path / "y.safetensors").exists()


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("model_7.pt", "x", "x is no name of a file to write, such as model_5.pt or model.safetensors"),
        ("model_7.pt", "folder.pt", "folder.pt is no name of a file to write"),
        ("model_7.pt", "./model_7.pt", "model_7.pt is the source itself; name another file"),
        ("model_7", "model_7.pt", "model_7.pt is the source itself"),
        ("model_9.pt", "x.pt", "model_9.pt cannot be read (No such file"),
        ("text.safetensors", "x.pt", "text.safetensors is damaged, or no checkpoint"),
        ("folder.pt/none.safetensors", "x.pt", "none.safetensors cannot be read (No such file"),
        ("model_3.index", "x.pt", "model_3.index is a TensorFlow checkpoint; convert it first, by scripts/convert_"),
        ("model_7.pt", "text.safetensors/x.pt", "x.pt cannot be written"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, capsys, source, target, expected):
    """Breaks when a mistake is a traceback, changes a file, or takes another exit status than 2."""
    write_run(tmp_path / "model_7.pt")
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "model_3.index").touch()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.is_file()}
    assert run_export(tmp_path / source, f"{tmp_path}/{target}") == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and expected in message and message.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.is_file()} == before


def test_missing_package(tmp_path):
    """Breaks when checkpoints need the package, too, or who needs it is not told its name."""
    write_run(tmp_path / "model_7.pt")
    (tmp_path / "y.safetensors").touch()
    with mock.patch.dict(sys.modules, {"safetensors": None}):
        export.export_network(str(tmp_path / "model_7.pt"), tmp_path / "x.pt")
        assert (tmp_path / "x.pt").exists()
        for call in (
            lambda: export.export_network(str(tmp_path / "x.pt"), tmp_path / "x.safetensors"),
            lambda: checkpoint.load_energy(tmp_path / "y.safetensors"),
        ):
            with pytest.raises(UsageError, match=r"pip install -e '\.\[export\]'"):
                call()


# ---------------------------------------------------------------------------------------------------------------------
# Files of strangers: what such a file holds besides the network's own, and how it is answered. Weights: by name.

TEXTS = {"config": json.dumps({"network": "MnistNet", "image_shape": [1, 12, 12], "num_filters": 4}), "iteration": "7"}
HUGE = json.dumps({"network": "MnistNet", "image_shape": [1, 4096, 4096], "num_filters": 65536, "start_rank": 65536})
STRANGE = {
    "no metadata": (None, {}, "is not a checkpoint of this project"),
    "config is null": ({"config": "null"}, {}, "describes a network this version does not know"),
    "no JSON": ({"config": "{"}, {}, "is damaged, or no checkpoint"),
    "deep": ({"flags": "[" * 100_000}, {}, "is damaged, or no checkpoint"),
    "long number": ({"iteration": "1" * 10_000}, {}, "is damaged, or no checkpoint"),
    "config is a list": ({"config": "[1]"}, {}, "describes a network this version does not know"),
    "another network": ({"config": TEXTS["config"].replace("Mnist", "Other")}, {}, "its network is impossible"),
    "NaN": ({"config": TEXTS["config"].replace("}", ', "spec_norm_val": NaN}')}, {}, "its spec_norm_val is impossible"),
    "huge": ({"config": HUGE}, {}, "does not fit its own configuration"),
    "iteration": ({"iteration": "-1"}, {}, "has an invalid entry iteration"),
    "settings": ({"flags": '{"lr": {"a": 1}}'}, {}, "has an invalid entry flags"),
    "names": ({"class_names": '"abc"'}, {}, "has an invalid entry class_names"),
    "checksum": ({"sha256": "0"}, {}, "its contents are not those of its checksum"),
    "whole numbers": ({}, {"stages.c1.weight": torch.zeros(4, 64, 4, 4, dtype=torch.int32)}, "holds no weights but"),
    "eight bits": ({}, {"stages.c1.weight": torch.zeros(4, 64, 4, 4).to(torch.float8_e4m3fn)}, "holds no weights but"),
    "another tensor": ({}, {"evil\x1b[2J": torch.zeros(1)}, "does not fit its own configuration"),
    "shape": ({}, {"stages.c1.weight": torch.zeros(1)}, "does not fit its own configuration"),
    "not finite": ({}, {"stages.c1.weight": torch.full((4, 64, 4, 4), torch.inf)}, "weights that are not finite"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_strange_files(tmp_path, capsys, kind):
    """Breaks when what a stranger wrote is believed, answered by a traceback, or steers the terminal."""
    texts, weights, expected = STRANGE[kind]
    network = make_model(models.ModelConfig("MnistNet", (1, 12, 12), 4)).state_dict()
    save_file(network | weights, tmp_path / "x.safetensors", None if texts is None else TEXTS | texts)
    assert run_export(tmp_path / "x.safetensors", tmp_path / "x.pt") == 2
    message = capsys.readouterr().err
    assert expected in message and message.count("\n") == 1 and message[:-1].isprintable()
    assert not (tmp_path / "x.pt").exists()


def test_file_of_another_program(tmp_path):
    """Breaks when a file is refused for want of a checksum, or the names of classes are not made printable."""
    config = models.ModelConfig("MnistNet", (1, 12, 12), 4, 2)
    network, texts = make_model(config), {"config": json.dumps(vars(config)), "class_names": '["a\\u001b[2J", "b"]'}
    save_file(network.state_dict(), tmp_path / "x.safetensors", TEXTS | texts)
    loaded = checkpoint.load_energy(tmp_path / "x.safetensors")
    assert loaded.class_names == ("a\\x1b[2J", "b")
    assert torch.equal(loaded.state_dict()["stages.c1.weight"], network.state_dict()["stages.c1.weight"])
