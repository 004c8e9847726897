#!/bin/bash
# SLURM, from a login node: plan, check, and submit embed with the merge after it. Run it again if something is left.
#
#     TARS='/shared/laion/{00000..00999}.tar' OUT=/shared/out INDEX=/shared/index docs/examples/slurm.sh
#     DRY=--dry-run ... docs/examples/slurm.sh         # only prints the sbatch scripts
set -euo pipefail
: "${TARS:?}" "${OUT:?}" "${INDEX:?}"
here=$(cd "$(dirname "$0")" && pwd)
CONFIG=${CONFIG:-$here/../../configs/slurm.yaml}       # your cluster's partition, account, GPUs, modules

clip-batch plan --input "$TARS" --output "$OUT" --model "${MODEL:-ViT-B-32}" ${PRETRAINED:+--pretrained "$PRETRAINED"}
[ -n "${DRY:-}" ] || clip-batch doctor --output "$OUT"      # checks the scheduler's limits, storage, disk and clock

# --tasks should be at most the number that can run at once: a finished worker stays to help slow ones.
clip-batch submit slurm --config "$CONFIG" --output "$OUT" --index "$INDEX" --tasks "${TASKS:-64}" ${DRY:-}

clip-batch status --output "$OUT"                    # repeat it: shows what is done, failed and missing
