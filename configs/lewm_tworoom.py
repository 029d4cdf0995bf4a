"""LeWM on a recording of TwoRoom, the cheapest task to plan in: minutes on one GPU.

    python -m wmjax.data record ROOM --env=tworoom --episodes=2000 --size=64
    python -m wmjax.main --config=configs/lewm_tworoom.py --config.data.root=ROOM

With model.scan=True the 2,000 steps took 1.4 minutes on one H200, with compilation. Of 300 goals 25
steps ahead 99 % were reached, of those 50 ahead 93 %, of those 75 ahead 87 %; by random actions 17,
9 and 9 %.

The predictor sees one frame, because the state is low-dimensional and SIGReg is weak there. The
action head, INTACT's, gives the planner its first plan. All frames are kept in device memory, 2.3
GB; data.cache='' reads them as they are needed.
"""

import ml_collections

from wmjax.config import get_config as get_base


def get_config() -> ml_collections.ConfigDict:
    config = get_base("base")
    config.model = ml_collections.ConfigDict(
        {"name": "lewm", "size": "tiny", "patch": 8, "history": 1, "remat": "none", "scan": None}
        | {"sigreg": 0.09, "inverse": 0.1, "to_goal": 0.05}
    )
    config.mask = ml_collections.ConfigDict()
    config.data.update(frames=6, stride=5, image_size=64, batch_size=64, cache="device")
    config.data.update(crop_scale=(1.0, 1.0), crop_aspect=(1.0, 1.0))
    config.optim.update(learning_rate=5e-4, start_learning_rate=0.0, final_learning_rate=0.0)
    config.optim.update(schedule="cosine", warmup=0.02, weight_decay=1e-3, clip_norm=1.0)
    config.optim.schedule_steps = 2_000
    config.train.num_steps = 2_000
    config.eval.update(env="tworoom", env_plan="lewm")
    return config
