"""Families of models: each module has `weights_digest` and `load`, as `clip_batch.encoders.Family` asks."""
