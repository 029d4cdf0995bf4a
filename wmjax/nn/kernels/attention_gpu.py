"""Fused attention on GPUs (Triton, through Pallas) for several sequences in one call.

cuDNN is slow with heads of width 32 and needs a call for each sequence. Here the sequences are
concatenated in the same arrays, so nothing is split or copied, and they may have any length. The
algorithm is FlashAttention-2 (Dao 2023, arXiv:2307.08691) without atomics, so that equal inputs
give equal bits.

Queries, keys and values may also lie in one array, BN3Hd, as a linear layer writes them, and
are read where they lie. The kernel rotates packed queries itself.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from wmjax.nn.kernels.devices import Lengths, on_own_rows, traced_once

BLOCK = 64  # rows that a program keeps, and rows of the other side that it loads at a time
LEAST = 16  # rows of a product on the tensor cores
WARPS, STAGES = 4, 3  # of every kernel
QUERY, KEY, VALUE = range(3)  # parts of a packed array

# Keys and values of earlier tokens, LBPHd, of all layers, and the number of the layer, int32.
Past = tuple[jax.Array, jax.Array, jax.Array]


def attend(
    query_BMHd: jax.Array,
    key_BNHd: jax.Array,
    value_BNHd: jax.Array,
    tails: Lengths,
    lengths: Lengths,
    interpret: bool = False,
) -> jax.Array:
    """Attend within each sequence; returns BMHd.

    lengths: tokens of each sequence along N. tails: queries of each sequence along M. All are above
    0. On a mesh every device attends for its own rows. interpret: True runs the kernels in Python,
    on any device, in place of compiling them.
    """
    assert (sum(tails), sum(lengths)) == (query_BMHd.shape[1], key_BNHd.shape[1])

    def own(*arrays: jax.Array) -> jax.Array:
        return _attend(*arrays, tails, lengths, interpret)

    return on_own_rows(own, (query_BMHd, key_BNHd, value_BNHd))


def attend_in_place(
    qkv_BN3Hd: jax.Array,
    key: jax.Array,
    table_BN2d: jax.Array | None,
    past: Past | None,
    lengths: Lengths,
    interpret: bool = False,
) -> jax.Array:
    """Attend within each sequence, and to the past of a single one; returns BNHd.

    It has no gradient. key: BNHd, rotated, or the packed array again, BN3Hd. table_BN2d: cosines
    and sines, as rope.rotate takes them, of one row for all or of every row: the kernel rotates the
    queries by them. None: nothing is rotated. The rest is as in `attend`.
    """
    assert sum(lengths) == qkv_BN3Hd.shape[1]
    assert past is None or len(lengths) == 1, "a past goes with a single sequence"
    rows: tuple[jax.Array, ...] = qkv_BN3Hd, key
    shared: list[jax.Array] = [] if past is None else [past[2].reshape(1, 1)]
    if table_BN2d is not None and len(table_BN2d) == len(qkv_BN3Hd):
        rows = *rows, table_BN2d
    elif table_BN2d is not None:
        shared = [table_BN2d, *shared]

    def own(qkv: jax.Array, key: jax.Array, *rest: jax.Array) -> jax.Array:
        table = None if table_BN2d is None else rest[0]
        earlier = None if past is None else (*rest[-2:], rest[-3])
        return _forward(qkv, key, qkv, lengths, lengths, interpret, table, earlier)[0]

    return on_own_rows(own, rows, *shared, stacked=() if past is None else past[:2])


def attend_and_keep(
    query_BNHd: jax.Array,
    key_BNHd: jax.Array,
    value_BNHd: jax.Array,
    lengths: Lengths,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attend within each sequence; return BNHd, and the BHN that gradient_in_place needs."""

    def own(*arrays: jax.Array) -> Any:
        return tuple(_forward(*arrays, lengths, lengths, interpret))

    return on_own_rows(own, (query_BNHd, key_BNHd, value_BNHd))


