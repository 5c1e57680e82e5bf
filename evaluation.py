"""A trained model that a script examines: its checkpoint, what this tells of its training, and data that fits it."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import torch

import acceleration
import checkpoint
import data
import distributed
import models
from ebm.settings import SIZES, SUBSETS, CheckedNetwork, CombineNetwork, ModelChoice, TestData
from errors import UsageError
from utils import keep_freed_memory


class TrainedModel(NamedTuple):
    """A trained model in eval mode, the path of its checkpoint, and what this tells of its training."""

    model: models.EnergyNetwork
    path: pathlib.Path
    flags: dict[str, Any]  # of train.py, by name; none in a TensorFlow checkpoint
    class_names: tuple[str, ...]

    @property
    def rescale(self) -> float:
        """The model was trained on images in [0, rescale]."""
        return self.flags.get("rescale", 1.0)

    def choose_step_lr(self, step_lr: float | None) -> float:
        """Return the step size of Langevin steps: the given one, else that of training, else the reference's."""
        return self.flags.get("step_lr", 10.0) if step_lr is None else step_lr


def choose_device(device: str) -> torch.device:
    """Return where to compute; it is set for the process that GPUs give figures of float32."""
    keep_freed_memory()
    acceleration.set_tf32(False)
    return distributed.choose_device(device, distributed.Launch())


def find_checkpoint(settings: ModelChoice) -> pathlib.Path:
    """Return the checkpoint that the settings name; raise UsageError saying what there is."""
    folder = pathlib.Path(settings.modeldir) / settings.exp
    if not folder.is_dir():
        raise UsageError(f"no experiment folder {folder}; give `modeldir` and `exp` of a trained model")
    return checkpoint.find(folder, "latest" if settings.resume_iter == "-1" else settings.resume_iter)


def open_model(path: pathlib.Path, device: torch.device, *, swish_act: bool | None, ema: bool) -> TrainedModel:
    """Load a checkpoint; raise UsageError where it is damaged, or lacks the averaged weights that ema asks for.

    swish_act: whether a TensorFlow checkpoint was trained with swish.
    """
    model = checkpoint.load_energy(path, swish_act=bool(swish_act), ema=ema, device=device)
    saved = checkpoint.load(path) if path.suffix == ".pt" else {}
    return TrainedModel(model, path, saved.get("flags", {}), tuple(saved.get("class_names", ())))


def find_contradictions(
    settings: CheckedNetwork | CombineNetwork, config: models.ModelConfig
) -> dict[str, tuple[Any, Any]]:
    """Return the settings of a network that a checkpoint contradicts, by name: what was given, and what is there."""
    there = {name: network == config.network for name, network in SIZES.items()}
    there |= {"cclass": config.label_size > 0, "use_attention": config.use_attention}
    there |= {"spec_norm": config.spec_norm, "swish_act": config.swish_act}
    stored: dict[str, Any] = there | {"num_filters": config.num_filters}
    given = {name: getattr(settings, name, None) for name in stored}
    return {name: (given[name], stored[name]) for name in stored if given[name] not in (None, stored[name])}


def check_network(settings: CheckedNetwork | CombineNetwork, trained: TrainedModel) -> None:
    """Raise UsageError, which says what is right, for a setting that contradicts the checkpoint's network."""
    config = trained.model.config
    for name, (given, there) in find_contradictions(settings, config).items():
        size = next((f" (`{setting}`)" for setting, network in SIZES.items() if network == config.network), "")
        kind = f"{config.network}{size}" if name in SIZES else f"`{name}`={there}"
        raise UsageError(f"`{name}`={given} does not fit {trained.path}, which is {kind}; leave it out")


def note_contradictions(settings: CheckedNetwork, trained: TrainedModel) -> None:
    """Say which settings of a network have no effect, since the checkpoint contradicts them."""
    for name, (given, there) in find_contradictions(settings, trained.model.config).items():
        print(f"note: --{name}={given} has no effect: the checkpoint's network has {name}={there}")


def load_split(
    split: str,
    trained: TrainedModel,
    settings: TestData,
    device: torch.device,
    *,
    name: str | None = None,
    condition: str | None = None,
) -> data.Dataset:
    """Return a split of the named data set, else of that in the settings, else of that the model was trained on.

    condition: what the labels of sprites tell. Raises UsageError where the images do not fit the model.
    """
    name, config = name or settings.dataset or trained.flags.get("dataset", "cifar10"), trained.model.config
    source = data.DATASETS.get(name)
    path = source and source.path_setting
    is_sprites, is_folder = name == "dsprites", name == "folder"
    dataset = data.load_dataset(
        name,
        split=split,
        root=settings.datadir,
        device=device,
        path=settings.find_path(name) or trained.flags.get(path) if path else None,
        image_size=config.image_shape[1] if is_folder else None,
        channels=config.image_shape[0] if is_folder else None,
        condition=condition if is_sprites else None,
        subset=next((SUBSETS[each] for each in SUBSETS if trained.flags.get(each)), None) if is_sprites else None,
        workers=settings.data_workers,
        download=settings.download,
    )
    if dataset.image_shape != config.image_shape:
        raise UsageError(
            f"`dataset`={name} has images of shape {dataset.image_shape}, the model takes {config.image_shape}"
        )
    return dataset
