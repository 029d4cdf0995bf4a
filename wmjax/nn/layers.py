"""Transformer parts: linear, attention, MLP, pre-norm block, and the run over depth.

Parameters are float32 and products run in the compute dtype; a LayerNorm computes and gives
float32, and the Linear after it casts down. A stack is one Block whose parameters carry a leading
depth axis, the same in checkpoints whether it is scanned or unrolled.

Logical axes at the parameters, for the sharding table to place:
    layers                  depth of a stack
    embed, predictor_embed  width of the residual stream of encoder and predictor
    heads                   heads times head dimension: outputs of qkv, inputs of proj
    mlp                     hidden width of the MLP
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from wmjax.errors import UserError
from wmjax.nn import rope
from wmjax.nn.attention import attend, choose_attention, split
from wmjax.nn.gelu import gelu
from wmjax.nn.kernels.devices import Lengths
from wmjax.nn.norm import EPS, Branch, LayerNorm, choose_norm, total

# What the backward pass recomputes; "dots" keeps the outputs of the products with parameters.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def split_rows(x: jax.Array) -> jax.Array:
    """Say that the first axis is split over the whole ambient mesh and nothing else is.

    Left to itself, XLA would take the splitting of the parameters over to the width of the
    activations, and exchange those in every product: many times what the parameters come to.
    Without an ambient mesh, x as it is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, jax.P(mesh.axis_names))


class Linear(nnx.Module):
    """y = x W + b; the shape of W may lead with a depth, which is gone when it is called."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        dtype: jnp.dtype,
        depth_scaled: bool = False,
    ):
        # The reference truncates at an absolute 2.0, a hundred standard deviations: a normal.
        kernel = 0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)
        if depth_scaled:  # blocks further up start with smaller branches
            layer = jnp.arange(1, shape[0] + 1, dtype=jnp.float32)[:, None, None]
            kernel = kernel / jnp.sqrt(2 * layer)
        self.kernel = nnx.Param(kernel, axes=axes)
        self.bias = nnx.Param(jnp.zeros((*shape[:-2], shape[-1])), axes=(*axes[:-2], axes[-1]))
        self.dtype = dtype

    def __call__(self, x_BNI: jax.Array) -> jax.Array:
        return total(self.branch(x_BNI))

    def branch(self, x_BNI: jax.Array) -> Branch:
        """Return x W and b apart."""
        return x_BNI.astype(self.dtype) @ self.kernel.astype(self.dtype), self.bias[...]


def ends(x_BN: jax.Array, lengths: Lengths, tails: Lengths) -> jax.Array:
    """Return as many tokens as the tails say from the end of each sequence."""
    parts = zip(split(x_BN, lengths), tails, strict=True)
    return jnp.concatenate([part[:, -tail:] for part, tail in parts], axis=1)


class Attention(nnx.Module):
    def __init__(
        self,
        rngs: nnx.Rngs,
        depth: int,
        width: int,
        heads: int,
        embed: str,
        dtype: jnp.dtype,
        attention: str,
    ):
        self.qkv = Linear(rngs, (depth, width, 3 * width), ("layers", embed, "heads"), dtype)
        self.proj = Linear(rngs, (depth, width, width), ("layers", "heads", embed), dtype, True)
        self.heads = heads
        self.implementation = choose_attention(attention, dtype, width // heads)

    def __call__(
        self,
        x_BND: jax.Array,
        table: rope.Table | None,
        lengths: Lengths = (),
        tails: Lengths = (),
    ) -> Branch:
        B, N, D = x_BND.shape
        qkv = self.qkv(x_BND).reshape(B, N, 3, self.heads, D // self.heads)
        query, key, value = (qkv[:, :, i] for i in range(3))
        query, key = rope.rotate(query, table), rope.rotate(key, table)
        lengths = lengths or (N,)
        if tails:
            query = ends(query, lengths, tails)
        y_BMHd = attend(query, key, value, tails or lengths, lengths, self.implementation)
        return self.proj.branch(y_BMHd.reshape(B, -1, D))


class MLP(nnx.Module):
    """depth: of the stack that it belongs to; None for one that is in none."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        depth: int | None,
        width: int,
        hidden: int,
        embed: str,
        dtype: jnp.dtype,
        gelu: str = "auto",
    ):
        stack, axes = ((), ()) if depth is None else ((depth,), ("layers",))
        self.fc1 = Linear(rngs, (*stack, width, hidden), (*axes, embed, "mlp"), dtype)
        self.fc2 = Linear(
            rngs, (*stack, hidden, width), (*axes, "mlp", embed), dtype, depth is not None
        )

        self.gelu = gelu

    def __call__(self, x_BND: jax.Array) -> jax.Array:
        return total(self.branch(x_BND))

    def branch(self, x_BND: jax.Array) -> Branch:
        return self.fc2.branch(gelu(self.fc1(x_BND), self.gelu))


