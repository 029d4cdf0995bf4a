"""Transformer parts: linear, attention, MLP, pre-norm block, and the run over depth.

Parameters are float32 and products run in the compute dtype. A LayerNorm computes and returns
float32, and the Linear after it casts down. A stack is one Block whose parameters have a leading
depth axis. Checkpoints have this layout whether the stack is scanned or unrolled.

Logical axes of the parameters, which the sharding table maps to the mesh:
    layers                  depth of a stack
    embed, predictor_embed  width of the residual stream of encoder and predictor
    heads                   heads times head dimension: outputs of qkv, inputs of proj
    mlp                     hidden width of the MLP
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from wmjax.nn import float8, rope
from wmjax.nn.attention import (
    LayerPast,
    Past,
    attend,
    attend_packed,
    attend_to_past,
    choose_attention,
    heads,
    longer,
    split,
)
from wmjax.nn.compute import Compute
from wmjax.nn.gelu import gelu
from wmjax.nn.kernels.devices import Lengths
from wmjax.nn.norm import EPS, LayerNorm, Pending, choose_norm, total

# What the backward pass recomputes; "dots" keeps the outputs of the products with parameters.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class TokenLayout(NamedTuple):
    """How the tokens of a row are grouped, static under jit.

    lengths: of the sequences that lie one after another along N. Each attends to itself alone.
    Empty: one sequence. tails: tokens at the end of each sequence whose outputs are wanted; the
    last block leaves the others out. Empty: all.
    frame: tokens of a frame, for frame-causal attention: a token attends to its own frame and to
    the frames before it. 0: every token attends to every other. It goes with one whole sequence.
    """

    lengths: Lengths = ()
    tails: Lengths = ()
    frame: int = 0


WHOLE = TokenLayout()

# The residual stream BND, and its pending update; None: nothing is pending.
Stream = tuple[jax.Array, Pending | None]


def split_rows(x: jax.Array) -> jax.Array:
    """Shard the first axis over the whole ambient mesh, and no other axis.

    Without this, XLA propagates the sharding of the parameters to the width of the activations and
    exchanges these in every product, which costs many times what the parameters cost. Without an
    ambient mesh, x is returned as it is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, jax.P(mesh.axis_names))


