"""Computes what pictures of a model that acts show: energies of actions, and imagined frames."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wmjax.inference import Model

POINTS = 21  # actions along each side of the landscape
CLIPS = 3  # whose roll-outs are shown


@dataclasses.dataclass
class Acted:
    """What a model that acts makes of some clips.

    energy_YX: distance to the first clip's second frame, of one block that repeats one action; its
    first two numbers are those of `x_X` and `y_Y`, the others are as recorded. taken: the mean of
    the recorded block. numbers: their places in an action.
    true_CT: recorded frames; nearest_CT: the recorded frames, of all clips, that are nearest to
    what the model imagines from the first frame and the recorded actions. uint8 RGB, HWC.
    """

    energy_YX: np.ndarray
    x_X: np.ndarray
    y_Y: np.ndarray
    taken: tuple[float, float]
    numbers: tuple[int, int]
    true_CT: list[list[np.ndarray]]
    nearest_CT: list[list[np.ndarray]]


def act(model: Model, clips: Sequence[Mapping[str, Any]]) -> Acted | None:
    """Imagine from the clips, as reader.Reader gives them; None: the model takes other actions.

    Energies need an action of two numbers or more that vary.
    """
    shown = [_shown(model, clip) for clip in clips]
    about = model.recordings[0]
    size = int(about["action_size"])
    actions = [np.asarray(clip["action"])[..., :size] for clip in clips]  # TPA
    blocks = np.concatenate(actions).reshape(-1, size)
    spread = blocks.std(axis=0)
    varied = np.flatnonzero(spread > 0)[:2]
    if len(varied) < 2:
        return None
    x, y = (int(number) for number in varied)
    recorded_PA = actions[0][0]
    low, high = blocks.min(axis=0), blocks.max(axis=0)
    x_X, y_Y = (np.linspace(low[i], high[i], POINTS) for i in (x, y))
    tried = np.repeat(recorded_PA[None], POINTS * POINTS, axis=0)
    tried[:, :, x] = np.tile(x_X, POINTS)[:, None]
    tried[:, :, y] = np.repeat(y_Y, POINTS)[:, None]
    energy = model.energy(shown[0][0], shown[0][1], tried, recording=str(about["name"]))

    frames = [_frames(clip) for clip in clips]
    each = [_embedding(model, shown_TF) for shown_TF in shown]
    every_FND = np.concatenate(each)
    every = [picture for pictures in frames for picture in pictures]
    nearest = []
    for number in range(min(CLIPS, len(clips))):
        steps = actions[number][: len(frames[number]) - 1].reshape(-1, size)
        ahead = model.rollout(shown[number][0], steps, recording=str(about["name"]))
        apart_HF = np.abs(ahead[:, None] - every_FND[None]).mean(axis=(2, 3))
        found = [every[index] for index in apart_HF.argmin(axis=1)]
        nearest.append([frames[number][0], *found])
    return Acted(
        energy[:, 0].reshape(POINTS, POINTS),
        x_X,
        y_Y,
        (float(recorded_PA[:, x].mean()), float(recorded_PA[:, y].mean())),
        (x, y),
        frames[: len(nearest)],
        nearest,
    )


def _frames(clip: Mapping[str, Any]) -> list[np.ndarray]:
    """Return the frames of the first camera with a valid view."""
    return list(clip["video"][int(np.argmax(clip["view_mask"]))])


def _shown(model: Model, clip: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each frame of a clip as a robot would show it."""
    about = model.recordings[0]
    cameras, size = about["cameras"], int(about["state_size"])
    return [
        {camera: clip["video"][view][t] for view, camera in enumerate(cameras)}
        | ({"state": np.asarray(clip["state"])[t, :size]} if size else {})
        for t in range(clip["video"].shape[1])
    ]


def _embedding(model: Model, shown_T: list[dict[str, Any]]) -> np.ndarray:
    """Return the embedding of each frame of a clip, TND."""
    stacked = {key: np.stack([each[key] for each in shown_T]) for key in shown_T[0]}
    return model.embed(stacked)
