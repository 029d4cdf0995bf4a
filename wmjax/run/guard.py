"""Checks finished steps: names the clips of skipped updates, warns of loss spikes."""

import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils

from wmjax.errors import UserError
from wmjax.run.console import say
from wmjax.types import WorldModelInput

WINDOW = 200  # losses that the next one is compared with
FEWEST = 50  # losses before anything is called a spike
SPREADS = 10.0  # distance above the median, in median absolute deviations, that makes a spike
PROOF = 100  # steps without a fault after which a checkpoint is proven, whatever follows


class Guard:
    """limit: consecutive skipped updates that end the run. note(step, entry) writes to a file.

    kept(proves): returns a line that says which checkpoint is sound. proves: see the method.
    """

    def __init__(
        self,
        limit: int,
        note: Callable[[int, dict[str, Any]], None],
        kept: Callable[[Callable[[int], bool]], str],
    ) -> None:
        self._limit, self._note, self._kept = limit, note, kept
        self._in_a_row, self._spiking = 0, False
        self._last, self._unsound = 0, deque[int]()  # steps: checked last; skipped or spiking
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def look(self, step: int, metrics: Any, batch: WorldModelInput) -> None:
        """Wait for a step and check it."""
        self._last = step
        loss, skipped = jax.device_get((metrics["loss"].total, metrics["skipped_updates"].total))
        if skipped:
            self._skipped(step, batch)
        else:
            self._in_a_row = 0
            self._compare(step, float(loss))
            if self._spiking:
                self._unsound.append(step)

    def proves(self, step: int) -> bool:
        """Return whether the steps after `step` show that its weights were sound.

        At least one step, and PROOF steps or all that were done, must be finite and have no loss
        spike. A later call is for the same or a later step.
        """
        while self._unsound and self._unsound[0] <= step:
            self._unsound.popleft()
        sound = (self._unsound[0] - 1 if self._unsound else self._last) - step
        return sound >= min(PROOF, max(self._last - step, 1))

    def _skipped(self, step: int, batch: WorldModelInput) -> None:
        self._unsound.append(step)
        ids = (batch.dataset_ids_B, batch.sample_ids_B)
        datasets, samples = (multihost_utils.process_allgather(x, tiled=True).tolist() for x in ids)
        clips = ", ".join(f"{d}:{s}" for d, s in zip(datasets, samples, strict=True))
        say(
            f"warning: step {step}: loss or gradients are not finite; the update is left out; if "
            "this happens often, lower optim.learning_rate or set optim.clip_norm\n"
            f"  its clips, dataset:sample: {clips}"
        )
        self._note(step, {"skipped": {"dataset_ids": datasets, "sample_ids": samples}})
        self._in_a_row += 1
        if self._in_a_row == self._limit:
            raise UserError(
                f"train.max_skipped={self._limit}: step {step} is the last of so many in a row "
                f"whose loss or gradients are not finite\n{self._kept(self.proves)}\n"
                "optim.clip_norm, a lower optim.learning_rate or other data may help"
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
