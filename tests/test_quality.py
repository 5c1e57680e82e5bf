"""Sample quality: the pool's bookkeeping, images that do not depend on the batch, features, caches, both scripts."""

import dataclasses
import hashlib
import importlib
import json
import math
import os
import pickle
import typing
import urllib.error

import numpy as np
import pytest
import torch

import data
import models
from conftest import (
    ENVIRONMENT,
    IMAGENET_BATCHES,
    Bomb,
    Planted,
    draw_bytes,
    draw_imagenet_batch,
    draw_sides,
    make_generator,
    make_model,
    make_progress,
    run_commands,
    write_checkpoint,
    write_pickle,
    write_random_inception,
)
from ebm.measures import features
from ebm.measures.features import RealImages
from ebm.settings import InceptionSettings, PoolSettings
from ebm.support import cli, metrics
from ebm.support.errors import UsageError
from ebm.support.metrics import mean_and_covariance
from ebm.support.pixels import to_bytes
from ebm.tasks import quality
from ebm.tasks.trained_models import TrainedModel

CONFIG = models.ModelConfig("MnistNet", (1, 2, 2), 1, label_size=10)


def plant(energy, config=CONFIG):
    """Return the prepared energy of a network whose energy is a given function of images and labels."""
    return models.freeze_energy(Planted(energy, config))  # type: ignore[arg-type]


def draw_small_pool(energies, number=0, step_lr=0.01, proj_norm=0.0, seed=0):
    """Return 50 images of a pool after two rounds of 25 new chains, of two steps each without noise."""
    settings = PoolSettings(im_number=1000 * number + 50, num_steps=2, noise_scale=0.0, batch_size=25, repeat_scale=1)
    return quality.draw_pool(
        number, list(map(plant, energies)), settings,
        step_lr=step_lr, proj_norm=proj_norm, seed=seed, device=torch.device("cpu"), progress=make_progress(),
    )  # fmt: skip


# ---- the pool; its rounds are compared with the reference's in test_golden_inception.py ----


def test_draws_of_a_pool():
    """Breaks when entries are not drawn evenly and with repetition, or labels or masks not at their rates."""
    draws = quality.PoolDraws(models.build_model(CONFIG), make_generator())
    counts = draws.draw_indices(1000, 100_000).bincount(minlength=1000).float()
    assert len(counts) == 1000 and counts.var() / counts.mean() == pytest.approx(1, rel=0.2)
    assert draws.draw_mask(100_000, 0.1).float().mean() == pytest.approx(0.1, rel=0.05)
    labels = draws.draw_labels(100_000)
    assert (labels.sum(1) == 1).all() and (labels.mean(0) - 0.1).abs().max() < 0.005
    unconditional = quality.PoolDraws(models.build_model(dataclasses.replace(CONFIG, label_size=0)), make_generator())
    assert unconditional.draw_labels(3).shape == (3, 0) and unconditional.draw_images(torch.zeros(3, 0)).shape == (
        3,
        1,
        2,
        2,
    )


def test_rounds_run_langevin_chains():
    """Breaks when the step sizes do not reach the chains, or a round runs another model of the ensemble.

    The first energy pulls every pixel up by 0.01 a step, the second down by 0.03, or 0.02 if its gradient is clipped.
    """
    energies = [lambda images, labels: -images.flatten(1).sum(1), lambda images, labels: 3 * images.flatten(1).sum(1)]
    start = draw_small_pool([lambda images, labels: 0 * images.flatten(1).sum(1)])
    inside = (start > 0.2) & (start < 0.9)
    for proj_norm, down in [(0.0, 0.06), (2.0, 0.04)]:
        change = draw_small_pool(energies, proj_norm=proj_norm) - start
        torch.testing.assert_close(change[:25][inside[:25]], torch.full_like(change[:25][inside[:25]], 0.02))
        torch.testing.assert_close(change[25:][inside[25:]], torch.full_like(change[25:][inside[25:]], -down))


class ScriptedDraws(quality.RehearsalDraws):
    """Draws for a pool of four entries: entry 0 twice, then 1 and 3, where the chain of entry 1 restarts."""

    def __init__(self):
        super().__init__(models.build_model(CONFIG), make_generator())
        self.indices = iter([torch.tensor([0, 0]), torch.tensor([1, 3])])
        self.masks = iter(torch.tensor([[0, 0], [0, 0], [1, 0], [0, 0]]).bool())

    def draw_indices(self, entries, number):
        return next(self.indices)

    def draw_mask(self, number, share):
        return next(self.masks)


