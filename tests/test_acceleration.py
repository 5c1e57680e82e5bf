"""What makes chains fast gives the plain chain's images, and gives way where it fails: what a CPU can show of it."""

import contextlib
import dataclasses
import gc
import json
import weakref

import pytest
import torch

import sampling
from conftest import CONFIG, ENVIRONMENT, ROOT, SHAPE, make_model, make_run, make_state, run_python, train_on_noise
from ebm.settings import ChainPrecision, TrainSettings
from ebm.support import cli, hardware
from ebm.support.errors import UsageError
from ebm.training import acceleration
from ebm.training.acceleration import Acceleration, CannotCapture
from sampling import CannotCompile

PLAIN = TrainSettings(num_steps=3, step_lr=10.0, batch_size=8, num_chains=6, zero_kl=True, replay_batch=True)


def call_again(function, generator):
    """Stand in for `capture` on a CPU, which records nothing: what is launched again is the function itself."""
    before = generator.get_state()
    end = function()
    generator.set_state(before)
    return lambda: end.copy_(function()), end


def samples_of(own_acceleration, iterations=3):
    """Return the state after a run's iterations and the end points (iterations, 6, 1, 28, 28) of its chains."""
    state = make_state()
    state.acceleration = own_acceleration
    return state, train_on_noise(state, PLAIN, iterations)


@pytest.fixture(scope="module")
def expected():
    """The end points of the plain chain."""
    return samples_of(Acceleration())[1]


def test_captured_chains(monkeypatch, expected):
    """Breaks when a chain that was recorded once runs on the first weights, images or labels, or its end points are
    overwritten by the next."""
    monkeypatch.setattr(acceleration, "capture", call_again)
    _, captured = samples_of(Acceleration(captured=True))
    assert torch.equal(captured, expected)
    assert (captured[0] - captured[1]).abs().mean() > 0.01


def test_compiled_chains_of_scripts(monkeypatch):
    """Breaks when a smaller last batch is compiled, too, or a script does without what its user asked for."""
    chains, can_compile = [], True

    def run_chain(energy, x, *, generator, compiled=False):
        chains.append((len(x), compiled))
        moved = x + sampling.draw_noise(x, generator)
        if compiled and not can_compile:
            raise CannotCompile("no compiler")
        return moved

    def descend(number):
        generators = [torch.Generator().manual_seed(k) for k in range(number)]
        return scripts.descend(None, torch.zeros(number, 2), generator=generators)

    monkeypatch.setattr(acceleration, "langevin", run_chain)
    scripts = Acceleration(compiled=True)
    for number in (3, 3, 2):
        descend(number)
    assert chains == [(3, True), (3, True), (2, False)]
    can_compile = False
    with pytest.raises(UsageError, match=r"cannot be compiled \(no compiler\); run with `compile`=False"):
        descend(3)


def test_a_captured_chain_ends_with_its_run(monkeypatch):
    """Breaks when the graph holds the state that holds it: only the garbage collector, at any time, would free it."""
    monkeypatch.setattr(acceleration, "capture", call_again)
    state, _ = samples_of(Acceleration(captured=True), iterations=1)
    graph = weakref.ref(state.acceleration.graph)
    gc.disable()
    try:
        del state
        assert graph() is None
    finally:
        gc.enable()


def test_precisions_of_the_command_line():
    """Breaks when --precision offers what chains do not know, or leaves one out."""
    offered = [cli.list_flags(kind)["precision"].choices for kind in (TrainSettings, ChainPrecision)]
    assert offered == 2 * [("auto", *hardware.PRECISIONS)]


