"""Weights against the libraries that they come from, torch and transformers, where installed."""

import functools
import importlib.util
import json
import warnings

import built
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import weight_files as files
from flax import nnx
from safetensors.numpy import load_file
from says import refused, says
from weight_files import MODEL, SIZES

import wmjax
from wmjax import sharding
from wmjax.errors import UserError
from wmjax.evals.classifier import evaluate, fit
from wmjax.models import base
from wmjax.nn import rope
from wmjax.nn.positions import bicubic
from wmjax.weights import __main__ as door
from wmjax.weights import export, load, open_pretrained, tables
from wmjax.weights.export import names_and_shapes, transformers_config
from wmjax.weights.load import abstract_params, describe, leaves_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")


# Compiling is nearly all the time these tests take.
jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


@pytest.fixture(autouse=True)
def quiet():
    """transformers and torch may warn of themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            centre = 1.0 if "norm" in name and "weight" in name else 0.0
            p.copy_(centre + 0.15 * torch.randn(p.shape, generator=generator))
    return model.eval()


def vjepa2_config(**others):
    names = {**files.vjepa2_config(), **others}
    names.pop("architectures")
    return transformers.VJEPA2Config(**names)


def same(ours, theirs):
    np.testing.assert_array_equal(ours, theirs, strict=True)


def close(ours, theirs):
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-5 * np.abs(theirs).max()


def loaded(source, model, *parts):
    """Return the model with these parts from the source, the others at zero."""
    graphdef, shapes, _ = base.split(built.abstract(**model, dtype="float32"))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    params |= load(source, {part: shapes[part] for part in parts}, built.settings(**model))
    return base.merge(graphdef, params)


def video_of(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# V-JEPA 2 of transformers


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    model = randomise(transformers.VJEPA2Model(vjepa2_config()))
    folder = tmp_path_factory.mktemp("oracle")
    model.save_pretrained(folder)
    return model, folder


def test_what_save_pretrained_writes_is_loaded(oracle):
    theirs, folder = oracle
    source = open_pretrained(folder)
    ours = loaded(source, source.model, "encoder", "predictor")
    video = video_of((2, 4, 16, 16, 3))
    with torch.no_grad():
        output = theirs(torch.from_numpy(video).permute(0, 1, 4, 2, 3))
    features = jit(ours.encode)(video)
    close(features, output.last_hidden_state)
    ids = jnp.broadcast_to(rope.all_ids((2, 4, 4)), (2, 32))
    predicted = jit(ours.predict, static_argnums=3)(features, ids, ids, (2, 4, 4))
    close(predicted, output.predictor_output.last_hidden_state)


def test_what_is_exported_opens_and_computes_the_same(oracle, tmp_path):
    """Other values than the oracle's: nothing but our folder reaches transformers."""
    shapes = built.shapes(**MODEL)
    rng = np.random.default_rng(7)
    params = jax.tree.map(lambda s: (0.2 * rng.normal(size=s.shape)).astype(np.float32), shapes)
    export(params, MODEL, tmp_path, frames=8, size=16)
    theirs, report = transformers.VJEPA2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    graphdef = base.split(built.abstract(**MODEL, dtype="float32"))[0]
    video = video_of((1, 8, 16, 16, 3))
    with torch.no_grad():
        pixels = torch.from_numpy(video).permute(0, 1, 4, 2, 3)
        features = theirs.eval()(pixels, skip_predictor=True).last_hidden_state
    close(jit(base.merge(graphdef, params).encode)(video), features)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves_of_torch_become_float32(oracle, tmp_path, dtype):
    theirs = transformers.VJEPA2Model(vjepa2_config())
    theirs.load_state_dict(oracle[0].state_dict())
    halves = theirs.to(getattr(torch, dtype))
    halves.save_pretrained(tmp_path)
    source = open_pretrained(tmp_path)
    assert set(source.tensors.dtypes.values()) == {dtype}
    params = load(source, abstract_params(source), built.settings(**source.model))
    wanted = halves.encoder.layer[1].mlp.fc1.weight.detach().float().numpy().T
    same(params["encoder"]["blocks"]["mlp"]["fc1"]["kernel"][1], wanted)


