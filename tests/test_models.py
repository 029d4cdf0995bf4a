"""V-JEPA 2 as the step uses it: loss, gradients, token dropping, variants, sizes, errors."""

import functools

import built
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clips import batch_of, random_batch
from flax import nnx
from says import refused

from wmjax.errors import UserError
from wmjax.models import base, encoder
from wmjax.nn import attention, float8, gelu, layers

TINY = {
    "width": 32,
    "depth": 2,
    "heads": 2,
    "patch": 8,
    "predictor_width": 24,
    "predictor_depth": 2,
    "predictor_heads": 2,
    "dtype": "float32",
}
CLIP = (4, 16, 24, 3)  # not square: a grid of 2 x 2 x 3
TOKENS = 12
BUDGETS = ((4, 6), (3, 9))
# Compiling is nearly all the time these tests take.
jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


def create(**cfg):
    return built.create(**(TINY | cfg))


@functools.cache
def shaken_params():
    """Return parameters larger than at the start, where features hardly differ and biases are 0."""
    _, shapes, _ = base.split(nnx.eval_shape(create))
    rng = np.random.default_rng(0)

    def draw(path, shape):
        centre = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(centre + 0.1 * rng.normal(size=shape.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def model_with(params, **cfg):
    return base.merge(base.split(nnx.eval_shape(lambda: create(**cfg)))[0], params)


@functools.cache
def loss_and_gradients(**cfg):
    """Return a jitted (params, target, batch) -> ((loss, metrics), gradients of both)."""
    graphdef = base.split(nnx.eval_shape(lambda: create(**cfg)))[0]

    def loss(params, target, batch):
        output = base.merge(graphdef, params).loss(target, batch, jax.random.key(0))
        return output.loss, output

    return jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def batch(seed=0, masks=2):
    there = ((True, True), (False, True))
    return random_batch(seed, (2, 2, *CLIP), TOKENS, BUDGETS[:masks], there)


def run_loss(batch, **cfg):
    params = shaken_params()
    return loss_and_gradients(**cfg)(params, params["encoder"], batch)


def test_the_fused_norm_gives_the_same_loss_and_gradients(monkeypatch):
    """By the kernel's Python; unrolled, so that it is there between the blocks too."""
    from wmjax.nn.kernels import norm_gpu

    calls = []

    def add_norm(*args):
        calls.append(args)
        return kernel(*args, True)

    kernel = norm_gpu.add_norm
    monkeypatch.setattr(norm_gpu, "add_norm", add_norm)
    monkeypatch.setattr(layers, "choose_norm", lambda wanted, dtype: wanted)
    (loss, _), gradients = run_loss(batch(masks=1), norm="fused", scan=False)
    (plain_loss, _), plain_gradients = run_loss(batch(masks=1), norm="xla", scan=False)
    assert calls
    np.testing.assert_allclose(loss, plain_loss, rtol=1e-6)
    for one, other in zip(*map(jax.tree.leaves, (gradients, plain_gradients)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max() + 1e-9)


def test_a_float8_target_changes_loss_and_gradients_little(monkeypatch):
    monkeypatch.setattr(float8, "check", lambda key: None)
    (loss, _), (gradients, _) = run_loss(batch(), target_dtype="float8")
    (plain_loss, _), (plain_gradients, _) = run_loss(batch())
    assert float(loss) != float(plain_loss)
    np.testing.assert_allclose(loss, plain_loss, rtol=0.01)
    apart, size = (
        np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)))
        for tree in (jax.tree.map(np.subtract, gradients, plain_gradients), plain_gradients)
    )
    assert apart < 0.1 * size


