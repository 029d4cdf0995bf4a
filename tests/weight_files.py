"""Small files of weights as others write them: names and shapes as published, random values."""

import json

import numpy as np
from safetensors.numpy import save_file

# Odd sizes, so that no two axes are mistaken for one another.
SIZES = {
    "width": 36,
    "depth": 3,
    "heads": 2,
    "hidden": 60,
    "patch": 4,
    "tubelet": 2,
    "predictor_width": 28,
    "predictor_depth": 2,
    "predictor_heads": 2,
    "num_mask_tokens": 3,
}
MODEL = {key: value for key, value in SIZES.items() if key != "hidden"} | {"mlp_ratio": 60 / 36}


def draw(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: (0.3 * rng.normal(size=shape) + (name.endswith("norm1.weight"))).astype(np.float32)
        for name, shape in shapes.items()
    }


def linear(name, out, into):
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def vjepa2_shapes(sizes=SIZES, prefix=""):
    """VJEPA2Model of transformers, modeling_vjepa2.py."""
    width, narrow = sizes["width"], sizes["predictor_width"]
    patches = f"{prefix}encoder.embeddings.patch_embeddings.proj"
    embeddings = f"{prefix}predictor.embeddings"
    shapes = {
        f"{patches}.weight": (width, 3, sizes["tubelet"], sizes["patch"], sizes["patch"]),
        f"{patches}.bias": (width,),
        f"{embeddings}.mask_tokens": (sizes["num_mask_tokens"], 1, 1, narrow),
        **linear(f"{embeddings}.predictor_embeddings", narrow, width),
        **norm(f"{prefix}encoder.layernorm", width),
        **norm(f"{prefix}predictor.layernorm", narrow),
        **linear(f"{prefix}predictor.proj", width, narrow),
    }
    for stack, depth, size, hidden in (
        ("encoder", sizes["depth"], width, sizes["hidden"]),
        ("predictor", sizes["predictor_depth"], narrow, 4 * narrow),
    ):
        for i in range(depth):
            layer = f"{prefix}{stack}.layer.{i}"
            shapes |= norm(f"{layer}.norm1", size) | norm(f"{layer}.norm2", size)
            for name in ("query", "key", "value", "proj"):
                shapes |= linear(f"{layer}.attention.{name}", size, size)
            shapes |= linear(f"{layer}.mlp.fc1", hidden, size)
            shapes |= linear(f"{layer}.mlp.fc2", size, hidden)
    return shapes


def classifier_shapes(classes=12, layers=2, sizes=SIZES):
    """VJEPA2ForVideoClassification of transformers."""
    width = sizes["width"]
    cross = "pooler.cross_attention_layer"
    shapes = {
        **vjepa2_shapes(sizes, "vjepa2."),
        "pooler.query_tokens": (1, 1, width),
        **linear("classifier", classes, width),
    }
    heads = {cross: "cross_attn.{}_proj"} | {
        f"pooler.self_attention_layers.{i}": "self_attn.{}_proj" for i in range(layers)
    }
    for layer, name in heads.items():
        shapes |= norm(f"{layer}.layer_norm1", width) | norm(f"{layer}.layer_norm2", width)
        for what in ("q", "k", "v", *(() if layer == cross else ("out",))):
            shapes |= linear(f"{layer}.{name.format(what)}", width, width)
        shapes |= linear(f"{layer}.mlp.fc1", 4 * width, width)
        shapes |= linear(f"{layer}.mlp.fc2", width, 4 * width)
    return shapes


def vjepa2_config(sizes=SIZES, **others):
    return {
        "architectures": ["VJEPA2Model"],
        "model_type": "vjepa2",
        "hidden_size": sizes["width"],
        "num_hidden_layers": sizes["depth"],
        "num_attention_heads": sizes["heads"],
        "mlp_ratio": sizes["hidden"] / sizes["width"] + 1e-9,
        "patch_size": sizes["patch"],
        "tubelet_size": sizes["tubelet"],
        "crop_size": 16,
        "frames_per_clip": 8,
        "pred_hidden_size": sizes["predictor_width"],
        "pred_num_hidden_layers": sizes["predictor_depth"],
        "pred_num_attention_heads": sizes["predictor_heads"],
        "pred_num_mask_tokens": sizes["num_mask_tokens"],
        **others,
    }


def write(folder, tensors, config, shards=1):
    """Lay a model out as save_pretrained does; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    where = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, folder / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def image_shapes(kind, width=36, depth=2, hidden=60, patch=4, grid=5, prefix=""):
    """ViTModel or Dinov2Model as save_pretrained writes them."""
    embeddings = f"{prefix}embeddings"
    patches = f"{embeddings}.patch_embeddings.projection"
    shapes = {
        f"{embeddings}.cls_token": (1, 1, width),
        f"{embeddings}.position_embeddings": (1, 1 + grid * grid, width),
        f"{patches}.weight": (width, 3, patch, patch),
        f"{patches}.bias": (width,),
        **norm(f"{prefix}layernorm", width),
    }
    norms, mlp = {
        "vit": (("layernorm_before", "layernorm_after"), ("intermediate.dense", "output.dense")),
        "dinov2": (("norm1", "norm2"), ("mlp.fc1", "mlp.fc2")),
    }[kind]
    if kind == "dinov2":
        shapes[f"{embeddings}.mask_token"] = (1, width)
    for i in range(depth):
        layer = f"{prefix}encoder.layer.{i}"
        shapes |= norm(f"{layer}.{norms[0]}", width) | norm(f"{layer}.{norms[1]}", width)
        for name in ("attention.query", "attention.key", "attention.value", "output.dense"):
            shapes |= linear(f"{layer}.attention.{name}", width, width)
        shapes |= linear(f"{layer}.{mlp[0]}", hidden, width)
        shapes |= linear(f"{layer}.{mlp[1]}", width, hidden)
        if kind == "dinov2":
            shapes |= {f"{layer}.layer_scale{j}.lambda1": (width,) for j in (1, 2)}
    return shapes


def image_config(kind, width=36, depth=2, hidden=60, patch=4, grid=5, **others):
    ratio = {"vit": {"intermediate_size": hidden}, "dinov2": {"mlp_ratio": hidden / width + 1e-9}}
    return {
        "model_type": kind,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": 2,
        "image_size": grid * patch,
        "patch_size": patch,
        **ratio[kind],
        **others,
    }
