"""Number types, and settings of the whole process: TF32 rounding and kernels of GPUs, memory of CPUs."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import getpass
import os
import pathlib
import platform
import resource
import shutil
import tempfile
from collections.abc import Iterator

import torch

from ebm.support.errors import UsageError

PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
# For energies whose gradients reach the weights: these would underflow in fp16, whose smallest number is 6e-8.
LOSS_PRECISIONS = PRECISIONS | {"fp16": torch.float32}
COMPILER_CACHE = "TORCHINDUCTOR_CACHE_DIR"  # environment variable that names the folder of compiled functions
# Words in the errors of PyTorch, its libraries for GPUs, and Python's threads.
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED", "can't start new thread")
# All that oneDNN says about it; where it cannot compute something, it says more.
NO_MEMORY_OF_ONEDNN = ("could not create a primitive", "could not execute a primitive", "could not create a memory")


def set_tf32(allowed: bool) -> None:
    """Allow or forbid GPUs to round the factors of float32 convolutions and matrix products to TF32.

    It holds for the whole process.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


@contextlib.contextmanager
def allow_tf32(precision: str) -> Iterator[None]:
    """Let GPUs round to TF32 inside the block, unless the precision is float32; then restore the earlier setting."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    set_tf32(precision != "float32")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def set_kernel_choice(*, deterministic: bool) -> None:
    """Let GPUs use the kernels that measure fastest or, if deterministic, those that give the same bits in every run.

    It holds for the whole process. Call it before anything is computed on a GPU.
    """
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        # Nobody reads uninitialised memory, so that filling it would only cost time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def keep_freed_memory() -> None:
    """Let the C library keep the memory of freed tensors instead of returning it to the system after each operation.

    Mapping fresh pages for every activation costs a third of a Langevin step's time on a CPU. Only glibc has this.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: serve up to a gigabyte from the heap
        library.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: and do not give its top back


def describe_processor() -> str:
    """Return the name of the CPU with its numbers of family, model and stepping; outside Linux its architecture."""
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if "model name" in facts:
            numbers = (f"{name} {facts[name]}" for name in ("cpu family", "model", "stepping") if name in facts)
            return f"{facts['model name']} ({', '.join(numbers)})"
    return f"{platform.machine()} {platform.processor()}"


def can_compute_bf16() -> bool:
    """Return whether oneDNN computes in bf16 on this CPU, be it by conversion; otherwise PyTorch is far slower."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def has_compiler() -> bool:
    """Return whether a C compiler is on the PATH, which PyTorch's compiler needs."""
    return any(shutil.which(name) for name in ("cc", "gcc", "clang"))


def find_free_memory() -> int:
    """Return how many bytes of memory this process can still take, by the least of the limits that Linux tells."""
    kilobytes = read_system_figures("/proc/self/status") | read_system_figures("/proc/meminfo")
    limits = [1024 * kilobytes["MemAvailable"]] if "MemAvailable" in kilobytes else []
    for kind, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            limits.append(limit - 1024 * kilobytes.get(used, 0))
    with contextlib.suppress(OSError, ValueError):  # the group of this process, as a container shows it
        most = int(pathlib.Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8"))
        limits.append(most - read_system_figures("/sys/fs/cgroup/memory.stat").get("anon", 0))
    return max(0, min(limits, default=2**63 - 1))


def read_system_figures(path: str) -> dict[str, int]:
    """Return the numbers of a file of Linux whose lines begin with a name and a number; none on other systems."""
    with contextlib.suppress(OSError):
        rows = (line.replace(":", " ").split() for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines())
        return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}
    return {}


def find_compiler_cache() -> pathlib.Path:
    """Return the folder in which PyTorch keeps compiled functions; raise KeyError if the user has no name."""
    named = os.environ.get(COMPILER_CACHE)
    return pathlib.Path(named or os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}"))


def provide_compiler_cache() -> None:
    """Let PyTorch's compiler use a temporary folder if the one for its results cannot be written, and say so.

    PyTorch looks for this folder even in runs that compile nothing, and fails without it. Raises UsageError if no
    temporary folder can be written.
    """
    try:
        folder = find_compiler_cache()
        os.makedirs(folder, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return
        reason = f"{folder} cannot be written"
    except (OSError, KeyError) as error:  # KeyError: the user has no name
        reason = str(error)
    try:
        os.environ[COMPILER_CACHE] = tempfile.mkdtemp(prefix="torchinductor_")
    except OSError as error:
        raise UsageError(f"no temporary folder can be made ({error.strerror}); set TMPDIR to another place") from None
    atexit.register(shutil.rmtree, os.environ[COMPILER_CACHE], ignore_errors=True)
    print(f"note: compiled functions are not kept ({reason}); {COMPILER_CACHE} can name another folder")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the memory of a GPU or of the CPU is exhausted."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    message = str(error)
    is_told = message in NO_MEMORY_OF_ONEDNN or any(words in message for words in NO_MEMORY)
    return isinstance(error, MemoryError) or is_told


def set_up_process() -> None:
    """Set for the whole process that memory is kept, where compiled functions go, and that GPUs do not use TF32."""
    keep_freed_memory()
    provide_compiler_cache()
    set_tf32(False)
