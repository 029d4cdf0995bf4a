"""From recordings to batches: sources, crops and the pipeline. Knows no model; no jax on import."""
