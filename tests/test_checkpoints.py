"""Checkpoints without a run: which are kept, and that they come back as they were saved."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from wmjax.errors import UserError
from wmjax.run.checkpoint import Checkpoints, Saved
from wmjax.step import TrainState


def state_of(**params):
    return TrainState(jnp.int32(3), params, {}, {}, {})


STATE = state_of(w=jnp.linspace(0.0, 1.0, 7))


@pytest.mark.parametrize(
    ("period", "kept"), [(0, ["10", "12"]), (4, ["4", "8", "10", "12"]), (100, ["10", "12"])]
)
def test_the_newest_are_kept_and_those_of_the_period(tmp_path, period, kept):
    with Checkpoints(tmp_path, keep=2, keep_period=period) as checkpoints:
        for step in range(2, 13, 2):
            checkpoints.save(step, STATE, {"position": step}, {})
    assert sorted((path.name for path in tmp_path.iterdir()), key=int) == kept


def test_what_was_saved_comes_back_by_both_ways(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(5, STATE, {"position": 40}, {"config": {"seed": 1}})
        checkpoints.wait()
        restored = checkpoints.restore(5, STATE)
    assert (restored.data, restored.meta) == ({"position": 40}, {"config": {"seed": 1}})
    saved = Saved(tmp_path)
    assert (saved.step, saved.meta) == (5, restored.meta)
    for state in (restored.state, saved.restore(STATE, "x")):
        np.testing.assert_array_equal(state.params["w"], STATE.params["w"])
    assert saved.read(["params.w"])["params.w"].tolist() == STATE.params["w"].tolist()


def test_its_json_is_strict_and_its_numbers_come_back(tmp_path):
    meta = {"config": {"clip": math.inf}, "statistics": [{"mean": [0.5, -math.inf]}]}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(5, STATE, {"position": 40}, meta)
    text = (tmp_path / "5/meta/metadata").read_text()
    assert '"Infinity"' in text
    assert "Infinity" not in text.replace('"Infinity"', "").replace('"-Infinity"', "")
    assert Saved(tmp_path).meta == meta


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        (state_of(w=jnp.zeros(8)), ("(7,)", "(8,)")),
        (state_of(w=jnp.zeros(7, jnp.bfloat16)), ("float32", "bfloat16")),
        (state_of(), ("float32(7,)", "none")),
    ],
)
def test_another_array_is_named_by_both_ways(tmp_path, wanted, named):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(5, STATE, {}, {})
        checkpoints.wait()
        for restore in (
            lambda: checkpoints.restore(5, wanted),
            lambda: Saved(tmp_path).restore(wanted, "x"),
        ):
            with pytest.raises(UserError) as error:
                restore()
            assert all(text in str(error.value) for text in ("params.w", *named))
            assert len(str(error.value).splitlines()) <= 3
