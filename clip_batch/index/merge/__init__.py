"""The command merge, which makes a version of INDEX from one OUT, and sweep, which compares index keys."""
