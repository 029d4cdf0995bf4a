"""Prediction error: by loss term, by time, and relative to predicting the mean token."""

import jax
import jax.numpy as jnp

from wmjax.types import Row, Term, TokenGrid, WorldModelOutput


def in_training(output: WorldModelOutput) -> dict[str, jax.Array]:
    """Return the loss of every term as loss/NAME, and the model's own scalars."""
    losses = {f"loss/{name}": jnp.asarray(term.loss) for name, term in output.terms.items()}
    return losses | {name: jnp.asarray(value) for name, value in output.scalars.items()}


def predicted(output: WorldModelOutput) -> list[Term]:
    """Return the terms with predictions and targets whose width equals that of the first one."""
    terms = output.terms.values()
    found = [t for t in terms if t.prediction_RMD is not None and t.target_RMD is not None]
    return [t for t in found if t.target_RMD.shape[-1] == found[0].target_RMD.shape[-1]]  # type: ignore[union-attr]


def valid_rows(term: Term) -> jax.Array:
    """Return 1 for each valid row of a term and 0 for the others, float32."""
    if term.valid_R is None:
        assert term.target_RMD is not None
        return jnp.ones(len(term.target_RMD))
    return jnp.asarray(term.valid_R).astype(jnp.float32)


def in_validation(output: WorldModelOutput, grid: TokenGrid) -> dict[str, jax.Array]:
    """Return L1 errors in a form that can be averaged over batches; `finish` turns them to figures.

    l1: of the prediction. l1_mean_token: of a constant prediction, the term's mean target token in
    this batch. error_at/T: part of l1 in tubelet T. share_at/T: share of the tokens in tubelet T.
    The last two count terms with token ids only. {} for a model without predicted features.
    """
    times, cells = grid[0], grid[1] * grid[2]
    terms = predicted(output)
    l1 = mean_token = jnp.zeros(())
    error_T = share_T = jnp.zeros(times)
    for term in terms:
        z_RMD, h_RMD = jnp.asarray(term.prediction_RMD), jnp.asarray(term.target_RMD)
        valid_R = valid_rows(term)
        rows = jnp.maximum(jnp.sum(valid_R), 1.0)
        # Weight of a token. Terms weigh the same, like the masks in V-JEPA's loss.
        weight = 1.0 / (rows * h_RMD.shape[1] * len(terms))
        mean_D = jnp.einsum("rmd,r->d", h_RMD, valid_R) / (rows * h_RMD.shape[1])
        error_RM = jnp.mean(jnp.abs(z_RMD - h_RMD), axis=-1) * valid_R[:, None] * weight
        constant_RM = jnp.mean(jnp.abs(mean_D[None, None] - h_RMD), axis=-1) * valid_R[:, None]
        l1 += jnp.sum(error_RM)
        mean_token += jnp.sum(constant_RM) * weight
        if term.ids_RM is not None:
            time_RM = jnp.asarray(term.ids_RM) // cells
            error_T = error_T.at[time_RM].add(error_RM)
            share_T = share_T.at[time_RM].add(
                jnp.broadcast_to(valid_R[:, None], time_RM.shape) * weight
            )
    if not terms:
        return {}
    figures = {"l1": l1, "l1_mean_token": mean_token}
    for t in range(times):
        figures |= {f"error_at/{t}": error_T[t], f"share_at/{t}": share_T[t]}
    return figures


def finish(row: Row) -> Row:
    """Turn averaged sums into readable figures: by_time/T and relative.

    by_time/T: mean L1 in tubelet T; absent for a tubelet without targets. relative: L1 of the
    prediction divided by that of the mean token; 1 means that the model has learned nothing; absent
    if all targets are equal.
    """
    sums = {k: v for k, v in row.items() if k.startswith(("error_at/", "share_at/"))}
    kept = {k: v for k, v in row.items() if k not in sums}
    for name, share in sums.items():
        kind, time = name.split("/")
        if kind == "share_at" and share > 0:
            kept[f"by_time/{time}"] = sums[f"error_at/{time}"] / share
    if row.get("l1_mean_token"):
        kept["relative"] = row["l1"] / row["l1_mean_token"]
    return kept
