"""Fine-tune a CLIP model on the hits of a text in an index, with checkpoints that resume exactly where they stopped.

    clip-batch demo DEMO --no-serve
    python docs/examples/train_filtered.py DEMO/index --text "flag of a country" --amount 200

The default model is the demo's. The script prints each epoch's mean loss. If you run it again with the same
--checkpoint, it continues after the last batch that was saved. With torchrun, each rank trains on its part (see
docs/training.md).
"""

from __future__ import annotations

import argparse
import os

import open_clip
import torch

from clip_batch import FilteredDataset
from clip_batch.encoders.embedded import model_path
from clip_batch.export.dataset import together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", help="INDEX, or a folder that `clip-batch filter` wrote")
    parser.add_argument("--text", default="", help="what to train on")
    parser.add_argument("--amount", type=int, default=200, help="number of rows")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--model", default=f"local-dir:{model_path()}", help="open_clip's name of a model")
    parser.add_argument("--pretrained", default=None)
    parser.add_argument("--checkpoint", default="", help="a file to save to, and to resume from if it exists")
    parser.add_argument("--every", type=int, default=10, help="batches between checkpoints")
    options = parser.parse_args()

    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(options.model, pretrained=options.pretrained)
    tokenize = open_clip.get_tokenizer(options.model)
    contrast = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.1)

    dataset = FilteredDataset(
        options.index, options.text or (), amount=options.amount, decode="pil", transform=preprocess
    )
    print(f"{len(dataset)} rows of {options.index}", flush=True)
    if options.checkpoint and os.path.exists(options.checkpoint):
        saved = torch.load(options.checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        dataset.load_state_dict(saved["dataset"])

    model.train()
    for epoch in range(dataset.epoch, options.epochs):
        dataset.set_epoch(epoch)
        losses = []
        loader = dataset.loader(options.batch_size, options.workers)
        for number, batch in enumerate(together(loader), 1):
            captions = tokenize([caption or "" for caption in batch["caption"]])
            images, texts, scale = model(batch["image"], captions)
            loss = contrast(images, texts, scale)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if options.checkpoint and number % options.every == 0:
                states = {"model": model, "optimizer": optimizer, "dataset": dataset}
                torch.save({name: one.state_dict() for name, one in states.items()}, options.checkpoint + ".new")
                os.replace(options.checkpoint + ".new", options.checkpoint)
        if losses:
            print(f"epoch {epoch}: loss {sum(losses) / len(losses):.4f}, {len(losses)} batches", flush=True)
    if dataset.failures.counts:
        print(f"rows without a sample in the last epoch: {dataset.failures}")


if __name__ == "__main__":
    main()
