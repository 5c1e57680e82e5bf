"""The settings of all scripts: each has its default, range, unit and help here, and the flags are made from them.

Groups that several scripts share are base classes: a function declares the group that it needs, and the settings of
any script that inherit from this group can be passed to it. Below a script's `main` no code knows of flags.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from checkpoint import UNRECORDED
from data import DATASETS
from ebm.presets import PRESETS
from ebm.readers import dsprites
from ebm.support.cli import IncompleteSettings, flag
from ebm.support.errors import UsageError
from ebm.support.experiments import find_model_folder, find_output_folder
from ebm.support.hardware import PRECISIONS
from ebm.training.distributed import BACKENDS
from sampling import PROJ_NORM_TYPES

DEVICES = ("auto", "cpu", "cuda")
UNCHANGED = "images are examined as they are, without augmentation"
POOL = 1_000  # chains that eval_inception.py runs in one pool, as many as the images that it takes from there
NOISE_UNIT = 0.005  # standard deviation of a Langevin step's noise at noise_scale 1, for images in [0, 1]

LARGEST_SEED = 2**64 - 1  # as for PyTorch
MOST_AT_ONCE, MOST_IMAGES, MOST_FILTERS, MOST_WORKERS = 10**6, 10**7, 1024, 1024  # more would only fail later

# Conditions under which flags have an effect, see `flag`.
USES_DATADIR = (
    "dataset=" + "|".join(name for name, source in DATASETS.items() if not source.path_setting and name != "digits"),
    *("svhn", "svhnmix", "cifar100mix", "texturemix", "mixset"),
)
USES_WORKERS = ("dataset=celeba|folder|imagenetfull|textures", "texturemix", "mixfolder", "mixset")
IS_GAUSS = "dataset=gauss|2d"  # ais.py checks itself on a density that is no trained model
SAMPLES_ONLY = "train=False"
CLASSIFIES = "task=label|labelfinetune"
ATTACKS = ("pgd", "attack=autoattack")

# A setting that chooses a larger network for colour images -> the name of this network.
SIZES = {"large_model": "ResNet32Large", "larger_model": "ResNet32Larger", "wider_model": "ResNet32Wider"}
# Settings of dSprites -> the concept that the model is conditioned on, or the subset of sprites that it is trained on.
CONDITIONS = {f"cond_{name}": name for name in dsprites.CONCEPTS}
SUBSETS = {"dsprites_restrict" if name == "restrict" else f"d{name}_only": name for name in dsprites.SUBSETS}


# ---------------------------------------------------------------------------------------------------------------------
# Groups that scripts share


@dataclasses.dataclass(frozen=True)
class DataFiles:
    """Data files"""

    datadir: str = flag(
        "data",
        "folder of the data sets that torchvision can download, such as mnist, cifar10 or svhn",
        only_with=USES_DATADIR,
        is_path=True,
    )
    download: bool = flag(True, "download files that are missing, such as data sets")
    data_path: str | None = flag(
        None,
        "folder of images for --dataset=folder; its subfolders, if it has any, are the classes, or the splits if they "
        "are called train and val or test",
        only_with="dataset=folder",
        is_path=True,
    )
    imagenet_path: str | None = flag(
        None,
        "folder of the downsampled 32x32 ImageNet files (or 8x8, 16x16, 64x64), pickles or .npz, for "
        "--dataset=imagenet",
        only_with=("dataset=imagenet", "mixset=imagenet"),
        is_path=True,
    )
    imagenet_datadir: str | None = flag(
        None,
        "folder of ImageNet TFRecords, or of image files in class folders, for --dataset=imagenetfull",
        only_with=("dataset=imagenetfull", "mixset=imagenetfull"),
        is_path=True,
    )
    dsprites_path: str | None = flag(
        None,
        "the published dSprites file, an .npz; default: the program draws the sprites itself",
        only_with=("dataset=dsprites", "mixset=dsprites"),
        is_path=True,
    )

    def find_path(self, dataset: str) -> str | None:
        """Return the path setting of a data set by its name; None if it is not set or the data set has none."""
        name = DATASETS[dataset].path_setting
        return getattr(self, name) if name else None


@dataclasses.dataclass(frozen=True)
class ChainPrecision:
    """Number type in chains"""

    precision: str = flag(
        "auto",
        "number type of energies and gradients in Langevin chains; images stay in float32. auto: on a CPU bf16 if that "
        "is faster there, for networks whose figures it does not change; else float32",
        choices=("auto", *PRECISIONS),
        not_with=("task=energyeval|mixenergy", "sampler=mala"),
    )


@dataclasses.dataclass(frozen=True)
class CompiledChains(ChainPrecision):
    """Compilation of chains"""

    compile: bool | None = flag(
        None,
        "compile the Langevin step, up to a minute once for each network and number of images; default: off",
        not_with="task=train|labeldiscover|gentest|genbaseline",
    )


@dataclasses.dataclass(frozen=True)
class DeviceChoice:
    """Device"""

    device: str = flag("auto", "device to compute on; auto: a GPU if there is one, else the CPU", choices=DEVICES)


@dataclasses.dataclass(frozen=True)
class ExperimentFolders:
    """Experiment and folders"""

    exp: str = flag("default", "name of the experiment, whose folder holds the model", not_with=IS_GAUSS)
    modeldir: str = flag(
        "cachedir",
        "folder of all experiments; a model that is not there is looked for among the shipped ones, in pretrained/",
        not_with=IS_GAUSS,
        is_path=True,
    )
    logdir: str = flag("sandbox_cachedir", "folder for results", is_path=True)

    @property
    def model_roots(self) -> tuple[str, ...]:
        """The folders of experiments in which models are looked for, one after the other, before the shipped ones."""
        return (self.modeldir,)

    def locate_model(self, exp: str, setting: str = "exp") -> pathlib.Path:
        """Return the folder of an experiment's checkpoints, of the user or shipped; see `find_model_folder`."""
        return find_model_folder(exp, self.model_roots, setting)

    @property
    def results_setting(self) -> str:
        """The name of the setting that says where results go."""
        return "logdir"

    @property
    def results_folder(self) -> pathlib.Path:
        """The folder for the results on this experiment; raises UsageError if its name leads elsewhere."""
        return find_output_folder(getattr(self, self.results_setting), self.exp, self.results_setting)


