"""Inference: `wmjax.load(where)` returns a model that turns video into features.

model = wmjax.load("runs/vjepa2_aloha")      # or a folder, OWNER/NAME on the Hub, a .pt file
features = model.encode(video, size=256)     # uint8 THWC -> (tokens, width)
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from wmjax import sharding, weights
from wmjax.data.media.transforms import centre_box, crop_and_scale
from wmjax.errors import UserError
from wmjax.models import base
from wmjax.models.classifier import AttentiveClassifier
from wmjax.models.encoder import PIXEL_MEAN, PIXEL_STD
from wmjax.models.vjepa2 import VJEPA2Settings
from wmjax.nn.compute import Compute
from wmjax.types import Term, WorldModelInput, WorldModelOutput

Size = int | tuple[int, int]


class Model:
    """A loaded model for inference; made by `load`.

    config: the configuration of the run; for other weights "model", "classifier" and "clip" as
    their files say. labels: names of the classes, or (). notes: what was assumed about the weights,
    and what was dropped. params: arrays by part, such as encoder and predictor. token_grid(frames,
    height, width): tokens of a clip along time, rows and columns; UserError if none fit.
    """

    def __init__(
        self,
        source: weights.Pretrained,
        probe: weights.Pretrained | None = None,
        dtype: str | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        # dtype and kernels are chosen for this machine, not for the one that trained the model.
        compute = Compute.of(source.model)
        compute = dataclasses.replace(
            compute, dtype=dtype or "float32", remat="none", attention="auto", norm="auto"
        )
        blueprint = source.blueprint(compute)
        settings = (probe or source).classifier
        self.config: dict[str, Any] = source.config or {
            "model": {"name": "vjepa2", **source.model},
            "classifier": settings,
            "clip": source.clip,
        }
        self.labels = (probe or source).labels
        self.notes = source.notes + (probe.notes if probe else ())
        self.token_grid = blueprint.token_grid
        self._where, self._clip, self._blueprint = source.where, source.clip, blueprint

        shapes, axes = dict(blueprint.shapes), dict(blueprint.axes)
        graphs: dict[str, Any] = {}
        if settings:
            if not isinstance(blueprint.settings, VJEPA2Settings):
                name = blueprint.family.__qualname__
                raise UserError(f"{source.where}: {name} takes no classifier; wanted V-JEPA 2")
            width = blueprint.settings.encoder["width"]
            if settings["width"] != width:
                raise UserError(
                    f"{(probe or source).where}: classifier for features of width "
                    f"{settings['width']}; the encoder's have width {width}"
                )
            classifier = nnx.eval_shape(
                lambda: AttentiveClassifier(nnx.Rngs(0), **settings, compute=compute)
            )
            for part in ("pooler", "head"):
                graphs[part], shapes[part], axes[part] = base.split(getattr(classifier, part))

        def read(origin: weights.Pretrained, parts: Iterable[str]) -> base.Params:
            placed = {
                part: jax.tree.map(
                    lambda leaf, names: _placed(leaf, names, mesh), shapes[part], axes[part]
                )
                for part in parts
            }
            return weights.load(origin, placed, blueprint.settings)

        from_probe = ("pooler", "head") if probe else ()
        self.params = read(source, (part for part in source.parts if part not in from_probe))
        if probe:
            self.params |= read(probe, from_probe)

        def built(params: base.Params) -> tuple[Any, base.Params]:
            """Return model and target; parts that were not loaded stay shapes and are not used."""
            parts = {part: params.get(part, shape) for part, shape in blueprint.shapes.items()}
            return base.merge(blueprint.graph, parts), blueprint.abstract.followed(parts)

        def encode(params: base.Params, video_BTHWC: jax.Array) -> jax.Array:
            model, target = built(params)
            return model.features(target, video_BTHWC)

        def targets(params: base.Params, video_BTHWC: jax.Array) -> jax.Array:
            model, target = built(params)
            return model.target_features(target, video_BTHWC)

        def loss(params: base.Params, batch: WorldModelInput) -> WorldModelOutput:
            model, target = built(params)
            return model.loss(target, batch, jax.random.key(0))

        def predict(
            params: base.Params, video_BTHWC: jax.Array, ids_BK: jax.Array, ids_BM: jax.Array
        ) -> jax.Array:
            model, _ = built(params)
            grid = self.token_grid(*video_BTHWC.shape[1:4])
            return model.predict(model.encode(video_BTHWC, ids_BK), ids_BK, ids_BM, grid)

        def classify(params: base.Params, video_BTHWC: jax.Array) -> jax.Array:
            pooled_B1D = base.merge(graphs["pooler"], params["pooler"])(encode(params, video_BTHWC))
            return base.merge(graphs["head"], params["head"])(pooled_B1D)[:, 0].astype(jnp.float32)

        self._encode, self._targets = jax.jit(encode), jax.jit(targets)
        self._predict, self._classify, self._loss = (
            jax.jit(predict),
            jax.jit(classify),
            jax.jit(loss),
        )

    def __repr__(self) -> str:
        clip = ", ".join(f"{name}={value}" for name, value in self._clip.items())
        return f"<wmjax model {self._where}: {', '.join(self.params)}; clip: {clip}>"

    @property
    def complete(self) -> bool:
        """Whether every part of the model was loaded; `terms` needs them all."""
        return self.params.keys() >= self._blueprint.shapes.keys()

    def target_features(self, video: Any) -> jax.Array:
        """Return features in the space of the loss, where predictions live; else like `encode`.

        video: as for encode, at its own size.
        """
        video_BTHWC, single = self._clips(video, None)
        features_BND = self._targets(self.params, video_BTHWC)
        return features_BND[0] if single else features_BND

    def terms(self, batch: WorldModelInput) -> dict[str, Term]:
        """Return the terms of the loss on a batch, with predictions and targets.

        Raises UserError if a part of the model was not loaded.
        """
        if not self.complete:
            parts = ", ".join(self._blueprint.shapes)
            raise UserError(f"{self._where}: has {', '.join(self.params)}; wanted {parts}")
        return self._loss(self.params, batch).terms

    def encode(self, video: Any, *, size: Size | None = None) -> jax.Array:
        """Return float32 features of all tokens: (tokens, width), or (B, tokens, width).

        video: THWC or BTHWC. uint8 RGB is normalised here; floats must be normalised already.
        Length and size must be multiples of tubelet and patch. Tokens are ordered by time, row,
        column. size: height and width in pixels, or one number for both, after a centre crop and
        resize; uint8 only. None: the video's own size.
        """
        video_BTHWC, single = self._clips(video, size)
        features_BND = self._encode(self.params, video_BTHWC)
        return features_BND[0] if single else features_BND

    def predict(
        self, video: Any, context_ids: Any, target_ids: Any, *, size: Size | None = None
    ) -> jax.Array:
        """Predict the features of target tokens from the context tokens alone.

        video, size: as for encode. context_ids, target_ids: token ids, (K,) and (M,) for all clips,
        or (B, K) and (B, M) for each clip. Returns float32 (M, width) or (B, M, width), to be
        compared with target_features. Raises UserError if the model does not predict masked tokens.
        """
        if not hasattr(self._blueprint.family, "predict"):
            name = self._blueprint.family.__qualname__
            raise UserError(f"{self._where}: {name} does not predict masked tokens")
        if not self.complete:
            raise UserError(f"{self._where}: has an encoder but no predictor")
        video_BTHWC, single = self._clips(video, size)
        tokens = math.prod(self.token_grid(*video_BTHWC.shape[1:4]))
        ids = (
            _token_ids(name, value, len(video_BTHWC), tokens)
            for name, value in (("context_ids", context_ids), ("target_ids", target_ids))
        )
        prediction_BMD = self._predict(self.params, video_BTHWC, *ids)
        return prediction_BMD[0] if single else prediction_BMD

    def classify(self, video: Any, *, size: Size | None = None) -> jax.Array:
        """Return float32 logits, (classes,) or (B, classes).

        video, size: as for encode. Raises UserError if no classifier was loaded.
        """
        if "head" not in self.params:
            raise UserError(f"{self._where}: has no classifier")
        video_BTHWC, single = self._clips(video, size)
        logits_BC = self._classify(self.params, video_BTHWC)
        return logits_BC[0] if single else logits_BC

    def preprocess(self, video: Any, size: Size | None = None) -> np.ndarray:
        """Crop, resize and normalise uint8 RGB, THWC or BTHWC of any size, to float32.

        size: height and width in pixels, or one number for both; None: as in training. Encoding the
        result equals encoding the uint8 video with the same size.
        """
        frames = _checked(video)
        if frames.dtype != np.uint8:
            raise UserError(f"video of {frames.dtype}: wanted uint8 for preprocess")
        size = size or self._clip.get("size")
        if not size:
            raise UserError(f"{self._where}: does not say the size of its clips; give size=")
        mean, std = (np.asarray(value, np.float32) for value in (PIXEL_MEAN, PIXEL_STD))
        return (_resized(frames, size).astype(np.float32) / np.float32(255) - mean) / std

    def _clips(self, video: Any, size: Size | None) -> tuple[Any, bool]:
        """Return a batch of resized clips, and whether the video was a single clip."""
        frames = _checked(video)
        if size is not None:
            if frames.dtype != np.uint8:
                raise UserError(f"size={size} for video of {frames.dtype}: only uint8 is resized")
            frames = _resized(frames, size)
        elif frames.dtype not in (np.uint8, np.float32):
            frames = frames.astype(np.float32)
        single = frames.ndim == 4
        clips = frames[None] if single else frames
        self.token_grid(*clips.shape[1:4])  # raises before anything is compiled
        return clips, single


def load(
    where: str | Path,
    *,
    encoder: str = "",
    heads: int | None = None,
    predictor_heads: int | None = None,
    probe: str | Path | None = None,
    probe_index: int = 0,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    trust: Sequence[str] = (),
) -> Model:
    """Load a model for inference.

    where: the workdir of a run (its newest checkpoint), a folder that `python -m wmjax.weights
    import` wrote, a folder of transformers with config.json and safetensors, OWNER/NAME on the
    Hugging Face Hub, or a .pt file of Meta. encoder: of a run or a .pt file: target_encoder (the
    EMA) or encoder; "": the EMA where there is one. heads, predictor_heads: attention heads of a
    .pt file, which does not say them; None: assumed, as the notes say. probe: a separate
    classifier, such as the files that Meta's evaluations write. probe_index: which of the probes in
    such a file, from 0. dtype: of matrix products: float32 (default) or bfloat16, for which GPUs
    have fused attention. mesh: shards the parameters over its devices, see sharding.make_mesh;
    None: the default device. trust: packages outside wmjax from which the model that a run's
    configuration names may be imported. Raises UserError if no format fits, or a name or shape does
    not.
    """
    source = weights.open_pretrained(
        where, encoder=encoder, heads=heads, predictor_heads=predictor_heads, trust=tuple(trust)
    )
    if not source.step and "encoder" not in source.parts:
        raise UserError(
            f"{source.where}: has {', '.join(source.parts)} but no encoder; load an encoder and "
            "give this as probe="
        )
    classifier = weights.open_pretrained(probe, probe=probe_index) if probe is not None else None
    if classifier and not classifier.classifier:
        raise UserError(f"{classifier.where}: has no classifier; probe= needs one")
    return Model(source, classifier, dtype, mesh)


def _placed(leaf: Any, axes: tuple, mesh: Mesh | None) -> jax.ShapeDtypeStruct:
    where = sharding.parameter_sharding(mesh, axes, leaf.shape) if mesh else None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def _checked(video: Any) -> Any:
    frames = video if isinstance(video, jax.Array) else np.asarray(video)
    if frames.ndim not in (4, 5) or frames.shape[-1] != 3:
        raise UserError(f"video of shape {frames.shape}: wanted THWC or BTHWC with 3 channels")
    if frames.dtype != np.uint8 and not jnp.issubdtype(frames.dtype, jnp.floating):
        raise UserError(f"video of {frames.dtype}: wanted uint8, or floats that are normalised")
    return frames


def _resized(frames: Any, size: Size) -> np.ndarray:
    """Centre-crop and scale on the host, exactly as held-out clips in training."""
    height, width = (size, size) if isinstance(size, int) else size
    if frames.shape[-3:-1] == (height, width):
        return np.asarray(frames)
    clips = np.asarray(frames).reshape(-1, *frames.shape[-3:])
    box = centre_box(clips.shape[1], clips.shape[2], width / height)
    scaled = crop_and_scale(list(clips), box, height, width)
    return scaled.reshape(*frames.shape[:-3], height, width, 3)


def _token_ids(name: str, value: Any, batch: int, tokens: int) -> np.ndarray:
    ids = np.asarray(value)
    if ids.ndim not in (1, 2) or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(
            f"{name} of shape {ids.shape}, {ids.dtype}: wanted integers in one row, or a row a clip"
        )
    if ids.min() < 0 or ids.max() >= tokens:
        raise UserError(f"{name} from {ids.min()} to {ids.max()}: the clip has {tokens} tokens")
    if ids.ndim == 2 and len(ids) != batch:
        raise UserError(f"{name} for {len(ids)} clips: the video has {batch}")
    return np.broadcast_to(ids.astype(np.int32), (batch, ids.shape[-1]))
