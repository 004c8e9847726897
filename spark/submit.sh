#!/bin/sh
# Submits clip-batch to Spark by hand. Edit the lines below, then run: sh spark/submit.sh
# `clip-batch submit spark` builds the same command line; this script is for those who want to see and change it.
# It can be run again at any time, also while another run is going on: what is committed stays.
set -eu
here=$(cd "$(dirname "$0")" && pwd)

OUT=${OUT:-/shared/out}                # the embeddings folder, with its plan: clip-batch plan ... --output $OUT
INDEX=${INDEX:-}                       # the index folder; empty: do not merge
TASKS=${TASKS:-0}                      # Spark tasks that share the missing partitions; 0: one a partition
MASTER=${MASTER:-spark://127.0.0.1:7077}
PROPERTIES=${PROPERTIES:-$here/spark-defaults.conf}
PYTHON=${PYTHON:-$(command -v python3)}   # an interpreter that has clip-batch, at this path on every host

# ---- Standalone, or local-cluster: hosts that share a file system with this one
set -- --master "$MASTER" --conf "spark.pyspark.python=$PYTHON"

# ---- YARN: the driver runs in the cluster, the environment travels as an archive (see docs/spark.md)
# set -- --master yarn --deploy-mode cluster \
#        --archives environment.tar.gz#environment --conf spark.pyspark.python=./environment/bin/python \
#        --files "$here/discover-gpus.sh" \
#        --conf spark.executor.resource.gpu.discoveryScript=./discover-gpus.sh

# ---- Kubernetes: the image has Spark, Python and clip-batch
# set -- --master k8s://https://HOST:6443 --deploy-mode cluster \
#        --conf spark.kubernetes.container.image=REGISTRY/clip-batch:TAG \
#        --conf spark.kubernetes.driver.secretKeyRef.CLIP_BATCH_STORAGE_OPTIONS=clip-batch:storage
# The driver below is then a path in the image: local:///opt/clip-batch/driver.py

# Credentials: in CLIP_BATCH_STORAGE_OPTIONS of this shell (client mode), never as a flag or a property.
# shellcheck disable=SC2086  # several flags
exec "${SPARK_SUBMIT:-spark-submit}" "$@" --name clip-batch --properties-file "$PROPERTIES" \
    "$here/driver.py" --output "$OUT" --tasks "$TASKS" ${INDEX:+--index "$INDEX"} ${DRIVER_FLAGS:-}
