"""Kinds of fields of an intervention: what each accepts, and the one canonical form it has inside a program.

What an array means is written, never guessed. A field has a rank: an index and a strength 0, a direction 1, a table 2, a value
that of its site. A plain array has that rank, or the axes of a sweep in front of it; a number is a number anywhere; what leads
with the layers is a `PerLayer`, with the prompts a `PerPrompt`. A list, a tuple or a range of indices is a set: all of them in
one run.

A value that the host can see (Python, NumPy) is checked by value; a JAX array by shape and dtype, since reading it would
wait for the device; a tracer by shape. After that an index is a strong int32 scalar, a set a bool mask over its axis, a
strength a float32 scalar, positions a bool `[T]`, and an array has its site's dtype: so numbers of any Python type, and any two
sets, share one compiled program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ..arrays import as_array, listing, on_device, wide
from ..sites import SITES, Site
from .broadcast import cast_to, first_wrong, fit, is_real, leading_axes, to_sweep_axes
from .each import PerLayer
from .frame import Frame

if TYPE_CHECKING:
    from ..intervention.protocol import Intervention


class Kind:
    """How one field becomes canonical. `owner` is the intervention, for fields that depend on another one of its fields.

    Attributes:
        by_prompt: whether the canonical form depends on the prompt, also where the value does not.
    """

    by_prompt = False

    def axes(self, value: object, owner: Intervention) -> tuple[int, ...]:
        """The axes of a sweep that a value makes."""
        return ()

    def canonical(self, value: object, owner: Intervention, frame: Frame, where: str) -> Any:
        """The leaf, or `Carried` rows of leaves where it has the axes of a sweep, `frame.axes`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Strength(Kind):
    """A finite number; `positive` ones must be above 0.

    Examples:
        >>> forward(model, ids, SpectraScaler(0, 0, -1.0))  # alpha is a field(Strength(positive=True))
        Traceback (most recent call last):
        ValueError: SpectraScaler.alpha is -1.0, and must be above 0 (1 changes nothing).
    """

    positive: bool = False

    def axes(self, value: object, owner: Intervention) -> tuple[int, ...]:
        return leading_axes(value, 0)

    def canonical(self, value: object, owner: Intervention, frame: Frame, where: str) -> Any:
        given = value.x if isinstance(value, PerLayer) else value
        array = as_array(given)
        if on_device(array):
            if not jnp.issubdtype(array.dtype, jnp.number) or jnp.issubdtype(array.dtype, jnp.complexfloating):
                raise TypeError(f"{where} is an array of {array.dtype}, and a number is needed.")
        elif isinstance(given, bool) or not is_real(array):
            raise TypeError(f"{where} is {given!r}, and a number is needed.")
        else:
            with np.errstate(over="ignore"):
                small = array.astype(np.float32)
            if not np.isfinite(small).all():
                wrong = first_wrong(array, ~np.isfinite(small))
                raise ValueError(f"{where} is {wrong}, and a number that is finite in float32 is needed.")
            if self.positive and not (small > 0).all():
                wrong = first_wrong(array, ~(small > 0))
                raise ValueError(f"{where} is {wrong}, and must be above 0 (1 changes nothing).")
        return fit(value, (), frame, np.dtype(np.float32), where, what="one number")


@dataclass(frozen=True)
class Values(Kind):
    """An array of a site's rank, in the site's dtype; each axis whole or 1.

    Attributes:
        site: the field that names the site.
        head: the field that may name one head, whose values then have no head axis; a `PerLayer` keeps it, as a capture does.
        layer: the field that, where it is None at a site of the layers, stands for all of them: then arrays lead with `L`.

    Examples:
        >>> says(forward(model, ids, ActivationPatch("mlp_out", 0, 0.0)))  # value is a field(Values(head="head"))
        'warm'
    """

    site: str = "site"
    head: str | None = None
    layer: str | None = None

    def _letters(self, value: Any, owner: Any, site: Site) -> tuple[tuple[str, ...], bool]:
        """The letters of the field's own axes, and whether `L` leads."""
        dense = self.layer is not None and site.layered and getattr(owner, self.layer) is None
        one_head = self.head is not None and site.head_axis is not None and getattr(owner, self.head) is not None
        return site.axes[1:] if one_head and not isinstance(value, PerLayer) else site.axes, dense

    def axes(self, value: object, owner: Intervention) -> tuple[int, ...]:
        name = getattr(owner, self.site)
        if not isinstance(name, str) or name not in SITES:  # `canonical` says so
            return ()
        letters, dense = self._letters(value, owner, SITES[name])
        return leading_axes(value, len(letters) + dense)

    def canonical(self, value: object, owner: Intervention, frame: Frame, where: str) -> Any:
        site = frame.site(getattr(owner, self.site))
        letters, dense = self._letters(value, owner, site)
        what = f"those of {site.name!r}{'' if len(letters) == len(site.axes) else ' at one head'}"
        return fit(
            value,
            letters,
            frame,
            self.dtype(site, frame),
            where,
            what=what,
            dense=dense and not isinstance(value, PerLayer),
        )

    def dtype(self, site: Site, frame: Frame) -> np.dtype:
        return frame.site_dtype(site)


