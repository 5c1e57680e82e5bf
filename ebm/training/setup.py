"""The preparation of a run before its first iteration: settings, data, network, acceleration and state."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

import data
import models
from ebm.presets import PRESETS
from ebm.settings import CONDITIONS, SIZES, SUBSETS, TrainSettings
from ebm.support import cli
from ebm.support.errors import UsageError
from ebm.support.experiments import check_tags
from ebm.support.hardware import find_free_memory, has_compiler
from ebm.support.logs import CONFIG_NAME
from ebm.support.progress import show_waiting
from ebm.support.reports import write_json
from ebm.support.sharing import fold_seed
from ebm.support.trackers import import_packages
from ebm.training.acceleration import COMPILED, Acceleration
from ebm.training.distributed import Workers
from ebm.training.state import State
from ebm.training.tuning import describe_way
from utils import REPLAY_SIZE, ClippedAdam, ReplayBuffer

# Setting of the network -> the networks without what it switches on.
UNUSED = {
    "swish_act": ("ResNet32", "ResNet32Large", "ResNet32Larger"),
    "downsample": tuple(name for name in models.NETWORKS if name.startswith("ResNet")),
    "use_attention": ("MnistNet", "DspritesNet"),
}

STARTS_IMAGES = 20_000  # to which the distribution of chains' starts is fitted
STARTS_PIXELS = 100_000_000  # of these images at most

# ---- settings ----


def list_enabled(settings: Any, names: dict[str, str]) -> list[str]:
    """Return the names of the settings that are on, of those in `names`."""
    return [name for name in names if getattr(settings, name)]


def check_settings(settings: TrainSettings) -> None:
    """Raise UsageError if settings contradict each other."""
    check_tags(settings.tag)
    for package, project in settings.projects.items():
        check_tags([project], package)
    conditions, subsets = list_enabled(settings, CONDITIONS), list_enabled(settings, SUBSETS)
    for names in (conditions, subsets, list_enabled(settings, SIZES)):
        if len(names) > 1:
            raise UsageError(f"`{names[0]}` and `{names[1]}` exclude each other; choose one")
    for name in conditions + subsets:
        if settings.dataset != "dsprites":
            raise UsageError(f"`{name}` is for `dataset`=dsprites, not {settings.dataset}")
    if conditions and not settings.cclass:
        raise UsageError(f"`{conditions[0]}` conditions the network only with `cclass`; add it")
    for name in data.DATASETS[settings.dataset].label_breakers:
        if getattr(settings, name) and settings.cclass:
            raise UsageError(
                f"`{name}` makes labels of `dataset`={settings.dataset} false, and `cclass` trains on them; "
                "leave one of the two out"
            )
    if (settings.num_chains or 0) > settings.batch_size:
        raise UsageError(
            f"`num_chains`={settings.num_chains} is more than the images of a `batch_size`={settings.batch_size}"
        )
    if settings.mismatch and not settings.cclass:
        raise UsageError("`mismatch` contrasts labels, and without `cclass` there are none; add it")
    if settings.datasource == "gauss" and settings.model_cclass:
        raise UsageError("`datasource`=gauss takes the classes of the data, which `model_cclass` replaces; choose one")
    if settings.mismatch and settings.model_cclass:
        raise UsageError("`mismatch` contrasts the labels of the data, which `model_cclass` replaces; leave one out")
    if settings.classify and not settings.cclass:
        raise UsageError("`classify` needs classes, and without `cclass` there are none; add it")
    if settings.classify and settings.model_cclass:
        raise UsageError("`classify` needs the classes of the data, which `model_cclass` replaces; leave one out")
    if settings.hmc and not settings.zero_kl:
        raise UsageError("`hmc` needs `zero_kl`: no gradient flows through accepting or rejecting a move")
    if settings.cuda_graph and not settings.has_plain_chains:
        raise UsageError("`cuda_graph` is for Langevin steps alone: it needs `zero_kl`, and no `hmc`")
    if settings.dataset == "folder" and not settings.data_path:
        raise UsageError("`dataset`=folder needs `data_path`, the folder of images")
    if not settings.train and settings.resume_iter == "-1":
        raise UsageError("`train`=False samples from a checkpoint; choose one with `resume_iter`")


# ---- data and network ----


def open_dataset(settings: TrainSettings, workers: Workers, class_names: Sequence[str] = ()) -> data.Dataset:
    """Return the data set to train on. Rank 0 reads it before the others, so that it is downloaded once.

    class_names: the classes that the network of a resumed run knows; those of the data are found by their names.
    """
    return workers.take_turns(functools.partial(read_split, "train", settings, workers.device, class_names))


def read_split(
    split: str, settings: TrainSettings, device: torch.device, class_names: Sequence[str] = ()
) -> data.Dataset:
    """Return the "train" or the "test" split of a run's data. class_names: see `open_dataset`."""
    dataset = data.load_dataset(
        settings.dataset,
        split=split,
        root=settings.datadir,
        device=device,
        path=settings.find_path(settings.dataset),
        image_size=settings.image_size if settings.dataset == "folder" else None,
        channels=settings.channels if settings.dataset == "folder" else None,
        condition=next((CONDITIONS[name] for name in list_enabled(settings, CONDITIONS)), None),
        subset=settings.subset,
        antialias=settings.antialias,
        workers=settings.data_workers,
        download=settings.download,
    )
    if settings.leave_out:
        dataset, _ = data.split_class_off(dataset, settings.leave_out)
    if class_names and dataset.class_names and (settings.cclass or settings.model_cclass):
        return data.match_classes(dataset, tuple(class_names))
    return dataset


