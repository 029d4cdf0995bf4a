"""Stored features of a frozen encoder: what they give, what refuses them, and stops in between."""

import json
import shutil
import signal
import sys
from pathlib import Path

import cluster
import jax
import micro
import numpy as np
import pytest
from says import lines_with

import wmjax
from wmjax import assemble, encode, features
from wmjax import config as configs
from wmjax.data.lerobot import LeRobotSource
from wmjax.data.lerobot.frames import RowFrames
from wmjax.data.media.transforms import Scaler, centre_box
from wmjax.data.stored import Stored
from wmjax.errors import UserError
from wmjax.run.saved import Saved
from wmjax.train import train

DATA = Path(__file__).parent / "data"
ROBOTS = f"{DATA}/pusht_sim_v3:1,{DATA}/recordings/v3_place_float:1"
SMALL = (
    *("model.name=vjepa2_ac", "model.width=48", "model.heads=2", "model.depth=1"),
    *("model.patch=8", "model.predictor_width=32", "model.predictor_depth=1"),
    *("model.predictor_heads=2", "data.source=lerobot", f"data.mixture={ROBOTS}", "data.fps=5"),
    *("data.frames=4", "data.image_size=32", "data.batch_size=16", "data.workers=0"),
    *("data.crop_scale=(1.0,1.0)", "data.crop_aspect=(1.0,1.0)", "train.eval_every=0"),
    *("train.log_every=1", "checkpoint.every=1", "optim.schedule_steps=4", "train.num_steps=2"),
)
FRAMES, EPISODES = 380, 6  # of the training splits
MAIN = "from wmjax import main; main.cli()"
STOPPING = f"""
import signal, sys, time
from wmjax import features
write = features._write
def slow(*args):
    write(*args)
    if "process=1" in " ".join(sys.argv):
        signal.raise_signal(signal.SIGTERM)
    time.sleep(2)
features._write = slow
{MAIN}
"""


def config(*overrides):
    return configs.load("debug_world_model", (*SMALL, *overrides))


def run(workdir, *overrides):
    return train(config(*overrides), workdir)


def parameters(workdir):
    saved = Saved(workdir / "checkpoints")
    return saved.read(saved.shapes)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder with the features of a run of two steps, and the run's workdir."""
    folder = tmp_path_factory.mktemp("stored")
    assert run(folder / "run", f"data.features={folder}/features") == 0
    return folder


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_it_trains_as_from_video_and_decodes_nothing_later(stored, tmp_path, monkeypatch):
    assert run(tmp_path / "video") == 0
    arrays = [np.load(path) for path in files(stored / "features") if path.suffix == ".npy"]
    assert sum(map(len, arrays)) == FRAMES
    assert {array.dtype for array in arrays} == {np.dtype("float16")}
    for key in ("loss", "gradient_norm"):
        by_video, by_features = (
            [row[key] for row in micro.rows(workdir)]
            for workdir in (tmp_path / "video", stored / "run")
        )
        assert by_features == pytest.approx(by_video, rel=1e-3)
    monkeypatch.setattr(RowFrames, "read", None)
    assert run(tmp_path / "again", f"data.features={stored}/features") == 0
    ours, again = parameters(stored / "run"), parameters(tmp_path / "again")
    assert all(np.array_equal(ours[name], again[name]) for name in ours)


