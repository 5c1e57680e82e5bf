"""Examine a trained energy model: classify, attack, detect outliers, restore, sample; one --task at a time.

    python ebm_sandbox.py --task=label --exp=cifar10_wider_model_cond --resume_iter=21600 --lnorm=-1 --pgd=20 \\
        --num_steps=10 --lival=8 --wider_model
    python ebm_sandbox.py --task=mixenergy --exp=cifar10_large_model_uncond --svhnmix --cifar100mix --randommix
    python ebm_sandbox.py --task=boxcorrupt --exp=digits --limit=100

label            classify test images by their energy under each class, also attacked (--pgd) and refined
labelfinetune    the same after one epoch of supervised training
energyeval       energies of training and test images
diagnose         chains of 50 rounds from noise and from test images: do they keep to the energy of the data?
mixenergy        tell test images from out-of-distribution images by their energy
anticorrupt      remove salt-and-pepper noise
boxcorrupt       inpaint the lower half of training and of test images: does the model memorise?
crossclass       turn images of one class into another
cycleclass       sample from noise, every stage of the chains
democlass        five samples of each class
nearestneighbor  samples beside their nearest training images
latent           move images along the directions in which the energy varies most

The network is read from the checkpoint. Pictures, arrays and <task>.json go to --logdir/<exp>/<task>/.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import TYPE_CHECKING, Any

from absl import flags

import cli
import evaluation
from cli import CONDITIONS, SIZES, SUBSETS
from errors import UsageError

if TYPE_CHECKING:
    import torch

    import models
    from evaluation import Trained
    from sandbox import AnyDataset
    from sandbox_tasks import Report, Run

FLAGS = flags.FLAGS
TASKS = (
    "label",
    "labelfinetune",
    "energyeval",
    "diagnose",
    "mixenergy",
    "anticorrupt",
    "boxcorrupt",
    "crossclass",
    "cycleclass",
    "democlass",
    "nearestneighbor",
    "latent",
)

with cli.group("Main"):
    flags.DEFINE_enum("task", "label", TASKS, "what to do, see above")
    evaluation.define_model_flags()
    flags.DEFINE_integer("limit", None, "look at this many images; by default at all, or as many as a picture shows", 1)
    flags.DEFINE_integer("batch_size", 32, "images at a time; lowered by itself where memory is short", lower_bound=1)

with cli.group("Data"):
    evaluation.define_data_flags()
    flags.DEFINE_bool("svhn", False, "the same as --dataset=svhn")
    flags.DEFINE_bool("single", False, "the same as --limit=1")
    for condition in ("shape", "size", "pos", "rot"):
        flags.DEFINE_bool(
            f"cond_{condition}", None, f"the dSprites model is conditioned on its {condition}; default as trained"
        )
    flags.DEFINE_alias("cond_scale", "cond_size")

with cli.group("Sampling"):
    flags.DEFINE_integer("num_steps", 20, "Langevin steps of a round, or of a refinement; 0: none", lower_bound=0)
    flags.DEFINE_float("step_lr", None, "step size of the gradient; default the model's in training, or 10", 0)
    flags.DEFINE_float("proj_norm", 0.0, "clip the gradient elementwise to this; 0: no clip", lower_bound=0)
    evaluation.define_precision_flag()

with cli.group("Classification"):
    flags.DEFINE_integer("pgd", 0, "steps of the attack on test images; 0: none", lower_bound=0)
    flags.DEFINE_enum("lnorm", "-1", ["-1", "2"], "norm of the attack's ball: -1 is L∞, 2 is L2")
    flags.DEFINE_float("lival", 8.0, "radius of the L∞ ball, in units of 1/255", lower_bound=0)
    flags.DEFINE_float("l2val", 40.0, "radius of the L2 ball, in units of 1/255", lower_bound=0)
    flags.DEFINE_integer("adaptive", 0, "attack through the refinement, averaging this many draws of its noise", 0)
    flags.DEFINE_float("refine", 8.0, "radius of the L∞ ball of the refinement, in units of 1/255", lower_bound=0)
    flags.DEFINE_bool("labelgrid", False, "task label over L∞ balls of 0 to 30/255, or L2 balls of 0 to 95/255")
    flags.DEFINE_bool("train", True, "task labelfinetune: train; --notrain loads what was trained before")

with cli.group("Out-of-distribution sets of mixenergy (several at once; none: --interpolationmix)"):
    flags.DEFINE_bool("svhnmix", False, "SVHN")
    flags.DEFINE_bool("cifar100mix", False, "CIFAR-100")
    flags.DEFINE_bool("texturemix", False, "Describable Textures")
    flags.DEFINE_bool("randommix", False, "Gaussian noise, 0.5 + 0.5·N(0, 1)")
    flags.DEFINE_bool("interpolationmix", False, "means of two test images")
    flags.DEFINE_list("mixset", [], "further data sets by name, such as mnist,digits")
    flags.DEFINE_multi_string("mixfolder", [], "a folder of images; may be given several times")

with cli.group("Directions of latent"):
    flags.DEFINE_bool("hessian", True, "of the energy's curvature; --nohessian: of the last features' change")

with cli.group("Network (read from the checkpoint; what is given here is checked against it)"):
    flags.DEFINE_bool("cclass", True, "conditioned on the class")
    flags.DEFINE_bool("large_model", False, "ResNet32Large")
    flags.DEFINE_bool("larger_model", False, "ResNet32Larger")
    flags.DEFINE_bool("wider_model", False, "ResNet32Wider")
    flags.DEFINE_bool("use_attention", False, "self attention in the residual networks")
    flags.DEFINE_bool("spec_norm", True, "spectral normalisation")
    flags.DEFINE_bool("swish_act", False, "swish; only a TensorFlow checkpoint needs to be told")

with cli.group("Accepted for old commands, without effect"):
    flags.DEFINE_string("datasource", "random", "where chains start is a matter of the task")
    flags.DEFINE_bool("bn", False, "no network here has batch normalisation")
    flags.DEFINE_bool("use_bias", True, "biases are what the checkpoint holds")


def check_network(config: models.ModelConfig, path: pathlib.Path) -> None:
    """Raise UsageError, which says what is right, for a flag that contradicts the checkpoint's network."""
    right = {name: network == config.network for name, network in SIZES.items()}
    right |= {"cclass": config.label_size > 0, "use_attention": config.use_attention}
    right |= {"spec_norm": config.spec_norm, "swish_act": config.swish_act}
    for name, value in right.items():
        if FLAGS[name].present and FLAGS[name].value != value:
            size = next((f" (--{flag})" for flag, network in SIZES.items() if network == config.network), "")
            kind = f"{config.network}{size}" if name in SIZES else f"--{name}={value}"
            raise UsageError(f"--{name}={FLAGS[name].value} does not fit {path}, which is {kind}; leave the flag out")


