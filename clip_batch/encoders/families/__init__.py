"""Families of models: each module has the `weights_digest` and `load` of `clip_batch.encoders.registry.Family`."""
