"""INDEX, the folder of a searchable index: its manifest, metadata, removals and versions."""
