"""The table of closed-loop results: systems, each trained from several seeds, on the same starts.

A run's row is a line of its evals.jsonl: `run` says what was trained, `closed_loop` has every
episode. The rows of a system differ in the training seed only.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wmjax.errors import UserError
from wmjax.run.files import from_json, read_json_lines

Row = Mapping[str, Any]  # of a run
Systems = Mapping[str, Sequence[Row]]  # by name
Cells = dict[str, Any]  # a line of a table: its values by column
SIMPLE = {"recorded": "recorded actions", "random": "random actions", "still": "no action"}
OTHER = ("lost", "validation")  # phases of a run's clock that are no training
# Keys that change no result, or its last bits only.
NO_MATTER = {
    "threads",
    "workers",
    "prefetch",
    "cache",
    "attention",
    "gelu",
    "norm",
    "remat",
    "scan",
}
RATES = ("official", "near", "middle", "far", "turning", "strict")
# Figures of others, trained on other data: simulator -> (system, goal, %). Sources: the papers of
# LeWM and INTACT, and the result files of petr-ivashkov/sensorimotor-world-model,
# DavidSunok/CLEAR-LeWM, pickxiguapi/LeWorldModel-pp and kevinghst/H-JEPA.
PUBLISHED: Mapping[str, Sequence[tuple[str, int, str]]] = {
    "swm/PushT-v1": (
        ("LeWM, paper, 3 training seeds", 25, "96.0 ± 2.8"),
        ("LeWM, by SMWM's authors, 5 training seeds, held out", 25, "88.8 ± 1.6"),
        ("LeWM, by CLEAR-LeWM, 3 choices of starts", 25, "86.3 ± 2.1, strict 70.3 ± 4.0"),
        ("LeWM in JAX, by LeWM++'s authors", 25, "80 ± 6"),
        ("LeWM in JAX, by LeWM++'s authors", 50, "35"),
        ("LeWM in JAX, by LeWM++'s authors", 75, "16"),
        ("LeWM, by H-JEPA's authors, own protocol", 75, "40.0 ± 2.3"),
        ("H-JEPA, own protocol", 75, "45.3 ± 1.3"),
        ("INTACT, CEM, 3 training seeds", 25, "93.6 ± 1.0"),
        ("LeWM++, 3 choices of starts", 25, "96.0 ± 1.6"),
    ),
    "tworoom": (
        ("LeWM, paper", 25, "87"),
        ("LeWM, by SMWM's authors, 5 training seeds", 25, "92.6 ± 0.9"),
        ("LeWM, by CLEAR-LeWM, to the other room only", 25, "84.0 ± 3.0, strict 58.3 ± 2.3"),
    ),
}


def read_run(workdir: Path) -> Row:
    """Return the newest row of --mode=eval with closed-loop results."""
    path = workdir / "evals.jsonl"
    rows = [row for row in read_json_lines(path) if "run" in row and "closed_loop" in row]
    if not rows:
        raise UserError(f"{path}: no closed-loop results: wanted --mode=eval with eval.env first")
    return rows[-1]


def read_file(path: Path) -> list[Row]:
    """Return the rows of a file that `python -m wmjax.evals --out` wrote."""
    try:
        return from_json(path.read_bytes())["runs"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: cannot be read: wanted a workdir, or a file of --out") from None


def table(systems: Systems) -> list[dict[str, Any]]:
    """Return a section for each simulator: env, and lines of rates, starts and systems.

    Raises UserError where the runs of a system differ in more than the seed, and where systems were
    tried from other starts.
    """
    for name, rows in systems.items():
        _check_runs(name, rows)
    sections: dict[str, dict[str, Sequence[Row]]] = {}
    for name, rows in systems.items():
        sections.setdefault(rows[0]["closed_loop"]["env"], {})[name] = rows
    return [_section(env, sections[env]) for env in sorted(sections)]


def _check_runs(name: str, rows: Sequence[Row]) -> None:
    seeds = [row["run"]["seed"] for row in rows]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{name}: training seeds {seeds}: wanted one run of each seed")
    first, *others = map(_identity, rows)
    for seed, other in zip(seeds[1:], others, strict=True):
        for key in first.keys() | other.keys():
            found, wanted = other.get(key), first.get(key)
            if found != wanted:
                raise UserError(
                    f"{name}: {key} is {wanted} with seed {seeds[0]}, {found} with seed {seed}: "
                    "wanted runs that differ in the seed only"
                )


def _identity(row: Row) -> dict[str, Any]:
    """Return what the runs of a system share."""
    played = row["closed_loop"]
    settings = {
        f"{group}.{key}": value
        for group, values in row["run"]["settings"].items()
        for key, value in values.items()
        if key not in NO_MATTER
    }
    trials = [(trial["goal"], trial["seed"]) for trial in played["trials"]]
    shared = {"step": row["step"], "plan": played["settings"], "goals and seeds": trials}
    return settings | shared | {"eval.env": played["env"]}


def _section(env: str, systems: Systems) -> dict[str, Any]:
    # By goal and seed of the starts: who played it first, and the trial.
    first: dict[tuple[int, int], tuple[str, Row]] = {}
    for name, rows in systems.items():
        for trial in (trial for row in rows for trial in row["closed_loop"]["trials"]):
            key = trial["goal"], trial["seed"]
            other, same = first.setdefault(key, (name, trial))
            if (trial["apart"], trial["turned"]) != (same["apart"], same["turned"]):
                raise UserError(
                    f"{name} and {other}: other starts in {env}, goal {key[0]}, seed {key[1]}: "
                    "wanted the same recording, data.val_share and eval.env_episodes"
                )
    lines: list[Cells] = []
    starts: list[Cells] = []
    for goal in sorted({goal for goal, _ in first}):
        for name, rows in systems.items():
            if runs := [some for row in rows if (some := _of(row["closed_loop"]["trials"], goal))]:
                lines.append({"system": name, "goal": goal, **rates(*runs, policy="planned")})
        trials = _of([trial for _, trial in first.values()], goal)
        lines += [
            {"system": title, "goal": goal, **rates(trials, policy=policy)}
            for policy, title in SIMPLE.items()
        ]
        lines += [
            {"system": system, "goal": goal, "published, other data": figure}
            for system, its_goal, figure in PUBLISHED.get(env, ())
            if its_goal == goal
        ]
        starts.append(_starts(goal, trials))
    return {
        "env": env,
        "rates": lines,
        "starts": starts,
        "systems": [_system(name, rows) for name, rows in systems.items()],
    }


def _of(trials: Sequence[Row], goal: int) -> list[Row]:
    return [trial for trial in trials if trial["goal"] == goal]


def rates(*runs: Sequence[Row], policy: str) -> Cells:
    """Return mean and deviation over runs, in %; a run is the trials of a goal, taken together."""
    found: dict[str, list[float]] = {}
    for trials in runs:
        keys = "apart", "turned", "strict_at_start"
        apart, turned, unjudged = (_joined(trials, key) for key in keys)
        usual, strict = (
            np.concatenate([trial[rule].get(policy, []) for trial in trials])
            for rule in ("official", "strict")
        )
        thirds, most = (
            [usual[part] for part in np.array_split(np.argsort(hard, kind="stable"), 3)]
            for hard in (apart, turned)
        )
        turning = most[-1] if np.any(turned) else most[-1][:0]
        judged = strict[unjudged == 0] if len(strict) else strict
        for column, reached in zip(RATES, (usual, *thirds, turning, judged), strict=True):
            if len(reached):
                found.setdefault(column, []).append(100 * float(np.mean(reached)))
    return {
        column: {
            "mean": round(float(np.mean(each)), 2),
            "std": round(float(np.std(each, ddof=1)), 2) if len(each) > 1 else None,
        }
        for column, each in found.items()
    }


def _joined(trials: Sequence[Row], key: str) -> np.ndarray:
    return np.concatenate([trial[key] for trial in trials])


def _starts(goal: int, trials: Sequence[Row]) -> Cells:
    """Return how many starts there are, and how hard they are."""

    def quantiles(values: np.ndarray) -> str:
        return " / ".join(f"{value:.0f}" for value in np.quantile(values, (0.1, 0.5, 0.9)))

    return {
        "goal": goal,
        "starts": sum(len(trial["clips"]) for trial in trials),
        "choices": len(trials),
        "left out, at the goal": sum(trial["solved"] for trial in trials),
        "not judged by strict": int(_joined(trials, "strict_at_start").sum()),
        "begin like training": sum(trial["familiar"] for trial in trials),
        "must move, 10/50/90 %": quantiles(_joined(trials, "apart")),
        "must turn, degrees": quantiles(np.rad2deg(_joined(trials, "turned"))),
    }


def _system(name: str, rows: Sequence[Row]) -> Cells:
    """Return what a system is; minutes: of a run without validation and lost time, the mean."""
    run, played = rows[0]["run"], rows[0]["closed_loop"]
    spent = [row["run"]["trained"].get("seconds", {}) for row in rows]
    busy = [sum(s for phase, s in each.items() if phase not in OTHER) / 60 for each in spent]
    devices = {row["run"]["trained"].get("devices", "") for row in rows}
    versions = {f"{n} {row['run']['versions'][n]}" for row in rows for n in ("wmjax", "jax")}
    return {
        "system": name,
        "training seeds": ", ".join(str(row["run"]["seed"]) for row in rows),
        "model": run["settings"]["model"]["name"],
        "parameters": f"{run['parameters'] / 1e6:.2f} M",
        "steps": rows[0]["step"],
        "clips a step": run["settings"]["data"]["batch_size"],
        "minutes": f"{np.mean(busy):.1f}",
        "trained on": ", ".join(sorted(devices)),
        "plan": played["plan"],
        "recording": ", ".join(run["recordings"]),
        "its frames": run["fingerprint"].get("frames"),
        "versions": ", ".join(sorted(versions)),
    }


def markdown(sections: Sequence[Mapping[str, Any]]) -> str:
    """Return the sections as Markdown."""
    parts = []
    for section in sections:
        parts.append(
            f"**{section['env']}**: goals reached, in %: mean ± standard deviation over training "
            "seeds. near, middle, far: a third of the starts each, by how far the object must "
            "move; turning: the third that must turn most."
        )
        first = "system", "goal", *RATES, "published, other data"
        parts += [_grid(section["rates"], first), _grid(section["starts"])]
        parts.append(_grid(section["systems"]))
    return "\n\n".join(parts) or "No results yet."


def _grid(lines: Sequence[Cells], header: Sequence[str] = ()) -> str:
    header = header or list(lines[0])
    cells = [[_text(line.get(column)) for column in header] for line in lines]
    rows = [header, ["---"] * len(header), *cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value['mean']:.1f}" + ("" if value["std"] is None else f" ± {value['std']:.1f}")
    return "" if value is None else str(value)
