"""Residual sum and layer norm in one GPU kernel (Triton, through Pallas).

XLA reads and writes the residual stream three to four times; this kernel does each once. The
backward kernel also sums the gradients of bias, scale and shift in the same pass.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from wmjax.nn.kernels.devices import on_own_rows, traced_once

ROWS = 4  # rows of the residual stream for each program of the forward kernel
AT_ONCE = 2048  # numbers that a program of the backward kernel processes at a time
PROGRAMS = 1056  # most programs of the backward kernel: eight for each multiprocessor of an H100
SUMS = 3  # vectors that the backward kernel sums: gradients of bias, scale and shift
WARPS = 4  # of every program


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def add_norm(
    x_BND: jax.Array,
    branch_BND: jax.Array,
    bias_D: jax.Array,
    scale_D: jax.Array,
    shift_D: jax.Array,
    eps: float,
    dtype: jnp.dtype,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Return the sum x + branch + bias in x's dtype, and its layer norm in `dtype`.

    scale, shift: of the layer norm. On a mesh every device works on its own rows. interpret: True
    runs the kernel in Python, on any device, in place of compiling it.
    """
    args = x_BND, branch_BND, bias_D, scale_D, shift_D, eps, dtype, interpret
    return _add_norm_forward(*args)[0]


def _add_norm_forward(
    x: jax.Array,
    branch: jax.Array,
    bias: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    eps: float,
    dtype: jnp.dtype,
    interpret: bool,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    vectors = jnp.stack([bias, scale, shift])
    own = functools.partial(_forward, eps=eps, dtype=dtype, interpret=interpret)
    total, y = on_own_rows(own, (x, branch), vectors)
    return (total, y), (total, scale)


def _add_norm_backward(
    eps: float, dtype: jnp.dtype, interpret: bool, kept: Any, gradients: Any
) -> tuple[jax.Array, ...]:
    total, scale = kept
    own = functools.partial(_backward, eps=eps, interpret=interpret)
    gradient, sums = on_own_rows(own, (total, *gradients), scale[None])
    return gradient, gradient, *jnp.sum(sums, axis=0)


add_norm.defvjp(_add_norm_forward, _add_norm_backward)


def _columns(width: int) -> tuple[jax.Array, jax.Array | None]:
    """Return the columns of a row, padded to a power of two, and their valid mask (None: all)."""
    columns = jnp.arange(pl.next_power_of_2(width))[None]
    return columns, None if columns.size == width else columns < width


def _load(ref: Any, at: tuple, valid: jax.Array | None) -> jax.Array:
    """Load as float32, with 0 where the mask is False."""
    other = None if valid is None else 0.0
    return triton.load(ref.at[at], mask=valid, other=other).astype(jnp.float32)


@traced_once("eps", "dtype", "interpret")
def _forward(
    x: jax.Array,
    branch: jax.Array,
    vectors: jax.Array,
    eps: float,
    dtype: jnp.dtype,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    B, N, D = x.shape
    height = math.gcd(ROWS, B * N)

    def kernel(x_ref: Any, branch_ref: Any, vectors_ref: Any, total_ref: Any, y_ref: Any) -> None:
        columns, valid = _columns(D)
        at = (pl.program_id(0) * height + jnp.arange(height)[:, None], columns)
        masked = None if valid is None else jnp.broadcast_to(valid, (height, columns.size))
        bias, weight, shift = (_load(vectors_ref, (row, columns), valid) for row in range(3))
        branch = (_load(branch_ref, at, masked) + bias).astype(x.dtype).astype(jnp.float32)
        total = (_load(x_ref, at, masked) + branch).astype(x.dtype)
        centred, scale = _normalise(total.astype(jnp.float32), D, eps, valid)
        triton.store(total_ref.at[at], total, mask=masked)
        y = centred * scale * weight + shift
        triton.store(y_ref.at[at], y.astype(dtype), mask=masked)

    shape = (B * N, D)
    total, y = pl.pallas_call(
        kernel,
        grid=(B * N // height,),
        out_shape=(jax.ShapeDtypeStruct(shape, x.dtype), jax.ShapeDtypeStruct(shape, dtype)),
        compiler_params=triton.CompilerParams(num_warps=WARPS),
        interpret=interpret,
        name="add_norm",
    )(x.reshape(shape), branch.reshape(shape), vectors)
    return total.reshape(B, N, D), y.reshape(B, N, D)


def _normalise(
    x: jax.Array, width: int, eps: float, valid: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Return the centred rows and the reciprocal of their standard deviation."""
    centred = x - jnp.sum(x, axis=1, keepdims=True) / width
    if valid is not None:
        centred = jnp.where(valid, centred, 0.0)
    variance = jnp.sum(centred * centred, axis=1, keepdims=True) / width
    return centred, jax.lax.rsqrt(variance + eps)


@traced_once("eps", "interpret")
def _backward(
    total: jax.Array,
    total_gradient: jax.Array,
    y_gradient: jax.Array,
    vectors: jax.Array,
    eps: float,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    B, N, D = total.shape
    padded = pl.next_power_of_2(D)
    height = math.gcd(max(1, AT_ONCE // padded), B * N)
    steps = B * N // height
    programs = min(PROGRAMS, steps)

    def kernel(
        vectors_ref: Any, total_ref: Any, straight_ref: Any, y_ref: Any, out_ref: Any, sums_ref: Any
    ) -> None:
        columns, valid = _columns(D)
        masked = None if valid is None else jnp.broadcast_to(valid, (height, padded))
        program = pl.program_id(0)
        weight = _load(vectors_ref, (0, columns), valid)

        def step(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            first = (program + i * programs) * height
            at = (first + jnp.arange(height)[:, None], columns)
            x, straight, gradient = (
                _load(ref, at, masked) for ref in (total_ref, straight_ref, y_ref)
            )
            centred, scale = _normalise(x, D, eps, masked)
            normal = centred * scale
            weighted = gradient * weight
            along = jnp.sum(weighted * normal, axis=1, keepdims=True) / D
            mean = jnp.sum(weighted, axis=1, keepdims=True) / D
            out = (straight + (weighted - normal * along - mean) * scale).astype(total.dtype)
            triton.store(out_ref.at[at], out, mask=masked)
            parts = (out.astype(jnp.float32), gradient * normal, gradient)
            return tuple(sum + part for sum, part in zip(sums, parts, strict=True))

        zeros = (jnp.zeros((height, padded), jnp.float32),) * SUMS
        sums = jax.lax.fori_loop(0, (steps - program + programs - 1) // programs, step, zeros)
        for k, sum in enumerate(sums):
            sum = jnp.sum(sum, axis=0, keepdims=True)
            triton.store(sums_ref.at[program, k, columns], sum, mask=valid)

    shape = (B * N, D)
    gradient, sums = pl.pallas_call(
        kernel,
        grid=(programs,),
        out_shape=(
            jax.ShapeDtypeStruct(shape, total.dtype),
            jax.ShapeDtypeStruct((programs, SUMS, D), jnp.float32),
        ),
        compiler_params=triton.CompilerParams(num_warps=WARPS),
        interpret=interpret,
        name="add_norm_backward",
    )(vectors, *(array.reshape(shape) for array in (total, total_gradient, y_gradient)))
    return gradient.reshape(B, N, D), sums
