"""Attentive probes: classify clips from frozen features, with many settings trained at once.

The protocol is that of facebookresearch/vjepa2 (evals/video_classification_frozen): one probe for
each learning rate and weight decay, AdamW that decays every parameter, no warm-up, a cosine
schedule to 0. The figure is the top-1 of the best probe. It is thus selected on the clips that it
is measured on; the table of all probes shows how much that matters. Unlike upstream, all probes
start from the same weights, so they differ by their settings only. The caller encodes the clips:

    probes = fit(batches, mesh, steps=9_000, seed=0, classes=174, heads=16, dtype=jnp.bfloat16)
    print(table(evaluate(probes, held_out_batches, mesh)))

Legend, besides that of types:
    G  probes of the grid, learning rates times weight decays      L  classes
"""

import functools
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from wmjax import optim, sharding
from wmjax.arrays import as_array
from wmjax.errors import UserError
from wmjax.models import base
from wmjax.models.classifier import AttentiveClassifier
from wmjax.nn.compute import Compute

RATES = (5e-3, 3e-3, 1e-3, 3e-4, 1e-4)
DECAYS = (0.01, 0.1, 0.4, 0.8)


class Probes(NamedTuple):
    """Probes trained side by side; parameters are stacked, settings are (rate, decay) of each."""

    graph: nnx.GraphDef
    params: base.Params
    settings: list[tuple[float, float]]

    def classifier(self, index: int) -> AttentiveClassifier:
        """Return the classifier of one probe."""
        return base.merge(self.graph, jax.tree.map(lambda leaf: leaf[index], self.params))


def fit(
    batches: Iterable[tuple[Any, Any]],
    mesh: Mesh,
    *,
    steps: int,
    seed: int,
    classes: int,
    rates: tuple[float, ...] = RATES,
    decays: tuple[float, ...] = DECAYS,
    dtype: str = "float32",
    **classifier: Any,
) -> Probes:
    """Train a probe for every rate and decay, on one batch a step.

    batches: (features BND, labels B), arrays or tensors. Labels count from 0; -1 marks a filler
    row. Batches of another shape compile the step again. dtype: of products, float32 or bfloat16.
    classifier: the other settings of AttentiveClassifier. Raises UserError if the batches end
    before `steps`, if a label is not below `classes`, and for arrays of other shapes, as pooled
    features and one-hot labels have.
    """
    stream = iter(batches)
    first = next(stream, None)
    classifier |= {"classes": classes, "compute": Compute(dtype=dtype)}
    if first is None:
        raise UserError(f"the probe's batches: found 0, wanted {steps}")
    begun = _placed(first, classes, None, mesh)
    width = begun[0].shape[-1]
    placed = itertools.chain([begun], (_placed(batch, classes, width, mesh) for batch in stream))
    settings = list(itertools.product(rates, decays))
    optimizer = optax.scale_by_adam()  # betas and epsilon as PyTorch has them by default
    shares = np.asarray(optim.cosine(1.0, 0.0, steps)(jnp.arange(steps)))

    def create() -> AttentiveClassifier:
        rngs = nnx.Rngs(jax.random.key(seed))
        return AttentiveClassifier(rngs, width=width, **classifier)

    graph = base.split(nnx.eval_shape(create))[0]

    def stack(params: base.Params) -> Any:
        one = params, optimizer.init(params)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (len(settings), *x.shape)), one)

    def update(
        state: Any,
        setting: jax.Array,
        share: jax.Array,
        features_BND: jax.Array,
        labels_B: jax.Array,
    ) -> Any:
        def loss(params: base.Params) -> jax.Array:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return cross_entropy(base.merge(graph, params)(features_BND), labels_B)

        (params, moments), (rate, decay) = state, setting
        grads, rate = jax.grad(loss)(params), share * rate
        with jax.numpy_dtype_promotion("standard"):  # Adam's decay ** count is float ** int
            moves, moments = optimizer.update(grads, moments)
        return jax.tree.map(lambda p, move: p - rate * (move + decay * p), params, moves), moments

    everywhere = sharding.replicated(mesh)
    step = jax.jit(
        jax.vmap(update, in_axes=(0, 0, None, None, None)),
        out_shardings=everywhere,
        donate_argnums=0,
    )
    params = jax.device_get(jax.jit(lambda: base.split(create())[1])())
    state = jax.jit(stack, out_shardings=everywhere)(params)
    settings_G = jax.device_put(np.asarray(settings, np.float32), everywhere)
    done = 0
    for share, (features_BND, labels_B) in zip(shares, placed, strict=False):
        state = step(state, settings_G, share, features_BND, labels_B)
        done += 1
    if done < steps:
        raise UserError(f"the probe's batches: found {done}, wanted {steps}")
    return Probes(graph, state[0], settings)


