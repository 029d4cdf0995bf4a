"""LeWM by its published recipe, in the pixels of `lewm_pusht`: for comparison.

    python -m wmjax.main --config=configs/lewm_original.py --config.data.root=DIR

It differs from `lewm_pusht` in: no action head, SIGReg 0.09, 128 clips of 4 frames, a rate of 5e-5,
and 139,000 steps, which were 10 epochs of their Push-T recording. LeWM itself has frames of 224 px
with patches of 14. As many frames as in `lewm_pusht` are 20,000 steps: set both
`optim.schedule_steps` and `train.num_steps`.
"""

import ml_collections

from wmjax.config import get_config as get_base


def get_config() -> ml_collections.ConfigDict:
    config = get_base("lewm_pusht")
    config.model.update(sigreg=0.09, inverse=0.0, to_goal=0.0)
    config.data.update(frames=4, batch_size=128)
    config.optim.update(learning_rate=5e-5, schedule_steps=139_000)
    config.train.num_steps = 139_000
    return config
