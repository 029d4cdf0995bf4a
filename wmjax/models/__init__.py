"""World models. A file here with a `create(rngs, **cfg)` is a model that `model.name` can name.

This room knows no mesh, no config object and no data: plain keyword arguments and arrays.
"""
