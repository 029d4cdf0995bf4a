"""Measures the figures that the README quotes: `python -m wmjax.bench step` and `data`."""
