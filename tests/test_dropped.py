"""data.on_error=skip when a dataset is opened: episodes that cannot be read are left out."""

import json
import shutil

import micro
import pyarrow.parquet as pq
import pytest
from recordings import (
    TABLE,
    VIDEO,
    digest,
    edit_column,
    edit_video,
    missing_names,
    open_pusht,
    refused,
    write_v2,
)
from shared_data import PUSHT

from wmjax import open_sources
from wmjax.data.lerobot.episodes import as_ranges
from wmjax.run import agree
from wmjax.run.saved import Saved


@pytest.fixture
def v21(tmp_path):
    return write_v2(tmp_path.resolve() / "v21")


def table_of(root, episode):
    return root / f"data/chunk-000/episode_{episode:06d}.parquet"


def video_of(root, episode):
    return root / f"videos/chunk-000/observation.image/episode_{episode:06d}.mp4"


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_rows(path):
    pq.write_table(pq.read_table(path)[:70], path)


def not_finite(path):
    edit_column(path, "action", lambda rows: [[float("nan"), 0.0], *rows[1:]])


def by_no_rule(path):
    """Half of the frames, and rows that do not fit them."""
    edit_video(path, 40)


LOST = {
    "no table": (table_of, lambda path: path.unlink()),
    "no video": (video_of, lambda path: path.unlink()),
    "an empty table": (table_of, lambda path: path.write_bytes(b"")),
    "an empty video": (video_of, lambda path: path.write_bytes(b"")),
    "half a table": (table_of, cut_in_half),
    "half a video": (video_of, cut_in_half),
    "rows missing": (table_of, without_rows),
    "not finite": (table_of, not_finite),
    "frames missing": (video_of, by_no_rule),
}


@pytest.mark.parametrize("fault", LOST)
def test_episodes_that_cannot_be_read_are_dropped_named_and_counted(v21, fault):
    place, damage = LOST[fault]
    for episode in (0, 3):
        damage(place(v21, episode))
    with refused(str(place(v21, 0))):
        source = open_pusht(v21)
        source[0]
    source = open_pusht(v21, on_error="skip")
    assert source.dropped == [0, 3]
    assert [episode.index for episode in source.episodes] == [1, 2, 4]
    (note,) = source.notes
    assert not missing_names(note, "data.on_error=skip", 2, 5, "0, 3", str(place(v21, 0)))
    whole = open_pusht()
    for number, episode in enumerate((1, 2, 4)):
        assert digest(source[71 * number]) == digest(whole[71 * episode])
    train, validation = (
        open_pusht(v21, on_error="skip", val_share=0.4, split=split).episodes.index_E.tolist()
        for split in ("train", "validation")
    )
    assert sorted(train + validation) == [1, 2, 4]


def test_a_file_of_many_episodes_drops_them_all(tmp_path):
    root = shutil.copytree(PUSHT, tmp_path / "set")
    edit_video(root / VIDEO, 399)
    source = open_pusht(root, on_error="raise")
    with refused(VIDEO, 399, 400, lines=3):
        source[0]
    with refused(VIDEO, 399, 400):
        open_pusht(root, on_error="skip")
    pq.write_table(pq.read_table(root / TABLE)[:320], root / TABLE)  # episode 4 has no rows
    edit_video(root / VIDEO, 320)
    assert open_pusht(root, on_error="skip").dropped == [4]


def test_no_episode_left_is_the_first_error(v21):
    for episode in range(5):
        video_of(v21, episode).write_bytes(b"")
    with refused(str(video_of(v21, 0))):
        open_pusht(v21, on_error="skip")


def test_what_is_not_asked_for_is_not_looked_at(v21):
    video_of(v21, 0).unlink()
    table_of(v21, 3).unlink()
    assert open_pusht(v21, episodes="1,2,4").dropped == []
    assert open_pusht(v21, episodes="0,1,2,4", on_error="skip").dropped == [0]


def test_many_are_named_as_ranges():
    assert as_ranges([7, 1, 2, 3, 9]) == "1:4, 7, 9"
    assert as_ranges(range(0, 200, 2), most=3) == "0, 2, 4, ..."


def settings(root, *more):
    data = ("data.source=lerobot", f"data.root={root}", "data.fps=4", "data.on_error=skip")
    return micro.config(*data, "data.batch_size=8", "checkpoint.every=2", *more)


def test_the_list_is_in_the_checkpoint_and_another_one_does_not_resume(v21, tmp_path):
    video_of(v21, 2).unlink()
    workdir = tmp_path / "run"
    micro.train(settings(v21, "train.num_steps=2"), workdir)
    assert Saved(workdir / "checkpoints").meta["dropped"] == [2]
    micro.train(settings(v21, "train.num_steps=3"), workdir)
    table_of(v21, 4).unlink()
    with refused("data.on_error", "[2, 4]", "[2]"):
        micro.train(settings(v21, "train.num_steps=4"), workdir)
    shutil.copytree(write_v2(tmp_path / "whole"), v21, dirs_exist_ok=True)
    with refused("data.on_error", "none", "[2]"):
        micro.train(settings(v21, "train.num_steps=4"), workdir)


def test_a_mixture_says_whose_episodes_are_dropped(v21):
    video_of(v21, 2).unlink()
    config = settings("", f"data.mixture={PUSHT}:1,{v21}:1")
    for source in open_sources.make_sources(config, ("train", "validation")).values():
        assert source.dropped == [["v21", 2]]
        assert json.dumps(source.dropped)


def test_processes_that_dropped_other_episodes_stop(v21, monkeypatch):
    video_of(v21, 2).unlink()
    setup = micro.prepare(settings(v21))
    agree.on_data(setup.sources)  # a single process has nobody to ask
    told = {"data.on_error: dropped train episodes": "[]"}
    monkeypatch.setattr(agree.coordination, "count", lambda: 2)
    monkeypatch.setattr(agree.coordination, "index", lambda: 1)
    monkeypatch.setattr(agree.coordination, "wait_told", lambda name, seconds: json.dumps(told))
    with refused("data.on_error", "[2]", "[]", "process 0", "process 1"):
        agree.on_data(setup.sources)