def test_chains_that_lead_to_images():
    """Breaks when a chain counts whose result is replaced (entry 0), restarted from (1) or not taken (3), or others."""
    settings = PoolSettings(im_number=4, num_steps=1, batch_size=2, repeat_scale=2, nomix=0)
    for wanted, places in [(3, [[0], [0], [1], [0]]), (4, [[0], [0, 1], [1], [0, 1]]), (1, [[0], [], [1], []])]:
        used = quality.find_used_chains(lambda energy, x: x, ScriptedDraws(), settings, wanted)
        assert [each.tolist() for each in used] == places


def test_unused_chains_change_no_image(monkeypatch):
    """Breaks when the images of a pool are others because chains that lead to none of them evaluate no energy."""
    settings, counts = PoolSettings(im_number=30, num_steps=2, batch_size=9, repeat_scale=20, nomix=20), []

    def energy(images, labels):
        counts.append(len(images))
        return (images * (labels.argmax(1) - 4.0).view(-1, 1, 1, 1)).flatten(1).sum(1)

    def draw():
        return quality.draw_pool(
            0, [plant(energy)], settings,
            step_lr=0.01, proj_norm=0.0, seed=3, device=torch.device("cpu"), progress=make_progress(),
        )  # fmt: skip

    monkeypatch.setattr(quality, "RESTART_SHARE", 0.2)
    pool, used = draw(), sum(counts)
    monkeypatch.setattr(quality, "find_used_chains", lambda *_: [torch.arange(9)] * 40)
    torch.testing.assert_close(draw(), pool)
    assert len(pool) == 30 and used < 0.6 * (sum(counts) - used) == 0.6 * 2 * 40 * 9


def test_labels_reach_the_chains():
    """Breaks when chains run without the labels of the pool: pixels stop moving where the label is of class 0."""
    pool = draw_small_pool([lambda images, labels: -images.flatten(1).sum(1) * (1 - labels[:, 0])], step_lr=10.0)
    assert 35 < (pool == 1).flatten(1).all(1).sum() < 50


def test_pools_depend_on_their_numbers_alone():
    """Breaks when two pools have the same images, or a pool is another because others were drawn before."""
    energies = [lambda images, labels: images.flatten(1).sum(1)]
    pools = [draw_small_pool(energies, number, seed=seed) for number, seed in [(0, 0), (1, 0), (0, 1), (1, 0)]]
    assert torch.equal(pools[1], pools[3])
    assert not any(torch.equal(pools[k], pools[m]) for k, m in [(0, 1), (0, 2), (1, 2)])


def test_images_are_the_first_of_each_pool():
    """Breaks when a number that is no multiple of 1,000 is rounded, or a pool gives more than 1,000 images."""
    images = quality.draw_from_pools(lambda number: torch.full((1024, 1, 1, 1), number / 4), 2250)
    assert images.dtype == torch.uint8 and images.flatten().bincount()[[0, 64, 128]].tolist() == [1000, 1000, 250]
    with pytest.raises(UsageError, match="diverged"):
        quality.draw_from_pools(lambda number: torch.full((10, 1, 1, 1), math.nan), 10)


def test_bytes_are_those_of_the_reference():
    """Breaks when images are rounded to 255 steps: clip(256·x, 0, 255) gives every byte the same share."""
    levels = torch.tensor([-0.1, 0.0, 0.0039, 0.00391, 0.5, 0.9999, 1.0, 1.1])
    assert to_bytes(levels).tolist() == [0, 0, 0, 1, 128, 255, 255, 255]
    assert torch.equal(to_bytes((torch.arange(256) + 0.5) / 256), torch.arange(256).byte())


# ---- images from noise ----


