"""Normalisation of states and actions by the statistics of their dataset.

The pipeline gives numbers as recorded. The statistics are saved with a checkpoint, so a model
treats the states of a robot as it treated those of the recording.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wmjax.types import Array


class Statistic(nnx.Variable):
    """A number of the data, which is never trained."""


class Normalizer(nnx.Module):
    """(x - mean) / std with one row of mean and std for each dataset Z of a mixture, float32."""

    def __init__(self, mean_ZS: Array, std_ZS: Array):
        self.mean_ZS = Statistic(jnp.asarray(mean_ZS))
        self.std_ZS = Statistic(jnp.asarray(std_ZS))

    def __call__(self, values_BXS: Array, dataset_ids_B: Array) -> jax.Array:
        """Normalise values of any rank whose first axis is B and whose last is S (or A)."""
        mean, std = self._rows(values_BXS, dataset_ids_B)
        return (jnp.asarray(values_BXS) - mean) / std

    def undo(self, values_BXS: Array, dataset_ids_B: Array) -> jax.Array:
        """Return normalised values in the units of the recording."""
        mean, std = self._rows(values_BXS, dataset_ids_B)
        return jnp.asarray(values_BXS) * std + mean

    def _rows(self, values_BXS: Array, dataset_ids_B: Array) -> tuple[jax.Array, jax.Array]:
        """Return mean and std, BXS."""

        def spread(table_ZS: jax.Array) -> jax.Array:
            row_BS = table_ZS[dataset_ids_B]
            inner = tuple(range(1, values_BXS.ndim - 1))
            return jnp.broadcast_to(jnp.expand_dims(row_BS, inner), values_BXS.shape)

        return spread(self.mean_ZS[...]), spread(self.std_ZS[...])


def normalizer(statistics: Sequence[Mapping[str, Any]], feature: str) -> Normalizer:
    """Build the normaliser of 'state' or 'action' from the statistics that `create` gets.

    A number that varies by rounding only is shifted and not scaled, so that it does not blow up.
    The padding of the narrower datasets of a mixture stays as it is. Without statistics nothing is
    changed.
    """
    sizes = [len(dataset[feature]["mean"]) for dataset in statistics]
    shape = max(len(sizes), 1), max(sizes, default=1)
    mean_ZS, std_ZS = np.zeros(shape, np.float32), np.ones(shape, np.float32)
    for mean_S, std_S, dataset in zip(mean_ZS, std_ZS, statistics, strict=False):
        mean, std, low, high = (
            np.asarray(dataset[feature][name]) for name in ("mean", "std", "min", "max")
        )
        varies = high - low > 1e-6 * np.maximum(np.abs(low), np.abs(high))
        mean_S[: len(mean)] = mean
        std_S[: len(mean)] = np.where(varies, std, 1.0)
    return Normalizer(mean_ZS, std_ZS)
