"""The action-conditioned predictor: features and actions of each frame -> features of the next.

As V-JEPA 2-AC (facebookresearch/vjepa2, src/models/ac_predictor.py): a frame is its action, its
state and its patches; a token attends to its own frame and to the frames before it. Ours takes
several cameras, and the datasets of a mixture have maps of their own. No mask is built.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from wmjax.nn import rope
from wmjax.nn.compute import Compute
from wmjax.nn.layers import (
    Block,
    Linear,
    Past,
    TokenLayout,
    causal_flops,
    no_past,
    run,
    run_with_past,
)
from wmjax.nn.norm import LayerNorm
from wmjax.types import Array

Conditions = tuple[Array, Array, Array]  # actions BT(PA), states BTS, dataset ids B


class PerDataset(nnx.Module):
    """A linear map for each dataset of a mixture."""

    def __init__(self, rngs: nnx.Rngs, datasets: int, inputs: int, outputs: int, dtype: jnp.dtype):
        shape = datasets, inputs, outputs
        kernel = 0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.kernel = nnx.Param(kernel, axes=(None, None, "predictor_embed"))
        self.bias = nnx.Param(jnp.zeros((datasets, outputs)), axes=(None, "predictor_embed"))
        self.dtype = dtype

    def __call__(self, x_BTI: Array, dataset_ids_B: Array) -> jax.Array:
        kernel_BIO = self.kernel[...][dataset_ids_B].astype(self.dtype)
        bias_BO = self.bias[...][dataset_ids_B].astype(self.dtype)
        return jnp.einsum("bti,bio->bto", x_BTI.astype(self.dtype), kernel_BIO) + bias_BO[:, None]


class ACPredictor(nnx.Module):
    """Features have shape BTVND here: N patches of each of V views of each of T frames.

    predicts_state: also predict the change of the state, from the state's token.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        encoder_width: int,
        width: int,
        depth: int,
        heads: int,
        rope_kind: str,
        views: int,
        datasets: int,
        action_size: int,
        state_size: int,
        predicts_state: bool,
        compute: Compute,
    ):
        rope.check(rope_kind, width, heads, "model.predictor_")
        dtype = compute.product_dtype
        self.embed = Linear(rngs, (encoder_width, width), ("embed", "predictor_embed"), dtype)
        self.action = PerDataset(rngs, datasets, action_size, width, dtype)
        self.state = PerDataset(rngs, datasets, state_size, width, dtype) if state_size else None
        several = jnp.zeros((datasets, width)) if datasets > 1 else None
        self.dataset = None if several is None else nnx.Param(several)
        of_views = jnp.zeros((views, width)) if views > 1 else None
        self.view = None if of_views is None else nnx.Param(of_views)
        self.blocks = Block(
            rngs,
            depth=depth,
            width=width,
            heads=heads,
            hidden=4 * width,
            embed="predictor_embed",
            compute=compute,
        )
        self.norm = LayerNorm((width,), ("predictor_embed",))
        self.proj = Linear(rngs, (width, encoder_width), ("predictor_embed", "embed"), dtype)
        changes = Linear(rngs, (width, state_size), (None, None), dtype) if predicts_state else None
        self.state_change = changes
        self.heads, self.rope_kind = heads, rope_kind

    @property
    def conditions(self) -> int:
        """Tokens of a frame before its patches."""
        return 1 if self.state is None else 2

    def __call__(
        self, x_BTVND: jax.Array, given: Conditions, grid: tuple[int, int]
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return the features after each frame, and the changes of the state, BTS.

        grid: rows and columns of patches. Features are in the compute dtype.
        """
        B, T, V, N, _ = x_BTVND.shape
        tokens_BTFD = self._tokens(x_BTVND, given)
        F, D = tokens_BTFD.shape[2:]
        table = self._table(jnp.arange(T), V, grid)
        y_BND = run(self.blocks, tokens_BTFD.reshape(B, T * F, D), table, TokenLayout(frame=F))
        return self._outputs(y_BND.reshape(B, T, F, D), V, N)

    def step(
        self,
        x_BVND: jax.Array,
        given: Conditions,
        grid: tuple[int, int],
        time: int | jax.Array,
        past: Past | None,
    ) -> tuple[jax.Array, jax.Array | None, Past]:
        """Return the features after one frame, the state's change BS, and the past with this frame.

        given: actions and states of this frame, B1. time: its number. past: of the frames before
        it; None: there are none.
        """
        B, V, N, _ = x_BVND.shape
        tokens_BFD = self._tokens(x_BVND[:, None], given)[:, 0]
        table = self._table(jnp.asarray(time)[None], V, grid)
        past = no_past(self.blocks, B) if past is None else past
        y_BFD, past = run_with_past(self.blocks, tokens_BFD, table, past)
        next_BTVND, change_BTS = self._outputs(y_BFD[:, None], V, N)
        return next_BTVND[:, 0], None if change_BTS is None else change_BTS[:, 0], past

    def _tokens(self, x_BTVND: jax.Array, given: Conditions) -> jax.Array:
        """Return the tokens of each frame: action, state, patches of each view, BTFD."""
        B, T, V, N, D = x_BTVND.shape
        action_BTA, state_BTS, ids_B = given
        patches = self.embed(x_BTVND.reshape(B, T * V * N, D)).reshape(B, T, V, N, -1)
        if self.view is not None:
            patches = patches + self.view[...].astype(patches.dtype)[None, None, :, None]
        conditions = [self.action(action_BTA, ids_B)]
        if self.state is not None:
            conditions.append(self.state(state_BTS, ids_B))
        if self.dataset is not None:
            own_BD = self.dataset[...][ids_B].astype(patches.dtype)
            conditions = [x_BTD + own_BD[:, None] for x_BTD in conditions]
        whole = [x_BTD[:, :, None] for x_BTD in conditions]
        return jnp.concatenate([*whole, patches.reshape(B, T, V * N, -1)], axis=2)

    def _table(self, times_T: jax.Array, views: int, grid: tuple[int, int]) -> rope.Table | None:
        """Return the rotations of the tokens: conditions by time alone, views at the same places.

        As Meta's code has it, rows and columns are not scaled: the grid is the one in training.
        """
        rows, columns = grid
        row_N, column_N = (
            jnp.concatenate([jnp.zeros(self.conditions), jnp.tile(x, views)])
            for x in (
                jnp.repeat(jnp.arange(rows, dtype=jnp.float32), columns),
                jnp.tile(jnp.arange(columns, dtype=jnp.float32), rows),
            )
        )
        T, F = len(times_T), len(row_N)
        time_N = jnp.repeat(times_T.astype(jnp.float32), F)
        where = time_N[None], jnp.tile(row_N, T)[None], jnp.tile(column_N, T)[None]
        return rope.table(where, self.norm.scale.shape[0] // self.heads, self.rope_kind)

    def _outputs(
        self, y_BTFD: jax.Array, views: int, patches: int
    ) -> tuple[jax.Array, jax.Array | None]:
        B, T, _, D = y_BTFD.shape
        own_BND = y_BTFD[:, :, self.conditions :].reshape(B, -1, D)
        features = self.proj(self.norm(own_BND)).reshape(B, T, views, patches, -1)
        if self.state_change is None:
            return features, None
        return features, self.state_change(self.norm(y_BTFD[:, :, 1])).astype(jnp.float32)

    def flops(self, frames: int, views: int, patches: int) -> int:
        """Count the operations of the products in one forward pass over a clip."""
        frame = self.conditions + views * patches
        inside = 4 * self.embed.kernel.size * frames * views * patches
        return causal_flops(self.blocks, frame, frames) + inside
