"""V-JEPA 2.1 ViT-S/8 on small frames, as from simulators: vjepa2_small with the loss of 2.1.

    python -m wmjax.main --config=configs/vjepa21_small.py --config.data.root=DIR

The same sizes, clips, rate and steps as vjepa2_small, for comparisons. A step also has 96 frames of
the recordings as pictures. The loss on clips alone: --config.images.source=
--config.model.image_loss=0.
"""

import ml_collections

from wmjax.config import get_config as get_base


def get_config() -> ml_collections.ConfigDict:
    config = get_base("vjepa2_small")
    config.model = ml_collections.ConfigDict(
        {"name": "vjepa21", "size": "small", "patch": 8, "scan": False, "remat": "none"}
        | {"predictor_width": 192, "predictor_depth": 6, "predictor_heads": 6}
        | {"image_loss": 1.0, "context_warmup": (750, 1_500)}
    )
    config.images.update(source="frames", size=96, batch_size=96)
    return config
