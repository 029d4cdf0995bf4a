"""The figures that the README quotes, measured: `python -m wmjax.bench step` and `data`."""
