"""Attentive probes: they learn what is there, side by side as alone, by the reference's recipe.

Their forward pass is held against transformers' in test_parity.py.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from flax import nnx
from says import refused

from wmjax import sharding
from wmjax.evals import classifier as probing
from wmjax.models import base
from wmjax.models.classifier import AttentiveClassifier
from wmjax.nn.compute import Compute

WIDTH, TOKENS, CLASSES = 16, 6, 4
PROBE = {"heads": 2, "classes": CLASSES, "depth": 1}
MESH, TWO = (sharding.make_mesh(n, 1, jax.devices()[:n]) for n in (1, 2))


def batches(seed, count=None, rows=16, signal=3.0, views=()):
    """Yield noise in which one token, anywhere, points to the class of the row."""
    rng, directions = np.random.default_rng(seed), np.random.default_rng(0)
    directions = directions.standard_normal((CLASSES, WIDTH))
    for _ in itertools.count() if count is None else range(count):
        x = rng.standard_normal((rows, *views, TOKENS, WIDTH))
        labels = rng.integers(0, CLASSES, rows)
        shown = signal * directions[labels].reshape(rows, *(1 for _ in views), WIDTH)
        x[np.arange(rows), ..., rng.integers(0, TOKENS, rows), :] += shown
        yield x.astype(np.float32), labels


def changed(features=lambda x: x, labels=lambda y: y):
    for x, y in batches(1, count=4):
        yield features(x), labels(y)


def fit(stream, steps, rates, decays=(0.01,), mesh=MESH):
    return probing.fit(stream, mesh, steps=steps, seed=0, rates=rates, decays=decays, **PROBE)


def named(tree):
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(tree)}


def logits(probes, index, features):
    return jax.jit(probes.classifier(index))(features)


@pytest.fixture(scope="module")
def learned():
    return fit(batches(1), 120, rates=(1e-2, 1e-7), decays=(0.01, 0.4))


def test_a_probe_learns_what_one_token_shows(learned):
    scores = probing.evaluate(learned, batches(2, count=16, views=(1,)), MESH)
    assert scores["top1"] > 0.95  # of 256 clips; chance is a quarter
    assert scores["learning_rate"] == 1e-2
    assert [row["top1"] > 0.95 for row in scores["all"]] == [True, True, False, False]
    assert scores["all"][scores["best"]]["top1"] == scores["top1"]
    assert f" {100 * scores['top1']:.2f}" in probing.table(scores).splitlines()[1]


def test_clips_of_one_view_need_no_axis_for_it(learned):
    with_axis = list(batches(2, count=2, views=(1,)))
    without = [(features_BVND[:, 0], labels_B) for features_BVND, labels_B in with_axis]
    scores = [probing.evaluate(learned, each, MESH) for each in (with_axis, without)]
    assert scores[0] == scores[1]


def test_labels_of_other_clips_are_no_views(learned):
    ((features, labels),) = batches(2, count=1)
    with refused("features", 16, 8):
        probing.evaluate(learned, [(features, labels[:8])], MESH)


def test_features_that_show_nothing_give_about_chance(learned):
    scores = probing.evaluate(learned, batches(2, count=16, signal=0.0, views=(1,)), MESH)
    assert scores["top1"] < 1 / CLASSES + 0.1


@pytest.fixture(scope="module")
def several():
    return fit(batches(1), 8, rates=(1e-2, 1e-3), decays=(0.01, 0.8))


@pytest.mark.parametrize("index", [0, 3])
def test_probes_side_by_side_are_those_trained_alone(several, index):
    rate, decay = several.settings[index]
    alone = fit(batches(1), 8, rates=(rate,), decays=(decay,))
    wanted = named(alone.params)
    for name, found in named(several.params).items():
        np.testing.assert_allclose(found[index], wanted[name][0], atol=1e-5, err_msg=name)
    features, _ = next(batches(3))
    one, other = logits(several, index, features), logits(alone, 0, features)
    assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()


def test_without_a_gradient_decay_shrinks_every_parameter_along_the_cosine(learned):
    """Norms, biases and the query too. A rate of 0 moves nothing, one of 1e-7 next to nothing."""
    filler = [(x, np.full_like(labels, -1)) for x, labels in batches(1, count=3)]
    probes = fit(filler, 3, rates=(0.0, 0.1), decays=(0.5, 1.0))
    cosine = 0.5 + 0.5 * np.cos(np.pi * np.arange(1, 4) / 3)
    for name, leaf in named(probes.params).items():
        start, also_start, *moved = leaf
        np.testing.assert_array_equal(start, also_start)
        np.testing.assert_allclose(start, named(learned.params)[name][2], atol=2e-5, err_msg=name)
        for after, decay in zip(moved, (0.5, 1.0), strict=True):
            shrunk = np.prod(1 - 0.1 * decay * cosine)
            np.testing.assert_allclose(after, shrunk * start, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["golden", "live"])
def test_training_is_the_references(kind, monkeypatch):
    reference = parity.reference(kind, "probing")
    settings = {"heads": parity.STEP_MODEL["heads"], "classes": parity.CLASSES, "eps": 1e-6}
    settings |= {"depth": parity.PROBE_DEPTH}
    start, wanted = (
        parity.classifier_params(parity.getter(reference, prefix), parity.PROBE_DEPTH)
        for prefix in ("weights/", "params/")
    )

    def create(rngs, **kwargs):
        graph, shapes, _ = base.split(AttentiveClassifier(rngs, **kwargs))
        assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, start)
        return base.merge(graph, jax.tree.map(jnp.asarray, start))

    monkeypatch.setattr(probing, "AttentiveClassifier", create)
    probes = probing.fit(
        *(zip(reference["features"], reference["labels"], strict=True), MESH),
        **{"steps": parity.PROBE_STEPS, "seed": 0, **settings},
        **{"rates": (parity.PROBE_RATE,), "decays": (parity.PROBE_DECAY,)},
    )
    wanted = named(wanted)
    for name, found in named(probes.params).items():
        apart = np.abs(found[0] - wanted[name])
        # Attention does not see a bias of its keys: that gradient is rounding, and so its moves.
        if "['qkv']['bias']" in name:
            apart = np.delete(apart, np.s_[apart.shape[-1] // 3 : 2 * apart.shape[-1] // 3], -1)
        if "['kv']['bias']" in name:
            apart = apart[apart.size // 2 :]
        assert apart.max() <= 0.01 * parity.PROBE_RATE, name


def test_views_vote_by_their_mean_softmax(learned):
    ((features, _),) = batches(4, rows=64, signal=1.0, views=(3,), count=1)
    rows = features.reshape(-1, TOKENS, WIDTH)
    each = np.asarray(logits(learned, 0, rows)).reshape(64, 3, CLASSES)
    shares = np.exp(each) / np.exp(each).sum(axis=-1, keepdims=True)
    vote = np.argmax(shares.mean(axis=1), axis=-1)
    assert np.any(vote != np.argmax(each.mean(axis=1), axis=-1))
    assert np.any(vote != np.argmax(each[:, 0], axis=-1))
    assert probing.evaluate(learned, [(features, vote)], MESH)["all"][0]["top1"] == 1.0


def test_filler_rows_count_for_nothing(learned):
    ((features, labels),) = batches(5, count=1, signal=1.0, views=(1,))
    halves = [np.where(np.arange(16) < 8, *pair) for pair in ((labels, -1), (-1, labels))]
    whole, *parts = (
        [row["top1"] for row in probing.evaluate(learned, [(features, y)], MESH)["all"]]
        for y in (labels, *halves)
    )
    assert parts[0] != parts[1]
    np.testing.assert_allclose(np.mean(parts, axis=0), whole, rtol=1e-12)
    scores = jnp.asarray(np.random.default_rng(0).standard_normal((16, CLASSES)), jnp.float32)
    lost = [probing.cross_entropy(scores[:n], jnp.asarray(halves[0][:n])) for n in (8, 16)]
    assert float(lost[1]) == pytest.approx(float(lost[0]), rel=1e-6)


def test_a_probe_that_diverged_names_nothing_rightly(learned):
    broken = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), learned.params)
    data = [(x, np.zeros_like(labels)) for x, labels in batches(6, count=1, views=(1,))]
    scores = probing.evaluate(learned._replace(params=broken), data, MESH)
    assert scores["all"][0]["top1"] == 0.0


def test_the_step_compiles_once_and_two_devices_agree_with_one(several, monkeypatch):
    traced = []
    call = AttentiveClassifier.__call__
    monkeypatch.setattr(
        AttentiveClassifier, "__call__", lambda self, x: traced.append(x.shape) or call(self, x)
    )
    two = fit(batches(1), 8, rates=(1e-2, 1e-3), decays=(0.01, 0.8), mesh=TWO)
    assert traced == [(16, TOKENS, WIDTH)]
    features, labels = next(batches(3))
    found, wanted = logits(two, 0, np.asarray(features)), logits(several, 0, features)
    assert np.abs(found - wanted).max() <= 1e-3 * np.abs(wanted).max()
    held_out = [(features[:, None], labels)]
    assert probing.evaluate(two, held_out, TWO) == probing.evaluate(several, held_out, MESH)


def test_initial_weights_and_axes():
    """The last product is scaled as the deepest block's: by the root of twice the depth."""

    def create():
        return AttentiveClassifier(nnx.Rngs(0), width=48, **PROBE | {"depth": 3}, compute=Compute())

    _, shapes, axes = base.split(nnx.eval_shape(create))
    params = jax.jit(lambda: base.split(create())[1])()
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    ranks = jax.tree.map(len, axes, is_leaf=lambda a: isinstance(a, tuple))
    assert ranks == jax.tree.map(jnp.ndim, params)
    blocks, cross = params["pooler"]["blocks"], params["pooler"]["cross"]
    for kernel in (cross["q"], cross["kv"], cross["mlp"]["fc1"], blocks["attention"]["qkv"]):
        assert np.std(kernel["kernel"]) == pytest.approx(0.02, rel=0.05)
    deepest = blocks["mlp"]["fc2"]["kernel"][2]
    for kernel in (cross["mlp"]["fc2"]["kernel"], deepest):
        assert np.std(kernel) == pytest.approx(0.02 / 6**0.5, rel=0.05)
    assert 0.01 < np.std(params["pooler"]["query"]) < 0.03
    for name, leaf in named(params).items():
        if "bias" in name or "scale" in name:
            np.testing.assert_array_equal(leaf, 1.0 if "scale" in name else 0.0)


