"""The stream of batches: keyed by position, exact after a jump, the same for any process count."""

import contextlib
import functools
import itertools
import os
import shutil
import types

import av
import built
import jax
import micro
import numpy as np
import pytest
from clu import metrics
from says import refused, says
from shared_data import PUSHT, SHARED, needs_shared

from wmjax import assemble, open_sources
from wmjax.bench.data import memory_bytes
from wmjax.data.source import Source
from wmjax.errors import ClipError
from wmjax.evals import Context
from wmjax.evals.validation import Validation


def stream(*overrides, split="train", position=0):
    config = micro.config("data.threads=4", *overrides)
    return built.stream(config, split, position)


def take(count, *overrides, **kwargs):
    batches = stream(*overrides, **kwargs)
    try:
        return [jax.device_get(next(batches)) for _ in range(count)]
    finally:
        batches.close()


def equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def pusht(*overrides):
    root = micro.ROOT / "tests" / "data" / "pusht_sim_v3"
    return ("data.source=lerobot", f"data.root={root}", "data.crop_scale=(0.3,1.0)", *overrides)


def test_a_batch_has_the_documented_shapes_and_types():
    (batch,) = take(1, *pusht("data.fps=4"))
    seen = batch.observation
    assert seen.video_BVTHWC.shape == (8, 1, 4, 32, 32, 3)
    assert seen.video_BVTHWC.dtype == np.uint8
    assert seen.view_mask_BV.all()
    assert seen.state_BTS.shape == (8, 4, 2)
    assert batch.action_BTPA.shape == batch.action_mask_BTPA.shape == (8, 4, 3, 2)
    assert seen.state_mask_BTS.shape == (8, 4, 2)
    assert seen.state_mask_BTS.all()
    assert [ids.shape for ids in batch.target.context_ids_BK] == [(8, 2), (8, 8)]
    assert [ids.shape for ids in batch.target.target_ids_BM] == [(8, 22), (8, 16)]


def test_a_jump_to_a_position_gives_what_reading_on_would_have():
    straight = take(5, *pusht())
    equal(straight[3:], take(2, *pusht(), position=3 * 8))
    batches = stream(*pusht())
    next(batches)
    next(batches)
    assert batches.position == 16
    batches.close()


def test_threads_and_prefetch_change_nothing():
    equal(
        take(3, *pusht("data.threads=1", "data.prefetch=1")),
        take(3, *pusht("data.threads=8", "data.prefetch=40")),
    )


