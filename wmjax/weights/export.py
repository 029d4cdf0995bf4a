"""Exports a V-JEPA 2, with or without a classifier, as a folder that transformers opens."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wmjax.errors import UserError
from wmjax.models import base
from wmjax.models.encoder import PIXEL_MEAN, PIXEL_STD
from wmjax.nn.norm import EPS
from wmjax.run.files import to_json
from wmjax.weights.files import MODEL, write_safetensors, write_torch
from wmjax.weights.load import abstract_params, assemble, describe, leaves_of, wanted
from wmjax.weights.meta import EMA
from wmjax.weights.pretrained import PREPROCESSORS, Pretrained
from wmjax.weights.tables import VJEPA2, VJEPA2_CLASSIFIER, Format, meta_ac, meta_dense


def export(
    params: base.Params,
    model: Mapping[str, Any],
    folder: str | Path,
    *,
    frames: int,
    size: int,
    classifier: Mapping[str, Any] | None = None,
    labels: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Write a folder for AutoModel and AutoVideoProcessor of transformers, with a model card.

    params: encoder and predictor; with a classifier also pooler and head. Arrays are fetched one by
    one, and each must be fully addressable from this process. model: the `model` group that built
    them. frames, size: of a clip; size is the side of a square frame in pixels, for which
    transformers computes positions. classifier: keyword arguments of the AttentiveClassifier.
    labels: names of the classes. config, metrics: of the training, for the model card.

    The files: model.safetensors, config.json, video_preprocessor_config.json and README.md.
    transformers computes the layer norms of a classifier with epsilon 1e-6, also of one trained
    with another; the card then says so.

    Raises UserError for a model that transformers would compute differently.
    """
    form = VJEPA2_CLASSIFIER if classifier else VJEPA2
    blueprint = _blueprint(model)
    sizes = describe(blueprint.settings)
    _check(params, blueprint, sizes, classifier, labels)
    leaves = leaves_of(params)
    settings = transformers_config(sizes, frames, size)
    if classifier:
        classes = leaves["head.bias"].shape[0]
        names = list(labels) or [f"LABEL_{i}" for i in range(classes)]
        settings |= {
            "architectures": ["VJEPA2ForVideoClassification"],
            "num_pooler_layers": leaves["pooler.blocks.norm1.scale"].shape[0],
            "id2label": {str(i): name for i, name in enumerate(names)},
            "label2id": {name: i for i, name in enumerate(names)},
        }
    shapes = names_and_shapes(form, {path: leaf.shape for path, leaf in leaves.items()})
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / MODEL, shapes, _tensors(form, leaves))
        for name, content in (("config.json", settings), (PREPROCESSORS[0], _processor(size))):
            (folder / name).write_text(to_json(content, indent=2) + "\n")
        eps = classifier["eps"] if classifier else EPS
        card = model_card(settings, config or {}, metrics or {}, eps)
        (folder / "README.md").write_text(card)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from error


def export_meta(source: Pretrained, path: Path) -> None:
    """Write a .pt file that Meta's code of V-JEPA 2-AC or 2.1 reads: encoders and predictor.

    Needs torch. Raises UserError for a model that Meta's code would compute differently.
    """
    name = source.model["name"]
    if path.suffix != ".pt":
        raise UserError(f"{path}: a model of name {name}: wanted OUT.pt, for Meta's code")
    settings = base.settings_of(source.model)
    acts = name == "vjepa2_ac"
    if acts:
        _check_acting(source, settings)
    levels = ["predictor.predictor_embed.0.weight"] * (not acts and settings.levels > 1)
    form = meta_ac("encoder") if acts else meta_dense("encoder", levels)
    tensors: dict[str, np.ndarray] = {}
    rows = {row.path: row for row in form.rows}
    for path_of, host in assemble(source, leaves_of(abstract_params(source))):
        row = rows.get(path_of)
        if row is None or not row.layout.write:
            continue  # statistics, which are 0 and 1, and counts
        layers = host if row.stacked else host[None]
        for (named,), layer in zip(row.layer_names(len(layers)), layers, strict=True):
            tensors[named] = row.layout.write(layer)
    if acts:
        width = tensors["predictor.action_encoder.bias"].shape[0]
        unused = {"weight": (width, source.spec.state_size - 1), "bias": (width,)}
        tensors |= {f"predictor.extrinsics_encoder.{k}": np.zeros(v) for k, v in unused.items()}
    copies = ("target_encoder",) if acts else EMA
    write_torch(path, tensors, dict.fromkeys(("encoder", *copies), "encoder"))


