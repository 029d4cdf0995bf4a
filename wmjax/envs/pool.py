"""Many simulators of one name, which act together; their steps are shared among processes.

A process is a fresh interpreter without jax. It holds some of the simulators, gets a method and its
rows over a pipe, and exits when the pipe closes.
"""

import contextlib
import itertools
import multiprocessing
import signal
import time
import traceback
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import numpy as np

from wmjax.envs.base import make
from wmjax.errors import SIGNALS, UserError


class Simulators:
    """`count` simulators with pictures of `size` pixels a side.

    processes: that hold them; 0: this one. Results do not depend on it. key: begins errors.
    Arrays have a row for each simulator, in order.
    """

    def __init__(self, name: str, key: str, *, size: int, count: int, processes: int) -> None:
        self._what = f"{key}={name!r}"
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._own = None if processes else _Part(name, key, size, count)
        if self._own:
            return
        context = multiprocessing.get_context("spawn")
        edges = np.linspace(0, count, min(processes, count) + 1).astype(int).tolist()
        self._parts = [slice(*pair) for pair in itertools.pairwise(edges)]
        for part in self._parts:
            own, other = context.Pipe()
            arguments = other, name, key, size, part.stop - part.start
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            other.close()
            self._pipes.append(own)
            self._processes.append(process)

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()

    def put(self, state_NS: np.ndarray, goal_NS: np.ndarray) -> None:
        """Set the states and the goals."""
        self._all("put", state_NS, goal_NS)

    def step(self, action_NA: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Apply an action each; return who is at its goal, by the usual and the stricter rule."""
        found_N2 = self._all("step", action_NA)
        return found_N2[:, 0], found_N2[:, 1]

    def pictures(self, wanted_N: np.ndarray) -> np.ndarray:
        """Return what the cameras of those that are wanted see, uint8 BHWC."""
        return self._all("pictures", wanted_N)

    def still(self) -> np.ndarray:
        """Return the actions that stay in place, NA."""
        return self._all("still")

    def states(self) -> np.ndarray:
        """Return the states, NS."""
        return self._all("states")

    def _all(self, method: str, *rows: np.ndarray) -> np.ndarray:
        if self._own:
            return np.asarray(getattr(self._own, method)(*rows))
        try:
            for pipe, part in zip(self._pipes, self._parts, strict=True):
                pipe.send((method, [row[part] for row in rows]))
            answers = [pipe.recv() for pipe in self._pipes]
        except (EOFError, ConnectionError):
            raise self._lost() from None
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return np.concatenate(answers)

    def _lost(self) -> UserError:
        time.sleep(0.2)  # a pipe closes before its process has ended
        codes = [process.exitcode for process in self._processes]
        end = f"ended with the codes {codes} (None: it runs); see their output above"
        if -signal.SIGKILL in codes:
            end = "were killed; out of memory? wanted a lower data.workers"
        return UserError(f"{self._what}: of {len(codes)} processes that play it, some {end}")


class _Part:
    """The simulators of one process."""

    def __init__(self, name: str, key: str, size: int, count: int) -> None:
        self._envs = [make(name, key, size=size) for _ in range(count)]
        self._size = size

    def put(self, state_NS: np.ndarray, goal_NS: np.ndarray) -> list:
        for env, state, goal in zip(self._envs, state_NS, goal_NS, strict=True):
            env.set_goal(goal)
            env.set_state(state)
        return []

    def step(self, action_NA: np.ndarray) -> list:
        for env, action in zip(self._envs, action_NA, strict=True):
            env.step(action)
        return [(env.reached(), env.reached_strictly()) for env in self._envs]

    def pictures(self, wanted_N: np.ndarray) -> np.ndarray:
        chosen = (env for env, wanted in zip(self._envs, wanted_N, strict=True) if wanted)
        nothing = np.zeros((0, self._size, self._size, 3), np.uint8)
        return np.concatenate([nothing, *(env.picture()[None] for env in chosen)])

    def still(self) -> list:
        return [env.still() for env in self._envs]

    def states(self) -> list:
        return [env.state for env in self._envs]


def _serve(pipe: Connection, name: str, key: str, size: int, count: int) -> None:
    """Answer what comes over the pipe; the main function of a process."""
    for number in SIGNALS:  # the parent handles them
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(EOFError, ConnectionError):
        try:
            part = _Part(name, key, size, count)
            while True:
                method, rows = pipe.recv()
                pipe.send(getattr(part, method)(*rows))
        except (EOFError, ConnectionError):
            return
        except UserError as error:
            pipe.send(UserError(str(error)))
        except Exception:
            pipe.send(RuntimeError(f"in a process of {key}={name!r}:\n{traceback.format_exc()}"))
