"""Kinds of fields of an intervention: what each accepts, and the one canonical form it has inside a program.

A field has a declared rank: an index and a strength 0, a set of positions or its mask `[T]` 1 (an integer 0), an array that
of its site's axes. What stands in front of that are the axes of a sweep. Index, strength and position fields broadcast to
them; an array carries all of them or none.

A value that the host can see (Python, NumPy) is checked by value; a JAX array by shape and dtype, since reading it would
wait for the device; a tracer by shape. After that an index is a strong int32 scalar, a strength a float32 scalar, a set of
positions a bool `[T]`, and an array has its site's dtype: so numbers of any Python type share one compiled program.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..arrays import as_array, listing, on_device
from ..sites import SITES, Site, unknown_site
from .broadcast import (
    Carried,
    broadcast_to_site,
    cast_to,
    first_wrong,
    is_real,
    is_whole,
    same_either_way,
    to_sweep_axes,
)
from .frame import Frame

WORDS = {"L": "layers", "H": "query heads", "K": "key/value heads", "E": "residual dimensions", "F": "neurons",
         "D": "head dimensions", "T": "tokens", "S": "key positions"}  # fmt: skip


class Kind:
    """How one field becomes canonical. `owner` is the intervention, for fields that depend on its site or head."""

    def axes(self, value: Any) -> tuple[int, ...]:
        """The axes of a sweep that a value makes; () for kinds whose arrays only follow those of the others."""
        return ()

    def canonical(self, value: Any, owner: Any, frame: Frame, where: str) -> Any:
        """The leaf, or `Carried` rows of leaves where it has the axes of a sweep, `frame.axes`."""
        raise NotImplementedError


def owner_site(owner: Any) -> Site:
    """The site of an intervention; ValueError where it names none."""
    site = SITES.get(owner.site) if isinstance(owner.site, str) else None
    if site is None:
        raise ValueError(unknown_site(owner.site))
    return site


@dataclass(frozen=True)
class Index(Kind):
    """A position on an axis, counted from 0.

    Attributes:
        of: the axis's letter; `"head"` for the site's own head axis, `"last"` for its last one.
        optional: whether None is allowed.
    """

    of: str
    optional: bool = False

    def axes(self, value: Any) -> tuple[int, ...]:
        return () if value is None else as_array(value).shape

    def canonical(self, value: Any, owner: Any, frame: Frame, where: str) -> Any:
        letter: str | None = self.of
        if letter == "head":
            letter = owner_site(owner).head_axis
            if letter is None and value is not None:
                raise ValueError(
                    f"{where} is given, but the site {owner.site!r} has no heads: it is {owner_site(owner).shape}."
                )
        elif letter == "last":
            letter = owner_site(owner).axes[-1]
        elif letter == "L" and hasattr(owner, "site") and not owner_site(owner).layered:
            if value is not None:
                raise ValueError(
                    f"{where} is {value}, but the site {owner.site!r} occurs once, outside the layers: use None."
                )
            return None
        if value is None:
            if self.optional:
                return None
            raise TypeError(f"{where} is None, and an integer is needed.")
        assert letter is not None
        size = frame.sizes[letter]
        array = as_array(value)
        if on_device(array):
            if not jnp.issubdtype(array.dtype, jnp.integer):
                raise TypeError(f"{where} is an array of {array.dtype}, and integers are needed.")
            return to_sweep_axes(jax.lax.convert_element_type(array, np.int32), 0, frame, where)
        if isinstance(value, bool) or array.dtype.kind not in "iu":
            raise TypeError(f"{where} is {value!r}, and an integer is needed.")
        wrong = (array < 0) | (array >= size)
        if wrong.any():
            raise ValueError(
                f"{where} is {first_wrong(array, wrong)}, but there are {size} {WORDS[letter]}: it must be 0 to {size - 1}."
            )
        return to_sweep_axes(array.astype(np.int32), 0, frame, where)


@dataclass(frozen=True)
class Strength(Kind):
    """A finite number; `positive` ones must be above 0."""

    positive: bool = False

    def axes(self, value: Any) -> tuple[int, ...]:
        return as_array(value).shape

    def canonical(self, value: Any, owner: Any, frame: Frame, where: str) -> Any:
        array = as_array(value)
        if on_device(array):
            if not jnp.issubdtype(array.dtype, jnp.number) or jnp.issubdtype(array.dtype, jnp.complexfloating):
                raise TypeError(f"{where} is an array of {array.dtype}, and a number is needed.")
            return to_sweep_axes(jax.lax.convert_element_type(array, np.float32), 0, frame, where)
        if isinstance(value, bool) or not is_real(array):
            raise TypeError(f"{where} is {value!r}, and a number is needed.")
        with np.errstate(over="ignore"):
            small = array.astype(np.float32)
        if not np.isfinite(small).all():
            raise ValueError(
                f"{where} is {first_wrong(array, ~np.isfinite(small))}, and a number that is finite in float32 is needed."
            )
        if self.positive and not (small > 0).all():
            raise ValueError(f"{where} is {first_wrong(array, ~(small > 0))}, and must be above 0 (1 changes nothing).")
        return to_sweep_axes(small, 0, frame, where)


@dataclass(frozen=True)
class Positions(Kind):
    """A set of token positions: an integer, a list of them, or a bool mask `[T]`; None, where `optional`, is all.

    Integers count real tokens, negative ones from the last; a mask lies along the token array, padding included. A list is
    a set of positions, an integer array positions of a sweep.
    """

    optional: bool = False

    def axes(self, value: Any) -> tuple[int, ...]:
        if value is None or isinstance(value, list | tuple):
            return ()
        array = as_array(value)
        return array.shape[:-1] if array.dtype == bool else array.shape

    def canonical(self, value: Any, owner: Any, frame: Frame, where: str) -> Any:
        if value is None:
            if self.optional:
                return np.ones(frame.slots, bool)
            raise TypeError(f"{where} is None, and a position is needed.")
        if isinstance(value, list | tuple) and len({isinstance(v, bool) for v in value}) == 2:
            raise TypeError(f"{where} is {value!r}, which mixes positions and yes or no.")
        array = as_array(value)
        if array.dtype == bool:
            if array.shape[-1:] != (frame.n_tokens,):
                raise ValueError(
                    f"{where} is a mask of shape {listing(array.shape)}, and the prompt is [{frame.n_tokens}]."
                )
            if not on_device(array) and not array.any():
                raise ValueError(f"{where} is a mask without a True: no position would be edited.")
            if frame.n_slots is not None:
                xp = jnp if on_device(array) else np
                array = xp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, frame.slots - frame.n_tokens)])
            return to_sweep_axes(array, 1, frame, where)
        if isinstance(value, list | tuple) and not value:
            raise ValueError(f"{where} is empty: no position would be edited. Leave it out for all positions.")
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"{where} is {value!r}, and an integer, a list of integers or a bool mask [T] is needed.")
        if isinstance(value, list | tuple):
            if array.ndim != 1:
                raise TypeError(f"{where} is {value!r}, and a flat list of integers is needed.")
            return frame.positions(array, where)
        if array.ndim and not frame.axes:
            raise ValueError(
                f"{where} is an integer array {listing(array.shape)}, which is a sweep over positions, for oculi_jax.sweep; "
                "for a set of positions give a list."
            )
        ranks = to_sweep_axes(array, 0, frame, where)
        return Carried(frame.positions(ranks.rows[:, None], where)) if array.ndim else frame.positions(ranks, where)


@dataclass(frozen=True)
class Values(Kind):
    """An array that broadcasts to the site's axes, in the site's dtype.

    It leaves out the head axis where the intervention names a head, and leads with `L` (or is a scalar) where the
    intervention acts at every layer. A whole run's capture, with `L` and the head axis, serves every head.

    Attributes:
        site: the site, where the intervention is about a fixed one.
        per_layer: whether it may lead with `L`, by having one axis more than the site, also where one layer is named.
    """

    site: str | None = None
    per_layer: bool = True

    def canonical(self, value: Any, owner: Any, frame: Frame, where: str) -> Any:
        site = SITES[self.site] if self.site else owner_site(owner)
        sizes = frame.site_axes(site)
        one_head = getattr(owner, "head", None) is not None and site.head_axis is not None
        dense = site.layered and getattr(owner, "layer", None) is None
        lead = "must" if dense else self.per_layer and site.layered
        shape = tuple(as_array(value).shape)
        if one_head and lead is True and is_whole(shape, sizes, frame):
            if frame.axes == shape[:2]:
                same_either_way(owner, 2, frame, where)
            return broadcast_to_site(value, sizes, frame, frame.site_dtype(site), where, site, lead=True)
        return broadcast_to_site(
            value, sizes[one_head:], frame, frame.site_dtype(site), where, site, lead=lead, owner=owner
        )


@dataclass(frozen=True)
class Mask(Kind):
    """A bool array that broadcasts to the site's axes, leading with `L` where the edit acts at every layer."""

    def canonical(self, value: Any, owner: Any, frame: Frame, where: str) -> Any:
        site = owner_site(owner)
        value = as_array(value)
        dtype = np.dtype(value.dtype)
        if dtype != np.dtype(bool):
            raise TypeError(f"{where} has dtype {dtype}, and bool is needed.")
        dense = site.layered and owner.layer is None
        return broadcast_to_site(
            value, frame.site_axes(site), frame, np.dtype(bool), where, site, lead="must" if dense else False
        )


