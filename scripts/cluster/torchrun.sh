#!/usr/bin/env bash
# A training by torchrun, on one machine or several, that goes on when the same command is given again:
#
#   scripts/cluster/torchrun.sh 2 --preset=digits_cpu --exp=digits          # two workers on this machine
#   NODES=2 MASTER=<host>:29500 scripts/cluster/torchrun.sh 8 --exp=...     # on each of two; <host> is one of them
#
# A worker that dies restarts all, from the last checkpoint, up to three times. After SIGTERM, as before a spot machine
# goes away, the run saves; torchrun waits two minutes for it, and 30 seconds with torch 2.11.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH" TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120

workers=${1:?name the number of workers of this machine, then the flags of train.py}
meeting=(--standalone)
if [[ -n ${MASTER-} ]]; then
    meeting=(--nnodes="${NODES:?set NODES to the number of machines}" --rdzv-backend=c10d --rdzv-endpoint="$MASTER")
fi
exec torchrun "${meeting[@]}" --nproc-per-node="$workers" --max-restarts=3 train.py --resume_iter=auto "${@:2}"
