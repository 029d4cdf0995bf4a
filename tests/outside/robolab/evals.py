"""An evaluator: how large the parameters are."""

import jax
import jax.numpy as jnp

from wmjax.evals import Report


class Size:
    def __init__(self, context):
        self.every = context.config["train"]["eval_every"]

    def __call__(self, step, state):
        largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(state.params))
        return Report({"robolab/largest": largest}, text=f"largest parameter {largest:.3f}")
