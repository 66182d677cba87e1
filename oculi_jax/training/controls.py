"""What a learnt thing is judged beside: a model that was never trained, and how a number and its controls print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from ..arrays import random_key
from ..backends import check_model
from ..intervals import Interval, bootstrap

if TYPE_CHECKING:
    from ..models.decoder.model import Decoder


def untrained(model: Decoder, key: Array) -> Decoder:
    """A model of the same shape that has learnt nothing: every weight is drawn anew, with the mean and the spread that it had.

    Of weights that the layers stack, each layer keeps its own two. What is found in such a model too was put there by the method
    that finds it (Heap et al. 2025, arXiv:2501.17727). Host function.

    Args:
        model: a model of any family.
        key: a JAX random key.

    Returns:
        A model of the same config, dtype and placement.

    Raises:
        TypeError: no model, or no key.

    Examples:
        >>> random = untrained(model, jax.random.key(0))
        >>> random.config == model.config, says(forward(random, ids)) == says(forward(model, ids))
        (True, False)
    """
    check_model(model)
    typed = random_key(key)
    leaves, tree = jax.tree.flatten(model)
    layered = {id(x) for x in jax.tree.leaves(model.layers)}
    drawn = [_drawn(x, jax.random.fold_in(typed, i), id(x) in layered) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(tree, drawn)


def _drawn(x: Any, key: Array, layered: bool) -> Any:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    axes = tuple(range(int(layered), x.ndim))
    wide = x.astype(np.promote_types(x.dtype, np.float32))
    mean, spread = jnp.mean(wide, axes, keepdims=True), jnp.std(wide, axes, keepdims=True)
    return jax.device_put((mean + spread * jax.random.normal(key, x.shape, wide.dtype)).astype(x.dtype), x.sharding)


def share(values: Float[np.ndarray, " M"]) -> str:
    """A mean as it prints, with its interval where there is more than one value."""
    return f"{float(np.mean(values)):.2f}" if len(values) < 2 else spread(bootstrap(values))


def spread(interval: Interval) -> str:
    """A mean and its interval as they print."""
    mean, low, high = (float(x) for x in (interval.mean, interval.low, interval.high))
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


def beside(values: Float[np.ndarray, " M"], controls: Mapping[str, Float[np.ndarray, " M"]], of: str) -> str:
    """A number as it prints: its mean and interval, of what, and each control's.

    Args:
        of: what it was measured on, such as `"held-out pairs"`.
    """
    others = "".join(f"; {name} {share(found)}" for name, found in controls.items())
    return f"{share(values)} of {len(values)} {of}{others}"
