"""What analyses share: which tokens are real, averages over them, and roots whose gradient at zero is zero.

Analyses may be called outside `jit`; then each of these is one program, where its operations would be a dozen.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from ..arrays import integer

if TYPE_CHECKING:
    from ..adapter.structures import AnyCapture


def real_tokens(capture: AnyCapture, ignore_first: int = 0) -> Bool[Array, "T"]:
    """Which tokens of a prompt an average runs over: the real ones, less the first `ignore_first` of them."""
    n_tokens = capture.tokens.shape[0]
    ignore_first = integer(ignore_first, "ignore_first", 0, n_tokens - 1, note=f": the prompt has {n_tokens} tokens")
    real = jnp.ones(n_tokens, bool) if capture.mask is None else jnp.asarray(capture.mask, bool)
    return _beyond(real, ignore_first)


@partial(jax.jit, inline=True)
def _beyond(real: Bool[Array, "T"], n: int) -> Bool[Array, "T"]:
    return real & (jnp.cumsum(real) > n)


@partial(jax.jit, inline=True)
def centred(
    values: Float[Array, "... T"], real: Bool[Array, "... T"]
) -> tuple[Float[Array, "..."], Float[Array, "... T"]]:
    """The mean over real tokens (NaN where there is none), and what each is above it (0 on the others).

    Deviations of equal values are exactly 0, which a mean's rounding would otherwise hide.
    """
    real = jnp.broadcast_to(real, values.shape)
    low = jax.lax.stop_gradient(jnp.min(jnp.where(real, values, jnp.inf), axis=-1, keepdims=True))
    above = jnp.where(real, values - low, 0.0)
    mean = jnp.sum(above, axis=-1, keepdims=True) / count(real)[..., None]
    return (mean + low)[..., 0], jnp.where(real, above - mean, 0.0)


def count(real: Bool[Array, "... T"]) -> Float[Array, "..."]:
    """How many tokens are real, as float32."""
    return jnp.sum(real, axis=-1).astype(jnp.float32)


@partial(jax.jit, inline=True)
def root(x: Array) -> Array:
    """√x whose gradient at 0 is 0."""
    zero = x == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, x)))


@partial(jax.jit, inline=True)
def norm(x: Float[Array, "... D"]) -> Float[Array, "..."]:
    """Length of the last axis."""
    return root(jnp.sum(x * x, axis=-1))
