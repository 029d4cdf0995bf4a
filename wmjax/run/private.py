"""The only module that uses names that a library does not publish. Each function says why.

tests/test_private_apis.py fails, and names the place to change, when a release drops one of them.
jax is imported inside the functions: --help answers without it.
"""

from typing import Any


def coordination_client() -> Any:
    """Return the client of jax's coordination service; None before jax.distributed.initialize.

    jax publishes no key-value store and no barrier with a time limit. multihost_utils has
    collectives of arrays only, which need every process and the devices.
    """
    from jax._src import distributed

    return distributed.global_state.client


def process_of_run() -> tuple[int, int]:
    """Return the index of this process and the number of processes; (0, 1) for a single process.

    jax.process_index() and jax.process_count() start the devices, which waits for the other
    processes.
    """
    from jax._src import distributed

    state = distributed.global_state
    return (0, 1) if state.client is None else (state.process_id, state.num_processes)


def detected_cluster() -> Any:
    """Return the cluster class that jax.distributed.initialize will choose; None where none fits.

    jax publishes initialize only. It ends the process with a fatal log when process 0 does not
    answer, so run.cluster looks for process 0 first and needs its address.
    """
    from jax._src.clusters import ClusterEnv

    kinds = (kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method)
    return next((kind for kind in kinds if kind.is_env_present()), None)


def run_exit_handlers() -> None:
    """Call the functions that are registered with atexit.

    Python publishes no call of them but its own end, which first joins all threads.
    """
    import atexit

    atexit._run_exitfuncs()
