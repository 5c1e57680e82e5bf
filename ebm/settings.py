"""Every setting of every script, once: its default, range, unit and help; a script's flags are made from these.

Groups that scripts share are base classes, so a function takes the group that it needs and a script's settings fit.
Below a script's `main` nobody knows of flags.
"""

from __future__ import annotations

import dataclasses
import pathlib

import dsprites
from acceleration import PRECISIONS
from cli import flag
from data import DATASETS
from distributed import BACKENDS
from presets import PRESETS
from sampling import PROJ_NORM_TYPES

DEVICES = ("auto", "cpu", "cuda")
NOISE_UNIT = 0.005  # standard deviation of a Langevin step's noise at noise_scale 1, for images in [0, 1]

# Settings that choose a larger network for colour images, and the network.
SIZES = {"large_model": "ResNet32Large", "larger_model": "ResNet32Larger", "wider_model": "ResNet32Wider"}
# What a model of sprites is conditioned on, and the subset of sprites, by the setting that chooses it.
CONDITIONS = {f"cond_{name}": name for name in dsprites.CONCEPTS}
SUBSETS = {"dsprites_restrict" if name == "restrict" else f"d{name}_only": name for name in dsprites.SUBSETS}


# ---------------------------------------------------------------------------------------------------------------------
# Groups that scripts share


@dataclasses.dataclass(frozen=True)
class DataFiles:
    """Where data lies"""

    datadir: str = flag("data", "where torchvision's datasets are kept or downloaded to")
    download: bool = flag(True, "download what is not there yet")
    data_path: str | None = flag(None, "the folder of images of --dataset=folder; class subfolders give labels")
    imagenet_path: str | None = flag(None, "the 32x32 files of --dataset=imagenet, pickles or .npz")
    imagenet_datadir: str | None = flag(None, "TFRecords or class folders of --dataset=imagenetfull")
    dsprites_path: str | None = flag(None, "the published .npz; without it sprites are drawn from their latents")

    def find_path(self, dataset: str) -> str | None:
        """Return the path that belongs to a data set, None where it was not given or takes none."""
        name = DATASETS[dataset].path_setting
        return getattr(self, name) if name else None


@dataclasses.dataclass(frozen=True)
class ChainPrecision:
    """Number type"""

    precision: str = flag(
        "float32", "number type of energies and gradients along chains, as in train.py", choices=tuple(PRECISIONS)
    )


@dataclasses.dataclass(frozen=True)
class ModelChoice:
    """Model"""

    exp: str = flag("default", "name of the experiment, the model's folder below --modeldir")
    modeldir: str = flag("cachedir", "where experiments are kept")
    resume_iter: str = flag("latest", "the checkpoint's iteration, 'best' or 'latest' (also -1)")
    ema: bool = flag(False, "take the averaged weights of a run with --ema_decay")
    logdir: str = flag("sandbox_cachedir", "where results go")
    seed: int = flag(0, "of everything random", at_least=0)
    device: str = flag("auto", "where to compute; auto takes a GPU if there is one", choices=DEVICES)


@dataclasses.dataclass(frozen=True)
class TestData(DataFiles):
    """Data"""

    dataset: str | None = flag(None, "as in train.py; default what the model was trained on, or cifar10")
    data_workers: int = flag(5, "threads that decode images from the disk", at_least=0)


@dataclasses.dataclass(frozen=True)
class CheckedNetwork:
    """Network (read from the checkpoint; what is given here is checked against it)"""

    swish_act: bool | None = flag(None, "swish activations: the one thing that a TensorFlow checkpoint does not tell")
    cclass: bool | None = flag(None, "conditioned on the class")
    large_model: bool | None = flag(None, "ResNet32Large")
    larger_model: bool | None = flag(None, "ResNet32Larger")
    wider_model: bool | None = flag(None, "ResNet32Wider")
    use_attention: bool | None = flag(None, "self attention in the residual networks")
    spec_norm: bool | None = flag(None, "spectral normalisation")
    bn: bool = flag(False, "no network here has batch normalisation", inert=True)
    use_bias: bool = flag(True, "biases are what the checkpoint holds", inert=True)


