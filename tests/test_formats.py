"""Every format of a LeRobot dataset, and metadata that is a little wrong.

Each variant is a copy of the recording in tests/data and must read as it does: pixels, states,
actions.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
    encode,
    missing_names,
    open_pusht,
    reader_of,
    refused,
    to_images,
    write_v2,
)
from shared_data import PUSHT

from wmjax.data import __main__ as tools
from wmjax.data.lerobot.episodes import Dropped, Episodes, Places
from wmjax.data.lerobot.info import read_info
from wmjax.data.lerobot.native import LeRobotSource
from wmjax.data.lerobot.paths import Folder, find
from wmjax.data.lerobot.tables import read_tables
from wmjax.data.media import images, pointers
from wmjax.data.mixture import Mixture
from wmjax.data.windows import pick_episodes
from wmjax.errors import ClipError
from wmjax.run.summary import notes_of

CAMERA = "observation.image"
CLIPS = (0, 70, 71, 200, 354)  # in all five episodes; the first and the last window


@pytest.fixture(scope="module")
def expected():
    source = open_pusht()
    return [digest(source[i]) for i in CLIPS]


@pytest.fixture
def pusht(tmp_path):
    return shutil.copytree(PUSHT, tmp_path / "pusht")


@pytest.fixture
def v21(tmp_path):
    return write_v2(tmp_path / "v21")


def check_reads(root, expected, names=None, **changes):
    """Check the clips of a dataset, and that it has one note with these names; None: no note."""
    source = open_pusht(root, **changes)
    assert len(source) == 355
    assert [digest(source[i]) for i in CLIPS] == expected
    if names is None:
        assert source.notes == []
    else:
        (note,) = source.notes
        assert "\n" not in note
        assert not missing_names(note, str(root), *names), note
    return source


def check_error(names, root, **changes):
    with refused(*names):
        open_pusht(root, **changes)


# --- versions ---


@pytest.mark.parametrize("version", ["v2.0", "v2.1"])
def test_one_table_and_one_video_an_episode(tmp_path, expected, version):
    source = check_reads(write_v2(tmp_path / "set", version, chunks_size=2), expected)
    assert not missing_names(source.describe(), version, "5 episodes", "400 frames")


def write_first_v20(root):
    """Write metadata as lerobot's first converter to v2.0 did: keys and shapes, no features."""
    data = "data/train-{episode_index:05d}-of-{total_episodes:05d}.parquet"
    video = "videos/{video_key}_episode_{episode_index:06d}.mp4"
    write_v2(root, "v2.0", data_path=data, video_path=video)
    (root / "meta/episodes.jsonl").unlink()
    info = {
        "codebase_version": "v2.0",
        "data_path": data,
        "robot_type": "unknown",
        "total_episodes": 5,
        "fps": 10,
        "splits": {"train": "0:5"},
        "keys": ["observation.state", "action"],
        "video_keys": [CAMERA],
        "image_keys": [],
        "shapes": {
            "observation.state": 2,
            "action": 2,
            CAMERA: {"width": 96, "height": 96, "channels": 3},
        },
        "names": {"observation.state": ["x", "y"], "action": ["x", "y"]},
        "videos": {"videos_path": video, CAMERA: {"video.codec": "av1"}},
        "episodes": [{"index": i, "task": 0, "length": 80} for i in range(5)],
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    return root


def test_the_first_v20_has_keys_and_shapes(tmp_path, expected):
    root = write_first_v20(tmp_path / "set")
    assert not missing_names(check_reads(root, expected).describe(), CAMERA, "96x96x3", "av1")
    edit_info(root, shapes={"action": 2})
    check_error(["meta/info.json", "shapes", "observation.state", "None"], root)
    edit_info(root, shapes=None)
    check_error(["meta/info.json", "features", "keys", "shapes"], root)


def test_numbers_in_float64(pusht, expected):
    for name in ("observation.state", "action"):
        edit_column(pusht / TABLE, name, lambda v: pa.array(v, pa.list_(pa.float64())))
        edit_features(pusht, **{name: {"dtype": "float64", "shape": [2], "names": None}})
    source = check_reads(pusht, expected)
    assert source[0]["state_TS"].dtype == source[0]["action_TPA"].dtype == np.float32


@pytest.mark.parametrize("layout", ["jsonl", "task", "__index_level_0__", "none"])
def test_tasks_are_not_read_in_any_layout(pusht, expected, layout):
    (pusht / "meta/tasks.parquet").unlink()
    if layout == "jsonl":
        (pusht / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "push"}\n')
    elif layout != "none":
        pq.write_table(pa.table({"task_index": [0], layout: ["x"]}), pusht / "meta/tasks.parquet")
    check_reads(pusht, expected)


# --- images in tables ---


@pytest.mark.parametrize("rows", [1_000, 17])
def test_pictures_in_the_tables_of_v30(pusht, expected, rows):
    """Episodes start inside a row group; with 17 rows a group, clips span several groups."""
    source = check_reads(to_images(pusht, row_group_size=rows), expected)
    assert not missing_names(source.describe(), CAMERA, "96x96x3", "images", "stride 3")
    frame = source[3]["frames_VT"][0][0]
    assert (frame.dtype, frame.shape) == (np.uint8, (96, 96, 3))


def test_pictures_in_the_tables_of_v21(v21, expected):
    check_reads(to_images(v21), expected)


def test_pictures_are_read_by_threads_and_after_pickling(pusht, expected):
    source = pickle.loads(pickle.dumps(open_pusht(to_images(pusht, row_group_size=50))))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda i: digest(source[i]), CLIPS * 4)) == expected * 4


