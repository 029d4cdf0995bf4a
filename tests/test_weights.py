"""Weights in and out, without torch: files are written here as their formats say."""

import dataclasses
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc

import built
import jax
import jax.numpy as jnp
import micro
import ml_dtypes
import numpy as np
import pytest
import weight_files as files
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file
from says import holds, lines_with, refused, says
from weight_files import MODEL, SIZES

from wmjax import sharding
from wmjax.errors import UserError
from wmjax.models import base
from wmjax.models.classifier import AttentiveClassifier
from wmjax.nn.compute import Compute
from wmjax.nn.positions import bicubic
from wmjax.run.checkpoint import Checkpoints
from wmjax.step import TrainState
from wmjax.weights import __main__ as door
from wmjax.weights import export, load, open_pretrained, tables
from wmjax.weights.export import model_card, names_and_shapes, transformers_config
from wmjax.weights.images import Pixels
from wmjax.weights.load import assemble, check, describe, leaves_of

CLASSIFIER = {"width": 36, "heads": 2, "classes": 12, "depth": 2, "eps": 1e-6}


@pytest.fixture(scope="module")
def tensors():
    return files.draw(files.vjepa2_shapes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tensors):
    return files.write(tmp_path_factory.mktemp("vjepa2"), tensors, files.vjepa2_config())


@pytest.fixture(scope="module")
def abstract():
    return built.shapes(**MODEL)


@pytest.fixture(scope="module")
def params(folder, abstract):
    return load(open_pretrained(folder), abstract, built.settings(**MODEL))


def probe_shapes():
    settings = CLASSIFIER | {"compute": Compute(attention="xla")}
    return base.split(nnx.eval_shape(lambda: AttentiveClassifier(nnx.Rngs(0), **settings)))[1]


def same(ours, theirs):
    np.testing.assert_array_equal(ours, theirs, strict=True)


def same_files(one, other):
    """Compare bit for bit: NaN and -0.0 too."""
    one, other = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert one.keys() == other.keys()
    for name in one:
        same(one[name].view(np.uint32), other[name].view(np.uint32))


# In


def test_every_tensor_is_where_it_belongs(tensors, params):
    def linear(name, found):
        same(found["kernel"], tensors[f"{name}.weight"].T)
        same(found["bias"], tensors[f"{name}.bias"])

    def norm(name, found):
        same(found["scale"], tensors[f"{name}.weight"])
        same(found["bias"], tensors[f"{name}.bias"])

    encoder, predictor = params["encoder"], params["predictor"]
    patches = "encoder.embeddings.patch_embeddings.proj"
    for d, t, p in ((0, 0, 1), (7, 1, 2)):
        same(
            encoder["patch_embed"]["kernel"][t, p, :, :, d],
            tensors[f"{patches}.weight"][d, :, t, p].T,
        )
    same(encoder["patch_embed"]["bias"], tensors[f"{patches}.bias"])
    norm("encoder.layernorm", encoder["norm"])
    norm("predictor.layernorm", predictor["norm"])
    linear("predictor.embeddings.predictor_embeddings", predictor["embed"])
    linear("predictor.proj", predictor["proj"])
    same(predictor["mask_tokens"], tensors["predictor.embeddings.mask_tokens"])
    for stack, part, depth in (("encoder", encoder, 3), ("predictor", predictor, 2)):
        for i in range(depth):
            block = jax.tree.map(lambda leaf, i=i: leaf[i], part["blocks"])
            name = f"{stack}.layer.{i}"
            norm(f"{name}.norm1", block["norm1"])
            norm(f"{name}.norm2", block["norm2"])
            linear(f"{name}.attention.proj", block["attention"]["proj"])
            linear(f"{name}.mlp.fc1", block["mlp"]["fc1"])
            linear(f"{name}.mlp.fc2", block["mlp"]["fc2"])
            thirds = zip(
                ("query", "key", "value"),
                np.split(block["attention"]["qkv"]["kernel"], 3, axis=1),
                np.split(block["attention"]["qkv"]["bias"], 3),
                strict=True,
            )
            for what, kernel, bias in thirds:
                linear(f"{name}.attention.{what}", {"kernel": kernel, "bias": bias})


