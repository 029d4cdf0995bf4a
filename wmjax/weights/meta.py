"""What the .pt files of Meta's V-JEPA code hold: which model, under which names, which positions.

Works on names and NumPy arrays; opens no file and does not import torch.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isqrt
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from wmjax.errors import UserError
from wmjax.models.encoder import SIZES
from wmjax.nn import rope
from wmjax.types import TokenGrid
from wmjax.weights.files import Tensors

# Parts of names that wrappers add: DDP, Meta's multi-mask wrappers, torch.compile, FSDP.
_WRAPPERS = {
    "module",
    "backbone",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}
# Parts of names that only another model has.
_OTHERS = {
    **dict.fromkeys(  # keys of config.json
        ("use_rope_interleave", "use_modality_embeddings", "interpolate_rope"),
        "V-JEPA 2.1 in the layout of transformers",
    ),
    **dict.fromkeys(
        ("verb_classifier", "noun_classifier", "action_classifier"),
        "the action anticipation head of EPIC-KITCHENS-100",
    ),
}
_RELEASED_SIZES = {SIZES[size][:2] for size in ("large", "huge", "giant")}  # of V-JEPA 2
_RELEASED_MASK_TOKENS = 10
EMA = ("target_encoder", "ema_encoder")  # the second: of V-JEPA 2.1 base and large
RAW = ".patch_embed.proj.weight"  # end of a name that only Meta's own layout has
_PATCHES, _EMBED = "patch_embed.proj.weight", "predictor_embed.weight"
_OF_PREDICTOR = re.compile(r"predictor_|mask_tokens\.")  # where both have one state dict


class Parts(NamedTuple):
    """An encoder and a predictor of a file, under names as in ENCODER.blocks, predictor.blocks.

    encoder: the name of the encoder, such as target_encoder. choices: names of all encoders.
    """

    encoder: str
    choices: tuple[str, ...]
    tensors: dict[str, Any]


def plain_names(where: str, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors of nested dicts by full name, without the parts that wrappers add."""
    named: dict[str, Any] = {}
    for path, tensor in _tensors(saved):
        name = ".".join(part for part in path.split(".") if part not in _WRAPPERS)
        if name in named:
            raise UserError(f"{where}: has two tensors {name}, but for the prefixes of wrappers")
        named[name] = tensor
    return named


