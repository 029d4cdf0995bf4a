"""--mode=demo: shows each component of a run with its shapes, in about a minute on a CPU.

It takes two steps to show one, and saves neither. Pictures go to WORKDIR/demo.
"""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import ml_collections
import numpy as np

from wmjax import assemble
from wmjax.assemble import Setup
from wmjax.data.source import Source
from wmjax.errors import UserError
from wmjax.masking import Masks
from wmjax.models.base import Stage
from wmjax.run.console import say
from wmjax.run.metrics import fetch
from wmjax.step import Steps, TrainState
from wmjax.train import open_checkpoints, restore_or_init
from wmjax.types import Row, WorldModelInput
from wmjax.viz import draw
from wmjax.viz.features import fit_basis
from wmjax.viz.look import Look
from wmjax.viz.validation import Looker

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Keep = Callable[[str, Callable[[], "Figure"]], None]

# What the axes of an array mean, or the array itself; its suffix names the axes.
MEANING = {
    "video_BVTHWC": "instants, views (cameras), frames, height, width, RGB",
    "view_mask_BV": "False where a camera is missing",
    "state_BTS": "state of the robot at each frame",
    "context_ids_BK": "ids of the tokens that the encoder sees",
    "target_ids_BM": "ids of the tokens that are predicted",
    "action_BTPA": "all actions recorded between two frames",
}


def demo(
    config: ml_collections.ConfigDict, workdir: Path, *, mesh: jax.sharding.Mesh | None = None
) -> int:
    """Show configuration, batch, masks, forward pass, loss and a step; return the exit code 0."""
    if jax.default_backend() == "cpu":  # full optimisation costs more time than it saves here
        jax.config.update("jax_disable_most_optimizations", True)
    keep = keeper(workdir / "demo")
    setup = assemble.prepare(config, mesh=mesh)
    title(1, "configuration", "one file of values; configs/base.py explains every key")
    shape = " x ".join(f"{axis} {size}" for axis, size in setup.mesh.shape.items())
    say(assemble.outline(config))
    say(f"  devices   {setup.mesh.size} x {jax.devices()[0].device_kind}, arranged as {shape}")

    stream = assemble.make_pipeline(config, setup, "train", held_out=False)
    with contextlib.closing(stream) as batches:
        batch = next(batches)
    show_batch(setup.sources["train"], batch)
    show_masks(setup.masks)
    state = show_model(config, workdir, setup, batch)
    seen = Looker(setup.steps, setup.masks.grid)(state, batch)
    if not seen.finite:
        raise UserError(
            f"{workdir}: features of this model are not finite: it has diverged\n"
            "to see a fresh model: another --workdir"
        )
    basis = fit_basis(seen.target_BND)
    keep("batch", lambda: draw.clips(seen))
    if setup.masks.sizes:
        keep("masks", lambda: draw.masks(seen))
    keep("features", lambda: draw.components(seen, basis))
    show_loss(seen)
    if seen.hidden:
        keep("error", lambda: draw.errors(seen))
    show_step(setup.steps, state, batch)
    say("\nnothing of this is saved; to train, run the same command without --mode=demo")
    return 0


def keeper(folder: Path) -> Keep:
    """Return a function that saves a picture in the folder, or does nothing without matplotlib."""
    try:
        draw.need()
        folder.mkdir(parents=True, exist_ok=True)
    except UserError as error:
        say(f"no pictures: {error}")
        return lambda name, make: None
    except OSError as error:
        raise UserError(f"--workdir: cannot write {folder}: {error.strerror}") from error

    def keep(name: str, make: Callable[[], "Figure"]) -> None:
        if jax.process_index() == 0:
            draw.save(make(), folder / f"{name}.png")
            say(f"  picture: {folder / name}.png")

    return keep


def title(number: int, name: str, text: str) -> None:
    say(f"\n{number}. {name}: {text}")


def show_batch(source: Source, batch: WorldModelInput) -> None:
    title(2, "batch", "clips of the source, cropped and scaled on the host")
    say(f"  {source.describe()}")
    for path, array in jax.tree_util.tree_leaves_with_path(batch):
        name = next(key.name for key in reversed(path) if hasattr(key, "name"))
        if name in MEANING:
            say(f"  {name:15} {array.dtype!s:8} {array.shape!s:22} {MEANING[name]}")


def show_masks(masks: Masks) -> None:
    title(3, "masks", "tokens that the encoder sees, and tokens to predict; drawn for each clip")
    time, rows, columns = masks.grid
    say(f"  a clip is {time} x {rows} x {columns} tokens: time, rows, columns")
    for name, (context, target) in masks.sizes.items():
        say(f"  {name:10} always {context} context and {target} target tokens: one compilation")


def show_model(
    config: ml_collections.ConfigDict, workdir: Path, setup: Setup, batch: WorldModelInput
) -> TrainState:
    """Show parameters and stages; return the newest checkpoint's state, or a fresh one."""
    title(4, "forward pass", "the stages of the loss, and the shape of their results")
    with open_checkpoints(config, workdir) as checkpoints:
        newest = checkpoints.latest()
        state, _ = restore_or_init(config, checkpoints, setup)
    say(f"  parameters of step {newest}" if newest else "  fresh parameters")
    for name, part in state.params.items():
        say(f"  {name:10} {sum(leaf.size for leaf in jax.tree.leaves(part)):,} parameters")
    blueprint = setup.steps.blueprint
    for name, stage in blueprint.abstract.stages(batch).items():

        def run(state: TrainState, features: Any, stage: Stage = stage) -> Any:
            model, target = blueprint.join(state.params, state.frozen, state.target)
            return stage.run(model, target, batch, features)

        given = jax.eval_shape(run, state, stage.features)
        shapes = ", ".join(str(leaf.shape) for leaf in jax.tree.leaves(given))
        say(f"  {name:10} returns {shapes}: rows, tokens, width")
    say("  compiling ...")
    return state


def show_loss(seen: Look) -> None:
    title(5, "loss", "mean |prediction - target| over the target tokens, in feature space")
    for name, error_THW in draw.error_maps(seen).items():
        say(f"  {name:10} {np.nanmean(error_THW):.4f} for the clip in the pictures")


def show_step(steps: Steps, state: TrainState, batch: WorldModelInput) -> None:
    title(6, "step", "gradients, AdamW, then the EMA: target = m * target + (1 - m) * encoder")
    flop = steps.blueprint.abstract.flops(batch)
    work = f" for {flop / 1e9:.1f} GFLOP" if flop else ""
    say("  compiling ...")
    state, before, first = take_step(steps, state, batch)
    state, after, second = take_step(steps, state, batch)
    say(f"  loss {before['loss']:.4f}, then {after['loss']:.4f} on the same clips")
    say(f"  learning rate {before['learning_rate']:.2e}, gradient {before['gradient_norm']:.3f}")
    say(f"  {first:.1f} s with compilation, then {second:.2f} s{work}")
    if jax.default_backend() == "cpu":
        say("  training compiles with full optimisation: a slower start, faster steps")


def take_step(
    steps: Steps, state: TrainState, batch: WorldModelInput
) -> tuple[TrainState, Row, float]:
    """Return the state after a step, its metrics, and the seconds that it took."""
    begun = time.perf_counter()
    state, metrics = steps.train(state, batch)
    row = fetch(metrics)
    return state, row, time.perf_counter() - begun
