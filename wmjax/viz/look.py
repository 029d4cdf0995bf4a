"""Computes features of all tokens of some clips, and predictions of hidden tokens.

Knows sources, masks and loaded models, but no configuration.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from wmjax.data.reader import Reader
from wmjax.data.source import Source
from wmjax.inference import Model
from wmjax.masking import Grid, Masks
from wmjax.types import Term, WorldModelInput


class Hidden(NamedTuple):
    """The prediction of one loss term for the clip that is shown.

    context_ids_K: ids of the tokens that the encoder sees; empty for a term without a mask.
    target_ids_M: ids of the predicted tokens. prediction_MD: their predicted features; None if the
    weights lack a part of the model. target_MD: their true features; None if the term has none.
    """

    context_ids_K: np.ndarray
    target_ids_M: np.ndarray
    prediction_MD: np.ndarray | None
    target_MD: np.ndarray | None


@dataclasses.dataclass
class Look:
    """Features and predictions for B clips. The first clip is the one that pictures show.

    video_BTHWC: uint8 RGB. target_BND: features of every token in the space of the loss. grid:
    tokens along time, rows, columns. hidden: predictions for the first clip, by loss term. names:
    of the clips.
    """

    video_BTHWC: np.ndarray
    target_BND: np.ndarray
    grid: Grid
    hidden: Mapping[str, Hidden]
    names: list[str]

    @property
    def tubelet(self) -> int:
        """Frames that one token covers."""
        return self.video_BTHWC.shape[1] // self.grid[0]

    @property
    def finite(self) -> bool:
        """Whether all features and predictions are finite; False for a model that diverged."""
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
    """Read `count` random clips of a source, cropped to the centre.

    size: height and width in pixels. seed: selects clips and draws masks. skip: True replaces
    unreadable clips by others; False raises.
    """
    reader = Reader(source, masks, height=size[0], width=size[1], seed=seed, skip=skip)
    numbers = np.random.default_rng(seed).permutation(source.draws)[:count].tolist()
    return [reader.read(i, number)[0] for i, number in enumerate(numbers)]


def look(model: Model, clips: Sequence[dict], masks: Masks) -> Look:
    """Encode the clips one by one, and compute the loss terms of the first one.

    Each clip is shown from its first camera with a valid view.
    """
    videos, targets, names = [], [], []
    for clip in clips:
        video = clip["video"][_camera(clip)]
        videos.append(video)
        targets.append(np.asarray(model.target_features(video)))
        names.append(f"clip {clip['sample_id']}")
    first = clips[0]
    context = {name: first[f"context_{i}"] for i, name in enumerate(masks.sizes)}
    if model.complete:
        batch = WorldModelInput.of({k: np.asarray(v)[None] for k, v in first.items()}, [*context])
        hidden = hidden_by(model.terms(batch), context, _camera(first))
    else:
        of_masks = ((name, first[f"target_{i}"]) for i, name in enumerate(masks.sizes))
        hidden = {name: Hidden(context[name], ids, None, None) for name, ids in of_masks}
    return Look(np.stack(videos), np.stack(targets), masks.grid, hidden, names)


def hidden_by(
    terms: Mapping[str, Term], context: Mapping[str, np.ndarray], camera: int
) -> dict[str, Hidden]:
    """Return the prediction of each term with token ids, for one camera of the first instant.

    terms: of a batch. context: context ids of the first instant, by mask; masks and terms share
    names.
    """
    found = {}
    for name, term in terms.items():
        if term.prediction_RMD is None or term.target_RMD is None or term.ids_RM is None:
            continue
        # Rows are views, the first instant's first; or each row is an instant with all its views.
        row = camera if len(term.ids_RM) > camera else 0
        found[name] = Hidden(
            context.get(name, np.zeros(0, int)),
            np.asarray(term.ids_RM[row]),
            np.asarray(term.prediction_RMD[row]),
            np.asarray(term.target_RMD[row]),
        )
    return found


def _camera(clip: dict) -> int:
    return int(clip["view_mask"].argmax())