def _check_acting(source: Pretrained, settings: Any) -> None:
    """Raise UserError for a V-JEPA 2-AC that Meta's code would compute differently."""
    spec = source.spec
    for what, found, fits in (
        ("model.action", settings.action, settings.action == "pose"),
        ("model.normalize", settings.normalize, not settings.normalize),
        ("cameras", spec.views, spec.views == 1),
        ("data.mixture: datasets", len(source.statistics), len(source.statistics) < 2),
        ("model.position_grid", settings.position_grid, not settings.position_grid),
        ("model.encoder_kind", settings.encoder_kind, settings.encoder_kind == "vjepa2"),
    ):
        if not fits:
            raise UserError(f"{source.where}: {what}={found}: Meta's code has another")


def square_clip(
    where: str, clip: Mapping[str, int], frames: int | None, size: int | None
) -> tuple[int, int]:
    """Return frames and size for `export`, as given or else as the weights' own clip has them.

    clip: of a Pretrained; where: its path, for errors. Raises UserError if neither says them, and
    for a clip that is not square.
    """
    if not size and "width" in clip:
        raise UserError(
            f"{where}: its clips have data.image_size={clip['size']}, "
            f"data.image_width={clip['width']}: transformers computes positions for square frames "
            "only; wanted --size=PIXELS (size= in Python), for square clips"
        )
    frames, size = frames or clip.get("frames"), size or clip.get("size")
    if not frames or not size:
        raise UserError(
            f"{where}: does not say frames and size of its clips; give --frames and --size"
        )
    return frames, size


