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
import json
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

import cli
import evaluation
from errors import UsageError

if TYPE_CHECKING:
    import torch

    from evaluation import Trained
    from quality import Chains, Classifier, Inception, Reference

FLAGS = flags.FLAGS
COMPARED = "of at most 10,000 images"
SPACING = 300  # iterations between the checkpoints of the reference's ensemble
RELEASED = "6726825d"  # how the SHA-256 of the released Inception weights begins

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

with cli.group("Main"):
    evaluation.define_model_flags()
    flags.DEFINE_list("iterations", [], "measure at each of these, such as 200,400,800 or all, and draw the curve")
    flags.DEFINE_integer("idx", 0, "number of this evaluation, in the name of its folder", lower_bound=0)

with cli.group("Sampling"):
    flags.DEFINE_integer("im_number", 50_000, "images to draw", lower_bound=4)
    flags.DEFINE_integer("num_steps", 20, "Langevin steps of a round", lower_bound=1)
    flags.DEFINE_float("step_lr", None, "step size of the gradient; default the model's in training, or 10", 0)
    flags.DEFINE_float("proj_norm", 0.05, "clip the gradient elementwise to this; 0: no clip", lower_bound=0)
    flags.DEFINE_float("noise_scale", 0.005, "standard deviation of a step's noise", lower_bound=0)
    flags.DEFINE_integer("batch_size", 512, "chains of a round, out of a pool of 1,000", lower_bound=1)
    flags.DEFINE_integer("repeat_scale", 100, "half the number of rounds of a pool", lower_bound=1)
    flags.DEFINE_integer("nomix", 10, "last rounds, in which no chain starts again or gets a new label", lower_bound=0)
    flags.DEFINE_integer("ensemble", 10, "checkpoints that take turns: 300 iterations apart, else the newest", 1)
    evaluation.define_precision_flag()

with cli.group("Measures"):
    flags.DEFINE_enum("features", "auto", ["auto", "inception", "classifier"], "what compares images; auto: see above")
    flags.DEFINE_string("inception_weights", None, "file of the Inception weights, as torch-fidelity publishes it")
    flags.DEFINE_string("inception_sha256", RELEASED, "how its SHA-256 has to begin")
    flags.DEFINE_integer("splits", 5_000, "images of a split of the Inception score", lower_bound=1)
    flags.DEFINE_enum("reference", None, ["train", "test", "both"], "real images; default both of cifar10, else train")
    flags.DEFINE_integer("real_number", 100_000, "real images, at random where there are more", lower_bound=100)
    flags.DEFINE_string("cache", None, "where what is known of real images is kept; default --logdir/statistics")

with cli.group("Data"):
    evaluation.define_data_flags()

with cli.group("Network (the checkpoint knows all but --swish_act of a TF1 file)"):
    evaluation.define_network_flags()


def chosen_iterations(folder: pathlib.Path) -> list[str]:
    """Return the iterations to measure at, as `checkpoint.find` takes them."""
    import checkpoint

    if FLAGS.iterations == ["all"]:
        return [str(iteration) for iteration in checkpoint.iterations(folder)] or ["latest"]
    for word in FLAGS.iterations:
        if not word.isdecimal():
            raise UsageError(f"--iterations={word} is no iteration; give numbers with commas between, or all")
    return FLAGS.iterations or ["latest" if FLAGS.resume_iter == "-1" else FLAGS.resume_iter]


def ensemble(folder: pathlib.Path, resume_iter: str, number: int) -> list[pathlib.Path]:
    """Return the checkpoints that take turns, newest first: 300 iterations apart if all are there, else the newest.

    None is newer than resume_iter. The best model stands alone.
    """
    import checkpoint

    newest = checkpoint.find(folder, resume_iter)
    name = newest.stem.removeprefix("model_")
    if not name.isdecimal():
        return [newest]
    there = [iteration for iteration in checkpoint.iterations(folder) if iteration <= int(name)]
    apart = [int(name) - SPACING * k for k in range(number)]
    used = apart if set(apart) <= set(there) else there[::-1][:number]
    return [checkpoint.find(folder, str(iteration)) for iteration in used]


def load_reference(trained: Trained, device: torch.device) -> Reference:
    """Return the real images to compare with. Raises UsageError where they do not fit the model."""
    from quality import Reference

    name = FLAGS.dataset or trained.flags.get("dataset", "cifar10")
    choice = FLAGS.reference or ("both" if name == "cifar10" else "train")
    splits = ("train", "test") if choice == "both" else (choice,)
    datasets = [evaluation.load_split(split, trained, device) for split in splits]
    return Reference.of(name, choice, datasets, FLAGS.real_number)


def load_extractor(reference: Reference, cache: pathlib.Path, device: torch.device) -> Inception | Classifier:
    """Return what compares images: Inception where it applies and is to be had, else the data set's own classifier."""
    from quality import Inception, classifier_of, find_inception, read_inception

    colour = reference.datasets[0].image_shape[0] == 3
    if FLAGS.features == "inception" or (FLAGS.features == "auto" and colour):
        if not colour:
            raise UsageError("--features=inception is for colour images; leave it out for grey ones")
        try:
            path = FLAGS.inception_weights or find_inception(FLAGS.download)
            inception = Inception(*read_inception(path, FLAGS.inception_sha256), device=device)
            print(f"compared by Inception-2015-12-05, {path}, SHA-256 {inception.identity[:16]}…")
            return inception
        except UsageError as error:
            if FLAGS.features == "inception" or FLAGS.inception_weights:
                raise
            print(f"note: {error}")
    classifier = classifier_of(reference, cache, device)
    accuracy = f"{classifier.network.accuracy:.1%} right on images held out"
    print(f"compared by a small classifier of this data set, {accuracy}; its figures compare with no FID")
    return classifier


