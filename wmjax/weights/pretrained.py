"""Opens pretrained weights: finds their format and the model that they belong to."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from wmjax.errors import UserError, check_above, check_choice
from wmjax.models.base import Blueprint, InputSpec, freeze_patterns
from wmjax.models.dense import TAPS
from wmjax.models.encoder import PIXEL_MEAN, PIXEL_STD, SIZES
from wmjax.nn import rope
from wmjax.nn.compute import Compute
from wmjax.nn.norm import EPS
from wmjax.run.files import check_utf8
from wmjax.run.saved import Saved
from wmjax.weights import meta, tables
from wmjax.weights.files import (
    Named,
    Tensors,
    find,
    open_safetensors,
    open_safetensors_files,
    open_torch,
    read_json,
    renamed,
    torch_tensors,
)
from wmjax.weights.images import Pixels
from wmjax.weights.tables import Format

CONFIG = "model.json"  # beside the weights in an imported folder
PREPROCESSORS = ("video_preprocessor_config.json", "preprocessor_config.json")  # of transformers
_SPEC = InputSpec(16, 256, 256)  # for weights that take clips of any size
_DROID = InputSpec(8, 256, 256, state_size=7, action_size=7)  # of the released V-JEPA 2-AC


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Opened weights, of which only names and shapes are read yet.

    where: path that errors name. model: the `model` group that builds the model; for an image model
    the keys of the encoder only; {}: a classifier alone. classifier: keyword arguments of the
    AttentiveClassifier, or {}. labels: names of the classes. clip: "frames" and "size" of a
    training clip, with "width" if it is not square, or {} if the files do not say. assumed: keys of
    `model` that are a guess, because neither files nor shapes say them. notes: lines to print: what
    was assumed, changed or dropped. choices: encoders of a .pt file or a run. config, step, spec,
    statistics: of the run that the weights come from. trust: packages outside wmjax whose model may
    be imported.
    """

    where: str
    format: Format
    tensors: Tensors
    model: dict[str, Any]
    classifier: dict[str, Any] = dataclasses.field(default_factory=dict)
    labels: tuple[str, ...] = ()
    clip: dict[str, int] = dataclasses.field(default_factory=dict)
    assumed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    step: int = 0
    choices: tuple[str, ...] = ()
    spec: InputSpec = _SPEC
    statistics: Sequence[Mapping[str, Any]] = ()
    recordings: Sequence[Mapping[str, Any]] = ()
    trust: tuple[str, ...] = ()

    def blueprint(self, compute: Compute) -> Blueprint:
        """Return the blueprint of the model, computed as `compute` says."""
        group = {"name": "vjepa2", **self.model}
        built = Blueprint.of(group, self.spec, self.statistics, trust=self.trust)
        return dataclasses.replace(built, compute=compute)

    @property
    def parts(self) -> tuple[str, ...]:
        """Top-level parts of our tree that the weights contain, such as encoder and predictor."""
        form, there = self.format, self.tensors.shapes
        paths = [row.path for row in form.rows if row.layer_names(1)[0][0] in there]
        paths += [*form.zeros, *form.ones]
        return tuple(dict.fromkeys(path.partition(".")[0] for path in paths))