def test_only_rows_that_a_clip_needs_are_decoded(pusht, monkeypatch):
    source = open_pusht(to_images(pusht, row_group_size=100))
    decoded, groups = [], []
    decode, read = images._decode, images._bytes
    monkeypatch.setattr(images, "_decode", lambda *a: decoded.append(a) or decode(*a))
    monkeypatch.setattr(images, "_bytes", lambda *a: groups.append(a[1]) or read(*a))
    assert len(source[71 + 10]["frames_VT"][0]) == 4  # episode 1 from frame 10: rows 90 to 99
    assert (len(decoded), groups) == (4, [0])


def test_pictures_are_scaled_one_by_one(pusht, monkeypatch):
    source = open_pusht(to_images(pusht))
    decoded, decode = [], images._decode
    monkeypatch.setattr(images, "_decode", lambda *a: decoded.append(a) or decode(*a))
    assert source.read(0, lambda image: len(decoded))["frames_VT"] == [[1, 2, 3, 4]]


def test_a_row_group_is_not_held_at_once(tmp_path):
    path = tmp_path / "table.parquet"
    pictures = [{"bytes": picture(8, 8) + bytes(200_000), "path": ""} for _ in range(200)]
    pages = {"data_page_size": 1 << 16, "write_batch_size": 16, "use_dictionary": False}
    pq.write_table(pa.table({"a.b": pictures}), path, compression="none", **pages)
    code = (
        "import sys, pyarrow as pa\nfrom pathlib import Path\n"
        "from wmjax.data.media.images import read_images\n"
        "read_images(Path(sys.argv[1]), 'a.b', [150, 199])\n"
        "print(pa.default_memory_pool().max_memory())"
    )
    out = subprocess.run([sys.executable, "-c", code, path], capture_output=True, check=True)
    assert path.stat().st_size > 40_000_000
    assert int(out.stdout) < 25_000_000


def test_jpeg_and_other_colours(tmp_path):
    """JPEG is read within its loss; grey and RGBA pictures are read as RGB."""
    truth = open_pusht()[7]["frames_VT"][0][2].to_ndarray(format="rgb24").astype(int)
    for codec, pix_fmt, bound in (
        ("mjpeg", "yuvj444p", 6),
        ("png", "rgba", 0),
        ("png", "gray", 80),
    ):
        root = shutil.copytree(PUSHT, tmp_path / f"{codec}-{pix_fmt}")
        image = open_pusht(to_images(root, codec, pix_fmt))[7]["frames_VT"][0][2]
        assert image.shape == (96, 96, 3)
        assert np.abs(image - truth).mean() <= bound
        assert (image == image[:, :, :1]).all() == (pix_fmt == "gray")


def picture(height, width):
    return encode(av.VideoFrame.from_ndarray(np.zeros((height, width, 3), np.uint8), "rgb24"))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda data: None, ["PNG", "JPEG"]),
        (lambda data: b"GIF89a", ["PNG", "JPEG"]),
        (lambda data: data[:400], []),
        (lambda data: data[:-100], []),
        (lambda data: picture(48, 96), ["48x96", "row 80", "96x96"]),
    ],
)
def test_a_picture_that_cannot_be_read_names_its_row(pusht, expected, change, names):
    to_images(pusht)

    def damage(pictures):
        pictures[83] |= {"bytes": change(pictures[83]["bytes"])}
        return pictures

    edit_column(pusht / TABLE, CAMERA, damage)
    source = open_pusht(pusht)
    with refused(TABLE, "row 83", CAMERA, "episode 1", *names, kind=ClipError, lines=2) as caught:
        source[71]
    assert ("PNG" in str(caught.value)) == ("PNG" in names)
    assert digest(source[0]) == expected[0]


