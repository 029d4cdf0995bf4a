"""Measures collapse: how much the tokens of targets and predictions differ.

V-JEPA 2 normalises each target token over its width, so every single token has variance 1. The
variance within a token therefore shows nothing, and these figures compare tokens with each other.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from wmjax.evals.prediction import predicted, valid_rows
from wmjax.types import Term, WorldModelInput, WorldModelOutput


class Side(NamedTuple):
    """The targets, or the predictions, of all terms.

    features: RMD, one array a term. ids: token ids, RM; None for a term without ids. valid_R: 1 for
    each valid row, 0 for the others.
    """

    features: list[jax.Array]
    ids: list[jax.Array | None]
    valid_R: jax.Array


def in_training(output: WorldModelOutput) -> dict[str, jax.Array]:
    """Return the cheap figures, std and cosine, as float32 scalars named health/..."""
    figures = {}
    for name, side in _sides(output).items():
        figures[f"health/{name}_std"] = std(side)
        figures[f"health/{name}_cosine"] = cosine(side)
    return figures


def in_validation(
    output: WorldModelOutput, batch: WorldModelInput, tokens: int
) -> dict[str, jax.Array]:
    """Return all figures as float32 scalars named health/...; tokens: of a whole clip."""
    figures = in_training(output)
    instants = len(batch.observation.view_mask_BV)
    for name, side in _sides(output).items():
        figures[f"health/{name}_rank"] = effective_rank(covariance(side))
        if all(ids is not None for ids in side.ids):
            figures[f"health/{name}_clip_share"] = clip_share(side, instants, tokens)
    return figures


def std(side: Side) -> jax.Array:
    """Return the standard deviation of the tokens around the mean token, over all dimensions.

    For normalised targets: 1 if tokens have nothing in common, 0 if all are equal.
    """
    mean_D, count = _mean(side.features, side.valid_R)
    squares = sum(
        jnp.einsum("rmd,r->", jnp.square(f - mean_D[None, None]), side.valid_R)
        for f in side.features
    )
    return jnp.sqrt(squares / (count * mean_D.size))


def cosine(side: Side) -> jax.Array:
    """Return the mean cosine between two different tokens of the batch."""
    units = [
        f / jnp.maximum(jnp.linalg.norm(f, axis=-1, keepdims=True), 1e-12) for f in side.features
    ]
    mean_D, count = _mean(units, side.valid_R)
    # |sum|^2 also contains the product of each token with itself, which is 1.
    return (count * jnp.sum(jnp.square(mean_D)) - 1.0) / jnp.maximum(count - 1.0, 1.0)


def covariance(side: Side) -> jax.Array:
    """Return the covariance of the tokens of a batch, (D, D)."""
    mean_D, count = _mean(side.features, side.valid_R)
    centred = [f - mean_D[None, None] for f in side.features]
    products = (jnp.einsum("rmd,rme,r->de", f, f, side.valid_R) for f in centred)
    return sum(products) / count


def effective_rank(covariance_DD: jax.Array) -> jax.Array:
    """Return exp(entropy) of the normalised singular values: 1 for a line, D for a ball.

    Source: Roy and Vetterli, The effective rank, 2007; RankMe (Garrido et al., 2023). RankMe uses
    uncentred features. Here they are centred, because the common mean would count as a direction.
    """
    eigenvalues_D = jnp.linalg.eigvalsh(covariance_DD)
    # Eigenvalues below this are rounding noise; their square roots would add up.
    noise = jnp.finfo(jnp.float32).eps * len(covariance_DD) * eigenvalues_D[-1]
    singular_D = jnp.sqrt(jnp.where(eigenvalues_D <= noise, 0.0, eigenvalues_D))  # keeps NaN
    share_D = singular_D / jnp.maximum(jnp.sum(singular_D), 1e-30)
    return jnp.exp(jnp.sum(jax.scipy.special.entr(share_D)))


def clip_share(side: Side, instants: int, tokens: int) -> jax.Array:
    """Return the share of the variance that lies between clips, at one position of one camera.

    0 means that features depend on the position but not on the content. Positions that fewer than
    two clips of the batch have do not count; if there are no others, as in a microbatch of one
    clip, the result is 1. instants: B of the batch; a side has a row for each instant, or for each
    view of an instant. tokens: of a whole clip.
    """
    views = len(side.features[0]) // instants
    places, count_P = [], jnp.zeros(views * tokens)
    total_PD = jnp.zeros((views * tokens, side.features[0].shape[-1]))
    for f, ids_RM in zip(side.features, side.ids, strict=True):
        assert ids_RM is not None
        place_RM = ids_RM + tokens * (jnp.arange(len(f)) % views)[:, None]
        weight_RM = jnp.broadcast_to(side.valid_R[:, None], place_RM.shape)
        count_P = count_P.at[place_RM].add(weight_RM)
        total_PD = total_PD.at[place_RM].add(f * weight_RM[:, :, None])
        places.append((f, place_RM, weight_RM))
    mean_PD = total_PD / jnp.maximum(count_P, 1.0)[:, None]
    several_P = (count_P > 1.5).astype(jnp.float32)
    # Each mean is fitted to count_P tokens, which costs one degree of freedom.
    unbiased_P = several_P * count_P / jnp.maximum(count_P - 1.0, 1.0)
    mean_D = jnp.sum(total_PD * several_P[:, None], axis=0) / jnp.maximum(
        jnp.sum(count_P * several_P), 1.0
    )
    within = total = jnp.zeros(())
    for f, place_RM, weight_RM in places:
        apart_RM = jnp.sum(jnp.square(f - mean_PD[place_RM]), axis=-1)
        within += jnp.sum(apart_RM * weight_RM * unbiased_P[place_RM])
        from_all_RM = jnp.sum(jnp.square(f - mean_D[None, None]), axis=-1)
        total += jnp.sum(from_all_RM * weight_RM * several_P[place_RM])
    return jnp.where(total == 0, 1.0, jnp.minimum(within / jnp.maximum(total, 1e-30), 1.0))


def _sides(output: WorldModelOutput) -> dict[str, Side]:
    """Return targets and predictions of the terms that have both; {} if none has.

    Terms with another number of rows than the first one are left out. The valid mask of the first
    term is used for all.
    """
    terms = predicted(output)
    terms = [term for term in terms if len(_target(term)) == len(_target(terms[0]))]
    if not terms:
        return {}
    ids = [None if term.ids_RM is None else jnp.asarray(term.ids_RM) for term in terms]
    valid_R = valid_rows(terms[0])
    return {
        "target": Side([_target(term) for term in terms], ids, valid_R),
        "prediction": Side([jnp.asarray(term.prediction_RMD) for term in terms], ids, valid_R),
    }


def _target(term: Term) -> jax.Array:
    return jnp.asarray(term.target_RMD)


def _mean(features: list[jax.Array], valid_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the mean token (D,) and the number of valid tokens, without copying the features."""
    total_D = jnp.asarray(sum(jnp.einsum("rmd,r->d", f, valid_R) for f in features))
    count = jnp.maximum(jnp.sum(valid_R), 1.0) * sum(f.shape[1] for f in features)
    return total_D / count, count