# ---------------------------------------------------------------------------------------------------------------------
# train.py


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Run"""

    preset: str | None = flag(None, "settings of a published or shipped run; flags beside it win", presets=PRESETS)
    exp: str = flag("default", "name of the experiment, its folder below --logdir")
    logdir: str = flag("cachedir", "where experiments are kept")
    train: bool = flag(True, "train; --train=False only samples from the checkpoint and reports")
    resume_iter: str = flag("-1", "go on from this iteration's checkpoint, or 'latest'; -1 starts anew")
    max_iter: int | None = flag(None, "stop after this many iterations", at_least=0)
    epoch_num: int = flag(10000, "stop after this many passes over the data", at_least=1)
    seed: int = flag(0, "of everything random; every worker derives its own", at_least=0)
    device: str = flag("auto", "where to compute; auto takes a GPU if there is one", choices=DEVICES)
    deterministic: bool = flag(
        False, "on a GPU take kernels that give the same bits in every run; slower, see --compile"
    )
    backend: str = flag("auto", "what joins several workers", choices=BACKENDS)
    num_gpus: int = flag(1, "a process drives one device; start workers with mpiexec", at_least=1, inert=True)

    @property
    def folder(self) -> pathlib.Path:
        """The experiment's folder."""
        return pathlib.Path(self.logdir) / self.exp


@dataclasses.dataclass(frozen=True)
class TrainingData(DataFiles):
    """Data"""

    dataset: str = flag("mnist", "what to train on", choices=tuple(DATASETS))
    image_size: int | None = flag(None, "height and width of --dataset=folder, in pixels", at_least=8)
    channels: int | None = flag(None, "1 (grey) or 3 (colour), of --dataset=folder", at_least=1, at_most=3)
    data_workers: int = flag(4, "processes that decode images from the disk", at_least=0)
    batch_size: int = flag(256, "images per iteration and worker", at_least=1)
    single: bool = flag(False, "overfit one image")
    augment: bool = flag(False, "random crops (4 pixels of padding) and horizontal flips")
    mixup: bool = flag(False, "convex mixes of two images, weight Beta(1, 1)")
    cutout: bool = flag(False, "blank a random square of each image")
    cutout_inside: bool = flag(False, "keep the square wholly inside the image")
    cutout_prob: float = flag(1.0, "share of images with a square", at_least=0, at_most=1)
    cutout_mask_size: int = flag(16, "side of the square, in pixels", at_least=1)
    rescale: float = flag(1.0, "images are in [0, rescale]", at_least=1e-6)


@dataclasses.dataclass(frozen=True)
class SpriteSettings:
    """dSprites"""

    cond_shape: bool = flag(False, "condition on the shape, one of three")
    cond_size: bool = flag(False, "condition on the scale, 0.5 to 1 (also --cond_scale)", alias="cond_scale")
    cond_pos: bool = flag(False, "condition on the position, x and y in 0 to 1")
    cond_rot: bool = flag(False, "condition on the rotation, cosine and sine")
    dshape_only: bool = flag(False, "only the shape varies")
    dpos_only: bool = flag(False, "only the position varies")
    dsize_only: bool = flag(False, "only the scale varies")
    drot_only: bool = flag(False, "only the rotation varies")
    dsprites_restrict: bool = flag(False, "squares that are not rotated")


