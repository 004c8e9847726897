#!/bin/bash
# One machine, with all its GPUs or its cores. If it is interrupted, run it again: it resumes where it stopped.
#
#     TARS='/data/{00000..00999}.tar' OUT=/data/embeddings INDEX=/data/index MODEL=ViT-B-32 \
#       PRETRAINED=laion2b_s34b_b79k docs/examples/one_machine.sh
set -euo pipefail
: "${TARS:?}" "${OUT:?}" "${INDEX:?}"

# The plan is frozen: another model or changed tars are refused and need another OUT.
clip-batch plan --input "$TARS" --output "$OUT" --model "${MODEL:-ViT-B-32}" ${PRETRAINED:+--pretrained "$PRETRAINED"}

# Optional, takes a minute: measures what bounds embed here, and recommends the batch size and the threads.
[ -z "${CALIBRATE:-}" ] || clip-batch doctor --output "$OUT" --calibrate

clip-batch embed --output "$OUT" --no-progress       # exit code 1: it names the partitions that failed
clip-batch verify --output "$OUT"                    # every sample is embedded, or listed as failed
clip-batch merge --output "$OUT" --index "$INDEX"
clip-batch search --index "$INDEX" --text "${QUERY:-a red bicycle}" -k 5
echo "the page: clip-batch serve --index $INDEX"
