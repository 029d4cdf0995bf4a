"""V-JEPA 2 ViT-L/16 on a LeRobot recording, ALOHA or any other: 16 frames of 256 px at 4 fps.

    python -m wmjax.main --config=configs/vjepa2_aloha.py --config.data.root=DIR

DIR holds meta/info.json (LeRobot v2.1 or v3.0). Expect about 5 GB of parameters, moments and
target in float32, and a batch of 24 clips on one 80 GB GPU; on N GPUs give
--config.data.batch_size=24*N, and --config.mesh.fsdp=N to split the state over them.

The reference's 5.25e-4 and 0.99925 are for 3,072 clips a step. Adam's noise scale asks for the
square root of the batch's ratio: 5.25e-4 * sqrt(24 / 3072) = 4.6e-5.
"""

import ml_collections

from wmjax.config import get_config as get_base


def get_config() -> ml_collections.ConfigDict:
    config = get_base("base")
    config.optim.update(learning_rate=4.6e-5, start_learning_rate=1e-6)
    return config
