"""The search service, `clip-batch serve`: clip-retrieval's endpoints, the /v1 endpoints and the web page."""
