"""What a model acts in: simulators, and the server that robots call. NumPy only.

This room knows a plan through the function that it is handed. It imports no jax and no simulator;
an adapter imports its library inside a function, when that environment is named.
"""
