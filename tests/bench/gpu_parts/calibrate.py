"""What `doctor --calibrate` says of the first model on this device."""

from __future__ import annotations

import subprocess
import sys

from tests import ROOT
from tests.bench.gpu_parts import Part
from tests.bench.gpu_parts.encoder import resolved
from tests.bench.gpu_parts.files import batch_size, planned


def run(part: Part) -> None:
    options = part.options
    model = options.model[0]
    out = f"{options.home}/{model}-calibrate"
    planned(resolved(model, options), options, out, 64 if options.quick else 8000, 2)
    command = [sys.executable, "-m", "clip_batch", "doctor", "--calibrate", "--output", out]
    command += ["--device", options.device, "--batch-size", str(batch_size(model, options))]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    part.figure("exit", done.returncode)
    for line in filter(None, map(str.strip, done.stdout.splitlines())):
        part.note(line)
