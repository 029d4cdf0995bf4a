"""Softmax attention, full or frame-causal, by the fastest implementation of the device."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from wmjax.errors import UserError
from wmjax.nn.kernels.devices import Lengths, device_name, has_triton, modern_gpu

# The longest sequence for which our kernels are preferred to cuDNN's with heads of 64. Measured on
# an H100: faster at 504 and 128 tokens, a fifth slower at 2,048; on an H200, with 258 queries: 29 %
# faster at 258 keys, 28 % at 516. With heads of 32 they are faster at 1,500 tokens too.
SHORT = 800

# The largest table of softmax weights that xla_attention writes out, in queries x keys. Above it,
# as for clips of 64 frames, it goes through the queries in blocks of BLOCK.
WHOLE = 2048 * 2048
BLOCK = 128


def split(x_BN: jax.Array, lengths: Sequence[int]) -> list[jax.Array]:
    """Split the second axis into parts of these lengths, which add up to its size."""
    return jnp.split(x_BN, np.cumsum(lengths)[:-1], axis=1)


def choose_attention(
    wanted: str, dtype: jnp.dtype, head_dim: int
) -> Literal["xla", "cudnn", "triton", "fastest", "splash"]:
    """Return the implementation that will run; UserError for one that cannot run here.

    fastest: `attend` chooses cudnn or triton by the length of the sequences. splash is accepted on
    any device, because a plan compiles for TPUs without having one.
    """
    if wanted == "splash" or (wanted == "auto" and jax.default_backend() == "tpu"):
        return "splash"
    if wanted == "xla":
        return "xla"
    gpu = modern_gpu() and dtype in (jnp.bfloat16, jnp.float16)
    cudnn = gpu and head_dim % 8 == 0 and head_dim <= 128
    triton = gpu and head_dim in (16, 32, 64) and has_triton()
    if wanted == "auto":
        return "fastest" if triton else "cudnn" if cudnn else "xla"
    if wanted == "cudnn":
        fits, widths = cudnn, "a multiple of 8 up to 128"
    else:
        fits, widths = triton, "16, 32 or 64, and a jax that has Pallas for Triton"
    if not fits:
        raise UserError(
            f"model.attention={wanted!r} on {device_name()}, {dtype}, head width {head_dim}, "
            f"jax {jax.__version__}: wanted an NVIDIA GPU from Ampere on, bfloat16 and a head "
            f"width of {widths}"
        )
    return "cudnn" if wanted == "cudnn" else "triton"


@jax.custom_vjp
def _scores(query_BNHd: jax.Array, key_BNHd: jax.Array) -> jax.Array:
    """Return float32 products of queries and keys.

    The backward pass computes products in the dtype of the inputs, as fused attention does. JAX's
    own rule (also in jax.nn.dot_product_attention) mixes float32 with bfloat16 there, which is
    slower and an error under strict dtype promotion.
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
    """Attend from all queries to all keys, with the softmax in float32.

    Memory grows with queries + keys, also backward, where each block is computed again.
    """
    if query_BNHd.shape[1] * key_BNHd.shape[1] <= WHOLE:
        return _attend_whole(query_BNHd, key_BNHd, value_BNHd)

    @jax.checkpoint
    def attend_one(query_BHd: jax.Array) -> jax.Array:  # lax.map gives it a block's queries at once
        return _attend_whole(query_BHd[:, None], key_BNHd, value_BNHd)[:, 0]

    output_NBHd = jax.lax.map(attend_one, jnp.moveaxis(query_BNHd, 1, 0), batch_size=BLOCK)
    return jnp.moveaxis(output_NBHd, 0, 1)


def _attend_whole(query_BNHd: jax.Array, key_BNHd: jax.Array, value_BNHd: jax.Array) -> jax.Array:
    weight_BHNN = jax.nn.softmax(_scores(query_BNHd, key_BNHd) * query_BNHd.shape[-1] ** -0.5)
    return jnp.einsum("bhqk,bkhd->bqhd", weight_BHNN.astype(value_BNHd.dtype), value_BNHd)


def cudnn_attention(query_BMHd: jax.Array, key_BNHd: jax.Array, value_BNHd: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(query_BMHd, key_BNHd, value_BNHd, implementation="cudnn")


def splash_attention(
    query_BMHd: jax.Array, key_BNHd: jax.Array, value_BNHd: jax.Array
) -> jax.Array:
    from wmjax.nn.kernels import attention_tpu  # Pallas takes a while to import

    return attention_tpu.attend(query_BMHd, key_BNHd, value_BNHd)


def attend(
    query_BMHd: jax.Array,
    key_BNHd: jax.Array,
    value_BNHd: jax.Array,
    tails: Lengths,
    lengths: Lengths,
    implementation: str,
) -> jax.Array:
    """Attend within each sequence, by an implementation that choose_attention returned.

    lengths: tokens of each sequence along N. tails: queries of each sequence along M.
    """
    if implementation == "fastest":
        short = max(lengths) <= SHORT or query_BMHd.shape[-1] < 64
        implementation = "triton" if short else "cudnn"
    if implementation == "triton":
        from wmjax.nn.kernels import attention_gpu  # Pallas takes a while to import

        return attention_gpu.attend(query_BMHd, key_BNHd, value_BNHd, tails, lengths)
    one = {"xla": xla_attention, "cudnn": cudnn_attention, "splash": splash_attention}
    keys, values = (split(x, lengths) for x in (key_BNHd, value_BNHd))
    apart = zip(split(query_BMHd, tails), keys, values, strict=True)
    return jnp.concatenate([one[implementation](*arrays) for arrays in apart], axis=1)


def attend_to_past(
    query_BNHd: jax.Array,
    key_BNHd: jax.Array,
    value_BNHd: jax.Array,
    frame: int,
    implementation: str,
) -> jax.Array:
    """Attend frame-causally: from each frame of `frame` tokens to itself and the frames before it.

    One call a frame over the keys up to its end: there is no mask, quadratic or other, in memory.
    """
    outputs = []
    for start in range(0, query_BNHd.shape[1], frame):
        end = start + frame
        own = query_BNHd[:, start:end], key_BNHd[:, :end], value_BNHd[:, :end]
        outputs.append(attend(*own, (frame,), (end,), implementation))
    return jnp.concatenate(outputs, axis=1)
