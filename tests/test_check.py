"""`wmjax.data check`: names every fault of a damaged dataset, and finds none in sound ones."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from recordings import (
    EPISODES,
    TABLE,
    VIDEO,
    edit_column,
    edit_features,
    edit_info,
    edit_video,
    missing_names,
    refused,
    to_images,
    write_v2,
)
from shared_data import PUSHT, SHARED, needs_shared

from wmjax.data.__main__ import run, statistics
from wmjax.data.lerobot import entries
from wmjax.data.lerobot.native import LeRobotSource
from wmjax.data.media import tables
from wmjax.data.tools.check import check
from wmjax.errors import UserError

SECOND = "videos/chunk-000/observation.image/episode_000001.mp4"
STATS = "meta/episodes_stats.jsonl"


@pytest.fixture
def pusht(tmp_path):
    return shutil.copytree(PUSHT, tmp_path / "pusht")


@pytest.fixture
def v21(tmp_path):
    """The recording in v2.1, with lerobot's statistics of each episode."""
    root = write_v2(tmp_path / "v21")
    columns = pq.read_table(PUSHT / EPISODES).to_pylist()
    with (root / STATS).open("w") as file:
        for row in columns:
            stats: dict = {}
            for name, value in row.items():
                if name.startswith("stats/"):
                    _, feature, key = name.split("/")
                    stats.setdefault(feature, {})[key] = value
            file.write(json.dumps({"episode_index": row["episode_index"], "stats": stats}) + "\n")
    return root


