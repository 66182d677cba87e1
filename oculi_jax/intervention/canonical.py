"""The canonical form of interventions: every field checked, of one run or of the variants and prompts of a sweep."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.core import Tracer

from ..arrays import listing, on_device
from .broadcast import Carried
from .each import PerPrompt
from .fields import Kind, Strength, Table
from .frame import Frame
from .indices import Index, Positions, is_set
from .protocol import as_list

if TYPE_CHECKING:
    from ..intervention.protocol import Intervention, Interventions

# Fields that are small, and are checked by value also where they lie on a device.
_SMALL = (Index, Strength, Positions, Table)


def canonical(interventions: Interventions, frame: Frame) -> tuple[Any, ...]:
    """Every intervention of one run with its fields checked and in canonical form; one error lists all problems."""
    frame = dataclasses.replace(frame, axes=())

    def leaf(item: Any, data: Any, where: str) -> Any:
        value = getattr(item, data.name)
        if isinstance(value, PerPrompt):
            raise ValueError(
                f"{where} is a PerPrompt, one entry for each of several prompts [B, T], and this is one run: give the entry "
                "itself; sweep, generate and the adapter take several prompts."
            )
        return data.metadata["kind"].canonical(value, item, frame, where)

    return with_leaves(as_list(interventions), leaf)


def with_leaves(items: Sequence[Any], leaf_of: Callable[[Any, Any, str], Any]) -> tuple[Any, ...]:
    """Interventions with `leaf_of(intervention, field, its name for messages)` in each field; one error lists all problems."""
    problems: list[Exception] = []
    done = []
    for item, where in zip(items, names(items), strict=True):
        leaves = {}
        try:
            check(item, where)
        except (ValueError, TypeError) as error:
            problems.append(error)
            continue
        for data in data_fields(item):
            try:
                leaves[data.name] = leaf_of(item, data, f"{where}.{data.name}")
            except (ValueError, TypeError) as error:
                problems.append(error)
        if not problems:
            done.append(dataclasses.replace(item, **leaves))
    if len(problems) == 1:
        raise problems[0]
    if problems:
        kind = TypeError if all(isinstance(p, TypeError) for p in problems) else ValueError
        raise kind("These interventions cannot be run:\n  " + "\n  ".join(map(str, problems)))
    return tuple(done)


def names(items: Sequence[Any]) -> list[str]:
    """What interventions are called in messages."""
    each = [type(item).__name__ for item in items]
    return each if len(items) == 1 else [f"{name} (number {number})" for number, name in enumerate(each)]


def check(item: Intervention, where: str) -> None:
    """Raises ValueError or TypeError for static fields that make no intervention, and for fields of no kind."""
    if not all("kind" in data.metadata for data in dataclasses.fields(item)):
        raise TypeError(
            f"{where} has fields that oculi_jax.intervention.field did not declare; lower it to Edits yourself."
        )
    try:
        getattr(item, "check", lambda: None)()
    except (ValueError, TypeError) as error:
        raise type(error)(f"{where}: {error}") from None


def data_fields(item: object) -> list[Any]:
    """The fields of an intervention that are data."""
    if not dataclasses.is_dataclass(item) or isinstance(item, type):
        return []
    return [data for data in dataclasses.fields(item) if data.metadata.get("kind") is not None]


def sweep_axes(interventions: Interventions, n_prompts: int = 1) -> tuple[int, ...]:
    """The axes of a sweep to which all fields broadcast together; () where it is one run of each prompt."""
    items = as_list(interventions)
    axes: tuple[int, ...] = ()
    found: dict[str, tuple[int, ...]] = {}
    for item, name in zip(items, names(items), strict=True):
        for data in data_fields(item):
            value = getattr(item, data.name)
            if isinstance(value, PerPrompt):
                value.check(n_prompts, f"{name}.{data.name}")
                value = value.of(0)
            shape = data.metadata["kind"].axes(value, item)
            if not shape:
                continue
            found[f"{name}.{data.name}"] = shape
            try:
                axes = np.broadcast_shapes(axes, shape)
            except ValueError:
                each = ", ".join(f"{where} {listing(shape)}" for where, shape in found.items())
                raise ValueError(f"The axes of these fields do not broadcast together: {each}.") from None
    if 0 in axes:
        raise ValueError(f"The sweep has axes {listing(axes)}: there is no variant in it.")
    return tuple(axes)


def by_value(item: Intervention) -> Any:
    """The intervention with what is small on the host, where it can be checked by value."""
    changes = {}
    for data in data_fields(item):
        value = getattr(item, data.name)
        leaves = jax.tree.leaves(value) if isinstance(data.metadata["kind"], _SMALL) else []
        if any(map(on_device, leaves)) and not any(isinstance(x, Tracer) for x in leaves):
            changes[data.name] = jax.tree.map(np.asarray, value)
    return dataclasses.replace(item, **changes) if changes else item


def field_of_prompts(
    kind: Kind, value: object, item: Intervention, frames: Sequence[Frame], where: str
) -> tuple[Any, bool]:
    """The canonical leaf of one field of several prompts, and whether it leads with them.

    Args:
        value: as given.
        item: the intervention, of which kinds ask for no more than what is None and what is static.
        frames: of each prompt.
    """
    alike = value is None or not kind.by_prompt or all(frame.mask is None for frame in frames)
    if not isinstance(value, PerPrompt):
        if alike:
            return kind.canonical(value, item, frames[0], where), False
        return _stacked([kind.canonical(value, item, frame, where) for frame in frames]), True
    leaves = jax.tree.leaves(value.x)
    if alike and not is_set(value.x) and all(map(on_device, leaves)):  # checked by shape alone: all at once
        return jax.vmap(lambda x: kind.canonical(x, item, frames[0], where))(value.x), True
    each = [value.of(number) for number in range(len(frames))]
    if any(map(is_set, each)):  # one index is a set of one
        each = [x if is_set(x) else [x] for x in each]
    parts = enumerate(zip(each, frames, strict=True))
    rows = [kind.canonical(x, item, frame, f"{where} of prompt {n}") for n, (x, frame) in parts]
    if len({isinstance(row, Carried) for row in rows}) == 2:
        raise ValueError(
            f"{where} has axes of a sweep for some prompts and none for others; give all of them the same axes."
        )
    return _stacked(rows), True


def _stacked(rows: Sequence[Any]) -> Any:
    def stack(*leaves: Any) -> Any:
        return jax.numpy.stack(leaves) if any(map(on_device, leaves)) else np.stack(leaves)

    return jax.tree.map(stack, *rows)