def test_the_configuration_gives_the_arguments_of_the_model(folder):
    source = open_pretrained(folder)
    assert source.model == {**MODEL, "rope": "tiled"}
    assert source.parts == ("encoder", "predictor")
    assert (source.clip, source.classifier) == ({"frames": 8, "size": 16}, {})


def test_what_the_configuration_leaves_out_is_as_in_transformers(tmp_path, tensors):
    files.write(tmp_path, tensors, {"model_type": "vjepa2"})
    model = open_pretrained(tmp_path).model
    (large, heads), predictor = (model["width"], model["heads"]), model["predictor_width"]
    assert (large, heads, model["depth"], model["mlp_ratio"], predictor) == (1024, 16, 24, 4.0, 384)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_halves_become_float32(tmp_path, tensors, abstract, dtype):
    halves = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    files.write(tmp_path, halves, files.vjepa2_config())
    params = load(open_pretrained(tmp_path), abstract, built.settings(**MODEL))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    fc1 = halves["encoder.layer.1.mlp.fc1.weight"].astype(np.float32).T
    same(params["encoder"]["blocks"]["mlp"]["fc1"]["kernel"][1], fc1)


def test_shards_are_one_model(tmp_path, tensors, abstract, params):
    files.write(tmp_path, tensors, files.vjepa2_config(), shards=3)
    jax.tree.map(same, load(open_pretrained(tmp_path), abstract, built.settings(**MODEL)), params)


