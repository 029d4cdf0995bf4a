"""The cooldown of V-JEPA 2: from a trained checkpoint to 64 frames of 384 px, the rate falling.

    python -m wmjax.main --config=configs/vjepa2_cooldown.py --config.init_from=runs/vjepa2_aloha \\
        --config.data.root=DIR

Begins with parameters, target and Adam's moments of the run in init_from (of other weights, with
fresh moments). As in the reference: the learning rate goes from where pretraining held it linearly
to 1e-6, without a warm-up, over 5 % of pretraining's steps. The batch stays that of pretraining,
24 clips, because the rate was set for it; 18,432 tokens a clip are worked through two clips at a
time. Episodes have to be 16 s long at 4 fps; else lower data.frames.
"""

import ml_collections

from wmjax.config import get_config as get_base


def get_config() -> ml_collections.ConfigDict:
    config = get_base("base")
    config.init_from = "runs/vjepa2_aloha"
    config.data.update(frames=64, image_size=384)
    config.optim.update(schedule="linear", warmup=0.0, schedule_steps=5_000, accumulate=12)
    config.optim.update(learning_rate=4.6e-5, final_learning_rate=1e-6, ema=0.998)
    config.train.num_steps = 5_000
    return config
