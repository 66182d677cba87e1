"""How an array fits a field: the axes of a sweep in front, broadcasting to a site's axes, padding, casting."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ..arrays import as_array, listing, on_device
from ..sites import Site
from .frame import Frame


class Carried(NamedTuple):
    """A canonical leaf that has an entry for each variant of a sweep, `[N, …]`; any other is shared by all."""

    rows: Any


def to_sweep_axes(array: Any, rank: int, frame: Frame, where: str) -> Any:
    """An array with axes of the sweep before `rank` of its own as `Carried`; one without as it is."""
    lead, own = array.shape[: array.ndim - rank], array.shape[array.ndim - rank :]
    if not lead:
        return array
    if not frame.axes:
        raise ValueError(
            f"{where} has axes {listing(lead)}, which makes it a sweep of many interventions, and this runs one: "
            "use a scalar, or oculi_jax.sweep for all of them in one program."
        )
    xp = jnp if on_device(array) else np
    array = array.reshape(*(1,) * (len(frame.axes) - len(lead)), *array.shape)
    return Carried(xp.broadcast_to(array, (*frame.axes, *own)).reshape(math.prod(frame.axes), *own))


def first_wrong(array: np.ndarray, wrong: np.ndarray) -> str:
    """The first wrong entry, for a message, and where it is."""
    if not array.ndim:
        return f"{array}"
    place = tuple(np.argwhere(wrong)[0].tolist())
    return f"{array[place]} at {listing(place)}"


def is_whole(shape: tuple[int, ...], sizes: list[int], frame: Frame) -> bool:
    """Whether a shape is that of a whole run's capture, `L` and then the site's axes."""
    return shape[:2] == (frame.sizes["L"], sizes[0]) and len(shape) == len(sizes) + 1


def same_either_way(owner: Any, n: int, frame: Frame, where: str) -> None:
    """ValueError where an array that leads with `L` (and, for n = 2, the head axis) would say something else if it led
    with the sweep's axes, which are as long. In a grid over layers (and heads) it says the same.
    """
    grid = np.indices(frame.axes)
    for given, place in zip((owner.layer, getattr(owner, "head", None))[:n], grid, strict=True):
        if isinstance(given, Tracer) or not np.array_equal(np.broadcast_to(as_array(given), frame.axes), place):
            raise ValueError(
                f"{where} could be a whole run's capture, with one row for each layer, or hold one entry for each variant of "
                f"the sweep {listing(frame.axes)}. Give the index fields one more axis, of length one (layer[..., None]), to "
                "say the first, and the array one too, after those of the sweep, to say the second."
            )


def _refuse_likeness(shape: tuple[int, ...], rank: int, owner: Any, frame: Frame, where: str) -> None:
    """ValueError for an array that fits all variants alike only because an axis of the sweep is as long as one of the site's.

    Where positions are swept along that axis, as in patching place by place, it is meant.
    """
    given = getattr(owner, "positions", None)
    if given is not None and not isinstance(given, list | tuple):
        array = as_array(given)
        spans = array.shape[:-1] if array.dtype == bool else array.shape
        if spans and spans[-1] == frame.axes[-1]:
            return
    n_sweep = len(frame.axes)
    if len(shape) - n_sweep < rank:
        want = (*frame.axes, *(1,) * (rank - len(shape) + n_sweep), *shape[n_sweep:])
        raise ValueError(
            f"{where} has shape {listing(shape)}, which could be one array for all variants of the sweep {listing(frame.axes)}, "
            f"or one entry for each. Write {listing(want)} for one each; to share it, give the index fields one more axis, of "
            "length one (layer[..., None])."
        )


def broadcast_to_site(
    value: Any,
    axes: list[int],
    frame: Frame,
    dtype: np.dtype,
    where: str,
    site: Site,
    lead: bool | str,
    owner: Any = None,
) -> Any:
    """Checks that `value` broadcasts to `axes`, perhaps after a leading `L` or the axes of a sweep, and casts it."""
    array = as_array(value)
    shape = tuple(array.shape)
    n_layers, n_sweep = frame.sizes["L"], len(frame.axes)
    rank = len(axes) + (lead == "must")
    carried = bool(n_sweep) and len(shape) == n_sweep + rank and shape[:n_sweep] == frame.axes
    per_layer = lead is True and len(shape) == len(axes) + 1 and shape[0] == n_layers
    if carried and per_layer:
        same_either_way(owner, 1, frame, where)
        carried = False
    inner = shape[n_sweep:] if carried else shape
    if inner and (lead == "must" or (per_layer and not carried)):
        if inner[0] != n_layers:
            raise ValueError(
                f"{where} has shape {listing(shape)}; acting at every layer, it must be a scalar or lead with L = {n_layers}."
            )
        inner = inner[1:]
    if not _broadcasts(inner, axes):
        extra = ", or to that behind a leading L" if lead else ""
        hint = ""
        if n_sweep and shape[:n_sweep] == frame.axes and _broadcasts(shape[n_sweep:], axes):
            want = (*frame.axes, *(1,) * (rank - len(shape) + n_sweep), *shape[n_sweep:])
            hint = f" For one entry for each variant, write it as {listing(want)}."
        elif not n_sweep and len(shape) > len(axes) and _broadcasts(shape[len(shape) - len(axes) :], axes):
            hint = " To sweep over its first axes, give an index or strength field those axes too: np.ones(n), np.full(n, …)."
        raise ValueError(
            f"{where} has shape {listing(shape)}, and must broadcast to {listing(axes)}, "
            f"the axes of {site.name!r} {site.shape}{'' if len(axes) == len(site.axes) else ' at one head'}{extra}.{hint}"
        )
    if owner is not None and lead != "must" and n_sweep and not carried and shape[:n_sweep] == frame.axes:
        _refuse_likeness(shape, rank, owner, frame, where)
    if site.dtype == "bool" and not (array.dtype == bool or (not on_device(array) and np.isin(array, (0, 1)).all())):
        raise TypeError(f"{where} is set into a table of yes and no, and must be bool.")
    array = _stretch(array, inner, axes, site, frame)
    if carried:
        array = array.reshape(math.prod(frame.axes), *array.shape[n_sweep:])
    if site.name == "scores" and not on_device(array) and array.dtype.kind == "f" and (array == -np.inf).any():
        finite = cast_to(np.where(array == -np.inf, 0, array), dtype, where)  # −∞ says: not allowed
        cast = np.where(array == -np.inf, dtype.type(-np.inf), finite)
    else:
        cast = cast_to(array, dtype, where)
    return Carried(cast) if carried else cast


def _broadcasts(shape: tuple[int, ...], axes: list[int]) -> bool:
    return len(shape) <= len(axes) and all(
        have in (1, want) for have, want in zip(reversed(shape), reversed(axes), strict=False)
    )


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


def cast_to(array: Any, dtype: np.dtype, where: str) -> Any:
    if on_device(array):
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            raise TypeError(f"{where} has dtype {array.dtype}, and real numbers are needed.")
        return jax.lax.convert_element_type(array, dtype)
    if array.dtype != np.dtype(bool) and not is_real(array):
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


def is_real(array: np.ndarray) -> bool:
    """Whether an array holds integers or floating-point numbers, bfloat16 among them."""
    return array.dtype.kind in "iuf" or array.dtype == jnp.bfloat16
