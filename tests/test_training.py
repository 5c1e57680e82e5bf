"""Objectives in closed form, the replay buffer, where chains start, and one training step of every kind."""

import dataclasses
import math
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

import checkpoint
import data
import models
from conftest import SHAPE, make_generator, make_run, make_state, train_once
from ebm.settings import TrainSettings
from ebm.support import hardware
from ebm.support.errors import UsageError
from ebm.training import setup
from ebm.training.chains import infer_labels, run_chains, run_hmc_chain
from ebm.training.classification import draw_test_images, measure_classification
from ebm.training.records import compute_label_entropy, compute_statistics
from ebm.training.run import read_batch
from train import classification_loss, contrastive_loss, keep_samples, start_chains
from utils import ReplayBuffer


def test_objectives():
    """Breaks when a coefficient, a sign or the weighting of an objective changes."""
    e_pos, e_neg = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0])
    assert contrastive_loss(e_pos, e_neg, TrainSettings())[0].item() == pytest.approx(1.0)
    assert contrastive_loss(e_pos, e_neg, TrainSettings(ml_coeff=2.0))[0].item() == pytest.approx(2.0)
    assert contrastive_loss(e_pos, e_neg, TrainSettings(l2_coeff=0.5))[1].item() == pytest.approx(0.5 * (5 + 2))
    weights = [1, math.exp(-2)]
    expected = 2 - (2 * weights[1]) / (sum(weights) + 1e-4)
    for objective, value in (("logsumexp", expected), ("softplus", math.log(1 + math.e))):
        likelihood, _ = contrastive_loss(e_pos, e_neg, TrainSettings(objective=objective))
        assert likelihood.item() == pytest.approx(value)
    with pytest.raises(ValueError, match="objective"):
        contrastive_loss(e_pos, e_neg, TrainSettings(objective="other"))


def test_logsumexp_weights_carry_no_gradient():
    """Breaks when the softmax weights are differentiated: then the weights' own gradient joins."""
    e_neg = torch.tensor([0.0, 2.0], requires_grad=True)
    contrastive_loss(torch.zeros(2), e_neg, TrainSettings(objective="logsumexp"))[0].backward()
    expected = torch.tensor([1.0, math.exp(-2)])
    torch.testing.assert_close(e_neg.grad, -expected / (expected.sum() + 1e-4))


def test_buffer_is_a_ring_of_bytes():
    """Breaks when the oldest images are not the ones overwritten, or a byte comes back outside its step."""
    buffer = ReplayBuffer(5, (1, 2, 2))
    for first in (0, 3):
        buffer.push(torch.stack([torch.full((1, 2, 2), (first + i) / 10) for i in range(3)]))
    assert len(buffer) == 5
    assert sorted(buffer.images[:, 0, 0, 0].tolist()) == [25, 51, 76, 102, 127]  # 0.0 is gone
    sample = buffer.sample(1000, torch.Generator().manual_seed(0))
    assert set((sample * 256).floor().long().flatten().tolist()) == {25, 51, 76, 102, 127}
    assert sample.min() >= 0 and sample.max() < 1


def test_buffer_round_trip_and_rescale():
    """Breaks when a saved buffer comes back with other images, another next place, or in another range."""
    buffer = ReplayBuffer(4, (1, 1, 1))
    buffer.push(torch.arange(6).view(6, 1, 1, 1) / 2, rescale=4.0)
    twin = ReplayBuffer(4, (1, 1, 1))
    twin.load_state_dict(buffer.state_dict())
    for each in (buffer, twin):
        each.push(torch.full((1, 1, 1, 1), 4.0), rescale=4.0)
    assert torch.equal(buffer.images, twin.images)
    smaller = ReplayBuffer(2, (1, 1, 1))
    smaller.load_state_dict(buffer.state_dict())
    assert smaller.images.flatten().tolist() == [int(2.5 / 4 * 255), 255]
    values = buffer.sample(100, torch.Generator().manual_seed(0), rescale=4.0)
    assert 3 < values.max() < 4


