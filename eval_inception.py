"""Measure how good a trained model's samples are: Inception score, FID, KID, precision and recall.

    python eval_inception.py --exp=cifar10_large_model_uncond --resume_iter=121200 --step_lr=10.0
    python eval_inception.py --exp=fashion_mnist --im_number=1000 --repeat_scale=10 --ensemble=1 --num_steps=10
    python eval_inception.py --exp=cifar10_cond --iterations=10000,20000,30000 --im_number=5000 --ensemble=1

Images come from pools of persistent chains under an ensemble of the last checkpoints. Colour images are compared with
real ones by the Inception-2015-12-05 network, as published figures are; its weights are found in torch's cache folder,
downloaded, or given by --inception_weights. Grey images, or all where there are no such weights, are compared by a
small classifier that is trained on the data set itself: its figures have other names, since they compare with no FID.
eval_inception.json, a grid of samples and the curve over --iterations go to --logdir/<exp>/eval_inception_<idx>/.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import checkpoint
import cli
import pictures
import quality
from acceleration import PRECISIONS, products_in
from ebm.settings import InceptionSettings
from errors import UsageError
from evaluation import TrainedModel, choose_device, load_split, note_contradictions, open_model
from quality import Classifier, Inception, Reference, classifier_of, find_inception, read_inception
from reports import format_table, write_json
from utils import Progress

COMPARED = "of at most 10,000 images"
SPACING = 300  # iterations between the checkpoints of the reference's ensemble

# Published figures (Du & Mordatch 2019, as later papers quote them; "?": not verified): data set, conditional -> rows.
PAPER = {
    ("cifar10", False): {
        "one model": "IS 6.02, FID 40.58",
        "ensemble of 10 late checkpoints": "IS 6.78, FID 38.2",
        "released model_121200, one model, num_steps 60, repeat_scale 10, by a user": "IS 6.40, FID 51.9",
    },
    ("cifar10", True): {"conditional": "IS 8.30, FID 37.9"},
    ("imagenet", True): {"conditional": "IS 18.22, FID 14.31 ? (a later paper quotes IS 5.85, FID 62.2)"},
    ("imagenetfull", True): {"conditional": "IS 28.6, FID 43.7 ?"},
}


def list_iterations(settings: InceptionSettings, folder: pathlib.Path) -> list[str]:
    """Return the iterations to measure at, as `checkpoint.find` takes them."""
    if settings.iterations == ("all",):
        return [str(iteration) for iteration in checkpoint.iterations(folder)] or ["latest"]
    for word in settings.iterations:
        if not word.isdecimal():
            raise UsageError(f"`iterations`={word} is no iteration; give numbers with commas between, or all")
    return list(settings.iterations) or ["latest" if settings.resume_iter == "-1" else settings.resume_iter]


def find_ensemble(folder: pathlib.Path, resume_iter: str, number: int) -> list[pathlib.Path]:
    """Return the checkpoints that take turns, newest first: 300 iterations apart if all are there, else the newest.

    None is newer than resume_iter. The best model stands alone.
    """
    newest = checkpoint.find(folder, resume_iter)
    name = newest.stem.removeprefix("model_")
    if not name.isdecimal():
        return [newest]
    there = [iteration for iteration in checkpoint.iterations(folder) if iteration <= int(name)]
    apart = [int(name) - SPACING * k for k in range(number)]
    used = apart if set(apart) <= set(there) else there[::-1][:number]
    return [checkpoint.find(folder, str(iteration)) for iteration in used]


def load_reference(settings: InceptionSettings, trained: TrainedModel, device: torch.device) -> Reference:
    """Return the real images to compare with. Raises UsageError where they do not fit the model."""
    name = settings.dataset or trained.flags.get("dataset", "cifar10")
    choice = settings.reference or ("both" if name == "cifar10" else "train")
    splits = ("train", "test") if choice == "both" else (choice,)
    datasets = [load_split(split, trained, settings, device) for split in splits]
    return Reference.of(name, choice, datasets, settings.real_number)


def load_extractor(
    settings: InceptionSettings, reference: Reference, cache: pathlib.Path, device: torch.device
) -> Inception | Classifier:
    """Return what compares images: Inception where it applies and is to be had, else the data set's own classifier."""
    colour = reference.datasets[0].image_shape[0] == 3
    if settings.features == "inception" or (settings.features == "auto" and colour):
        if not colour:
            raise UsageError("`features`=inception is for colour images; leave it out for grey ones")
        try:
            path = settings.inception_weights or find_inception(settings.download)
            inception = Inception(*read_inception(path, settings.inception_sha256), device=device)
            print(f"compared by Inception-2015-12-05, {path}, SHA-256 {inception.identity[:16]}…")
            return inception
        except UsageError as error:
            if settings.features == "inception" or settings.inception_weights:
                raise
            print(f"note: {error}")
    classifier = classifier_of(reference, cache, device)
    accuracy = f"{classifier.network.accuracy:.1%} right on images held out"
    print(f"compared by a small classifier of this data set, {accuracy}; its figures compare with no FID")
    return classifier


