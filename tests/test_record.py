"""Recordings of a simulator: sound, the same however they are written, resumed and extended."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from recordings import refused

from wmjax import assemble, open_sources
from wmjax import config as configs
from wmjax.data import __main__ as door
from wmjax.data.lerobot import LeRobotSource
from wmjax.data.tools import record as recording
from wmjax.data.tools.check import check
from wmjax.data.tools.record import record
from wmjax.envs.base import Environment
from wmjax.envs.tworoom import TwoRoom

SMALL = {"env": "tworoom", "policy": "expert", "episodes": 5, "steps": 12, "size": 32}


class Arm(Environment):
    """State: one joint and one block; the action is the joint's next angle."""

    fps, camera, task = 20.0, "observation.images.top", "Turn."
    robot_names, world_names, action_names = ("joint",), ("block",), ("joint",)
    lowest, highest = -np.ones(1, np.float32), 2 * np.ones(1, np.float32)

    def __init__(self, size):
        self.size, self.joint = size, 0.0

    def reset(self, rng):
        self.joint = rng.uniform()

    def step(self, action):
        self.joint = float(action[0])

    def picture(self):
        return np.full((self.size, self.size, 3), int(80 + 80 * self.joint), np.uint8)

    @property
    def state(self):
        return np.array([self.joint, 7.0], np.float32)

    def reached(self):
        return self.joint > 1


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(recording, "FILE", 2)


def files(folder):
    return {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}


def frames(root):
    source = LeRobotSource(root, frames=12, fps=10.0)
    return np.stack([np.stack(source[i]["frames_VT"][0]) for i in range(len(source))])


def test_a_recording_is_sound_and_says_what_was_played(small_files, tmp_path):
    record(tmp_path / "room", **SMALL, images=True)
    findings, looked_at = check(tmp_path / "room", decode=True)
    assert (findings, "5 episodes" in looked_at) == ([], True)
    source = LeRobotSource(tmp_path / "room", frames=12, fps=10.0)
    assert (len(source), source.fps_effective) == (5, 10.0)
    room, rng = TwoRoom(size=32), np.random.default_rng((0, 3))
    room.reset(rng)
    act, clip = room.expert(rng), source[3]
    for t in range(12):
        np.testing.assert_array_equal(clip["frames_VT"][0][t], room.picture())
        np.testing.assert_array_equal(clip["state_TS"][t], room.state)
        room.step(act())
        if t < 11:
            np.testing.assert_allclose(clip["state_TS"][t + 1], room.state)
    table = pq.read_table(tmp_path / "room" / "data/chunk-000/file-001.parquet").to_pydict()
    assert table["index"] == list(range(24, 48))
    assert table["next.done"] == [t % 12 == 11 for t in range(24)]


def test_a_run_records_its_own_data_once(tmp_path, monkeypatch):
    root = tmp_path / "room"
    overrides = (f"data.root={root}", "data.record=tworoom:6", "data.val_share=0.3")
    config = configs.load("lewm_tworoom_cpu", overrides)
    sources = open_sources.make_sources(config, ("train", "validation"))
    assert sources["train"].label_sizes == {"observation.state": 2}
    info = json.loads((root / "meta/info.json").read_text())
    assert info["total_episodes"] == 6
    assert info["features"]["observation.image"]["shape"] == [32, 32, 3]
    monkeypatch.setattr(open_sources, "record", None)  # the second run finds it
    open_sources.make_sources(config, ("train",))


@pytest.mark.parametrize("given", ["tworoom", "tworoom:0", ":5", "tworoom:some"])
def test_what_is_to_be_recorded_is_checked(given):
    with refused("data.record", given):
        assemble.check(configs.load("lewm_tworoom_cpu", (f"data.record={given}",)))
    with refused("data.record", "data.root"):
        assemble.check(configs.load("lewm_tworoom_cpu", ("data.root=",)))


def test_video_is_near_the_pictures(tmp_path):
    for images in (True, False):
        record(tmp_path / f"{images}", **SMALL, images=images)
    assert not check(tmp_path / "False", decode=True)[0]
    exact = frames(tmp_path / "True")
    source = LeRobotSource(tmp_path / "False", frames=12, fps=10.0)
    found = np.stack(
        [
            [frame.to_ndarray(format="rgb24") for frame in source[i]["frames_VT"][0]]
            for i in range(5)
        ]
    )
    assert np.abs(found.astype(float) - exact).mean() < 6


