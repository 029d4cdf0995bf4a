"""Runs of several processes on this machine: N processes of D fake CPU devices, over gloo."""

import contextlib
import os
import signal
import socket
import subprocess
import time

import micro

# Only what process 0 compiles is kept from run to run: the others compile every time.
FAST = {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"}


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


def start(workdir, *overrides, processes, devices, folder, flags=()):
    """Start a micro run of `processes` processes with `devices` devices each; see `group`."""
    coordinator = f"localhost:{free_port()}"
    command = [*micro.command(workdir, *overrides), *flags]
    return group(
        [
            [*command, f"--coordinator={coordinator}", f"--processes={processes}", f"--process={i}"]
            for i in range(processes)
        ],
        [micro.environment(devices) | FAST] * processes,
        folder,
    )


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


def run(workdir, *overrides, processes, devices, folder, flags=(), timeout=280):
    """Run to the end and return what each process printed, as (standard output, error)."""
    folder.mkdir(exist_ok=True)
    with start(
        workdir, *overrides, processes=processes, devices=devices, folder=folder, flags=flags
    ) as group:
        codes = wait(group, timeout)
    printed = [
        tuple((folder / f"{i}.{kind}").read_text() for kind in ("out", "err"))
        for i in range(processes)
    ]
    assert codes == [0] * processes, (codes, printed)
    return printed
