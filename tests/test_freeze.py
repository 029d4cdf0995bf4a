"""optim.freeze: what is frozen stays bit for bit, is stored once, and comes from another run."""

import jax
import micro
import numpy as np
import pytest
from says import refused

import wmjax
from wmjax.run.saved import Saved

FROZEN = ("optim.freeze=encoder/**", "train.num_steps=3")


def arrays(workdir):
    saved = Saved(workdir / "checkpoints")
    return saved.read(saved.shapes)


def under(found, prefix):
    return {name.removeprefix(prefix): x for name, x in found.items() if name.startswith(prefix)}


def same(found, wanted):
    assert found
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)


def named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


@pytest.fixture(scope="module")
def initial():
    return micro.prepare(micro.config(*FROZEN)).steps.init()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Workdir, to be read only, of three steps with a frozen encoder."""
    workdir = tmp_path_factory.mktemp("frozen")
    assert micro.train(micro.config(*FROZEN), workdir) == 0
    return workdir


def test_it_stays_bit_for_bit_and_is_stored_once(workdir, initial):
    found = arrays(workdir)
    same(under(found, "frozen."), named(initial.frozen))
    encoder = {name for name in found if "encoder" in name}
    assert encoder == {name for name in found if name.startswith("frozen.encoder.")}
    assert not under(found, "target.")
    assert under(found, "opt_state.mu.predictor.")
    moved = {
        name: np.abs(x - named(initial.params)[name]).max()
        for name, x in under(found, "params.").items()
    }
    assert {name.partition(".")[0] for name in moved} == {"predictor"}
    assert all(moved[name] > 0 for name in moved if "mask_token" not in name)


def test_it_loads_and_encodes_as_it_began(workdir, initial):
    model = wmjax.load(workdir)
    same(named(model.params["encoder"]), named(initial.frozen["encoder"]))
    video = np.random.default_rng(0).integers(0, 256, (1, 4, 32, 32, 3), np.uint8)
    blueprint = micro.prepare(micro.config(*FROZEN)).steps.blueprint

    @jax.jit
    def encode(params, frozen, video):
        built, _ = blueprint.join(params, frozen, {})
        return built.encode(video)

    wanted = encode(initial.params, initial.frozen, video)
    np.testing.assert_allclose(model.encode(video), wanted, atol=1e-5)
    assert model.complete


def test_a_resumed_run_is_the_same_to_the_last_bit(workdir, tmp_path):
    assert micro.train(micro.config(*FROZEN, "train.num_steps=2"), tmp_path) == 0
    assert micro.train(micro.config(*FROZEN), tmp_path) == 0
    same(arrays(tmp_path), arrays(workdir))
    losses = [[row["loss"] for row in micro.rows(each)] for each in (tmp_path, workdir)]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3


def test_another_runs_ema_is_what_is_frozen(micro_run, tmp_path):
    config = micro.config(f"init_from={micro_run}", *FROZEN)
    assert micro.train(config, tmp_path) == 0
    before, after = arrays(micro_run), arrays(tmp_path)
    same(under(after, "frozen.encoder."), under(before, "target."))
    ema, trained = under(before, "target."), under(before, "params.encoder.")
    assert any(
        np.any(ema[name] != trained[name]) for name in ema
    )  # which it could be mixed up with
    assert after["opt_state.count"] == 3  # moments begin anew
    config.init_from = "gone"  # what it began with is not asked for again
    config.train.num_steps = 4
    assert micro.train(config, tmp_path) == 0
    same(under(arrays(tmp_path), "frozen.encoder."), ema)
    video = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    models = [wmjax.load(each) for each in (tmp_path, micro_run)]
    np.testing.assert_array_equal(*(model.encode(video) for model in models))


def test_patterns_are_separated_by_commas_and_spaces(tmp_path):
    patterns = "predictor/blocks/**, encoder/**"
    config = micro.config(f"optim.freeze={patterns}", "train.num_steps=1")
    assert micro.train(config, tmp_path) == 0
    found = arrays(tmp_path)
    assert {name.partition(".")[0] for name in under(found, "frozen.")} == {"encoder", "predictor"}
    assert not under(found, "params.predictor.blocks.")
    model = wmjax.load(tmp_path)
    same(named(model.params["predictor"]["blocks"]), under(found, "frozen.predictor.blocks."))


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("encodr/**", ["optim.freeze='encodr/**'", "encoder/**", "predictor/**"]),
        ("encoder/*", ["optim.freeze='encoder/*'", "encoder/**", "predictor/**"]),  # within a name
        ("**", ["optim.freeze='**'", "VJEPA2"]),
        ("encoder/**,predictor/**", ["optim.freeze='encoder/**,predictor/**'", "VJEPA2"]),
    ],
)
def test_a_mistake_is_one_line(pattern, named, tmp_path):
    with refused(*named, lines=1):
        micro.train(micro.config(f"optim.freeze={pattern}"), tmp_path)
    assert not list(tmp_path.iterdir())
