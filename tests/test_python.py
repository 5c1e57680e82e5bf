"""The project from Python, in a working directory and beside modules of someone else: imports, torch.hub."""

import re
import sys
from unittest import mock

import pytest
import torch

import hubconf
from conftest import ENVIRONMENT, ROOT, run_python

# What anybody writes to sample from a model; it prints the mean energies of starts and samples, and writes both.
SAMPLE = """
labels = torch.eye(10)
energy = models.freeze_energy(model).under(labels)
starts = models.draw_starts(model, len(labels), labels, torch.Generator().manual_seed(0))
generator = torch.Generator().manual_seed(1)
images = sampling.langevin(energy, starts, num_steps=20, step_lr=model.settings["step_lr"], generator=generator)
torch.save([starts, images], "images.pt")
print(energy(starts).mean().item(), energy(images).mean().item())
"""
IMPORTS = 'import torch, checkpoint, models, sampling\nmodel = checkpoint.load_energy("fashion_cond")'
HUB = f'import sys, torch\nmodel = torch.hub.load({str(ROOT)!r}, "fashion_cond", source="local")'
LEFT = f"assert {str(ROOT)!r} not in sys.path\nimport models, sampling"


@pytest.fixture
def elsewhere(tmp_path):
    """Return a working directory that has modules with names of this project's."""
    for name in ("utils", "models", "data"):
        (tmp_path / f"{name}.py").write_text("x = 1\n")
    return tmp_path


def sample(program, folder, **environment):
    """Run a program that loads a model, then the lines of SAMPLE; return starts and samples (2, 10, 1, 28, 28)."""
    result = run_python("-c", program + SAMPLE, cwd=folder, env=ENVIRONMENT | environment)
    assert result.returncode == 0, result.stderr
    before, after = map(float, result.stdout.splitlines()[-1].split())
    assert after < before - 0.05, "the chains do not descend"  # the shipped model: from 0.09 to -0.01
    path = folder / "images.pt"
    images = torch.stack(torch.load(path, weights_only=True))
    path.unlink()
    return images


def test_five_lines_anywhere(tmp_path):
    """Breaks when the modules work in their own folder only, or images depend on the folder."""
    images = sample(IMPORTS, tmp_path, PYTHONPATH=str(ROOT))
    assert images.shape == (2, 10, 1, 28, 28) and images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, sample(f"import sys\nsys.path.append({str(ROOT)!r})\n{IMPORTS}", tmp_path))


def test_page(tmp_path):
    """Breaks when the lines of docs/python.md no longer run, or their samples are no images."""
    lines, hub = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)
    hub = hub.replace("<folder>", str(ROOT)).replace("<name or path>", "digits_cond")
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    result = run_python("-c", f'{lines}torch.save(images, "images.pt")', cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    images = torch.load(tmp_path / "images.pt", weights_only=True)
    assert images.shape == (10, 1, 28, 28) and images.min() >= 0 and images.max() <= 1
    assert images[1, 0, :8, :4].mean() < 0.1 < 0.4 < images[1, 0, :8, 11:17].mean()  # a trouser's waistband
    result = run_python("-c", f"{hub}\nprint(*model.class_names)", cwd=tmp_path)
    assert result.stdout.split() == list("0123456789"), result.stderr


def test_hub_beside_modules_of_someone_else(elsewhere, tmp_path_factory):
    """Breaks when a network of torch.hub fails after the folder has left the path, or samples other images."""
    images = sample(f"{HUB}\n{LEFT}", elsewhere)
    assert torch.equal(images, sample(IMPORTS, tmp_path_factory.mktemp("plain"), PYTHONPATH=str(ROOT)))


@pytest.mark.parametrize("name", ["utils", "models"])
def test_modules_that_are_loaded_already(elsewhere, name):
    """Breaks when another module of the name gives an error that does not say so."""
    result = run_python("-c", f"import {name}\n{HUB}", cwd=elsewhere)
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: this process has loaded a module `{name}`, {elsewhere}/{name}.py, ")
    assert "load them in a process without the other one" in last


def test_a_folder_that_is_a_module(tmp_path):
    """Breaks when a package without a file is taken for this project's."""
    (tmp_path / "models").mkdir()
    result = run_python("-c", f"import models\n{HUB}", cwd=tmp_path)
    assert f"ImportError: this process has loaded a module `models`, {tmp_path}/models, " in result.stderr


def test_hub_entries(tmp_path, monkeypatch):
    """Breaks when a shipped model has no entry, another name is one, a docstring says too little, or cachedir/ wins."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cachedir/mnist_cond").mkdir(parents=True)
    (tmp_path / "cachedir/mnist_cond/model_1.pt").write_text("no checkpoint")
    with mock.patch("torch.hub._get_cache_or_reload", return_value=str(ROOT)):  # they take no local folder
        entries = torch.hub.list("owner/name")
        texts = {name: torch.hub.help("owner/name", name) for name in entries}
    shipped = {path.parent.name for path in ROOT.glob("pretrained/*/model_*.pt")}
    assert set(entries) == shipped | {"load_energy"} and len(shipped) >= 8
    for name in shipped:
        model = torch.hub.load(str(ROOT), name, source="local")
        settings, text = model.settings, " ".join(texts[name].split())
        assert not model.training and settings["dataset"] in text and f"step_lr={settings['step_lr']:g} " in text
        assert all(word in text for word in model.class_names) and f"(N, {model.config.label_size})" in text
        assert max(map(len, texts[name].splitlines())) <= 100
    model = torch.hub.load(str(ROOT), "load_energy", str(ROOT / "pretrained/mnist_cond"), source="local")
    assert model.class_names == tuple("0123456789") and "safetensors" in texts["load_energy"]


def test_hub_dependencies(tmp_path):
    """Breaks when loading a model imports a package that hubconf.py does not name."""

    def list_packages(program):
        words = run_python("-c", f"{program}\nprint(*sys.modules)", cwd=tmp_path, check=True).stdout.split()
        return {word.partition(".")[0] for word in words}

    own = {path.stem for path in ROOT.iterdir()} | set(sys.stdlib_module_names)
    assert not list_packages(f"{HUB}\n{LEFT}") - list_packages("import sys, torch.hub, numpy") - own
    assert hubconf.dependencies == ["torch", "numpy", "tqdm"]
