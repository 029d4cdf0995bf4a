"""Frames in device memory (data.cache): batches equal the uncached ones, and nothing is decoded."""

import contextlib
import signal

import av
import cluster
import jax
import micro
import numpy as np
import pytest
from recordings import edit_features, write_v2
from shared_data import PUSHT

from wmjax import assemble, cache, open_sources
from wmjax import config as configs
from wmjax.data.lerobot.frames import RowFrames
from wmjax.errors import UserError
from wmjax.run.saved import Saved
from wmjax.train import train

CACHE = "data.cache=device"
SMALL = (
    *("model.width=48", "model.depth=1", "model.heads=2", "model.predictor_width=32"),
    *("model.predictor_depth=1", "model.predictor_heads=2", "data.source=lerobot"),
    *("data.fps=5", "data.frames=4", "data.image_size=32", "data.batch_size=16"),
    *("data.workers=0", "data.crop_scale=(1.0,1.0)", "data.crop_aspect=(1.0,1.0)"),
    *("train.eval_every=0", "train.log_every=1", "checkpoint.every=1", "optim.schedule_steps=8"),
    "train.num_steps=4",
)
ONE = f"data.root={PUSHT}"


def config(*overrides):
    return configs.load("debug_world_model", (*SMALL, *overrides))


def batches(count, *overrides, devices=1, begin=lambda: None):
    """Return the first training batches, with their frames."""
    settings = config(*overrides)
    setup = micro.prepare(settings, devices=devices)
    source, show = None, lambda batch: batch
    if settings.data.cache:
        source, show = assemble.cached_source(settings, setup, begin)
    stream = assemble.make_pipeline(settings, setup, "train", held_out=False, source=source)
    with contextlib.closing(stream):
        return [jax.device_get(show(next(stream))) for _ in range(count)]


def assert_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def two_cameras(tmp_path_factory):
    """Push-T with a second camera, twice as wide, which the first one's crop does not fit."""
    root = write_v2(tmp_path_factory.mktemp("data") / "two")
    shape = {"dtype": "video", "shape": [48, 96, 3], "names": ["height", "width", "channel"]}
    edit_features(root, wide=shape)
    for video in root.glob("videos/*/observation.image/*.mp4"):
        wide = video.parents[1] / "wide" / video.name
        wide.parent.mkdir(exist_ok=True)
        with av.open(video) as read, av.open(wide, "w") as write:
            stream = write.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 96, 48, "yuv420p"
            for frame in read.decode(video=0):
                image = frame.to_ndarray(format="rgb24")[:48]
                write.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            write.mux(stream.encode())
    return root


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(
    "data",
    [
        ("data.root=PUSHT", "data.workers=2"),
        ("data.root=TWO", "data.ends=repeat", "data.clips_per_episode=3"),
        ("data.root=TWO", "data.cameras=wide,observation.image"),
        ("data.root=TWO", "data.cameras=each"),
        ("data.mixture=PUSHT:1,TWO:1",),  # of one view and of two
    ],
)
def test_batches_are_the_same(two_cameras, data, devices, monkeypatch):
    monkeypatch.setattr(cache, "_PART", 5 * 32 * 32 * 3)  # many parts, which split episodes
    data = [x.replace("PUSHT", str(PUSHT)).replace("TWO", str(two_cameras)) for x in data]
    mesh = ("mesh.fsdp=2",) if devices == 8 else ()
    assert_equal(batches(3, *data, *mesh, CACHE, devices=devices), batches(3, *data))


def parameters(workdir):
    saved = Saved(workdir / "checkpoints")
    return saved.read(saved.shapes)


def run(workdir, *overrides):
    return train(config(ONE, *overrides), workdir, mesh=micro.mesh(config(ONE)))


def losses(workdir):
    return [row["loss"] for row in micro.rows(workdir)]


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """The workdir of a run of four steps with the cache, and the frames that it decoded."""
    folder, decoded = tmp_path_factory.mktemp("cached"), []
    read = RowFrames.read

    def counting(self, path, episode, steps, *picture):
        decoded.extend((path, episode, step) for step in steps)
        return read(self, path, episode, steps, *picture)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowFrames, "read", counting)
        assert run(folder, CACHE) == 0
    return folder, decoded