@dataclasses.dataclass(frozen=True)
class ReleaseFolders(ExperimentFolders):
    """Experiment and folders"""

    logdir: str = flag(
        ExperimentFolders.logdir,
        "folder for results; if it has the experiment's checkpoints, as in commands of the release, they are used",
        is_path=True,
    )
    savedir: str | None = flag(None, "folder for results, in place of --logdir", not_with="task=train", is_path=True)

    @property
    def experiments_root(self) -> str:
        """The folder of all experiments: `logdir` if it is given, as in the release, else `modeldir`."""
        return self.modeldir if self.logdir == ExperimentFolders.logdir else self.logdir

    @property
    def model_roots(self) -> tuple[str, ...]:
        """The folders of experiments in which models are looked for, one after the other, before the shipped ones."""
        return tuple(dict.fromkeys((self.experiments_root, self.modeldir)))

    @property
    def results_setting(self) -> str:
        """The name of the setting that says where results go."""
        return "savedir" if self.savedir else "logdir"


@dataclasses.dataclass(frozen=True)
class ModelChoice(ExperimentFolders, DeviceChoice):
    """Model"""

    resume_iter: str = flag(
        "latest",
        "iteration of the checkpoint to load, 'best' or 'latest' (-1 also means latest)",
        not_with=("iterations", IS_GAUSS),
    )
    ema: bool = flag(False, "load the averaged weights, which a training run with --ema_decay saves", not_with=IS_GAUSS)
    seed: int = flag(0, "seed of all random numbers", at_least=0, at_most=LARGEST_SEED)


@dataclasses.dataclass(frozen=True)
class SpriteSubsets:
    """dSprites"""

    dshape_only: bool = flag(False, "use sprites that differ only in shape")
    dpos_only: bool = flag(False, "use sprites that differ only in position")
    dsize_only: bool = flag(False, "use sprites that differ only in scale")
    drot_only: bool = flag(False, "use sprites that differ only in rotation")
    dsprites_restrict: bool = flag(False, "use unrotated squares of any size and position")

    @property
    def subset(self) -> str | None:
        """The chosen subset of sprites, one of dsprites.SUBSETS; None for all sprites.

        Raises UsageError if several are chosen.
        """
        names = [name for name in SUBSETS if getattr(self, name)]
        if len(names) > 1:
            raise UsageError(f"`{names[0]}` and `{names[1]}` exclude each other; choose one")
        return SUBSETS[names[0]] if names else None


@dataclasses.dataclass(frozen=True)
class TestData(DataFiles, SpriteSubsets):
    """Data"""

    dataset: str | None = flag(
        None,
        "name of the data set, one of those in train.py --help; default: the one that the model was trained on, "
        "else cifar10",
        not_with="svhn",
    )
    antialias: bool | None = flag(
        None,
        "for --dataset=imagenetfull: resize images with antialiasing; default: as in training, else False",
        only_with="dataset=imagenetfull",
    )
    data_workers: int = flag(
        5,
        "number of parallel workers that decode image files; 0: no extra processes",
        at_least=0,
        only_with=USES_WORKERS,
        at_most=MOST_WORKERS,
    )
    cutout: bool = flag(False, UNCHANGED, inert=True)
    cutout_inside: bool = flag(False, UNCHANGED, inert=True)
    cutout_prob: float = flag(1.0, UNCHANGED, inert=True)
    cutout_mask_size: int = flag(16, UNCHANGED, inert=True)


@dataclasses.dataclass(frozen=True)
class InceptionWeights:
    """Inception"""

    inception_weights: str | None = flag(
        None,
        "file of the Inception weights as published by torch-fidelity; default: in torch's cache folder",
        not_with=("quality=False", "features=classifier"),
        is_path=True,
    )
    inception_sha256: str = flag(
        "6726825d",
        "first digits of the SHA-256 of the Inception weights; default: those of the published file",
        not_with=("quality=False", "features=classifier"),
    )


