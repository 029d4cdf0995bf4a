"""How a model is computed, as one object. The results do not depend on it, except for rounding."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from wmjax.errors import check_choice

CHOICES = {
    "dtype": ("bfloat16", "float32", "float8"),
    "target_dtype": ("", "float8"),
    "remat": ("none", "dots", "full"),
    "scan": (True, False, None),
    "attention": ("auto", "xla", "cudnn", "triton", "splash"),
    "gelu": ("auto", "exact", "polynomial", "tanh"),
    "norm": ("auto", "xla", "fused"),
}


@dataclasses.dataclass(frozen=True)
class Compute:
    """The keys of the `model` group that every model family shares.

    dtype: of matrix products; parameters stay float32. float8: bfloat16, and in the transformer
    blocks of encoders and predictors float8; not for training.
    target_dtype: float8: the same for the EMA target alone. Empty: dtype.
    remat: what the backward pass recomputes: none; dots: all but the products with parameters;
    full: everything.
    scan: True compiles one block and scans it over the depth; False unrolls the depth; None: True
    on a CPU, where compiling takes long, else False.
    attention: xla; cudnn or triton on GPUs; splash on TPUs; auto: the fastest that runs here.
    gelu: exact, polynomial (within 1e-4) or tanh (within 5e-4, computed by cuBLAS in the product);
    auto: exact in float32; in bfloat16 tanh on a GPU, and polynomial elsewhere.
    norm: xla, or fused (residual sum and norm in one GPU kernel); auto: fused where it runs.

    Raises UserError for any other value.
    """

    dtype: str = "float32"
    target_dtype: str = ""
    remat: str = "none"
    scan: bool | None = True
    attention: str = "auto"
    gelu: str = "auto"
    norm: str = "auto"

    def __post_init__(self) -> None:
        for key, choices in CHOICES.items():
            check_choice(f"model.{key}", getattr(self, key), choices)

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> "Compute":
        """Take these keys from the `model` group of a configuration; the others are left alone."""
        return cls(**{key: group[key] for key in CHOICES if key in group})

    @property
    def product_dtype(self) -> jnp.dtype:
        return jnp.dtype("bfloat16" if self.float8 else self.dtype)

    @property
    def float8(self) -> bool:
        return self.dtype == "float8"

    @property
    def scans(self) -> bool:
        """Whether stacks are scanned over their depth here."""
        return jax.default_backend() == "cpu" if self.scan is None else self.scan


def jit(fn: Callable[..., Any], **settings: Any) -> Any:
    """Return jax.jit(fn, **settings), by the compiler's options that suit a model.

    On GPUs cuBLAS computes all products. Before it writes a result it adds bias and residual
    stream, and computes GELU. Products by Triton, which XLA would try, do not. A function with such
    options cannot be called within another jit.
    """
    cublas = {"xla_gpu_enable_triton_gemm": False} if jax.default_backend() == "gpu" else None
    return jax.jit(fn, compiler_options=cublas, **settings)
