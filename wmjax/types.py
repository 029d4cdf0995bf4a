"""What flows between data, model and step, and the legend of the shape suffixes.

Legend
    B  instants in the batch (global under jit)     N  tokens of a clip (a 3-D grid)
    V  views (cameras) of one instant               K  context tokens kept by one mask
    T  frames of a clip                             M  tokens that one term of the loss predicts
    R  rows: views of instants, or instants
    H, W, C  pixels, channels (RGB)                 D  width of the encoder
    S  numbers in a state                           A  numbers in an action
    P  recorded actions between two sampled frames (the stride)
    Z  datasets of a mixture

Token ids count the cells of the (time, row, column) grid in row-major order, from 0.
Imports jax for its types only: no array is made here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import struct

Array = jax.Array | np.ndarray
IMAGES = "images"  # name of a batch of pictures beside the clips
TokenGrid = tuple[int, int, int]  # tubelets, rows, columns
Row = dict[str, float]  # one report: figures by name


@struct.dataclass
class VideoObservation:
    """What the cameras and joints showed over one clip.

    video_BVTHWC: uint8 RGB at the training size; normalised on the device. H = W = 0 where
    features_BVTND stand in its place.
    view_mask_BV: bool, False where a view is missing and its pixels are filler.
    state_BTS: float32, as recorded, at each sampled frame.
    state_mask_BTS: bool, False where the clip goes on past the end of its episode (the last state
    stands in) and where a dataset of a mixture has fewer numbers than the widest (zeros).
    features_BVTND: float16, of each frame, as `target_features` gives them (data.features).
    """

    video_BVTHWC: Array
    view_mask_BV: Array
    state_BTS: Array
    state_mask_BTS: Array
    features_BVTND: Array | None = None


@struct.dataclass
class VideoTarget:
    """The masks of a batch: for each, the tokens that are seen and the tokens to predict.

    context_ids_BK, target_ids_BM: int32, sorted, unique and disjoint in a row, one array a mask,
    each with its own K and M; the views of an instant share them. names: of the masks.
    All empty for a model without masks.
    """

    context_ids_BK: tuple[Array, ...] = ()
    target_ids_BM: tuple[Array, ...] = ()
    names: tuple[str, ...] = struct.field(pytree_node=False, default=())


@struct.dataclass
class WorldModelInput:
    """One batch, as the pipeline delivers it and the train step takes it.

    action_BTPA: float32, every action recorded from a sampled frame up to the next one.
    action_mask_BTPA: bool, False where nothing was recorded: past the end of the episode (the last
    action stands in), and where a dataset has a smaller stride or fewer numbers (zeros).
    dataset_ids_B: int32, which dataset of a mixture the clip is from; 0 where there is one.
    sample_ids_B: int32 index of the window in its dataset, to name a bad sample.
    beside: further streams by name that the same step takes, each with a static shape of its own:
    images beside video, for example. A model's loss gets each of them by itself.
    """

    observation: VideoObservation
    target: VideoTarget
    action_BTPA: Array
    action_mask_BTPA: Array
    dataset_ids_B: Array
    sample_ids_B: Array
    beside: dict[str, "WorldModelInput"] = struct.field(default_factory=dict)

    @classmethod
    def of(cls, arrays: Mapping[str, Any], masks: Sequence[str]) -> "WorldModelInput":
        """Take the arrays of a batch by their names in data.reader; masks: names of the masks."""
        context, target = (
            tuple(arrays[f"{side}_{i}"] for i in range(len(masks)))
            for side in ("context", "target")
        )
        return cls(
            VideoObservation(
                video_BVTHWC=arrays["video"],
                view_mask_BV=arrays["view_mask"],
                state_BTS=arrays["state"],
                state_mask_BTS=arrays["state_mask"],
                features_BVTND=arrays.get("features"),
            ),
            VideoTarget(context, target, tuple(masks)),
            action_BTPA=arrays["action"],
            action_mask_BTPA=arrays["action_mask"],
            dataset_ids_B=arrays["dataset_id"],
            sample_ids_B=arrays["sample_id"],
        )


@struct.dataclass
class Term:
    """One named term of a loss, with what evaluations and pictures need; None: it has none.

    loss: float32 scalar, the mean over valid rows. A row R is a view of an instant (R = B V, the
    views of an instant next to each other), or an instant with all its views (R = B).
    prediction_RMD, target_RMD: predicted and true features of M tokens.
    ids_RM: int32 ids of these tokens in the token grid.
    valid_R: bool, False where the view is missing; None: all rows are valid.
    """

    loss: Array
    prediction_RMD: Array | None = None
    target_RMD: Array | None = None
    ids_RM: Array | None = None
    valid_R: Array | None = None


@struct.dataclass
class WorldModelOutput:
    """What a model's loss gives for a batch.

    loss: float32 scalar to minimise. terms: its named terms, which evaluations walk. scalars:
    further figures to log. updates: new values of frozen variables, such as running statistics, as
    a nested dict of those that change; with microbatches, their mean is kept.
    """

    loss: Array
    terms: dict[str, Term] = struct.field(default_factory=dict)
    scalars: dict[str, Array] = struct.field(default_factory=dict)
    updates: dict[str, Any] = struct.field(default_factory=dict)
