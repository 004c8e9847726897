"""The embedded demo: 1,911 captioned emoji images and a small CLIP trained on them.

Everything here works with no network. `data` reads the images and captions and writes them as
webdataset tars, `build` makes the image table from its public sources, `train` trains the model
and measures it. Licences of the images, the captions and their sources are in `NOTICE`.
"""