def test_every_leaf_lands_on_its_sharding(folder, params):
    mesh = sharding.make_mesh(2, 4)
    _, shapes, axes = base.split(built.abstract(**MODEL))

    def place(axes, leaf):
        where = sharding.parameter_sharding(mesh, axes, leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    wanted = jax.tree.map(place, axes, shapes, is_leaf=lambda x: isinstance(x, tuple))
    found = load(open_pretrained(folder), wanted, built.settings(**MODEL))
    jax.tree.map(same, found, params)
    assert jax.tree.map(lambda a: a.sharding, found) == jax.tree.map(lambda a: a.sharding, wanted)
    qkv = found["encoder"]["blocks"]["attention"]["qkv"]["kernel"]
    assert {shard.data.shape for shard in qkv.addressable_shards} == {(3, 9, 108)}


def test_a_part_is_loaded_alone(folder, abstract, params):
    """The predictor's names are not unused then: nobody asked for them."""
    other = {**MODEL, "predictor_width": 24, "predictor_depth": 1}
    found = load(open_pretrained(folder), {"encoder": abstract["encoder"]}, built.settings(**other))
    assert found.keys() == {"encoder"}
    jax.tree.map(same, found["encoder"], params["encoder"])


def test_the_host_holds_one_parameter_and_one_tensor(tmp_path):
    """Of many layers, so that a second copy of the weights would be many times as much."""
    sizes = SIZES | {"depth": 12, "width": 96, "hidden": 384}
    model = MODEL | {"depth": 12, "width": 96, "mlp_ratio": 4.0}
    files.write(tmp_path, files.draw(files.vjepa2_shapes(sizes)), files.vjepa2_config(sizes))
    leaves = leaves_of(built.shapes(**model))
    source = open_pretrained(tmp_path)
    largest = 12 * 96 * 384 * 4
    assert sum(leaf.size for leaf in leaves.values()) * 4 > 3 * largest
    next(assemble(source, leaves))  # what is built once
    tracemalloc.start()
    for _ in assemble(source, leaves):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert largest < peak < 2.3 * largest  # the next parameter is there before the last one goes


# The probe


def test_a_classifier_is_loaded_and_written_back(tmp_path):
    tensors = files.draw(files.classifier_shapes())
    labels = [f"class {i}" for i in range(12)]
    config = files.vjepa2_config(
        num_pooler_layers=2, id2label={str(i): label for i, label in enumerate(labels)}
    )
    source = open_pretrained(files.write(tmp_path / "in", tensors, config))
    assert source.classifier == CLASSIFIER
    assert source.labels == tuple(labels)
    assert source.parts == ("encoder", "predictor", "pooler", "head")
    wanted = built.shapes(**MODEL) | probe_shapes()
    params = load(source, wanted, built.settings(**MODEL))

    cross = "pooler.cross_attention_layer"
    k, v = (tensors[f"{cross}.cross_attn.{x}_proj.weight"].T for x in "kv")
    same(params["pooler"]["cross"]["kv"]["kernel"], np.concatenate([k, v], axis=1))
    same(params["head"]["kernel"], tensors["classifier.weight"].T)
    export(
        params,
        MODEL,
        tmp_path / "out",
        frames=8,
        size=16,
        classifier=source.classifier,
        labels=source.labels,
    )
    same_files(tmp_path / "in", tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["architectures"] == ["VJEPA2ForVideoClassification"]
    assert list(written["id2label"].values()) == labels
    assert open_pretrained(tmp_path / "out").classifier == CLASSIFIER


# Out


def test_out_and_in_again_is_bit_exact(tmp_path, folder, params):
    kernel = params["predictor"]["proj"]["kernel"]
    odd = kernel.at[0, :4].set(jnp.array([jnp.nan, -0.0, jnp.inf, 1e-42]))
    params = {
        **params,
        "predictor": {
            **params["predictor"],
            "proj": {**params["predictor"]["proj"], "kernel": odd},
        },
    }
    export(params, MODEL, tmp_path, frames=8, size=16)
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    tensors = load_file(tmp_path / "model.safetensors")
    wanted = load_file(folder / "model.safetensors")
    proj = tensors.pop("predictor.proj.weight"), wanted.pop("predictor.proj.weight")
    same(proj[0].view(np.uint32)[:4, 0], np.asarray(odd[0, :4]).view(np.uint32))
    same(proj[0][:, 1:], proj[1][:, 1:])
    assert tensors.keys() == wanted.keys()
    jax.tree.map(same, tensors, wanted)
    back = load(open_pretrained(tmp_path), jax.eval_shape(lambda: params), built.settings(**MODEL))
    jax.tree.map(lambda a, b: same(*(np.asarray(x).view(np.uint32) for x in (a, b))), back, params)


def test_the_card_tells_of_the_training(tmp_path, params):
    config = {"optim": {"learning_rate": 4.6e-5}}
    settings = {"config": config, "metrics": {"validation/relative": 0.51234567}}
    export(params, MODEL, tmp_path, frames=8, size=16, **settings)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| validation/relative | 0.512346 |" in card
    assert '"learning_rate": 4.6e-05' in card
    assert "torch.rand(1, 8, 3, 16, 16)" in card
    settings = json.loads((tmp_path / "config.json").read_text())
    assert not holds(card, "1e-05", "1e-06")
    assert holds(model_card(settings, {}, {}, eps=1e-5), "1e-05", "1e-06")
    pixels = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    assert (pixels["size"], pixels["crop_size"]["width"]) == ({"shortest_edge": 18}, 16)


def test_ratios_survive_that_transformers_cuts_the_product():
    for model, hidden in (
        ({"size": "giant"}, 6144),
        ({"size": "gigantic"}, 8192),
        (MODEL | {"width": 22, "heads": 1, "mlp_ratio": 30 / 22}, 30),  # 29.999999999999996
    ):
        settings = transformers_config(describe(built.settings(**model)), 16, 256)
        assert int(settings["hidden_size"] * settings["mlp_ratio"]) == hidden


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope": "interleaved"}, ["model.rope='interleaved'", "'tiled'"]),
        ({"position_grid": 4}, ["model.position_grid=4", 0]),
        ({"mask_index": 0}, ["model.mask_index=0", 1]),
        ({"mlp_ratio": 1.5}, ["encoder.blocks.mlp.fc1.bias", "(3, 60)", "(3, 54)"]),
    ],
)
def test_what_transformers_would_compute_otherwise_is_not_written(tmp_path, params, changes, named):
    with refused(*named):
        export(params, MODEL | changes, tmp_path / "out", frames=8, size=16)
    assert not (tmp_path / "out").exists()


def test_one_mask_token_goes_in_and_out(tmp_path):
    sizes = SIZES | {"num_mask_tokens": 1}
    tensors = files.draw(files.vjepa2_shapes(sizes))
    files.write(tmp_path / "in", tensors, files.vjepa2_config(sizes))
    door.run(["export", str(tmp_path / "in"), str(tmp_path / "out")])
    same_files(tmp_path / "in", tmp_path / "out")


