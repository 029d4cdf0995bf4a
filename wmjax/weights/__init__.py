"""Weights in and out: Hugging Face and Meta's V-JEPA 2, image transformers, and folders of ours.

    source = open_pretrained("facebook/vjepa2-vitl-fpc64-256")
    params = load(source, abstract, model)       # sharded as the abstract parameters are
    export(params, model, "out", frames=16, size=256)

A format is a table from names to our paths (tables.py). Models are all that this room knows.
"""

from wmjax.weights.export import export
from wmjax.weights.load import load
from wmjax.weights.pretrained import Pretrained, open_pretrained

__all__ = ["Pretrained", "export", "load", "open_pretrained"]
