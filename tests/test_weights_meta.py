"""Files of Meta's V-JEPA code: each loads as the model that it is, or is refused by its name."""

import jax
import micro
import numpy as np
import pytest
from says import holds, refused, says

import wmjax
from wmjax import assemble, initial
from wmjax.weights import __main__ as door
from wmjax.weights import open_pretrained

torch = pytest.importorskip("torch", reason="torch is not installed")
import vjepa1  # noqa: E402  needs torch

VIDEO = np.random.default_rng(0).uniform(-1.5, 2, (2, 4, 12, 12, 3)).astype(np.float32)
CONTEXT, TARGET = np.array([0, 3, 4, 9, 17]), np.array([1, 8, 12])


def pixels(video):
    return torch.from_numpy(video).permute(0, 4, 1, 2, 3)


def save(path, encoder, predictor=None, prefix="module.backbone.", online=None):
    """Write a checkpoint as Meta's train.py does."""

    def state(module):
        return {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}

    parts = {"encoder": online, "predictor": predictor, "target_encoder": encoder}
    torch.save({key: state(part) for key, part in parts.items() if part} | {"epoch": 3}, path)
    return path


def close(ours, theirs):
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-5 * np.abs(theirs).max()


# V-JEPA 1


@pytest.mark.parametrize("uniform_power", [True, False])
@pytest.mark.parametrize("prefix", ["", "module.backbone.", "_orig_mod.module.backbone."])
def test_vjepa1_is_loaded_as_what_it_is(tmp_path, uniform_power, prefix):
    encoder, predictor = vjepa1.build(uniform_power)
    file = save(tmp_path / "v1.pth.tar", encoder, predictor, prefix)
    model = wmjax.load(file, heads=2)
    assert model.config["model"]["rope"] == ("sincos_uniform" if uniform_power else "sincos")
    assert model.config["clip"] == {"frames": 4, "size": 12}
    assert any(holds(note, "V-JEPA 1") for note in model.notes)
    features = encoder(pixels(VIDEO))
    close(model.encode(VIDEO), features)
    # As in wmjax.load(...).predict: the context is encoded alone.
    context = encoder.patch_embed(pixels(VIDEO)) + encoder.pos_embed
    context = context[:, CONTEXT]
    for block in encoder.blocks:
        context = block(context)
    close(model.predict(VIDEO, CONTEXT, TARGET), predictor(encoder.norm(context), CONTEXT, TARGET))


def test_vjepa1_encoder_alone(tmp_path):
    encoder, _ = vjepa1.build()
    model = wmjax.load(save(tmp_path / "v1.pt", encoder), heads=2)
    close(model.encode(VIDEO), encoder(pixels(VIDEO)))


def test_a_table_of_half_precision_is_recognised(tmp_path):
    encoder, predictor = (module.bfloat16() for module in vjepa1.build())
    source = open_pretrained(save(tmp_path / "v1.pt", encoder, predictor))
    assert source.model["rope"] == "sincos_uniform"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"predictor_pos_embed": None},
            ["target_encoder.pos_embed", "predictor.predictor_pos_embed"],
        ),
        ({"pos_embed": 0.0}, ["target_encoder.pos_embed", "predictor.predictor_pos_embed"]),
        ({"pos_embed": 2.0}, ["target_encoder.pos_embed", "(1, 18, 48)"]),
    ],
)
def test_positions_that_are_neither_are_refused(tmp_path, changes, named):
    """changes: the factor of a table; None: it is left out."""
    encoder, predictor = vjepa1.build()
    for module in (encoder, predictor):
        for name in changes.keys() & module._parameters.keys():
            if changes[name] is None:
                del module._parameters[name]
            else:
                module._parameters[name].data *= changes[name]
    file = save(tmp_path / "v1.pt", encoder, predictor)
    with refused(file, *named):
        open_pretrained(file)


def checkpoint_of_size(width, depth, mask_tokens):
    """Return a checkpoint of a released size with a true table, the rest empty."""

    def empty(*shape):
        return torch.zeros(1).expand(shape)

    encoder = {f"blocks.{i}.norm1.weight": empty(width) for i in range(depth)}
    encoder |= {
        "patch_embed.proj.weight": empty(width, 3, 2, 16, 16),
        "blocks.0.mlp.fc1.weight": empty(4 * width, width),
        "pos_embed": vjepa1.table(width, 2, 3, True),
    }
    predictor = {f"mask_tokens.{i}": empty(1, 1, 384) for i in range(mask_tokens)}
    predictor |= {
        "predictor_embed.weight": empty(384, width),
        "predictor_blocks.0.norm1.weight": empty(384),
        "predictor_pos_embed": vjepa1.table(384, 2, 3, True),
    }
    return {"target_encoder": encoder} | ({"predictor": predictor} if mask_tokens else {})


