"""What flows between data, model and step, and the legend of the shape suffixes.

Legend
    B  instants in the batch (global under jit)     N  tokens of a clip (a 3-D grid)
    V  views (cameras) of one instant               K  context tokens kept by one mask
    T  frames of a clip                             M  target tokens predicted by one mask
    H, W, C  pixels, channels (RGB)                 D  width of the encoder
    S  numbers in a state                           A  numbers in an action
    P  recorded actions between two sampled frames (the stride)
    Z  datasets of a mixture

Token ids count the cells of the (time, row, column) grid in row-major order, from 0.
Imports jax for its types only: no array is made here.
"""

import jax
import numpy as np
from flax import struct

Array = jax.Array | np.ndarray


@struct.dataclass
class VideoObservation:
    """What the cameras and joints showed over one clip.

    video_BVTHWC: uint8 RGB at the training size; normalised on the device.
    view_mask_BV: bool, False where a view is missing and its pixels are filler.
    state_BTS: float32, as recorded, at each sampled frame.
    state_mask_BTS: bool, False where the clip goes on past the end of its episode (the last state
    stands in) and where a dataset of a mixture has fewer numbers than the widest (zeros).
    """

    video_BVTHWC: Array
    view_mask_BV: Array
    state_BTS: Array
    state_mask_BTS: Array


@struct.dataclass
class VideoTarget:
    """What is hidden and what is to be predicted: one entry a mask, each with its own K and M.

    context_ids_BK, target_ids_BM: int32, sorted, unique and disjoint in a row; shared by the
    views of an instant.
    """

    context_ids_BK: tuple[Array, ...]
    target_ids_BM: tuple[Array, ...]


@struct.dataclass
class WorldModelInput:
    """One batch, as the pipeline delivers it and the train step takes it.

    action_BTPA: float32, every action recorded from a sampled frame up to the next one.
    action_mask_BTPA: bool, False where nothing was recorded: past the end of the episode (the last
    action stands in), and where a dataset has a smaller stride or fewer numbers (zeros).
    dataset_ids_B: int32, which dataset of a mixture the clip is from; 0 where there is one.
    sample_ids_B: int64-safe int32 index of the window in its dataset, to name a bad sample.
    """

    observation: VideoObservation
    target: VideoTarget
    action_BTPA: Array
    action_mask_BTPA: Array
    dataset_ids_B: Array
    sample_ids_B: Array


@struct.dataclass
class WorldModelOutput:
    """What a world model gives for a batch: one entry a mask, views folded into the rows (BV).

    loss: float32 scalar, the mean of losses; losses: the mean over views that are there.
    prediction_BVMD, target_BVMD: predicted and wanted features of the target tokens.
    """

    loss: Array
    losses: tuple[Array, ...]
    prediction_BVMD: tuple[Array, ...]
    target_BVMD: tuple[Array, ...]