def test_resuming_without_the_buffer(tmp_path):
    """Breaks when a checkpoint with a replay buffer does not go on without --replay_batch, or says nothing."""
    saved, resumed, said = make_state(), make_state(), []
    saved.buffer.push(torch.rand(60, *SHAPE))
    saved.buffer.push(torch.rand(60, *SHAPE))  # a full ring that begins in the middle
    resumed.buffer = ReplayBuffer(0, SHAPE)
    contents = saved.get_shared_state() | {"workers": [saved.get_worker_state()]}
    checkpoint.save(tmp_path / "model_0.pt", contents)
    make_run(resumed, tmp_path, said, zero_kl=True).resume(tmp_path / "model_0.pt")
    assert len(resumed.buffer) == 0 and "a replay buffer of 100 images, which this run drops" in said[0]
    assert torch.equal(resumed.generator.get_state(), saved.generator.get_state())
    train_once(
        resumed, TrainSettings(zero_kl=True, num_steps=1), torch.rand(8, *SHAPE), torch.eye(3)[torch.arange(8) % 3]
    )


def test_chain_starts():
    """Breaks when replay takes over before the buffer holds more than a batch, or in another share than 95 % or what is
    asked for; when --datasource=both is not half and half."""
    state, images = make_state(), torch.full((8, *SHAPE), 0.5)
    settings = TrainSettings(replay_batch=True, batch_size=8)
    state.buffer.push(torch.zeros(8, *SHAPE))
    assert start_chains(state, settings, images, None).flatten(1).mean(1).gt(0.3).all()
    state.buffer.push(torch.zeros(1, *SHAPE))
    starts = [start_chains(state, settings, images, None).flatten(1).mean(1) < 0.1 for _ in range(100)]
    assert torch.cat(starts).float().mean().item() == pytest.approx(0.95, abs=0.03)
    settings = dataclasses.replace(settings, replay_rate=0.5)
    starts = [start_chains(state, settings, images, None).flatten(1).mean(1) < 0.1 for _ in range(100)]
    assert torch.cat(starts).float().mean().item() == pytest.approx(0.5, abs=0.06)
    near = start_chains(state, TrainSettings(datasource="default"), images, None)
    assert (near - images).std().item() == pytest.approx(0.3, rel=0.05)
    half = start_chains(state, TrainSettings(datasource="both"), images, None)
    assert (half - images)[:4].std().item() == pytest.approx(0.3, rel=0.05)
    assert half[4:].std().item() == pytest.approx(12**-0.5, rel=0.05) and half[4:].min() >= 0 and half[4:].max() <= 1


def test_gaussian_starts_have_the_moments_of_their_class():
    """Breaks when --datasource=gauss mixes the classes, forgets a direction, or scales mean or covariance wrongly; when
    the starts ignore --rescale, leave the range of pixels or differ under the same generator."""
    state = make_state(label_size=2, start_rank=3)
    starts, generator = state.model.starts, make_generator(1)
    directions = torch.linalg.qr(torch.randn(math.prod(SHAPE), 2, generator=generator)).Q.T
    factors = torch.tensor([[0.4, 0.2], [0.1, 0.3]])[:, :, None] * directions
    classes, means = torch.arange(4000) % 2, torch.tensor([[0.4], [0.6]])
    images = means[classes] + (torch.randn(4000, 1, 2, generator=generator) @ factors[classes]).squeeze(1)
    labels = torch.eye(2)[classes]
    starts.fit(images.view(-1, *SHAPE), labels)
    drawn = models.draw_starts(state.model, 4000, labels, make_generator(2)).flatten(1)
    assert drawn.min() >= 0 and drawn.max() <= 1
    for number in range(2):
        of_class = drawn[classes == number]
        assert (of_class.mean(0) - means[number]).abs().max() < 0.03
        covariance = factors[number].T @ factors[number]
        assert (of_class.T.cov() - covariance).norm() < 0.15 * covariance.norm()
    again = models.draw_starts(state.model, 4000, labels, make_generator(2), rescale=2.0).flatten(1)
    torch.testing.assert_close(again, 2 * drawn)
    settings = TrainSettings(datasource="gauss")
    state.generator.manual_seed(2)
    torch.testing.assert_close(start_chains(state, settings, images.view(-1, *SHAPE), labels).flatten(1), drawn)


