"""How a model is computed, as one object. The results do not depend on it, except for rounding."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from wmjax.errors import check_choice

CHOICES = {
    "dtype": ("bfloat16", "float32"),
    "remat": ("none", "dots", "full"),
    "scan": (True, False, None),
    "attention": ("auto", "xla", "cudnn", "triton", "splash"),
    "gelu": ("auto", "exact", "polynomial", "tanh"),
    "norm": ("auto", "xla", "fused"),
}


@dataclasses.dataclass(frozen=True)
class Compute:
    """The keys of the `model` group that every model family shares.

    dtype: of matrix products; parameters stay float32.
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
        return jnp.dtype(self.dtype)

    @property
    def scans(self) -> bool:
        """Whether stacks are scanned over their depth here."""
        return jax.default_backend() == "cpu" if self.scan is None else self.scan
