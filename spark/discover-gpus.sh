#!/bin/sh
# Prints the GPUs of a host (with YARN: of a container) as the JSON that Spark expects:
#   {"name": "gpu", "addresses": ["0", "1"]}
# Name it in spark.executor.resource.gpu.discoveryScript (YARN, Kubernetes), or in
# spark.worker.resource.gpu.discoveryScript of a standalone cluster's workers.
# Where CUDA_VISIBLE_DEVICES is set, as it is under SLURM, only those GPUs may be used.
if [ -n "$CUDA_VISIBLE_DEVICES" ]; then
    gpus=$(echo "$CUDA_VISIBLE_DEVICES" | tr ',' '\n')
else
    gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader) || exit 1
fi
echo "$gpus" | awk 'NF { list = list (list ? ", " : "") "\"" $1 "\"" } END { print "{\"name\": \"gpu\", \"addresses\": [" list "]}" }'
