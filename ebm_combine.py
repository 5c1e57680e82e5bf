"""Combine energy models of single concepts on dSprites; one --task at a time.

    python ebm_combine.py --task=train
    python ebm_combine.py --task=conceptcombine
    python ebm_combine.py --task=conceptcombine --combine="2*shape & pos & ~size" --labels=shape=heart
    python ebm_combine.py --task=conceptcombine --combine="shape & 1e-3*(1e3*pos | 1e3*pos2)" --labels=pos=0,0,pos2=1,1

train            train the four concept models one after the other; those begun go on
conceptcombine   images that fit several concepts at once, and how many do
labeldiscover    infer labels from images
gentest          train two concepts on two slices of the latents, sample the combinations never seen
genbaseline      a feed-forward generator trained on the same slices

--combine: alternate steps on one concept's energy after the other, sum on all of them; or an expression of energies:
`&` adds, `|` mixes (−logsumexp(−E)), `~` negates, `2*` weights. Its names are size, shape, pos, rot and those of
--models; pos2 is pos with the label of a second target. Trained energies differ little: weights, as above, sharpen a
mixture, which else is a mean. Networks are read from the checkpoints. Pictures, plots and <task>.json go to
--savedir/<exp>/<task>/.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib
import re
import shlex
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

import cli
import evaluation
from errors import UsageError

if TYPE_CHECKING:
    import torch

    import combine
    import dsprites
    import models

FLAGS = flags.FLAGS
TASKS = ("train", "conceptcombine", "labeldiscover", "gentest", "genbaseline")
CONCEPTS = ("size", "shape", "pos", "rot")  # in the order in which the reference visits them

# The published training command of each concept.
PUBLISHED = (
    "--dataset=dsprites --exp={exp} --zero_kl --num_steps=20 --step_lr=500.0 --swish_act --cond_{concept} "
    "--replay_batch -cclass"
)

with cli.group("Main"):
    flags.DEFINE_enum("task", "conceptcombine", TASKS, "what to do, see above")
    flags.DEFINE_string("logdir", "cachedir", "where the models' experiments are kept")
    flags.DEFINE_string("savedir", "cachedir", "where results go, into <exp>/<task>/")
    flags.DEFINE_string("exp", "combine", "name of the results' folder")
    flags.DEFINE_integer("batch_size", 256, "images at a time", lower_bound=1)
    flags.DEFINE_integer("limit", None, "images to make or look at; default a batch, 30 of labeldiscover", 1)
    flags.DEFINE_integer("seed", 0, "of everything random", lower_bound=0)
    flags.DEFINE_enum("device", "auto", ["auto", "cpu", "cuda"], "where to compute; auto takes a GPU if there is one")
    flags.DEFINE_string("dsprites_path", None, "the published .npz; without it sprites are drawn from their latents")

with cli.group("Concepts"):
    for _concept in CONCEPTS:
        flags.DEFINE_bool(f"cond_{_concept}", True, f"take the {_concept} of a sprite into account")
        flags.DEFINE_string(f"exp_{_concept}", f"dsprites_cond_{_concept}", f"experiment of the {_concept}'s model")
        flags.DEFINE_string(f"resume_{_concept}", "latest", "its iteration, 'best' or 'latest' (also -1)")
    flags.DEFINE_alias("cond_scale", "cond_size")
    flags.DEFINE_bool("ema", False, "take the averaged weights of runs with --ema_decay")
    flags.DEFINE_string("combine", "alternate", "alternate, sum, or an expression, see above")
    flags.DEFINE_multi_string(
        "weights", [], "conceptcombine: name=factor of an energy in alternate or sum, as pos=2; may be repeated"
    )
    flags.DEFINE_multi_string("models", [], "name=exp[:iteration], a further model for expressions; may be repeated")
    flags.DEFINE_multi_string(
        "labels", [], "name=label, as shape=heart, size=0.7, pos=0.2,0.8, rot=90; may be repeated"
    )

with cli.group("Sampling"):
    flags.DEFINE_integer("num_steps", 20, "rounds of Langevin dynamics, or steps on a label", lower_bound=0)
    flags.DEFINE_float("step_lr", 500.0, "step size of the gradient", lower_bound=0)
    flags.DEFINE_float("label_lr", 1.0, "labeldiscover: step size of the gradient on a label", lower_bound=0)
    flags.DEFINE_float(
        "first_noise",
        0.0,
        "conceptcombine: noise of the first rounds, from where it falls to 0.005; 0: that throughout",
        0,
    )
    flags.DEFINE_float(
        "first_step_lr",
        0.0,
        "conceptcombine: step size of the first rounds, from where it falls to --step_lr; 0: that throughout",
        0,
    )
    flags.DEFINE_integer("restarts", 1, "conceptcombine: chains per image, of which the lowest energy is kept", 1)
    evaluation.define_precision_flag()

with cli.group("Training"):
    flags.DEFINE_string("train_flags", "--max_iter=10000", "for train.py, behind the published flags of task train")
    flags.DEFINE_bool("train", False, "gentest: train anew, even where trained models are kept")
    flags.DEFINE_bool("joint_shape", False, "gentest, genbaseline: position with shape, not with size")
    flags.DEFINE_bool("joint_rot", False, "gentest, genbaseline: position with rotation, not with size")
    flags.DEFINE_integer("break_steps", 300, "gentest, genbaseline: training iterations", lower_bound=1)
    flags.DEFINE_float("lr", 1e-3, "gentest: learning rate of the energy models", lower_bound=0)
    flags.DEFINE_float("frac", 0.0, "genbaseline: share of the unseen combinations that is trained on", 0, 1)
    flags.DEFINE_bool("plot_curve", False, "genbaseline over --frac from 0 to 1")

with cli.group("Network (read from the checkpoint; what is given here is checked against it)"):
    flags.DEFINE_integer("num_filters", 64, "width; of what gentest and genbaseline train, too", lower_bound=1)
    flags.DEFINE_bool("cclass", True, "conditioned on the concept")
    flags.DEFINE_bool("spec_norm", True, "spectral normalisation")
    flags.DEFINE_bool("use_attention", False, "no network for sprites has attention")
    flags.DEFINE_bool("swish_act", True, "swish, as the published commands train; only TensorFlow's need to be told")

with cli.group("Accepted for old commands, without effect"):
    flags.DEFINE_integer("data_workers", 4, "sprites are in memory or drawn")
    flags.DEFINE_bool("proj_cclass", False, "labels enter the networks as they did in training")
    flags.DEFINE_bool("use_bias", True, "biases are what the checkpoint holds")


# ---- models ----


def pairs(flag: str) -> dict[str, str]:
    """Return the name=value pairs of a flag that may be repeated, or hold several by commas."""
    found = {}
    for text in filter(None, re.split(r",(?=[A-Za-z_]\w*=)", ",".join(getattr(FLAGS, flag)))):
        name, equals, value = text.partition("=")
        if not (name.isidentifier() and equals and value):
            raise UsageError(f"--{flag}={text}: expected name=value, name of letters and digits")
        found[name] = value
    return found


def factors() -> dict[str, float]:
    """Return the factors of --weights by concept; raise UsageError for other names, and for what is not above 0."""
    given = pairs("weights")
    if given and FLAGS.combine not in ("alternate", "sum"):
        raise UsageError("--weights goes with --combine=alternate and sum; an expression has its own, as 2*pos")
    found = {}
    for name, text in given.items():
        if name not in enabled():
            raise UsageError(f"--weights={name}={text}: {name} is not combined here, only {', '.join(enabled())}")
        with contextlib.suppress(ValueError):
            found[name] = float(text)
        if not 0 < found.get(name, 0) < math.inf:
            raise UsageError(f"--weights={name}={text}: expected a number above 0")
    return found


def published(concept: str) -> str:
    """Return the flags of train.py with which a concept's model is trained."""
    return PUBLISHED.format(exp=FLAGS[f"exp_{concept}"].value, concept=concept)