def test_same_seed_same_images_whatever_the_batch_size():
    """Breaks when noise belongs to the batch instead of the image: its start, or that of any step."""
    model = make_model(models.ModelConfig("MnistNet", (1, 12, 12), 4, label_size=3))
    energy, labels = models.freeze_energy(model), torch.eye(3).repeat(4, 1)

    def sample(batch_size, number=12, seed=0):
        return quality.draw_fresh_images(
            energy, labels[:number], model,
            num_steps=5, step_lr=100.0, seed=seed, batch_size=batch_size, progress=make_progress(),
        )  # fmt: skip

    whole = sample(12)
    for batch_size in (1, 5, 100):
        assert torch.equal(sample(batch_size), whole)
    assert torch.equal(sample(12, number=4), whole[:4])
    assert (sample(12, seed=1) != whole).float().mean() > 0.5
    assert (whole[0] != whole[3]).any()  # one class, two images


def test_fresh_images_follow_the_chain_of_the_paper():
    """Breaks when a step forgets noise, gradient, clip or bounds: against the sum of all that on a linear energy."""
    config = models.ModelConfig("MnistNet", (1, 2, 2), 1)
    settings = {
        "num_steps": 3,
        "step_lr": 0.5,
        "noise_std": 0.1,
        "proj_norm": 0.02,
        "seed": 7,
        "progress": make_progress(),
    }
    images = quality.draw_fresh_images(
        plant(lambda images, labels: 9 * images.flatten(1).sum(1), config),
        torch.zeros(2, 0),
        models.build_model(config),
        **settings,
    )
    own = make_generator(7 * 1_000_003 + 1)
    x = torch.rand(1, 1, 2, 2, generator=own)[0]
    for _ in range(3):
        x = (x + 0.1 * torch.randn(1, 2, 2, generator=own) - 0.5 * 0.02).clamp(0, 1)
    assert torch.equal(images[1], to_bytes(x))


# ---- Inception ----


def test_inception_figures_are_those_of_torch_fidelity(tmp_path, monkeypatch):
    """Breaks when images, layers, softmax or the roles of real and sampled differ from torch-fidelity's own path.

    Its figure for the Fréchet distance is compared on some of the features, for time.
    """
    path = tmp_path / "weights.pth"
    write_random_inception(path)
    import torch_fidelity
    from torch_fidelity import metric_fid

    class Images(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images = images

        def __getitem__(self, i):
            return self.images[i]

        def __len__(self):
            return len(self.images)

    # Samples all like one real image: precise, without recall.
    real, change = (draw_bytes(5, 3, 8, 8, seed=s) for s in (0, 1))
    fake = real[:1] - real[:1] % 32 + change % 32
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(fake), input2=Images(real), cuda=False, isc=True, kid=True, prc=True, verbose=False,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(path), cache=False,
        isc_splits=2, samples_shuffle=False, kid_subsets=1, kid_subset_size=5, prc_neighborhood=3, save_cpu_ram=True,
    )  # fmt: skip

    state, sha256 = features.read_inception(path, hashlib.sha256(path.read_bytes()).hexdigest())
    inception = features.Inception(state, sha256)
    dataset = data.StoredImages("toy", real, None)
    reference = RealImages.choose("toy", "train", [dataset], 100)
    statistics = features.load_or_compute_statistics(inception, reference, tmp_path)
    monkeypatch.setattr(metrics, "frechet_distance", lambda *statistics: float(len(statistics[0])))
    patches = features.load_or_compute_patches(reference, tmp_path)
    ours = features.measure_quality(inception, fake, statistics, patches, splits=2)
    monkeypatch.undo()
    assert ours["Inception score"] - 1 == pytest.approx(theirs["inception_score_mean"] - 1, rel=1e-2)
    assert ours["IS deviation"] == pytest.approx(theirs["inception_score_std"], rel=1e-2)
    assert ours["KID"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-2)
    assert ours["precision"] == pytest.approx(theirs["precision"]) != ours["recall"]
    assert ours["recall"] == pytest.approx(theirs["recall"])
    assert ours["FID"] == 2048  # of all features

    a, b = statistics.features[:, :20], inception(fake)[0][:, :20]
    parts = [metric_fid.fid_features_to_statistics(part) for part in (a, b)]
    fid = metric_fid.fid_statistics_to_metric(*parts, verbose=False)["frechet_inception_distance"]
    assert metrics.frechet_distance(*mean_and_covariance(a), *mean_and_covariance(b)) == pytest.approx(fid, rel=1e-4)


