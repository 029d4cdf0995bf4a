"""Every frame of every kind of video, in any order, is the one that sequential decoding gives."""

import types
from fractions import Fraction

import av
import numpy as np
import pytest
from test_published import CASES, number_of

from wmjax.data.media import video
from wmjax.data.media.video import VideoFiles, WrongTimes
from wmjax.errors import UserError

QUIET = "log-level=none"
KINDS = [
    # (encoder, containers, options that may be drawn)
    ("libx264", ("mp4", "frag", "noedit", "mkv"), [{"bf": "0"}, {"bf": "3"}]),
    ("libx264", ("mp4", "frag", "noedit", "mkv"), [{"bf": "3", "x264-params": "open-gop=1"}]),
    ("libx264", ("mp4", "frag", "mkv"), [{"x264-params": "intra-refresh=1:bframes=0"},
                                        {"x264-params": "intra-refresh=1:bframes=2"}]),
    ("libx265", ("mp4", "frag", "noedit", "mkv"), [{"x265-params": f"bframes=3:{QUIET}"},
                                                   {"x265-params": f"open-gop=0:{QUIET}"}]),
    ("mpeg4", ("mp4", "mkv"), [{"bf": "0"}, {"bf": "2"}]),
    ("mpeg2video", ("mkv",), [{"bf": "0"}, {"bf": "2"}]),
    ("libvpx-vp9", ("webm", "mkv", "mp4"), [{"deadline": "realtime", "cpu-used": "8"}]),
    ("libvpx", ("webm", "mkv"), [{"deadline": "realtime", "cpu-used": "8"}]),
    ("libsvtav1", ("mp4", "mkv"), [{"preset": "12"},
                                   {"preset": "12", "svtav1-params": "irefresh-type=1"}]),
]  # fmt: skip
CONTAINERS = {
    "mp4": ("mp4", {}),
    "frag": ("mp4", {"movflags": "frag_keyframe+empty_moov"}),
    "noedit": ("mp4", {"use_editlist": "0"}),
    "mkv": ("matroska", {}),
    "webm": ("webm", {}),
}
RATES = [10, 24, Fraction(30000, 1001), 30, 50]


def write_numbered(path, encoder, container, options, gop, rate, start, count):
    """Encode pictures that show their number in 12 bits, on ground that moves."""
    ground = np.random.default_rng(0).integers(0, 100, (96, 128, 3), np.uint8)
    form, settings = CONTAINERS[container]
    with av.open(str(path), "w", format=form, options=settings) as file:
        options = {"g": str(gop), **options}
        for key in ("x264-params", "x265-params"):  # their own parameters override g
            if key in options:
                options[key] = f"keyint={gop}:{options[key]}"
        stream = file.add_stream(encoder, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for number in range(count):
            image = np.roll(ground, number, 1)
            for bit in range(12):
                row, column = divmod(bit, 6)
                block = np.s_[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
                image[block] = 255 * (number >> bit & 1)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = start + number, 1 / Fraction(rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def check_order(path, order_rng, numbers=None):
    """Read all frames in a random order; return how many were compared, all equal."""
    with av.open(str(path)) as file:
        decoded = {f.pts: f.to_ndarray(format="rgb24") for f in file.decode(video=0)}
    videos = VideoFiles()
    times = videos.timeline(path).pts_N.tolist()
    assert times == list(decoded)
    for at in order_rng.permutation(len(times)).tolist():
        (frame,) = videos.read(path, [times[at]])
        assert frame.pts == times[at]
        assert np.array_equal(frame.to_ndarray(format="rgb24"), decoded[frame.pts]), at
        assert numbers is None or number_of(frame) == numbers[at]
    return len(times)


def check_draw(folder, seed):
    rng = np.random.default_rng(seed)
    encoder, containers, options = KINDS[seed % len(KINDS)]
    if encoder not in av.codecs_available:
        pytest.skip(f"PyAV is built without {encoder}")
    draw = {
        "container": containers[rng.integers(len(containers))],
        "options": options[rng.integers(len(options))],
        "gop": int(rng.choice([2, 5, 12, 30])),
        "rate": RATES[rng.integers(len(RATES))],
        "start": int(rng.choice([0, 0, 7])),
        "count": int(rng.integers(20, 70)),
    }
    path = folder / f"{seed}.video"
    write_numbered(path, encoder, **draw)
    compared = check_order(path, rng, range(draw["count"]))
    assert compared == draw["count"], (encoder, draw)
    return compared


# 120: the second key frame is decoded when the first frame is shown.
@pytest.mark.parametrize("seed", [*range(len(KINDS)), 120])
def test_any_frame_of_any_kind_of_video(tmp_path, seed):
    check_draw(tmp_path, seed)


@pytest.mark.campaign
def test_many_draws(tmp_path):
    compared = [check_draw(tmp_path, seed) for seed in range(len(KINDS), 200)]
    print(f"\n{len(compared)} draws, {sum(compared)} pictures compared, 0 wrong")


@pytest.mark.parametrize("path", sorted(CASES.rglob("*.m[pk][4v]")), ids=lambda p: p.parts[-5])
def test_any_frame_of_the_published(path):
    if "lfs_pointers" not in path.parts:
        check_order(path, np.random.default_rng(0))


def test_a_lost_frame_is_not_sought_from_every_key_frame(tmp_path, monkeypatch):
    path = tmp_path / "lost.mp4"
    write_numbered(path, "libx264", "mp4", {"bf": "0"}, 2, 30, 0, 400)
    videos = VideoFiles()
    (lost,) = videos.timeline(path, proven=True).pts_N[[380]] + 1
    seeks = []
    seek = video._Video._seek
    monkeypatch.setattr(video._Video, "_seek", lambda *a: seeks.append(a[1]) or seek(*a))
    with pytest.raises(UserError):
        videos.read(path, [int(lost)])
    assert len(seeks) < 15  # of 200 key frames


def test_an_index_that_lies_is_found_out(tmp_path):
    """Its decoding times are even, but a frame is shown late: only its packets say so."""
    path, late = tmp_path / "even.mp4", tmp_path / "late.mp4"
    write_numbered(path, "libx264", "mp4", {"bf": "0"}, 5, 30, 0, 20)
    with av.open(str(path)) as old, av.open(str(late), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0], opaque=True)
        for number, packet in enumerate(p for p in old.demux(video=0) if p.size):
            packet.pts += 100 * (number == 7)
            packet.stream = stream
            new.mux(packet)
    videos = VideoFiles()
    assert not videos.timeline(late).proven
    times = videos.timeline(late).pts_N.tolist()
    with pytest.raises(WrongTimes):
        videos.read(late, times)
    proven = videos.timeline(late, proven=True).pts_N.tolist()
    assert [n for n, pair in enumerate(zip(times, proven, strict=True)) if len({*pair}) > 1] == [7]
    assert [number_of(frame) for frame in videos.read(late, proven)] == [*range(20)]


def test_a_tick_lasts_what_the_file_says_and_a_second_where_it_does_not():
    def ticks(*pair):
        base = types.SimpleNamespace(numerator=pair[0], denominator=pair[1]) if pair else None
        return video.seconds_a_tick(types.SimpleNamespace(time_base=base))

    assert (ticks(1, 12800), ticks(0, 1), ticks()) == (Fraction(1, 12800), 1, 1)
    with pytest.raises(ZeroDivisionError):
        ticks(1, 0)
