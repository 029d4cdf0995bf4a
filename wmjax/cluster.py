"""The start of a run that is several processes: found by JAX itself, or told by three flags."""

import argparse
import socket
import time

from wmjax.errors import UserError

PATIENCE_S = 25  # for a coordinator that does not answer; a program may still be starting there


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

    jax.config.update("jax_enable_preemption_service", False)  # wmjax.stop is told the signals
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
    host, colon, port = coordinator.rpartition(":")
    if not (colon and port.isdigit() and 0 < int(port) < 2**16):
        raise UserError(f"--coordinator={coordinator}: wanted HOST:PORT")
    if process == 0:
        _check_free(int(port))
        print(f"process 0 of {processes}: waiting at {coordinator} for the others", flush=True)
    else:
        _wait_for(host.strip("[]"), int(port))
    jax.distributed.initialize(
        coordinator, processes, process, cluster_detection_method="deactivate"
    )


def speaks() -> bool:
    """Say whether this process is the one that prints; starts no device where it is alone."""
    import jax

    return not jax.distributed.is_initialized() or jax.process_index() == 0


def _join_what_is_found() -> None:
    import jax

    try:
        jax.distributed.initialize()
    except ValueError as error:
        if "coordinator_address" not in str(error):  # which is unknown where there is no cluster
            raise
    except RuntimeError as error:
        raise UserError(f"{error}\nto run by itself: --processes=1") from error


def _check_free(port: int) -> None:
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise UserError(f"--coordinator: cannot listen on port {port}: {error.strerror}") from error


def _wait_for(host: str, port: int) -> None:
    """Return once something listens there."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"--coordinator={host}:{port}: no answer within {PATIENCE_S} s "
                    f"({error.strerror or error}); wanted process 0 of the run there"
                ) from error
        time.sleep(0.5)
