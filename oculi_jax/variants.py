"""Interventions of several rows of one program: the same ones on prompts of their own, or one kind at many strengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .fields import Index, Positions, Strength, Values, canonical, owner_site
from .frame import Frame, as_array, listing, on_device
from .sites import SITES


def count(interventions: Any) -> int | None:
    """How many variants interventions hold: `N` where index or strength fields have one leading axis, else None."""
    found: dict[int, str] = {}
    for item in _listed(interventions):
        for field in _data(item):
            value = getattr(item, field.name)
            if not _may_vary(field.metadata["kind"]) or value is None or isinstance(value, str):
                continue
            shape = as_array(value).shape
            positions = isinstance(field.metadata["kind"], Positions)
            if positions and (isinstance(value, list | tuple) or as_array(value).dtype == bool):
                continue
            if len(shape) > 1:
                raise ValueError(
                    f"{type(item).__name__}.{field.name} has axes {listing(shape)}; variants that are decoded side by side "
                    "lie along one axis [N]."
                )
            if shape:
                found.setdefault(shape[0], f"{type(item).__name__}.{field.name}")
    if len(found) > 1:
        raise ValueError(
            "These interventions hold different numbers of variants: "
            + ", ".join(f"{n} in {where}" for n, where in found.items())
            + "; give all of them one axis [N], or a scalar."
        )
    n = next(iter(found), None)
    if n == 0:
        raise ValueError(f"{found[0]} is empty: there is no variant to decode.")
    return n


def variant(interventions: Any, number: int, n: int, frame: Frame) -> list[Any]:
    """The interventions of one of `n` variants."""

    def pick(item: Any) -> Any:
        changes = {}
        for field in _data(item):
            kind, value = field.metadata["kind"], getattr(item, field.name)
            if value is None or (field.name == "value" and getattr(item, "op", None) == "apply"):
                continue
            array = as_array(value) if _may_vary(kind) or isinstance(kind, Values) else None
            if array is None or not array.shape:
                continue
            if _may_vary(kind):
                if on_device(array) and not isinstance(array, Tracer):
                    array = np.asarray(array)  # few and small, and so checked by value
                listed = isinstance(kind, Positions) and (isinstance(value, list | tuple) or array.dtype == bool)
                changes[field.name] = value if listed else array[number]
            elif _carries(item, kind, array.shape, n, frame, f"{type(item).__name__}.{field.name}"):
                changes[field.name] = array[number]
        return dataclasses.replace(item, **changes)

    return [pick(item) for item in _listed(interventions)]


def stack(interventions: Sequence[Any], frames: Sequence[Frame]) -> tuple[tuple[Any, ...], tuple[bool, ...]]:
    """Canonical interventions of several rows as one tree.

    Args:
        interventions: for each row, its interventions; rows differ in values only.
        frames: for each row, its frame.

    Returns:
        The tree, and for each of its leaves whether it leads with the rows; the others are what all rows share.
    """
    rows = [canonical(row, frame) for row, frame in zip(interventions, frames, strict=True)]
    trees: list[Any] = []
    leads: list[bool] = []
    for number, item in enumerate(rows[0]):
        leaves = {}
        given = [_listed(row)[number] for row in interventions]
        for field in _data(item):
            values = [getattr(row[number], field.name) for row in rows]
            own = [getattr(one, field.name) for one in given]
            shared = not _may_vary(field.metadata["kind"]) and all(value is own[0] for value in own)
            leaves[field.name] = values[0] if shared else jax.tree.map(lambda *xs: _stacked(xs), *values)
            leads += [not shared] * len(jax.tree.leaves(values[0]))
        trees.append(dataclasses.replace(item, **leaves))
    return tuple(trees), tuple(leads)


def along_rows(fn: Any, interventions: tuple[Any, ...], leads: tuple[bool, ...]) -> Any:
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


def _listed(interventions: Any) -> list[Any]:
    return list(interventions) if isinstance(interventions, list | tuple) else [interventions]


def _data(item: Any) -> list[Any]:
    """The fields of an intervention that are data; none where it is no intervention, which `canonical` then says."""
    if not dataclasses.is_dataclass(item) or isinstance(item, type):
        return []
    return [field for field in dataclasses.fields(item) if field.metadata.get("kind") is not None]


def _may_vary(kind: Any) -> bool:
    return isinstance(kind, Index | Strength | Positions)


def _carries(item: Any, kind: Values, shape: tuple[int, ...], n: int, frame: Frame, where: str) -> bool:
    """Whether an array field leads with the variants; ValueError where that cannot be told from its shape.

    What an `apply` edit's own function reads is shared by all, and so are arrays that lead with `L` for every layer.
    """
    site = SITES[kind.site] if kind.site else owner_site(item)
    if site.layered and getattr(item, "layer", None) is None:
        return False
    axes = frame.axes(site)[bool(getattr(item, "head", None) is not None and site.head_axis) :]

    def fits(inner: tuple[int, ...]) -> bool:
        return len(inner) <= len(axes) and all(
            have in (1, want) for have, want in zip(reversed(inner), reversed(axes), strict=False)
        )

    per_layer = site.layered and len(shape) == len(axes) + 1 and shape[0] == frame.sizes["L"] and fits(shape[1:])
    alone, leading = fits(shape) or per_layer, shape[0] == n and fits(shape[1:])
    if alone and leading and n > 1:
        raise ValueError(
            f"{where} has shape {listing(shape)}, which could be one array for all {n} variants or one for each; "
            f"write {listing((n, *(1,) * (len(axes) - len(shape) + 1), *shape[1:]))} for one each."
            if len(shape) <= len(axes)
            else f"{where} has shape {listing(shape)}, which could be one row for each layer or one for each variant; "
            "decode them in two calls."
        )
    return leading and not alone
