"""The spread over prompts: a mean and its bootstrap interval."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import Float

from .arrays import as_array, integer, listing
from .pytrees import pytree

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@pytree
class Interval:
    """A mean over prompts and its confidence interval, each `[…]`.

    Examples:
        >>> spread = bootstrap([1.0, 2.0, 4.0])
        >>> [float(end) for end in (spread.low, spread.high)]
        [1.0, 4.0]
    """

    mean: Float[Array, "..."]
    low: Float[Array, "..."]
    high: Float[Array, "..."]

    def __repr__(self) -> str:
        ends = (self.mean, self.low, self.high)
        if any(x is None or isinstance(x, Tracer) or np.ndim(x) for x in ends):
            return f"Interval(mean, low and high {listing(np.shape(self.mean))})"
        return "{:.4g} ({:.4g} to {:.4g})".format(*map(float, ends))


def bootstrap(values: ArrayLike, confidence: float = 0.95, n_resamples: int = 2000, seed: int = 0) -> Interval:
    """The mean over prompts, with its percentile bootstrap interval (Efron 1979, doi:10.1214/aos/1176344552).

    B prompts are drawn from the B with replacement, `n_resamples` times, the same ones for all entries of the trailing
    axes; the interval spans the middle `confidence` of the means of these. It is made of these B values alone: of fewer than
    ten prompts it is narrower than it should be, and of two its ends are just the two.

    Args:
        values: `[B, …]`, numbers, one row for each of at least two prompts.
        confidence: between 0 and 1.
        n_resamples: how often; static.
        seed: an integer, 0 to 2³² − 1.

    Returns:
        An `Interval` of float32 `[…]`; where a prompt's value is not finite, its ends are NaN.

    Raises:
        ValueError, TypeError: too few prompts, or a number that cannot be.

    Examples:
        >>> bootstrap([1.0, 2.0, 4.0])
        2.333 (1 to 4)
    """
    array = as_array(values)
    if not jnp.issubdtype(array.dtype, jnp.number) or jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"values has dtype {array.dtype}, and real numbers are needed.")
    if array.ndim == 0 or array.shape[0] < 2:
        raise ValueError(f"values has shape {listing(array.shape)}, and [B, …] with at least two prompts is needed.")
    if isinstance(confidence, bool) or not isinstance(confidence, float | np.floating) or not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence!r}, and must be between 0 and 1, such as 0.95.")
    n_resamples, seed = integer(n_resamples, "n_resamples", 1), integer(seed, "seed", 0, 2**32 - 1)
    return _bootstrap(jnp.asarray(array, jnp.float32), np.float32(confidence), np.uint32(seed), n_resamples)


@partial(jax.jit, static_argnums=(3,), inline=True)
def _bootstrap(values: Float[Array, "B ..."], confidence: Array, seed: Array, n_resamples: int) -> Interval:
    n, trailing = values.shape[0], values.shape[1:]
    drawn = jax.random.randint(jax.random.key(seed), (n_resamples, n), 0, n)
    counts = jnp.zeros((n_resamples, n)).at[jnp.arange(n_resamples)[:, None], drawn].add(1.0)
    tails = jnp.stack([(1.0 - confidence) / 2, (1.0 + confidence) / 2])

    def column(x: Float[Array, "B"]) -> Float[Array, "3"]:
        mean = jnp.mean(x)
        above = jnp.matmul(counts, x - mean, precision=jax.lax.Precision.HIGHEST) / n
        return jnp.concatenate([mean[None], mean + jnp.quantile(above, tails)])

    columns = jnp.moveaxis(values.reshape(n, math.prod(trailing)), 0, 1)
    # In blocks, so that memory stays that of n_resamples × 4096 numbers whatever the trailing axes.
    found = jax.lax.map(column, columns, batch_size=min(4096, max(1, math.prod(trailing))))
    return Interval(*(found[:, i].reshape(trailing) for i in range(3)))
