"""The policy server: openpi's messages, bad messages survived, several clients."""

import contextlib
import os
import subprocess
import sys
import threading
import urllib.request

import msgpack
import numpy as np
import pytest
from websockets.sync.client import connect

from wmjax.envs import server
from wmjax.errors import UserError


def send(value):
    """What openpi's client sends for an array or a number."""
    if isinstance(value, np.ndarray):
        contents = value.tobytes()
        about = {b"dtype": value.dtype.str, b"shape": value.shape}
        return {b"__ndarray__": True, b"data": contents, **about}
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}


def receive(value):
    if b"__ndarray__" in value:
        return np.ndarray(
            buffer=value[b"data"], dtype=np.dtype(value[b"dtype"]), shape=value[b"shape"]
        )
    return value


def array(dtype, shape, data=b""):
    """A message with one array, which may be wrong."""
    about = {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}
    return msgpack.packb({"top": about})


class Client:
    def __init__(self, port, stack):
        address = f"ws://localhost:{port}"
        self.connection = stack.enter_context(connect(address, compression=None, max_size=None))
        self.metadata = msgpack.unpackb(self.connection.recv(), object_hook=receive)

    def ask(self, message):
        raw = isinstance(message, (bytes, str))
        self.connection.send(message if raw else msgpack.packb(message, default=send))
        reply = self.connection.recv()
        return reply if isinstance(reply, str) else msgpack.unpackb(reply, object_hook=receive)


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def serving():
    seen = []

    def answer(shown, goal, where):
        seen.append((shown, goal, where))
        if "boom" in shown:
            raise RuntimeError("a fault of the model")
        if "top" not in shown:
            raise UserError("observation: has no 'top'")
        return {"actions": np.arange(6, dtype=np.float32).reshape(3, 2), "cost": 0.5}

    with server.Server(answer, {"fps": 10.0, "block": 3}, "localhost", 0) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running.port, seen
    thread.join(5)


def test_an_observation_is_answered_with_actions(serving, stack):
    port, seen = serving
    client = Client(port, stack)
    assert client.metadata == {"fps": 10.0, "block": 3}
    picture = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    nested = {
        "observation": {"images": {"top": picture}},
        "observation/state": np.zeros(2),
        "top": 1,
    }
    reply = client.ask(nested | {"goal": picture})
    np.testing.assert_array_equal(reply["actions"], [[0, 1], [2, 3], [4, 5]])
    assert reply["cost"] == 0.5
    assert reply["server_timing"]["infer_ms"] > 0
    shown, goal, where = seen[0]
    assert set(shown) == {"observation.images.top", "observation.state", "top"}
    np.testing.assert_array_equal(shown["observation.images.top"], picture)
    np.testing.assert_array_equal(goal, picture)
    assert where == (0, 0)


@pytest.mark.parametrize(
    "bad",
    [
        b"\xc1",
        b"",
        "text",
        msgpack.packb([1]),
        msgpack.packb({"top": {b"__ndarray__": True, b"data": b"", b"dtype": "|O", b"shape": [1]}}),
        msgpack.packb(
            {"top": {b"__ndarray__": True, b"data": b"12", b"dtype": "<f8", b"shape": [9]}}
        ),
        msgpack.packb(
            {"top": {b"__ndarray__": True, b"data": b"", b"dtype": "<f8", b"shape": [-1]}}
        ),
        msgpack.packb({"top": {b"__ndarray__": True}}),
        msgpack.packb({"state": 1}),
        msgpack.packb({"boom": 1}),
    ],
)
def test_a_bad_message_is_answered_and_survived(serving, stack, bad):
    port, _ = serving
    client, other = Client(port, stack), Client(port, stack)
    reply = client.ask(bad)
    assert isinstance(reply, str)
    assert "\n" not in reply
    for each in (client, other):
        assert each.ask({"top": np.float32(1)})["cost"] == 0.5


def test_clients_are_told_apart(serving, stack):
    port, seen = serving
    clients = [Client(port, stack), Client(port, stack)]
    for client in (*clients, clients[0]):
        client.ask({"top": 1})
    assert [where for _, _, where in seen] == [(0, 0), (1, 0), (0, 1)]


def test_its_health_can_be_asked(serving):
    with urllib.request.urlopen(f"http://localhost:{serving[0]}/healthz") as reply:
        assert reply.status == 200


def test_a_port_in_use_is_one_line(serving):
    with pytest.raises(UserError, match=f"--port={serving[0]}"):
        server.Server(lambda *_: {}, {}, "localhost", serving[0])


@pytest.mark.campaign
def test_openpis_client_talks_to_it(serving, tmp_path):
    """The client of PyPI in a venv of its own: it pins numpy < 2."""
    port, _ = serving
    python = tmp_path / "venv/bin/python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    needs = ["openpi-client==0.1.2", "typing_extensions"]  # which it does not name itself
    subprocess.run([python, "-m", "pip", "install", "-q", *needs], check=True)
    code = (
        "import numpy as np\n"
        "from openpi_client.websocket_client_policy import WebsocketClientPolicy\n"
        f"client = WebsocketClientPolicy('localhost', {port})\n"
        "reply = client.infer({'top': np.zeros((4, 4, 3), np.uint8)})\n"
        "print(client.get_server_metadata()['block'], reply['actions'].sum())\n"
        "try:\n"
        "    client.infer({'side': 1})\n"
        "except RuntimeError as error:\n"
        "    print('refused', 'top' in str(error))\n"
        "print(client.infer({'top': 1})['cost'])\n"
    )
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, env=clean)
    assert found.stdout.split("\n")[:3] == ["3 15.0", "refused True", "0.5"], found.stderr
