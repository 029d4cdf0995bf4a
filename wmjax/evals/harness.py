"""The closed loop in stable-worldmodel's World: the same tasks, played and judged by its code."""

from typing import Any

import numpy as np

from wmjax.envs.harness import Harness, check, evaluate, versions
from wmjax.evals import Context
from wmjax.evals.closed_loop import KEPT, Act, ClosedLoop


class InWorld(ClosedLoop):
    """`harness` in eval.evaluators."""

    name = "harness"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        check(self._name)
        self.about = versions()

    def _planned(self, weights: Any) -> Act:
        harness = Harness(lambda goals: self._policy(weights, goals))
        return lambda info, _: harness.get_action(info)

    def _play(self, act: Act, kept: list[np.ndarray] | None = None) -> np.ndarray:
        states = np.stack([[task.start, task.goal] for task in self._tasks])
        own = len(self._env.robot_names)
        return evaluate(_Acts(act, kept), self._name, self._pictures, states, own, self._goal)


class _Acts:
    """A policy of World from a function of (info, step)."""

    def __init__(self, act: Act, kept: list[np.ndarray] | None) -> None:
        self._act, self._kept, self._step = act, kept, -1

    def set_env(self, env: Any) -> None:
        """World calls this before an evaluation."""

    def get_action(self, info: dict[str, Any]) -> np.ndarray:
        if self._kept is not None:
            self._kept.append(info["pixels"][:KEPT, -1].copy())
        self._step += 1
        return self._act(info, self._step).astype(np.float64)
