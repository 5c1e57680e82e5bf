"""Train an energy model on images; negatives are Langevin samples from a replay buffer.

    python train.py --exp=digits --dataset=digits --cclass --replay_batch --zero_kl --num_steps=20 --step_lr=100
    python train.py --exp=cifar10_cond --dataset=cifar10 --num_steps=60 --batch_size=128 --step_lr=10.0 \\
        --proj_norm=0.01 --zero_kl --replay_batch --cclass
    mpiexec -n 2 python train.py ... the same flags; each worker takes --batch_size images
    python train.py --exp=digits ... --resume_iter=latest

Checkpoints, logs and pictures go to --logdir/<exp>/.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import pathlib
import shutil
from typing import TYPE_CHECKING, Any

from absl import flags

import cli
from cli import CONDITIONS, PATHS, SIZES, SUBSETS
from errors import UsageError
from presets import PRESETS

if TYPE_CHECKING:
    import data
    import metrics
    import models
    from acceleration import Acceleration
    from distributed import Workers
    from imagenet import StreamedImages
    from trainer import Trainer

FLAGS = flags.FLAGS
DATASETS = ("digits", "mnist", "fashion_mnist", "cifar10", "imagenet", "imagenetfull", "dsprites", "folder")

with cli.group("Main"):
    flags.DEFINE_enum("preset", None, list(PRESETS), "settings of a published or shipped run; flags beside it win")
    flags.DEFINE_string("exp", "default", "name of the experiment, its folder below --logdir")
    flags.DEFINE_string("logdir", "cachedir", "where experiments are kept")
    flags.DEFINE_bool("train", True, "train; --train=False only samples from the checkpoint and reports")
    flags.DEFINE_string("resume_iter", "-1", "go on from this iteration's checkpoint, or 'latest'; -1 starts anew")
    flags.DEFINE_integer("max_iter", None, "stop after this many iterations", lower_bound=0)
    flags.DEFINE_integer("epoch_num", 10000, "stop after this many passes over the data", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of everything random; every worker derives its own", lower_bound=0)
    flags.DEFINE_enum("device", "auto", ["auto", "cpu", "cuda"], "where to compute; auto takes a GPU if there is one")
    flags.DEFINE_bool(
        "deterministic", False, "on a GPU take kernels that give the same bits in every run; slower, see --compile"
    )
    flags.DEFINE_enum("backend", "auto", ["auto", "horovod", "torch", "none"], "what joins several workers")
    flags.DEFINE_integer("num_gpus", 1, "accepted for old commands; workers scale out, see mpiexec", lower_bound=1)

with cli.group("Data"):
    flags.DEFINE_enum("dataset", "mnist", DATASETS, "what to train on")
    flags.DEFINE_string("datadir", "data", "where torchvision's datasets are kept or downloaded to")
    flags.DEFINE_bool("download", True, "download what is not there yet")
    flags.DEFINE_string("data_path", None, "the folder of images of --dataset=folder; class subfolders give labels")
    flags.DEFINE_string("imagenet_path", None, "the 32x32 files of --dataset=imagenet, pickles or .npz")
    flags.DEFINE_string("imagenet_datadir", None, "TFRecords or class folders of --dataset=imagenetfull")
    flags.DEFINE_integer("image_size", None, "height and width of --dataset=folder, in pixels", lower_bound=8)
    flags.DEFINE_integer("channels", None, "1 (grey) or 3 (colour), of --dataset=folder", lower_bound=1, upper_bound=3)
    flags.DEFINE_integer("data_workers", 4, "processes that decode images from the disk", lower_bound=0)
    flags.DEFINE_integer("batch_size", 256, "images per iteration and worker", lower_bound=1)
    flags.DEFINE_bool("single", False, "overfit one image")
    flags.DEFINE_bool("augment", False, "random crops (4 pixels of padding) and horizontal flips")
    flags.DEFINE_bool("mixup", False, "convex mixes of two images, weight Beta(1, 1)")
    flags.DEFINE_bool("cutout", False, "blank a random square of each image")
    flags.DEFINE_bool("cutout_inside", False, "keep the square wholly inside the image")
    flags.DEFINE_float("cutout_prob", 1.0, "share of images with a square", lower_bound=0, upper_bound=1)
    flags.DEFINE_integer("cutout_mask_size", 16, "side of the square, in pixels", lower_bound=1)
    flags.DEFINE_float("rescale", 1.0, "images are in [0, rescale]", lower_bound=1e-6)

with cli.group("dSprites"):
    flags.DEFINE_string("dsprites_path", None, "the published .npz; without it sprites are drawn from their latents")
    flags.DEFINE_bool("cond_shape", False, "condition on the shape, one of three")
    flags.DEFINE_bool("cond_size", False, "condition on the scale, 0.5 to 1 (also --cond_scale)")
    flags.DEFINE_bool("cond_pos", False, "condition on the position, x and y in 0 to 1")
    flags.DEFINE_bool("cond_rot", False, "condition on the rotation, cosine and sine")
    flags.DEFINE_bool("dshape_only", False, "only the shape varies")
    flags.DEFINE_bool("dpos_only", False, "only the position varies")
    flags.DEFINE_bool("dsize_only", False, "only the scale varies")
    flags.DEFINE_bool("drot_only", False, "only the rotation varies")
    flags.DEFINE_bool("dsprites_restrict", False, "squares that are not rotated")
    flags.DEFINE_alias("cond_scale", "cond_size")

with cli.group("Sampling"):
    flags.DEFINE_enum(
        "datasource", "random", ["random", "default", "both"], "chains start from noise, noised data, or half and half"
    )
    flags.DEFINE_integer("num_chains", None, "chains per iteration; default one per image of the batch", lower_bound=1)
    flags.DEFINE_integer("num_steps", 20, "Langevin steps per iteration", lower_bound=0)
    flags.DEFINE_float("step_lr", 1.0, "step size of the gradient in a Langevin step", lower_bound=0)
    flags.DEFINE_float("noise_scale", 1.0, "noise of a Langevin step, in units of 0.005", lower_bound=0)
    flags.DEFINE_float("proj_norm", 0.0, "clip the gradient of a Langevin step to this norm; 0: no clip", lower_bound=0)
    flags.DEFINE_enum("proj_norm_type", "li", ["li", "l2"], "clip elementwise (li), or the whole batch's norm (l2)")
    flags.DEFINE_bool(
        "replay_batch", False, "start chains from a buffer of 10,000 earlier end points, a share --replay_rate of them"
    )
    flags.DEFINE_float("replay_rate", 0.95, "share of the chains that --replay_batch starts from the buffer", 0, 1)
    flags.DEFINE_enum(
        "precision",
        "auto",
        ["auto", *cli.PRECISIONS],
        "of energies and their gradients; images and parameters stay float32. fp16: in chains only, the loss is then "
        "in TF32. auto: on GPUs fp16, with the KL term or --hmc TF32; on CPUs with AMX bf16 for MnistNet, by Langevin "
        "chains with --zero_kl; else float32",
    )
    flags.DEFINE_bool(
        "compile",
        None,
        "compile the Langevin step, up to a minute once; default on GPUs but for --deterministic. Not with the KL term "
        "or --hmc",
    )
    flags.DEFINE_bool(
        "cuda_graph", None, "launch each chain as one CUDA graph; default on GPUs. Not with the KL term or --hmc"
    )
    flags.DEFINE_bool("pcd", False, "start all chains from the previous end points")
    flags.DEFINE_bool("hmc", False, "Hamiltonian Monte Carlo moves instead of gradient steps; needs --zero_kl")

with cli.group("Loss"):
    flags.DEFINE_enum("objective", "cd", ["cd", "logsumexp", "softplus"], "contrastive divergence, or a relative")
    flags.DEFINE_bool("zero_kl", False, "leave out the KL term, whose gradient flows through the whole chain")
    flags.DEFINE_float("ml_coeff", 1.0, "weight of the likelihood term")
    flags.DEFINE_float("l2_coeff", 1.0, "weight of the squared energies", lower_bound=0)
    flags.DEFINE_float(
        "mismatch",
        0.0,
        "weight of a second contrast, of images with their own labels to the whole batch with others'",
        0,
    )
    flags.DEFINE_float("temperature", 1.0, "factor of the energy in chains and loss", lower_bound=0)
    flags.DEFINE_float("lr", 3e-4, "learning rate of Adam", lower_bound=0)
    flags.DEFINE_float("ema_decay", 0.0, "keep a moving average of the weights, and sample with it; 0: none", 0, 1)

    flags.DEFINE_bool("guard", True, "roll a diverging run back to its last good state, with half the learning rate")
    flags.DEFINE_integer("max_rollbacks", 10, "stop a run that diverges more often than this", lower_bound=0)

with cli.group("Network"):
    flags.DEFINE_bool("cclass", False, "condition on the class")
    flags.DEFINE_bool("model_cclass", False, "conditional, with classes the model infers itself")
    flags.DEFINE_integer("num_filters", None, "width; default 64 (grey, 128x128), 128, 192 (wider), 256 (imagenet)", 1)
    flags.DEFINE_bool("large_model", False, "ResNet32Large, with dropout")
    flags.DEFINE_bool("larger_model", False, "ResNet32Larger")
    flags.DEFINE_bool("wider_model", False, "ResNet32Wider")
    flags.DEFINE_bool("use_attention", False, "self attention in the residual networks")
    flags.DEFINE_bool("swish_act", False, "swish instead of leaky ReLU, where the reference honours it")
    flags.DEFINE_bool("downsample", False, "average pooling instead of stride 2 (networks for grey images)")
    flags.DEFINE_bool("spec_norm", True, "spectral normalisation")
    flags.DEFINE_integer("spec_iter", 1, "power iterations of the spectral norm per training iteration", lower_bound=1)
    flags.DEFINE_float("spec_norm_val", 1.0, "spectral norm of the normalised weights", lower_bound=0)
    flags.DEFINE_bool("spec_eval", False, "keep the power iteration's vector as it is")

with cli.group("Output"):
    flags.DEFINE_integer("log_interval", 10, "iterations between lines of the log", lower_bound=1)
    flags.DEFINE_integer("save_interval", 1000, "iterations between checkpoints", lower_bound=1)
    flags.DEFINE_integer("test_interval", 1000, "iterations between pictures and quality figures", lower_bound=1)
    flags.DEFINE_integer("num_samples", 100, "images that --train=False, or the end of a run, samples", lower_bound=1)
    flags.DEFINE_bool("quality", False, "measure samples against the data in the features of a small classifier")
    flags.DEFINE_integer("sample_steps", None, "Langevin steps of those chains; default 10 times --num_steps", 0)
    flags.DEFINE_bool("proposal_debug", False, "accepted for old commands")


def check_flags() -> None:
    """Raise UsageError for flags that contradict each other; say which ones have no effect."""
    conditions = [name for name in CONDITIONS if FLAGS[name].value]
    subsets = [name for name in SUBSETS if FLAGS[name].value]
    for given, what in ((conditions, "condition"), (subsets, "subset")):
        if len(given) > 1:
            raise UsageError(f"--{given[0]} and --{given[1]} exclude each other; one {what} at a time")
        if given and FLAGS.dataset != "dsprites":
            raise UsageError(f"--{given[0]} is for --dataset=dsprites, not {FLAGS.dataset}")
    if conditions and not FLAGS.cclass:
        raise UsageError(f"--{conditions[0]} conditions the network only with --cclass; add it")
    if (FLAGS.num_chains or 0) > FLAGS.batch_size:
        raise UsageError(
            f"--num_chains={FLAGS.num_chains} is more than the images of a --batch_size={FLAGS.batch_size}"
        )
    if FLAGS.mismatch and not FLAGS.cclass:
        raise UsageError("--mismatch contrasts labels, and without --cclass there are none; add it")
    sizes = [name for name in SIZES if FLAGS[name].value]
    if len(sizes) > 1:
        raise UsageError(f"--{sizes[0]} and --{sizes[1]} exclude each other")
    if FLAGS.hmc and not FLAGS.zero_kl:
        raise UsageError("--hmc needs --zero_kl: no gradient flows through accepting or rejecting a move")
    if FLAGS.cuda_graph and (FLAGS.hmc or not FLAGS.zero_kl):
        raise UsageError("--cuda_graph is for Langevin steps alone: it needs --zero_kl, and no --hmc")
    if FLAGS.dataset == "folder" and not FLAGS.data_path:
        raise UsageError("--dataset=folder needs --data_path, the folder of images")
    inert = {
        "num_gpus": "a process drives one device; start workers with mpiexec",
        "proposal_debug": "the reference printed proposals; log.jsonl has the figures",
    }
    if not FLAGS.replay_batch:
        inert["replay_rate"] = "without --replay_batch there is no buffer"
    if not has_plain_chains():
        inert["compile"] = "only Langevin steps with --zero_kl are compiled"
    for name, reason in inert.items():
        if FLAGS[name].present:
            print(f"note: --{name} has no effect: {reason}")


def has_plain_chains() -> bool:
    """Return whether chains are Langevin steps that no gradient flows back through."""
    return FLAGS.zero_kl and not FLAGS.hmc


def chosen(names: dict[str, str]) -> str | None:
    """Return the value of the first of these boolean flags that is set."""
    return next((value for name, value in names.items() if FLAGS[name].value), None)


def open_dataset(workers: Workers) -> data.Dataset | StreamedImages:
    """Return the data set that the flags name; rank 0 reads it first, so that it is downloaded once."""
    import data

    if workers.rank > 0:
        workers.barrier()
    dataset = data.load_dataset(
        FLAGS.dataset,
        root=FLAGS.datadir,
        device=workers.device,
        path=FLAGS[PATHS[FLAGS.dataset]].value if FLAGS.dataset in PATHS else None,
        image_size=FLAGS.image_size,
        channels=FLAGS.channels,
        condition=chosen(CONDITIONS),
        subset=chosen(SUBSETS),
        workers=FLAGS.data_workers,
        download=FLAGS.download,
    )
    if workers.rank == 0:
        workers.barrier()
    return dataset


def network_config(dataset: data.Dataset | StreamedImages) -> models.ModelConfig:
    """Return the network that the flags choose for a dataset: MnistNet for grey images, a ResNet for colour."""
    import models

    channels, height, _ = dataset.image_shape
    label_size = dataset.label_size if FLAGS.cclass or FLAGS.model_cclass else 0
    if (FLAGS.cclass or FLAGS.model_cclass) and not label_size:
        raise UsageError(f"--cclass needs labels, and {dataset.name} has none; use class subfolders")
    asked = next((name for name in SIZES if FLAGS[name].value), None)
    if asked and (channels == 1 or height > 64):
        raise UsageError(f"--{asked} is for colour images of up to 64x64 pixels, not {dataset.name}")
    if FLAGS.dataset == "dsprites":
        network, filters = "DspritesNet", 64
    elif FLAGS.dataset == "imagenet":
        network, filters = "ResNet32Wider", 256
    elif channels == 1:
        network, filters = "MnistNet", 64
    elif height > 64:
        network, filters = "ResNet128", 64
    elif asked:
        network, filters = SIZES[asked], 192 if asked == "wider_model" else 128
    else:
        network, filters = "ResNet32", 128
    return models.ModelConfig(
        network,
        image_shape=dataset.image_shape,
        num_filters=FLAGS.num_filters or filters,
        label_size=label_size,
        spec_norm=FLAGS.spec_norm,
        spec_iter=FLAGS.spec_iter,
        spec_norm_val=FLAGS.spec_norm_val,
        use_attention=FLAGS.use_attention,
        swish_act=FLAGS.swish_act,
        downsample=FLAGS.downsample,
    )


def open_folder(folder: pathlib.Path, resuming: bool) -> None:
    """Make the experiment's folder; a new run moves an earlier one aside, so that nothing is lost.

    Raises UsageError where nothing can be written.
    """
    try:
        if folder.exists() and not resuming and any(folder.iterdir()):
            aside = next(p for p in (folder.with_name(f"{folder.name}.{n}") for n in range(1, 10**6)) if not p.exists())
            folder.rename(aside)
            print(f"note: {folder} held an earlier run; it is now {aside} (--resume_iter=latest would have gone on)")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise UsageError(f"--logdir={FLAGS.logdir}: cannot write {folder} ({error.strerror})") from None


def last_iteration(images: int, workers: int) -> int:
    """Return where training stops: --max_iter, or --epoch_num passes over the data; 60,000 for mnist as published."""
    if FLAGS.max_iter is not None:
        return FLAGS.max_iter
    epochs = FLAGS.epoch_num * (images // (FLAGS.batch_size * workers))
    return min(epochs, 60_000) if FLAGS.dataset == "mnist" else epochs


def feature_distance(
    dataset: data.Dataset | StreamedImages, folder: pathlib.Path
) -> tuple[metrics.ClassifierDistance, float]:
    """Return the distance to one half of the data in a small classifier's features, and that of the other half to it.

    The classifier is trained on the data the first time, then kept in the folder.
    """
    import torch

    import checkpoint
    from metrics import ClassifierDistance, train_feature_classifier

    images, labels = getattr(dataset, "images", None), getattr(dataset, "labels", None)
    if labels is None or labels.ndim > 1 or not isinstance(images, torch.Tensor):
        raise UsageError("--quality trains a classifier on the classes of the data, and there are none here")
    path = folder / "classifier.pt"
    reference, rest = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tensor_split(2)
    if path.exists():
        measure = ClassifierDistance.from_state_dict(torch.load(path, weights_only=True, map_location=images.device))
    else:
        print("training a small classifier, in whose features samples are compared with data", flush=True)
        classifier = train_feature_classifier(images, labels, device=images.device)
        measure = ClassifierDistance.from_images(classifier, images[reference])
        checkpoint.save(path, measure.state_dict())
    print(f"classifier for the distance to data: {measure.classifier.accuracy:.1%} right on images held out, {path}")
    return measure, measure.distance(images[rest[: FLAGS.num_samples]])


def choose_acceleration(device: str, network: str) -> Acceleration:
    """Return how chains run: as the flags ask for, else the fastest way on this kind of device."""
    from acceleration import Acceleration

    has_compiler = any(shutil.which(name) for name in ("cc", "gcc", "clang"))
    if FLAGS.compile and not has_compiler:
        raise UsageError("--compile needs a C compiler (cc, gcc or clang), and none is on the PATH; leave it out")
    on_gpu = device == "cuda"
    compiled = has_plain_chains() and (on_gpu and not FLAGS.deterministic if FLAGS.compile is None else FLAGS.compile)
    if compiled and not has_compiler:
        print("note: no C compiler is on the PATH (cc, gcc or clang): the Langevin step runs uncompiled")
        compiled = False
    captured = has_plain_chains() and (on_gpu and FLAGS.num_steps > 0 if FLAGS.cuda_graph is None else FLAGS.cuda_graph)
    asked = {"precision": FLAGS.precision != "auto", "compile": FLAGS.compile, "cuda_graph": FLAGS.cuda_graph}
    return Acceleration(
        precision_on(device, network),
        compiled,
        captured,
        frozenset(name for name, is_asked in asked.items() if is_asked),
    )


def precision_on(device: str, network: str) -> str:
    """Return what energies are computed in: as --precision says, else what is fast and good enough.

    On a GPU that is fp16 for Langevin chains without the KL term, whose gradients to images are 1 to 3 % off then (of
    untrained networks, on a CPU), and TF32 for all else; nothing was measured there yet. On a CPU that multiplies bf16
    in tiles (AMX) it is bf16 for MnistNet by such chains, whose training curves cannot be told from those of float32;
    others were not compared, or not enough (README, Speed).
    """
    import torch

    if FLAGS.precision == "fp16" and not FLAGS.zero_kl:
        print("note: with the KL term, whose gradients underflow in fp16, --precision=fp16 is tf32")
        return "tf32"
    if FLAGS.precision != "auto":
        return FLAGS.precision
    if device == "cuda":
        return "fp16" if has_plain_chains() else "tf32"
    compared = network == "MnistNet" and has_plain_chains()
    return "bf16" if compared and torch.cpu._is_amx_tile_supported() else "float32"


def announce(trainer: Trainer) -> None:
    """Print what a run is about to do and where everything goes; store its flags and network in config.json."""
    import torch

    state, dataset, workers, config = trainer.state, trainer.dataset, trainer.workers, trainer.state.model.config
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    described = {"flags": cli.values(), "network": dataclasses.asdict(config), "parameters": parameters}
    described |= {"torch": torch.__version__, "workers": workers.size, "energies": str(state.acceleration)}
    (trainer.folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    print(f"data: {dataset.name}, {len(dataset):,} images of {config.image_shape}, {dataset.label_size} label values")
    print(f"network: {config.network}, {parameters:,} parameters, {config.num_filters} filters")
    print(f"workers: {workers.size}, {workers.engine} ({workers.why}), on {workers.device}")
    print(f"energies in {state.acceleration}; images and parameters in float32")
    if state.acceleration.compiled:
        print("the Langevin step is compiled when it first runs, which can take a minute; torch keeps the result")
    print(f"iterations: {state.iteration} to {trainer.cadence.stop}; everything goes to {trainer.folder}/")
    print("settings: " + " ".join(f"{name}={value}" for name, value in cli.values().items() if value is not None))


def main() -> None:
    check_flags()
    import torch

    import acceleration
    import checkpoint
    import data
    import distributed
    import models
    import training
    from optimizer import ClippedAdam
    from trainer import Cadence, Trainer
    from utils import ReplayBuffer, keep_freed_memory

    keep_freed_memory()
    acceleration.set_tf32(False)  # but in training steps and their chains
    workers = distributed.start(FLAGS.backend, FLAGS.device)
    leads = workers.rank == 0
    if FLAGS.cuda_graph and workers.device.type != "cuda":
        raise UsageError(f"--cuda_graph needs a GPU, and this run is on the {workers.device}; leave it out")
    if workers.device.type == "cuda":
        acceleration.set_kernel_choice(deterministic=FLAGS.deterministic)
    elif FLAGS.deterministic:
        workers.print("note: --deterministic has no effect on a CPU, where runs are the same bit for bit anyway")
    dataset = open_dataset(workers)
    config = network_config(dataset)
    # A GPU indexes what lies there; what is read from the disk is asked for by the CPU.
    index_device = workers.device if isinstance(dataset, data.Dataset) else "cpu"
    batches = data.Batches(len(dataset), FLAGS.batch_size, FLAGS.seed, workers.rank, workers.size, device=index_device)
    given: dict[str, Any] = {field.name: FLAGS[field.name].value for field in dataclasses.fields(training.Options)}
    options = training.Options(**given)
    folder = pathlib.Path(FLAGS.logdir) / FLAGS.exp
    resume = None if FLAGS.resume_iter == "-1" else checkpoint.find(folder, FLAGS.resume_iter)
    if resume is None and not FLAGS.train:
        raise UsageError("--train=False samples from a checkpoint; choose one with --resume_iter")

    if leads:
        open_folder(folder, resume is not None)

    # Every worker starts with the same weights, then draws noise, chains and replays of its own.
    torch.manual_seed(FLAGS.seed + workers.rank)
    model = models.build_model(config, torch.Generator().manual_seed(FLAGS.seed)).to(workers.device)
    state = training.State(
        model=model,
        optimizer=ClippedAdam(model.parameters(), lr=FLAGS.lr),
        buffer=ReplayBuffer(training.REPLAY_SIZE if FLAGS.replay_batch else 0, config.image_shape, workers.device),
        batches=batches,
        generator=torch.Generator(workers.device).manual_seed(FLAGS.seed * 1_000 + workers.rank),
        ema=copy.deepcopy(model).eval() if FLAGS.ema_decay else None,
        acceleration=choose_acceleration(workers.device.type, config.network),
    )
    cadence = Cadence(
        stop=last_iteration(len(dataset), workers.size),
        log=FLAGS.log_interval,
        save=FLAGS.save_interval,
        test=FLAGS.test_interval,
    )
    trainer = Trainer(
        state,
        options,
        dataset,
        workers,
        folder,
        cadence,
        flags=cli.values(),
        seed=FLAGS.seed,
        num_samples=FLAGS.num_samples,
        sample_steps=10 * FLAGS.num_steps if FLAGS.sample_steps is None else FLAGS.sample_steps,
        measure=feature_distance(dataset, folder) if FLAGS.quality and leads else None,
        max_rollbacks=FLAGS.max_rollbacks if FLAGS.guard else None,
    )
    if resume is not None:
        trainer.resume(resume)
    if leads:
        announce(trainer)
    if FLAGS.train:
        trainer.run()
    trainer.report()
    workers.close()


if __name__ == "__main__":
    cli.run(main, __doc__, PRESETS)
