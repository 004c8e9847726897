"""The HTTP services: search with its web page, and the worker that runs the stages on request."""
