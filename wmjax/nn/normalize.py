"""States and actions as models take them: shifted and scaled by the statistics of their dataset.

The pipeline gives numbers as recorded; the statistics come from a checkpoint's meta, so that a
model that reads states or actions treats a robot's as it did the recording's.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from wmjax.types import Array


@struct.dataclass
class Normalizer:
    """(x - mean) / std with one row of mean and std for each dataset Z of a mixture, float32."""

    mean_ZS: Array
    std_ZS: Array

    def __call__(self, values_BXS: Array, dataset_ids_B: Array) -> jax.Array:
        """Normalise values of any rank whose first axis is B and whose last is S (or A)."""
        mean, std = self._of(values_BXS, dataset_ids_B)
        return (jnp.asarray(values_BXS) - mean) / std

    def undo(self, values_BXS: Array, dataset_ids_B: Array) -> jax.Array:
        """Return normalised values in the recording's units."""
        mean, std = self._of(values_BXS, dataset_ids_B)
        return jnp.asarray(values_BXS) * std + mean

    def _of(self, values_BXS: Array, dataset_ids_B: Array) -> tuple[jax.Array, jax.Array]:
        """Return mean and std, BXS."""

        def spread(table_ZS: Array) -> jax.Array:
            row_BS = jnp.asarray(table_ZS)[dataset_ids_B]
            inner = tuple(range(1, values_BXS.ndim - 1))
            return jnp.broadcast_to(jnp.expand_dims(row_BS, inner), values_BXS.shape)

        return spread(self.mean_ZS), spread(self.std_ZS)


def normalizer(statistics: list[dict[str, Any]], feature: str) -> Normalizer:
    """Build the normaliser of 'state' or 'action' from the statistics in a checkpoint's meta.

    A number that never varied but for rounding is shifted only, so that it does not blow up; the
    padding of the narrower datasets of a mixture stays as it is.
    """
    shape = len(statistics), max(len(dataset[feature]["mean"]) for dataset in statistics)
    mean_ZS, std_ZS = np.zeros(shape, np.float32), np.ones(shape, np.float32)
    for mean_S, std_S, dataset in zip(mean_ZS, std_ZS, statistics, strict=True):
        mean, std, low, high = (
            np.asarray(dataset[feature][name]) for name in ("mean", "std", "min", "max")
        )
        varies = high - low > 1e-6 * np.maximum(np.abs(low), np.abs(high))
        mean_S[: len(mean)] = mean
        std_S[: len(mean)] = np.where(varies, std, 1.0)
    return Normalizer(mean_ZS, std_ZS)
