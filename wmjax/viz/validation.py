"""Draws features and predictions of a few held-out clips when a run is validated."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from wmjax import sharding
from wmjax.errors import UserError
from wmjax.evals import Context, Report, Unavailable
from wmjax.step import Steps, TrainState
from wmjax.types import Array, Term, TokenGrid, WorldModelInput
from wmjax.viz import draw
from wmjax.viz.features import fit_basis
from wmjax.viz.look import Look, hidden_by

CLIPS = 4  # clips that are encoded; the first is shown, the colour basis is fitted to all


class Pictures:
    """The evaluator that draws the first held-out clip, for TensorBoard and W&B."""

    def __init__(self, context: Context) -> None:
        if not context.shows:
            raise Unavailable("")  # neither TensorBoard nor W&B is on: skipped without a line
        try:
            draw.need()
        except UserError as error:
            raise Unavailable(str(error)) from error
        self.every = context.config["train"]["eval_every"]
        self._look = Looker(context.steps, context.masks.grid)
        self._open = context.open_batches

    def __call__(self, step: int, state: TrainState) -> Report:
        with contextlib.closing(self._open("validation", batches=1)) as batches:
            seen = self._look(state, next(batches))
        return Report({}, pictures=lambda: pictures(seen))


class Looker:
    """Computes features and predictions of a run's model for the first clips of a batch."""

    def __init__(self, steps: Steps, grid: TokenGrid) -> None:
        """Prepare a jitted function, compiled on first use. grid: tokens of a clip."""
        blueprint, mesh = steps.blueprint, steps.mesh
        where = jax.tree.map(lambda leaf: leaf.sharding, steps.abstract)

        def look(
            state: TrainState, batch: WorldModelInput
        ) -> tuple[WorldModelInput, Array, dict[str, Term]]:
            count = -(-CLIPS // mesh.size) * mesh.size  # the same number on every device
            few: WorldModelInput = jax.tree.map(lambda x: x[:count], batch)
            video = jnp.asarray(few.observation.video_BVTHWC)
            B, V = video.shape[:2]
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                model, target = blueprint.join(state.params, state.frozen, state.target)
                target_RND = model.target_features(target, video.reshape(B * V, *video.shape[2:]))
                terms = model.loss(target, few, jax.random.key(0)).terms
            features = target_RND.reshape(B, V, *target_RND.shape[1:])
            shown = jax.tree.map(lambda x: x[:CLIPS], (few, features))

            def of_first(term: Term) -> Term:  # a row is a view, or an instant with all its views
                rows = 0 if term.ids_RM is None else len(term.ids_RM)
                views = V if rows == V * count else 1
                return jax.tree.map(
                    lambda x: x[:views], dataclasses.replace(term, loss=jnp.zeros(1))
                )

            first = {name: of_first(term) for name, term in terms.items()}
            return *shown, first

        self._look = jax.jit(
            look,
            in_shardings=(where, sharding.batch_sharding(mesh)),
            out_shardings=sharding.replicated(mesh),
        )
        self._grid = grid

    def __call__(self, state: TrainState, batch: WorldModelInput) -> Look:
        """Return features and predictions of the first clips. A collective: all processes call."""
        few, features, terms = jax.device_get(self._look(state, batch))
        views = few.observation.view_mask_BV.argmax(axis=1)
        clips = np.arange(len(views))
        ids = zip(few.target.names, few.target.context_ids_BK, strict=True)
        context = {name: ids_BK[0] for name, ids_BK in ids}
        return Look(
            few.observation.video_BVTHWC[clips, views],
            features[clips, views],
            self._grid,
            hidden_by(terms, context, int(views[0])),
            [f"clip {sample}" for sample in few.sample_ids_B],
        )


def pictures(seen: Look) -> dict[str, np.ndarray]:
    """Return a picture for each loss term, uint8 RGB; {} if the model has diverged."""
    if not seen.finite:  # health.alarms reports it
        return {}
    figures = draw.overview(seen, fit_basis(seen.target_BND))
    return {name: draw.pixels(figure) for name, figure in figures.items()}