def choose_network(settings: TrainSettings, dataset: data.Dataset) -> models.ModelConfig:
    """Return the network for a data set, with its width and labels; raise UsageError if it does not take the images."""
    is_conditional = settings.cclass or settings.model_cclass
    if is_conditional and not dataset.label_size:
        remedy = "use class subfolders" if settings.dataset in ("folder", "imagenetfull") else "leave it out"
        raise UsageError(f"`cclass` needs labels, and {dataset.name} has none; {remedy}")
    network, filters = find_network(settings, dataset)
    config = models.ModelConfig(
        network,
        image_shape=dataset.image_shape,
        num_filters=settings.num_filters or filters,
        label_size=dataset.label_size if is_conditional else 0,
        spec_norm=settings.spec_norm,
        spec_iter=settings.spec_iter,
        spec_norm_val=settings.spec_norm_val,
        use_attention=settings.use_attention,
        swish_act=settings.swish_act,
        downsample=settings.downsample,
        start_rank=settings.start_rank if settings.datasource == "gauss" else 0,
    )
    check_starts(config)
    if settings.classify and config.label_size < 2:
        raise UsageError(f"`classify` tells classes apart, and {dataset.name} has one; leave it out")
    for name in ("model_cclass", "classify"):
        if getattr(settings, name) and not config.has_classes:
            raise UsageError(
                f"`{name}` is for classes, and these labels of {dataset.name} are quantities; leave it out"
            )
    for name, networks in UNUSED.items():
        if getattr(settings, name) and network in networks:
            print(f"note: {name} has no effect: {network} does not have it")
    return config


def find_network(settings: TrainSettings, dataset: data.Dataset) -> tuple[str, int]:
    """Return the name and the usual width of the network for a data set.

    It is MnistNet for grey images, DspritesNet for sprites, and a ResNet for colour. Raises UsageError if the images
    are too small, or too large for a chosen size of network.
    """
    channels, height, width = dataset.image_shape
    size = next(iter(list_enabled(settings, SIZES)), None)
    if size and (channels == 1 or height > 64):
        raise UsageError(f"`{size}` is for colour images of up to 64x64 pixels, not {dataset.name}")
    if settings.dataset == "dsprites":
        network, filters = "DspritesNet", 64
    elif settings.dataset == "imagenet":
        network, filters = "ResNet32Wider", 256
    elif channels == 1:
        network, filters = "MnistNet", 64
    elif height > 64 and width >= models.SMALLEST_SIDES["ResNet128"]:
        network, filters = "ResNet128", 64
    elif size:
        network, filters = SIZES[size], 192 if size == "wider_model" else 128
    else:
        network, filters = "ResNet32", 128
    smallest = models.SMALLEST_SIDES.get(network, 1)
    if min(height, width) < smallest:
        raise UsageError(
            f"images of {width}x{height} pixels are too small for {network}, which takes {smallest}x{smallest} and "
            "larger ones; choose a larger `image_size`"
        )
    return network, filters


