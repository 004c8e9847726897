#!/bin/bash
# One machine: all its GPUs, or its cores. Killed or cut off, run it again: it goes on where it was.
#
#     TARS='/data/{00000..00999}.tar' OUT=/data/embeddings INDEX=/data/index MODEL=ViT-B-32 \
#       PRETRAINED=laion2b_s34b_b79k docs/examples/one_machine.sh
set -euo pipefail
: "${TARS:?}" "${OUT:?}" "${INDEX:?}"

# Frozen once: another model, or changed tars, are refused, and want another OUT.
clip-batch plan --input "$TARS" --output "$OUT" --model "${MODEL:-ViT-B-32}" ${PRETRAINED:+--pretrained "$PRETRAINED"}

# What bounds embed here, and which batch size and threads to take; a minute. Leave it out once you know.
[ -z "${CALIBRATE:-}" ] || clip-batch doctor --output "$OUT" --calibrate

clip-batch embed --output "$OUT" --no-progress       # exit code 1: some partitions failed, and are named
clip-batch verify --output "$OUT"                    # every sample is embedded, or listed with its reason
clip-batch merge --output "$OUT" --index "$INDEX"
clip-batch search --index "$INDEX" --text "${QUERY:-a red bicycle}" -k 5
echo "the page: clip-batch serve --index $INDEX"
