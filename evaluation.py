"""What the scripts that examine a trained model share: their common flags, the model that these name, its data."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from cli import PATHS, PRECISIONS, SUBSETS
from errors import UsageError

if TYPE_CHECKING:
    import torch

    import models
    from sandbox import AnyDataset

FLAGS = flags.FLAGS


def define_model_flags() -> None:
    """Define the flags that choose a trained model, where results go, and where to compute."""
    flags.DEFINE_string("exp", "default", "name of the experiment, the model's folder below --modeldir")
    flags.DEFINE_string("modeldir", "cachedir", "where experiments are kept")
    flags.DEFINE_string("resume_iter", "latest", "the checkpoint's iteration, 'best' or 'latest' (also -1)")
    flags.DEFINE_bool("ema", False, "take the averaged weights of a run with --ema_decay")
    flags.DEFINE_string("logdir", "sandbox_cachedir", "where results go")
    flags.DEFINE_integer("seed", 0, "of everything random", lower_bound=0)
    flags.DEFINE_enum("device", "auto", ["auto", "cpu", "cuda"], "where to compute; auto takes a GPU if there is one")


def define_precision_flag() -> None:
    """Define what chains compute in."""
    flags.DEFINE_enum("precision", "float32", PRECISIONS, "of energies and gradients along chains, as in train.py")


def define_data_flags() -> None:
    """Define the flags that choose the data set to examine a model on."""
    flags.DEFINE_string("dataset", None, "as in train.py; default what the model was trained on, or cifar10")
    flags.DEFINE_string("datadir", "data", "where torchvision's datasets are kept or downloaded to")
    flags.DEFINE_bool("download", True, "download what is not there yet")
    flags.DEFINE_string("data_path", None, "the folder of images of --dataset=folder")
    flags.DEFINE_string("imagenet_path", None, "the 32x32 files of --dataset=imagenet, pickles or .npz")
    flags.DEFINE_string("imagenet_datadir", None, "TFRecords or class folders of --dataset=imagenetfull")
    flags.DEFINE_string("dsprites_path", None, "the published .npz; without it sprites are drawn from their latents")
    flags.DEFINE_integer("data_workers", 5, "threads that decode images from the disk", lower_bound=0)


def define_network_flags() -> None:
    """Define --swish_act, which a TF1 file cannot tell, and the flags of old commands that the checkpoint answers."""
    flags.DEFINE_bool("swish_act", False, "the network of a TF1 checkpoint was trained with swish")
    for inert in ("cclass", "large_model", "larger_model", "wider_model", "use_attention", "bn"):
        flags.DEFINE_bool(inert, False, "accepted for old commands")
    for inert in ("spec_norm", "use_bias"):
        flags.DEFINE_bool(inert, True, "accepted for old commands")


class Trained(NamedTuple):
    """A trained model in eval mode, the path of its checkpoint, the flags and the class names that this holds."""

    model: models.EnergyNetwork
    path: pathlib.Path
    flags: dict[str, Any]  # none of a TF1 checkpoint, which does not tell
    class_names: tuple[str, ...]


def start() -> torch.device:
    """Make ready for figures of float32, also on a GPU, and return where to compute."""
    import acceleration
    import distributed
    from utils import keep_freed_memory

    keep_freed_memory()
    acceleration.set_tf32(False)
    return distributed.start("none", FLAGS.device).device


def find_checkpoint() -> pathlib.Path:
    """Return the checkpoint that the flags name; raise UsageError saying what there is."""
    import checkpoint

    folder = pathlib.Path(FLAGS.modeldir) / FLAGS.exp
    if not folder.is_dir():
        raise UsageError(f"no experiment folder {folder}; give --modeldir and --exp of a trained model")
    return checkpoint.find(folder, "latest" if FLAGS.resume_iter == "-1" else FLAGS.resume_iter)


def open_model(path: pathlib.Path, device: torch.device) -> Trained:
    """Load a checkpoint; raise UsageError where it is damaged, or lacks the averaged weights that --ema asks for."""
    import checkpoint

    model = checkpoint.load_energy(path, swish_act=FLAGS.swish_act, ema=FLAGS.ema, device=device)
    saved = checkpoint.load(path) if path.suffix == ".pt" else {}
    return Trained(model, path, saved.get("flags", {}), tuple(saved.get("class_names", ())))


def load_split(
    split: str, trained: Trained, device: torch.device, *, name: str | None = None, condition: str | None = None
) -> AnyDataset:
    """Return a split of the named data set, else of the flags' one, else of that the model was trained on.

    condition: what the labels of sprites tell. Raises UsageError where the images do not fit the model.
    """
    import data

    name, config = name or FLAGS.dataset or trained.flags.get("dataset", "cifar10"), trained.model.config
    sprites, folder = name == "dsprites", name == "folder"
    dataset = data.load_dataset(
        name,
        split=split,
        root=FLAGS.datadir,
        device=device,
        path=FLAGS[PATHS[name]].value or trained.flags.get(PATHS[name]) if name in PATHS else None,
        image_size=config.image_shape[1] if folder else None,
        channels=config.image_shape[0] if folder else None,
        condition=condition if sprites else None,
        subset=next((SUBSETS[flag] for flag in SUBSETS if trained.flags.get(flag)), None) if sprites else None,
        workers=FLAGS.data_workers,
        download=FLAGS.download,
    )
    if dataset.image_shape != config.image_shape:
        raise UsageError(
            f"--dataset={name} has images of shape {dataset.image_shape}, the model takes {config.image_shape}"
        )
    return dataset
