"""Parquet files of images and captions: their columns, where they may be cut, and the samples of their rows."""
