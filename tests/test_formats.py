"""Every format of a LeRobot dataset, and metadata that is a little wrong.

Each variant is a copy of the recording in tests/data and must read as it does: pixels, states,
actions.
"""

import json
import pickle
import shutil
import subprocess
import sys
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
    encode,
    missing_names,
    open_pusht,
    refused,
    to_images,
    write_v2,
)
from shared_data import PUSHT

from wmjax.data.media import images
from wmjax.data.mixture import Mixture
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
    paths = [path for path, _ in source.episodes[0].videos.values()]
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


def test_timestamps_that_drift(pusht, expected):
    """Each start is a frame earlier than the last one should make it, as summed durations drift."""
    shift = [0.0, 0.1, 0.2, 0.3, 0.4]

    def earlier(times):
        return [time - off for time, off in zip(times, shift, strict=True)]

    edit_column(pusht / EPISODES, f"videos/{CAMERA}/from_timestamp", earlier)
    source = open_pusht(pusht)
    assert not missing_names(source.notes[0], VIDEO, f"videos/{CAMERA}/from_timestamp", "4.00")
    assert [digest(source[i]) for i in CLIPS] == expected
    edit_video(pusht / VIDEO, 399)
    check_error([VIDEO, "episode 1", "frame 79.00", 80], pusht)


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
