"""Inference: `wmjax.load(where)` returns a model that turns video into features.

model = wmjax.load("runs/vjepa2_aloha")      # or a folder, OWNER/NAME on the Hub, a .pt file
features = model.encode(video, size=256)     # uint8 THWC -> (tokens, width)
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from wmjax import sharding, weights
from wmjax.actor import Actor, Found
from wmjax.arrays import as_array
from wmjax.data.media.transforms import FULL_BOX, centre_cropped, crop_and_scale
from wmjax.errors import UserError
from wmjax.models import base
from wmjax.models.acting import ActingModel
from wmjax.models.classifier import AttentiveClassifier
from wmjax.models.encoder import PIXEL_MEAN, PIXEL_STD
from wmjax.models.vjepa2 import VJEPA2Settings
from wmjax.nn.compute import Compute, jit
from wmjax.planning.policy import Policy
from wmjax.planning.search import Settings
from wmjax.types import Array, Term, WorldModelInput, WorldModelOutput

Size = int | tuple[int, int]
OFFICIAL_CROP = 224 / 256  # share of the short side that V-JEPA 2's evaluations keep
_SLACK = 0.1  # how far floats may lie outside their range, after rounding and resizing


class Model:
    """A loaded model for inference; made by `load`.

    config: the configuration of the run; for other weights "model", "classifier" and "clip" as
    their files say. labels: names of the classes, or (). notes: what was assumed about the weights,
    and what was dropped. params: arrays by part, such as encoder and predictor. crop_pct: as given
    to `load`. token_grid(frames, height, width): tokens of a clip along time, rows and columns;
    UserError if none fit.
    """

    def __init__(
        self,
        source: weights.Pretrained,
        probe: weights.Pretrained | None = None,
        dtype: str | None = None,
        mesh: Mesh | None = None,
        crop_pct: float | None = None,
    ) -> None:
        # dtype and kernels are chosen for this machine, not for the one that trained the model.
        compute = dataclasses.replace(
            Compute.of(source.model),
            dtype=dtype or "float32",
            target_dtype="",
            remat="none",
            attention="auto",
            norm="auto",
        )
        blueprint = source.blueprint(compute)
        self._classifier = settings = (probe or source).classifier
        self.crop_pct = crop_pct or (OFFICIAL_CROP if settings else 1.0)
        self.config: dict[str, Any] = source.config or {
            "model": {"name": "vjepa2", **source.model},
            "classifier": settings,
            "clip": source.clip,
        }
        self.labels = (probe or source).labels
        self.notes = source.notes + (probe.notes if probe else ())
        self.token_grid = blueprint.token_grid
        self._where, self._clip, self._blueprint = source.where, source.clip, blueprint
        self._model = source.model

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
            return model.evaluate(target, batch)

        def predict(
            params: base.Params, video_BTHWC: jax.Array, ids_BK: jax.Array, ids_BM: jax.Array
        ) -> jax.Array:
            model, _ = built(params)
            return model.predict_from(video_BTHWC, ids_BK, ids_BM)

        def classify(params: base.Params, video_BTHWC: jax.Array) -> jax.Array:
            pooled_B1D = base.merge(graphs["pooler"], params["pooler"])(encode(params, video_BTHWC))
            return base.merge(graphs["head"], params["head"])(pooled_B1D)[:, 0].astype(jnp.float32)

        self._built, self._recordings = built, source.recordings
        self._encode, self._targets, self._predict, self._classify, self._loss = (
            _jit_unless_traced(fn) for fn in (encode, targets, predict, classify, loss)
        )

    def __repr__(self) -> str:
        clip = ", ".join(f"{name}={value}" for name, value in self._clip.items())
        return f"<wmjax model {self._where}: {', '.join(self.params)}; clip: {clip}>"

    @property
    def complete(self) -> bool:
        """Whether every part of the model was loaded; `terms` needs them all."""
        return self.params.keys() >= self._blueprint.shapes.keys()

    def target_features(self, video: Any, *, normalized: bool | None = None) -> jax.Array:
        """Return features in the space of the loss, where predictions live; else like `encode`.

        video, normalized: as for encode; the video is taken at its own size.
        """
        video_BTHWC, single = self._clips(video, None, normalized)
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

    def encode(
        self, video: Any, *, size: Size | None = None, normalized: bool | None = None
    ) -> jax.Array:
        """Return float32 features of all tokens: (tokens, width), or (B, tokens, width).

        video: THWC or BTHWC, uint8 RGB or floats. Length and size must be multiples of tubelet and
        patch. V-JEPA 2.1 also takes images: HWC, or clips of one frame. Tokens are ordered by time,
        row, column. size: height and width in pixels, or one number for both, after a resize and a
        centre crop that keeps `crop_pct`; uint8 only. None: the video's own size. normalized: of
        floats. True: (RGB - mean) / std of ImageNet's RGB in 0..1, as `preprocess` returns. False:
        RGB in 0..1. None: normalised, but values that may be either, which all lie in -1..1, are
        refused.

        Raises UserError for values that are not what `normalized` says. Values are not checked
        under jit, where floats need `normalized`.
        """
        video_BTHWC, single = self._clips(video, size, normalized)
        features_BND = self._encode(self.params, video_BTHWC)
        return features_BND[0] if single else features_BND

    def encode_dataset(
        self,
        root: str | Path,
        out: str | Path,
        *,
        frames: int | None = None,
        size: Size | None = None,
        fps: float = 4.0,
        cameras: str = "each",
        clips: int = 8,
        threads: int = 8,
    ) -> None:
        """Write what `encode` gives for all clips of a LeRobot dataset; the same call resumes.

        `OUT/DATASET+CAMERA/EPISODE.npy` is float16 (clips, tokens, width). Clips follow one another
        without overlap; the last repeats the episode's last frame. `OUT/features.json` says what
        they are of. An episode's file is written whole. Frames are cropped to the centre and
        scaled as held-out clips in training, whatever crop_pct.

        root: the dataset's folder. frames, size: of a clip; None: as in training. fps: highest
        frame rate; every ceil(recorded fps / fps)-th frame is taken. cameras: each, or names: a,b.
        clips: encoded at once. threads: that decode. Raises UserError for a folder of other
        features, such as those of another encoder.
        """
        from wmjax import features
        from wmjax.data.lerobot import LeRobotSource

        frames, size = frames or self._clip.get("frames"), size or self._clip.get("size")
        if not frames or not size:
            raise UserError(f"{self._where}: does not say its clips; give frames= and size=")
        if min(clips, threads) < 1:
            raise UserError(f"clips={clips}, threads={threads}: wanted 1 or more")
        height, width = (size, size) if isinstance(size, int) else size
        self.token_grid(frames, height, width)  # raises before the dataset is read
        source = LeRobotSource(root, frames=frames, fps=fps, ends="repeat", cameras=cameras)
        features.of_dataset(
            self._encode,
            {part: self.params[part] for part in self.params if part in self._blueprint.shapes},
            {
                **{f"model.{k}": v for k, v in base.function_of(self._blueprint.settings).items()},
                "model.dtype": self._blueprint.compute.dtype,
            },
            source,
            Path(out),
            clips=clips,
            size=(height, width),
            threads=threads,
        )

    def predict(
        self,
        video: Any,
        context_ids: Any,
        target_ids: Any,
        *,
        size: Size | None = None,
        normalized: bool | None = None,
    ) -> jax.Array:
        """Predict the features of target tokens from the context tokens alone.

        video, size, normalized: as for encode. context_ids, target_ids: token ids, (K,) and (M,)
        for all clips, or (B, K) and (B, M) for each clip. Returns float32 (M, width) or
        (B, M, width), to be compared with target_features. Raises UserError if the model does not
        predict masked tokens.
        """
        if not hasattr(self._blueprint.family, "predict_from"):
            name = self._blueprint.family.__qualname__
            raise UserError(f"{self._where}: {name} does not predict masked tokens")
        if not self.complete:
            raise UserError(f"{self._where}: has an encoder but no predictor")
        video_BTHWC, single = self._clips(video, size, normalized)
        tokens = math.prod(self.token_grid(*video_BTHWC.shape[1:4]))
        ids = (
            _token_ids(name, value, len(video_BTHWC), tokens)
            for name, value in (("context_ids", context_ids), ("target_ids", target_ids))
        )
        prediction_BMD = self._predict(self.params, video_BTHWC, *ids)
        return prediction_BMD[0] if single else prediction_BMD

    def classify(
        self, video: Any, *, size: Size | None = None, normalized: bool | None = None
    ) -> jax.Array:
        """Return float32 logits, (classes,) or (B, classes).

        video, size, normalized: as for encode. Raises UserError if no classifier was loaded.
        """
        if "head" not in self.params:
            raise UserError(f"{self._where}: has no classifier")
        video_BTHWC, single = self._clips(video, size, normalized)
        logits_BC = self._classify(self.params, video_BTHWC)
        return logits_BC[0] if single else logits_BC

    @cached_property
    def _actor(self) -> Actor:
        return Actor(self._where, self._blueprint, self._built, self._recordings, centre_cropped)

    def rollout(self, observation: Any, actions: Any, *, recording: str = "") -> np.ndarray:
        """Return the embeddings that the model imagines after each block of actions, (H, N, D).

        observation: a picture, uint8 RGB HWC of any size, where the run had one camera; or a dict
        of pictures by camera and "state". A leading axis B stands for episodes; then the result is
        (B, H, N, D). actions: in the units of the recording, (H x P, A), the P actions between two
        frames one after another. recording: which dataset of a mixture the robot is.
        """
        return self._actor.rollout(self.params, observation, actions, recording)

    @property
    def recordings(self) -> list[dict[str, Any]]:
        """The datasets that a model was trained on: names, cameras, state, action and rate."""
        return [dict(each) for each in self._recordings]

    @property
    def acts(self) -> bool:
        """Whether the model imagines what actions lead to, and plans."""
        return issubclass(self._blueprint.family, ActingModel)

    def embed(self, observation: Any, *, recording: str = "") -> np.ndarray:
        """Return the embedding of an observation, (N, D), that plans compare with the goal's."""
        return self._actor.embed(self.params, observation, recording)

    def energy(
        self, observation: Any, goal: Any, actions: Any, *, recording: str = ""
    ) -> np.ndarray:
        """Return the distance to a goal after each block of actions, (H,).

        Arguments as for rollout and plan. actions: (H x P, A); or (N, H x P, A), of which each is
        imagined from the same observation; then the result is (N, H).
        """
        return self._actor.energy(self.params, observation, goal, actions, recording)

    def cost(
        self,
        observation: Any,
        goal: Any,
        actions: Any,
        *,
        plan: Settings | str | Mapping[str, Any] = "lewm",
        recording: str = "",
    ) -> np.ndarray:
        """Return the cost of plans for a search of your own, (S,), or (B, S) for B episodes.

        Arguments as for plan, of whose settings objective, control and chunk are used. actions: S
        plans an episode in the model's units, normalised blocks: (S, H, P x A) or (B, S, H, P x A).
        """
        return self._actor.cost(self.params, observation, goal, actions, plan, recording)

    def plan(
        self,
        observation: Any,
        goal: Any,
        *,
        plan: Settings | str | Mapping[str, Any] = "lewm",
        recording: str = "",
        bounds: Any = "recorded",
        seed: int | Sequence[int] = 0,
    ) -> Found:
        """Plan toward a goal: actions in the units of the recording, (H x P, A), and their cost.

        observation, recording: as for rollout. goal: pictures of the same cameras, or a dict of
        them. plan: lewm, short, vjepa2_ac, fast, or keys of planning.search.Settings. bounds: of
        each number of an action: recorded (least and greatest in the data), None, or (lowest,
        highest). Raises UserError for a model that does not act.
        """
        arguments = self.params, observation, goal, plan, recording, bounds, seed
        return self._actor.plan(*arguments)[1]

    def policy(
        self,
        goal: Any,
        *,
        plan: Settings | str | Mapping[str, Any] = "lewm",
        recording: str = "",
        bounds: Any = "recorded",
        seed: int = 0,
    ) -> Policy:
        """Return a policy toward a goal: `reset()` before an episode, `act(observation)` each step.

        Arguments as for plan.
        """
        return self._actor.policy(self.params, goal, plan, recording, bounds, seed)

    def export(
        self,
        folder: str | Path,
        classifier: AttentiveClassifier | None = None,
        labels: Sequence[str] = (),
        *,
        frames: int | None = None,
        size: int | None = None,
    ) -> None:
        """Write a folder that AutoModel and AutoVideoProcessor of transformers open.

        classifier: trained on features of this model by evals.classifier.fit; None: the one that
        was loaded, if any. labels: names of its classes. frames, size: of a clip; size is the side
        of a square frame in pixels; None: as in training. Raises UserError for a model that
        transformers would compute differently, and for frames that are not square.
        """
        frames, size = weights.square_clip(self._where, self._clip, frames, size)
        params, settings = dict(self.params), self._classifier
        if classifier is not None:
            settings = classifier.settings
            params |= base.split(classifier)[1]
        weights.export(
            params,
            self._model,
            folder,
            frames=frames,
            size=size,
            classifier=settings or None,
            labels=labels or (self.labels if classifier is None else ()),
            config=self.config if "data" in self.config else None,
        )

    def preprocess(self, video: Any, size: Size | None = None) -> np.ndarray:
        """Resize, crop and normalise uint8 RGB, THWC or BTHWC of any size, to float32.

        size: height and width in pixels, or one number for both; None: as in training. Encoding the
        result equals encoding the uint8 video with the same size.
        """
        frames = self._checked(video)
        if frames.dtype != np.uint8:
            raise UserError(f"video of {frames.dtype}: wanted uint8 for preprocess")
        if not size:
            if "size" not in self._clip:
                raise UserError(f"{self._where}: does not say the size of its clips; give size=")
            size = self._clip["size"], self._clip.get("width", self._clip["size"])
        resized = _resized(frames, size, self.crop_pct)
        return np.asarray(_normalise(resized.astype(np.float32) / np.float32(255)))

    def _checked(self, video: Any) -> Array:
        """Return clips as _checked does; a picture, for a family that takes it, as a clip."""
        if getattr(self._blueprint.family, "takes_pictures", False):
            frames = as_array("video", video)
            video = frames[None] if frames.ndim == 3 else frames
        return _checked(video)

    def _clips(self, video: Any, size: Size | None, normalized: bool | None) -> tuple[Any, bool]:
        """Return a batch of resized clips, and whether the video was a single clip."""
        frames = self._checked(video)
        if frames.dtype != np.uint8:
            if size is not None:
                raise UserError(f"size={size} for video of {frames.dtype}: only uint8 is resized")
            frames = _normalised(frames, normalized)
        elif normalized:
            raise UserError("normalized=True for video of uint8: wanted floats")
        elif size is not None:
            frames = _resized(frames, size, self.crop_pct)
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
    crop_pct: float | None = None,
    trust: Sequence[str] = (),
) -> Model:
    """Load a model for inference.

    where: the workdir of a run (its newest checkpoint), a folder that `python -m wmjax.weights
    import` wrote, a folder of transformers with config.json and safetensors, OWNER/NAME on the
    Hugging Face Hub, or a .pt file of Meta. encoder: of a run or a .pt file: target_encoder (the
    EMA) or encoder; "": the EMA where there is one. heads, predictor_heads: attention heads of a
    .pt file, which does not say them; None: assumed, as the notes say. probe: a separate
    classifier, such as the files that Meta's evaluations write. probe_index: which of the probes in
    such a file, from 0. dtype: of matrix products: float32 (default); bfloat16, for which GPUs have
    fused attention; or float8, twice as fast and less exact, on NVIDIA GPUs from Ada on. mesh:
    shards the parameters over its devices, see sharding.make_mesh; None: the default device.
    crop_pct: share of a frame's short side that `size=` keeps, above 0 to 1. 1.0: the largest
    centre crop, then a resize, as held-out clips in training. Less: the short side is resized to
    int(size / crop_pct), then the centre is cropped. Default: 0.875 with a classifier, as V-JEPA
    2's evaluations (EvalVideoTransform: 256 / 224) and VJEPA2VideoProcessor; else 1.0. trust:
    packages outside wmjax from which the model that a run's configuration names may be imported.
    Raises UserError if no format fits, or a name or shape does not.
    """
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise UserError(f"crop_pct={crop_pct}: wanted above 0, up to 1")
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
    return Model(source, classifier, dtype, mesh, crop_pct)