def open_pretrained(
    source: str | Path,
    *,
    encoder: str = "",
    heads: int | None = None,
    predictor_heads: int | None = None,
    probe: int = 0,
    trust: tuple[str, ...] = (),
) -> Pretrained:
    """Open a folder, a model on the Hub (OWNER/NAME), a .pt file, or the workdir of a run.

    A run gives its newest checkpoint, with the EMA target in place of the parameters it follows.

    encoder: of a run or a checkpoint of Meta: target_encoder (the EMA, which all of Meta's
    evaluations use) or encoder; "": the EMA where there is one. heads, predictor_heads: attention
    heads of encoder (or probe) and predictor of a .pt file, which does not say them; None: assumed,
    and noted. probe: which of the probes in a file of Meta's evaluation, from 0. trust: packages
    outside wmjax from which the model of a run may be imported. Raises UserError if no format fits.
    """
    for key, value in {"heads": heads, "predictor_heads": predictor_heads}.items():
        if value is not None:
            check_above(key, value)
    path = find(str(source))
    if file := path if path.is_file() else _raw(path):
        return _meta(file, encoder, heads, predictor_heads, probe)
    is_run = (path / "checkpoints").is_dir() and not (path / CONFIG).is_file()
    asked: dict[str, Any] = {"heads": heads, "predictor_heads": predictor_heads, "probe": probe}
    asked |= {} if is_run else {"encoder": encoder}
    if named := ", ".join(f"{key}={value!r}" for key, value in asked.items() if value):
        raise UserError(f"{path}: {named}: chosen for .pt files of Meta only; wanted none for this")
    if is_run:
        return _run(path, encoder, trust)
    if (path / CONFIG).is_file():
        return _own(path)
    config = read_json(
        path / "config.json",
        "a model in safetensors with its configuration, or the workdir of a run",
    )
    kind = config.get("model_type")
    readers = {
        "vjepa2": _vjepa2,
        "vit": _vit,
        "dinov2": _dinov2,
        "dinov2_with_registers": _dinov2,
    }
    if kind not in readers:
        raise UserError(
            f"{path / 'config.json'}: model_type={kind!r}: wanted one of {', '.join(readers)}"
        )
    return readers[kind](path, config, open_safetensors(path))


def _raw(folder: Path) -> Path | None:
    """Return the weights of a folder that holds them under Meta's names; None: it does not."""
    known = any((folder / name).exists() for name in ("checkpoints", CONFIG))
    files = list(folder.glob("*.safetensors"))
    if known or len(files) != 1:
        return None
    names = open_safetensors_files(files).shapes
    return files[0] if any(f".{name}".endswith(meta.RAW) for name in names) else None


def _own(folder: Path) -> Pretrained:
    saved = read_json(folder / CONFIG, "a model of wmjax")
    tensors = open_safetensors(folder)
    return Pretrained(
        str(folder),
        tables.own(list(tensors.shapes)),
        tensors,
        saved.get("model", {}),
        saved.get("classifier", {}),
        tuple(saved.get("labels", ())),
        saved.get("clip", {}),
        spec=InputSpec(**saved["spec"]) if "spec" in saved else _SPEC,
    )


def _run(workdir: Path, encoder: str, trust: tuple[str, ...]) -> Pretrained:
    check_utf8(str(workdir))
    saved = Saved(workdir / "checkpoints")
    config = saved.meta["config"]
    data, model = config["data"], {k: v for k, v in config["model"].items() if k != "pretrained"}
    size = data["image_size"], data.get("image_width") or data["image_size"]
    clip = {"frames": data["frames"], "size": size[0]}
    if size[1] != size[0]:
        clip["width"] = size[1]
    spec = InputSpec(data["frames"], *size)
    if "spec" in saved.meta:  # checkpoints of older commits have none
        spec = InputSpec(**saved.meta["spec"])
    statistics = saved.meta.get("statistics", ())
    freeze = freeze_patterns(config.get("optim", {}).get("freeze", ""))
    blueprint = Blueprint.of(model, spec, statistics, freeze, trust)
    choices = ("encoder", "target_encoder") if blueprint.followed_paths else ("encoder",)
    check_choice("encoder", encoder or choices[-1], choices)
    names = _saved_names(blueprint, ema=encoder != "encoder")
    arrays: dict[str, Any] = {}

    def read(path: str) -> Any:
        if names[path] not in arrays:  # reading one array takes as long as reading all
            arrays.update(saved.read(names.values()))
        return arrays.pop(names[path])

    tensors = Tensors(
        {path: saved.shapes[name] for path, name in names.items()},
        {path: saved.dtypes[name] for path, name in names.items()},
        read,
    )
    return Pretrained(
        str(workdir),
        tables.own(list(names)),
        tensors,
        model,
        clip=clip,
        notes=(f"step {saved.step} of a run: {_origins(names)}",),
        config=config,
        step=saved.step,
        choices=choices,
        spec=spec,
        statistics=statistics,
        recordings=saved.meta.get("recordings", ()),
        trust=trust,
    )


