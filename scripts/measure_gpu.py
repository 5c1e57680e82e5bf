"""Measure on one GPU, in at most eight minutes, everything that was never measured there; `make gpu` runs this.

    python scripts/measure_gpu.py --output=benchmarks/gpu
    python scripts/measure_gpu.py --device=cpu --output=build/rehearsal      # the same steps at tiny sizes

The steps are tests, the speed of all variants, three minutes of training, a profile, a resumed run and NCCL, the most
valuable first. If a step fails or takes too long, the next one follows. Each step writes its figures at once to
report.json and its output to log.txt; pictures are in the same folder. Nothing is downloaded. Training uses CIFAR-10
(JPEG) from data/cifar10_jpeg.tar.xz (train/<class>/*.jpg) if that file is there, else digits. torchebm is measured if
its wheel is there as data/torchebm*.whl.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import lzma
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Sequence
from typing import Any

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
START = 30  # seconds until a training on a GPU makes its first iteration
KEPT = 20_000  # the last characters of a step's output, which go into the log
TRAIN = "--cclass --zero_kl --replay_batch --num_steps=20 --step_lr=10 --proj_norm=0.01 --lr=1e-3 --ema_decay=0.999"
RESERVE = 110  # seconds that are left for the steps after the training


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


GPU = Sizes(
    chain=("--batch_size=128", "--steps=60", "--rounds=2", "--compile"),
    iteration=("--batch_sizes=128", "--steps=20,60"),
    train=("--batch_size=128",),
    fast="fp16",
    others=("bf16", "tf32", "float32"),
    training_seconds=170,
    compiled=(
        "--networks=ResNet32 --precisions=fp16",
        "--networks=ResNet32Large --precisions=fp16",
        "--networks=ResNet128 --precisions=fp16",
        "--networks=DspritesNet,MnistNet --precisions=fp16",
        "--networks=ResNet32 --precisions=bf16 --nochanges",
        "--networks=ResNet32 --precisions=tf32 --nochanges",
        "--networks=ResNet32 --precisions=float32 --nochanges",
    ),
)
CPU = Sizes(
    chain=("--batch_size=2", "--steps=1", "--rounds=1", "--num_filters=2", "--limit_size=64"),
    iteration=("--batch_sizes=2", "--steps=1", "--rounds=1", "--num_filters=2"),
    train=("--batch_size=4", "--num_filters=2", "--sample_steps=1"),
    fast="float32",
    others=(),
    training_seconds=0.5,
    compiled=("--networks=MnistNet --nochanges",),
)


class Session:
    """The folder of the results, a temporary folder and the time limit of all steps."""

    def __init__(self, output: pathlib.Path, work: pathlib.Path, device: str, seconds: float):
        self.output, self.work, self.device = output, work, device
        self.end = time.monotonic() + seconds
        self.report: dict[str, Any] = {"steps": {}}
        places = os.pathsep.join([str(work / "site"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": places.strip(os.pathsep)}
        self.environment |= {
            "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
            "TRITON_CACHE_DIR": str(work / "triton"),
        }
        self.environment["TORCHINDUCTOR_COMPILE_THREADS"] = "4"  # several programs compile at once
        self.programs: dict[str, subprocess.Popen[bytes]] = {}
        output.mkdir(parents=True, exist_ok=True)
        for name in ("report.json", "log.txt", "curves.png", "samples.png"):  # an earlier call may have written them
            (output / name).unlink(missing_ok=True)

    def left(self) -> float:
        """Return the seconds that are left for all further steps."""
        return self.end - time.monotonic()

    def start(self, name: str, words: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a Python program in the background, with its output in <name>.txt of the temporary folder."""
        with (self.work / f"{name}.txt").open("wb") as file:
            program = subprocess.Popen(
                [sys.executable, *words], cwd=self.work, env=self.environment, stdin=subprocess.DEVNULL,
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.programs[name] = program
        return program

    def finish_programs(self, seconds: float) -> None:
        """Wait for the programs in the background, then stop those that still run; log those that failed."""
        print(f"waiting for compilations, {seconds:.0f} s at most", flush=True)
        end = time.monotonic() + seconds
        for name, program in self.programs.items():
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.wait(max(0, end - time.monotonic()))
            if program.poll() != 0:
                self.log(name, "failed or was too slow" if program.poll() is None else program.returncode)
            stop(program)

    def log(self, name: str, status: int | str) -> None:
        """Append the end of a program's output to the log."""
        path = self.work / f"{name}.txt"
        text = path.read_text(encoding="utf-8", errors="replace")[-KEPT:] if path.exists() else ""
        with (self.output / "log.txt").open("a", encoding="utf-8") as log:
            log.write(self.without_places(f"==== {name}: {status}\n{text}\n"))

    def step(self, name: str, seconds: float, *words: str) -> bool:
        """Run a Python program; record its status and figures; return whether it worked.

        The program is stopped after so many seconds. Its figures are those that it writes to <name>.json in the
        temporary folder.
        """
        start_time, limit = time.monotonic(), min(seconds, self.left())
        print(f"{name}: python {' '.join(words)}", flush=True)
        status: int | str = "no time was left"
        if limit > 1:
            program = self.start(name, words)
            try:
                status = program.wait(limit)
            except subprocess.TimeoutExpired:
                status = f"stopped after {limit:.0f} s"
            stop(self.programs.pop(name))
        took = time.monotonic() - start_time
        print(f"  {'done' if status == 0 else status}, {took:.0f} s, {self.left():.0f} s left of all", flush=True)
        self.report["steps"][name] = {"command": ["python", *words], "status": status, "seconds": round(took, 1)}
        figures = self.work / f"{name}.json"
        with contextlib.suppress(OSError, ValueError):  # the file may be missing or cut short
            self.report[name] = json.loads(figures.read_text(encoding="utf-8"))
        (self.output / "report.json").write_text(
            self.without_places(json.dumps(self.report, indent=1)) + "\n", encoding="utf-8"
        )
        self.log(name, status)
        return status == 0

    def without_places(self, text: str) -> str:
        """Return a text in which the folders of this machine are replaced."""
        return text.replace(str(self.work), "<work>").replace(f"{ROOT}/", "")


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
    """Unpack CIFAR-10 (JPEG) if the data folder has it; return the flags of train.py for it, else for digits."""
    images = data / "cifar10_jpeg.tar.xz"
    try:
        with tarfile.open(images) as archive:
            members = (member for member in archive if member.name.startswith("train/"))
            archive.extractall(work / "cifar10", members, filter="data")
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError) as error:
        print(f"note: {images.name} cannot be read ({error}); digits are trained on instead")
        return ["--dataset=digits"]
    return ["--dataset=folder", f"--data_path={work / 'cifar10' / 'train'}", "--image_size=32", "--channels=3"]


