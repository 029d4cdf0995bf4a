"""V-JEPA 2 ViT-L/16 in at most 12 GB of GPU memory: vjepa2_aloha that recomputes every block.

    python -m wmjax.main --config=configs/vjepa2_low_mem.py --config.data.root=DIR

Expect a peak of 9.5 GB for 24 clips a step (measured on an H200), of which 5.1 GB are parameters,
moments and target. A step takes longer than in vjepa2_aloha.
"""

import ml_collections

from wmjax.config import get_config as get_base


def get_config() -> ml_collections.ConfigDict:
    config = get_base("vjepa2_aloha")
    config.model.update(scan=True, remat="full")
    return config