@dataclasses.dataclass(frozen=True)
class NegativeSettings:
    """Sampling of the negatives"""

    datasource: str = flag(
        "random",
        "chains start from noise, noised data, or half and half",
        choices=("random", "default", "both"),
    )
    num_chains: int | None = flag(None, "chains per iteration; default one per image of the batch", at_least=1)
    num_steps: int = flag(20, "Langevin steps per iteration", at_least=0)
    step_lr: float = flag(1.0, "step size of the gradient in a Langevin step", at_least=0)
    noise_scale: float = flag(1.0, "noise of a Langevin step, in units of 0.005", at_least=0)
    proj_norm: float = flag(0.0, "clip the gradient of a Langevin step to this norm; 0: no clip", at_least=0)
    proj_norm_type: str = flag("li", "clip elementwise (li), or the whole batch's norm (l2)", choices=PROJ_NORM_TYPES)
    replay_batch: bool = flag(
        False, "start chains from a buffer of 10,000 earlier end points, a share --replay_rate of them"
    )
    replay_rate: float = flag(
        0.95, "share of the chains that --replay_batch starts from the buffer", at_least=0, at_most=1
    )
    pcd: bool = flag(False, "start all chains from the previous end points")
    hmc: bool = flag(False, "Hamiltonian Monte Carlo moves instead of gradient steps; needs --zero_kl")
    precision: str = flag(
        "auto",
        "number type of energies and their gradients; images and parameters stay float32. fp16: in chains only, the "
        "loss is then in TF32. auto: on GPUs fp16, with the KL term or --hmc TF32; on CPUs with AMX bf16 for MnistNet, "
        "by Langevin chains with --zero_kl; else float32",
        choices=("auto", *PRECISIONS),
    )
    compile: bool | None = flag(
        None,
        "compile the Langevin step, up to a minute once; default on GPUs but for --deterministic. Not with the KL term "
        "or --hmc",
    )
    cuda_graph: bool | None = flag(
        None, "launch each chain as one CUDA graph; default on GPUs. Not with the KL term or --hmc"
    )


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """Loss and update"""

    objective: str = flag("cd", "contrastive divergence, or a relative of it", choices=("cd", "logsumexp", "softplus"))
    zero_kl: bool = flag(False, "leave out the KL term, whose gradient flows through the whole chain")
    ml_coeff: float = flag(1.0, "weight of the likelihood term")
    l2_coeff: float = flag(1.0, "weight of the squared energies", at_least=0)
    mismatch: float = flag(
        0.0, "weight of a second contrast, of images with their own labels to the whole batch with others'", at_least=0
    )
    temperature: float = flag(1.0, "factor of the energy in chains and loss", at_least=0)
    lr: float = flag(3e-4, "learning rate of Adam", at_least=0)
    ema_decay: float = flag(
        0.0, "keep a moving average of the weights, and sample with it; 0: none", at_least=0, at_most=1
    )
    guard: bool = flag(True, "roll a diverging run back to its last good state, with half the learning rate")
    max_rollbacks: int = flag(10, "stop a run that diverges more often than this", at_least=0)


@dataclasses.dataclass(frozen=True)
class NetworkSettings:
    """Network"""

    cclass: bool = flag(False, "condition on the class")
    model_cclass: bool = flag(False, "conditional, with classes the model infers itself")
    num_filters: int | None = flag(
        None, "width; default 64 (grey, 128x128), 128, 192 (wider), 256 (imagenet)", at_least=1
    )
    large_model: bool = flag(False, "ResNet32Large, with dropout")
    larger_model: bool = flag(False, "ResNet32Larger")
    wider_model: bool = flag(False, "ResNet32Wider")
    use_attention: bool = flag(False, "self attention in the residual networks")
    swish_act: bool = flag(False, "swish instead of leaky ReLU, where the reference honours it")
    downsample: bool = flag(False, "average pooling instead of stride 2 (networks for grey images)")
    spec_norm: bool = flag(True, "spectral normalisation")
    spec_iter: int = flag(1, "power iterations of the spectral norm per training iteration", at_least=1)
    spec_norm_val: float = flag(1.0, "spectral norm of the normalised weights", at_least=0)
    spec_eval: bool = flag(False, "keep the power iteration's vector as it is")


@dataclasses.dataclass(frozen=True)
class OutputSettings:
    """Output"""

    log_interval: int = flag(10, "iterations between lines of the log", at_least=1)
    save_interval: int = flag(1000, "iterations between checkpoints", at_least=1)
    test_interval: int = flag(1000, "iterations between pictures and quality figures", at_least=1)
    num_samples: int = flag(100, "images that --train=False, or the end of a run, samples", at_least=1)
    quality: bool = flag(False, "measure samples against the data in the features of a small classifier")
    sample_steps: int | None = flag(None, "Langevin steps of those chains; default 10 times --num_steps", at_least=0)
    proposal_debug: bool = flag(False, "the reference printed proposals; log.jsonl has the figures", inert=True)


