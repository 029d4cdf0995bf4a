"""The path of a batch: window -> decoded frames -> crop and scale -> masks -> batch -> devices.

A Grain graph, read top to bottom in `Pipeline`. All randomness is keyed by (seed, purpose,
position in the endless stream), so epochs differ, resumes do not, and no two processes draw the
same crop. jax is loaded only where batches are placed.
"""

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from wmjax.data.reader import Reader
from wmjax.data.source import Source
from wmjax.data.transforms import centre_box, crop_and_scale, frame_size, random_box
from wmjax.masking import Masks

_CROP, _MASK = 0, 1  # purposes that a random stream is keyed by
_MIX = 64  # clips within which a mixture is shuffled, each dataset having its share of them


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
        on_error: str = "raise",
        max_skip_share: float = 0.0,
        position: int = 0,
    ) -> None:
        """Build the graph and start reading at `position`.

        batch_size: clips in the global batch; sharding: of its first axis over the mesh.
        crop_scale: area of the random crop as a share of the frame; None: the largest centred one.
        prefetch: clips decoded ahead, at least one a thread; 0: two batches.
        on_error, max_skip_share: what a clip that cannot be read comes to, as in Reader.
        """
        import jax

        process, processes = jax.process_index(), jax.process_count()
        local = batch_size // processes
        reader = Reader(source, seed=seed, on_error=on_error, max_skip_share=max_skip_share)

        def load(position: int, number: int) -> dict[str, Any]:
            index, sample, skipped = reader.read(position, number)
            part, index_in_part = source.locate(index)
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
                "dataset_id": np.int32(part),
                "sample_id": np.int32(index_in_part),
                "skipped": skipped,
            }

        def place(batch: dict[str, Any]) -> tuple[Any, np.ndarray, int]:
            from wmjax.types import VideoObservation, VideoTarget, WorldModelInput

            arrays = WorldModelInput(
                VideoObservation(
                    batch["video"], batch["view_mask"], batch["state"], batch["state_mask"]
                ),
                VideoTarget(batch["context"], batch["target"]),
                batch["action"],
                batch["action_mask"],
                batch["dataset_id"],
                batch["sample_id"],
            )
            placed = jax.tree.map(
                lambda x: jax.make_array_from_process_local_data(sharding, x), arrays
            )
            drawn = np.bincount(batch["dataset_id"], minlength=len(source.parts))
            return placed, drawn, int(batch["skipped"].sum())

        stream = _order(source, seed).map_with_index(load).slice(slice(process, None, processes))
        ahead = max(prefetch or 2 * local, threads)
        reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        batches = stream.to_iter_dataset(reading).batch(local, drop_remainder=True).map(place)
        batches = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2)
        self._batch_size = batch_size
        self._iterator = iter(batches)
        if position:
            self._iterator.set_state({"next_index": position // processes})
        self._processes = processes
        self._names = [part.name for part in source.parts]
        self._drawn, self._skipped = np.zeros(len(self._names), int), 0
        self._reader, self._reports_skips = reader, on_error == "skip"

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._reader.check()  # before the position moves on
        batch, drawn, skipped = next(self._iterator)
        self._reader.count(int(drawn.sum()), skipped)
        self._drawn += drawn
        self._skipped += skipped
        return batch

    def report(self) -> dict[str, float]:
        """Tell of the clips since the last report: shares of a mixture's datasets, clips skipped.

        Counted on the host, over the clips of this process.
        """
        drawn, self._drawn = self._drawn, np.zeros_like(self._drawn)
        skipped, self._skipped = self._skipped, 0
        row: dict[str, float] = {"data_skipped": skipped} if self._reports_skips else {}
        if len(drawn) > 1:
            shares = (drawn / max(drawn.sum(), 1)).tolist()
            row |= {f"mixture/{n}": share for n, share in zip(self._names, shares, strict=True)}
        return row

    @property
    def position(self) -> int:
        """Clips of the global stream handed out so far."""
        return self._iterator.get_state()["next_index"] * self._processes

    def close(self) -> None:
        """Stop the reading threads."""
        self._iterator.close()


def _order(source: Source, seed: int) -> grain.MapDataset:
    """Stream the numbers of the draws without end: each dataset shuffled anew every pass, mixed."""
    streams = [
        grain.MapDataset.source(part.draws).seed(seed + i).shuffle().repeat()
        for i, part in enumerate(source.parts)
    ]
    if len(streams) == 1:
        return streams[0]
    # Grain takes weights in hundredths of the least: 0.7 to 0.3 is 233 to 100.
    mixed = grain.MapDataset.mix(streams, [part.weight for part in source.parts])
    # Mixed by a fixed pattern, in which every second clip, say, may be of one dataset: processes
    # take every n-th clip, and each is to see, and decode, of all.
    return grain.experimental.WindowShuffleMapDataset(mixed, window_size=_MIX, seed=seed)