def test_each_frame_is_decoded_once(cached):
    """All of the split, and none a second time for the clips of four batches."""
    source = open_sources.make_source(config(ONE), "train")
    frames = sum(take.frames for take in source.takes())
    assert len(cached[1]) == len(set(cached[1])) == frames
    assert frames == source.episodes.length_E.sum() > 0


def test_a_run_is_the_same_with_and_without_and_resumed(cached, tmp_path):
    """To the last bit: uncached, and interrupted after two steps."""
    assert run(tmp_path / "plain") == 0
    assert run(tmp_path / "parts", CACHE, "train.num_steps=2") == 0
    assert run(tmp_path / "parts", CACHE) == 0
    wanted = parameters(cached[0])
    for workdir in (tmp_path / "plain", tmp_path / "parts"):
        assert losses(workdir) == losses(cached[0])
        found = parameters(workdir)
        assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_a_resumed_run_may_have_another_batch_size(tmp_path):
    """The position counts clips, so it need not be a multiple of the batch."""
    settings = config(ONE, CACHE, "data.batch_size=16")
    setup = micro.prepare(settings)
    source, show = assemble.cached_source(settings, setup, lambda: None)
    with contextlib.closing(
        assemble.make_pipeline(settings, setup, "train", 24, held_out=False, source=source)
    ) as stream:
        assert stream.position == 24
        found = jax.device_get(show(next(stream)))
        assert stream.position == 40
    ids = np.concatenate([batch.sample_ids_B for batch in batches(3, ONE)])
    assert found.sample_ids_B.tolist() == ids[24:40].tolist()


def test_frames_that_do_not_fit_are_refused_before_any_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "_free_bytes", lambda devices: 10**6)
    monkeypatch.setattr(RowFrames, "read", None)
    with pytest.raises(UserError, match=r"data\.cache='device'.*0\.00 GB are free"):
        run(tmp_path, CACHE)


@pytest.mark.parametrize("workers", [0, 1])
def test_frames_that_cannot_be_read_end_the_run(workers, tmp_path):
    root = write_v2(tmp_path / "data")
    video = sorted(root.rglob("*.mp4"))[3]
    video.write_bytes(video.read_bytes()[:2000])
    settings = config(f"data.root={root}", f"data.workers={workers}", CACHE)
    with pytest.raises(UserError, match=video.name):
        assemble.cached_source(settings, micro.prepare(settings), lambda: None)


def test_a_signal_stops_it_between_two_parts(tmp_path, monkeypatch):
    read = cache.RowReader.read

    def stopping(self, position, number):
        signal.raise_signal(signal.SIGTERM)
        return read(self, position, number)

    monkeypatch.setattr(cache, "_PART", 5 * 32 * 32 * 3)
    monkeypatch.setattr(cache.RowReader, "read", stopping)
    assert run(tmp_path, CACHE) == 128 + signal.SIGTERM
    assert not micro.rows(tmp_path)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("data.crop_scale=(0.3,1.0)", "data.crop_scale"),
        ("data.reader=lerobot", "data.reader"),
        ("data.source=synthetic", "data.source"),
        ("data.on_error=skip", "data.on_error"),
        ("data.features=/somewhere", "data.features"),
        ("data.cache=host", "data.cache"),
    ],
)
def test_what_it_does_not_go_with_is_refused_by_key(override, key):
    with pytest.raises(UserError) as error:
        assemble.check(config(ONE, CACHE, override))
    assert key in str(error.value)
    assert "data.cache" in str(error.value)


def test_evaluations_read_as_before():
    settings = config(ONE, CACHE)
    setup = micro.prepare(settings)
    assemble.cached_source(settings, setup, lambda: None)
    assert setup.sources["train"].stored is None
    with contextlib.closing(
        assemble.make_pipeline(settings, setup, "train", held_out=True)
    ) as stream:
        assert_equal([jax.device_get(next(stream))], batches(1, ONE))


@pytest.mark.processes
@pytest.mark.timeout(280)
def test_two_processes_hold_a_share_each(cached, tmp_path):
    cluster.run(
        tmp_path / "run", *SMALL, ONE, CACHE, processes=2, devices=1, folder=tmp_path / "out"
    )
    assert losses(tmp_path / "run") == pytest.approx(losses(cached[0]), rel=1e-4)