def test_it_is_the_same_in_one_process_and_in_two_and_when_resumed(small_files, tmp_path):
    record(tmp_path / "one", **SMALL)
    record(tmp_path / "two", **SMALL, workers=2)
    for name in ("data/chunk-000/file-002.parquet", "meta/info.json", "meta/tasks.parquet"):
        (tmp_path / "two" / name).unlink()
    kept = (tmp_path / "two/data/chunk-000/file-000.parquet").stat().st_mtime_ns
    record(tmp_path / "two", **SMALL)
    assert (tmp_path / "two/data/chunk-000/file-000.parquet").stat().st_mtime_ns == kept
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(one[name].read_bytes() == two[name].read_bytes() for name in one)


def test_more_episodes_are_added(small_files, tmp_path):
    record(tmp_path / "grown", **SMALL | {"episodes": 3})
    refused("--episodes", "2", "3")(record)(tmp_path / "grown", **SMALL | {"episodes": 2})
    record(tmp_path / "grown", **SMALL)
    record(tmp_path / "whole", **SMALL)
    grown, whole = files(tmp_path / "grown"), files(tmp_path / "whole")
    assert all(grown[name].read_bytes() == whole[name].read_bytes() for name in whole)


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"seed": 1}, ("--seed=0", "--seed=1")),
        ({"size": 34}, ("--size=32", "--size=34")),
        ({"policy": "random"}, ("--policy=expert", "--policy=random")),
        ({"env": "two-room"}, ("--env", "two-room", "tworoom")),
        ({"policy": "best"}, ("--policy", "best", "expert")),
        ({"size": 33}, ("--size=33", "--images")),
        ({"episodes": 0}, ("--episodes", "0")),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_written(tmp_path, changed, names):
    record(tmp_path, **SMALL | {"episodes": 1})
    before = {name: path.stat().st_mtime_ns for name, path in files(tmp_path).items()}
    refused(*names)(record)(tmp_path, **SMALL | {"episodes": 1} | changed)
    assert {name: path.stat().st_mtime_ns for name, path in files(tmp_path).items()} == before


def test_an_environment_of_your_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mysim", sys.modules[__name__])
    command = ["record", str(tmp_path / "arm"), "--env=mysim:Arm", "--policy=random"]
    command += ["--episodes=2", "--steps=30", "--size=16", "--workers=1"]
    assert door.run(command) == 0
    assert not check(tmp_path / "arm", decode=True)[0]
    source = LeRobotSource(tmp_path / "arm", frames=30, fps=20.0, labels="auto")
    assert source.cameras == ("observation.images.top",)
    clip, (_, labels) = source[1], source.labels(0, 1)
    assert labels["observation.environment_state"].tolist() == [[7.0]] * 30
    action = clip["action_TPA"][:, 0, 0]
    np.testing.assert_array_equal(clip["state_TS"][1:, 0], action[:-1])
    assert -1 <= action.min() < 0
    assert 1 < action.max() <= 2
    refused("--policy=expert", "Arm", "random")(record)(
        tmp_path / "other", **SMALL | {"env": "mysim:Arm"}
    )


@pytest.mark.skipif(not importlib.util.find_spec("lerobot"), reason="lerobot is not installed")
def test_lerobots_own_reader_opens_it(tmp_path):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    record(tmp_path / "room", **SMALL)
    dataset = LeRobotDataset("local/room", root=tmp_path / "room", video_backend="pyav")
    assert len(dataset) == 60
    clip = LeRobotSource(tmp_path / "room", frames=12, fps=10.0)[2]
    row = dataset[2 * 12 + 5]
    np.testing.assert_allclose(row["observation.state"].numpy(), clip["state_TS"][5])
    picture = row["observation.image"].numpy().transpose(1, 2, 0) * 255
    np.testing.assert_allclose(picture, clip["frames_VT"][0][5].to_ndarray(format="rgb24"), atol=1)
    stats = json.loads(Path(tmp_path / "room/meta/stats.json").read_text())
    assert stats["observation.image"]["mean"][1][0][0] > 0.5
