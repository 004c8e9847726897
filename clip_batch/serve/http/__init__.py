"""Parts that both HTTP services share: errors, bodies, limits, metrics and OpenAPI."""
