"""Measure on one GPU, in at most twenty minutes, everything that was never measured there; `make gpu` runs this.

    python scripts/measure_gpu.py --output=benchmarks/gpu
    python scripts/measure_gpu.py --device=cpu --output=build/rehearsal      # the same steps at tiny sizes

First come the tests, during which steps are compiled. Then one program at a time uses the GPU: the speed of all
variants, a training, a profile, a resumed run and NCCL, the most valuable first. The time that is left, more than half
of it by default, goes to comparisons of number types by training curves and by evaluations. If a step fails or takes
too long, the next one follows. Meanwhile chains are timed on the CPU, if it has enough cores, on two of them for each
kind of instructions that oneDNN may use.

Each step writes its figures at once to report.json and its output to log.txt; pictures and the figures of the CPU are
in the same folder. Nothing is downloaded. Colour images are CIFAR-10 (JPEG) from data/cifar10_jpeg.tar.xz
(train/<class>/*.jpg) if that file is there; else the training is on digits, and number types are not compared on colour
images. torchebm is measured if its wheel is there as data/torchebm*.whl.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import lzma
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from ebm.support.hardware import describe_processor
from ebm.support.progress import show_waiting
from ebm.support.reports import print_written

ROOT = pathlib.Path(__file__).resolve().parent.parent
START = 20  # seconds until a training on a GPU makes its first iteration
KEPT = 20_000  # the last characters of a step's output, which go into the log
TRAIN = "--cclass --zero_kl --replay_batch --num_steps=20 --step_lr=10 --proj_norm=0.01 --lr=1e-3 --ema_decay=0.999"
PATIENCE = {"cuda": 1, "cpu": 5}  # a rehearsal is no measurement, and must also end well on a slow machine
RESERVE = 60  # seconds that are left for the steps after the training

# A benchmark on the CPU -> the instructions that oneDNN may use at most, and number types that these compute fast.
ON_CPU = {
    "cpu_amx": ("DEFAULT", "float32,bf16"),
    "cpu_avx512_bf16": ("AVX512_CORE_BF16", "float32,bf16"),
    "cpu_avx512": ("AVX512_CORE", "float32"),
}
CORES = 2  # of each benchmark on the CPU
ENOUGH_CORES = 12  # for benchmarks on the CPU beside everything else
FILES = ("report.json", "log.txt", "curves.png", "samples.png", *(f"{name}.json" for name in ON_CPU))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A comparison of number types by a benchmark.

    train_flags: flags of train.py for all its runs. on_images: whether they train on the unpacked colour images.
    """

    script: str
    flags: str
    train_flags: str = ""
    on_images: bool = False


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of the steps: those of the published commands on a GPU, tiny ones in a rehearsal on a CPU."""

    chain: tuple[str, ...]  # flags of benchmarks/langevin.py and kernels.py
    iteration: tuple[str, ...]
    train: tuple[str, ...]
    fast: str  # the default number type of the device
    others: tuple[str, ...]  # the other number types
    training_seconds: float  # for iterations alone
    compiled: tuple[str, ...]  # flags of benchmarks/langevin.py for each compilation during the first steps
    comparisons: Mapping[str, Comparison]  # by the names of the steps


COMPARED = "--precisions=float32,bf16,fp16 --seeds=6"
GPU = Sizes(
    chain=("--batch_size=128", "--steps=60", "--rounds=2", "--compile"),
    iteration=("--batch_sizes=128", "--steps=20,60"),
    train=("--batch_size=128",),
    fast="fp16",
    others=("bf16", "tf32", "float32"),
    training_seconds=110,
    compiled=(
        "--networks=ResNet32 --precisions=fp16",
        "--networks=ResNet32 --precisions=bf16,tf32,float32 --nochanges",
        "--networks=ResNet32Large,DspritesNet,MnistNet --precisions=fp16 --nochanges",
    ),
    comparisons={
        "compare_sprites": Comparison(
            "recipes.py",
            f"{COMPARED} --jobs=4 --preset=dsprites_shape_cpu --max_iter=800 --test_interval=200",
            "--nocompile",
        ),
        "compare_digits": Comparison(
            "recipes.py", f"{COMPARED} --jobs=2 --preset=digits_cpu --max_iter=400 --test_interval=100", "--nocompile"
        ),
        "compare_evaluations": Comparison("evaluation_precision.py", f"{COMPARED} --jobs=3"),
        "compare_colour": Comparison(
            "recipes.py",
            f"{COMPARED} --jobs=4 --preset=colour_cpu --max_iter=300 --test_interval=75",
            "--cclass --nocompile --num_steps=20",
            on_images=True,
        ),
    },
)
CPU = Sizes(
    chain=("--batch_size=2", "--steps=1", "--rounds=1", "--num_filters=2", "--limit_size=64"),
    iteration=("--batch_sizes=2", "--steps=1", "--rounds=1", "--num_filters=2"),
    train=("--batch_size=4", "--num_filters=2", "--sample_steps=1", "--notune"),
    fast="float32",
    others=(),
    training_seconds=0.5,
    compiled=(),  # half a minute each
    comparisons={
        "compare_evaluations": Comparison(
            "evaluation_precision.py", "--seeds=2 --evaluations=democlass --call_flags=--num_steps=1"
        ),
        "compare_colour": Comparison(
            "recipes.py",
            "--precisions=float32,bf16 --seeds=2 --preset=colour_cpu --max_iter=1 --test_interval=1",
            "--cclass --notune --num_steps=1 --num_filters=2 --batch_size=2 --num_samples=20 --sample_steps=1",
            on_images=True,
        ),
    },
)


@dataclasses.dataclass
class Program:
    """A program that runs: its words after `python`, its process and when it started."""

    words: Sequence[str]
    process: subprocess.Popen[bytes]
    start_time: float


class Session:
    """The folder of the results, a temporary folder and the time limit of all steps."""

    def __init__(self, output: pathlib.Path, work: pathlib.Path, device: str, seconds: float):
        self.output, self.work, self.device = output, work, device
        self.end = time.monotonic() + seconds
        processor = {"name": describe_processor(), "cores": os.cpu_count(), "instructions": list_instructions()}
        self.report: dict[str, Any] = {"processor": processor, "steps": {}}
        places = os.pathsep.join([str(work / "site"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": places.strip(os.pathsep)}
        self.environment |= {
            "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
            "TRITON_CACHE_DIR": str(work / "triton"),
        }
        self.environment["TORCHINDUCTOR_COMPILE_THREADS"] = "2"  # several programs compile at once
        self.programs: dict[str, Program] = {}
        output.mkdir(parents=True, exist_ok=True)
        for name in FILES:  # an earlier call may have written them
            (output / name).unlink(missing_ok=True)

    def left(self) -> float:
        """Return the seconds that are left for all further steps."""
        return self.end - time.monotonic()

    def start(self, name: str, *words: str, **environment: str) -> None:
        """Start a Python program in the background, with its output in <name>.txt of the temporary folder."""
        print(f"{name}: python {' '.join(words)}", flush=True)
        with (self.work / f"{name}.txt").open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *words], cwd=self.work, env=self.environment | environment, stdin=subprocess.DEVNULL,
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.programs[name] = Program(words, process, time.monotonic())

    def finish(self, name: str, seconds: float) -> bool:
        """Wait for a program, so many seconds at most; record its status and figures; return whether it worked.

        Its figures are those that it wrote to <name>.json in the temporary folder, also if it did not come to its end.
        """
        program = self.programs[name]
        status: int | str
        limit = max(0, min(seconds, self.left()))
        try:
            with show_waiting(f"  {name} runs", f"at most {limit:.0f} s"):
                status = program.process.wait(limit)
        except subprocess.TimeoutExpired:
            status = f"stopped after {time.monotonic() - program.start_time:.0f} s"
        stop(self.programs.pop(name).process)
        return self.record(name, program.words, status, time.monotonic() - program.start_time)

    def finish_all(self, seconds: float, prefix: str = "") -> None:
        """Finish all programs whose names begin with `prefix`, so many seconds from now at the latest."""
        end = time.monotonic() + seconds
        for name in [name for name in self.programs if name.startswith(prefix)]:
            self.finish(name, end - time.monotonic())

    def step(self, name: str, seconds: float, *words: str) -> bool:
        """Run a Python program, so many seconds at most; record it as `finish` does; return whether it worked."""
        if self.left() <= 1:
            return self.record(name, words, "no time was left", 0.0)
        self.start(name, *words)
        return self.finish(name, seconds * PATIENCE[self.device])

    def record(self, name: str, words: Sequence[str], status: int | str, seconds: float) -> bool:
        """Write the status and the figures of a program to the report, and its output to the log.

        Return whether the program worked.
        """
        print(f"  {name}: {'done' if status == 0 else status}, {seconds:.0f} s, {self.left():.0f} s left", flush=True)
        self.report["steps"][name] = {"command": ["python", *words], "status": status, "seconds": round(seconds, 1)}
        with contextlib.suppress(OSError, ValueError):  # the file may be missing or cut short
            self.report[name] = json.loads((self.work / f"{name}.json").read_text(encoding="utf-8"))
        (self.output / "report.json").write_text(
            self.without_places(json.dumps(self.report, indent=1)) + "\n", encoding="utf-8"
        )
        path = self.work / f"{name}.txt"
        text = path.read_text(encoding="utf-8", errors="replace")[-KEPT:] if path.exists() else ""
        with (self.output / "log.txt").open("a", encoding="utf-8") as log:
            log.write(self.without_places(f"==== {name}: {status}\n{text}\n"))
        return status == 0

    def without_places(self, text: str) -> str:
        """Return a text in which the folders of this machine are replaced."""
        return text.replace(str(self.work), "<work>").replace(f"{ROOT}/", "")


def list_instructions() -> list[str]:
    """Return which of the instructions that matter for speed the processor has, as Linux calls them."""
    lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    found = {word for line in lines if line.startswith("flags") for word in line.split()}
    return [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16") if name in found]


@contextlib.contextmanager
def stay_on(cores: Sequence[int]) -> Iterator[None]:
    """Keep this process, and programs that it starts inside the block, on these cores of the CPU."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def stop(program: subprocess.Popen) -> None:
    """Kill a program and all processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(program.pid, signal.SIGKILL)
    program.wait()


def unpack_wheels(data: pathlib.Path, work: pathlib.Path) -> None:
    """Unpack the wheel of torchebm, if the data folder has one, so that the steps can import it."""
    for wheel in data.glob("torchebm*.whl"):
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(work / "site")
        except (OSError, zipfile.BadZipFile) as error:
            print(f"note: {wheel.name} cannot be read ({error}); torchebm is left out")


def unpack_images(data: pathlib.Path, work: pathlib.Path) -> list[str]:
    """Write CIFAR-10 (JPEG), if the data folder has it, as torchvision's files; return the flags of train.py for it.

    The images are decoded once, so that each training starts fast. If they are missing, the flags are those for digits.
    """
    archive = data / "cifar10_jpeg.tar.xz"
    folder = work / "data" / "cifar-10-batches-py"
    try:
        with show_waiting(f"decoding the images in {archive}"):
            images = read_images(archive)
        names = sorted(images)
        rows = np.concatenate([np.stack(images[name]) for name in names])
    except (OSError, EOFError, ValueError, lzma.LZMAError, tarfile.TarError) as error:
        print(f"note: {archive.name} cannot be read ({error}); digits are trained on instead")
        return ["--dataset=digits"]
    folder.mkdir(parents=True)
    labels = np.repeat(np.arange(len(names)), [len(images[name]) for name in names])
    order = np.random.default_rng(0).permutation(len(rows))
    write_pickle(folder / "batches.meta", {"label_names": names})
    for number, part in enumerate(np.array_split(order, 5), start=1):
        write_pickle(folder / f"data_batch_{number}", {"data": rows[part], "labels": labels[part].tolist()})
    return ["--dataset=cifar10", f"--datadir={work / 'data'}"]


def read_images(path: pathlib.Path) -> dict[str, list[np.ndarray]]:
    """Return the images of each class in an archive of train/<class>/*.jpg, as bytes (3 · 32 · 32,)."""
    images: dict[str, list[np.ndarray]] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is None or not member.name.startswith("train/"):
                continue
            pixels = np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB"))
            images.setdefault(pathlib.PurePosixPath(member.name).parent.name, []).append(
                pixels.transpose(2, 0, 1).ravel()
            )
    return images


def write_pickle(path: pathlib.Path, contents: Mapping[str, Any]) -> None:
    """Write a dictionary as the files of CIFAR-10 have it."""
    with path.open("wb") as file:
        pickle.dump(contents, file)


def start_on_cpu(session: Session) -> None:
    """Time chains on the CPU, by kinds of instructions, on cores of their own; all else keeps to the other cores.

    With few cores, or in a rehearsal, nothing happens.
    """
    cores = sorted(os.sched_getaffinity(0))
    if session.device != "cuda" or len(cores) < ENOUGH_CORES:
        return
    for name, (instructions, precisions) in ON_CPU.items():
        taken, cores = cores[-CORES:], cores[:-CORES]
        # Each has a cache of its own, so that none takes over what another compiles for other instructions.
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(session.work / f"{name}_inductor")}
        environment |= {"ONEDNN_MAX_CPU_ISA": instructions, "OMP_NUM_THREADS": str(CORES)}
        words = ["--device=cpu", "--compile", "--nochanges", "--rounds=3", f"--precisions={precisions}"]
        with stay_on(taken):
            script = str(ROOT / "benchmarks" / "langevin.py")
            session.start(name, script, *words, f"--output={session.work / name}.json", **environment)
    os.sched_setaffinity(0, cores)


def measure(session: Session, data: pathlib.Path) -> None:
    """Run all steps, the most valuable first."""
    sizes, work = GPU if session.device == "cuda" else CPU, session.work
    device, fast = f"--device={session.device}", f"--precision={sizes.fast}"

    def run_benchmark(name: str, seconds: float, script: str, *words: str) -> None:
        session.step(name, seconds, str(ROOT / "benchmarks" / script), device, *words, f"--output={work / name}.json")

    def time_chains(name: str, seconds: float, networks: str, precisions: Sequence[str], *words: str) -> None:
        flags = f"--networks={networks}", f"--precisions={','.join(precisions)}"
        run_benchmark(name, seconds, "langevin.py", *flags, *sizes.chain, *words)

    # Compiling takes long but few of the cores, so that it runs beside the tests. All programs share one cache of it.
    unpack_wheels(data, work)
    start_on_cpu(session)
    langevin = str(ROOT / "benchmarks" / "langevin.py")
    for number, flags in enumerate(sizes.compiled):
        session.start(f"compile_{number}", langevin, device, *sizes.chain, "--compile_only", *flags.split())
    images = unpack_images(data, work)
    train = [str(ROOT / "train.py"), device, f"--logdir={work / 'trained'}", *images, *TRAIN.split(), *sizes.train]
    session.start("compile_training", *train, "--exp=compile", "--max_iter=1", "--sample_steps=1", "--noquality")
    several = ["-n", "4"] if session.device == "cuda" and importlib.util.find_spec("xdist") else []
    session.start("tests", "-m", "pytest", "-p", "no:cacheprovider", *several, str(ROOT / "tests/test_gpu.py"))
    for names in ("tests", "compile"):
        session.finish_all(150 * PATIENCE[session.device], names)

    time_chains("resnet32", 60, "ResNet32", [sizes.fast])
    run_benchmark("iteration", 30, "iteration.py", "--network=ResNet32", fast, *sizes.iteration, "--nokl")
    time_chains("networks", 60, "ResNet32Large,DspritesNet,MnistNet", [sizes.fast], "--nochanges")
    if sizes.others:
        time_chains("resnet32_others", 60, "ResNet32", sizes.others, "--nochanges")

    last = run_training(session, train, sizes.training_seconds)
    small = [word for word in sizes.chain if word.startswith(("--batch_size", "--num_filters"))]
    run_benchmark("kernels", 25, "kernels.py", fast, *small)
    short = [*train, "--nocompile", "--sample_steps=1", "--num_samples=10", "--noquality"]
    short += ["--save_interval=1000", "--test_interval=1000"]
    session.step("resume", 30, *short, "--exp=trained", f"--max_iter={last + 10}", "--resume_iter=latest")
    launch = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc_per_node=1"]
    session.step("one_rank", 30, *launch, *short, "--exp=one_rank", "--max_iter=10", "--backend=torch")
    run_benchmark("machine", 30, "machine.py", f"--precisions={','.join((sizes.fast, *sizes.others))}")
    for name, comparison in sizes.comparisons.items():
        if comparison.on_images and "--dataset=digits" in images:
            continue
        words = [device, *comparison.flags.split(), f"--logdir={work / name}", f"--output={work / name}.json"]
        if train_flags := [*comparison.train_flags.split(), *(images if comparison.on_images else ())]:
            words.append(f"--train_flags={' '.join(train_flags)}")
        session.step(name, session.left(), str(ROOT / "benchmarks" / comparison.script), *words)
    session.finish_all(session.left())
    for name in ON_CPU:
        if (work / f"{name}.json").exists():
            shutil.copy(work / f"{name}.json", session.output)


def run_training(session: Session, train: Sequence[str], seconds: float) -> int:
    """Train a class-conditional model for so many seconds; keep its curves and samples; return the last iteration.

    The number of iterations follows from the benchmark of ResNet32's iterations. The seconds are fewer if less time is
    left.
    """
    rows = [row for row in session.report.get("iteration", {}).get("rows", []) if row["what"] == "iteration"]
    seconds = min(seconds, session.left() - RESERVE - START)
    iterations = max(1, int(1000 * seconds / rows[0]["ms"])) if rows else 500
    fifth = max(1, iterations // 5)
    intervals = f"--max_iter={iterations} --save_interval={fifth} --test_interval={fifth}"
    words = [*train, "--exp=trained", *intervals.split(), "--quality", "--num_samples=200"]
    session.step("training", max(10.0, min(session.left() - RESERVE + 20, 2 * seconds + START + 60)), *words)
    folder = session.work / "trained" / "trained"
    for source, name in (("curves.png", "curves.png"), (f"samples_{iterations}.png", "samples.png")):
        if (folder / source).exists():
            shutil.copy(folder / source, session.output / name)
    return iterations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--output", type=pathlib.Path, default=ROOT / "benchmarks" / "gpu", help="folder of the results"
    )
    parser.add_argument("--data", type=pathlib.Path, default=ROOT / "data", help="folder of images and wheels, if any")
    parser.add_argument("--seconds", type=float, default=1200, help="time limit of all steps together")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "error: torch sees no GPU here; --device=cpu rehearses the steps\n")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that all programs are stopped
    with tempfile.TemporaryDirectory() as work:
        try:
            session = Session(options.output.resolve(), pathlib.Path(work), options.device, options.seconds)
        except OSError as error:
            parser.exit(2, f"error: --output={options.output} cannot be written ({error.strerror})\n")
        try:
            measure(session, options.data.resolve())
        finally:
            for program in session.programs.values():
                stop(program.process)
    failed = [name for name, step in session.report["steps"].items() if step["status"] != 0]
    print_written(sorted(session.output.iterdir()))
    print(f"failed: {', '.join(failed)}, see {session.output / 'log.txt'}" if failed else "every step is done")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
