"""The verdict: what the figures of a run say, in plain words.

Every evaluator compares the model with something that learned nothing: random weights, pixels, the
last frame copied, other actions. The verdict names what the model is better than, and what not.
"""

import textwrap
from collections.abc import Iterator, Mapping
from typing import NamedTuple

# Differences below these may be chance, with as few clips and episodes as evaluators use.
R2, SHARE, RATE = 0.02, 0.05, 10.0  # of probes; of an error; % of the goals
RELATIVE, PLANNED = "validation/relative", "closed_loop/planned"
# The baselines of each evaluator, by their names in its row.
ACTIONS = {"random": "random actions", "still": "no action"}
FEATURES = {"random": "random weights", "pixels": "pixels"}
COPIES = {"copy": "the last frame copied", "shuffled": "other actions"}
EARLY = 1_000  # steps: before, most models have learned little


class Finding(NamedTuple):
    """A comparison. key: of tests and files. than: what the model is compared with."""

    key: str
    better: bool
    than: str


def findings(row: Mapping[str, float]) -> list[Finding]:
    """Compare the model with each baseline that the rows of the evaluators have.

    row: the newest figure of each name, as in metrics.jsonl. A figure that is not finite is not
    better.
    """
    return [*_goals(row), *_probes(row), *_foresight(row), *_prediction(row)]


def _goals(row: Mapping[str, float]) -> Iterator[Finding]:
    for name, than in ACTIONS.items():
        if {PLANNED, f"closed_loop/{name}"} <= row.keys():
            better = row[PLANNED] > row[f"closed_loop/{name}"] + RATE
            yield Finding(f"goals/{name}", better, than)


def labels(row: Mapping[str, float]) -> list[str]:
    """Return the labels that the probe predicted."""
    names = (name.removeprefix("probe/") for name in row if name.startswith("probe/"))
    return [name.removesuffix("/trained") for name in names if name.endswith("/trained")]


def _probes(row: Mapping[str, float]) -> Iterator[Finding]:
    for name, than in FEATURES.items():
        pairs = [
            (row[f"probe/{label}/trained"], row[f"probe/{label}/{name}"])
            for label in labels(row)
            if f"probe/{label}/{name}" in row
        ]
        if pairs:
            better = all(trained > other + R2 for trained, other in pairs)
            yield Finding(f"probe/{name}", better, than)


def _foresight(row: Mapping[str, float]) -> Iterator[Finding]:
    for name, than in COPIES.items():
        if (ratio := _ahead(row, name)) is not None:
            yield Finding(f"foresight/{name}", ratio < 1 - SHARE, than)


def _prediction(row: Mapping[str, float]) -> Iterator[Finding]:
    if RELATIVE in row:
        yield Finding("mean", row[RELATIVE] < 1 - SHARE, "the mean token")


def _ahead(row: Mapping[str, float], name: str) -> float | None:
    """Return the error one block ahead, relative to that of a baseline."""
    error, other = row.get("acting/error/1"), row.get(f"acting/{name}/1")
    return error / other if error is not None and other else None


def text(row: Mapping[str, float], step: int) -> str:
    """Return the verdict: a line, and one for each evaluator's figures.

    "": no evaluator has reported.
    """
    found = findings(row)
    if not found:
        return ""
    better, worse = ([f.than for f in found if f.better is which] for which in (True, False))
    if not worse:
        said = f"better than {_listed(better)}"
    elif better:
        said = f"better than {_listed(better)}; not better than {_listed(worse)}"
    else:
        said = f"not better than {_listed(worse)}: it has learned nothing that shows"
    if worse:
        soon = f"normal before {EARLY:,} steps; later" if step < EARLY else "what to do"
        said += f" ({soon}: wmjax/evals/README.md)"
    return "\n".join([f"verdict: {said}", *(f"  {line}" for line in _figures(row))])


def wrapped(said: str) -> str:
    """Return a verdict in lines that fit a console of 80 columns."""
    lines = said.splitlines()
    return "\n".join(textwrap.fill(line, 79, subsequent_indent="    ") for line in lines)


def _figures(row: Mapping[str, float]) -> Iterator[str]:
    if PLANNED in row:
        others = {"recorded": "recorded actions"} | ACTIONS
        rates = (
            f"{than} {row[f'closed_loop/{name}']:.0f} %"
            for name, than in others.items()
            if f"closed_loop/{name}" in row
        )
        yield f"goals reached in the simulator: {row[PLANNED]:.0f} % ({', '.join(rates)})"
    for label in labels(row):
        scores = (
            f"{than} {row[f'probe/{label}/{name}']:.2f}"
            for name, than in FEATURES.items()
            if f"probe/{label}/{name}" in row
        )
        trained = row[f"probe/{label}/trained"]
        yield f"R2 of {label} from its features: {trained:.2f} ({', '.join(scores)}; 1 is best)"
    each = ((_ahead(row, name), than) for name, than in COPIES.items())
    ratios = [(ratio, than) for ratio, than in each if ratio is not None]
    if ratios:
        said = " and ".join(f"{ratio:.2f} x that of {than}" for ratio, than in ratios)
        yield f"error one block of actions ahead: {said}"
    if RELATIVE in row:
        yield f"error {row[RELATIVE]:.2f} x that of the mean token (1: nothing learned yet)"


def _listed(names: list[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
