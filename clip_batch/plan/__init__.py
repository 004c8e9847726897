"""The frozen plan: what `--input` names, packed into partitions."""
