"""V-JEPA 2 ViT-S/8 on small frames, as from simulators: 16 frames of 96 px, about 16 minutes.

    python -m wmjax.main --config=configs/vjepa2_small.py --config.data.root=DIR

Expect 21 steps of 64 clips a second on an H100 with 16 cores. The 15,000 steps take about 16
minutes, with validation and probes. On 250 episodes of Push-T:

                                        random weights          pixels         trained
    R2 of the probe: the agent's place           0.458          -0.306           0.938
    the block's place: x; y               0.890; 0.850    0.900; 0.825    0.910; 0.888
    the block's angle, as a point on a circle   -0.024          -0.042          -0.058
    validation/relative                           11.1                            0.57
    effective rank of the targets                  104                              72

validation/relative was 0.87 after 1,000 steps, 0.84 after 3,000, 0.67 after 8,000, and 0.60 after
11,000, in the cooldown; the rank was 102, 30, 56 and 65. The probe averages features over a coarse
grid, and no linear fit to these predicts the angle.

Why these values: with learning rate 5e-4, EMA 0.996 and a predictor as wide as the encoder
(384 x 12) the rank fell from 100 to 6 in 4,000 steps, and the probe fell below random weights. A
constant 2e-4 left validation/relative at 0.84 after 6,000 steps. A predictor of half the width and
depth is a bottleneck, as in the larger sizes. The EMA averages over 1,000 steps.
"""

import ml_collections

from wmjax.config import get_config as get_base


def get_config() -> ml_collections.ConfigDict:
    config = get_base("base")
    config.model.update(size="small", patch=8, scan=None, remat="none")
    config.model.update(predictor_width=192, predictor_depth=6, predictor_heads=6)
    config.data.update(image_size=96, batch_size=64)
    config.optim.update(learning_rate=3e-4, start_learning_rate=1e-6, ema=0.999)
    config.optim.update(schedule_steps=15_000, cooldown=0.4)
    config.train.num_steps = 15_000
    config.eval.probe_every = 5_000
    return config