def test_weights_that_are_not_the_released_ones(tmp_path, monkeypatch):
    """Breaks when a missing, other, damaged or harmful file gives more than one line, or runs."""
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    (tmp_path / "harmful.pth").write_bytes(pickle.dumps(Bomb(os.mkdir, "exploded"), 2))
    (tmp_path / "damaged.pth").write_bytes(b"PK\x03\x04")

    def message(name, **given):
        with pytest.raises(UsageError) as error:
            features.Inception(*features.read_inception(tmp_path / name, **given))
        assert "\n" not in str(error.value) and "`inception_weights`" in str(error.value)
        return str(error.value)

    assert "cannot be read" in message("missing.pth")
    assert "SHA-256" in message("other.pth") and "`inception_sha256`" in message("other.pth")
    assert "another network" in message("other.pth", sha256="")
    assert "not loaded" in message("harmful.pth", sha256="")
    assert "not loaded" in message("damaged.pth", sha256="")
    assert not (tmp_path / "exploded").exists()


def test_weights_are_found_or_downloaded_or_asked_for(tmp_path, monkeypatch):
    """Breaks when the cache folder is not looked into, a download is not checked, or its failure is a traceback."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    asked = []

    def download(url, path, hash_prefix):
        asked.append(hash_prefix)
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(UsageError, match=r"no network here.*`inception_weights`") as error:
        features.find_or_download_inception()
    assert "\n" not in str(error.value) and asked == [features.INCEPTION_SHA256]
    with pytest.raises(UsageError, match="`download`=False"):
        features.find_or_download_inception(download=False)
    path = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    path.touch()
    assert features.find_or_download_inception() == path and len(asked) == 1


# ---- real images ----


class Means:
    """Features that are the mean colour and some pixels; it counts its calls."""

    name = "means"
    identity = "1"
    calls = 0

    def __call__(self, images):
        self.calls += 1
        flat = images.flatten(1).float()
        return flat[:, :5], flat.softmax(1)


def toy(images):
    return RealImages.choose("toy", "train", [data.StoredImages("toy", images, None)], 1000)


def test_statistics_are_computed_once(tmp_path, capsys):
    """Breaks when they are computed again, or kept for other images or other weights, or a damaged file is fatal."""
    images, _ = draw_sides(20, (1, 8, 8))
    extractor = Means()
    first = features.load_or_compute_statistics(extractor, toy(images), tmp_path)
    again = features.load_or_compute_statistics(extractor, toy(images), tmp_path)
    assert extractor.calls == 1 and torch.equal(first.covariance, again.covariance)
    torch.testing.assert_close(first.mean, images.flatten(1)[:, :5].double().mean(0))

    other = images.clone()
    other[3] ^= 1
    features.load_or_compute_statistics(extractor, toy(other), tmp_path)
    assert extractor.calls == 2
    extractor.identity = "2"
    features.load_or_compute_statistics(extractor, toy(images), tmp_path)
    assert extractor.calls == 3

    for path in tmp_path.iterdir():
        path.write_bytes(b"damaged")
    capsys.readouterr()
    features.load_or_compute_statistics(extractor, toy(images), tmp_path)
    assert extractor.calls == 4 and "is damaged and is computed again" in capsys.readouterr().out


def test_reference_keeps_images_with_their_classes():
    """Breaks when an image meets another's class, a split is lost, or a limited set is not the same every time."""
    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1)
    labels = torch.arange(40)
    parts = [data.StoredImages("toy", images[:30], labels[:30]), data.StoredImages("toy", images[30:], labels[30:])]
    reference = RealImages.choose("toy", "both", parts, 25)
    found = torch.cat(list(reference.batches(reference.numbers))).flatten()
    assert torch.equal(found, reference.classes()) and len(found.unique()) == 25 and found.max() >= 30
    assert torch.equal(RealImages.choose("toy", "both", parts, 25).numbers, reference.numbers)
    assert "25 of 40 images of train and test" in str(reference)
    assert len(RealImages.choose("toy", "both", parts, 100)) == 40


