"""`wmjax.data transcode`: every frame, window and number of the dataset is kept."""

import json
import shutil
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from recordings import (
    EPISODES,
    TABLE,
    VIDEO,
    edit_column,
    edit_features,
    edit_video,
    missing_names,
    refused,
    to_images,
    write_v2,
)
from shared_data import PUSHT, SHARED, needs_shared

from wmjax.data.__main__ import run
from wmjax.data.lerobot.native import LeRobotSource
from wmjax.data.media.transforms import FULL_BOX, crop_and_scale
from wmjax.data.reader import Reader
from wmjax.data.tools import transcode as module
from wmjax.data.tools.check import check
from wmjax.data.tools.transcode import scaled
from wmjax.masking import Masks

SMALL = ("--size=48", "--workers=1")


def frames_of(path, height, width):
    """Return the times of all frames, and their pixels at this size."""
    with av.open(str(path)) as file:
        frames = list(file.decode(video=0))
    times = [frame.pts * frame.time_base for frame in frames]
    return times, crop_and_scale(frames, FULL_BOX, height, width)


def worst_psnr(a_THWC, b_THWC):
    error = (a_THWC.astype(np.float64) - b_THWC) ** 2
    return float(10 * np.log10(255**2 / error.mean((1, 2, 3)).max()))


def contents(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def check_same_clips(a, b, **settings):
    a, b = (LeRobotSource(root, **settings) for root in (a, b))
    assert (len(a), a.stride, a.cameras) == (len(b), b.stride, b.cameras)
    assert [(e.index, e.length) for e in a.episodes] == [(e.index, e.length) for e in b.episodes]
    for i in np.linspace(0, len(a) - 1, 7).astype(int):
        one, two = a[i], b[i]
        for key in ("episode", "start"):
            assert one[key] == two[key]
        for key in ("state_TS", "action_TPA"):
            np.testing.assert_array_equal(one[key], two[key])


def write(kind, tmp_path):
    return PUSHT if kind == "v3.0" else write_v2(tmp_path / "source", kind)


@pytest.mark.parametrize("version", ["v3.0", "v2.1", "v2.0"])
def test_every_frame_is_where_it_was(tmp_path, version):
    root, out = write(version, tmp_path), tmp_path / "out"
    assert run(["transcode", str(root), str(out), *SMALL]) == 0
    videos = sorted(path.relative_to(root) for path in root.rglob("*.mp4"))
    assert sorted(path.relative_to(out) for path in out.rglob("*.mp4")) == videos
    assert len(videos) == (1 if version == "v3.0" else 5)
    for video in videos:
        (times, before), (found, after) = (frames_of(r / video, 48, 48) for r in (root, out))
        assert found == times
        right, one_off = worst_psnr(before, after), worst_psnr(before[1:], after[:-1])
        assert right > 36
        assert one_off < right - 3
        with av.open(str(out / video)) as file:
            keys = [packet.is_keyframe for packet in file.demux(video=0) if packet.size]
            assert keys == [i % 2 == 0 for i in range(len(times))]
    check_same_clips(root, out, frames=4, fps=4)
    others = {name: text for name, text in contents(root).items() if name.suffix != ".mp4"}
    written = contents(out)
    del others[Path("meta/info.json")], written[Path("meta/transcode.json")]
    assert {name: written[name] for name in others} == others
    assert set(written) == {*others, *videos, Path("meta/info.json")}


def test_the_metadata_tells_what_the_videos_are(tmp_path):
    run(["transcode", str(PUSHT), str(tmp_path / "out"), *SMALL, "--gop=5"])
    before, after = (
        json.loads((r / "meta/info.json").read_text()) for r in (PUSHT, tmp_path / "out")
    )
    old, new = (info["features"].pop("observation.image") for info in (before, after))
    assert before == after
    assert new["shape"] == [48, 48, 3]
    assert new["names"] == old["names"]
    changed = {key: value for key, value in new["info"].items() if old["info"][key] != value}
    assert changed == {
        "video.height": 48,
        "video.width": 48,
        "video.codec": "h264",
        "video.g": 5,
        "video.crf": 20,
        "video.preset": "medium",
        "video.extra_options": {"tune": "fastdecode", "bf": 0},
    }
    with av.open(str(tmp_path / "out" / VIDEO)) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.width) == ("h264", "yuv420p", 48)