def test_an_encoder_alone_is_not_written(tmp_path, params):
    with refused("encoder", "encoder", "predictor"):
        export({"encoder": params["encoder"]}, MODEL, tmp_path, frames=8, size=16)


def test_a_folder_that_cannot_be_written(tmp_path, params):
    (tmp_path / "file").write_text("")
    with refused(tmp_path / "file", os.strerror(errno.EEXIST), lines=1):
        export(params, MODEL, tmp_path / "file", frames=8, size=16)


# Image models


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_an_image_model_becomes_an_encoder(tmp_path, kind):
    tensors = files.draw(files.image_shapes(kind))
    source = open_pretrained(files.write(tmp_path, tensors, files.image_config(kind)))
    assert source.model["position_grid"] == 5
    assert source.parts == ("encoder",)
    assert any(holds(note, "embeddings.cls_token") for note in source.notes)
    model = {**source.model, "patch": 4, "tubelet": 3}
    shapes = built.shapes(**model)
    encoder = load(source, {"encoder": shapes["encoder"]}, built.settings(**model))["encoder"]

    kernel = encoder["patch_embed"]["kernel"]
    patches = tensors["embeddings.patch_embeddings.projection.weight"]
    np.testing.assert_allclose(kernel.sum(0), patches.transpose(2, 3, 1, 0), atol=1e-6)
    same(kernel[0], kernel[2])
    table = tensors["embeddings.position_embeddings"]
    same(encoder["positions"]["space"][1, 2], table[0, 1 + 5 + 2])
    assert not np.asarray(encoder["positions"]["time"]).any()
    block = jax.tree.map(lambda leaf: leaf[1], encoder["blocks"])
    fc2 = {"vit": "output.dense", "dinov2": "mlp.fc2"}[kind]
    for ours, name, scale in (
        (block["attention"]["proj"], "attention.output.dense", "layer_scale1"),
        (block["mlp"]["fc2"], fc2, "layer_scale2"),
    ):
        gain = tensors.get(f"encoder.layer.1.{scale}.lambda1", np.float32(1))
        same(ours["kernel"], tensors[f"encoder.layer.1.{name}.weight"].T * gain)
        same(ours["bias"], tensors[f"encoder.layer.1.{name}.bias"] * gain)


def test_a_resized_kernel_gives_the_same_tokens_on_resized_patches():
    """What the pseudo-inverse is for; exact where patches get larger."""
    rng = np.random.default_rng(0)
    kernel, image = rng.normal(size=(7, 3, 14, 14)), rng.normal(size=(3, 14, 14))
    ours = Pixels().kernel(kernel, (2, 16, 16, 3, 7), None)
    resize = bicubic(16, 14)
    larger = np.einsum("rp,cq,xpq->rcx", resize, resize, image)
    token = np.einsum("trcxd,rcx->d", ours, larger)
    np.testing.assert_allclose(token, np.einsum("dxpq,xpq->d", kernel, image), rtol=1e-9)


@pytest.mark.parametrize("values", ["null", "[0.5]"])
def test_a_normalisation_that_is_none(tmp_path, values):
    files.write(tmp_path, files.draw(files.image_shapes("vit")), files.image_config("vit"))
    text = f'{{"image_mean": [0.5, 0.5, 0.5], "image_std": {values}}}'
    (tmp_path / "preprocessor_config.json").write_text(text)
    found = f"image_std={json.loads(values)}"
    with refused(tmp_path / "preprocessor_config.json", found):
        open_pretrained(tmp_path)


def test_vjepa21_of_transformers_is_refused_by_name(tmp_path, tensors):
    config = files.vjepa2_config(use_rope_interleave=True, use_modality_embeddings=False)
    with refused(files.write(tmp_path, tensors, config), "V-JEPA 2.1", "use_rope_interleave"):
        open_pretrained(tmp_path)


def test_what_is_for_pt_files_is_refused_for_a_folder(folder):
    for asked in ({"heads": 4}, {"predictor_heads": 4}, {"probe": 1}, {"encoder": "encoder"}):
        ((key, value),) = asked.items()
        with refused(folder, f"{key}={value!r}"):
            open_pretrained(folder, **asked)


