"""The linear probe: ridge regression of known labels from frozen features, on held-out clips.

Features of the model, of random weights and raw pixels are compared by one rule. A sample is a
tubelet of a clip, and its numbers are centred. The ridge is chosen on the training split: each
episode is predicted by a line fitted to the other episodes. The figure is R2 on the validation
split. An angle that jumps by a full turn is fitted as its point on the circle.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wmjax import sharding
from wmjax.evals import Context, Report, Unavailable
from wmjax.models.base import Params, WorldModel
from wmjax.step import TrainState
from wmjax.types import Array, TokenGrid, WorldModelInput

CELLS = 4  # the coarse grid's rows and columns: features are averaged over each of its cells
RIDGES = 10.0 ** np.arange(-5, 6)  # in units of the mean eigenvalue of the samples' products
FEW = 5  # episodes; with fewer it is clips that are told by the others
TURNS = (2 * np.pi, 360.0)  # what an angle jumps by
TEST_SHARE = 0.5  # held-out clips, as a share of the training ones

Weights = tuple[Params, Params, Params]  # trained, frozen, target
Scores = dict[str, dict[str, Any]]  # label -> r2, the mean over its numbers; more: see `score`


class Probe:
    """The probe of one run, always on the same clips."""

    def __init__(self, context: Context) -> None:
        """Compile nothing yet."""
        sources, settings = context.sources, context.config["eval"]
        if not all(source.label_sizes for source in sources.values()):
            raise Unavailable("no label of eval.labels is in all of the data, in one size")
        self.every = settings["probe_every"]
        steps, seed = context.steps, context.config["seed"]  # random weights: as the run began
        blueprint, mesh, state = steps.blueprint, steps.mesh, steps.abstract
        weights = state.params, state.frozen, state.target
        shardings = jax.tree.map(lambda leaf: leaf.sharding, weights)
        everywhere = sharding.replicated(mesh)

        def random() -> Any:
            model = blueprint.create(nnx.Rngs(jax.random.key(seed)))
            return blueprint.divide(*blueprint.variables(model))

        def read(weights: Weights, batch: WorldModelInput) -> tuple[Array, Array, Array]:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                model, target = blueprint.join(*weights)
                features = pooled(model, target, batch, blueprint.grid)
            ids = jnp.stack([batch.dataset_ids_B, batch.sample_ids_B], axis=1)
            return features, scaled(batch, features.shape), ids

        self._random = jax.jit(random, out_shardings=shardings)
        self._read = jax.jit(
            read,
            in_shardings=(shardings, sharding.batch_sharding(mesh)),
            out_shardings=everywhere,
        )
        clips = settings["probe_clips"]
        self._clips = {"train": clips, "validation": max(1, round(TEST_SHARE * clips))}
        self._open = context.open_batches
        self._labels = {split: source.labels for split, source in sources.items()}
        self._baselines: dict[str, Scores] = {}

    def __call__(self, step: int, state: TrainState) -> Report:
        scores = self.scores(state)
        return Report(row(scores), table(scores), entry={"probe": scores})

    def scores(self, state: TrainState) -> dict[str, Scores]:
        """Return the table: {"trained", "random", "pixels"} -> label -> scores."""
        features: dict[str, dict[str, np.ndarray]] = {"trained": {}, "random": {}, "pixels": {}}
        models: dict[str, Weights] = {"trained": (state.params, state.frozen, state.target)}
        if not self._baselines:  # they do not change: computed once
            models["random"] = self._random()
        truth = {}
        for split in self._clips:
            for name, weights in models.items():
                features[name][split], pixels, ids = self.read(weights, split)
            features["pixels"][split] = pixels
            truth[split] = self._truth(split, ids, features["trained"][split].shape[1])
        if not self._baselines:
            self._baselines = {n: fit_all(features[n], truth) for n in ("random", "pixels")}
        return {"trained": fit_all(features["trained"], truth), **self._baselines}

    def read(self, weights: Weights, split: str) -> tuple[np.ndarray, ...]:
        """Return features, pixels (each clips x tubelets x numbers), dataset and sample ids."""
        parts: list[tuple[np.ndarray, ...]] = []
        clips = self._clips[split]
        batches: Iterator[WorldModelInput] = self._open(split)
        try:
            while sum(len(part[-1]) for part in parts) < clips:
                parts.append(jax.device_get(self._read(weights, next(batches))))
        finally:
            batches.close()  # type: ignore[attr-defined]
        return tuple(np.concatenate(columns)[:clips] for columns in zip(*parts, strict=True))

    def _truth(
        self, split: str, ids: np.ndarray, tubelets: int
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return the clips' episodes and labels (clips x tubelets x frames x numbers)."""
        asked = (self._labels[split](*pair) for pair in ids.tolist())
        episodes, labels = zip(*asked, strict=True)
        stacked = {name: np.stack([each[name] for each in labels]) for name in labels[0]}
        return np.array(episodes), {
            name: values.reshape(len(ids), tubelets, -1, values.shape[-1])
            for name, values in stacked.items()
        }


def pooled(model: WorldModel, target: Params, batch: WorldModelInput, grid: TokenGrid) -> jax.Array:
    """Return target features averaged over a coarse grid: (B, tubelets, V * cells * D), float32."""
    B, V, *clip = batch.observation.video_BVTHWC.shape
    video = jnp.asarray(batch.observation.video_BVTHWC).reshape(B * V, *clip)
    x = model.target_features(target, video).reshape(B, V, *grid, -1)
    x = x * batch.observation.view_mask_BV[:, :, None, None, None, None].astype(jnp.float32)
    x = jnp.einsum("bvtrcd,ir,jc->btvijd", x, _average(grid[1]), _average(grid[2]))
    return x.reshape(B, grid[0], -1)