def test_shapes_with_channels_first_stay_so(tmp_path):
    root = shutil.copytree(PUSHT, tmp_path / "source")
    camera = {"dtype": "video", "shape": [3, 96, 96], "names": ["channels", "height", "width"]}
    edit_features(root, **{"observation.image": camera})
    run(["transcode", str(root), str(tmp_path / "out"), *SMALL])
    info = json.loads((tmp_path / "out/meta/info.json").read_text())
    assert info["features"]["observation.image"]["shape"] == [3, 48, 48]
    assert check(tmp_path / "out")[0] == []


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ((480, 640, 256), (256, 342)),
        ((640, 480, 256), (342, 256)),
        ((96, 96, 256), (96, 96)),
        ((97, 131, 256), (96, 130)),
        ((720, 1280, 255), (256, 454)),
    ],
)
def test_sizes_are_even_keep_their_aspect_and_are_never_enlarged(found, wanted):
    assert scaled(*found) == wanted


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "tags", "kept"),
    [
        ("libx264", "yuv420p", (1, 1), (1, 1)),  # BT.709, limited range
        ("libx264", "yuv420p", (1, 2), (1, 2)),  # full range, by its tag alone
        ("libx264", "yuvj420p", (2, 2), None),
        ("libx264", "yuv444p", (2, 0), None),
        ("libx264rgb", "rgb24", (0, 2), None),
    ],
)
def test_colours_are_kept(tmp_path, codec, pix_fmt, tags, kept):
    root = shutil.copytree(PUSHT, tmp_path / "source")
    with av.open(str(PUSHT / VIDEO)) as old, av.open(str(root / VIDEO), "w") as new:
        stream = new.add_stream(codec, rate=10, options={"crf": "10"})
        stream.width = stream.height = 96
        stream.pix_fmt, stream.thread_type = pix_fmt, "NONE"
        stream.codec_context.colorspace, stream.codec_context.color_range = tags
        for frame in old.decode(video=0):
            frame = frame.reformat(format=pix_fmt)
            frame.pict_type = av.video.frame.PictureType.NONE
            new.mux(stream.encode(frame))
        new.mux(stream.encode(None))
    run(["transcode", str(root), str(tmp_path / "out"), *SMALL])
    (times, before), (found, after) = (
        frames_of(r / VIDEO, 48, 48) for r in (root, tmp_path / "out")
    )
    assert found == times
    assert worst_psnr(before, after) > 35
    with av.open(str(tmp_path / "out" / VIDEO)) as file:
        frame = next(file.decode(video=0))
    assert kept in (None, (frame.colorspace, frame.color_range))


