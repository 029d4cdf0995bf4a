"""What a model computes of some clips: features of all tokens, and predictions of hidden ones.

Knows sources of clips, masks and loaded models; no configuration.
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
    """What one term of the loss predicts of the clip that is shown.

    context_ids_K: tokens that its mask shows to the encoder; none without a mask. target_ids_M:
    tokens that it predicts. prediction_MD: None where a part of the model is missing. target_MD:
    their true features; None where the term has none.
    """

    context_ids_K: np.ndarray
    target_ids_M: np.ndarray
    prediction_MD: np.ndarray | None
    target_MD: np.ndarray | None


@dataclasses.dataclass
class Look:
    """Clips as the model sees them; the first is the one that is shown.

    target_BND: features of every token in the space of the loss. hidden: of the first clip, by the
    name of the loss term. names: of the clips.
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


def look(model: Model, clips: Sequence[dict], masks: Masks) -> Look:
    """Encode the clips one by one, and predict what the terms of the loss predict of the first.

    A clip is shown from its first camera that recorded it.
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
    """Return what each term with token ids predicts of the first instant, seen from a camera.

    terms: of a batch. context: ids that the masks of the first instant show, by the term's name.
    """
    found = {}
    for name, term in terms.items():
        if term.prediction_RMD is None or term.ids_RM is None:
            continue
        # A row is a view, and the first instant's come first; or an instant with all its views.
        row = camera if len(term.ids_RM) > camera else 0
        target = None if term.target_RMD is None else np.asarray(term.target_RMD[row])
        found[name] = Hidden(
            context.get(name, np.zeros(0, int)),
            np.asarray(term.ids_RM[row]),
            np.asarray(term.prediction_RMD[row]),
            target,
        )
    return found


def _camera(clip: dict) -> int:
    return int(clip["view_mask"].argmax())