class Linear(nnx.Module):
    """y = x W + b. The shape of W may start with a depth axis; `run` removes it before the call."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        dtype: jnp.dtype,
        depth_scaled: bool = False,
        std: float = 0.02,
    ):
        # The reference truncates at an absolute 2.0, a hundred standard deviations: a normal.
        kernel = std * jax.random.normal(rngs.params(), shape, jnp.float32)
        if depth_scaled:  # later blocks start with smaller branches
            layer = jnp.arange(1, shape[0] + 1, dtype=jnp.float32)[:, None, None]
            kernel = kernel / jnp.sqrt(2 * layer)
        self.kernel = nnx.Param(kernel, axes=axes)
        self.bias = nnx.Param(jnp.zeros((*shape[:-2], shape[-1])), axes=(*axes[:-2], axes[-1]))
        self.dtype, self.float8 = dtype, False  # see Block.use_float8

    def __call__(self, x_BNI: jax.Array) -> jax.Array:
        return total(self.pending(x_BNI))

    def pending(self, x_BNI: jax.Array) -> Pending:
        """Return x W and b, not yet added."""
        if self.float8:
            return float8.product(x_BNI, self.kernel[...], self.dtype), self.bias[...]
        return x_BNI.astype(self.dtype) @ self.kernel.astype(self.dtype), self.bias[...]


def last_tokens(x_BN: jax.Array, lengths: Lengths, tails: Lengths) -> jax.Array:
    """Return the last `tails[i]` tokens of sequence i, one sequence after another."""
    parts = zip(split(x_BN, lengths), tails, strict=True)
    return jnp.concatenate([part[:, -tail:] for part, tail in parts], axis=1)


class Attention(nnx.Module):
    def __init__(
        self, rngs: nnx.Rngs, depth: int, width: int, heads: int, embed: str, compute: Compute
    ):
        dtype = compute.product_dtype
        self.qkv = Linear(rngs, (depth, width, 3 * width), ("layers", embed, "heads"), dtype)
        self.proj = Linear(rngs, (depth, width, width), ("layers", "heads", embed), dtype, True)
        self.heads = heads
        self.implementation = choose_attention(compute.attention, dtype, width // heads)

    def __call__(self, x_BND: jax.Array, table: rope.Table | None, layout: TokenLayout) -> Pending:
        B, N, D = x_BND.shape
        lengths, qkv_BN3Hd = layout.lengths or (N,), self._packed(x_BND)
        if not layout.frame and not layout.tails:
            y_BMHd = attend_packed(qkv_BN3Hd, table, lengths, self.implementation)
            return self.proj.pending(y_BMHd.reshape(B, -1, D))
        query, key, value = heads(qkv_BN3Hd, table)
        if layout.frame:
            assert N % layout.frame == 0, f"{N} tokens in frames of {layout.frame}"
            assert layout[:2] == WHOLE[:2], "frames go with one whole sequence"
            y_BMHd = attend_to_past(query, key, value, layout.frame, self.implementation)
        else:
            query = last_tokens(query, lengths, layout.tails)
            y_BMHd = attend(query, key, value, layout.tails, lengths, self.implementation)
        return self.proj.pending(y_BMHd.reshape(B, -1, D))

    def with_past(
        self, x_BND: jax.Array, table: rope.Table | None, past: LayerPast
    ) -> tuple[Pending, Past]:
        """Attend from these tokens to themselves and to `past`; return the longer past too."""
        qkv_BN3Hd = self._packed(x_BND)
        lengths = (x_BND.shape[1],)
        y_BNHd = attend_packed(qkv_BN3Hd, table, lengths, self.implementation, past)
        _, key, value = heads(qkv_BN3Hd, table)
        return self.proj.pending(y_BNHd.reshape(x_BND.shape)), longer(past.own, key, value)

    def _packed(self, x_BND: jax.Array) -> jax.Array:
        """Return queries, keys and values, not rotated, BN3Hd."""
        B, N, D = x_BND.shape
        return self.qkv(x_BND).reshape(B, N, 3, self.heads, D // self.heads)


class MLP(nnx.Module):
    """depth: of the stack that it belongs to; None: it belongs to none."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        depth: int | None,
        width: int,
        hidden: int,
        embed: str,
        compute: Compute,
    ):
        dtype = compute.product_dtype
        stack, axes = ((), ()) if depth is None else ((depth,), ("layers",))
        self.fc1 = Linear(rngs, (*stack, width, hidden), (*axes, embed, "mlp"), dtype)
        self.fc2 = Linear(
            rngs, (*stack, hidden, width), (*axes, "mlp", embed), dtype, depth is not None
        )
        self.gelu = compute.gelu

    def __call__(self, x_BND: jax.Array) -> jax.Array:
        return total(self.pending(x_BND))

    def pending(self, x_BND: jax.Array) -> Pending:
        return self.fc2.pending(gelu(self.fc1(x_BND), self.gelu))


