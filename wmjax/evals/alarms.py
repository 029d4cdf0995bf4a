"""Alarms: what in a run's settings, first batch or reports shows that its training is not healthy.

Each is a text that names the figure and what to change. The loop prints them as warnings, and
`health/alarms` counts those of a report. Bounds were chosen with the runs of tests/sick.py.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from wmjax.evals import video
from wmjax.types import Row, WorldModelInput

# Targets. A healthy model predicts nearly the mean for its first hundreds of steps, so predictions
# may look collapsed for long. Measured with a model of width 48 over 2,000 steps: on generated
# shapes a cosine of at most 0.66, rank at least 12, clip share at least 0.84; on PushT, where nine
# tenths of the picture never change, 0.991, 24 and 0.49. Collapsed on purpose, it passed a cosine
# of 0.998 by step 125.
MAX_COSINE = 0.998
MIN_RANK = 2.0
MIN_CLIP_SHARE = 0.01
RANK_SHARE = 1 / 8  # of its highest; healthy: 0.19 and above; at ten times the rate: 0.08
DISTANCE = 0.7  # of target and encoder, relative to the encoder; healthy: 0.1 and below
JUMP = 10.0  # of the gradient norm, in medians of the reports before it; healthy: below 7
FALL = 0.1  # of a probe's R2; healthy: 0.06 and below
SETTLED = 300  # steps, and twice the warm-up, after which predictions should be better than nothing
SAME = 1e-3  # spread of predictions, relative to that of targets; healthy from the start: 5e-3

# Video, in levels of 0 to 255. Recordings have a spread of 17 and more and change by 0.5 and more;
# their frames have an order of at most 0.8, and of 0.93 and more once they are shuffled.
FLAT, STILL, SHUFFLED = 1.0, 0.01, 0.88

EASY_MASK = 0.1  # share of the tokens to predict; shipped configurations: 0.48 and more


def of_settings(
    config: Mapping[str, Any],
    sizes: Mapping[str, tuple[int, int]],
    tokens: int,
    has_target: bool,
) -> list[str]:
    """Return a text for each setting that makes training fail.

    sizes: context and target tokens of each mask. tokens: of a clip. has_target: an EMA target.
    """
    data, optim = config["data"], config["optim"]
    texts = []
    if data["batch_size"] == 1:
        texts.append(
            "data.batch_size=1: every update follows one clip; wanted 8 or more "
            "(optim.accumulate saves memory)"
        )
    if has_target:
        ema, final = optim["ema"], optim["final_ema"]
        last = ema if final is None or final < 0 else final
        if max(ema, last) ** optim["schedule_steps"] > 0.9:
            texts.append(
                f"optim.ema={max(ema, last):g}: the target stays as it began, which is random "
                "unless it starts from weights; wanted 0.99 to 0.9995"
            )
        if min(ema, last) < 0.5:
            texts.append(
                f"optim.ema={min(ema, last):g}: the target is the encoder itself, and both may "
                "collapse; wanted 0.99 to 0.9995"
            )
    starts = config["init_from"] or config["model"]["pretrained"]
    if warmup_steps(config) < 1 and not starts and optim["learning_rate"] > 0:
        texts.append(
            f"optim.warmup={optim['warmup']:g}: the first steps have the full learning rate, "
            "which random weights do not bear; wanted 0.02 to 0.1"
        )
    most = max((target for _, target in sizes.values()), default=tokens)
    if most < EASY_MASK * tokens:
        texts.append(
            f"mask: at most {most} of {tokens} tokens are predicted, which is too easy; wanted "
            "larger scale, blocks and target in a group"
        )
    return texts


def warmup_steps(config: Mapping[str, Any]) -> float:
    """Return the steps in which the learning rate rises; 0 if it starts at its peak."""
    optim = config["optim"]
    rises = optim["start_learning_rate"] < optim["learning_rate"]
    return optim["warmup"] * optim["schedule_steps"] if rises else 0.0


def of_batch(batch: WorldModelInput) -> list[str]:
    """Return a text if the video of a batch, as this process holds it, cannot teach anything."""
    observation = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), batch.observation)
    if not observation.video_BVTHWC.size:  # features stand in its place
        return []
    found = video.figures(observation.video_BVTHWC, observation.view_mask_BV, np)
    return _of_video({name: float(value) for name, value in found.items()})


def _of_video(row: Row) -> list[str]:
    flat, change = row.get("health/video_std", 255.0), row.get("health/video_change", 255.0)
    if flat < FLAT:
        return [
            f"a camera shows one colour: pixels of its clips vary by {flat:.2g} of 255 levels; "
            "look at it (python -m wmjax.viz --dataset=DIR), or leave it out with data.cameras"
        ]
    if change < STILL:
        return [
            f"a camera shows still pictures: its frames change by {change:.2g} of 255 levels; "
            "look at the recording, or choose other data.cameras or a larger data.stride"
        ]
    return []


class Alarms:
    """Judges the reports of a run, in order; `alarms(step, row)` returns the texts for one.

    warmup: steps of the warm-up. ema: whether the model has an EMA target. History is kept, so that
    falls and jumps are seen.
    """

    def __init__(self, warmup: float = 0.0, ema: bool = True) -> None:
        self._ema = ema
        self._settled = max(SETTLED, 2 * warmup)
        self._highest: dict[str, float] = {}  # of figures that should not fall
        self._best_relative = math.inf
        self._norms: deque[float] = deque(maxlen=20)

    def __call__(self, step: int, row: Row) -> list[str]:
        """Return a text for each thing that is wrong.

        row: of training, validation or the probe. If any figure is not finite, the only text
        reports divergence, because the figures then say nothing about the features.
        """
        if bad := [name for name, value in row.items() if not math.isfinite(value)]:
            first = min(bad, key=lambda name: ("loss" not in name, name))
            return [
                f"the model has diverged: {first} is {row[first]}; {len(bad)} of {len(row)} "
                "figures are not finite; lower optim.learning_rate or set optim.clip_norm"
            ]
        plain = {name.removeprefix("validation/"): value for name, value in row.items()}
        return [
            *self._collapse(plain),
            *self._prediction(step, plain),
            *self._gradients(plain),
            *self._probe(plain),
            *_of_video(plain),
            *_order(plain),
        ]

    def _collapse(self, row: Row) -> list[str]:
        remedy = "lower optim.learning_rate" + (", or raise optim.ema" if self._ema else "")
        cosine, rank, share, distance = (
            row.get(f"health/target_{name}")
            for name in ("cosine", "rank", "clip_share", "distance")
        )
        texts = []
        if cosine is not None and cosine > MAX_COSINE:
            texts.append(
                f"targets have collapsed to one token: mean cosine {cosine:.3f} between tokens; "
                f"{remedy}"
            )
        if rank is not None:
            highest = self._raise("rank", rank)
            if rank < MIN_RANK:
                texts.append(
                    f"targets have collapsed to a line: effective rank {rank:.1f}; {remedy}"
                )
            elif rank < RANK_SHARE * highest:
                texts.append(
                    f"targets lose directions: effective rank {rank:.1f}, it was {highest:.1f}; "
                    f"{remedy}"
                )
        if share is not None and share < MIN_CLIP_SHARE:
            texts.append(
                f"targets encode the position but not the content: {share:.1%} of their variance "
                "is between clips; use larger masks, or data that differs more"
            )
        if distance is not None and distance > DISTANCE:
            texts.append(
                f"target and encoder are apart: their parameters differ by {distance:.0%}; lower "
                "optim.ema or optim.learning_rate"
            )
        return texts

    def _prediction(self, step: int, row: Row) -> list[str]:
        spread, target = row.get("health/prediction_std"), row.get("health/target_std", 0.0)
        relative = row.get("relative")
        if relative is not None:
            self._best_relative = min(self._best_relative, relative)
        if step < self._settled:
            return []
        if spread is not None and spread < SAME * target:
            return [
                f"all predictions are the same: standard deviation {spread:.2g}, of targets "
                f"{target:.2g}; check the predictor, optim.freeze and optim.learning_rate"
            ]
        if relative is not None and relative >= 1 and self._best_relative > 0.98:
            return [
                f"predictions are no better than the mean token: error {relative:.2f} of its; "
                "change optim.learning_rate or the masks"
            ]
        return []

    def _gradients(self, row: Row) -> list[str]:
        norm = row.get("gradient_norm")
        if norm is None:
            return []
        before, self._norms = list(self._norms), deque([*self._norms, norm], self._norms.maxlen)
        if norm == 0:
            return ["the gradient is 0: nothing is learned; check optim.freeze and the loss"]
        usual = statistics.median(before) if len(before) >= 5 else math.inf
        if norm > JUMP * usual:
            return [
                f"the gradient norm jumps: {norm:.3g}, usually {usual:.3g}; set optim.clip_norm, "
                "or lower optim.learning_rate"
            ]
        return []

    def _probe(self, row: Row) -> list[str]:
        texts = []
        for name, trained in row.items():
            if not (name.startswith("probe/") and name.endswith("/trained")):
                continue
            label = name.split("/")[1]
            best = self._raise(name, trained)
            for kind, other in (("random weights", "random"), ("pixels", "pixels")):
                level = row.get(f"probe/{label}/{other}", -math.inf)
                # Training begins at random weights, and may need long to pass pixels: to fall below
                # either is a fault. A label that neither can tell says nothing.
                was_above = kind == "random weights" or best > level
                if level - FALL > 0 and trained < level - FALL and was_above:
                    texts.append(
                        f"features get worse: the probe of {label} has R2 {trained:.2f}, {kind} "
                        f"{level:.2f}; lower optim.learning_rate, or raise "
                        f"{'optim.ema or ' if self._ema else ''}data.batch_size"
                    )
                    break
        return texts

    def _raise(self, name: str, value: float) -> float:
        """Return the highest value of a figure so far."""
        self._highest[name] = max(value, self._highest.get(name, -math.inf))
        return self._highest[name]


def _order(row: Row) -> list[str]:
    order = row.get("health/frame_order", 0.0)
    if order < SHUFFLED:
        return []
    return [
        f"frames are not in order: a frame differs from the next by {order:.0%} of what it differs "
        "from any other of its clip; shuffled frames give 100%; look at the recording, or lower "
        "data.stride"
    ]
