"""The native LeRobot reader: against lerobot's frames, against itself, on damaged datasets."""

import hashlib
import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from recordings import (
    EPISODES,
    TABLE,
    VIDEO,
    digest,
    edit_column,
    edit_features,
    edit_info,
    edit_video,
    missing_names,
    open_pusht,
    playlist,
    refused,
)
from shared_data import PUSHT, SHARED, needs_shared

from wmjax.data.__main__ import run
from wmjax.data.lerobot.native import LeRobotSource
from wmjax.data.lerobot.paths import Folder
from wmjax.data.media import video as video_files
from wmjax.data.media.transforms import FULL_BOX, Box, crop_and_scale
from wmjax.data.tools.check import check as check_dataset
from wmjax.errors import ClipError, UserError, reason


@pytest.fixture
def pusht(tmp_path):
    """A copy to damage."""
    return shutil.copytree(PUSHT, tmp_path / "pusht")


# --- bit-exact with lerobot ---


def check_against_lerobot(name, root):
    rows = json.loads((SHARED / "lerobot_frames.json").read_text())["datasets"][name]["rows"]
    fps = json.loads((root / "meta/info.json").read_text())["fps"]
    source = LeRobotSource(root, frames=1, fps=fps)
    starts = np.cumsum([0, *(episode.length for episode in source.episodes)])
    for row in rows:
        clip = source[int(starts[row["episode_index"]]) + row["frame_index"]]
        assert (clip["episode"], clip["start"]) == (row["episode_index"], row["frame_index"])
        for camera, frames in zip(source.cameras, clip["frames_VT"], strict=True):
            image_HWC = crop_and_scale(frames, FULL_BOX, *row[camera]["shape"][:2])[0]
            assert hashlib.sha256(image_HWC.tobytes()).hexdigest() == row[camera]["sha256"]
        for key, found in (("observation.state", "state_TS"), ("action", "action_TPA")):
            np.testing.assert_array_equal(clip[found].ravel(), np.float32(row[key]))


@needs_shared
@pytest.mark.parametrize(
    "name",
    [
        "g1_subset_v30",
        "aloha_sim_twocam_v3",
        "pusht_sim_v3",
        "pusht_explore_v3",
        "aloha_sim_transfer_v3",
    ],
)
def test_frames_states_and_actions_are_lerobots(name):
    check_against_lerobot(name, SHARED / name)


def test_a_frame_is_made_a_picture_before_the_next_is_decoded(monkeypatch):
    """Frames are scaled while they are in the CPU cache."""
    done, decode = [], video_files._Video.frame
    monkeypatch.setattr(
        video_files._Video,
        "frame",
        lambda self, number: done.append("decoded") or decode(self, number),
    )
    source = open_pusht()
    clip = source.read(3, lambda frame: done.append("picture") or frame.pts)
    assert done == ["decoded", "picture"] * 4
    assert clip["frames_VT"] == [[frame.pts for frame in source[3]["frames_VT"][0]]]


@needs_shared
def test_v21_is_what_lerobot_reads_after_converting():
    check_against_lerobot("g1_subset_v30", SHARED / "g1_subset_v21")


def check_versions_agree(step):
    old, new = (
        LeRobotSource(SHARED / name, frames=16, fps=4)
        for name in ("g1_subset_v21", "g1_subset_v30")
    )
    assert len(old) == len(new)
    for i in range(0, len(old), step):
        a, b = old[i], new[i]
        for key in ("episode", "start"):
            assert a[key] == b[key]
        for key in ("state_TS", "action_TPA"):
            np.testing.assert_array_equal(a[key], b[key])
        box = Box(0.1, 0.2, 0.7, 0.6)
        np.testing.assert_array_equal(
            *(crop_and_scale(clip["frames_VT"][0], box, 64, 64) for clip in (a, b))
        )


@needs_shared
def test_v21_equals_v30():
    check_versions_agree(step=61)


@needs_shared
@pytest.mark.campaign
def test_v21_equals_v30_in_every_window():
    check_versions_agree(step=1)


# --- clips ---


