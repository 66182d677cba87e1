"""Kinds of fields of an intervention: what each accepts, and the one canonical form it has inside a program.

A value that the host can see (Python, NumPy) is checked by value; a JAX array by shape and dtype, since reading it would
wait for the device; a tracer by shape. After that an index is a strong int32 scalar, a strength a float32 scalar, a set of
positions a bool `[T]`, and an array has its site's dtype: so numbers of any Python type share one compiled program.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from .frame import Frame, as_array, listing, on_device
from .sites import SITES, Site, unknown_site

T = TypeVar("T")

WORDS = {"L": "layers", "H": "query heads", "K": "key/value heads", "E": "residual dimensions", "F": "neurons",
         "D": "head dimensions", "T": "tokens", "S": "key positions"}  # fmt: skip


class Kind:
    """How one field becomes canonical. `owner` is the intervention, for fields that depend on its site or head."""

    def canonical(self, value: Any, owner: Any, frame: Frame, where: str) -> Any:
        raise NotImplementedError


def _refuse_axes(shape: tuple[int, ...], where: str) -> None:
    if shape:
        raise ValueError(
            f"{where} has axes {listing(shape)}, which makes it a sweep of many interventions, and forward runs one: "
            "use a scalar, or map forward over it with jax.vmap."
        )


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
            _refuse_axes(array.shape, where)
            return jax.lax.convert_element_type(array, np.int32)
        if isinstance(value, bool) or array.dtype.kind not in "iu":
            raise TypeError(f"{where} is {value!r}, and an integer is needed.")
        _refuse_axes(array.shape, where)
        if not 0 <= array < size:
            raise ValueError(f"{where} is {array}, but there are {size} {WORDS[letter]}: it must be 0 to {size - 1}.")
        return array.astype(np.int32)


@dataclass(frozen=True)
class Strength(Kind):
    """A finite number; `positive` ones must be above 0."""

    positive: bool = False

    def canonical(self, value: Any, owner: Any, frame: Frame, where: str) -> Any:
        array = as_array(value)
        if on_device(array):
            if not jnp.issubdtype(array.dtype, jnp.number) or jnp.issubdtype(array.dtype, jnp.complexfloating):
                raise TypeError(f"{where} is an array of {array.dtype}, and a number is needed.")
            _refuse_axes(array.shape, where)
            return jax.lax.convert_element_type(array, np.float32)
        if isinstance(value, bool) or not _is_real(array):
            raise TypeError(f"{where} is {value!r}, and a number is needed.")
        _refuse_axes(array.shape, where)
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
        if not np.isfinite(array):
            raise ValueError(f"{where} is {value}, and a number that is finite in float32 is needed.")
        if self.positive and not array > 0:
            raise ValueError(f"{where} is {value}, and must be above 0 (1 changes nothing).")
        return array


@dataclass(frozen=True)
class Positions(Kind):
    """A set of token positions: an integer, a list of them, or a bool mask `[T]`; None, where `optional`, is all.

    Integers count real tokens, negative ones from the last; a mask lies along the token array, padding included.
    """

    optional: bool = False

    def canonical(self, value: Any, owner: Any, frame: Frame, where: str) -> Any:
        if value is None:
            if self.optional:
                return np.ones(frame.slots, bool)
            raise TypeError(f"{where} is None, and a position is needed.")
        if isinstance(value, list | tuple) and len({isinstance(v, bool) for v in value}) == 2:
            raise TypeError(f"{where} is {value!r}, which mixes positions and yes or no.")
        array = as_array(value)
        if array.dtype == bool:
            if not on_device(array) and not array.any():
                raise ValueError(f"{where} is a mask without a True: no position would be edited.")
            if array.shape != (frame.n_tokens,):
                raise ValueError(
                    f"{where} is a mask of shape {listing(array.shape)}, and the prompt is [{frame.n_tokens}]."
                )
            xp = jnp if on_device(array) else np
            return array if frame.n_slots is None else xp.pad(array, (0, frame.slots - frame.n_tokens))
        if isinstance(value, list | tuple) and not value:
            raise ValueError(f"{where} is empty: no position would be edited. Leave it out for all positions.")
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"{where} is {value!r}, and an integer, a list of integers or a bool mask [T] is needed.")
        if isinstance(value, list | tuple):
            if array.ndim != 1:
                raise TypeError(f"{where} is {value!r}, and a flat list of integers is needed.")
        elif array.ndim:
            raise ValueError(
                f"{where} is an integer array {listing(array.shape)}, which would be a sweep over positions; "
                "for a set of positions give a list."
            )
        return frame.positions(array, where)


@dataclass(frozen=True)
class Values(Kind):
    """An array that broadcasts to the site's axes, in the site's dtype.

    It leaves out the head axis where the intervention names a head, and leads with `L` (or is a scalar) where the
    intervention acts at every layer.

    Attributes:
        site: the site, where the intervention is about a fixed one.
        per_layer: whether it may lead with `L`, by having one axis more than the site, also where one layer is named.
    """

    site: str | None = None
    per_layer: bool = True

    def canonical(self, value: Any, owner: Any, frame: Frame, where: str) -> Any:
        site = SITES[self.site] if self.site else owner_site(owner)
        axes = frame.axes(site)
        if getattr(owner, "head", None) is not None and site.head_axis:
            axes = axes[1:]
        dense = site.layered and getattr(owner, "layer", None) is None
        return _fit(
            value,
            axes,
            frame,
            frame.site_dtype(site),
            where,
            site,
            lead="must" if dense else self.per_layer and site.layered,
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
        return _fit(value, frame.axes(site), frame, np.dtype(bool), where, site, lead="must" if dense else False)


@dataclass(frozen=True)
class Table(Kind):
    """An array of exactly these letters' sizes; float32."""

    letters: str

    def canonical(self, value: Any, owner: Any, frame: Frame, where: str) -> Any:
        want = tuple(frame.sizes[letter] for letter in self.letters)
        array = as_array(value)
        if array.shape != want:
            raise ValueError(
                f"{where} has shape {listing(array.shape)}, and {listing(self.letters)} = {listing(want)} is needed."
            )
        return _cast(array, np.dtype(np.float32), where)


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
                return _cast(array, np.dtype(np.float32), where)
            if array.dtype.kind not in "iu":
                raise TypeError(f"{where} holds {x!r}, which is not an array of numbers.")
            small = array.astype(np.int32)
            if not np.array_equal(small, array):
                raise ValueError(f"{where} holds {np.abs(array).max()}, which int32 cannot hold.")
            return small

        return jax.tree.map(leaf, value)


