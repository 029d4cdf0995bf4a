"""V-JEPA 2.1 equals Meta's code (dense_oracle.py): features, predictions, a training step."""

import json
from pathlib import Path

import dense_inputs
import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest
from clips import batch_of
from flax import nnx
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file
from says import lines_with, refused

import wmjax
from wmjax import initial
from wmjax.models import base
from wmjax.models.vjepa21 import distances
from wmjax.nn.compute import Compute
from wmjax.step import in_turn
from wmjax.weights import __main__ as door
from wmjax.weights import load, open_pretrained
from wmjax.weights.files import Tensors
from wmjax.weights.load import assemble
from wmjax.weights.pretrained import Pretrained, of_meta

KINDS = ("dense", "distilled")


@pytest.fixture(scope="module")
def record():
    with np.load(Path(__file__).parent / "data/parity_vjepa21.npz") as arrays:
        return dict(arrays)


def named(record, prefix):
    """Return Meta's weights under a prefix, by their names."""
    start = f"{prefix}/"
    return {
        name.removeprefix(start): (value / np.float32(dense_inputs.GRAIN)).astype(np.float32)
        for name, value in record.items()
        if name.startswith(start)
    }


def weights_of(record, kind):
    """Return the weights of a model; the distilled one has the encoder of the dense one."""
    found = named(record, "dense/weights")
    if kind == "dense":
        return found
    encoder = {name: value for name, value in found.items() if name.startswith("encoder.")}
    return encoder | named(record, f"{kind}/weights")


@pytest.fixture(scope="module", params=KINDS)
def opened(request, record, tmp_path_factory):
    """A file of raw safetensors, and the model that it is."""
    file = tmp_path_factory.mktemp(request.param) / "raw.safetensors"
    save_file(weights_of(record, request.param), file)
    source = open_pretrained(file, heads=2, predictor_heads=2)
    return request.param, source, file


def params_of(source):
    blueprint = source.blueprint(Compute())
    return blueprint, load(source, blueprint.shapes, blueprint.settings)


