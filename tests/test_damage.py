"""Damaged datasets end in a clear error, a counted skip or valid clips, and in nothing else.

damage.py damages and reads the datasets in processes of its own. A crash, a hang or a memory bomb
is of the case that was being read.
"""

import collections
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import av
import damage
import numpy as np
import pytest
from recordings import (
    TABLE,
    VIDEO,
    edit_column,
    encode,
    open_pusht,
    reader_of,
    refused,
    to_images,
    write_v2,
)
from shared_data import PUSHT, SHARED

from wmjax.data.media import video

SCRIPT = Path(__file__).with_name("damage.py")
MOST_MB = 300  # growth of the process's peak memory by one case


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    shutil.copytree(PUSHT, folder / "video")
    write_v2(folder / "episodes")
    to_images(shutil.copytree(PUSHT, folder / "images"))
    if SHARED.is_dir():
        shutil.copytree(SHARED / "g1_subset_v21", folder / "large")
    return folder


def check_cases(base, first, end):
    """Read the cases; return how many had each outcome."""
    child = subprocess.run(
        [sys.executable, str(SCRIPT), str(base), f"{first}:{end}"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    cases = {}
    for line in map(json.loads, child.stdout.splitlines()):
        cases.setdefault(line["case"], {}).update(line)
    for case in cases.values():
        assert case.get("outcome") in ("refused", "skipped", "read"), f"{case}\n{child.stderr}"
        assert case["grown_mb"] < MOST_MB, case
    assert (len(cases), child.returncode) == (end - first, 0), child.stderr
    # Any other warning on stderr would be about nothing that a user can mend.
    own = [line for line in child.stderr.splitlines() if line.startswith(f"warning: {base.parent}")]
    assert child.stderr.splitlines() == own
    return collections.Counter(case["outcome"] for case in cases.values())


@pytest.mark.parametrize("name", ["video", "episodes", "images", "large"])
def test_a_few_damaged_datasets(bases, name):
    if not (bases / name).is_dir():
        pytest.skip(f"no datasets in {SHARED}")
    outcomes = check_cases(bases / name, 0, 15)
    assert all(outcomes[outcome] for outcome in ("refused", "read")), outcomes


@pytest.mark.campaign
@pytest.mark.parametrize("first", range(15, 165, 50))
@pytest.mark.parametrize("name", ["video", "episodes", "images", "large"])
def test_many_damaged_datasets(bases, name, first):
    if not (bases / name).is_dir():
        pytest.skip(f"no datasets in {SHARED}")
    outcomes = check_cases(bases / name, first, first + 50)
    assert all(outcomes[outcome] for outcome in ("refused", "read")), outcomes
    print(f"{name} {first}: {dict(outcomes)}")


def check_times(base, tmp_path, seeds):
    """Damage only times; return how many pictures were compared. None may be another row's."""
    compared = 0
    for seed in seeds:
        root = shutil.copytree(base, tmp_path / f"{base.name}-{seed}")
        what = damage.damage_times(root, random.Random(f"{base.name} {seed}"))
        count, wrong = damage.wrong_pictures(base, root)
        assert wrong == 0, f"seed {seed}: {what}: {wrong} of {count} pictures are another row's"
        compared += count
        shutil.rmtree(root)
    return compared


@pytest.mark.parametrize("name", ["video", "episodes"])
def test_no_picture_is_wrong_where_times_are_damaged(bases, tmp_path, name):
    assert check_times(bases / name, tmp_path, range(20)) > 0


@pytest.mark.campaign
@pytest.mark.parametrize("name", ["video", "episodes"])
def test_no_picture_is_wrong_in_many_damages_of_times(bases, tmp_path, name):
    compared = check_times(bases / name, tmp_path, range(20, 320))
    print(f"{name}: 300 damages of times, {compared} pictures compared, 0 wrong")


def test_frames_beyond_the_most_pixels_are_not_decoded(monkeypatch):
    monkeypatch.setattr(video, "MAX_PIXELS", 96 * 96 // 2)
    with refused(VIDEO, "frame 0", "episode 0", lines=2):
        open_pusht()[0]


def test_a_picture_that_says_it_is_huge_takes_no_memory(tmp_path):
    """Its header says 16,000 x 16,000 pixels, 768 MB: the largest that libav accepts by default."""
    picture = bytearray(encode(av.VideoFrame.from_ndarray(np.zeros((96, 96, 3), np.uint8))))
    picture[16:24] = (16_000).to_bytes(4, "big") * 2
    root = to_images(shutil.copytree(PUSHT, tmp_path / "set"))
    edit_column(
        root / TABLE,
        "observation.image",
        lambda pictures: [{"bytes": bytes(picture), "path": "0.png"}, *pictures[1:]],
    )
    source = open_pusht(root)
    held = damage.most_memory()
    with refused(TABLE, "row 0", "observation.image", "episode 0"):
        source[0]
    assert damage.most_memory() - held < MOST_MB << 20
    clip, errors = reader_of(source, skip=True).read(0, 0)
    assert clip["skipped"]
    assert len(errors) == 1
