"""V-JEPA 2.1 ViT-L/16 on a LeRobot recording, ALOHA or any other: vjepa21_base with a ViT-L.

    python -m wmjax.main --config=configs/vjepa21_aloha.py --config.data.root=DIR

One H200: 247 ms a step of 24 clips and 36 pictures, 33 GB; vjepa2_aloha took 209 ms and 30 GB in
the same hour.

From Meta's encoder: --config.init_from=vjepa2_1_vitl_dist_vitG_384.pt --config.init_parts=encoder.
If the memory is too small: --config.model.remat=dots, or --config.optim.accumulate=2.
"""

import ml_collections

from wmjax.config import get_config as get_base


def get_config() -> ml_collections.ConfigDict:
    config = get_base("vjepa21_base")
    config.model.size = "large"
    return config
