"""Kinds of fields that say where: a layer, a head, a place on a site's last axis, token positions; one of them, or a set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from ..arrays import as_array, listing, on_device
from .broadcast import Carried, first_wrong, to_sweep_axes
from .each import PerLayer
from .fields import Kind
from .frame import Frame

if TYPE_CHECKING:
    from ..intervention.protocol import Intervention

WORDS = {"L": "layers", "H": "query heads", "K": "key/value heads", "E": "residual dimensions", "F": "neurons",
         "D": "head dimensions", "T": "tokens", "S": "key positions"}  # fmt: skip


def is_set(value: object) -> TypeGuard[Sequence[object]]:
    """Whether a value of an index field means all of its entries in one run."""
    return isinstance(value, list | tuple | range)


def _no_layers(value: Any, where: str) -> None:
    if isinstance(value, PerLayer):
        raise TypeError(
            f"{where} is a PerLayer, which holds arrays and strengths; one index for each layer has no meaning."
        )


@dataclass(frozen=True)
class Index(Kind):
    """A place on an axis, counted from 0; or a set of places.

    Attributes:
        letter: the axis's, one that every run has; `""` where it depends on the site.
        optional: whether None is allowed.

    Examples:
        >>> forward(model, ids, HeadAblation(0, 6))  # head is a field(Index("H"))
        Traceback (most recent call last):
        ValueError: HeadAblation.head is 6, but there are 6 query heads: it must be 0 to 5.
    """

    letter: str = ""
    optional: bool = False

    def axes(self, value: object, owner: Intervention) -> tuple[int, ...]:
        if value is None or is_set(value) or isinstance(value, PerLayer):
            return ()
        array = as_array(value)
        return array.shape[:-1] if array.dtype == bool else array.shape

    def letter_of(self, value: object, owner: Intervention, frame: Frame, where: str) -> str | None:
        """The axis's letter; None where there is none, which only None may stand for."""
        return self.letter

    def canonical(self, value: object, owner: Intervention, frame: Frame, where: str) -> Any:
        _no_layers(value, where)
        letter = self.letter_of(value, owner, frame, where)
        if value is None:
            if self.optional or letter is None:
                return None
            raise TypeError(f"{where} is None, and an integer is needed.")
        assert letter is not None
        size, word = frame.sizes[letter], WORDS[letter]
        if is_set(value):
            if not len(value):
                raise ValueError(f"{where} is empty: there is nothing to act on.")
            if len({isinstance(x, bool) for x in value}) == 2:
                raise TypeError(f"{where} is {value!r}, which mixes indices and yes or no.")
        array = as_array(list(value) if isinstance(value, range) else value)
        if array.dtype == bool:
            if array.shape[-1:] != (size,):
                raise TypeError(
                    f"{where} is {value!r}, and an integer, a list of integers or a bool mask [{letter}] = [{size}] is needed."
                )
            if not on_device(array) and not array.any(axis=-1).all():
                raise ValueError(f"{where} is a mask without a True: there is nothing to act on.")
            return to_sweep_axes(array, 1, frame, where)
        if is_set(value) and array.ndim != 1:
            raise TypeError(f"{where} is {value!r}, and a flat list of integers is needed.")
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"{where} is {value!r}, and an integer is needed.")
        if on_device(array):
            array = jax.lax.convert_element_type(array, np.int32)
            if is_set(value):
                return jnp.any(array[:, None] == jnp.arange(size)[None, :], axis=0)
            return to_sweep_axes(array, 0, frame, where)
        wrong = (array < 0) | (array >= size)
        if wrong.any():
            raise ValueError(
                f"{where} is {first_wrong(array, wrong)}, but there are {size} {word}: it must be 0 to {size - 1}."
            )
        if is_set(value):
            return np.isin(np.arange(size), array)
        hint = f" For all of these {word} in one run, give a list."
        return to_sweep_axes(array.astype(np.int32), 0, frame, where, hint)