def test_released_vjepa2_has_a_table_that_it_does_not_use(tmp_path):
    file = tmp_path / "vitl.pt"
    for mask_tokens, rope, heads in ((10, "tiled", 12), (2, "sincos_uniform", 16)):
        torch.save(checkpoint_of_size(1024, 24, mask_tokens), file)
        source = open_pretrained(file)
        assert (source.model["rope"], source.model["predictor_heads"]) == (rope, heads)
        assert any(holds(note, "sin-cos") for note in source.notes)
    torch.save(checkpoint_of_size(1024, 24, 0), file)
    with refused(file, "V-JEPA 1", "V-JEPA 2"):
        open_pretrained(file)


# Heads


def test_heads_are_assumed_aloud_or_given(tmp_path, capsys):
    encoder, predictor = vjepa1.build(heads=4, width=48)
    file = save(tmp_path / "v1.pt", encoder, predictor)
    model = wmjax.load(file)
    assert any(holds(note, "assumed", "heads=1") for note in model.notes)
    door.run(["import", str(file), str(tmp_path / "ours"), "--heads=4", "--predictor-heads=2"])
    says(capsys.readouterr().out, "heads=4", "predictor_heads=2")
    for model in (wmjax.load(file, heads=4), wmjax.load(tmp_path / "ours")):
        close(model.encode(VIDEO), encoder(pixels(VIDEO)))
        assert not any(holds(note, "assumed", "heads") for note in model.notes[:2])
    assert model.config["model"]["predictor_heads"] == 2
    with refused("model.heads=5", "model.width=48"):
        wmjax.load(file, heads=5)
    with refused("heads=0", 0):
        wmjax.load(file, heads=0)
    with refused(tmp_path / "ours", "heads=4"):
        wmjax.load(tmp_path / "ours", heads=4)


# Names


def test_other_prefixes_and_raw_state_dicts(tmp_path):
    encoder, predictor = vjepa1.build()
    wanted = encoder(pixels(VIDEO))
    states = encoder.state_dict(), predictor.state_dict()
    compiled = {name.replace(".attn.", "._orig_mod.attn."): t for name, t in states[0].items()}
    for saved in (
        states[0],
        {"encoder": states[0]},
        {"state_dict": states[0], "epoch": 1},
        {f"backbone._orig_mod.module.{name}": t for name, t in states[0].items()},
        compiled,
        states[0] | states[1],
        torch.nn.ModuleList([encoder, predictor]).state_dict(),
        torch.nn.ModuleDict({"encoder": encoder, "predictor": predictor}).state_dict(),
    ):
        torch.save(saved, tmp_path / "raw.pt")
        model = wmjax.load(tmp_path / "raw.pt", heads=2)
        close(model.encode(VIDEO), wanted)
        has_predictor = any("predictor_embed" in name for name in saved)
        assert model.complete is has_predictor


def test_an_encoder_that_is_not_there(tmp_path):
    encoder, predictor = vjepa1.build()
    file = tmp_path / "model.pt"
    torch.save({"encoder": encoder.state_dict(), "student": encoder.state_dict()}, file)
    with refused(file, "'target_encoder'", "student"):
        wmjax.load(file)
    assert wmjax.load(file, encoder="student").params
    torch.save(predictor.state_dict(), file)
    with refused(file, "'target_encoder'", "predictor_embed"):
        wmjax.load(file)
    name = "patch_embed.proj.bias"
    torch.save(encoder.state_dict() | {f"module.{name}": torch.zeros(48)}, file)
    with refused(file, name):
        wmjax.load(file)


RUN = (
    *(
        "model.width=48",
        "model.depth=2",
        "model.heads=2",
        "model.patch=4",
        "model.rope=sincos_uniform",
    ),
    *("model.predictor_width=24", "model.predictor_depth=2", "model.predictor_heads=2"),
    "data.image_size=16",
)


def begin(*overrides):
    config = micro.config(*RUN, *overrides)
    steps = assemble.prepare(config).steps
    return initial.make_state(
        steps, init_from=config.init_from, init_encoder=config.init_encoder, pretrained=""
    )


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


@pytest.mark.parametrize("mask_tokens", [1, 2, 12])
def test_a_run_starts_from_any_number_of_mask_tokens(tmp_path, mask_tokens):
    encoder, predictor = vjepa1.build(mask_tokens=mask_tokens)
    file = save(tmp_path / "latest.pt", encoder, predictor)
    state, origin = begin(f"init_from={file}")
    says(origin, "heads=2", "predictor_heads=2")
    assert not holds(origin, "assumed")
    tokens = np.asarray(state.params["predictor"]["mask_tokens"])
    assert len(tokens) == 10
    for index in range(10):
        theirs = predictor.mask_tokens[index % mask_tokens].detach()
        np.testing.assert_array_equal(tokens[index], theirs)
    wmjax.load(file, heads=2).predict(VIDEO, CONTEXT, TARGET)
    with refused(file, "model.rope='tiled'", "'sincos_uniform'"):
        begin(f"init_from={file}", "model.rope=tiled")


