"""INDEX, the folder of a searchable index: its file names, manifest, metadata, removals and versions."""
