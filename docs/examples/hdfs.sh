#!/bin/bash
# Tars on HDFS, read without a JVM: pip install 'clip-batch[hdfs]'. HADOOP_CONF_DIR is the folder of core-site.xml and
# hdfs-site.xml, which have the name services. With Kerberos, run kinit first.
#
#     TARS=hdfs://nameservice1/tars OUT=hdfs://nameservice1/clip/out INDEX=hdfs://nameservice1/clip/index \
#       docs/examples/hdfs.sh
set -euo pipefail
: "${TARS:?}" "${OUT:?}" "${INDEX:?}"
# Each partition is six objects on the NameNode. Two copies are enough, as the files can be computed again.
export CLIP_BATCH_STORAGE_OPTIONS=${CLIP_BATCH_STORAGE_OPTIONS:-'{"hdfs": {"dfs.replication": "2"}}'}

clip-batch plan --input "$TARS" --output "$OUT" --partition-bytes 4GB --model "${MODEL:-ViT-B-32}" \
  ${PRETRAINED:+--pretrained "$PRETRAINED"}
clip-batch doctor --output "$OUT"
clip-batch embed --output "$OUT" --no-progress       # or submit slurm | spark, with the same OUT
clip-batch merge --output "$OUT" --index "$INDEX"
clip-batch search --index "$INDEX" --text "${QUERY:-a red bicycle}" -k 5
