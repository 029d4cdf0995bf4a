"""Softmax attention from everywhere to everywhere, by what the device at hand does fastest."""

from typing import Literal

import jax
import jax.numpy as jnp

from wmjax.errors import UserError


def choose_attention(
    wanted: str, dtype: jnp.dtype, head_dim: int
) -> Literal["xla", "cudnn", "splash"]:
    """Return the implementation that will run; UserError for one that cannot.

    splash is taken at its word: it may be compiled for TPUs where there are none.
    """
    if wanted == "splash" or (wanted == "auto" and jax.default_backend() == "tpu"):
        return "splash"
    gpu = jax.default_backend() == "gpu"
    fits = dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128
    if wanted == "auto":
        return "cudnn" if gpu and fits else "xla"
    if wanted == "xla":
        return "xla"
    if wanted != "cudnn":
        raise UserError(f"model.attention={wanted!r}: wanted auto, xla, cudnn or splash")
    if not (gpu and fits):
        raise UserError(
            f"model.attention='cudnn' on {jax.default_backend()}, {dtype}, head width {head_dim}: "
            "wanted a GPU, bfloat16 and a multiple of 8 up to 128"
        )
    return "cudnn"


@jax.custom_vjp
def _scores(query_BNHd: jax.Array, key_BNHd: jax.Array) -> jax.Array:
    """Return float32 products of queries and keys.

    The gradient goes back through products in the inputs' dtype, as in fused attention. JAX's own
    rule (and with it jax.nn.dot_product_attention) mixes float32 with bfloat16 there, which is
    slower and refused under strict dtype promotion.
    """
    return jnp.einsum("bqhd,bkhd->bhqk", query_BNHd, key_BNHd, preferred_element_type=jnp.float32)


def _scores_backward(
    kept: tuple[jax.Array, jax.Array], gradient_BHNN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    query, key = kept
    gradient_BHNN = gradient_BHNN.astype(query.dtype)
    return (
        jnp.einsum("bhqk,bkhd->bqhd", gradient_BHNN, key),
        jnp.einsum("bhqk,bqhd->bkhd", gradient_BHNN, query),
    )


_scores.defvjp(lambda query, key: (_scores(query, key), (query, key)), _scores_backward)


def xla_attention(query_BNHd: jax.Array, key_BNHd: jax.Array, value_BNHd: jax.Array) -> jax.Array:
    """Attend from everywhere to everywhere, softmax in float32."""
    weight_BHNN = jax.nn.softmax(_scores(query_BNHd, key_BNHd) * query_BNHd.shape[-1] ** -0.5)
    return jnp.einsum("bhqk,bkhd->bqhd", weight_BHNN.astype(value_BNHd.dtype), value_BNHd)


def attend(
    query_BNHd: jax.Array, key_BNHd: jax.Array, value_BNHd: jax.Array, implementation: str
) -> jax.Array:
    """Attend by one of the implementations that choose_attention returns."""
    arguments = query_BNHd, key_BNHd, value_BNHd
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(*arguments, implementation="cudnn")
    if implementation == "splash":
        from wmjax.models import attention_tpu  # Pallas takes a while to import

        return attention_tpu.attend(*arguments)
    return xla_attention(*arguments)