class Block(nnx.Module):
    """`depth` pre-norm blocks in one: each parameter is stacked. `run` calls it layer by layer."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        depth: int,
        width: int,
        heads: int,
        hidden: int,
        embed: str,
        compute: Compute,
        eps: float = EPS,
    ):
        self.norm1 = LayerNorm((depth, width), ("layers", embed), eps)
        self.attention = Attention(rngs, depth, width, heads, embed, compute)
        self.norm2 = LayerNorm((depth, width), ("layers", embed), eps)
        self.mlp = MLP(rngs, depth, width, hidden, embed, compute)
        self.fused_norm = choose_norm(compute.norm, compute.product_dtype) == "fused"
        self.compute = compute
        if compute.float8:
            self.use_float8("model.dtype")

    def use_float8(self, key: str) -> None:
        """Compute products from float8 numbers from now on; key: that asks for it, for errors.

        XLA's norm writes float8, which our kernel does not.
        """
        float8.check(key)
        for linear in (self.attention.qkv, self.attention.proj, self.mlp.fc1, self.mlp.fc2):
            linear.float8 = True
        self.fused_norm = False

    def __call__(
        self, x_BND: jax.Array, table: rope.Table | None, layout: TokenLayout = WHOLE
    ) -> jax.Array:
        """Return the new residual stream; with tails, of these tokens only."""
        x_BND, pending = self.residual(x_BND, None, table, layout)
        return x_BND + total(pending)

    def residual(
        self,
        x_BND: jax.Array,
        pending: Pending | None,
        table: rope.Table | None,
        layout: TokenLayout,
    ) -> tuple[jax.Array, Pending]:
        """Return the residual stream and the pending update of the MLP.

        pending: the update of the block before, which this block's first norm adds.
        """
        x_BND, y_BND = self._first_norm(x_BND, pending)
        pending = self.attention(y_BND, table, layout)
        if layout.tails:
            x_BND = last_tokens(x_BND, layout.lengths, layout.tails)
        x_BND, y_BND = self.norm2.after(x_BND, pending, self.fused_norm)
        return x_BND, self.mlp.pending(y_BND)

    def with_past(
        self, stream: Stream, table: rope.Table | None, past: LayerPast
    ) -> tuple[Stream, Past]:
        """Return `residual` of these tokens, and the past with them.

        What is pending is left to the fused norm of the block after this one, if there is one. XLA
        lets cuBLAS add it to the stream, but not across the turns of a scan.
        """
        x_BND, y_BND = self._first_norm(*stream)
        pending, new = self.attention.with_past(y_BND, table, past)
        x_BND, y_BND = self.norm2.after(x_BND, pending, self.fused_norm)
        pending = self.mlp.pending(y_BND)
        return (x_BND, pending) if self.fused_norm else (x_BND + total(pending), None), new

    def _first_norm(self, x_BND: jax.Array, pending: Pending | None) -> tuple[jax.Array, jax.Array]:
        """Return the residual stream with the pending update, and its norm."""
        if pending is None:
            return x_BND, self.norm1(x_BND)
        return self.norm1.after(x_BND, pending, self.fused_norm)


def no_past(blocks: Block, batch: int) -> Past:
    """Return the past of the first frame: no tokens."""
    attention, (depth, width) = blocks.attention, blocks.norm1.scale.shape
    shape = depth, batch, 0, attention.heads, width // attention.heads
    return (jnp.zeros(shape, attention.qkv.dtype),) * 2


def run_with_past(
    blocks: Block, x_BND: jax.Array, table: rope.Table | None, past: Past
) -> tuple[jax.Array, Past]:
    """Run a stack over the tokens of one frame, which attend to the frames before it too.

    past: what the call for the frame before returned; `no_past` for the first. The outputs equal
    those of `run` with TokenLayout(frame=...), where each frame is computed once.
    """
    graphdef, params = nnx.split(blocks)

    def one(stream: Stream, params: nnx.State, past: LayerPast) -> tuple[Stream, Past]:
        x_BND, pending = stream
        return nnx.merge(graphdef, params).with_past((split_rows(x_BND), pending), table, past)

    # A scan carries arrays: zeros where the fused norm adds what is pending.
    nothing = (jnp.zeros_like(x_BND), jnp.zeros(x_BND.shape[-1])) if blocks.fused_norm else None
    stream: Stream = x_BND, nothing
    if blocks.compute.scans:
        stack = jax.lax.stop_gradient(past)

        def scanned(stream: Stream, layer: tuple[nnx.State, Past, jax.Array]) -> Any:
            params, own, number = layer
            return one(stream, params, LayerPast(own, stack, number))

        numbers = jnp.arange(_depth(blocks), dtype=jnp.int32)
        stream, past = jax.lax.scan(scanned, stream, (params, past, numbers))
    else:
        pasts = []
        for number in range(_depth(blocks)):
            layer, own = jax.tree.map(lambda leaf, i=number: leaf[i], (params, past))
            stream, new = one(stream, layer, LayerPast.alone(own))
            pasts.append(new)
        keys, values = zip(*pasts, strict=True)
        past = jnp.stack(keys), jnp.stack(values)
    x_BND, pending = stream
    return x_BND if pending is None else x_BND + total(pending), past


def run(
    blocks: Block, x_BND: jax.Array, table: rope.Table | None, layout: TokenLayout = WHOLE
) -> jax.Array:
    """Run a stack over its depth: scan one compiled block, or unroll all of them."""
    (x_BND,) = run_with_taps(blocks, x_BND, table, (_depth(blocks),), layout)
    return x_BND


def run_with_taps(
    blocks: Block,
    x_BND: jax.Array,
    table: rope.Table | None,
    taps: Sequence[int],
    layout: TokenLayout = WHOLE,
) -> list[jax.Array]:
    """Run a stack and return the residual stream after each of some layers.

    taps: numbers of these layers, counted from 1, rising. The stack ends with the last of them.
    """
    graphdef, params = nnx.split(blocks)
    compute, whole = blocks.compute, layout._replace(tails=())

    def one(layout: TokenLayout) -> Callable[[jax.Array, nnx.State], jax.Array]:
        def block(x_BND: jax.Array, params: nnx.State) -> jax.Array:
            return split_rows(nnx.merge(graphdef, params)(split_rows(x_BND), table, layout))

        if compute.remat == "none":
            return block
        # Inside a scan nothing can be merged with the forward pass, and the guard against it costs.
        return jax.checkpoint(block, policy=REMAT[compute.remat], prevent_cse=not compute.scans)

    block, last = one(whole), one(layout)
    leaves, structure = jax.tree.flatten(params)
    spans = list(pairwise((0, *taps)))
    outputs = []
    if compute.scans:
        for start, end in spans:
            apart = bool(layout.tails) and end == taps[-1]  # its last block has another layout
            scanned = _layers(params, slice(start, end - apart))
            x_BND, _ = jax.lax.scan(lambda x, layer: (block(x, layer), None), x_BND, scanned)
            if apart:
                x_BND = last(x_BND, _layers(params, end - 1))
            outputs.append(x_BND)
        return outputs
    # One split of each parameter: its gradient is one concatenation, not a sum of padded slices.
    slices = [[s[0] for s in jax.lax.split(leaf, (1,) * len(leaf))] for leaf in leaves]
    layers = [jax.tree.unflatten(structure, layer) for layer in zip(*slices, strict=True)]
    pending = None
    for start, end in spans:
        for number, layer in enumerate(layers[start:end], start + 1):
            final = number == taps[-1]
            if compute.remat != "none":
                x_BND = (last if final else block)(x_BND, layer)
                continue
            # Each block's update stays pending until the next one's norm, which adds it.
            x_BND, pending = nnx.merge(graphdef, layer).residual(
                split_rows(x_BND), pending, table, layout if final else whole
            )
        outputs.append(split_rows(x_BND if pending is None else x_BND + total(pending)))
    return outputs


def _layers(params: nnx.State, index: int | slice) -> nnx.State:
    return jax.tree.map(lambda leaf: leaf[index], params)


def _depth(blocks: Block) -> int:
    return blocks.mlp.fc1.kernel.shape[0]


def causal_flops(blocks: Block, frame: int, frames: int) -> int:
    """Count the operations of the products in one frame-causal pass over frames of `frame`."""
    depth, width, hidden = blocks.mlp.fc1.kernel.shape
    products = 2 * (4 * width * width + 2 * width * hidden) * frame * frames
    attention = 4 * width * frame * frame * frames * (frames + 1) // 2
    return depth * (products + attention)


def flops(blocks: Block, tokens: int, tail: int | None = None) -> int:
    """Count the operations of the products in one forward pass over one sequence.

    tail: tokens whose outputs the last block returns; None: all.
    """
    depth, width, hidden = blocks.mlp.fc1.kernel.shape

    def block(kept: int) -> int:
        products = 3 * width * width * tokens + (width * width + 2 * width * hidden) * kept
        return 2 * products + 4 * tokens * kept * width

    return (depth - 1) * block(tokens) + block(tokens if tail is None else tail)