@dataclass(frozen=True)
class Mask(Values):
    """A bool array of a site's rank: where an edit acts."""

    layer: str | None = "layer"

    def canonical(self, value: object, owner: Intervention, frame: Frame, where: str) -> Any:
        given = as_array(value.x if isinstance(value, PerLayer) else value)
        if given.dtype != np.dtype(bool):
            raise TypeError(f"{where} has dtype {given.dtype}, and bool is needed.")
        return super().canonical(value, owner, frame, where)

    def dtype(self, site: Site, frame: Frame) -> np.dtype:
        return np.dtype(bool)


@dataclass(frozen=True)
class Vector(Kind):
    """An array over the last axis of a site, in the site's dtype.

    Attributes:
        site: the field that names the site; or a site's own name where `fixed`.
        fixed: whether it is one.
        heads: whether a `PerLayer` may have a head axis, `[L, H, D]`.
        nonzero: whether it is a direction, whose length may not be 0.

    Examples:
        >>> forward(model, ids, DirectionAblation("act", 0, np.zeros(512)))  # direction is a field(Vector(nonzero=True))
        Traceback (most recent call last):
        ValueError: DirectionAblation.direction is zero, and a direction of some length is needed.
    """

    site: str = "site"
    fixed: bool = False
    heads: bool = False
    nonzero: bool = False

    def axes(self, value: object, owner: Intervention) -> tuple[int, ...]:
        return leading_axes(value, 1)

    def canonical(self, value: object, owner: Intervention, frame: Frame, where: str) -> Any:
        site = frame.site(self.site if self.fixed else getattr(owner, self.site))
        letters: tuple[str, ...] = site.axes[-1:]
        if self.heads and isinstance(value, PerLayer) and as_array(value.x).ndim == 3:
            letters = (str(site.head_axis), *letters)
        given = as_array(value.x if isinstance(value, PerLayer) else value)
        leaf = fit(value, letters, frame, frame.site_dtype(site), where, what=f"the last axis of {site.name!r}")
        if self.nonzero and not on_device(given) and (np.abs(np.atleast_1d(given)).max(axis=-1) == 0).any():
            raise ValueError(f"{where} is zero, and a direction of some length is needed.")
        return leaf


@dataclass(frozen=True)
class Table(Kind):
    """A float32 array `[L, n]`: for each layer one number for each of a site's heads; or, where it has none, for each place
    on its last axis, or 1. `[1, n]` for a site outside the layers.

    Attributes:
        site: the field that names the site.

    Examples:
        >>> forward(model, ids, Blend("z", np.ones((4, 2))))  # keep is a field(Table())
        Traceback (most recent call last):
        ValueError: Blend.keep has shape [4, 2], and [4, 6] is needed for 'z': layers and its heads H.
    """

    site: str = "site"

    def axes(self, value: object, owner: Intervention) -> tuple[int, ...]:
        return leading_axes(value, 2)

    def canonical(self, value: object, owner: Intervention, frame: Frame, where: str) -> Any:
        site = frame.site(getattr(owner, self.site))
        n_layers = frame.sizes["L"] if site.layered else 1
        widths = {frame.sizes[site.head_axis]} if site.head_axis else {1, frame.sizes[site.axes[-1]]}
        array = as_array(value)
        if array.ndim < 2 or array.shape[-2] != n_layers or array.shape[-1] not in widths:
            word = f"its heads {site.head_axis}" if site.head_axis else f"1, or its last axis {site.axes[-1]}"
            need = f"[{n_layers}, {' or '.join(map(str, sorted(widths)))}]"
            raise ValueError(
                f"{where} has shape {listing(array.shape)}, and {need} is needed for {site.name!r}: "
                f"{'layers' if site.layered else 'one row'} and {word}."
            )
        return to_sweep_axes(cast_to(array, np.dtype(np.float32), where), 2, frame, where)