def measure(session: Session, data: pathlib.Path) -> None:
    """Run all steps, the most valuable first."""
    sizes, work = GPU if session.device == "cuda" else CPU, session.work
    device, fast = f"--device={session.device}", f"--precision={sizes.fast}"

    def run_benchmark(name: str, seconds: float, script: str, *words: str) -> None:
        session.step(name, seconds, str(ROOT / "benchmarks" / script), device, *words, f"--output={work / name}.json")

    def time_chains(name: str, seconds: float, networks: str, precisions: Sequence[str], *words: str) -> None:
        flags = f"--networks={networks}", f"--precisions={','.join(precisions)}"
        run_benchmark(name, seconds, "langevin.py", *flags, *sizes.chain, *words)

    # Compiling takes long but few of the cores, so that it runs during the first steps. All programs share one cache.
    langevin = str(ROOT / "benchmarks" / "langevin.py")
    for number, flags in enumerate(sizes.compiled):
        session.start(f"compile_{number}", [langevin, device, *sizes.chain, "--compile_only", *flags.split()])
    unpack_wheels(data, work)
    train = [str(ROOT / "train.py"), device, f"--logdir={work / 'trained'}", *unpack_images(data, work)]
    train += [*TRAIN.split(), *sizes.train]
    session.start("compile_training", [*train, "--exp=compile", "--max_iter=1", "--sample_steps=1"])
    run_benchmark("machine", 60, "machine.py", f"--precisions={','.join((sizes.fast, *sizes.others))}")
    several = ["-n", "8"] if session.device == "cuda" and importlib.util.find_spec("xdist") else []
    session.step("tests", 110, "-m", "pytest", "-p", "no:cacheprovider", *several, str(ROOT / "tests/test_gpu.py"))
    session.finish_programs(60)

    time_chains("resnet32", 80, "ResNet32", [sizes.fast])
    if sizes.others:
        time_chains("resnet32_others", 80, "ResNet32", sizes.others, "--nochanges")
    time_chains("large", 45, "ResNet32Large", [sizes.fast])
    time_chains("small", 45, "DspritesNet,MnistNet", [sizes.fast])
    for name, network in (("iteration", "ResNet32"), ("iteration_large", "ResNet32Large")):
        run_benchmark(name, 40, "iteration.py", f"--network={network}", fast, *sizes.iteration, "--nokl")

    last = run_training(session, train, sizes.training_seconds)
    small = [word for word in sizes.chain if word.startswith(("--batch_size", "--num_filters"))]
    run_benchmark("kernels", 30, "kernels.py", fast, *small)
    short = [*train, "--nocompile", "--sample_steps=1", "--num_samples=10"]
    session.step("resume", 40, *short, "--exp=trained", f"--max_iter={last + 10}", "--resume_iter=latest")
    launch = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc_per_node=1"]
    session.step("one_rank", 40, *launch, *short, "--exp=one_rank", "--max_iter=10", "--backend=torch")
    time_chains("resnet128", 60, "ResNet128", [sizes.fast])


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
    session.step("training", max(10.0, session.left() - RESERVE + 20), *words)
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
    parser.add_argument("--seconds", type=float, default=480, help="time limit of all steps together")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "error: torch sees no GPU here; --device=cpu rehearses the steps\n")
    with tempfile.TemporaryDirectory() as work:
        try:
            session = Session(options.output.resolve(), pathlib.Path(work), options.device, options.seconds)
        except OSError as error:
            parser.exit(2, f"error: --output={options.output} cannot be written ({error.strerror})\n")
        try:
            measure(session, options.data.resolve())
        finally:
            for program in session.programs.values():
                stop(program)
    failed = [name for name, step in session.report["steps"].items() if step["status"] != 0]
    print(f"wrote {', '.join(str(path) for path in sorted(session.output.iterdir()))}")
    print(f"failed: {', '.join(failed)}, see {session.output / 'log.txt'}" if failed else "every step is done")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
