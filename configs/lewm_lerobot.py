"""LeWM on a recording of your own robot, also in several scenes.

    python -m wmjax.main --config=configs/lewm_lerobot.py --config.data.root=DIR

The action head is on with a large weight: without it, SIGReg alone keeps what differs between
scenes, and loses the robot. Two frames are a quarter of a second apart; the actions between them
are one block. For a GPU with little memory, lower data.batch_size, and the learning rate with its
root.
"""

import ml_collections

from wmjax.config import get_config as get_base


def get_config() -> ml_collections.ConfigDict:
    config = get_base("base")
    config.model = ml_collections.ConfigDict(
        {"name": "lewm", "size": "small", "patch": 16, "embedding": 384}
        | {"remat": "none", "scan": None}
        | {"sigreg": 0.09, "inverse": 1.0, "to_goal": 0.05}
    )
    config.mask = ml_collections.ConfigDict()
    config.data.update(frames=8, fps=4.0, image_size=128, batch_size=128)
    config.data.update(crop_scale=(0.8, 1.0), crop_aspect=(0.9, 1.1))
    config.optim.update(learning_rate=3e-4, start_learning_rate=0.0, final_learning_rate=0.0)
    config.optim.update(schedule="cosine", warmup=0.02, weight_decay=1e-3, clip_norm=1.0)
    config.optim.schedule_steps = 20_000
    config.train.num_steps = 20_000
    config.eval.probe_every = 5_000
    return config
