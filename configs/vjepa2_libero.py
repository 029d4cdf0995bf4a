"""V-JEPA 2 ViT-L/16 on LIBERO in LeRobot's format: two cameras of 256 px, 16 frames at 5 fps.

    python -m wmjax.main --config=configs/vjepa2_libero.py --config.data.root=DIR

LIBERO is recorded at 10 or 20 frames a second with an agent view and a wrist view. Both are views
of one clip, and share its crop and its masks. A step has 12 clips of two views, as many videos as
in vjepa2_aloha, so learning rate and EMA are the same. For datasets whose features have no
`observation.` prefix: --config.data.state=state --config.data.action=actions.
"""

import ml_collections

from wmjax.config import get_config as get_base


def get_config() -> ml_collections.ConfigDict:
    config = get_base("vjepa2_aloha")
    config.data.update(fps=5.0, batch_size=12)
    return config
