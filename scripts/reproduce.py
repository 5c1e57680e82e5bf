"""Check the files that a published figure needs, run its command, and print the measured figures beside the expected.

    python scripts/reproduce.py --list
    python scripts/reproduce.py digits_label
    python scripts/reproduce.py cifar10_uncond_user --checkpoint=downloads/model_121200.index --dry_run

docs/reproduce.md explains the rows. Of each file the size and the SHA-256 are printed, and compared with the recorded
hash if there is one. A checkpoint is also loaded, which verifies the checksums inside it. The exit status is 0 if the
figures were measured (or, with --dry_run, if all files are there and whole), 2 if a file is missing, damaged or another
one than recorded, and else that of the row's command.
"""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from ebm.support import interruption

if __name__ == "__main__":
    interruption.guard_start()

import dataclasses
import difflib
import hashlib
import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import checkpoint
from ebm.measures.features import INCEPTION_SHA256, locate_inception
from ebm.readers.bounded import CHUNK, open_file, read_json, report_unreadable_file
from ebm.readers.downloads import import_torchvision
from ebm.support import cli
from ebm.support.cli import flag
from ebm.support.errors import UsageError
from ebm.support.experiments import get_shipped_root
from ebm.support.interruption import Interruption
from ebm.support.progress import SHORT, Progress
from ebm.support.reports import print_written

ROOT = pathlib.Path(__file__).resolve().parent.parent
MAX_REPORT = 1 << 28  # bytes
SPACING, LATE = 300, 10  # iterations between the checkpoints of the published ensemble, and their number


class Row(NamedTuple):
    """A figure that someone published: what it is, where from, and how to measure it.

    expected: the place of each figure in the report of the command, as the names on the way there -> the published
    figure; "?": not verified. checkpoints: <experiment>/<checkpoint>. data: keys of `list_data_files`. In the command
    <name> stands for a setting of this script, and for what no source tells. was_run: whether this project measured it.
    """

    what: str
    expected: Mapping[tuple[str, ...], str]
    source: str
    command: str
    checkpoints: tuple[str, ...]
    data: tuple[str, ...]
    was_run: str


LARGE, COND = "cifar10_large_model_uncond/model_121200", "cifar10_cond/model_74700"
WIDER = "cifar10_wider_model_cond/model_21600"
LATE_CHECKPOINTS = tuple(f"cifar10_large_model_uncond/model_{121200 - SPACING * k}" for k in range(LATE))
INCEPTION = "eval_inception.py --features=inception"
UNCOND = f"{INCEPTION} --exp=cifar10_large_model_uncond --resume_iter=121200 --dataset=cifar10 --large_model"
OUTLIERS = "ebm_sandbox.py --exp=cifar10_large_model_uncond --resume_iter=121200 --large_model --cclass=False"
CLASSIFY = "ebm_sandbox.py --task=label --exp=cifar10_wider_model_cond --resume_iter=21600 --wider_model"
SHIPPED_ONLY = "--modeldir=pretrained"
NO_FILES = "no: no checkpoint, data, Inception weights"
NO_DATA = "no: no checkpoint, data"
SPRITE_MODELS = tuple(
    f"dsprites_cond_{name}" for name in ("size/model_1250", "shape/model_10500", "pos/model_2500", "rot/model_5250")
)

