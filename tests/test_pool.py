"""Simulators in processes: the same results as in one, and errors that name what failed."""

import contextlib

import numpy as np
import pytest
from recordings import refused

from wmjax.envs.pool import Simulators
from wmjax.envs.tworoom import TwoRoom


class Absolute(TwoRoom):
    def still(self):
        return self.state


class Broken(TwoRoom):
    def step(self, action):
        raise ZeroDivisionError("the disc left the table")


def opened(name, processes, count=7):
    pool = Simulators(name, "eval.env", size=16, count=count, processes=processes)
    return contextlib.closing(pool)


def played(processes):
    """Return all that 7 dots do in 30 random steps."""
    rng = np.random.default_rng(0)
    start_NS, goal_NS = rng.uniform(20, 100, (2, 7, 2)).astype(np.float32)
    found = []
    with opened("test_pool:Absolute", processes) as pool:
        pool.put(start_NS, goal_NS)
        np.testing.assert_array_equal(pool.still(), start_NS)
        for _ in range(30):
            usual, strict = pool.step(rng.uniform(-1, 1, (7, 2)))
            wanted = rng.integers(0, 2, 7).astype(bool)
            pictures = pool.pictures(wanted)
            assert pictures.shape == (wanted.sum(), 16, 16, 3)
            assert not np.any(strict & ~usual)
            found.append((usual, strict, pictures.tobytes(), pool.states(), pool.still()))
    return found


def test_processes_change_no_result():
    alone = played(0)
    assert any(usual.any() for usual, *_ in alone)
    for processes in (1, 3, 20):
        for one, other in zip(alone, played(processes), strict=True):
            for a, b in zip(one, other, strict=True):
                np.testing.assert_array_equal(a, b)


def test_a_process_that_is_killed_and_one_that_fails_are_told():
    nothing = np.zeros((7, 2))
    with opened("tworoom", 2) as pool:
        pool.states()
        pool._processes[1].kill()
        pool._processes[1].join()
        with refused("eval.env", "tworoom", "data.workers", 2):
            pool.step(nothing)
    with opened("test_pool:Broken", 2) as pool, pytest.raises(RuntimeError, match="ZeroDivision"):
        pool.step(nothing)
    with opened("tworoom2", 2) as pool, refused("eval.env", "tworoom2", "tworoom"):
        pool.states()