def _tensors(saved: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in saved.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{name}", tensor) for name, tensor in _tensors(value))
        elif hasattr(value, "shape"):
            yield str(key), value


def refuse_other_models(where: str, names: Iterable[str]) -> None:
    """Raise UserError that says which model it is, where a name belongs to another one.

    names: of tensors, or keys of config.json.
    """
    for name in names:
        for part in name.split("."):
            if part in _OTHERS:
                raise UserError(
                    f"{where}: {_OTHERS[part]}, as it has {name}: wmjax does not load this model; "
                    "wanted V-JEPA 2, V-JEPA 2.1 or V-JEPA 2-AC as Meta has them, V-JEPA 1 or a "
                    "video classification probe"
                )


def choose_parts(
    where: str, saved: Mapping[Any, Any], named: Mapping[str, Any], encoder: str
) -> Parts:
    """Find the encoder that is asked for, and the predictor.

    saved: the file. named: its tensors, as plain_names returns. encoder: its name; "": the EMA,
    target_encoder or ema_encoder, or the only one. A state dict without a name is called encoder.
    """
    encoders = {prefix.rstrip(".") or "encoder": prefix for prefix in _prefixes(named, _PATCHES)}
    wanted = encoder or next((name for name in EMA if name in encoders), EMA[0])
    if wanted not in encoders and not encoder and len(encoders) == 1:
        (wanted,) = encoders
    if wanted not in encoders:
        keys = list(dict.fromkeys(str(key).partition(".")[0] for key in saved))
        raise UserError(
            f"{where}: has no {wanted!r}, which has {wanted}.{_PATCHES} with 5 axes; encoders: "
            f"{', '.join(encoders) or 'none'}; it has: {', '.join(keys[:8]) or 'nothing'}"
        )
    start = encoders[wanted]
    apart = any(name.startswith("predictor.") for name in named)
    of_predictor = "predictor." if apart else next(iter(_prefixes(named, _EMBED)), None)
    tensors = {}
    for name, tensor in named.items():
        if of_predictor is not None and name.startswith(of_predictor):
            rest = name.removeprefix(of_predictor)
            if of_predictor != start or _OF_PREDICTOR.match(rest):
                tensors[f"predictor.{rest}"] = tensor
                continue
        if name.startswith(start):
            tensors[f"{wanted}.{name.removeprefix(start)}"] = tensor
    return Parts(wanted, tuple(encoders), tensors)


def _prefixes(named: Mapping[str, Any], end: str) -> list[str]:
    return [name.removesuffix(end) for name in named if f".{name}".endswith(f".{end}")]


def fixed_positions(where: str, tensors: Tensors, encoder: str) -> tuple[str, TokenGrid] | None:
    """Return rope kind and token grid of a model with fixed sin-cos positions; None: it has RoPE.

    V-JEPA 1 adds a table of them to the tokens, in the encoder and in the predictor. A table of
    zeros is not used.

    Raises UserError for a table of other values, or where encoder and predictor differ.
    """
    names = [f"{encoder}.pos_embed"]
    if f"predictor.{_EMBED}" in tensors.shapes:
        names.append("predictor.predictor_pos_embed")
    found = [_fixed_table(where, tensors, name) for name in names]
    if found[0] != found[-1]:
        texts = [" of tokens ".join(map(str, each or ["no table"])) for each in found]
        pairs = "; ".join(f"{name}: {text}" for name, text in zip(names, texts, strict=True))
        raise UserError(
            f"{where}: encoder and predictor have different positions: {pairs}; wanted the same "
            "sin-cos table in both (V-JEPA 1), or none (V-JEPA 2)"
        )
    return found[0]


def is_released(where: str, model: Mapping[str, Any]) -> bool:
    """Say whether a file with fixed positions is a V-JEPA 2 as released, which does not use them.

    model: what the shapes say. The number of mask tokens tells; V-JEPA 1 has one for each mask.
    Raises UserError for an encoder alone of a released size, which may be either.
    """
    released_size = (model["width"], model["depth"]) in _RELEASED_SIZES
    if released_size and "num_mask_tokens" not in model:
        raise UserError(
            f"{where}: an encoder alone with fixed sin-cos positions: V-JEPA 1 adds them, V-JEPA 2 "
            "as released does not; wanted a file with its predictor, which tells one from the other"
        )
    return released_size and model["num_mask_tokens"] == _RELEASED_MASK_TOKENS


def accuracies(saved: Mapping[Any, Any], prefix: str = "") -> list[str]:
    """Return a line for each entry of a file of probes that holds accuracies."""
    lines = []
    for key, value in saved.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            lines += accuracies(value, f"{name}.")
        elif "acc" in name.lower():
            value = value.tolist() if hasattr(value, "tolist") else value
            figures = value if isinstance(value, list | tuple) else [value]
            if all(isinstance(figure, int | float) for figure in figures):
                lines.append(f"{name}: {', '.join(f'{i}: {x:g}' for i, x in enumerate(figures))}")
    return lines


def _fixed_table(where: str, tensors: Tensors, name: str) -> tuple[str, TokenGrid] | None:
    if name not in tensors.shapes:
        return None
    table_ND = tensors.read(name).reshape(-1, tensors.shapes[name][-1])
    if not table_ND.any():
        return None
    count, width = table_ND.shape

    def fits(kind: str, grid: TokenGrid, rows: Sequence[int]) -> bool:
        ids = jnp.asarray(rows, jnp.int32)[None]
        made_ND = rope.sincos(rope.coordinates(ids, grid), width, kind)[0]
        same_width = made_ND.shape[1] == width
        return same_width and np.allclose(made_ND, table_ND[np.asarray(rows)], atol=0.01)

    for side in range(isqrt(count), 0, -1):  # frames are square
        grid = (count // side**2, side, side)
        for kind in rope.FIXED if count % side**2 == 0 else ():
            if fits(kind, grid, [count - 1]) and fits(kind, grid, range(count)):
                return kind, grid
    raise UserError(
        f"{where}: {name} {tensors.shapes[name]} is not the fixed sin-cos table of V-JEPA 1 for "
        "square frames, nor zero: wmjax has no such positions"
    )
