"""`soft_top_k`: a mask that keeps k, as a smooth function of scores."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from ..arrays import as_array, listing, on_device, wide

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

_HALVINGS = {np.dtype(np.float32): 26, np.dtype(np.float64): 56}  # one bit of the threshold each


def soft_top_k(scores: ArrayLike, k: ArrayLike, temperature: ArrayLike) -> Float[Array, "..."]:
    """A mask between 0 and 1 that sums to k: `m = σ((scores − τ) / temperature)`, with the threshold τ that makes it so.

    τ is found by bisection, and differentiated as what it is, the solution of an equation (the implicit function theorem): where
    the mask's gradient is g, the scores' is `(σ′ / temperature) (g − ⟨g, σ′⟩ / Σσ′)`, σ′ = m (1 − m). It has derivatives with
    respect to `k` and `temperature` too, and of any order. The mask of Matryoshka attribution (arXiv:2609.25518).

    Args:
        scores: of any shape, all of them together; of several masks, map over them.
        k: how many to keep, from 0 to the number of scores, not only whole ones; at these ends the mask is all 0, all 1.
        temperature: above 0. The smaller, the nearer to the k largest scores alone.

    Returns:
        Of the shape of the scores, float32 (float64 of such scores).

    Raises:
        ValueError: no scores, k or a temperature out of range, or an array for one of these two. TypeError: what is no number.

    Examples:
        >>> training.soft_top_k(np.array([3.0, 1.0, 2.0, 0.0]), 2, 0.05).round(3)
        Array([1., 0., 1., 0.], dtype=float32)
        >>> float(training.soft_top_k(np.array([3.0, 1.0, 2.0, 0.0]), 2.5, 0.5).sum())
        2.5
    """
    given = as_array(scores)
    if not jnp.issubdtype(given.dtype, jnp.number) or jnp.issubdtype(given.dtype, jnp.complexfloating):
        raise TypeError(f"scores is an array of {given.dtype}, and numbers are needed.")
    if given.size == 0:
        raise ValueError(f"scores has shape {listing(given.shape)}: there is nothing to keep.")
    dtype = jax.dtypes.canonicalize_dtype(wide(given.dtype))
    many = _number(k, "k", f"from 0 to {given.size}, the number of scores", lambda x: 0 <= x <= given.size)
    heat = _number(temperature, "temperature", "above 0", lambda x: 0 < x < np.inf)
    return _soft_top_k(jnp.asarray(given, dtype), jnp.asarray(many, dtype), jnp.asarray(heat, dtype))


def _number(value: object, what: str, need: str, holds: Callable[[float], bool]) -> Array | np.ndarray:
    """A scalar, checked by value where the host sees it."""
    array = as_array(value)
    if array.dtype == bool or not jnp.issubdtype(array.dtype, jnp.number):
        raise TypeError(f"{what} is {value!r}, and a number is needed.")
    if array.shape != ():
        raise ValueError(
            f"{what} has shape {listing(array.shape)}, and one number is needed: map over several with jax.vmap."
        )
    if not on_device(array) and not holds(float(array)):
        raise ValueError(f"{what} is {value!r}, and must be {need}.")
    return array


@partial(jax.jit, inline=True)
def _soft_top_k(scores: Array, k: Array, temperature: Array) -> Array:
    tau = _threshold(scores, k, temperature)
    m = jax.nn.sigmoid((scores - tau) / temperature)
    # What the rounding of τ leaves is shared out as a last step of τ would; its derivative is the step's, which is zero.
    left = jax.lax.stop_gradient(_shared(m, k - jnp.sum(m)))
    inside = jnp.clip(m + left, 0, 1)
    m = m + jax.lax.stop_gradient(inside - m)
    return jnp.where(k <= 0, jnp.zeros_like(m), jnp.where(k >= scores.size, jnp.ones_like(m), m))


def _shared(m: Array, much: Array) -> Array:
    slope = m * (1 - m)
    total = jnp.sum(slope)
    return slope * jnp.where(total > 0, much / jnp.where(total > 0, total, 1), 0)


@jax.custom_jvp
def _threshold(scores: Array, k: Array, temperature: Array) -> Array:
    """τ with Σ σ((scores − τ) / temperature) = k, of k inside its range."""
    n, end = scores.size, jnp.finfo(scores.dtype).eps
    share = jnp.clip(k / n, end, 1 - end)
    # Were all scores the smallest one, this would be τ; it can be no less. Nor more than were all the largest.
    shift = temperature * (jnp.log(share) - jnp.log1p(-share))
    low, high = jnp.min(scores) - shift, jnp.max(scores) - shift

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = low + (high - low) / 2
        more = jnp.sum(jax.nn.sigmoid((scores - middle) / temperature)) > k
        return jnp.where(more, middle, low), jnp.where(more, high, middle)

    low, high = jax.lax.fori_loop(0, _HALVINGS[np.dtype(scores.dtype)], halve, (low, high))
    return low + (high - low) / 2


@_threshold.defjvp
def _threshold_jvp(given: tuple[Array, ...], dots: tuple[Array, ...]) -> tuple[Array, Array]:
    scores, k, temperature = given
    d_scores, d_k, d_temperature = dots
    tau = _threshold(scores, k, temperature)
    x = (scores - tau) / temperature
    m = jax.nn.sigmoid(x)
    slope = m * (1 - m)
    total = jnp.sum(slope)
    there = total > 0
    up = jnp.sum(slope * (d_scores - x * d_temperature)) - temperature * d_k
    return tau, jnp.where(there, up / jnp.where(there, total, 1), 0)
