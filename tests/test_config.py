"""Configurations: found by name or path, overridden with types, checked, and shipped in a wheel."""

import json
import subprocess
import sys
import zipfile

import micro
import pytest
from says import refused, suggests

import wmjax
from wmjax import assemble
from wmjax import config as configs

DEBUG = configs.get_config("debug_world_model")


def test_every_shipped_configuration_loads_and_is_consistent():
    assert {"debug_world_model", "vjepa2_aloha"} <= set(wmjax.list_configs())
    for name in wmjax.list_configs():
        config = wmjax.get_config(name)
        if config.data.source == "lerobot":
            config.data.root = "somewhere"
        assemble.check(config)
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


def test_the_configuration_of_a_run_is_read_with_the_types_of_its_keys(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(configs.to_json(configs.load("vjepa2_aloha", ["seed=7"])))
    assert configs.full_name(str(tmp_path)) == str(path.resolve())
    found = configs.load(str(tmp_path), ["mask.short.aspect=(0.5, 2)"])
    assert (found.seed, found.mask.short.aspect) == (7, (0.5, 2.0))
    assert found.data.crop_scale == configs.get_config("vjepa2_aloha").data.crop_scale


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": 3}'])
def test_a_file_that_is_no_configuration_of_a_run_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with refused(tmp_path / "config.json"):
        configs.load(str(tmp_path / "config.json"))


def test_a_package_that_a_file_names_has_to_be_trusted(tmp_path):
    config = configs.get_config("debug_world_model")
    config.model.name = "robolab.models:Dreamer"
    (tmp_path / "config.json").write_text(configs.to_json(config))
    with refused("robolab.models:Dreamer", "--trust=robolab"):
        configs.load(str(tmp_path / "config.json"))


def test_overrides_take_the_type_of_the_key():
    config = configs.load(
        "debug_world_model",
        [
            "optim.learning_rate=3e-4",
            "train.num_steps=7",
            "train.eval_every=1e3",
            "model.scan=false",
            "data.crop_scale=(0.5, 1)",
            "mask.short.blocks=3",
            "data.root=a=b",
        ],
    )
    assert config.optim.learning_rate == 3e-4
    assert config.train.num_steps == 7
    assert (config.train.eval_every, type(config.train.eval_every)) == (1000, int)
    assert config.model.scan is False
    assert config.data.crop_scale == (0.5, 1.0)
    assert config.mask.short.blocks == 3
    assert config.data.root == "a=b"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.learing_rate=1", ["optim.learing_rate", "optim.learning_rate"]),
        ("train.num_steps=ten", ["train.num_steps=ten", DEBUG.train.num_steps]),
        ("train.num_steps=1.5", ["train.num_steps=1.5", DEBUG.train.num_steps]),
        ("model.scan=maybe", ["model.scan=maybe", DEBUG.model.scan]),
        ("data.crop_scale=0.5", ["data.crop_scale=0.5", "(1.0, 1.0)"]),
        ("data=3", ["--config.data", "batch_size", "frames"]),
        ("seed", ["--config.seed="]),
        ("model.width.x=1", ["--config.model.width.x"]),
    ],
)
def test_a_wrong_override_says_what_is_wanted(override, parts):
    with refused(*parts):
        configs.load("debug_world_model", [override])


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.image_size=30", ["data.image_size=30", "model.patch=8", "32"]),
        ("data.image_width=30", ["data.image_width=30", "model.patch=8", 32]),
        ("data.frames=5", ["data.frames=5", "model.tubelet=2"]),
        ("data.source=lerobto", ["data.source='lerobto'", "lerobot", "synthetic"]),
        ("data.source=lerobot", ["data.root=", "data.repo_id="]),
        ("data.root=somewhere", ["data.source='synthetic'", "data.source=lerobot"]),
        ("model.rope=tilde", ["model.rope='tilde'", "tiled"]),
        ("optim.ema=1.5", ["optim.ema=1.5", 0, 1]),
        ("optim.final_ema=1.5", ["optim.final_ema=1.5", 0, 1]),
        ("optim.schedule=cosinus", ["optim.schedule='cosinus'", "constant", "cosine", "linear"]),
        ("optim.cooldown=0.95", ["optim.warmup=0.1", "optim.cooldown=0.95", 1]),
        ("optim.accumulate=0", ["optim.accumulate=0"]),
        ("optim.clip_norm=-1", ["optim.clip_norm=-1.0", 0]),
        ("train.log_every=0", ["train.log_every=0"]),
        ("data.fps=-1", ["data.fps=-1.0", 0]),
        ("data.ends=loop", ["data.ends='loop'", "drop", "repeat"]),
        ("data.stride=-1", ["data.stride=-1", 0]),
        ("data.workers=-2", ["data.workers=-2", "-1"]),
    ],
)
def test_values_that_contradict_are_refused_before_anything_is_loaded(override, parts):
    with refused(*parts):
        assemble.check(configs.load("debug_world_model", [override]))


@pytest.mark.parametrize(
    ("override", "nearest", "others"),
    [
        ("data.source=lerobto", "lerobot", ["synthetic"]),
        ("optim.schedule=cosinus", "cosine", ["constant", "linear"]),
    ],
)
def test_of_several_choices_the_nearest_is_proposed(override, nearest, others):
    with refused() as error:
        assemble.check(configs.load("debug_world_model", [override]))
    suggests(error, nearest, others)


def test_a_cooldown_goes_with_the_constant_schedule_only():
    config = configs.load("debug_world_model", ["optim.schedule=cosine", "optim.cooldown=0.2"])
    with refused("optim.cooldown=0.2", "optim.schedule=constant", "cosine", 0):
        assemble.check(config)


def test_masks_of_ones_own_replace_the_shipped_ones():
    config = configs.get_config("debug_world_model")
    config.mask = {"tubes": {"strategy": "spatial", "cell": 2, "context": 0.2, "target": 0.6}}
    assert configs.plain(config)["mask"].keys() == {"tubes"}


def test_an_unknown_configuration_names_the_nearest():
    with refused("--config=vjepa2_alohaa") as error:
        configs.load("vjepa2_alohaa")
    suggests(error, "vjepa2_aloha", set(configs.list_configs()) - {"vjepa2_aloha"})


def test_json_round_trip_and_differences():
    config = configs.get_config("debug_world_model")
    old = json.loads(configs.to_json(config))
    assert configs.differences(old, configs.plain(config)) == []
    config.optim.learning_rate = 0.5
    assert configs.differences(old, configs.plain(config)) == ["optim.learning_rate: 0.0003 -> 0.5"]


def test_what_is_new_since_or_empty_is_no_difference():
    new = configs.plain(configs.get_config("debug_world_model"))
    old = json.loads(json.dumps(new))
    del old["optim"]["freeze"], old["train"]["profile"]
    old["data"]["stride"], old["optim"]["final_ema"], old["mesh"]["data"] = 0, -1.0, -1
    assert configs.differences(old, new) == []
    new["optim"]["freeze"], new["data"]["stride"] = "encoder/**", 3
    assert configs.differences(old, new) == [
        *("data.stride: 0 -> 3", "optim.freeze:  -> encoder/**"),
    ]


def test_an_empty_value_is_typed_as_no_text():
    config = configs.load("debug_world_model", ["model.width=", "data.stride=2"])
    assert (config.model.width, config.data.stride) == (None, 2)
    assert configs.load("debug_world_model", ["data.stride=3", "data.stride="]).data.stride is None
    with refused("--config.optim.eps="):
        configs.load("debug_world_model", ["optim.eps="])


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
