"""Train an energy model on images; negatives are Langevin samples from a replay buffer.

    python train.py --exp=digits --dataset=digits --cclass --replay_batch --zero_kl --num_steps=20 --step_lr=100
    python train.py --exp=cifar10_cond --dataset=cifar10 --num_steps=60 --batch_size=128 --step_lr=10.0 \\
        --proj_norm=0.01 --zero_kl --replay_batch --cclass
    mpiexec -n 2 python train.py ... the same flags; each worker takes --batch_size images
    python train.py --exp=digits ... --resume_iter=latest

Checkpoints, logs and pictures go to --logdir/<exp>/.
"""

from __future__ import annotations

import checkpoint
import cli
import distributed
from ebm.settings import TrainSettings
from ebm.training.setup import (
    announce,
    build_state,
    check_settings,
    choose_network,
    last_iteration,
    measure_distance,
    open_dataset,
    open_folder,
    set_kernels,
)
from trainer import Cadence, Trainer
from utils import keep_freed_memory


def main(settings: TrainSettings) -> None:
    check_settings(settings)
    keep_freed_memory()
    workers = distributed.start(settings.backend, settings.device)
    set_kernels(settings, workers)
    dataset = open_dataset(settings, workers)
    state = build_state(settings, choose_network(settings, dataset), dataset, workers)
    is_resumed = settings.resume_iter != "-1"
    start = checkpoint.find(settings.folder, settings.resume_iter) if is_resumed else None
    is_first = workers.rank == 0
    if is_first:
        open_folder(settings.folder, is_resumed)
    measure = measure_distance(settings, dataset) if settings.quality and is_first else None
    cadence = Cadence(
        stop=last_iteration(settings, len(dataset), workers.size),
        log=settings.log_interval,
        save=settings.save_interval,
        test=settings.test_interval,
    )
    trainer = Trainer(
        state,
        settings,
        dataset,
        workers,
        settings.folder,
        cadence,
        flags=cli.to_dict(settings),
        seed=settings.seed,
        num_samples=settings.num_samples,
        sample_steps=10 * settings.num_steps if settings.sample_steps is None else settings.sample_steps,
        measure=measure,
        max_rollbacks=settings.max_rollbacks if settings.guard else None,
    )
    if start is not None:
        trainer.resume(start)
    if is_first:
        announce(settings, state, dataset, workers, cadence.stop)
    if settings.train:
        trainer.run()
    trainer.report()
    workers.close()


if __name__ == "__main__":
    cli.run(main, TrainSettings, __doc__)
