"""Softmax attention, full or frame-causal, by the fastest implementation of the device."""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wmjax.errors import UserError
from wmjax.nn import rope
from wmjax.nn.kernels.devices import Lengths, device_name, has_triton, modern_gpu

# The longest sequence for which our kernels are preferred to cuDNN's with heads of 64. Measured on
# an H100: faster at 504 and 128 tokens, a fifth slower at 2,048; on an H200, with 258 queries: 29 %
# faster at 258 keys, 28 % at 516. With heads of 32 they are faster at 1,500 tokens too.
SHORT = 800

# The largest table of softmax weights that xla_attention writes out, in queries x keys. Above it,
# as for clips of 64 frames, it goes through the queries in blocks of BLOCK.
WHOLE = 2048 * 2048
BLOCK = 128

# The table that our kernel reads, within 2**-12: a rotated number is rounded to 2**-9 in bfloat16.
TABLE = jnp.float16

# Keys, rotated, and values of earlier tokens, BPHd; of a stack of layers, LBPHd.
Past = tuple[jax.Array, jax.Array]


class LayerPast(NamedTuple):
    """The past of one layer.

    own: its keys and values. stack: those of all layers, and layer: its number among them. Kernels
    read the stack, so that `own` need not be copied out of it; gradients go into `own` alone.
    """

    own: Past
    stack: Past
    layer: jax.Array

    @classmethod
    def alone(cls, own: Past) -> "LayerPast":
        key, value = own
        return cls(own, (key[None], value[None]), jnp.int32(0))


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
    chosen = _chosen(implementation, max(lengths), query_BMHd.shape[-1])
    if chosen == "triton":
        from wmjax.nn.kernels import attention_gpu  # Pallas takes a while to import

        return attention_gpu.attend(query_BMHd, key_BNHd, value_BNHd, tails, lengths)
    named = {"xla": xla_attention, "cudnn": cudnn_attention, "splash": splash_attention}
    one = named[chosen]
    keys, values = (split(x, lengths) for x in (key_BNHd, value_BNHd))
    apart = zip(split(query_BMHd, tails), keys, values, strict=True)
    return jnp.concatenate([one(*arrays) for arrays in apart], axis=1)


def _chosen(implementation: str, longest: int, head_dim: int) -> str:
    """Return the implementation for sequences of up to `longest` keys."""
    if implementation != "fastest":
        return implementation
    return "triton" if longest <= SHORT or head_dim < 64 else "cudnn"


def heads(qkv_BN3Hd: jax.Array, table: rope.Table | None) -> tuple[jax.Array, ...]:
    """Return queries and keys, rotated, and values, BNHd."""
    query, key, value = (qkv_BN3Hd[:, :, part] for part in range(3))
    return rope.rotate(query, table), rope.rotate(key, table), value


def longer(past: Past, key_BNHd: jax.Array, value_BNHd: jax.Array) -> Past:
    """Return the past with these keys and values after it."""
    key, value = past
    return jnp.concatenate([key, key_BNHd], axis=1), jnp.concatenate([value, value_BNHd], axis=1)


def attend_packed(
    qkv_BN3Hd: jax.Array,
    table: rope.Table | None,
    lengths: Lengths,
    implementation: str,
    past: LayerPast | None = None,
) -> jax.Array:
    """Rotate queries and keys, then attend within each sequence; returns BNHd.

    past: a single sequence attends to it as well. The rest is as in `attend`.
    """
    if past and not past.own[0].shape[1]:
        past = None
    own = past.own if past else None
    longest = max(lengths) + (own[0].shape[1] if own else 0)
    if _chosen(implementation, longest, qkv_BN3Hd.shape[-1]) == "triton":
        where = (*past.stack, past.layer) if past else None
        return _attend_in_place(qkv_BN3Hd, table, own, where, lengths)
    return _attend_apart(qkv_BN3Hd, table, own, lengths, implementation)


def _attend_apart(
    qkv: jax.Array,
    table: rope.Table | None,
    past: Past | None,
    lengths: Lengths,
    implementation: str,
) -> jax.Array:
    query, key, value = heads(qkv, table)
    tails = lengths
    if past:
        key, value = longer(past, key, value)
        lengths = (key.shape[1],)
    return attend(query, key, value, tails, lengths, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend_in_place(
    qkv: jax.Array, table: rope.Table | None, past: Past | None, where: Any, lengths: Lengths
) -> jax.Array:
    """Return what _attend_apart does, with fewer copies.

    where: the stack that the past is a layer of, and the layer, from which it is read. The kernel
    rotates the queries. It would rotate the keys anew for each block of queries, so XLA does that.
    Under a gradient XLA rotates both, and the backward kernels rotate the gradients back.
    """
    from wmjax.nn.kernels import attention_gpu  # Pallas takes a while to import

    key = qkv if table is None else rope.rotate(qkv[:, :, 1], table)
    return attention_gpu.attend_in_place(qkv, key, _joined(table), where, lengths)


def _joined(table: rope.Table | None) -> jax.Array | None:
    """Return the table as our kernels read it, BN2d."""
    return None if table is None else jnp.concatenate(table, axis=2).astype(TABLE)


def _attend_in_place_forward(
    qkv: jax.Array, table: rope.Table | None, past: Past | None, where: Any, lengths: Lengths
) -> tuple[jax.Array, Any]:
    from wmjax.nn.kernels import attention_gpu

    if past:

        def apart(qkv: jax.Array, past: Past) -> jax.Array:
            return _attend_apart(qkv, table, past, lengths, "triton")

        return jax.vjp(apart, qkv, past)
    query, key, value = heads(qkv, table)
    out, log_sum = attention_gpu.attend_and_keep(query, key, value, lengths)
    return out, ((query, key, value, out, log_sum), _joined(table))


def _attend_in_place_backward(lengths: Lengths, kept: Any, gradient: jax.Array) -> tuple[Any, ...]:
    from wmjax.nn.kernels import attention_gpu

    if callable(kept):
        into_qkv, into_past = kept(gradient)
        return into_qkv, None, into_past, None
    arrays, table = kept
    return attention_gpu.gradient_in_place(arrays, gradient, table, lengths), None, None, None


_attend_in_place.defvjp(_attend_in_place_forward, _attend_in_place_backward)


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
