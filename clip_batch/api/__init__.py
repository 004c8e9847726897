"""The functions of Python for the commands that answer something, with typed results."""
