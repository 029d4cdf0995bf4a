"""Batches in the form of the pipeline's, made from given or random arrays."""

import numpy as np

from wmjax.types import VideoObservation, VideoTarget, WorldModelInput


def batch_of(video_BVTHWC, masks, view_mask_BV=None):
    """Return a batch of these clips; masks is [(context_ids_BK, target_ids_BM), ...].

    The masks are called 0, 1, ...
    """
    B, V, T = video_BVTHWC.shape[:3]
    context_ids, target_ids = (
        tuple(np.asarray(mask[side], np.int32) for mask in masks) for side in (0, 1)
    )

    def numbers(shape):
        return np.zeros(shape, np.float32), np.ones(shape, bool)

    if view_mask_BV is None:
        view_mask_BV = np.ones((B, V), bool)
    return WorldModelInput(
        VideoObservation(video_BVTHWC, np.asarray(view_mask_BV), *numbers((B, T, 1))),
        VideoTarget(context_ids, target_ids, tuple(map(str, range(len(masks))))),
        *numbers((B, T, 1, 1)),
        np.zeros(B, np.int32),
        np.arange(B, dtype=np.int32),
    )


def random_batch(seed, shape_BVTHWC, tokens, budgets, view_mask_BV=None):
    """Return noise with random masks of these (K, M) budgets."""
    rng = np.random.default_rng(seed)
    masks = []
    for kept, hidden in budgets:
        ids = np.stack([rng.permutation(tokens) for _ in range(shape_BVTHWC[0])])
        masks.append((np.sort(ids[:, :kept]), np.sort(ids[:, kept : kept + hidden])))
    return batch_of(rng.integers(0, 256, shape_BVTHWC, np.uint8), masks, view_mask_BV)