def _jit_unless_traced(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Jit a function of (parameters, arrays); within a caller's jit it becomes a part of that."""
    jitted = jit(fn)

    def call(params: base.Params, *arrays: Any) -> Any:
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arrays))
        return (fn if traced else jitted)(params, *arrays)

    return call


def _placed(leaf: Any, axes: tuple, mesh: Mesh | None) -> jax.ShapeDtypeStruct:
    where = sharding.parameter_sharding(mesh, axes, leaf.shape) if mesh else None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def _checked(video: Any) -> Array:
    frames = as_array("video", video)
    if frames.ndim not in (4, 5) or frames.shape[-1] != 3:
        raise UserError(f"video of shape {frames.shape}: wanted THWC or BTHWC with 3 channels")
    if not frames.size:
        raise UserError(f"video of shape {frames.shape}: holds no pixel; wanted a clip or more")
    if frames.dtype != np.uint8 and not jnp.issubdtype(frames.dtype, jnp.floating):
        raise UserError(f"video of {frames.dtype}: wanted uint8 or floats")
    return frames


def _normalised(frames: Array, normalized: bool | None) -> Array:
    """Return float32 normalised RGB; UserError unless the floats are what `normalized` says."""
    frames = frames.astype(np.float32)
    if not isinstance(frames, jax.core.Tracer):
        _check_values(frames, normalized)
    elif normalized is None:
        raise UserError("video of floats under jit: wanted normalized=True or normalized=False")
    return _normalise(frames) if normalized is False else frames