def test_the_attention_kernels_give_the_same_loss_and_gradients(monkeypatch, in_python):
    """By the kernels' Python, for two masks at once and the predictor's last block."""
    monkeypatch.setattr(layers, "choose_attention", lambda wanted, *_: wanted)
    (loss, _), gradients = run_loss(batch(), attention="triton", remat="dots")
    (plain_loss, _), plain_gradients = run_loss(batch(), attention="xla", remat="dots")
    assert {
        ("attend_in_place", (TOKENS,)),  # the target encoder's tokens
        ("attend_and_keep", (4, 3)),  # context tokens
        ("gradient_in_place", (4, 3)),
        ("attend", (6, 9), (10, 12)),  # target tokens alone, from context and target
    } <= set(in_python)
    np.testing.assert_allclose(loss, plain_loss, rtol=1e-6)
    for one, other in zip(*map(jax.tree.leaves, (gradients, plain_gradients)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max() + 1e-9)


def paths(tree):
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(tree)}


# Loss and gradients


def test_gradient_reaches_all_but_the_target_and_the_other_mask_tokens():
    _, (gradients, to_target) = run_loss(batch())
    mask_tokens = np.abs(gradients["predictor"]["mask_tokens"]).max(axis=(1, 2, 3))
    assert np.flatnonzero(mask_tokens).tolist() == [1]
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))
    assert all(np.abs(g).max() == 0 for g in jax.tree.leaves(to_target))


def test_the_output_is_float32_and_two_batches_compile_once():
    (loss, output), _ = run_loss(batch())
    run_loss(batch(seed=1))
    assert loss_and_gradients()._cache_size() == 1
    floats = [(t.loss, t.prediction_RMD, t.target_RMD) for t in output.terms.values()]
    assert {leaf.dtype for leaf in jax.tree.leaves(floats)} == {jnp.dtype("float32")}
    losses = [float(term.loss) for term in output.terms.values()]
    assert list(output.terms) == ["0", "1"]
    assert loss == output.loss
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-6)


def test_missing_views_count_for_nothing_and_views_share_their_instants_masks():
    whole = batch()
    (loss, output), _ = run_loss(whole)
    noise = whole.observation.video_BVTHWC.copy()
    noise[1, 0] = 0
    masks = list(zip(whole.target.context_ids_BK, whole.target.target_ids_BM, strict=True))
    (same, same_output), _ = run_loss(batch_of(noise, masks, whole.observation.view_mask_BV))
    assert same == loss
    for name, term in output.terms.items():
        assert same_output.terms[name].loss == term.loss

    params = shaken_params()
    forward = jit(functools.partial(model_with(params).loss, key=None))
    alone = []  # each view that is there, as an instant of its own
    for instant, view in ((0, 0), (0, 1), (1, 1)):
        video = whole.observation.video_BVTHWC[instant : instant + 1, view : view + 1]
        one = batch_of(video, [(c[[instant]], t[[instant]]) for c, t in masks])
        alone.append(forward(params["encoder"], one).loss)
    assert float(loss) == pytest.approx(np.mean(alone), rel=1e-5)


@pytest.mark.parametrize(
    "variant", [{"remat": "full"}, {"remat": "dots", "scan": False}, {"scan": False}], ids=str
)
def test_scan_and_remat_change_nothing(variant):
    (loss, _), (gradients, _) = run_loss(batch(masks=1))
    (other, _), (other_gradients, _) = run_loss(batch(masks=1), **variant)
    assert float(other) == pytest.approx(float(loss), rel=1e-6)
    others = paths(other_gradients)
    for name, g in paths(gradients).items():
        np.testing.assert_allclose(others[name], g, atol=1e-5 * np.abs(g).max(), err_msg=name)


def test_bfloat16_is_near_float32_and_its_gradients_are_float32():
    (loss, _), (gradients, _) = run_loss(batch(masks=1))
    (other, _), (other_gradients, _) = run_loss(batch(masks=1), dtype="bfloat16")
    assert float(other) == pytest.approx(float(loss), rel=0.01)
    others = paths(other_gradients)
    for name, g in paths(gradients).items():
        assert others[name].dtype == jnp.float32, name
        assert np.linalg.norm(others[name] - g) <= 0.06 * np.linalg.norm(g), name


# Tokens


