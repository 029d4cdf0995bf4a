"""The attention kernels for GPUs against plain attention, forward and backward.

Run in Python here, and lowered for a GPU; compiled and timed on one by `wmjax.bench step`. In a
model: test_models.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import lowered_for_gpu
from flax import nnx
from says import refused

from wmjax import sharding
from wmjax.nn import attention, layers, rope
from wmjax.nn.compute import Compute
from wmjax.nn.kernels import attention_gpu
from wmjax.nn.kernels import devices as kernels


def arguments(tails, lengths, dtype=jnp.float32, width=32):
    """Return query, key and value, and a gradient of what is attended to, for two clips."""
    keys = jax.random.split(jax.random.key(0), 4)
    tokens = sum(tails), sum(lengths), sum(lengths), sum(tails)
    return [
        (scale * jax.random.normal(key, (2, n, 2, width))).astype(dtype)
        for key, n, scale in zip(keys, tokens, (3, 1, 1, 1), strict=True)
    ]


def results(attend, query, key, value, gradient):
    def both(*arrays):
        out, backward = jax.vjp(attend, *arrays)
        return out, *backward(gradient)

    return jax.jit(both)(query, key, value)


def compare(found, wanted, bound):
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        np.testing.assert_allclose(one, other, rtol=0, atol=bound * np.abs(other).max())


@pytest.mark.parametrize(
    ("tails", "lengths"),
    [
        ((70, 128), (70, 128)),  # one that fills no blocks, one that does
        ((3, 64, 1), (65, 64, 1)),  # fewer queries than keys, as in the predictor's last block
        ((64,), (64,)),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "width", "bound"), [(jnp.float32, 32, 2e-6), (jnp.bfloat16, 16, 2e-2)]
)
def test_results_and_gradients_are_the_plain_ones(tails, lengths, dtype, width, bound):
    arrays = arguments(tails, lengths, dtype, width)
    found = results(lambda *x: attention_gpu.attend(*x, tails, lengths, interpret=True), *arrays)
    wanted = results(lambda *x: attention.attend(*x, tails, lengths, "xla"), *arrays)
    compare(found, wanted, bound)


def test_logits_far_from_zero_overflow_nowhere():
    """With all of them far below, the weight of a key that is not there would be infinite."""
    query, key, value, gradient = arguments((70,), (70,))
    query, key = jnp.abs(query) * 4, -jnp.abs(key) * 4
    arrays = query, key, value, gradient
    found = results(lambda *x: attention_gpu.attend(*x, (70,), (70,), interpret=True), *arrays)
    wanted = results(lambda *x: attention.attend(*x, (70,), (70,), "xla"), *arrays)
    compare(found, wanted, 1e-4)


def packed(tokens, earlier=0, rows=1, dtype=jnp.float32, width=32):
    """Return queries, keys and values of two clips in one array, a table, and the past of layer 1.

    rows: of the table: 1, or each clip's own positions. earlier: tokens of the past.
    """
    keys = jax.random.split(jax.random.key(1), 4)
    qkv = jax.random.normal(keys[0], (2, tokens, 3, 2, width)).astype(dtype)
    ids = jax.random.permutation(keys[1], rows * tokens).reshape(rows, tokens)
    table = rope.table(rope.coordinates(ids, (4, 8, 8)), width, "tiled")
    if not earlier:
        return qkv, table, None
    shape = 3, 2, earlier, 2, width
    stack = tuple(jax.random.normal(key, shape).astype(dtype) for key in keys[2:])
    own = stack[0][1], stack[1][1]
    return qkv, table, attention.LayerPast(own, stack, jnp.int32(1))


PACKED = [
    ((70,), 0, 1),
    ((3, 65), 0, 2),
    ((70,), 66, 2),  # the last block of each has rows that are not valid
    ((64,), 128, 1),
]


@pytest.mark.parametrize(
    ("dtype", "width", "bound"), [(jnp.float32, 32, 2e-6), (jnp.bfloat16, 16, 2e-2)]
)
@pytest.mark.parametrize(("lengths", "earlier", "rows"), PACKED)
def test_packed_heads_are_rotated_and_read_in_place(
    monkeypatch, in_python, lengths, earlier, rows, dtype, width, bound
):
    if dtype != jnp.float32:
        monkeypatch.setattr(attention, "TABLE", jnp.float16)
    qkv, table, past = packed(sum(lengths), earlier, rows, dtype, width)
    for rotation in (table, None):
        arrays = qkv, rotation, lengths
        found = attention.attend_packed(*arrays, "triton", past)
        compare([found], [attention.attend_packed(*arrays, "xla", past)], bound)


@pytest.mark.parametrize(("lengths", "earlier", "rows"), PACKED)
def test_gradients_of_packed_heads_are_the_plain_ones(in_python, lengths, earlier, rows):
    qkv, table, past = packed(sum(lengths), earlier, rows)

    def gradients(name):
        def loss(qkv, table, own):
            whole = past and past._replace(own=own)
            return jnp.sum(jnp.sin(attention.attend_packed(qkv, table, lengths, name, whole)))

        arguments = qkv, table, past and past.own
        wanted = (0, 2) if past else 0
        return jax.tree.leaves(jax.jit(jax.grad(loss, wanted))(*arguments))

    compare(gradients("triton"), gradients("xla"), 5e-6)
    table = None  # nothing is rotated
    compare(gradients("triton"), gradients("xla"), 5e-6)


@pytest.mark.parametrize("rows", [1, 2])
def test_every_device_works_on_its_own_rows_of_packed_heads(in_python, rows):
    mesh = sharding.make_mesh(-1, 2, jax.devices()[:2])
    arrays = packed(70, 5, rows)

    def split(qkv, table, past):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return attention.attend_packed(qkv, table, (70,), "triton", past)

    def gradient(attend, arrays):
        qkv, table, _ = arrays
        return jax.jit(jax.grad(lambda qkv: jnp.sum(jnp.sin(attend(qkv, table, None)))))(qkv)

    def plain(qkv, table, past):
        return attention.attend_packed(qkv, table, (70,), "xla", past)

    assert "shard_map" in str(jax.make_jaxpr(split)(*arrays))
    clips, everywhere = sharding.batch_sharding(mesh), jax.NamedSharding(mesh, jax.P())
    stacks = jax.NamedSharding(mesh, jax.P(None, mesh.axis_names))
    past = attention.LayerPast(clips, stacks, everywhere)
    placed = jax.device_put(arrays, (clips, everywhere if rows == 1 else clips, past))
    found = jax.jit(split)(*placed), gradient(split, placed)
    compare(found, (plain(*arrays), gradient(plain, arrays)), 5e-6)


@pytest.mark.parametrize("scan", [True, False])
def test_a_stack_frame_by_frame_is_the_frame_causal_one(monkeypatch, in_python, scan):
    """Three frames: the second and the third read the past of every layer; so do gradients."""
    monkeypatch.setattr(layers, "choose_attention", lambda *_: "triton")
    frame, frames, width = 5, 3, 32
    sizes = {"depth": 3, "width": width, "heads": 2, "hidden": width, "embed": "embed"}
    blocks = layers.Block(nnx.Rngs(0), **sizes, compute=Compute(scan=scan))
    x_BND = jax.random.normal(jax.random.key(2), (2, frame * frames, width))
    places = rope.coordinates(jnp.arange(frame * frames)[None], (frames, 1, frame))
    graph, params = nnx.split(blocks)

    def at_once(params, x_BND):
        table = rope.table(places, width // 2, "tiled")
        return layers.run(nnx.merge(graph, params), x_BND, table, layers.TokenLayout(frame=frame))

    def one_by_one(params, x_BND):
        blocks, outputs = nnx.merge(graph, params), []
        past = layers.no_past(blocks, len(x_BND))
        for start in range(0, frame * frames, frame):
            own = [place[:, start : start + frame] for place in places]
            y_BND, past = layers.run_with_past(
                blocks, x_BND[:, start : start + frame], rope.table(own, width // 2, "tiled"), past
            )
            outputs.append(y_BND)
        return jnp.concatenate(outputs, axis=1)

    def both(run):
        def loss(params, x_BND):
            return jnp.sum(jnp.sin(run(params, x_BND)))

        found = jax.jit(lambda *x: (run(*x), jax.grad(loss, (0, 1))(*x)))(params, x_BND)
        return jax.tree.leaves(found)

    found = both(one_by_one)
    assert ("attend_in_place", (frame,)) in in_python
    compare(found, both(at_once), 2e-5)


def test_every_device_works_on_its_own_rows():
    mesh = sharding.make_mesh(-1, 2, jax.devices()[:2])
    lengths = (70, 5)
    arrays = arguments(lengths, lengths)

    def split(*arrays):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return attention_gpu.attend(*arrays, lengths, lengths, interpret=True)

    # XLA would split the kernels' Python by itself, but not kernels.
    assert "shard_map" in str(jax.make_jaxpr(split)(*arrays[:3]))
    found = results(split, *jax.device_put(arrays, sharding.batch_sharding(mesh)))
    wanted = results(lambda *x: attention.attend(*x, lengths, lengths, "xla"), *arrays)
    compare(found, wanted, 2e-6)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # since jax 0.11
@pytest.mark.parametrize("width", [16, 32, 64])
def test_the_kernels_lower_for_a_gpu_once_for_all_layers(width):
    tails, lengths = (992, 1408), (1496, 1536)

    def layers(query, key, value):
        return sum(attention_gpu.attend(query, i * key, value, tails, lengths) for i in (1, 2))

    def both(*arrays, gradient):
        out, backward = jax.vjp(layers, *arrays)
        return out, *backward(gradient)

    *arrays, gradient = arguments(tails, lengths, jnp.bfloat16, width)
    text = lowered_for_gpu(functools.partial(both, gradient=gradient), *arrays)
    assert text.count("__gpu$xla.gpu.triton(") == 3


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize(("earlier", "width"), [(0, 16), (66, 32), (258, 64)])
def test_the_kernel_of_packed_heads_lowers_for_a_gpu(earlier, width):
    def attend(qkv, table, past):
        return attention.attend_packed(qkv, table, (258,), "triton", past)

    text = lowered_for_gpu(attend, *packed(258, earlier, 1, jnp.bfloat16, width))
    assert text.count("__gpu$xla.gpu.triton(") == 1

    def gradient(qkv, table):
        def loss(qkv):
            return jnp.sum(attention.attend_packed(qkv, table, (200, 58), "triton"))

        return jax.grad(loss)(qkv)

    text = lowered_for_gpu(gradient, *packed(258, 0, 2, jnp.bfloat16, width)[:2])
    assert text.count("__gpu$xla.gpu.triton(") == 3


def test_lengths_that_do_not_add_up_are_refused():
    query, key, value, _ = arguments((70,), (70,))
    with pytest.raises(AssertionError):
        attention_gpu.attend(query, key, value, (69,), (70,), interpret=True)


def test_narrow_heads_and_short_sequences_go_to_the_kernels(monkeypatch):
    monkeypatch.setattr(attention_gpu, "attend", lambda query, *_: query + 1)
    monkeypatch.setattr(attention_gpu, "attend_in_place", lambda query, *_: query[:, :, 0] + 1)
    monkeypatch.setattr(attention, "cudnn_attention", lambda query, *_: query + 2)

    def chosen(width, *lengths):
        x = jnp.zeros((1, sum(lengths), 1, width))
        return attention.attend(x, x, x, lengths, lengths, "fastest").max()

    assert chosen(32, 3000) == chosen(64, 504, 128) == 1
    assert chosen(64, 2048) == 2

    def with_past(earlier):
        past = attention.LayerPast.alone((jnp.zeros((1, earlier, 1, 64)),) * 2)
        qkv = jnp.zeros((1, 258, 3, 1, 64))
        return attention.attend_packed(qkv, None, (258,), "fastest", past).max()

    assert with_past(0) == with_past(516) == 1
    assert with_past(774) == 2


def test_it_is_refused_where_it_cannot_run(monkeypatch):
    with refused("model.attention='triton'", "cpu", "bfloat16", 32):
        attention.choose_attention("triton", jnp.dtype(jnp.bfloat16), 32)
    monkeypatch.setattr(attention, "modern_gpu", lambda: True)
    assert attention.choose_attention("triton", jnp.dtype(jnp.bfloat16), 32) == "triton"
    with refused("model.attention='triton'", 80, jax.__version__, "Ampere", 16, 32, 64):
        attention.choose_attention("triton", jnp.dtype(jnp.bfloat16), 80)
    monkeypatch.setattr(attention, "has_triton", lambda: False)  # jax will drop it
    assert attention.choose_attention("auto", jnp.dtype(jnp.bfloat16), 32) == "cudnn"


class Device:
    def __init__(self, platform, capability):
        self.platform = platform
        if capability:
            self.compute_capability = capability


@pytest.mark.parametrize(
    ("platform", "capability", "modern"),
    [
        ("gpu", "9.0", True),
        ("gpu", "10.3", True),
        ("gpu", "8.0", True),
        ("gpu", "7.5", False),  # a T4, as on Colab
        ("gpu", "gfx942", False),
        ("gpu", None, False),
        ("tpu", None, False),
    ],
)
def test_gpus_that_take_the_kernels(monkeypatch, platform, capability, modern):
    monkeypatch.setattr(
        jax, "devices", lambda: [Device("gpu", "9.0"), Device(platform, capability)]
    )
    assert kernels.modern_gpu() is modern