@pytest.mark.parametrize("decode", [False, True])
def test_a_sound_dataset_has_no_faults(pusht, decode, capsys):
    assert run(["check", str(pusht), *(["--decode"] if decode else [])]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    size = ("v3.0", "5 episodes", "400 frames", "10 fps", "observation.image")
    assert not missing_names(line, str(pusht), *size)


def test_v21_and_images_have_none(v21, pusht):
    assert check(v21)[0] == []
    assert check(to_images(pusht), decode=True)[0] == []


@needs_shared
@pytest.mark.parametrize(
    "name", ["g1_subset_v21", "g1_subset_v30", "aloha_sim_twocam_v3", "aloha_sim_transfer_v3"]
)
def test_shared_datasets_have_none(name):
    assert check(SHARED / name)[0] == []


def set_row(row, value):
    return lambda rows: [*rows[:row], value, *rows[row + 1 :]]


def edit_stats(root, feature, **changes):
    path = root / "meta/stats.json"
    stats = json.loads(path.read_text())
    stats[feature] |= changes
    path.write_text(json.dumps(stats))


def test_a_list_of_too_many_episodes_is_counted_not_read(pusht, monkeypatch):
    """Equal numbers take no room in a file: 30 million episodes are 2 MB."""
    names = [n for n in pq.read_schema(pusht / EPISODES).names if not n.startswith("stats/")]
    numbers = pa.array(np.zeros(5_000_000, np.int8))
    pq.write_table(pa.table(dict.fromkeys(names, numbers)), pusht / EPISODES)
    monkeypatch.setattr(entries, "read_columns", None)
    findings, _ = check(pusht)
    assert any(f.where == "meta/episodes" and "5000000" in f.found for f in findings), findings
    with refused("meta/episodes", 5_000_000):
        LeRobotSource(pusht, frames=2, fps=10)


def test_numbers_of_a_table_are_counted_before_they_are_read(pusht, monkeypatch):
    monkeypatch.setattr(tables, "MOST_NUMBERS", 400 * 2)
    with refused(TABLE, 400, 800):
        LeRobotSource(pusht, frames=2, fps=10)
    assert any(f.where == TABLE and "1200" in f.found for f in check(pusht)[0])


FORGED = "x\r\x1b[2Kstep 100/100  loss 0.0001\nstep 100/100  loss 0.0001"


def forge_feature(root):
    features = json.loads((root / "meta/info.json").read_text())["features"]
    edit_info(root, features={**features, FORGED: features["action"]})


def forge_version(root):
    edit_info(root, codebase_version=FORGED)


def forge_template(root):
    edit_info(root, data_path=f"{FORGED}/{{chunk_index}}")


def forge_file_name(root):
    (root / EPISODES).rename((root / EPISODES).with_name(f"{FORGED.replace('/', '_')}.parquet"))


def forge_dtype(root):
    edit_features(root, action={"dtype": FORGED, "shape": [2]})


def forge_link(root):
    (root / TABLE).unlink()
    (root / TABLE).symlink_to(f"/{FORGED.replace('/', '_')}")


@pytest.mark.parametrize(
    "forge",
    [forge_feature, forge_version, forge_template, forge_file_name, forge_dtype, forge_link],
)
@pytest.mark.parametrize("command", ["check", "stats"])
def test_metadata_writes_no_line_of_its_own_on_the_terminal(pusht, forge, command):
    forge(pusht)
    code = "from wmjax import door; from wmjax.data.__main__ import run; door.run_and_exit(run, '')"
    done = subprocess.run([sys.executable, "-c", code, command, pusht], capture_output=True)
    assert done.returncode in (0, 2), done.stderr
    said = (done.stdout + done.stderr).decode()
    assert "Traceback" not in said
    assert not set(said) & {"\r", "\x1b"}
    assert not [line for line in said.splitlines() if line.startswith("step ")]


def test_metadata_that_would_fill_the_memory_is_not_read(pusht):
    os.truncate(pusht / "meta/stats.json", 1 << 40)  # a hole: nothing is on the disk
    assert any(f.where == "meta/stats.json" and str(1 << 40) in f.found for f in check(pusht)[0])


def flip_bytes(root):
    data = bytearray((root / VIDEO).read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000] = bytes(4000)
    (root / VIDEO).write_bytes(data)


FAULTS = [
    # (damage, file and episode of the finding, names in it)
    (lambda r: (r / VIDEO).unlink(), VIDEO, ["chunk_index=0", "file_index=0"]),
    (lambda r: os.truncate(r / VIDEO, 3000), VIDEO, ["moov"]),
    (lambda r: (r / VIDEO).write_text("text"), VIDEO, ["moov"]),
    (lambda r: edit_video(r / VIDEO, 300), f"{VIDEO}: episode 3", [300, 400]),
    (lambda r: edit_info(r, fps=20), f"{TABLE}: episode 0", ["timestamp", "0.100000001", 0.05]),
    (lambda r: (r / TABLE).unlink(), TABLE, ["chunk_index=0", "file_index=0"]),
    (lambda r: (r / TABLE).write_text("text"), TABLE, ["parquet"]),
    (
        lambda r: edit_column(r / TABLE, "action", set_row(167, [0.0, float("nan")])),
        f"{TABLE}: episode 2",
        ["action[1]", "nan", "frame 7", 1],
    ),
    (
        lambda r: edit_column(r / TABLE, "observation.state", set_row(1, [float("inf"), 0.0])),
        f"{TABLE}: episode 0",
        ["observation.state[0]", "inf", "frame 1"],
    ),
    (
        lambda r: edit_column(r / TABLE, "timestamp", set_row(85, 0.75)),
        f"{TABLE}: episode 1",
        ["timestamp", 0.75, "frame 5", 0.5],
    ),
    (
        lambda r: edit_column(r / TABLE, "frame_index", set_row(85, 6)),
        f"{TABLE}: episode 1",
        ["frame_index", 6, "frame 5"],
    ),
    (
        lambda r: edit_column(r / TABLE, "index", set_row(85, 99)),
        f"{TABLE}: episode 1",
        ["index", 99, "frame 5", 85],
    ),
    (
        lambda r: pq.write_table(pq.read_table(r / TABLE).slice(0, 390), r / TABLE),
        f"{TABLE}: episode 4",
        [70, 80],
    ),
    (
        lambda r: edit_column(r / TABLE, "episode_index", lambda v: v[::80] * 80),
        f"{TABLE}: episode 0",
        [0, 5],
    ),
    (lambda r: edit_column(r / TABLE, "action", lambda _: None), TABLE, ["action"]),
    (
        lambda r: edit_features(r, action={"dtype": "float32", "shape": [3], "names": None}),
        f"{TABLE}: episode 0",
        ["action", 2, 3],
    ),
    (
        lambda r: edit_stats(r, "action", mean=[290.0, 232.9391374206543]),
        "meta/stats.json",
        ["action", "mean[0]", 290, 282.728],
    ),
    (lambda r: edit_stats(r, "action", count=[399]), "meta/stats.json", ["action", 399, 400]),
    (lambda r: edit_stats(r, "action", max=[1.0]), "meta/stats.json", ["action", "max", 1, 2]),
    (lambda r: (r / "meta/stats.json").unlink(), "meta/stats.json", []),
    (lambda r: (r / "meta/stats.json").write_text("{"), "meta/stats.json", ["JSON"]),
    (lambda r: (r / "meta/tasks.parquet").unlink(), "meta/tasks.parquet", []),
    (
        lambda r: edit_column(r / EPISODES, "length", set_row(4, 81)),
        f"{TABLE}: episode 4",
        [80, 81],
    ),
    (
        lambda r: edit_column(r / EPISODES, "length", set_row(4, 2**31)),
        "meta/episodes: episode 4",
        [2**31, "2**31"],
    ),
    (
        lambda r: edit_column(
            r / EPISODES, "videos/observation.image/from_timestamp", set_row(2, 16.3)
        ),
        f"{VIDEO}: episode 3",
        ["frame 240", "24.0000 s", "episode 2: frame 77"],
    ),
    (
        lambda r: edit_column(r / EPISODES, "episode_index", set_row(4, 3)),
        "meta/episodes: episode 3",
        [2],
    ),
    (
        lambda r: edit_column(r / EPISODES, "episode_index", set_row(4, 6)),
        "meta/episodes",
        ["[4, 5]"],
    ),
    (lambda r: (r / EPISODES).write_text("text"), EPISODES, ["parquet"]),
    (lambda r: (r / EPISODES).unlink(), "meta/episodes", ["parquet"]),
    (lambda r: edit_info(r, total_frames=401), "meta/info.json", ["total_frames=401", 400]),
    (
        lambda r: edit_info(r, video_path="v/{x}.mp4"),
        "meta/info.json",
        ["video_path='v/{x}.mp4'", "chunk_index"],
    ),
    (
        lambda r: edit_info(r, video_path="videos/{file_index}.mp4"),
        "meta/info.json",
        ["video_path='videos/{file_index}.mp4'"],
    ),
    (lambda r: edit_info(r, splits={"train": "0:9"}), "meta/info.json", ["splits", "0:9", 5]),
    (
        lambda r: edit_features(
            r, **{"observation.image": {"dtype": "video", "shape": [96, 128, 3]}}
        ),
        VIDEO,
        ["96x96", "96x128", "observation.image"],
    ),
    (
        lambda r: edit_features(r, side={"dtype": "video", "shape": [96, 96, 3]}),
        EPISODES,
        ["videos/side/chunk_index"],
    ),
]


@pytest.mark.parametrize(("fault", "where", "names"), FAULTS)
def test_a_fault_is_named(pusht, fault, where, names):
    fault(pusht)
    findings, _ = check(pusht)
    assert any(
        finding.where == where and not missing_names(" ".join(finding[1:]), *names)
        for finding in findings
    ), findings


@pytest.mark.parametrize(("fault", "where", "names"), FAULTS)
def test_what_training_refuses_or_warns_of_is_found(pusht, fault, where, names):
    fault(pusht)
    try:
        wrong = LeRobotSource(pusht, frames=4, fps=4).notes
    except UserError as error:
        wrong = str(error)
    assert check(pusht)[0] or not wrong


def test_a_video_of_two_episodes_is_one_finding(v21):
    """The template gives a file for each episode, but one file for all: training refuses it."""
    name = "videos/chunk-000/observation.image/episode_000000.mp4"
    edit_info(v21, video_path=name)
    (v21 / SECOND).rename(v21 / "elsewhere")
    findings = [finding for finding in check(v21)[0] if finding.where == "meta/info.json"]
    assert len(findings) == 1
    assert not missing_names(" ".join(findings[0]), name, "episode_index=0", "episode_index=1")


def test_damage_between_key_frames_takes_decoding_every_frame(pusht):
    flip_bytes(pusht)
    assert check(pusht)[0] == []
    findings, _ = check(pusht, decode=True)
    assert [finding.where for finding in findings] == [VIDEO]


def test_it_goes_on_to_the_next_thing(v21, capsys):
    (v21 / SECOND).unlink()
    edit_column(
        v21 / "data/chunk-000/episode_000003.parquet", "action", set_row(0, [float("inf"), 0.0])
    )
    text = (v21 / STATS).read_text().splitlines()
    entry = json.loads(text[2])
    entry["stats"]["observation.state"]["max"][1] = 1e6
    (v21 / STATS).write_text("\n".join([*text[:2], json.dumps(entry), text[4]]))
    edit_video(v21 / SECOND.replace("1.mp4", "4.mp4"), 79)
    assert run(["check", str(v21)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 5 + 1
    for part in (
        ("episode_000001.mp4",),
        ("episode_000003.parquet: episode 3", "action[0]", "inf", "frame 0"),
        (f"{STATS}: episode 2", "observation.state", "max[1]", "1e+06"),
        (f"{STATS}: episode 3",),
        ("episode_000004.mp4", 79, 80),
    ):
        assert any(not missing_names(line, *part) for line in lines[1:-1]), part
    assert not missing_names(lines[-1], str(v21), 5)


def test_exit_codes_of_the_door(tmp_path):
    def door(*argv):
        command = [sys.executable, "-m", "wmjax.data", *map(str, argv)]
        return subprocess.run(command, capture_output=True, text=True)

    none = door("check", tmp_path)
    assert (none.returncode, none.stdout) == (2, "")
    assert none.stderr.startswith("error: ")
    assert not missing_names(none.stderr, f"data.root='{tmp_path}'", "meta/info.json")
    sound = door("stats", PUSHT)
    assert sound.returncode == 0
    assert json.loads(sound.stdout) == statistics(PUSHT, "observation.state", "action")


def test_statistics_are_those_that_training_uses():
    (used,) = LeRobotSource(PUSHT, frames=1, fps=1).statistics()
    found = statistics(PUSHT, "observation.state", "action")
    assert found == {"observation.state": used["state"], "action": used["action"]}


def test_statistics_need_no_videos(pusht):
    shutil.rmtree(pusht / "videos")
    assert statistics(pusht, "action", "action")["action"]["count"] == 400
    with refused("--state='x'", "observation.state", "action"):
        statistics(pusht, "x", "action")
    edit_column(pusht / TABLE, "action", set_row(1, [float("nan"), 0.0]))
    with refused(TABLE, "episode 0", "action[0]", "nan", "frame 1"):
        statistics(pusht, "observation.state", "action")
    assert np.isfinite(statistics(PUSHT, "action", "action")["action"]["std"]).all()