def test_chains_drawn_during_training_run_as_training_does(monkeypatch, tmp_path):
    """Breaks when fresh chains are computed in float32 whatever the run is in, or have a step of another shape compiled
    for them; when their energies are rounded, or images of a batch that is not full are left out."""
    seen = []

    def compile_step():
        def step(energy, x, *arguments):
            seen.append(tuple(x.shape))
            return sampling.langevin_step(energy, x, *arguments)

        return step

    monkeypatch.setattr(sampling, "compile_step", compile_step)
    images = []
    for precision in ("float32", "bf16"):
        state = make_state(precision=precision)
        state.acceleration.compiled = True
        run = make_run(state, tmp_path, num_chains=4, batch_size=8, step_lr=100.0)
        chains = run.sampler.draw_chains(6)
        images.append(chains.images)
        assert chains.energies.shape == (6,)
        labels = torch.eye(3)[torch.arange(6) % 3]
        with torch.no_grad():
            torch.testing.assert_close(chains.energies, state.model.eval()(chains.images, labels))
    assert seen == [(4, *SHAPE)] * 4  # two batches of four by each
    assert 0 < (images[0] - images[1]).abs().mean() < 0.01


# ---- what fails ----


def fail_to_compile():
    def step(*arguments):
        raise CannotCompile("no compiler")

    return step


def fail_to_capture(function, generator):
    torch.rand(3, generator=generator)  # a recording that breaks off has drawn some noise
    raise CannotCapture("not permitted")


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({"compiled": True}, ["cannot be compiled (no compiler); going on as with compile=False"]),
        ({"captured": True}, ["cannot be captured as a CUDA graph (not permitted); going on as with cuda_graph=False"]),
        ({"compiled": True, "captured": True}, ["CUDA graph", "compiled"]),
    ],
)
def test_what_fails_is_given_up(monkeypatch, expected, wanted, told):
    """Breaks when a failure that nobody asked for ends a run, goes unsaid, is said again, or costs noise."""
    monkeypatch.setattr(sampling, "compile_step", fail_to_compile)
    monkeypatch.setattr(acceleration, "capture", fail_to_capture)
    said = []
    state, samples = samples_of(Acceleration(**wanted, asked=frozenset(), say=said.append))
    assert torch.equal(samples, expected)
    assert len(said) == len(told) and all(words in line for words, line in zip(told, said, strict=True))
    assert not (state.acceleration.compiled or state.acceleration.captured)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"compiled": True}, r"cannot be compiled \(no compiler\); run with `compile`=False"),
        ({"captured": True}, r"CUDA graph \(not permitted\); run with `cuda_graph`=False"),
    ],
)
def test_what_was_asked_for_and_fails_ends_the_run(monkeypatch, wanted, message):
    """Breaks when --compile or --cuda_graph is replaced by something slower."""
    monkeypatch.setattr(sampling, "compile_step", fail_to_compile)
    monkeypatch.setattr(acceleration, "capture", fail_to_capture)
    with pytest.raises(UsageError, match=message):
        samples_of(Acceleration(**wanted, asked=frozenset(acceleration.REMEDIES)))


def overflow_in_fp16(weights, x, labels, compiled):
    """A chain whose images leave fp16's range, but not that of float32."""
    return x + (1e5 * weights["one"]).float() / 1e5


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("asked", [True, False])
def test_fp16_that_overflows(monkeypatch, asked, captured):
    """Breaks when images that are not finite in fp16 are handed on, by the old graph too, or what was asked for is
    replaced."""
    monkeypatch.setattr(acceleration, "capture", call_again)
    said = []
    names = frozenset({"precision"} if asked else ())
    chosen = Acceleration("fp16", captured=captured, asked=names, say=said.append)
    arguments = {"one": torch.ones(())}, torch.zeros(2), None, torch.Generator()
    if asked:
        with pytest.raises(UsageError, match="not finite in fp16; run with `precision`=tf32"):
            chosen.run(overflow_in_fp16, *arguments, repeated=True)
    else:
        assert chosen.run(overflow_in_fp16, *arguments, repeated=True).tolist() == [1.0, 1.0]
        assert chosen.precision == "tf32" and "going on as with precision=tf32" in said[0]