def gradient_in_place(
    kept: tuple[jax.Array, ...],
    gradient_BNHd: jax.Array,
    table_BN2d: jax.Array | None,
    lengths: Lengths,
    interpret: bool = False,
) -> jax.Array:
    """Return the gradient of the packed array, BN3Hd, whose parts were rotated by the table.

    kept: rotated queries and keys, values, and what attend_and_keep returned.
    """
    own_table = table_BN2d is not None and len(table_BN2d) == len(gradient_BNHd)
    tables = [] if table_BN2d is None else [table_BN2d]

    def own(*arrays: jax.Array) -> jax.Array:
        table = arrays[6] if tables else None
        query, key, value, out, log_sum, gradient = arrays[:6]
        into, shift = _into_queries(
            *(query, key, value, out, gradient, log_sum, lengths, lengths, interpret),
            table=table,
            packed=True,
        )
        return _into_keys(
            *(query, key, value, gradient, log_sum, shift, lengths, lengths, interpret),
            table=table,
            into=into,
        )[0]

    rows = *kept, gradient_BNHd
    return on_own_rows(own, (*rows, *tables)) if own_table else on_own_rows(own, rows, *tables)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    tails: Lengths,
    lengths: Lengths,
    interpret: bool,
) -> jax.Array:
    return _forward(query, key, value, tails, lengths, interpret)[0]


def _attend_forward(query: jax.Array, key: jax.Array, value: jax.Array, *static: Any) -> Any:
    out, log_sum = _forward(query, key, value, *static)
    return out, (query, key, value, out, log_sum)


def _attend_backward(
    tails: Lengths, lengths: Lengths, interpret: bool, kept: Any, gradient: jax.Array
) -> tuple[jax.Array, ...]:
    static = tails, lengths, interpret
    query, key, value, out, log_sum = kept
    into_query, shift = _into_queries(query, key, value, out, gradient, log_sum, *static)
    return into_query, *_into_keys(query, key, value, gradient, log_sum, shift, *static)


_attend.defvjp(_attend_forward, _attend_backward)


