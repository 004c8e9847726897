#!/bin/bash
# Submits the whole chain as four jobs: embed -> train -> index shards -> manifest. Edit embed.sbatch
# and merge.sbatch first, then run, from a folder on the shared disk:
#
#     OUT=/shared/embeddings INDEX=/shared/index TASKS=32 MERGE_TASKS=8 slurm/chain.sh
#
# Arguments are passed to sbatch for the embed job: slurm/chain.sh --time=4:00:00 --exclude=node7
# It prints the four job ids. If you cancel the first, the others end too, as OUT is incomplete.
set -euo pipefail
: "${OUT:?OUT=/shared/embeddings is needed: the folder of the plan}"
: "${INDEX:?INDEX=/shared/index is needed: the folder of the index}"
export OUT INDEX TASKS="${TASKS:-32}" MERGE_TASKS="${MERGE_TASKS:-8}"
here="$(cd "$(dirname "$0")" && pwd)"

# The site refuses more elements than its limit; fewer elements do the same work, for longer.
limit="$(scontrol show config | awk '$1 == "MaxArraySize" {print $3}')"
if [ "$TASKS" -gt "$limit" ] || [ "$MERGE_TASKS" -gt "$limit" ]; then
  echo "chain.sh: TASKS=$TASKS or MERGE_TASKS=$MERGE_TASKS is above MaxArraySize, $limit: set fewer" >&2
  exit 2
fi

# afterany behind embed, because merge itself refuses an incomplete OUT and names what is missing.
# afterok behind merge's tasks; SLURM removes a task that can never start (--kill-on-invalid-dep).
behind() { sbatch --parsable --kill-on-invalid-dep=yes --dependency="$1" "${@:2}"; }

embed="$(sbatch --parsable --array="0-$((TASKS - 1))" "$@" "$here/embed.sbatch")"
train="$(behind "afterany:${embed%;*}" "$here/merge.sbatch" train)"
array=(--array="0-$((MERGE_TASKS - 1))" --output=%x-%A_%a.log)
shards="$(behind "afterok:${train%;*}" "${array[@]}" "$here/merge.sbatch" shards)"
manifest="$(behind "afterok:${shards%;*}" "$here/merge.sbatch" manifest)"
echo "embed $embed, train $train, shards $shards, manifest $manifest"
