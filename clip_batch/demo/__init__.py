"""The embedded demo: 1,911 captioned emoji images, and a small CLIP that was trained on them.

`run` is the command. `data` reads the images and captions and writes them as webdataset tars. Neither needs a network.
How the demo was made is here too: `build` makes the table of images from its public sources, `tokenizer` and `train`
make the model, and `evaluate` measures it. The licences of images, captions and sources are in `NOTICE`.
"""
