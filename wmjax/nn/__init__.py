"""Neural network parts that belong to no model family: layers, attention, norm, positions."""