def _fit(value: Any, axes: list[int], frame: Frame, dtype: np.dtype, where: str, site: Site, lead: bool | str) -> Any:
    """Checks that `value` broadcasts to `axes`, perhaps after a leading `L`, and casts it."""
    array = as_array(value)
    shape = array.shape
    inner = shape
    n_layers = frame.sizes["L"]
    if shape and (lead == "must" or (lead and len(shape) == len(axes) + 1 and shape[0] == n_layers)):
        if shape[0] != n_layers:
            raise ValueError(
                f"{where} has shape {listing(shape)}; acting at every layer, it must be a scalar or lead with L = {n_layers}."
            )
        inner = shape[1:]
    fits = len(inner) <= len(axes) and all(
        have in (1, want) for have, want in zip(reversed(inner), reversed(axes), strict=False)
    )
    if not fits:
        extra = ", or to that behind a leading L" if lead else ""
        raise ValueError(
            f"{where} has shape {listing(shape)}, and must broadcast to {listing(axes)}, "
            f"the axes of {site.name!r} {site.shape}{'' if len(axes) == len(site.axes) else ' at one head'}{extra}."
        )
    if site.dtype == "bool" and not (array.dtype == bool or (not on_device(array) and np.isin(array, (0, 1)).all())):
        raise TypeError(f"{where} is set into a table of yes and no, and must be bool.")
    array = _stretch(array, inner, axes, site, frame)
    if site.name == "scores" and not on_device(array) and array.dtype.kind == "f" and (array == -np.inf).any():
        finite = _cast(np.where(array == -np.inf, 0, array), dtype, where)  # −∞ says: not allowed
        return np.where(array == -np.inf, dtype.type(-np.inf), finite)
    return _cast(array, dtype, where)


