"""The path of a batch: shuffled draws -> clips, read ahead -> batch -> devices.

`Pipeline` builds it as a Grain graph. Every random draw is keyed by (seed, purpose, position in the
endless stream). So each epoch has new crops and masks, a resumed run repeats the same ones, and no
two processes draw the same. jax is imported in `Pipeline` only.
"""

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from wmjax.data.cached import Cached
from wmjax.data.reader import BatchReader, Clip, Reader
from wmjax.data.skips import Skips
from wmjax.data.source import Source
from wmjax.data.workers import Reads, Workers
from wmjax.masking import Masks

_MIX = 64  # a mixture is shuffled within windows of this many clips


class Pipeline:
    """An endless iterator of WorldModelInput batches on the devices.

    position: number of clips delivered from the global stream. It does not depend on the number of
    processes, so a run resumes with the same clips on another number of hosts.
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
        workers: int = 0,
        prefetch: int = 0,
        on_error: str = "raise",
        max_skip_share: float = 0.0,
        position: int = 0,
        batches: int = 0,
    ) -> None:
        """Build the graph and start reading at `position`.

        batch_size: clips of the global batch. sharding: of a batch over the mesh. crop_scale,
        crop_aspect: as in Reader. threads: reader threads of this process. workers: reader
        processes, in place of the threads; 0: none. prefetch: clips read ahead, at least one for
        each thread or worker; 0: two batches. on_error: 'raise'; 'skip' replaces clips that cannot
        be read (see Reader). max_skip_share: largest share of replaced clips (see Skips). batches:
        how many are read; 0: endless.
        """
        import jax

        process, processes = jax.process_index(), jax.process_count()
        local = batch_size // processes
        reader: Reads = Reader(
            source,
            masks,
            height=height,
            width=width,
            seed=seed,
            crop_scale=crop_scale,
            crop_aspect=crop_aspect,
            skip=on_error == "skip",
        )
        whole = isinstance(source.stored, Cached)  # such clips are so small that one is no job
        if isinstance(reader, Reader) and whole:
            reader = BatchReader(reader, local)
        skips = Skips(max_skip_share)
        self._workers = Workers(reader, workers) if workers else None
        read, calls = reader.read, threads
        if self._workers:
            read, calls = self._workers.read, self._workers.calls

        def load(draws: tuple[Any, Any]) -> Clip:
            clip, errors = read(*draws)
            skips.note(errors)
            return clip

        def place(batch: dict[str, Any]) -> tuple[Any, np.ndarray, int]:
            from wmjax.types import WorldModelInput

            arrays = WorldModelInput.of(batch, list(masks.sizes))
            placed = jax.tree.map(
                lambda x: jax.make_array_from_process_local_data(sharding, x), arrays
            )
            drawn = np.bincount(batch["dataset_id"], minlength=len(source.datasets))
            return placed, drawn, int(batch["skipped"].sum())

        stream = _order(source, seed).map_with_index(lambda *draw: draw)
        end = position + batches * batch_size if batches else None
        stream = stream.slice(slice(position + process, end, processes))
        if whole:
            stream = stream.batch(local, batch_fn=lambda draws: tuple(zip(*draws, strict=True)))
        ahead = max((prefetch or 2 * local) // (local if whole else 1), calls)
        reading = grain.ReadOptions(num_threads=calls, prefetch_buffer_size=ahead)
        clips = stream.map(load).to_iter_dataset(reading)
        grouped = (clips if whole else clips.batch(local, drop_remainder=True)).map(place)
        ahead_of_use = grain.experimental.ThreadPrefetchIterDataset(grouped, prefetch_buffer_size=2)
        self._batch_size = batch_size
        self._iterator = iter(ahead_of_use)
        self._start, self._unit = position, batch_size if whole else processes
        self._names = [dataset.name for dataset in source.datasets]
        self._drawn, self._skipped = np.zeros(len(self._names), int), 0
        self._skips, self._reports_skips = skips, on_error == "skip"

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._skips.check()  # before the position advances
        batch, drawn, skipped = next(self._iterator)
        self._skips.count(int(drawn.sum()), skipped)
        self._drawn += drawn
        self._skipped += skipped
        return batch

    def report(self) -> dict[str, float]:
        """Return figures of the clips since the last report, counted in this process.

        mixture/NAME: share of the clips from a dataset of a mixture. data_skipped: clips replaced,
        with on_error='skip'.
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
        """Clips of the global stream delivered so far."""
        return self._start + self._iterator.get_state()["next_index"] * self._unit

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers; empty where threads read."""
        return self._workers.pids if self._workers else []

    def close(self) -> None:
        """Stop the reading threads and processes."""
        if self._workers:  # first, because threads wait for replies of the workers
            self._workers.close()
        self._iterator.close()


class Beside:
    """Batches of one stream, each with a batch of another stream beside it, under `name`.

    Both give one batch a step, so the position of the first says where the second is.
    """

    def __init__(self, stream: Pipeline, name: str, other: Pipeline) -> None:
        self._stream, self._name, self._other = stream, name, other

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        other = next(self._other)  # first: where it fails, the position has not advanced
        return next(self._stream).replace(beside={self._name: other})

    def report(self) -> dict[str, float]:
        """Return the figures of both; those of the second as NAME/FIGURE."""
        other = {f"{self._name}/{key}": value for key, value in self._other.report().items()}
        return self._stream.report() | other

    @property
    def position(self) -> int:
        """Clips of the first stream delivered so far."""
        return self._stream.position

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers of both."""
        return self._stream.worker_pids + self._other.worker_pids

    def close(self) -> None:
        """Stop the reading threads and processes of both."""
        self._other.close()
        self._stream.close()


def _order(source: Source, seed: int) -> grain.MapDataset:
    """Return an endless stream of draws: each dataset shuffled anew in every pass, then mixed."""
    streams = [
        grain.MapDataset.source(dataset.draws).seed(seed + i).shuffle().repeat()
        for i, dataset in enumerate(source.datasets)
    ]
    if len(streams) == 1:
        return streams[0]
    # Grain rounds weights to hundredths of the smallest: 0.7 and 0.3 become 233 and 100.
    mixed = grain.MapDataset.mix(streams, [dataset.weight for dataset in source.datasets])
    # Grain mixes by a fixed pattern, and process i of n takes every n-th clip. Without this shuffle
    # a process could get clips of one dataset only.
    return grain.experimental.WindowShuffleMapDataset(mixed, window_size=_MIX, seed=seed)
