"""Open pretrained weights: which format they are in, and the model that they belong to."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from wmjax.errors import UserError
from wmjax.models.base import Blueprint, InputSpec, patterns_of
from wmjax.models.encoder import SIZES
from wmjax.nn.compute import Compute
from wmjax.nn.norm import EPS
from wmjax.run.checkpoint import Saved
from wmjax.weights import tables
from wmjax.weights.files import (
    Tensors,
    find,
    open_safetensors,
    open_torch,
    read_json,
    torch_tensors,
)
from wmjax.weights.images import Pixels
from wmjax.weights.tables import Format

CONFIG = "model.json"  # beside the weights in a folder of ours
_SPEC = InputSpec(16, 256, 256)  # of weights that take clips of any size
_PREFIXES = ("module.backbone.", "module.", "backbone.")  # of wrappers in Meta's checkpoints


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Opened weights; only names and shapes are read yet.

    model: the `model` group of a configuration that builds such a model; of an image model the keys
    of the encoder only. classifier: keyword arguments of its AttentiveClassifier, or {}.
    labels: names of its classes. clip: {"frames", "size"} of a clip in training, or {} where the
    files do not say. assumed: keys of model that neither the files nor the shapes tell.
    notes: what was assumed, and what is left out. choices: keys of the encoders in a file that has
    several. config, step: of the run that they come from. spec, statistics: what that run's model
    was built for. trust: packages outside wmjax whose model may be imported.
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
    trust: tuple[str, ...] = ()

    def blueprint(self, compute: Compute) -> Blueprint:
        """Return what the model is built from, to be computed in this way."""
        group = {"name": "vjepa2", **self.model}
        built = Blueprint.of(group, self.spec, self.statistics, trust=self.trust)
        return dataclasses.replace(built, compute=compute)

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the parts of our tree that it has: encoder, predictor, pooler, head."""
        return tuple(
            dict.fromkeys(
                row.ours.partition(".")[0]
                for row in self.format.rows
                if row.names(1)[0][0] in self.tensors.shapes
            )
        )


def open_pretrained(
    source: str | Path, *, encoder: str = "target_encoder", trust: tuple[str, ...] = ()
) -> Pretrained:
    """Open a folder, a model of the Hub (OWNER/NAME), a .pt file, or the workdir of a run.

    Of a run it is the newest checkpoint, with the EMA target in place of what it follows.

    encoder: which encoder of Meta's checkpoint to take: target_encoder (the EMA, which all of its
    evaluations use) or encoder. trust: packages outside wmjax whose model a run may name. Raises
    UserError where it is no model that wmjax knows.
    """
    path = find(str(source))
    if path.is_file():
        return _meta(path, encoder)
    if (path / CONFIG).is_file():
        return _own(path)
    if (path / "checkpoints").is_dir():
        return _run(path, trust)
    config = read_json(
        path / "config.json",
        "a model in safetensors, with its configuration, or the workdir of a run",
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
    )


def _run(workdir: Path, trust: tuple[str, ...]) -> Pretrained:
    saved = Saved(workdir / "checkpoints")
    config = saved.meta["config"]
    data, model = config["data"], {k: v for k, v in config["model"].items() if k != "pretrained"}
    size = data["image_size"], data.get("image_width") or data["image_size"]
    spec = InputSpec(data["frames"], *size)
    if "spec" in saved.meta:  # absent in checkpoints of older commits
        spec = InputSpec(**saved.meta["spec"])
    statistics = saved.meta.get("statistics", ())
    freeze = patterns_of(config.get("optim", {}).get("freeze", ""))
    names = _saved_names(Blueprint.of(model, spec, statistics, freeze, trust))
    held: dict[str, Any] = {}

    def read(ours: str) -> Any:
        if names[ours] not in held:  # all at once: an array by itself takes as long
            held.update(saved.read(names.values()))
        return held.pop(names[ours])

    tensors = Tensors(
        {ours: saved.shapes[name] for ours, name in names.items()},
        {ours: saved.dtypes[name] for ours, name in names.items()},
        read,
    )
    return Pretrained(
        str(workdir),
        tables.own(list(names)),
        tensors,
        model,
        clip={"frames": data["frames"], "size": data["image_size"]},
        notes=(f"step {saved.step} of a run: {_origins(names)}",),
        config=config,
        step=saved.step,
        spec=spec,
        statistics=statistics,
        trust=trust,
    )


