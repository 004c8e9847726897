#!/usr/bin/env bash
# Measure everything of a machine with a GPU, in under ten minutes:  bash tests/bench/gpu.sh OUT [options]
# It leaves OUT/gpu.json, OUT/parts.log and OUT/table.txt, and prints the table last. The options are those of
# `python -m tests.bench.gpu --help`. PYTHON names another Python than python3; wheels unpacked in .site are found.
set -eu
out=$(realpath -m "${1:?usage: bash tests/bench/gpu.sh OUT [options]}")
shift
cd "$(dirname "$0")/../.."
export PYTHONUNBUFFERED=1 PYTHONPATH="${PYTHONPATH:-$PWD/.site}:$PWD"
exec "${PYTHON:-python3}" -m tests.bench.gpu --out "$out" "$@"