ROWS = {
    "cifar10_uncond_user": Row(
        "CIFAR-10, unconditional, the released model alone, 50,000 samples",
        {("FID",): "51.9", ("Inception score",): "6.40"},
        "a user, openai/ebm_code_release issue 11 (2025)",
        f"{UNCOND} --ensemble=1 --im_number=50000 --num_steps=60 --repeat_scale=10 --step_lr=10",
        (LARGE,),
        ("cifar10", "inception"),
        NO_FILES,
    ),
    "cifar10_uncond": Row(
        "CIFAR-10, unconditional, one model; sampler: the release's defaults ?",
        {("FID",): "40.58", ("Inception score",): "6.02"},
        "paper, quoted in NCSN (2019), Table 1",
        f"{UNCOND} --ensemble=1 --step_lr=10",
        (LARGE,),
        ("cifar10", "inception"),
        NO_FILES,
    ),
    "cifar10_uncond_ensemble": Row(
        "CIFAR-10, unconditional, ensemble of 10 late checkpoints; sampler: the release's defaults ?",
        {("FID",): "38.2", ("Inception score",): "6.78"},
        "paper, quoted in DDPM (2020), Table 1",
        f"{UNCOND} --ensemble=10 --step_lr=10",
        LATE_CHECKPOINTS,
        ("cifar10", "inception"),
        NO_FILES,
    ),
    "cifar10_cond": Row(
        "CIFAR-10, conditional; checkpoint, ensemble ? and sampler ?",
        {("FID",): "37.9", ("Inception score",): "8.30"},
        "paper, quoted in NCSN and DDPM",
        f"{INCEPTION} --exp=cifar10_cond --resume_iter=74700 --dataset=cifar10 --ensemble=1 --step_lr=10",
        (COND,),
        ("cifar10", "inception"),
        NO_FILES,
    ),
    "imagenet32_cond": Row(
        "ImageNet 32x32, conditional; checkpoint ? and sampler ?",
        {("FID",): "14.31 ? (62.2 in a later paper)", ("Inception score",): "18.22 ? (5.85 in a later paper)"},
        "two sources disagree",
        f"{INCEPTION} --exp=imagenet_cond --resume_iter=<iteration> --dataset=imagenet --imagenet_path=<imagenet_path> "
        "--wider_model --ensemble=1 --step_lr=10",
        ("imagenet_cond/model_<iteration>",),
        ("imagenet", "inception"),
        NO_FILES,
    ),
    "imagenet128_cond": Row(
        "ImageNet 128x128, conditional; sampler ? (steps of training)",
        {("FID",): "43.7 ?", ("Inception score",): "28.6 ?"},
        "not verified",
        f"{INCEPTION} --exp=imagenet128_cond --resume_iter=2238000 --swish_act --dataset=imagenetfull "
        "--imagenet_datadir=<imagenet_datadir> --ensemble=1 --num_steps=50 --step_lr=100",
        ("imagenet128_cond/model_2238000",),
        ("imagenetfull", "inception"),
        NO_FILES,
    ),
    "cifar10_accuracy": Row(
        "CIFAR-10, accuracy of the class of lowest energy; checkpoint ?",
        {("clean",): "0.491"},
        "paper, quoted in HybViT",
        f"{CLASSIFY} --num_steps=0",
        (WIDER,),
        ("cifar10",),
        NO_DATA,
    ),
    "cifar10_pgd": Row(
        "CIFAR-10, accuracy over the radius of an L∞ attack, with and without refinement; steps of PGD ?",
        {(f"{radius}/255", name): "?" for radius in (0, 8, 16) for name in ("attacked", "attacked, refined")},
        "paper, a curve of which no source here has the numbers",
        f"{CLASSIFY} --lnorm=-1 --pgd=20 --num_steps=10 --labelgrid",
        (WIDER,),
        ("cifar10",),
        NO_DATA,
    ),
    "outliers": Row(
        "CIFAR-10, unconditional, AUROC of −E against other images",
        {
            ("svhn", "AUROC"): "0.63",
            ("textures", "AUROC"): "0.48",
            ("cifar100", "AUROC"): "0.50",
            ("interpolation", "AUROC"): "0.70",
        },
        "paper, quoted in DiffPath and HybViT",
        f"{OUTLIERS} --task=mixenergy --svhnmix --texturemix --cifar100mix --interpolationmix",
        (LARGE,),
        ("cifar10", "svhn", "textures", "cifar100"),
        NO_DATA,
    ),
    "outliers_made": Row(
        "CIFAR-10, unconditional, AUROC of −E against images of one colour and uniform noise",
        {("constant", "−E"): "0.30 ?", ("uniform noise", "−E"): "1.0 ?"},
        "not verified",
        f"{OUTLIERS} --task=ood --repeats=1",
        (LARGE,),
        ("cifar10",),
        NO_DATA,
    ),
    "ais_gauss": Row(
        "bounds of log Z of a Gaussian, which is −1267.47",
        {
            ("pdist 10", "log Z ≥"): "-4839.8",
            ("pdist 10", "log Z ≤"): "-336.9",
            ("pdist 1000", "log Z ≥"): "-1425.7",
            ("pdist 1000", "log Z ≤"): "-1165.3",
        },
        "this project; log Z is exact",
        "ais.py --dataset=gauss --pdist=10,100,1000 --temperature=1000",
        (),
        (),
        "yes, 9 s",
    ),
    "digits_label": Row(
        "digits, accuracy and calibration error on the 179 test images",
        {("clean",): "0.989", ("calibration error, clean",): "0.034"},
        "this project",
        f"ebm_sandbox.py --task=label --exp=digits_cond --num_steps=0 {SHIPPED_ONLY}",
        ("digits_cond/model_500",),
        (),
        "yes, 5 s",
    ),
    "digits_quality": Row(
        "digits, classifier Fréchet distance, precision and recall of 1,000 samples",
        {
            ("classifier Fréchet distance",): "2.1",
            ("classifier precision",): "0.22",
            ("classifier recall",): "0.42",
            ("patch distance",): "0.156",
            ("tone distance",): "0.05",
        },
        "this project",
        "eval_inception.py --exp=digits_cond --ensemble=1 --num_steps=auto --proj_norm=0 --im_number=1000 "
        f"--repeat_scale=1 --nomix=2 --batch_size=500 {SHIPPED_ONLY}",
        ("digits_cond/model_500",),
        (),
        "yes, 22 s",
    ),
    "mnist_noise": Row(
        "the model of MNIST, AUROC of −E, scikit-learn's digits against Gaussian noise",
        {("random", "AUROC"): "1.00"},
        "this project",
        f"ebm_sandbox.py --task=mixenergy --exp=mnist_cond --dataset=digits --randommix {SHIPPED_ONLY}",
        ("mnist_cond/model_600",),
        (),
        "yes, 21 s",
    ),
    "fashion_label": Row(
        "Fashion-MNIST, accuracy and calibration error on 1,000 test images",
        {("clean",): "0.871", ("calibration error, clean",): "0.028"},
        "this project",
        f"ebm_sandbox.py --task=label --exp=fashion_cond --limit=1000 --num_steps=0 {SHIPPED_ONLY}",
        ("fashion_cond/model_6000",),
        ("fashion_mnist",),
        "yes, 16 s",
    ),
    "sprites_labels": Row(
        "dSprites, share of 256 images whose label of lowest energy is right",
        {
            ("size, lowest energy", "right"): "0.99",
            ("shape, lowest energy", "right"): "0.98",
            ("rot, lowest energy", "right"): "0.75",
        },
        "this project",
        f"ebm_combine.py --task=labeldiscover --limit=256 --num_steps=40 --label_lr=0.02 {SHIPPED_ONLY}",
        SPRITE_MODELS,
        (),
        "yes, 2 min",
    ),
    "sprites_combined": Row(
        "dSprites, share of 128 samples of four energies in which all concepts are right",
        {
            ("right, size & shape & pos & rot", "jointly"): "0.19",
            ("right, size & shape & pos & rot", "by nearest"): "0.46",
            ("right, size & shape & pos & rot", "no sprite"): "0.77",
        },
        "this project",
        "ebm_combine.py --weights=pos=3,rot=1.5 --num_steps=200 --step_lr=50 --first_step_lr=400 --first_noise=0.1 "
        f"--limit=128 --seed=1 --precision=bf16 {SHIPPED_ONLY}",
        SPRITE_MODELS,
        (),
        "yes, for docs/concepts.md; half an hour on one busy core",
    ),
}

