"""Measures pairs of image and caption a second of plan and embed, beside clip-retrieval's own `inference`.

    python -m tests.bench.pairs --python PYTHON --pretrained FILE [--model ViT-B-32] [--tars 4] [--samples 250]
        [--plan '--precision bf16'] [--embed '--threads 2'] [--record]

Both have the same tars (JPEGs of 256 x 256, captions of 2 to 30 words) and weights. They run one after the other, as
commands that a user types, so the start and end of the processes count. PYTHON is an interpreter that has
clip-retrieval (`make clip-retrieval`).
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.bench import result
from tests.bench.data_path import write_tars
from tests.bench.process import run

PEER = """
import sys
from clip_retrieval.clip_inference.main import main
main(sys.argv[1], sys.argv[2], input_format="webdataset", enable_metadata=True, output_partition_count=1,
     num_prepro_workers=int(sys.argv[4]), batch_size=64, clip_model=sys.argv[3], use_jit=False)
"""


def main() -> None:
    parser = result.parser(__doc__)
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
        found = {name: run(command, Path(home, f"{name}.log"), 3000) for name, command in commands.items()}
        for name, done in found.items():
            assert done["exit"] == 0, Path(home, f"{name}.log").read_text()[-2000:]
        for folder in ("ours", "theirs"):
            files = Path(home, folder, "img_emb").glob("*.npy")
            assert sum(len(np.load(path, mmap_mode="r")) for path in files) == pairs, folder
    seconds = found["plan"]["seconds"] + found["embed"]["seconds"]
    rates = {"clip-retrieval": pairs / found["clip-retrieval"]["seconds"], "ours": pairs / seconds}
    told = {"pairs_s": {name: round(rate, 1) for name, rate in rates.items()}}
    ratio = round(rates["ours"] / rates["clip-retrieval"], 2)
    cpu_ms = round(1000 * (found["plan"]["cpu_seconds"] + found["embed"]["cpu_seconds"]) / pairs, 1)
    peaks = f"peak {found['embed']['peak_mb']:,} against {found['clip-retrieval']['peak_mb']:,} MB"
    precision = "int8" if "int8" in options.plan else "fp32"
    what = f"{pairs:,} pairs, {options.model}, whole commands {options.plan} {options.embed}".strip()
    peer, target = "clip-retrieval's `inference`", {"fp32": 1.8, "int8": 3.5}[precision]
    rates_shown = told["pairs_s"]["ours"], told["pairs_s"]["clip-retrieval"]
    rows = [result.Row(precision, f"{what} ({peaks})", "pairs/s", *rates_shown, peer, ratio, target, cpu_ms)]
    result.report("pairs", "embeddings", options, rows, {**told, "over_clip_retrieval": ratio, **found})


if __name__ == "__main__":
    main()
