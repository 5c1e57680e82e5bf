"""Train an energy model on images; negatives are Langevin samples from a replay buffer.

    python train.py --exp=digits --dataset=digits --cclass --replay_batch --zero_kl --num_steps=20 --step_lr=100
    python train.py --exp=cifar10_cond --dataset=cifar10 --num_steps=60 --batch_size=128 --step_lr=10.0 \\
        --proj_norm=0.01 --zero_kl --replay_batch --cclass
    mpiexec -n 2 python train.py ... the same flags; each worker takes --batch_size images
    python train.py --exp=digits --resume_iter=latest goes on with a run and its settings; flags given now win

Checkpoints, logs and pictures go to --logdir/<exp>/.
"""

from __future__ import annotations

from ebm.support import interruption

if __name__ == "__main__":
    interruption.guard_start()  # first of all, because importing PyTorch takes seconds

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import models
from ebm.settings import TrainSettings
from ebm.support import cli
from ebm.support.hardware import LOSS_PRECISIONS, allow_tf32, set_kernel_choice, set_up_process
from ebm.training import distributed, resuming, setup, tuning
from ebm.training.chains import infer_labels, run_chains
from ebm.training.distributed import Workers
from ebm.training.estimate import check_cost
from ebm.training.ownership import FolderOwner, own_folder
from ebm.training.run import Run
from ebm.training.state import State, Step
from models import PreparedEnergy


def train(run: Run) -> None:
    """Train until the last iteration, or until a signal asks the run to end."""
    for images, labels in run.batches():
        with run.surround_iteration(), allow_tf32(run.state.acceleration.precision):
            start = start_chains(run.state, run.settings, images, labels)
            step = train_step(run.state, run.settings, images, labels, start, run.average_gradients)
        run.after(step)  # divergence guard, log, pictures, checkpoint, signals


def train_step(
    state: State,
    settings: TrainSettings,
    images: Tensor,
    labels: Tensor | None,
    start: Tensor,
    average_gradients: Callable[[], None],
) -> Step:
    """Run one iteration of the paper's algorithm 1: chains, energies of data and samples, loss, update.

    images: (batch_size, C, H, W) in [0, rescale], labels: (batch_size, label_size) or None. start: the images
    (N, C, H, W) that the chains start from. The chains take the labels of the batch's first N images, or inferred ones
    with `model_cclass`; their end points are contrasted with these images.
    average_gradients: replaces the gradients by their mean over all workers.
    """
    # The weights are normalised once, so that the chain, the loss and the update all see the same ones.
    energy, frozen = prepare_energies(state, settings)
    data, data_labels = images[: len(start)], None if labels is None else labels[: len(start)]
    chain_labels = infer_labels(state, frozen, data) if settings.model_cclass else data_labels

    # Negatives: Langevin chains down the energy. With the KL term the gradient flows back through them.
    ends, acceptance = run_chains(state, settings, frozen if settings.zero_kl else energy, start, chain_labels)
    samples = ends.detach()

    # Loss: energy down on data, up on samples.
    e_data, e_neg = compute_data_energies(energy, images, labels, settings), energy(samples, chain_labels)
    e_pos = e_data[: len(start)]
    loss_ml, regulariser = contrastive_loss(e_pos, e_neg, settings)
    loss_kl = kl_loss(energy, ends, data_labels, settings)
    loss_wrong, e_wrong = mismatch_loss(energy, e_data, images, labels, settings)
    loss_classify, is_recognised = classification_loss(energy, e_data, images, labels, settings)
    loss = loss_ml + regulariser + loss_kl + loss_wrong + settings.classify * loss_classify

    # Update: Adam on the mean gradient over workers.
    state.optimizer.zero_grad()
    loss.backward()
    average_gradients()
    state.optimizer.step()
    state.iteration += 1
    state.update_ema(settings.ema_decay)
    keep_samples(state, settings, samples)
    energies, losses = (e_pos, e_neg, e_wrong), (loss_ml, loss_kl, loss)
    classified = (loss_classify, is_recognised)
    return Step(
        data, start, samples, data_labels, chain_labels, frozen, *energies, *losses, *classified, acceptance
    ).detach()


def prepare_energies(state: State, settings: TrainSettings) -> tuple[PreparedEnergy, PreparedEnergy]:
    """Return the energy for the loss, differentiable in the weights, and the energy for chains, with frozen weights."""
    weights = state.model.prepare(update_u=not settings.spec_eval)
    learned = models.cast(weights, LOSS_PRECISIONS[state.acceleration.precision])
    return (
        PreparedEnergy(state.model, learned),
        PreparedEnergy(state.model, models.detach(weights)),
    )


