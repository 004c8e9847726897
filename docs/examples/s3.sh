#!/bin/bash
# Tars, embeddings and index on S3, or on a server that speaks it (MinIO, Ceph): name its address as ENDPOINT.
# Keys come from AWS's own chain (environment, profile, instance role); best put none here.
#
#     TARS=s3://bucket/tars OUT=s3://bucket/out INDEX=s3://bucket/index docs/examples/s3.sh
set -euo pipefail
: "${TARS:?}" "${OUT:?}" "${INDEX:?}"
if [ -n "${ENDPOINT:-}" ]; then export CLIP_BATCH_STORAGE_OPTIONS="{\"s3\": {\"endpoint_url\": \"$ENDPOINT\"}}"; fi

# A folder is one listing; a brace pattern asks for each tar by itself, and refuses a missing one.
clip-batch plan --input "$TARS" --output "$OUT" --model "${MODEL:-ViT-B-32}" ${PRETRAINED:+--pretrained "$PRETRAINED"}
clip-batch doctor --output "$OUT"                    # does this store refuse a name that is taken?

# TMPDIR holds the tars that are fetched ahead (--prefetch) and a partition's vectors until they are sent.
clip-batch embed --output "$OUT" --prefetch 4GB --no-progress
clip-batch merge --output "$OUT" --index "$INDEX"
clip-batch search --index "$INDEX" --text "${QUERY:-a red bicycle}" -k 5 --index-cache 100GB     # a local copy