def draw_images(
    settings: InceptionSettings, paths: Sequence[pathlib.Path], trained: TrainedModel, device: torch.device
) -> Tensor:
    """Return `im_number` images, uint8 (N, C, H, W), from chains under the ensemble of these checkpoints."""
    load = functools.partial(
        checkpoint.load_energy, swish_act=bool(settings.swish_act), ema=settings.ema, device=device
    )
    ensemble, rescale = list(map(load, paths)), trained.rescale
    progress = Progress(settings.rounds * -(-settings.im_number // quality.POOL), what="round")
    with quality.within_memory(settings.batch_size), products_in(settings.precision):
        images = quality.pool_images(
            [quality.energy_of(model, rescale, PRECISIONS[settings.precision]) for model in ensemble],
            ensemble[0].config,
            settings,
            step_lr=trained.choose_step_lr(settings.step_lr) / rescale,  # gradients to images in [0, 1] are `rescale`
            proj_norm=settings.proj_norm * rescale,  # times those to the network's own images
            generator=torch.Generator(device).manual_seed(settings.seed),
            progress=progress,
        )
    progress.close()
    return images


def describe_settings(
    settings: InceptionSettings, trained: TrainedModel, reference: Reference, extractor: Inception | Classifier
) -> dict[str, Any]:
    """Return what the figures depend on besides the checkpoints, by the names of the settings."""
    of_chains = ("im_number", "num_steps", "proj_norm", "noise_scale", "batch_size", "repeat_scale", "nomix")
    described = {name: getattr(settings, name) for name in (*of_chains, "seed", "ema", "precision")}
    described |= {"step_lr": trained.choose_step_lr(settings.step_lr)}
    described |= {"reference": str(reference), "features": extractor.name, "weights": extractor.identity}
    if isinstance(extractor, Classifier):
        return described | {"accuracy": extractor.network.accuracy, "precision and recall": COMPARED}
    return described | {"splits": settings.splits, "KID, precision and recall": COMPARED}


def format_results(contents: dict[str, Any]) -> str:
    """Return the figures as a table, a row per iteration, with their settings and the published ones."""
    results, of_real = contents["results"], contents["Fréchet distance of real images"]
    sizes = "/".join(str(size) for size in sorted({len(result["ensemble"]) for result in results}))
    settings = ", ".join(f"{name}={value}" for name, value in contents["settings"].items())
    lines = [format_table({f"iteration {result['iteration']}": result["figures"] for result in results})]
    lines += [f"Fréchet distance of {of_real['images']:,} images of the reference itself: {of_real['distance']:.4f}"]
    lines += [f"settings: ensemble={sizes}, {settings}"]
    return "\n".join(lines + [f"paper, {name}: {text}" for name, text in contents["paper"].items()])


def main(settings: InceptionSettings) -> None:
    device = choose_device(settings.device)
    models_of = pathlib.Path(settings.modeldir) / settings.exp
    ensembles = [
        find_ensemble(models_of, iteration, settings.ensemble) for iteration in list_iterations(settings, models_of)
    ]
    newest = ensembles[-1][0]
    trained = open_model(newest, device, swish_act=settings.swish_act, ema=settings.ema)
    note_contradictions(settings, trained)
    config = trained.model.config
    if config.network == "DspritesNet" and 0 < config.label_size < 3:
        raise UsageError(f"{newest} is conditioned on a size, position or rotation; chains here draw classes")
    cache = pathlib.Path(settings.cache or pathlib.Path(settings.logdir) / "statistics")
    reference = load_reference(settings, trained, device)
    extractor = load_extractor(settings, reference, cache, device)
    real = quality.reference_statistics(extractor, reference, cache)

    of_real = dict(zip(("images", "distance"), quality.distance_of_real(real, settings.im_number), strict=True))
    published = PAPER.get((reference.datasets[0].name, config.label_size > 0), {})
    contents: dict[str, Any] = {
        "settings": describe_settings(settings, trained, reference, extractor),
        "flags": cli.to_dict(settings),
        "network": dataclasses.asdict(config),
        "results": [],
        "Fréchet distance of real images": of_real,
        "paper": published if extractor.name == "inception" else {},
    }
    folder = pathlib.Path(settings.logdir) / settings.exp / f"eval_inception_{settings.idx}"
    path = folder / "eval_inception.json"
    for paths in ensembles:
        print(f"ensemble of {len(paths)}: {', '.join(map(str, paths))}")
        images = draw_images(settings, paths, trained, device)
        iteration = paths[0].stem.removeprefix("model_")
        shown, scale = images[:100] / 255, max(1, 64 // images.shape[3])
        print(f"wrote {pictures.save_grid(shown, folder / f'samples_{iteration}.png', columns=10, scale=scale)}")
        figures = quality.figures(extractor, images, real, splits=settings.splits)
        contents["results"].append({"iteration": iteration, "ensemble": list(map(str, paths)), "figures": figures})
        write_json(path, contents)
    print(format_results(contents))
    print(f"wrote {path}")
    if len(ensembles) > 1:
        at = [int(result["iteration"]) for result in contents["results"]]
        curves = {name: {name: (at, [result["figures"][name] for result in contents["results"]])} for name in figures}
        print(f"wrote {pictures.plot_lines(curves, folder / 'curve.png', xlabel='iteration')}")


if __name__ == "__main__":
    cli.run(main, InceptionSettings, __doc__)
