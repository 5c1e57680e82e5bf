#!/usr/bin/env bash
# A training by torchrun, on one machine or several, that goes on when the same command is given again:
#
#   scripts/cluster/torchrun.sh 2 --preset=digits_cpu --exp=digits     # two workers on this machine
#   NODES=2 NODE=0 MASTER=<host>:29500 scripts/cluster/torchrun.sh 8 --exp=cifar10_cond ...    # on each machine, its NODE
#
# A worker that dies restarts all, from the last checkpoint, up to three times. After SIGTERM, as before a spot machine
# goes away, the run saves; torchrun waits two minutes for it.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH"

workers=${1:?name the number of workers of this machine, then the flags of train.py}
meeting=(--standalone)
[[ -z ${MASTER-} ]] || meeting=(--nnodes="$NODES" --node-rank="$NODE" --master-addr="${MASTER%:*}" --master-port="${MASTER##*:}")
exec torchrun "${meeting[@]}" --nproc-per-node="$workers" --max-restarts=3 --shutdown-timeout=120 \
    train.py --resume_iter=auto "${@:2}"