def evaluate(probes: Probes, batches: Iterable[tuple[Any, Any]], mesh: Mesh) -> dict[str, Any]:
    """Score every probe on all batches; the softmax is averaged over views.

    batches: (features BND or BVND, labels B as for fit). Returns top1, learning_rate and
    weight_decay of the best probe, its index as `best`, and the same three figures of every probe
    as `all`. Raises UserError if no row has a label.
    """
    right, count = [], 0
    for batch in batches:
        placed = _placed(batch, *_classes_and_width(probes.params), mesh, views=True)
        right.append(_count_right(probes.graph, mesh, probes.params, *placed))
        count += int(jnp.sum(placed[1] >= 0))
    if not count:
        raise UserError("the probe's held-out batches: found no labelled clip, wanted 1 or more")
    right_G = np.sum(jax.device_get(right), axis=0)
    rows = [
        {"top1": int(each) / count, "learning_rate": rate, "weight_decay": decay}
        for each, (rate, decay) in zip(right_G, probes.settings, strict=True)
    ]
    best = int(np.argmax(right_G))
    return {**rows[best], "best": best, "all": rows}


def cross_entropy(logits_BL: jax.Array, labels_B: jax.Array) -> jax.Array:
    """Return the mean cross entropy of the rows that have a label; 0 if none has."""
    valid_B = labels_B >= 0
    each_B = optax.softmax_cross_entropy_with_integer_labels(logits_BL, jnp.maximum(labels_B, 0))
    count = jnp.sum(valid_B, dtype=jnp.float32)
    return jnp.sum(jnp.where(valid_B, each_B, 0.0)) / jnp.maximum(count, 1.0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _count_right(
    graph: nnx.GraphDef,
    mesh: Mesh,
    params: base.Params,
    features: jax.Array,
    labels_B: jax.Array,
) -> jax.Array:
    """Count the rows that each probe classifies correctly, (G,); 0 for a probe that diverged."""
    B = len(features)
    rows = features.reshape(-1, *features.shape[-2:])

    def one(params: base.Params) -> jax.Array:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            logits = base.merge(graph, params)(rows)
        share_BVL = jax.nn.softmax(logits).reshape(B, len(rows) // B, -1)
        share_BL = jnp.mean(share_BVL, axis=1)
        right_B = (jnp.argmax(share_BL, axis=1) == labels_B) & jnp.isfinite(share_BL[:, 0])
        return jnp.sum(right_B, dtype=jnp.int32)

    return jax.lax.map(one, params)  # sequential, so that memory is needed for one probe only


def _classes_and_width(params: base.Params) -> tuple[int, int]:
    width, classes = params["head"]["kernel"].shape[-2:]
    return classes, width


def _placed(
    batch: tuple[Any, Any], classes: int, width: int | None, mesh: Mesh, *, views: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Split a batch over the devices; UserError unless it is features BND and labels B.

    width: of the features; None: any. views: features may be BVND too.
    """
    features = as_array("the probe's features", batch[0])
    labels = np.asarray(as_array("the probe's labels", batch[1]))
    if labels.ndim != 1 or not labels.size or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"the probe's labels: {labels.dtype} of shape {labels.shape}: wanted one integer a "
            "clip, (B,); of one-hot labels np.argmax(labels, -1)"
        )
    shape, ranks = features.shape, (3, 4) if views else (3,)
    if len(shape) not in ranks or shape[0] != len(labels) or width not in (None, shape[-1]):
        raise UserError(
            f"the probe's features: shape {shape}: wanted ({len(labels)}, tokens, "
            f"{width or 'width'}); of pooled features features[:, None]"
        )
    if labels.max() >= classes:
        raise UserError(f"the probe's labels: found {labels.max()}, wanted below classes={classes}")
    sharding.check_batch(mesh, len(labels))
    return jax.device_put((features, labels.astype(np.int32)), sharding.batch_sharding(mesh))


def table(scores: dict[str, Any]) -> str:
    """Format top-1 for the console: a line for each learning rate, a column for each decay."""
    top1 = {(row["learning_rate"], row["weight_decay"]): row["top1"] for row in scores["all"]}
    rates, decays = (list(dict.fromkeys(values)) for values in zip(*top1, strict=True))
    lines = ["top-1 in %, by weight decay   " + "".join(f"{decay:>8g}" for decay in decays)]
    for rate in rates:
        cells = "".join(f"{100 * top1[rate, decay]:8.2f}" for decay in decays)
        lines.append(f"  learning rate {rate:<14g}{cells}")
    return "\n".join(lines)