def test_every_window_is_seen_once_an_epoch_and_epochs_differ():
    overrides = pusht("data.batch_size=8", "data.val_share=0.0", "data.stride=17")
    windows = len(open_sources.make_source(micro.config(*overrides), "train"))
    assert windows % 8  # so that a batch straddles the epochs
    ids = np.concatenate([b.sample_ids_B for b in take(-(-2 * windows // 8), *overrides)])
    first, second = ids[:windows], ids[windows : 2 * windows]
    assert sorted(first) == sorted(second) == list(range(windows))
    assert list(first) != list(second)


def test_a_window_seen_again_gets_another_crop_and_mask():
    batches = take(30, *pusht("data.stride=17"))
    seen = {}
    for batch in batches:
        for row, window in enumerate(batch.sample_ids_B):
            seen.setdefault(int(window), []).append((batch, row))
    again = next(rows for rows in seen.values() if len(rows) > 1)
    (a, i), (b, j) = again[:2]
    assert np.any(a.observation.video_BVTHWC[i] != b.observation.video_BVTHWC[j])
    assert np.any(a.target.target_ids_BM[1][i] != b.target.target_ids_BM[1][j])
    np.testing.assert_array_equal(a.action_BTPA[i], b.action_BTPA[j])


@pytest.mark.campaign
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("workers", [0, 2])
def test_memory_stays_flat(workers):
    """Of this process and its workers, in 2,000 batches: below 1 MB more in a thousand."""
    batches = stream(*pusht(f"data.workers={workers}", "data.batch_size=8"))
    held = []
    with contextlib.closing(batches):
        pids = [os.getpid(), *batches.worker_pids]
        for step in range(3_000):
            next(batches)
            if step >= 1_000 and step % 20 == 0:  # until then files, buffers and pools fill up
                held.append((step, sum(memory_bytes(pid, "VmRSS") for pid in pids)))
    slope = np.polyfit(*np.transpose(held), 1)[0]
    assert slope * 1_000 < 1e6, f"{slope * 1_000 / 1e6:.2f} MB more in a thousand batches"


def test_held_out_clips_are_centred_and_of_other_episodes():
    config = micro.config(*pusht())
    episodes = {
        split: {source[i]["episode"] for i in range(len(source))}
        for split, source in (
            (s, open_sources.make_source(config, s)) for s in ("train", "validation")
        )
    }
    assert not episodes["train"] & episodes["validation"]
    (batch,) = take(1, *pusht("data.image_size=96"), split="validation")
    source = open_sources.make_source(config, "validation")
    frames = source[int(batch.sample_ids_B[0])]["frames_VT"][0]
    native = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
    np.testing.assert_array_equal(batch.observation.video_BVTHWC[0, 0], native)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_stream_between_them(monkeypatch, processes):
    whole = take(3, *pusht())
    parts = []
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    for process in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        monkeypatch.setattr(jax, "make_array_from_process_local_data", lambda _, x: x)
        parts.append(take(3, *pusht()))
    for step, batch in enumerate(whole):
        ids = np.concatenate([part[step].sample_ids_B for part in parts])
        assert sorted(ids) == sorted(batch.sample_ids_B)
        video = np.concatenate([part[step].observation.video_BVTHWC for part in parts])
        order, wanted = (
            np.argsort(ids, kind="stable"),
            np.argsort(batch.sample_ids_B, kind="stable"),
        )
        np.testing.assert_array_equal(video[order], batch.observation.video_BVTHWC[wanted])


@needs_shared
def test_one_recording_in_two_versions_gives_the_same_batches():
    versions = [
        take(2, "data.source=lerobot", f"data.root={SHARED / name}", "data.crop_scale=(0.3,1.0)")
        for name in ("g1_subset_v21", "g1_subset_v30")
    ]
    equal(*versions)


@needs_shared
def test_two_cameras_share_crop_and_masks_and_show_different_pictures():
    root = f"data.root={SHARED / 'aloha_sim_twocam_v3'}"
    (batch,) = take(1, "data.source=lerobot", root, "data.cameras=top,left_wrist")
    assert batch.observation.video_BVTHWC.shape[:2] == (8, 2)
    assert np.any(batch.observation.video_BVTHWC[:, 0] != batch.observation.video_BVTHWC[:, 1])
    (one,) = take(1, "data.source=lerobot", root, "data.cameras=left_wrist")
    np.testing.assert_array_equal(
        batch.observation.video_BVTHWC[:, 1], one.observation.video_BVTHWC[:, 0]
    )


def test_clips_past_the_end_come_marked():
    batches = take(3, *pusht("data.fps=4", "data.ends=repeat"))
    masks = [(b.observation.state_mask_BTS[..., 0], b.action_mask_BTPA[..., 0]) for b in batches]
    state_BT, action_BTP = (np.concatenate(side) for side in zip(*masks, strict=True))
    assert state_BT[:, 0].all()
    assert not state_BT.all()
    np.testing.assert_array_equal(action_BTP[:, :, 0], state_BT)
    # Once past the end, past it for good.
    assert (np.diff(action_BTP.reshape(len(action_BTP), -1).astype(int), axis=1) <= 0).all()


def test_a_few_clips_an_episode_are_drawn_anew_each_pass():
    overrides = pusht("data.clips_per_episode=2", "data.val_share=0.0", "data.batch_size=16")
    source = open_sources.make_source(micro.config(*overrides), "train")
    assert source.draws == 2 * 5
    batches = take(5, *overrides)
    ids = np.concatenate([b.sample_ids_B for b in batches])
    passes = [[source._windows[int(i)] for i in ids[p : p + 10]] for p in range(0, 80, 10)]
    for drawn in passes:
        assert sorted(episode for episode, _ in drawn) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert len({frozenset(drawn) for drawn in passes}) == len(passes)
    equal(batches[3:], take(2, *overrides, position=3 * 16))


def test_a_missing_view_is_filler_and_masked():
    config = micro.config(*pusht())
    source = open_sources.make_source(config, "train")

    class OneViewMissing(Source):
        views, frames, stride = 2, source.frames, source.stride
        state_size, action_size = source.state_size, source.action_size

        def __len__(self):
            return len(source)

        def __getitem__(self, index):
            sample = source[index]
            return sample | {"frames_VT": [[], *sample["frames_VT"]]}

    setup = assemble.prepare(config, sources={"train": OneViewMissing()})
    batches = built.stream(config, setup=setup)
    seen = jax.device_get(next(batches)).observation
    batches.close()
    assert seen.view_mask_BV.tolist() == [[False, True]] * 8
    assert not seen.video_BVTHWC[:, 0].any()
    (whole,) = take(1, *pusht())
    np.testing.assert_array_equal(seen.video_BVTHWC[:, 1:], whole.observation.video_BVTHWC)


# --- clips that cannot be read ---


@pytest.fixture
def damaged(tmp_path):
    """Overrides for a copy of PushT in which the video of episode 1 is damaged from frame 20 on."""
    root = shutil.copytree(PUSHT, tmp_path / "pusht")
    path = root / "videos/observation.image/chunk-000/file-000.mp4"
    data = bytearray(path.read_bytes())
    with av.open(path) as container:
        packet = list(container.demux(video=0))[100]
    data[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    path.write_bytes(data)
    return pusht(f"data.root={root}", "data.val_share=0.0")


def test_a_clip_that_cannot_be_read_stops_the_run_or_another_takes_its_place(damaged, capfd):
    with refused("file-000.mp4", "frame", "episode", 1, lines=2):
        take(40, *damaged)
    source = open_sources.make_source(micro.config(*damaged), "train")
    whole = take(12, *pusht("data.val_share=0.0"))
    skip = (*damaged, "data.on_error=skip", "data.max_skip_share=1.0")
    capfd.readouterr()
    batches = stream(*skip)
    found = [jax.device_get(next(batches)) for _ in range(12)]
    said = capfd.readouterr().err
    assert batches.position == 12 * 8
    skipped = batches.report()["data_skipped"]
    assert batches.report() == {"data_skipped": 0}
    batches.close()
    ids, wanted = (np.concatenate([b.sample_ids_B for b in run]) for run in (found, whole))
    changed = ids != wanted
    assert 0 < skipped == changed.sum()
    # Only where it could not be read, and by what can: the rest is the stream as it was.
    assert {source[int(i)]["episode"] for i in wanted[~changed]} == {0, 1, 2, 3, 4}
    for i in wanted[changed]:
        with refused("file-000.mp4", "episode", 1, error=ClipError):
            source[int(i)]
    says(said, "data.on_error=skip", "file-000.mp4", "episode", 1, lines=3)
    assert said.count("data.on_error=skip") == said.count("file-000.mp4") == 1  # not by each clip
    # Keyed: whichever thread reads it, and after a jump, the same one takes the place.
    equal(found[6:], take(6, *skip, "data.threads=1", position=6 * 8))


def test_too_many_skipped_clips_stop_the_run_where_it_was(damaged):
    batches = stream(*damaged, "data.on_error=skip", "data.max_skip_share=0.004")
    taken = []
    with refused("data.max_skip_share=0.004", 2, "file-000.mp4", "episode", 1):
        taken.extend(itertools.islice(batches, 50))
    assert batches.position == 8 * len(taken) > 0
    batches.close()


def test_validation_reports_what_it_skipped(damaged, tmp_path):
    """Half of the held-out episodes are damaged; the model is none of this test's business."""
    skip = ("data.on_error=skip", "data.max_skip_share=1.0", "data.val_share=0.4")
    config = micro.config(*damaged, *skip, "eval.batches=5")
    source = open_sources.make_source(config, "validation")
    assert [episode.index for episode in source.episodes] == [1, 3]
    figure = metrics.Average.from_model_output(np.ones(1))
    steps = types.SimpleNamespace(validate=lambda *_: {"l1": figure, "l1_mean_token": figure})
    context = Context(
        steps, {}, None, config.to_dict(), tmp_path, functools.partial(built.stream, config)
    )
    row = Validation(context)(0, None).row
    assert row["validation/relative"] == 1
    assert 0 < row["validation/data_skipped"] < 40


def test_only_clips_are_skipped_not_mistakes():
    with refused("data.root='nowhere'"):
        take(1, *pusht("data.root=nowhere", "data.on_error=skip"))