def test_some_chains_start_from_noise_in_spite_of_gaussian_starts():
    """Breaks when another share of the chains than --noise_rate starts from noise, or others are replayed or kept."""
    state, images = make_state(label_size=0, start_rank=1), torch.full((8, *SHAPE), 0.3)
    state.model.starts.fit(images[:1], None)
    settings = TrainSettings(datasource="gauss", noise_rate=0.25, replay_batch=True, replay_rate=1.0)
    for _ in range(5):
        start = start_chains(state, settings, images, None)
        assert start[:2].std().item() == pytest.approx(12**-0.5, rel=0.1)  # uniform
        torch.testing.assert_close(start[2:], images[2:])
        keep_samples(state, settings, torch.zeros_like(images))
    assert len(state.buffer) == 10 > len(images)
    start = start_chains(state, settings, images, None)
    assert start[:2].max() < 1 / 255  # black, as bytes
    torch.testing.assert_close(start[2:], images[2:])
    without = dataclasses.replace(settings, datasource="random")
    assert start_chains(state, without, images, None).max() < 1 / 255  # all are replayed


def test_gaussian_starts_of_few_images():
    """Breaks when a class of one image, or of none, or fewer images than directions, cannot be fitted or drawn from."""
    state = make_state(label_size=3, start_rank=5)
    images = 0.45 + 0.1 * torch.rand(3, *SHAPE, generator=make_generator())
    state.model.starts.fit(images, torch.eye(3)[[0, 2, 2]])
    drawn = models.draw_starts(state.model, 30, torch.eye(3).repeat(10, 1), make_generator())
    torch.testing.assert_close(drawn[0], images[0])
    torch.testing.assert_close(drawn[1], torch.full(SHAPE, 0.5))
    line = (images[2] - images[1]).flatten()
    off = (drawn[2::3] - images[1]).flatten(1)
    along = (off @ line / (line @ line))[:, None] * line
    torch.testing.assert_close(off, along, rtol=0, atol=1e-5)


def test_starts_that_do_not_fit(monkeypatch):
    """Breaks when sprites, whose models are combined from noise, get starts, or starts that memory cannot hold."""
    setup.check_starts(models.ModelConfig("DspritesNet", (1, 64, 64), 4, 3))
    with pytest.raises(UsageError, match=r"`datasource`=gauss is not for sprites"):
        setup.check_starts(models.ModelConfig("DspritesNet", (1, 64, 64), 4, 3, start_rank=2))
    large = models.ModelConfig("MnistNet", (1, 28, 28), 4, 10, start_rank=64)  # 2 MB
    monkeypatch.setattr(setup, "find_free_memory", lambda: 9_000_000)
    setup.check_starts(large)
    monkeypatch.setattr(setup, "find_free_memory", lambda: 7_000_000)
    with pytest.raises(UsageError, match=r"`start_rank`=64 takes 0.0 GB"):
        setup.check_starts(large)


def test_a_run_on_one_image_starts_there(tmp_path):
    """Breaks when --single fits its starts to other images than the first, or another rank than 0 fits them."""
    for rank, place in ((0, 0.0), (1, 0.5)):
        state = make_state(label_size=0, start_rank=2)
        run = make_run(state, tmp_path, single=True)
        run.workers.rank = rank
        setup.fit_starts(run.settings, state, run.dataset, run.workers)
        first = run.dataset.raw(torch.zeros(1, dtype=torch.long)).flatten() / 256
        expected = first if rank == 0 else torch.full_like(first, place)
        torch.testing.assert_close(state.model.starts.mean[0], expected, rtol=0, atol=1 / 256)


def test_learning_rate_falls_along_half_a_cosine(tmp_path):
    """Breaks when the schedule ends before or after the run, forgets a rollback, or changes the published constant."""
    rates = {}
    for schedule in ("constant", "cosine"):
        run = make_run(make_state(), tmp_path, lr=0.8, lr_schedule=schedule, max_iter=8)
        rates[schedule] = []
        for run.state.iteration in range(9):
            run.set_learning_rate()
            rates[schedule].append(run.state.optimizer.param_groups[0]["lr"])
        run.rollbacks, run.state.iteration = 2, 4
        run.set_learning_rate()
        rates[schedule].append(run.state.optimizer.param_groups[0]["lr"])
    assert rates["constant"] == [0.8] * 9 + [0.2]
    expected = [0.4 * (1 + math.cos(math.pi * k / 8)) for k in range(9)] + [0.1]
    assert rates["cosine"] == pytest.approx(expected) and rates["cosine"][8] == pytest.approx(0, abs=1e-12)