def scaled(batch: WorldModelInput, like: tuple[int, ...]) -> jax.Array:
    """Return each tubelet's mean frame, scaled down to about as many numbers as `like` has."""
    B, V, T, H, W, C = batch.observation.video_BVTHWC.shape
    _, time, numbers = like
    shrink = min(1.0, (numbers / (V * H * W * C)) ** 0.5)
    height, width = max(1, round(shrink * H)), max(1, round(shrink * W))
    x = jnp.asarray(batch.observation.video_BVTHWC).reshape(B, V, time, T // time, H, W, C)
    x = jnp.mean(x.astype(jnp.float32) / 255, axis=3)
    x = jax.image.resize(x, (B, V, time, height, width, C), "linear")
    return jnp.moveaxis(x, 1, 2).reshape(B, time, -1)


def _average(size: int) -> jax.Array:
    """Return the matrix that averages `size` cells over CELLS ranges, as even as they can be."""
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

    features[split]: clips x tubelets x numbers. truth[split]: episode of each clip, and labels
    by name, clips x tubelets x frames x numbers, of which the tubelets' means are fitted.
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
    """Return the full turn of each number that is an angle, 0 of the others.

    values: clips x tubelets x frames x numbers. An angle stays within one turn, and there is a
    frame after which it has gone nearly all of it.
    """
    moved = values.reshape(len(values), -1, values.shape[-1])
    span = np.ptp(moved, axis=(0, 1))
    jump = np.abs(np.diff(moved, axis=1)).max(axis=(0, 1), initial=0)
    found = np.zeros(len(span))
    for turn in TURNS:
        found[(span < 1.001 * turn) & (jump > 0.75 * turn)] = turn
    return found


def columns(values: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Return samples x columns: the tubelets' means of each number, of an angle's cosine and sine.

    The cosines stand where the angles did, and the sines after all numbers.
    """
    angle = turn > 0
    phase = values[..., angle] * (2 * np.pi / turn[angle])
    straight = values.astype(np.float64)
    straight[..., angle] = np.cos(phase)
    both = np.concatenate([straight, np.sin(phase)], axis=-1)
    return both.mean(axis=2).reshape(-1, both.shape[-1])


class Lines:
    """Ridge regressions in x, samples x numbers, whatever its width: in the samples' own space."""

    def __init__(self, x: np.ndarray, groups: np.ndarray) -> None:
        """Do what takes long, once for all labels. groups: of the samples, told apart by number."""
        self._mean = x.mean(axis=0, dtype=np.float64)
        self._x = x - self._mean  # float64: the smallest ridges tell no more than float32 rounds
        gram = self._x @ self._x.T
        self._unit = np.trace(gram) / len(x) or 1.0
        values, self._vectors = np.linalg.eigh(gram / self._unit)
        self._values = np.maximum(values, 0)
        self._groups = [np.flatnonzero(groups == group) for group in np.unique(groups)]

    def held_out_errors(self, y: np.ndarray) -> np.ndarray:
        """Return mean squared errors, RIDGES x columns of y, of each group by all the others' line.

        No line is fitted again: what the whole one misses in a group tells what the others' would.
        """
        turned = self._vectors.T @ (y - y.mean(axis=0)).astype(np.float64)
        errors = np.zeros((len(RIDGES), y.shape[1]))
        for sum, ridge in zip(errors, RIDGES, strict=True):
            missing = ridge / (self._values + ridge)
            missed = self._vectors @ (missing[:, None] * turned)
            for group in self._groups:
                own = self._vectors[group]
                left = (own * missing) @ own.T - 1 / len(y)  # of the mean as well
                sum += (np.linalg.solve(left, missed[group]) ** 2).sum(axis=0)
        return errors / len(y)

    def turn(self, x_new: np.ndarray) -> np.ndarray:
        """Return other samples as `fit` takes them, for all labels."""
        return (x_new - self._mean) @ self._x.T @ self._vectors

    def fit(self, y: np.ndarray, ridges: np.ndarray, turned_new: np.ndarray) -> np.ndarray:
        """Return what the lines fitted to y's columns, with a ridge each, say of other samples."""
        mean = y.mean(axis=0)
        turned = self._vectors.T @ (y - mean).astype(np.float64)
        return turned_new @ (turned / (self._values[:, None] + ridges)) / self._unit + mean


def choose(errors: np.ndarray) -> np.ndarray:
    """Return the best of RIDGES for each column: of those that are alike, the largest."""
    as_good = errors <= (1 + 1e-4) * errors.min(axis=0)
    return np.where(as_good, RIDGES[:, None], 0).max(axis=0)


def score(
    fitted: np.ndarray, y_test: np.ndarray, varied: np.ndarray, angle: np.ndarray
) -> dict[str, Any]:
    """Return the figures of one label.

    fitted, y_test: columns(); varied: which columns did in training; angle: which numbers are
    angles. r2: mean over the numbers that vary; r2_each: null for those that do not; angles: their
    places.
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
    """Lay out R2 for the console: a line a source of features, a column a label."""
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
    """Return the table as one report's scalars: probe/LABEL/SOURCE."""
    return {
        f"probe/{label}/{name}": score["r2"]
        for name, by_label in scores.items()
        for label, score in by_label.items()
        if score["r2"] is not None
    }