def test_a_column_that_holds_no_pictures(pusht):
    edit_column(to_images(pusht) / TABLE, CAMERA, lambda v: [p["path"] for p in v])
    check_error([TABLE, CAMERA, "string", "bytes"], pusht)


# --- templates ---


ONE_FILE = ("episode_index=0", "episode_index=1")


@pytest.mark.parametrize(
    ("key", "path", "names"),
    [
        ("video_path", "videos/chunk-000/{video_key}/episode_000000.mp4", ONE_FILE),
        (
            "video_path",
            "videos/chunk-000/{video_key}/episode_{episode_index:06d}.mp4",
            [f"videos/chunk-000/{CAMERA}/episode_000002.mp4"],
        ),
        ("video_path", "video/{video_key}.mp4", [f"video/{CAMERA}.mp4"]),
        ("data_path", "data/chunk-000/episode_000000.parquet", ONE_FILE),
        (
            "data_path",
            "data/chunk-000/episode_{episode_index:06d}.parquet",
            ["data/chunk-000/episode_000002.parquet"],
        ),
    ],
)
def test_a_template_that_leads_to_the_first_episodes_only(tmp_path, expected, key, path, names):
    root = write_v2(tmp_path / "set", chunks_size=2)
    edit_info(root, **{key: path})
    check_reads(root, expected, ["meta/info.json", f"{key}={path!r}"])
    # If the standard template does not lead to every file either, nothing is certain.
    (*_, last) = sorted(root.rglob("*.mp4" if key == "video_path" else "*.parquet"))
    last.unlink()
    check_error(names, root)


def test_a_template_of_v30_without_the_number_of_the_file(pusht, expected):
    edit_info(pusht, video_path="videos/{video_key}/{file_index}.mp4")
    check_reads(pusht, expected, ["video_path='videos/{video_key}/{file_index}.mp4'"])


def test_a_template_without_the_camera(pusht, expected):
    """It is right for one camera. With two, each must read its own pixels."""
    edit_info(pusht, video_path=VIDEO)
    check_reads(pusht, expected)
    shutil.copytree(pusht / "videos" / CAMERA, pusht / "videos/observation.side")
    add_camera(pusht, "observation.side")
    source = open_pusht(pusht)
    paths = [place.path for place in source.episodes[0].videos.values()]
    assert [path.parts[-3] for path in paths] == [CAMERA, "observation.side"]
    (note,) = source.notes
    assert not missing_names(note, f"video_path={VIDEO!r}")


# --- cameras ---


def add_camera(root, name, columns=True):
    """Declare another camera, described as the first one is."""
    features = json.loads((root / "meta/info.json").read_text())["features"]
    edit_features(root, **{name: features[CAMERA]})
    if columns and (root / EPISODES).exists():
        table = pq.read_table(root / EPISODES)
        for column in [c for c in table.column_names if c.startswith(f"videos/{CAMERA}/")]:
            table = table.append_column(column.replace(CAMERA, name), table[column])
        pq.write_table(table, root / EPISODES)


@pytest.mark.parametrize("columns", [True, False])
def test_a_camera_that_is_declared_and_has_no_files(pusht, v21, expected, columns):
    for root in (pusht, v21):
        add_camera(root, "observation.wrist", columns)
        note = ["observation.wrist"]
        assert check_reads(root, expected, note).cameras == (CAMERA,)
        assert check_reads(root, expected, note, cameras="each").views == 1
        check_reads(root, expected, cameras="image")
        check_error(["observation.wrist"], root, cameras="wrist")


def test_a_camera_with_some_files_is_an_error(v21):
    add_camera(v21, "observation.wrist")
    folder = v21 / "videos/chunk-000"
    shutil.copytree(folder / CAMERA, folder / "observation.wrist")
    (folder / "observation.wrist/episode_000003.mp4").unlink()
    check_error(["observation.wrist/episode_000003.mp4"], v21)


def test_images_that_are_declared_and_have_no_column(pusht, expected):
    edit_features(pusht, side={"dtype": "image", "shape": [96, 96, 3]})
    check_reads(pusht, expected, ["side"])
    check_error([TABLE, "side"], pusht, cameras="side")


