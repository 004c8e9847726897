"""The command `end2end`: from a list of URLs to an index, with an account of every URL."""
