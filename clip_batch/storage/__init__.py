"""Files, local or remote: stores, retries, downloads, caches, and the formats that every folder reads."""