def sprite_condition(label_size: int, trained: dict[str, Any]) -> str | None:
    """Return what a dSprites model is conditioned on: by the flags, else its training, else the width of its labels.

    None: by what varies in the subset it was trained on.
    """
    given = [condition for name, condition in CONDITIONS.items() if FLAGS[name].value]
    known = [condition for name, condition in CONDITIONS.items() if trained.get(name)]
    guessed = None if any(trained.get(name) for name in SUBSETS) else {1: "size", 2: "pos"}.get(label_size, "shape")
    return (given + known + [guessed])[0]


def load_own(split: str, trained: Trained, device: torch.device) -> AnyDataset:
    """Return a split of the data set to examine the model on; raise UsageError where it does not fit the model."""
    label_size = trained.model.config.label_size
    condition = sprite_condition(label_size, trained.flags)
    name = "svhn" if FLAGS.svhn else None
    dataset = evaluation.load_split(split, trained, device, name=name, condition=condition)
    if label_size and dataset.label_size != label_size:
        raise UsageError(
            f"--dataset={dataset.name} has labels of width {dataset.label_size}, the model takes {label_size}"
        )
    return dataset


def load_mix(name: str, config: models.ModelConfig, device: torch.device) -> AnyDataset:
    """Return an out-of-distribution data set by its name, or the images of a folder, then under the folder's name."""
    import data

    common: dict[str, Any] = {"device": device, "workers": FLAGS.data_workers, "split": "test"}
    if name not in FLAGS.mixfolder:
        return data.load_dataset(name, root=FLAGS.datadir, download=FLAGS.download, **common)
    channels, size, _ = config.image_shape
    dataset = data.load_dataset("folder", path=name, image_size=size, channels=channels, **common)
    assert isinstance(dataset, data.Dataset), "a folder is read into memory"
    return dataclasses.replace(dataset, name=pathlib.Path(name).resolve().name)


