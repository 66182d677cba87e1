"""What JAX does inside a program, in the forms that are cheapest to trace: a first call spends most of its time on that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .arrays import AnyArray


def entry(array: AnyArray, number: AnyArray | int) -> Array:
    """`array[number]`, of a number that is not negative: one operation, where indexing with a traced one makes five."""
    return jax.lax.dynamic_index_in_dim(array, number, 0, keepdims=False, allow_negative_indices=False)


def mapped(
    fn: Callable[..., Any],
    size: int,
    in_axes: int | tuple[Any, ...] = 0,
    out_axes: int = 0,
    axis_name: str | None = None,
) -> Callable[..., Any]:
    """`jax.vmap(fn, in_axes, out_axes)` over `size`; of one alone `fn` as it is, which is traced in two thirds of the time.

    Args:
        in_axes: as `jax.vmap` takes them; those that lead, 0, or None.
        axis_name: of the mesh, over which what is mapped is spread.
    """

    def alone(*given: Any) -> Any:
        def only(axis: int | None, part: Any) -> Any:
            return part if axis is None else jax.tree.map(lambda x: x[0], part)

        axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(given)
        found = fn(*jax.tree.map(only, axes, given, is_leaf=lambda axis: axis is None))
        return jax.tree.map(lambda x: jnp.expand_dims(x, out_axes), found)

    if size == 1 and axis_name is None:
        return alone
    return jax.vmap(fn, in_axes, out_axes, axis_size=size, spmd_axis_name=axis_name)
