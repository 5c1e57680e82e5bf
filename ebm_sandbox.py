"""Examine a trained energy model by one of the tasks below: classify, attack, detect outliers, restore, sample.

    python ebm_sandbox.py --task=label --exp=cifar10_wider_model_cond --resume_iter=21600 --lnorm=-1 --pgd=20 \\
        --num_steps=10 --lival=8 --wider_model
    python ebm_sandbox.py --task=mixenergy --exp=cifar10_large_model_uncond --svhnmix --cifar100mix --randommix
    python ebm_sandbox.py --task=boxcorrupt --exp=digits --limit=100

A round is a Langevin chain of --num_steps steps. Pictures, arrays and <task>.json go to <logdir>/<exp>/<task>/.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping

import torch

import cli
import data
from cli import flag
from ebm.settings import CONDITIONS, SUBSETS, SandboxSettings
from errors import UsageError
from evaluation import TrainedModel, check_network, find_checkpoint, load_split, open_model, prepare_device
from examined import ExaminedModel
from models import ModelConfig
from reports import make_folder, write_report
from sandbox_tasks import TASKS, SandboxRun


@dataclasses.dataclass(frozen=True)
class Settings(SandboxSettings):
    """Task"""

    task: str = flag("label", "the task to run, see above", choices=tuple(TASKS))


def find_condition(settings: SandboxSettings, label_size: int, trained: Mapping[str, object]) -> str | None:
    """Return the concept of a dSprites model: that of the settings, else of its training, else by its label width.

    trained: the flags of the training run. None means that the subset of its data determines the concept.
    """
    by_settings = [condition for name, condition in CONDITIONS.items() if getattr(settings, name)]
    by_training = [condition for name, condition in CONDITIONS.items() if trained.get(name)]
    by_width = None if any(trained.get(name) for name in SUBSETS) else {1: "size", 2: "pos"}.get(label_size, "shape")
    return (by_settings + by_training + [by_width])[0]


def load_own(split: str, settings: SandboxSettings, trained: TrainedModel, device: torch.device) -> data.Dataset:
    """Return a split of the data set to examine the model on; raise UsageError if it does not fit the model."""
    label_size = trained.model.config.label_size
    condition = find_condition(settings, label_size, trained.flags)
    name = "svhn" if settings.svhn else None
    dataset = load_split(split, trained, settings, device, name=name, condition=condition)
    if label_size and dataset.label_size != label_size:
        raise UsageError(
            f"`dataset`={dataset.name} has labels of width {dataset.label_size}, the model takes {label_size}"
        )
    return dataset


def load_outlier_set(name: str, settings: SandboxSettings, config: ModelConfig, device: torch.device) -> data.Dataset:
    """Return an out-of-distribution data set: that of this name, or the images of the folder at this path."""
    if name not in settings.mixfolder:
        return data.load_dataset(
            name,
            split="test",
            root=settings.datadir,
            device=device,
            workers=settings.data_workers,
            download=settings.download,
        )
    channels, size, _ = config.image_shape
    dataset = data.load_dataset(
        "folder",
        split="test",
        device=device,
        path=name,
        image_size=size,
        channels=channels,
        workers=settings.data_workers,
    )
    assert isinstance(dataset, data.StoredImages), "a folder is read into memory"
    return dataclasses.replace(dataset, name=pathlib.Path(name).resolve().name)


def list_outliers(settings: SandboxSettings) -> list[str]:
    """Return the out-of-distribution sets that the settings select: names, and paths of folders."""
    switches = {
        "svhn": settings.svhnmix,
        "cifar100": settings.cifar100mix,
        "textures": settings.texturemix,
        "random": settings.randommix,
        "interpolation": settings.interpolationmix,
    }
    names = [name for name, is_on in switches.items() if is_on] + list(settings.mixset)
    folders = [pathlib.Path(folder) for folder in settings.mixfolder]
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"`mixfolder`={folder}: no such folder")
    titles = names + [folder.resolve().name for folder in folders]
    twice = [title for title in titles if titles.count(title) > 1]
    if twice:
        raise UsageError(f"two sets of mixenergy are called {twice[0]}; give each set only once")
    return names + list(settings.mixfolder) or ["interpolation"]


def main(settings: Settings) -> None:
    device = prepare_device(settings.device)
    trained = open_model(find_checkpoint(settings), device, swish_act=settings.swish_act, ema=settings.ema)
    check_network(settings, trained)
    config = trained.model.config
    model = ExaminedModel(
        trained.model,
        torch.Generator(device).manual_seed(settings.seed),
        num_steps=settings.num_steps,
        step_lr=trained.choose_step_lr(settings.step_lr),
        proj_norm=settings.proj_norm,
        rescale=trained.rescale,
        batch_size=settings.batch_size,
        precision=settings.precision,
    )
    run = SandboxRun(
        model,
        settings,
        load=functools.cache(functools.partial(load_own, settings=settings, trained=trained, device=device)),
        load_mix=functools.partial(load_outlier_set, settings=settings, config=config, device=device),
        mixes=list_outliers(settings),
        folder=make_folder(pathlib.Path(settings.logdir) / settings.exp / settings.task, "logdir"),
        names=trained.class_names,
    )
    kind = f"conditioned on labels of width {config.label_size}" if config.label_size else "unconditional"
    print(f"model: {trained.path}, {config.network} with {config.num_filters} filters, {kind}, on {device}")
    print(f"task: {settings.task}, rounds of {model.num_steps} Langevin steps of {model.step_lr:g}")
    report = TASKS[settings.task](run)
    contents = {
        "task": settings.task,
        "checkpoint": str(trained.path),
        "network": dataclasses.asdict(config),
        "images": run.used,
        "settings": cli.to_dict(settings) | {"step_lr": model.step_lr, "batch_size": model.images_at_a_time},
        "figures": report.figures,
        "paper": report.paper,
    }
    write_report(run.path(f"{settings.task}.json"), contents, run.files)


if __name__ == "__main__":
    cli.run(main, Settings, cli.describe_tasks(__doc__, TASKS))