def test_a_clip_is_the_rows_of_its_episode():
    source = open_pusht(frames=5)
    assert (source.stride, source.cameras) == (3, ("observation.image",))
    assert (source.state_size, source.action_size) == (2, 2)
    assert source.fps_effective == pytest.approx(10 / 3)
    table = pq.read_table(PUSHT / TABLE)
    owners, counts = (table[name].to_numpy() for name in ("episode_index", "frame_index"))
    states, actions = (
        np.array(table[name].to_pylist(), np.float32) for name in ("observation.state", "action")
    )
    assert len(source) == 5 * (80 - 12)
    for i in [0, 1, 67, 68, 200, len(source) - 1]:
        clip = source[i]
        rows = np.flatnonzero(owners == clip["episode"])
        assert counts[rows[clip["start"]]] == clip["start"]
        for t in range(5):
            step = clip["start"] + 3 * t
            np.testing.assert_array_equal(clip["state_TS"][t], states[rows[step]])
            for p in range(3):
                np.testing.assert_array_equal(
                    clip["action_TPA"][t, p], actions[rows[min(step + p, 79)]]
                )
        assert [frame.pts // 1024 for frame in clip["frames_VT"][0]] == (
            80 * clip["episode"] + clip["start"] + 3 * np.arange(5)
        ).tolist()


def test_order_of_access_does_not_matter():
    source = open_pusht()
    in_order = [digest(source[i]) for i in range(len(source))]
    assert len(set(in_order)) == len(in_order)
    for i in np.random.default_rng(0).permutation(len(source)):
        assert digest(source[i]) == in_order[i]


def test_threads_read_at_once():
    source, alone = open_pusht(), open_pusht()
    order = np.random.default_rng(0).integers(len(source), size=120)
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda i: digest(source[i]), order))
    assert together == [digest(alone[i]) for i in order]


def test_an_open_pretrained_can_be_pickled():
    source = open_pusht()
    clip = digest(source[7])
    again = pickle.loads(pickle.dumps(source))
    assert digest(again[7]) == clip
    assert again.describe() == source.describe()


def test_split_by_episode():
    train, validation = (
        open_pusht(split=split, val_share=0.4) for split in ("train", "validation")
    )
    assert [e.index for e in train.episodes] == [0, 2, 4]
    assert [e.index for e in validation.episodes] == [1, 3]
    assert digest(validation[0]) == digest(open_pusht()[80 - 9])
    assert digest(train[71]) == digest(open_pusht()[2 * 71])


def test_describe_says_what_was_opened():
    line = open_pusht().describe()
    assert "\n" not in line
    assert not missing_names(
        line,
        *(str(PUSHT), "v3.0", "5 episodes", "400 frames", "10 fps", "observation.image"),
        *("96x96x3", "av1", "stride 3", "3.333 fps", "355 clips"),
    )


@needs_shared
def test_cameras_by_full_name_last_part_or_all():
    def cameras(asked):
        return LeRobotSource(SHARED / "aloha_sim_twocam_v3", cameras=asked, frames=4, fps=4).cameras

    top, wrist = "observation.images.top", "observation.images.left_wrist"
    assert cameras("all") == (top, wrist)
    assert cameras("left_wrist, top") == (wrist, top)
    assert cameras(top) == (top,)
    with refused("data.cameras='top,observation.images.top'", lines=1):
        cameras(f"top,{top}")


@needs_shared
def test_each_camera_is_a_clip_of_its_own():
    def two(cameras):
        return LeRobotSource(SHARED / "aloha_sim_twocam_v3", cameras=cameras, frames=2, fps=4)

    each, together = two("each"), two("all")
    windows = len(together)
    assert (each.views, together.views, len(each)) == (1, 2, 2 * windows)
    assert not missing_names(each.describe(), f"{2 * windows} clips")
    for i in (0, windows - 1):
        views = together[i]["frames_VT"]
        for camera in range(2):
            clip = each[camera * windows + i]
            (frames,) = clip["frames_VT"]
            assert [f.pts for f in frames] == [f.pts for f in views[camera]]
            np.testing.assert_array_equal(frames[0].to_ndarray(), views[camera][0].to_ndarray())
            np.testing.assert_array_equal(clip["state_TS"], together[i]["state_TS"])
    # A pass draws every clip of every camera once.
    drawn = {each.draw(i, np.random.default_rng(i)) for i in range(each.draws)}
    assert drawn == set(range(2 * windows))