def test_context_depends_on_the_kept_tokens_alone():
    model = model_with(shaken_params())
    video = batch().observation.video_BVTHWC[:1, 0]
    ids = jnp.asarray([[0, 4, 11]], jnp.int32)
    changed = 255 - video
    for cell in ids[0]:
        t, h, w = np.unravel_index(cell, (2, 2, 3))
        where = np.s_[:, 2 * t : 2 * t + 2, 8 * h : 8 * h + 8, 8 * w : 8 * w + 8]
        changed[where] = video[where]
    encode = jit(model.encode)
    np.testing.assert_array_equal(encode(video, ids), encode(changed, ids))
    assert np.abs(encode(video, ids) - encode(255 - video, ids)).max() > 0.1


@pytest.mark.parametrize("kind", ["tiled", "sincos"])
def test_permuted_ids_give_permuted_features(kind):
    model = model_with(shaken_params(), rope=kind)
    video = batch().observation.video_BVTHWC[:, 0]
    order = np.random.default_rng(1).permutation(TOKENS)
    ids = jnp.asarray([order, order], jnp.int32)
    features = jit(model.encode)(video)
    np.testing.assert_allclose(jit(model.encode)(video, ids), features[:, order], atol=2e-5)
    context, target, (a, b) = ids[:, :5], ids[:, 5:], (np.arange(5)[::-1], np.arange(7)[::-1])
    kept = features[:, order[:5]]
    predict = jit(functools.partial(model.predict, grid=(2, 2, 3)))
    prediction = predict(kept, context, target)
    reverse = predict(kept[:, a], context[:, a], target[:, b])
    np.testing.assert_allclose(reverse, prediction[:, b], atol=2e-5)
    assert jnp.std(prediction, axis=1).min() > 1e-4  # it knows where its targets are


def test_sincos_tells_apart_patches_that_look_alike():
    """Rotation alone cannot: attention over equal values gives that value."""
    grey = np.full((1, *CLIP), 128, np.uint8)
    spread = {
        kind: jnp.std(jit(model_with(shaken_params(), rope=kind).encode)(grey), axis=1).max()
        for kind in ("interleaved", "sincos")
    }
    assert spread["interleaved"] < 1e-5
    assert spread["sincos"] > 0.1


def test_bytes_are_normalised_and_floats_taken_as_they_are():
    model = model_with(shaken_params())
    video = batch().observation.video_BVTHWC[:, 0]
    pixels = (video / np.float32(255) - np.float32([0.485, 0.456, 0.406])) / np.float32(
        [0.229, 0.224, 0.225]
    )
    encode = jit(model.encode)
    np.testing.assert_allclose(encode(video), encode(pixels), atol=1e-5)


# Sizes


@pytest.mark.parametrize(
    ("size", "encoder_count", "predictor_count"),
    [
        ("base", 86_236_416, None),
        ("large", 303_885_312, 22_086_016),
        ("huge", 631_648_000, None),
        ("giant", 1_012_173_952, None),
        ("gigantic", 1_843_923_840, None),
    ],
)
def test_parameter_counts_are_the_references(size, encoder_count, predictor_count):
    model = built.blueprint(size=size).abstract
    _, params, axes = base.split(model)
    count = {k: sum(p.size for p in jax.tree.leaves(v)) for k, v in params.items()}
    assert count["encoder"] == encoder_count
    assert predictor_count in (None, count["predictor"])
    ranks = jax.tree.map(len, axes, is_leaf=lambda a: isinstance(a, tuple))
    assert ranks == jax.tree.map(jnp.ndim, params)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))


def test_small_sizes_are_usual_vits():
    assert encoder.resolve_size("tiny", 0, 0, 0, 0.0) == {
        **{"width": 192, "depth": 12, "heads": 3, "hidden": 768}
    }
    assert encoder.resolve_size("small", 0, 6, 0, 2.0) == {
        **{"width": 384, "depth": 6, "heads": 6, "hidden": 768}
    }


def test_flops_of_a_large_step():
    """85.4 TFLOP were counted for a step that embeds every patch before dropping tokens."""
    model = built.blueprint(size="large").abstract
    masks = [(np.zeros((24, k)), np.zeros((24, m))) for k, m in ((504, 992), (128, 1408))]
    shapes = batch_of(np.broadcast_to(np.uint8(0), (24, 1, 16, 256, 256, 3)), masks)
    assert model.flops(shapes) == pytest.approx(85.4e12, rel=0.01)


