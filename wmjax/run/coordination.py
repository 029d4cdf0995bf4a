"""What the processes of a run tell each other beside arrays, by the service that jax started.

The one room that uses jax's client of that service, for which there is no public name.
"""

import contextlib

import jax
from jax._src import distributed


def alone() -> bool:
    """Say whether the run is this process only."""
    return distributed.global_state.client is None or jax.process_count() == 1


def tell(key: str, value: str) -> None:
    """Leave a value for the other processes."""
    _client().key_value_set(f"wmjax/{key}", value, allow_overwrite=True)


def told(key: str) -> str | None:
    """Return what a process left; None where it did not, or the service does not answer."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        return _client().key_value_try_get(f"wmjax/{key}")
    return None


def wait_told(key: str, seconds: float) -> str:
    """Return what a process leaves within some seconds; raise JaxRuntimeError where none does."""
    return _client().blocking_key_value_get(f"wmjax/{key}", round(1e3 * seconds))


def meet(name: str, seconds: float) -> None:
    """Wait until all processes meet; raise JaxRuntimeError where some do not within the time."""
    _client().wait_at_barrier(f"wmjax/{name}", round(1e3 * seconds))


def gather_values(name: str, value: str, seconds: float) -> list[str | None]:
    """Return the values that all processes give within some seconds, in order; None: no answer."""
    tell(f"{name}/{jax.process_index()}", value)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # some are missing: which, is asked below
        meet(name, seconds)
    return [told(f"{name}/{process}") for process in range(jax.process_count())]


def _client() -> "distributed._jax.DistributedRuntimeClient":
    client = distributed.global_state.client
    assert client is not None
    return client
