#!/usr/bin/env bash
# Runs the quick tests with another version of Python or PyTorch, in an environment of its own.
#
#   scripts/try_version.sh python3.12 2.11.0     # an interpreter and a torch; the newest of everything else that fits
#
# The environment stays in build/versions/ for the next time: 5 to 8 GB with the CUDA libraries that torch brings.
set -euo pipefail

fail() { echo "error: $*" >&2; exit 2; }

(($# == 2)) || fail "name a Python and a version of torch, such as: scripts/try_version.sh python3.12 2.11.0"
version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "cannot run '$1'; name an interpreter"
interpreter=$("$1" -c 'import sys; print(sys.executable)')
cd "$(dirname "$0")/.."
environment=build/versions/python$version-torch$2

[[ -x $environment/bin/pip ]] || "$interpreter" -m venv "$environment"
echo "installing torch $2 and the requirements into $environment, a few minutes the first time"
"$environment/bin/pip" --disable-pip-version-check install --quiet -e '.[dev]' "torch==$2"
echo "running the quick tests, those that are not marked slow"
status=0
OMP_NUM_THREADS=1 "$environment/bin/python" -m pytest -m "not slow" -n 2 --dist=loadfile --no-loadscope-reorder ||
    status=$?
"$environment/bin/python" - "$status" <<'END'
import platform, sys
import numpy, torch, torchvision

outcome = "passed" if sys.argv[1] == "0" else "FAILED"
print(
    f"{outcome}: Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}, "
    f"numpy {numpy.__version__}"
)
END
exit "$status"