def test_past_the_end_the_last_frame_stands_in_and_is_marked():
    source = open_pusht(ends="repeat")
    assert len(source) == 5 * 80
    for start, steps in ((70, [70, 73, 76, 79]), (75, [75, 78, 79, 79]), (79, [79] * 4)):
        clip = source[80 + start]
        assert [f.pts // 1024 for f in clip["frames_VT"][0]] == [80 + step for step in steps]
        rows = source.episodes[1].first_row + np.array(steps)
        np.testing.assert_array_equal(clip["state_TS"], source._tables["observation.state"][rows])
        unclamped_T = start + 3 * np.arange(4)
        assert clip["state_mask_TS"].tolist() == [[step < 80] * 2 for step in unclamped_T]
        assert clip["action_mask_TPA"].tolist() == [
            [[step + p < 80] * 2 for p in range(3)] for step in unclamped_T
        ]
        last = source._tables["action"][source.episodes[1].first_row + 79]
        assert (clip["action_TPA"][~clip["action_mask_TPA"][:, :, 0]] == last).all()
    # Repeated frames have equal pixels, and a clip inside its episode is the same with ends=drop.
    video_THWC = crop_and_scale(source[75]["frames_VT"][0], Box(0.0, 0.0, 0.9, 0.9), 64, 64)
    np.testing.assert_array_equal(video_THWC[2], video_THWC[3])
    assert np.any(video_THWC[0] != video_THWC[2])
    assert digest(source[80]) == digest(open_pusht()[71])


def test_a_stride_takes_the_place_of_fps():
    source = open_pusht(stride=5)
    assert (source.stride, source.fps_effective) == (5, 2)
    assert source[0]["action_TPA"].shape == (4, 5, 2)
    check(["data.frames=4", 91, 5, 80, "data.stride=30"], open_pusht, stride=30)


# --- where episodes lie in files ---


@needs_shared
def test_files_of_video_and_of_rows_switch_at_different_episodes():
    root = SHARED / "pusht_explore_v3"
    source = LeRobotSource(root, frames=2, fps=10)
    tables = [pq.read_table(path) for path in sorted(root.glob("data/*/*.parquet"))]
    states = np.array(pa.concat_tables(tables)["observation.state"].to_pylist(), np.float32)
    switch_of_rows = tables[1]["episode_index"][0].as_py()
    videos = [episode.videos["observation.image"] for episode in source.episodes]
    switches = [i for i in range(1, 250) if videos[i].path != videos[i - 1].path]
    assert len(switches) == 2
    assert switch_of_rows not in switches
    starts = np.cumsum([0, *(episode.length - 1 for episode in source.episodes)])
    for index in [0, *switches, switch_of_rows, 249]:
        episode, first = source.episodes[index], round(10 * videos[index].start)
        assert (first == 0) == (index in [0, *switches])
        if index in switches:
            before = source.episodes[index - 1]
            with av.open(videos[index - 1].path) as container:
                assert (
                    round(10 * videos[index - 1].start) + before.length
                    == container.streams.video[0].frames
                )
        for i, number in (
            (starts[index], first),
            (starts[index + 1] - 1, first + episode.length - 2),
        ):
            clip = source[int(i)]
            assert [f.pts for f in clip["frames_VT"][0]] == [1024 * number, 1024 * (number + 1)]
        np.testing.assert_array_equal(
            clip["state_TS"], states[episode.first_row + episode.length - 2 :][:2]
        )


@pytest.mark.parametrize(
    ("off", "names"),
    [
        (0.05, ["episode 3: frame 0", "24.0500 s", "80 of 400", "400 frames"]),
        (0.1, ["episode 4: frame 0", "frame 320", "episode 3: frame 79", "400 frames"]),
        (0.3, ["episode 4: frame 0", "frame 320", "episode 3: frame 77", "400 frames"]),
        (1e4, ["episode 3: frame 0", "10024.0000 s", "80 of 400", "400 frames"]),
    ],
)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_start_that_is_off_is_refused_for_the_whole_file(pusht, off, names, split):
    name = "videos/observation.image/from_timestamp"
    edit_column(pusht / EPISODES, name, lambda v: [*v[:3], v[3] + off, v[4]])
    source = open_pusht(pusht, split=split, val_share=0.2)
    for index in (0, len(source) - 1):
        with refused(VIDEO, *names, kind=ClipError, lines=3):
            source[index]


def write_v21(root, *, lengths, fps=30, video_fps=30, kind="float32"):
    """Write a v2.1 dataset whose frames are grey and brighten by 4 a frame."""
    (root / "meta").mkdir(parents=True)
    image = {"dtype": "video", "shape": [3, 48, 64], "names": ["channels", "height", "width"]}
    numbers = {"dtype": "float32", "shape": [1], "names": None}
    info = {
        "codebase_version": "v2.1",
        "fps": fps,
        "chunks_size": 1,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": {"cam": image, "observation.state": numbers, "action": numbers},
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    lines = [json.dumps({"episode_index": i, "length": n}) for i, n in enumerate(lengths)]
    (root / "meta/episodes.jsonl").write_text("\n".join(lines) + "\n")
    for i, length in enumerate(lengths):
        table = root / f"data/chunk-{i:03d}/episode_{i:06d}.parquet"
        video = root / f"videos/{i:03d}/cam/episode_{i:06d}.mp4"
        for path in (table, video):
            path.parent.mkdir(parents=True)
        columns = {
            "observation.state": pa.array(
                [j + 100 * i for j in range(length)], pa.type_for_alias(kind)
            ),
            "action": pa.array([[float(j)] for j in range(length)], pa.list_(pa.float64())),
            "episode_index": [i] * length,
            "frame_index": list(range(length)),
        }
        pq.write_table(pa.table(columns), table)
        with av.open(video, "w") as container:
            stream = container.add_stream(
                "libx264", rate=video_fps, options={"g": "12", "bf": "3", "qp": "0"}
            )
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for j in range(length):
                image = np.full((48, 64, 3), 4 * j, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
    return root


@pytest.mark.parametrize(("frames", "fps"), [(4, 30), (3, 4), (2, 1.1)])
def test_b_frames_and_long_groups_of_pictures(tmp_path, frames, fps):
    source = LeRobotSource(
        write_v21(tmp_path / "set", lengths=[60, 50], kind="float64"), frames=frames, fps=fps
    )
    for i in np.random.default_rng(0).permutation(len(source)):
        clip = source[i]
        steps_T = clip["start"] + source.stride * np.arange(frames)
        assert np.array_equal(clip["state_TS"][:, 0], steps_T + 100 * clip["episode"])
        assert np.array_equal(clip["action_TPA"][:, 0, 0], steps_T)
        grey_T = [frame.to_ndarray(format="rgb24").mean() for frame in clip["frames_VT"][0]]
        assert np.abs(grey_T - 4 * steps_T).max() < 2


def test_a_file_read_to_its_end_is_read_again(tmp_path):
    """A decoder with delay returns its last frames only after the last packet."""
    path = next(write_v21(tmp_path / "set", lengths=[60]).rglob("*.mp4"))
    videos = video_files.VideoFiles()
    times = videos.timeline(path).pts_N.tolist()
    assert times == [512 * number for number in range(60)]
    for order in (times, [1536, 30208, 0]):
        assert [frame.pts for frame in videos.read(path, order)] == order


def test_seeks_only_where_a_key_frame_lies_ahead(tmp_path):
    path = next(write_v21(tmp_path / "set", lengths=[60]).rglob("*.mp4"))
    video = video_files._Video(path, None)
    seeks = []

    class Counted:
        def __init__(self, container):
            self.demux, self._seek = container.demux, container.seek

        def seek(self, *args, **kwargs):
            seeks.append(args)
            self._seek(*args, **kwargs)

    video._container = Counted(video._container)
    # Key frames: 0, 12, 24, ... It decodes on to 3 and 11, and seeks to 13, 40 and backwards.
    for number, total in [(0, 1), (3, 1), (11, 1), (13, 2), (14, 2), (40, 3), (38, 4), (38, 5)]:
        assert video.frame(512 * number).pts == 512 * number
        assert len(seeks) == total


def test_more_files_than_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(video_files, "MAX_OPEN", 2)
    root = write_v21(tmp_path / "set", lengths=[9, 9, 9, 9])
    source = LeRobotSource(root, frames=2, fps=30)
    clips = [source[i] for i in [0, 8, 16, 24] * 3]
    assert len(source._frames.videos._local.videos) == 2
    # Frames stay valid after their file is closed.
    for clip, again in zip(clips[:4], clips[4:8], strict=True):
        assert digest(clip) == digest(again)


# --- damaged datasets and wrong metadata ---


def check(names, call, *args, **changes):
    with refused(*names):
        call(*args, **changes)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"cameras": "wrist"}, ["data.cameras='wrist'", "observation.image"]),
        ({"cameras": ""}, ["data.cameras=''", "observation.image"]),
        ({"cameras": "action"}, ["data.cameras='action'", "observation.image"]),
        ({"fps": 11}, ["data.fps=11", 10]),
        ({"fps": 0}, ["data.fps=0", 10]),
        ({"frames": 40}, ["data.frames=40", "stride 3", 118, 5, 80, str(PUSHT), 10, "data.fps=4"]),
        ({"state_key": "state"}, ["data.state='state'", "observation.state", "action"]),
        ({"action_key": "observation.image"}, ["data.action='observation.image'", "action"]),
        ({"split": "validation"}, ["data.val_share=0", "validation", 5]),
    ],
)
def test_wrong_options(changes, names):
    check(names, open_pusht, **changes)


