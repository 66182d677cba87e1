"""How an array fits a field: the axes of a sweep in front, the field's own after them, padding, casting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..arrays import AnyArray, as_array, listing, on_device
from .each import PerLayer
from .frame import Frame

if TYPE_CHECKING:
    pass


class Carried(NamedTuple):
    """A canonical leaf that has an entry for each variant of a sweep, `[N, …]`; any other is shared by all."""

    rows: Any


def leading_axes(value: object, rank: int) -> tuple[int, ...]:
    """The axes in front of a field's own `rank`: those of a sweep. What leads with the layers has none."""
    if isinstance(value, PerLayer):
        return ()
    shape = tuple(as_array(value).shape)
    return shape[: max(len(shape) - rank, 0)]


def to_sweep_axes(array: AnyArray, rank: int, frame: Frame, where: str, hint: str = "") -> Any:
    """An array with axes of the sweep before `rank` of its own as `Carried`; one without as it is."""
    lead, own = array.shape[: array.ndim - rank], array.shape[array.ndim - rank :]
    if not lead:
        return array
    if not frame.axes:
        raise ValueError(
            f"{where} has axes {listing(lead)}{f' before its own {listing(own)}' if own else ''}, which makes it a sweep of "
            f"many interventions, and this runs one: use oculi_jax.sweep for all of them in one program.{hint}"
        )
    xp = jnp if on_device(array) else np
    array = array.reshape(*(1,) * (len(frame.axes) - len(lead)), *array.shape)
    return Carried(xp.broadcast_to(array, (*frame.axes, *own)).reshape(math.prod(frame.axes), *own))


def fit(
    value: object, letters: Sequence[str], frame: Frame, dtype: np.dtype, where: str, *, what: str, dense: bool = False
) -> Any:
    """An array in canonical form: of all its field's axes, each as long as the run's or 1; or a number.

    Args:
        value: a number, an array, or either for each layer in a `PerLayer`.
        letters: of the field's own axes.
        dtype: to cast to.
        where: the field, for messages; `what` is what its axes are, for messages.
        dense: whether the array leads with `L` because it acts at every layer.

    Returns:
        The array, `Carried` where it has the axes of the sweep; a `PerLayer` of it where it leads with the layers.
    """
    per_layer = isinstance(value, PerLayer)
    array = as_array(value.x if per_layer else value)
    names = (*("L" * (per_layer or dense)), *letters)
    sizes, rank = [frame.sizes[letter] for letter in names], len(names)
    shape = tuple(array.shape)
    need = f"{listing(names)} = {listing(sizes)}, {what}"
    if per_layer and len(shape) != rank:
        raise ValueError(f"{where} is a PerLayer of shape {listing(shape)}, and {need}, is needed.")
    if 0 < len(shape) < rank:
        short = ", ".join(["None"] * (rank - len(shape)) + ["..."])
        raise ValueError(
            f"{where} has shape {listing(shape)}, and {need}, is needed: a number, or all of these axes, those that it lacks "
            f"as axes of one: x[{short}] adds them in front."
        )
    own = shape[len(shape) - rank :] if shape else ()
    if any(have not in (1, size) for have, size in zip(own, sizes, strict=False)):
        mean = [1 if letter in "TS" else frame.sizes[letter] for letter in letters]
        hint = f" A mean over tokens is {listing(mean)}, one for each layer PerLayer of {listing((frame.sizes['L'], *mean))}."
        raise ValueError(
            f"{where} has shape {listing(shape)}, and must end in {need}, each of them whole or 1."
            f"{hint if 'T' in letters else ''}"
        )
    if (per_layer or dense) and own and own[0] != sizes[0]:
        raise ValueError(f"{where} has shape {listing(shape)}, and must lead with all layers, L = {sizes[0]}.")
    array = _stretch(array, names, own, frame)
    cast = cast_to(array, dtype, where, infinite=what.startswith("those of 'scores'"))
    hint = ""
    if not per_layer and not dense and shape[: len(shape) - rank] == (frame.sizes["L"],):
        hint = f" One entry for each layer is PerLayer(x), with x {listing(('L', *letters))}."
    leaf = to_sweep_axes(cast, rank if own else 0, frame, where, hint)
    if per_layer or (dense and own):
        return Carried(PerLayer(leaf.rows)) if isinstance(leaf, Carried) else PerLayer(leaf)
    return leaf


def _stretch(array: Any, names: Sequence[str], own: tuple[int, ...], frame: Frame) -> Any:
    """Pads token axes with zeros to the slots of a run that has more of them than the arrays cover."""
    if frame.slots == frame.n_tokens or not own:
        return array
    widths = [(0, 0)] * (array.ndim - len(own))
    for name, have in zip(names, own, strict=True):
        widths.append((0, frame.slots - frame.n_tokens if name in "TS" and have == frame.n_tokens else 0))
    return (jnp if on_device(array) else np).pad(array, widths)


def first_wrong(array: np.ndarray, wrong: np.ndarray) -> str:
    """The first wrong entry, for a message, and where it is."""
    if not array.ndim:
        return f"{array}"
    place = tuple(np.argwhere(wrong)[0].tolist())
    return f"{array[place]} at {listing(place)}"


def cast_to(array: AnyArray, dtype: np.dtype, where: str, *, infinite: bool = False) -> Any:
    """An array in another dtype, its values checked where the host sees them; −∞ passes where `infinite` says so."""
    if dtype == np.dtype(bool):
        if array.dtype != bool and (on_device(array) or not np.isin(array, (0, 1)).all()):
            raise TypeError(f"{where} is a table of yes and no, and must be bool; it has dtype {array.dtype}.")
        return array.astype(bool)
    if on_device(array):
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            raise TypeError(f"{where} has dtype {array.dtype}, and real numbers are needed.")
        return jax.lax.convert_element_type(array, dtype)
    if array.dtype != np.dtype(bool) and not is_real(array):
        raise TypeError(f"{where} has dtype {array.dtype}, and numbers are needed.")
    with np.errstate(over="ignore"):
        wide = array.astype(np.float64)
        excluded = (wide == -np.inf) if infinite else np.zeros(wide.shape, bool)
        if np.isnan(wide).any():
            raise ValueError(f"{where} holds NaN.")
        if np.isinf(wide[~excluded]).any():
            raise ValueError(f"{where} holds an infinity, and finite numbers are needed.")
        cast = array.astype(dtype)
        if np.isinf(cast.astype(np.float64)[~excluded]).any():
            raise ValueError(f"{where} holds {np.abs(wide[~excluded]).max():.3g}, which {dtype} cannot hold.")
    return cast


def is_real(array: AnyArray) -> bool:
    """Whether an array holds integers or floating-point numbers, bfloat16 among them."""
    return array.dtype.kind in "iuf" or array.dtype == jnp.bfloat16
