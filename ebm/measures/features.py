"""The quality of samples: networks whose features are compared, statistics of real images, and quality measures.

    inception = Inception(*read_inception("weights-inception-2015-12-05-6726825d.pth"), device="cuda")
    images = RealImages.choose("cifar10", "train", [dataset], 50_000)
    cache = pathlib.Path("statistics")
    real = load_or_compute_statistics(inception, images, cache)
    patches = load_or_compute_patches(images, cache)
    measure_quality(inception, samples, real, patches)  # {"Inception score": …, "FID": …, …}

Images are uint8 (N, C, H, W). A cache folder keeps what takes long to compute: the statistics of real images and the
classifiers that were trained on them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

import checkpoint
from data import Dataset, match_classes
from ebm.measures.classifier import FeatureClassifier, check_examples, train_feature_classifier
from ebm.measures.patches import (
    CHOICES,
    MAX_IMAGES,
    PatchStatistics,
    build_patch_statistics,
    compute_patch_statistics,
    measure_patches,
)
from ebm.readers.bounded import describe_failure, read_file
from ebm.readers.downloads import import_torchvision
from ebm.readers.state_values import is_mapping_to
from ebm.readers.torch_files import read_torch_file
from ebm.support import metrics
from ebm.support.errors import UsageError
from ebm.support.pixels import to_bytes
from ebm.support.progress import SHORT, Progress, show_waiting

MAX_COMPARED = (
    10_000  # largest number of features per set for KID, precision and recall: the cost grows with its square
)
IMAGES_PER_SPLIT = 5_000  # of the Inception score, as in the reference
BATCH = 250  # images whose features are computed at once
MAX_REAL_IMAGES = 100_000  # largest number of real images that a training run compares its samples with
MAX_COMPARED_IN_RUN = 2_000  # as MAX_COMPARED, at the tests of a training run
DISTANCE = "classifier Fréchet distance"  # computed in the features of a small classifier; the FID needs Inception
# The figures of samples: name in the log of a training run -> in words.
INCEPTION_FIGURES = {"inception_score": "Inception score", "inception_score_std": "IS deviation", "fid": "FID"}
CLASSIFIER_FIGURES = {
    "feature_distance": DISTANCE,
    "feature_precision": "classifier precision",
    "feature_recall": "classifier recall",
}
PATCH_FIGURES = {"patch_distance": "patch distance", "tone_distance": "tone distance"}

MAX_INCEPTION_SIZE = 1 << 29  # bytes of a file of weights; the released one has 95 million
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_FILE = f"weights-inception-2015-12-05-{INCEPTION_SHA256[:8]}.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"

# ---------------------------------------------------------------------------------------------------------------------
# Features


class Extractor(Protocol):
    """A network in whose features images are compared.

    Called with images uint8 (n, C, H, W), it returns their features (n, D) and class probabilities (n, K). name: used
    in messages and file names. identity: a hash of the weights.
    """

    name: str
    identity: str

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]: ...


def compute_fingerprint(tensors: Iterable[Tensor]) -> str:
    """Return the SHA-256 of the types, shapes and values of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Inception:
    """The Inception network of torch-fidelity: 2,048 features and 1,008 class probabilities of RGB images of any size.

    state: the weights. identity: their SHA-256. Raises UsageError if torch-fidelity is not installed or the weights
    belong to another network.
    """

    name = "inception"

    def __init__(self, state: Mapping[str, Tensor], identity: str, device: torch.device | str = "cpu"):
        try:
            import_torchvision()  # torch-fidelity imports it
            from torch_fidelity import FeatureExtractorInceptionV3
        except ImportError as error:
            raise UsageError(f"Inception features need {error.name}; pip install -e '.[quality]'") from None
        # torch-fidelity unpickles its file without protection, so it gets a file that was written here.
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


def locate_inception() -> pathlib.Path:
    """Return the path in torch's cache folder where the released Inception-2015-12-05 weights belong."""
    return pathlib.Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE


