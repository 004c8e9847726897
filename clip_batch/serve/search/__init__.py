"""The search service: /v1, clip-retrieval's protocol, and the live versions behind them."""
