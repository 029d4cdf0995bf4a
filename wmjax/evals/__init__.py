"""Evaluations of a run: prediction against a baseline, health of the features, probes.

An evaluator is a class that is built from a Context. `eval.evaluators` lists the evaluators of a
run: names from EVALUATORS, or package.module:Name. Its attribute `every` is the number of steps
between its reports in training, with one more after the last step; 0: no reports. A call with
(step, state) returns a Report. The constructor raises Unavailable if the evaluator does not apply
to the run. This room knows no data format and no ConfigDict.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from wmjax.errors import UserError, check_least
from wmjax.plugins import resolve
from wmjax.types import Row

EVALUATORS = {
    "validation": "wmjax.evals.validation:Validation",
    "pictures": "wmjax.viz.validation:Pictures",
    "probe": "wmjax.evals.probe:Probe",
    "acting": "wmjax.evals.acting:Acting",
    "closed_loop": "wmjax.evals.closed_loop:ClosedLoop",
    "harness": "wmjax.evals.harness:InWorld",
}


BATCHES, PROBE_CLIPS = 8, 512  # of a run that is not short
FEWEST = 10  # clips that a probe can be fitted to
SHARE = 0.1  # of the batches and clips that a run trains on, for each of its evaluations


class Unavailable(UserError):
    """The evaluator does not apply to this run. The run prints the message, if any, and goes on."""


class Report(NamedTuple):
    """The result of an evaluator.

    row: figures by name, for metrics.jsonl and its sinks. text: for the console; "": --mode=eval
    prints the row. pictures: a function that draws uint8 RGB arrays by name; called only if they
    are shown. entry: for evals.jsonl; {}: --mode=eval writes the row, training writes nothing.
    """

    row: Row
    text: str = ""
    pictures: Callable[[], Mapping[str, np.ndarray]] | None = None
    entry: Mapping[str, Any] = {}


class Context(NamedTuple):
    """What an evaluator may use: compiled steps, data and configuration of the run.

    steps: step.Steps. sources: the splits train and validation, as data.source.Source. masks:
    masking.Masks. config: the whole configuration as plain dicts, with the sizes of `sizes`.
    open_batches(split, frames=0, batches=0): iterator of the batches of a split, from its first
    clip, cropped to the centre; the evaluator closes it. frames: of longer clips, as far as the
    episodes allow (see Source.of_frames). batches: how many are read; 0: endless, read ahead.
    shows: True if the run has TensorBoard or W&B for pictures. workers: processes that an
    evaluator may start; 0: none.
    """

    steps: Any
    sources: Mapping[str, Any]
    masks: Any
    config: Mapping[str, Any]
    workdir: Path
    open_batches: Callable[..., Any]
    shows: bool = False
    workers: int = 0


class Evaluator(Protocol):
    """The interface of an evaluator; see the top of this file."""

    every: int

    def __init__(self, context: Context) -> None: ...

    def __call__(self, step: int, state: Any) -> Report: ...


def check(settings: Mapping[str, Any]) -> None:
    """Raise UserError for values of the `eval` group that are out of range."""
    check_least("eval.batches", settings["batches"], 1)
    check_least("eval.probe_clips", settings["probe_clips"], FEWEST)
    check_least("eval.probe_every", settings["probe_every"])


def sizes(settings: Mapping[str, Any], num_steps: int, batch_size: int) -> dict[str, int]:
    """Return eval.batches and eval.probe_clips; where they are empty they follow the run's length.

    Empty: BATCHES and PROBE_CLIPS, and at most SHARE of what the run trains on.
    """
    steps = round(SHARE * num_steps)
    follow = {
        "batches": min(BATCHES, max(1, steps)),
        "probe_clips": min(PROBE_CLIPS, max(FEWEST, steps * batch_size)),
    }
    return {name: settings[name] or size for name, size in follow.items()}


def names(settings: Mapping[str, Any]) -> list[str]:
    """Return the names in eval.evaluators."""
    return [name for each in settings["evaluators"].split(",") if (name := each.strip())]


def open_all(context: Context, tell: Callable[[str], None]) -> list[Evaluator]:
    """Build the evaluators that eval.evaluators lists; `tell` why any does not apply."""
    found = []
    for name in names(context.config["eval"]):
        try:
            found.append(resolve("eval.evaluators", name, EVALUATORS)(context))
        except Unavailable as reason:
            if str(reason):
                tell(f"no {name}: {reason}")
    return found
