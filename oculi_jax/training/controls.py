"""What a learnt thing is judged beside: a model that was never trained, and other seeds; and how a number and all these print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

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


def orders(n: int, seeds: int, key: Array) -> Int[np.ndarray, "N S"]:
    """Which of n examples each seed of a fit has in the place of each: the first seed that one, all others one in an order drawn
    for them.
    """
    drawn = [np.asarray(jax.random.permutation(jax.random.fold_in(key, seed), n)) for seed in range(1, seeds)]
    return np.stack([np.arange(n), *drawn], axis=1).astype(np.int32)


def another(n: int, rng: np.random.Generator) -> Int[np.ndarray, " N"]:
    """For each of n, drawn, another one than itself: whose answer a control is asked for."""
    drawn = rng.permutation(n)
    found = np.empty(n, np.int32)
    found[drawn] = np.roll(drawn, 1)
    return found


def shown(values: Float[np.ndarray, " M"]) -> str:
    """A mean as it prints, with its interval where there is more than one value."""
    return f"{float(np.mean(values)):.2f}" if len(values) < 2 else ranged(bootstrap(values))


def ranged(spread: Interval) -> str:
    """An interval of one number as it prints."""
    mean, low, high = (round(float(x), 2) + 0.0 for x in (spread.mean, spread.low, spread.high))  # no −0.00
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


def beside(
    values: Float[np.ndarray, " M"],
    controls: Mapping[str, Float[np.ndarray, " M"]],
    of: str,
    by_seed: Float[np.ndarray, " S"],
) -> str:
    """A number as it prints: its mean and interval, of what, each control's, and that of seeds where there are several.

    Args:
        of: what it was measured on, such as `"held-out pairs"`.
    """
    others = "".join(f"; {name} {shown(found)}" for name, found in controls.items())
    seeds = f"; {len(by_seed)} seeds {shown(by_seed)}" if len(by_seed) > 1 else ""
    return f"{shown(values)} of {len(values)} {of}{others}{seeds}"
