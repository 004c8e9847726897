#!/bin/bash
# SLURM, from a login node: plan, look, submit embed and the merge behind it. Run it again when something is left.
#
#     TARS='/shared/laion/{00000..00999}.tar' OUT=/shared/out INDEX=/shared/index docs/examples/slurm.sh
#     DRY=--dry-run ... docs/examples/slurm.sh         # only show the sbatch scripts
set -euo pipefail
: "${TARS:?}" "${OUT:?}" "${INDEX:?}"
here=$(cd "$(dirname "$0")" && pwd)
CONFIG=${CONFIG:-$here/../../configs/slurm.yaml}       # your cluster's partition, account, GPUs, modules

clip-batch plan --input "$TARS" --output "$OUT" --model "${MODEL:-ViT-B-32}" ${PRETRAINED:+--pretrained "$PRETRAINED"}
[ -n "${DRY:-}" ] || clip-batch doctor --output "$OUT"      # the scheduler's limits, storage, disk, clock

# --tasks no more than run at the same time: a worker that is done helps the slow ones, and keeps its place for it.
clip-batch submit slurm --config "$CONFIG" --output "$OUT" --index "$INDEX" --tasks "${TASKS:-64}" ${DRY:-}

clip-batch status --output "$OUT"                    # again and again: done, failed, missing, what to run
