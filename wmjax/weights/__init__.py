"""Weights in and out: Hugging Face, Meta's V-JEPA 2, image transformers, runs, our own folders.

    source = open_pretrained("facebook/vjepa2-vitl-fpc64-256")
    params = load(source, abstract, settings)    # each array on the sharding of its abstract leaf
    export(params, model, "out", frames=16, size=256)

A format is a table from names in a file to paths of our parameters (tables.py). This room imports
models, nn, run.saved and run.files only: no configuration object and no data.
"""

from wmjax.weights.export import export, square_clip
from wmjax.weights.load import load
from wmjax.weights.pretrained import Pretrained, open_pretrained

__all__ = ["Pretrained", "export", "load", "open_pretrained", "square_clip"]
