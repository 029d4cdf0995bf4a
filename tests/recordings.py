"""The small recording in tests/data: read it, damage it, write it in other formats."""

import hashlib
import json
import re
import shutil
from contextlib import contextmanager
from fractions import Fraction

import av
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shared_data import PUSHT

from wmjax.data.lerobot.native import LeRobotSource
from wmjax.data.media.transforms import FULL_BOX, crop_and_scale, frame_size
from wmjax.data.reader import Reader
from wmjax.errors import UserError
from wmjax.masking import Masks

VIDEO = "videos/observation.image/chunk-000/file-000.mp4"
TABLE = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"


def missing_names(text, *names):
    """Return the names that are not in the text as a whole word, path, key=value or number."""

    def pattern(name):
        if not isinstance(name, str):
            return rf"(?<![\w.-]){re.escape(str(name))}(?!\w|\.\d)"
        return rf"(?<!\w){re.escape(name)}(?!\w)"

    return [name for name in names if not re.search(pattern(name), text)]


@contextmanager
def refused(*names, kind=UserError, lines=None):
    """Expect an error that has all these names; lines: how many lines; None: one to three."""
    with pytest.raises(kind) as caught:
        yield caught
    text = str(caught.value)
    assert not missing_names(text, *names), text
    count = len(text.splitlines())
    assert count == lines if lines else 1 <= count <= 3, text


def open_pusht(root=PUSHT, **changes):
    return LeRobotSource(root, **{"frames": 4, "fps": 4, **changes})


def reader_of(source, **settings):
    masks = Masks({"m": {"strategy": "random", "context": 0.5, "target": 0.25}}, (2, 4, 4))
    return Reader(source, masks, height=32, width=48, seed=0, crop_scale=(0.3, 1.0), **settings)


def digest(clip):
    """Return one hash of a clip's pixels, states and actions."""
    sha = hashlib.sha256()
    for frames in clip["frames_VT"]:
        sha.update(crop_and_scale(frames, FULL_BOX, *frame_size(frames[0])).tobytes())
    sha.update(clip["state_TS"].tobytes() + clip["action_TPA"].tobytes())
    return sha.hexdigest()


def edit_info(root, **changes):
    path = root / "meta/info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_features(root, **changes):
    features = json.loads((root / "meta/info.json").read_text())["features"]
    edit_info(root, features={**features, **changes})


def edit_column(path, name, change):
    """Replace a column by change(list of its values), or drop it where that is None."""
    table = pq.read_table(path)
    at = table.column_names.index(name)
    values = change(table[name].to_pylist())
    table = table.remove_column(at)
    pq.write_table(table if values is None else table.add_column(at, name, pa.array(values)), path)


def edit_video(path, keep):
    """Write the first `keep` packets to the same path, undecoded, with the index at the end."""
    shorter = path.with_name("shorter.mp4")
    copy_packets(path, shorter, 0, keep)
    shorter.replace(path)


def copy_packets(source, target, first, end):
    """Write packets first to end - 1, undecoded, to a file that starts at time 0."""
    with av.open(source) as old, av.open(target, "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0], opaque=True)
        packets = [packet for packet in old.demux(video=0) if packet.size][first:end]
        start = packets[0].pts
        for packet in packets:
            packet.pts, packet.dts = packet.pts - start, packet.dts - start
            packet.stream = stream
            new.mux(packet)


def playlist(kind, video):
    """Return a script that FFmpeg's demuxer of this kind reads another file by."""
    return {
        "ffconcat": f"ffconcat version 1.0\nfile '{video.name}'\n",
        "m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{video}\n#EXT-X-ENDLIST\n",
        "mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT8S" profiles="urn:mpeg:dash:profile:isoff-main:2011">'
        '<Period><AdaptationSet mimeType="video/mp4"><Representation id="0" bandwidth="1">'
        f"<BaseURL>{video.name}</BaseURL></Representation></AdaptationSet></Period></MPD>",
    }[kind]


V2_DATA = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
V2_VIDEO = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"


def write_v2(root, version="v2.1", chunks_size=1000, data_path=V2_DATA, video_path=V2_VIDEO):
    """Write the recording in v2: one table and one video an episode."""
    (root / "meta").mkdir(parents=True)
    info = json.loads((PUSHT / "meta/info.json").read_text())
    info |= {
        "codebase_version": version,
        "chunks_size": chunks_size,
        "data_path": data_path,
        "video_path": video_path,
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    lines = [json.dumps({"episode_index": i, "tasks": [], "length": 80}) for i in range(5)]
    (root / "meta/episodes.jsonl").write_text("\n".join(lines))
    (root / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "push"}\n')
    table = pq.read_table(PUSHT / TABLE)
    for i in range(5):
        fields = {
            "episode_index": i,
            "episode_chunk": i // chunks_size,
            "total_episodes": 5,
            "video_key": "observation.image",
        }
        data, video = (root / path.format(**fields) for path in (data_path, video_path))
        for path in (data, video):
            path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.filter(pa.compute.equal(table["episode_index"], i)), data)
        copy_packets(PUSHT / VIDEO, video, 80 * i, 80 * i + 80)
    return root


def to_images(root, codec="png", pix_fmt="rgb24", **options):
    """Move the camera of a dataset in v3.0 or v2 from its videos into its tables."""
    tables, videos = (sorted(root.glob(f"{folder}/**/*.*")) for folder in ("data", "videos"))
    for table_path, video in zip(tables, [v for v in videos if v.is_file()], strict=True):
        with av.open(video) as container:
            frames = [frame.reformat(format=pix_fmt) for frame in container.decode(video=0)]
        pictures = [{"bytes": encode(f, codec), "path": f"{i}.png"} for i, f in enumerate(frames)]
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        table = pq.read_table(table_path)
        table = table.append_column("observation.image", pa.array(pictures, kind))
        pq.write_table(table, table_path, **options)
    shutil.rmtree(root / "videos")
    image = {"dtype": "image", "shape": [96, 96, 3], "names": ["height", "width", "channel"]}
    edit_info(root, video_path=None)
    edit_features(root, **{"observation.image": image})
    return root


def encode(frame, codec="png"):
    """Return a frame as the bytes of a picture file."""
    encoder = av.CodecContext.create(codec, "w")
    encoder.width, encoder.height, encoder.pix_fmt = frame.width, frame.height, frame.format.name
    encoder.time_base = Fraction(1)
    frame.pts = 0
    return b"".join(bytes(p) for p in [*encoder.encode(frame), *encoder.encode(None)])