def test_swiglu_is_refused(tmp_path):
    config = files.image_config("dinov2", use_swiglu_ffn=True)
    files.write(tmp_path, files.draw(files.image_shapes("dinov2")), config)
    with refused(tmp_path / "config.json", "use_swiglu_ffn=True", "False"):
        open_pretrained(tmp_path)


# What does not fit


def test_all_names_that_do_not_fit_are_in_one_error(tmp_path, tensors, abstract):
    broken = dict(tensors)
    del broken["encoder.layer.1.norm1.bias"], broken["encoder.layer.2.norm1.bias"]
    broken["encoder.extra"] = np.zeros(3, np.float32)
    broken["predictor.proj.bias"] = np.zeros(35, np.float32)
    broken["encoder.layernorm.bias"] = np.zeros(36, np.int32)
    files.write(tmp_path, broken, files.vjepa2_config())
    with pytest.raises(UserError) as caught:
        load(open_pretrained(tmp_path), abstract, built.settings(**MODEL))
    first, *others = str(caught.value).splitlines()
    says(first, tmp_path, "VJEPA2Model")
    named = (
        ("encoder.layer.{1..2}.norm1.bias", "(36,)"),
        ("predictor.proj.bias", "(35,)", "(36,)"),
        ("encoder.layernorm.bias", "I32", "float32"),
        ("encoder.extra", "(3,)"),
    )
    for line, tokens in zip(others, named, strict=True):
        says(line, *tokens)
    assert (
        len({line.partition(tokens[0])[0] for line, tokens in zip(others, named, strict=True)}) == 4
    )


def test_a_depth_that_the_configuration_does_not_have(tmp_path, tensors):
    """The configuration is believed, and then found wrong by the names."""
    files.write(tmp_path, tensors, files.vjepa2_config(SIZES | {"depth": 2}))
    model = MODEL | {"depth": 2}
    with pytest.raises(UserError) as caught:
        load(open_pretrained(tmp_path), built.shapes(**model), built.settings(**model))
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 16
    assert len(lines_with(str(caught.value), "encoder.layer.2.attention.key.bias", "(36,)")) == 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"width": 32, "mlp_ratio": 2.0}, {"model.width=32": 36, "model.hidden=64": 60}),
        ({"heads": 6}, {"model.heads=6": 2}),
        ({"rope": "interleaved"}, {"model.rope='interleaved'": "'tiled'"}),
        ({"patch": 8, "tubelet": 1}, {"model.patch=8": 4, "model.tubelet=1": 2}),
        ({"position_grid": 4}, {"model.position_grid=4": 0}),
    ],
)
def test_weights_of_another_model(folder, changes, named):
    model = MODEL | changes
    with refused(folder, *named, *named.values()) as caught:
        load(open_pretrained(folder), built.shapes(**model), built.settings(**model))
    found = re.findall(r"model\.\w+=(?:'\w+'|\d+)", str(caught.value))
    assert found == list(named)  # and nothing else


def test_rope_beside_learned_positions_is_the_predictors(folder):
    source = open_pretrained(folder)
    source = dataclasses.replace(source, model=source.model | {"position_grid": 5})
    model = source.model | {"rope": "interleaved"}
    check(source, built.settings(**model), ("encoder",))
    with refused("model.rope='interleaved'", "'tiled'"):
        check(source, built.settings(**model), ("encoder", "predictor"))


def cut(path, bytes_left):
    path.write_bytes(path.read_bytes()[:bytes_left])


def break_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("breaks", "named"),
    [
        (lambda f: cut(f / "model.safetensors", 40_000), ["{f}/model.safetensors"]),
        (lambda f: cut(f / "model.safetensors", 5), ["{f}/model.safetensors"]),
        (lambda f: (f / "config.json").unlink(), ["{f}/config.json", "safetensors"]),
        (lambda f: cut(f / "config.json", 20), ["{f}/config.json", "line", "column"]),
        (
            lambda f: (f / "model.safetensors").unlink(),
            ["{f}", "model.safetensors", "model.safetensors.index.json"],
        ),
        (
            lambda f: break_config(f, model_type="bert"),
            ["{f}/config.json", "model_type='bert'", "vjepa2"],
        ),
        (
            lambda f: break_config(f, hidden_act="silu"),
            ["{f}/config.json", "hidden_act='silu'", "'gelu'"],
        ),
        (lambda f: break_config(f, hidden_size="36"), ["{f}/config.json", "hidden_size='36'"]),
        (lambda f: break_config(f, hidden_size=0), ["{f}/config.json", "hidden_size=0", 0, 0]),
        (lambda f: break_config(f, patch_size=[4, 4]), ["{f}/config.json", "patch_size=[4, 4]"]),
    ],
)
def test_a_broken_folder_is_one_line(tmp_path, tensors, breaks, named):
    folder = files.write(tmp_path / "model", tensors, files.vjepa2_config())
    breaks(folder)
    with refused(*(str(token).format(f=folder) for token in named), lines=1):
        open_pretrained(folder)


