"""The averaged weights: their closed form, in checkpoints and rollbacks, in samples, and on request in scripts."""

import pytest
import torch

import checkpoint
from conftest import GOLDEN, ROOT, SHAPE, is_same_state, make_run, make_state, run_python, train_once, write_checkpoint
from ebm.settings import TrainSettings
from ebm.support.errors import UsageError
from ebm.training.guard import DivergenceGuard


def with_average(label_size=3):
    state = make_state(label_size)
    state.ema = make_state(label_size).model.eval()
    return state


def steps(state, decay, number):
    """Train and return the parameters after each iteration."""
    seen = []
    for _ in range(number):
        images = torch.rand(4, *SHAPE, generator=state.generator)
        settings = TrainSettings(zero_kl=True, num_steps=1, batch_size=4, ema_decay=decay)
        train_once(state, settings, images, torch.eye(3)[torch.arange(4) % 3])
        seen.append([parameter.detach().clone() for parameter in state.model.parameters()])
    return seen


def test_closed_form():
    """Breaks when the decay, its warm-up (2/11, 3/12, then 0.26) or the copy of the spectral vectors is off."""
    state = with_average()
    expected = [parameter.detach().clone() for parameter in state.ema.parameters()]
    for decay, parameters in zip([2 / 11, 3 / 12, 0.26], steps(state, 0.26, 3), strict=True):
        expected = [decay * mine + (1 - decay) * new for mine, new in zip(expected, parameters, strict=True)]
    for mine, parameter in zip(expected, state.ema.parameters(), strict=True):
        torch.testing.assert_close(parameter, mine)
    assert all(map(torch.equal, state.ema.buffers(), state.model.buffers()))


def test_training_does_not_see_it():
    """Breaks when averaging draws random numbers or touches the weights that are trained."""
    plain, averaged = make_state(), with_average()
    steps(plain, 0.0, 2)
    steps(averaged, 0.9, 2)
    assert is_same_state(plain.model.state_dict(), averaged.model.state_dict())
    assert (
        is_same_state(plain.get_worker_state(), averaged.get_worker_state()) and plain.get_shared_state()["ema"] is None
    )


def test_a_rollback_restores_it():
    """Breaks when the average keeps what the diverged iterations put into it."""
    state, guard = with_average(), DivergenceGuard()
    steps(state, 0.5, 1)
    before = {name: tensor.clone() for name, tensor in state.ema.state_dict().items()}
    guard.remember(state)
    steps(state, 0.5, 1)
    assert not is_same_state(before, state.ema.state_dict())
    guard.roll_back(state)
    assert is_same_state(before, state.ema.state_dict())


def test_a_state_without_average_starts_one():
    """Breaks when an average goes on from old weights after a state without one was loaded."""
    state, other = with_average(), make_state()
    steps(other, 0.0, 1)
    state.load_shared_state(other.get_shared_state())
    assert is_same_state(state.ema.state_dict(), other.model.state_dict())


def test_load_energy(tmp_path):
    """Breaks when ema=True gives the current weights, False the averaged ones, or none are no clear line."""
    state = with_average(label_size=0)
    with torch.no_grad():
        state.ema.stages["c1"].weight.mul_(2).add_(1)
    checkpoint.save(tmp_path / "model_1.pt", state.get_shared_state())
    for ema, model in ((True, state.ema), (False, state.model)):
        assert is_same_state(checkpoint.load_energy(tmp_path / "model_1", ema=ema).state_dict(), model.state_dict())
    write_checkpoint(tmp_path / "model_2.pt")
    published = GOLDEN / "tf_checkpoints/dsprites_cond_pos/model_8000"
    for path in (tmp_path / "model_2", published):
        with pytest.raises(UsageError, match=r"has no averaged weights.*`ema`"):
            checkpoint.load_energy(path, ema=True)


def test_samples_are_of_the_averaged_weights(tmp_path):
    """Breaks when a run samples from the current weights though it averages."""
    state, other = with_average(), make_state()
    steps(state, 1.0, 2)
    other.model.load_state_dict(state.ema.state_dict())
    samples = [make_run(each, tmp_path).sampler.draw_chains(3).images for each in (state, other)]
    assert torch.equal(*samples)
    state.ema = None
    assert not torch.equal(samples[0], make_run(state, tmp_path).sampler.draw_chains(3).images)


def test_a_run_says_where_an_average_starts_or_ends(tmp_path):
    """Breaks when resuming with another --ema_decay drops an average, or starts one, without a word."""
    for state, resumed, words in (
        (with_average(), make_state(), "has averaged weights, which this run drops"),
        (make_state(), with_average(), "has no averaged weights; the average starts with its weights"),
    ):
        said = []
        checkpoint.save(tmp_path / "model_0.pt", state.get_shared_state())
        make_run(resumed, tmp_path, said).resume(tmp_path / "model_0.pt")
        assert words in said[0]


@pytest.mark.parametrize("script", ["ebm_sandbox.py", "imagenet_demo.py"])
def test_scripts_take_it_on_request(tmp_path, script):
    """Breaks when --ema does not reach the checkpoint: this one has no averaged weights."""
    write_checkpoint(tmp_path / "exp" / "model_1.pt")
    folder = "--modeldir" if script == "ebm_sandbox.py" else "--logdir"
    result = run_python(ROOT / script, "--exp=exp", f"{folder}={tmp_path}", "--ema")
    assert result.returncode == 2 and "model_1.pt has no averaged weights" in result.stderr