def sources(names: list[str]) -> dict[str, tuple[str, str, str]]:
    """Return for each name in an expression the experiment of its model, the iteration, and how to train it."""
    import combine

    given, found = pairs("models"), {}
    for name in names:
        concept = combine.split_name(name)[0]
        if name in given:
            exp, _, iteration = given[name].partition(":")
            found[name] = exp, iteration or "latest", f"python train.py --logdir={FLAGS.logdir} --exp={exp} …"
        elif concept in CONCEPTS:
            command = f"python train.py {published(concept)}"
            command += f" --logdir={FLAGS.logdir}" if FLAGS["logdir"].present else ""
            found[name] = getattr(FLAGS, f"exp_{concept}"), getattr(FLAGS, f"resume_{concept}"), command
        else:
            raise UsageError(
                f"--combine={FLAGS.combine}: there is no model {name}; "
                f"names are {', '.join([*CONCEPTS, *given])}, others are given by --models={name}=<exp>"
            )
    return found


def find_models(names: list[str]) -> dict[str, pathlib.Path]:
    """Return the checkpoints behind names; raise UsageError with a line for each that is missing."""
    import checkpoint

    paths, missing = {}, []
    for name, (exp, iteration, command) in sources(names).items():
        folder = pathlib.Path(FLAGS.logdir) / exp
        iteration = "latest" if iteration == "-1" else iteration
        try:
            paths[name] = checkpoint.find(folder, iteration)
        except UsageError:
            there = ", ".join(map(str, checkpoint.iterations(folder)[-8:])) or "no checkpoint"
            missing.append(f"  {name}: no {folder}/model_{iteration} (there is {there}); train it: {command}")
    if missing:
        raise UsageError("\n".join(["models are missing; --task=train trains all four", *dict.fromkeys(missing)]))
    return paths