class Block(nnx.Module):
    """`depth` pre-norm blocks in one, each parameter stacked; `run` calls it layer by layer."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        depth: int,
        width: int,
        heads: int,
        hidden: int,
        embed: str,
        dtype: jnp.dtype,
        attention: str,
        gelu: str = "auto",
        norm: str = "xla",
        eps: float = EPS,
    ):
        self.norm1 = LayerNorm((depth, width), ("layers", embed), eps)
        self.attention = Attention(rngs, depth, width, heads, embed, dtype, attention)
        self.norm2 = LayerNorm((depth, width), ("layers", embed), eps)
        self.mlp = MLP(rngs, depth, width, hidden, embed, dtype, gelu)
        self.fused_norm = choose_norm(norm, dtype) == "fused"

    def __call__(
        self,
        x_BND: jax.Array,
        table: rope.Table | None,
        lengths: Lengths = (),
        tails: Lengths = (),
    ) -> jax.Array:
        """Return the new x; tails: only of as many tokens at the end of each sequence."""
        x_BND, branch = self.branch(x_BND, None, table, lengths, tails)
        return x_BND + total(branch)

    def branch(
        self,
        x_BND: jax.Array,
        branch: Branch | None,
        table: rope.Table | None,
        lengths: Lengths = (),
        tails: Lengths = (),
    ) -> tuple[jax.Array, Branch]:
        """Return the residual stream and what is still to be added to it, as `branch` is to x."""
        if branch is None:
            y_BND = self.norm1(x_BND)
        else:
            x_BND, y_BND = self.norm1.after(x_BND, branch, self.fused_norm)
        branch = self.attention(y_BND, table, lengths, tails)
        if tails:
            x_BND = ends(x_BND, lengths, tails)
        x_BND, y_BND = self.norm2.after(x_BND, branch, self.fused_norm)
        return x_BND, self.mlp.branch(y_BND)


def run(
    blocks: Block,
    x_BND: jax.Array,
    table: rope.Table | None,
    scan: bool,
    remat: str,
    lengths: Lengths = (),
    tails: Lengths = (),
) -> jax.Array:
    """Run a stack over its depth: one compiled block scanned, or all of them unrolled.

    tails: of each sequence, how many tokens at its end are wanted; the last block leaves the others
    out.
    """
    graphdef, params = nnx.split(blocks)

    def one(tails: Lengths) -> Callable[[jax.Array, nnx.State], jax.Array]:
        def block(x_BND: jax.Array, params: nnx.State) -> jax.Array:
            return split_rows(nnx.merge(graphdef, params)(split_rows(x_BND), table, lengths, tails))

        if remat == "none":
            return block
        # Inside a scan nothing can be merged with the first pass anyway, and the guard costs.
        return jax.checkpoint(block, policy=REMAT[remat], prevent_cse=not scan)

    block, last = one(()), one(tails)
    leaves, structure = jax.tree.flatten(params)
    depth = len(leaves[0])
    if scan:
        scanned = jax.tree.map(lambda leaf: leaf[: depth - bool(tails)], params)
        x_BND, _ = jax.lax.scan(lambda x, layer: (block(x, layer), None), x_BND, scanned)
        return last(x_BND, jax.tree.map(lambda leaf: leaf[-1], params)) if tails else x_BND
    # One split a parameter: its gradient is one concatenation, not a sum over padded slices.
    slices = [[s[0] for s in jax.lax.split(leaf, (1,) * depth)] for leaf in leaves]
    layers = [jax.tree.unflatten(structure, layer) for layer in zip(*slices, strict=True)]
    if remat != "none":
        for layer in layers[:-1]:
            x_BND = block(x_BND, layer)
        return last(x_BND, layers[-1])
    branch = None  # of each block goes into the next one's norm
    for layer in layers:
        x_BND, branch = nnx.merge(graphdef, layer).branch(
            split_rows(x_BND), branch, table, lengths, tails if layer is layers[-1] else ()
        )
    return split_rows(x_BND if branch is None else x_BND + total(branch))


def check_remat(remat: str) -> None:
    if remat not in REMAT:
        raise UserError(f"model.remat={remat!r}: wanted one of {', '.join(REMAT)}")


def flops(blocks: Block, tokens: int, tail: int | None = None) -> int:
    """Count the operations of the products in one forward pass over one sequence.

    tail: of the tokens, those that the last block is to give.
    """
    depth, width, hidden = blocks.mlp.fc1.kernel.shape

    def block(kept: int) -> int:
        products = 3 * width * width * tokens + (width * width + 2 * width * hidden) * kept
        return 2 * products + 4 * tokens * kept * width

    return (depth - 1) * block(tokens) + block(tokens if tail is None else tail)