def mixes() -> list[str]:
    """Return the out-of-distribution sets that the flags choose: names, and paths of folders."""
    named = {
        "svhn": FLAGS.svhnmix,
        "cifar100": FLAGS.cifar100mix,
        "textures": FLAGS.texturemix,
        "random": FLAGS.randommix,
        "interpolation": FLAGS.interpolationmix,
    }
    names = [name for name, given in named.items() if given] + FLAGS.mixset
    for folder in map(pathlib.Path, FLAGS.mixfolder):
        if not folder.is_dir():
            raise UsageError(f"--mixfolder={folder}: no such folder")
        names.append(folder.resolve().name)
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"two sets of mixenergy are called {twice[0]}; give each once, folders by different names")
    return names[: len(names) - len(FLAGS.mixfolder)] + FLAGS.mixfolder or ["interpolation"]


def write_report(run: Run, report: Report, checkpoint_path: pathlib.Path) -> None:
    """Write <task>.json beside the task's other files; print the figures and the paths."""
    contents = {
        "task": FLAGS.task,
        "checkpoint": str(checkpoint_path),
        "network": dataclasses.asdict(run.sandbox.model.config),
        "images": run.used,
        "settings": cli.values() | {"step_lr": run.sandbox.step_lr, "batch_size": run.sandbox.batch_size},
        "figures": report.figures,
        "paper": report.paper,
        "files": [str(path) for path in run.files],
    }
    path = run.path(f"{FLAGS.task}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n")
    print(cli.table(report.figures, report.paper))
    for written in run.files:
        print(f"wrote {written}")


def main() -> None:
    for name in ("datasource", "bn", "use_bias"):
        if FLAGS[name].present:
            print(f"note: --{name} has no effect: {FLAGS[name].help}")
    import torch

    import sandbox_tasks
    from sandbox import Sandbox

    device = evaluation.start()
    trained = evaluation.open_model(evaluation.find_checkpoint(), device)
    model, path, config = trained.model, trained.path, trained.model.config
    check_network(config, path)

    usual_step = trained.flags.get("step_lr", 10.0)
    sandbox = Sandbox(
        model,
        torch.Generator(device).manual_seed(FLAGS.seed),
        num_steps=FLAGS.num_steps,
        step_lr=usual_step if FLAGS.step_lr is None else FLAGS.step_lr,
        proj_norm=FLAGS.proj_norm,
        rescale=trained.flags.get("rescale", 1.0),
        batch_size=FLAGS.batch_size,
        precision=FLAGS.precision,
    )
    options: dict[str, Any] = {
        field.name: FLAGS[field.name].value for field in dataclasses.fields(sandbox_tasks.Options)
    }
    run = sandbox_tasks.Run(
        sandbox,
        sandbox_tasks.Options(**options | ({"limit": 1} if FLAGS.single else {})),
        load=functools.cache(functools.partial(load_own, trained=trained, device=device)),
        load_mix=functools.partial(load_mix, config=config, device=device),
        mixes=mixes(),
        folder=pathlib.Path(FLAGS.logdir) / FLAGS.exp / FLAGS.task,
        names=trained.class_names,
    )
    kind = f"conditioned on labels of width {config.label_size}" if config.label_size else "unconditional"
    print(f"model: {path}, {config.network} with {config.num_filters} filters, {kind}, on {device}")
    print(f"task: {FLAGS.task}, rounds of {sandbox.num_steps} Langevin steps of {sandbox.step_lr:g}")
    write_report(run, sandbox_tasks.TASKS[FLAGS.task](run), path)


if __name__ == "__main__":
    cli.run(main, __doc__)