@dataclasses.dataclass(frozen=True)
class TrainSettings(
    RunSettings, TrainingData, SpriteSettings, NegativeSettings, LossSettings, NetworkSettings, OutputSettings
):
    """All settings of a training run."""

    @property
    def noise_std(self) -> float:
        """Standard deviation of a Langevin step's noise, in units of the images."""
        return NOISE_UNIT * self.rescale * self.noise_scale

    @property
    def bounds(self) -> tuple[float, float]:
        """The range of the images."""
        return 0.0, self.rescale

    @property
    def has_plain_chains(self) -> bool:
        """Whether chains are Langevin steps that no gradient flows back through."""
        return self.zero_kl and not self.hmc


# ---------------------------------------------------------------------------------------------------------------------
# ebm_sandbox.py


@dataclasses.dataclass(frozen=True)
class SandboxChains(ChainPrecision):
    """Sampling"""

    num_steps: int = flag(20, "Langevin steps of a round, or of a refinement; 0: none", at_least=0)
    step_lr: float | None = flag(None, "step size of the gradient; default the model's in training, or 10", at_least=0)
    proj_norm: float = flag(0.0, "clip the gradient elementwise to this; 0: no clip", at_least=0)
    batch_size: int = flag(32, "images at a time; lowered by itself where memory is short", at_least=1)
    limit: int | None = flag(
        None, "look at this many images; by default at all, or as many as a picture shows", at_least=1
    )
    single: bool = flag(False, "the same as --limit=1")
    datasource: str = flag("random", "where chains start is a matter of the task", inert=True)


@dataclasses.dataclass(frozen=True)
class SandboxData(TestData):
    """Data"""

    svhn: bool = flag(False, "the same as --dataset=svhn")
    cond_shape: bool | None = flag(None, "the dSprites model is conditioned on its shape; default as trained")
    cond_size: bool | None = flag(
        None, "the dSprites model is conditioned on its size; default as trained", alias="cond_scale"
    )
    cond_pos: bool | None = flag(None, "the dSprites model is conditioned on its position; default as trained")
    cond_rot: bool | None = flag(None, "the dSprites model is conditioned on its rotation; default as trained")


@dataclasses.dataclass(frozen=True)
class ClassificationSettings:
    """Classification (tasks label and labelfinetune)"""

    pgd: int = flag(0, "steps of the attack on test images; 0: none", at_least=0)
    lnorm: str = flag("-1", "norm of the attack's ball: -1 is L∞, 2 is L2", choices=("-1", "2"))
    lival: float = flag(8.0, "radius of the L∞ ball, in units of 1/255", at_least=0)
    l2val: float = flag(40.0, "radius of the L2 ball, in units of 1/255", at_least=0)
    adaptive: int = flag(0, "attack through the refinement, averaging this many draws of its noise", at_least=0)
    refine: float = flag(8.0, "radius of the L∞ ball of the refinement, in units of 1/255", at_least=0)
    labelgrid: bool = flag(False, "task label over L∞ balls of 0 to 30/255, or L2 balls of 0 to 95/255")
    train: bool = flag(True, "task labelfinetune: train; --notrain loads what was trained before")


@dataclasses.dataclass(frozen=True)
class OutlierSettings:
    """Out-of-distribution sets of mixenergy (several at once; none: --interpolationmix)"""

    svhnmix: bool = flag(False, "SVHN")
    cifar100mix: bool = flag(False, "CIFAR-100")
    texturemix: bool = flag(False, "Describable Textures")
    randommix: bool = flag(False, "Gaussian noise, 0.5 + 0.5·N(0, 1)")
    interpolationmix: bool = flag(False, "means of two test images")
    mixset: tuple[str, ...] = flag((), "further data sets by name, such as mnist,digits")
    mixfolder: tuple[str, ...] = flag((), "a folder of images; may be given several times", repeated=True)


