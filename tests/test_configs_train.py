"""Every shipped configuration builds at its full size in the abstract, and trains when shrunk."""

import jax
import micro
import pytest

import wmjax
from wmjax import assemble, open_sources
from wmjax import config as configs
from wmjax.masking import Masks

PARAMETERS = {  # encoder and predictor with ten mask tokens, from the reference's table of sizes
    "debug_world_model": 4_694_256,
    "lewm_lerobot": 53_297_106,
    "lewm_original": 17_937_142,
    "lewm_pusht": 20_891_442,
    "lewm_tworoom": 20_875_698,
    "lewm_tworoom_cpu": 869_106,
    "vjepa2_ac_aloha": 38_889_990,
    # Meta's, without the map of extrinsics, and with 6 generated numbers in place of 7.
    "vjepa2_ac_droid": 305_220_992 - 7 * 1024 - 2 * 1024,
    "vjepa2_aloha": 303_885_312 + 22_086_016,
    "vjepa2_cooldown": 303_885_312 + 22_086_016,
    "vjepa2_libero": 303_885_312 + 22_086_016,
    "vjepa2_low_mem": 303_885_312 + 22_086_016,
    "vjepa2_small": 24_261_696,
    "vjepa2_world_model": 86_236_416 + 21_889_152,
    "vjepa21_aloha": 304_680_960 + 29_041_024,
    "vjepa21_base": 86_833_152 + 26_318_976,
    "vjepa21_cooldown": 304_680_960 + 29_041_024,
    "vjepa21_small": 25_447_872,
}


# Generated video has no poses.
WITHOUT_POSES = {"vjepa2_ac_droid": ("model.action=difference",)}


@pytest.mark.parametrize("name", wmjax.list_configs())
def test_it_builds_at_full_size_without_a_number_in_memory(name):
    config = configs.load(name, WITHOUT_POSES.get(name, ()))
    open_sources.use_generated_data(config)
    config.data.batch_size = config.images.batch_size = 96  # of eight devices
    state = assemble.prepare(config).steps.abstract
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == PARAMETERS[name]
    assert config.mask or config.model.name not in ("vjepa2", "vjepa21")
    assert all(k and m for k, m in Masks(config.mask, assemble.token_grid(config)).sizes.values())


def test_a_configuration_from_python_is_as_complete_as_from_the_command_line():
    config = wmjax.get_config("lewm_tworoom_cpu")
    assemble.check(config)
    assert config == configs.load("lewm_tworoom_cpu")


# What every micro run varies; and those that, shrunk, differ from others in values alone.
EVERYWHERE = {"debug_world_model", "vjepa2_cooldown", "vjepa2_small"} | {
    *("lewm_lerobot", "lewm_original", "lewm_tworoom", "lewm_tworoom_cpu", "vjepa2_ac_droid"),
    *("vjepa21_aloha", "vjepa21_cooldown", "vjepa21_small"),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.campaign if name in EVERYWHERE else ())
        for name in wmjax.list_configs()
    ],
)
def test_it_trains_two_steps_at_a_reduced_size(name, tmp_path):
    keys = configs.load(name, ()).model.keys()
    shrunk = [
        *(o for o in micro.OVERRIDES if not o.startswith(("train.num_steps", "optim"))),
        *("train.num_steps=2", "data.source=synthetic", "data.fps=10", "model.patch=8"),
        *("data.root=", "data.record=", "data.cache="),
        *micro.LEWM,
        *("model.dtype=float32", "init_from=", "optim.accumulate=1"),
        *WITHOUT_POSES.get(name, ()),
    ]
    if "levels" in keys:  # V-JEPA 2.1 takes features at four depths
        shrunk += ["model.depth=4", "images.size=64", "images.batch_size=8"]
    shrunk = [o for o in shrunk if not o.startswith("model.") or o[6:].partition("=")[0] in keys]
    assert micro.train(configs.load(name, shrunk), tmp_path) == 0
    assert [row["step"] for row in micro.rows(tmp_path)] == [1, 2]