@pytest.mark.slow
def test_real_failures_of_the_compiler():
    """Breaks when a step that cannot be compiled, or the ninth shape in a process, ends in a traceback of torch's."""

    def step(energy, size=3):
        return sampling.langevin(energy, torch.rand(2, size), num_steps=1, step_lr=0.1, compiled=True)

    def depends_on_values(x):
        return x.sum(1) if x.sum() > 0 else x.square().sum(1)

    with pytest.raises(CannotCompile) as reason:
        step(depends_on_values)
    assert "\n" not in str(reason.value)
    with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(CannotCompile, match="too many shapes"):
        for size in (4, 5):
            step(lambda x: x.square().sum(1), size)


@pytest.mark.slow
def test_a_compiler_that_is_switched_off():
    """Breaks when TORCH_COMPILE_DISABLE=1, for which torch has no error of its own kind, ends a run."""
    program = """if True:
        import torch, sampling
        from ebm.training import acceleration
        def chain(weights, x, labels, compiled):
            energy = lambda x: x.square().sum(1)
            return sampling.langevin(energy, x, num_steps=1, step_lr=0.1, noise_std=0.0, compiled=compiled)
        chosen = acceleration.Acceleration(compiled=True, asked=frozenset())
        print(chosen.run(chain, {}, torch.ones(1, 2), None, torch.Generator(), repeated=True).tolist())
    """
    environment = ENVIRONMENT | {"TORCH_COMPILE_DISABLE": "1"}
    result = run_python("-c", program, cwd=ROOT, env=environment, check=True)
    note, end = result.stdout.splitlines()
    assert "cannot be compiled" in note and "going on as with compile=False" in note
    assert json.loads(end) == [[pytest.approx(0.8), pytest.approx(0.8)]]


# ---- what is set for a process, and how a graph is recorded ----


def test_tf32_is_for_what_is_inside():
    """Breaks when float32 means TF32, other precisions do not, or figures taken afterwards are rounded."""
    flags = [lambda: torch.backends.cudnn.allow_tf32, lambda: torch.backends.cuda.matmul.allow_tf32]
    before = [flag() for flag in flags]
    try:
        hardware.set_tf32(False)
        for precision in hardware.PRECISIONS:
            with contextlib.suppress(KeyError), hardware.allow_tf32(precision):
                assert [flag() for flag in flags] == 2 * [precision != "float32"]
                raise KeyError
            assert [flag() for flag in flags] == [False, False]
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(("version", "registered"), [("2.11.0", True), ("2.13.0+cu130", True), ("2.14.1", False)])
def test_recording(monkeypatch, version, registered):
    """Breaks when the garbage collector may run during a recording, noise is not recorded as drawn by its generator,
    a graph is told of it where torch warns of that, or the warm-up uses noise up."""
    events = []

    class Graph:
        def register_generator_state(self, generator):
            events.append("register")

        def replay(self):
            events.append("replay")

    class Stream:
        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def record(graph, pool, stream, capture_error_mode):
        events.append("record")
        yield

    monkeypatch.setattr(acceleration, "lend_copies", lambda generators: [])
    stand_ins = {"CUDAGraph": Graph, "Stream": Stream, "current_stream": Stream, "graph": record}
    stand_ins |= {"stream": lambda stream: contextlib.nullcontext(), "graph_pool_handle": lambda: (0, 0)}
    stand_ins |= {"current_device": lambda: 0, "default_generators": (torch.default_generator,)}
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    generator = torch.Generator().manual_seed(3)

    def draw():
        events.append(gc.isenabled())
        return torch.rand(2, generator=generator)

    replay, end = acceleration.capture(draw, generator)
    replay()
    assert events == [*["register"] * registered, False, "record", False, "replay"]
    assert gc.isenabled()
    assert torch.equal(end, torch.rand(2, generator=torch.Generator().manual_seed(3)))


def test_one_channel_is_convolved_by_the_library_but_on_cpus():
    """Breaks when a GPU, which would launch a kernel per image, takes the way by patches; a meta tensor stands in."""
    for label_size in (0, 3):
        model = make_model(dataclasses.replace(CONFIG, label_size=label_size))
        assert model.prepare()["c1_pre.kernel"].dim() < 4
        assert model.to("meta").prepare()["c1_pre.kernel"].dim() == 4
