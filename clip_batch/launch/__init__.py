"""Launchers: each only supplies two integers, slot and slots, to the same worker."""