def test_in_the_hubs_cache_a_camera_without_files_may_not_be_downloaded(pusht, tmp_path):
    add_camera(pusht, "observation.wrist")
    snapshot = tmp_path / "datasets--a--b/snapshots/0123"
    snapshot.parent.mkdir(parents=True)
    pusht.rename(snapshot)
    check_error(["observation.wrist/chunk-000/file-000.mp4", "data.cameras"], snapshot)


@pytest.mark.parametrize("folder", ["image", "observation_image", "images.observation.image"])
def test_a_video_folder_of_another_name(pusht, v21, expected, folder):
    for root, parent in ((pusht, "videos"), (v21, "videos/chunk-000")):
        (root / parent / CAMERA).rename(root / parent / folder)
        note = [CAMERA, folder]
        check_reads(root, expected, note)
        check_reads(root, expected, note, cameras="image")


def test_a_video_folder_that_is_not_certain(v21):
    folder = v21 / "videos/chunk-000"
    (folder / CAMERA).rename(folder / "image")
    # Two cameras fit the folder.
    add_camera(v21, "other.image")
    check_error([f"{CAMERA}/episode_000000.mp4"], v21)
    shutil.copytree(folder / "image", folder / "other.image")
    assert open_pusht(v21).cameras == (CAMERA, "other.image")
    # Two folders fit the camera.
    shutil.copytree(folder / "image", folder / "observation_image")
    check_error([CAMERA, "image", "observation_image"], v21)
    # The folder lacks a file; or its name fits no camera.
    shutil.rmtree(folder / "observation_image")
    (folder / "image/episode_000004.mp4").unlink()
    check_error([f"{CAMERA}/episode_000000.mp4"], v21, cameras=CAMERA)
    shutil.rmtree(folder / "image")
    (folder / "other.image").rename(folder / "wrist")
    check_error([f"{CAMERA}/episode_000000.mp4"], v21)


# --- times and totals ---


@pytest.mark.parametrize(("off", "wrong"), [(0.0005, None), (0.02, 320), (0.1, "frame 79")])
def test_timestamps_that_drift(pusht, expected, off, wrong):
    """Within 1 % of a frame they are read; one frame an episode would repeat frames."""

    def earlier(times):
        return [time - off * (i > 0) * (i if off == 0.1 else 1) for i, time in enumerate(times)]

    edit_column(pusht / EPISODES, f"videos/{CAMERA}/from_timestamp", earlier)
    source = open_pusht(pusht)
    assert source.notes == []
    if wrong is None:
        assert [digest(source[i]) for i in CLIPS] == expected
    else:
        with refused(VIDEO, wrong, "400 rows", kind=ClipError):
            source[0]


def test_to_timestamp_is_not_read(pusht, expected):
    edit_column(pusht / EPISODES, f"videos/{CAMERA}/to_timestamp", lambda v: [t - 0.1 for t in v])
    check_reads(pusht, expected)
    edit_column(pusht / EPISODES, f"videos/{CAMERA}/to_timestamp", lambda v: None)
    check_reads(pusht, expected)


def test_splits_beyond_the_episodes(pusht, expected):
    edit_info(pusht, splits={"train": "0:9"})
    check_reads(pusht, expected, ["splits", "train", "0:9", 5, "data.val_share"])


@pytest.mark.parametrize(
    "said", [{"total_episodes": 6}, {"total_frames": 1}, {"total_episodes": 4, "total_frames": 320}]
)
def test_totals_that_are_off_while_the_tables_agree(pusht, v21, expected, said):
    for root in (pusht, v21):
        edit_info(root, **said, splits={})
        check_reads(root, expected, [*(f"{key}={value}" for key, value in said.items()), 5, 400])


def test_totals_and_tables_that_are_at_odds(pusht, v21):
    """An episode in the tables may be missing from the list in the metadata."""
    lines = (v21 / "meta/episodes.jsonl").read_text().splitlines()
    (v21 / "meta/episodes.jsonl").write_text("\n".join(lines[:4]))
    check_error(["meta/episodes.jsonl", 4, 3, 320, "total_episodes=5", 400], v21)
    pq.write_table(pq.read_table(pusht / EPISODES)[1:], pusht / EPISODES)
    edit_column(pusht / EPISODES, f"videos/{CAMERA}/from_timestamp", lambda v: [t - 8 for t in v])
    check_error([str(pusht / "meta/episodes"), 4, 1, 320, "total_frames=400"], pusht)


