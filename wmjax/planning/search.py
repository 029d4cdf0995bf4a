"""Search over action sequences: CEM, iCEM, MPPI and gradient descent, under jit.

A search takes cost(actions BSHA) -> BS, a first mean BHA, a PRNG key for each row, and settings. It
returns the plan BHA and its cost B. Rows are independent: each draws from its own key, so a plan
does not depend on its neighbours in the batch. Actions are the model's: normalised blocks.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wmjax.errors import UserError, check_above, check_choice, check_least, check_share, suggest
from wmjax.plugins import ANY, resolve

Cost = Callable[[jax.Array], jax.Array]  # actions BSHA -> BS
Bounds = tuple[jax.Array, jax.Array] | None  # lowest and highest action, (B, A)
Search = Callable[..., tuple[jax.Array, jax.Array]]

SEARCHES = {name: f"wmjax.planning.search:{name}" for name in ("cem", "icem", "mppi", "gradient")}
OBJECTIVES = ("last", "sum", "min")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to plan. Defaults: LeWM's CEM.

    search: cem, icem, mppi, gradient, or package.module:function. horizon: blocks of a plan.
    samples: sequences in an iteration. iterations: how often they are drawn; gradient: steps.
    elites: best samples that give the next mean and std. std: first standard deviation, in the
    model's units. momentum: share of the old mean and std that is kept.
    objective: of the distances to the goal along the horizon: the last, their sum, or the smallest
    (min). control: weight of the mean square of the actions, added to it.
    head: True starts each plan from that of the model's action head, where it has one.
    warm_start: True starts a replan from the rest of the plan before, where no head gives one.
    replan: blocks that are executed before the next plan; 0: all.
    chunk: samples that are imagined at once; 0: all. Smaller needs less memory.
    temperature: of MPPI's weights. colour: exponent of iCEM's noise; 0 is white. kept: elites that
    iCEM keeps for the next iteration. rate: of gradient's Adam.
    """

    search: str = "cem"
    horizon: int = 5
    samples: int = 300
    iterations: int = 30
    elites: int = 30
    std: float = 1.0
    momentum: float = 0.0
    objective: str = "last"
    control: float = 0.0
    head: bool = True
    warm_start: bool = True
    replan: int = 0
    chunk: int = 0
    temperature: float = 1.0
    colour: float = 2.0
    kept: int = 5
    rate: float = 0.1

    def __post_init__(self) -> None:
        if ":" not in self.search:
            check_choice("plan.search", self.search, list(SEARCHES))
        check_choice("plan.objective", self.objective, OBJECTIVES)
        for key in ("horizon", "samples", "iterations", "elites", "std", "temperature", "rate"):
            check_above(f"plan.{key}", getattr(self, key))
        for key in ("control", "replan", "chunk", "colour", "kept"):
            check_least(f"plan.{key}", getattr(self, key))
        check_share("plan.momentum", self.momentum)
        if self.elites > self.samples:
            raise UserError(
                f"plan.elites={self.elites}: wanted at most plan.samples={self.samples}"
            )
        if self.replan > self.horizon:
            raise UserError(
                f"plan.replan={self.replan}: wanted at most plan.horizon={self.horizon}"
            )
        if self.chunk and self.samples % self.chunk:
            raise UserError(
                f"plan.chunk={self.chunk}: wanted a divisor of plan.samples={self.samples}"
            )


PRESETS: dict[str, dict[str, Any]] = {
    # LeWM's protocol; LeWM++'s short search; V-JEPA 2-AC's; and one for a fast reply.
    "lewm": {},
    "short": {"horizon": 2, "iterations": 5, "objective": "min", "replan": 1},
    "vjepa2_ac": {"horizon": 1, "samples": 800, "iterations": 10, "elites": 10, "momentum": 0.15},
    "fast": {"horizon": 1, "samples": 128, "iterations": 6, "elites": 16, "momentum": 0.15},
}


def parse(text: str) -> Settings:
    """Return settings from a preset's name and keys after commas, as in "fast,horizon=2"."""
    name, *pairs = [part.strip() for part in text.split(",")]
    if "=" in name:
        name, pairs = "lewm", [name, *pairs]
    if name not in PRESETS:
        near = suggest(name, list(PRESETS))
        raise UserError(f"plan={name!r}: unknown{near}; there are: {', '.join(PRESETS)}")
    texts = {key: value for key, _, value in (pair.partition("=") for pair in pairs)}
    _check_keys(texts)
    defaults = vars(Settings())
    changed = {key: _value(key, text, type(defaults[key])) for key, text in texts.items()}
    return Settings(**PRESETS[name] | changed)