# ---- how chains are computed ----


def choose_acceleration(settings: TrainSettings, device: str) -> Acceleration:
    """Return the acceleration of chains: what the settings ask for, else what is usual on this kind of device."""
    if settings.compile and not has_compiler():
        raise UsageError(
            "`compile` needs a C compiler (cc, gcc or clang), and none is on the PATH; set `compile`=False"
        )
    on_gpu, is_plain = device == "cuda", settings.has_plain_chains
    compiled = is_plain and (on_gpu and not settings.deterministic if settings.compile is None else settings.compile)
    if compiled and not has_compiler():
        print("note: no C compiler is on the PATH (cc, gcc or clang): the Langevin step runs uncompiled")
        compiled = False
    captured = is_plain and (on_gpu and settings.num_steps > 0 if settings.cuda_graph is None else settings.cuda_graph)
    asked = {"precision": settings.precision != "auto", "compile": settings.compile, "cuda_graph": settings.cuda_graph}
    return Acceleration(
        choose_precision(settings, device),
        compiled,
        captured,
        frozenset(name for name, is_asked in asked.items() if is_asked),
    )


def choose_precision(settings: TrainSettings, device: str) -> str:
    """Return the number type of energies: that of the setting `precision`, else the usual one on this kind of device.

    On a GPU that is fp16 for Langevin chains without the KL term, and TF32 for all else. On a CPU it is float32;
    `tune_run` may find that bf16 is faster. In fp16 the gradients for images are 1 to 3 % off.
    """
    if settings.precision == "fp16" and not settings.zero_kl:
        print("note: with the KL term, whose gradients underflow in fp16, precision=fp16 is tf32")
        return "tf32"
    if settings.precision != "auto":
        return settings.precision
    if device == "cuda":
        return "fp16" if settings.has_plain_chains else "tf32"
    return "float32"


# ---- the run's state ----


def build_state(settings: TrainSettings, config: models.ModelConfig, dataset: data.Dataset, workers: Workers) -> State:
    """Return the state of a new run: the same weights on every worker, but its own noise and replay buffer."""
    torch.manual_seed(fold_seed(settings.seed + workers.rank))
    model = models.build_model(config, torch.Generator().manual_seed(settings.seed)).to(workers.device)
    return State(
        model=model,
        optimizer=ClippedAdam(model.parameters(), lr=settings.lr),
        buffer=ReplayBuffer(REPLAY_SIZE if settings.replay_batch else 0, config.image_shape, workers.device),
        batches=data.Batches(
            len(dataset), settings.batch_size, settings.seed, workers.rank, workers.size, dataset.index_device
        ),
        generator=torch.Generator(workers.device).manual_seed(fold_seed(settings.seed * 1_000 + workers.rank)),
        ema=copy.deepcopy(model).eval() if settings.ema_decay else None,
        acceleration=choose_acceleration(settings, workers.device.type),
    )


def check_starts(config: models.ModelConfig) -> None:
    """Raise UsageError if the normal distributions of starts do not fit the network or the memory."""
    if not config.start_rank:
        return
    if config.network == "DspritesNet":
        raise UsageError("`datasource`=gauss is not for sprites, whose models are combined from noise; leave it out")
    size = 4 * config.start_rank * max(config.label_size, 1) * math.prod(config.image_shape)
    if 4 * size > find_free_memory():  # the weights, their average, and what is saved
        raise UsageError(f"`start_rank`={config.start_rank} takes {size / 1e9:.1f} GB several times over; lower it")


def fit_starts(settings: TrainSettings, state: State, dataset: data.Dataset, workers: Workers) -> None:
    """Fit the distribution of a new run's starts, if it has one, to at most `STARTS_IMAGES` random images.

    Rank 0 does so; the others receive it with the weights.
    """
    if state.model.starts is None or workers.rank > 0:
        return
    most = min(STARTS_IMAGES, STARTS_PIXELS // math.prod(dataset.image_shape))
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:most]
    generator = torch.Generator(state.generator.device).manual_seed(0)
    order = torch.zeros(1, dtype=torch.long) if settings.single else order
    with show_waiting(f"fitting the distribution that chains start from to {len(order):,} images"):
        images, labels = dataset.batch(order.to(dataset.index_device), generator)
        state.model.starts.fit(images, labels if state.model.config.label_size else None)
    state.start_ema()