def load_concepts(
    paths: dict[str, pathlib.Path], device: torch.device, chain_type: torch.dtype
) -> dict[str, combine.Concept]:
    """Return the models of these checkpoints; raise UsageError where they cannot be combined."""
    concepts = {name: load_concept(name, path, device, chain_type) for name, path in paths.items()}
    for name, concept in concepts.items():
        config = concept.model.config
        print(f"model {name}: {paths[name]}, {config.network} with {config.num_filters} filters, on {device}")
    shapes = {name: concept.model.config.image_shape for name, concept in concepts.items()}
    if len(set(shapes.values())) > 1:
        raise UsageError(f"models of images of different shapes cannot be combined: {shapes}")
    return concepts


def load_concept(name: str, path: pathlib.Path, device: torch.device, chain_type: torch.dtype) -> combine.Concept:
    """Return one model with its weights prepared; raise UsageError where it is conditioned on something else."""
    import checkpoint
    import combine
    import models

    model = checkpoint.load_energy(path, swish_act=FLAGS.swish_act, ema=FLAGS.ema, device=device)
    check_network(model.config, path)
    trained = checkpoint.load(path).get("flags", {}) if path.suffix == ".pt" else {}
    known = next((concept for concept in CONCEPTS if trained.get(f"cond_{concept}")), None)
    meant = combine.split_name(name)[0]
    if meant in CONCEPTS:
        if known not in (None, meant) or model.config.label_size != combine.LABEL_SIZES[meant]:
            kind = f"with --cond_{known}" if known else f"on labels of width {model.config.label_size}"
            raise UsageError(f"{path} was trained {kind}, it cannot be {name}; change --exp_{meant} or --models")
        known = meant
    return combine.Concept(model, models.spectral_norm_once(model, chain_type), known)


def check_network(config: models.ModelConfig, path: pathlib.Path) -> None:
    """Raise UsageError, which says what is right, for a flag that contradicts the checkpoint's network."""
    right = {"num_filters": config.num_filters, "cclass": config.label_size > 0, "spec_norm": config.spec_norm}
    right |= {"use_attention": config.use_attention, "swish_act": config.swish_act}
    for name, value in right.items():
        if FLAGS[name].present and FLAGS[name].value != value:
            raise UsageError(f"--{name}={FLAGS[name].value} does not fit {path}, where it is {value}; leave it out")


def enabled() -> list[str]:
    """Return the concepts that the flags leave on."""
    names = [concept for concept in CONCEPTS if FLAGS[f"cond_{concept}"].value]
    if not names:
        raise UsageError("no concept is left: --cond_size, --cond_shape, --cond_pos and --cond_rot are all off")
    return names


def names_needed() -> list[str]:
    """Return the names of the models that a task needs."""
    import composition

    if FLAGS.task not in ("conceptcombine", "labeldiscover"):
        return []
    if FLAGS.task == "labeldiscover" or FLAGS.combine in ("alternate", "sum"):
        return enabled()
    return list(dict.fromkeys(composition.parse(FLAGS.combine).names))


def load_sprites(device: torch.device) -> dsprites.Sprites:
    """Return all of dSprites, drawn when indexed, or the published file."""
    import torch

    import dsprites

    if FLAGS.dsprites_path is None:
        return dsprites.Sprites(dsprites.latents_of(torch.arange(dsprites.SIZE, device=device)))
    latents, bits = dsprites.read_published(FLAGS.dsprites_path)
    return dsprites.Sprites(latents.to(device), bits.to(device))


# ---- training the four models ----