def test_a_classifier_goes_in_and_out_again(tmp_path):
    config = vjepa2_config(num_pooler_layers=2, num_labels=12)
    theirs = randomise(transformers.VJEPA2ForVideoClassification(config))
    theirs.save_pretrained(tmp_path / "in")
    door.run(["import", str(tmp_path / "in"), str(tmp_path / "ours")])
    door.run(["export", str(tmp_path / "ours"), str(tmp_path / "out")])
    again, report = transformers.VJEPA2ForVideoClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values())
    for name, tensor in theirs.state_dict().items():
        same(again.state_dict()[name].numpy(), tensor.numpy())
    assert again.config.id2label == theirs.config.id2label


@pytest.mark.parametrize("size", ["large", "giant"])
def test_tables_name_all_that_transformers_has(size, tmp_path):
    """Released sizes, of which only the shapes are made; configured by what export writes."""
    settings = transformers_config(describe(built.settings(size=size)), 64, 256)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with torch.device("meta"):
        theirs = transformers.VJEPA2Model(transformers.VJEPA2Config.from_pretrained(tmp_path))
    leaves = leaves_of(built.shapes(size=size))
    shapes = names_and_shapes(tables.VJEPA2, {path: leaf.shape for path, leaf in leaves.items()})
    assert shapes == {name: tuple(p.shape) for name, p in theirs.state_dict().items()}


# Image models


def image_model(kind, patch=4, grid=5):
    settings = {
        "hidden_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": patch * grid,
        "patch_size": patch,
        "attn_implementation": "eager",
    }
    if kind == "dinov2":
        return randomise(
            transformers.Dinov2Model(transformers.Dinov2Config(**settings, mlp_ratio=2))
        )
    if kind == "dinov2_with_registers":
        config = transformers.Dinov2WithRegistersConfig(**settings, mlp_ratio=2)
        return randomise(transformers.Dinov2WithRegistersModel(config))
    config = transformers.ViTConfig(**settings, intermediate_size=60)
    if kind == "vit_classifier":
        return randomise(transformers.ViTForImageClassification(config))
    return randomise(transformers.ViTModel(config))


def blocks_of(theirs):
    """Return the layers and the last norm, under whatever names this release gives them."""
    modules = dict(theirs.named_modules())
    layers = next(
        module
        for name, module in modules.items()
        if isinstance(module, torch.nn.ModuleList) and name.endswith(("layer", "layers"))
    )
    norm = next(m for name, m in modules.items() if name.endswith("layernorm") and "." not in name)
    return layers, norm


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("vit", (20, 20)),
        ("vit_classifier", (12, 28)),
        ("dinov2", (20, 20)),
        ("dinov2", (12, 28)),
        ("dinov2_with_registers", (20, 20)),
    ],
)
def test_a_clip_of_one_image_is_seen_as_the_image(tmp_path, kind, size):
    """Embeddings, every block and the last norm, without the CLS token, on repeated frames.

    With every key and value there as often as there are tubelets, attention is that of the image.
    """
    theirs = image_model(kind)
    theirs.save_pretrained(tmp_path)
    source = open_pretrained(tmp_path)
    ours = loaded(source, {**source.model, "patch": 4, "tubelet": 2}, "encoder")
    height, width = size
    image = video_of((2, height, width, 3))
    video = np.broadcast_to(image[:, None], (2, 6, height, width, 3))
    grid = (3, height // 4, width // 4)
    tokens = grid[1] * grid[2]

    body = theirs.vit if kind == "vit_classifier" else theirs
    layers, norm = blocks_of(body)
    with torch.no_grad():
        pixels = torch.from_numpy(image).permute(0, 3, 1, 2)
        asks = {"interpolate_pos_encoding": True} if kind.startswith("vit") else {}
        x = body.embeddings(pixels, **asks)[:, -tokens:]  # CLS and registers come first
        wanted = [x]
        for layer in layers:
            out = layer(wanted[-1])
            wanted.append(out if torch.is_tensor(out) else out[0])
        last = norm(wanted[-1])

    def embed(video):
        ids = rope.all_ids(grid)
        return ours.encoder.patch_embed(video, None) + ours.encoder.positions(ids, grid)

    def first_block(x):
        graphdef, params = nnx.split(ours.encoder.blocks)
        return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[0], params))(x, None)

    outputs = jit(lambda v: (embed(v), first_block(embed(v)), ours.encode(v)))
    embedded, first, features = outputs(video)
    for t in range(3):
        mine = slice(t * tokens, (t + 1) * tokens)
        close(embedded[:, mine], wanted[0])
        close(features[:, mine], last)
    close(first[:, :tokens], wanted[1])