def start_chains(state: State, settings: TrainSettings, images: Tensor, labels: Tensor | None) -> Tensor:
    """Return the images (N, C, H, W) that this iteration's chains start from: noise, draws, noised data or replays.

    images, labels: the batch. N is `num_chains`, by default the batch size.
    """
    images, generator, device = images[: settings.num_chains], state.generator, images.device
    if settings.pcd and state.previous is not None:
        return state.previous
    # The first chains start from noised data, the others from noise, or from the model's own distribution of starts.
    num_noised = {"default": len(images), "both": len(images) // 2}.get(settings.datasource, 0)
    starts, noised = [], images[:num_noised]
    if num_noised:
        starts.append(noised + 0.3 * torch.randn(noised.shape, generator=generator, device=device))
    if num_noised < len(images):
        start_labels = None if labels is None else labels[num_noised : len(images)]
        starts.append(
            models.draw_starts(state.model, len(images) - num_noised, start_labels, generator, settings.rescale)
        )
    start = torch.cat(starts)
    exploring = count_exploring(settings, len(images))
    if settings.explores:
        start[:exploring] = models.draw_noise_images(state.model.config, exploring, generator, settings.rescale)
    if settings.replay_batch and len(state.buffer) > len(images):
        replayed = state.buffer.sample(len(images), generator, settings.rescale)
        is_replayed = torch.rand(len(images), 1, 1, 1, generator=generator, device=device) < settings.replay_rate
        is_replayed[exploring:] = False
        start = torch.where(is_replayed, replayed, start)
    return start


def count_exploring(settings: TrainSettings, number: int) -> int:
    """Return how many of an iteration's chains, the first ones, may be replayed: all, or those of `noise_rate`."""
    return round(settings.noise_rate * number) if settings.explores else number


def keep_samples(state: State, settings: TrainSettings, samples: Tensor) -> None:
    """Keep the end points of the chains, so that later chains can start from them."""
    if settings.replay_batch:
        state.buffer.push(samples[: count_exploring(settings, len(samples))], settings.rescale)
    if settings.pcd:
        state.previous = samples


def compute_data_energies(
    energy: PreparedEnergy, images: Tensor, labels: Tensor | None, settings: TrainSettings
) -> Tensor:
    """Return the energies E⁺ of images (N, C, H, W) under their labels, (N,), or under every class, (N, classes).

    They are taken under every class with `model_cclass`, so that the loss averages over the classes.
    """
    if settings.model_cclass:
        return -models.compute_class_logits(energy, images, energy.model.config.label_size)
    return energy(images, labels)


def contrastive_loss(e_pos: Tensor, e_neg: Tensor, settings: TrainSettings) -> tuple[Tensor, Tensor]:
    """Return the likelihood term and the regulariser of the loss, both scalars.

    e_pos: energies E⁺ of data, (N,) or, of each image under every class, (N, classes). e_neg: energies E⁻ of negatives,
    (N,). The setting `objective` chooses the likelihood term, in which T is `temperature`:
    cd: ml_coeff · T · (mean E⁺ − mean E⁻), contrastive divergence (paper, equation 2).
    logsumexp: the same with negatives weighted by softmax(−T·E⁻); no gradient flows through these weights.
    softplus: ml_coeff · mean softplus(T · (E⁺ − E⁻)).
    The regulariser is l2_coeff · (mean E⁺² + mean E⁻²), without T.
    """
    pos, neg = settings.temperature * e_pos, settings.temperature * e_neg
    if settings.objective == "cd":
        likelihood = pos.mean() - neg.mean()
    elif settings.objective == "logsumexp":
        weights = (-(neg - neg.min())).exp().detach()
        likelihood = pos.mean() - (weights / (weights.sum() + 1e-4) * neg).sum()
    elif settings.objective == "softplus":
        likelihood = F.softplus(pos.view(len(neg), -1) - neg[:, None]).mean()
    else:
        raise ValueError(f"unknown objective {settings.objective!r}")
    regulariser = e_pos.square().mean() + e_neg.square().mean()
    return settings.ml_coeff * likelihood, settings.l2_coeff * regulariser


def kl_loss(energy: PreparedEnergy, ends: Tensor, labels: Tensor | None, settings: TrainSettings) -> Tensor:
    """Return the KL term, a scalar: the mean energy of the chains' end points, 0 with `zero_kl`.

    Its gradient reaches the weights only through the chains, which learn to end at lower energies of the frozen
    network. ends: the end points (N, C, H, W) with the autograd graph of the chains. labels: those of the batch, as in
    the reference also where the chains had inferred ones.
    """
    if settings.zero_kl:
        return ends.new_zeros(())
    return PreparedEnergy(energy.model, models.detach(energy.weights))(ends, labels).mean()


def mismatch_loss(
    energy: PreparedEnergy, e_data: Tensor, images: Tensor, labels: Tensor | None, settings: TrainSettings
) -> tuple[Tensor, Tensor | None]:
    """Return the contrastive loss of data against images with wrong labels, a scalar, and the energies of the latter.

    The wrong labels are those of other images of the batch (Reed et al. 2016, section 4.2). Without `mismatch` the
    loss is 0 and the energies are None.
    """
    if not settings.mismatch:
        return e_data.new_zeros(()), None
    e_wrong = energy(images.roll(1, 0), labels)
    contrast, regulariser = contrastive_loss(e_data, e_wrong, settings)
    return settings.mismatch * (contrast + regulariser), e_wrong


def classification_loss(
    energy: PreparedEnergy, e_data: Tensor, images: Tensor, labels: Tensor | None, settings: TrainSettings
) -> tuple[Tensor, Tensor | None]:
    """Return the cross-entropy of softmax(−classify_scale · E) over the classes, and whether each image is recognised.

    Added to the contrast of data and samples, it trains a joint energy model (Grathwohl et al. 2020). The classes are
    those of one-hot labels (N, classes). Without `classify` the loss is 0, and the other value None.
    """
    if not settings.classify or labels is None:
        return e_data.new_zeros(()), None
    count, classes = labels.shape
    # The energies under the true classes are known: only the classes after them, cyclically, are left.
    others = (labels.argmax(1, keepdim=True) + torch.arange(1, classes, device=labels.device)) % classes
    e_others = energy(images.repeat_interleave(classes - 1, 0), F.one_hot(others.flatten(), classes).to(labels.dtype))
    energies = torch.cat([e_data[:, None], e_others.view(count, -1)], 1)  # (N, classes), the true class first
    loss = F.cross_entropy(-settings.classify_scale * energies, labels.new_zeros(count, dtype=torch.long))
    return loss, e_data < energies[:, 1:].amin(1)  # equal energies recognise nothing


def main(settings: TrainSettings) -> None:
    set_up_process()
    workers = distributed.join_workers(settings.backend, settings.device)
    with own_folder(settings.folder, workers, lambda: resuming.check_folder(settings)) as owner:
        with workers.print_once():
            run = open_run(settings, workers, owner)
        if settings.train:
            train(run)
        run.report()
        workers.close()
        run.finish()


def open_run(settings: TrainSettings, workers: Workers, owner: FolderOwner) -> Run:
    """Return a run that is about to begin or to go on; until all checks have passed, the folder stays as it is."""
    path, contents = resuming.open_checkpoint(settings, workers)
    if path is not None:
        settings = resuming.recall_settings(settings, path, contents)
    cli.note_flags_without_effect(settings, settings.given_names)
    setup.check_settings(settings)
    setup.check_device(settings, workers)
    setup.check_trackers(settings, workers)
    if workers.device.type == "cuda":
        set_kernel_choice(deterministic=settings.deterministic)
    dataset = setup.open_dataset(settings, workers, contents.get("class_names", ()))
    state = setup.build_state(settings, setup.choose_network(settings, dataset), dataset, workers)
    run = Run(settings, state, dataset, workers, owner)
    trials = tuning.tune_run(state, settings, workers, contents)
    if path is None:
        with workers.busy():
            setup.fit_starts(settings, state, dataset, workers)
    else:
        run.resume(path, contents)
    cost = check_cost(train_step, state, settings, workers, run.stop, is_new=path is None)
    trials += tuning.tune_compiler(state, settings, workers, run.stop)
    if path is None:
        owner.start_afresh()
    run.prepare_measure()
    if workers.rank == 0:
        if settings.train:
            setup.write_config(settings, state, workers, run.stop)
        setup.announce_run(settings, state, dataset, workers, run.stop, trials, cost)
    return run


if __name__ == "__main__":
    cli.run(main, TrainSettings, __doc__)
