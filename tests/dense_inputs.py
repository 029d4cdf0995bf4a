"""What both sides of the parity of V-JEPA 2.1 know: inputs, masks' budgets and schedules."""

import numpy as np

PATCH, GRAIN = 16, 64  # weights are kept as whole multiples of 1 / GRAIN
# Frames and pixels of the forward passes: images and clips, of the pretrained grid and larger.
INPUTS = {
    "image_256": (1, 256),
    "image_384": (1, 384),
    "video_256": (4, 256),
    "video_384": (4, 384),
}
TEACHER = 24  # width of what the distilled predictor predicts
KEPT = 24  # tokens whose features are kept, evenly spread
# Of the training step: frames, pixels and the (K, M) of each mask.
STREAMS = {"video": (4, 64, [(9, 14), (5, 20)]), "images": (1, 96, [(10, 17)])}
CONTEXT, WARMUP, UPDATES = 0.5, (2, 6), 5  # weight, its schedule, and the updates before the step


def pixels(seed, shape):
    """Return uint8 noise that every NumPy makes alike."""
    count = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(seed * 1_000_003)
    mixed = count * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return (mixed >> np.uint64(56)).astype(np.uint8).reshape(shape)


def tokens_of(frames, size):
    return max(frames // 2, 1) * (size // PATCH) ** 2


def shown(frames, size):
    return np.linspace(0, tokens_of(frames, size) - 1, KEPT).astype(int)