def test_notes_of_a_mixture_are_its_members(pusht):
    edit_info(pusht, total_frames=1)
    mixture = Mixture({"a": open_pusht(), "b": open_pusht(pusht)}, {"a": 1.0, "b": 1.0})
    (note,) = mixture.notes
    assert not missing_names(note, str(pusht), "total_frames=1")


def test_a_note_of_two_splits_is_shown_once(pusht):
    edit_info(pusht, total_frames=1)
    splits = {s: open_pusht(pusht, split=s, val_share=0.4) for s in ("train", "validation")}
    assert notes_of(splits) == splits["train"].notes == splits["validation"].notes


def test_one_episode_leaves_none_for_validation_and_says_what_to_do(pusht):
    edit_info(pusht, total_episodes=1, total_frames=80)
    pq.write_table(pq.read_table(pusht / EPISODES)[:1], pusht / EPISODES)
    pq.write_table(pq.read_table(pusht / TABLE)[:80], pusht / TABLE)
    assert len(open_pusht(pusht, val_share=0.05)) == 71
    names = ["data.val_share=0.05", "validation", 1, "--config.train.eval_every=0"]
    check_error(names, pusht, val_share=0.05, split="validation")


# --- recordings as people publish them: tests/data/recordings/README.md ---

RECORDINGS = Path(__file__).parent / "data/recordings"
TOP = "observation.images.top"
WIDTHS = {"observation.state": 2, "action": 2}


def number_of(frame):
    """Return the number that a picture of these recordings shows: 100 x episode + frame."""
    pixels = frame.to_ndarray(format="gray")
    bits = [
        pixels[16 * row + 4 : 16 * row + 12, 16 * column + 4 : 16 * column + 12].mean() > 125
        for row in range(2)
        for column in range(6)
    ]
    return sum(1 << i for i, bit in enumerate(bits) if bit)


def published(name, **changes):
    return LeRobotSource(RECORDINGS / name, **{"frames": 2, "fps": 30, **changes})


def check_pictures(source):
    """Check that the first clip of each episode shows its own pictures and holds its own states."""
    seen = {}
    for index in range(len(source)):
        if source._place(index)[2] == 0:
            clip = source[index]
            seen[clip["episode"]] = [number_of(frame) for frame in clip["frames_VT"][0]]
            assert clip["state_TS"].tolist() == [[clip["episode"], i] for i in range(2)]
    assert seen == {e.index: [100 * e.index, 100 * e.index + 1] for e in source.episodes}


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("no_frame_index", None),
        ("irrelevant_feature_shape_null", None),
        ("check_crash_shape_0", None),
        ("depth_in_video_info", None),
        ("v21_chunk_index_template", ["data_path", "video_path", "{chunk_index}"]),
        ("v3_place_float", None),
    ],
)
def test_published_recordings_are_read(name, names):
    source = published(name)
    assert source.cameras == (TOP,)
    check_pictures(source)
    assert len(source.notes) == (names is not None)
    assert not missing_names("".join(source.notes), *(names or []))


def write_table(path, **columns):
    pq.write_table(pa.table({"episode_index": [3, 3, 3, 5, 5], **columns}), path)
    table = Places([path], np.zeros(2, int), np.zeros(2), np.array([2]))
    episodes = Episodes(np.array([3, 5]), np.array([3, 2]), np.zeros(2, int), table, {})
    return read_tables(episodes, {}, fps=10, dropped=Dropped(skip=False))


def test_rows_without_frame_index_are_in_the_order_of_the_file(tmp_path):
    path = tmp_path / "t.parquet"
    assert write_table(path)[2].tolist() == [0, 0.1, 0.2, 0, 0.1]
    assert write_table(path, frame_index=[4, 5, 6, 0, 1])[2].tolist() == [0.4, 0.5, 0.6, 0, 0.1]
    with refused(str(path), "episode 3", "frame_index", 7, 6, "frame 2"):
        write_table(path, frame_index=[4, 5, 7, 0, 1])
    with refused(str(path), "episode 5", "frame_index", 1, 2, "frame 1"):
        write_table(path, frame_index=[4, 5, 6, 1, 1])


