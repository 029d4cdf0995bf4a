"""V-JEPA 2 ViT-L/16 on a LeRobot recording, ALOHA or any other: 16 frames of 256 px at 4 fps.

    python -m wmjax.main --config=configs/vjepa2_aloha.py --config.data.root=DIR

DIR holds meta/info.json. Expect 5.1 GB of parameters, moments and target, 30 GB at the peak on
one GPU, about 110 clips a second on an H100, and one to two minutes of compiling the first time.
Where that is too much, vjepa2_low_mem takes less of both and more time a step. On N GPUs give
--config.data.batch_size=24*N, and --config.mesh.fsdp=N to split the state over them.

Learning rate: the reference's 5.25e-4 is for 3,072 clips a step. Adam's noise asks for the square
root of the batch's ratio: 5.25e-4 * sqrt(24 / 3072) = 4.6e-5.
EMA: what the target averages over, 1 / (1 - m) steps, is 0.56 % of the reference's 240,000 steps
at its 0.99925; the same share of 100,000 steps is m = 0.998.
"""

import ml_collections

from wmjax.config import get_config as get_base


def get_config() -> ml_collections.ConfigDict:
    config = get_base("base")
    config.model.update(scan=False, remat="none")  # the fastest
    config.optim.update(learning_rate=4.6e-5, start_learning_rate=1e-6, ema=0.998)
    return config
