"""Worker processes that read clips (data.workers), for where the GIL would limit threads.

A worker is a fresh interpreter that loads neither jax nor grain. It gets the number of a clip over
a pipe, writes the clip to shared memory, and exits when the pipe closes. Pipe and memory have no
name, so nothing is left behind, however the run ends.
"""

import collections
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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar

import numpy as np

import wmjax
from wmjax.data.reader import Clip
from wmjax.errors import SIGNALS, ClipError, UserError

_T = TypeVar("_T")
_R = TypeVar("_R")

_SLOTS = 2  # clips in flight per process: it reads one while the parent copies the other
_ALIGN = 64  # bytes, of arrays in shared memory


def in_order(
    pool: ThreadPoolExecutor, read: Callable[[_T], _R], items: Iterable[_T], ahead: int
) -> Iterator[_R]:
    """Yield read(item) of each item in order; the pool is at most `ahead` items in front."""
    waiting: collections.deque[Future[_R]] = collections.deque()
    for item in items:
        waiting.append(pool.submit(read, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class Reads(Protocol):
    """What workers do: data.reader.Reader, say."""

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, position: Any, number: Any) -> tuple[Clip, list[ClipError]]: ...


class _Slot(NamedTuple):
    """A clip in flight: the process that reads it, its pipe, and its arrays in shared memory."""

    process: subprocess.Popen
    pipe: Connection
    arrays: dict[str, np.ndarray]


class Workers:
    """Processes that read clips as `reader` does; `calls` threads that read keep all busy."""

    def __init__(self, reader: Reads, count: int) -> None:
        """Start the processes; they need some tenths of a second to be ready."""
        self.calls = _SLOTS * count
        self._processes: list[subprocess.Popen] = []
        self._free: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        with _memory() as image:
            parts = _dump(reader, image)
            slots = [self._start(reader.dtype, image, parts) for _ in range(count)]
        for each in zip(*slots, strict=True):  # the first slot of every process, then the second
            for slot in each:
                self._free.put(slot)

    def _start(self, dtype: np.dtype, image: BinaryIO, parts: list[tuple[int, int]]) -> list[_Slot]:
        own, worker = zip(*(Pipe() for _ in range(_SLOTS)), strict=True)  # ends of the pipes
        with _memory() as memory:
            memory.truncate(_SLOTS * dtype.itemsize)
            clips = _map_clips(memory.fileno(), dtype)
            files = [str(file.fileno()) for file in (image, memory, *worker)]
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-c", _program(), *files],
                    pass_fds=[int(file) for file in files],
                    stdin=subprocess.DEVNULL,
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for pipe in worker:
            pipe.close()
        self._processes.append(process)
        own[0].send(parts)
        return [_Slot(process, *slot) for slot in zip(own, clips, strict=True)]

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def read(self, position: Any, number: Any) -> tuple[Clip, list[ClipError]]:
        """Do what Reader.read does, in one of the processes; raise the same errors."""
        slot = self._free.get()
        try:
            slot.pipe.send((position, number))
            answer = slot.pipe.recv()
            if isinstance(answer, Exception):
                raise answer
            return {name: array[0].copy() for name, array in slot.arrays.items()}, answer
        except (EOFError, ConnectionError):
            raise self._lost(slot.process) from None
        finally:
            self._free.put(slot)

    def _lost(self, process: subprocess.Popen) -> UserError:
        code = process.wait()
        if code < 0:
            end = f"was killed by {signal.Signals(-code).name}: out of memory? Fewer need less"
        else:
            end = f"exited with code {code}; see its output above"
        return UserError(f"data.workers={len(self._processes)}: a worker process {end}")

    def close(self) -> None:
        """Kill the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()


def _program() -> str:
    """Return the program of a worker: this wmjax, and modules from where this process finds them.

    The current folder comes last, and nothing is imported from it before that is set: it may be a
    dataset's.
    """
    path = [folder for folder in sys.path if folder]
    path += [os.getcwd()] if "" in sys.path else []
    return (
        "import sys\n"
        f"sys.path[:] = {path!r}\n"
        "from importlib import util\n"
        f"spec = util.spec_from_file_location('wmjax', {wmjax.__file__!r})\n"
        "sys.modules['wmjax'] = package = util.module_from_spec(spec)\n"
        "spec.loader.exec_module(package)\n"
        f"import {__name__} as this\n"
        "this.serve()"
    )


def serve() -> None:
    """Read clips until the pipes close; the main function of a worker process."""
    image, memory, *files = map(int, sys.argv[1:])
    pipes = [Connection(file) for file in files]
    with contextlib.suppress(EOFError, ConnectionError):
        reader = _load(image, pipes[0].recv())
        clips = dict(zip(pipes, _map_clips(memory, reader.dtype), strict=True))
        while True:
            for pipe in wait(pipes):
                assert isinstance(pipe, Connection)
                pipe.send(_read(reader, pipe.recv(), clips[pipe]))


def _read(
    reader: Reads, draw: tuple[Any, Any], arrays: dict[str, np.ndarray]
) -> list[ClipError] | Exception:
    """Read a clip into `arrays`; return the errors of skipped clips, or what Reader.read raises."""
    try:
        clip, errors = reader.read(*draw)
        for name, value in clip.items():
            arrays[name][0] = value
        return errors
    except ClipError as error:
        return error
    except UserError as error:
        return UserError(str(error))  # not every subclass can be pickled
    except Exception:
        return RuntimeError(f"in a worker process of data.workers:\n{traceback.format_exc()}")


def _memory() -> BinaryIO:
    """Open anonymous memory; another process can map it by its descriptor."""
    if hasattr(os, "memfd_create"):  # not limited by /dev/shm, which is small in containers
        return open(os.memfd_create("wmjax"), "r+b")
    return tempfile.TemporaryFile()


def _map_clips(memory: int, dtype: np.dtype) -> list[dict[str, np.ndarray]]:
    """Map the arrays of all clips in the memory, by clip and name; each has a first axis of 1."""
    clips = np.frombuffer(mmap.mmap(memory, 0), dtype)
    names = dtype.names or ()
    return [{name: clips[name][i : i + 1] for name in names} for i in range(len(clips))]


def _dump(reader: Reads, image: BinaryIO) -> list[tuple[int, int]]:
    """Pickle a reader to `image`, large arrays out of band; return (start, end) of each part."""
    buffers: list[pickle.PickleBuffer] = []
    text = pickle.dumps(reader, protocol=5, buffer_callback=buffers.append)
    bounds = []
    for part in (memoryview(text), *(buffer.raw() for buffer in buffers)):
        start = image.seek(-(-image.tell() // _ALIGN) * _ALIGN)
        image.write(part)
        bounds.append((start, image.tell()))
    image.flush()
    return bounds


def _load(image: int, parts: list[tuple[int, int]]) -> Reads:
    """Unpickle a reader; its large arrays are views of `image`, one copy for all processes."""
    view = memoryview(mmap.mmap(image, 0, access=mmap.ACCESS_READ))
    text, *buffers = (view[start:end] for start, end in parts)
    return pickle.loads(text, buffers=buffers)
