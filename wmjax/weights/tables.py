"""Formats of weights: a table each, from the names in a file to the paths of our parameters.

One row serves reading and writing. Works on NumPy arrays; opens no file.
"""

import re
from collections.abc import Callable, Container
from typing import Any, NamedTuple

import numpy as np

from wmjax.models.dense import TAPS
from wmjax.weights import images

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """Converts between a tensor in a file and a parameter, both without the layer axis.

    file_shape(our shape, shape found): shape that the tensor must have. read(tensor, our shape,
    other tensor of the row): the parameter. write(parameter): the tensor; None: cannot be written.
    other_shape(our shape): shape of the other tensor; None: another row checks it, or there is no
    other tensor.
    """

    file_shape: Callable[[Shape, Shape], Shape]
    read: Callable[[np.ndarray, Shape, Any], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray] | None = None
    other_shape: Callable[[Shape], Shape] | None = None


def _permuted(*axes: int) -> Layout:
    """Return the layout whose file has our axes in this order."""
    back = [axes.index(axis) for axis in range(len(axes))]
    return Layout(
        lambda ours, _: tuple(ours[axis] for axis in axes),
        lambda tensor, *_: tensor.transpose(back),
        lambda ours: ours.transpose(axes),
    )


SAME = Layout(lambda ours, _: ours, lambda tensor, *_: tensor, lambda ours: ours)
LINEAR = _permuted(1, 0)
CONV3D = _permuted(4, 3, 0, 1, 2)
# The other tensor is the gain of LayerScale; reading multiplies it in.
SCALED = Layout(SAME.file_shape, images.scaled, other_shape=lambda ours: ours[-1:])
SCALED_LINEAR = Layout(LINEAR.file_shape, images.scaled_linear, other_shape=lambda ours: ours[-1:])
# Our maps have an axis for the datasets of a mixture; the file has one.
OF_ONE = Layout(lambda ours, _: ours[1:], lambda tensor, *_: tensor[None], lambda ours: ours[0])
LINEAR_OF_ONE = Layout(
    lambda ours, _: (ours[2], ours[1]),
    lambda tensor, *_: tensor.T[None],
    lambda ours: ours[0].T,
)
POSITIONS = Layout(images.position_shape, images.positions)


class TensorMap(NamedTuple):
    """One of our parameters and the tensors of a file that it is made of.

    path: of the parameter, as in encoder.norm.scale. names: of the tensors. `*` stands for the
    layer number, which is our first axis. Several names are parts side by side along our last axis,
    such as query, key and value. other: one more tensor that the layout needs.
    """

    path: str
    names: tuple[str, ...]
    layout: Layout = SAME
    other: str = ""

    @property
    def stacked(self) -> bool:
        """Whether the parameter stacks the layers along its first axis."""
        return "*" in self.names[0]

    def layer_names(self, depth: int) -> list[tuple[str, ...]]:
        """Return the names of the parts for each layer; one layer if the row is not stacked."""
        layers = range(depth if self.stacked else 1)
        return [tuple(name.replace("*", str(i)) for name in self.names) for i in layers]

    def part_shape(self, shape: Shape) -> Shape:
        """Return the shape of one part of one layer, in our layout; shape: of the parameter."""
        inner = shape[1:] if self.stacked else shape
        if len(self.names) == 1:
            return inner
        return *inner[:-1], inner[-1] // len(self.names)


class Format(NamedTuple):
    """A table and its name.

    ignored: patterns of names that are dropped. zeros, ones: our paths that the format does not
    have; they are loaded as zeros and ones. of_images: True for an image model, which gives an
    encoder only and may have another patch size.
    """

    name: str
    rows: tuple[TensorMap, ...]
    ignored: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()
    ones: tuple[str, ...] = ()
    of_images: bool = False

    def part(self, name: str) -> str | None:
        """Return the part of our model, such as "encoder", that a name in a file belongs to."""
        for row in self.rows:
            if any(matches(pattern, name) for pattern in (*row.names, row.other)):
                return row.path.partition(".")[0]
        return None

    def ignores(self, name: str) -> bool:
        """Return whether a name in a file is dropped."""
        return any(matches(pattern, name) for pattern in self.ignored)


