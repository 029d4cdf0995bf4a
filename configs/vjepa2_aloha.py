"""V-JEPA 2 ViT-L/16 on a LeRobot recording, ALOHA or any other: 16 frames of 256 px at 4 fps.

    python -m wmjax.main --config=configs/vjepa2_aloha.py --config.data.root=DIR

DIR contains meta/info.json. Expect on one GPU 5.1 GB of parameters, moments and target, a peak of
30 GB, about 110 clips a second on an H100, and a first compilation of one to two minutes. If the
memory is too small, use vjepa2_low_mem. On N GPUs set --config.data.batch_size to 24 x N;
--config.mesh.fsdp=N also splits the state over them.

Learning rate: the reference's 5.25e-4 is for 3,072 clips a step. The noise of Adam scales it with
the square root of the batch size: 5.25e-4 * sqrt(24 / 3072) = 4.6e-5.
EMA: the target averages over 1 / (1 - m) steps. The reference's m = 0.99925 averages over 0.56 % of
its 240,000 steps. The same share of 100,000 steps is m = 0.998.
"""

import ml_collections

from wmjax.config import get_config as get_base


def get_config() -> ml_collections.ConfigDict:
    config = get_base("base")
    config.model.update(scan=None, remat="none")  # fastest, most memory
    config.optim.update(learning_rate=4.6e-5, start_learning_rate=1e-6, ema=0.998)
    return config
