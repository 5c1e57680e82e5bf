"""The models in pretrained/: small, whole, and as good as the README says; the script that writes such files."""

import pytest
import torch

import checkpoint
import data
import models
from conftest import ROOT, load_state, make_model, run_python, write_checkpoint
from ebm.readers import dsprites
from ebm.settings import CombineSettings
from ebm.tasks import concepts
from ebm.tasks.concept_models import ConceptModel
from ebm.tasks.examined_model import ExaminedModel
from ebm.tasks.results import Results
from ebm.training.distributed import work_alone
from sampling import langevin

SHIPPED = sorted(ROOT.glob("pretrained/*_cond*/model_*.pt"))
CONCEPTS = ("pos", "rot", "shape", "size")


def test_they_are_small_and_hold_weights_alone():
    """Breaks when a model is lost or too large, or carries optimizer, buffer or places of a machine."""
    assert {path.parent.name for path in SHIPPED} >= {"cifar_cond", "digits_cond", "fashion_cond", "mnist_cond"} | {
        f"dsprites_cond_{concept}" for concept in CONCEPTS
    }
    assert sum(path.stat().st_size for path in SHIPPED) < 40e6
    for path in SHIPPED:
        state = load_state(path)
        assert state.keys() == {"config", "model", "iteration", "flags", "class_names"}
        assert all(tensor.dtype == torch.float16 and tensor.isfinite().all() for tensor in state["model"].values())
        assert not {"logdir", "datadir", "exp", "data_path"} & set(state["flags"])
        assert path.name == f"model_{state['iteration']}.pt"


def test_digits_are_told_apart():
    """Breaks when the digits' model no longer knows its classes: 10 % right by chance, 99 % when shipped."""
    (path,) = ROOT.glob("pretrained/digits_cond/model_*.pt")
    images, labels = data.load_dataset("digits", split="test").batch(
        torch.arange(150), torch.Generator().manual_seed(0)
    )
    logits = ExaminedModel(checkpoint.load_energy(path), torch.Generator().manual_seed(0)).compute_logits(images)
    assert (logits.argmax(1) == labels.argmax(1)).double().mean() > 0.95


def test_noise_is_told_from_samples_of_cifar():
    """Breaks when noise gets a lower energy than the model's samples, as it had before --noise_rate."""
    (path,) = ROOT.glob("pretrained/cifar_cond/model_*.pt")
    model, generator, labels = checkpoint.load_energy(path), torch.Generator().manual_seed(0), torch.eye(10)
    energy = models.freeze_energy(model).under(labels)
    settings = {"num_steps": model.settings["sample_steps"], "step_lr": model.settings["step_lr"]}
    samples = langevin(energy, models.draw_starts(model, 10, labels, generator), generator=generator, **settings)
    with torch.no_grad():
        assert energy(samples).max() < energy(models.draw_noise_images(model.config, 10, generator)).min()


@pytest.mark.slow
@pytest.mark.parametrize(("concept", "least"), [("pos", 0.9), ("size", 0.8), ("shape", 0.85), ("rot", 0.6)])
def test_sprites_show_what_was_asked_for(concept, least, tmp_path):
    """Breaks when the model of a concept no longer samples it: 1, 45, 33 or 15 % would be right by chance.

    The sprite nearest to a sample must show it. Samples of a single concept are blobs, and hardly ever sprites.
    """
    (path,) = ROOT.glob(f"pretrained/dsprites_cond_{concept}/model_*.pt")
    known = {concept: ConceptModel(models.freeze_energy(checkpoint.load_energy(path)), concept)}
    sprites = dsprites.Sprites(dsprites.compute_latents(torch.arange(dsprites.SIZE)))
    settings = CombineSettings(limit=16, num_steps=60, step_lr=150.0)
    run = concepts.ConceptRun(
        settings, known, {}, {}, sprites, torch.Generator().manual_seed(0), Results(tmp_path, work_alone())
    )
    assert concepts.combine_concepts(run)[f"right, {concept}"]["by nearest"] > least


def test_export(tmp_path):
    """Breaks when the averaged weights are not the ones kept, more than rounding is lost, or a path gets out."""
    config = models.ModelConfig("MnistNet", (1, 12, 12), 4, 3)
    averaged = make_model(config, seed=1)
    contents = {"ema": averaged.state_dict(), "optimizer": {}, "class_names": ["a", "b", "c"]}
    contents |= {"flags": {"lr": 0.01, "datadir": "somewhere"}}
    write_checkpoint(tmp_path / "run" / "model_7.pt", make_model(config), 7, **contents)
    script = ROOT / "scripts/export.py"
    run_python(script, "run/model_7.pt", "slim/model_7.pt", "--ema", "--half", cwd=tmp_path, check=True)
    assert load_state(tmp_path / "slim/model_7.pt")["flags"] == {"lr": 0.01}
    images, labels = torch.rand(5, 1, 12, 12), torch.eye(3)[torch.arange(5) % 3]
    energies = checkpoint.load_energy(tmp_path / "slim/model_7")(images, labels)
    torch.testing.assert_close(energies, averaged.eval()(images, labels), rtol=1e-2, atol=1e-3)
    missing = run_python(script, "nothing.pt", "x.pt", cwd=tmp_path)
    assert missing.returncode == 2 and missing.stderr.startswith("error: nothing.pt")
