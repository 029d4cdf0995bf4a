"""The formats of weights: each a table from the names in a file to the paths of our parameters.

A row serves both directions. No files are touched here, and nothing runs on a device.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from wmjax.weights import images

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """How a tensor of theirs lies in ours, both without the axis of the layers.

    shape: of theirs, from (shape of ours, shape found); ours: from (theirs, shape of ours, the
    other tensor of the row); theirs: from ours, or None where that is not a way to go. other: shape
    of the other tensor where it has no row of its own.
    """

    shape: Callable[[Shape, Shape], Shape]
    ours: Callable[[np.ndarray, Shape, Any], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray] | None = None
    other: Callable[[Shape], Shape] | None = None


def _permuted(*axes: int) -> Layout:
    """Lay out our axes in this order to get theirs."""
    back = [axes.index(axis) for axis in range(len(axes))]
    return Layout(
        lambda ours, _: tuple(ours[axis] for axis in axes),
        lambda theirs, *_: theirs.transpose(back),
        lambda ours: ours.transpose(axes),
    )


SAME = Layout(lambda ours, _: ours, lambda theirs, *_: theirs, lambda ours: ours)
LINEAR = _permuted(1, 0)
CONV3D = _permuted(4, 3, 0, 1, 2)
# With LayerScale, the other tensor, multiplied into it.
SCALED = Layout(SAME.shape, images.scaled, other=lambda ours: ours[-1:])
SCALED_LINEAR = Layout(LINEAR.shape, images.scaled_linear, other=lambda ours: ours[-1:])
POSITIONS = Layout(images.position_shape, images.positions)


class TensorMap(NamedTuple):
    """One of our parameters and what it is in a file.

    ours: its path, as in encoder.norm.scale. theirs: names; `*` counts our first axis, the layers,
    and several names are parts side by side along our last axis. other: a further tensor that the
    layout takes.
    """

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = SAME
    other: str = ""

    @property
    def stacked(self) -> bool:
        return "*" in self.theirs[0]

    def names(self, depth: int) -> list[tuple[str, ...]]:
        """Return the names of the parts, layer by layer; what is not stacked has one."""
        layers = range(depth if self.stacked else 1)
        return [tuple(name.replace("*", str(i)) for name in self.theirs) for i in layers]

    def one(self, shape: Shape) -> Shape:
        """Return the shape of one part of one layer, laid out as ours."""
        inner = shape[1:] if self.stacked else shape
        if len(self.theirs) == 1:
            return inner
        return *inner[:-1], inner[-1] // len(self.theirs)


class Format(NamedTuple):
    """A table with its name. ignored: patterns of names that we have no use for.

    zeros: our paths that the format knows nothing of and that begin at zero. of_images: for an
    encoder alone, whose patch may have any size.
    """

    name: str
    rows: tuple[TensorMap, ...]
    ignored: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()
    of_images: bool = False

    def part(self, name: str) -> str | None:
        """Return the part of our model, as in "encoder", that a name of theirs belongs to."""
        for row in self.rows:
            if any(matches(pattern, name) for pattern in (*row.theirs, row.other)):
                return row.ours.partition(".")[0]
        return None

    def ignores(self, name: str) -> bool:
        return any(matches(pattern, name) for pattern in self.ignored)


def matches(pattern: str, name: str) -> bool:
    """Say whether a name fits a pattern, in which `*` is a number and a final `.` any rest."""
    expression = re.escape(pattern).replace(r"\*", r"\d+") + (".*" if pattern.endswith(".") else "")
    return re.fullmatch(expression, name) is not None


def _norm(ours: str, theirs: str) -> list[TensorMap]:
    return [
        TensorMap(f"{ours}.scale", (f"{theirs}.weight",)),
        TensorMap(f"{ours}.bias", (f"{theirs}.bias",)),
    ]


def _linear(ours: str, *theirs: str, gain: str = "") -> list[TensorMap]:
    kernel, bias = (SCALED_LINEAR, SCALED) if gain else (LINEAR, SAME)
    return [
        TensorMap(f"{ours}.kernel", tuple(f"{name}.weight" for name in theirs), kernel, gain),
        TensorMap(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs), bias, gain),
    ]


def _tubelets(ours: str, theirs: str) -> list[TensorMap]:
    return [
        TensorMap(f"{ours}.kernel", (f"{theirs}.weight",), CONV3D),
        TensorMap(f"{ours}.bias", (f"{theirs}.bias",)),
    ]


def _patches(ours: str, theirs: str, pixels: images.Pixels) -> list[TensorMap]:
    kernel = Layout(images.patch_shape, pixels.kernel)
    bias = Layout(SAME.shape, pixels.bias)
    return [
        TensorMap(f"{ours}.kernel", (f"{theirs}.weight",), kernel),
        TensorMap(f"{ours}.bias", (f"{theirs}.bias",), bias, f"{theirs}.weight"),
    ]


def _blocks(
    ours: str,
    theirs: str,
    qkv: tuple[str, ...],
    proj: str,
    norms: tuple[str, str] = ("norm1", "norm2"),
    mlp: tuple[str, str] = ("mlp.fc1", "mlp.fc2"),
    gains: tuple[str, str] = ("", ""),
) -> list[TensorMap]:
    """Return the rows of a stack; names are within a block of theirs."""

    def full(name: str) -> str:
        return name and f"{theirs}.{name}"

    return [
        *_norm(f"{ours}.norm1", full(norms[0])),
        *_linear(f"{ours}.attention.qkv", *map(full, qkv)),
        *_linear(f"{ours}.attention.proj", full(proj), gain=full(gains[0])),
        *_norm(f"{ours}.norm2", full(norms[1])),
        *_linear(f"{ours}.mlp.fc1", full(mlp[0])),
        *_linear(f"{ours}.mlp.fc2", full(mlp[1]), gain=full(gains[1])),
    ]


def _vjepa2(prefix: str) -> tuple[TensorMap, ...]:
    qkv = ("attention.query", "attention.key", "attention.value")
    encoder, predictor = f"{prefix}encoder", f"{prefix}predictor"
    return (
        *_tubelets("encoder.patch_embed", f"{encoder}.embeddings.patch_embeddings.proj"),
        *_blocks("encoder.blocks", f"{encoder}.layer.*", qkv, "attention.proj"),
        *_norm("encoder.norm", f"{encoder}.layernorm"),
        *_linear("predictor.embed", f"{predictor}.embeddings.predictor_embeddings"),
        TensorMap("predictor.mask_tokens", (f"{predictor}.embeddings.mask_tokens",)),
        *_blocks("predictor.blocks", f"{predictor}.layer.*", qkv, "attention.proj"),
        *_norm("predictor.norm", f"{predictor}.layernorm"),
        *_linear("predictor.proj", f"{predictor}.proj"),
    )


VJEPA2 = Format("VJEPA2Model of transformers", _vjepa2(""))

_ATTENDS = "pooler.cross_attention_layer"
VJEPA2_CLASSIFIER = Format(
    "VJEPA2ForVideoClassification of transformers",
    (
        *_vjepa2("vjepa2."),
        TensorMap("pooler.query", ("pooler.query_tokens",)),
        *_blocks(
            "pooler.blocks",
            "pooler.self_attention_layers.*",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "self_attn.out_proj",
            norms=("layer_norm1", "layer_norm2"),
        ),
        *_norm("pooler.cross.norm1", f"{_ATTENDS}.layer_norm1"),
        *_linear("pooler.cross.q", f"{_ATTENDS}.cross_attn.q_proj"),
        *_linear(
            "pooler.cross.kv", f"{_ATTENDS}.cross_attn.k_proj", f"{_ATTENDS}.cross_attn.v_proj"
        ),
        *_norm("pooler.cross.norm2", f"{_ATTENDS}.layer_norm2"),
        *_linear("pooler.cross.mlp.fc1", f"{_ATTENDS}.mlp.fc1"),
        *_linear("pooler.cross.mlp.fc2", f"{_ATTENDS}.mlp.fc2"),
        *_linear("head", "classifier"),
    ),
)


def meta(encoder: str) -> Format:
    """Return the table of Meta's checkpoints, whose encoder is under this key.

    Released files may hold fixed position tables, which no model with RoPE reads.
    """
    qkv = ("attn.qkv",)
    return Format(
        f"V-JEPA 2 checkpoint of Meta, {encoder}",
        (
            *_tubelets("encoder.patch_embed", f"{encoder}.patch_embed.proj"),
            *_blocks("encoder.blocks", f"{encoder}.blocks.*", qkv, "attn.proj"),
            *_norm("encoder.norm", f"{encoder}.norm"),
            *_linear("predictor.embed", "predictor.predictor_embed"),
            TensorMap("predictor.mask_tokens", ("predictor.mask_tokens.*",)),
            *_blocks("predictor.blocks", "predictor.predictor_blocks.*", qkv, "attn.proj"),
            *_norm("predictor.norm", "predictor.predictor_norm"),
            *_linear("predictor.proj", "predictor.predictor_proj"),
        ),
        ignored=(f"{encoder}.pos_embed", "predictor.predictor_pos_embed"),
    )


_LOOKS = "classifiers.0.pooler.cross_attention_block"
META_CLASSIFIER = Format(
    "attentive probe of Meta, classifiers[0]",
    (
        TensorMap("pooler.query", ("classifiers.0.pooler.query_tokens",)),
        *_blocks("pooler.blocks", "classifiers.0.pooler.blocks.*", ("attn.qkv",), "attn.proj"),
        *_norm("pooler.cross.norm1", f"{_LOOKS}.norm1"),
        *_linear("pooler.cross.q", f"{_LOOKS}.xattn.q"),
        *_linear("pooler.cross.kv", f"{_LOOKS}.xattn.kv"),
        *_norm("pooler.cross.norm2", f"{_LOOKS}.norm2"),
        *_linear("pooler.cross.mlp.fc1", f"{_LOOKS}.mlp.fc1"),
        *_linear("pooler.cross.mlp.fc2", f"{_LOOKS}.mlp.fc2"),
        *_linear("head", "classifiers.0.linear"),
    ),
)


def _image(
    name: str,
    prefix: str,
    pixels: images.Pixels,
    norms: tuple[str, str],
    mlp: tuple[str, str],
    gains: tuple[str, str] = ("", ""),
) -> Format:
    embeddings = f"{prefix}embeddings"
    return Format(
        name,
        (
            *_patches("encoder.patch_embed", f"{embeddings}.patch_embeddings.projection", pixels),
            TensorMap("encoder.positions.space", (f"{embeddings}.position_embeddings",), POSITIONS),
            *_blocks(
                "encoder.blocks",
                f"{prefix}encoder.layer.*",
                tuple(f"attention.attention.{x}" for x in ("query", "key", "value")),
                "attention.output.dense",
                norms,
                mlp,
                gains,
            ),
            *_norm("encoder.norm", f"{prefix}layernorm"),
        ),
        ignored=(
            *(f"{embeddings}.{token}" for token in ("cls_token", "mask_token", "register_tokens")),
            f"{prefix}pooler.",
            "classifier.",
        ),
        zeros=("encoder.positions.time",),
        of_images=True,
    )


def vit(prefix: str, pixels: images.Pixels) -> Format:
    """Return the table of ViTModel; prefix: of its names in a model with a head."""
    norms, mlp = ("layernorm_before", "layernorm_after"), ("intermediate.dense", "output.dense")
    return _image("ViTModel of transformers", prefix, pixels, norms, mlp)


def dinov2(prefix: str, pixels: images.Pixels) -> Format:
    """Return the table of Dinov2Model; prefix: of its names in a model with a head."""
    norms, mlp = ("norm1", "norm2"), ("mlp.fc1", "mlp.fc2")
    gains = ("layer_scale1.lambda1", "layer_scale2.lambda1")
    return _image("Dinov2Model of transformers", prefix, pixels, norms, mlp, gains)


def own(names: list[str]) -> Format:
    """Return the table of a folder of wmjax: names are our paths."""
    return Format("wmjax", tuple(TensorMap(name, (name,)) for name in names))