def test_flops_are_those_xla_counts():
    """Of a forward pass: unrolled, and wide enough that the products are nearly everything."""
    model = nnx.eval_shape(lambda: create(width=256, heads=2, scan=False))
    blocks = model.encoder.blocks
    graphdef, params = nnx.split(blocks)

    def forward(params, x):
        return layers.run(nnx.merge(graphdef, params), x, None)

    x = jax.ShapeDtypeStruct((1, 64, 256), jnp.float32)
    counted = jax.jit(forward).lower(params, x).compile().cost_analysis()["flops"]
    assert layers.flops(blocks, 64) == pytest.approx(counted, rel=0.05)


def test_initial_weights():
    init = jit(lambda: base.split(create(width=96, depth=3, heads=3))[1]["encoder"])
    params = init()
    blocks = params["blocks"]
    kernels = [blocks["attention"]["qkv"], blocks["mlp"]["fc1"], params["patch_embed"]]
    for kernel in (k["kernel"] for k in kernels):
        assert np.std(kernel) == pytest.approx(0.02, rel=0.03)
    for scaled in (blocks["attention"]["proj"], blocks["mlp"]["fc2"]):
        wanted = 0.02 / np.sqrt(2 * np.arange(1, 4))
        np.testing.assert_allclose(np.std(scaled["kernel"], axis=(1, 2)), wanted, rtol=0.05)
    for name, leaf in paths(params).items():
        if "bias" in name or "scale" in name:
            np.testing.assert_array_equal(leaf, 1.0 if "scale" in name else 0.0)
    first, second, _ = blocks["mlp"]["fc1"]["kernel"]
    assert np.abs(first - second).max() > 0.01  # layers are drawn apart


def test_target_follows_the_encoder():
    model = nnx.eval_shape(create)
    _, params, _ = base.split(model)
    assert model.followed(params) is params["encoder"]


def test_the_token_grid_of_the_settings_is_the_encoders():
    assert built.blueprint(**TINY).token_grid(*CLIP[:3]) == (2, 2, 3)
    assert nnx.eval_shape(create).encoder.token_grid(*CLIP[:3]) == (2, 2, 3)


# Errors


@pytest.mark.parametrize(
    ("cfg", "named"),
    [
        ({"size": "enormous"}, ["model.size='enormous'", "tiny", "small"]),
        ({"rope": "spiral"}, ["model.rope='spiral'", "tiled"]),
        ({"remat": "some"}, ["model.remat='some'", "none", "dots", "full"]),
        ({"dtype": "float16"}, ["model.dtype='float16'", "bfloat16"]),
        ({"attention": "flash"}, ["model.attention='flash'", "cudnn"]),
        ({"attention": "cudnn"}, ["model.attention='cudnn'", "cpu", "Ampere", 8, 128]),
        ({"heads": 5}, ["model.heads=5", "model.width=32"]),
        (
            {"predictor_width": 26, "predictor_heads": 2},
            ["model.predictor_heads=2", "model.predictor_width=26"],
        ),
        (
            {"predictor_width": 28, "rope": "sincos"},
            ["model.predictor_width=28", "model.rope='sincos'", 8],
        ),
        ({"mask_index": 10}, ["model.mask_index=10", 10, 10]),
    ],
)
def test_a_bad_value_is_named(cfg, named):
    with refused(*named):
        nnx.eval_shape(lambda: create(**cfg))


def test_an_unknown_model_is_answered_with_those_there_are():
    for name in ("vjepa9", "layers", "base"):
        with refused(f"model.name='{name}'", "vjepa2"):
            base.family_named(name)


def test_clips_must_divide():
    blueprint = built.blueprint(**TINY)
    for size, named in (
        ((5, 16, 24), ["frames", 5, "tubelet=2"]),
        ((4, 16, 20), ["width", 20, "patch=8"]),
        ((0, 16, 24), ["frames", 0, "tubelet=2"]),
    ):
        with refused(*named):
            blueprint.token_grid(*size)