def test_pcd_goes_on_from_the_last_end_points():
    """Breaks when --pcd restarts its chains."""
    state, images = make_state(), torch.rand(8, *SHAPE)
    labels = torch.eye(3)[torch.arange(8) % 3]
    settings = TrainSettings(pcd=True, zero_kl=True, num_steps=1)
    first = train_once(state, settings, images, labels)
    second = train_once(state, settings, images, labels)
    assert torch.equal(second.start, first.samples)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"zero_kl": True, "objective": "softplus"},
        {"zero_kl": True, "hmc": True, "num_steps": 1},
        {"zero_kl": True, "objective": "logsumexp", "temperature": 2.0, "rescale": 2.0},
        {"cclass": True, "classify": 0.1, "mismatch": 1.0},
        {"zero_kl": True, "model_cclass": True, "proj_norm": 0.01, "proj_norm_type": "l2"},
    ],
    ids=str,
)
def test_step(changes):
    """Breaks when an option leaves a parameter without gradient, the images' range, or the weights as they were."""
    state = make_state()
    settings = TrainSettings(**{"num_steps": 2, "batch_size": 8, **changes})
    images = settings.rescale * torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(1))
    before = [parameter.clone() for parameter in state.model.parameters()]
    step = train_once(state, settings, images, torch.eye(3)[torch.arange(8) % 3])
    assert step.loss.isfinite() and state.iteration == 1
    assert step.samples.min() >= 0 and step.samples.max() <= settings.rescale
    assert all(parameter.grad is not None for parameter in state.model.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, state.model.parameters(), strict=True))
    figures = compute_statistics(state, settings, step)
    assert figures["e_diff"] == pytest.approx(figures["e_pos"] - figures["e_neg"], abs=1e-5)
    assert figures["label_ent"] <= math.log(3) + 1e-5


def test_mismatched_labels():
    """Breaks when --mismatch weighs, pairs or regularises otherwise, when its energies stay out of the gradient, or
    when --num_chains runs, stores or reports another number of chains.
    """
    images = torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(1))
    labels = torch.eye(3)[torch.arange(8) % 3]
    chains_only, state = make_state(), make_state()
    settings = TrainSettings(num_steps=0, batch_size=8, zero_kl=True, num_chains=4, l2_coeff=0.5, replay_batch=True)
    weights = models.detach(state.model.prepare())
    e_data = state.model.energy(weights, images, labels)
    e_wrong = state.model.energy(weights, images[[7, 0, 1, 2, 3, 4, 5, 6]], labels)
    second = (e_data - e_wrong).mean() + 0.5 * (e_data.square() + e_wrong.square()).mean()

    first = train_once(chains_only, settings, images, labels)
    step = train_once(state, dataclasses.replace(settings, mismatch=3.0), images, labels)
    assert step.loss.item() == pytest.approx(first.loss.item() + 3 * second.item(), rel=1e-5)
    assert step.loss_ml.item() == pytest.approx(first.loss_ml.item(), rel=1e-5)  # the figure stays the reference's
    assert torch.allclose(step.e_wrong, e_wrong, atol=1e-6) and torch.allclose(step.e_pos, e_data[:4], atol=1e-6)
    assert len(step.samples) == len(step.images) == len(step.labels) == len(state.buffer) == 4
    figures = compute_statistics(state, settings, step)
    assert figures["e_wrong"] == pytest.approx(e_wrong.mean().item(), rel=1e-4)
    gradients = [model.stages["fc5"].weight.grad for model in (chains_only.model, state.model)]
    assert not torch.allclose(*gradients)


class EnergyTable(torch.nn.Module):
    """A network whose energy of an image under class k is the image's first row's pixel k, times a factor."""

    config = models.ModelConfig("MnistNet", SHAPE, num_filters=4, label_size=3)

    def energy(self, weights, images, labels):
        return weights["factor"] * (images[:, 0, 0, :3] * labels).sum(1)


def test_classification_loss_in_closed_form():
    """Breaks when the loss is not the mean cross-entropy of softmax(−scale · E), or its gradient for the energies not
    scale · (onehot − softmax) / N; when another class than the true one counts as recognised.
    """
    images = torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(1), requires_grad=True)
    classes, settings = torch.tensor([0, 1, 2, 1, 0]), TrainSettings(cclass=True, classify=2.0, classify_scale=7.0)
    labels, energy = torch.eye(3)[classes], models.PreparedEnergy(EnergyTable(), {"factor": torch.ones(())})
    loss, is_recognised = classification_loss(energy, energy(images, labels), images, labels, settings)
    energies = images.detach()[:, 0, 0, :3]
    assert loss.item() == pytest.approx(F.cross_entropy(-7 * energies, classes).item(), rel=1e-5)
    assert is_recognised.tolist() == (energies.argmin(1) == classes).tolist()
    (gradient,) = torch.autograd.grad(loss, images)
    torch.testing.assert_close(gradient[:, 0, 0, :3], 7 * (labels - (-7 * energies).softmax(1)) / 5)
    level = models.PreparedEnergy(EnergyTable(), {"factor": torch.zeros(())})  # all classes alike: nothing is known
    assert not classification_loss(level, level(images, labels), images, labels, settings)[1].any()