@dataclasses.dataclass(frozen=True)
class LatentSettings:
    """Directions of task latent"""

    hessian: bool = flag(True, "of the energy's curvature; --nohessian: of the last features' change")


@dataclasses.dataclass(frozen=True)
class SandboxSettings(
    ModelChoice, SandboxData, SandboxChains, ClassificationSettings, OutlierSettings, LatentSettings, CheckedNetwork
):
    """All settings of the sandbox."""

    @property
    def most_images(self) -> int | None:
        """How many images to look at, None: as many as a task looks at by itself."""
        return 1 if self.single else self.limit


# ---------------------------------------------------------------------------------------------------------------------
# ebm_combine.py


@dataclasses.dataclass(frozen=True)
class CombineRun:
    """Run"""

    logdir: str = flag("cachedir", "where the models' experiments are kept")
    savedir: str = flag("cachedir", "where results go, into <exp>/<task>/")
    exp: str = flag("combine", "name of the results' folder")
    batch_size: int = flag(256, "images at a time", at_least=1)
    limit: int | None = flag(None, "images to make or look at; default a batch, 30 of labeldiscover", at_least=1)
    seed: int = flag(0, "of everything random", at_least=0)
    device: str = flag("auto", "where to compute; auto takes a GPU if there is one", choices=DEVICES)
    dsprites_path: str | None = flag(None, "the published .npz; without it sprites are drawn from their latents")
    data_workers: int = flag(4, "sprites are in memory or drawn", inert=True)


@dataclasses.dataclass(frozen=True)
class ConceptChoice:
    """Concepts"""

    cond_size: bool = flag(True, "take the size of a sprite into account", alias="cond_scale")
    exp_size: str = flag("dsprites_cond_size", "experiment of the size's model")
    resume_size: str = flag("latest", "its iteration, 'best' or 'latest' (also -1)")
    cond_shape: bool = flag(True, "take the shape of a sprite into account")
    exp_shape: str = flag("dsprites_cond_shape", "experiment of the shape's model")
    resume_shape: str = flag("latest", "its iteration, 'best' or 'latest' (also -1)")
    cond_pos: bool = flag(True, "take the position of a sprite into account")
    exp_pos: str = flag("dsprites_cond_pos", "experiment of the position's model")
    resume_pos: str = flag("latest", "its iteration, 'best' or 'latest' (also -1)")
    cond_rot: bool = flag(True, "take the rotation of a sprite into account")
    exp_rot: str = flag("dsprites_cond_rot", "experiment of the rotation's model")
    resume_rot: str = flag("latest", "its iteration, 'best' or 'latest' (also -1)")
    ema: bool = flag(False, "take the averaged weights of runs with --ema_decay")
    combine: str = flag("alternate", "alternate, sum, or an expression, see above")
    weights: tuple[str, ...] = flag(
        (), "conceptcombine: name=factor of an energy in alternate or sum, as pos=2; may be repeated", repeated=True
    )
    models: tuple[str, ...] = flag(
        (), "name=exp[:iteration], a further model for expressions; may be repeated", repeated=True
    )
    labels: tuple[str, ...] = flag(
        (), "name=label, as shape=heart, size=0.7, pos=0.2,0.8, rot=90; may be repeated", repeated=True
    )


@dataclasses.dataclass(frozen=True)
class CombineChains(ChainPrecision):
    """Sampling"""

    num_steps: int = flag(20, "rounds of Langevin dynamics, or steps on a label", at_least=0)
    step_lr: float = flag(500.0, "step size of the gradient", at_least=0)
    label_lr: float = flag(1.0, "labeldiscover: step size of the gradient on a label", at_least=0)
    first_noise: float = flag(
        0.0, "conceptcombine: noise of the first rounds, from where it falls to 0.005; 0: that throughout", at_least=0
    )
    first_step_lr: float = flag(
        0.0,
        "conceptcombine: step size of the first rounds, from where it falls to --step_lr; 0: that throughout",
        at_least=0,
    )
    restarts: int = flag(1, "conceptcombine: chains per image, of which the lowest energy is kept", at_least=1)


