"""One faiss index: train, fill, search, measure recall and memory, and join several into one on disk."""