def test_classification_joins_the_loss():
    """Breaks when --classify weighs otherwise, draws random numbers, changes the other terms, or is left out of the
    gradient or the log; when a run without it computes more energies, or logs what it does not have.
    """
    images = torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(1))
    labels = torch.eye(3)[torch.arange(8) % 3]
    settings = TrainSettings(num_steps=1, batch_size=8, zero_kl=True, num_chains=4, cclass=True)
    steps, figures, gradients, calls = [], [], [], []
    for weight in (0.0, 3.0):
        state, chosen = make_state(), dataclasses.replace(settings, classify=weight)
        with mock.patch.object(state.model, "energy", wraps=state.model.energy) as energy:
            steps.append(train_once(state, chosen, images, labels))
        calls.append([len(call.args[1]) for call in energy.call_args_list])
        gradients.append(state.model.stages["fc5"].weight.grad)
        figures.append(compute_statistics(state, chosen, steps[-1]))
    without, joint = steps
    assert joint.loss.item() == pytest.approx(without.loss.item() + 3 * joint.loss_classify.item(), rel=1e-5)
    assert torch.equal(joint.samples, without.samples) and torch.equal(joint.loss_ml, without.loss_ml)
    assert calls == [[4, 8, 4], [4, 8, 4, 16]]  # the chain, data, samples; 8 images under the two other classes
    assert not torch.allclose(*gradients)
    assert figures[1]["loss_classify"] == pytest.approx(joint.loss_classify.item())
    assert figures[1]["accuracy"] == joint.is_recognised.float().mean()
    assert not {"loss_classify", "accuracy"} & set(figures[0])


def test_classification_is_learnt():
    """Breaks when the loss does not teach classes: digits of the test split are then guessed, one in ten."""
    digits, generator = data.load_dataset("digits"), torch.Generator().manual_seed(0)
    settings = TrainSettings(
        dataset="digits", cclass=True, classify=1.0, num_steps=1, step_lr=100.0, batch_size=32, zero_kl=True
    )
    state = make_state(label_size=10, num_filters=8)
    state.optimizer.param_groups[0]["lr"] = 1e-2
    examples = draw_test_images(settings, digits, torch.device("cpu"))
    assert len(examples.images) == 179 and torch.equal(
        examples.images, draw_test_images(settings, digits, torch.device("cpu")).images
    )
    figures = []
    for _ in range(2):
        figures.append(measure_classification(models.freeze_energy(state.model), examples, settings.classify_scale))
        for _ in range(40 * (len(figures) == 1)):
            index = torch.randint(len(digits), (32,), generator=generator)
            train_once(state, settings, *digits.batch(index, generator))
    assert figures[0].total_accuracy < 0.3 and figures[1].total_accuracy > 0.6
    assert all(0 <= each.expected_error <= 1 for each in figures)


def test_data_without_test_images(capsys, tmp_path):
    """Breaks when training images pass for test images, or a run ends because there are none."""
    draw = lambda dataset, **settings: draw_test_images(  # noqa: E731
        TrainSettings(dataset=dataset, cclass=True, classify=1.0, **settings),
        data.load_dataset("digits"),
        torch.device("cpu"),
    )
    assert draw("imagenet", imagenet_path=str(tmp_path)) is None
    assert "no accuracy on test images is measured: " in capsys.readouterr().out
    with mock.patch.object(data, "load_dataset", return_value=data.load_dataset("digits")):
        assert draw("digits") is None
    assert "those of digits are the training images" in capsys.readouterr().out
    assert draw("digits", train=False) is None and not capsys.readouterr().out


