"""Computes what an encoder gives for every frame or clip of recordings, once, into a folder.

With data.features a train step then reads features in place of video. The folder's `features.json`
says what they were computed from; another encoder, size or recording is refused. An episode's file
is written whole, so a stopped run goes on where it was.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from tqdm import tqdm

from wmjax import sharding
from wmjax.data.media.transforms import Scaler, centre_box
from wmjax.data.source import Source
from wmjax.data.stored import Stored, Take
from wmjax.data.tools.jobs import placed
from wmjax.data.workers import in_order
from wmjax.errors import ClipError, UserError
from wmjax.models.base import Params
from wmjax.nn.compute import jit
from wmjax.run.console import say
from wmjax.run.files import to_json, write_whole
from wmjax.step import Steps, TrainState

KEY = "features.json"
_SPARE = 1.02  # room that is wanted on the disk, relative to the features
Part = tuple[Take, np.ndarray, ClipError | None]  # some frames of a take, in order


def stored_source(
    source: Source,
    folder: Path,
    steps: Steps,
    state: TrainState,
    *,
    pictures: int,
    threads: int,
    skip: bool,
    begin: Callable[[], None],
) -> Source:
    """Return the clips with features in place of pictures; compute those that `folder` lacks.

    pictures: encoded at once by all processes. threads: that read, in each process. skip: leave out
    what cannot be read, with a warning; its clips then cannot be read. begin: called before all
    processes encode; may raise to stop, and the next call goes on.
    Raises UserError for a model whose features change in training, and for a folder of others.
    """
    blueprint = steps.blueprint
    prefix, settings = blueprint.abstract.frozen_features()
    if not prefix:
        raise UserError(
            f"data.features={str(folder)!r}: the features of {blueprint.family.__name__} change in "
            "training; wanted a frozen encoder: model.name='vjepa2_ac' with model.joint=False"
        )

    def encode(state: TrainState, video_BTHWC: jax.Array) -> jax.Array:
        with jax.sharding.use_abstract_mesh(steps.mesh.abstract_mesh):
            model, target = blueprint.join(state.params, state.frozen, state.target)
            return model.target_features(target, video_BTHWC).astype(Stored.dtype)

    spec = blueprint.spec
    params = {k: v for k, v in flatten_dict(state.frozen, sep="/").items() if k.startswith(prefix)}
    key = {
        "encoder": _digest(params),
        **{f"model.{name}": value for name, value in settings.items()},
        "model.dtype": blueprint.compute.dtype,
        "size in pixels": [spec.height, spec.width],
        **source.fingerprint(),
    }
    picture = jax.ShapeDtypeStruct((1, 1, spec.height, spec.width, 3), np.uint8)
    found = jax.eval_shape(encode, steps.abstract, picture)
    stored = Stored(folder.expanduser().absolute(), found.shape[1:])
    where = f"data.features={str(folder)!r}"
    _check_key(stored.folder, key, where)
    takes = [take for take in source.takes() if not stored.path(*take[:3]).exists()]
    if takes:
        rows = sharding.batch_sharding(steps.mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, steps.abstract)
        jitted = jit(encode, in_shardings=(shardings, rows), out_shardings=rows)
        shape = pictures // jax.process_count(), spec.height, spec.width, 3

        def encoded(some: np.ndarray) -> np.ndarray:
            video = np.zeros((shape[0], 1, *shape[1:]), np.uint8)
            video[: len(some), 0] = some
            placed = jax.make_array_from_process_local_data(rows, video)
            return _local_rows(jitted(state, placed))[: len(some)]

        _compute(*(stored, takes, encoded, begin, where), shape=shape, threads=threads, skip=skip)
    return source.from_stored(stored)


def of_dataset(
    encode: Callable[[Params, jax.Array], jax.Array],
    params: Params,
    settings: Mapping[str, Any],
    source: Source,
    folder: Path,
    *,
    clips: int,
    size: tuple[int, int],
    threads: int,
) -> None:
    """Encode whole recordings, clip after clip, into a folder; compute only what it lacks.

    encode(params, video_BTHWC): features BND. settings: what else they depend on. source: its
    frames and stride are those of a clip; a last clip repeats its last frame. clips: encoded at
    once. size: height and width in pixels. Raises UserError for a folder of other features.
    """
    video = (clips, source.frames, *size, 3)

    def narrow(params: Params, video_BTHWC: jax.Array) -> jax.Array:
        return encode(params, video_BTHWC).astype(Stored.dtype)

    jitted = jit(narrow)
    found = jax.eval_shape(narrow, params, jax.ShapeDtypeStruct(video, np.uint8))
    stored = Stored(folder.expanduser().absolute(), found.shape[1:])
    clip = {"frames of a clip": source.frames, "stride": source.stride, "size in pixels": [*size]}
    key = {"encoder": _digest(flatten_dict(params, sep="/")), **settings, **clip}
    _check_key(stored.folder, key | source.fingerprint(), str(folder))
    takes = [take for take in source.takes() if not stored.path(*take[:3]).exists()]

    def encoded(some: np.ndarray) -> np.ndarray:
        padded = np.zeros(video, np.uint8)
        padded[: len(some)] = some
        return np.asarray(jitted(params, padded))[: len(some)]

    if takes:
        _compute(
            stored,
            [_in_clips(take, source.frames, source.stride) for take in takes],
            encoded,
            lambda: None,
            str(folder),
            shape=video,
            threads=threads,
            skip=False,
            unit="clip",
        )


def _in_clips(take: Take, frames: int, stride: int) -> Take:
    """Return a take whose frames are clips, one after another, that cover it all."""

    def read(numbers: Sequence[int], picture: Callable[[Any], Any]) -> list[np.ndarray]:
        steps = np.asarray(numbers)[:, None] * frames * stride + np.arange(frames) * stride
        wanted, at = np.unique(np.minimum(steps, take.frames - 1), return_inverse=True)
        return [*np.stack(take.read(wanted.tolist(), picture))[at.reshape(steps.shape)]]

    return take._replace(frames=-(-take.frames // (frames * stride)), read=read)


def _check_key(folder: Path, key: dict[str, Any], where: str) -> None:
    """Write the key of a new folder, or raise UserError where the folder has another one."""
    path = folder / KEY
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists() and any(folder.iterdir()):
            raise UserError(f"{where}: found other files and no {KEY}; wanted a new folder")
        multihost_utils.sync_global_devices("data.features")
        if not path.exists() and jax.process_index() == 0:
            write_whole(path, to_json(key, indent=1))
        multihost_utils.sync_global_devices("data.features")
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None
    wanted = json.loads(to_json(key))
    for name in {**wanted, **found}:
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{where}: its features are of another {name}: found {found.get(name)}, wanted "
                f"{wanted.get(name)}\nfor these features: another folder"
            )


def _compute(
    stored: Stored,
    takes: Sequence[Take],
    encode: Callable[[np.ndarray], np.ndarray],
    begin: Callable[[], None],
    where: str,
    *,
    shape: tuple[int, ...],
    threads: int,
    skip: bool,
    unit: str = "frame",
) -> None:
    """Encode the frames of takes and store the features; each process has its share of the takes.

    encode: at most `shape[0]` pictures, or clips, of `shape[1:]`; all processes call it equally
    often. where: begins errors. unit: what the pictures are.
    """
    frames = sum(take.frames for take in takes)
    size = frames * math.prod(stored.shape) * stored.dtype.itemsize
    free = shutil.disk_usage(stored.folder).free
    if free < _SPARE * size:
        raise UserError(
            f"{where}: {frames:,} {unit}s need {size / 1e9:.2f} GB, "
            f"the disk has {free / 1e9:.2f} GB"
        )
    say(f"computing features of {frames:,} {unit}s: {size / 1e9:.2f} GB in {stored.folder}")
    share = [takes[i :: jax.process_count()] for i in range(jax.process_count())]
    rounds = max(sum(-(-take.frames // shape[0]) for take in part) for part in share)
    done: list[np.ndarray] = []
    unread: set[Path] = set()  # files of takes that cannot be read
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=frames, unit=unit, disable=None) as bar,
    ):
        own = share[jax.process_index()]
        parts = _read_ahead(pool, 2 * threads, own, shape)
        for _ in range(rounds):
            begin()
            take, pictures, error = next(parts, (None, np.zeros((0, *shape[1:]), np.uint8), None))
            if error and not skip:
                raise error
            done.append(encode(pictures))
            bar.update(len(pictures))
            if take is None:
                continue
            path = stored.path(*take[:3])
            if error and path not in unread:
                unread.add(path)
                say(f"warning: left out: {error}")
            if sum(map(len, done)) == take.frames:
                if path not in unread:
                    _write(path, np.concatenate(done))
                done.clear()
    multihost_utils.sync_global_devices("data.features")


def _read_ahead(
    pool: ThreadPoolExecutor, ahead: int, takes: Sequence[Take], shape: tuple[int, ...]
) -> Iterator[Part]:
    """Return the scaled frames of takes in order, at most shape[0] at once, read by threads.

    Where they cannot be read: black ones, and the error.
    """
    most, *_, height, width, _ = shape

    def read(take: Take, numbers: range) -> Part:
        scale = Scaler(lambda h, w: centre_box(h, w, width / height), height, width)
        try:
            return take, np.stack(take.read(numbers, scale)), None
        except ClipError as error:
            return take, np.zeros((len(numbers), *shape[1:]), np.uint8), error

    jobs = (
        (take, range(first, min(first + most, take.frames)))
        for take in takes
        for first in range(0, take.frames, most)
    )
    return in_order(pool, lambda job: read(*job), jobs, ahead)


def _local_rows(array: jax.Array) -> np.ndarray:
    """Return the rows of an array, sharded along its first axis, that this process holds."""
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def _write(path: Path, features: np.ndarray) -> None:
    with placed(path) as part, part.open("wb") as file:
        np.save(file, features)


def _digest(params: Params) -> str:
    """Return a hash of arrays by name, the same however they are sharded."""

    def mixed(x: jax.Array, seed: int) -> jax.Array:
        """Add up hashes (MurmurHash3's finaliser) of each number with its index, modulo 2^32."""
        bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32).reshape(-1), jnp.uint32)
        h = bits ^ ((jnp.arange(bits.size, dtype=jnp.uint32) + seed) * jnp.uint32(0x9E3779B1))
        for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
            h = (h ^ (h >> shift)) * jnp.uint32(factor)
        return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)

    hashes = jax.jit(lambda tree: jax.tree.map(lambda x: (mixed(x, 0), mixed(x, 1)), tree))(params)
    text = {name: [x.shape, *map(int, hashes[name])] for name, x in params.items()}
    return hashlib.sha256(to_json(text, sort_keys=True).encode()).hexdigest()[:16]
