"""Fused attention on TPUs: the splash kernel that jax ships, on sequences of any length."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

LANES = 128  # the kernel takes whole blocks of as many tokens


def attend(
    query_BNHd: jax.Array, key_BNHd: jax.Array, value_BNHd: jax.Array, interpret: bool = False
) -> jax.Array:
    """Attend from everywhere to everywhere; every device its own rows of the ambient mesh.

    interpret: run the kernel's Python in place of compiling it, on any device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    local = functools.partial(_attend, interpret=interpret)
    if not mesh.empty:  # XLA cannot split a kernel by itself
        rows = jax.P(mesh.axis_names)
        local = jax.shard_map(local, in_specs=(rows, rows, rows), out_specs=rows, check_vma=False)
    return local(query_BNHd, key_BNHd, value_BNHd)


def _attend(
    query_BNHd: jax.Array, key_BNHd: jax.Array, value_BNHd: jax.Array, interpret: bool
) -> jax.Array:
    _, N, H, d = query_BNHd.shape
    padded = -(-N // LANES) * LANES
    # What pads is a segment of its own: it sees itself, which keeps its softmax finite, and is cut.
    segment = (jnp.arange(padded) >= N).astype(jnp.int32)
    segments = splash.SegmentIds(segment, segment) if padded > N else None

    def by_head(x_BNHd: jax.Array) -> jax.Array:
        return jnp.pad(x_BNHd, ((0, 0), (0, padded - N), (0, 0), (0, 0))).swapaxes(1, 2)

    kernel = _kernel(H, padded, interpret)
    query_BNHd = query_BNHd * jnp.asarray(d**-0.5, query_BNHd.dtype)
    y_BHNd = jax.vmap(lambda q, k, v: kernel(q, k, v, segments))(
        by_head(query_BNHd), by_head(key_BNHd), by_head(value_BNHd)
    )
    return y_BHNd.swapaxes(1, 2)[:, :N]


def _kernel(heads: int, tokens: int, interpret: bool) -> Callable[..., jax.Array]:
    block = next(size for size in (512, 256, LANES) if tokens % size == 0)
    return splash.make_splash_mha(
        splash.MultiHeadMask([splash.FullMask((tokens, tokens))] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
