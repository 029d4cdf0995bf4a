"""What a run begins with: another run's state, pretrained weights, or an image model."""

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest
import weight_files

import wmjax
from wmjax import assemble, initial, sharding, train
from wmjax import config as configs
from wmjax.errors import UserError


def steps_of(config):
    return assemble.make_steps(config, sharding.make_mesh())


def begin(config):
    return initial.make_state(
        steps_of(config),
        configs.model_arguments(config),
        init_from=config.init_from,
        pretrained=config.model.pretrained,
    )


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three steps."""
    workdir = tmp_path_factory.mktemp("run")
    assert train.train(micro.config("train.num_steps=3"), workdir) == 0
    return workdir


def test_another_run_gives_parameters_target_and_moments(run, capsys):
    config = micro.config(f"init_from={run}", "optim.learning_rate=0", "optim.warmup=0")
    state, origin = begin(config)
    assert "step 3" in origin
    assert int(state.step) == 0
    assert int(state.opt_state.count) == 3
    assert not same(state.params["encoder"], state.target)
    model = wmjax.load(run)
    assert same(model._params["encoder"], state.target)
    assert same(model._params["predictor"], state.params["predictor"])


def test_schedules_follow_the_new_run_and_moments_the_old_one(run, tmp_path):
    overrides = ["optim.schedule=linear", "optim.warmup=0", "optim.schedule_steps=4"]
    config = micro.config(f"init_from={run}", *overrides, "train.num_steps=2")
    assert train.train(config, tmp_path) == 0
    rates = [row["learning_rate"] for row in micro.rows(tmp_path)]
    peak, final = config.optim.learning_rate, config.optim.final_learning_rate
    np.testing.assert_allclose(
        rates, [final + (peak - final) * 3 / 4, final + (peak - final) / 2], rtol=1e-5
    )
    with assemble_checkpoint(tmp_path) as saved:
        assert saved.read(["opt_state.count"])["opt_state.count"] == 5


def test_a_run_of_another_model_is_refused_with_the_parameter(run):
    config = micro.config(f"init_from={run}", "model.width=96")
    with pytest.raises(UserError, match=r"init_from=.*another model.*encoder.*wanted"):
        begin(config)


def test_a_model_of_transformers_gives_encoder_predictor_and_target(tmp_path):
    folder = weight_files.write_tiny(tmp_path)
    config = micro.config(f"init_from={folder}", *weight_files.TINY_OVERRIDES)
    state, origin = begin(config)
    model = wmjax.load(folder)
    assert same(state.params["encoder"], model._params["encoder"])
    assert same(state.params["predictor"], model._params["predictor"])
    assert same(state.target, state.params["encoder"])
    assert "optimizer state" in origin
    batch_donates_twice = steps_of(config)
    assert batch_donates_twice  # parameters and target share no memory: see the next lines
    for ours, theirs in zip(
        jax.tree.leaves(state.target), jax.tree.leaves(state.params["encoder"]), strict=True
    ):
        assert ours.unsafe_buffer_pointer() != theirs.unsafe_buffer_pointer()


def test_both_ways_to_begin_at_once_are_refused():
    with pytest.raises(UserError, match="wanted one of them"):
        configs.check(micro.config("init_from=a", "model.pretrained=b"))


def unused():
    return jnp
