"""A small V-JEPA 2 on generated video: the whole system on a laptop's CPU in two minutes.

    python -m wmjax.main --config=configs/debug_world_model.py

Expect 100 steps, a checkpoint at 50 and at 100, and a loss that falls from about 0.8 within the
first tens of steps. Encoder 288 wide, predictor 144; no pretrained weights, no dataset.

100 steps show that it runs. Features worth more than random ones take about 1,000, by
--config.train.num_steps=1000 --config.optim.schedule_steps=1000: then a line reads the shapes'
positions off them with R2 0.81, against 0.72 off random weights and 0.58 off pixels. Rate, EMA and
batch are set for that: with 16 clips a step, which give 0.84, rates of 1e-3 and 3e-3 take the
targets' effective rank from 144 to 31 and 10, where 3e-4 leaves 84, and the probe falls with it
though the loss is lower; 4 clips are too few, and an EMA of 0.999 is still near its beginning.
"""

import ml_collections

from wmjax.config import get_config as get_base


def get_config() -> ml_collections.ConfigDict:
    config = get_base("base")
    config.model.update(size="tiny", width=288, depth=4, heads=6, patch=8)
    config.model.update(predictor_width=144, predictor_depth=2, predictor_heads=6)
    config.model.update(dtype="float32", remat="none")
    config.data.update(
        source="synthetic", frames=8, fps=10.0, image_size=48, batch_size=8, threads=2, workers=0
    )
    config.data.update(crop_scale=(1.0, 1.0), crop_aspect=(1.0, 1.0))
    config.optim.update(learning_rate=3e-4, schedule_steps=100, warmup=0.1, ema=0.99)
    config.train.update(num_steps=100, log_every=10, eval_every=50)
    config.eval.update(batches=4, probe_every=100, probe_clips=128)
    config.checkpoint.every = 50
    return config
