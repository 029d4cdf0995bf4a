"""A policy: plans from what the robot shows, gives one action a call, and plans again in time."""

from collections.abc import Callable
from typing import Any

import numpy as np

from wmjax.errors import UserError
from wmjax.planning.search import Settings

# (observation, first mean or None, seeds of the rows) -> blocks in the model's units BHA, the same
# as actions of the robot B(HP)A
Planned = Callable[[Any, np.ndarray | None, np.ndarray], tuple[np.ndarray, np.ndarray]]


class Policy:
    """Acts toward a goal; made by `wmjax.load(...).policy(goal)`.

    meta: block, the actions between two frames; fps, the rate of the actions; cameras; state;
    action_size; plan, the settings of the search. An environment at another rate is refused by
    `check`.
    """

    def __init__(self, planned: Planned, settings: Settings, meta: dict[str, Any], seed: int = 0):
        self.meta = meta
        self._planned, self._settings, self._seed = planned, settings, seed
        self.reset()

    def reset(self) -> None:
        """Begin an episode: forget the plan. Episodes since the start have different draws."""
        self._episode = getattr(self, "_episode", -1) + 1
        self._plans = 0
        self._queue: list[np.ndarray] = []
        self._rest: np.ndarray | None = None

    def check(self, fps: float) -> None:
        """Raise UserError for an environment whose actions come at another rate, in 1/s."""
        wanted = self.meta["fps"]
        if wanted and abs(fps - wanted) > 1e-3 * wanted:
            raise UserError(
                f"environment at {fps:g} actions a second: the model was trained on actions at "
                f"{wanted:g}, {self.meta['block']} between two frames: wanted {wanted:g}"
            )

    @property
    def due(self) -> bool:
        """Whether the next `act` plans; only then it reads its observation."""
        return not self._queue

    def act(self, observation: Any) -> np.ndarray:
        """Return the next action in the units of the recording, (A,), or (B, A) for B episodes.

        observation: as `wmjax.load(...).plan` takes it. It is read when a new plan is due, after
        `replan` blocks.
        """
        if self.due:
            self._replan(observation)
        return self._queue.pop(0)

    def _replan(self, observation: Any) -> None:
        settings = self._settings
        seeds = np.array([self._seed, self._episode, self._plans])
        blocks_BHA, action_BXA = self._planned(observation, self._rest, seeds)
        self._plans += 1
        used = settings.replan or settings.horizon
        count = used * self.meta["block"]
        single = action_BXA.ndim == 2
        rows = action_BXA if single else action_BXA.swapaxes(0, 1)
        self._queue = list(rows[:count])
        self._rest = None
        if settings.warm_start and used < settings.horizon:
            rest = blocks_BHA[:, used:]
            self._rest = np.concatenate([rest, np.zeros_like(blocks_BHA[:, :used])], axis=1)
