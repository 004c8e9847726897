#!/bin/sh
# Packs an environment of clip-batch for Spark's executors, to be sent by --archives environment.tar.gz#environment
# (see docs/containers.md). Run it on a host like theirs:
#
#     sh spark/pack.sh                  # venv-pack: hosts need the same Python at the same path
#     KIND=conda sh spark/pack.sh       # conda-pack: hosts need no Python
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)

KIND=${KIND:-venv}
EXTRAS=${EXTRAS:-embed,merge,s3,hdfs}  # without spark: executors get pyspark from the cluster's Spark
SOURCE=${SOURCE:-$root}                # a checkout or a wheel
ARCHIVE=${ARCHIVE:-environment.tar.gz}
PYTHON=${PYTHON:-python3}              # for venv: the hosts must have the same one
VERSION=${VERSION:-3.11}               # for conda

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
case $KIND in
  venv) "$PYTHON" -m venv "$work/environment" ;;
  conda) conda create --yes --quiet --channel conda-forge --prefix "$work/environment" "python=$VERSION" pip ;;
  *) echo "pack.sh: KIND=$KIND is neither venv nor conda" >&2; exit 2 ;;
esac
# pandas is for Spark 3.5, whose mapInArrow needs it
"$work/environment/bin/python" -m pip install --quiet --constraint "$root/constraints.txt" "${SOURCE}[$EXTRAS]" pandas "$KIND-pack"
"$work/environment/bin/$KIND-pack" --quiet --force --prefix "$work/environment" --output "$ARCHIVE"
ls -l "$ARCHIVE"