def test_missing_root_and_other_folders(tmp_path):
    nowhere = tmp_path / "nowhere"
    check([f"data.root='{nowhere}'"], open_pusht, nowhere)
    check([f"data.root='{tmp_path}'", "meta/info.json"], open_pusht, tmp_path)
    shutil.copytree(PUSHT / "meta", tmp_path / "set/meta")
    near = str(tmp_path / "set")
    for folder in (tmp_path, tmp_path / "set/meta"):
        check([f"data.root='{folder}'", "meta/info.json", near], open_pusht, folder)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (
            {"codebase_version": "v4.0"},
            ["codebase_version='v4.0'", "v2.0", "v2.1", "v3.0", "data.reader=lerobot"],
        ),
        ({"codebase_version": None}, ["codebase_version=None", "v2.0"]),
        ({"fps": 0}, ["fps=0", 0.001]),
        ({"fps": -10}, ["fps=-10", 0.001]),
        ({"fps": "10"}, ["fps='10'"]),
        ({"fps": 1e-320}, ["fps=1e-320", 0.001]),
        ({"fps": 10**400}, ["fps=1" + "0" * 19, "2**31"]),
        ({"features": []}, ["features=[]"]),
        ({"data_path": "data/{chunk_index!r}"}, ["data_path='data/{chunk_index!r}'", "file_index"]),
        ({"data_path": "data/\0"}, ["data_path=" + repr("data/\0")]),
        ({"video_path": None}, ["video_path=None"]),
        (
            {"data_path": "../x/{chunk_index:03d}-{file_index}"},
            ["data_path='../x/{chunk_index:03d}-{file_index}'"],
        ),
        (
            {"data_path": "data/{chunk_index.real}"},
            ["data_path='data/{chunk_index.real}'", "file_index"],
        ),
        (
            {"data_path": "data/{chunk_index:999999999d}"},
            ["data_path='data/{chunk_index:999999999d}'", "file_index"],
        ),
        ({"data_path": "data/{"}, ["data_path='data/{'"]),
        ({"video_path": "/etc/passwd"}, ["video_path='/etc/passwd'"]),
        (
            {"video_path": "videos/{video_key:03d}.mp4"},
            ["video_path='videos/{video_key:03d}.mp4'", "chunk_index"],
        ),
    ],
)
def test_wrong_info(pusht, changes, names):
    edit_info(pusht, **changes)
    check(["meta/info.json", *names], open_pusht, pusht)


