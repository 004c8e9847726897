#!/bin/bash
# Tars, embeddings and index on S3, or on a server that speaks its protocol (MinIO, Ceph): set ENDPOINT to its address.
# Credentials come from AWS's own chain (environment, profile, instance role); do not write them here.
#
#     TARS=s3://bucket/tars OUT=s3://bucket/out INDEX=s3://bucket/index docs/examples/s3.sh
set -euo pipefail
: "${TARS:?}" "${OUT:?}" "${INDEX:?}"
if [ -n "${ENDPOINT:-}" ]; then export CLIP_BATCH_STORAGE_OPTIONS="{\"s3\": {\"endpoint_url\": \"$ENDPOINT\"}}"; fi

# A folder takes one listing. A brace pattern takes a request for each tar, and a missing tar is an error.
clip-batch plan --input "$TARS" --output "$OUT" --model "${MODEL:-ViT-B-32}" ${PRETRAINED:+--pretrained "$PRETRAINED"}
clip-batch doctor --output "$OUT"                    # checks that this store refuses to overwrite

# TMPDIR holds the prefetched tars (--prefetch) and the vectors of a partition until they are uploaded.
clip-batch embed --output "$OUT" --prefetch 4GB --no-progress
clip-batch merge --output "$OUT" --index "$INDEX"
clip-batch search --index "$INDEX" --text "${QUERY:-a red bicycle}" -k 5 --index-cache 100GB     # a local copy
