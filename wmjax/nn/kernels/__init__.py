"""GPU and TPU kernels. Each has a plain twin in nn, so this folder can be deleted."""
