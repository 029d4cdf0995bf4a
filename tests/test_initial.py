"""What a run begins with: another run's state, pretrained weights, or an image model."""

import jax
import micro
import numpy as np
import pytest
import weight_files
from says import holds, lines_with, refused, says

import wmjax
from wmjax import assemble, initial
from wmjax.run.saved import Saved

FIRST = "params.encoder.blocks.attention.proj.bias"
SIZES = weight_files.SIZES
OVERRIDES = (
    *(f"model.{key}={value}" for key, value in weight_files.MODEL.items() if "mask" not in key),
    "data.image_size=16",
)


def begin(config):
    steps = assemble.prepare(config).steps
    return initial.make_state(steps, init_from=config.init_from, pretrained=config.model.pretrained)


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model as transformers saves it."""
    tensors = weight_files.draw(weight_files.vjepa2_shapes(SIZES))
    config = weight_files.vjepa2_config(SIZES)
    return weight_files.write(tmp_path_factory.mktemp("model"), tensors, config)


def test_another_run_gives_parameters_target_and_moments(micro_run):
    state, origin = begin(micro.config(f"init_from={micro_run}"))
    says(origin, micro_run, 3)
    assert int(state.step) == 0
    assert int(state.opt_state.count) == 3
    saved = Saved(micro_run / "checkpoints")
    arrays = saved.read(saved.shapes)
    assert same(arrays.pop("step"), 3)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    ours = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    del ours["step"]
    assert same(ours, arrays)


def test_schedules_follow_the_new_run_and_moments_the_old_one(micro_run, tmp_path, capsys):
    overrides = ["optim.schedule=linear", "optim.warmup=0", "optim.schedule_steps=4"]
    config = micro.config(f"init_from={micro_run}", *overrides, "train.num_steps=2")
    assert micro.train(config, tmp_path) == 0
    assert lines_with(capsys.readouterr().out, micro_run, 3)
    rates = [row["learning_rate"] for row in micro.rows(tmp_path)]
    peak, final = config.optim.learning_rate, config.optim.final_learning_rate
    wanted = [final + (peak - final) * share for share in (3 / 4, 2 / 4)]
    np.testing.assert_allclose(rates, wanted, rtol=1e-5)
    assert Saved(tmp_path / "checkpoints").read(["opt_state.count"])["opt_state.count"] == 5
    config.init_from = "gone"  # what it began with is not asked for again
    config.train.num_steps = 3
    assert micro.train(config, tmp_path) == 0


def test_a_run_of_another_model_is_refused_with_the_parameter(micro_run):
    with refused(f"init_from={micro_run}", FIRST, "(2, 48)", "(2, 96)"):
        begin(micro.config(f"init_from={micro_run}", "model.width=96"))


FUNCTION = [
    ("model.rope=interleaved", ["model.rope='interleaved'", "'tiled'"]),
    ("model.rope=sincos", ["model.rope='sincos'", "'tiled'"]),
    ("model.heads=4", ["model.heads=4", 2]),
    ("model.predictor_heads=4", ["model.predictor_heads=4", 2]),
]


@pytest.mark.parametrize("freeze", ["", "encoder/norm/*"])
@pytest.mark.parametrize(("override", "named"), FUNCTION)
def test_a_run_of_another_function_is_refused_by_the_setting(micro_run, override, named, freeze):
    """With another optim.freeze the weights are loaded without the optimiser state."""
    config = micro.config(f"init_from={micro_run}", override, f"optim.freeze={freeze}")
    with refused(micro_run, *named):
        begin(config)


def test_what_changes_no_function_is_noted(micro_run):
    changes = ("model.loss_exp=2", "model.gelu=polynomial", "model.remat=full")
    _, origin = begin(micro.config(f"init_from={micro_run}", *changes))
    for key, old, new in (("loss_exp", 1.0, 2.0), ("gelu", "auto", "polynomial")):
        assert lines_with(origin, f"model.{key}", old, new)
    _, origin = begin(micro.config(f"init_from={micro_run}"))
    assert "model." not in origin


def test_a_model_of_transformers_gives_encoder_predictor_and_target(folder):
    state, origin = begin(micro.config(f"init_from={folder}", *OVERRIDES))
    model = wmjax.load(folder)
    tokens = model.params["predictor"]["mask_tokens"]
    assert len(tokens) == 3
    model.params["predictor"]["mask_tokens"] = tokens[np.arange(10) % 3]  # as Meta takes them
    assert same(state.params, model.params)
    assert same(state.target, model.params["encoder"])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))
    loaded, fresh = origin.split(str(folder))
    says(loaded, "encoder", "predictor", "target")
    says(fresh, "optimizer")
    assert not holds(fresh, "predictor")
    shards = [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(state)]
    pointers = [shard.unsafe_buffer_pointer() for shard in shards]
    assert len(set(pointers)) == len(pointers)  # the step donates each of them


def test_an_image_model_gives_encoder_and_target_and_its_positions(tmp_path, capsys):
    tensors = weight_files.draw(weight_files.image_shapes("vit"))
    folder = weight_files.write(tmp_path / "vit", tensors, weight_files.image_config("vit"))
    config = micro.config(
        *(*OVERRIDES, "model.depth=2", f"model.pretrained={folder}"),
        *("train.num_steps=1", "optim.learning_rate=0", "optim.start_learning_rate=0"),
    )
    assert micro.train(config, tmp_path / "run") == 0
    (origin,) = lines_with(capsys.readouterr().out, folder, "optimizer")
    loaded, fresh = origin.split(str(folder))
    says(loaded, "encoder", "target")
    says(fresh, "predictor", "optimizer")
    model = wmjax.load(tmp_path / "run")
    assert model.config["model"]["position_grid"] == 5
    positions = tensors["embeddings.position_embeddings"][0, 1:].reshape(5, 5, 36)
    averaged = model.params["encoder"]["positions"]["space"]  # of equal ones, so rounded
    np.testing.assert_allclose(averaged, positions, rtol=3e-7)
    assert micro.train(config, tmp_path / "run") == 0  # finished: nothing is loaded again


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["init_from=a", "model.pretrained=b"], ["init_from='a'", "model.pretrained='b'"]),
        (["init_from={folder}"], ["{folder}", "model.width=48", 36]),
        (["model.pretrained={folder}"], ["model.pretrained=", "--config.init_from={folder}"]),
        (["init_from=/nowhere"], ["/nowhere"]),
    ],
)
def test_a_mistake_gets_a_line(folder, overrides, named, tmp_path):
    config = micro.config(*(override.format(folder=folder) for override in overrides))
    with refused(*(str(token).format(folder=folder) for token in named)):
        micro.train(config, tmp_path)
