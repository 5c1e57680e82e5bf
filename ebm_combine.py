"""Combine energy models of single concepts on dSprites by one of the tasks below.

    python ebm_combine.py --task=train
    python ebm_combine.py --task=conceptcombine
    python ebm_combine.py --task=conceptcombine --combine="2*shape & pos & ~size" --labels=shape=heart
    python ebm_combine.py --task=conceptcombine --combine="shape & 1e-3*(1e3*pos | 1e3*pos2)" --labels=pos=0,0,pos2=1,1

--combine=alternate descends the energy of one concept after the other, --combine=sum their sum. An expression combines
energies: `&` adds them, `|` mixes them (−logsumexp(−E)), `~` negates one, `2*` weights one. The names in an expression
are size, shape, pos, rot and those of --models; pos2 is pos with the label of a second target. The energies of trained
models differ little, so that a mixture is close to their mean; weights as in the last example make it sharp. Networks
are read from the checkpoints. An image is right only if it overlaps a sprite by 0.9, else it counts as "no sprite"; the
column "by nearest" is the share that would be right if the nearest sprite counted for every image. Pictures, plots and
<task>.json go to <logdir>/<exp>/<task>/, or to <savedir>/<exp>/<task>/ if --savedir is given. --task=train trains in
--modeldir, or in --logdir if that is given.
"""

from __future__ import annotations

from ebm.support import interruption

if __name__ == "__main__":
    interruption.guard_start()  # first of all, because importing PyTorch takes seconds

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import torch

from ebm.readers import dsprites
from ebm.settings import CombineSettings
from ebm.support import cli
from ebm.support.cli import flag
from ebm.support.errors import UsageError
from ebm.support.hardware import set_up_process
from ebm.support.interruption import keep_what_is_done
from ebm.tasks import concepts, unseen
from ebm.tasks.concept_models import (
    find_models,
    find_starts,
    list_models,
    load_models,
    read_pairs,
    read_weights,
    train_models,
)
from ebm.tasks.results import Results, own_results
from ebm.training.distributed import Workers, find_launch, share_evaluation

TASKS: dict[str, Callable[..., Any]] = {
    "train": train_models,
    "conceptcombine": concepts.combine_concepts,
    "labeldiscover": concepts.discover_labels,
    "gentest": unseen.measure_product,
    "genbaseline": unseen.measure_generator,
}


@dataclasses.dataclass(frozen=True)
class Settings(CombineSettings):
    """Task"""

    task: str = flag("conceptcombine", "the task to run, see above", choices=tuple(TASKS))


def check_combination(settings: Settings) -> None:
    """Raise UsageError for settings that contradict each other."""
    if settings.task in ("gentest", "genbaseline") and (settings.use_attention or settings.cclass is False):
        name = "use_attention" if settings.use_attention else "cclass"
        raise UsageError(f"`{name}`: the networks of `task`={settings.task} have labels and no attention; leave it out")
    if settings.joint_shape and settings.joint_rot:
        raise UsageError("`joint_shape` and `joint_rot` exclude each other")
    if 0 < settings.first_step_lr < settings.step_lr:
        raise UsageError(
            f"`first_step_lr`={settings.first_step_lr:g} cannot fall to `step_lr`={settings.step_lr:g}; lower `step_lr`"
        )


def find_task_models(settings: Settings) -> dict[str, pathlib.Path]:
    """Return the paths of the checkpoints that the task uses, by name; only gentest can do without some."""
    if settings.task in ("conceptcombine", "labeldiscover"):
        return find_models(settings, list_models(settings, settings.task))
    if settings.task == "gentest":
        return find_starts(settings, ("pos", unseen.choose_other_concept(settings)))
    return {}


def load_all_sprites(path: str | None, device: torch.device) -> dsprites.Sprites:
    """Return all sprites of dSprites. path: the published file, or None to draw them when they are indexed."""
    if path is None:
        return dsprites.Sprites(dsprites.compute_latents(torch.arange(dsprites.SIZE, device=device)))
    latents, bits = dsprites.read_published(path)
    return dsprites.Sprites(latents.to(device), bits.to(device))


def find_task_folder(settings: Settings) -> pathlib.Path:
    """Return the folder for the results of the task."""
    folder = settings.results_folder / settings.task
    if settings.task in ("gentest", "genbaseline"):
        folder /= f"pos_{unseen.choose_other_concept(settings)}"
    return folder


def main(settings: Settings) -> None:
    if settings.task == "train":
        if find_launch().rank == 0:  # trainings are not shared out
            train_models(settings, pathlib.Path(__file__).with_name("train.py"))
        return
    set_up_process()
    check_combination(settings)
    with (
        share_evaluation(settings.device) as workers,
        own_results(find_task_folder(settings), workers, settings.results_setting) as results,
    ):
        run_task(settings, workers, results)


def run_task(settings: Settings, workers: Workers, results: Results) -> None:
    """Run the task, each worker on its share of the images, and write its report."""
    labels, weights = read_pairs("labels", settings.labels), read_weights(settings)
    paths = find_task_models(settings)
    models = load_models(settings, paths, workers.device)
    run = concepts.ConceptRun(
        settings,
        models,
        labels,
        weights,
        load_all_sprites(settings.dsprites_path, workers.device),
        torch.Generator(workers.device).manual_seed(settings.seed),
        results,
    )
    figures: concepts.Figures = {}
    with keep_what_is_done(results.files):
        figures = TASKS[settings.task](run)
    contents = {
        "task": settings.task,
        "checkpoints": {name: str(path) for name, path in paths.items()},
        "networks": {name: dataclasses.asdict(concept.config) for name, concept in run.concepts.items()},
        **results.describe_state(),
        "settings": cli.to_dict(settings),
        "figures": figures,
    }
    results.report_figures(f"{settings.task}.json", contents)


if __name__ == "__main__":
    cli.run(main, Settings, cli.describe_tasks(__doc__, TASKS))
