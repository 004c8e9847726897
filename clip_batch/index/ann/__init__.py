"""One faiss index: built, measured, sized, put on disk and searched."""
