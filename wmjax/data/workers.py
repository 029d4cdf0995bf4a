"""Clips read by processes, for where threads of one would wait on each other for the interpreter.

Each is a fresh interpreter that loads neither jax nor grain. It is told what to read over a pipe,
leaves the clip in memory that both share, and ends when the pipe does: however the run ends,
nothing is left behind, for neither the memory nor the pipe has a name.
"""

import contextlib
import mmap
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import traceback
from multiprocessing.connection import Connection, Pipe, wait
from typing import BinaryIO, NamedTuple

import numpy as np

from wmjax.data.reader import Clip, Reader
from wmjax.errors import ClipError, UserError

_LANES = 2  # clips asked of a process at once: it reads one while the other is taken from it
_ALIGN = 64  # bytes, for arrays in shared memory
# What the terminal, or a scheduler, sends to the run's processes all alike: it is for the first.
_NOT_FOR_WORKERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class _Lane(NamedTuple):
    """One clip under way: the process that reads it, the pipe to it, and where its arrays lie."""

    process: subprocess.Popen
    pipe: Connection
    place: dict[str, np.ndarray]


class Workers:
    """Processes that read clips as `reader` does; `calls` threads keep all of them busy."""

    def __init__(self, reader: Reader, count: int) -> None:
        """Start the processes; they are ready some tenths of a second later."""
        self.calls = _LANES * count
        self._processes: list[subprocess.Popen] = []
        self._free: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
        with _memory() as image:
            parts = _dump(reader, image)
            lanes = [self._start(reader.dtype, image, parts) for _ in range(count)]
        for each in zip(*lanes, strict=True):  # one of every process, then the next
            for lane in each:
                self._free.put(lane)

    def _start(self, dtype: np.dtype, image: BinaryIO, parts: list[tuple[int, int]]) -> list[_Lane]:
        here, there = zip(*(Pipe() for _ in range(_LANES)), strict=True)
        with _memory() as memory:
            memory.truncate(_LANES * dtype.itemsize)
            places = _places(memory.fileno(), dtype)
            files = [str(file.fileno()) for file in (image, memory, *there)]
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_WORKERS)
            try:
                process = subprocess.Popen(
                    [sys.executable, "-c", f"import {__name__} as this; this.serve()", *files],
                    pass_fds=[int(file) for file in files],
                    stdin=subprocess.DEVNULL,
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for pipe in there:
            pipe.close()
        self._processes.append(process)
        here[0].send(parts)
        return [_Lane(process, *lane) for lane in zip(here, places, strict=True)]

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def read(self, position: int, number: int) -> tuple[Clip, list[ClipError]]:
        """Do what Reader.read does, in one of the processes; raise the same errors."""
        lane = self._free.get()
        try:
            lane.pipe.send((position, number))
            answer = lane.pipe.recv()
            if isinstance(answer, Exception):
                raise answer
            return {name: array[0].copy() for name, array in lane.place.items()}, answer
        except (EOFError, ConnectionError):
            raise self._lost(lane.process) from None
        finally:
            self._free.put(lane)

    def _lost(self, process: subprocess.Popen) -> UserError:
        code = process.wait()
        if code < 0:
            end = f"was killed by {signal.Signals(-code).name}: out of memory? fewer need less"
        else:
            end = f"ended with code {code}; it may have said why, above"
        return UserError(f"data.workers={len(self._processes)}: one of these processes {end}")

    def close(self) -> None:
        """End the processes, whatever they are at."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()


def serve() -> None:
    """Read clips until the pipes end: what a worker process runs."""
    image, memory, *files = map(int, sys.argv[1:])
    pipes = [Connection(file) for file in files]
    with contextlib.suppress(EOFError, ConnectionError):
        reader = _load(image, pipes[0].recv())
        places = dict(zip(pipes, _places(memory, reader.dtype), strict=True))
        while True:
            for pipe in wait(pipes):
                assert isinstance(pipe, Connection)
                pipe.send(_read(reader, pipe.recv(), places[pipe]))


def _read(
    reader: Reader, draw: tuple[int, int], place: dict[str, np.ndarray]
) -> list[ClipError] | Exception:
    """Read a clip into its place; return what Reader.read does besides, or raises."""
    try:
        clip, errors = reader.read(*draw)
        for name, value in clip.items():
            place[name][0] = value
        return errors
    except ClipError as error:
        return error
    except UserError as error:
        return UserError(str(error))  # whatever its kind: not all travel
    except Exception:
        return RuntimeError(f"in a process of data.workers:\n{traceback.format_exc()}")


def _memory() -> BinaryIO:
    """Open memory without a name, which a process that is given its descriptor can map as well."""
    if hasattr(os, "memfd_create"):  # not bounded by /dev/shm, which is small in containers
        return open(os.memfd_create("wmjax"), "r+b")
    return tempfile.TemporaryFile()


def _places(memory: int, dtype: np.dtype) -> list[dict[str, np.ndarray]]:
    """Map the arrays of as many clips as the memory holds, each with an axis of 1 before it."""
    clips = np.frombuffer(mmap.mmap(memory, 0), dtype)
    names = dtype.names or ()
    return [{name: clips[name][i : i + 1] for name in names} for i in range(len(clips))]


def _dump(reader: Reader, image: BinaryIO) -> list[tuple[int, int]]:
    """Write a reader for `_load`, large arrays by themselves; return where its parts lie."""
    buffers: list[pickle.PickleBuffer] = []
    text = pickle.dumps(reader, protocol=5, buffer_callback=buffers.append)
    places = []
    for part in (memoryview(text), *(buffer.raw() for buffer in buffers)):
        start = image.seek(-(-image.tell() // _ALIGN) * _ALIGN)
        image.write(part)
        places.append((start, image.tell()))
    image.flush()
    return places


def _load(image: int, parts: list[tuple[int, int]]) -> Reader:
    """Load a reader whose large arrays stay where they are: one copy of them for all processes."""
    view = memoryview(mmap.mmap(image, 0, access=mmap.ACCESS_READ))
    text, *buffers = (view[start:end] for start, end in parts)
    return pickle.loads(text, buffers=buffers)
