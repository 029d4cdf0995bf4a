"""A loaded model that acts: reads what a robot shows, imagines, plans, and gives a policy.

The methods of `wmjax.load(...)` that need actions are here. NumPy in and out.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from wmjax.arrays import as_array
from wmjax.errors import UserError, suggest
from wmjax.models.acting import ActingModel, Observation, repeat
from wmjax.models.base import Blueprint, Params
from wmjax.nn.compute import jit
from wmjax.planning import plan as planning
from wmjax.planning.policy import Policy
from wmjax.planning.search import Settings, of_keys, parse

Built = Callable[[Params], tuple[ActingModel, Params]]
Resize = Callable[[np.ndarray, tuple[int, int]], np.ndarray]


class Found(NamedTuple):
    """A plan in the units of the recording. action: (H x P, A), or (B, H x P, A). cost: of it."""

    action: np.ndarray
    cost: np.ndarray


class Actor:
    """recordings: of the run's data, as data.source.Source.recordings returns them."""

    def __init__(
        self,
        where: str,
        blueprint: Blueprint,
        built: Built,
        recordings: Sequence[Mapping[str, Any]],
        resize: Resize,
    ):
        if not issubclass(blueprint.family, ActingModel):
            name = blueprint.family.__qualname__
            raise UserError(f"{where}: {name} does not act; wanted a run of lewm or vjepa2_ac")
        self._where, self._blueprint, self._resize = where, blueprint, resize
        self._model: ActingModel = cast(ActingModel, blueprint.abstract)
        self._built = built
        self._recordings = list(recordings) or [{}]
        spec = blueprint.spec
        self._size = spec.height, spec.width

        def rollout(params: Params, seen: Observation, action_BHPA: jax.Array) -> jax.Array:
            model, target = built(params)
            blocks_BHA = model.to_model(action_BHPA, seen.dataset_ids_B)
            return planning.rollout(model, model.observe(target, seen), blocks_BHA)

        def plan(
            params: Params,
            seen: Observation,
            goal: Observation,
            keys_B: jax.Array,
            bounds: Any,
            start_BHA: jax.Array | None,
            settings: Settings,
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            model, target = built(params)
            ids_B = seen.dataset_ids_B
            if bounds is not None:  # (B, A) in the robot's units
                P = model.block[0]
                bounds = tuple(
                    model.to_model(jnp.repeat(x[:, None, None], P, axis=2), ids_B)[:, 0]
                    for x in bounds
                )
            blocks_BHA, cost_B = planning.plan(
                model, target, seen, goal, keys_B, settings, bounds, start_BHA
            )
            return blocks_BHA, model.to_robot(blocks_BHA, ids_B), cost_B

        def energy(
            params: Params, seen: Observation, goal: Observation, action_NHPA: jax.Array
        ) -> jax.Array:
            model, target = built(params)
            latent, wanted = model.observe(target, seen), model.observe(target, goal)
            N, ids_B = len(action_NHPA), seen.dataset_ids_B
            blocks_NHA = model.to_model(action_NHPA, jnp.repeat(ids_B, N))
            goal_NND = repeat(model.embedding(wanted), N)
            return planning.distances(model, repeat(latent, N), goal_NND, blocks_NHA)

        def cost(
            params: Params,
            seen: Observation,
            goal: Observation,
            action_BSHA: jax.Array,
            settings: Settings,
        ) -> jax.Array:
            model, target = built(params)
            goal_BND = model.embedding(model.observe(target, goal))
            return planning.score(
                model, model.observe(target, seen), goal_BND, action_BSHA, settings
            )

        def embed(params: Params, seen: Observation) -> jax.Array:
            model, target = built(params)
            return model.embedding(model.observe(target, seen))

        self._rollout, self._energy = jit(rollout), jit(energy)
        self._embed, self._cost = jit(embed), jit(cost, static_argnames="settings")
        self._plan = jit(plan, static_argnames="settings")

    def observation(self, shown: Any, recording: str = "") -> tuple[Observation, bool]:
        """Return what a robot shows as the model takes it, and whether it was one episode's.

        shown: uint8 RGB of the only camera, HWC or BHWC; or a dict of pictures by camera, and the
        state by the name of its feature, or as "state", if the model reads it. Pictures may have
        any size: they are cropped and scaled as held-out clips are.
        """
        index, about = self._recording(recording)
        spec = self._blueprint.spec
        cameras = list(about.get("cameras", [""])) or [""]
        if not isinstance(shown, Mapping):
            if len(cameras) > 1:
                raise UserError(
                    f"observation: one picture for {len(cameras)} cameras; wanted a dict with "
                    f"{', '.join(cameras)}"
                )
            shown = {cameras[0]: shown}
        pictures = [self._picture(shown, camera) for camera in cameras]
        single = pictures[0].ndim == 3
        batches = [picture[None] if single else picture for picture in pictures]
        B = len(batches[0])
        state_BS = np.zeros((B, spec.state_size), np.float32)
        if self._state_size:
            state_BS = self._state(shown, about, B)
        rows = [self._resize(batch[:, None], self._size) for batch in batches]  # BTHWC, T = 1
        if len(rows) < spec.views:  # of a mixture, whose other datasets have more cameras
            rows += [np.zeros_like(rows[0])] * (spec.views - len(rows))
        return Observation(
            np.stack(rows, axis=1),
            state_BS[:, None],
            np.zeros((B, 0, spec.stride, spec.action_size), np.float32),
            np.full(B, index, np.int32),
        ), single

    def _recording(self, name: str) -> tuple[int, Mapping[str, Any]]:
        names = [str(each.get("name", "")) for each in self._recordings]
        if not name and len(names) == 1:
            return 0, self._recordings[0]
        if name not in names:
            raise UserError(
                f"recording={name!r}: unknown{suggest(name, names)}; the model was trained on: "
                f"{', '.join(names)}"
            )
        return names.index(name), self._recordings[names.index(name)]

    def _picture(self, shown: Mapping[str, Any], camera: str) -> np.ndarray:
        last = camera.rpartition(".")[2]
        key = next((key for key in (camera, last) if key in shown), None)
        if key is None:
            raise UserError(
                f"observation: has no {camera!r}{suggest(camera, list(shown))}; it has: "
                f"{', '.join(map(str, shown)) or 'nothing'}"
            )
        picture = np.asarray(as_array(f"observation[{key!r}]", shown[key]))
        if picture.dtype != np.uint8 or picture.ndim not in (3, 4) or picture.shape[-1] != 3:
            raise UserError(
                f"observation[{key!r}] of {picture.dtype}{picture.shape}: wanted uint8 RGB, HWC or "
                "BHWC"
            )
        return picture

    @property
    def _state_size(self) -> int:
        """Numbers of the state that the model reads."""
        family = self._blueprint.family
        reads = issubclass(family, ActingModel) and family.reads_state
        return self._blueprint.spec.state_size if reads else 0

    def _state(self, shown: Mapping[str, Any], about: Mapping[str, Any], batch: int) -> np.ndarray:
        feature, wanted = about.get("state", "state"), self._blueprint.spec.state_size
        key = next((key for key in (feature, "state") if key in shown), None)
        if key is None:
            raise UserError(
                f"observation: has no {feature!r}, the state of {wanted} numbers: wanted a dict "
                "with 'state' beside the pictures"
            )
        state = np.asarray(as_array(f"observation[{key!r}]", shown[key]), np.float32)
        own = about.get("state_size", wanted)
        if state.shape not in ((own,), (batch, own)):
            raise UserError(f"observation[{key!r}] of shape {state.shape}: wanted ({own},)")
        state = np.broadcast_to(state, (batch, own))
        return np.pad(state, ((0, 0), (0, wanted - own)))

    def settings(self, plan: Settings | str | Mapping[str, Any]) -> Settings:
        """Return settings from a text (see search.parse) or a dict of keys, or as they are."""
        if isinstance(plan, Settings):
            found = plan
        elif isinstance(plan, str):
            found = parse(plan)
        else:
            found = of_keys(plan)
        self._check_horizon("plan.horizon", found.horizon)
        return found

    def _check_horizon(self, what: str, blocks: int) -> None:
        longest = self._model.longest
        if longest and blocks > longest:
            raise UserError(
                f"{what}={blocks}: the model was trained to look {longest} blocks ahead "
                f"(data.frames={self._blueprint.spec.frames}): wanted {longest} or fewer"
            )

    def rollout(self, params: Params, shown: Any, actions: Any, recording: str = "") -> np.ndarray:
        """Return what the model imagines after each block; see `inference.Model.rollout`."""
        seen, single = self.observation(shown, recording)
        blocks = self._blocks(actions, recording, single, len(seen.state_BTS))
        ahead = np.asarray(self._rollout(params, seen, blocks))
        return ahead[0] if single else ahead

    def energy(
        self, params: Params, shown: Any, goal: Any, actions: Any, recording: str = ""
    ) -> np.ndarray:
        """Return distances to a goal after each block; see `inference.Model.energy`."""
        seen, single = self.observation(shown, recording)
        wanted, one_goal = self._goal(goal, recording)
        if not (single and one_goal):
            raise UserError("energy: wanted one observation and one goal, with many actions")
        several = np.ndim(actions) == 3
        found = np.asarray(as_array("actions", actions), np.float32)
        found = found if several else found[None]
        blocks = self._blocks(found, recording, False, len(found))
        distance_NH = np.asarray(self._energy(params, seen, wanted, blocks))
        return distance_NH if several else distance_NH[0]

    def cost(
        self,
        params: Params,
        shown: Any,
        goal: Any,
        actions: Any,
        plan: Settings | str | Mapping[str, Any],
        recording: str,
    ) -> np.ndarray:
        """Return the costs of plans; see `inference.Model.cost`."""
        settings, (P, A) = self.settings(plan), self._model.block
        (seen, wanted, *_), single = self._arguments(shown, goal, recording, None, 0)
        action = np.asarray(as_array("actions", actions), np.float32)
        action_BSHA = action[None] if single else action
        B = len(seen.state_BTS)
        if action_BSHA.ndim != 4 or (len(action_BSHA), action_BSHA.shape[3]) != (B, P * A):
            axes = "plans, blocks" if single else f"{B}, plans, blocks"
            raise UserError(f"actions of shape {action.shape}: wanted ({axes}, {P * A})")
        self._check_horizon("actions: blocks", action_BSHA.shape[2])
        cost_BS = np.asarray(self._cost(params, seen, wanted, action_BSHA, settings=settings))
        return cost_BS[0] if single else cost_BS

    def embed(self, params: Params, shown: Any, recording: str = "") -> np.ndarray:
        """Return what is compared with a goal; see `inference.Model.embed`."""
        seen, single = self.observation(shown, recording)
        z_BND = np.asarray(self._embed(params, seen))
        return z_BND[0] if single else z_BND

    def _blocks(self, actions: Any, recording: str, single: bool, batch: int) -> np.ndarray:
        """Return actions as blocks, BHPA, padded to the widest robot's."""
        P, A = self._model.block
        action = np.asarray(as_array("actions", actions), np.float32)
        own = self._action_size(recording)
        if single and action.ndim == 2:
            action = action[None]
        if action.ndim != 3 or action.shape[0] != batch or action.shape[2] != own:
            raise UserError(f"actions of shape {np.shape(actions)}: wanted (steps, {own})")
        if not action.shape[1] or action.shape[1] % P:
            raise UserError(
                f"actions: {action.shape[1]} steps: wanted a multiple of {P}, the actions between "
                "two frames"
            )
        action = np.pad(action, ((0, 0), (0, 0), (0, A - own)))
        blocks = action.reshape(len(action), -1, P, A)
        self._check_horizon("actions: blocks", blocks.shape[1])
        return blocks

    def _action_size(self, recording: str) -> int:
        about, A = self._recording(recording)[1], self._model.block[1]
        return int(about.get("action_size", A)) if self._recorded else A

    @property
    def _recorded(self) -> bool:
        return getattr(self._blueprint.settings, "action", "recorded") == "recorded"

    def _bounds(self, bounds: Any, recording: str, batch: int) -> Any:
        """Return lowest and highest action, (B, A) each; None: there are none."""
        A, own = self._model.block[1], self._action_size(recording)
        index, _ = self._recording(recording)
        if isinstance(bounds, str):
            if bounds != "recorded":
                raise UserError(f"bounds={bounds!r}: wanted 'recorded', None, or (lowest, highest)")
            if not (self._recorded and index < len(self._blueprint.statistics)):
                return None
            action = self._blueprint.statistics[index]["action"]
            bounds = action["min"], action["max"]
        if bounds is None:
            return None
        pair = []
        for name, value in zip(("lowest", "highest"), bounds, strict=True):
            value = np.asarray(value, np.float32)
            if value.shape not in ((), (own,)):
                raise UserError(
                    f"bounds: {name} has shape {value.shape}: wanted {own} numbers, one for each "
                    "number of an action"
                )
            value = np.pad(np.broadcast_to(value, (own,)), (0, A - own))
            pair.append(np.broadcast_to(value, (batch, A)))
        if np.any(pair[0] > pair[1]):
            raise UserError("bounds: a lowest action is above the highest")
        return tuple(pair)

    def plan(
        self,
        params: Params,
        shown: Any,
        goal: Any,
        plan: Settings | str | Mapping[str, Any],
        recording: str,
        bounds: Any,
        seeds: Any,
        start_BHA: np.ndarray | None = None,
    ) -> tuple[np.ndarray, Found]:
        """Return the plan in the model's units, BHA, and in the robot's."""
        settings = self.settings(plan)
        arguments, single = self._arguments(shown, goal, recording, bounds, seeds)
        if start_BHA is None:  # an array always, so that a replan is not compiled again
            B, (P, A) = len(arguments[0].state_BTS), self._model.block
            start_BHA = np.zeros((B, settings.horizon, P * A), np.float32)
        blocks, action_BHPA, cost_B = jax.device_get(
            self._plan(params, *arguments, start_BHA, settings=settings)
        )
        action_BXA = action_BHPA.reshape(len(blocks), -1, action_BHPA.shape[-1])
        action_BXA = action_BXA[..., : self._action_size(recording)]
        found = Found(action_BXA[0], cost_B[0]) if single else Found(action_BXA, cost_B)
        return blocks, found

    def traced(self, params: Params, shown: Any, goal: Any, settings: Settings) -> Any:
        """Return the jaxpr of a plan, so that its operations can be counted."""
        arguments, _ = self._arguments(shown, goal, "", None, 0)
        return self._plan.trace(params, *arguments, None, settings=settings).jaxpr

    def _arguments(
        self, shown: Any, goal: Any, recording: str, bounds: Any, seeds: Any
    ) -> tuple[tuple, bool]:
        """Return what the jitted plan takes, and whether it is one episode's."""
        seen, single = self.observation(shown, recording)
        wanted, one_goal = self._goal(goal, recording)
        B = len(seen.state_BTS)
        if one_goal and not single:
            wanted = jax.tree.map(lambda x: np.repeat(x, B, axis=0), wanted)
        if len(wanted.state_BTS) != B:
            raise UserError(f"goal: {len(wanted.state_BTS)} pictures for {B} episodes")
        key = jax.random.key(0)
        for number in np.ravel(seeds):
            key = jax.random.fold_in(key, int(number) % 2**32)
        keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(B))
        return (seen, wanted, keys_B, self._bounds(bounds, recording, B)), single

    def _goal(self, goal: Any, recording: str) -> tuple[Observation, bool]:
        """Read a goal like an observation; its state is not compared, and may be missing."""
        size = self._state_size
        if size and not (isinstance(goal, Mapping) and self._has_state(goal, recording)):
            about = self._recording(recording)[1]
            cameras = list(about.get("cameras", [""])) or [""]
            pictures = dict(goal) if isinstance(goal, Mapping) else {cameras[0]: goal}
            goal = pictures | {"state": np.zeros(about.get("state_size", size), np.float32)}
        return self.observation(goal, recording)

    def _has_state(self, shown: Mapping[str, Any], recording: str) -> bool:
        return self._recording(recording)[1].get("state", "state") in shown or "state" in shown

    def policy(
        self,
        params: Params,
        goal: Any,
        plan: Settings | str | Mapping[str, Any],
        recording: str,
        bounds: Any,
        seed: int,
    ) -> Policy:
        settings = self.settings(plan)
        if goal is not None:
            self._goal(goal, recording)  # raises before anything moves
        about, P = self._recording(recording)[1], self._model.block[0]

        def planned(
            shown: Any, start_BHA: np.ndarray | None, seeds: np.ndarray
        ) -> tuple[np.ndarray, np.ndarray]:
            blocks, found = self.plan(
                params, shown, goal, settings, recording, bounds, seeds, start_BHA
            )
            return blocks, found.action

        rate = float(about.get("fps", 0.0))
        meta = {
            "block": P,
            "fps": rate if self._recorded else rate / self._blueprint.spec.stride,
            "cameras": list(about.get("cameras", [])),
            "state": about.get("state", ""),
            "state_size": self._state_size,
            "action_size": self._action_size(recording),
            "plan": dataclasses.asdict(settings),
        }
        return Policy(planned, settings, meta, seed)