def _origins(names: Mapping[str, str]) -> str:
    """List the parts of a run's model and mark the EMA targets; names: as _saved_names returns."""
    parts = dict.fromkeys(path.partition(".")[0] for path in names)
    ema = {path.partition(".")[0] for path, name in names.items() if _is_ema(name)}
    return ", ".join(f"{part} (the EMA target)" if part in ema else part for part in parts)


def _saved_names(blueprint: Blueprint, ema: bool) -> dict[str, str]:
    """Return path -> name in the checkpoint for each variable of a run's model.

    ema: take the EMA target in place of the parameters that it follows.
    """
    trained = flatten_dict(blueprint.mask, sep=".")
    names = {path: f"{'params' if yes else 'frozen'}.{path}" for path, yes in trained.items()}
    for at, path in flatten_dict(blueprint.followed_paths, sep=".").items():
        path = path.replace("/", ".")
        if ema and trained[path]:
            names[path] = f"target.{at}"
    return names


def _is_ema(name: str) -> bool:
    return name.startswith("target.")


def _value(folder: Path, config: Mapping[str, Any], key: str, default: float) -> Any:
    """Return a number of config.json, which lacks keys that have their default in transformers."""
    value, wanted = config.get(key, default), type(default)
    if isinstance(value, bool) or not isinstance(value, (int, float) if wanted is float else int):
        raise UserError(f"{folder / 'config.json'}: {key}={value!r}: wanted {wanted.__name__}")
    if value <= 0:
        raise UserError(f"{folder / 'config.json'}: {key}={value!r}: wanted a number above 0")
    return wanted(value)


