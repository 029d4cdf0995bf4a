"""Strides, splits and windows, compared with brute force."""

import numpy as np
import pytest
from recordings import refused

from wmjax.data.windows import Windows, split_episodes, stride_for
from wmjax.errors import UserError


@pytest.mark.parametrize(
    ("recorded", "fps", "stride"),
    [
        (30, 4, 8),
        (50, 4, 13),
        (20, 4, 5),
        (10, 4, 3),
        (30, 30, 1),
        (30, 29.97, 2),
        (29.97, 29.97, 1),
        (9.9, 3.3, 3),
        (33, 3.3, 10),
        (0.3, 0.1, 3),
        (10, 0.1, 100),
    ],
)
def test_stride_is_the_least_that_is_not_faster_than_asked(recorded, fps, stride):
    assert stride_for(recorded, fps) == stride


@pytest.mark.parametrize("fps", [0, -1, 30.5, float("nan"), float("inf"), 1e-6])
def test_stride_refuses_what_the_recording_cannot_give(fps):
    with refused(f"data.fps={fps:g}"):
        stride_for(30, fps)


@pytest.mark.parametrize("share", [0, 0.01, 0.1, 0.5, 0.99])
def test_split_is_a_partition_and_spread_evenly(share):
    for count in range(1, 60):
        train, validation = split_episodes(count, share)
        assert sorted([*train, *validation]) == list(range(count))
        if count > 1 and share > 0:
            assert len(train) >= 1
            assert len(validation) >= 1
            assert abs(len(validation) - count * share) <= 1
            gaps = np.diff(validation)
            assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1
        else:
            assert len(validation) == 0


def test_split_refuses_a_share_of_everything():
    with refused("data.val_share=1"):
        split_episodes(5, 1.0)


def test_windows_are_every_start_that_fits():
    rng = np.random.default_rng(0)
    for _ in range(300):
        lengths = rng.integers(0, 12, rng.integers(1, 7))
        frames, stride = int(rng.integers(1, 5)), int(rng.integers(1, 4))
        every = [
            (episode, start)
            for episode, length in enumerate(lengths)
            for start in range(length)
            if start + (frames - 1) * stride < length
        ]
        if not every:
            with pytest.raises(UserError):
                Windows(lengths, frames, stride)
            continue
        windows = Windows(lengths, frames, stride)
        assert [windows[i] for i in range(len(windows))] == every
        assert windows.too_short == len(lengths) - len({episode for episode, _ in every})
        for outside in (-1, len(windows)):
            with pytest.raises(IndexError):
                windows[outside]


def test_windows_say_how_long_a_clip_is():
    with refused("data.frames=16", "stride 8", 121, 2, 80):
        Windows([80, 60], 16, 8)
    with refused("data.frames=0", 1):
        Windows([80], 0, 8)


def test_repeated_ends_give_every_start():
    windows = Windows([3, 0, 5], 4, 10, ends="repeat")
    every = [(0, 0), (0, 1), (0, 2), *((2, start) for start in range(5))]
    assert [windows[i] for i in range(len(windows))] == every


def test_draws_of_an_episode_come_from_equal_parts_of_its_starts():
    rng = np.random.default_rng(0)
    windows = Windows([10, 2, 0, 35], 2, 1, per_episode=3)
    starts = {0: 9, 1: 1, 3: 34}
    assert windows.draws == 3 + 1 + 3
    seen = {}
    for _ in range(500):
        drawn = [windows[windows.draw(i, rng)] for i in range(windows.draws)]
        assert [episode for episode, _ in drawn] == [0, 0, 0, 1, 3, 3, 3]
        assert drawn == sorted(set(drawn))
        for episode, start in drawn:
            seen.setdefault(episode, set()).add(start)
    assert seen == {episode: set(range(count)) for episode, count in starts.items()}


@pytest.mark.parametrize("per_episode", [0, 100])
def test_without_a_limit_a_pass_is_every_window_in_order(per_episode):
    windows = Windows([7, 1, 4], 3, 1, per_episode=per_episode)
    rng = np.random.default_rng(0)
    assert [windows.draw(i, rng) for i in range(windows.draws)] == list(range(len(windows)))
