"""OUT, the folder of embeddings: how partitions are embedded, committed, read, counted, verified and repaired."""