@dataclasses.dataclass(frozen=True)
class CombineTraining:
    """Training"""

    train_flags: str = flag("--max_iter=10000", "for train.py, after the published flags of task train")
    train: bool = flag(False, "gentest: train anew, even where trained models are kept")
    joint_shape: bool = flag(False, "gentest, genbaseline: position with shape, not with size")
    joint_rot: bool = flag(False, "gentest, genbaseline: position with rotation, not with size")
    break_steps: int = flag(300, "gentest, genbaseline: training iterations", at_least=1)
    lr: float = flag(1e-3, "gentest: learning rate of the energy models", at_least=0)
    frac: float = flag(0.0, "genbaseline: share of the unseen combinations that is trained on", at_least=0, at_most=1)
    plot_curve: bool = flag(False, "genbaseline over --frac from 0 to 1")


@dataclasses.dataclass(frozen=True)
class CombineNetwork:
    """Network (read from the checkpoint; what is given here is checked against it)"""

    num_filters: int | None = flag(
        None, "width; of what gentest and genbaseline train, too, there by default 64", at_least=1
    )
    cclass: bool | None = flag(None, "conditioned on the concept")
    spec_norm: bool | None = flag(None, "spectral normalisation; of what gentest trains, too, there by default")
    use_attention: bool | None = flag(None, "no network for sprites has attention")
    swish_act: bool | None = flag(
        None, "swish, as the published commands train, and so the default for TensorFlow's checkpoints and gentest"
    )
    proj_cclass: bool = flag(False, "labels enter the networks as they did in training", inert=True)
    use_bias: bool = flag(True, "biases are what the checkpoint holds", inert=True)


@dataclasses.dataclass(frozen=True)
class CombineSettings(CombineRun, ConceptChoice, CombineChains, CombineTraining, CombineNetwork):
    """All settings of the combination of concepts."""


# ---------------------------------------------------------------------------------------------------------------------
# sample.py, imagenet_demo.py, eval_inception.py, ais.py


@dataclasses.dataclass(frozen=True)
class SampleChoice:
    """Samples"""

    num: int = flag(100, "images", at_least=1)
    label: str | None = flag(None, "class of all images, by number or name; default one class after the other")
    folder: bool = flag(False, "write every image as a PNG, too")


@dataclasses.dataclass(frozen=True)
class SampleChains(ChainPrecision):
    """Sampling"""

    num_steps: int | None = flag(None, "Langevin steps; default as the run's own samples, or 200", at_least=0)
    step_lr: float | None = flag(None, "step size of the gradient; default the model's in training, or 10", at_least=0)
    proj_norm: float = flag(0.0, "clip the gradient elementwise to this; 0: no clip", at_least=0)
    noise_scale: float = flag(NOISE_UNIT, "standard deviation of a step's noise", at_least=0)
    batch_size: int = flag(100, "images at a time", at_least=1)


@dataclasses.dataclass(frozen=True)
class SampleSettings(ModelChoice, SampleChoice, SampleChains, CheckedNetwork):
    """All settings of sample.py."""


@dataclasses.dataclass(frozen=True)
class DemoRun:
    """Model"""

    exp: str = flag("default", "name of the experiment, the model's folder below --logdir")
    resume_iter: str = flag("latest", "iteration of the checkpoint, 'best' or 'latest'")
    logdir: str = flag("cachedir", "where experiments are kept")
    ema: bool = flag(False, "take the averaged weights of a run with --ema_decay")
    savedir: str = flag("sandbox_cachedir", "where the pictures go, to a folder named as the experiment")
    seed: int = flag(0, "of classes, noise and chains", at_least=0)
    device: str = flag("auto", "where to compute; auto takes a GPU if there is one", choices=DEVICES)


