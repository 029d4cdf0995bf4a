"""A policy server that speaks openpi's protocol: websocket frames of msgpack with NumPy arrays.

openpi-client (PyPI) is a client. After a client connects, the server sends its metadata. Each
message is an observation, each reply {"actions": ...}. A text frame is an error: the connection
stays open. Nothing is pickled: only arrays of plain numbers are read.
"""

import contextlib
import http
import itertools
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgpack
import numpy as np

from wmjax.errors import UserError, how_to_install, one_line, reason

MAX_BYTES = 1 << 28  # of a message
KINDS = "biuf"  # of arrays: bool, whole numbers, floats

# (observation, goal or None, (number of the client, number of its message)) -> reply
Answer = Callable[[dict[str, Any], Any, tuple[int, int]], dict[str, Any]]


def pack(value: Any) -> bytes:
    """Return a message; arrays as openpi's client writes them."""
    return msgpack.packb(value, default=_pack_array)


def _pack_array(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in KINDS:
        contents = np.ascontiguousarray(value).tobytes()
        about = {b"dtype": value.dtype.str, b"shape": value.shape}
        return {b"__ndarray__": True, b"data": contents, **about}
    if isinstance(value, np.generic) and value.dtype.kind in KINDS:
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"{type(value).__name__} cannot be sent")


def unpack(message: bytes) -> Any:
    """Read a message. Raises UserError for what is not msgpack of plain numbers and texts."""
    try:
        return msgpack.unpackb(message, object_hook=_unpack_array, strict_map_key=False)
    except UserError:
        raise
    except Exception as error:  # msgpack's own have no common class
        raise UserError(f"message: {reason(error)}: wanted msgpack") from None


def _unpack_array(value: dict[Any, Any]) -> Any:
    if b"__ndarray__" not in value and b"__npgeneric__" not in value:
        return value
    dtype = np.dtype(str(value[b"dtype"]))
    if dtype.kind not in KINDS:
        raise UserError(f"message: an array of {dtype}: wanted numbers")
    if b"__npgeneric__" in value:
        return dtype.type(value[b"data"])
    shape = tuple(int(size) for size in value[b"shape"])
    data = value[b"data"]
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if any(axis < 0 for axis in shape) or size != len(data):
        raise UserError(f"message: an array {shape} of {dtype} in {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(shape)


def flat(observation: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one, with names such as observation.images.top; / stands for a dot."""
    found: dict[str, Any] = {}
    for key, value in observation.items():
        name = f"{prefix}{key}".replace("/", ".")
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


class Server:
    """Answers clients, one message at a time; a context manager that closes the port.

    answer: gives the reply. metadata: sent to each client. host, port: where to listen; 0: any free
    port, which `port` then tells.
    """

    def __init__(self, answer: Answer, metadata: dict[str, Any], host: str, port: int):
        try:
            from websockets.sync import server
        except ModuleNotFoundError as error:
            raise UserError(f"serving needs {error.name}: {how_to_install('serve')}") from None
        self._answer, self._metadata = answer, pack(metadata)
        self._clients, self._busy = itertools.count(), threading.Lock()
        try:
            self._server = server.serve(
                self._talk,
                host,
                port,
                compression=None,
                max_size=MAX_BYTES,
                process_request=_health,
            )
        except OSError as error:
            raise UserError(f"--host={host} --port={port}: {error.strerror}") from None
        self.port = self._server.socket.getsockname()[1]

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()

    def serve_forever(self) -> None:
        self._server.serve_forever()

    def _talk(self, connection: Any) -> None:
        from websockets.exceptions import ConnectionClosed

        client = next(self._clients)
        with contextlib.suppress(ConnectionClosed):
            connection.send(self._metadata)
            for number, message in enumerate(connection):
                connection.send(self._reply(message, (client, number)))

    def _reply(self, message: Any, where: tuple[int, int]) -> bytes | str:
        """Return the reply, or one line that says what is wrong with the message."""
        begun = time.perf_counter()
        try:
            if isinstance(message, str):
                raise UserError("message: text: wanted msgpack in a binary frame")
            shown = unpack(message)
            if not isinstance(shown, dict):
                raise UserError(f"message: a {type(shown).__name__}: wanted a dict")
            goal = shown.pop("goal", None)
            with self._busy:
                reply = self._answer(flat(shown), goal, where)
            taken = 1e3 * (time.perf_counter() - begun)
            return pack(reply | {"server_timing": {"infer_ms": taken}})
        except UserError as error:
            return one_line(str(error))
        except Exception as error:  # a client's message must not end the server
            return one_line(f"{type(error).__name__}: {reason(error)}")


def _health(connection: Any, request: Any) -> Any:
    """Answer a plain GET of /healthz, as openpi's server does."""
    if request.path == "/healthz":
        return connection.respond(http.HTTPStatus.OK, "OK\n")
    return None
