"""Sample quality: images from a persistent pool of chains, and how far they are from real ones.

    images = pool_images([energy_of(model)], 1000, model.config, Chains(), generator=generator, progress=progress)
    inception = Inception(*read_inception("weights-inception-2015-12-05-6726825d.pth"), device="cuda")
    reference = Reference.of("cifar10", "train", [dataset], 50_000)
    real = reference_statistics(inception, reference, cache=pathlib.Path("statistics"))
    figures(inception, images, real)  # {"Inception score": …, "FID": …, …}

Images that are compared are uint8 (N, C, H, W). What takes long to compute about real images is kept in a cache folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import pathlib
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

import checkpoint
import metrics
import models
from data import Dataset
from ebm.readers.downloads import import_torchvision
from ebm.settings import PoolSettings
from errors import UsageError
from sampling import clip_gradient, langevin, langevin_step
from sandbox import out_of_memory
from training import noise_images
from utils import Progress


class LabelledEnergy(Protocol):
    """Images (N, C, H, W) in [0, 1] under labels (N, classes) -> energies (N,)."""

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor: ...


POOL = 1_000  # chains of a pool
RESTARTED = 0.01  # share of a batch that starts again from noise
RELABELLED = 0.1  # and that gets a new label
COMPARED = 10_000  # features of a set that KID, precision and recall look at: their cost grows with the square
BATCH = 250  # images at a time to have their features computed

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_FILE = f"weights-inception-2015-12-05-{INCEPTION_SHA256[:8]}.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"


# ---------------------------------------------------------------------------------------------------------------------
# Images


def energy_of(model: models.EnergyNetwork, rescale: float = 1.0, dtype: torch.dtype | None = None) -> LabelledEnergy:
    """Return the energy of a trained model, its weights prepared once, of this type (None: as they are).

    It was trained on images in [0, rescale].
    """
    weights = models.spectral_norm_once(model, dtype)

    def energy(images: Tensor, labels: Tensor) -> Tensor:
        return model.energy(weights, images * rescale, labels)

    return energy


def pool_images(
    energies: Sequence[LabelledEnergy],
    config: models.ModelConfig,
    settings: PoolSettings,
    *,
    step_lr: float,
    proj_norm: float,
    generator: torch.Generator,
    progress: Progress,
) -> Tensor:
    """Return `im_number` images, uint8 (N, C, H, W) on the CPU, 1,000 from a pool of chains at a time.

    energies: of the ensemble, of images in [0, 1]. config: of its networks. step_lr, proj_norm: for these gradients.
    progress: counts rounds, of which there are `settings.rounds` a pool. Raises UsageError where a chain diverges.
    """
    pools, number = [], settings.im_number
    for start in range(0, number, POOL):
        images = run_pool(
            energies,
            min(POOL, number - start),
            config,
            settings,
            step_lr=step_lr,
            proj_norm=proj_norm,
            generator=generator,
            progress=progress,
        )
        pools.append(to_bytes(finite(images)).cpu())
    return torch.cat(pools)


def run_pool(
    energies: Sequence[LabelledEnergy],
    size: int,
    config: models.ModelConfig,
    settings: PoolSettings,
    *,
    step_lr: float,
    proj_norm: float,
    generator: torch.Generator,
    progress: Progress,
) -> Tensor:
    """Return the images (size, C, H, W) in [0, 1] of a pool of persistent chains after its rounds, as the reference.

    Each round takes a batch at random, none twice, runs its chains on under the next energy of the ensemble and writes
    them back. In all but the last `nomix` rounds some of the batch starts again from noise or gets a new label.
    """
    device, classes = generator.device, config.label_size

    def noise(n: int) -> Tensor:
        return noise_images((n, *config.image_shape), generator, network=config.network)

    def labels_of(n: int) -> Tensor:
        if not classes:
            return torch.zeros(n, 0, device=device)
        return F.one_hot(torch.randint(classes, (n,), generator=generator, device=device), classes).float()

    images, labels = noise(size), labels_of(size)
    batch_size = min(settings.batch_size, size)
    for round_ in range(settings.rounds):
        chosen = torch.randperm(size, generator=generator, device=device)[:batch_size]
        x, y = images[chosen], labels[chosen]
        if round_ < settings.rounds - settings.nomix:
            chance = torch.rand(2, batch_size, generator=generator, device=device)
            x = torch.where((chance[0] < RESTARTED).view(-1, 1, 1, 1), noise(batch_size), x)
            y = torch.where((chance[1] < RELABELLED).view(-1, 1), labels_of(batch_size), y)
        images[chosen] = langevin(
            functools.partial(energies[round_ % len(energies)], labels=y),
            x,
            num_steps=settings.num_steps,
            step_lr=step_lr,
            noise_std=settings.noise_scale,
            proj_norm=proj_norm,
            generator=generator,
        )
        labels[chosen] = y
        progress.update(progress.done + 1)
    return images


def fresh_images(
    energy: LabelledEnergy,
    labels: Tensor,
    config: models.ModelConfig,
    *,
    num_steps: int,
    step_lr: float,
    noise_std: float = 0.005,
    proj_norm: float = 0.0,
    seed: int = 0,
    batch_size: int = 100,
    progress: Progress,
) -> Tensor:
    """Return images from noise, one Langevin chain per row of labels (N, classes): uint8 (N, C, H, W) on the CPU.

    Image i draws its start and its steps from a generator of its own, that of (seed, i) where the labels are. So on one
    kind of device its chain has the same noise whatever the batch size and the number of images, and differs by
    rounding at most. progress: counts steps of batches.
    """
    clip = functools.partial(clip_gradient, proj_norm=proj_norm, proj_norm_type="li")
    restrict = functools.partial(torch.clamp, min=0, max=1)
    batches = []
    for numbers in torch.arange(len(labels)).split(batch_size):
        seeds = [(seed * 1_000_003 + i) % 2**32 for i in numbers.tolist()]
        generators = [torch.Generator(labels.device).manual_seed(own) for own in seeds]
        starts = [noise_images((1, *config.image_shape), own, network=config.network) for own in generators]
        x, y = torch.cat(starts), labels[numbers.to(labels.device)]
        noise = torch.empty(x.shape, device=x.device)
        for _ in range(num_steps):
            for image, own in zip(noise, generators, strict=True):
                image.normal_(generator=own)
            x = langevin_step(functools.partial(energy, labels=y), x, noise_std * noise, step_lr, clip, restrict)
            progress.update(progress.done + 1)
        batches.append(to_bytes(finite(x)).cpu())
    return torch.cat(batches)


def finite(images: Tensor) -> Tensor:
    """Return the images; raise UsageError where the chains have diverged."""
    if not images.isfinite().all():
        raise UsageError("the chains' images are not finite: this model has diverged; use an earlier checkpoint")
    return images


@contextlib.contextmanager
def within_memory(batch_size: int) -> Iterator[None]:
    """Answer in one line where memory cannot hold a batch."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UsageError(f"memory cannot hold chains of `batch_size`={batch_size}; lower it") from None


