"""The linear probe: ridge regression from frozen features to recorded labels.

Features of the model, features of random weights and raw pixels are compared by the same protocol.
A sample is a tubelet of a clip; features are centred. The ridge is selected by cross-validation
over the episodes of the training split. The figure is R2 on the validation split. An angle that
wraps around by a full turn is fitted as cosine and sine.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wmjax import sharding
from wmjax.evals import Context, Report, Unavailable
from wmjax.models.base import Params, WorldModel
from wmjax.run.console import say
from wmjax.step import TrainState
from wmjax.types import Array, TokenGrid, WorldModelInput

CELLS = 4  # rows and columns of the coarse grid over whose cells features are averaged
RIDGES = 10.0 ** np.arange(-5, 6)  # in units of the mean eigenvalue of the Gram matrix
FEW = 5  # episodes; with fewer, cross-validation leaves out clips in place of episodes
TURNS = (2 * np.pi, 360.0)  # a full turn, in radians and degrees
TEST_SHARE = 0.5  # validation clips for each training clip

Weights = tuple[Params, Params, Params]  # trained, frozen, target
Scores = dict[str, dict[str, Any]]  # label -> figures, as `score` returns them


class Probe:
    """The evaluator that fits linear probes, always on the same clips."""

    def __init__(self, context: Context) -> None:
        """Prepare jitted functions, compiled on first use."""
        sources, settings = context.sources, context.config["eval"]
        self.every = settings["probe_every"]
        if not all(source.label_sizes for source in sources.values()):
            text = "no label of eval.labels is in all of the data, in one size"
            raise Unavailable(text if self.every else "")
        steps = context.steps
        blueprint, mesh, state = steps.blueprint.scanned, steps.mesh, steps.abstract
        weights = state.params, state.frozen, state.target
        shardings = jax.tree.map(lambda leaf: leaf.sharding, weights)
        everywhere = sharding.replicated(mesh)

        def read(weights: Weights, batch: WorldModelInput) -> tuple[Array, Array, Array]:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                model, target = blueprint.join(*weights)
                features = pooled(model, target, batch, blueprint.grid)
            ids = jnp.stack([batch.dataset_ids_B, batch.sample_ids_B], axis=1)
            return features, scaled(batch, features.shape), ids

        self._untrained = steps.untrained
        self._read = jax.jit(
            read,
            in_shardings=(shardings, sharding.batch_sharding(mesh)),
            out_shardings=everywhere,
        )
        clips, self._batch_size = settings["probe_clips"], context.config["data"]["batch_size"]
        self._clips = {"train": clips, "validation": max(1, round(TEST_SHARE * clips))}
        self._open = context.open_batches
        self._labels = {split: source.labels for split, source in sources.items()}
        self._baselines: dict[str, Scores] = {}

    def __call__(self, step: int, state: TrainState) -> Report:
        say(f"linear probe: reading and encoding {self._clips['train']} clips ...")
        scores = self.scores(state)
        return Report(row(scores), table(scores), entry={"probe": scores})

    def scores(self, state: TrainState) -> dict[str, Scores]:
        """Return {"trained", "random", "pixels"} -> label -> figures."""
        features: dict[str, dict[str, np.ndarray]] = {"trained": {}, "random": {}, "pixels": {}}
        models: dict[str, Weights] = {"trained": (state.params, state.frozen, state.target)}
        if not self._baselines:  # computed once, because they do not depend on the state
            models["random"] = self._untrained()
        truth = {}
        for split in self._clips:
            found, pixels, ids = self.read(models, split)
            for name, values in (found | {"pixels": pixels}).items():
                features[name][split] = values
            truth[split] = self._truth(split, ids, pixels.shape[1])
        if not self._baselines:
            self._baselines = {n: fit_all(features[n], truth) for n in ("random", "pixels")}
        return {"trained": fit_all(features["trained"], truth), **self._baselines}

    def read(
        self, models: Mapping[str, Weights], split: str
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Return features by name of the weights, pixels, and (dataset, sample) ids.

        Features and pixels: clips x tubelets x numbers. Each clip is read once for all weights.
        """
        parts: dict[str, list[tuple[np.ndarray, ...]]] = {name: [] for name in models}
        clips = self._clips[split]
        count = -(-clips // self._batch_size)
        with contextlib.closing(self._open(split, batches=count)) as batches:
            for _ in range(count):
                batch = next(batches)
                for name, weights in models.items():
                    parts[name].append(jax.device_get(self._read(weights, batch)))
        found = {}
        for name, read in parts.items():
            columns = zip(*read, strict=True)
            found[name], pixels, ids = (np.concatenate(column)[:clips] for column in columns)
        return found, pixels, ids

    def _truth(
        self, split: str, ids: np.ndarray, tubelets: int
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return episodes and labels of the clips, clips x tubelets x frames x numbers."""
        asked = (self._labels[split](*pair) for pair in ids.tolist())
        episodes, labels = zip(*asked, strict=True)
        stacked = {name: np.stack([each[name] for each in labels]) for name in labels[0]}
        return np.array(episodes), {
            name: values.reshape(len(ids), tubelets, -1, values.shape[-1])
            for name, values in stacked.items()
        }


def pooled(model: WorldModel, target: Params, batch: WorldModelInput, grid: TokenGrid) -> jax.Array:
    """Average target features over a coarse grid: (B, tubelets, V * cells * D), float32."""
    B, V, *clip = batch.observation.video_BVTHWC.shape
    video = jnp.asarray(batch.observation.video_BVTHWC).reshape(B * V, *clip)
    x = model.target_features(target, video).reshape(B, V, *grid, -1)
    x = x * batch.observation.view_mask_BV[:, :, None, None, None, None].astype(jnp.float32)
    x = jnp.einsum("bvtrcd,ir,jc->btvijd", x, _average(grid[1]), _average(grid[2]))
    return x.reshape(B, grid[0], -1)


def scaled(batch: WorldModelInput, like: tuple[int, ...]) -> jax.Array:
    """Return the mean frame of each tubelet, scaled down to about as many numbers as features.

    like: shape of the features, (B, tubelets, numbers).
    """
    B, V, T, H, W, C = batch.observation.video_BVTHWC.shape
    _, time, numbers = like
    shrink = min(1.0, (numbers / (V * H * W * C)) ** 0.5)
    height, width = max(1, round(shrink * H)), max(1, round(shrink * W))
    x = jnp.asarray(batch.observation.video_BVTHWC).reshape(B, V, time, T // time, H, W, C)
    x = jnp.mean(x.astype(jnp.float32) / 255, axis=3)
    x = jax.image.resize(x, (B, V, time, height, width, C), "linear")
    return jnp.moveaxis(x, 1, 2).reshape(B, time, -1)


def _average(size: int) -> jax.Array:
    """Return the matrix that averages `size` cells into at most CELLS ranges of similar length."""
    cells = min(CELLS, size)
    first = np.arange(cells) * size // cells
    last = -(-(np.arange(cells) + 1) * size // cells)
    at = np.arange(size)
    inside = (at >= first[:, None]) & (at < last[:, None])
    return jnp.asarray(inside / inside.sum(axis=1, keepdims=True), jnp.float32)


def fit_all(
    features: Mapping[str, np.ndarray],
    truth: Mapping[str, tuple[np.ndarray, Mapping[str, np.ndarray]]],
) -> Scores:
    """Fit every label on the training split and score it on the validation split.

    features[split]: clips x tubelets x numbers. truth[split]: episode of each clip, and labels by
    name, clips x tubelets x frames x numbers. The mean label of each tubelet is fitted.
    """
    tubelets = features["train"].shape[1]
    episodes, labels = truth["train"]
    if len(np.unique(episodes)) < FEW:
        episodes = np.arange(len(episodes))
    x, x_test = (features[split].reshape(-1, features[split].shape[-1]) for split in truth)
    lines = Lines(x, np.repeat(episodes, tubelets))
    turned_test = lines.turn(x_test)
    scores = {}
    for name, values in labels.items():
        turn = turns(values)
        y, y_test = (columns(split[1][name], turn) for split in truth.values())
        best = choose(lines.held_out_errors(y))
        scores[name] = score(lines.fit(y, best, turned_test), y_test, y.std(axis=0) > 0, turn > 0)
        scores[name]["ridge_each"] = best.tolist()
    return scores


def turns(values: np.ndarray) -> np.ndarray:
    """Return the full turn of each number that is an angle, and 0 for the others.

    values: clips x tubelets x frames x numbers. A number is an angle if its range is at most one
    turn and it changes by more than 3/4 of a turn between two frames.
    """
    moved = values.reshape(len(values), -1, values.shape[-1])
    span = np.ptp(moved, axis=(0, 1))
    jump = np.abs(np.diff(moved, axis=1)).max(axis=(0, 1), initial=0)
    found = np.zeros(len(span))
    for turn in TURNS:
        found[(span < 1.001 * turn) & (jump > 0.75 * turn)] = turn
    return found


def columns(values: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Return tubelet means as samples x columns, with angles as cosine and sine.

    Cosines take the columns of the angles; sines follow after all numbers.
    """
    angle = turn > 0
    phase = values[..., angle] * (2 * np.pi / turn[angle])
    straight = values.astype(np.float64)
    straight[..., angle] = np.cos(phase)
    both = np.concatenate([straight, np.sin(phase)], axis=-1)
    return both.mean(axis=2).reshape(-1, both.shape[-1])


class Lines:
    """Ridge regressions from x, solved in the dual: the cost hardly depends on the width of x."""

    def __init__(self, x: np.ndarray, groups: np.ndarray) -> None:
        """Decompose the Gram matrix, once for all labels.

        x: samples x numbers. groups: the group of each sample, for leave-one-group-out errors.
        """
        self._mean = x.mean(axis=0, dtype=np.float64)
        self._x = x - self._mean  # float64, because the smallest ridges are below float32 rounding
        gram = self._x @ self._x.T
        self._unit = np.trace(gram) / len(x) or 1.0
        values, self._vectors = np.linalg.eigh(gram / self._unit)
        self._values = np.maximum(values, 0)
        self._groups = [np.flatnonzero(groups == group) for group in np.unique(groups)]

    def held_out_errors(self, y: np.ndarray) -> np.ndarray:
        """Return leave-one-group-out mean squared errors, RIDGES x columns of y.

        Nothing is fitted again: the held-out residuals of a group follow from the residuals of the
        full fit and the group's block of the hat matrix.
        """
        turned = self._vectors.T @ (y - y.mean(axis=0)).astype(np.float64)
        errors = np.zeros((len(RIDGES), y.shape[1]))
        for sum, ridge in zip(errors, RIDGES, strict=True):
            missing = ridge / (self._values + ridge)
            missed = self._vectors @ (missing[:, None] * turned)
            for group in self._groups:
                own = self._vectors[group]
                left = (own * missing) @ own.T - 1 / len(y)  # 1 / len(y) leaves the mean out too
                sum += (np.linalg.solve(left, missed[group]) ** 2).sum(axis=0)
        return errors / len(y)

    def turn(self, x_new: np.ndarray) -> np.ndarray:
        """Project new samples into the form that `fit` takes, once for all labels."""
        return (x_new - self._mean) @ self._x.T @ self._vectors

    def fit(self, y: np.ndarray, ridges: np.ndarray, turned_new: np.ndarray) -> np.ndarray:
        """Fit each column of y with its own ridge, and return predictions for new samples.

        turned_new: new samples, as `turn` returns them.
        """
        mean = y.mean(axis=0)
        turned = self._vectors.T @ (y - mean).astype(np.float64)
        return turned_new @ (turned / (self._values[:, None] + ridges)) / self._unit + mean


def choose(errors: np.ndarray) -> np.ndarray:
    """Return the best of RIDGES for each column; the largest of those within 1e-4 of the best."""
    as_good = errors <= (1 + 1e-4) * errors.min(axis=0)
    return np.where(as_good, RIDGES[:, None], 0).max(axis=0)


def score(
    fitted: np.ndarray, y_test: np.ndarray, varied: np.ndarray, angle: np.ndarray
) -> dict[str, Any]:
    """Return the figures of one label: r2, r2_each and angles.

    fitted, y_test: samples x columns, as `columns` returns them. varied: which columns vary in the
    training split. angle: which numbers are angles. r2: mean over the numbers that vary; None if
    none does. r2_each: None for a number that does not vary. angles: indices of the angles.
    """
    missed = ((fitted - y_test) ** 2).mean(axis=0)
    spread = ((y_test - y_test.mean(axis=0)) ** 2).mean(axis=0)
    varies = (spread > 1e-10 * (1e-10 + y_test**2).mean(axis=0)) & varied
    number = np.concatenate([np.arange(len(angle)), np.flatnonzero(angle)])  # of each column
    missed, spread, varies = (np.bincount(number, values) for values in (missed, spread, varies))
    each = [float(1 - m / s) if v else None for m, s, v in zip(missed, spread, varies, strict=True)]
    known = [value for value in each if value is not None]
    return {
        "r2": float(np.mean(known)) if known else None,
        "r2_each": each,
        "angles": np.flatnonzero(angle).tolist(),
    }


def table(scores: Mapping[str, Scores]) -> str:
    """Format R2 for the console: a line for each kind of features, a column for each label."""
    labels = list(next(iter(scores.values())))
    wide = [max(len(label), 6) for label in labels]
    lines = ["R2 on held-out clips  " + "  ".join(labels)]
    for name, by_label in scores.items():
        values = [by_label[label]["r2"] for label in labels]
        shown = ["const." if value is None else f"{value:.3f}" for value in values]
        cells = (f"{text:>{size}}" for text, size in zip(shown, wide, strict=True))
        lines.append(f"  {name:20}" + "  ".join(cells))
    return "\n".join(lines)


def row(scores: Mapping[str, Scores]) -> dict[str, float]:
    """Return R2 as scalars for a report: probe/LABEL/KIND, KIND being trained, random or pixels."""
    return {
        f"probe/{label}/{name}": score["r2"]
        for name, by_label in scores.items()
        for label, score in by_label.items()
        if score["r2"] is not None
    }
