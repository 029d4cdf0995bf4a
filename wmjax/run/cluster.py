"""Start of a run of several processes: JAX detects the cluster, or three flags describe it."""

import argparse
import contextlib
import importlib.util
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from wmjax.errors import ExitCode, UserError
from wmjax.run import private

PATIENCE_S = 20  # wait for the coordinator: its program may still be starting
IMAGES_S = 300  # the same in containers, which first pull images; also process 0 for the others
_joined: list[Any] = []  # run.peers, once this process has joined others; it imports jax


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several processes",
        "Not needed on TPU pods, Slurm, Kubernetes and Open MPI: JAX detects these.",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    group.add_argument(
        "--processes", metavar="N", type=int, help="how many; 1: run alone, also inside a cluster"
    )
    group.add_argument("--process", metavar="I", type=int, help="index of this process, from 0")


def start(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Join the other processes of the run, if there are any; call it before any use of a device.

    Without flags it joins the cluster that JAX detects. Raises UserError when process 0 cannot be
    reached. That is checked first because jax would end the process with a fatal log instead.
    """
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # run.signals handles signals
    if coordinator is None and process is None and processes in (None, 1):
        if processes is None:
            _join_detected_cluster()
        return
    if coordinator is None or processes is None or process is None:
        raise UserError(
            f"--coordinator={coordinator} --processes={processes} --process={process}: "
            "wanted all three, or none where JAX detects the cluster"
        )
    if not 0 <= process < processes:
        raise UserError(f"--process={process}: wanted 0 to {processes - 1}, as --processes says")
    _, colon, port = coordinator.rpartition(":")
    if not (colon and port.isdigit() and 0 < int(port) < 2**16):
        raise UserError(f"--coordinator={coordinator}: wanted HOST:PORT")
    patience = IMAGES_S if "KUBERNETES_SERVICE_HOST" in os.environ else PATIENCE_S
    with _notice_of_a_long_wait(f"--coordinator={coordinator}", patience):
        _find_coordinator("--coordinator=", coordinator, processes, process, patience)
    _initialize(
        coordinator,
        coordinator_address=coordinator,
        num_processes=processes,
        process_id=process,
        cluster_detection_method="deactivate",
    )


def looks_alone(coordinator: str | None) -> bool:
    """Return, without jax, whether nothing hints at other processes: a flag, a cluster or a TPU."""
    hints = ("SLURM_", "OMPI_", "KUBERNETES_", "JAX_COORDINATOR", "TPU_", "MEGASCALE_")
    hinted = any(name.startswith(hints) for name in os.environ)
    return coordinator is None and not hinted and importlib.util.find_spec("libtpu") is None


def ending_together(run: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Return `run` such that an error in one process ends all processes of the run."""

    def run_together(arguments: list[str]) -> int:
        try:
            code = run(arguments)
        except BaseException as error:
            if _joined:
                _joined[0].fail(error)
            raise
        if _joined:
            _joined[0].leave()
        return code

    return run_together


def speaks() -> bool:
    """Return whether this process prints; does not start the devices of a single process."""
    import jax

    return not jax.distributed.is_initialized() or jax.process_index() == 0


def _join_detected_cluster() -> None:
    try:
        found = private.detected_cluster()
        address = os.environ.get("JAX_COORDINATOR_ADDRESS")
        if found is None and address:
            raise UserError(f"JAX_COORDINATOR_ADDRESS={address}, but JAX detects no cluster here")
        if found is None:
            return
        patience = PATIENCE_S if found.name in ("slurm", "ompi") else IMAGES_S
        with _notice_of_a_long_wait(found.name, patience):
            coordinator = address or found.get_coordinator_address(
                timeout_secs=patience,
                override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT"),
            )
            processes, process = found.get_process_count(), found.get_process_id()
            _find_coordinator(
                f"{found.name}, process 0 at ", coordinator, processes, process, patience
            )
    except Exception as error:  # the kinds depend on the cluster
        raise UserError(f"{error}\nto run this process alone: --processes=1") from error
    _initialize(coordinator)


def _initialize(coordinator: str, **flags: Any) -> None:
    """Join jax's coordination service, then connect to process 0, which ends all together."""
    import jax

    from wmjax.run import peers
    from wmjax.run.exits import exit_now

    # jax waits in C++. Python would handle Ctrl-C only after all processes have arrived.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    text = f"error: not all processes of the run have come to {coordinator} within {IMAGES_S} s"
    late = threading.Timer(IMAGES_S, exit_now, [ExitCode.PEER_DIED, text])
    late.daemon = True
    late.start()
    try:
        # Later than `late`: jax would abort the process.
        jax.distributed.initialize(initialization_timeout=IMAGES_S + 60, **flags)
    finally:
        late.cancel()
        signal.signal(signal.SIGINT, handler)
    peers.join(coordinator.rpartition(":")[0].strip("[]"))
    _joined.append(peers)


@contextlib.contextmanager
def _notice_of_a_long_wait(name: str, patience: int) -> Iterator[None]:
    """Print a line once PATIENCE_S have passed, where the wait may last longer."""
    text = f"{name}: no answer from process 0 within {PATIENCE_S} s; waiting for up to {patience} s"
    late = threading.Timer(PATIENCE_S, print, [text], {"file": sys.stderr, "flush": True})
    if patience > PATIENCE_S:
        late.start()
    try:
        yield
    finally:
        late.cancel()


def _find_coordinator(
    origin: str, coordinator: str, processes: int, process: int, patience: int
) -> None:
    """Wait until process 0 can be reached; in process 0, check that its port is free."""
    host, _, port = coordinator.rpartition(":")
    if process:
        _wait_for(origin, host.strip("[]"), int(port), patience)
        return
    try:
        socket.create_server(("", int(port))).close()
    except OSError as error:
        raise UserError(
            f"{origin}{coordinator}: cannot listen on port {port}: {error.strerror}"
        ) from error
    if processes > 1:
        print(
            f"process 0 of {processes}: waiting up to {IMAGES_S} s at {coordinator} for the others",
            flush=True,
        )


def _wait_for(origin: str, host: str, port: int, patience: int) -> None:
    """Wait until something listens on this port."""
    deadline = time.monotonic() + patience
    while True:
        try:
            left = max(0.5, deadline - time.monotonic())
            socket.create_connection((host, port), timeout=min(5, left)).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{origin}{host}:{port}: no answer within {patience} s "
                    f"({error.strerror or error}); wanted process 0 of the run there"
                ) from error
        time.sleep(0.5)
