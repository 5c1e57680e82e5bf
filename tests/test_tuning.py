"""The way to compute chains: found by timing, kept for later runs, the same after a resume."""

import dataclasses
import json

import pytest
import torch

import models
from conftest import CONFIG, SHAPE, make_generator, make_model, make_state
from ebm.settings import SampleSettings, TrainSettings
from ebm.support.hardware import describe_processor
from ebm.training import chains, distributed, tuning
from ebm.training.tuning import Way
from sampling import CannotCompile

SETTINGS = TrainSettings(num_steps=2, step_lr=10.0, batch_size=8, zero_kl=True)
USUAL = Way(threads=4)


def measure_planted(cost):
    """Return a stopwatch by which a way takes the product of its fields' costs."""

    def measure(ways):
        return [cost(way) for way in ways]

    return measure


def test_each_field_is_varied_from_the_best_way_before_it():
    """Breaks when a slower way is chosen, a gain within the noise counts, or halving goes on past the best number."""
    asked = []

    def cost(way):
        asked.append(way)
        seconds = {4: 2.0, 2: 1.0, 1: 1.5}[way.threads]
        return (
            seconds
            * (0.5 if way.precision == "bf16" else 1)
            * (1.2 if not way.fold else 1)
            * (1 if way.patches else 0.97)
        )

    alternatives = {"precision": ["bf16"], "fold": [False], "patches": [False], "threads": [2, 1]}
    way, trials = tuning.find_fastest_way(measure_planted(cost), USUAL, alternatives)
    assert way == Way("bf16", fold=True, patches=True, threads=2, compiled=False)
    assert trials == [
        "bf16 2.00x", "pooling not folded 0.83x", "one channel directly 1.03x", "2 threads 2.00x", "1 thread 0.67x"
    ]  # fmt: skip
    assert all(way.precision == "bf16" for way in asked[2:])


def test_alternatives_are_those_that_can_differ(monkeypatch):
    """Breaks when time is spent on what changes nothing, or bf16 is tried where it was not compared."""
    monkeypatch.setattr(tuning, "can_compute_bf16", lambda: True)
    grey, colour = make_model(), make_model(models.ModelConfig("ResNet32Wider", (3, 8, 8), num_filters=2))
    every = {"precision": ["bf16"], "patches": [False]}
    assert tuning.list_alternatives(grey, allow_bf16=True) == every
    assert tuning.list_alternatives(grey, allow_bf16=False) == {"patches": [False]}
    assert tuning.list_alternatives(colour, allow_bf16=True) == {"fold": [False]}
    monkeypatch.setattr(tuning, "can_compute_bf16", lambda: False)
    for shape, names in ((CONFIG.image_shape, ["patches"]), ((3, 8, 8), [])):
        labelled = make_model(dataclasses.replace(CONFIG, image_shape=shape, label_size=3))
        assert list(tuning.list_alternatives(labelled, allow_bf16=True)) == names


def choose(model, batch_size=4, usual=None):
    """Return the way and the trials for a small network with patches to choose."""
    chain = chains.bind_chain(model, dataclasses.replace(SETTINGS, num_steps=1), make_generator())
    return tuning.choose_way(model, chain, batch_size, usual or Way(), {"patches": [False]})[:2]