def test_timestamps_are_read_as_recorded(tmp_path):
    path = tmp_path / "t.parquet"
    times = [0.1, 0.2, 0.3, 7.0, 7.1]
    for kind in (np.float32, np.float64):
        found = write_table(path, timestamp=np.array(times, kind))[2]
        assert found.dtype == np.float64
        assert found.tolist() == np.array(times, kind).astype(np.float64).tolist()
    assert write_table(path, timestamp=[[t] for t in times])[2].tolist() == times
    for wrong in (float("nan"), float("inf"), None):
        with refused(str(path), "episode 5", "timestamp"):
            write_table(path, timestamp=[*times[:4], wrong])
    with refused(str(path), "timestamp", "string"):
        write_table(path, timestamp=["x"] * 5)


@pytest.mark.parametrize("shape", [None, ["2"], [2**40], [0], "2"])
def test_a_broken_shape_is_refused_where_it_is_asked_for(pusht, shape):
    wide = {"dtype": "float32", "shape": shape}
    edit_features(pusht, extra=wide, nothing=None, text={"dtype": 5})
    open_pusht(pusht)
    check_error(["eval.labels='extra'", "float32", str(shape)], pusht, labels="extra")
    check_error(["eval.labels='text'", 5, "None"], pusht, labels="text")
    edit_features(pusht, action=wide)
    check_error(["data.action='action'", "float32", str(shape)], pusht)


def test_a_camera_needs_no_shape_but_no_wrong_one(pusht, expected):
    for camera in ({}, {"shape": None}, {"shape": []}, {"info": "x"}):
        edit_features(pusht, **{CAMERA: {"dtype": "video", **camera}})
        check_reads(pusht, expected)
    for shape in (["96"], [0, 96, 3], "96"):
        edit_features(pusht, **{CAMERA: {"dtype": "video", "shape": shape}})
        check_error(["meta/info.json", "features", CAMERA, str(shape)], pusht)


@pytest.mark.parametrize("place", ["info", "video_info"])
@pytest.mark.parametrize("key", ["is_depth_map", "video.is_depth_map"])
def test_depth_is_marked_in_any_of_four_places(pusht, place, key):
    depth = {"dtype": "video", "shape": [96, 96, 1], "info": {"video.codec": "av1"}}
    edit_features(pusht, **{"observation.depth": {**depth, place: {key: True}}})
    source = open_pusht(pusht)
    assert source.cameras == (CAMERA,)
    assert not missing_names(source.describe(), "observation.depth")


def test_an_unknown_field_of_a_template(pusht, expected):
    edit_info(pusht, data_path="data/{episode_index}")
    check_reads(pusht, expected, ["data_path='data/{episode_index}'", "chunk_index"])
    (pusht / TABLE).unlink()
    check_error(["data_path='data/{episode_index}'", "{episode_index}", "chunk_index"], pusht)