def matches(pattern: str, name: str) -> bool:
    """Return whether a name fits a pattern: `*` is a number, a final `.` allows any suffix."""
    expression = re.escape(pattern).replace(r"\*", r"\d+") + (".*" if pattern.endswith(".") else "")
    return re.fullmatch(expression, name) is not None


def _norm(path: str, name: str) -> list[TensorMap]:
    return [
        TensorMap(f"{path}.scale", (f"{name}.weight",)),
        TensorMap(f"{path}.bias", (f"{name}.bias",)),
    ]


def _linear(path: str, *names: str, gain: str = "") -> list[TensorMap]:
    kernel, bias = (SCALED_LINEAR, SCALED) if gain else (LINEAR, SAME)
    return [
        TensorMap(f"{path}.kernel", tuple(f"{name}.weight" for name in names), kernel, gain),
        TensorMap(f"{path}.bias", tuple(f"{name}.bias" for name in names), bias, gain),
    ]


def _tubelets(path: str, name: str) -> list[TensorMap]:
    return [
        TensorMap(f"{path}.kernel", (f"{name}.weight",), CONV3D),
        TensorMap(f"{path}.bias", (f"{name}.bias",)),
    ]


def _modality(path: str, name: str) -> list[TensorMap]:
    return [
        TensorMap(f"{path}.video", (f"{name}.video_mod_embed",)),
        TensorMap(f"{path}.image", (f"{name}.img_mod_embed",)),
    ]


def _patches(path: str, name: str, pixels: images.Pixels) -> list[TensorMap]:
    kernel = Layout(images.patch_shape, pixels.kernel)
    bias = Layout(SAME.file_shape, pixels.bias)
    return [
        TensorMap(f"{path}.kernel", (f"{name}.weight",), kernel),
        TensorMap(f"{path}.bias", (f"{name}.bias",), bias, f"{name}.weight"),
    ]


