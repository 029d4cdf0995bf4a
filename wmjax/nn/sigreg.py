"""SIGReg: pulls embeddings toward an isotropic Gaussian, so that they cannot collapse.

Source: LeJEPA (arXiv 2511.08544). Random projections of the embeddings are compared with a standard
normal by the Epps-Pulley statistic: the distance of their characteristic functions.
"""

import jax
import jax.numpy as jnp
import numpy as np

HIGHEST = (
    3.0  # of the characteristic function's argument; it is even, so half of the line is enough
)


def sigreg(
    z_BTD: jax.Array, key: jax.Array, *, projections: int = 1024, knots: int = 17
) -> jax.Array:
    """Return the statistic, a float32 scalar: the mean over projections and time.

    Each time step is a sample of B embeddings. Under jit, B is the global batch. key: of the
    projections.
    """
    direction_DQ = jax.random.normal(key, (z_BTD.shape[-1], projections), jnp.float32)
    return statistic(z_BTD, direction_DQ, knots)


def statistic(z_BTD: jax.Array, direction_DQ: jax.Array, knots: int = 17) -> jax.Array:
    """Return the statistic for given directions, of any length above 0."""
    t_K = np.linspace(0, HIGHEST, knots, dtype=np.float32)
    weight_K = np.full(knots, 2 * HIGHEST / (knots - 1), np.float32)  # trapezoids, of both halves
    weight_K[[0, -1]] /= 2
    normal_K = np.exp(-(t_K**2) / 2)
    direction_DQ = direction_DQ / jnp.linalg.norm(direction_DQ, axis=0, keepdims=True)
    x_BTQ = jnp.einsum("btd,dq->btq", z_BTD.astype(jnp.float32), direction_DQ)

    def at(t: jax.Array) -> jax.Array:
        """Return the squared distance at one knot, TQ."""
        real_TQ, imaginary_TQ = jnp.mean(jnp.cos(t * x_BTQ), 0), jnp.mean(jnp.sin(t * x_BTQ), 0)
        return jnp.square(real_TQ - jnp.exp(-t * t / 2)) + jnp.square(imaginary_TQ)

    # One knot at a time: the table of all knots would be 17 times as large as x.
    error_KTQ = jax.lax.map(at, jnp.asarray(t_K))
    weight = jnp.asarray(weight_K * normal_K)
    return jnp.mean(jnp.einsum("ktq,k->tq", error_KTQ, weight)) * z_BTD.shape[0]
