"""How well a model that acts foresees and plans, on a recording: no simulator is needed.

Held-out clips. The error of roll-outs by horizon is compared with the last frame copied, and with
the actions of another clip. The energy is the distance to the goal after one block; a good model
ranks the recorded block near the top. Plans are open-loop, toward the clip's own later frames.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wmjax import sharding
from wmjax.evals import Context, Report, Unavailable
from wmjax.evals.probe import Lines, choose, score
from wmjax.models.acting import ActingModel, Observation, observed, repeat, valid_frames
from wmjax.models.base import Params
from wmjax.planning import plan as planning
from wmjax.planning.search import Settings
from wmjax.run.console import say
from wmjax.step import TrainState
from wmjax.types import Array, WorldModelInput

HORIZON = 16  # blocks that are looked ahead, at most, also where training clips are shorter
SHOWN = (1, 2, 3, 4, 6, 8, 12, 16)  # of the horizons, on the console
CANDIDATES = 64  # recorded blocks that are ranked, at most
PLANNED = 16  # clips that are planned for, at most
LONGEST = 4  # blocks of a plan
BEST = 0.1  # share of the ranks that counts as the best
SEARCH = Settings(horizon=1, samples=64, iterations=5, elites=8, objective="min")
Sums = dict[str, tuple[jax.Array, jax.Array]]  # figure -> sum and count


class Acting:
    """The evaluator of models that act; `acting` in eval.evaluators."""

    def __init__(self, context: Context) -> None:
        """Prepare jitted functions, compiled on first use."""
        self.every = context.config["eval"]["probe_every"]
        steps = context.steps
        blueprint, mesh, state = steps.blueprint.scanned, steps.mesh, steps.abstract
        if not issubclass(blueprint.family, ActingModel):
            raise Unavailable
        weights = state.params, state.frozen, state.target
        shardings = jax.tree.map(lambda leaf: leaf.sharding, weights)
        everywhere = sharding.replicated(mesh)

        def jitted(measure: Callable[..., Any]) -> Callable[..., Any]:
            def call(weights: Any, batch: WorldModelInput) -> Any:
                with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                    return measure(*blueprint.join(*weights), batch)

            inputs = (shardings, sharding.batch_sharding(mesh))
            return jax.jit(call, in_shardings=inputs, out_shardings=everywhere)

        self._weights = steps.untrained
        self._transitions, self._foresight, self._plans = map(
            jitted, (transitions, foresight, plans)
        )
        self._open, self._batches = context.open_batches, context.config["eval"]["batches"]
        self._untrained: dict[str, float] = {}

    def __call__(self, step: int, state: TrainState) -> Report:
        say(f"acting: roll-outs and plans on {self._batches} batches ...")
        models = {"trained": (state.params, state.frozen, state.target)}
        if not self._untrained:  # computed once, because it does not depend on the state
            models["random"] = self._weights()
        found = self.figures(models)
        self._untrained = found.setdefault("random", self._untrained)
        return Report(row(found), table(found), entry={"acting": found})

    def figures(self, models: Mapping[str, Any]) -> dict[str, dict[str, float]]:
        """Return the figures of each model's weights by name; each clip is read once for all."""
        sums: dict[str, dict[str, np.ndarray]] = {name: {} for name in models}
        pairs: dict[str, dict[str, list[Any]]] = {
            name: {"train": [], "validation": []} for name in models
        }
        for split in ("train", "validation"):
            opened = self._open(split, frames=HORIZON + 1, batches=self._batches)
            with contextlib.closing(opened) as batches:
                for number in range(self._batches):
                    batch = next(batches)
                    for name, weights in models.items():
                        pairs[name][split].append(jax.device_get(self._transitions(weights, batch)))
                        if split == "validation":
                            self._add(sums[name], weights, batch, planned=not number)
        return {name: means(sums[name], pairs[name]) for name in models}

    def _add(
        self, sums: dict[str, np.ndarray], weights: Any, batch: WorldModelInput, *, planned: bool
    ) -> None:
        found = self._foresight(weights, batch)
        found |= self._plans(weights, batch) if planned else {}
        for name, pair in jax.device_get(found).items():
            sums[name] = sums.get(name, 0) + np.array(pair, np.float64)


def means(sums: Mapping[str, np.ndarray], pairs: Mapping[str, list[Any]]) -> dict[str, float]:
    """Return figures from sums and counts, and from the transitions of both splits."""
    found = {name: float(sum / max(count, 1)) for name, (sum, count) in sums.items()}
    found["inverse_r2"] = inverse_r2(pairs)
    found["fidelity"] = 1 - found.pop("frechet") / max(found.pop("frechet_still"), 1e-9)
    return found