def test_a_resumed_run_is_the_same_to_the_last_bit(stored, tmp_path):
    shutil.copytree(stored / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/2")
    assert run(tmp_path / "run", f"data.features={stored}/features") == 0
    ours, again = parameters(stored / "run"), parameters(tmp_path / "run")
    assert all(np.array_equal(ours[name], again[name]) for name in ours)


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("seed=1", ("encoder",)),
        ("model.depth=2", ("encoder",)),
        ("model.dtype=bfloat16", ("model.dtype", "float32", "bfloat16")),
        ("data.image_size=40", ("size in pixels", "[32, 32]", "[40, 40]")),
        (f"data.mixture={DATA}/pusht_sim_v3:1", ("v3_place_float",)),
        ("data.crop_scale=(0.3,1.0)", ("data.crop_scale",)),
        ("data.reader=lerobot", ("data.reader", "native")),
        ("data.source=synthetic", ("data.source", "lerobot")),
        ("model.joint=True", ("model.joint=False",)),
    ],
)
def test_other_features_are_refused(stored, tmp_path, override, names):
    before = files(stored / "features")
    with pytest.raises(UserError) as error:
        run(tmp_path, f"data.features={stored}/features", override)
    assert all(name in str(error.value) for name in (*names, "data.features"))
    assert files(stored / "features") == before


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    with pytest.raises(UserError, match=r"data\.features"):
        run(tmp_path / "run", f"data.features={tmp_path}/mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("damage", ["cut", "another"])
def test_a_damaged_file_is_named(stored, tmp_path, damage):
    shutil.copytree(stored / "features", tmp_path / "features")
    for path in files(tmp_path / "features"):
        if path.suffix == ".npy":
            data = path.read_bytes()
            path.write_bytes(data[: len(data) // 2]) if damage == "cut" else np.save(path, 1.0)
    with pytest.raises(UserError, match=r"\d\.npy"):
        run(tmp_path / "run", f"data.features={tmp_path}/features")


def test_a_stopped_run_goes_on_with_the_episodes_that_are_missing(stored, tmp_path, monkeypatch):
    write = features._write

    def stopping(path, array):
        write(path, array)
        signal.raise_signal(signal.SIGTERM)

    folder = tmp_path / "features"
    with monkeypatch.context() as patch:
        patch.setattr(features, "_write", stopping)
        assert run(tmp_path / "run", f"data.features={folder}") == 128 + signal.SIGTERM
    (first,) = folder.rglob("*.npy")
    inode = first.stat().st_ino
    assert run(tmp_path / "run", f"data.features={folder}") == 0
    assert first.stat().st_ino == inode
    ours, theirs = files(folder), files(stored / "features")
    assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]


def test_the_hash_of_an_encoder_is_that_of_its_numbers(tmp_path):
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    mesh = jax.make_mesh((8,), ("x",))
    by_rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None))
    same = [{"a": x}, {"a": jax.device_put(x, by_rows)}]
    other = [{"a": x[::-1]}, {"b": x}, {"a": x.T}, {"a": x + np.eye(4, 6, dtype=np.float32) * 1e-6}]
    (ours, again), others = map(features._digest, same), [features._digest(x) for x in other]
    assert ours == again
    assert len({ours, *others}) == 5


def test_the_disk_is_looked_at_first(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"data\.features"):
        run(tmp_path / "run", f"data.features={tmp_path}/features")
    assert not list(tmp_path.rglob("*.npy"))


def test_a_take_that_cannot_be_read_is_left_out_or_ends_the_run(tmp_path, monkeypatch, capfd):
    read = RowFrames.read

    def broken(self, path, episode, steps, picture):
        if episode == 3 and len(steps) > 4:  # of the features, not of a first look
            raise UserError(f"{path}: damaged data")
        return read(self, path, episode, steps, picture)

    monkeypatch.setattr(RowFrames, "read", broken)
    with pytest.raises(UserError, match="episode 3"):
        run(tmp_path / "a", f"data.features={tmp_path}/features")
    more = ("data.on_error=skip", "data.max_skip_share=0.9", "train.num_steps=4")
    assert run(tmp_path / "b", f"data.features={tmp_path}/features", *more) == 0
    said = "".join(capfd.readouterr())
    assert len(lines_with(said, "warning", "left out")) == 1
    assert len(list(tmp_path.rglob("*.npy"))) == EPISODES - 1
    assert sum(row.get("data_skipped", 0) for row in micro.rows(tmp_path / "b")) > 0


def test_evaluations_see_video(stored):
    setup = assemble.prepare(config(f"data.features={stored}/features"))
    assert setup.sources["train"].stored is None
    assert json.loads((stored / "features" / features.KEY).read_text())["model.dtype"] == "float32"