PLACES = [f"videos/{CAMERA}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]


@pytest.mark.parametrize("column", ["data/chunk_index", *PLACES[:2]])
def test_places_that_are_no_whole_numbers(pusht, expected, column):
    edit_column(pusht / EPISODES, column, lambda v: [float(x) for x in v])
    check_reads(pusht, expected)
    edit_column(pusht / EPISODES, column, lambda v: [*v[:3], 0.5, 0.0])
    check_error([EPISODES, "episode 3", column, 0.5], pusht)


def test_an_episode_without_a_place_of_its_table(pusht):
    edit_column(pusht / EPISODES, "data/file_index", lambda v: [0, 0, None, 0, 0])
    check_error([EPISODES, "episode 2", "data/file_index=None"], pusht)


@pytest.fixture
def sparse(pusht):
    """Two cameras: the first did not record episodes 1 and 3, the second not 3 and 4."""
    shutil.copytree(pusht / "videos" / CAMERA, pusht / "videos/observation.side")
    add_camera(pusht, "observation.side")
    for camera, holes in ((CAMERA, (1, 3)), ("observation.side", (3, 4))):
        for name in ("chunk_index", "file_index"):
            edit_column(
                pusht / EPISODES,
                f"videos/{camera}/{name}",
                lambda v, holes=holes: [None if i in holes else x for i, x in enumerate(v)],
            )
        # What is left of the file holds the recorded episodes alone, one after the other.
        frames = iter(range(5))
        starts = [None if i in holes else 8.0 * next(frames) for i in range(5)]
        edit_column(
            pusht / EPISODES, f"videos/{camera}/from_timestamp", lambda v, starts=starts: starts
        )
    return pusht


def test_episodes_that_a_camera_did_not_record(sparse):
    source = open_pusht(sparse)
    (note,) = source.notes
    assert not missing_names(note, 5, f"2 have no {CAMERA}", "2 have no observation.side", 1)
    clips = {71 * i: [bool(f) for f in source[71 * i]["frames_VT"]] for i in range(4)}
    assert clips == {0: [True, True], 71: [False, True], 142: [True, True], 213: [True, False]}
    assert [source[i]["episode"] for i in clips] == [0, 1, 2, 4]
    assert [len(source.videos(i)) for i in clips] == [2, 1, 2, 1]
    assert len(source) == source.draws == 4 * 71
    clip, _ = reader_of(source).read(0, 71)
    assert clip["view_mask"].tolist() == [False, True]
    assert not clip["video"][0].any()
    assert clip["video"][1].any()
    # Statistics are of the episodes with clips.
    assert source.statistics()[0]["state"]["count"] == 320
    assert "shorter" not in source.describe()


def test_clips_of_each_camera_come_from_the_episodes_that_it_recorded(sparse):
    source = open_pusht(sparse, cameras="each")
    assert (source.views, len(source), source.draws) == (1, 6 * 71, 6 * 71)
    places = [source._place(71 * i) for i in range(6)]
    assert places == [
        *(((CAMERA,), episode, 0) for episode in (0, 2, 4)),
        *((("observation.side",), episode, 0) for episode in (0, 1, 2)),
    ]
    assert source[71]["episode"] == source.labels(0, 71)[0] == 2
    rng = np.random.default_rng(0)
    limited = open_pusht(sparse, cameras="each", clips_per_episode=2)
    drawn = [limited._place(limited.draw(i, rng))[:2] for i in range(limited.draws)]
    assert drawn == [place[:2] for place in places for _ in range(2)]
    assert len(open_pusht(sparse, cameras="image")) == 3 * 71
    with refused("data.frames=40", 118, 5, 80):
        open_pusht(sparse, cameras="each", frames=40)
    with refused(0, 1, CAMERA):
        open_pusht(sparse, cameras="image", episodes="1")


def test_a_camera_that_recorded_no_episode(pusht, expected):
    add_camera(pusht, "observation.side")
    edit_column(pusht / EPISODES, "videos/observation.side/chunk_index", lambda v: [None] * 5)
    check_reads(pusht, expected, ["observation.side"])
    check_error(["observation.side", 0, 5], pusht, cameras="side")


@pytest.mark.parametrize(
    "name", [VIDEO, TABLE, EPISODES, "meta/info.json", "v21/meta/episodes.jsonl"]
)
def test_pointers_of_git_lfs(pusht, name):
    root = write_v2(pusht / "v21") if name.startswith("v21") else pusht
    pointer = (RECORDINGS / "lfs_pointers/data/chunk-000/file-000.parquet").read_bytes()
    (pusht / name).write_bytes(pointer)
    with refused(str(pusht / name), "git lfs pull"):
        pointers.check(pusht / name) if name == VIDEO else open_pusht(root)
    for other in (PUSHT / VIDEO, pusht / "missing"):
        pointers.check(other)


def test_a_folder_of_a_similar_name_is_named(v21):
    (v21 / "videos").rename(v21 / "video")
    check_error(["videos/chunk-000", "video"], v21)
    (v21 / "video").rename(v21 / "pictures")
    with refused("videos/chunk-000") as caught:
        open_pusht(v21)
    assert "mean" not in str(caught.value)


# --- which episodes ---


@pytest.mark.parametrize(
    ("text", "positions"),
    [
        ("", [0, 1, 2, 3, 4, 5]),
        ("3", [1]),
        ("-1", [5]),
        ("-6, 2", [0]),
        ("3:10", [1, 2, 3]),
        (":4,10:", [0, 1, 4, 5]),
        ("::2", [0, 2, 4]),
        ("4:-1:2", [2, 4]),
        ("-2:", [4, 5]),
        ("-99:3", [0]),
        ("9:99, 5, 5", [2, 3, 4, 5]),
    ],
)
def test_numbers_and_slices_name_episodes(text, positions):
    """The recorded numbers have gaps."""
    assert pick_episodes(text, [2, 3, 5, 9, 10, 12]) == positions


@pytest.mark.parametrize(
    "item", ["4", "-7", "13", "6:9", "5:5", "99:", "a", "1.5", "::0", "::-1", "1:2:3:4", "1-3"]
)
def test_items_that_name_no_episode(item):
    with refused("data.episodes", repr(item), 2, 12, 6):
        pick_episodes(f"3,{item}", [2, 3, 5, 9, 10, 12])


def test_only_the_chosen_episodes_are_read_and_split(v21, expected):
    for path in sorted(v21.glob("data/*/*.parquet"))[1:3]:
        path.write_bytes(b"damaged")
    source = open_pusht(v21, episodes="0,-2:")
    assert [episode.index for episode in source.episodes] == [0, 3, 4]
    assert digest(source[0]) == expected[0]
    assert digest(source[3 * 71 - 1]) == expected[-1]
    splits = [
        open_pusht(v21, episodes="0,-2:", val_share=0.4, split=s) for s in ("train", "validation")
    ]
    assert [[e.index for e in split.episodes] for split in splits] == [[0, 4], [3]]
    check_error(["data.episodes", "'5'", 0, 4, str(v21)], v21, episodes="5")


def test_recorded_numbers_choose_not_places(pusht):
    """Of episodes 1, 2, 3 and 4, number 1 is the first."""
    pq.write_table(pq.read_table(pusht / EPISODES)[1:], pusht / EPISODES)
    edit_column(pusht / EPISODES, PLACES[2], lambda v: [t - 8 for t in v])
    edit_info(pusht, total_episodes=4, total_frames=320)
    assert [e.index for e in open_pusht(pusht, episodes="1,3:").episodes] == [1, 3, 4]


# --- links ---


@pytest.mark.parametrize("name", ["videos", "meta", "data", TABLE, VIDEO, "meta/info.json"])
def test_links_out_of_the_folder_where_they_are_allowed(pusht, tmp_path, expected, name):
    (pusht / name).rename(tmp_path / "elsewhere")
    (pusht / name).symlink_to(tmp_path / "elsewhere")
    check_error(["data.follow_links=True", str(tmp_path / "elsewhere")], pusht)
    check_reads(pusht, expected, follow_links=True)


def test_the_tools_follow_links_where_they_are_allowed(pusht, tmp_path, expected):
    (pusht / "videos").rename(tmp_path / "elsewhere")
    (pusht / "videos").symlink_to(tmp_path / "elsewhere")
    for command in (["check"], ["stats"], ["transcode", "--size=96", "--workers=1"]):
        out = [str(tmp_path / "out")] * (command[0] == "transcode")
        arguments = [command[0], str(pusht), *out, *command[1:]]
        assert tools.run([*arguments, "--follow-links"]) == 0
    assert (tmp_path / "out" / VIDEO).is_file()
    assert open_pusht(tmp_path / "out").notes == []
    assert tools.run(["check", str(pusht)]) == 2
    with refused("data.follow_links=True", str(tmp_path / "elsewhere")):
        tools.run(["transcode", str(pusht), str(tmp_path / "other")])


def test_a_link_to_a_folder_above_is_walked_once(pusht):
    (pusht / "videos/again").symlink_to(pusht)
    edit_info(pusht, total_frames=1)
    assert len(open_pusht(pusht).notes) == 1
    assert len([*Folder(pusht).walk()]) == len([p for p in pusht.rglob("*") if p.is_file()])


@pytest.mark.parametrize("path", ["../other/{file_index}", "/etc/passwd"])
def test_templates_lead_nowhere_else_even_with_links(pusht, path):
    edit_info(pusht, data_path=path)
    with refused("data_path", repr(path)) as caught:
        open_pusht(pusht, follow_links=True)
    assert "data.follow_links" not in str(caught.value)


def test_paths_are_resolved_as_by_the_system(tmp_path):
    root = tmp_path.resolve() / "set"
    (root / "a/b").mkdir(parents=True)
    (root / "a/b/file").touch()
    (root / "link").symlink_to("a/b")
    (root / "file").symlink_to("link/file")
    for path in ("file", "link/file", "a/../link/file", "a/b/../b/file"):
        assert Folder(root).resolve(root / path) == root / "a/b/file"
    for path in ("..", "a/../..", "../other", "link/../../../x"):
        with refused(str(tmp_path)):
            Folder(root).resolve(root / path)


def test_many_files_are_found_with_few_calls(tmp_path, monkeypatch):
    root = write_v2(tmp_path.resolve() / "set")
    folder = Folder(root)
    fields = [{"episode_chunk": 0, "episode_index": i, "total_episodes": 300} for i in range(300)]
    for i in range(300):
        (root / f"data/chunk-000/episode_{i:06d}.parquet").touch()
    calls = []
    real = os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda *a, **k: calls.append(a) or real(*a, **k))
    assert len(set(find(folder, read_info(folder), "data", fields, []))) == 300
    assert len(calls) < 10