def find_or_download_inception(download: bool = True) -> pathlib.Path:
    """Return the path of the Inception weights in torch's cache folder; download them if they are missing.

    Raises UsageError, which tells how to get the weights, if the download fails or `download` is False.
    """
    path = locate_inception()
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
    """Read Inception weights from a file without executing any code in it; return them and the file's SHA-256.

    sha256: the first digits of the expected SHA-256. Raises UsageError if the file cannot be read, has another SHA-256,
    or holds anything but tensors.
    """
    try:
        contents = read_file(path, MAX_INCEPTION_SIZE)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"`inception_weights`={path} cannot be read ({describe_failure(error)}); get {INCEPTION_URL}"
        ) from None
    digest = hashlib.sha256(contents).hexdigest()
    if not digest.startswith(sha256.lower()):
        raise UsageError(
            f"`inception_weights`={path} has SHA-256 {digest[:16]}… instead of {sha256[:16]}…: "
            f"get {INCEPTION_URL}, or set `inception_sha256` to the hash of your file"
        )
    file = io.BytesIO(contents)
    try:  # torch wrote files of another format before it wrote archives
        state = (
            read_torch_file(file)
            if contents.startswith(b"PK")
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    except Exception:  # a damaged file can cause any error
        state = None
    if not is_mapping_to(state, lambda tensor: isinstance(tensor, Tensor)):
        raise UsageError(f"`inception_weights`={path} is damaged or holds more than tensors; not loaded")
    return state, digest


class Classifier:
    """An extractor of the features of a small classifier, which was trained on the data set itself."""

    name = "classifier"

    def __init__(self, classifier: FeatureClassifier):
        self.network = classifier
        self.identity = compute_fingerprint(classifier.state_dict().values())

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.network.embed(images)
        return features, self.network.output(features).softmax(1)


def extract_features(
    extractor: Extractor, batches: Iterable[Tensor], total: int, what: str, patience: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the features (N, D) and class probabilities (N, K) of all images in the batches.

    total: N, the number of images. what, patience: of the progress bar.
    """
    parts = []
    with Progress(total, what=what, patience=patience) as progress:
        for batch in batches:
            parts.append(extractor(batch))
            progress.update(progress.done + len(batch))
    features, probabilities = zip(*parts, strict=True)
    return torch.cat(features), torch.cat(probabilities)


# ---------------------------------------------------------------------------------------------------------------------
# Real images


@dataclasses.dataclass(frozen=True)
class RealImages:
    """Real images to compare samples with, as the bytes that are stored.

    name: of the data set. splits: "train", "test" or "both". datasets: these splits. numbers: the indices of the images
    in the concatenation of the splits, ascending.
    """

    name: str
    splits: str
    datasets: Sequence[Dataset]
    numbers: Tensor

    @classmethod
    def choose(cls, name: str, splits: str, datasets: Sequence[Dataset], most: int) -> RealImages:
        """Return the images of the splits, or a random choice of `most` of them, which is always the same."""
        order = torch.randperm(sum(map(len, datasets)), generator=torch.Generator().manual_seed(0))
        return cls(name, splits, datasets, order[:most].sort().values)

    def __len__(self) -> int:
        return len(self.numbers)

    def __str__(self) -> str:
        splits = "train and test" if self.splits == "both" else self.splits
        return f"{self.name}, {len(self):,} of {sum(map(len, self.datasets)):,} images of {splits}, bytes as stored"

    def batches(self, numbers: Tensor) -> Iterable[Tensor]:
        """Yield the images of these numbers, which must ascend, in batches uint8 (n, C, H, W)."""
        first = 0
        for dataset in self.datasets:
            inside = (numbers >= first) & (numbers < first + len(dataset))
            indices = numbers[inside] - first
            first += len(dataset)
            for index in indices.split(BATCH):
                if len(index):
                    yield dataset.raw(index)

    def take(self, number: int, start: int = 0) -> Tensor:
        """Return images uint8 (n, C, H, W): `number` of a random order that is always the same, from `start` on."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))
        with show_waiting("reading real images"):
            return torch.cat(list(self.batches(self.numbers[order[start : start + number]].sort().values)))

    def classes(self) -> Tensor | None:
        """Return the class of each image (N,); None if there are no classes, or if images are read from the disk.

        Classes of the second split are found by their names, because it may lack some. Raises UsageError if it has
        others.
        """
        names = self.datasets[0].class_names
        labels = [match_classes(d, names).labels if d.class_names and names else d.labels for d in self.datasets]
        if any(part is None or part.ndim > 1 for part in labels):
            return None
        return torch.cat(labels)[self.numbers.to(labels[0].device)]  # type: ignore[arg-type, union-attr]

    def settings(self) -> dict[str, Any]:
        """Return what identifies this set of images: its description, and a hash of a thousand of its images."""
        some = self.numbers[:: max(1, len(self) // 1_000)]
        with show_waiting(f"reading {len(some):,} images to identify the data set by"):
            return {"reference": str(self), "fingerprint": compute_fingerprint(self.batches(some))}


Result = TypeVar("Result")


def locate_cache(folder: pathlib.Path, name: str, settings: Mapping[str, Any]) -> pathlib.Path:
    """Return the path of the cache file for these settings in a folder that holds those of several.

    name: the beginning of the file's name.
    """
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return folder / f"{name}_{key[:16]}.pt"


def load_or_compute(
    path: pathlib.Path,
    settings: Mapping[str, Any],
    make: Callable[[], dict],
    build: Callable[[dict], Result],
) -> Result:
    """Return what `build` makes of the contents of a cache file, or of `make()`, which are then cached.

    make: returns a dictionary of tensors and plain values. build: raises an error for contents that are none of these.
    A damaged file, or one that was made with other settings, is replaced.
    """
    try:
        contents = read_torch_file(path) if path.exists() else {}
        if contents.get("settings") == settings:
            return build(contents)
    except Exception as error:  # a damaged file can cause any error
        print(f"note: {path} is damaged and is computed again ({describe_failure(error)})")
    contents = make() | {"settings": dict(settings)}
    try:
        checkpoint.save(path, contents)
        print(f"wrote {path}")
    except OSError as error:
        print(f"note: {path} cannot be written ({error.strerror}); the next run computes it again")
    return build(contents)


def require_classes(reference: RealImages) -> Tensor:
    """Return the class of each image of a reference set (N,); raise UsageError if no classifier can learn them."""
    classes = reference.classes()
    if classes is None:
        raise UsageError(
            f"{reference.name} has no classes in memory, and the classifier that compares samples is trained on classes"
        )
    check_examples(reference.datasets[0].image_shape, classes)
    return classes


def load_or_train_classifier(
    reference: RealImages, path: pathlib.Path, device: torch.device | str = "cpu"
) -> Classifier:
    """Return the classifier of a reference set: train it at the first call, then read it from its file.

    Raises UsageError if the images have no classes.
    """
    classes = require_classes(reference)

    def train() -> dict[str, Any]:
        print(f"training a small classifier on {reference}", flush=True)
        images = torch.cat(list(reference.batches(reference.numbers)))
        network = train_feature_classifier(images, classes, device=device)
        shape, state = list(network.image_shape), network.state_dict()
        return {"image_shape": shape, "classes": network.classes, "accuracy": network.accuracy, "state": state}

    def build(contents: dict[str, Any]) -> FeatureClassifier:
        with torch.random.fork_rng(devices=[]):  # the constructor draws weights from the CPU's global generator
            classifier = FeatureClassifier(reference.datasets[0].image_shape, int(classes.max()) + 1)
        if not all(tensor.isfinite().all() for tensor in contents["state"].values()):
            raise ValueError("its weights are not finite")
        classifier.load_state_dict(contents["state"])
        classifier.accuracy = float(contents["accuracy"])
        return classifier

    classifier = load_or_compute(path, reference.settings(), train, build)
    return Classifier(classifier.eval().to(device))


@dataclasses.dataclass(frozen=True)
class Statistics:
    """The mean (D,) and covariance (D, D) of the features of real images, and up to 10,000 of the features (n, D)."""

    mean: Tensor
    covariance: Tensor
    features: Tensor


def load_or_compute_statistics(extractor: Extractor, reference: RealImages, cache: pathlib.Path) -> Statistics:
    """Return the feature statistics of real images: compute them at the first call, then read them from the cache."""

    def compute() -> dict[str, Any]:
        features, _ = extract_features(
            extractor, reference.batches(reference.numbers), len(reference), "features of real images"
        )
        with show_waiting(f"computing the covariance of {len(features):,} features"):
            mean, covariance = metrics.mean_and_covariance(features)
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:MAX_COMPARED]
        return {"mean": mean, "covariance": covariance, "features": features[order.to(features.device)]}

    settings = reference.settings() | {"features": extractor.name, "weights": extractor.identity}
    path = locate_cache(cache, f"{reference.name}_{extractor.name}_statistics", settings)
    return load_or_compute(path, settings, compute, build_statistics)


def load_or_compute_patches(reference: RealImages, cache: pathlib.Path, most: int = MAX_IMAGES) -> PatchStatistics:
    """Return the patch statistics of `most` real images: compute them at the first call, then read them from the cache.

    They are the images that `reference.take` returns first.
    """
    settings = reference.settings() | CHOICES | {"images": most}
    path = locate_cache(cache, f"{reference.name}_patch_statistics", settings)
    return load_or_compute(
        path, settings, lambda: vars(compute_patch_statistics(reference.take(most))), build_patch_statistics
    )


def build_statistics(contents: dict[str, Any]) -> Statistics:
    """Return the statistics in a cache file; raise ValueError unless their shapes fit and they are finite."""
    real = Statistics(contents["mean"], contents["covariance"], contents["features"])
    width = len(real.mean)
    if real.covariance.shape != (width, width) or real.features.shape != (len(real.features), width):
        raise ValueError("its statistics do not fit together")
    if not all(tensor.is_floating_point() and tensor.isfinite().all() for tensor in vars(real).values()):
        raise ValueError("its statistics are not finite")
    return real


# ---------------------------------------------------------------------------------------------------------------------
# Quality measures


def measure_real(real: Statistics, number: int) -> tuple[int, float]:
    """Return how many real images were compared with all real images, and their Fréchet distance.

    At most `number` and 10,000 images are compared. A small number biases the distance upwards: this is the distance
    that perfect samples of this number would have.
    """
    some = real.features[:number]
    return len(some), measure_distance(some, real)


def describe_patches(images: Tensor, patches: PatchStatistics) -> dict[str, float]:
    """Return the distances of patches and tones of images to those of real ones, see `measure_patches`, by name."""
    return {PATCH_FIGURES[name]: value for name, value in measure_patches(images, patches).items()}


def measure_quality(
    extractor: Extractor,
    images: Tensor,
    real: Statistics,
    patches: PatchStatistics,
    *,
    splits: int = IMAGES_PER_SPLIT,
) -> dict[str, float]:
    """Return quality measures of images uint8 (N, C, H, W) by name, computed in the features of the extractor.

    With Inception: the Inception score over splits of `splits` images, FID, KID, precision and recall. With a
    classifier: Fréchet distance, precision and recall under names of their own, because they cannot be compared with
    published figures. KID, precision and recall use at most 10,000 images of each set. With both: the distances of
    patches and tones, see `measure_patches`.
    """
    features, probabilities = extract_features(extractor, images.split(BATCH), len(images), "features of samples")
    beside = describe_patches(images, patches)
    known, compared = real.features.to(features.device), features[:MAX_COMPARED]
    distance = measure_distance(features, real)
    precision, recall = metrics.precision_recall(known, compared)
    if extractor.name != Inception.name:
        return {DISTANCE: distance, "classifier precision": precision, "classifier recall": recall} | beside
    score, deviation = metrics.inception_score(probabilities, splits=max(1, len(images) // splits))
    return {
        "Inception score": score,
        "IS deviation": deviation,
        "FID": distance,
        "KID": metrics.kernel_distance(known, compared),
        "precision": precision,
        "recall": recall,
    } | beside


# ---------------------------------------------------------------------------------------------------------------------
# The measure of a training run, for its tests and its end


@dataclasses.dataclass(frozen=True)
class SampleMeasure:
    """A measure of samples: Inception score and FID, or distance, precision and recall in the features of a classifier.

    Both come with the distances of patches and tones to those of real images. of_real_images: the figures of other real
    images, as many as there are samples, for comparison; empty with Inception.
    """

    extractor: Extractor
    real: Statistics
    patches: PatchStatistics
    of_real_images: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def has_inception(self) -> bool:
        """Whether images are compared by Inception."""
        return self.extractor.name == Inception.name

    @property
    def figures(self) -> dict[str, str]:
        """The names of its figures in the log, each with its name in words."""
        return (INCEPTION_FIGURES if self.has_inception else CLASSIFIER_FIGURES) | PATCH_FIGURES

    def measure(self, images: Tensor, *, splits: int = 1) -> dict[str, float]:
        """Return the figures of images (N, C, H, W), float in [0, 1] or uint8, by their names in the log.

        They are `nan` if the images are not finite. splits: those of the Inception score. Precision and recall are of
        at most 2,000 images of each set. A small number of images biases distances upwards: compare values for equal
        numbers of images only.
        """
        if not images.isfinite().all():
            return dict.fromkeys(self.figures, math.nan)
        beside = measure_patches(images, self.patches)
        if self.has_inception and images.is_floating_point():
            images = to_bytes(images)
        what = "features of samples"
        features, probabilities = extract_features(self.extractor, images.split(BATCH), len(images), what, SHORT)
        distance = measure_distance(features, self.real)
        if self.has_inception:
            figures = (*metrics.inception_score(probabilities, splits=splits), distance)
        else:
            known = self.real.features[:MAX_COMPARED_IN_RUN].to(features.device)
            figures = (distance, *metrics.precision_recall(known, features[:MAX_COMPARED_IN_RUN]))
        return dict(zip(self.figures, (*figures, *beside.values()), strict=True))

    def get_key_figure(self, figures: Mapping[str, float]) -> float:
        """Return the figure by which the best model is chosen, smaller is better: −score, or the distance."""
        return -figures["inception_score"] if self.has_inception else figures["feature_distance"]

    def describe(self, figures: Mapping[str, float]) -> str:
        """Return figures that `measure` returned in words."""
        words = [f"{word} {figures[name]:.4g}" for name, word in self.figures.items() if name not in INCEPTION_FIGURES]
        if self.has_inception:
            score, deviation, fid = (figures[name] for name in INCEPTION_FIGURES)
            words = [f"Inception score {score:.2f} ± {deviation:.2f}", f"FID {fid:.2f}", *words]
        return ", ".join(words)


def measure_distance(features: Tensor, real: Statistics) -> float:
    """Return the Fréchet distance of features (N, D) to those of real images."""
    with show_waiting(f"computing the Fréchet distance of {len(features):,} features to those of real images"):
        mean, covariance = metrics.mean_and_covariance(features)
        return metrics.frechet_distance(
            mean, covariance, real.mean.to(features.device), real.covariance.to(features.device)
        )


def prepare_inception(dataset: Dataset, inception: Inception, cache: pathlib.Path) -> SampleMeasure:
    """Return the measure by Inception, whose FID compares samples with at most 10,000 images of the data.

    cache: the folder of statistics of real images.
    """
    reference = RealImages.choose(dataset.name, "train", [dataset], MAX_COMPARED)
    real = load_or_compute_statistics(inception, reference, cache)
    return SampleMeasure(inception, real, load_or_compute_patches(reference, cache))


def split_halves(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Return the indices of the images that samples are compared with, and of others: always the same random halves."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:MAX_REAL_IMAGES]
    half, others = order.tensor_split(2)
    return half, others


def prepare_distance(dataset: Dataset, number: int, cache: pathlib.Path) -> SampleMeasure:
    """Return the measure by a classifier, which compares samples with one half of the data.

    number: the number of real images, from the other half, whose figures it includes. The classifier is trained on the
    data at the first call, then read from classifier.pt in the cache folder. Raises UsageError if the images have no
    classes.
    """
    half, others = split_halves(dataset)
    images = RealImages.choose(dataset.name, "train", [dataset], MAX_REAL_IMAGES)
    classifier = load_or_train_classifier(images, cache / "classifier.pt", dataset.index_device)
    reference = RealImages(dataset.name, "train", [dataset], half)
    real = load_or_compute_statistics(classifier, reference, cache)
    measure = SampleMeasure(classifier, real, load_or_compute_patches(reference, cache))
    return dataclasses.replace(measure, of_real_images=measure.measure(dataset.raw(others[:number])))