def compute_last_iteration(settings: TrainSettings, images: int, workers: int) -> int:
    """Return the last iteration: `max_iter`, else `epoch_num` passes over the data, for mnist at most 60,000.

    The limit for mnist is that of the published code.
    """
    if settings.max_iter is not None:
        return settings.max_iter
    epochs = settings.epoch_num * (images // (settings.batch_size * workers))
    return min(epochs, 60_000) if settings.dataset == "mnist" else epochs


def check_device(settings: TrainSettings, workers: Workers) -> None:
    """Raise UsageError, or print a note, for settings of GPUs in a run on a CPU."""
    if workers.device.type == "cuda":
        return
    if settings.cuda_graph:
        raise UsageError(f"`cuda_graph` needs a GPU, and this run is on the {workers.device}; set `cuda_graph`=False")
    if settings.deterministic:
        workers.print("note: deterministic has no effect on a CPU, where runs are the same bit for bit anyway")


def check_trackers(settings: TrainSettings, workers: Workers) -> None:
    """Raise UsageError if the package of a tracker cannot be used. Rank 0 alone needs it."""
    if settings.train:
        workers.call_first(lambda: import_packages(settings.projects, settings.folder))


def write_config(settings: TrainSettings, state: State, workers: Workers, stop: int) -> None:
    """Write the settings, the network, the versions and the last iteration of a run to config.json."""
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    config = {
        "flags": cli.to_dict(settings),
        "network": dataclasses.asdict(state.model.config),
        "parameters": parameters,
    }
    config |= {"torch": torch.__version__, "workers": workers.size, "energies": str(state.acceleration)}
    write_json(settings.folder / CONFIG_NAME, config | {"last_iteration": stop})


def note_name_of_preset(settings: TrainSettings) -> None:
    """Print a note if a run on other data than those of its preset has the preset's name."""
    words = {word.lstrip("-") for word in PRESETS.get(settings.preset or "", "").split()}
    if f"exp={settings.exp}" in words and f"dataset={settings.dataset}" not in words:
        print(
            f"note: this run on {settings.dataset} is called {settings.exp}, as its preset says; exp=<name> renames it"
        )


def announce_run(
    settings: TrainSettings,
    state: State,
    dataset: data.Dataset,
    workers: Workers,
    stop: int,
    trials: str,
    cost: str,
) -> None:
    """Print the data, the network, the workers, the cost and the settings of a run.

    trials: what was timed to choose how chains are computed.
    """
    config = state.model.config
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    print(f"data: {dataset.name}, {len(dataset):,} images of {config.image_shape}, {dataset.label_size} label values")
    if dataset.class_names and not config.label_size:
        print(cli.name_flags(f"labels: {list_some(dataset.class_names)} (`cclass` conditions on them)", type(settings)))
    print(f"network: {config.network}, {parameters:,} parameters, {config.num_filters} filters")
    team = (
        f"{workers.size} workers, connected by {workers.engine} ({workers.why})" if workers.size > 1 else "one worker"
    )
    print(f"device: {workers.device}, {team}; energies in {state.acceleration}, images and parameters in float32")
    if state.acceleration.compiled:
        print(COMPILED)
    print(f"iterations: {state.iteration} to {stop}; everything goes to {settings.folder}/")
    if state.iteration == 0:
        note_name_of_preset(settings)
    if workers.device.type == "cpu":
        print(f"chains: {describe_way(state)}{trials}")
    if cost:
        print(cost)
    print(f"settings: {cli.write_flags(settings)}")


def list_some(names: Sequence[str]) -> str:
    """Return the first ten names of a list, each cut to 30 letters, and how many there are if some are left out."""
    rest = f", … ({len(names):,} in all)" if len(names) > 10 else ""
    return ", ".join(name[:30] for name in names[:10]) + rest