def _only(folder: Path, config: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise UserError for values with which the same weights would compute something else."""
    for key, value in wanted.items():
        if (found := config.get(key, value)) != value:
            raise UserError(
                f"{folder / 'config.json'}: {key}={found!r}: wmjax supports {value!r} only"
            )


def _vjepa2(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> Pretrained:
    def get(key: str, default: float) -> Any:
        return _value(folder, config, key, default)

    only = {"in_chans": 3, "hidden_act": "gelu", "layer_norm_eps": EPS, "pred_mlp_ratio": 4.0}
    _only(folder, config, {**only, "qkv_bias": True})
    if (pixels := _pixels(folder)) and not np.allclose(pixels, Pixels()):
        raise UserError(
            f"{folder}: its preprocessor file has image_mean={pixels.mean}, "
            f"image_std={pixels.std}: wanted {PIXEL_MEAN} and {PIXEL_STD} for V-JEPA 2"
        )
    meta.refuse_other_models(str(folder), [*tensors.shapes, *filter(config.get, config)])
    width, heads = get("hidden_size", 1024), get("num_attention_heads", 16)
    model = {
        "width": width,
        "depth": get("num_hidden_layers", 24),
        "heads": heads,
        "mlp_ratio": int(width * get("mlp_ratio", 4.0)) / width,  # transformers rounds down
        "patch": get("patch_size", 16),
        "tubelet": get("tubelet_size", 2),
        "rope": "tiled",
        "predictor_width": get("pred_hidden_size", 384),
        "predictor_depth": get("pred_num_hidden_layers", 12),
        "predictor_heads": get("pred_num_attention_heads", 12),
        **_mask_tokens(get("pred_num_mask_tokens", 10)),
    }
    clip = {"frames": get("frames_per_clip", 64), "size": get("crop_size", 256)}
    classifier: dict[str, Any] = {}
    labels: tuple[str, ...] = ()
    if "classifier.weight" in tensors.shapes:
        classifier = {
            "width": width,
            "heads": heads,
            "classes": tensors.shapes["classifier.weight"][0],
            "depth": get("num_pooler_layers", 3),
            "eps": 1e-6,
        }
        names = config.get("id2label", {})
        labels = tuple(names[key] for key in sorted(names, key=int))
    table = tables.VJEPA2_CLASSIFIER if classifier else tables.VJEPA2
    return Pretrained(str(folder), table, tensors, model, classifier, labels, clip)


def _vit(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> Pretrained:
    width = _value(folder, config, "hidden_size", 768)
    ratio = _value(folder, config, "intermediate_size", 3072) / width
    return _image(folder, config, tensors, tables.vit, ratio, 1e-12)


def _dinov2(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> Pretrained:
    _only(folder, config, {"use_swiglu_ffn": False})
    width = _value(folder, config, "hidden_size", 768)
    ratio = int(width * _value(folder, config, "mlp_ratio", 4.0)) / width
    return _image(folder, config, tensors, tables.dinov2, ratio, 1e-6)


def _pixels(folder: Path) -> Pixels | None:
    """Return the pixel normalisation that a folder states; None if it does not say.

    Raises UserError for pixels that are not (RGB / 255 - mean) / std.
    """
    path = next((folder / name for name in PREPROCESSORS if (folder / name).is_file()), None)
    if path is None:
        return None
    found = read_json(path, "image_mean and image_std")
    for key, wanted in (("do_rescale", 1), ("do_normalize", 1), ("rescale_factor", 1 / 255)):
        value = found.get(key)  # absent or null: the default of transformers, as wanted
        if value is not None and not (_is_number(value) and math.isclose(value, wanted)):
            raise UserError(f"{path}: {key}={value!r}: wanted {wanted:.8g}")
    mean_std = []
    for key in Pixels._fields:
        value = found.get(f"image_{key}")
        if not isinstance(value, list) or len(value) != 3 or not all(map(_is_number, value)):
            raise UserError(f"{path}: image_{key}={value!r}: wanted three numbers")
        mean_std.append(tuple(value))
    return Pixels(*mean_std)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _image(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Tensors,
    table_of: Callable[[str, Pixels], Format],
    mlp_ratio: float,
    eps: float,
) -> Pretrained:
    _only(folder, config, {"num_channels": 3, "hidden_act": "gelu", "qkv_bias": True})
    side, patch = (
        _value(folder, config, key, default)
        for key, default in (("image_size", 224), ("patch_size", 16))
    )
    model = {
        "width": _value(folder, config, "hidden_size", 768),
        "depth": _value(folder, config, "num_hidden_layers", 12),
        "heads": _value(folder, config, "num_attention_heads", 12),
        "mlp_ratio": mlp_ratio,
        "patch": patch,
        "position_grid": side // patch,
    }
    wrapped = f"{config['model_type']}."  # prefix of names in a model with a head
    prefix = wrapped if any(name.startswith(wrapped) for name in tensors.shapes) else ""
    pixels = _pixels(folder)
    table = table_of(prefix, pixels or Pixels())
    dropped = [name for name in tensors.shapes if table.ignores(name)]
    notes = [
        f"image model: its patch kernel of {patch} px is resized to model.patch and spread over "
        "the tubelet; positions in time start at 0",
        f"dropped: {', '.join(dropped)}",
    ]
    if pixels is None:
        notes.append("no preprocessor_config.json: assumed the pixel normalisation of wmjax")
    elif pixels != Pixels():
        notes.append("its pixel normalisation is folded into the patch embedding")
    if config["model_type"] == "dinov2_with_registers":
        notes.append("positions are resized as in Dinov2Model, without antialiasing")
    if (eps := _value(folder, config, "layer_norm_eps", eps)) != EPS:
        notes.append(f"layer norm epsilon: {EPS:g} in place of {eps:g}, a negligible change")
    return Pretrained(str(folder), table, tensors, model, notes=tuple(notes))


def _meta(
    path: Path, encoder: str, heads: int | None, predictor_heads: int | None, probe: int
) -> Pretrained:
    where, opened = str(path), None
    if path.suffix == ".safetensors":
        opened = open_safetensors_files([path])
        saved: dict[str, Any] = {name: Named(name, shape) for name, shape in opened.shapes.items()}
    elif path.suffix in (".pt", ".pth", ".tar"):
        saved = open_torch(path)
    else:
        raise UserError(
            f"{path}: not a model; wanted a folder, OWNER/NAME on the Hub, or a file of Meta's "
            "weights: .pt or .safetensors"
        )
    if "classifiers" in saved:
        return _meta_classifier(where, saved, heads, probe)
    if probe:
        raise UserError(f"{where}: probe={probe}: has no classifiers; wanted a file that has them")
    named = meta.plain_names(where, saved)
    meta.refuse_other_models(where, named)
    parts = meta.choose_parts(where, saved, named, encoder)
    tensors = torch_tensors(parts.tensors) if opened is None else renamed(opened, parts.tensors)
    return of_meta(where, tensors, parts.encoder, parts.choices, heads, predictor_heads)


def of_meta(
    where: str,
    tensors: Tensors,
    encoder: str,
    choices: tuple[str, ...],
    heads: int | None,
    predictor_heads: int | None,
) -> Pretrained:
    """Find which of Meta's models these tensors are; names: as meta.choose_parts returns."""
    acts = "predictor.action_encoder.weight" in tensors.shapes
    dense = f"{encoder}.patch_embed_img.proj.weight" in tensors.shapes
    sizes = _dense_sizes if dense else partial(_meta_sizes, acts=acts)
    model = sizes(where, tensors, encoder)
    released = {size[:2]: size[2] for size in SIZES.values()}.get((model["width"], model["depth"]))
    notes, clip, assumed = [f"the encoder is {encoder}"], {}, []
    if positions := meta.fixed_positions(where, tensors, encoder):
        kind, (time, rows, _) = positions
        if meta.is_released(where, model):
            notes.append(
                f"V-JEPA 2 as released, as it has {model['num_mask_tokens']} mask tokens: its "
                "fixed sin-cos positions are not used"
            )
        else:
            notes.append(f"V-JEPA 1: model.rope={kind!r}, fixed sin-cos positions and no RoPE")
            model["rope"] = kind
            clip = {"frames": time * model["tubelet"], "size": rows * model["patch"]}

    def choose(key: str, given: int | None, known: int | None, guess: int) -> None:
        count = model[key] = given or known or max(1, guess)
        if given:
            notes.append(f"{key}={count}, as given; the file does not say")
            return
        each = model[key.replace("heads", "width")] // count
        notes.append(
            f"assumed {key}={count}, each {each} wide; the file does not say: {key}= says otherwise"
        )
        if not known:
            assumed.append(key)

    choose("heads", heads, released, model["width"] // 64)
    if acts:
        choose("predictor_heads", predictor_heads, None, model["predictor_width"] // 64)
        notes.append("V-JEPA 2-AC: model.action='pose', actions and states as recorded")
    elif (narrow := model.get("predictor_width")) and model.get("rope") not in rope.FIXED:
        choose("predictor_heads", predictor_heads, 12 if narrow == 384 else None, narrow // 32)
    elif narrow:  # V-JEPA 1 takes the encoder's
        known = None if assumed else model["heads"]
        choose("predictor_heads", predictor_heads, known, model["heads"])
    table = (tables.meta_ac if acts else tables.meta)(encoder)
    return Pretrained(
        where,
        tables.meta_dense(encoder, tensors.shapes) if dense else table,
        tensors,
        model,
        clip=clip,
        spec=_DROID if acts else _SPEC,
        assumed=tuple(assumed),
        notes=tuple(notes),
        choices=choices,
    )


def _meta_sizes(where: str, tensors: Tensors, encoder: str, acts: bool) -> dict[str, Any]:
    """Return the keys of `model` that the shapes of a checkpoint say; acts: V-JEPA 2-AC."""
    model = {**_encoder_sizes(where, tensors, encoder), "rope": "tiled"}
    if any(name.startswith("predictor.") for name in tensors.shapes):
        model |= _predictor_sizes(where, tensors, "predictor.predictor_embed.weight")
        if acts:
            own = {"action": "pose", "normalize": False, "state_loss": 0.0}
            return {"name": "vjepa2_ac", **model, **own}
        _shape(where, tensors, "predictor.mask_tokens.0", 3)
        model |= _mask_tokens(_count(tensors.shapes, "predictor.mask_tokens.*"))
    return model


def _dense_sizes(where: str, tensors: Tensors, encoder: str) -> dict[str, Any]:
    """Return the keys of `model` that the shapes of a checkpoint of V-JEPA 2.1 say."""
    shapes = tensors.shapes
    model = {"name": "vjepa21", **_encoder_sizes(where, tensors, encoder)}
    if any(name.startswith("predictor.") for name in shapes):
        several = "predictor.predictor_embed.0.weight" in shapes
        embed = f"predictor.predictor_embed.{'2.' if several else ''}weight"
        outputs = _shape(where, tensors, "predictor.predictor_proj.weight", 2)[0]
        levels = TAPS if several else 1
        model |= _predictor_sizes(where, tensors, embed)
        model |= _mask_tokens(_count(shapes, "predictor.mask_tokens.*"))
        own = outputs == levels * model["width"]
        model |= {"levels": levels, "teacher_width": 0 if own else outputs // levels}
    return model


def _encoder_sizes(where: str, tensors: Tensors, encoder: str) -> dict[str, Any]:
    width, _, tubelet, patch, _ = _shape(where, tensors, f"{encoder}.patch_embed.proj.weight", 5)
    hidden, _ = _shape(where, tensors, f"{encoder}.blocks.0.mlp.fc1.weight", 2)
    return {
        "width": width,
        "depth": _count(tensors.shapes, f"{encoder}.blocks.*.norm1.weight"),
        "mlp_ratio": hidden / width,
        "patch": patch,
        "tubelet": tubelet,
    }


def _predictor_sizes(where: str, tensors: Tensors, embed: str) -> dict[str, Any]:
    return {
        "predictor_width": _shape(where, tensors, embed, 2)[0],
        "predictor_depth": _count(tensors.shapes, "predictor.predictor_blocks.*.norm1.weight"),
    }


def _shape(where: str, tensors: Tensors, name: str, rank: int) -> tuple[int, ...]:
    found = tensors.shapes.get(name, ())
    if len(found) != rank:
        raise UserError(
            f"{where}: not a V-JEPA 2: {name} is {found or 'absent'}; wanted {rank} axes"
        )
    return found


def _mask_tokens(count: int) -> dict[str, int]:
    """Return the keys of `model` for a number of mask tokens; Meta takes number 1 modulo it."""
    return {"num_mask_tokens": count} | ({"mask_index": 0} if count == 1 else {})


def _meta_classifier(
    where: str, saved: Mapping[str, Any], heads: int | None, index: int
) -> Pretrained:
    """Open one of the probes that Meta's evaluation trains at once (twenty, usually)."""
    probes = saved["classifiers"]
    if not isinstance(probes, list) or not probes or not all(isinstance(p, dict) for p in probes):
        raise UserError(f"{where}: classifiers: wanted a list of state dicts")
    if not 0 <= index < len(probes):
        raise UserError(
            f"{where}: probe {index} of {len(probes)} in classifiers; wanted 0 to {len(probes) - 1}"
        )
    named = meta.plain_names(where, {"classifiers": {index: probes[index]}})
    meta.refuse_other_models(where, named)
    tensors, name = torch_tensors(named), f"classifiers.{index}.linear.weight"
    head = tensors.shapes.get(name)
    if head is None or len(head) != 2:
        raise UserError(f"{where}: not an attentive probe: {name} is {head}; wanted 2 axes")
    classifier = {
        "width": head[1],
        "heads": heads or 16,
        "classes": head[0],
        "depth": _count(tensors.shapes, f"classifiers.{index}.pooler.blocks.*.norm1.weight"),
        "eps": 1e-5,
    }
    notes = [f"probe {index} of {len(probes)}, counted from 0"]
    notes += meta.accuracies(saved)
    notes.append(
        f"heads={heads}, as given; the file does not say"
        if heads
        else "assumed 16 heads, as in all of Meta's evaluations; the file does not say"
    )
    table = tables.meta_classifier(index)
    return Pretrained(where, table, tensors, {}, classifier, notes=tuple(notes))


def _count(shapes: Mapping[str, Any], pattern: str) -> int:
    return sum(tables.matches(pattern, name) for name in shapes)