@pytest.mark.parametrize(
    ("backend", "dtype", "head_dim", "chosen"),
    [
        ("gpu", jnp.bfloat16, 64, "fastest"),
        ("gpu", jnp.bfloat16, 80, "cudnn"),
        ("gpu", jnp.bfloat16, 136, "xla"),
        ("gpu", jnp.bfloat16, 26, "xla"),
        ("gpu", jnp.float32, 64, "xla"),
        ("old gpu", jnp.bfloat16, 64, "xla"),
        ("tpu", jnp.bfloat16, 64, "splash"),
        ("cpu", jnp.bfloat16, 64, "xla"),
    ],
)
def test_auto_attention(monkeypatch, backend, dtype, head_dim, chosen):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(attention, "modern_gpu", lambda: backend == "gpu")
    assert attention.choose_attention("auto", jnp.dtype(dtype), head_dim) == chosen


def test_the_polynomial_gelu_is_the_exact_one_to_bfloat16():
    x = jnp.linspace(-20, 20, 400_001)
    exact, ours = (lambda x, kind=kind: gelu.gelu(x, kind) for kind in ("exact", "polynomial"))
    np.testing.assert_allclose(ours(x), exact(x), atol=1e-4)
    slopes = [jax.vmap(jax.grad(f))(x) for f in (ours, exact)]
    np.testing.assert_allclose(*slopes, atol=3e-4)
    narrow = x.astype(jnp.bfloat16)
    assert ours(narrow).dtype == jax.grad(lambda x: ours(x).sum())(narrow).dtype == jnp.bfloat16
    np.testing.assert_array_equal(gelu.gelu(narrow), ours(narrow))  # what auto is there
    np.testing.assert_array_equal(gelu.gelu(x), exact(x))


def test_a_gpu_computes_gelu_by_tanh_in_bfloat16(monkeypatch):
    """This is the form that cuBLAS computes at the end of a product."""
    x = jnp.linspace(-20, 20, 4_001)
    narrow = x.astype(jnp.bfloat16)
    exact, ours = (lambda x, kind=kind: gelu.gelu(x, kind) for kind in ("exact", "tanh"))
    np.testing.assert_allclose(ours(x), exact(x), atol=5e-4)
    slopes = [jax.vmap(jax.grad(f))(x) for f in (ours, exact)]
    np.testing.assert_allclose(*slopes, atol=3e-4)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_array_equal(gelu.gelu(narrow), ours(narrow))
    np.testing.assert_array_equal(gelu.gelu(x), exact(x))


def test_sequences_side_by_side_are_those_alone():
    """Two masks' contexts in one pass: each sees itself only, whatever the other holds."""
    model = model_with(shaken_params())
    video = jax.random.normal(jax.random.key(0), (2, *CLIP))
    ids = [jnp.tile(jnp.array([row], jnp.int32), (2, 1)) for row in ([0, 3, 5], [1, 2, 4, 6, 7])]
    together = jit(model.encoder, static_argnums=2)(video, jnp.concatenate(ids, axis=1), (3, 5))
    alone = [jit(model.encode)(video, row) for row in ids]
    np.testing.assert_allclose(together, jnp.concatenate(alone, axis=1), atol=1e-6)


@pytest.mark.parametrize(
    "key", ["width", "depth", "heads", "patch", "predictor_depth", "mlp_ratio"]
)
def test_sizes_of_somebody_elses_configuration_are_bounded(key):
    with pytest.raises(UserError, match=f"model.{key}=1000000000"):
        base.settings_of({"name": "vjepa2", "size": "tiny", key: 10**9})


@pytest.mark.parametrize("key", ["frames", "views", "state_size"])
def test_sizes_of_clips_are_bounded(key):
    with pytest.raises(UserError, match=f"{key} of a clip=1000000000"):
        base.InputSpec(**{"frames": 16, "height": 64, "width": 64, key: 10**9})