def draw(paths: Sequence[pathlib.Path], chains: Chains, trained: dict[str, Any], device: torch.device) -> torch.Tensor:
    """Return --im_number images, uint8 (N, C, H, W), from chains under the ensemble of these checkpoints."""
    import torch

    import checkpoint
    import quality
    from acceleration import PRECISIONS, products_in
    from utils import Progress

    load = functools.partial(checkpoint.load_energy, swish_act=FLAGS.swish_act, ema=FLAGS.ema, device=device)
    ensemble = list(map(load, paths))
    rescale = trained.get("rescale", 1.0)
    # Gradients to images in [0, 1] are `rescale` times those to the network's own images.
    chains = dataclasses.replace(chains, step_lr=chains.step_lr / rescale, proj_norm=chains.proj_norm * rescale)
    progress = Progress(chains.rounds * -(-FLAGS.im_number // quality.POOL), what="round")
    with quality.within_memory(chains.batch_size), products_in(FLAGS.precision):
        images = quality.pool_images(
            [quality.energy_of(model, rescale, PRECISIONS[FLAGS.precision]) for model in ensemble],
            FLAGS.im_number,
            ensemble[0].config,
            chains,
            generator=torch.Generator(device).manual_seed(FLAGS.seed),
            progress=progress,
        )
    progress.close()
    return images


def settings_of(chains: Chains, reference: Reference, extractor: Inception | Classifier) -> dict[str, Any]:
    """Return what the figures depend on besides the checkpoints, under the names of the flags where there are some."""
    import quality

    settings = {"im_number": FLAGS.im_number, **dataclasses.asdict(chains), "seed": FLAGS.seed, "ema": FLAGS.ema}
    settings["precision"] = FLAGS.precision
    settings |= {"reference": str(reference), "features": extractor.name, "weights": extractor.identity}
    if isinstance(extractor, quality.Classifier):
        return settings | {"accuracy": extractor.network.accuracy, "precision and recall": COMPARED}
    return settings | {"splits": FLAGS.splits, "KID, precision and recall": COMPARED}


def as_text(contents: dict[str, Any]) -> str:
    """Return the figures as a table, a row per iteration, with their settings and the published ones."""
    results, of_real = contents["results"], contents["Fréchet distance of real images"]
    sizes = "/".join(str(size) for size in sorted({len(result["ensemble"]) for result in results}))
    settings = ", ".join(f"{name}={value}" for name, value in contents["settings"].items())
    lines = [cli.table({f"iteration {result['iteration']}": result["figures"] for result in results})]
    lines += [f"Fréchet distance of {of_real['images']:,} images of the reference itself: {of_real['distance']:.4f}"]
    lines += [f"settings: ensemble={sizes}, {settings}"]
    return "\n".join(lines + [f"paper, {name}: {text}" for name, text in contents["paper"].items()])


def main() -> None:

    import pictures
    import quality

    device = evaluation.start()
    models_of = pathlib.Path(FLAGS.modeldir) / FLAGS.exp
    ensembles = [ensemble(models_of, iteration, FLAGS.ensemble) for iteration in chosen_iterations(models_of)]
    newest = ensembles[-1][0]
    trained = evaluation.open_model(newest, device)
    config = trained.model.config
    if config.network == "DspritesNet" and 0 < config.label_size < 3:
        raise UsageError(f"{newest} is conditioned on a size, position or rotation; chains here draw classes")
    cache = pathlib.Path(FLAGS.cache or pathlib.Path(FLAGS.logdir) / "statistics")
    reference = load_reference(trained, device)
    extractor = load_extractor(reference, cache, device)
    real = quality.reference_statistics(extractor, reference, cache)

    usual_step = trained.flags.get("step_lr", 10.0)
    given: dict[str, Any] = {field.name: FLAGS[field.name].value for field in dataclasses.fields(quality.Chains)}
    chains = quality.Chains(**given | {"step_lr": usual_step if FLAGS.step_lr is None else FLAGS.step_lr})
    of_real = dict(zip(("images", "distance"), quality.distance_of_real(real, FLAGS.im_number), strict=True))
    published = PAPER.get((reference.datasets[0].name, config.label_size > 0), {})
    contents: dict[str, Any] = {
        "settings": settings_of(chains, reference, extractor),
        "flags": cli.values(),
        "network": dataclasses.asdict(config),
        "results": [],
        "Fréchet distance of real images": of_real,
        "paper": published if extractor.name == "inception" else {},
    }
    folder = pathlib.Path(FLAGS.logdir) / FLAGS.exp / f"eval_inception_{FLAGS.idx}"
    path = folder / "eval_inception.json"
    for paths in ensembles:
        print(f"ensemble of {len(paths)}: {', '.join(map(str, paths))}")
        images = draw(paths, chains, trained.flags, device)
        iteration = paths[0].stem.removeprefix("model_")
        shown, scale = images[:100] / 255, max(1, 64 // images.shape[3])
        print(f"wrote {pictures.save_grid(shown, folder / f'samples_{iteration}.png', columns=10, scale=scale)}")
        figures = quality.figures(extractor, images, real, splits=FLAGS.splits)
        contents["results"].append({"iteration": iteration, "ensemble": list(map(str, paths)), "figures": figures})
        path.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n")
    print(as_text(contents))
    print(f"wrote {path}")
    if len(ensembles) > 1:
        at = [int(result["iteration"]) for result in contents["results"]]
        curves = {name: {name: (at, [result["figures"][name] for result in contents["results"]])} for name in figures}
        print(f"wrote {pictures.plot_lines(curves, folder / 'curve.png', xlabel='iteration')}")


if __name__ == "__main__":
    cli.run(main, __doc__)
