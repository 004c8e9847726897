"""Encoders turn images and captions into unit vectors; models of many libraries stand behind one protocol.

`resolve` gives the identity of a model, `try_model` embeds one picture with it, and `load` gives its encoder, which is
a `Model`:

>>> encoder = load(resolve("fake:8"))
>>> encoder.encode_texts(["a cat", "a dog"]).shape
(2, 8)
"""

from clip_batch.encoders.encoder import NO_TEXT, Model, encode_pairs
from clip_batch.encoders.registry import Family, OtherWeights, check_weights, load, resolve
from clip_batch.encoders.trial import try_model

__all__ = [
    "NO_TEXT",
    "Family",
    "Model",
    "OtherWeights",
    "check_weights",
    "encode_pairs",
    "load",
    "resolve",
    "try_model",
]
