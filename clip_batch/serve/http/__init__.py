"""What any of our HTTP services needs: errors, limits, metrics, threads and its OpenAPI description."""
