"""LeWM on a Push-T recording: a world model to plan with, trained from scratch on one GPU.

    python -m wmjax.main --config=configs/lewm_pusht.py --config.data.root=DIR

One H200 takes 53 ms a step (4,840 clips a second, 24 GB), and took 7 minutes for the 5,000 steps,
with compilation and validation. From 6,650 recorded episodes it reached 56 % of the goals 25 steps
ahead (wmjax/envs/README.md); the error of the next embedding was still falling. All frames are kept
in device memory, 27 KB each; data.cache='' reads them as they are needed.

ViT-tiny on frames of 96 px with patches of 8, one embedding of 192 numbers a frame, 5 actions
between two frames. The loss is the squared error of the next frame's embedding, SIGReg, and
INTACT's action head, which gives the planner its first plan.

Values: AdamW 5e-4 with weight decay 1e-3, 1 % warm-up and a cosine to 0, gradients clipped at 1,
256 clips of 8 frames, as in INTACT. LeWM itself has 4 frames, 128 clips, a rate of 5e-5, SIGReg
0.09 and no action head.
"""

import ml_collections

from wmjax.config import get_config as get_base


def get_config() -> ml_collections.ConfigDict:
    config = get_base("base")
    config.model = ml_collections.ConfigDict(
        {"name": "lewm", "size": "tiny", "patch": 8, "remat": "none", "scan": None}
        | {"sigreg": 0.02, "inverse": 0.1, "to_goal": 0.05}
    )
    config.mask = ml_collections.ConfigDict()
    config.data.update(frames=8, stride=5, image_size=96, batch_size=256, cache="device")
    config.data.update(crop_scale=(1.0, 1.0), crop_aspect=(1.0, 1.0))
    config.optim.update(learning_rate=5e-4, start_learning_rate=0.0, final_learning_rate=0.0)
    config.optim.update(schedule="cosine", warmup=0.01, weight_decay=1e-3, clip_norm=1.0)
    config.optim.update(schedule_steps=5_000)
    config.train.num_steps = 5_000
    config.eval.env_plan = "lewm"
    return config
