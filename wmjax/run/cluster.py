"""The start of a run that is several processes: found by JAX itself, or told by three flags."""

import argparse
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from wmjax.errors import UserError

PATIENCE_S = 20  # for a coordinator that does not answer; a program may still be starting there
IMAGES_S = 300  # for containers, which start as their images arrive; of process 0, for the others


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several processes",
        "Not needed on TPU pods and under Slurm, Kubernetes and Open MPI, where JAX finds them.",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument(
        "--processes", metavar="N", type=int, help="how many; 1: alone, whatever JAX finds"
    )
    group.add_argument("--process", metavar="I", type=int, help="which of them, from 0, this is")


def start(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Join the processes of the run; without flags, those of the cluster that JAX finds, if any.

    Must come before the first use of a device. Raises UserError where that cannot be: once the
    connection is begun, jax ends a process that does not get through with a fatal log.
    """
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # run.signals handles them
    if coordinator is None and process is None and processes in (None, 1):
        if processes is None:
            _join_what_is_found()
        return
    if coordinator is None or processes is None or process is None:
        raise UserError(
            f"--coordinator={coordinator} --processes={processes} --process={process}: "
            "wanted all three, or none where JAX finds the cluster"
        )
    if not 0 <= process < processes:
        raise UserError(f"--process={process}: wanted 0 to {processes - 1}, as --processes says")
    _, colon, port = coordinator.rpartition(":")
    if not (colon and port.isdigit() and 0 < int(port) < 2**16):
        raise UserError(f"--coordinator={coordinator}: wanted HOST:PORT")
    patience = IMAGES_S if "KUBERNETES_SERVICE_HOST" in os.environ else PATIENCE_S
    with _saying_that_it_lasts(f"--coordinator={coordinator}", patience):
        _meet("--coordinator=", coordinator, processes, process, patience)
    _initialize(
        coordinator_address=coordinator,
        num_processes=processes,
        process_id=process,
        cluster_detection_method="deactivate",
    )


def speaks() -> bool:
    """Say whether this process is the one that prints; starts no device where it is alone."""
    import jax

    return not jax.distributed.is_initialized() or jax.process_index() == 0


def _join_what_is_found() -> None:
    from jax._src.clusters import ClusterEnv  # what initialize() will find has no public name

    kinds = (kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method)
    try:
        found = next((kind for kind in kinds if kind.is_env_present()), None)
        address = os.environ.get("JAX_COORDINATOR_ADDRESS")
        if found is None and address:
            raise UserError(f"JAX_COORDINATOR_ADDRESS={address}, but JAX finds no cluster here")
        if found is None:
            return
        patience = PATIENCE_S if found.name in ("slurm", "ompi") else IMAGES_S
        with _saying_that_it_lasts(found.name, patience):
            coordinator = address or found.get_coordinator_address(
                timeout_secs=patience,
                override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT"),
            )
            processes, process = found.get_process_count(), found.get_process_id()
            _meet(f"{found.name}, process 0 at ", coordinator, processes, process, patience)
    except Exception as error:  # each kind of cluster has its own
        raise UserError(f"{error}\nto run by itself, whatever JAX finds: --processes=1") from error
    _initialize()


def _initialize(**flags: Any) -> None:
    import jax

    # jax waits outside Python, which would not hear of Ctrl-C before the others have come.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        jax.distributed.initialize(initialization_timeout=IMAGES_S, **flags)
    finally:
        signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def _saying_that_it_lasts(name: str, patience: int) -> Iterator[None]:
    text = f"{name}: no answer of process 0 within {PATIENCE_S} s; waiting for up to {patience} s"
    late = threading.Timer(PATIENCE_S, print, [text], {"file": sys.stderr, "flush": True})
    if patience > PATIENCE_S:
        late.start()
    try:
        yield
    finally:
        late.cancel()


def _meet(origin: str, coordinator: str, processes: int, process: int, patience: int) -> None:
    """Return once process 0, which this may be, can be reached."""
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
    """Return once something listens there."""
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
