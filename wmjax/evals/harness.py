"""The closed loop in stable-worldmodel's World: its code plays and judges the same episodes."""

import contextlib
from typing import Any

import numpy as np

from wmjax.envs.harness import Harness, check, evaluate, versions
from wmjax.evals import Context
from wmjax.evals.closed_loop import KEPT, Act, ClosedLoop, Outcome, Trial


class InWorld(ClosedLoop):
    """`harness` in eval.evaluators. World does not know the stricter rule."""

    name = "harness"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        check(self._name)
        self.about = versions()

    def _open(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()  # World has its own simulators

    def _planned(self, trial: Trial, weights: Any) -> Act:
        harness = Harness(lambda goals: self._policy(weights, goals, trial.seed))
        return lambda world, _: harness.get_action(world.info)

    def _play(
        self, envs: Any, trial: Trial, act: Act, seen: list[np.ndarray] | None = None
    ) -> Outcome:
        policy = _Acts(act, np.stack([self._env.still()] * self._count), seen)
        states = np.stack([trial.start_NS, trial.goal_NS], axis=1)
        own = len(self._env.robot_names)
        reached = evaluate(policy, self._name, trial.picture_N2HWC, states, own, trial.goal)
        return reached, None


class _Acts:
    """A policy of World that acts by an Act, for which it stands for the simulators.

    still_NA: actions that stay in place, which are the same in all states of World's simulators.
    """

    def __init__(self, act: Act, still_NA: np.ndarray, seen: list[np.ndarray] | None) -> None:
        self._act, self._still_NA, self._seen, self._step = act, still_NA, seen, -1
        self.info: dict[str, Any] = {}

    def set_env(self, env: Any) -> None:
        """World calls this before an evaluation."""

    def still(self) -> np.ndarray:
        return self._still_NA

    def get_action(self, info: dict[str, Any]) -> np.ndarray:
        if self._seen is not None:
            self._seen.append(info["pixels"][:KEPT, -1].copy())
        self.info, self._step = info, self._step + 1
        return self._act(self, self._step).astype(np.float64)