def test_classifier_is_kept_and_scores_perfect_images(tmp_path, capsys):
    """Breaks when the classifier is trained twice, differs once stored, or real images are not at distance 0."""
    images, labels = draw_sides(100, (1, 8, 8))
    reference = RealImages.choose("toy", "train", [data.StoredImages("toy", images, labels, ("left", "right"))], 1000)
    first = features.load_or_train_classifier(reference, tmp_path / "classifier.pt")
    assert "training" in capsys.readouterr().out
    again = features.load_or_train_classifier(reference, tmp_path / "classifier.pt")
    assert "training" not in capsys.readouterr().out
    assert again.identity == first.identity and again.network.accuracy == first.network.accuracy == 1
    assert torch.equal(again(images)[0], first(images)[0])

    real = features.load_or_compute_statistics(again, reference, tmp_path)
    patches = features.load_or_compute_patches(reference, tmp_path)
    figures = features.measure_quality(again, images, real, patches)
    names = ["classifier Fréchet distance", "classifier precision", "classifier recall"]
    assert list(figures) == [*names, "patch distance", "tone distance"]
    assert list(figures.values()) == pytest.approx([0, 1, 1, 0, 0], abs=1e-6)
    noise = torch.randint(0, 256, images.shape, generator=make_generator()).byte()
    worse = features.measure_quality(again, noise, real, patches)
    assert worse["classifier Fréchet distance"] > 10 * features.measure_real(real, 50)[1]

    with pytest.raises(UsageError, match="no classes"):
        features.load_or_train_classifier(toy(images), tmp_path / "other.pt")


# ---- the scripts ----

EVALUATIONS = {
    "curve": "--exp=digits --iterations=all --ensemble=2",
    "apart": "--exp=digits --ensemble=3 --resume_iter=900 --idx=1",
    "colour": "--exp=colour --dataset=folder --data_path={tmp}/images --nodownload",
    "bad weights": "--exp=colour --dataset=folder --data_path={tmp}/images --inception_weights={tmp}/bad.pth",
    "grey": "--exp=digits --features=inception",
    "no number": "--exp=digits --iterations=300,best",
    "other size": "--exp=colour --dataset=digits",
    "too few rounds": "--exp=digits --batch_size=3",
}
SAMPLES = {
    "all classes": "--exp=digits --num=12 --batch_size=5 --seed=3",
    "float32": "--exp=digits --num=4 --step_lr=300 --logdir={tmp}/float32 --precision=float32",
    "bf16": "--exp=digits --num=4 --step_lr=300 --logdir={tmp}/bf16 --precision=bf16",
    "more before": "--exp=digits --num=5 --folder --logdir={tmp}/one",
    "one class": "--exp=digits --num=3 --label=Two --folder --logdir={tmp}/one",
    "no class": "--exp=digits --label=tow",
    "unconditional": "--exp=colour --label=3",
}


def run_all(script, commands, tmp):
    common = [f"--modeldir={tmp}/models", f"--logdir={tmp}/results"]
    words = {name: [*common, *command.format(tmp=tmp).split()] for name, command in commands.items()}
    return run_commands(script, words, env=ENVIRONMENT | {"TORCH_HOME": str(tmp / "empty")})


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory):
    """Two experiments: of digits at three iterations 300 apart and one beside, and of colour images."""
    tmp = tmp_path_factory.mktemp("quality")
    digits = models.ModelConfig("MnistNet", (1, 28, 28), 2, label_size=10)
    colour = models.ModelConfig("MnistNet", (3, 8, 8), 2)
    words = ["zero", "one", "two", *map(str, range(3, 10))]
    for exp, config, iteration in [("digits", digits, k) for k in (300, 600, 800, 900)] + [("colour", colour, 5)]:
        path, model = tmp / "models" / exp / f"model_{iteration}.pt", make_model(config, seed=iteration)
        flags = {"step_lr": 7.5, "sample_steps": 2, "dataset": "digits"}
        write_checkpoint(path, model, iteration, flags=flags, class_names=words)
    from PIL import Image

    for k, image in enumerate(draw_sides(40, (3, 8, 8))[0]):
        path = tmp / "images" / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    (tmp / "bad.pth").write_bytes(b"none")
    return tmp