class Rows:
    """Rows of one head of one clip, with a valid mask.

    Vectors are stored as (B * N, H * d), or as several such parts side by side, scalars as
    (B * H, N).
    """

    def __init__(
        self, shape_BNHd: tuple[int, ...], ids: Any, first: Any, end: Any = None, count: int = BLOCK
    ):
        """shape_BNHd: of the whole array. ids: clip and head. Rows from `end` on are not valid."""
        (_, N, H, d), (clip, head) = shape_BNHd, ids
        row = first + jnp.arange(count)
        self._place = first, end, count
        self._clip, self._width = clip, H * d
        self._vectors = (clip * N + row)[:, None], (head * d + jnp.arange(d))[None]
        self._numbers = clip * H + head, row
        self.valid: Any = None  # None: all rows are valid
        self._valid_vectors: Any = None
        if end is not None:
            self.valid = row < end
            self._valid_vectors = jnp.broadcast_to(self.valid[:, None], (count, d))

    def vectors(self, ref: Any, part: int = 0) -> jax.Array:
        """Load (count, d), with 0 in rows that are not valid."""
        other = None if self._valid_vectors is None else 0.0
        return triton.load(self._in_part(ref, part), mask=self._valid_vectors, other=other)

    def rotation(self, ref: Any, shape_BN2d: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """Load cosines and sines of these rows, (count, d), float32, from a table."""
        B, N, _, d = shape_BN2d
        rows = Rows((B, N, 1, d), (self._clip if B > 1 else 0, 0), *self._place)
        cos, sin = (rows.vectors(ref, part).astype(jnp.float32) for part in range(2))
        return cos, sin

    def numbers(self, ref: Any) -> jax.Array:
        """Load (count,), with 0 in rows that are not valid."""
        other = None if self.valid is None else 0.0
        return triton.load(ref.at[self._numbers], mask=self.valid, other=other)

    def store_vectors(self, ref: Any, x: jax.Array, part: int = 0) -> None:
        at = self._in_part(ref, part)
        triton.store(at, x.astype(ref.dtype), mask=self._valid_vectors)

    def _in_part(self, ref: Any, part: int) -> Any:
        row, column = self._vectors
        return ref.at[row, column + part * self._width]

    def store_numbers(self, ref: Any, x: jax.Array) -> None:
        triton.store(ref.at[self._numbers], x, mask=self.valid)


def _of_heads(x: Any) -> tuple[int, ...]:
    """Return the shape BNHd, for a packed array too."""
    return *x.shape[:2], *x.shape[-2:]


def _work(
    own_shape: tuple[int, ...],
    own: Lengths,
    other_shape: tuple[int, ...],
    other: Lengths,
    before: Any = 0,
) -> tuple[Rows, Callable[[Callable[[Rows, Any], Any], Any], Any]]:
    """Return the rows of this program, and a loop over the other side's blocks of its sequence.

    own: the side that the grid divides, queries or keys; other: the side that the loop runs over.
    The shapes are BNHd. loop(step, carry) calls step(rows, carry). The last block may be smaller,
    and may have rows that are not valid. before: clips of the other side before the first.
    """
    ids = pl.program_id(2), pl.program_id(1)
    first, end, start, length = _place(pl.program_id(0), own, other)

    def loop(step: Callable[[Rows, Any], Any], carry: Any) -> Any:
        def at(i: jax.Array, *place: Any) -> Rows:
            return Rows(other_shape, (before + ids[0], ids[1]), start + i * BLOCK, *place)

        whole, blocks = length // BLOCK, (length + BLOCK - 1) // BLOCK
        carry = jax.lax.fori_loop(0, whole, lambda i, carry: step(at(i), carry), carry)
        rest = max(n % BLOCK for n in other)  # the most rows of a last block
        if not rest:
            return carry
        place = start + length, max(LEAST, pl.next_power_of_2(rest))
        return jax.lax.fori_loop(whole, blocks, lambda i, carry: step(at(i, *place), carry), carry)

    return Rows(own_shape, ids, first, end), loop


def _place(block: jax.Array, own: Lengths, other: Lengths) -> tuple[Any, ...]:
    """Return the place of a block: (first row, end of its sequence, other start, other length).

    block: index among the blocks of all own sequences. The last two describe the sequence of the
    other side that the block attends to.
    """
    blocks_before = own_before = other_before = 0
    place: Any = None
    for length, other_length in zip(own, other, strict=True):
        first = own_before + (block - blocks_before) * BLOCK
        here = first, own_before + length, other_before, other_length
        place = _choose(block >= blocks_before, here, place) if place else here
        blocks_before += pl.cdiv(length, BLOCK)
        own_before, other_before = own_before + length, other_before + other_length
    return place


def _choose(condition: jax.Array, if_true: tuple[Any, ...], if_false: tuple[Any, ...]) -> tuple:
    pairs = zip(if_true, if_false, strict=True)
    return tuple(jnp.where(condition, jnp.int32(one), jnp.int32(other)) for one, other in pairs)


def _call(
    kernel: Callable[..., None],
    name: str,
    own: Lengths,
    arrays: Sequence[jax.Array],
    outs: Sequence[Any],
    interpret: bool,
    in_place: bool = False,
) -> list[jax.Array]:
    """Run a kernel for each block, head and clip, with arrays flattened as Rows expects.

    outs: anything with the shapes and dtypes of the results; the first is one of heads. in_place:
    the kernel writes it into the last of the arrays.
    """
    B, _, H, _ = _of_heads(outs[0])

    def flat(shape: tuple[int, ...]) -> tuple[int, int]:
        return shape[0] * shape[1], math.prod(shape[2:])

    found = pl.pallas_call(
        kernel,
        grid=(sum(pl.cdiv(length, BLOCK) for length in own), H, B),
        out_shape=[jax.ShapeDtypeStruct(flat(x.shape), x.dtype) for x in outs],
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        input_output_aliases={len(arrays) - 1: 0} if in_place else {},
        interpret=interpret,
        name=name,
    )(*(x.reshape(flat(x.shape)) for x in arrays))
    return [x.reshape(out.shape) for x, out in zip(found, outs, strict=True)]


def _to_log(d: int) -> float:
    """Return the factor from a product of query and key of width d to log2 of its weight."""
    return math.log2(math.e) * d**-0.5


def _exp2(x: jax.Array, interpret: bool) -> jax.Array:
    """Return 2**x to within 2 ulp; results below 2**-126 become 0.

    This takes one instruction. XLA's exponential takes four, because it keeps smaller results.
    """
    if interpret:
        return jnp.exp2(x)
    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return triton.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[result],
    )[0]


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _rotated(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate neighbouring pairs of the columns, as rope.rotate does."""
    cos, sin = rotation
    wide = x.astype(jnp.float32)
    return (wide * cos + _swapped(wide) * sin).astype(x.dtype)


def _unrotated(gradient: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Return the gradient of what was rotated, from that of the result."""
    cos, sin = rotation
    return gradient * cos + _swapped(gradient * sin)


def _swapped(x: jax.Array) -> jax.Array:
    """Swap the members of each pair of columns; a thread holds both, so nothing is exchanged."""
    first, second = jnp.split(x.reshape(len(x), -1, 2), 2, axis=-1)
    return jnp.concatenate([second, first], axis=-1).reshape(x.shape)


@traced_once("tails", "lengths", "interpret")
def _forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    tails: Lengths,
    lengths: Lengths,
    interpret: bool,
    table: jax.Array | None = None,
    past: Past | None = None,
) -> list[jax.Array]:
    """Return the attention output, and log2 of the softmax denominator of each query, (B, H, M).

    The arguments are those of `attend_in_place`.
    """
    shape, key_shape = _of_heads(query), _of_heads(key)
    B, M, H, d = shape
    to_log = _to_log(d)

    def kernel(*refs: Any) -> None:
        q_ref, k_ref, v_ref, *others, out_ref, log_sum_ref = refs
        table_ref = None if table is None else others.pop(0)
        own, loop = _work(shape, tails, key_shape, lengths)

        def load(rows: Rows, x: jax.Array, ref: Any, part: int) -> jax.Array:
            return rows.vectors(ref, part if x.ndim == 5 else 0)

        q = load(own, query, q_ref, QUERY)
        if table is not None:
            q = _rotated(q, own.rotation(table_ref, table.shape))

        def attend_to(k: jax.Array, v: jax.Array, k_ref: Any, v_ref: Any) -> Any:
            def step(rows: Rows, carry: Any) -> Any:
                sum, total, largest = carry
                scores = _dot(q, load(rows, k, k_ref, KEY).T)
                if rows.valid is not None:
                    scores = jnp.where(rows.valid[None], scores, -jnp.inf)
                above = jnp.maximum(largest, jnp.max(scores, axis=1))
                weights = _exp2(scores * to_log - (above * to_log)[:, None], interpret)
                shrink = _exp2((largest - above) * to_log, interpret)
                total = total * shrink + jnp.sum(weights, axis=1)
                v_rows = load(rows, v, v_ref, VALUE)
                sum = sum * shrink[:, None] + _dot(weights.astype(v_rows.dtype), v_rows)
                return sum, total, above

            return step

        zeros = jnp.zeros(BLOCK, jnp.float32)
        carry = jnp.zeros((BLOCK, d), jnp.float32), zeros, zeros - jnp.inf
        if others:
            keys_ref, values_ref, layer_ref = others
            before = layer_ref[0, 0] * B
            _, loop_past = _work(shape, tails, keys.shape, keys.shape[1:2], before)
            carry = loop_past(attend_to(keys, values, keys_ref, values_ref), carry)
        sum, total, largest = loop(attend_to(key, value, k_ref, v_ref), carry)
        own.store_vectors(out_ref, sum / total[:, None])
        own.store_numbers(log_sum_ref, largest * to_log + jnp.log2(total))

    outs = (
        jax.ShapeDtypeStruct(shape, query.dtype),
        jax.ShapeDtypeStruct((B, H, M), jnp.float32),
    )
    arrays = [query, key, value]
    if table is not None:
        arrays.append(table)
    if past is not None:
        keys, values = (x.reshape(-1, *x.shape[2:]) for x in past[:2])  # all layers' clips
        arrays += keys, values, past[2]
    return _call(kernel, "attend", tails, arrays, outs, interpret)


