"""Counts the arithmetic of open_clip's image towers: `python -m docs.gflop` writes what `clip-batch models` shows."""

from __future__ import annotations

import json
import os
from typing import Any

from clip_batch.encoders.embedded import model_path
from clip_batch.encoders.open_clip_names import GFLOP, models, tags


def gflop(settings: dict[str, Any]) -> float:
    """Billions of floating-point operations, two for a multiplication and its addition, of one image of a model."""
    import torch
    from open_clip.model import _build_vision_tower
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad():
        tower = _build_vision_tower(settings["embed_dim"], settings["vision_cfg"]).eval().requires_grad_(False)
        size = settings["vision_cfg"].get("image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        with FlopCounterMode(display=False) as counter:
            tower(torch.empty(1, 3, height, width))
    return float(f"{counter.get_total_flops() / 1e9:.3g}")


def main() -> None:
    """Write the table of all models that have weights."""
    with open(os.path.join(model_path(), "open_clip_config.json"), encoding="utf-8") as file:
        table = {"demo": gflop(json.load(file)["model_cfg"])}
    for name, settings in models().items():
        if tags(name):
            table[name] = gflop(settings)
    GFLOP.write_text(json.dumps(table, indent=0) + "\n")


if __name__ == "__main__":
    main()
