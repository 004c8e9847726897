#!/bin/sh
# Pack clip-batch's environment for Spark's executors, who get it by --archives environment.tar.gz#environment
# (docs/containers.md). Run it on a host like theirs:
#
#     sh spark/pack.sh                  # venv-pack: hosts need the same Python at the same path
#     KIND=conda sh spark/pack.sh       # conda-pack: hosts need none
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)

KIND=${KIND:-venv}
EXTRAS=${EXTRAS:-embed,merge,s3,hdfs}  # no spark: executors get pyspark from the cluster's Spark
SOURCE=${SOURCE:-$root}                # or a wheel
ARCHIVE=${ARCHIVE:-environment.tar.gz}
PYTHON=${PYTHON:-python3}              # of venv: the hosts must have this very one
VERSION=${VERSION:-3.11}               # of conda

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
case $KIND in
  venv) "$PYTHON" -m venv "$work/environment" ;;
  conda) conda create --yes --quiet --channel conda-forge --prefix "$work/environment" "python=$VERSION" pip ;;
  *) echo "pack.sh: KIND=$KIND is neither venv nor conda" >&2; exit 2 ;;
esac
"$work/environment/bin/python" -m pip install --quiet --constraint "$root/constraints.txt" "${SOURCE}[$EXTRAS]" "$KIND-pack"
"$work/environment/bin/$KIND-pack" --quiet --force --prefix "$work/environment" --output "$ARCHIVE"
ls -l "$ARCHIVE"