def test_killed_half_way_and_resumed_is_the_same_as_unbroken(tmp_path):
    root = write_v2(tmp_path / "source")
    run(["transcode", str(root), str(tmp_path / "whole"), *SMALL])
    out = tmp_path / "out"
    # A pause before each rename leaves time to kill the process half-way.
    slow = (
        "import time\nfrom wmjax.data.tools import transcode\nfrom wmjax.data.__main__ import run\n"
        "encode = transcode._encode\n"
        "def slowly(job, part):\n    encode(job, part)\n    time.sleep(1)\n"
        "transcode._encode = slowly\n"
        f"run(['transcode', {str(root)!r}, {str(out)!r}, *{SMALL!r}])"
    )
    child = subprocess.Popen([sys.executable, "-c", slow], stderr=subprocess.DEVNULL)
    try:
        while not (list(out.rglob("*.mp4")) and list(out.rglob("*.mp4.*.part"))):
            assert child.poll() is None
            time.sleep(0.02)
    finally:
        child.kill()
        child.wait()
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    assert 0 < len(kept) < 5
    with refused(f"data.root='{out}'", "meta/info.json"):  # half a copy is no dataset
        LeRobotSource(out, frames=4, fps=4)
    run(["transcode", str(root), str(out), "--size=48", "--workers=2"])
    assert contents(out) == contents(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_finished_one_is_left_as_it_is(tmp_path, monkeypatch):
    command = ["transcode", str(PUSHT), str(tmp_path / "out"), *SMALL]
    run(command)
    before = contents(tmp_path / "out")
    monkeypatch.setattr(module, "_encode", None)
    run(command)
    assert contents(tmp_path / "out") == before


@needs_shared
def test_cameras_that_are_not_named_are_left_out_everywhere(tmp_path):
    root, out = SHARED / "aloha_sim_twocam_v3", tmp_path / "out"
    run(["transcode", str(root), str(out), "--size=32", "--workers=1", "--cameras=left_wrist"])
    assert [path.parent.parent.name for path in out.rglob("*.mp4")] == [
        "observation.images.left_wrist"
    ]
    for path in (out / "meta").rglob("*"):
        text = pq.read_schema(path).names if path.suffix == ".parquet" else None
        if path.is_file():
            assert "observation.images.top" not in str(text or path.read_bytes())
    check_same_clips_of_one(root, out)


def check_same_clips_of_one(root, out):
    one = LeRobotSource(root, frames=2, fps=4, cameras="left_wrist")
    two = LeRobotSource(out, frames=2, fps=4)
    assert one.cameras == two.cameras
    np.testing.assert_array_equal(one[9]["state_TS"], two[9]["state_TS"])


@pytest.mark.parametrize(
    ("out", "flags", "names"),
    [
        ("source/out", (), ["{tmp}/source/out", "{tmp}/source"]),
        ("source", (), ["{tmp}/source"]),
        (".", (), ["{tmp}", "{tmp}/source"]),
        ("pusht", (), ["{tmp}/pusht"]),
        ("file", (), ["{tmp}/file"]),
        ("file/out", (), ["{tmp}/file/out", "Not a directory"]),
        ("out", ("--size=0",), ["--size=0", 16, 8192]),
        ("out", ("--gop=0",), ["--gop=0", 1, 1000]),
        ("out", ("--crf=52",), ["--crf=52", 0, 51]),
        ("out", ("--workers=0",), ["--workers=0", 1, 1024]),
        ("out", ("--cameras=front",), ["--cameras='front'", "observation.image"]),
    ],
)
def test_what_is_refused_leaves_nothing_behind(tmp_path, out, flags, names):
    root = shutil.copytree(PUSHT, tmp_path / "source")
    shutil.copytree(PUSHT, tmp_path / "pusht")
    (tmp_path / "file").write_text("")
    before = contents(tmp_path)
    with refused(*(n.format(tmp=tmp_path) if isinstance(n, str) else n for n in names)):
        run(["transcode", str(root), str(tmp_path / out), *flags])
    assert contents(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_one_begun_otherwise_is_refused(tmp_path):
    root, out = shutil.copytree(PUSHT, tmp_path / "source"), tmp_path / "out"
    run(["transcode", str(root), str(out), *SMALL])
    with refused(str(out), "--size=48", "--size=64"):
        run(["transcode", str(root), str(out), "--size=64"])
    edit_column(root / TABLE, "action", lambda rows: [[0.0, 0.0]] * len(rows))
    with refused(str(out), str(root)):
        run(["transcode", str(root), str(out), *SMALL])


def test_images_in_tables_are_said_not_to_be_transcoded(tmp_path):
    root = to_images(shutil.copytree(PUSHT, tmp_path / "source"))
    with refused(str(root), "observation.image", "--cameras"):
        run(["transcode", str(root), str(tmp_path / "out")])


def test_a_bad_video_is_named_and_the_others_are_kept(tmp_path):
    root = write_v2(tmp_path / "source")
    bad, short = (root / f"videos/chunk-000/observation.image/episode_00000{i}.mp4" for i in (1, 2))
    whole = bad.read_bytes()
    bad.write_bytes(whole[:3000])
    edit_video(short, 50)
    with refused("episode_000001.mp4", 1, "3 of 5"):
        run(["transcode", str(root), str(tmp_path / "out"), *SMALL])
    assert len(list((tmp_path / "out").rglob("*.mp4"))) == 3
    assert not list((tmp_path / "out").rglob("*.part"))
    assert not (tmp_path / "out/meta/info.json").exists()


def test_a_disk_that_takes_no_more_is_an_error_line(tmp_path):
    limited = (
        "import resource, runpy, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        f"sys.argv = ['x', 'transcode', {str(PUSHT)!r}, {str(tmp_path / 'out')!r}, *{SMALL!r}]\n"
        "runpy.run_module('wmjax.data', run_name='__main__')"
    )
    child = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True)
    assert child.returncode == 2
    assert not missing_names(child.stderr, "error", str(tmp_path / "out" / VIDEO), "File too large")
    assert "Traceback" not in child.stderr
    assert not list((tmp_path / "out").rglob("*.mp4*"))


def test_episodes_of_one_file_stay_in_one_file(tmp_path):
    run(["transcode", str(PUSHT), str(tmp_path / "out"), *SMALL])
    before, after = (pq.read_table(root / EPISODES) for root in (PUSHT, tmp_path / "out"))
    assert before.equals(after)


@pytest.mark.parametrize("start", [0, 7])
def test_b_frames_and_a_late_start(tmp_path, start):
    root = shutil.copytree(PUSHT, tmp_path / "source")
    with av.open(str(PUSHT / VIDEO)) as old, av.open(str(root / VIDEO), "w") as new:
        rate = Fraction(10)
        stream = new.add_stream("libx264", rate=rate, options={"bf": "3", "g": "50"})
        stream.width = stream.height = 96
        stream.pix_fmt, stream.thread_type = "yuv420p", "NONE"
        for number, frame in enumerate(old.decode(video=0)):
            frame.pict_type = av.video.frame.PictureType.NONE
            frame.pts, frame.time_base = start + number, 1 / rate
            new.mux(stream.encode(frame))
        new.mux(stream.encode(None))
    run(["transcode", str(root), str(tmp_path / "out"), *SMALL])
    (times, before), (found, after) = (
        frames_of(r / VIDEO, 48, 48) for r in (root, tmp_path / "out")
    )
    assert found == times
    assert worst_psnr(before, after) > 35


@needs_shared
@pytest.mark.campaign
def test_a_transcoded_dataset_is_read_several_times_as_fast(tmp_path):
    """Clips a second a core (CPU time): 16 frames at 4 fps and 256 px, as in training."""
    root = SHARED / "g1_subset_v30"
    run(["transcode", str(root), str(tmp_path / "out")])
    masks = Masks({"m": {"strategy": "random", "context": 0.5, "target": 0.25}}, (8, 16, 16))
    rates = []
    for folder in (root, tmp_path / "out"):
        source = LeRobotSource(folder, frames=16, fps=4)
        reader = Reader(source, masks, height=256, width=256, seed=0)
        numbers = np.random.default_rng(0).permutation(len(source))[:60].tolist()
        start = time.process_time()
        for position, number in enumerate(numbers):
            reader.read(position, number)
        rates.append(len(numbers) / (time.process_time() - start))
    print(f"\nclips/s a core: {rates[0]:.1f} as recorded, {rates[1]:.1f} transcoded")
    assert rates[1] > 3 * rates[0]
