"""Recordings as people publish them: the pictures of exactly their rows, or a true refusal.

tests/data/recordings holds small datasets with numbered pictures: 100 x episode + frame, in bits.
"""

from pathlib import Path

import numpy as np
import pytest
from recordings import missing_names, refused

from wmjax.data.lerobot.native import LeRobotSource
from wmjax.data.tools.check import check
from wmjax.data.tools.transcode import transcode

CASES = Path(__file__).parent / "data/recordings"


def number_of(frame):
    """Return the number in a picture: 12 blocks of 16 x 16 pixels, least significant bit first."""
    grey_HW = frame.to_ndarray(format="rgb24").mean(-1)
    blocks = [grey_HW[16 * r + 4 : 16 * r + 12, 16 * c + 4 : 16 * c + 12]
              for r in range(2) for c in range(6)]  # fmt: skip
    return sum((block.mean() > 125) << bit for bit, block in enumerate(blocks))


def pictures(root, frames=1):
    """Read every clip of a dataset, shuffled; return {(episode, row): number of its picture}."""
    source = LeRobotSource(root, frames=frames, fps=30, stride=1, ends="repeat")
    found = {}
    for index in np.random.default_rng(0).permutation(len(source)):
        clip = source[int(index)]
        steps = [clip["start"] + i for i in range(len(set(map(id, clip["frames_VT"][0]))))]
        for step, frame in zip(steps, clip["frames_VT"][0], strict=False):
            found[clip["episode"], step] = int(number_of(frame))
    return found, source


def numbered(lengths, picture=lambda episode, row: 100 * episode + row):
    return {(e, row): picture(e, row) for e, n in enumerate(lengths) for row in range(n)}


READ = {
    "hevc_g2_lerobot": numbered([90]),
    "h264_open_gop": numbered([90]),
    "mp4_without_edit_list": numbered([90]),
    "mp4_fragmented": numbered([90]),
    "mkv": numbered([90]),
    "rate_29_5_called_30": numbered([90]),
    "late_first_frame": numbered([90]),
    "v3_gap_between_episodes": numbered([31, 40, 29, 25, 25]),
    "rows_trimmed_at_the_start": numbered([30, 20], lambda e, row: 100 * e + 10 + row),
    "rows_10hz_video_30hz": numbered([20], lambda e, row: 3 * row),
    "depth_in_video_info": numbered([30, 20]),
    "no_frame_index": numbered([30, 20]),
    "v21_chunk_index_template": numbered([30, 20]),
    "check_crash_shape_0": numbered([30, 20]),
    "irrelevant_feature_shape_null": numbered([30, 20]),
    "v3_place_float": numbered([31, 40, 29]),
    "v3_subset_video_untouched": numbered([40, 25], lambda e, row: 100 + 200 * e + row),
}
NOTED = {"rate_29_5_called_30", "late_first_frame", "v21_chunk_index_template"}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("frames", [1, 4])
def test_every_row_has_its_picture(name, frames):
    found, source = pictures(CASES / name, frames)
    assert found == READ[name]
    assert (len(source.notes) == 1) == (name in NOTED), source.notes


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("decode", [False, True])
def test_check_agrees_with_training(name, decode):
    findings = [f for f in check(CASES / name, decode=decode)[0] if "stats" not in f.where]
    assert bool(findings) == (name in NOTED), findings


def test_a_depth_camera_is_left_out_and_said():
    source = LeRobotSource(CASES / "depth_in_video_info", frames=1, fps=30)
    assert source.cameras == ("observation.images.top",)
    assert not missing_names(source.describe(), "observation.images.depth")


def test_pictures_as_lists_of_numbers_are_no_camera():
    root = CASES / "check_fine_raw_uint8_camera"
    with refused("data.cameras='all'", "none"):
        LeRobotSource(root, frames=1, fps=30)
    assert any("none" in finding.found + finding.wanted for finding in check(root)[0])


def test_pointers_of_git_lfs_are_named():
    root = CASES / "lfs_pointers"
    with refused("git lfs pull"):
        LeRobotSource(root, frames=1, fps=30)
    assert any("git lfs pull" in " ".join(finding) for finding in check(root)[0])


@pytest.mark.parametrize("name", ["mp4_fragmented", "mkv", "v3_gap_between_episodes"])
def test_a_copy_has_the_same_pictures(name, tmp_path):
    out = tmp_path / "out"
    transcode(CASES / name, out, size=96, gop=2, crf=20, cameras="all", workers=1)
    assert pictures(out)[0] == READ[name]
