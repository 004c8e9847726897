"""Webdataset tars: their headers, the samples that members make, and where a tar may be cut."""
