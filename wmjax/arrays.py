"""Arrays that users hand over: of NumPy, JAX or torch, or nested lists. Imports no torch."""

from typing import Any

import jax
import numpy as np

from wmjax.errors import UserError, reason
from wmjax.types import Array


def as_array(name: str, value: Any) -> Array:
    """Return a JAX array as it is, and any other array, tensor or nested list as NumPy.

    A tensor of torch may need a gradient or lie on a GPU; bfloat16, which NumPy lacks, becomes
    float32. name: of the argument, for errors. Raises UserError for a list of different shapes.
    """
    if isinstance(value, jax.Array):
        return value
    value = _on_host(value)
    try:
        return np.asarray(value)
    except ValueError as error:
        shapes = dict.fromkeys(str(part.shape) for part in value if hasattr(part, "shape"))
        found = f"shapes {', '.join(shapes)}" if shapes else reason(error)
        raise UserError(f"{name}: {found}: wanted arrays of one shape") from None


def _on_host(value: Any) -> Any:
    """Return tensors of torch, also those in lists, as np.asarray takes them."""
    if isinstance(value, (list, tuple)):
        return [_on_host(part) for part in value]
    if not hasattr(value, "detach"):
        return value
    value = value.detach().cpu()
    return value.float() if str(value.dtype) == "torch.bfloat16" else value
