"""serve-worker: plan, embed and merge over HTTP."""
