"""The stages of the straight line: embed, merge, search, and verify, which proves them."""
