"""An eye on the steps as they are done: updates left out are named, losses that jump reported."""

import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils

from wmjax.errors import UserError
from wmjax.run.console import say
from wmjax.step import Metrics
from wmjax.types import WorldModelInput

WINDOW = 200  # losses that the next one is held against
FEWEST = 50
SPREADS = 10.0  # above the median, in units of the usual distance from it: a spike


class Guard:
    """Looks at each step once it is done, one step late, so that the device is never waited for.

    limit: updates left out in a row that end the run. note(step, entry) keeps an entry for later.
    """

    def __init__(self, limit: int, note: Callable[[int, dict[str, Any]], None]) -> None:
        self._limit, self._note = limit, note
        self._pending: tuple[int, Metrics, WorldModelInput] | None = None
        self._in_a_row, self._spiking = 0, False
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def add(self, step: int, metrics: Metrics, batch: WorldModelInput) -> None:
        """Take a step that was dispatched; wait for the one before and look at it."""
        self.settle()
        self._pending = (step, metrics, batch)

    def settle(self) -> None:
        """Wait for the last step that was added and look at it."""
        if self._pending is None:
            return
        (step, metrics, batch), self._pending = self._pending, None
        loss, skipped = jax.device_get((metrics["loss"].total, metrics["skipped_updates"].total))
        if skipped:
            self._left_out(step, batch)
        else:
            self._in_a_row = 0
            self._compare(step, float(loss))

    def _left_out(self, step: int, batch: WorldModelInput) -> None:
        ids = (batch.dataset_ids_B, batch.sample_ids_B)
        datasets, samples = (multihost_utils.process_allgather(x, tiled=True).tolist() for x in ids)
        clips = ", ".join(f"{d}:{s}" for d, s in zip(datasets, samples, strict=True))
        say(
            f"warning: step {step}: loss or gradients are not finite; the update is left out\n"
            f"  its clips, dataset:sample: {clips}"
        )
        self._note(step, {"skipped": {"dataset_ids": datasets, "sample_ids": samples}})
        self._in_a_row += 1
        if self._in_a_row == self._limit:
            raise UserError(
                f"train.max_skipped={self._limit}: step {step} is the last of so many in a row "
                "whose loss or gradients are not finite\n"
                "the newest checkpoint is kept; optim.clip_norm, a lower optim.learning_rate or "
                "other data may help"
            )

    def _compare(self, step: int, loss: float) -> None:
        losses = self._losses
        if len(losses) >= FEWEST:
            median = statistics.median(losses)
            usual = statistics.median(abs(each - median) for each in losses)
            spiking = loss - median > SPREADS * max(usual, 1e-3 * abs(median))
            if spiking and not self._spiking:
                say(
                    f"warning: step {step}: loss {loss:.4f}, far above the median {median:.4f} of "
                    f"the {len(losses)} steps before it (usually within {usual:.4f})"
                )
            self._spiking = spiking
        losses.append(loss)
