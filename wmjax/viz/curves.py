"""Reads metrics.jsonl as series, and groups them into panels."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from wmjax.errors import UserError
from wmjax.run.files import read_json_lines

METRICS = "metrics.jsonl"
# Title of a panel -> {label of a line: its key in metrics.jsonl}.
PANELS: Mapping[str, Mapping[str, str]] = {
    "loss": {"training": "loss", "validation": "validation/loss"},
    "error relative to the mean-token error (1: nothing learned)": {
        "validation": "validation/relative"
    },
    "mean cosine between tokens (1: collapsed)": {
        "target": "health/target_cosine",
        "prediction": "health/prediction_cosine",
    },
    "deviation from the mean token": {
        "target": "health/target_std",
        "prediction": "health/prediction_std",
    },
    "effective rank (1: collapsed)": {
        "target": "validation/health/target_rank",
        "prediction": "validation/health/prediction_rank",
    },
    "share of variance between clips": {
        "target": "validation/health/target_clip_share",
        "prediction": "validation/health/prediction_clip_share",
    },
    "gradient norm": {"training": "gradient_norm"},
    "learning rate": {"training": "learning_rate"},
}

Series = tuple[np.ndarray, np.ndarray]  # steps, values
Run = list[dict[str, float]]


def read(workdir: Path) -> Run:
    """Return the rows of a run's metrics.jsonl, oldest first."""
    path = workdir / METRICS
    if not path.is_file():
        raise UserError(f"{path}: no such file; wanted the workdir of a run")
    return read_json_lines(path)


def newest(run: Run) -> dict[str, float]:
    """Return the newest value of each name."""
    return {name: value for row in run for name, value in row.items()}


def series(run: Run, key: str) -> Series:
    """Return the steps of the rows that have `key`, and its values."""
    found = [(row["step"], row[key]) for row in run if key in row]
    steps, values = np.array(found, float).reshape(-1, 2).T
    return steps, values
