"""Messages and barriers between the processes of a run, through jax's coordination service.

They use no device, so they also work from threads and while a device is busy or stuck.
"""

import contextlib
from typing import Any

import jax

from wmjax.run import private


def alone() -> bool:
    """Return whether the run is a single process."""
    return count() == 1


def index() -> int:
    """Return the index of this process, without starting the devices."""
    return private.process_of_run()[0]


def count() -> int:
    """Return the number of processes, without starting the devices."""
    return private.process_of_run()[1]


def tell(key: str, value: str) -> None:
    """Publish a value for the other processes; overwrites an earlier one."""
    _client().key_value_set(f"wmjax/{key}", value, allow_overwrite=True)


def told(key: str) -> str | None:
    """Return a published value; None where there is none or the service does not answer."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        return _client().key_value_try_get(f"wmjax/{key}")
    return None


def wait_told(key: str, seconds: float) -> str:
    """Wait for a value and return it; raise JaxRuntimeError after so many seconds."""
    return _client().blocking_key_value_get(f"wmjax/{key}", round(1e3 * seconds))


def meet(name: str, seconds: float) -> None:
    """Wait until all processes reach this barrier; raise JaxRuntimeError after so many seconds."""
    _client().wait_at_barrier(f"wmjax/{name}", round(1e3 * seconds))


def gather_values(name: str, value: str, seconds: float) -> list[str | None]:
    """Return one value of each process, in order; None for a process that does not answer."""
    tell(f"{name}/{index()}", value)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the next line finds who is missing
        meet(name, seconds)
    return [told(f"{name}/{process}") for process in range(count())]


def _client() -> Any:
    client = private.coordination_client()
    assert client is not None
    return client