def test_pixels_normalised_otherwise_give_the_same_tokens(tmp_path):
    """Of bytes, which each side normalises for itself."""
    theirs = image_model("vit")
    theirs.save_pretrained(tmp_path)
    mean, std = (0.5, 0.4, 0.6), (0.5, 0.3, 0.25)
    text = json.dumps({"image_mean": mean, "image_std": std})
    (tmp_path / "preprocessor_config.json").write_text(text)
    source = open_pretrained(tmp_path)
    ours = loaded(source, {**source.model, "patch": 4, "tubelet": 2}, "encoder")
    video = np.broadcast_to(
        np.random.default_rng(0).integers(0, 256, (1, 1, 20, 20, 3), np.uint8), (1, 2, 20, 20, 3)
    )
    pixels = (torch.tensor(video[:, 0]) / 255 - torch.tensor(mean)) / torch.tensor(std)
    wanted = theirs.embeddings.patch_embeddings(pixels.permute(0, 3, 1, 2))
    close(jit(ours.encoder.patch_embed)(video, None), wanted)


@pytest.mark.parametrize(("new", "old"), [(16, 14), (16, 37), (5, 5), (3, 7)])
def test_bicubic_is_torchs(new, old):
    image = torch.randn(1, 1, old, old, dtype=torch.float64)
    wanted = torch.nn.functional.interpolate(image, size=(new, new), mode="bicubic")
    matrix = bicubic(new, old)
    np.testing.assert_allclose(matrix @ image[0, 0].numpy() @ matrix.T, wanted[0, 0], atol=1e-12)


def test_swiglu_is_refused(tmp_path):
    settings = {"hidden_size": 36, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Dinov2Config(**settings, use_swiglu_ffn=True)
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="use_swiglu_ffn=True"):
        open_pretrained(tmp_path)


# Meta's files


