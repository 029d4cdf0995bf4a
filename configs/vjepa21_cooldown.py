"""The cooldown of V-JEPA 2.1: a trained run continues on 64 frames of 256 px as its rate falls.

    python -m wmjax.main --config=configs/vjepa21_cooldown.py --config.data.root=DIR \\
        --config.init_from=runs/vjepa21_aloha

Starts with parameters, target and optimiser state of the run in init_from. As in Meta's cooldown:
no warm-up, the learning rate falls linearly to 1e-6 during 4 % of pretraining's steps, a step has 3
pictures for a clip, and the loss on context tokens has its whole weight, whatever their distance to
the target. A clip has 8,192 tokens, so a step works through four clips at a time. Episodes must be
16 s long at 4 fps; otherwise lower data.frames.
"""

import ml_collections

from wmjax.config import get_config as get_base


def get_config() -> ml_collections.ConfigDict:
    config = get_base("vjepa21_aloha")
    config.init_from = "runs/vjepa21_aloha"
    config.model.update(context_warmup=(0, 0), by_distance=False)
    config.data.frames = 64
    config.images.batch_size = 72
    config.optim.update(schedule="linear", warmup=0.0, schedule_steps=4_000, accumulate=6)
    config.optim.final_learning_rate = 1e-6
    config.train.num_steps = 4_000
    return config