@pytest.mark.parametrize(
    ("stream", "settings", "said"),
    [
        (lambda: iter(()), {}, ["batches", 4]),
        (lambda: batches(1, count=2), {}, ["batches", 2, 4]),
        (lambda: [(x, y + 1) for x, y in batches(1, count=4)], {}, ["labels", 4, "classes=4"]),
        (lambda: batches(1, rows=15), {"mesh": TWO}, ["=15", 2, 16]),
        (lambda: changed(labels=lambda y: np.eye(CLASSES)[y]), {}, ["labels", "(16, 4)", "argmax"]),
        (lambda: changed(labels=lambda y: y / 2), {}, ["labels", "float64"]),
        (lambda: changed(labels=lambda y: y[:0]), {}, ["labels", "(0,)"]),
        (lambda: changed(lambda x: x.mean(1)), {}, ["features", "(16, 16)", "[:, None]"]),
        (lambda: changed(lambda x: x[:, None]), {}, ["features", "(16, 1, 6, 16)"]),
        (lambda: changed(lambda x: [*x[1:], x[0, 1:]]), {}, ["features", "(6, 16)", "(5, 16)"]),
    ],
)
def test_bad_batches_are_answered(stream, settings, said):
    with refused(*said):
        fit(stream(), 4, rates=(1e-3,), **settings)


def test_a_later_batch_may_be_bad_too():
    with refused("features", "(16, 6, 8)", 16):
        fit(itertools.chain(batches(1, count=1), changed(lambda x: x[..., :8])), 4, rates=(1e-3,))


def test_features_of_torch_are_features():
    """With a gradient, in bfloat16, as a frozen encoder hands them over."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    halves = torch.bfloat16, jnp.bfloat16

    def tensors(dtype):
        for x, y in batches(1, count=2):
            yield torch.tensor(x, requires_grad=True).to(dtype), torch.tensor(y)

    rounded = [(np.float32(x.astype(halves[1])), y) for x, y in batches(1, count=2)]
    probes = [fit(each, 2, rates=(1e-2,)) for each in (tensors(halves[0]), rounded)]
    leaves = [jax.tree.leaves(each.params) for each in probes]
    assert all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True))


def test_bad_heads_and_no_labels_are_answered(learned):
    with refused("heads=3", "width=16"):
        probing.fit(batches(1), MESH, steps=1, seed=0, **PROBE | {"heads": 3})
    with refused("held-out"):
        probing.evaluate(learned, [], MESH)
