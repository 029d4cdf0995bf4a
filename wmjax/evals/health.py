"""Has it collapsed? Figures of target and prediction that fall when features say less and less.

V-JEPA 2 normalises each target token over its width, so every token has variance 1 by itself;
what is measured here is how tokens differ from one another.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from wmjax.types import Array, WorldModelInput, WorldModelOutput

Features = Sequence[Array]  # (rows, M, D) of every mask; a row is a view of an instant


def in_training(output: WorldModelOutput, batch: WorldModelInput) -> dict[str, jax.Array]:
    """Return what costs a pass over the features: `health/...` float32 scalars."""
    rows_there_R = _rows_there(batch)
    figures = {}
    for name, features in _sides(output):
        figures[f"health/{name}_std"] = std(features, rows_there_R)
        figures[f"health/{name}_cosine"] = cosine(features, rows_there_R)
    return figures


def in_validation(
    output: WorldModelOutput, batch: WorldModelInput, tokens: int
) -> dict[str, jax.Array]:
    """Return all figures. tokens: of a whole clip."""
    rows_there_R = _rows_there(batch)
    figures = in_training(output, batch)
    for name, features in _sides(output):
        figures[f"health/{name}_rank"] = effective_rank(covariance(features, rows_there_R))
        figures[f"health/{name}_clip_share"] = clip_share(features, batch, tokens)
    return figures


def std(features: Features, rows_there_R: jax.Array) -> jax.Array:
    """Deviation of tokens from the mean token, root of the mean over the width.

    Targets: 1 when tokens share nothing, 0 when all are one.
    """
    mean_D, count = _mean(features, rows_there_R)
    squares = sum(
        jnp.einsum("rmd,r->", jnp.square(f - mean_D[None, None]), rows_there_R) for f in features
    )
    return jnp.sqrt(squares / (count * mean_D.size))


def cosine(features: Features, rows_there_R: jax.Array) -> jax.Array:
    """Mean cosine of the angle between two different tokens of the batch."""
    units = [f / jnp.maximum(jnp.linalg.norm(f, axis=-1, keepdims=True), 1e-12) for f in features]
    mean_D, count = _mean(units, rows_there_R)
    # Of the pairs in |sum|^2, each token's with itself gives 1.
    return (count * jnp.sum(jnp.square(mean_D)) - 1.0) / jnp.maximum(count - 1.0, 1.0)


def covariance(features: Features, rows_there_R: jax.Array) -> jax.Array:
    """Covariance of the tokens of a batch, (D, D)."""
    mean_D, count = _mean(features, rows_there_R)
    centred = [f - mean_D[None, None] for f in features]
    products = (jnp.einsum("rmd,rme,r->de", f, f, rows_there_R) for f in centred)
    return sum(products) / count


def effective_rank(covariance_DD: jax.Array) -> jax.Array:
    """exp of the entropy of the singular values' shares: 1 for a line, D for a ball.

    Roy and Vetterli, The effective rank, 2007, and RankMe (Garrido et al., 2023), there of the
    features themselves, here of centred ones: a mean that all tokens share would count as a
    direction.
    """
    eigenvalues_D = jnp.linalg.eigvalsh(covariance_DD)
    # Below this they are rounding, of which the roots would add up.
    noise = jnp.finfo(jnp.float32).eps * len(covariance_DD) * eigenvalues_D[-1]
    singular_D = jnp.sqrt(jnp.where(eigenvalues_D <= noise, 0.0, eigenvalues_D))  # keeps NaN
    share_D = singular_D / jnp.maximum(jnp.sum(singular_D), 1e-30)
    return jnp.exp(jnp.sum(jax.scipy.special.entr(share_D)))


def clip_share(features: Features, batch: WorldModelInput, tokens: int) -> jax.Array:
    """Share of the variance that is between clips, at one position of one camera.

    0 when features know where they are and nothing of what is there. Positions that fewer than
    two clips of the batch have count for nothing; 1 where there are no others, as in a microbatch
    of one clip.
    """
    rows_there_R = _rows_there(batch)
    views = batch.observation.view_mask_BV.shape[1]
    view_R = jnp.arange(rows_there_R.size) % views
    places, count_P = [], jnp.zeros(views * tokens)
    total_PD = jnp.zeros((views * tokens, features[0].shape[-1]))
    for f, ids_BM in zip(features, batch.target.target_ids_BM, strict=True):
        place_RM = jnp.repeat(ids_BM, views, axis=0) + tokens * view_R[:, None]
        weight_RM = jnp.broadcast_to(rows_there_R[:, None], place_RM.shape)
        count_P = count_P.at[place_RM].add(weight_RM)
        total_PD = total_PD.at[place_RM].add(f * weight_RM[:, :, None])
        places.append((f, place_RM, weight_RM))
    mean_PD = total_PD / jnp.maximum(count_P, 1.0)[:, None]
    several_P = (count_P > 1.5).astype(jnp.float32)
    # Each mean is fitted to count_P tokens, which takes one of them from the degrees of freedom.
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


# Of the targets only: the predictions of a healthy model stay near their mean for its first
# hundreds of steps. A model 48 wide had over 2,000 steps on generated shapes a cosine of at most
# 0.66, rank 12 and more, clip share 0.84 and more; on PushT, nine tenths of whose picture never
# change, 0.991, 24 and 0.49. Collapsed on purpose it passed a cosine of 0.998 by step 125.
MAX_COSINE = 0.998
MIN_RANK = 2.0
MIN_CLIP_SHARE = 0.01


def alarms(row: Mapping[str, float]) -> list[str]:
    """Say in words which figures of a report, of training or validation, mean collapse.

    Where some are not finite, that in place of it: they say nothing of the features.
    """
    if bad := [name for name, value in row.items() if not math.isfinite(value)]:
        first = min(bad, key=lambda name: ("loss" not in name, name))
        return [
            f"the model has diverged: {first} is {row[first]}; {len(bad)} of {len(row)} figures "
            "are not finite"
        ]

    def figure(name: str) -> float | None:
        return row.get(f"health/target_{name}", row.get(f"validation/health/target_{name}"))

    said = []
    if (value := figure("cosine")) is not None and value > MAX_COSINE:
        said.append(f"targets have collapsed to one token: mean cosine {value:.3f} between any two")
    if (value := figure("rank")) is not None and value < MIN_RANK:
        said.append(f"targets have collapsed to a line: effective rank {value:.1f}")
    if (value := figure("clip_share")) is not None and value < MIN_CLIP_SHARE:
        said.append(
            f"targets say where they are and not what is there: {value:.1%} of their variance is "
            "between clips"
        )
    return said


def _sides(output: WorldModelOutput) -> tuple[tuple[str, Features], ...]:
    return ("target", output.target_BVMD), ("prediction", output.prediction_BVMD)


def _rows_there(batch: WorldModelInput) -> jax.Array:
    return jnp.asarray(batch.observation.view_mask_BV).reshape(-1).astype(jnp.float32)


def _mean(features: Features, rows_there_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the mean token (D,) and how many tokens it is of; never a copy of all masks'."""
    total_D = sum(jnp.einsum("rmd,r->d", f, rows_there_R) for f in features)
    count = jnp.maximum(jnp.sum(rows_there_R), 1.0) * sum(f.shape[1] for f in features)
    return total_D / count, count
