"""Train on what a query finds: a stream of an index's rows, with their images, for torch's DataLoader.

    from clip_batch import FilteredDataset

    dataset = FilteredDataset("INDEX", "a red bicycle", amount=100_000)
    for epoch in range(dataset.epoch, 10):
        dataset.set_epoch(epoch)
        for batch in dataset.loader(batch_size=64, workers=2):
            ...  # batch["image"]: uint8 (64, 3, 224, 224), batch["caption"]: 64 texts
            state = dataset.state_dict()  # goes on from here, with any number of workers

docs/training.md tells the rest. Modules: `select` (which rows), `deal` (in which order, and whose they are),
`fetch` (their bytes), `pictures` (what is made of these), `failures`, `stream` (the dataset), `loader` (batches).
"""

from clip_batch.export.dataset.loader import Loader, collate, together
from clip_batch.export.dataset.stream import FilteredDataset

__all__ = ["FilteredDataset", "Loader", "collate", "together"]
