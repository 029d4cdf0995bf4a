"""Data: recordings and generated video as NumPy arrays. No models, no ConfigDict, no jax here."""
