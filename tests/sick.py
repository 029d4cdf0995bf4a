"""Sick and healthy runs on generated video and recordings, for the alarms (test_alarms.py).

`python tests/sick.py OUT NAME...` trains runs, a process each, and writes OUT/NAME.jsonl, the
rows of their reports. WMJAX_DATA: the folder of the recordings (default: ../shared/data).
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from wmjax.data.synthetic import SyntheticSource
from wmjax.models import vjepa2

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("WMJAX_DATA", ROOT.parent / "shared/data"))


class Generated(SyntheticSource):
    """Generated video, with its arguments taken from the data group."""

    def __init__(self, frames, height, width, seed, split, views=1):
        super().__init__(
            frames=frames, height=height, width=width, views=views, stride=1, seed=seed, split=split
        )

    def __getitem__(self, index):
        clip = super().__getitem__(index)
        views = [
            self.change(view, list(frames), index) for view, frames in enumerate(clip["frames_VT"])
        ]
        return clip | {"frames_VT": views}


class OneColour(Generated):
    def change(self, view, frames, index):
        return [np.full_like(frame, 90) for frame in frames]


class Still(Generated):
    def change(self, view, frames, index):
        return [frames[0]] * len(frames)


class BlackCamera(Generated):
    def change(self, view, frames, index):
        return [np.zeros_like(frame) for frame in frames] if view else frames


class Shuffled(Generated):
    def change(self, view, frames, index):
        order = np.random.default_rng(index).permutation(len(frames))
        return [frames[i] for i in order]


class DeadPredictor(vjepa2.VJEPA2):
    """Its predictor gives one constant token."""

    def loss(self, target, batch, key):
        real = self.predictor
        self.predictor = lambda *arguments: [0.0 * z + 0.1 for z in real(*arguments)]
        try:
            return super().loss(target, batch, key)
        finally:
            self.predictor = real


class Overflowing(vjepa2.VJEPA2):
    """Activations that leave the range of bfloat16 in some batches."""

    def target_features(self, target, video_BTHWC):
        x = super().target_features(target, video_BTHWC).astype(jnp.bfloat16)
        return (x * jnp.where(jnp.max(x) > 4.6, 3e38, 1)).astype(jnp.float32) * 2


STEPS = 1500
SIZES = (  # of debug_world_model; another model.name starts from its own defaults
    "model.size=tiny",
    "model.width=288",
    "model.depth=4",
    "model.heads=6",
    "model.patch=8",
    "model.predictor_width=144",
    "model.predictor_depth=2",
    "model.predictor_heads=6",
    "model.remat=none",
    "model.scan=False",
)
DEBUG = (
    "config=debug_world_model",
    "train.num_steps=300",
    f"optim.schedule_steps={STEPS}",
    "train.eval_every=50",
    "eval.probe_every=50",
    "train.log_every=10",
    "checkpoint.every=100000",
)
SICK = {
    "rate": ("optim.learning_rate=3e-3", "optim.ema=0.9"),
    "rate_high": ("optim.learning_rate=2e-2",),
    "ema_0": ("optim.ema=0.0",),
    "ema_1": ("optim.ema=1.0",),
    "no_warmup": ("optim.warmup=0.0",),
    "constant": ("data.source=sick:OneColour",),
    "still": ("data.source=sick:Still",),
    "easy_masks": tuple(
        f"mask.{group}.{key}={value}"
        for group in ("short", "long")
        for key, value in {"scale": 0.06, "blocks": 1, "context": 0.9, "target": 0.05}.items()
    ),
    "black_camera": ("data.source=sick:BlackCamera", "data.views=2"),
    "dead_predictor": ("model.name=sick:DeadPredictor", *SIZES, "model.dtype=float32"),
    "frozen_predictor": ("optim.freeze=predictor/**",),
    "overflow": ("model.name=sick:Overflowing", *SIZES, "model.dtype=bfloat16"),
    "diverging": ("optim.learning_rate=30.0", "model.dtype=bfloat16"),
    "shuffled": ("data.source=sick:Shuffled",),
    "batch_of_one": ("data.batch_size=1",),
}
TINY = (
    "model.size=tiny",
    "data.image_size=64",
    "train.num_steps=2000",
    "optim.schedule_steps=2000",
    "train.eval_every=100",
    "eval.probe_every=500",
    "train.log_every=10",
    "checkpoint.every=100000",
    "data.workers=2",
)
HEALTHY = {
    f"{name}_{seed}": (f"config={name}", *TINY, *more, f"seed={seed}")
    for name, more in {
        "debug_world_model": ("data.workers=0",),
        "vjepa2_aloha": ("data.root=aloha_sim_transfer_v3",),
        "vjepa2_small": ("data.root=pusht_explore_v3",),
        "vjepa2_low_mem": ("data.root=g1_subset_v30", "data.cameras=observation.images.cam_high"),
        "vjepa2_world_model": ("data.root=aloha_sim_transfer_v3",),
    }.items()
    for seed in (0, 1)
}


def arguments(name):
    """Return the configuration and the overrides of a run."""
    return (*DEBUG, *SICK[name]) if name in SICK else HEALTHY[name]


def overrides(name):
    """Return the flags of wmjax.main for a run."""
    given = [text.replace("data.root=", f"data.root={DATA}/") for text in arguments(name)]
    return [f"--{text}" if text.startswith("config=") else f"--config.{text}" for text in given]


def train(out, name, memory):
    """Train a run in a process of its own; return (name, exit code, the last lines it printed)."""
    workdir = out / "runs" / name
    child = subprocess.run(
        [sys.executable, "-m", "wmjax.main", *overrides(name), f"--workdir={workdir}"],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "XLA_PYTHON_CLIENT_MEM_FRACTION": str(memory),
        },
        capture_output=True,
        text=True,
    )
    lines = (child.stdout + child.stderr).splitlines()
    (out / f"{name}.txt").write_text("\n".join(lines))
    if (workdir / "metrics.jsonl").exists():
        shutil.copy(workdir / "metrics.jsonl", out / f"{name}.jsonl")
    return name, child.returncode, lines[-2:]


def main():
    out, *names = sys.argv[1:]
    out = Path(out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    names = {"sick": [*SICK], "healthy": [*HEALTHY]}.get(names[0], names)
    with ThreadPoolExecutor(len(names)) as pool:
        for result in pool.map(lambda name: train(out, name, 0.9 / len(names)), names):
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