def foresight(model: ActingModel, target: Params, batch: WorldModelInput) -> Sums:
    """Return sums and counts of errors by horizon, and of the recorded block's rank."""
    z_BTND = _frames(model, target, batch)
    B, T = z_BTND.shape[:2]
    blocks_BHA, known_BH = _blocks(model, batch)
    seen_BT = valid_frames(batch)
    start = model.observe(target, observed(batch, 1))
    twice = jnp.concatenate([blocks_BHA, jnp.roll(blocks_BHA, 1, axis=0)])
    both = planning.rollout(model, jax.tree.map(lambda x: jnp.concatenate([x, x]), start), twice)
    ahead, other = both[:B], both[B:]
    sums: Sums = {}
    for h in range(T - 1):
        for name, found in (
            ("error", ahead[:, h]),
            ("copy", z_BTND[:, 0]),
            ("shuffled", other[:, h]),
        ):
            apart_B = model.distance(found, z_BTND[:, h + 1])
            sums[f"{name}/{h + 1}"] = _summed(apart_B, seen_BT[:, h + 1])

    goal_BND = z_BTND[:, 1]
    count = min(B, CANDIDATES)
    tried = jnp.tile(blocks_BHA[:count, 0], (B, 1))
    imagined = model.embedding(model.imagine(repeat(start, count), tried))
    energy_BC = model.distance(imagined, repeat(goal_BND, count)).reshape(B, count)
    own_B = model.distance(ahead[:, 0], goal_BND)
    same_BC = jnp.all(blocks_BHA[:, 0][:, None] == blocks_BHA[None, :count, 0], axis=-1)
    below_BC = (energy_BC < own_B[:, None]) & ~same_BC
    rank_B = jnp.sum(below_BC, axis=1) / jnp.maximum(jnp.sum(~same_BC, axis=1), 1)
    return sums | {
        "rank": _summed(rank_B, known_BH[:, 0]),
        "in_best_tenth": _summed((rank_B <= BEST).astype(jnp.float32), known_BH[:, 0]),
    }


def plans(model: ActingModel, target: Params, batch: WorldModelInput) -> Sums:
    """Return sums and counts of how far plans are from the recorded blocks; PLANNED clips."""
    few = jax.tree.map(lambda x: x[:PLANNED], batch)
    z_BTND, (blocks_BHA, known_BH) = _frames(model, target, few), _blocks(model, few)
    start = model.observe(target, observed(few, 1))
    B, steps = len(z_BTND), min(blocks_BHA.shape[1], LONGEST)

    def planned(steps: int) -> jax.Array:
        settings = dataclasses.replace(SEARCH, horizon=steps)
        wanted = z_BTND[:, steps]

        def cost(action_BSHA: jax.Array) -> jax.Array:
            return planning.score(model, start, wanted, action_BSHA, settings)

        first = model.propose(start, wanted, steps)
        if first is None:
            first = jnp.zeros((B, steps, blocks_BHA.shape[-1]))
        keys_B = jax.random.split(jax.random.key(0), B)
        return planning.find(settings)(cost, first, keys_B, settings, None)[0]

    error_BA, true_BA = planned(1)[:, 0] - blocks_BHA[:, 0], blocks_BHA[:, 0]
    path_BHA = jnp.cumsum(planned(steps), axis=1)
    true_BHA, known_B = jnp.cumsum(blocks_BHA[:, :steps], axis=1), jnp.all(known_BH[:, :steps], 1)
    return {
        "action_error": _summed(jnp.mean(jnp.abs(error_BA), axis=-1), known_BH[:, 0]),
        "mean_action_error": _summed(jnp.mean(jnp.abs(true_BA), axis=-1), known_BH[:, 0]),
        "frechet": _summed(frechet(path_BHA, true_BHA), known_B),
        "frechet_still": _summed(frechet(jnp.zeros_like(true_BHA), true_BHA), known_B),
    }


