"""The worker service, `clip-batch serve-worker`: plan, embed and merge over HTTP."""
