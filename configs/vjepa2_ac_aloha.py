"""V-JEPA 2-AC on an ALOHA recording, or any other with actions: a frozen ViT-L and a predictor.

    python -m wmjax.main --config=configs/vjepa2_ac_aloha.py --config.data.root=DIR \\
      --config.init_from=facebook/vjepa2-vitl-fpc64-256

init_from is any V-JEPA 2 of the same size: released weights, an imported folder, or the workdir of
a run of vjepa2_aloha. Without it the encoder has random weights, and stays so.

The predictor is half as wide and deep as Meta's, for tens of episodes in place of thousands. 8
frames at 4 fps: it looks 7 blocks of actions ahead.
"""

import ml_collections

from wmjax.config import get_config as get_base


def get_config() -> ml_collections.ConfigDict:
    config = get_base("base")
    config.model = ml_collections.ConfigDict(
        {"name": "vjepa2_ac", "size": "large"}
        | {"predictor_width": 512, "predictor_depth": 12, "predictor_heads": 8}
    )
    config.mask = ml_collections.ConfigDict()
    config.data.update(frames=8, fps=4.0, batch_size=32)
    config.data.update(crop_scale=(1.0, 1.0), crop_aspect=(1.0, 1.0))
    config.optim.update(learning_rate=4.25e-4, start_learning_rate=7.5e-5, final_learning_rate=0.0)
    config.optim.update(warmup=0.05, cooldown=0.05, clip_norm=1.0, schedule_steps=20_000)
    config.train.num_steps = 20_000
    config.eval.probe_every = 5_000
    return config
