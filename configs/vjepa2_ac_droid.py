"""V-JEPA 2-AC as Meta trained it on DROID: a frozen ViT-g, 305 M parameters of a predictor.

    python -m wmjax.main --config=configs/vjepa2_ac_droid.py --config.data.root=DIR \\
      --config.init_from=facebook/vjepa2-vitg-fpc64-256 --config.data.batch_size=256

DIR: DROID in LeRobot's format, whose state is the pose of the gripper: place (3 numbers), rotation
as Euler angles x, y, z, and how far the gripper is closed. Actions are the differences of poses, as
recorded, without statistics. Source: facebookresearch/vjepa2,
configs/train/vitg16/droid-256px-8f.yaml: 315 epochs of 300 steps of 256 clips of 8 frames at 4 fps,
15 epochs of warm-up and 15 of cool-down, AdamW with weight decay 0.04, roll-outs of 2.
"""

import ml_collections

from wmjax.config import get_config as get_base


def get_config() -> ml_collections.ConfigDict:
    config = get_base("base")
    config.model = ml_collections.ConfigDict(
        {"name": "vjepa2_ac", "size": "giant", "remat": "full"}
        | {"action": "pose", "normalize": False, "state_loss": 0.0}
    )
    config.mask = ml_collections.ConfigDict()
    config.data.update(frames=8, fps=4.0, batch_size=256)
    config.data.update(crop_scale=(1.0, 1.0), crop_aspect=(1.0, 1.0))
    config.optim.update(learning_rate=4.25e-4, start_learning_rate=7.5e-5, final_learning_rate=0.0)
    config.optim.update(warmup=15 / 315, cooldown=15 / 315, schedule_steps=94_500)
    config.train.num_steps = 94_500
    return config
