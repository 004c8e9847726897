#!/bin/bash
# Tars on HDFS, no JVM: pip install 'clip-batch[hdfs]'. HADOOP_CONF_DIR names core-site.xml and hdfs-site.xml (name
# services, Kerberos: kinit first).
#
#     TARS=hdfs://nameservice1/tars OUT=hdfs://nameservice1/clip/out INDEX=hdfs://nameservice1/clip/index \
#       docs/examples/hdfs.sh
set -euo pipefail
: "${TARS:?}" "${OUT:?}" "${INDEX:?}"
# Six objects a partition on the NameNode; two copies are enough for what can be made again.
export CLIP_BATCH_STORAGE_OPTIONS=${CLIP_BATCH_STORAGE_OPTIONS:-'{"hdfs": {"dfs.replication": "2"}}'}

clip-batch plan --input "$TARS" --output "$OUT" --partition-bytes 4GB --model "${MODEL:-ViT-B-32}" \
  ${PRETRAINED:+--pretrained "$PRETRAINED"}
clip-batch doctor --output "$OUT"
clip-batch embed --output "$OUT" --no-progress       # or submit slurm | spark, with the same OUT
clip-batch merge --output "$OUT" --index "$INDEX"
clip-batch search --index "$INDEX" --text "${QUERY:-a red bicycle}" -k 5
