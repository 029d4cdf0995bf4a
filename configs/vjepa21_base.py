"""V-JEPA 2.1 ViT-B/16 on a LeRobot recording: 16 frames of 256 px at 4 fps, with pictures beside.

    python -m wmjax.main --config=configs/vjepa21_base.py --config.data.root=DIR

The pictures are frames of the same recording; --config.images.source=FOLDER takes JPEG and PNG
files. Without pictures: --config.images.source= --config.model.image_loss=0. On N GPUs set
--config.data.batch_size to 24 x N and --config.images.batch_size to 36 x N.

Meta's base and large are distilled from the gigantic one, and their predictor predicts its
features. Their encoders start a run by themselves:
--config.init_from=vjepa2_1_vitb_dist_vitG_384.pt --config.init_parts=encoder.

As in Meta's pretraining, a step has 3 pictures for 2 clips, and both streams weigh the same.
Learning rate: Meta's 6e-4 for 3,072 clips a step, scaled with the square root of the batch size:
6e-4 * sqrt(24 / 3072) = 5.3e-5. EMA: the same share of the run as in vjepa2_aloha. The loss on
context tokens rises from 5 to 10 % of the steps, as Meta's does from 15,000 to 30,000 of 300,000.
"""

import ml_collections

from wmjax.config import get_config as get_base


def get_config() -> ml_collections.ConfigDict:
    config = get_base("base")
    config.model = ml_collections.ConfigDict(
        {"name": "vjepa21", "size": "base", "scan": False, "remat": "none"}
        | {"image_loss": 1.0, "context_warmup": (5_000, 10_000)}
    )
    config.images.source = "frames"
    config.optim.update(learning_rate=5.3e-5, start_learning_rate=1e-6, ema=0.998)
    return config