def _origins(names: Mapping[str, str]) -> str:
    """Name the parts of a run's model, and those that are an EMA target; names: see above."""
    parts = dict.fromkeys(path.partition(".")[0] for path in names)
    ema = {path.partition(".")[0] for path, name in names.items() if name.startswith("target.")}
    return ", ".join(f"{part} (the EMA target)" if part in ema else part for part in parts)


def _saved_names(blueprint: Blueprint) -> dict[str, str]:
    """Return the name in a checkpoint of each variable of a run's model, by our path."""
    trained = flatten_dict(blueprint.mask, sep=".")
    names = {path: f"{'params' if yes else 'frozen'}.{path}" for path, yes in trained.items()}
    paths = unflatten_dict({path: path for path in trained}, sep=".")
    for place, path in flatten_dict(blueprint.abstract.followed(paths), sep=".").items():
        if trained[path]:
            names[path] = f"target.{place}"
    return names


def _value(folder: Path, config: Mapping[str, Any], key: str, default: float) -> Any:
    """Return a number of config.json; transformers leaves out what is as by default."""
    value, wanted = config.get(key, default), type(default)
    if isinstance(value, bool) or not isinstance(value, (int, float) if wanted is float else int):
        raise UserError(f"{folder / 'config.json'}: {key}={value!r}: wanted {wanted.__name__}")
    if value <= 0:
        raise UserError(f"{folder / 'config.json'}: {key}={value!r}: wanted a number above 0")
    return wanted(value)