@pytest.mark.processes
@pytest.mark.timeout(280)
def test_two_processes_share_the_work(stored, tmp_path):
    """They write the same features as one process; a signal to one stops both in between."""
    flags = (f"--coordinator=localhost:{cluster.free_port()}", "--processes=2")
    overrides = [*SMALL, f"data.features={tmp_path}/features"]
    commands = [
        [
            *(sys.executable, "-c", STOPPING, "--config=debug_world_model"),
            *(f"--workdir={tmp_path}/run", *flags, f"--process={i}"),
            *(f"--config.{override}" for override in overrides),
        ]
        for i in (0, 1)
    ]
    with cluster.group(commands, [micro.environment(1)] * 2, tmp_path) as processes:
        assert [process.wait(200) for process in processes] == [128 + signal.SIGTERM] * 2
    begun = len([*tmp_path.rglob("*.npy")])
    assert 0 < begun < EPISODES
    for command in commands:
        command[2] = MAIN
    with cluster.group(commands, [micro.environment(1)] * 2, tmp_path) as processes:
        assert [process.wait(200) for process in processes] == [0, 0]
    key, *ours = files(tmp_path / "features")
    assert key.read_bytes() == (stored / "features" / features.KEY).read_bytes()
    for one, other in zip(ours, files(stored / "features")[1:], strict=True):
        assert (one.parent.name, one.name) == (other.parent.name, other.name)
        np.testing.assert_allclose(np.load(one), np.load(other), atol=4e-3)


def test_a_dataset_is_encoded_as_its_clips_are_and_resumed(micro_run, tmp_path, monkeypatch):
    model, root = wmjax.load(micro_run), DATA / "pusht_sim_v3"
    asked = {"frames": 4, "size": 32, "fps": 4, "clips": 3}
    read, taken = RowFrames.read, []

    def counted(self, path, episode, steps, *picture):
        taken.extend(steps)
        return read(self, path, episode, steps, *picture)

    monkeypatch.setattr(RowFrames, "read", counted)
    model.encode_dataset(root, tmp_path / "out", **asked)
    source = LeRobotSource(root, frames=4, fps=4, ends="repeat", cameras="each")
    found = {path: np.load(path) for path in files(tmp_path / "out") if path.suffix == ".npy"}
    assert len(found) == len(source.takes())
    scale = Scaler(lambda h, w: centre_box(h, w, 1), 32, 32)
    span = 4 * source.stride
    for take in source.takes():
        stored = found[Stored(tmp_path / "out", ()).path(*take[:3])]
        assert len(stored) == -(-take.frames // span)
        for number in (0, len(stored) - 1):
            steps = [min(number * span + i * source.stride, take.frames - 1) for i in range(4)]
            clip = np.stack([take.read([step], scale)[0] for step in steps])
            wanted = np.asarray(model.encode(clip)).astype(np.float16)
            np.testing.assert_allclose(stored[number], wanted, rtol=2e-3, atol=1e-4)

    gone = min(found)
    gone.unlink()
    taken.clear()
    flags = [f"--{name}={value}" for name, value in asked.items()]
    assert encode.run([str(micro_run), str(root), str(tmp_path / "out"), *flags]) == 0
    np.testing.assert_array_equal(np.load(gone), found[gone])
    (episode,) = [t for t in source.takes() if Stored(tmp_path / "out", ()).path(*t[:3]) == gone]
    assert 0 < len(taken) <= -(-episode.frames // source.stride) + 1  # of one episode, each once

    for other, name in (({"size": 48}, "size in pixels"), ({"fps": 10}, "stride")):
        with pytest.raises(UserError, match=name):
            model.encode_dataset(root, tmp_path / "out", **asked | other)
    model.params = jax.tree.map(lambda x: x + 1, model.params)
    with pytest.raises(UserError, match="encoder"):
        model.encode_dataset(root, tmp_path / "out", **asked)