def of_keys(keys: Mapping[str, Any]) -> Settings:
    """Return settings from keys that differ from the defaults."""
    _check_keys(keys)
    return Settings(**keys)


def _check_keys(keys: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(Settings)]
    for key in keys:
        if key not in known:
            raise UserError(f"plan.{key}: no such key{suggest(key, known)}")


def _value(key: str, text: str, kind: type) -> Any:
    """Read a value of a key's type."""
    if kind is bool:
        check_choice(f"plan.{key}", text.lower(), ("true", "false"))
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"plan.{key}={text!r}: wanted {kind.__name__}") from None


def find(settings: Settings) -> Search:
    """Return the search that settings name."""
    return resolve("plan.search", settings.search, SEARCHES, ANY)


def normal(keys_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw standard normal numbers, (B, *shape), for each row from its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys_B)


def _fold(keys_B: jax.Array, number: jax.Array) -> jax.Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys_B)


def _within(action_BSHA: jax.Array, bounds: Bounds) -> jax.Array:
    if bounds is None:
        return action_BSHA
    low_BA, high_BA = bounds
    return jnp.clip(action_BSHA, low_BA[:, None, None], high_BA[:, None, None])


def _best(action_BSHA: jax.Array, cost_BS: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Return the `count` cheapest samples and their costs, the cheapest first."""
    least_BE, index_BE = jax.lax.top_k(-cost_BS, count)
    return jnp.take_along_axis(action_BSHA, index_BE[:, :, None, None], axis=1), -least_BE


def _plan(cost: Cost, mean_BHA: jax.Array, bounds: Bounds) -> tuple[jax.Array, jax.Array]:
    """Return a mean as the plan, with its cost."""
    plan_BSHA = _within(mean_BHA[:, None], bounds)
    return plan_BSHA[:, 0], cost(plan_BSHA)[:, 0]


def cem(
    cost: Cost, mean_BHA: jax.Array, keys_B: jax.Array, s: Settings, bounds: Bounds
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy method: fit a Gaussian to the elites, again and again; return its mean.

    The first sample is the mean itself. The std of the elites is the unbiased one.
    """

    def iterate(
        state: tuple[jax.Array, jax.Array], number: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        mean_BHA, std_BHA = state
        noise_BSHA = normal(_fold(keys_B, number), (s.samples, *mean_BHA.shape[1:]))
        action_BSHA = mean_BHA[:, None] + std_BHA[:, None] * noise_BSHA
        action_BSHA = _within(action_BSHA.at[:, 0].set(mean_BHA), bounds)
        elite_BEHA, _ = _best(action_BSHA, cost(action_BSHA), s.elites)
        return (
            _mix(mean_BHA, jnp.mean(elite_BEHA, axis=1), s.momentum),
            _mix(std_BHA, jnp.std(elite_BEHA, axis=1, ddof=min(1, s.elites - 1)), s.momentum),
        ), None

    first = mean_BHA, jnp.full_like(mean_BHA, s.std)
    (mean_BHA, _), _ = jax.lax.scan(iterate, first, jnp.arange(s.iterations))
    return _plan(cost, mean_BHA, bounds)


def _mix(old: jax.Array, new: jax.Array, momentum: float) -> jax.Array:
    return momentum * old + (1 - momentum) * new


def icem(
    cost: Cost, mean_BHA: jax.Array, keys_B: jax.Array, s: Settings, bounds: Bounds
) -> tuple[jax.Array, jax.Array]:
    """CEM with noise that is correlated in time and elites that stay; return the best sample.

    Source: Pinneri et al. 2020 (arXiv 2008.06389).
    """
    horizon, size = mean_BHA.shape[1:]
    frequency_F = np.maximum(np.arange(horizon // 2 + 1), 1) / horizon
    scale_F = frequency_F ** (-s.colour / 2)
    # The share of the noise's variance in each frequency; the std is 1 after the division.
    once = (
        np.arange(len(scale_F)) % (horizon / 2) == 0
    )  # the first, and the last if horizon is even
    share_F = np.where(once, 1, 2)
    scale_F = scale_F / np.sqrt(np.sum(share_F * scale_F**2) / horizon)
    kept = min(s.kept, s.elites, s.samples - 1)

    def coloured(keys_B: jax.Array) -> jax.Array:
        white_BSAH = normal(keys_B, (s.samples, size, horizon))
        scale = jnp.asarray(scale_F, jnp.complex64)[None, None, None]
        noise_BSAH = jnp.fft.irfft(jnp.fft.rfft(white_BSAH) * scale, n=horizon)
        return jnp.swapaxes(noise_BSAH, 2, 3)

    def iterate(state: tuple, number: jax.Array) -> tuple[tuple, None]:
        mean_BHA, std_BHA, elite_BEHA, best_BHA, least_B = state
        action_BSHA = mean_BHA[:, None] + std_BHA[:, None] * coloured(_fold(keys_B, number))
        action_BSHA = action_BSHA.at[:, 0].set(mean_BHA)
        # In the first iteration, the kept elites are copies of the mean.
        action_BSHA = action_BSHA.at[:, 1 : 1 + kept].set(elite_BEHA[:, :kept])
        action_BSHA = _within(action_BSHA, bounds)
        elite_BEHA, cost_BE = _best(action_BSHA, cost(action_BSHA), s.elites)
        better_B = cost_BE[:, 0] < least_B
        best_BHA = jnp.where(better_B[:, None, None], elite_BEHA[:, 0], best_BHA)
        std = jnp.std(elite_BEHA, axis=1, ddof=min(1, s.elites - 1))
        return (
            _mix(mean_BHA, jnp.mean(elite_BEHA, axis=1), s.momentum),
            _mix(std_BHA, std, s.momentum),
            elite_BEHA,
            best_BHA,
            jnp.minimum(least_B, cost_BE[:, 0]),
        ), None

    elites = jnp.repeat(mean_BHA[:, None], s.elites, axis=1)
    least_B = jnp.full(len(mean_BHA), jnp.inf)
    first = mean_BHA, jnp.full_like(mean_BHA, s.std), elites, mean_BHA, least_B
    (_, _, _, best_BHA, least_B), _ = jax.lax.scan(iterate, first, jnp.arange(s.iterations))
    return best_BHA, least_B


def mppi(
    cost: Cost, mean_BHA: jax.Array, keys_B: jax.Array, s: Settings, bounds: Bounds
) -> tuple[jax.Array, jax.Array]:
    """Path integral control: weigh samples by exp(-cost / temperature) and take their mean.

    Costs are scaled by their spread over the samples, so that a temperature fits any cost.
    """

    def iterate(mean_BHA: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        noise_BSHA = normal(_fold(keys_B, number), (s.samples, *mean_BHA.shape[1:]))
        action_BSHA = mean_BHA[:, None] + s.std * noise_BSHA
        action_BSHA = _within(action_BSHA.at[:, 0].set(mean_BHA), bounds)
        cost_BS = cost(action_BSHA)
        spread_B1 = jnp.std(cost_BS, axis=1, keepdims=True) + 1e-9
        weight_BS = jax.nn.softmax(-cost_BS / (s.temperature * spread_B1), axis=1)
        new_BHA = jnp.einsum("bs,bsha->bha", weight_BS, action_BSHA)
        return _mix(mean_BHA, new_BHA, s.momentum), None

    mean_BHA, _ = jax.lax.scan(iterate, mean_BHA, jnp.arange(s.iterations))
    return _plan(cost, mean_BHA, bounds)


def gradient(
    cost: Cost, mean_BHA: jax.Array, keys_B: jax.Array, s: Settings, bounds: Bounds
) -> tuple[jax.Array, jax.Array]:
    """Adam on the actions of all samples, which start around the mean; return the best one."""
    noise_BSHA = normal(keys_B, (s.samples, *mean_BHA.shape[1:]))
    action_BSHA = (mean_BHA[:, None] + s.std * noise_BSHA).at[:, 0].set(mean_BHA)
    optimizer = optax.adam(s.rate)

    def total(action_BSHA: jax.Array) -> tuple[jax.Array, jax.Array]:
        cost_BS = cost(_within(action_BSHA, bounds))
        return jnp.sum(cost_BS), cost_BS

    def iterate(state: tuple, _: None) -> tuple[tuple, None]:
        action_BSHA, moments = state
        slope_BSHA, _ = jax.grad(total, has_aux=True)(action_BSHA)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to a whole number
            updates, moments = optimizer.update(slope_BSHA, moments)
        return (_within(action_BSHA + updates, bounds), moments), None

    first = action_BSHA, optimizer.init(action_BSHA)
    (action_BSHA, _), _ = jax.lax.scan(iterate, first, None, length=s.iterations)
    best_BEHA, cost_BE = _best(action_BSHA, cost(_within(action_BSHA, bounds)), 1)
    return _within(best_BEHA, bounds)[:, 0], cost_BE[:, 0]