def names_and_shapes(
    form: Format, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the tensors in a file, in table order; shapes: of ours, by path."""
    return {name: shape for row in form.rows for name, shape in wanted(row, shapes[row.path], {})}


def _tensors(form: Format, leaves: Mapping[str, Any]) -> Iterator[np.ndarray]:
    for row in form.rows:
        host = np.asarray(leaves[row.path])
        assert row.layout.write is not None
        for layer in host if row.stacked else host[None]:
            for part in np.split(layer, len(row.names), axis=-1):
                yield row.layout.write(part)


def _blueprint(model: Mapping[str, Any]) -> base.Blueprint:
    """Return the blueprint of a `model` group; UserError unless it is a V-JEPA 2."""
    name = model.get("name", "vjepa2")
    if name != "vjepa2":
        raise UserError(f"model.name={name!r}: transformers has no such model; wanted vjepa2")
    return base.Blueprint.of({"name": name, **model}, base.InputSpec(16, 256, 256))


def _check(
    params: base.Params,
    blueprint: base.Blueprint,
    sizes: Mapping[str, Any],
    classifier: Mapping[str, Any] | None,
    labels: Sequence[str],
) -> None:
    mask_index = 1 % sizes["num_mask_tokens"]
    wants = {"rope": "tiled", "position_grid": 0, "mask_index": mask_index}
    for key, value in wants.items():
        if sizes[key] != value:
            raise UserError(
                f"model.{key}={sizes[key]!r}: transformers computes {value!r} only; its features "
                "would differ from this model's"
            )
    parts = {"encoder", "predictor", *(("pooler", "head") if classifier else ())}
    if params.keys() != parts:
        raise UserError(f"parameters of {', '.join(params)}; wanted {', '.join(sorted(parts))}")
    made = leaves_of({part: params[part] for part in ("encoder", "predictor")})
    for path, leaf in leaves_of(blueprint.shapes).items():
        if path not in made or made[path].shape != leaf.shape:
            found = made[path].shape if path in made else "absent"
            raise UserError(f"{path}: {found}; wanted {leaf.shape}, as the `model` group says")
    if classifier and classifier["heads"] != sizes["heads"]:
        raise UserError(
            f"heads={classifier['heads']} of the classifier: transformers uses the number of the "
            f"encoder, {sizes['heads']}"
        )
    if labels and classifier and len(labels) != classifier["classes"]:
        raise UserError(f"{len(labels)} labels for {classifier['classes']} classes")


def transformers_config(sizes: Mapping[str, Any], frames: int, size: int) -> dict[str, Any]:
    """Return the content of config.json; sizes: as load.describe returns."""
    width, hidden = sizes["width"], sizes["hidden"]
    ratio = hidden / width
    if int(width * ratio) != hidden:  # transformers rounds the product down
        ratio = math.nextafter(ratio, math.inf)
    return {
        "architectures": ["VJEPA2Model"],
        "model_type": "vjepa2",
        "dtype": "float32",
        "patch_size": sizes["patch"],
        "tubelet_size": sizes["tubelet"],
        "crop_size": size,
        "frames_per_clip": frames,
        "in_chans": 3,
        "hidden_size": width,
        "num_hidden_layers": sizes["depth"],
        "num_attention_heads": sizes["heads"],
        "mlp_ratio": ratio,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": 1e-6,
        "pred_hidden_size": sizes["predictor_width"],
        "pred_num_hidden_layers": sizes["predictor_depth"],
        "pred_num_attention_heads": sizes["predictor_heads"],
        "pred_num_mask_tokens": sizes["num_mask_tokens"],
        "pred_mlp_ratio": 4.0,
    }


def _processor(size: int) -> dict[str, Any]:
    """Return the content of video_preprocessor_config.json, as VJEPA2VideoProcessor writes it."""
    return {
        "video_processor_type": "VJEPA2VideoProcessor",
        "do_resize": True,
        "size": {"shortest_edge": int(size * 256 / 224)},  # no other is possible there
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(PIXEL_MEAN),
        "image_std": list(PIXEL_STD),
    }


_CARD = """\
---
library_name: transformers
tags: [video, vjepa2, wmjax]
---

# V-JEPA 2 trained with wmjax

Width {width}, {depth} blocks. Clips of {frames} frames of {size} x {size} pixels; patches of
{tubelet} x {patch} x {patch}. The weights are float32.

```python
import torch
from transformers import {architecture}

model = {architecture}.from_pretrained("FOLDER").eval()
video = torch.rand(1, {frames}, 3, {size}, {size})  # RGB in 0..1
mean, std = torch.tensor({mean}), torch.tensor({std})
video = (video - mean[:, None, None]) / std[:, None, None]
with torch.no_grad():
    output = model(video{arguments}).{output}
```

Use square frames of {size} pixels only: transformers computes positions for this size.
`AutoVideoProcessor.from_pretrained("FOLDER")` makes them of uint8 RGB: it resizes the short side to
{short} pixels and crops the centre, as the evaluations of V-JEPA 2.
"""


def model_card(
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    metrics: Mapping[str, float],
    eps: float = EPS,
) -> str:
    """Return the text of the model card; eps: of the classifier's layer norms in training."""
    classifies = "id2label" in settings
    text = _CARD.format(
        width=settings["hidden_size"],
        depth=settings["num_hidden_layers"],
        frames=settings["frames_per_clip"],
        size=settings["crop_size"],
        tubelet=settings["tubelet_size"],
        patch=settings["patch_size"],
        architecture=settings["architectures"][0],
        arguments="" if classifies else ", skip_predictor=True",
        output="logits" if classifies else "last_hidden_state",
        mean=list(PIXEL_MEAN),
        std=list(PIXEL_STD),
        short=_processor(settings["crop_size"])["size"]["shortest_edge"],
    )
    if eps != EPS:
        text += (
            f"\nThe classifier was trained with layer norms of epsilon {eps:g}. transformers "
            f"computes them with {EPS:g}.\n"
        )
    if metrics:
        rows = "\n".join(f"| {name} | {value:.6g} |" for name, value in sorted(metrics.items()))
        text += f"\n## Metrics\n\n| metric | value |\n|---|---|\n{rows}\n"
    if config:
        text += f"\n## Configuration\n\n```json\n{to_json(config, indent=2, sort_keys=True)}\n```\n"
    return text
