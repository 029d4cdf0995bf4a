"""Fused attention on TPUs: jax's splash kernel, padded for sequences of any length."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from wmjax.nn.kernels.devices import on_own_rows

LANES = 128  # the kernel needs sequences whose length is a multiple of this


def attend(
    query_BMHd: jax.Array, key_BNHd: jax.Array, value_BNHd: jax.Array, interpret: bool = False
) -> jax.Array:
    """Attend from each query to every key; returns BMHd.

    On a mesh every device attends for its own rows. interpret: True runs the kernel in Python, on
    any device, in place of compiling it.
    """
    own = functools.partial(_attend, interpret=interpret)
    return on_own_rows(own, (query_BMHd, key_BNHd, value_BNHd))


def _attend(
    query_BMHd: jax.Array, key_BNHd: jax.Array, value_BNHd: jax.Array, interpret: bool
) -> jax.Array:
    _, M, H, d = query_BMHd.shape
    N = key_BNHd.shape[1]
    queries, keys = (-(-length // LANES) * LANES for length in (M, N))
    # Padding keys form a segment that no query attends to. Padding queries attend to all valid keys
    # and are cut off at the end.
    hidden = (jnp.arange(keys) >= N).astype(jnp.int32)
    segments = splash.SegmentIds(jnp.zeros(queries, jnp.int32), hidden) if keys > N else None

    def by_head(x_BNHd: jax.Array, padded: int) -> jax.Array:
        missing = padded - x_BNHd.shape[1]
        return jnp.pad(x_BNHd, ((0, 0), (0, missing), (0, 0), (0, 0))).swapaxes(1, 2)

    kernel = _kernel(H, queries, keys, interpret)
    query_BMHd = query_BMHd * jnp.asarray(d**-0.5, query_BMHd.dtype)
    y_BHMd = jax.vmap(lambda q, k, v: kernel(q, k, v, segments))(
        by_head(query_BMHd, queries), by_head(key_BNHd, keys), by_head(value_BNHd, keys)
    )
    return y_BHMd.swapaxes(1, 2)[:, :M]


def _kernel(heads: int, queries: int, keys: int, interpret: bool) -> Callable[..., jax.Array]:
    q, kv = (next(size for size in (512, 256, LANES) if n % size == 0) for n in (queries, keys))
    return splash.make_splash_mha(
        splash.MultiHeadMask([splash.FullMask((queries, keys))] * heads),
        block_sizes=splash.BlockSizes(
            block_q=q,
            block_kv=kv,
            block_q_dkv=q,
            block_kv_dkv=kv,
            block_q_dq=q,
            block_kv_dq=kv,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
