"""The cooldown of V-JEPA 2: a trained run continues on 64 frames of 384 px as its rate falls.

    python -m wmjax.main --config=configs/vjepa2_cooldown.py --config.init_from=runs/vjepa2_aloha \\
        --config.data.root=DIR

Starts with parameters, target and optimiser state of the run in init_from. Weights of other formats
start with a fresh optimiser state. As in the reference, the learning rate falls linearly from its
value in pretraining to 1e-6, without a warm-up, during 5 % of pretraining's steps. The batch stays
at 24 clips, because the learning rate was chosen for it. A clip has 18,432 tokens, so a step works
through two clips at a time. Episodes must be 16 s long at 4 fps; otherwise lower data.frames.
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