def to_bytes(images: Tensor) -> Tensor:
    """Return images in [0, 1] as uint8, clip(256·x, 0, 255), as the reference hands them to Inception."""
    return (images * 256).clamp(0, 255).to(torch.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Features


class Extractor(Protocol):
    """Where images are compared: uint8 (n, C, H, W) -> features (n, D) and class probabilities (n, K).

    name: for people and file names. identity: changes with the weights.
    """

    name: str
    identity: str

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]: ...


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Return the SHA-256 of what tensors hold."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Inception:
    """torch-fidelity's Inception network: 2,048 features and 1,008 class probabilities of RGB images of any size.

    Raises UsageError where torch-fidelity is not installed or the weights are of another network.
    """

    name = "inception"

    def __init__(self, state: Mapping[str, Tensor], identity: str, device: torch.device | str = "cpu"):
        try:
            import_torchvision()  # torch-fidelity imports it
            from torch_fidelity import FeatureExtractorInceptionV3
        except ImportError as error:
            raise UsageError(f"Inception features need {error.name}; pip install -r requirements.txt") from None
        # torch-fidelity unpickles its file unguarded, so it gets one that was written here.
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        try:
            network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], file)
        except (RuntimeError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:150]
            raise UsageError(f"`inception_weights` holds another network than Inception ({reason} …)") from None
        self.network, self.identity, self.device = network.to(device), identity, device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self.network(images.to(self.device))
        return features, logits.softmax(1)


