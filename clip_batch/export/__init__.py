"""Handing an index to other systems: one module each."""