@dataclass(frozen=True)
class Basis(Kind):
    """A float array `[n, r]` of a site's last axis × a rank: columns that span a subspace, linearly independent.

    Attributes:
        site: the field that names the site.

    Examples:
        >>> forward(model, ids, Subspace("resid_pre", 2, np.ones((192, 2)), 0.0))  # basis is a field(Basis())
        Traceback (most recent call last):
        ValueError: Subspace.basis spans 1 dimension with 2 columns: they must be linearly independent.
    """

    site: str = "site"

    def axes(self, value: object, owner: Intervention) -> tuple[int, ...]:
        return leading_axes(value, 2)

    def canonical(self, value: object, owner: Intervention, frame: Frame, where: str) -> Any:
        site = frame.site(getattr(owner, self.site))
        letter, size = site.axes[-1], frame.sizes[site.axes[-1]]
        array = as_array(value.x if isinstance(value, PerLayer) else value)
        if array.ndim < 2 or array.shape[-2] != size or not 1 <= array.shape[-1] <= size:
            raise ValueError(
                f"{where} has shape {listing(array.shape)}, and [{letter}, r] = [{size}, r] is needed, with r from 1 to {size}: "
                f"the last axis of {site.name!r} × the rank of the subspace."
            )
        cast = cast_to(array, wide(frame.dtype), where)
        if not on_device(cast):
            rank, n = int(np.min(np.linalg.matrix_rank(cast))), array.shape[-1]
            if rank < n:
                dimensions = "dimension" if rank == 1 else "dimensions"
                raise ValueError(
                    f"{where} spans {rank} {dimensions} with {n} columns: they must be linearly independent."
                )
        if not isinstance(value, PerLayer):
            return to_sweep_axes(cast, 2, frame, where)
        if cast.ndim != 3 or cast.shape[0] != frame.sizes["L"]:
            raise ValueError(
                f"{where} is a PerLayer of shape {listing(cast.shape)}, and [L, {letter}, r] with L = {frame.sizes['L']} is needed."
            )
        return PerLayer(cast)


@dataclass(frozen=True)
class Capture(Kind):
    """What another run had at some sites: its `Output`, or site → capture, of all layers.

    Attributes:
        sites: the field that names them.
    """

    sites: str = "sites"

    def canonical(self, value: object, owner: Intervention, frame: Frame, where: str) -> Any:
        found = getattr(value, "activations", value)
        if not isinstance(found, Mapping):
            raise TypeError(
                f"{where} is a {type(value).__name__}, and the Output of a run, or its activations, is needed."
            )
        leaves = {}
        for name in getattr(owner, self.sites):
            site = frame.site(name)
            if name not in found:
                raise ValueError(f"{where} has no {name!r}; it has {', '.join(map(str, found)) or 'nothing'}.")
            want = [frame.sizes[letter] for letter in (*("L" * site.layered), *site.axes)]
            if list(np.shape(found[name])) != want:
                raise ValueError(
                    f"{where}[{name!r}] has shape {listing(np.shape(found[name]))}, and {site.shape} = {listing(want)} is "
                    "needed: captured in all layers, at all positions, of a prompt of this length."
                )
            given = PerLayer(found[name]) if site.layered else found[name]
            what = f"those of {name!r}"
            leaves[name] = fit(given, site.axes, frame, frame.site_dtype(site), f"{where}[{name!r}]", what=what)
        return leaves


@dataclass(frozen=True)
class Anything(Kind):
    """Any pytree of arrays, for an `apply` edit's own function, handed over as it is: no rank, no axes of a sweep.

    Where the edit acts at every layer, arrays with axes lead with `L`.

    Attributes:
        site, layer: the fields that name them.
    """

    site: str = "site"
    layer: str = "layer"

    def canonical(self, value: object, owner: Intervention, frame: Frame, where: str) -> Any:
        dense = frame.site(getattr(owner, self.site)).layered and getattr(owner, self.layer) is None
        n_layers = frame.sizes["L"]

        def leaf(x: Any) -> Any:
            per_layer = isinstance(x, PerLayer) or (dense and np.ndim(x) > 0)
            x = x.x if isinstance(x, PerLayer) else x
            if per_layer and np.shape(x)[:1] != (n_layers,):
                raise ValueError(
                    f"{where} holds an array {listing(np.shape(x))}; "
                    f"{'acting at every layer' if dense else 'in a PerLayer'}, it must be a scalar or lead with L = {n_layers}."
                )
            array = self._cast(x, where)
            return PerLayer(array) if per_layer else array

        return jax.tree.map(leaf, value, is_leaf=lambda x: isinstance(x, PerLayer))

    def _cast(self, x: Any, where: str) -> Any:
        if on_device(x):
            return x
        array = np.asarray(x)
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


def field(kind: Kind | None, *, default: object = dataclasses.MISSING) -> Any:
    """A field of an intervention: `kind` for data, None for what is static (names, functions).

    Examples:
        >>> @pytree
        ... class Louder:
        ...     site: str = field(None)  # a part of the program
        ...     alpha: object = field(Strength(), default=2.0)  # data
        ...     def edits(self, sizes):
        ...         return (Edit(self.site, "scale", 0, value=self.alpha),)
        >>> sweep(model, ids, Louder("z", np.array([1.0, 2.0, 3.0])), metric).shape
        (3,)
    """
    return dataclasses.field(default=default, metadata={"kind": kind, "static": kind is None})