def transitions(
    model: ActingModel, target: Params, batch: WorldModelInput
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return two neighbouring embeddings, the block between them, and whether it is known."""
    z_BTD = jnp.mean(_frames(model, target, batch), axis=2)
    blocks_BHA, known_BH = _blocks(model, batch)
    moves = jnp.concatenate([z_BTD[:, :-1], z_BTD[:, 1:]], axis=-1)
    D, A = moves.shape[-1], blocks_BHA.shape[-1]
    return moves.reshape(-1, D), blocks_BHA.reshape(-1, A), known_BH.reshape(-1)


def _blocks(model: ActingModel, batch: WorldModelInput) -> tuple[jax.Array, jax.Array]:
    """Return the blocks between frames, BHA, and which of them lead to a recorded frame, BH."""
    blocks_BTA, known_BT = model.taken(batch)
    return blocks_BTA[:, :-1], known_BT[:, :-1] & valid_frames(batch)[:, 1:]


def _summed(value_B: jax.Array, counts_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    counts_B = counts_B.astype(jnp.float32)
    return jnp.sum(value_B * counts_B), jnp.sum(counts_B)


def _frames(model: ActingModel, target: Params, batch: WorldModelInput) -> jax.Array:
    """Return the embedding of each frame by itself, BTND."""
    shown = observed(batch, batch.observation.video_BVTHWC.shape[2])
    B, V, T, *size = shown.video_BVTHWC.shape

    def rows(x_BT: Array) -> jax.Array:
        return jnp.asarray(x_BT).reshape(B * T, 1, *x_BT.shape[2:])

    video = jnp.moveaxis(jnp.asarray(shown.video_BVTHWC), 2, 1).reshape(B * T, V, 1, *size)
    no_actions = jnp.zeros((B * T, 0, *shown.action_BTPA.shape[2:]))
    ids = jnp.repeat(jnp.asarray(shown.dataset_ids_B), T)
    each = Observation(video, rows(shown.state_BTS), no_actions, ids)
    z_RND = model.embedding(model.observe(target, each))
    return z_RND.reshape(B, T, *z_RND.shape[1:])


def frechet(a_BHA: jax.Array, b_BHA: jax.Array) -> jax.Array:
    """Return the discrete Fréchet distance of two paths, B."""
    apart_BHH = jnp.linalg.norm(a_BHA[:, :, None] - b_BHA[:, None], axis=-1)
    H = apart_BHH.shape[1]
    table: dict[tuple[int, int], jax.Array] = {}
    for i in range(H):
        for j in range(H):
            before = [table[p] for p in ((i - 1, j), (i, j - 1), (i - 1, j - 1)) if p in table]
            least = jnp.min(jnp.stack(before), axis=0) if before else apart_BHH[:, 0, 0]
            table[i, j] = jnp.maximum(least, apart_BHH[:, i, j])
    return table[H - 1, H - 1]


def inverse_r2(pairs: Mapping[str, list[Any]]) -> float:
    """Fit the block from two neighbouring embeddings on train; return R2 on validation.

    NaN where no number of the actions varies.
    """
    data = {}
    for split, parts in pairs.items():
        moves, blocks, known = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        data[split] = moves[known][:2048], blocks[known][:2048]
    (x, y), (x_test, y_test) = data["train"], data["validation"]
    if len(x) < 20 or not len(x_test):
        return float("nan")
    lines = Lines(x, np.arange(len(x)) * 10 // len(x))
    fitted = lines.fit(y, choose(lines.held_out_errors(y)), lines.turn(x_test))
    found = score(fitted, y_test, y.std(axis=0) > 0, np.zeros(y.shape[1], bool))["r2"]
    return float("nan") if found is None else found


def row(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return figures for a report: acting/NAME, and acting/NAME/random of untrained weights.

    What cannot be measured, such as R2 of an action that never varies, is left out.
    """
    trained = {f"acting/{name}": value for name, value in found["trained"].items()}
    random = {f"acting/{name}/random": value for name, value in found["random"].items()}
    return {name: value for name, value in (trained | random).items() if np.isfinite(value)}


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Format the figures for the console, untrained weights beside them."""
    trained = found["trained"]
    horizons = [h for h in SHOWN if f"error/{h}" in trained]
    lines = ["error by horizon in blocks, relative to the last frame copied (1)"]
    lines.append("  blocks     " + "".join(f"{h:7}" for h in horizons))
    for label, who, name in (
        ("trained", "trained", "error"),
        ("other actions", "trained", "shuffled"),
        ("untrained", "random", "error"),
    ):
        figures = found[who]
        cells = [figures[f"{name}/{h}"] / max(figures[f"copy/{h}"], 1e-12) for h in horizons]
        digits = (0 if cell >= 100 else 2 for cell in cells)
        texts = [f"{min(cell, 99999):7.{n}f}" for cell, n in zip(cells, digits, strict=True)]
        lines.append(f"  {label:11}" + "".join(texts))
    for name, text in (
        ("rank", "recorded action's rank among others (0 best, 0.5 chance)"),
        ("in_best_tenth", "recorded action in the best tenth"),
        ("action_error", "error of a planned block, in std"),
        ("mean_action_error", "the same of the mean action"),
        ("fidelity", "fidelity of open-loop plans (1 best, 0 as no motion)"),
        ("inverse_r2", "R2 of the action from two frames"),
    ):
        lines.append(f"{text:57} {trained[name]:6.3f}   untrained {found['random'][name]:6.3f}")
    return "\n".join(lines)
