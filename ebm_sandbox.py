"""Examine a trained energy model by one of the tasks below: classify, attack, detect outliers, restore, sample.

    python ebm_sandbox.py --task=label --exp=cifar10_wider_model_cond --resume_iter=21600 --lnorm=-1 --pgd=20 \\
        --num_steps=10 --lival=8 --wider_model
    python ebm_sandbox.py --task=mixenergy --exp=cifar10_large_model_uncond --svhnmix --cifar100mix --randommix
    python ebm_sandbox.py --task=boxcorrupt --exp=digits --limit=100

A round is a Langevin chain of --num_steps steps. As in the reference, images are examined without the noise that
training adds to them, but for those of SVHN, CIFAR-100, ImageNet and the textures. Pictures, arrays and
<task>.json go to <logdir>/<exp>/<task>/.
"""

from __future__ import annotations

from ebm.support import interruption

if __name__ == "__main__":
    interruption.guard_start()  # first of all, because importing PyTorch takes seconds

import dataclasses
import functools

import torch

from ebm.settings import SandboxSettings
from ebm.support import cli
from ebm.support.cli import flag
from ebm.support.hardware import set_up_process
from ebm.support.interruption import keep_what_is_done
from ebm.tasks.examined_model import ExaminedModel
from ebm.tasks.results import Results, own_results
from ebm.tasks.sandbox import ROUNDS, TASKS
from ebm.tasks.sandbox_data import list_outliers, load_model_split, load_outlier_set
from ebm.tasks.sandbox_run import Report, SandboxRun
from ebm.tasks.trained_models import check_network, find_checkpoint, load_split, open_model
from ebm.training.distributed import Workers, share_evaluation
from ebm.training.tuning import settle_precision


@dataclasses.dataclass(frozen=True)
class Settings(SandboxSettings):
    """Task"""

    task: str = flag("label", "the task to run, see above", choices=tuple(TASKS))


def main(settings: Settings) -> None:
    set_up_process()
    with share_evaluation(settings.device) as workers:
        folder = settings.results_folder / settings.task
        with own_results(folder, workers, "logdir") as results:
            examine_model(settings, workers, results)


def examine_model(settings: Settings, workers: Workers, results: Results) -> None:
    """Run the task, each worker on its share of the images, and write its report."""
    device = workers.device
    trained = open_model(find_checkpoint(settings), device, settings, ema=settings.ema)
    check_network(settings, trained)
    settings = settle_precision(settings, trained.model, workers)
    config = trained.model.config
    model = ExaminedModel(
        trained.model,
        torch.Generator(device).manual_seed(settings.seed),
        num_steps=trained.choose_num_steps(settings.num_steps, ROUNDS.get(settings.task, 1)),
        step_lr=trained.choose_step_lr(settings.step_lr),
        proj_norm=settings.proj_norm,
        rescale=trained.rescale,
        batch_size=settings.batch_size,
        precision=settings.precision,
        workers=workers,
    )
    load = functools.partial(load_model_split, settings=settings, trained=trained, device=device)
    load_mix = functools.partial(load_outlier_set, settings=settings, config=config, device=device)
    load_left_out = functools.partial(load_split, "test", trained, settings, device, left_out=True)
    is_class_left_out = trained.find_left_out("svhn" if settings.svhn else settings.dataset) is not None
    run = SandboxRun(
        model,
        settings,
        load=functools.cache(lambda split: workers.take_turns(functools.partial(load, split))),
        load_mix=lambda *words, **options: workers.take_turns(functools.partial(load_mix, *words, **options)),
        mixes=list_outliers(settings),
        results=results,
        names=trained.class_names,
        load_left_out=(lambda: workers.take_turns(load_left_out)) if is_class_left_out else None,
    )
    labels = f"{config.label_size} classes" if config.has_classes else f"labels of width {config.label_size}"
    kind = f"conditioned on {labels}" if config.label_size else "unconditional"
    print(f"model: {trained.path}, {config.network} with {config.num_filters} filters, {kind}, on {device}")
    print(f"task: {settings.task}")
    report = Report({})
    with keep_what_is_done(results.files):
        report = TASKS[settings.task](run)
    contents = {
        "task": settings.task,
        "checkpoint": str(trained.path),
        "network": dataclasses.asdict(config),
        "images": run.used,
        **results.describe_state(),
        "settings": cli.to_dict(settings)
        | {"step_lr": model.step_lr, "num_steps": model.num_steps, "batch_size": model.images_at_a_time},
        "figures": report.figures,
        "paper": report.paper,
    }
    results.report_figures(f"{settings.task}.json", contents)


if __name__ == "__main__":
    cli.run(main, Settings, cli.describe_tasks(__doc__, TASKS))