def to_meta(tensors):
    """Name tensors of VJEPA2Model as Meta's checkpoints do."""
    encoder, predictor = {}, {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        found, short = (encoder, "") if part == "encoder" else (predictor, "predictor_")
        if rest == "embeddings.mask_tokens":
            found |= {f"mask_tokens.{i}": token for i, token in enumerate(tensor)}
            continue
        for old, new in (
            ("embeddings.patch_embeddings.", "patch_embed."),
            ("embeddings.predictor_embeddings.", "predictor_embed."),
            ("layernorm.", f"{short}norm."),
            ("layer.", f"{short}blocks."),
            ("attention.", "attn."),
        ):
            rest = rest.replace(old, new)
        if rest.startswith("proj."):
            rest = f"predictor_{rest}"
        if ".query." in rest:
            key, value = (tensors[name.replace("query", other)] for other in ("key", "value"))
            rest, tensor = rest.replace("query", "qkv"), np.concatenate([tensor, key, value])
        elif ".key." in rest or ".value." in rest:
            continue
        found[rest] = tensor
    return encoder, predictor


def as_torch(tensors, prefix="module.backbone."):
    return {f"{prefix}{name}": torch.from_numpy(np.array(t)) for name, t in tensors.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return the parts of a checkpoint of Meta and the folder of its twin for transformers."""
    tensors = files.draw(files.vjepa2_shapes())
    target, predictor = to_meta(tensors)
    online, _ = to_meta(files.draw(files.vjepa2_shapes(), seed=1))
    twin = tmp_path_factory.mktemp("twin")
    files.write(twin, tensors, files.vjepa2_config())
    saved = {
        "encoder": as_torch(online) | {"module.backbone.pos_embed": torch.zeros(1, 8, 36)},
        "predictor": as_torch(predictor)
        | {"module.backbone.predictor_pos_embed": torch.zeros(1, 8, 28)},
        "target_encoder": as_torch(target) | {"module.backbone.pos_embed": torch.zeros(1, 8, 36)},
        "opt": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]},
        "epoch": 3,
        "loss": 0.5,
    }
    return saved, twin


def test_a_checkpoint_of_meta_is_its_twin(checkpoint, tmp_path):
    saved, twin = checkpoint
    torch.save(saved, tmp_path / "e3.pt")
    model = {**MODEL, "rope": "tiled"}
    shapes = built.shapes(**model)
    wanted = load(open_pretrained(twin), shapes, built.settings(**model))
    source = open_pretrained(tmp_path / "e3.pt")
    # The file does not say how many heads there are: assumed, so that the caller's word counts.
    assert source.model == {**model, "heads": 1, "predictor_heads": 1}
    assert source.assumed == ("heads", "predictor_heads")
    says(source.notes[0], "target_encoder")
    says(source.notes[1], "assumed", "heads=1", 36)
    says(source.notes[2], "assumed", "predictor_heads=1", 28)
    jax.tree.map(same, load(source, shapes, built.settings(**model)), wanted)

    online = open_pretrained(tmp_path / "e3.pt", encoder="encoder")
    other = load(online, shapes, built.settings(**model))
    jax.tree.map(same, other["predictor"], wanted["predictor"])
    kernel = other["encoder"]["patch_embed"]["kernel"]
    assert np.abs(kernel - wanted["encoder"]["patch_embed"]["kernel"]).max() > 0.1


@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
def test_prefixes_of_wrappers(checkpoint, tmp_path, prefix):
    saved, _ = checkpoint
    saved = {
        key: {f"{prefix}{k.removeprefix('module.backbone.')}": v for k, v in saved[key].items()}
        for key in ("target_encoder", "predictor")
    }
    torch.save(saved, tmp_path / "model.pt")
    source = open_pretrained(tmp_path / "model.pt")
    load(source, abstract_params(source), built.settings(**source.model))
    assert "target_encoder.blocks.0.norm1.weight" in source.tensors.shapes


def test_heads_of_released_sizes_are_known(tmp_path):
    """Shapes of ViT-H, without the numbers: 80 wide heads."""
    sizes = SIZES | {"width": 1280, "depth": 32, "hidden": 5120, "predictor_width": 384}
    shapes = files.vjepa2_shapes(sizes)
    empty = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    del empty["encoder.embeddings.patch_embeddings.proj.weight"]
    encoder, predictor = (
        {name: torch.zeros(1).expand(t.shape) for name, t in part.items() if "qkv" not in name}
        for part in to_meta({k: v for k, v in empty.items() if "attention" not in k})
    )
    encoder["patch_embed.proj.weight"] = torch.zeros(1).expand(1280, 3, 2, 16, 16)
    torch.save({"target_encoder": encoder, "predictor": predictor}, tmp_path / "vith.pt")
    source = open_pretrained(tmp_path / "vith.pt")
    assert (source.model["heads"], source.model["predictor_heads"]) == (16, 12)
    encoder_note, *heads_notes = source.notes
    says(encoder_note, "target_encoder")
    for note, token in zip(heads_notes, ("heads=16", "predictor_heads=12"), strict=True):
        says(note, "assumed", token)
    with refused("model.heads=20", 16, "--heads=N"):
        load(source, {"encoder": {}}, built.settings(**(source.model | {"heads": 20})))


def test_a_probe_of_meta_is_its_twin(tmp_path):
    tensors = files.draw(files.classifier_shapes(sizes=SIZES | {"heads": 2}))
    probe = {}
    for name, tensor in tensors.items():
        if not name.startswith(("pooler.", "classifier.")):
            continue
        for old, new in (
            ("pooler.cross_attention_layer.layer_norm", "pooler.cross_attention_block.norm"),
            ("pooler.cross_attention_layer.", "pooler.cross_attention_block."),
            ("pooler.self_attention_layers.", "pooler.blocks."),
            ("layer_norm", "norm"),
            ("self_attn.out_proj", "attn.proj"),
            ("cross_attn.q_proj", "xattn.q"),
            ("classifier.", "linear."),
        ):
            name = name.replace(old, new)
        if name.split(".")[-2] in ("k_proj", "v_proj") or "self_attn.q_proj" in name:
            continue
        probe[name] = tensor
    cross = "pooler.cross_attention_layer.cross_attn"
    for end in ("weight", "bias"):
        kv = [tensors[f"{cross}.{x}_proj.{end}"] for x in "kv"]
        probe[f"pooler.cross_attention_block.xattn.kv.{end}"] = np.concatenate(kv)
        for i in range(2):
            name = f"pooler.self_attention_layers.{i}.self_attn"
            qkv = [tensors[f"{name}.{x}_proj.{end}"] for x in "qkv"]
            probe[f"pooler.blocks.{i}.attn.qkv.{end}"] = np.concatenate(qkv)
    saved = {"classifiers": [as_torch(probe, "module."), {}], "epoch": 20}
    torch.save(saved, tmp_path / "ssv2.pt")
    source = open_pretrained(tmp_path / "ssv2.pt")
    assert source.classifier == {"width": 36, "heads": 16, "classes": 12, "depth": 2, "eps": 1e-5}

    config = files.vjepa2_config(num_pooler_layers=2)
    twin = open_pretrained(files.write(tmp_path / "twin", tensors, config))
    shapes = {part: abstract_params(twin)[part] for part in ("pooler", "head")}
    jax.tree.map(
        same,
        load(source, shapes, built.settings()),
        load(twin, shapes, built.settings(**twin.model)),
    )


class Surprise:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("saved", "named"),
    [
        ({"target_encoder": Surprise()}, ["tensors"]),
        ([1, 2], ["list", "dict"]),
        ({"encoder": {}, "epoch": 3}, ["'target_encoder'", "encoder", "epoch"]),
        ({"target_encoder": {}}, ["target_encoder.patch_embed.proj.weight", 5]),
        ({"classifiers": []}, ["classifiers"]),
    ],
)
def test_a_file_that_is_no_checkpoint_is_one_line(tmp_path, capsys, saved, named):
    torch.save(saved, tmp_path / "bad.pt")
    with refused(tmp_path / "bad.pt", *named, lines=1):
        open_pretrained(tmp_path / "bad.pt")
    assert "run" not in capsys.readouterr().out


def test_a_truncated_checkpoint_is_one_line(tmp_path):
    path = tmp_path / "cut.pt"
    torch.save({"target_encoder": {"x": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with refused(path, "torch.load", lines=1):
        open_pretrained(path)


def test_a_checkpoint_of_meta_becomes_one_for_transformers(checkpoint, tmp_path):
    """Heads are wrong for this size, as the file does not say them; the tensors are not."""
    saved, twin = checkpoint
    torch.save(saved, tmp_path / "e3.pt")
    door.run(["import", str(tmp_path / "e3.pt"), str(tmp_path / "ours")])
    door.run(["export", str(tmp_path / "ours"), str(tmp_path / "out"), "--frames=8", "--size=16"])
    theirs, ours = (load_file(f / "model.safetensors") for f in (twin, tmp_path / "out"))
    assert theirs.keys() == ours.keys()
    jax.tree.map(same, ours, theirs)


# From a run to transformers


def test_train_then_classify_then_export(micro_run, tmp_path):
    """AutoModel and, where torchvision is installed, AutoVideoProcessor open what was written."""
    model = wmjax.load(micro_run)
    rng = np.random.default_rng(0)
    videos = rng.integers(0, 256, (8, 4, 32, 32, 3), np.uint8)
    labels = np.arange(8) % 3
    features = np.asarray(model.encode(videos))
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    batches = [(features, labels)] * 4
    probes = fit(batches, mesh, steps=4, seed=0, classes=3, heads=2, depth=1, eps=1e-6)
    best = probes.classifier(evaluate(probes, batches, mesh)["best"])
    model.export(tmp_path, best, labels=("lift", "push", "pull"))

    encoder = transformers.AutoModel.from_pretrained(tmp_path).eval()
    classifier = transformers.AutoModelForVideoClassification.from_pretrained(tmp_path).eval()
    assert classifier.config.id2label == {0: "lift", 1: "push", 2: "pull"}
    ours = wmjax.load(tmp_path)
    assert ours.labels == ("lift", "push", "pull")

    large = np.repeat(np.repeat(videos[0], 3, axis=1), 2, axis=2)
    clip = ours.preprocess(large[None])
    if importlib.util.find_spec("torchvision"):
        processor = transformers.AutoVideoProcessor.from_pretrained(tmp_path)
        given = processor(torch.from_numpy(large.transpose(0, 3, 1, 2)), return_tensors="pt")
        theirs = given["pixel_values_videos"].permute(0, 1, 3, 4, 2).numpy()
        assert theirs.shape == clip.shape
        assert np.abs(clip - theirs).mean() < 0.05  # two levels of 255: resizes round differently
        clip = theirs
    pixels = torch.from_numpy(clip).permute(0, 1, 4, 2, 3)
    with torch.no_grad():
        close(ours.encode(clip), encoder(pixels, skip_predictor=True).last_hidden_state)
        close(ours.classify(clip), classifier(pixels).logits)
    close(best(model.encode(clip)), classifier(pixels).logits)
