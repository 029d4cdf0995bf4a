"""GPU and TPU kernels. Each has a plain JAX equivalent in nn, so this folder is optional."""