def _blocks(
    path: str,
    name: str,
    qkv: tuple[str, ...],
    proj: str,
    norms: tuple[str, str] = ("norm1", "norm2"),
    mlp: tuple[str, str] = ("mlp.fc1", "mlp.fc2"),
    gains: tuple[str, str] = ("", ""),
) -> list[TensorMap]:
    """Return the rows of a stack of blocks; names are relative to a block in the file."""

    def full(inner: str) -> str:
        return inner and f"{name}.{inner}"

    return [
        *_norm(f"{path}.norm1", full(norms[0])),
        *_linear(f"{path}.attention.qkv", *map(full, qkv)),
        *_linear(f"{path}.attention.proj", full(proj), gain=full(gains[0])),
        *_norm(f"{path}.norm2", full(norms[1])),
        *_linear(f"{path}.mlp.fc1", full(mlp[0])),
        *_linear(f"{path}.mlp.fc2", full(mlp[1]), gain=full(gains[1])),
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
    """Return the table of Meta's checkpoints; encoder: the key of the encoder to read.

    Tables of fixed positions are not read: the model computes them (meta.fixed_positions).
    """
    qkv = ("attn.qkv",)
    return Format(
        f"V-JEPA checkpoint of Meta, {encoder}",
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


def meta_dense(encoder: str, names: Container[str]) -> Format:
    """Return the table of Meta's V-JEPA 2.1; names: of the tensors in the file.

    The predictor of several levels reads them by two linear layers, that of one by one.
    """
    qkv, several = ("attn.qkv",), "predictor.predictor_embed.0.weight" in names
    embed = "predictor.predictor_embed"
    return Format(
        f"V-JEPA 2.1 checkpoint of Meta, {encoder}",
        (
            *_tubelets("encoder.patch_embed", f"{encoder}.patch_embed.proj"),
            *_tubelets("encoder.patch_embed_image", f"{encoder}.patch_embed_img.proj"),
            *_modality("encoder.modality", encoder),
            *_blocks("encoder.blocks", f"{encoder}.blocks.*", qkv, "attn.proj"),
            *(
                row
                for tap in range(TAPS)
                for row in _norm(f"encoder.norms.{tap}", f"{encoder}.norms_block.{tap}")
            ),
            *(_linear("predictor.mix", f"{embed}.0") if several else ()),
            *_linear("predictor.embed", f"{embed}.2" if several else embed),
            *_modality("predictor.modality", "predictor"),
            TensorMap("predictor.mask_tokens", ("predictor.mask_tokens.*",)),
            *_blocks("predictor.blocks", "predictor.predictor_blocks.*", qkv, "attn.proj"),
            *_norm("predictor.norm", "predictor.predictor_norm"),
            *_linear("predictor.proj", "predictor.predictor_proj"),
            *_linear("predictor.proj_context", "predictor.predictor_proj_context"),
        ),
        zeros=("predictor.updates",) if "predictor.predictor_norm.weight" in names else (),
    )


def meta_ac(encoder: str) -> Format:
    """Return the table of Meta's V-JEPA 2-AC; its statistics are mean 0 and std 1."""
    rows = meta(encoder).rows
    own = [row for row in rows if row.path != "predictor.mask_tokens"]
    for name in ("action", "state"):
        own += [
            TensorMap(
                f"predictor.{name}.kernel", (f"predictor.{name}_encoder.weight",), LINEAR_OF_ONE
            ),
            TensorMap(f"predictor.{name}.bias", (f"predictor.{name}_encoder.bias",), OF_ONE),
        ]
    return Format(
        f"V-JEPA 2-AC checkpoint of Meta, {encoder}",
        tuple(own),
        ignored=(*meta(encoder).ignored, "predictor.extrinsics_encoder."),
        zeros=("of_action.mean_ZS", "of_state.mean_ZS"),
        ones=("of_action.std_ZS", "of_state.std_ZS"),
    )


def meta_classifier(index: int) -> Format:
    """Return the table of one of the attentive probes of a file of Meta."""
    probe = f"classifiers.{index}"
    looks = f"{probe}.pooler.cross_attention_block"
    return Format(
        f"attentive probe of Meta, classifiers[{index}]",
        (
            TensorMap("pooler.query", (f"{probe}.pooler.query_tokens",)),
            *_blocks("pooler.blocks", f"{probe}.pooler.blocks.*", ("attn.qkv",), "attn.proj"),
            *_norm("pooler.cross.norm1", f"{looks}.norm1"),
            *_linear("pooler.cross.q", f"{looks}.xattn.q"),
            *_linear("pooler.cross.kv", f"{looks}.xattn.kv"),
            *_norm("pooler.cross.norm2", f"{looks}.norm2"),
            *_linear("pooler.cross.mlp.fc1", f"{looks}.mlp.fc1"),
            *_linear("pooler.cross.mlp.fc2", f"{looks}.mlp.fc2"),
            *_linear("head", f"{probe}.linear"),
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
    """Return the table of ViTModel; prefix: of the names where the model has a head."""
    norms, mlp = ("layernorm_before", "layernorm_after"), ("intermediate.dense", "output.dense")
    return _image("ViTModel of transformers", prefix, pixels, norms, mlp)


def dinov2(prefix: str, pixels: images.Pixels) -> Format:
    """Return the table of Dinov2Model; prefix: of the names where the model has a head."""
    norms, mlp = ("norm1", "norm2"), ("mlp.fc1", "mlp.fc2")
    gains = ("layer_scale1.lambda1", "layer_scale2.lambda1")
    return _image("Dinov2Model of transformers", prefix, pixels, norms, mlp, gains)


def own(names: list[str]) -> Format:
    """Return the table of wmjax's own weights, whose names are our paths."""
    return Format("wmjax", tuple(TensorMap(name, (name,)) for name in names))