def test_unreadable_info(pusht):
    (pusht / "meta/info.json").write_text('{"fps": ')
    check(["meta/info.json", "JSON"], open_pusht, pusht)
    (pusht / "meta/info.json").write_text("[]")
    check(["meta/info.json", "JSON", "list"], open_pusht, pusht)


def test_links_may_not_lead_outside_except_to_the_hubs_blobs(pusht, tmp_path):
    blob = tmp_path / "hub/blobs/0123"
    blob.parent.mkdir(parents=True)
    (pusht / VIDEO).rename(blob)
    (pusht / VIDEO).symlink_to(blob)
    check(["meta/info.json", "video_path", str(blob)], open_pusht, pusht)
    snapshot = tmp_path / "hub/snapshots/abc"
    snapshot.parent.mkdir()
    pusht.rename(snapshot)
    assert digest(open_pusht(snapshot)[3]) == digest(open_pusht()[3])
    edit_info(snapshot, video_path="../../{video_key}")
    names = ["video_path='../../{video_key}'", str(tmp_path / "hub/observation.image")]
    check(names, open_pusht, snapshot)


@pytest.mark.parametrize("name", ["meta/info.json", EPISODES])
def test_metadata_may_not_be_links_to_what_lies_outside(pusht, tmp_path, name):
    (pusht / name).rename(tmp_path / "elsewhere")
    (pusht / name).symlink_to(tmp_path / "elsewhere")
    check([name, str(tmp_path / "elsewhere")], open_pusht, pusht)