# File of a row's checkpoint -> its SHA-256. Those of the authors' files are missing: they could not be downloaded.
HASHES = {
    "digits_cond/model_500.pt": "66412d3ca1b0939f18029dd83599876c2314ac8b97dbb3cbc2e428352008c024",
    "dsprites_cond_pos/model_2500.pt": "0880814940635414cf99bf74eb3a85bb26fcfb72eb92360b2870cbfdf6e5ae71",
    "dsprites_cond_rot/model_5250.pt": "e023e7200b0852df2d5890996644c541798e1f278619dd34b78c84eab9e03007",
    "dsprites_cond_shape/model_10500.pt": "612b3fcb2df9cfa3611031074f736fb64403632141a55e270f93239f1115d93b",
    "dsprites_cond_size/model_1250.pt": "e51e3e8214099ad179fd40453495bc7d10c515594663ae8fb6d44f7eb7c1be55",
    "fashion_cond/model_6000.pt": "1abf8df2e83717ec4c59b8c6d3910bf5f090512d5bd5a4eeb8fd2126acdbe79f",
    "mnist_cond/model_600.pt": "cd76d2275ea604413c427e7fe6113a8c84ff71ab3103bf0fb695a782821073dd",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Row"""

    row: str | None = flag(None, "the row to check and run, see --list; a word alone is the row", takes_word=True)
    list: bool = flag(False, "print all rows, as without a row, and end")
    dry_run: bool = flag(False, "check the files and print the command, but do not run it", not_with="list")
    checkpoint: str | None = flag(
        None,
        "the row's checkpoint, the path of one of its files; default: in cachedir/<experiment>/",
        not_with="list",
        is_path=True,
    )
    datadir: str = flag("data", "folder of the data sets that torchvision can download", not_with="list", is_path=True)
    imagenet_path: str | None = flag(None, "folder of the 32x32 ImageNet files", not_with="list", is_path=True)
    imagenet_datadir: str | None = flag(
        None, "folder of ImageNet's TFRecords or class folders", not_with="list", is_path=True
    )
    inception_weights: str | None = flag(
        None,
        "file of the Inception weights as published by torch-fidelity; default: in torch's cache folder",
        not_with="list",
        is_path=True,
    )
    logdir: str = flag("sandbox_cachedir", "folder for results", not_with=("list", "dry_run"), is_path=True)
    call_flags: str = flag(
        "",
        "further flags for the row's command, such as --device=cuda; those that change the figure, such as --limit, "
        "make the comparison a trial",
        not_with="list",
        can_be_empty=True,
    )


# ---- files ----

KINDS = {"sha256": "SHA-256", "md5": "MD5"}  # of hashes
# Data that a command downloads if they are missing.
DOWNLOADED = {"cifar10", "cifar100", "svhn", "textures", "fashion_mnist", "inception"}


class NeededFile(NamedTuple):
    """A file or folder that a row needs. known: the first digits of its MD5 or SHA-256, as `kind` says; may be ""."""

    path: pathlib.Path
    known: str = ""
    kind: str = "sha256"


def hash_file(path: pathlib.Path, kind: str = "sha256") -> str:
    """Return the hash of a file in hexadecimal digits; raise UsageError, which names the file, if it is unreadable."""
    digest = hashlib.new(kind, usedforsecurity=False)
    with report_unreadable_file(path), open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        with Progress(-(-size // CHUNK), what=f"hash of {path.name}, MB", patience=SHORT) as progress:
            while piece := file.read(CHUNK):
                digest.update(piece)
                progress.advance()
    return digest.hexdigest()


def check_file(needed: NeededFile) -> None:
    """Print size and SHA-256 of a file, or that it is a folder; raise UsageError if it has another hash than known."""
    path, known, kind = needed
    if path.is_dir():
        print(f"{path}: a folder, whose files the command reads")
        return
    found = hash_file(path)
    print(f"{path}: {path.stat().st_size:,} bytes, SHA-256 {found}", flush=True)
    compared = found if kind == "sha256" else hash_file(path, kind)
    if known and not compared.startswith(known):
        raise UsageError(
            f"{path} has the {KINDS[kind]} {compared[:16]}… instead of {known[:16]}…: it is damaged or another file; "
            "get it again, or run the command above by hand"
        )
    print(f"  {'as recorded' if known else 'no hash of it is recorded here'}")


def list_checkpoint_files(prefix: pathlib.Path, name: str) -> list[NeededFile]:
    """Return the files of a checkpoint: one of this project, if it is there, else the two of TensorFlow.

    name: of the row's checkpoint, by which its hashes are recorded.
    """
    is_ours = prefix.with_name(f"{prefix.name}.pt").exists()
    endings = (".pt",) if is_ours else (".index", ".data-00000-of-00001")
    return [NeededFile(prefix.with_name(prefix.name + end), HASHES.get(name + end, "")) for end in endings]


def list_data_files(name: str, settings: Settings) -> list[NeededFile]:
    """Return the files of a data set, or the weights of Inception, with the hashes that torchvision and others know."""
    root = pathlib.Path(settings.datadir)
    if name == "inception":
        weights = pathlib.Path(settings.inception_weights) if settings.inception_weights else locate_inception()
        return [NeededFile(weights, INCEPTION_SHA256)]
    if name in ("imagenet", "imagenetfull"):
        setting = {"imagenet": "imagenet_path", "imagenetfull": "imagenet_datadir"}[name]
        return [NeededFile(pathlib.Path(require_setting(setting, settings)))]
    if name == "textures":
        return [NeededFile(root / "dtd/dtd/images")]
    if name == "fashion_mnist":  # copies are packed differently, so that no hash of them is known
        plain = [root / "FashionMNIST/raw" / f"t10k-{part}-ubyte" for part in ("images-idx3", "labels-idx1")]
        return [NeededFile(path if path.exists() else path.with_name(f"{path.name}.gz")) for path in plain]
    sets: Any = import_torchvision().datasets
    if name == "svhn":
        _, file, known = sets.SVHN.split_list["test"]
        return [NeededFile(root / file, known, "md5")]
    kind = {"cifar10": sets.CIFAR10, "cifar100": sets.CIFAR100}[name]
    entries = [*(kind.train_list if name == "cifar10" else []), *kind.test_list]
    entries += [(kind.meta["filename"], kind.meta["md5"])]
    return [NeededFile(root / kind.base_folder / file, known, "md5") for file, known in entries]


def require_setting(name: str, settings: Settings) -> str:
    """Return the value of a setting; raise UsageError if it is not given."""
    value = getattr(settings, name, None)
    if value is None:
        raise UsageError(f"this row needs `{name}`; docs/data.md says where such files come from")
    return value


def check_files(prefixes: Sequence[pathlib.Path], row: Row, settings: Settings) -> None:
    """Check all files of a row and load its checkpoints; raise UsageError if one is missing, damaged or another.

    Missing data that the command downloads are left to it, unless this is a dry run.
    """
    missing = []
    for prefix, name in zip(prefixes, row.checkpoints, strict=True):
        files = list_checkpoint_files(prefix, name)
        absent = [needed.path for needed in files if not needed.path.exists()]
        for needed in files if not absent else []:
            check_file(needed)
        if not absent:
            config = checkpoint.load_energy(files[0].path).config
            kind = f"labels of width {config.label_size}" if config.label_size else "unconditional"
            print(f"  its own checksums agree: {config.network} with {config.num_filters} filters, {kind}")
        missing += absent
    for name in row.data:
        for needed in list_data_files(name, settings):
            if needed.path.exists():
                check_file(needed)
            elif name in DOWNLOADED and not settings.dry_run:
                print(f"{needed.path}: missing; the command downloads it")
            else:
                missing.append(needed.path)
    if missing:
        for path in missing:
            print(f"{path}: missing")
        others = f" and {len(missing) - 1} more, listed above, are" if missing[1:] else " is"
        raise UsageError(f"{missing[0]}{others} missing; docs/data.md and docs/reproduce.md say where to get them")


# ---- the command ----


def find_row(name: str) -> Row:
    """Return a row by its name; raise UsageError, which lists the rows, if there is none."""
    if name not in ROWS:
        similar = difflib.get_close_matches(name, ROWS, 1)
        hint = f"did you mean {similar[0]}? " if similar else ""
        raise UsageError(f"there is no row {name!r}; {hint}the rows are {', '.join(ROWS)}")
    return ROWS[name]


def locate_checkpoints(row: Row, settings: Settings) -> list[pathlib.Path]:
    """Return the paths of a row's checkpoints without their endings; raise UsageError if they cannot be told."""
    if settings.checkpoint is None:
        if any("<" in name for name in row.checkpoints):
            raise UsageError("no source tells the iteration of this row's checkpoint; give the file with `checkpoint`")
        root = get_shipped_root() if SHIPPED_ONLY in row.command else pathlib.Path("cachedir")
        return [root / name for name in row.checkpoints]
    if not row.checkpoints or len({pathlib.Path(name).parent for name in row.checkpoints}) > 1:
        raise UsageError("this row takes no single checkpoint; leave `checkpoint` out")
    prefix = checkpoint.strip_ending(pathlib.Path(os.path.abspath(settings.checkpoint)))
    number = prefix.name.removeprefix("model_")
    if not prefix.name.startswith("model_") or not number.isdecimal():
        raise UsageError(f"`checkpoint`={settings.checkpoint} is not called model_<iteration>; give it its first name")
    return [prefix.with_name(f"model_{int(number) - SPACING * k}") for k in range(len(row.checkpoints))]


def build_command(row: Row, prefixes: Sequence[pathlib.Path], settings: Settings) -> list[str]:
    """Return the script of a row and its flags for this call: with the checkpoint, folders and further flags given."""
    words = row.command.split()
    changes = {}
    if settings.checkpoint is not None:
        place = prefixes[0]
        changes = {"resume_iter": place.name.removeprefix("model_"), "exp": place.parent.name}
        changes |= {"modeldir": str(place.parent.parent)}
    elif SHIPPED_ONLY in row.command:
        changes = {"modeldir": str(get_shipped_root())}  # those whose hashes were checked
    if row.data and settings.datadir != Settings.datadir:
        changes["datadir"] = settings.datadir
    if "inception" in row.data and settings.inception_weights:
        changes["inception_weights"] = settings.inception_weights
    if settings.logdir != Settings.logdir:
        changes["logdir"] = settings.logdir
    words = [word for word in words if word.split("=")[0].removeprefix("--") not in changes]
    words = [re.sub(r"<(\w+)>", lambda match: require_setting(match[1], settings), word) for word in words]
    return [*words, *(f"--{name}={value}" for name, value in changes.items()), *shlex.split(settings.call_flags)]


def run_command(words: Sequence[str]) -> pathlib.Path:
    """Run a script of this project with its flags, and return the path of the report that it writes.

    A signal is passed on, so that the script writes its results so far. If the script fails, this program ends with its
    exit status.
    """
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    program, paths = [sys.executable, str(ROOT / words[0]), *words[1:]], list[str]()
    # In a session of its own, so that Ctrl-C on a terminal reaches it once.
    process = subprocess.Popen(
        program, env=environment, stdout=subprocess.PIPE, text=True, encoding="utf-8", start_new_session=True
    )
    with process:
        try:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                paths += re.findall(r"^wrote (.*\.json)$", line)
        except Interruption as stop:
            process.send_signal(stop.number)
            for line in process.stdout or ():
                print(line, end="", flush=True)
            raise
    if process.returncode:
        print(f"error: {words[0]} ended with the exit status {process.returncode}", file=sys.stderr)
        sys.exit(process.returncode if process.returncode > 0 else 128 - process.returncode)
    if not paths:
        raise UsageError(f"{words[0]} wrote no report; are the further flags those of a measurement?")
    return pathlib.Path(paths[-1])


def read_figures(path: pathlib.Path) -> Mapping[str, Any]:
    """Return the figures in a report: those of a task, of the first ensemble, or the bounds of log Z."""
    with report_unreadable_file(path):
        report: Any = read_json(path, MAX_REPORT)
        if "results" in report:
            return report["results"][0]["figures"]
        return report["bounds"] if "bounds" in report else report["figures"]


def format_comparison(row: Row, figures: Mapping[str, Any]) -> str:
    """Return a table of the measured figures of a row beside the expected ones; "–": not measured."""
    width, lines = max(len(", ".join(place)) for place in row.expected), []
    lines.append(f"{'':<{width}}  {'measured':>10}   expected ({row.source})")
    for place, expected in row.expected.items():
        value: Any = figures
        for name in place:
            value = value.get(name) if isinstance(value, Mapping) else None
        measured = f"{value:.4f}" if isinstance(value, float) else "–" if value is None else str(value)
        lines.append(f"{', '.join(place):<{width}}  {measured:>10}   {expected}")
    return "\n".join(lines)


def describe_expected(row: Row) -> str:
    """Return the expected figures of a row on one line."""
    return "; ".join(f"{', '.join(place)} {expected}" for place, expected in row.expected.items())


def main(settings: Settings) -> None:
    if settings.list or settings.row is None:
        for name, row in ROWS.items():
            print(f"{name}: {row.what}\n    {describe_expected(row)} ({row.source})\n    run here: {row.was_run}")
        return
    row = find_row(settings.row)
    print(f"row {settings.row}: {row.what}\nexpected: {describe_expected(row)} ({row.source})")
    prefixes = locate_checkpoints(row, settings)
    words = build_command(row, prefixes, settings)
    print(f"command: python {shlex.join(words)}")
    check_files(prefixes, row, settings)
    if settings.dry_run:
        print("all files are there; run again without the dry run to measure")
        return
    report = run_command(words)
    print(format_comparison(row, read_figures(report)))
    if settings.call_flags:
        print(f"with {settings.call_flags} in addition to the row's settings")
    print_written([report.parent])


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
