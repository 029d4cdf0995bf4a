"""V-JEPA 2 ViT-B/16 (768 wide, predictor 384) on a LeRobot recording: 100,000 steps on one GPU.

    python -m wmjax.main --config=configs/vjepa2_world_model.py --config.data.root=DIR

The encoder starts from random weights. To start it from an image model:
--config.model.pretrained=google/vit-base-patch16-224, or the folder of another ViT-B or DINOv2-B.

The middle size: a clip takes a quarter of the time of ViT-L, so a step has 48 clips. Learning rate
and EMA follow the rules in vjepa2_aloha: 5.25e-4 * sqrt(48 / 3072) = 6.6e-5, and 0.998 for 100,000
steps.
"""

import ml_collections

from wmjax.config import get_config as get_base


def get_config() -> ml_collections.ConfigDict:
    config = get_base("base")
    config.model.size = "base"
    config.data.batch_size = 48
    config.optim.update(learning_rate=6.6e-5, start_learning_rate=1e-6, ema=0.998)
    return config
