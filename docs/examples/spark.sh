#!/bin/bash
# Spark, with one executor for each GPU and one task at a time in it. Run it again if something is left.
#
#     TARS='/shared/{00000..00999}.tar' OUT=/shared/out INDEX=/shared/index MASTER=yarn docs/examples/spark.sh
#     DRY=--dry-run ... docs/examples/spark.sh         # only prints the spark-submit command
set -euo pipefail
: "${TARS:?}" "${OUT:?}" "${INDEX:?}"
here=$(cd "$(dirname "$0")" && pwd)

clip-batch plan --input "$TARS" --output "$OUT" --model "${MODEL:-ViT-B-32}" ${PRETRAINED:+--pretrained "$PRETRAINED"}
clip-batch submit spark --output "$OUT" --index "$INDEX" --master "${MASTER:-yarn}" \
  --properties-file "$here/../../spark/spark-defaults.conf" \
  --spark-conf '{"spark.executor.instances": 16,
                 "spark.executor.resource.gpu.amount": 1, "spark.task.resource.gpu.amount": 1}' ${DRY:-}
clip-batch status --output "$OUT"
