"""Pairs of image and caption a second: clip-retrieval's own `inference` against plan and embed; prints JSON.

python -m tests.bench.pairs --python PYTHON --pretrained FILE [--model ViT-B-32] [--tars 4] [--samples 250]
    [--plan '--precision bf16'] [--embed '--threads 2']

The same tars (JPEGs of 256 x 256, captions of 2 to 30 words) and weights, commands as a user types them, one
after the other on this machine, start and end of the processes included. PYTHON is an interpreter
that has clip-retrieval (`make clip-retrieval`).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.bench.compare import build
from tests.bench.data_path import write_tars

PEER = """
import sys
from clip_retrieval.clip_inference.main import main
main(sys.argv[1], sys.argv[2], input_format="webdataset", enable_metadata=True, output_partition_count=1,
     num_prepro_workers=int(sys.argv[4]), batch_size=64, clip_model=sys.argv[3], use_jit=False)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=os.environ.get("CLIP_RETRIEVAL_PYTHON", ".clip-retrieval/bin/python"))
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--pretrained", required=True, help="a checkpoint that open_clip loads")
    parser.add_argument("--tars", type=int, default=4)
    parser.add_argument("--samples", type=int, default=250, help="a tar")
    parser.add_argument("--plan", default="", help="more options of plan")
    parser.add_argument("--embed", default="", help="more options of embed")
    options = parser.parse_args()
    pairs = options.tars * options.samples
    with tempfile.TemporaryDirectory() as home:
        write_tars(home, options.tars, options.samples)
        os.symlink(os.path.abspath(options.pretrained), f"{home}/weights.pt")
        tars, workers = f"{home}/{{00000..{options.tars - 1:05d}}}.tar", str(len(os.sched_getaffinity(0)))
        model = ["--model", options.model, "--pretrained", f"{home}/weights.pt"]
        ours = [sys.executable, "-m", "clip_batch"]
        out = ["--output", f"{home}/ours"]
        theirs = [tars, f"{home}/theirs", f"open_clip:{options.model}/weights.pt", workers]
        commands = {
            "clip-retrieval": ["env", "-C", home, os.path.abspath(options.python), "-c", PEER, *theirs],
            "plan": [*ours, "plan", "--input", tars, *out, *model, *shlex.split(options.plan)],
            "embed": [*ours, "embed", *out, "--device", "cpu", *shlex.split(options.embed)],
        }
        found = {name: build(command, Path(home, f"{name}.log"), 3000) for name, command in commands.items()}
        for name, result in found.items():
            assert result["exit"] == 0, Path(home, f"{name}.log").read_text()[-2000:]
        for folder in ("ours", "theirs"):
            files = Path(home, folder, "img_emb").glob("*.npy")
            assert sum(len(np.load(path, mmap_mode="r")) for path in files) == pairs, folder
    seconds = found["plan"]["seconds"] + found["embed"]["seconds"]
    rates = {"clip-retrieval": pairs / found["clip-retrieval"]["seconds"], "ours": pairs / seconds}
    told = {"pairs_s": {name: round(rate, 1) for name, rate in rates.items()}}
    ratio = round(rates["ours"] / rates["clip-retrieval"], 2)
    print(json.dumps({"benchmark": "pairs", **vars(options), **told, "over_clip_retrieval": ratio, **found}))


if __name__ == "__main__":
    main()
