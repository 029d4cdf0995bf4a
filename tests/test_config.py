"""Configurations: found by name or path, overridden with types, checked, and shipped in a wheel."""

import json
import subprocess
import sys
import zipfile

import micro
import pytest

import wmjax
from wmjax import config as configs
from wmjax.errors import UserError


def test_every_shipped_configuration_loads_and_is_consistent():
    assert {"debug_world_model", "vjepa2_aloha"} <= set(wmjax.list_configs())
    for name in wmjax.list_configs():
        config = wmjax.get_config(name)
        if config.data.source == "lerobot":
            config.data.root = "somewhere"
        configs.check(config)
        assert configs.describe(name)


def test_a_path_elsewhere_falls_back_to_the_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configs.load("configs/debug_world_model.py") == configs.get_config("debug_world_model")


def test_a_file_of_the_users_own_is_run(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from wmjax.config import get_config as get_base\n"
        "def get_config():\n    c = get_base('base')\n    c.seed = 7\n    return c\n"
    )
    assert configs.load(str(path)).seed == 7


def test_overrides_take_the_type_of_the_key():
    config = configs.load(
        "debug_world_model",
        [
            "optim.learning_rate=3e-4",
            "train.num_steps=7",
            "model.scan=false",
            "data.crop_scale=(0.5, 1)",
            "mask.short.blocks=3",
            "data.root=a=b",
        ],
    )
    assert config.optim.learning_rate == 3e-4
    assert config.train.num_steps == 7
    assert config.model.scan is False
    assert config.data.crop_scale == (0.5, 1.0)
    assert config.mask.short.blocks == 3
    assert config.data.root == "a=b"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.learing_rate=1", ["optim.learing_rate", "did you mean optim.learning_rate"]),
        ("train.num_steps=ten", ["train.num_steps=ten", "int"]),
        ("train.num_steps=1.5", ["train.num_steps=1.5", "int"]),
        ("model.scan=maybe", ["model.scan=maybe", "bool"]),
        ("data.crop_scale=0.5", ["data.crop_scale=0.5", "(1.0, 1.0)"]),
        ("data=3", ["group"]),
        ("seed", ["no value"]),
        ("model.width.x=1", ["no such key"]),
    ],
)
def test_a_wrong_override_says_what_is_wanted(override, parts):
    with pytest.raises(UserError) as error:
        configs.load("debug_world_model", [override])
    assert all(part in str(error.value) for part in parts)
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.image_size=30", ["data.image_size=30", "model.patch=8", "32"]),
        ("data.image_width=30", ["data.image_width=30", "model.patch=8"]),
        ("data.frames=5", ["data.frames=5", "model.tubelet=2"]),
        ("data.source=lerobto", ["lerobto", "did you mean lerobot"]),
        ("data.source=lerobot", ["data.root"]),
        ("data.root=somewhere", ["data.source='synthetic'", "data.source=lerobot"]),
        ("model.rope=tilde", ["model.rope='tilde'", "tiled"]),
        ("optim.ema=1.5", ["optim.ema=1.5", "between 0 and 1"]),
        ("optim.final_ema=1.5", ["optim.final_ema=1.5", "between 0 and 1"]),
        ("optim.schedule=cosinus", ["optim.schedule='cosinus'", "did you mean cosine"]),
        ("optim.cooldown=0.95", ["optim.warmup=0.1, optim.cooldown=0.95", "1 at most"]),
        ("optim.accumulate=0", ["optim.accumulate=0"]),
        ("optim.clip_norm=-1", ["optim.clip_norm=-1"]),
        ("train.log_every=0", ["train.log_every=0"]),
        ("data.fps=-1", ["data.fps=-1"]),
        ("data.ends=loop", ["data.ends='loop'", "drop, repeat"]),
        ("data.stride=-1", ["data.stride=-1"]),
        ("data.workers=-2", ["data.workers=-2", "-1"]),
    ],
)
def test_values_that_contradict_are_refused_before_anything_is_loaded(override, parts):
    with pytest.raises(UserError) as error:
        configs.check(configs.load("debug_world_model", [override]))
    assert all(part in str(error.value) for part in parts)


def test_a_cooldown_goes_with_the_constant_schedule_only():
    config = configs.load("debug_world_model", ["optim.schedule=cosine", "optim.cooldown=0.2"])
    with pytest.raises(UserError, match=r"optim\.cooldown=0\.2.*constant, found cosine"):
        configs.check(config)


def test_masks_of_ones_own_replace_the_shipped_ones():
    config = configs.get_config("debug_world_model")
    config.mask = {"tubes": {"strategy": "spatial", "cell": 2, "context": 0.2, "target": 0.6}}
    assert configs.plain(config)["mask"].keys() == {"tubes"}


def test_an_unknown_configuration_names_the_nearest():
    with pytest.raises(UserError, match="did you mean vjepa2_aloha"):
        configs.load("vjepa2_alohaa")


def test_json_round_trip_and_differences():
    config = configs.get_config("debug_world_model")
    old = json.loads(configs.to_json(config))
    assert configs.differences(old, configs.plain(config)) == []
    config.optim.learning_rate = 0.5
    assert configs.differences(old, configs.plain(config)) == ["optim.learning_rate: 0.0003 -> 0.5"]


def test_the_wheel_holds_the_configurations(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=micro.ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    code = (
        "import wmjax; print(wmjax.__file__); print(wmjax.list_configs()); "
        "print(wmjax.get_config('vjepa2_aloha').model.size)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert str(installed) in out
    assert str(wmjax.list_configs()) in out
    assert "large" in out
