"""Evaluations of a run: prediction against a baseline, health of the features, probes.

An evaluator is a class that takes a Context; `eval.evaluators` lists those of a run, by a name from
EVALUATORS or as package.module:Name. It has `every`, the steps between two of its reports in
training (0: none; otherwise one is made at the end too), and is called with (step, state) for a
Report. It raises Unavailable where it does not apply to the run. This room knows no data format and
no ConfigDict.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from wmjax.errors import UserError, check_above, check_least
from wmjax.plugins import resolve
from wmjax.types import Row

EVALUATORS = {
    "validation": "wmjax.evals.validation:Validation",
    "pictures": "wmjax.viz.validation:Pictures",
    "probe": "wmjax.evals.probe:Probe",
}


class Unavailable(UserError):
    """An evaluator does not apply to this run; its line, if any, is printed and the run goes on."""


class Report(NamedTuple):
    """What an evaluator found.

    row: figures, by name. text: for the console; empty: the figures themselves. pictures: draws
    uint8 RGB arrays by name, called where they are shown. entry: for evals.jsonl; empty: the row.
    """

    row: Row
    text: str = ""
    pictures: Callable[[], Mapping[str, np.ndarray]] | None = None
    entry: Mapping[str, Any] = {}


class Context(NamedTuple):
    """What an evaluator may use: the run's compiled steps, its data and its configuration.

    steps: step.Steps. sources: the splits train and validation, as data.source.Source. masks:
    masking.Masks. config: the whole configuration, as plain dicts. open_batches(split): the batches
    of a split from its first clip on, cropped to the centre; to be closed after use. shows: the run
    has a sink for pictures.
    """

    steps: Any
    sources: Mapping[str, Any]
    masks: Any
    config: Mapping[str, Any]
    workdir: Path
    open_batches: Callable[[str], Any]
    shows: bool = False


class Evaluator(Protocol):
    every: int

    def __init__(self, context: Context) -> None: ...

    def __call__(self, step: int, state: Any) -> Report: ...


def check(settings: Mapping[str, Any]) -> None:
    """Raise UserError for values of the `eval` group that are out of range."""
    check_above("eval.batches", settings["batches"])
    check_least("eval.probe_clips", settings["probe_clips"], 10)  # a line is fitted to them
    check_least("eval.probe_every", settings["probe_every"])


def open_all(context: Context, tell: Callable[[str], None]) -> list[Evaluator]:
    """Build the evaluators that eval.evaluators lists; `tell` those that do not apply."""
    found = []
    for name in filter(None, context.config["eval"]["evaluators"].split(",")):
        try:
            found.append(resolve("eval.evaluators", name.strip(), EVALUATORS)(context))
        except Unavailable as reason:
            if str(reason):
                tell(f"no {name}: {reason}")
    return found
