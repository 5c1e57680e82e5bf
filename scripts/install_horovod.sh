#!/usr/bin/env bash
# Installs Horovod into the Python environment that runs it: run it once, after `pip install -e '.[mpi]'`.
#
#   scripts/install_horovod.sh                              # about 3 minutes on 2 cores; a second time: nothing to do
#   PYTHON=.venv/bin/python scripts/install_horovod.sh      # another environment than the `python` of the PATH
#   HOROVOD_GPU_OPERATIONS=NCCL scripts/install_horovod.sh  # with NCCL, where nvcc and its headers are installed
#
# The built wheel stays in HOROVOD_WHEELS (default build/wheels), so that the next environment with the same torch
# installs it in seconds. Any other HOROVOD_* variable reaches Horovod's own build.
set -euo pipefail

version=0.28.1

fail() { echo "error: $*" >&2; exit 1; }
pip() { "$python" -m pip --disable-pip-version-check --quiet "$@"; }
loads() { "$python" -c "import horovod.torch as h; assert h.mpi_built() and h.gloo_built()" 2>/dev/null; }

python=$("${PYTHON:-python}" -c "import sys; print(sys.executable)") ||
    fail "cannot run '${PYTHON:-python}'; activate an environment or set PYTHON"
cd "$(dirname "$0")/.."
torch=$("$python" -c "import torch; print(torch.__version__)" 2>/dev/null) ||
    fail "$python has no torch; run '$python -m pip install -r requirements.txt' first"
if loads; then
    echo "Horovod already works with torch $torch in this environment: nothing to do"
    exit 0
fi

PATH="$("$python" -c "import sysconfig; print(sysconfig.get_path('scripts'))"):$PATH"
wheels="${HOROVOD_WHEELS:-build/wheels}/torch-$torch${HOROVOD_GPU_OPERATIONS:+-$HOROVOD_GPU_OPERATIONS}"
tag=$("$python" -c "import sys; print('cp%d%d' % sys.version_info[:2])")
wheel() { find "$wheels" -name "horovod-$version-$tag-*.whl" 2>/dev/null | head -n 1; }

if [ -z "$(wheel)" ]; then
    command -v "${CXX:-g++}" >/dev/null ||
        fail "Horovod needs a C++ compiler and there is no '${CXX:-g++}'; install one (apt-get install g++ make)" \
            "or do without Horovod: torch.distributed takes over"
    command -v make >/dev/null || fail "Horovod needs make; install it (apt-get install make)"
    command -v mpicxx >/dev/null || fail "no mpicxx; run $python -m pip install -e '.[mpi]' first"
    echo "building Horovod $version for torch $torch, a few minutes"
    pip install setuptools wheel packaging cloudpickle psutil pyyaml cffi
    command -v cmake >/dev/null || pip install cmake

    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    pip download --no-deps --no-build-isolation --no-binary horovod --dest "$work" "horovod==$version"
    tar -xzf "$work/horovod-$version.tar.gz" -C "$work"
    source="$work/horovod-$version"
    # The last release asks for C++14, the headers of torch for C++17. The relative search path finds libmpi in
    # whatever environment the wheel is installed into, not only in the one that built it.
    sed -i 's/CMAKE_CXX_STANDARD 14/CMAKE_CXX_STANDARD 17/' "$source"/CMakeLists.txt "$source"/horovod/torch/CMakeLists.txt
    sed -i 's/RelWithDebInfo/Release/' "$source"/setup.py # debug information takes a third of the build
    sed -i '/^project(/a set(CMAKE_BUILD_RPATH "$ORIGIN/../../../..")' "$source"/CMakeLists.txt

    # CMake 4 refuses the minimum versions that Horovod's bundled libraries name unless the policy variable is set.
    CMAKE_POLICY_VERSION_MINIMUM=3.5 MAKEFLAGS="${MAKEFLAGS:--j$(nproc)}" \
        HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 \
        HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1 HOROVOD_CPU_OPERATIONS="${HOROVOD_CPU_OPERATIONS:-MPI}" \
        "$python" -m pip --disable-pip-version-check wheel --no-deps --no-build-isolation \
        --wheel-dir "$work/wheels" "$source" >"$work/log" 2>&1 ||
        { tail -n 40 "$work/log" >&2; fail "Horovod did not build; the end of its log is above"; }
    mkdir -p "$wheels"
    mv "$work"/wheels/*.whl "$wheels/"
fi

pip install --force-reinstall --no-deps "$(wheel)"
pip install "$(wheel)" # what it needs at run time, without touching what is there
loads || fail "Horovod is installed but does not load: $("$python" -c 'import horovod.torch' 2>&1 | tail -n 1)"
echo "installed $(basename "$(wheel)")"
echo "wrote $(wheel)"