def _check_values(frames: Array, normalized: bool | None) -> None:
    """Raise UserError for float32 values that are not what `normalized` says, or may be either."""
    axes = tuple(range(frames.ndim - 1))
    low_C, high_C = np.asarray(frames.min(axes)), np.asarray(frames.max(axes))
    least_C: Array = np.zeros(3, np.float32)
    most_C: Array = np.ones(3, np.float32)
    raw = "RGB in 0..1 with normalized=False, or in 0..255 as uint8"
    wanted = raw
    if normalized is not False:
        least_C, most_C = _normalise(least_C), _normalise(most_C)
        wanted = f"normalised RGB in {least_C.min():.2f}..{most_C.max():.2f}; or {raw}"
    for name, low, high, least, most in zip(
        ("red", "green", "blue"), low_C, high_C, least_C, most_C, strict=True
    ):
        if not (low >= least - _SLACK and high <= most + _SLACK):  # NaN is refused too
            raise UserError(f"video of floats: {name} in {low:.4g}..{high:.4g}: wanted {wanted}")
    if normalized is None and low_C.min() >= -1 and high_C.max() <= 1:
        raise UserError(
            f"video of floats in {low_C.min():.4g}..{high_C.max():.4g}: may be normalised or not: "
            f"wanted normalized=True; or {raw}"
        )