def find_inception(download: bool = True) -> pathlib.Path:
    """Return the released weights of Inception-2015-12-05 in torch's cache folder, downloaded where they are not there.

    Raises UsageError, which says how to get them, where that fails or is not allowed.
    """
    path = pathlib.Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if path.exists():
        return path
    reason = "`download`=False"
    if download:
        print(f"downloading {INCEPTION_URL}", flush=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=INCEPTION_SHA256)
            return path
        except Exception as error:  # no network, another file, a full disk
            reason = " ".join(str(error).split())
    raise UsageError(
        f"no Inception weights: they are not in {path} and not downloaded ({reason}); "
        f"put {INCEPTION_URL} there, or give the file with `inception_weights`"
    )


def read_inception(path: str | pathlib.Path, sha256: str = INCEPTION_SHA256) -> tuple[dict[str, Tensor], str]:
    """Return the weights in a file and its SHA-256, having executed nothing.

    Raises UsageError for a file that cannot be read, is another than the released one, or holds more than tensors.
    """
    try:
        contents = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"`inception_weights`={path} cannot be read ({error.strerror})") from None
    found = hashlib.sha256(contents).hexdigest()
    if not found.startswith(sha256.lower()):
        raise UsageError(
            f"`inception_weights`={path} has SHA-256 {found[:16]}… instead of {sha256[:16]}…: "
            f"get {INCEPTION_URL}, or say with `inception_sha256` which file you mean"
        )
    try:
        state = torch.load(io.BytesIO(contents), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        raise UsageError(f"`inception_weights`={path} is damaged or holds more than tensors; not loaded") from None
    return state, found


class Classifier:
    """The features of a small classifier that was trained on the data set itself, where Inception does not apply."""

    name = "classifier"

    def __init__(self, classifier: metrics.FeatureClassifier):
        self.network = classifier
        self.identity = fingerprint(classifier.state_dict().values())

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.network.embed(images)
        return features, self.network.output(features).softmax(1)


def extract(extractor: Extractor, batches: Iterable[Tensor], total: int, what: str) -> tuple[Tensor, Tensor]:
    """Return features (N, D) and probabilities (N, K) of N = total images, a batch at a time."""
    progress, parts = Progress(total, what=what), []
    for batch in batches:
        parts.append(extractor(batch))
        progress.update(progress.done + len(batch))
    progress.close()
    features, probabilities = zip(*parts, strict=True)
    return torch.cat(features), torch.cat(probabilities)


# ---------------------------------------------------------------------------------------------------------------------
# Real images


@dataclasses.dataclass(frozen=True)
class Reference:
    """Real images to compare with: the chosen `numbers` of splits of a data set laid end to end, bytes as stored."""

    name: str
    splits: str
    datasets: Sequence[Dataset]
    numbers: Tensor

    @classmethod
    def of(cls, name: str, splits: str, datasets: Sequence[Dataset], most: int) -> Reference:
        """All images of the splits, or `most` at random: always the same ones."""
        order = torch.randperm(sum(map(len, datasets)), generator=torch.Generator().manual_seed(0))
        return cls(name, splits, datasets, order[:most].sort().values)

    def __len__(self) -> int:
        return len(self.numbers)

    def __str__(self) -> str:
        splits = "train and test" if self.splits == "both" else self.splits
        return f"{self.name}, {len(self):,} of {sum(map(len, self.datasets)):,} images of {splits}, bytes as stored"

    def batches(self, numbers: Tensor) -> Iterable[Tensor]:
        """Yield these images, of numbers in ascending order, as uint8 (n, C, H, W)."""
        first = 0
        for dataset in self.datasets:
            own = numbers[(numbers >= first) & (numbers < first + len(dataset))] - first
            first += len(dataset)
            for index in own.split(BATCH):
                if len(index):
                    yield dataset.raw(index)

    def classes(self) -> Tensor | None:
        """The class (N,) of each image, None where there are none, or where images are read from the disk."""
        labels = [dataset.labels for dataset in self.datasets]
        if any(part is None or part.ndim > 1 for part in labels):
            return None
        return torch.cat(labels)[self.numbers.to(labels[0].device)]  # type: ignore[arg-type, union-attr]

    def settings(self) -> dict[str, Any]:
        """What tells this set of images from another: its description, and what a thousand of its images hold."""
        some = self.numbers[:: max(1, len(self) // 1_000)]
        return {"reference": str(self), "fingerprint": fingerprint(self.batches(some))}


def cached(folder: pathlib.Path, name: str, settings: Mapping[str, Any], make: Callable[[], dict]) -> dict[str, Any]:
    """Return what `make` gives, tensors and plain values, kept in a file of this name for equal settings.

    A file that cannot be read is made again.
    """
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    path = folder / f"{name}_{key[:16]}.pt"
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
        if contents.get("settings") == settings:
            return contents
    except (OSError, RuntimeError, EOFError, ValueError, AttributeError, pickle.UnpicklingError):
        print(f"note: {path} is damaged and made again")
    contents = make() | {"settings": dict(settings)}
    try:
        checkpoint.save(path, contents)
        print(f"wrote {path}")
    except OSError as error:
        print(f"note: {path} cannot be written ({error.strerror}); the next run computes it again")
    return contents


def classifier_of(reference: Reference, cache: pathlib.Path, device: torch.device | str = "cpu") -> Classifier:
    """Return the classifier trained on a reference set, the first time; then it is read from the cache.

    Raises UsageError where the images have no classes.
    """
    classes = reference.classes()
    if classes is None:
        raise UsageError(
            f"{reference.name} has no classes in memory to train a classifier on, to compare samples in its features; "
            "colour images can be compared with `features`=inception"
        )

    def train() -> dict[str, Any]:
        print(f"training a small classifier on {reference}", flush=True)
        images = torch.cat(list(reference.batches(reference.numbers)))
        trained = metrics.train_feature_classifier(images, classes, device=device)
        shape, state = list(trained.image_shape), trained.state_dict()
        return {"image_shape": shape, "classes": trained.classes, "accuracy": trained.accuracy, "state": state}

    kept = cached(cache, f"{reference.name}_classifier", reference.settings(), train)
    classifier = metrics.FeatureClassifier(kept["image_shape"], kept["classes"])
    classifier.load_state_dict(kept["state"])
    classifier.accuracy = kept["accuracy"]
    return Classifier(classifier.eval().to(device))


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D, D) of the features of real images, and up to 10,000 of the features (n, D)."""

    mean: Tensor
    covariance: Tensor
    features: Tensor


def reference_statistics(extractor: Extractor, reference: Reference, cache: pathlib.Path) -> Statistics:
    """Return the statistics of real images, computed once per set of images and weights, then read from the cache."""

    def compute() -> dict[str, Any]:
        features, _ = extract(
            extractor, reference.batches(reference.numbers), len(reference), "features of real images"
        )
        mean, covariance = metrics.mean_and_covariance(features)
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:COMPARED]
        return {"mean": mean, "covariance": covariance, "features": features[order.to(features.device)]}

    settings = reference.settings() | {"features": extractor.name, "weights": extractor.identity}
    kept = cached(cache, f"{reference.name}_{extractor.name}_statistics", settings, compute)
    return Statistics(kept["mean"], kept["covariance"], kept["features"])


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def distance_of_real(real: Statistics, number: int) -> tuple[int, float]:
    """Return the Fréchet distance of `number` of the real images, at most 10,000, to all of them, and how many it took.

    Few images bias the distance upwards: this says what it is for so many that are perfect.
    """
    some = real.features[:number]
    return len(some), metrics.frechet_distance(*metrics.mean_and_covariance(some), real.mean, real.covariance)


def figures(extractor: Extractor, images: Tensor, real: Statistics, *, splits: int = 5_000) -> dict[str, float]:
    """Return how good images, uint8 (N, C, H, W), are: measures by name, computed in the features of the extractor.

    In Inception's: score over splits of so many images, FID, KID, precision and recall. In a classifier's: the Fréchet
    distance, under a name of its own since it compares with no FID, precision and recall. KID, precision and recall are
    of at most 10,000 images of each set.
    """
    features, probabilities = extract(extractor, images.split(BATCH), len(images), "features of samples")
    device, compared = features.device, features[:COMPARED]
    mean, covariance = metrics.mean_and_covariance(features)
    distance = metrics.frechet_distance(mean, covariance, real.mean.to(device), real.covariance.to(device))
    precision, recall = metrics.precision_recall(real.features.to(device), compared)
    if extractor.name != Inception.name:
        return {"classifier Fréchet distance": distance, "classifier precision": precision, "classifier recall": recall}
    score, deviation = metrics.inception_score(probabilities, splits=max(1, len(images) // splits))
    return {
        "Inception score": score,
        "IS deviation": deviation,
        "FID": distance,
        "KID": metrics.kernel_distance(real.features.to(device), compared),
        "precision": precision,
        "recall": recall,
    }
