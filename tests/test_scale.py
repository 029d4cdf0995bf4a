"""Large datasets: what is opened and read is counted; `-m campaign` measures a generated one.

The generated datasets have real metadata and tables, and empty videos.
"""

import json
import resource
import subprocess
import sys

import micro
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from recordings import open_pusht, refused, write_v2
from shared_data import PUSHT

from wmjax import open_sources
from wmjax.data.lerobot import native
from wmjax.data.lerobot.native import LeRobotSource
from wmjax.data.media import tables

CAMERAS = ("observation.images.top", "observation.images.wrist")
WIDTH = 8
STANDARD = {
    "v2.1": (
        "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    ),
    "v3.0": (
        "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    ),
}


def generate(root, version, episodes, length, files):
    """Write a dataset of so many episodes of so many rows, in so many tables."""
    numbers = {
        name: {"dtype": "float32", "shape": [WIDTH]} for name in ("observation.state", "action")
    }
    camera = {"dtype": "video", "shape": [480, 640, 3], "info": {"video.codec": "av1"}}
    data, video = STANDARD[version]
    info = {
        "codebase_version": version,
        "fps": 30,
        "chunks_size": 1000,
        "total_episodes": episodes,
        "total_frames": episodes * length,
        "data_path": data,
        "video_path": video,
        "features": {**numbers, **dict.fromkeys(CAMERAS, camera)},
    }
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    lines = (json.dumps({"episode_index": i, "length": length}) for i in range(episodes))
    (root / "meta/episodes.jsonl").write_text("\n".join(lines))
    own = episodes // files
    rows = own * length
    values = np.random.default_rng(0).standard_normal(rows * WIDTH).astype(np.float32)
    numbers = pa.FixedSizeListArray.from_arrays(values, WIDTH)
    frames = np.tile(np.arange(length), own)
    for file in range(files):
        mine = np.arange(file * own, (file + 1) * own)
        table = pa.table(
            {
                "observation.state": numbers,
                "action": numbers,
                "timestamp": (frames / 30).astype(np.float32),
                "frame_index": frames,
                "episode_index": np.repeat(mine, length),
            }
        )
        place = {
            "chunk_index": 0,
            "file_index": file,
            "episode_index": file,
            "episode_chunk": file // 1000,
        }
        path = root / data.format(**place)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, row_group_size=100 * length)
        listed = {"episode_index": mine, "length": np.full(own, length)}
        for prefix in ("data", *(f"videos/{camera}" for camera in CAMERAS)):
            listed |= {
                f"{prefix}/chunk_index": np.zeros(own, int),
                f"{prefix}/file_index": np.full(own, file),
            }
        for camera in CAMERAS:
            listed[f"videos/{camera}/from_timestamp"] = np.arange(own) * length / 30
            path = root / video.format(video_key=camera, **place)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        pq.write_table(pa.table(listed), root / f"meta/episodes/chunk-000/file-{file:03d}.parquet")
    return root


@pytest.fixture
def opened(monkeypatch):
    """The tables opened, in order."""
    paths = []
    real = tables.opened_table

    def counted(path, **options):
        paths.append(path)
        return real(path, **options)

    monkeypatch.setattr(tables, "opened_table", counted)
    return paths


def recording(root, *more):
    data = ("data.source=lerobot", f"data.root={root}", "data.fps=4", "data.val_share=0.4")
    return micro.config(*data, *more)


def test_a_dataset_is_read_once_for_both_splits(opened):
    sources = open_sources.make_sources(recording(PUSHT), ("train", "validation"))
    # The list of the episodes, counted, then read; the columns of the table, then its rows.
    assert len(opened) == 4
    train, validation = sources.values()
    assert train._tables is validation._tables
    assert sorted([*train.episodes.index_E, *validation.episodes.index_E]) == [0, 1, 2, 3, 4]
    separate = open_pusht(val_share=0.4, split="validation")
    assert len(validation) == len(separate)
    assert validation.statistics() == separate.statistics() != train.statistics()


@pytest.mark.parametrize("splits", [("train",), ("train", "validation")])
def test_each_split_is_cut_once(monkeypatch, splits):
    cut, real = [], LeRobotSource.use_split
    monkeypatch.setattr(
        LeRobotSource, "use_split", lambda self, split: (cut.append(split), real(self, split))[1]
    )
    assert [*open_sources.make_sources(recording(PUSHT), splits)] == cut == [*splits]


def test_a_mixture_is_read_once_for_both_splits(opened, tmp_path):
    other = write_v2(tmp_path / "other")
    config = recording("", f"data.mixture={PUSHT}:1,{other}:1")
    open_sources.make_sources(config, ("train", "validation"))
    assert len(opened) == 4 + 1 + 5


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_each_table_is_opened_once_and_no_video(tmp_path, opened, monkeypatch, version):
    root = generate(tmp_path, version, episodes=60, length=5, files=60 if version == "v2.1" else 3)
    looked_at = []
    monkeypatch.setattr(native.RowFrames, "decide", lambda self, path: looked_at.append(path) or "")
    source = LeRobotSource(root, frames=2, fps=30)
    assert (len(source), len(source.episodes)) == (60 * 4, 60)
    lists, files = {"v2.1": (0, 60), "v3.0": (2 * 3, 3)}[version]
    assert len(opened) == lists + 1 + files  # the first table also for its columns
    assert len(looked_at) == len(CAMERAS)  # the first of each
    assert source.episodes.first_row_E.tolist() == [*range(0, 300, 5)]


def test_rows_in_another_table_are_not_taken_from_there(tmp_path):
    """Many small tables are checked together; each episode must be in its own."""
    root = generate(tmp_path, "v2.1", episodes=4, length=5, files=4)
    first, second = (root / f"data/chunk-000/episode_00000{i}.parquet" for i in (1, 2))
    first.rename(root / "kept")
    second.rename(first)
    (root / "kept").rename(second)
    with refused(str(first), "episode 1", 0, 5):
        LeRobotSource(root, frames=2, fps=30)


def test_the_first_batch_does_not_wait_for_statistics(tmp_path, monkeypatch):
    order = []
    summarize = LeRobotSource._summarize

    def counted(self):
        order.append("statistics")
        return summarize(self)

    monkeypatch.setattr(LeRobotSource, "_summarize", counted)
    config = recording(PUSHT, "train.num_steps=2")
    micro.train(config, tmp_path / "run", on_step=lambda step, *_: order.append(step))
    assert order == [1, 2, "statistics"]  # they go into the checkpoint


OPEN = """
import sys, time
from wmjax.data.lerobot.native import LeRobotSource
begun = time.perf_counter()
source = LeRobotSource(sys.argv[1], frames=16, fps=5, val_share=0.05)
source.of_split("validation")
print(time.perf_counter() - begun)
"""


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("version", "episodes", "length", "files"),
    [("v3.0", 100_000, 300, 100), ("v2.1", 20_000, 100, 20_000)],
)
def test_opening_a_large_dataset(tmp_path, version, episodes, length, files):
    root = generate(tmp_path, version, episodes, length, files)
    seconds = []
    for _ in range(3):
        child = subprocess.run(
            [sys.executable, "-c", OPEN, str(root)], capture_output=True, text=True, check=True
        )
        seconds.append(float(child.stdout))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    print(f"{version}, {episodes} episodes: {sorted(seconds)[1]:.1f} s, peak {peak:.2f} GB")
    assert peak < 3