@traced_once("tails", "lengths", "interpret", "packed")
def _into_queries(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    out: jax.Array,
    gradient: jax.Array,
    log_sum: jax.Array,
    tails: Lengths,
    lengths: Lengths,
    interpret: bool,
    table: jax.Array | None = None,
    packed: bool = False,
) -> list[jax.Array]:
    """Return the gradient of the queries, and sum(gradient * out) of each query, (B, H, M).

    The softmax backward subtracts that sum from the gradients of the weights. table: it rotated the
    queries. packed: return an array BN3Hd, of which only the part of the queries is written.
    """
    B, M, H, d = query.shape
    to_log = _to_log(d)

    def kernel(*refs: Any) -> None:
        q_ref, k_ref, v_ref, out_ref, g_ref, log_sum_ref, *table_refs, dq_ref, shift_ref = refs
        own, loop = _work(query.shape, tails, key.shape, lengths)
        q, g = own.vectors(q_ref), own.vectors(g_ref)
        log_sum = own.numbers(log_sum_ref)
        shift = jnp.sum(g.astype(jnp.float32) * own.vectors(out_ref).astype(jnp.float32), axis=1)
        own.store_numbers(shift_ref, shift)

        def step(rows: Rows, dq: jax.Array) -> jax.Array:
            k = rows.vectors(k_ref)
            weights = _exp2(_dot(q, k.T) * to_log - log_sum[:, None], interpret)
            if rows.valid is not None:  # a padding key of zeros could overflow
                weights = jnp.where(rows.valid[None], weights, 0.0)
            errors = weights * (_dot(g, rows.vectors(v_ref).T) - shift[:, None])
            return dq + _dot(errors.astype(k.dtype), k)

        dq = loop(step, jnp.zeros((BLOCK, d), jnp.float32)) * d**-0.5
        if table is not None:
            dq = _unrotated(dq, own.rotation(table_refs[0], table.shape))
        own.store_vectors(dq_ref, dq, QUERY)

    shape = (B, M, 3, H, d) if packed else query.shape
    outs = (
        jax.ShapeDtypeStruct(shape, query.dtype),
        jax.ShapeDtypeStruct((B, H, M), jnp.float32),
    )
    arrays = [query, key, value, out, gradient, log_sum]
    if table is not None:
        arrays.append(table)
    return _call(kernel, "attend_into_queries", tails, arrays, outs, interpret)


