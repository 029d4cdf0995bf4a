"""--mode=eval: runs every evaluator of eval.evaluators on the newest checkpoint of a run."""

import re
from pathlib import Path
from typing import Any

import jax
import ml_collections

from wmjax import __version__, assemble
from wmjax import config as configs
from wmjax.data.pipeline import Beside, Pipeline
from wmjax.errors import UserError
from wmjax.evals import names, verdict
from wmjax.evals.alarms import Alarms
from wmjax.run import agree
from wmjax.run.clock import row_of
from wmjax.run.console import say
from wmjax.run.reporter import EVALUATIONS, append_evaluation
from wmjax.run.saved import rules_of
from wmjax.step import TrainState
from wmjax.train import CHECKPOINTS, open_checkpoints, restore_or_init


def evaluate(
    config: ml_collections.ConfigDict, workdir: Path, *, mesh: jax.sharding.Mesh | None = None
) -> int:
    """Evaluate the newest checkpoint in workdir, or without one a fresh model.

    Prints the figures, appends them as a line to evals.jsonl, and returns the exit code 0.
    """
    if not names(config.eval.to_dict()):
        raise UserError("eval.evaluators is empty: wanted one or more, as in validation,probe")
    agree.on_workdir(workdir)
    rules = rules_of(workdir / CHECKPOINTS)
    agree.on_program(configs.plain(config))
    setup = assemble.prepare(config, ("train", "validation"), mesh, rules=rules)
    agree.on_data(setup.sources)
    step, state = load_newest(config, workdir, setup)
    for split, source in setup.sources.items():
        say(f"{split}: {source.describe()}")

    def open_batches(split: str, frames: int = 0, batches: int = 0) -> Pipeline | Beside:
        return assemble.make_pipeline(
            config, setup, split, held_out=True, frames=frames, batches=batches
        )

    entry: dict[str, Any] = {"step": step, "run": describe(config, workdir, setup, step, state)}
    row: dict[str, float] = {}
    judge = Alarms(ema=bool(state.target))
    say("compiling and reading clips ...")
    for evaluator in assemble.open_evaluators(config, setup, workdir, open_batches):
        found = evaluator(step, state)
        figures = "\n".join(f"{key:40} {value:.4f}" for key, value in sorted(found.row.items()))
        say(found.text or figures)
        for warning in judge(step, found.row):
            say(f"warning: step {step}: {warning}")
        entry |= found.entry or found.row
        row |= found.row
    entry["verdict"] = {f.key: f.better for f in verdict.findings(row)}
    append_evaluation(workdir, entry)
    say(f"added to {workdir / EVALUATIONS}; what each figure means: wmjax/evals/README.md")
    if said := verdict.text(row, step):
        say(verdict.wrapped(said))
    return 0


def describe(
    config: ml_collections.ConfigDict,
    workdir: Path,
    setup: assemble.Setup,
    step: int,
    state: TrainState,
) -> dict[str, Any]:
    """Return what figures of a run depend on, as JSON has it; of paths only the last part."""
    plain, source = configs.plain(config), setup.sources["train"]
    trained = row_of(workdir / "goodput.jsonl", step) or {}
    leaves = jax.tree.leaves((state.params, state.frozen))
    return {
        "seed": config.seed,
        "settings": {name: _without_folders(plain[name]) for name in ("model", "data", "optim")},
        "recordings": [about["name"] for about in source.recordings()],
        "fingerprint": source.fingerprint(),
        "parameters": sum(leaf.size for leaf in leaves),
        "trained": {key: trained[key] for key in ("seconds", "devices") if key in trained},
        "evaluated": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": agree.versions() | {"wmjax": __version__, "source": agree.source_hash()},
    }


def _without_folders(value: Any) -> Any:
    """Return settings with the last part of each absolute path."""
    if isinstance(value, dict):
        return {key: _without_folders(each) for key, each in value.items()}
    return re.sub(r"(?<![^,:])[/~][^,:]*/", "", value) if isinstance(value, str) else value


def load_newest(
    config: ml_collections.ConfigDict, workdir: Path, setup: assemble.Setup
) -> tuple[int, TrainState]:
    """Return the newest step and its state; without a checkpoint 0 and a fresh state.

    A run that goes on in the workdir may delete the checkpoint meanwhile: then the next one is
    loaded.
    """
    while True:
        before = steps_in(workdir)
        try:
            with open_checkpoints(config, workdir) as checkpoints:
                step = checkpoints.latest() or 0
                say(f"{workdir}: {f'step {step}' if step else 'no checkpoint: a fresh model'}")
                return step, restore_or_init(config, checkpoints, setup)[0]
        except Exception as error:  # the type depends on the file that is gone
            gone = before - steps_in(workdir)
            if not gone:
                raise
            text = f"{workdir}: a run deleted step {max(gone)} while it was read"
            if jax.process_count() > 1:  # only some of the processes may have failed
                raise UserError(f"{text}: run the same command again") from error
            say(f"{text}; reading the newest")


def steps_in(workdir: Path) -> set[int]:
    """Return the steps of the checkpoints in a workdir."""
    return {int(path.name) for path in (workdir / CHECKPOINTS).glob("*") if path.name.isdigit()}