def test_shards_that_are_not_there_are_named(tmp_path, tensors):
    files.write(tmp_path, tensors, files.vjepa2_config(), shards=3)
    for shard in (1, 3):
        (tmp_path / f"model-{shard:05}-of-00003.safetensors").unlink()
    shard = "model-{:05}-of-00003.safetensors".format
    with refused(tmp_path, "model.safetensors.index.json", shard(1), shard(3)) as caught:
        open_pretrained(tmp_path)
    assert not holds(str(caught.value), shard(2))


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {"a": "../model.safetensors"}}'])
def test_shards_stay_in_their_folder(tmp_path, tensors, index):
    files.write(tmp_path, tensors, files.vjepa2_config())
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(files.vjepa2_config()))
    (folder / "model.safetensors.index.json").write_text(index)
    with refused(folder / "model.safetensors.index.json", "weight_map"):
        open_pretrained(folder)


def test_a_file_that_is_no_model(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"0")
    with refused(path, "OWNER/NAME", ".pt"):
        open_pretrained(path)
    with refused(tmp_path / "gone"):
        open_pretrained(tmp_path / "gone")


# The Hub


OFFLINE = """
from wmjax.weights import open_pretrained
from wmjax.errors import UserError
for name in ("someone/vjepa2", "someone/else"):
    try:
        print(open_pretrained(name).where)
    except UserError as error:
        print("error:", error)
"""


