"""What a model makes of some clips: features of all their tokens, and predictions of the hidden.

Knows sources of clips, masks and loaded models; no configuration.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from wmjax.data.reader import Reader
from wmjax.data.source import Source
from wmjax.inference import Model
from wmjax.masking import Grid, Masks
from wmjax.models.vjepa2 import TARGET_EPS
from wmjax.nn.norm import layer_norm


class Hidden(NamedTuple):
    """One mask on the clip that is shown; prediction_MD is None where there is no predictor."""

    context_ids_K: np.ndarray
    target_ids_M: np.ndarray
    prediction_MD: np.ndarray | None


@dataclasses.dataclass
class Look:
    """Clips as the model sees them; the first is the one that is shown.

    target_BND: features of every token as the loss has them, normalised over their width. hidden:
    the masks of the first clip, by name. names: of the clips.
    """

    video_BTHWC: np.ndarray
    target_BND: np.ndarray
    grid: Grid
    hidden: Mapping[str, Hidden]
    names: list[str]

    @property
    def tubelet(self) -> int:
        """Frames of a token."""
        return self.video_BTHWC.shape[1] // self.grid[0]

    @property
    def finite(self) -> bool:
        """Whether there is anything to draw: a model that diverged has no features."""
        predictions = [h.prediction_MD for h in self.hidden.values() if h.prediction_MD is not None]
        return all(np.isfinite(array).all() for array in (self.target_BND, *predictions))


def read_clips(
    source: Source,
    masks: Masks,
    *,
    size: tuple[int, int],
    count: int,
    seed: int,
    skip: bool,
) -> list[dict]:
    """Read clips from all over a source, cropped to the centre; `seed` decides which.

    size: height and width. skip: others take the place of those that cannot be read.
    """
    reader = Reader(source, masks, height=size[0], width=size[1], seed=seed, skip=skip)
    numbers = np.random.default_rng(seed).permutation(source.draws)[:count].tolist()
    return [reader.read(i, number)[0] for i, number in enumerate(numbers)]


def look(model: Model, clips: Iterable[dict], masks: Masks) -> Look:
    """Encode the clips one by one, and predict what each mask hides of the first.

    Of several cameras it is the first that recorded the clip.
    """
    videos, targets, names = [], [], []
    hidden: dict[str, Hidden] = {}
    for clip in clips:
        video = clip["video"][int(clip["view_mask"].argmax())]
        videos.append(video)
        targets.append(np.asarray(layer_norm(model.encode(video), TARGET_EPS)))
        names.append(f"clip {clip['sample_id']}")
        for i, name in enumerate(masks.sizes if not hidden else ()):
            ids = clip[f"context_{i}"], clip[f"target_{i}"]
            predicts = "predictor" in model.params
            prediction = np.asarray(model.predict(video, *ids)) if predicts else None
            hidden[name] = Hidden(*ids, prediction)
    return Look(np.stack(videos), np.stack(targets), masks.grid, hidden, names)
