"""Runs of several processes on this machine: N processes of D fake CPU devices, over gloo."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import micro

FAST = {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"}
# The first process compiles for all of them; see member.py.
SHARED = {
    "JAX_SHARE_BINARY_BETWEEN_HOSTS": "true",
    "JAX_SHARE_BINARY_BETWEEN_HOSTS_TIMEOUT_MS": "240000",
}
# What Gloo prints in every process, by its pieces: two threads of one process mix their lines.
GLOO = re.compile(
    r"Expected number of connected peer ranks is :|\[Gloo\] Rank|is connected to|peer ranks\.|\d|\s"
)


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def group(commands, environments, folder):
    """Start processes, each the leader of a group of its own; all are killed at the end.

    Yields the Popen objects. What process I prints is in folder/I.out and folder/I.err: files,
    for a pipe that nobody reads fills up.
    """
    processes = []
    try:
        for index, (command, environment) in enumerate(zip(commands, environments, strict=True)):
            with (
                (folder / f"{index}.out").open("w") as out,
                (folder / f"{index}.err").open("w") as err,
            ):
                processes.append(
                    subprocess.Popen(
                        command,
                        env=environment,
                        cwd=micro.ROOT,
                        stdout=out,
                        stderr=err,
                        start_new_session=True,
                    )
                )
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait(processes, timeout):
    """Wait for all of them and return their exit codes; the first failure ends the wait."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if None not in codes:
            return codes
        if any(codes):  # jax tells the others; one that hangs is killed by `group`
            deadline = min(deadline, time.monotonic() + 20)
        time.sleep(0.1)
    return [process.poll() for process in processes]


def run(workdir, *overrides, processes, devices, folder, timeout=280):
    """Run micro to its end on `processes` processes of `devices` devices each.

    Returns what each process printed, as (standard output, error). The ids of the clips that
    process I was handed, a list for each step, are in folder/I.ids; see `clips`.
    """
    folder.mkdir(exist_ok=True)
    flags = micro.command(workdir, *overrides)[3:]
    commands = [
        [
            *(sys.executable, micro.ROOT / "tests" / "member.py", folder / f"{i}.ids", *flags),
            *(f"--coordinator=localhost:{port}", f"--processes={processes}", f"--process={i}"),
        ]
        for port in [free_port()]
        for i in range(processes)
    ]
    environment = micro.environment(devices) | FAST | SHARED
    with group(commands, [environment] * processes, folder) as members:
        codes = wait(members, timeout)
    printed = [
        tuple((folder / f"{i}.{kind}").read_text() for kind in ("out", "err"))
        for i in range(processes)
    ]
    assert codes == [0] * processes, (codes, printed)
    return printed


def clips(folder):
    """Return, for each process of a run, the ids of the clips that it was handed at each step."""
    files = sorted(folder.glob("*.ids"))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