def close(found, wanted):
    assert found.shape == wanted.shape
    assert np.abs(np.asarray(found) - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("name", dense_inputs.INPUTS)
def test_features_and_predictions(opened, record, name):
    kind, source, file = opened
    frames, size = dense_inputs.INPUTS[name]
    blueprint, params = params_of(source)
    model = base.merge(blueprint.graph, params)
    levels = blueprint.settings.levels
    video = dense_inputs.pixels(7, (2, frames, size, size, 3))
    wanted = {key: record[f"{kind}/{name}/{key}"] for key in ("last", "levels", "context")}
    masks = [tuple(record[f"{kind}/{name}/{side}_ids"] for side in ("context", "target"))]

    @jax.jit
    def run(video):
        grid = model.encoder.token_grid(*video.shape[1:4])
        context = model.encoder(video, masks[0][0], levels=levels)
        predicted = model.predictor(context, masks, grid, video.shape[1] == 1)
        return model.encoder(video), model.encoder(video, levels=levels), context, predicted

    last, all_levels, context, ((of_context, of_target),) = run(video)
    at = dense_inputs.shown(frames, size)
    close(last[:, at], wanted["last"])
    close(all_levels[:, at], wanted["levels"])
    close(context, wanted["context"])
    close(of_context, record[f"{kind}/{name}/context_prediction"])
    close(of_target, record[f"{kind}/{name}/target_prediction"])
    loaded = wmjax.load(file, heads=2, predictor_heads=2)
    close(loaded.predict(video, *masks[0]), record[f"{kind}/{name}/target_prediction"])


def stream(record, name):
    frames, size, budgets = dense_inputs.STREAMS[name]
    start = f"step/{name}"
    masks = [
        (record[f"{start}/context_ids/{i}"], record[f"{start}/target_ids/{i}"])
        for i in range(len(budgets))
    ]
    return batch_of(dense_inputs.pixels(8, (2, 1, frames, size, size, 3)), masks)


@pytest.fixture(scope="module")
def step(record, tmp_path_factory):
    """Loss, gradients and outputs of a training step on both streams; and the weights."""
    file = tmp_path_factory.mktemp("step") / "raw.safetensors"
    of_target = {f"target_encoder.{k}": v for k, v in named(record, "step/target").items()}
    save_file(weights_of(record, "dense") | of_target, file)
    own = {"heads": 2, "predictor_heads": 2}
    source = open_pretrained(file, encoder="encoder", **own)
    loss = {"image_loss": 1.0, "context_loss": dense_inputs.CONTEXT}
    group = source.model | loss | {"context_warmup": dense_inputs.WARMUP}
    blueprint = base.Blueprint.of(group, base.InputSpec(4, 64, 64))
    params = load(source, blueprint.shapes, blueprint.settings)
    ema = {"encoder": blueprint.shapes["encoder"]}
    target = load(open_pretrained(file, **own), ema, blueprint.settings)["encoder"]
    params["predictor"]["updates"] = jnp.float32(dense_inputs.UPDATES)
    batch = stream(record, "video").replace(beside={"images": stream(record, "images")})
    trained, frozen, target = blueprint.divide(params, target)

    @jax.jit
    def run(trained):
        def of_stream(trained, stream, batch):
            def of(trained):
                model, whole = blueprint.join(trained, frozen, target)
                output = model.loss(whole, batch, jax.random.key(0))
                return output.loss, output

            (loss, output), gradients = jax.value_and_grad(of, has_aux=True)(trained)
            return (loss, gradients), {stream: output}

        return in_turn(of_stream, trained, batch, blueprint.abstract.stream_weight)

    return run(trained), source


def test_losses_of_both_streams(record, step):
    ((total, _), outputs), _ = step
    assert float(total) == pytest.approx(float(record["step/total"]), rel=1e-6)
    for name, output in zip(("video", "images"), (outputs[""], outputs["images"]), strict=True):
        assert float(output.scalars["context_weight"]) == pytest.approx(record["step/weight"])
        assert float(output.updates["predictor"]["updates"]) == dense_inputs.UPDATES + 1
        for side, suffix in (("target", ""), ("context", "_context")):
            masks = len(dense_inputs.STREAMS[name][2])
            mean = np.mean([float(output.terms[f"{i}{suffix}"].loss) for i in range(masks)])
            assert mean == pytest.approx(float(record[f"step/{name}/{side}"]), rel=1e-6)


def test_gradients_of_both_streams(record, step):
    ((_, gradients), _), source = step
    found = flatten_dict(gradients, sep=".")
    theirs = {
        name.removeprefix("step/gradients/"): value
        for name, value in record.items()
        if name.startswith("step/gradients/")
    }
    tensors = Tensors(
        {name: value.shape for name, value in theirs.items()},
        dict.fromkeys(theirs, "float32"),
        theirs.__getitem__,
    )
    as_weights = Pretrained("gradients", source.format, tensors, source.model)
    wanted = dict(assemble(as_weights, found))
    assert wanted.keys() == found.keys()
    for path, value in wanted.items():
        bound = 1e-4 * np.abs(value).max() + 1e-7
        np.testing.assert_allclose(found[path], value, atol=bound, rtol=0, err_msg=path)
        used = "mask_tokens" in path or np.abs(value).max() > 1e-7
        assert used, path


def test_distances_equal_the_references_loop(record):
    for name, (frames, size, budgets) in dense_inputs.STREAMS.items():
        batch = stream(record, name)
        side = size // dense_inputs.PATCH
        for i in range(len(budgets)):
            ids = batch.target.context_ids_BK[i], batch.target.target_ids_BM[i]
            found = np.sqrt(distances(*ids, (max(frames // 2, 1), side, side)))
            np.testing.assert_allclose(found, record[f"step/{name}/distance/{i}"], rtol=1e-6)


@pytest.mark.parametrize("size", ["base", "large", "giant", "gigantic"])
def test_the_released_sizes_fit_name_by_name(record, size):
    """Every tensor of Meta's classes at full size has its parameter here, and none is left over."""
    shapes = json.loads(bytes(record["shapes"]))[size]
    counts = {"base": 320, "large": 464, "giant": 802, "gigantic": 898}
    assert len(shapes) == counts[size]
    built = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    source = abstract_source(built)
    assert not source.assumed
    blueprint = source.blueprint(Compute())
    named_size = base.Blueprint.of({"name": "vjepa21", "size": size}, base.InputSpec(64, 384, 384))
    wanted = flatten_dict(named_size.shapes["encoder"], sep="/")
    found = flatten_dict(blueprint.shapes["encoder"], sep="/")
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in wanted.items()}
    assert blueprint.settings.encoder == named_size.settings.encoder
    leaves = {".".join(path): leaf for path, leaf in flatten_dict(blueprint.shapes).items()}
    assert next(assemble(source, leaves))  # one error for all names, before the first is read


def abstract_source(arrays):
    """Open tensors as the file of Meta that they are from."""
    tensors = Tensors(
        {name: array.shape for name, array in arrays.items()},
        dict.fromkeys(arrays, "float32"),
        arrays.__getitem__,
    )
    return of_meta("meta.pt", tensors, "encoder", ("encoder",), None, None)


def test_images_and_video_have_their_own_path(opened):
    """A still clip is no image: patches and embeddings differ."""
    *_, file = opened
    model = wmjax.load(file, heads=2, predictor_heads=2)
    picture = dense_inputs.pixels(9, (1, 64, 64, 3))
    image, still = model.encode(picture), model.encode(np.repeat(picture, 2, axis=0))
    assert image.shape == still.shape == (16, 16)
    assert np.abs(image - still).max() > 0.1


def test_encoding_a_frame_is_one_line(opened):
    """At the released models' 384 px, from a frame of any size."""
    *_, file = opened
    model = wmjax.load(file, heads=2, predictor_heads=2)
    frame = dense_inputs.pixels(9, (384, 400, 3))
    features = model.encode(frame, size=384)
    assert features.shape == (576, 16)
    np.testing.assert_array_equal(features, model.encode(frame[:, 8:392]))


def test_the_encoder_frozen_in_vjepa2_ac_sees_images(opened):
    _, source, file = opened
    own = {"heads": 2, "predictor_heads": 2, "predictor_width": 32, "predictor_depth": 1}
    sizes = {key: source.model[key] for key in ("width", "depth", "mlp_ratio", "patch")}
    group = {"name": "vjepa2_ac", "encoder_kind": "vjepa21", "rope": "interleaved"} | sizes | own
    spec = base.InputSpec(4, 64, 64, action_size=2)
    blueprint = base.Blueprint.of(group, spec)
    shapes = {"encoder": blueprint.shapes["encoder"]}
    encoder = load(source, shapes, blueprint.settings)["encoder"]
    model = base.merge(blueprint.graph, base.split(blueprint.create(nnx.Rngs(0)))[1])
    video = dense_inputs.pixels(9, (1, 3, 64, 64, 3))
    found = model.features(encoder, video)
    alone = wmjax.load(file, heads=2, predictor_heads=2).encode(video[0][:, None])
    np.testing.assert_allclose(found[0], alone.reshape(-1, 16), atol=1e-5)
    assert not blueprint.abstract.trained("encoder/norms/0/scale")


def test_a_run_starts_from_a_distilled_encoder(record, tmp_path):
    """Its predictor is a teacher's and does not fit, so init_parts leaves it out."""
    file = tmp_path / "raw.safetensors"
    save_file(weights_of(record, "distilled"), file)
    sizes = ("width=16", "depth=12", "heads=2", "mlp_ratio=2.0", "patch=16", "name=vjepa21")
    own = [f"model.{each}" for each in sizes]
    steps = micro.prepare(micro.config(*own, "data.image_size=128")).steps
    with refused("model.levels=4", "model.output_width=64", lines=4):
        initial.make_state(steps, init_from=str(file), pretrained="")
    with refused("init_parts='decoder'", "encoder, predictor"):
        initial.make_state(steps, init_from=str(file), pretrained="", init_parts="decoder")
    state, origin = initial.make_state(
        steps, init_from=str(file), pretrained="", init_parts="encoder"
    )
    assert lines_with(origin, "encoder", "predictor")
    wanted = record["dense/weights/encoder.norms_block.3.weight"] / dense_inputs.GRAIN
    for encoder in (state.params["encoder"], state.target):
        np.testing.assert_array_equal(encoder["norms"]["3"]["scale"], wanted)


def test_metas_torch_files_come_in_and_go_out(record, tmp_path):
    """Released files: ema_encoder with a distilled predictor, target_encoder with a dense one."""
    torch = pytest.importorskip("torch")
    for kind, key in (("distilled", "ema_encoder"), ("dense", "target_encoder")):
        saved = {key: {}, "predictor": {}, "epoch": 3}
        for name, value in weights_of(record, kind).items():
            part, _, rest = name.partition(".")
            part, wrapper = (key, "module.backbone.") if part == "encoder" else (part, "module.")
            saved[part][f"{wrapper}{rest}"] = torch.from_numpy(value)
        torch.save(saved, tmp_path / "meta.pt")
        kept, again = tmp_path / kind, tmp_path / f"{kind}.pt"
        heads = ["--heads=2", "--predictor-heads=2"]
        door.run(["import", str(tmp_path / "meta.pt"), str(kept), *heads])
        model = wmjax.load(kept)
        levels, teacher = (1, dense_inputs.TEACHER) if kind == "distilled" else (4, 0)
        assert model.config["model"]["levels"] == levels
        assert model.config["model"]["teacher_width"] == teacher
        door.run(["export", str(kept), str(again)])
        back = torch.load(again, weights_only=True)
        assert back.keys() == {"encoder", "target_encoder", "ema_encoder", "predictor"}
        for part, name in ((key, "module.backbone."), ("predictor", "module.")):
            assert {f"{name}{each}" for each in back[part]} == saved[part].keys()
            for each, value in back[part].items():
                torch.testing.assert_close(value, saved[part][name + each])


def test_all_names_that_do_not_fit_are_in_one_error(record, tmp_path):
    weights = weights_of(record, "dense")
    del weights["encoder.norms_block.2.weight"]
    weights["encoder.norm.weight"] = weights.pop("encoder.video_mod_embed")
    weights["predictor.predictor_proj_context.bias"] = np.zeros(3, np.float32)
    save_file(weights, tmp_path / "raw.safetensors")
    names = ("norms_block.2.weight", "norm.weight", "video_mod_embed", "predictor_proj_context")
    with refused("raw.safetensors", *names, lines=5):
        wmjax.load(tmp_path, heads=2, predictor_heads=2)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_what_no_image_trains_does_not_decay(weight):
    group = {"name": "vjepa21", "size": "tiny", "image_loss": weight}
    model = base.Blueprint.of(group, base.InputSpec(4, 64, 64)).abstract
    for path in ("encoder/patch_embed_image/kernel", "predictor/modality/image"):
        assert model.decays(path) is bool(weight)
    assert model.decays("encoder/patch_embed/kernel") is True
    assert model.decays("predictor/mask_tokens").reshape(-1).tolist() == [False, True] + 6 * [False]


def test_evaluations_judge_hidden_tokens_alone(step):
    """Predictions of seen tokens are untrained during the warm-up."""
    (_, outputs), _ = step
    output = outputs[""]
    judged = {name for name, term in output.terms.items() if term.prediction_RMD is not None}
    assert judged == {"0", "1"}
    assert all(output.terms[f"{name}_context"].ids_RM is not None for name in judged)