def _normalise(frames: Array) -> Array:
    """Return (RGB - mean) / std of float32 RGB in 0..1, channels last."""
    ones = (1,) * (frames.ndim - 1)
    mean, std = (np.asarray(v, np.float32).reshape(*ones, 3) for v in (PIXEL_MEAN, PIXEL_STD))
    return (frames - mean) / std


def _resized(frames: Any, size: Size, crop_pct: float) -> np.ndarray:
    """Resize and centre-crop on the host; crop_pct=1: exactly as held-out clips in training."""
    height, width = (size, size) if isinstance(size, int) else size
    frames = np.asarray(frames)
    if crop_pct == 1:
        return centre_cropped(frames, (height, width))
    rows, columns = frames.shape[-3:-1]
    tall, wide = int(height / crop_pct), int(width / crop_pct)
    if rows * wide > columns * tall:
        tall = rows * wide // columns
    else:
        wide = columns * tall // rows
    top, left = round((tall - height) / 2), round((wide - width) / 2)
    clips = list(frames.reshape(-1, rows, columns, 3))
    scaled = crop_and_scale(clips, FULL_BOX, tall, wide)
    scaled = scaled[:, top : top + height, left : left + width]
    return scaled.reshape(*frames.shape[:-3], height, width, 3)


def _token_ids(name: str, value: Any, batch: int, tokens: int) -> np.ndarray:
    ids = np.asarray(as_array(name, value))
    if ids.ndim not in (1, 2) or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(
            f"{name} of shape {ids.shape}, {ids.dtype}: wanted integers in one row, or a row a clip"
        )
    if ids.min() < 0 or ids.max() >= tokens:
        raise UserError(f"{name} from {ids.min()} to {ids.max()}: the clip has {tokens} tokens")
    if ids.ndim == 2 and len(ids) != batch:
        raise UserError(f"{name} for {len(ids)} clips: the video has {batch}")
    return np.broadcast_to(ids.astype(np.int32), (batch, ids.shape[-1]))