def _stretch(array: Any, inner: tuple[int, ...], axes: list[int], site: Site, frame: Frame) -> Any:
    """Pads token axes with zeros to the slots of a run that has more of them than the arrays cover."""
    if frame.slots == frame.n_tokens or not inner:
        return array
    letters = site.axes[len(site.axes) - len(axes) :]
    widths = [(0, 0)] * len(array.shape)
    for axis, letter in zip(range(-1, -len(inner) - 1, -1), reversed(letters), strict=False):
        if letter in "TS" and array.shape[axis] == frame.n_tokens:
            widths[axis] = (0, frame.slots - frame.n_tokens)
    return (jnp if on_device(array) else np).pad(array, widths)


def _cast(array: Any, dtype: np.dtype, where: str) -> Any:
    if on_device(array):
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            raise TypeError(f"{where} has dtype {array.dtype}, and real numbers are needed.")
        return jax.lax.convert_element_type(array, dtype)
    if array.dtype != np.dtype(bool) and not _is_real(array):
        raise TypeError(f"{where} has dtype {array.dtype}, and numbers are needed.")
    with np.errstate(over="ignore"):
        wide = array.astype(np.float64)
        if np.isnan(wide).any():
            raise ValueError(f"{where} holds NaN.")
        if np.isinf(wide).any():
            raise ValueError(f"{where} holds an infinity, and finite numbers are needed.")
        cast = array.astype(dtype)
        if dtype.kind != "b" and np.isinf(cast.astype(np.float64)).any():
            raise ValueError(f"{where} holds {np.abs(wide).max():.3g}, which {dtype} cannot hold.")
    return cast


def _is_real(array: np.ndarray) -> bool:
    """Whether an array holds integers or floating-point numbers, bfloat16 among them."""
    return array.dtype.kind in "iuf" or array.dtype == jnp.bfloat16


def field(kind: Kind | None, *, default: Any = dataclasses.MISSING) -> Any:
    """A field of an intervention: `kind` for data, None for what is static (names, functions)."""
    return dataclasses.field(default=default, metadata={"kind": kind})


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def pytree(cls: type[T]) -> type[T]:
    """Makes a class with `field`s a frozen dataclass and a pytree whose leaves are the fields that have a kind."""
    cls = dataclass(frozen=True, eq=False)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    data = [f.name for f in fields if f.metadata["kind"] is not None]
    static = [f.name for f in fields if f.metadata["kind"] is None]
    jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=static)
    return cls


def canonical(interventions: Any, frame: Frame) -> tuple[Any, ...]:
    """Every intervention with its fields checked and in canonical form; one error lists all problems."""
    if hasattr(interventions, "edits") or isinstance(interventions, type):
        interventions = (interventions,)
    if not isinstance(interventions, list | tuple):
        raise TypeError(f"interventions is a {type(interventions).__name__}; give an intervention or a list of them.")
    problems: list[Exception] = []
    done = []
    for number, intervention in enumerate(interventions):
        if isinstance(intervention, type):
            raise TypeError(f"interventions[{number}] is the class {intervention.__name__}; give an instance of it.")
        if not hasattr(intervention, "edits") or not dataclasses.is_dataclass(intervention):
            raise TypeError(f"interventions[{number}] is a {type(intervention).__name__}, not an intervention.")
        name = type(intervention).__name__
        where = name if len(interventions) == 1 else f"{name} (number {number})"
        if not all("kind" in item.metadata for item in dataclasses.fields(intervention)):
            raise TypeError(
                f"{where} has fields that oculi_jax.fields.field did not declare; lower it to Edits yourself."
            )
        try:
            getattr(intervention, "check", lambda: None)()
            if hasattr(intervention, "site"):
                owner_site(intervention)
        except (ValueError, TypeError) as error:
            problems.append(type(error)(f"{where}: {error}"))
            continue
        leaves = {}
        for item in dataclasses.fields(intervention):
            if (kind := item.metadata["kind"]) is None:
                continue
            try:
                value = getattr(intervention, item.name)
                leaves[item.name] = kind.canonical(value, intervention, frame, f"{where}.{item.name}")
            except (ValueError, TypeError) as error:
                problems.append(error)
        if not problems:
            done.append(dataclasses.replace(intervention, **leaves))  # type: ignore[type-var]
    if len(problems) == 1:
        raise problems[0]
    if problems:
        kind = TypeError if all(isinstance(p, TypeError) for p in problems) else ValueError
        raise kind("These interventions cannot be run:\n  " + "\n  ".join(map(str, problems)))
    return tuple(done)