def begun(folder: pathlib.Path) -> bool:
    """Return whether a run in this folder can go on; the models that come with the project are weights alone."""
    import checkpoint

    if not checkpoint.iterations(folder):
        return False
    path = checkpoint.find(folder, "latest")
    return path.suffix != ".pt" or "optimizer" in checkpoint.load(path)


def train() -> None:
    """Train the concepts' models one after the other with the published commands; those begun go on."""
    script = pathlib.Path(__file__).with_name("train.py")
    names = enabled()
    for number, concept in enumerate(names, 1):
        words = [*shlex.split(published(concept)), f"--logdir={FLAGS.logdir}", f"--device={FLAGS.device}"]
        words += [f"--dsprites_path={FLAGS.dsprites_path}"] if FLAGS.dsprites_path else []
        if begun(pathlib.Path(FLAGS.logdir) / getattr(FLAGS, f"exp_{concept}")):
            words.append("--resume_iter=latest")
        words += shlex.split(FLAGS.train_flags)
        print(f"model {number} of {len(names)}: python train.py {shlex.join(words)}", flush=True)
        status = run_to_end([sys.executable, str(script), *words])
        if status in (130, 143):  # a signal: train.py has saved
            print("stopped; the same command goes on")
            sys.exit(status)
        if status:
            raise UsageError(f"training of {concept} ended with status {status}; the same command goes on, once mended")


def run_to_end(command: list[str]) -> int:
    """Run a command to its end and return its status; a signal is left to it, so that it can save first."""
    process = subprocess.Popen(command)
    handlers = {
        signal.SIGINT: lambda number, frame: None,  # a terminal sends it to both
        signal.SIGTERM: lambda number, frame: process.send_signal(number),
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- one task ----


def write_report(run: combine.Run, figures: combine.Figures, paths: dict[str, pathlib.Path]) -> None:
    """Write <task>.json beside the task's other files; print the figures and the paths."""
    contents = {
        "task": FLAGS.task,
        "checkpoints": {name: str(path) for name, path in paths.items()},
        "networks": {name: dataclasses.asdict(concept.model.config) for name, concept in run.concepts.items()},
        "settings": cli.values(),
        "figures": figures,
        "files": [str(path) for path in run.files],
    }
    path = run.path(f"{FLAGS.task}.json")
    path.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n")
    print(cli.table(figures))
    for written in run.files:
        print(f"wrote {written}")


def main() -> None:
    for name in ("data_workers", "proj_cclass", "use_bias"):
        if FLAGS[name].present:
            print(f"note: --{name} has no effect: {FLAGS[name].help}")
    if FLAGS.joint_shape and FLAGS.joint_rot:
        raise UsageError("--joint_shape and --joint_rot exclude each other")
    if 0 < FLAGS.first_step_lr < FLAGS.step_lr:
        raise UsageError(
            f"--first_step_lr={FLAGS.first_step_lr:g} cannot fall to --step_lr={FLAGS.step_lr:g}; lower --step_lr"
        )
    if FLAGS.task == "train":
        train()
        return
    import torch

    import combine
    import distributed
    import unseen
    from acceleration import PRECISIONS, set_tf32
    from utils import keep_freed_memory

    keep_freed_memory()
    set_tf32(False)  # but in chains
    device = distributed.start("none", FLAGS.device).device
    given = {"labels": pairs("labels"), "weights": factors()}
    paths = find_models(names_needed())
    fields: dict[str, Any] = {field.name: FLAGS[field.name].value for field in dataclasses.fields(combine.Options)}
    options = combine.Options(**fields | given)
    folder = pathlib.Path(FLAGS.savedir) / FLAGS.exp / FLAGS.task
    tasks = {
        "conceptcombine": combine.conceptcombine,
        "labeldiscover": combine.labeldiscover,
        "gentest": unseen.gentest,
        "genbaseline": unseen.genbaseline,
    }
    if FLAGS.task in ("gentest", "genbaseline"):
        folder /= f"pos_{unseen.other_concept(options)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--savedir={FLAGS.savedir}: cannot make {folder} ({error.strerror})") from None
    generator = torch.Generator(device).manual_seed(FLAGS.seed)
    run = combine.Run(
        options, load_concepts(paths, device, PRECISIONS[FLAGS.precision]), load_sprites(device), generator, folder
    )
    write_report(run, tasks[FLAGS.task](run), paths)


if __name__ == "__main__":
    cli.run(main, __doc__)