def test_models_of_the_hub_offline(tmp_path, folder):
    """With the real huggingface_hub, told that there is no network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--someone--vjepa2"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, snapshot / name)
    run = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        env={**micro.environment(1), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    cached, absent = run.stdout.splitlines()
    assert cached == str(snapshot)
    assert absent.startswith("error: ")
    says(absent, "someone/else", "Hub", "cache")


# The door


def test_import_and_export_are_each_others_inverse(tmp_path, folder, abstract, params, capsys):
    assert door.run(["import", str(folder), str(tmp_path / "ours")]) == 0
    said = capsys.readouterr().out
    says(said, folder, tmp_path / "ours")
    assert lines_with(said, "encoder", "predictor", 91)
    source = open_pretrained(tmp_path / "ours")
    assert source.format.name == "wmjax"
    jax.tree.map(same, load(source, abstract, built.settings(**MODEL)), params)
    assert door.run(["export", str(tmp_path / "ours"), str(tmp_path / "theirs")]) == 0
    same_files(folder, tmp_path / "theirs")
    settings = json.loads((tmp_path / "theirs/config.json").read_text())
    assert (settings["crop_size"], settings["frames_per_clip"]) == (16, 8)
    capsys.readouterr()
    assert door.run(["export", str(tmp_path / "ours"), str(tmp_path / "more"), "--frames=16"]) == 0
    assert lines_with(capsys.readouterr().out, "--frames=16", 8)


def test_show_joins_the_layers(folder, capsys):
    door.run(["show", str(folder)])
    out = capsys.readouterr().out.splitlines()
    line = "encoder.layer.{0..2}.mlp.fc1.weight (60, 36) float32 -> encoder.blocks.mlp.fc1.kernel"
    assert line in out
    count = sum(int(np.prod(shape)) for shape in files.vjepa2_shapes().values())
    assert any(holds(text, f"{count:,}") for text in out)


def test_a_run_is_exported_with_its_target(tmp_path, params, capsys):
    config = {
        "model": {"name": "vjepa2", **MODEL, "dtype": "float32"},
        "data": {"frames": 8, "image_size": 16},
    }
    target = jax.tree.map(lambda leaf: leaf + 1, params["encoder"])
    for step in (1, 2):
        state = TrainState(jnp.int32(step), params, {}, target, {"mu": params})
        with Checkpoints(tmp_path / "run/checkpoints", keep=2) as checkpoints:
            checkpoints.save(step, state, {"position": step}, {"config": config})
    rows = [{"step": 1, "validation/loss": 0.5}, {"step": 2, "loss": 0.25, "data_wait": 0.1}]
    later = [{"step": 3, "loss": 0.125}]
    (tmp_path / "run/metrics.jsonl").write_text("\n".join(map(json.dumps, rows + later)))

    door.run(["export", str(tmp_path / "run"), str(tmp_path / "out")])
    says(capsys.readouterr().out, tmp_path / "run", tmp_path / "out", "EMA", "predictor")
    wanted = jax.eval_shape(lambda: params)
    found = load(open_pretrained(tmp_path / "out"), wanted, built.settings(**MODEL))
    jax.tree.map(same, found, {"encoder": target, "predictor": params["predictor"]})
    card = (tmp_path / "out/README.md").read_text()
    assert "| validation/loss | 0.5 |" in card
    assert "| loss | 0.25 |" in card
    assert "data_wait" not in card


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["export", "gone", "out"], ["gone"]),
        (["export", ".", "out"], ["config.json", "safetensors", "workdir"]),
        (["import", "nothing/here/", "out"], ["nothing/here/"]),
    ],
)
def test_the_door_answers_a_mistake_with_a_line(tmp_path, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    with refused(*named, lines=1):
        door.run(arguments)


def test_an_image_model_is_imported_but_not_exported(tmp_path):
    tensors = files.draw(files.image_shapes("vit"))
    files.write(tmp_path / "vit", tensors, files.image_config("vit"))
    door.run(["import", str(tmp_path / "vit"), str(tmp_path / "ours")])
    source = open_pretrained(tmp_path / "ours")
    model = {**source.model, "rope": "interleaved"}  # which is the predictor's
    shapes = built.shapes(**model)
    encoder = load(source, {"encoder": shapes["encoder"]}, built.settings(**model))["encoder"]
    assert encoder["patch_embed"]["kernel"].shape == (2, 4, 4, 3, 36)
    with refused(tmp_path / "ours", "--frames", "--size"):
        door.run(["export", str(tmp_path / "ours"), str(tmp_path / "out")])
    size = ["--frames=16", "--size=256"]
    with refused("model.position_grid=5", 0):
        door.run(["export", str(tmp_path / "ours"), str(tmp_path / "out"), *size])


# Large


@pytest.mark.parametrize(
    ("size", "count"), [("large", 303_885_312 + 22_086_016), ("giant", 1_012_173_952 + 22_381_312)]
)
def test_names_of_the_released_sizes(size, count):
    leaves = leaves_of(built.shapes(size=size))
    shapes = names_and_shapes(tables.VJEPA2, {path: leaf.shape for path, leaf in leaves.items()})
    width, depth, heads, ratio = {"large": (1024, 24, 16, 4), "giant": (1408, 40, 22, 48 / 11)}[
        size
    ]
    sizes = {
        "width": width,
        "depth": depth,
        "heads": heads,
        "hidden": round(width * ratio),
        "patch": 16,
        "tubelet": 2,
        "predictor_width": 384,
        "predictor_depth": 12,
        "predictor_heads": 12,
        "num_mask_tokens": 10,
    }
    assert shapes == files.vjepa2_shapes(sizes)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == count


@pytest.mark.campaign
def test_the_large_model_in_and_out_is_bit_exact(tmp_path):
    """1.3 GB of real values."""
    sizes = SIZES | {"width": 1024, "depth": 24, "heads": 16, "hidden": 4096, "patch": 16}
    sizes |= {"predictor_width": 384, "predictor_depth": 12, "predictor_heads": 12}
    sizes["num_mask_tokens"] = 10
    tensors = files.draw(files.vjepa2_shapes(sizes))
    files.write(tmp_path / "in", tensors, files.vjepa2_config(sizes))
    del tensors
    door.run(["import", str(tmp_path / "in"), str(tmp_path / "ours")])
    door.run(["export", str(tmp_path / "ours"), str(tmp_path / "out")])
    same_files(tmp_path / "in", tmp_path / "out")
