"""Validation: loss, prediction error and health, always over the same held-out clips."""

import contextlib

from wmjax.evals import Context, Report
from wmjax.evals.prediction import finish
from wmjax.run.metrics import Mean, fetch
from wmjax.step import TrainState


class Validation:
    """Averages all figures over the first eval.batches held-out batches.

    The row is prefixed with validation/ and also contains what the stream of batches reports.
    """

    def __init__(self, context: Context) -> None:
        self.every = context.config["train"]["eval_every"]
        self._steps, self._open = context.steps, context.open_batches
        self._count = context.config["eval"]["batches"]

    def __call__(self, step: int, state: TrainState) -> Report:
        mean = Mean()
        with contextlib.closing(self._open("validation", batches=self._count)) as batches:
            for _ in range(self._count):
                mean.add(self._steps.validate(state, next(batches)))
            row = finish(fetch(mean.take())) | batches.report()
        return Report({f"validation/{name}": value for name, value in row.items()})