def test_evaluations_end_to_end(models_folder):
    """Breaks when a figure comes without its settings, the ensemble is another than said, or a mistake is no line."""
    quick = "--im_number=8 --num_steps=1 --batch_size=4 --repeat_scale=1 --real_number=100 "
    done = run_all("eval_inception", {name: quick + words for name, words in EVALUATIONS.items()}, models_folder)

    printed, error = done["curve"]
    assert error is None
    folder = models_folder / "results/digits/eval_inception_0"
    report = json.loads((folder / "eval_inception.json").read_text())
    assert set(report["files"]) == {path.name for path in folder.iterdir()} and report["complete"]
    assert [result["iteration"] for result in report["results"]] == ["300", "600", "800", "900"]
    assert [len(result["ensemble"]) for result in report["results"]] == [1, 2, 2, 2]
    assert report["results"][2]["ensemble"][1].endswith("model_600.pt")  # no model_500: the newest before
    assert report["results"][3]["ensemble"][1].endswith("model_600.pt")  # 300 iterations apart, so not model_800
    settings = {"im_number": 8, "num_steps": 1, "step_lr": 7.5, "repeat_scale": 1, "features": "classifier"}
    assert report["settings"].items() >= settings.items()
    assert "100 of 1,618 images of train" in report["settings"]["reference"]
    for shown in (
        "classifier Fréchet distance",
        "patch distance of other real images",
        "im_number=8",
        "step_lr=7.5",
        "ensemble=1/2",
        "correct on held-out images",
    ):
        assert shown in printed
    assert (folder / "curve.png").exists() and (folder / "samples_800.png").exists()

    printed, error = done["apart"]
    assert error is None and "training" not in printed
    assert "model_900.pt, " in printed and "model_600.pt, " in printed and "model_300.pt\n" in printed

    printed, error = done["colour"]
    assert error is None and "note: no Inception weights" in printed and "cannot be compared with any FID" in printed
    assert "SHA-256" in done["bad weights"][1] and "--inception_weights" in done["bad weights"][1]
    assert "--features=inception" in done["grey"][1]
    assert "--dataset=digits" in done["other size"][1]
    assert "--iterations=best" in done["no number"][1]
    assert "--repeat_scale=1 makes 2 rounds" in done["too few rounds"][1]


def test_imagenet_is_compared_with_its_validation_set(tmp_path):
    """Breaks when samples are compared with training images by default, where the reference takes others."""
    for seed, name in enumerate(["val_data", *IMAGENET_BATCHES]):
        write_pickle(tmp_path / name, draw_imagenet_batch(seed))
    model = make_model(models.ModelConfig("ResNet32", (3, 32, 32), 1))
    trained = TrainedModel(model, tmp_path / "model_1.pt", {"dataset": "imagenet"}, ())
    settings = InceptionSettings(imagenet_path=str(tmp_path))
    assert "3 of 3 images of test" in str(quality.load_reference(settings, trained, torch.device("cpu")))


def test_samples_end_to_end(models_folder):
    """Breaks when files hold other images or classes than asked for, or a mistake is no line that helps."""
    done = run_all("sample", {name: "--num_steps=2 " + words for name, words in SAMPLES.items()}, models_folder)
    assert done["all classes"][1] is None
    arrays = np.load(models_folder / "results/digits/sample/samples.npz")
    assert arrays["images"].shape == (12, 28, 28, 1) and arrays["images"].dtype == np.uint8
    assert arrays["labels"].tolist() == [*range(10), 0, 1]

    assert done["one class"][1] is None
    folder = models_folder / "one/digits/sample"
    arrays = np.load(folder / "samples.npz")
    assert arrays["labels"].tolist() == [2, 2, 2]
    from PIL import Image

    paths = sorted((folder / "images").iterdir())
    assert np.array_equal(np.stack([np.asarray(Image.open(path)) for path in paths]), arrays["images"][..., 0])
    images = [np.load(models_folder / name / "digits/sample/samples.npz")["images"] for name in ("float32", "bf16")]
    difference = np.abs(images[0].astype(int) - images[1])
    assert 0 < difference.mean() < 5
    assert "did you mean two?" in done["no class"][1]
    assert "not conditioned on classes" in done["unconditional"][1]


@pytest.mark.parametrize("name", ["eval_inception", "sample"])
def test_help(name):
    """Breaks when --help leaves out how to use the script, or a group of flags."""
    script = importlib.import_module(name)
    text = cli.describe_flags(typing.get_type_hints(script.main)["settings"], script.__doc__)
    assert f"python {name}.py --exp=" in text and "--resume_iter" in text
