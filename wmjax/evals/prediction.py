"""How well hidden features are predicted: by mask, by time, and against the mean token."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from wmjax.types import WorldModelInput, WorldModelOutput

Row = dict[str, float]


def in_training(output: WorldModelOutput, names: Sequence[str]) -> dict[str, jax.Array]:
    """Return the loss of every mask under its name."""
    losses = map(jnp.asarray, output.losses)
    return {f"loss/{name}": loss for name, loss in zip(names, losses, strict=True)}


def in_validation(
    output: WorldModelOutput, batch: WorldModelInput, grid: tuple[int, int, int]
) -> dict[str, jax.Array]:
    """Return L1 errors as shares of the mean, so that batches may be averaged; see `finish`.

    l1: of the prediction; l1_mean_token: of the mean of the mask's target tokens in this batch as
    the prediction of each of them. error_at/T, share_at/T: the part of l1 and the share of the
    tokens in tubelet T.
    """
    times, cells = grid[0], grid[1] * grid[2]
    views = batch.observation.view_mask_BV.shape[1]
    there_R = jnp.asarray(batch.observation.view_mask_BV).reshape(-1).astype(jnp.float32)
    rows = jnp.maximum(jnp.sum(there_R), 1.0)
    masks = len(output.losses)
    l1 = mean_token = jnp.zeros(())
    error_T = share_T = jnp.zeros(times)
    for z_RMD, h_RMD, ids_BM in zip(
        output.prediction_BVMD, output.target_BVMD, batch.target.target_ids_BM, strict=True
    ):
        # What a token of this mask counts for; masks count alike, as in the loss.
        weight = 1.0 / (rows * ids_BM.shape[1] * masks)
        mean_D = jnp.einsum("rmd,r->d", h_RMD, there_R) / (rows * ids_BM.shape[1])
        error_RM = jnp.mean(jnp.abs(z_RMD - h_RMD), axis=-1) * there_R[:, None] * weight
        constant_RM = jnp.mean(jnp.abs(mean_D[None, None] - h_RMD), axis=-1) * there_R[:, None]
        time_RM = jnp.repeat(ids_BM // cells, views, axis=0)
        l1 += jnp.sum(error_RM)
        mean_token += jnp.sum(constant_RM) * weight
        error_T = error_T.at[time_RM].add(error_RM)
        share_T = share_T.at[time_RM].add(
            jnp.broadcast_to(there_R[:, None], time_RM.shape) * weight
        )
    figures = {"l1": l1, "l1_mean_token": mean_token}
    for t in range(times):
        figures |= {f"error_at/{t}": error_T[t], f"share_at/{t}": share_T[t]}
    return figures


def finish(row: Row) -> Row:
    """Turn averaged sums into what is read: by_time/T (mean L1 there), relative.

    relative: L1 of the prediction over that of the mean token; 1 is a model that has learned
    nothing; none where all targets are one. A tubelet that no target lies in has no by_time.
    """
    sums = {k: v for k, v in row.items() if k.startswith(("error_at/", "share_at/"))}
    kept = {k: v for k, v in row.items() if k not in sums}
    for name, share in sums.items():
        kind, time = name.split("/")
        if kind == "share_at" and share > 0:
            kept[f"by_time/{time}"] = sums[f"error_at/{time}"] / share
    if row["l1_mean_token"] != 0:
        kept["relative"] = row["l1"] / row["l1_mean_token"]
    return kept
