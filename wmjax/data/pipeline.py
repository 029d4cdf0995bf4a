"""The path of a batch: window -> decoded frames -> crop and scale -> masks -> batch -> devices.

A Grain graph, read top to bottom in `Pipeline`. All randomness is keyed by (seed, purpose,
position in the endless stream), so epochs differ, resumes do not, and no two processes draw the
same crop. jax is loaded only where batches are placed.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import grain
import numpy as np

from wmjax.data.transforms import centre_box, crop_and_scale, frame_size, random_box
from wmjax.masking import Masks

_CROP, _MASK, _DRAW = 0, 1, 2  # purposes that a random stream is keyed by


class Source(Protocol):
    """Clips of one recording, generated or read.

    A sample is a dict: frames_VT (views x frames, each an av.VideoFrame or HWC uint8 array; no
    frames where the view is missing), state_TS, action_TPA, episode, start, and where not
    everything was recorded state_mask_TS and action_mask_TPA.

    A source may also say how many clips one pass over it draws and which: `draws`, and
    `draw(number, rng) -> index`; without these a pass takes every clip once. And `statistics()`,
    with name, state and action of each dataset in it.
    """

    def describe(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class Pipeline:
    """An endless iterator of WorldModelInput batches whose position is one number.

    position counts the clips of the global stream that were handed out: it does not depend on the
    number of processes, so a run goes on elsewhere exactly where it was.
    """

    def __init__(
        self,
        source: Source,
        masks: Masks,
        *,
        height: int,
        width: int,
        batch_size: int,
        seed: int,
        sharding: Any,
        crop_scale: tuple[float, float] | None = None,
        crop_aspect: tuple[float, float] = (1.0, 1.0),
        threads: int = 2,
        prefetch: int = 0,
        position: int = 0,
    ) -> None:
        """Build the graph and start reading at `position`.

        batch_size: clips in the global batch; sharding: of its first axis over the mesh.
        crop_scale: area of the random crop as a share of the frame; None: the largest centred one.
        prefetch: clips decoded ahead, at least one a thread; 0: two batches.
        """
        import jax

        process, processes = jax.process_index(), jax.process_count()
        local = batch_size // processes

        def load(position: int, number: int) -> dict[str, Any]:
            index = number
            if hasattr(source, "draw"):
                index = source.draw(number, np.random.default_rng((seed, _DRAW, position)))
            sample = source[index]
            size = next(frame_size(frames[0]) for frames in sample["frames_VT"] if frames)
            out_aspect = width / height
            if crop_scale is None:
                box = centre_box(*size, out_aspect)
            else:
                crop_rng = np.random.default_rng((seed, _CROP, position))
                box = random_box(crop_rng, *size, crop_scale, crop_aspect, out_aspect)
            context, target = masks.draw(np.random.default_rng((seed, _MASK, position)))
            state_TS, action_TPA = sample["state_TS"], sample["action_TPA"]
            missing_THWC = np.zeros((len(state_TS), height, width, 3), np.uint8)
            views = [
                crop_and_scale(frames, box, height, width) if frames else missing_THWC
                for frames in sample["frames_VT"]
            ]
            return {
                "video": np.stack(views),
                "view_mask": np.array([bool(frames) for frames in sample["frames_VT"]]),
                "state": state_TS,
                "state_mask": sample.get("state_mask_TS", np.ones_like(state_TS, bool)),
                "action": action_TPA,
                "action_mask": sample.get("action_mask_TPA", np.ones_like(action_TPA, bool)),
                "context": context,
                "target": target,
                "sample_id": np.int32(index),
            }

        def place(batch: dict[str, Any]) -> Any:
            from wmjax.types import VideoObservation, VideoTarget, WorldModelInput

            arrays = WorldModelInput(
                VideoObservation(
                    batch["video"], batch["view_mask"], batch["state"], batch["state_mask"]
                ),
                VideoTarget(batch["context"], batch["target"]),
                batch["action"],
                batch["action_mask"],
                batch["sample_id"],
            )
            return jax.tree.map(
                lambda x: jax.make_array_from_process_local_data(sharding, x), arrays
            )

        draws = getattr(source, "draws", len(source))
        stream = grain.MapDataset.source(range(draws)).seed(seed).shuffle().repeat()
        stream = stream.map_with_index(load).slice(slice(process, None, processes))
        ahead = max(prefetch or 2 * local, threads)
        reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        batches = stream.to_iter_dataset(reading).batch(local, drop_remainder=True).map(place)
        batches = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2)
        self._batch_size = batch_size
        self._iterator = iter(batches)
        if position:
            self._iterator.set_state({"next_index": position // processes})
        self._processes = processes

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._iterator)

    @property
    def position(self) -> int:
        """Clips of the global stream handed out so far."""
        return self._iterator.get_state()["next_index"] * self._processes

    def close(self) -> None:
        """Stop the reading threads."""
        self._iterator.close()