@dataclasses.dataclass(frozen=True)
class UnrecordedNetwork:
    """Network, for TensorFlow checkpoints, which do not store this (other checkpoints do)"""

    swish_act: bool | None = flag(None, "swish activations")
    spec_iter: int | None = flag(
        None, "power iterations that estimate the spectral norm; default for a TensorFlow checkpoint: 1", at_least=1
    )
    spec_norm_val: float | None = flag(
        None, "spectral norm of the weights; default for a TensorFlow checkpoint: 1", at_least=0
    )
    downsample: bool | None = flag(None, "in networks for grey images: average pooling instead of stride 2")
    spec_eval: bool = flag(
        True,
        "evaluation never changes the vectors of the power iteration",
        inert=True,
    )

    @property
    def unrecorded(self) -> dict[str, Any]:
        """The settings that are given, by name, of those that a TensorFlow checkpoint does not store."""
        values = {name: getattr(self, name) for name in UNRECORDED}
        return {name: value for name, value in values.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class CheckedNetwork(UnrecordedNetwork):
    """Network (the checkpoint defines it; these flags are only compared with it)"""

    cclass: bool | None = flag(None, "the network is conditioned on class labels")
    large_model: bool | None = flag(None, "the network is ResNet32Large")
    larger_model: bool | None = flag(None, "the network is ResNet32Larger")
    wider_model: bool | None = flag(None, "the network is ResNet32Wider")
    use_attention: bool | None = flag(None, "the residual network has self-attention")
    spec_norm: bool | None = flag(None, "the weights have spectral normalisation")
    bn: bool = flag(False, "no network of this project has batch normalisation", inert=True)
    use_bias: bool = flag(True, "the checkpoint determines which layers have biases", inert=True)


# ---------------------------------------------------------------------------------------------------------------------
# train.py


@dataclasses.dataclass(frozen=True)
class RunSettings(DeviceChoice, IncompleteSettings):
    """Run"""

    preset: str | None = flag(
        None,
        "use the flags of a published command, of a shipped model, or for colour images on a CPU (colour_cpu); "
        "flags given on the command line override them",
        presets=PRESETS,
    )
    exp: str = flag("default", "name of the experiment; its files go to <logdir>/<exp>/")
    logdir: str = flag("cachedir", "folder of all experiments", is_path=True)
    tag: tuple[str, ...] = flag(
        (), "words, commas between, by which scripts/compare.py finds this run among others, such as those of one study"
    )
    train: bool = flag(True, "train the model; --train=False only samples from a checkpoint and writes the report")
    resume_iter: str = flag(
        "-1",
        "iteration of the checkpoint to resume from, 'latest', or 'auto': the latest if there is one, else a new run; "
        "-1 starts a new run. A resumed run keeps its settings, but for those that are given now",
    )
    change: bool = flag(
        False,
        "resume a run although flags that are given now change its network or its data",
        not_with="resume_iter=-1",
    )
    max_iter: int | None = flag(
        None, "number of the last iteration; default: set by --epoch_num", at_least=0, not_with=SAMPLES_ONLY
    )
    epoch_num: int = flag(
        10000,
        "without --max_iter: number of passes over the data (for mnist at most 60,000 iterations)",
        at_least=1,
        not_with=("max_iter", SAMPLES_ONLY),
    )
    seed: int = flag(
        0, "seed of all random numbers; each worker derives its own seed from it", at_least=0, at_most=LARGEST_SEED
    )
    deterministic: bool = flag(
        False,
        "on a GPU: use only kernels that give the same bits in every run; slower, and turns off --compile unless "
        "it is given",
    )
    backend: str = flag(
        "auto",
        "library that averages gradients over several workers; auto: chosen by how the workers were started",
        choices=BACKENDS,
    )
    num_gpus: int = flag(
        1, "each process uses one device; for several GPUs start several workers with mpiexec", at_least=1, inert=True
    )

    @property
    def folder(self) -> pathlib.Path:
        """The experiment's folder; raises UsageError if its name leads elsewhere, or among the shipped models."""
        return find_output_folder(self.logdir, self.exp)


@dataclasses.dataclass(frozen=True)
class TrainingData(DataFiles):
    """Data"""

    dataset: str = flag("mnist", "data set to train on", choices=tuple(DATASETS))
    image_size: int | None = flag(
        None,
        "for --dataset=folder: resize images to this height and width in pixels; default: no resizing, all images "
        "must have one size",
        at_least=8,
        only_with="dataset=folder",
        at_most=4096,
    )
    channels: int | None = flag(
        None,
        "for --dataset=folder: 1 (grey) or 3 (colour); default: as in the first image",
        at_least=1,
        at_most=3,
        only_with="dataset=folder",
    )
    antialias: bool = flag(
        False,
        "for --dataset=imagenetfull: resize images with antialiasing, which looks better; default: by TensorFlow's old "
        "bilinear rule, with which the published models were trained",
        only_with="dataset=imagenetfull",
    )
    data_workers: int = flag(
        4,
        "number of parallel workers that decode image files; 0: no extra processes",
        at_least=0,
        only_with=USES_WORKERS,
        at_most=MOST_WORKERS,
    )
    leave_out: str | None = flag(
        None,
        "train without the images of this class, its name or number; ebm_sandbox.py --task=ood then measures how well "
        "the model tells them from the others",
    )
    batch_size: int = flag(256, "images per iteration on each worker", at_least=1, at_most=MOST_AT_ONCE)
    single: bool = flag(False, "train on a single image, to check that the model can overfit it")
    augment: bool = flag(
        False,
        "augment images by random crops (4 pixels of padding) and horizontal flips; with --cclass not for digits and "
        "sprites, whose labels would become false",
    )
    mixup: bool = flag(False, "train on convex combinations of two images, weighted by a draw from Beta(1, 1)")
    cutout: bool = flag(
        False,
        "set a random square of each image to black; with --cclass not for images on a black background, whose labels "
        "would become false",
    )
    cutout_inside: bool = flag(False, "keep the cutout square completely inside the image", only_with="cutout")
    cutout_prob: float = flag(
        1.0, "share of the images that get a cutout square, 0 to 1", at_least=0, at_most=1, only_with="cutout"
    )
    cutout_mask_size: int = flag(16, "side of the cutout square, in pixels", at_least=1, only_with="cutout")
    rescale: float = flag(1.0, "largest pixel value: images are scaled to [0, rescale]", at_least=1e-6, at_most=1e6)


@dataclasses.dataclass(frozen=True)
class SpriteSettings(SpriteSubsets):
    """dSprites"""

    cond_shape: bool = flag(
        False, "condition the model on the sprite's shape: square, ellipse or heart; needs --cclass"
    )
    cond_size: bool = flag(
        False,
        "condition the model on the sprite's scale, 0.5 to 1; needs --cclass (also called --cond_scale)",
        alias="cond_scale",
    )
    cond_pos: bool = flag(False, "condition the model on the sprite's position, x and y from 0 to 1; needs --cclass")
    cond_rot: bool = flag(False, "condition the model on the cosine and sine of the sprite's rotation; needs --cclass")


@dataclasses.dataclass(frozen=True)
class NegativeSettings:
    """Negative samples (Langevin chains during training)"""

    datasource: str = flag(
        "random",
        "start of the chains: random (noise), default (data plus noise), both (half of the chains each), or gauss "
        "(draws from a normal distribution fitted to the images of each class, which the model keeps; Yang and Ji "
        "2021)",
        choices=("random", "default", "both", "gauss"),
    )
    start_rank: int = flag(
        64,
        "number of directions in which the normal distributions of --datasource=gauss vary",
        at_least=1,
        at_most=1024,
        only_with="datasource=gauss",
    )
    noise_rate: float = flag(
        0.0,
        "share of the chains that start from noise in spite of --datasource=gauss, 0 to 1, so that the energy of noise "
        "is learnt, too; with --replay_batch only these are replayed",
        at_least=0,
        at_most=1,
        only_with="datasource=gauss",
    )
    num_chains: int | None = flag(
        None, "chains per iteration on each worker, at most --batch_size; default: --batch_size", at_least=1
    )
    num_steps: int = flag(20, "Langevin steps per training iteration", at_least=0)
    step_lr: float = flag(
        1.0, "step size of a Langevin step: the factor of the energy gradient", at_least=0, not_with="hmc"
    )
    noise_scale: float = flag(
        1.0, "standard deviation of a Langevin step's noise, in units of 0.005 for images in [0, 1]", at_least=0
    )
    proj_norm: float = flag(
        0.0,
        "clip the gradient of a Langevin step to this size, see --proj_norm_type; 0: no clipping",
        at_least=0,
        not_with="hmc",
    )
    proj_norm_type: str = flag(
        "li",
        "li clips each element of the gradient; l2 clips the L2 norm of the gradient of the whole batch",
        choices=PROJ_NORM_TYPES,
        only_with="proj_norm",
    )
    replay_batch: bool = flag(
        False,
        "start a share of the chains, --replay_rate, from a replay buffer of 10,000 earlier samples",
        not_with=("pcd", SAMPLES_ONLY),
    )
    replay_rate: float = flag(
        0.95,
        "share of the chains that start from the replay buffer, 0 to 1; needs --replay_batch",
        at_least=0,
        at_most=1,
        only_with="replay_batch",
    )
    pcd: bool = flag(
        False, "persistent contrastive divergence: start the chains where those of the previous iteration ended"
    )
    hmc: bool = flag(False, "use Hamiltonian Monte Carlo moves instead of Langevin steps; needs --zero_kl")
    precision: str = flag(
        "auto",
        "number type of energies and gradients; images and parameters stay in float32. fp16 is used in chains "
        "only, the loss is then computed in TF32. auto: on a GPU fp16, but TF32 with the KL term or --hmc; on a "
        "CPU bf16 if it is faster there, for networks whose curves it does not change, with --zero_kl and without "
        "--hmc; else float32",
        choices=("auto", *PRECISIONS),
    )
    compile: bool | None = flag(
        None,
        "compile the Langevin step, which takes up to a minute once; default: on for GPUs without --deterministic, "
        "on CPUs tried for long runs. Has no effect with the KL term or --hmc",
        only_with="zero_kl",
        not_with="hmc",
    )
    cuda_graph: bool | None = flag(
        None, "launch each chain as one CUDA graph; default: on for GPUs. Needs --zero_kl and excludes --hmc"
    )
    tune: bool = flag(
        True,
        "on a CPU: time for a few seconds which number type, form of convolutions and number of threads are fastest, "
        "unless they are given, and in long runs whether compiling is faster. The outcome is kept in ways.json, in the "
        "folder of torch's compiled functions; a resumed run keeps what it began with",
    )
    fold: bool | None = flag(
        None, "merge average pooling into the kernels before it; default: on, on CPUs the faster one, see --tune"
    )
    patches: bool | None = flag(
        None,
        "on a CPU: convolve images of one channel as a product of patches; default: the faster one, see --tune",
    )
    threads: int | None = flag(
        None,
        "threads of each worker on a CPU; default: OMP_NUM_THREADS, else one for each core, or fewer if that is "
        "faster, see --tune",
        at_least=1,
    )

    @property
    def explores(self) -> bool:
        """Whether a share of the chains, `noise_rate`, starts from noise and the others from normal distributions."""
        return self.datasource == "gauss" and self.noise_rate > 0


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """Loss and update"""

    objective: str = flag(
        "cd",
        "loss: cd (contrastive divergence), logsumexp (samples weighted by softmax(-E)) or softplus (of the "
        "difference of energies)",
        choices=("cd", "logsumexp", "softplus"),
        not_with=SAMPLES_ONLY,
    )
    zero_kl: bool = flag(
        False, "leave out the KL term, whose gradient flows through the whole chain and takes much memory and time"
    )
    ml_coeff: float = flag(1.0, "weight of the likelihood term of the loss", not_with=SAMPLES_ONLY)
    l2_coeff: float = flag(
        1.0, "weight of the mean squared energies, the regulariser of the loss", at_least=0, not_with=SAMPLES_ONLY
    )
    mismatch: float = flag(
        0.0,
        "weight of a second contrastive loss over the whole batch: images with their own labels against images "
        "with the labels of other images; 0: none",
        at_least=0,
        not_with=SAMPLES_ONLY,
    )
    classify: float = flag(
        0.0,
        "weight of a classification loss, which trains the energy as a classifier, too (a joint energy model): the "
        "cross-entropy of softmax(-E * --classify_scale) over all classes, each of which costs an energy of every "
        "image: with ten classes and 20 steps an iteration takes 1.5 times as long. Needs --cclass; 0: none",
        at_least=0,
        not_with=SAMPLES_ONLY,
    )
    classify_scale: float = flag(
        100.0,
        "factor of the energies in the classification loss: energies of classes come to differ by a few times its "
        "inverse, so that a small factor makes them steep",
        at_least=0,
        only_with="classify",
        not_with=SAMPLES_ONLY,
    )
    temperature: float = flag(1.0, "factor of the energy in chains and loss", at_least=0)
    lr: float = flag(3e-4, "learning rate of Adam", at_least=0, not_with=SAMPLES_ONLY)
    lr_schedule: str = flag(
        "constant",
        "learning rate over the run: constant, or cosine, which falls from --lr towards 0 at the last iteration "
        "(Loshchilov and Hutter 2017); a later end raises it again",
        choices=("constant", "cosine"),
        not_with=SAMPLES_ONLY,
    )
    ema_decay: float = flag(
        0.0,
        "decay of a moving average of the weights, with which the run then samples, 0 to 1; 0: no average",
        at_least=0,
        at_most=1,
    )
    guard: bool = flag(
        True, "if the run diverges, return to its last good state and halve the learning rate", not_with=SAMPLES_ONLY
    )
    max_rollbacks: int = flag(
        10,
        "number of returns to a good state after which a further divergence stops the run",
        at_least=0,
        only_with="guard",
        not_with=SAMPLES_ONLY,
    )


@dataclasses.dataclass(frozen=True)
class NetworkSettings:
    """Network"""

    cclass: bool = flag(False, "condition the network on class labels")
    model_cclass: bool = flag(
        False,
        "condition the network on classes without using labels: it infers the classes of the chains itself, and "
        "energies of data are averaged over all classes",
    )
    num_filters: int | None = flag(
        None,
        "number of filters, the width of the network; default: 64 (grey images, sprites, 128x128), 128 (colour "
        "32x32), 192 (--wider_model), 256 (imagenet)",
        at_least=1,
        at_most=MOST_FILTERS,
    )
    large_model: bool = flag(False, "use the network ResNet32Large, which has dropout")
    larger_model: bool = flag(False, "use the network ResNet32Larger")
    wider_model: bool = flag(False, "use the network ResNet32Wider")
    use_attention: bool = flag(False, "add self-attention to the residual network")
    swish_act: bool = flag(
        False, "use swish instead of leaky ReLU, in those networks where the reference implementation has it"
    )
    downsample: bool = flag(False, "in networks for grey images: use average pooling instead of stride 2")
    spec_norm: bool = flag(True, "use spectral normalisation of the weights")
    spec_iter: int = flag(
        1,
        "power iterations per training iteration that estimate the spectral norm",
        at_least=1,
        only_with="spec_norm",
        at_most=1000,
    )
    spec_norm_val: float = flag(
        1.0, "spectral norm of the weights after normalisation", at_least=0, only_with="spec_norm"
    )
    spec_eval: bool = flag(False, "keep the vector of the power iteration fixed while training", only_with="spec_norm")


@dataclasses.dataclass(frozen=True)
class OutputSettings(InceptionWeights):
    """Output"""

    log_interval: int = flag(10, "iterations between two lines of the log", at_least=1, not_with=SAMPLES_ONLY)
    save_interval: int = flag(1000, "iterations between two checkpoints", at_least=1, not_with=SAMPLES_ONLY)
    test_interval: int = flag(
        1000,
        "iterations between two tests, which draw pictures and measure sample quality",
        at_least=1,
        not_with=SAMPLES_ONLY,
    )
    num_samples: int | None = flag(
        None,
        "number of images to sample at the end of a run and with --train=False; default: 50,000 if Inception measures "
        "them, else 100. Tests measure as many, with Inception at most 1,000",
        at_least=1,
        at_most=MOST_IMAGES,
    )
    quality: bool | None = flag(
        None,
        "measure the quality of samples at each test and at the end: by Inception for colour images if its weights are "
        "available, else by a small classifier of the data; default: on for cifar10, imagenet and imagenetfull",
    )
    sample_steps: int | None = flag(
        None,
        "Langevin steps of the chains that sample images for pictures and reports; default: 10 times --num_steps",
        at_least=0,
    )
    proposal_debug: bool = flag(
        False, "the share of accepted moves of --hmc is always logged, as hmc_acceptance", inert=True
    )


@dataclasses.dataclass(frozen=True)
class TrackerSettings:
    """Experiment trackers (the packages wandb and trackio, which are needed only here)"""

    wandb: str = flag(
        "",
        "project on Weights & Biases that gets a copy of the log and the pictures; empty: none",
        not_with=SAMPLES_ONLY,
        can_be_empty=True,
    )
    trackio: str = flag(
        "",
        "project in Trackio, which runs on this machine, that gets a copy of the log and the pictures; empty: none",
        not_with=SAMPLES_ONLY,
        can_be_empty=True,
    )

    @property
    def projects(self) -> dict[str, str]:
        """The projects of the trackers that are on, by the names of their packages."""
        projects = {"wandb": self.wandb, "trackio": self.trackio}
        return {package: project for package, project in projects.items() if project}


@dataclasses.dataclass(frozen=True)
class TrainSettings(
    RunSettings,
    TrainingData,
    SpriteSettings,
    NegativeSettings,
    LossSettings,
    NetworkSettings,
    OutputSettings,
    TrackerSettings,
):
    """All settings of train.py."""

    @property
    def noise_std(self) -> float:
        """The standard deviation of a Langevin step's noise, for images in [0, rescale]."""
        return NOISE_UNIT * self.rescale * self.noise_scale

    @property
    def bounds(self) -> tuple[float, float]:
        """The range of pixel values."""
        return 0.0, self.rescale

    @property
    def has_plain_chains(self) -> bool:
        """Whether chains consist of Langevin steps through which no gradient flows back."""
        return self.zero_kl and not self.hmc


# ---------------------------------------------------------------------------------------------------------------------
# ebm_sandbox.py


@dataclasses.dataclass(frozen=True)
class SandboxChains(ChainPrecision):
    """Sampling"""

    num_steps: int = flag(
        20,
        "Langevin steps per round of a chain, and per refinement before classification; 0: none; auto: so many "
        "that all rounds of a task together are about as long as the chains of the training run's own samples",
        at_least=0,
        not_with="task=energyeval|mixenergy|mixing",
        takes_auto=True,
    )
    step_lr: float | None = flag(
        None,
        "step size of a Langevin step: the factor of the energy gradient; default: as in training, else 10",
        at_least=0,
        not_with="task=energyeval|mixenergy",
    )
    proj_norm: float = flag(
        0.0,
        "clip each element of the gradient to ± this value; 0: no clipping",
        at_least=0,
        not_with=("task=energyeval|mixenergy", "sampler=mala"),
    )
    batch_size: int = flag(
        32,
        "images that the network processes at once; lowered automatically if memory is short",
        at_least=1,
        at_most=MOST_AT_ONCE,
    )
    limit: int | None = flag(
        None,
        "number of images to examine; default: all, or as many as a picture shows; task mixing: of chains from new "
        "starts, and of chains from test images; default: 8",
        at_least=1,
        not_with=("single", "task=democlass"),
        at_most=MOST_IMAGES,
    )
    single: bool = flag(False, "the same as --limit=1", not_with="task=democlass")
    datasource: str = flag("random", "the task determines where chains start", inert=True)


@dataclasses.dataclass(frozen=True)
class SandboxData(TestData):
    """Data"""

    svhn: bool = flag(False, "the same as --dataset=svhn")
    cond_shape: bool | None = flag(None, "the dSprites model is conditioned on the shape; default: as in training")
    cond_size: bool | None = flag(
        None,
        "the dSprites model is conditioned on the size; default: as in training (also called --cond_scale)",
        alias="cond_scale",
    )
    cond_pos: bool | None = flag(None, "the dSprites model is conditioned on the position; default: as in training")
    cond_rot: bool | None = flag(None, "the dSprites model is conditioned on the rotation; default: as in training")


@dataclasses.dataclass(frozen=True)
class ClassificationSettings:
    """Classification (tasks label and labelfinetune)"""

    attack: str = flag(
        "pgd",
        "attacks of task label: pgd, the one of the reference, with --pgd steps; autoattack, those of AutoAttack on "
        "100 images, which stay in [0, 1], and checks of these attacks (needs the package torchattacks)",
        choices=("pgd", "autoattack"),
        only_with="task=label",
    )
    attack_steps: int = flag(
        100, "gradient steps of each attack of AutoAttack", at_least=1, only_with="attack=autoattack"
    )
    attack_queries: int = flag(
        5000, "queries of AutoAttack's attack without gradients, Square", at_least=1, only_with="attack=autoattack"
    )
    pgd: int = flag(
        0,
        "steps of the PGD attack on test images; 0: no attack",
        at_least=0,
        only_with=CLASSIFIES,
        not_with="attack=autoattack",
    )
    lnorm: str = flag(
        "-1",
        "norm of the ball within which the attack moves an image: -1 is L∞, 2 is L2",
        choices=("-1", "2"),
        only_with=ATTACKS,
    )
    lival: float = flag(
        8.0, "radius of the attack's L∞ ball, in units of 1/255", at_least=0, only_with="lnorm=-1", not_with="labelgrid"
    )
    l2val: float = flag(
        40.0, "radius of the attack's L2 ball, in units of 1/255", at_least=0, only_with="lnorm=2", not_with="labelgrid"
    )
    l2_per_step: bool = flag(
        False,
        "with --lnorm=2: limit each step of the attack by --l2val, but not their sum, as in the reference",
        only_with="pgd",
    )
    adaptive: int = flag(
        0,
        "number of draws of the refinement's noise over which the attack averages gradients through the refinement; "
        "0: the attack ignores the refinement",
        at_least=0,
        only_with=ATTACKS,
    )
    refine: float = flag(
        8.0,
        "radius of the L∞ ball within which Langevin steps refine an image before it is classified, in units of 1/255",
        at_least=0,
        only_with=CLASSIFIES,
        not_with="num_steps=0",
    )
    labelgrid: bool = flag(
        False,
        "task label: repeat the attack with L∞ balls of 0 to 30/255, or L2 balls of 0 to 95/255",
        only_with="task=label",
        not_with="attack=autoattack",
    )
    train: bool = flag(
        True,
        "task labelfinetune: train the classifier; --notrain loads the one of an earlier run",
        only_with="task=labelfinetune",
    )


@dataclasses.dataclass(frozen=True)
class OutlierSettings:
    """Out-of-distribution sets of tasks mixenergy (default: --interpolationmix) and ood (default: all there are)"""

    svhnmix: bool = flag(False, "compare with SVHN", only_with="task=mixenergy")
    cifar100mix: bool = flag(False, "compare with CIFAR-100", only_with="task=mixenergy")
    texturemix: bool = flag(False, "compare with the Describable Textures", only_with="task=mixenergy")
    randommix: bool = flag(False, "compare with Gaussian noise, 0.5 + 0.5·N(0, 1)", only_with="task=mixenergy")
    interpolationmix: bool = flag(False, "compare with averages of two test images", only_with="task=mixenergy")
    mixset: tuple[str, ...] = flag(
        (),
        "compare with further data sets, names separated by commas, such as mnist,digits; in task ood instead of all "
        "data sets that are in --datadir",
        only_with="task=mixenergy|ood",
    )
    mixfolder: tuple[str, ...] = flag(
        (),
        "compare with the images of this folder; may be repeated",
        repeated=True,
        only_with="task=mixenergy|ood",
        is_path=True,
    )
    repeats: int = flag(
        3,
        "task ood: number of times that everything is measured, with other noise and, with --limit, other images",
        at_least=1,
        at_most=1000,
        only_with="task=ood",
    )


@dataclasses.dataclass(frozen=True)
class LatentSettings:
    """Directions in task latent"""

    hessian: bool = flag(
        True,
        "move images along the eigenvectors of the smallest eigenvalues of the energy's Hessian; --nohessian: along "
        "the directions in which the features of the last layer change most",
        only_with="task=latent",
    )


@dataclasses.dataclass(frozen=True)
class MixingSettings:
    """Long chains in task mixing"""

    sampler: str = flag(
        "langevin",
        "how chains move: langevin, as in training, or mala, Langevin steps that are accepted or rejected so that the "
        "density is kept exactly",
        choices=("langevin", "mala"),
        only_with="task=mixing",
    )
    chain_steps: int = flag(
        10_000, "length of the chains, in steps", at_least=50, at_most=10**6, only_with="task=mixing"
    )
    noise_scale: float = flag(
        NOISE_UNIT,
        "standard deviation of a step's noise, for images in [0, 1]; with --step_lr it decides the density, about "
        "exp(−E · 2·step_lr / noise_scale²)",
        at_least=1e-6,
        at_most=0.2,
        only_with="task=mixing",
    )
    label: str | None = flag(
        None, "class of all chains, by its number or name; default: the first", only_with="task=mixing"
    )


@dataclasses.dataclass(frozen=True)
class SandboxSettings(
    ModelChoice,
    SandboxData,
    SandboxChains,
    ClassificationSettings,
    OutlierSettings,
    LatentSettings,
    MixingSettings,
    CheckedNetwork,
):
    """All settings of ebm_sandbox.py."""

    @property
    def most_images(self) -> int | None:
        """The number of images to examine; None: the task decides."""
        return 1 if self.single else self.limit


# ---------------------------------------------------------------------------------------------------------------------
# ebm_combine.py


@dataclasses.dataclass(frozen=True)
class CombineRun(ReleaseFolders, DeviceChoice):
    """Run"""

    exp: str = flag("combine", "name of the results, which go to <logdir>/<exp>/<task>/", not_with="task=train")
    batch_size: int = flag(
        256, "images that the models process at once", at_least=1, not_with="task=train", at_most=MOST_AT_ONCE
    )
    limit: int | None = flag(
        None,
        "number of images to sample or examine; default: --batch_size, in labeldiscover 30 times as many, in gentest "
        "and genbaseline all unseen combinations",
        at_least=1,
        not_with="task=train",
        at_most=MOST_IMAGES,
    )
    seed: int = flag(0, "seed of all random numbers", at_least=0, not_with="task=train", at_most=LARGEST_SEED)
    dsprites_path: str | None = flag(
        None, "the published dSprites file, an .npz; default: the program draws the sprites itself", is_path=True
    )
    data_workers: int = flag(4, "sprites are in memory or drawn, no image file is decoded", inert=True)


@dataclasses.dataclass(frozen=True)
class ConceptChoice:
    """Concepts"""

    cond_size: bool = flag(
        True, "combine the model of the sprite's size with the others (also called --cond_scale)", alias="cond_scale"
    )
    exp_size: str = flag(
        "dsprites_cond_size", "experiment of the model that is conditioned on the size", only_with="cond_size"
    )
    resume_size: str = flag(
        "latest",
        "iteration of the size model's checkpoint, 'best' or 'latest' (-1 also means latest)",
        only_with="cond_size",
        not_with="task=train",
    )
    cond_shape: bool = flag(True, "combine the model of the sprite's shape with the others")
    exp_shape: str = flag(
        "dsprites_cond_shape", "experiment of the model that is conditioned on the shape", only_with="cond_shape"
    )
    resume_shape: str = flag(
        "latest",
        "iteration of the shape model's checkpoint, 'best' or 'latest' (-1 also means latest)",
        only_with="cond_shape",
        not_with="task=train",
    )
    cond_pos: bool = flag(True, "combine the model of the sprite's position with the others")
    exp_pos: str = flag(
        "dsprites_cond_pos", "experiment of the model that is conditioned on the position", only_with="cond_pos"
    )
    resume_pos: str = flag(
        "latest",
        "iteration of the position model's checkpoint, 'best' or 'latest' (-1 also means latest)",
        only_with="cond_pos",
        not_with="task=train",
    )
    cond_rot: bool = flag(True, "combine the model of the sprite's rotation with the others")
    exp_rot: str = flag(
        "dsprites_cond_rot", "experiment of the model that is conditioned on the rotation", only_with="cond_rot"
    )
    resume_rot: str = flag(
        "latest",
        "iteration of the rotation model's checkpoint, 'best' or 'latest' (-1 also means latest)",
        only_with="cond_rot",
        not_with="task=train",
    )
    ema: bool = flag(
        False, "load the averaged weights, which training runs with --ema_decay save", not_with="task=train|genbaseline"
    )
    combine: str = flag(
        "alternate",
        "how energies are combined: alternate, sum, or an expression as described above",
        only_with="task=conceptcombine",
    )
    weights: tuple[str, ...] = flag(
        (),
        "task conceptcombine with alternate or sum: factor of one concept's energy, such as pos=2; may be repeated",
        repeated=True,
        only_with="task=conceptcombine",
    )
    models: tuple[str, ...] = flag(
        (),
        "a further model for expressions, as name=exp or name=exp:iteration; may be repeated",
        repeated=True,
        only_with="task=conceptcombine",
    )
    labels: tuple[str, ...] = flag(
        (),
        "label of one model, such as shape=heart, size=0.7, pos=0.2,0.8 or rot=90 (degrees); default: the label of "
        "a random sprite; may be repeated",
        repeated=True,
        only_with="task=conceptcombine",
    )


@dataclasses.dataclass(frozen=True)
class CombineChains(CompiledChains):
    """Sampling"""

    precision: str = flag(
        "float32",
        "number type of energies and gradients in Langevin chains; images stay in float32",
        choices=tuple(PRECISIONS),
    )

    num_steps: int = flag(
        20,
        "Langevin steps on each energy; in task labeldiscover: Langevin steps on the label",
        at_least=0,
        not_with="task=train|genbaseline",
    )
    step_lr: float = flag(
        500.0,
        "step size of a Langevin step: the factor of the energy gradient",
        at_least=0,
        only_with="task=conceptcombine|gentest",
    )
    label_lr: float = flag(
        1.0,
        "labeldiscover: step size of a step on the label: the factor of the energy gradient",
        at_least=0,
        only_with="task=labeldiscover",
    )
    first_noise: float = flag(
        0.0,
        "conceptcombine: standard deviation of the noise at the first step, from which it falls to 0.005; 0: "
        "always 0.005",
        at_least=0,
        only_with="task=conceptcombine",
    )
    first_step_lr: float = flag(
        0.0,
        "conceptcombine: step size of the first step, from which it falls to --step_lr; 0: always --step_lr",
        at_least=0,
        only_with="task=conceptcombine",
    )
    restarts: int = flag(
        1,
        "conceptcombine: number of chains per image, of which the one with the lowest energy is used",
        at_least=1,
        only_with="task=conceptcombine",
        at_most=10_000,
    )


@dataclasses.dataclass(frozen=True)
class CombineTraining:
    """Training (tasks train, gentest and genbaseline)"""

    train_flags: str = flag(
        "--max_iter=10000",
        "train: flags for train.py, which follow the published flags and override them",
        only_with="task=train",
        can_be_empty=True,
    )
    train: bool = flag(
        False, "gentest: train the models again even if an earlier run has trained them", only_with="task=gentest"
    )
    joint_shape: bool = flag(
        False, "gentest, genbaseline: combine position with shape instead of size", only_with="task=gentest|genbaseline"
    )
    joint_rot: bool = flag(
        False,
        "gentest, genbaseline: combine position with rotation instead of size",
        only_with="task=gentest|genbaseline",
    )
    balance: bool = flag(
        True,
        "gentest, genbaseline: repeat the few images in which the other concept varies until they are as many as those "
        "in which the position does; --nobalance: use each once, as the release",
        only_with="task=gentest|genbaseline",
    )
    break_steps: int | None = flag(
        None,
        "gentest, genbaseline: largest number of training iterations; default: 300 in gentest, which makes one pass "
        "over its images, and in genbaseline five passes",
        at_least=1,
        only_with="task=gentest|genbaseline",
    )
    lr: float = flag(1e-3, "gentest: learning rate of the energy models", at_least=0, only_with="task=gentest")
    frac: float = flag(
        0.0,
        "genbaseline: share of the sprites with both concepts varied that is trained on as well, 0 to 1",
        at_least=0,
        at_most=1,
        only_with="task=genbaseline",
        not_with="plot_curve",
    )
    plot_curve: bool = flag(
        False,
        "genbaseline: repeat for --frac from 0 to 1 in steps of 0.1, and plot the curve",
        only_with="task=genbaseline",
    )


@dataclasses.dataclass(frozen=True)
class CombineNetwork(UnrecordedNetwork):
    """Network (checkpoints define it; these flags are compared with them, and used for new networks in gentest)"""

    num_filters: int | None = flag(
        None,
        "number of filters, the width of the network; default for new networks in gentest and genbaseline: 64",
        at_least=1,
        at_most=MOST_FILTERS,
    )
    cclass: bool | None = flag(None, "the networks are conditioned on a concept")
    spec_norm: bool | None = flag(None, "spectral normalisation of the weights; default for new networks: True")
    use_attention: bool | None = flag(None, "the network has self-attention; no network for sprites has it")
    proj_cclass: bool = flag(False, "labels enter a network as they did in training", inert=True)
    proposal_debug: bool = flag(False, "no task makes Hamiltonian Monte Carlo moves", inert=True)
    use_bias: bool = flag(True, "the checkpoint determines which layers have biases", inert=True)


@dataclasses.dataclass(frozen=True)
class CombineSettings(CombineRun, ConceptChoice, CombineChains, CombineTraining, CombineNetwork):
    """All settings of ebm_combine.py."""


# ---------------------------------------------------------------------------------------------------------------------
# sample.py, imagenet_demo.py, eval_inception.py, ais.py


@dataclasses.dataclass(frozen=True)
class SampleChoice:
    """Samples"""

    num: int = flag(100, "number of images to sample", at_least=1, at_most=MOST_IMAGES)
    label: str | None = flag(
        None, "class of all images, by its number or name; default: the classes one after the other"
    )
    folder: bool = flag(False, "also write each image to a PNG file of its own")


@dataclasses.dataclass(frozen=True)
class SampleChains(CompiledChains):
    """Sampling"""

    num_steps: int | None = flag(
        None,
        "Langevin steps per image; default: as many as the training run takes for its own samples, else 200",
        at_least=0,
        takes_auto=True,
    )
    step_lr: float | None = flag(
        None,
        "step size of a Langevin step: the factor of the energy gradient; default: as in training, else 10",
        at_least=0,
    )
    proj_norm: float = flag(0.0, "clip each element of the gradient to ± this value; 0: no clipping", at_least=0)
    noise_scale: float = flag(
        NOISE_UNIT, "standard deviation of a Langevin step's noise, for images in [0, 1]", at_least=0
    )
    batch_size: int = flag(100, "images that are sampled at once", at_least=1, at_most=MOST_AT_ONCE)


@dataclasses.dataclass(frozen=True)
class SampleSettings(ModelChoice, SampleChoice, SampleChains, CheckedNetwork):
    """All settings of sample.py."""


@dataclasses.dataclass(frozen=True)
class DemoChains(CompiledChains):
    """Sampling"""

    num_steps: int = flag(
        200,
        "Langevin steps of the chains; auto: as many as the training run takes for its own samples",
        at_least=1,
        takes_auto=True,
    )
    step_lr: float | None = flag(
        None,
        "step size of a Langevin step: the factor of the energy gradient; default: as in training, else 180",
        at_least=0,
    )
    batch_size: int = flag(
        16, "number of images, shown in a grid that is as square as possible", at_least=1, at_most=MOST_AT_ONCE
    )
    classes: str | None = flag(
        None,
        "classes of the images, numbers from 0 or names, separated by commas and repeated to fill the grid; "
        "default: random classes",
    )
    class_names: str | None = flag(
        None, "text file with the names of the classes, one per line in the order of their numbers", is_path=True
    )
    every: int = flag(1, "Langevin steps per frame of the GIF", at_least=1)


@dataclasses.dataclass(frozen=True)
class DemoSettings(ReleaseFolders, ModelChoice, DemoChains, CheckedNetwork):
    """All settings of imagenet_demo.py."""


@dataclasses.dataclass(frozen=True)
class EnsembleChoice:
    """Checkpoints"""

    iterations: tuple[str, ...] = flag(
        (), "iterations to measure, such as 200,400,800 or all, and to plot as a curve; default: --resume_iter alone"
    )
    idx: int = flag(0, "number of this evaluation, which is part of the name of its folder", at_least=0)
    ensemble: int = flag(
        10,
        "number of checkpoints whose energies take turns in the chains: those 300 iterations apart if they exist, "
        "else the newest",
        at_least=1,
    )


@dataclasses.dataclass(frozen=True)
class PoolSettings(ChainPrecision):
    """Sampling from pools of persistent chains"""

    im_number: int = flag(50_000, "number of images to sample", at_least=4, at_most=MOST_IMAGES)
    num_steps: int = flag(
        20,
        "Langevin steps per round; auto: as many as the training run takes for its own samples",
        at_least=1,
        takes_auto=True,
    )
    step_lr: float | None = flag(
        None,
        "step size of a Langevin step: the factor of the energy gradient; default: as in training, else 10",
        at_least=0,
    )
    proj_norm: float = flag(0.05, "clip each element of the gradient to ± this value; 0: no clipping", at_least=0)
    noise_scale: float = flag(
        NOISE_UNIT, "standard deviation of a Langevin step's noise, for images in [0, 1]", at_least=0
    )
    batch_size: int = flag(
        512,
        "chains that run in one round: new ones until a pool has 1,000, or --im_number if that is less; then chains "
        "of the pool, drawn at random with repetition",
        at_least=1,
        at_most=MOST_AT_ONCE,
    )
    repeat_scale: int = flag(
        100, "half the number of rounds of a pool of 1,000 images; the rounds that fill it count", at_least=1
    )
    nomix: int = flag(10, "number of rounds at the end in which no chain restarts or gets a new label", at_least=0)

    @property
    def rounds(self) -> int:
        """The number of rounds of a pool."""
        return 2 * self.repeat_scale

    @property
    def pool_size(self) -> int:
        """The number of chains that fill a pool."""
        return min(POOL, self.im_number)

    @property
    def round_size(self) -> int:
        """The number of chains that run in one round, not more than the images that are wanted."""
        return min(self.batch_size, self.im_number)


@dataclasses.dataclass(frozen=True)
class MeasureSettings(InceptionWeights):
    """Quality measures"""

    features: str = flag(
        "auto",
        "network in whose features images are compared; auto: Inception for colour images if its weights are "
        "available, else a classifier",
        choices=("auto", "inception", "classifier"),
    )
    splits: int = flag(5_000, "images per split of the Inception score", at_least=1, not_with="features=classifier")
    reference: str | None = flag(
        None,
        "split of the data set to compare with; default: both for cifar10, test (the validation set) for imagenet "
        "and imagenetfull, else train",
        choices=("train", "test", "both"),
    )
    real_number: int = flag(
        100_000, "largest number of real images to compare with, drawn at random from a larger data set", at_least=100
    )
    cache: str | None = flag(
        None, "folder where statistics of real images are kept; default: <logdir>/statistics", is_path=True
    )


@dataclasses.dataclass(frozen=True)
class ReleasedInceptionFlags:
    """Other flags of the release"""

    scaled: bool = flag(True, "the noise is that of --noise_scale in all steps", inert=True)
    single: bool = flag(False, "--ensemble chooses how many checkpoints take turns", inert=True)
    datasource: str = flag("random", "chains start as in the model's training", inert=True)


@dataclasses.dataclass(frozen=True)
class InceptionSettings(
    ModelChoice, EnsembleChoice, PoolSettings, MeasureSettings, TestData, CheckedNetwork, ReleasedInceptionFlags
):
    """All settings of eval_inception.py."""


@dataclasses.dataclass(frozen=True)
class AnnealingSettings:
    """Annealed importance sampling"""

    limit: int | None = flag(
        None,
        "number of test images to measure, drawn at random; default: all",
        at_least=1,
        not_with=IS_GAUSS,
        at_most=MOST_IMAGES,
    )
    label: str | None = flag(
        None,
        "class to measure, its density and its test images, by its number or name; default: all classes",
        not_with=IS_GAUSS,
    )
    pdist: tuple[int, ...] = flag(
        (10,),
        "number of distributions on the way from the box, where chains start, to the model; several numbers, such as "
        "10,100,1000, are compared",
        at_least=1,
        at_most=10**8,
    )
    alr: float | None = flag(
        None,
        "step size of HMC at the box; it falls to a 56th of this at the model; default: 0.0065 for grey images, "
        "0.0045 for colour (0.0085 with --rescale=8), 0.0085 for gauss, 0.0045 for 2d",
        at_least=0,
    )
    batch_size: int = flag(
        16, "number of chains, for each class if the model is conditioned on classes", at_least=2, at_most=MOST_AT_ONCE
    )
    temperature: float | None = flag(None, "factor of the energy; default: as in training", at_least=0)
    rescale: float | None = flag(
        None,
        "largest pixel value: images are scaled to [0, rescale]; default: as in training",
        at_least=1e-6,
        at_most=1e6,
    )
    gauss_dim: int = flag(
        500,
        "for --dataset=gauss: number of dimensions, 2 for --dataset=2d; the precision (inverse variance) of both is "
        "--temperature",
        at_least=1,
        only_with="dataset=gauss",
        at_most=10**6,
    )


@dataclasses.dataclass(frozen=True)
class ReleasedAisFlags:
    """Other flags of the release"""

    num_filters: int | None = flag(
        None,
        "number of filters, the width of the network; only compared with the checkpoint",
        at_least=1,
        at_most=MOST_FILTERS,
    )
    max_pool: bool = flag(False, "no network of this project has max pooling", inert=True)
    single: bool = flag(False, "--limit chooses how many test images are measured", inert=True)
    datasource: str = flag("random", "chains start from noise in the box", inert=True)
    proposal_debug: bool = flag(False, "the shares of accepted moves are always reported", inert=True)


@dataclasses.dataclass(frozen=True)
class AisSettings(ModelChoice, AnnealingSettings, TestData, CheckedNetwork, ReleasedAisFlags):
    """All settings of ais.py."""
