"""merge: one OUT becomes a version of INDEX."""