def test_depth_is_refused_not_dropped(pusht):
    depth = {"dtype": "video", "shape": [96, 96, 1], "info": {"is_depth_map": True}}
    edit_features(pusht, **{"observation.depth": depth})
    assert open_pusht(pusht).cameras == ("observation.image",)
    assert not missing_names(open_pusht(pusht).describe(), "observation.depth")
    names = ["data.cameras='observation.depth'", "depth", "observation.image"]
    check(names, open_pusht, pusht, cameras="observation.depth")
    edit_features(pusht, **{"observation.image": depth})
    names = ["data.cameras='all'", "observation.image", "observation.depth", "depth"]
    check(names, open_pusht, pusht)


def test_last_part_of_two_cameras(pusht):
    features = json.loads((pusht / "meta/info.json").read_text())["features"]
    edit_features(pusht, **{"other.image": features["observation.image"]})
    names = ["data.cameras='image'", "observation.image", "other.image"]
    check(names, open_pusht, pusht, cameras="image")


@pytest.mark.parametrize(
    ("path", "named"), [(VIDEO, VIDEO), (TABLE, TABLE), (EPISODES, "meta/episodes")]
)
def test_missing_files(pusht, path, named):
    (pusht / path).unlink()
    check([str(pusht / named)], open_pusht, pusht)