def test_a_choice_is_kept_for_the_machine_the_network_and_the_batch(monkeypatch, tmp_path):
    """Breaks when every run times anew, so that two runs may compute in two ways, or one choice serves another case."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counts = []

    def time_ways(model, chain, count, ways):
        counts.append(count)
        return [0.5 if way.patches else 0.1 for way in ways]

    monkeypatch.setattr(tuning, "time_ways", time_ways)
    first = choose(make_model())
    assert first == (Way(patches=False), ["one channel directly 5.00x"]) and counts
    counts.clear()
    assert choose(make_model(seed=1)) == first and not counts
    for other in (lambda: choose(make_model(), batch_size=5), lambda: choose(make_model(), usual=Way(fold=False))):
        other()
        assert counts
        counts.clear()
    kept = json.loads((tmp_path / "ways.json").read_text())
    assert len(kept) == 3 and all(describe_processor() in json.loads(key)[0]["processor"] for key in kept)

    entry = next(iter(kept.values()))
    spoilt = [
        entry | {"way": way} for way in (["fp16", *entry["way"][1:]], ["float32", 1, 0, True, 0], [[], 1], [], None)
    ]
    spoilt += [entry | {"trials": ["\x1b[2J"]}, entry | {"seconds": -1.0}, entry | {"seconds": "1"}, {}, 3]
    texts = [json.dumps(dict.fromkeys(kept, each)) for each in spoilt] + [
        "[" * 900_000,
        '"' + "x" * 2_000_000 + '"',
        "\0",
    ]
    for text in texts:
        (tmp_path / "ways.json").write_text(text)
        assert choose(make_model()) == first and counts, text[:200]
        counts.clear()
    (tmp_path / "ways.json").unlink()
    (tmp_path / "ways.json").mkdir()  # a file that cannot be written
    assert choose(make_model()) == first and counts


def test_compiling_is_tried_for_long_runs_only(monkeypatch, tmp_path, capsys):
    """Breaks when a short run waits for the compiler, a long one does without its gain or ends where compiling fails, a
    failure is kept for good, or the other ways are tried compiled, which takes a minute for each."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "has_compiler", lambda: True)
    tried, fails = [], [True]

    def time_ways(model, chain, count, ways):
        tried.extend(ways)
        if any(way.compiled for way in ways) and fails:
            raise CannotCompile("no space")
        return [0.5 if way.compiled else 1.0 for way in ways]  # for each batch of one image

    monkeypatch.setattr(tuning, "time_ways", time_ways)

    def compile_run(stop, **settings):
        state = make_state(label_size=0)
        chosen = dataclasses.replace(SETTINGS, batch_size=1, num_steps=1, **settings)
        words = tuning.tune_compiler(state, chosen, distributed.join_workers("none", "cpu"), stop)
        return state.acceleration.compiled, words

    long, short = int(tuning.LONG_CHAINS) + 1, int(tuning.LONG_CHAINS) - 1
    assert compile_run(short) == (False, "") and not capsys.readouterr().out
    assert compile_run(long) == (False, "; the step cannot be compiled (no space)")
    assert "compiling a Langevin step" in capsys.readouterr().out
    fails.clear()
    assert compile_run(long) == (True, "; timed: steps compiled 2.00x")
    for settings in ({"compile": False}, {"zero_kl": False}, {"hmc": True}, {"tune": False}, {"train": False}):
        assert compile_run(long, **settings) == (False, ""), settings
    tried.clear()
    compiled = tuning.choose_way(make_model(), None, 1, Way(compiled=True), {"patches": [False]})
    assert compiled.way.compiled and tried and not any(way.compiled for way in tried)


def test_timing_changes_nothing():
    """Breaks when timing draws from a run's generators, moves its power iterations or leaves other threads behind."""
    state = make_state(label_size=0)
    before = state.get_draws()
    threads, draws = torch.get_num_threads(), torch.get_rng_state()
    chain = chains.bind_chain(state.model, dataclasses.replace(SETTINGS, num_steps=1), torch.Generator())
    ways = [Way(), Way(patches=False, threads=threads + 1)]
    assert all(0 < seconds < 10 for seconds in tuning.time_ways(state.model, chain, 2, ways))
    after = state.get_draws()
    assert torch.equal(before["generator"], after["generator"]) and torch.equal(draws, torch.get_rng_state())
    assert all(map(torch.equal, before["vectors"], after["vectors"])) and torch.get_num_threads() == threads


@pytest.mark.parametrize(("network", "label_size"), [("MnistNet", 0), ("MnistNet", 3), ("ResNet32", 0)])
def test_all_forms_give_the_same_energies(network, label_size):
    """Breaks when a form of the weights that timing may choose is another network, or forgets the labels."""
    model = make_model(models.ModelConfig(network, (1, 28, 28), num_filters=4, label_size=label_size))
    images = torch.rand(3, 1, 28, 28, generator=make_generator())
    labels = 3 * torch.rand(3, label_size, generator=make_generator()) if label_size else None
    forms = [models.WeightForm(fold=fold, patches=patches) for fold in (True, False) for patches in (True, False)]
    kernels = [model.prepare(form=form)["c1_pre.kernel"] for form in forms]
    assert [kernel.dim() == 4 for kernel in kernels] == [False, True, False, True]
    energies = [model.energy(model.prepare(form=form), images, labels) for form in forms]
    for other in energies[1:]:
        torch.testing.assert_close(other, energies[0], rtol=1e-4, atol=1e-6)
    model.form = forms[1]
    assert torch.equal(model(images, labels), energies[1])


def tune(state, contents=None, **settings):
    """Return the way of a run after tuning, and the line about it."""
    workers = distributed.join_workers("none", "cpu")
    words = tuning.tune_run(state, dataclasses.replace(SETTINGS, **settings), workers, contents or {})
    return tuning.get_way(state), words


