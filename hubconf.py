"""Trained energy models for torch.hub.

    model = torch.hub.load("<this folder>", "fashion_cond", source="local")  # a models.EnergyNetwork in eval mode
    model = torch.hub.load("<this folder>", "load_energy", "digits.safetensors", source="local")

Each shipped model has an entry of its name. After a call, `import models, sampling` works in any folder.
"""

# ruff: noqa: E402  (the check stands before the imports that it is for)

import pathlib
import sys
import textwrap
from collections.abc import Callable as _Callable
from typing import Any as _Any

_FOLDER = pathlib.Path(__file__).resolve().parent
_MODULES = ("checkpoint", "models", "sampling", "utils", "ebm")
# Python keeps one module of a name: with another `utils` loaded, an import below would fail for no visible reason.
for _module in (sys.modules[name] for name in _MODULES if name in sys.modules):
    _place = getattr(_module, "__file__", None) or next(iter(getattr(_module, "__path__", [])), "of unknown origin")
    if not pathlib.Path(_place).resolve().is_relative_to(_FOLDER):
        raise ImportError(
            f"this process has loaded a module `{_module.__name__}`, {_place}, and the energy models need the one in "
            f"{_FOLDER}; load them in a process without the other one, or rename it"
        )

import checkpoint
import models
import sampling  # noqa: F401  (for those who load a model: later the folder is no longer on the path)
from ebm.readers import dsprites as _dsprites
from ebm.support import experiments as _experiments

dependencies = ["torch", "numpy", "tqdm"]
load_energy = checkpoint.load_energy


def _make_entry(name: str) -> _Callable[..., models.EnergyNetwork]:
    """Return the function that loads a shipped model, with a docstring that the model's checkpoint tells."""
    folder = _experiments.SHIPPED / name

    def load_shipped_model(**options: _Any) -> models.EnergyNetwork:
        return checkpoint.load_energy(folder, **options)

    state = checkpoint.load(checkpoint.find(folder, "latest"))
    settings, shape = state["flags"], ", ".join(map(str, state["config"]["image_shape"]))
    concepts = [concept for concept in _dsprites.CONCEPTS if settings[f"cond_{concept}"]]
    of_what = f"of the classes {', '.join(state['class_names'])}" if state["class_names"] else f"for {concepts[0]}"
    text = (
        f"model(images, labels) returns the energies (N,) of images (N, {shape}) in [0, 1] under labels "
        f"(N, {state['config']['label_size']}) {of_what}. model.settings are those of its training on "
        f"{settings['dataset']}, among them num_steps={settings['num_steps']} and step_lr={settings['step_lr']:g} "
        "of its Langevin chains. device: where to load it to, by default the CPU."
    )
    load_shipped_model.__name__ = name
    load_shipped_model.__doc__ = f"Return the shipped model {name} in eval mode.\n\n{textwrap.fill(text, 100)}\n"
    return load_shipped_model


globals().update({name: _make_entry(name) for name in _experiments.list_experiments(_experiments.SHIPPED)})
