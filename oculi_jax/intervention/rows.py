"""Interventions of several rows of one program: what rows share is one array, what differs leads with the rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..arrays import on_device
from .canonical import Family, data_fields, family
from .fields import Positions
from .frame import Frame
from .protocol import as_list


def stack_rows(
    interventions: Sequence[Any], frames: Sequence[Frame]
) -> tuple[tuple[Any, ...], tuple[bool, ...], Family]:
    """Families of several rows, one of prompts for instance, as one tree.

    Args:
        interventions: for each row, its interventions; rows differ in values only.
        frames: for each row, its frame.

    Returns:
        The tree, and for each of its leaves whether it leads with the rows (the others are what all rows share: one object
        in all of them, and no set of positions, which depends on the frame); and the family of the first row, with which leaves
        lead with the variants after that.
    """
    families = [family(row, frame) for row, frame in zip(interventions, frames, strict=True)]
    given = [as_list(row) for row in interventions]
    trees: list[Any] = []
    leads: list[bool] = []
    for number, item in enumerate(families[0].interventions):
        leaves = {}
        for data in data_fields(item):
            values = [getattr(row.interventions[number], data.name) for row in families]
            own = [getattr(row[number], data.name) for row in given]
            shared = not isinstance(data.metadata["kind"], Positions) and all(value is own[0] for value in own)
            leaves[data.name] = values[0] if shared else jax.tree.map(lambda *xs: _stacked(xs), *values)
            leads += [not shared] * len(jax.tree.leaves(values[0]))
        trees.append(dataclasses.replace(item, **leaves))
    return tuple(trees), tuple(leads), families[0]


def along_rows(fn: Callable[..., Any], interventions: tuple[Any, ...], leads: tuple[bool, ...]) -> Callable[..., Any]:
    """`vmap` of `fn(interventions, *arguments)` over rows, sharing what they share; every argument leads with the rows."""
    leaves, tree = jax.tree.flatten(interventions)

    def one(leaves: list[Any], *arguments: Any) -> Any:
        return fn(jax.tree.unflatten(tree, leaves), *arguments)

    def call(*arguments: Any) -> Any:
        axes = ([0 if lead else None for lead in leads], *(0 for _ in arguments))
        return jax.vmap(one, in_axes=axes)(leaves, *arguments)

    return call


def _stacked(values: Sequence[Any]) -> Any:
    return jnp.stack(values) if any(map(on_device, values)) else np.stack(values)