@dataclass(frozen=True)
class Table(Kind):
    """An array of exactly these letters' sizes; float32."""

    letters: str

    def axes(self, value: Any) -> tuple[int, ...]:
        return as_array(value).shape[: -len(self.letters)]

    def canonical(self, value: Any, owner: Any, frame: Frame, where: str) -> Any:
        want = tuple(frame.sizes[letter] for letter in self.letters)
        array = as_array(value)
        if array.shape[-len(want) :] != want:
            raise ValueError(
                f"{where} has shape {listing(array.shape)}, and {listing(self.letters)} = {listing(want)} is needed."
            )
        return to_sweep_axes(cast_to(array, np.dtype(np.float32), where), len(want), frame, where)


@dataclass(frozen=True)
class Direction(Values):
    """A value whose last axis is a direction: of any length but zero."""

    def canonical(self, value: Any, owner: Any, frame: Frame, where: str) -> Any:
        array, given = super().canonical(value, owner, frame, where), as_array(value)
        if not on_device(given) and (np.abs(np.atleast_1d(given).astype(np.float64)).max(axis=-1) == 0).any():
            raise ValueError(f"{where} is zero, and a direction of some length is needed.")
        return array


@dataclass(frozen=True)
class Anything(Kind):
    """Any pytree of arrays, for an `apply` edit's own function; leaves with axes lead with `L` in the dense form."""

    def canonical(self, value: Any, owner: Any, frame: Frame, where: str) -> Any:
        n_layers = frame.sizes["L"] if owner_site(owner).layered and owner.layer is None else None

        def leaf(x: Any) -> Any:
            array = x if on_device(x) else np.asarray(x)
            if n_layers is not None and array.shape and array.shape[0] != n_layers:
                raise ValueError(
                    f"{where} holds an array {listing(array.shape)}; acting at every layer, it must be a scalar or lead "
                    f"with L = {n_layers}."
                )
            if on_device(x):
                return x
            if array.dtype == bool or array.dtype == jnp.bfloat16:
                return array
            if array.dtype.kind == "f":
                return cast_to(array, np.dtype(np.float32), where)
            if array.dtype.kind not in "iu":
                raise TypeError(f"{where} holds {x!r}, which is not an array of numbers.")
            small = array.astype(np.int32)
            if not np.array_equal(small, array):
                raise ValueError(f"{where} holds {np.abs(array).max()}, which int32 cannot hold.")
            return small

        return jax.tree.map(leaf, value)


def field(kind: Kind | None, *, default: Any = dataclasses.MISSING) -> Any:
    """A field of an intervention: `kind` for data, None for what is static (names, functions)."""
    return dataclasses.field(default=default, metadata={"kind": kind, "static": kind is None})