@pytest.mark.parametrize("path", [TABLE, EPISODES])
def test_unreadable_tables(pusht, path):
    whole = (pusht / path).read_bytes()
    (pusht / path).write_bytes(whole[: len(whole) // 2])
    check([path, "parquet"], open_pusht, pusht)


def replace(at, value):
    return lambda values: [*values[:at], value, *values[at + 1 :]]


@pytest.mark.parametrize(
    ("path", "column", "change", "names"),
    [
        (TABLE, "action", lambda v: None, ["action", "observation.state"]),
        (TABLE, "action", replace(200, [1.0]), ["episode 2", "action", 1, 2]),
        (TABLE, "action", replace(200, None), ["action", 1]),
        (TABLE, "action", replace(200, [1.0, None]), ["action", 1]),
        (TABLE, "action", lambda v: [["1", "2"]] * 400, ["action", "string"]),
        (TABLE, "action", lambda v: [1.0] * 400, ["episode 0", "action", 1, 2]),
        (TABLE, "action", replace(200, [1e300, 0.0]), ["episode 2", "action[0]", "inf", 40]),
        (TABLE, "episode_index", lambda v: [0, *v[:-1]], ["episode 0", 81, 80]),
        (TABLE, "episode_index", lambda v: [9, *v[1:]], ["episode 0", 79, 80]),
        (TABLE, "episode_index", lambda v: v[::80] * 80, ["episode 0", 0, 5]),
        (TABLE, "episode_index", lambda v: ["x"] * 400, ["episode_index", "string"]),
        (TABLE, "frame_index", replace(200, 7), ["episode 2", "frame_index", 7, 40]),
        (TABLE, "frame_index", lambda v: [0.5] * 400, ["frame_index", "double"]),
        (EPISODES, "length", lambda v: None, ["length"]),
        (EPISODES, "length", replace(4, 2**40), ["episode 4", "length", 2**40]),
        (EPISODES, "length", replace(4, 0), ["episode 4", "length", 0]),
        (EPISODES, "length", lambda v: ["80"] * 5, ["length", "string"]),
        (EPISODES, "length", replace(4, 79), ["total_frames=400", 399, 400]),
        (EPISODES, "length", replace(0, 70), ["total_frames=400", 390, "400 rows"]),
        (EPISODES, "episode_index", replace(4, 3), ["episode 3", 2]),
        (EPISODES, "data/file_index", lambda v: [{"x": 0}] * 5, ["data/file_index", "struct"]),
        (EPISODES, "data/file_index", lambda v: [1] * 5, ["data/chunk-000/file-001.parquet"]),
    ],
)
def test_tables_at_odds(pusht, path, column, change, names):
    edit_column(pusht / path, column, change)
    where = [] if path == EPISODES else [path]
    check([*where, *names], open_pusht, pusht)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_number_that_is_none_is_found_where_it_is(pusht, value):
    edit_column(pusht / TABLE, "action", lambda v: [*v[:200], [v[200][0], float(value)], *v[201:]])
    names = [str(pusht / TABLE), "episode 2", "action[1]", value, "frame 40"]
    check(names, open_pusht, pusht)
    check(names, open_pusht, pusht, val_share=0.2)  # in a held-out episode: read with the others


def test_a_length_that_no_memory_holds_is_held_against_the_rows_first(pusht):
    edit_info(pusht, total_frames=2**31 - 1 + 320)
    edit_column(pusht / EPISODES, "length", lambda v: [*v[:4], 2**31 - 1])
    check([TABLE, "episode 4", 80, 2**31 - 1], open_pusht, pusht)


def test_a_column_that_is_there_twice(pusht):
    table = pq.read_table(pusht / TABLE)
    pq.write_table(table.append_column("action", table["action"]), pusht / TABLE)
    check([TABLE, "action"], open_pusht, pusht)


def test_links_to_themselves_and_files_that_are_none(pusht):
    for path in (VIDEO, TABLE):
        (pusht / path).rename(pusht / "kept")
        (pusht / path).symlink_to((pusht / path).name)
        check([path], open_pusht, pusht)
        (pusht / path).unlink()
        (pusht / path).mkdir()
        check([path], open_pusht, pusht)
        (pusht / path).rmdir()
        (pusht / "kept").rename(pusht / path)
    (pusht / "meta/info.json").write_text("[" * 100_000)
    check(["meta/info.json", "JSON"], open_pusht, pusht)


def test_no_episodes(tmp_path, pusht):
    pq.write_table(pq.read_table(pusht / EPISODES)[:0], pusht / EPISODES)
    check([str(pusht / "meta/episodes"), 1], open_pusht, pusht)
    root = write_v21(tmp_path / "set", lengths=[])
    names = ["meta/episodes.jsonl", 1]
    check(names, LeRobotSource, root, frames=2, fps=30)


def test_lines_of_the_v21_episodes_file(tmp_path):
    root = write_v21(tmp_path / "set", lengths=[5])
    path = root / "meta/episodes.jsonl"
    for line, names in (('{"episode_index": 0}', ["episode_index", "length"]), ("{", ["JSON"])):
        path.write_text(f"{line}\n")
        check([str(path), *names], LeRobotSource, root, frames=2, fps=30)
    path.unlink()
    check([str(path)], LeRobotSource, root, frames=2, fps=30)


def test_videos_that_are_cut_short(pusht):
    """Opening checks that the file exists; every read raises the error."""
    path = pusht / VIDEO
    whole = path.read_bytes()
    named = (str(path), "episode 4", "observation.image")
    # PyAV 15 has no index to compare the size with; it counts the frames.
    cut = len(whole) // 2 if hasattr(av.stream.Stream, "index_entries") else 400
    for data, name in ((whole[: len(whole) // 2], cut), (whole[8:], "moov"), (b"", "moov")):
        path.write_bytes(data)
        source = open_pusht(pusht)
        for _ in range(2):
            with refused(*named, name, kind=ClipError, lines=2):
                source[len(source) - 1]


@pytest.mark.parametrize("kind", ["ffconcat", "m3u8", "mpd"])
def test_a_video_that_is_a_playlist_reads_no_other_file(pusht, tmp_path, kind):
    """FFmpeg knows a format by its content, whatever the file is called."""
    path = pusht / VIDEO
    path.write_text(playlist(kind, path.rename(path.with_name("other.mp4"))))
    with refused(str(path), "episode 0", "not readable as video", kind=ClipError, lines=2):
        open_pusht(pusht)[0]
    findings, _ = check_dataset(pusht)
    assert any(f.where == VIDEO and "not readable as video" in f.found for f in findings)
    with pytest.raises(UserError, match="not readable as video"):
        run(["transcode", str(pusht), str(tmp_path / "out"), "--workers=1"])
    assert not list((tmp_path / "out").rglob("*.mp4"))


def test_a_video_that_is_gone_is_said_to_be_gone(pusht):
    source = open_pusht(pusht)
    source[0]
    (pusht / VIDEO).unlink()
    reopened = pickle.loads(pickle.dumps(source))
    with refused(VIDEO, "No such file", kind=ClipError, lines=2) as caught:
        reopened[0]
    assert "moov" not in str(caught.value)


def test_a_link_to_itself_is_not_said_to_be_missing(pusht):
    (pusht / "loop").symlink_to("loop")
    with refused("loop") as caught:
        Folder(pusht).resolve(pusht / "loop")
    assert "no such file" not in str(caught.value)


def test_the_systems_error_is_shown_after_a_path_of_any_length():
    """Arrow and Orbax put it at the end."""
    error = OSError(
        28, f"Error writing to '/{'d' * 400}'. Detail: [errno 28] No space left on device"
    )
    text = reason(error)
    assert len(text) <= 200
    assert text.startswith("Error writing")
    assert text.endswith("[errno 28] No space left on device")


def test_damaged_video_data(pusht):
    data = bytearray((pusht / VIDEO).read_bytes())
    with av.open(pusht / VIDEO) as container:
        packet = list(container.demux(video=0))[100]
    data[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    (pusht / VIDEO).write_bytes(data)
    source = open_pusht(pusht)
    check([VIDEO, "frame 100", "episode 1"], source.__getitem__, 71 + 11)
    assert digest(source[0]) == digest(open_pusht()[0])


def test_fewer_frames_than_rows(pusht):
    edit_video(pusht / VIDEO, 300)
    source = open_pusht(pusht)
    for index in (0, 3 * 71):
        names = [VIDEO, "300 frames", "400 rows", "100 of 400", "episode 3", "observation.image"]
        check(names, source.__getitem__, index)


def test_video_at_another_rate(tmp_path):
    root = write_v21(tmp_path / "set", lengths=[20], fps=30, video_fps=20)
    source = LeRobotSource(root, frames=3, fps=30)
    (note,) = source.notes
    assert not missing_names(
        note, "episode_000000.mp4", "frame 1", "0.0500 s", "0.0333 s", "13 of 20"
    )
    assert [frame.pts for frame in source[5]["frames_VT"][0]] == [512 * n for n in (5, 6, 7)]
    # Two episodes, of which one has too few frames: not by count.
    edit_video(next(root.rglob("*.mp4")), 19)
    check(["19 frames", "20 rows"], LeRobotSource(root, frames=3, fps=30).__getitem__, 0)


def test_no_video_stream(tmp_path):
    root = write_v21(tmp_path / "set", lengths=[20])
    path = next(root.rglob("*.mp4"))
    with av.open(path, "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    check([str(path), "episode 0"], LeRobotSource(root, frames=3, fps=30).__getitem__, 0)