def test_precision_of_the_loss():
    """Breaks when bf16 stays out of the loss, or loses its gradients; when fp16, where they underflow, gets in."""
    images = torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(1))
    gradients = {}
    for precision in ("float32", "bf16", "fp16"):
        state = make_state(precision=precision)
        settings = TrainSettings(num_steps=0, batch_size=8, zero_kl=True)
        step = train_once(state, settings, images, torch.eye(3)[torch.arange(8) % 3])
        assert step.e_pos.dtype == torch.float32
        gradients[precision] = torch.cat([parameter.grad.flatten() for parameter in state.model.parameters()])
    assert torch.equal(gradients["fp16"], gradients["float32"])
    error = (gradients["bf16"] - gradients["float32"]).norm() / gradients["float32"].norm()
    assert 1e-4 < error < 0.1


def test_kl_term_reaches_the_weights_through_the_chain():
    """Breaks when the KL gradient is cut: with the other terms weighted 0, all that is left flows through the chain."""
    state = make_state()
    images, labels = torch.rand(4, *SHAPE), torch.eye(3)[torch.arange(4) % 3]
    settings = TrainSettings(ml_coeff=0.0, l2_coeff=0.0, num_steps=2, step_lr=10.0, batch_size=4)
    step = train_once(state, settings, images, labels)
    assert step.loss.item() == pytest.approx(step.loss_kl.item())
    assert state.model.stages["c1"].weight.grad.abs().max() > 0


def test_kl_term_in_16_bits():
    """Breaks when the KL term stays out of bf16, loses its gradient there, or gets into fp16, where it underflows."""
    images, labels = torch.rand(4, *SHAPE), torch.eye(3)[torch.arange(4) % 3]
    gradients = []
    for precision in ("float32", "bf16", "fp16"):
        state = make_state(precision=precision)
        settings = TrainSettings(ml_coeff=0.0, l2_coeff=0.0, num_steps=2, step_lr=10.0, batch_size=4)
        with mock.patch.object(state.model, "energy", wraps=state.model.energy) as energy:
            train_once(state, settings, images, labels)
        used = {call.args[0]["fc5.kernel"].dtype for call in energy.call_args_list}
        assert used == {hardware.LOSS_PRECISIONS[precision]}
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in state.model.parameters()]))
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert 1e-4 < error < 0.1
    assert torch.equal(gradients[2], gradients[0])


def test_inferred_labels_follow_the_energies():
    """Breaks when model_cclass samples from softmax(+E), or the entropy is not that of the mean label."""

    class Known(torch.nn.Module):
        config = models.ModelConfig("MnistNet", SHAPE, num_filters=4, label_size=2)

        def energy(self, weights, images, labels):
            return labels @ torch.tensor([0.0, math.log(3)])

    labels = infer_labels(make_state(), models.PreparedEnergy(Known(), {}), torch.zeros(4000, *SHAPE))
    assert labels[:, 0].mean().item() == pytest.approx(0.75, abs=0.03)
    labels = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]])
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert compute_label_entropy(labels).item() == pytest.approx(expected, rel=1e-4)


def test_batches_are_reproduced_and_single_overfits():
    """Breaks when --single shows more than one image, or labels reach an unconditional network."""

    class Numbers:
        def prefetch(self, index):
            assert len(index) == 8

        def batch(self, index, generator, rescale):
            return index.view(-1, 1, 1, 1).float().expand(-1, *SHAPE), torch.eye(3)[index % 3]

    state = make_state(label_size=0)
    images, labels = read_batch(state, TrainSettings(single=True), Numbers())
    assert labels is None and images.unique().numel() == 1
    images, _ = read_batch(state, TrainSettings(), Numbers())
    assert images[:, 0, 0, 0].unique().numel() == 8


def test_hmc_tells_its_acceptance_and_chains_how_far_they_moved():
    """Breaks when the acceptance is not the mean over moves and images, or the way is not measured from the start."""
    state, images = make_state(label_size=0), torch.rand(8, *SHAPE)
    settings = TrainSettings(zero_kl=True, hmc=True, num_steps=3, batch_size=8)
    step = train_once(state, settings, images, None)
    figures = compute_statistics(state, settings, step)
    assert figures["hmc_acceptance"] * 24 == pytest.approx(round(figures["hmc_acceptance"] * 24), abs=1e-4)
    assert figures["x_moved"] == pytest.approx((step.samples - step.start).abs().mean().item())
    flat = lambda x: 0 * x.flatten(1).sum(1)  # noqa: E731
    assert run_hmc_chain(flat, images, settings, state.generator)[1] == 1.0  # nothing to lose: all are accepted
    langevin = TrainSettings(zero_kl=True, num_steps=1)
    assert run_chains(state, langevin, models.freeze_energy(state.model), images, None)[1] is None