def _only(folder: Path, config: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse values that would make another function of the same weights."""
    for key, value in wanted.items():
        if (found := config.get(key, value)) != value:
            raise UserError(
                f"{folder / 'config.json'}: {key}={found!r}: our model has {value!r} only"
            )


def _vjepa2(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> Pretrained:
    def get(key: str, default: float) -> Any:
        return _value(folder, config, key, default)

    only = {"in_chans": 3, "hidden_act": "gelu", "layer_norm_eps": EPS, "pred_mlp_ratio": 4.0}
    _only(folder, config, {**only, "qkv_bias": True})
    width, heads = get("hidden_size", 1024), get("num_attention_heads", 16)
    model = {
        "width": width,
        "depth": get("num_hidden_layers", 24),
        "heads": heads,
        "mlp_ratio": int(width * get("mlp_ratio", 4.0)) / width,  # cut to whole units there
        "patch": get("patch_size", 16),
        "tubelet": get("tubelet_size", 2),
        "rope": "tiled",
        "predictor_width": get("pred_hidden_size", 384),
        "predictor_depth": get("pred_num_hidden_layers", 12),
        "predictor_heads": get("pred_num_attention_heads", 12),
        "num_mask_tokens": get("pred_num_mask_tokens", 10),
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
    """Return how the model's images are normalised; None where the folder does not say."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return None
    found = read_json(path, "how images are normalised")
    mean_std = []
    for key in Pixels._fields:
        value = found.get(f"image_{key}")
        if not isinstance(value, list) or len(value) != 3:
            raise UserError(f"{path}: image_{key}={value!r}: wanted three numbers")
        mean_std.append(tuple(value))
    return Pixels(*mean_std)


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
    wrapped = f"{config['model_type']}."  # in a model with a head
    prefix = wrapped if any(name.startswith(wrapped) for name in tensors.shapes) else ""
    pixels = _pixels(folder)
    table = table_of(prefix, pixels or Pixels())
    dropped = [name for name in tensors.shapes if table.ignores(name)]
    notes = [
        f"an image model: its patch kernel of {patch} px is resized to model.patch and spread over "
        "the tubelet; frames look alike to it until time is learned",
        f"left out: {', '.join(dropped)}",
    ]
    if pixels is None:
        notes.append("no preprocessor_config.json: pixels taken as normalised as ours are")
    elif pixels != Pixels():
        notes.append("its normalisation of pixels is folded into the patch embedding")
    if config["model_type"] == "dinov2_with_registers":
        notes.append("positions are resized as Dinov2Model does, without antialiasing")
    if (eps := _value(folder, config, "layer_norm_eps", eps)) != EPS:
        notes.append(
            f"layer norms have epsilon {eps:g} there and {EPS:g} here, a negligible change"
        )
    return Pretrained(str(folder), table, tensors, model, notes=tuple(notes))


def _meta(path: Path, encoder: str) -> Pretrained:
    if path.suffix not in (".pt", ".pth", ".tar"):
        raise UserError(f"{path}: no model: wanted a folder, OWNER/NAME on the Hub, or a .pt file")
    found = open_torch(path)
    if "classifiers" in found:
        return _meta_classifier(path, found)
    if encoder not in found or not isinstance(found[encoder], dict):
        raise UserError(
            f"{path}: no {encoder!r} in it; there are: {', '.join(map(str, found)) or 'no names'}"
        )
    named = _state_dict(encoder, found[encoder])
    if isinstance(found.get("predictor"), dict):
        named |= _state_dict("predictor", found["predictor"])
    tensors = torch_tensors(named)
    shapes = tensors.shapes

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if len(shapes.get(name, ())) != rank:
            raise UserError(
                f"{path}: no V-JEPA 2: {name} is {shapes.get(name, 'absent')}; wanted {rank} axes"
            )
        return shapes[name]

    width, _, tubelet, patch, _ = shape(f"{encoder}.patch_embed.proj.weight", 5)
    hidden, _ = shape(f"{encoder}.blocks.0.mlp.fc1.weight", 2)
    depth = _count(shapes, f"{encoder}.blocks.*.norm1.weight")
    heads = {size[:2]: size[2] for size in SIZES.values()}.get((width, depth))
    model = {
        "width": width,
        "depth": depth,
        "heads": heads or max(1, width // 64),
        "mlp_ratio": hidden / width,
        "patch": patch,
        "tubelet": tubelet,
        "rope": "tiled",
    }
    notes, assumed = [f"the encoder is {encoder}"], []
    if heads is None:
        assumed.append("heads")
        notes.append(f"heads: {model['heads']} assumed, 64 wide; the file does not say")
    if "predictor" in found:
        predictor_width, _ = shape("predictor.predictor_embed.weight", 2)
        model |= {
            "predictor_width": predictor_width,
            "predictor_depth": _count(shapes, "predictor.predictor_blocks.*.norm1.weight"),
            "predictor_heads": 12 if predictor_width == 384 else max(1, predictor_width // 32),
            "num_mask_tokens": _count(shapes, "predictor.mask_tokens.*"),
        }
        if predictor_width != 384:
            assumed.append("predictor_heads")
            notes.append(f"heads of the predictor: {model['predictor_heads']} assumed, 32 wide")
    return Pretrained(
        str(path),
        tables.meta(encoder),
        tensors,
        model,
        assumed=tuple(assumed),
        notes=tuple(notes),
        choices=tuple(key for key in ("encoder", "target_encoder") if key in found),
    )


def _meta_classifier(path: Path, found: Mapping[str, Any]) -> Pretrained:
    """Open the probes of an evaluation: twenty were trained at once; the first is taken."""
    probes = found["classifiers"]
    if not isinstance(probes, list) or not probes or not isinstance(probes[0], dict):
        raise UserError(f"{path}: its classifiers are no list of state dicts")
    tensors = torch_tensors(_state_dict("classifiers.0", probes[0]))
    head = tensors.shapes.get("classifiers.0.linear.weight")
    if head is None or len(head) != 2:
        raise UserError(f"{path}: no attentive probe: classifiers.0.linear.weight is {head}")
    classifier = {
        "width": head[1],
        "heads": 16,
        "classes": head[0],
        "depth": _count(tensors.shapes, "classifiers.0.pooler.blocks.*.norm1.weight"),
        "eps": 1e-5,
    }
    notes = (
        f"the first of {len(probes)} probes",
        "heads: 16 assumed, as all of Meta's evaluations have; the file does not say",
    )
    return Pretrained(str(path), tables.META_CLASSIFIER, tensors, {}, classifier, notes=notes)


def _state_dict(key: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors of one state dict, named KEY.NAME without the prefixes of wrappers."""
    named = {}
    for name, tensor in tensors.items():
        prefix = next((p for p in _PREFIXES if name.startswith(p)), "")
        if hasattr(tensor, "shape"):
            named[f"{key}.{name.removeprefix(prefix)}"] = tensor
    return named


def _count(shapes: Mapping[str, Any], pattern: str) -> int:
    return sum(tables.matches(pattern, name) for name in shapes)
