"""Hostile input by the thousand, and every shape of input that people have."""