@traced_once("tails", "lengths", "interpret")
def _into_keys(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    gradient: jax.Array,
    log_sum: jax.Array,
    shift: jax.Array,
    tails: Lengths,
    lengths: Lengths,
    interpret: bool,
    table: jax.Array | None = None,
    into: jax.Array | None = None,
) -> list[jax.Array]:
    """Return the gradients of keys and values.

    table: it rotated the keys. into: an array BN3Hd, which is returned with both written into it.
    """
    d = key.shape[-1]
    to_log = _to_log(d)

    def kernel(*refs: Any) -> None:
        q_ref, k_ref, v_ref, g_ref, log_sum_ref, shift_ref, *rest = refs
        own, loop = _work(key.shape, lengths, query.shape, tails)
        k, v = own.vectors(k_ref), own.vectors(v_ref)

        def step(rows: Rows, carry: Any) -> Any:
            dk, dv = carry
            q, g = rows.vectors(q_ref), rows.vectors(g_ref)
            log_sum = rows.numbers(log_sum_ref)
            weights = _exp2(_dot(k, q.T) * to_log - log_sum[None], interpret)
            dv = dv + _dot(weights.astype(g.dtype), g)
            errors = weights * (_dot(v, g.T) - rows.numbers(shift_ref)[None])
            return dk + _dot(errors.astype(q.dtype), q), dv

        zeros = jnp.zeros((BLOCK, d), jnp.float32)
        dk, dv = loop(step, (zeros, zeros))
        dk = dk * d**-0.5
        if table is not None:
            dk = _unrotated(dk, own.rotation(rest[0], table.shape))
        if into is None:
            own.store_vectors(rest[-2], dk)
            own.store_vectors(rest[-1], dv)
        else:
            own.store_vectors(rest[-1], dk, KEY)
            own.store_vectors(rest[-1], dv, VALUE)

    arrays = [query, key, value, gradient, log_sum, shift]
    if table is not None:
        arrays.append(table)
    if into is None:
        return _call(kernel, "attend_into_keys", lengths, arrays, (key, value), interpret)
    arrays.append(into)
    return _call(kernel, "attend_into_keys", lengths, arrays, (into,), interpret, in_place=True)
