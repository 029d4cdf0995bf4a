"""The same pictures of a run at its validation: what it makes of a few held-out clips."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from wmjax import sharding
from wmjax.masking import Masks
from wmjax.models import base
from wmjax.types import Array, WorldModelInput
from wmjax.viz import draw
from wmjax.viz.features import fit_basis
from wmjax.viz.look import Hidden, Look

CLIPS = 4  # of a batch: one is shown, the basis of colours is of all


class Pictures:
    """Pictures of one run: `look` at some clips, then `draw` what was seen."""

    def __init__(
        self, model: dict[str, Any], params: Any, target: Any, mesh: Mesh, masks: Masks
    ) -> None:
        """Compile nothing yet.

        model: as step.build takes it; params, target: abstract, with their shardings.
        """
        shapes = base.abstract(**model)
        graph = base.split(shapes)[0]
        where = jax.tree.map(lambda leaf: leaf.sharding, (params, target))

        def look(
            params: Any, target: Any, batch: WorldModelInput
        ) -> tuple[WorldModelInput, Array, list[Array]]:
            count = -(-CLIPS // mesh.size) * mesh.size  # as many on every device
            few: WorldModelInput = jax.tree.map(lambda x: x[:count], batch)
            video = jnp.asarray(few.observation.video_BVTHWC)
            B, V = video.shape[:2]
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                target_RND = shapes.target_features(target, video.reshape(B * V, *video.shape[2:]))
                _, output = base.merge(graph, params).loss(target, few, jax.random.key(0))
            features = target_RND.reshape(B, V, *target_RND.shape[1:])
            shown = jax.tree.map(lambda x: x[:CLIPS], (few, features))
            return *shown, [z_RMD[:V] for z_RMD in output.prediction_BVMD]

        self._look = jax.jit(
            look,
            in_shardings=(*where, sharding.batch_sharding(mesh)),
            out_shardings=sharding.replicated(mesh),
        )
        self._masks = masks

    def look(self, params: Any, target: Any, batch: WorldModelInput) -> Look:
        """Look at the first clips of a batch; every process has to."""
        few, features, predictions = jax.device_get(self._look(params, target, batch))
        views = few.observation.view_mask_BV.argmax(axis=1)
        clips = np.arange(len(views))
        masked = zip(few.target.context_ids_BK, few.target.target_ids_BM, predictions, strict=True)
        return Look(
            few.observation.video_BVTHWC[clips, views],
            features[clips, views],
            self._masks.grid,
            {
                name: Hidden(context_BK[0], target_BM[0], z_VMD[views[0]])
                for name, (context_BK, target_BM, z_VMD) in zip(
                    self._masks.sizes, masked, strict=True
                )
            },
            [f"clip {sample}" for sample in few.sample_ids_B],
        )

    @staticmethod
    def draw(seen: Look) -> dict[str, np.ndarray]:
        """Return a picture of each mask, uint8 RGB; none of a model that has diverged.

        Its loss says that it has.
        """
        if not seen.finite:
            return {}
        figures = draw.overview(seen, fit_basis(seen.target_BND))
        return {name: draw.pixels(figure) for name, figure in figures.items()}
