"""LeWM in TwoRoom, small: a laptop's CPU records, trains and plans in minutes. The first run.

    python -m wmjax.main --config=configs/lewm_tworoom_cpu.py

The run records 240 episodes of a simulator into runs/tworoom_32px, once, trains 1,000 steps on
frames of 32 px, and plans. It takes about 5 minutes on two cores, 350 s of CPU time.
Expect 88 % of 50 goals reached: all of the nearer ones, 62 % of the farthest third, behind the
wall. Random actions reach 20 %, no action 0 %. The video is in runs/lewm_tworoom_cpu/closed_loop.

A clip has four frames of 2 x 2 patches. A plan of five blocks is as long as the recorded way to a
goal; with three blocks 80 % are reached, with two 76 %. It was chosen on the same 50 goals, and the
standard error of 88 % is 5. There is no linear probe: the place of one dot is almost linear in the
pixels (R2 0.99), and no features beat that.
"""

import ml_collections

from wmjax.config import get_config as get_base


def get_config() -> ml_collections.ConfigDict:
    config = get_base("lewm_tworoom")
    config.model.update(width=96, depth=3, heads=3, patch=16, embedding=64, projector=256)
    config.model.update(predictor_depth=2, predictor_heads=4, predictor_head_width=16)
    config.model.update(predictor_hidden=256, head_width=256, projections=256, dtype="float32")
    config.data.update(record="tworoom:240", root="runs/tworoom_32px", image_size=32, frames=4)
    config.data.update(cache="device", threads=4)
    config.optim.update(learning_rate=1e-3, schedule_steps=1_000)
    config.train.update(num_steps=1_000, log_every=50, eval_every=1_000)
    config.eval.update(evaluators="validation,pictures,acting,closed_loop", batches=2)
    config.eval.update(env_plan="short,horizon=5,samples=100,elites=10")
    return config