def test_init_encoder_chooses_the_encoder(tmp_path):
    ema, predictor = vjepa1.build()
    online, _ = vjepa1.build(seed=1)
    file = tmp_path / "latest.pt"
    save(file, ema, predictor, online=online)

    def bias(module):
        return module.patch_embed.proj.bias.detach().numpy()

    for chosen, params, target in (
        ("", online, ema),
        ("target_encoder", ema, ema),
        ("encoder", online, online),
    ):
        state, _ = begin(f"init_from={file}", f"init_encoder={chosen}")
        np.testing.assert_array_equal(state.params["encoder"]["patch_embed"]["bias"], bias(params))
        np.testing.assert_array_equal(state.target["patch_embed"]["bias"], bias(target))
    with refused(file, "'other'", "target_encoder"):
        begin(f"init_from={file}", "init_encoder=other")
    with refused("init_encoder='encoder'", "init_from"):
        begin("init_encoder=encoder")


# Other models


@pytest.mark.parametrize(
    ("saved", "named"),
    [
        ({"classifiers": [{"module.verb_classifier.weight": 4}]}, ["EPIC-KITCHENS-100"]),
        ({"classifiers": [{"module.action_classifier.weight": 4}]}, ["EPIC-KITCHENS-100"]),
    ],
)
def test_other_models_are_refused_by_name(tmp_path, saved, named):
    encoder, _ = vjepa1.build()

    def filled(value):
        if isinstance(value, dict):
            return {key: filled(each) for key, each in value.items()}
        return [filled(each) for each in value] if isinstance(value, list) else torch.zeros(value)

    file = tmp_path / "other.pt"
    torch.save({"encoder": encoder.state_dict()} | filled(saved), file)
    with refused(file, *named, lines=1):
        open_pretrained(file)


# Probes


def probes(count):
    def one(seed):
        generator = torch.Generator().manual_seed(seed)
        cross = "pooler.cross_attention_block"
        shapes = {"pooler.query_tokens": (1, 1, 48), "linear.weight": (5, 48), "linear.bias": (5,)}
        for name, (out, into) in {
            f"{cross}.xattn.q": (48, 48),
            f"{cross}.xattn.kv": (96, 48),
            f"{cross}.mlp.fc1": (192, 48),
            f"{cross}.mlp.fc2": (48, 192),
            "pooler.blocks.0.attn.qkv": (144, 48),
            "pooler.blocks.0.attn.proj": (48, 48),
            "pooler.blocks.0.mlp.fc1": (192, 48),
            "pooler.blocks.0.mlp.fc2": (48, 192),
        }.items():
            shapes |= {f"{name}.weight": (out, into), f"{name}.bias": (out,)}
        for norm in (cross, "pooler.blocks.0"):
            for i in (1, 2):
                shapes |= {f"{norm}.norm{i}.weight": (48,), f"{norm}.norm{i}.bias": (48,)}
        return {f"module.{n}": torch.randn(s, generator=generator) for n, s in shapes.items()}

    return [one(seed) for seed in range(count)]


def test_each_probe_of_a_file_can_be_loaded(tmp_path, capsys):
    encoder, _ = vjepa1.build()
    video, all_probes = save(tmp_path / "v1.pt", encoder), probes(3)
    file = tmp_path / "ssv2.pt"
    accuracies = {"val_acc": torch.tensor([70.5, 71.25, 69.0]), "best_acc": 71.25}
    torch.save({"classifiers": all_probes, "epoch": 20, **accuracies, "accum": "x"}, file)
    for index in range(3):
        model = wmjax.load(video, heads=2, probe=file, probe_index=index)
        theirs = all_probes[index]["module.linear.bias"]
        np.testing.assert_array_equal(model.params["head"]["bias"], theirs)
        assert model.classify(VIDEO).shape == (2, 5)
    assert any(holds(note, "probe 2", 3) for note in model.notes)
    assert any(holds(note, "0: 70.5", "1: 71.25", "2: 69") for note in model.notes)
    assert any(holds(note, "best_acc", 71.25) for note in model.notes)
    door.run(["import", str(file), str(tmp_path / "probe"), "--probe=1", "--heads=4"])
    says(capsys.readouterr().out, "probe 1", "71.25", "heads=4")
    model = wmjax.load(video, heads=2, probe=tmp_path / "probe")
    np.testing.assert_array_equal(model.params["head"]["bias"], all_probes[1]["module.linear.bias"])
    for index in (3, -1):
        with refused(file, f"probe {index}", 3, 2):
            open_pretrained(file, probe=index)
    with refused(tmp_path / "probe", "probe=1"):
        open_pretrained(tmp_path / "probe", probe=1)