@dataclass(frozen=True)
class Layer(Index):
    """A layer, or a set of layers; None alone for a site outside the layers, and, where `optional`, for all of them.

    Attributes:
        site: the field that names the site; None where it is one of the layers.

    Examples:
        >>> forward(model, ids, HeadAblation(4, 0))  # layer is a field(Layer())
        Traceback (most recent call last):
        ValueError: HeadAblation.layer is 4, but there are 4 layers: it must be 0 to 3.
    """

    letter: str = "L"
    site: str | None = None

    def letter_of(self, value: object, owner: Intervention, frame: Frame, where: str) -> str | None:
        if self.site is None or frame.site(getattr(owner, self.site)).layered:
            return "L"
        if value is not None:
            raise ValueError(
                f"{where} is {value}, but the site {getattr(owner, self.site)!r} occurs once, outside the layers: use None."
            )
        return None


@dataclass(frozen=True)
class Head(Index):
    """One of the heads that a site has, `H` or `K`, or a set of them; None for all.

    Attributes:
        site: the field that names the site.

    Examples:
        >>> forward(model, ids, ActivationPatch("mlp_out", 0, 0.0, head=1))  # head is a field(Head())
        Traceback (most recent call last):
        ValueError: ActivationPatch.head is given, but the site 'mlp_out' has no heads: it is [L, T, E].
    """

    optional: bool = True
    site: str = "site"

    def letter_of(self, value: object, owner: Intervention, frame: Frame, where: str) -> str | None:
        site = frame.site(getattr(owner, self.site))
        if site.head_axis is None and value is not None:
            raise ValueError(f"{where} is given, but the site {site.name!r} has no heads: it is {site.shape}.")
        return site.head_axis


@dataclass(frozen=True)
class Last(Index):
    """A place on the last axis of a site (a neuron of `act`, a dimension of a stream), or a set of them; None for all.

    Examples:
        >>> forward(model, ids, Ablation("act", 0, 512))  # index is a field(Last())
        Traceback (most recent call last):
        ValueError: Ablation.index is 512, but there are 512 neurons: it must be 0 to 511.
    """

    optional: bool = True
    site: str = "site"

    def letter_of(self, value: object, owner: Intervention, frame: Frame, where: str) -> str | None:
        return frame.site(getattr(owner, self.site)).axes[-1]


@dataclass(frozen=True)
class Positions(Kind):
    """Token positions: an integer, a set of them, or a bool mask `[T]`; None, where `optional`, is all.

    Integers count real tokens, negative ones from the last; a mask lies along the token array, padding included.

    Examples:
        >>> forward(model, ids, AttentionKnockout(0, 0, query=-1, key=6))  # key is a field(Positions())
        Traceback (most recent call last):
        ValueError: AttentionKnockout.key is 6, but the prompt has 6 tokens: positions are 0 to 5, or −1 to −6 from the end.
    """

    optional: bool = False
    by_prompt = True

    def axes(self, value: object, owner: Intervention) -> tuple[int, ...]:
        return Index().axes(value, owner)

    def canonical(self, value: object, owner: Intervention, frame: Frame, where: str) -> Any:
        _no_layers(value, where)
        if value is None:
            if self.optional:
                return np.ones(frame.slots, bool)
            raise TypeError(f"{where} is None, and a position is needed.")
        if is_set(value) and not len(value):
            raise ValueError(f"{where} is empty: no position would be edited. Leave it out for all positions.")
        if is_set(value) and len({isinstance(x, bool) for x in value}) == 2:
            raise TypeError(f"{where} is {value!r}, which mixes positions and yes or no.")
        array = as_array(list(value) if isinstance(value, range) else value)
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
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"{where} is {value!r}, and an integer, a list of integers or a bool mask [T] is needed.")
        if is_set(value):
            if array.ndim != 1:
                raise TypeError(f"{where} is {value!r}, and a flat list of integers is needed.")
            return frame.positions(array, where)
        ranks = to_sweep_axes(array, 0, frame, where, " For a set of positions give a list.")
        return Carried(frame.positions(ranks.rows[:, None], where)) if array.ndim else frame.positions(ranks, where)
