"""The smallest run that goes through every room, and ways to run it in this or a new process."""

import json
import os
import subprocess
import sys
from pathlib import Path

from wmjax import config as configs

ROOT = Path(__file__).parents[1]

OVERRIDES = (
    "model.width=48",
    "model.depth=2",
    "model.heads=2",
    "model.predictor_width=32",
    "model.predictor_depth=1",
    "model.predictor_heads=2",
    "data.frames=4",
    "data.image_size=32",
    "data.batch_size=8",
    "optim.schedule_steps=20",
    "train.num_steps=4",
    "train.log_every=1",
    "train.eval_every=0",
    "eval.probe_every=0",
    "checkpoint.every=1000",
)
LEWM = (  # further sizes of lewm
    *("model.embedding=32", "model.projector=32", "model.predictor_depth=1"),
    *("model.predictor_heads=2", "model.predictor_head_width=8", "model.predictor_hidden=32"),
    *("model.head_width=32", "model.head_depth=1", "model.projections=16"),
)
# Runs a command with SIGHUP and SIGINT as in a terminal: nohup, and jobs of a shell in the
# background, ignore them. A preexec_fn would fork, of which jax warns.
AS_IN_A_TERMINAL = (
    sys.executable,
    "-c",
    "import os, signal, sys\n"
    "for number in (signal.SIGHUP, signal.SIGINT):\n"
    "    signal.signal(number, signal.SIG_DFL)\n"
    "os.execvp(sys.argv[1], sys.argv[1:])",
)
FLOP = 107_139_072  # of one step on 8 clips; test_bench counts it by hand


def config(*overrides):
    return configs.load("debug_world_model", [*OVERRIDES, *overrides])


def mesh(config, devices=1):
    """Arrange the first `devices` devices as the configuration says."""
    import jax

    from wmjax import sharding

    return sharding.make_mesh(config.mesh.data, config.mesh.fsdp, jax.devices()[:devices])


def prepare(config, splits=("train",), *, devices=1, sources=None):
    from wmjax import assemble

    return assemble.prepare(config, splits, mesh(config, devices), sources)


def train(config, workdir, *, devices=1, on_step=lambda step, metrics, batch: None):
    """Train in this process, on one of its eight devices.

    They take turns on a CPU: one is faster where sharding is no matter.
    """
    from wmjax.train import train

    return train(config, workdir, mesh=mesh(config, devices), on_step=on_step)


def evaluate(config, workdir, *, devices=1):
    from wmjax.commands.evaluate import evaluate

    return evaluate(config, workdir, mesh=mesh(config, devices))


def command(workdir, *overrides):
    settings = [f"--config.{override}" for override in (*OVERRIDES, *overrides)]
    return [
        *(sys.executable, "-m", "wmjax.main", "--config=debug_world_model"),
        f"--workdir={workdir}",
        *settings,
    ]


def environment(devices):
    """A new process has `devices` fake CPU devices and finds this checkout first."""
    return os.environ | {
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }


def run(workdir, *overrides, devices=1):
    """Train in a new process; return the finished process with its output as text."""
    return subprocess.run(
        command(workdir, *overrides),
        env=environment(devices),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )


def rows(workdir):
    """Rows of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
