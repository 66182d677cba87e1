"""The canonical form of interventions: of one run, or of a family of them whose fields have the axes of a sweep."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from ..arrays import listing
from .broadcast import Carried
from .fields import Index, Positions, Strength, Table, owner_site
from .frame import Frame
from .protocol import as_list


@dataclass(frozen=True)
class Family:
    """Interventions in canonical form, `N` variants of them side by side.

    Attributes:
        interventions: their leaves lead with `N`, or are shared by all variants.
        leads: for each leaf, whether it leads with `N`.
        axes: what `N` is the product of.
    """

    interventions: tuple[Any, ...]
    leads: tuple[bool, ...]
    axes: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.axes)


def canonical(interventions: Any, frame: Frame) -> tuple[Any, ...]:
    """Every intervention of one run with its fields checked and in canonical form; one error lists all problems."""
    return _canonical(as_list(interventions), dataclasses.replace(frame, axes=()))[0]


def family(interventions: Any, frame: Frame) -> Family:
    """Interventions whose fields have axes as a `Family`; Raises as `canonical` does."""
    given = [_by_value(item) for item in as_list(interventions)]
    axes = sweep_axes(given)
    tree, leads = _canonical(given, dataclasses.replace(frame, axes=axes))
    return Family(tree, leads, axes)


def sweep_axes(interventions: list[Any]) -> tuple[int, ...]:
    """The axes to which all index, strength and position fields broadcast together."""
    axes: tuple[int, ...] = ()
    found: dict[str, tuple[int, ...]] = {}
    for number, item in enumerate(interventions):
        for data in data_fields(item):
            shape = data.metadata["kind"].axes(getattr(item, data.name))
            if not shape:
                continue
            name = type(item).__name__ if len(interventions) == 1 else f"{type(item).__name__} (number {number})"
            found[f"{name}.{data.name}"] = shape
            try:
                axes = np.broadcast_shapes(axes, shape)
            except ValueError:
                each = ", ".join(f"{where} {listing(shape)}" for where, shape in found.items())
                raise ValueError(f"The axes of these fields do not broadcast together: {each}.") from None
    if 0 in axes:
        raise ValueError(f"The sweep has axes {listing(axes)}: there is no variant in it.")
    return tuple(axes)


def data_fields(item: Any) -> list[Any]:
    """The fields of an intervention that are data; none where it is no intervention, which `canonical` then says."""
    if not dataclasses.is_dataclass(item) or isinstance(item, type):
        return []
    return [data for data in dataclasses.fields(item) if data.metadata.get("kind") is not None]


def _by_value(item: Any) -> Any:
    """The intervention with what makes the axes of a sweep on the host, where it is small and can be checked by value."""
    changes = {}
    for data in data_fields(item):
        value = getattr(item, data.name)
        small = isinstance(data.metadata["kind"], Index | Strength | Positions | Table)
        leaves = jax.tree.leaves(value) if small else []
        if any(isinstance(x, jax.Array) for x in leaves) and not any(isinstance(x, Tracer) for x in leaves):
            # A list stays one: of positions it is a set.
            changes[data.name] = (
                [np.asarray(x) for x in value] if isinstance(value, list | tuple) else np.asarray(value)
            )
    return dataclasses.replace(item, **changes) if changes else item


def _canonical(interventions: list[Any], frame: Frame) -> tuple[tuple[Any, ...], tuple[bool, ...]]:
    problems: list[Exception] = []
    done = []
    leads: list[bool] = []
    for number, intervention in enumerate(interventions):
        name = type(intervention).__name__
        where = name if len(interventions) == 1 else f"{name} (number {number})"
        if not all("kind" in item.metadata for item in dataclasses.fields(intervention)):
            raise TypeError(
                f"{where} has fields that oculi_jax.intervention.field did not declare; lower it to Edits yourself."
            )
        try:
            getattr(intervention, "check", lambda: None)()
            if hasattr(intervention, "site"):
                owner_site(intervention)
        except (ValueError, TypeError) as error:
            problems.append(type(error)(f"{where}: {error}"))
            continue
        leaves = {}
        for data in data_fields(intervention):
            try:
                value = getattr(intervention, data.name)
                leaf = data.metadata["kind"].canonical(value, intervention, frame, f"{where}.{data.name}")
            except (ValueError, TypeError) as error:
                problems.append(error)
                continue
            carried = isinstance(leaf, Carried)
            leaves[data.name] = leaf.rows if carried else leaf
            leads += [carried] * len(jax.tree.leaves(leaves[data.name]))
        if not problems:
            done.append(dataclasses.replace(intervention, **leaves))  # type: ignore[type-var]
    if len(problems) == 1:
        raise problems[0]
    if problems:
        kind = TypeError if all(isinstance(p, TypeError) for p in problems) else ValueError
        raise kind("These interventions cannot be run:\n  " + "\n  ".join(map(str, problems)))
    return tuple(done), tuple(leads)
