"""Webdataset tars: headers checked block by block, grouped into samples over a memory map."""