@dataclasses.dataclass(frozen=True)
class DemoChains(ChainPrecision):
    """Sampling"""

    num_steps: int = flag(200, "Langevin steps", at_least=1)
    step_lr: float = flag(180.0, "step size of the gradient in a Langevin step", at_least=0)
    batch_size: int = flag(16, "images, in a grid as square as possible", at_least=1)
    classes: str | None = flag(None, "numbers from 0 or names, commas between; repeated to fill the grid")
    class_names: str | None = flag(None, "a text file with the classes' names, one per line in their order")
    every: int = flag(1, "Langevin steps per frame", at_least=1)


@dataclasses.dataclass(frozen=True)
class DemoSettings(DemoRun, DemoChains, CheckedNetwork):
    """All settings of imagenet_demo.py."""


@dataclasses.dataclass(frozen=True)
class EnsembleChoice:
    """Checkpoints"""

    iterations: tuple[str, ...] = flag((), "measure at each of these, such as 200,400,800 or all, and draw the curve")
    idx: int = flag(0, "number of this evaluation, in the name of its folder", at_least=0)
    ensemble: int = flag(10, "checkpoints that take turns: 300 iterations apart, else the newest", at_least=1)


@dataclasses.dataclass(frozen=True)
class PoolSettings(ChainPrecision):
    """Sampling from a pool of persistent chains"""

    im_number: int = flag(50_000, "images to draw", at_least=4)
    num_steps: int = flag(20, "Langevin steps of a round", at_least=1)
    step_lr: float | None = flag(None, "step size of the gradient; default the model's in training, or 10", at_least=0)
    proj_norm: float = flag(0.05, "clip the gradient elementwise to this; 0: no clip", at_least=0)
    noise_scale: float = flag(NOISE_UNIT, "standard deviation of a step's noise", at_least=0)
    batch_size: int = flag(512, "chains of a round, out of a pool of 1,000", at_least=1)
    repeat_scale: int = flag(100, "half the number of rounds of a pool", at_least=1)
    nomix: int = flag(10, "last rounds, in which no chain starts again or gets a new label", at_least=0)

    @property
    def rounds(self) -> int:
        """How many rounds a pool lasts."""
        return 2 * self.repeat_scale


@dataclasses.dataclass(frozen=True)
class MeasureSettings:
    """Measures"""

    features: str = flag("auto", "what compares images; auto: see above", choices=("auto", "inception", "classifier"))
    inception_weights: str | None = flag(None, "file of the Inception weights, as torch-fidelity publishes it")
    inception_sha256: str = flag("6726825d", "how its SHA-256 has to begin; default that of the released weights")
    splits: int = flag(5_000, "images of a split of the Inception score", at_least=1)
    reference: str | None = flag(
        None, "real images; default both of cifar10, else train", choices=("train", "test", "both")
    )
    real_number: int = flag(100_000, "real images, at random where there are more", at_least=100)
    cache: str | None = flag(None, "where what is known of real images is kept; default --logdir/statistics")


@dataclasses.dataclass(frozen=True)
class InceptionSettings(ModelChoice, EnsembleChoice, PoolSettings, MeasureSettings, TestData, CheckedNetwork):
    """All settings of eval_inception.py."""


@dataclasses.dataclass(frozen=True)
class AnnealingSettings:
    """Annealing"""

    limit: int = flag(1000, "test images to look at, drawn at random", at_least=1)
    pdist: tuple[int, ...] = flag(
        (10,), "distributions from box to model; several, such as 10,100,1000, are compared", at_least=1
    )
    alr: float | None = flag(
        None, "step size of HMC; default 0.0045 colour (0.0085 at rescale 8), 0.0065 grey", at_least=0
    )
    batch_size: int = flag(16, "chains, under each class if the model is conditioned on classes", at_least=2)
    temperature: float | None = flag(None, "factor of the energy; default as in training", at_least=0)
    rescale: float | None = flag(None, "images are in [0, rescale]; default as in training", at_least=1e-6)
    gauss_dim: int = flag(500, "dimensions of --dataset=gauss, whose precision is --temperature", at_least=1)


@dataclasses.dataclass(frozen=True)
class AisSettings(ModelChoice, AnnealingSettings, TestData, CheckedNetwork):
    """All settings of ais.py."""
