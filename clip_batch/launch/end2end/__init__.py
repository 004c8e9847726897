"""end2end: from a list of URLs to an index, with an account of each URL."""
