"""The verdict: from the figures of the evaluators to what the model is better than."""

import math

import pytest

from wmjax.evals import verdict

LEARNED = {
    "closed_loop/planned": 84.0,
    "closed_loop/recorded": 100.0,
    "closed_loop/random": 12.0,
    "closed_loop/still": 0.0,
    "probe/observation.state/trained": 0.95,
    "probe/observation.state/random": 0.8,
    "probe/observation.state/pixels": 0.9,
    "acting/error/1": 0.1,
    "acting/copy/1": 1.0,
    "acting/shuffled/1": 0.5,
    "validation/relative": 0.57,
}
KEYS = {
    *("goals/random", "goals/still", "probe/random", "probe/pixels"),
    *("foresight/copy", "foresight/shuffled", "mean"),
}


def judged(row):
    return {finding.key: finding.better for finding in verdict.findings(row)}


def test_a_model_that_learned_is_better_than_every_baseline():
    assert judged(LEARNED) == dict.fromkeys(KEYS, True)


@pytest.mark.parametrize(
    ("changed", "worse"),
    [
        ({"closed_loop/planned": 20.0}, ["goals/random"]),  # within chance of 12
        ({"closed_loop/planned": 5.0}, ["goals/random", "goals/still"]),
        ({"probe/observation.state/trained": 0.85}, ["probe/pixels"]),
        ({"probe/observation.state/trained": -0.35}, ["probe/random", "probe/pixels"]),
        ({"acting/error/1": 0.97}, ["foresight/copy", "foresight/shuffled"]),
        ({"acting/error/1": 0.0}, []),
        ({"acting/shuffled/1": 0.1}, ["foresight/shuffled"]),
        ({"validation/relative": 0.97}, ["mean"]),
        ({"validation/relative": math.nan}, ["mean"]),
    ],
    ids=str,
)
def test_a_figure_that_is_bad_is_said(changed, worse):
    assert judged(LEARNED | changed) == {key: key not in worse for key in KEYS}


def test_a_baseline_counts_only_if_every_label_is_better():
    other = {f"probe/world/{name}": 0.5 for name in ("trained", "random", "pixels")}
    found = judged(LEARNED | other)
    assert (found["probe/random"], found["probe/pixels"]) == (False, False)


def test_only_what_was_measured_is_judged():
    assert judged({"validation/relative": 0.5, "loss": 1.0}) == {"mean": True}
    assert judged({"loss": 1.0}) == {}
    assert verdict.text({"loss": 1.0}, 5) == ""


@pytest.mark.parametrize("step", [10, 100_000])
def test_the_text_has_every_figure(step):
    bad = LEARNED | {"validation/relative": 1.25, "closed_loop/planned": 3.0}
    for row in (LEARNED, bad):
        first, *others = verdict.text(row, step).splitlines()
        assert ("wmjax/evals/README.md" in first) == (row is bad)
        assert len(others) == 4  # an evaluator each
        lines = verdict.wrapped(verdict.text(row, step)).splitlines()
        assert max(map(len, lines)) < 80
        assert " ".join(" ".join(lines).split()) == " ".join(" ".join([first, *others]).split())
        for figure in (f"{row['validation/relative']:.2f}", f"{row['closed_loop/planned']:.0f} %"):
            assert any(figure in line for line in others)
