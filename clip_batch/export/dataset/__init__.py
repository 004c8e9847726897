"""Train on the rows that queries find in an index: a torch dataset that streams them with their images.

    from clip_batch import FilteredDataset

    dataset = FilteredDataset("INDEX", "a red bicycle", amount=100_000)
    for epoch in range(dataset.epoch, 10):
        dataset.set_epoch(epoch)
        for batch in dataset.loader(batch_size=64, workers=2):
            ...  # batch["image"]: uint8 (64, 3, 224, 224), batch["caption"]: 64 texts
            state = dataset.state_dict()  # a later pass resumes here, with any number of workers

See docs/training.md. `select` decides which rows, `deal` their order and which rank and worker reads them, `fetch`
reads image files, `pictures` decodes them, `failures` and `progress` keep account, `stream` has the dataset, and
`loader` makes batches.
"""

from clip_batch.export.dataset.loader import Loader, collate, together
from clip_batch.export.dataset.stream import FilteredDataset

__all__ = ["FilteredDataset", "Loader", "collate", "together"]