def test_settings_and_checkpoints_come_before_timing(monkeypatch):
    """Breaks when a pinned field is varied, a resumed run computes in another way than it began with, or a run on a GPU
    takes over the way of a CPU."""
    asked = {}

    def choose_way(model, chain, batch_size, usual, alternatives):
        asked.update(alternatives)
        return tuning.Outcome(usual._replace(patches=False), ["x"], 1.0)

    def choose_threads(model, chain, batch_size, way):
        counted.append(way.threads)
        return way, []

    counted = []
    monkeypatch.setattr(tuning, "choose_way", choose_way)
    monkeypatch.setattr(tuning, "choose_threads", choose_threads)
    monkeypatch.setattr(tuning, "can_compute_bf16", lambda: False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    state = make_state(label_size=0)
    way, words = tune(state)
    assert not way.patches and not state.model.form.patches and asked == {"patches": [False]} and counted == [2]
    assert tuning.describe_way(state) == "float32, one channel directly, 2 threads, steps not compiled"
    assert words == "; timed: x"
    asked.clear()
    counted.clear()
    tune(make_state(label_size=0), patches=True, threads=2)
    assert not asked and not counted
    assert tune(make_state(label_size=0), tune=False)[0].patches and not asked

    kept = way._asdict() | {"on_cpu": True}
    assert tune(make_state(label_size=0), contents={"way": kept})[0] == way and not asked
    assert tune(make_state(label_size=0), contents={"way": kept}, patches=True)[0].patches
    assert tune(make_state(label_size=0), contents={"way": kept | {"on_cpu": False}})[1] == "; timed: x"  # moved here
    asked.clear()
    assert tune(make_state(label_size=0), contents={"precision": "bf16"})[0].precision == "bf16"  # of earlier versions
    for of_a_gpu in ("tf32", "fp16"):
        assert tune(make_state(label_size=0), contents={"precision": of_a_gpu})[0].precision == "float32"
    rounded = {"way": kept | {"precision": "bf16", "compiled": True}}
    assert tune(make_state(label_size=0), contents=rounded)[0][::4] == ("bf16", True)
    other = {"hmc": True, "given_names": frozenset({"hmc"})}  # chains that it did not have before
    assert tune(make_state(label_size=0), contents=rounded, **other)[0][::4] == ("float32", False)
    assert tune(make_state(label_size=0), contents={"way": kept | {"threads": 64}})[0].threads == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    asked.clear()
    counted.clear()
    tune(make_state(label_size=0))
    assert asked and not counted


def test_number_type_of_evaluations(monkeypatch, tmp_path, capsys):
    """Breaks when images depend on how many are asked for, bf16 is taken unasked where figures were not compared, or
    without a word, or a number type that is given is replaced."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    workers = distributed.join_workers("none", "cpu")

    def time_ways(model, chain, count, ways):
        assert count <= tuning.EVALUATED
        return [1.0 if way.precision == "bf16" else 3.0 for way in ways]

    def settle(network, shape, **settings):
        model = make_model(models.ModelConfig(network, shape, num_filters=2))
        return tuning.settle_precision(SampleSettings(**settings), model, workers).precision

    monkeypatch.setattr(tuning, "time_ways", time_ways)
    monkeypatch.setattr(tuning, "can_compute_bf16", lambda: True)
    assert settle("MnistNet", SHAPE) == settle("MnistNet", SHAPE, num=1, batch_size=1) == "bf16"
    assert capsys.readouterr().out.count("note: chains are computed in bf16; timed: bf16 3.00x; precision=") == 2
    assert settle("MnistNet", SHAPE, precision="float32") == "float32"
    assert settle("ResNet32Wider", (3, 8, 8)) == "float32"
    monkeypatch.setattr(tuning, "can_compute_bf16", lambda: False)
    assert settle("MnistNet", SHAPE) == "float32" and not capsys.readouterr().out


def test_threads_are_chosen_on_an_idle_machine_alone(monkeypatch):
    """Breaks when other work, for which all threads wait, leaves a long run with one thread, or halving has no end."""

    def time_ways(model, chain, count, ways):
        tried.extend(way.threads for way in ways)
        return [{8: 4.0, 4: 2.0, 2: 1.0, 1: 3.0}[way.threads] for way in ways]

    tried, load = [], [0.1]
    monkeypatch.setattr(tuning, "time_ways", time_ways)
    monkeypatch.setattr(tuning.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(tuning.os, "getloadavg", lambda: (load[0], 0.0, 0.0))
    way, trials = tuning.choose_threads(make_model(), None, 4, Way(threads=8, compiled=True))
    assert way == Way(threads=2, compiled=True) and trials[-1] == "1 thread 0.33x" and tried[0] == 8
    load[0] = 5.0
    tried.clear()
    assert tuning.choose_threads(make_model(), None, 4, Way(threads=8)) == (Way(threads=8), []) and not tried
