"""`Edit`, the one primitive of intervention, and what it does to a site's value at a layer."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from ..arrays import AnyArray, wide
from ..pytrees import pytree
from ..sites import SITES, Site, site_of
from ..traced import entry
from .each import PerLayer, Whole
from .fields import Anything, Mask, Values, field
from .frame import Frame
from .indices import Layer
from .protocol import Intervention

OPS = ("set", "add", "scale", "apply")
# Some of a run's tokens: where they begin and how many there are, or their slots `[R]`.
Slots: TypeAlias = tuple[Array | int, int] | Int[Array, "R"]


@dataclasses.dataclass(frozen=True)
class _EditValue(Values):
    """An edit's value: fits the site, unless a function of the user's own reads it."""

    layer: str | None = "layer"

    def axes(self, value: object, owner: Intervention) -> tuple[int, ...]:
        assert isinstance(owner, Edit)
        return () if owner.op == "apply" else super().axes(value, owner)

    def canonical(self, value: object, owner: Intervention, frame: Frame, where: str) -> Any:
        assert isinstance(owner, Edit)
        if owner.op == "apply":
            return Anything().canonical(value, owner, frame, where)
        return super().canonical(value, owner, frame, where)


@pytree
class Edit:
    """Where `mask` holds, at layer `layer`, replaces the value of `site` by `op(value of the site, value)`.

    Every named intervention lowers to this. Results are cast to the site's dtype.

    Args:
        site: a name of the site table; static.
        op: `"set"`, `"add"`, `"scale"`, or `"apply"`; static.
        layer: which layer, from 0, or a set of layers. None is every layer: the dense form, in which `mask` and `value` are
            scalars or lead with `L`. A site outside the layers (`embed`, `final_scale`, `final_norm`) takes None.
        mask: bool, of the site's axes, each whole or 1.
        value: of the site's axes, each whole or 1 (a mean over tokens is `mean[None]`); a `PerLayer` of that. For `apply` any
            pytree of arrays, handed over as it is (in the dense form, leaves with axes lead with `L`).
        fn: for `apply`, `fn(x, value) → x` of the same shape: anything JAX can trace. Static: a new function is a new
            program. It is to treat each token by itself: padding is ones to it (along the keys of a real token, zeros), rows of
            the last axis that `mask` leaves alone are constants without a gradient, and in decoding `x` is of one token,
            `value` being passed whole. A sweep runs all tokens where there is one, unless `site_shaped` says that it can be
            cut.

    Examples:
        >>> even = forward(model, ids, Edit("scores", "scale", 2, value=0.0), capture="pattern")
        >>> even["pattern"][2, 0, -1].round(2)
        Array([0.17, 0.17, 0.17, 0.17, 0.17, 0.17], dtype=float32)
    """

    site: str = field(None)
    op: str = field(None)
    layer: Any = field(Layer(site="site", optional=True))
    mask: Any = field(Mask(), default=True)
    value: Any = field(_EditValue(), default=0.0)
    fn: Callable[[Array, Any], Array] | None = field(None, default=None)

    def check(self) -> None:
        """Raises ValueError for static fields that make no edit."""
        if self.op not in OPS:
            raise ValueError(f"op is {self.op!r}, and must be one of {', '.join(OPS)}.")
        if (self.op == "apply") != (self.fn is not None):
            raise ValueError("op 'apply' needs fn, a function of (x, value)." if self.fn is None else
                             f"fn is given, but op is {self.op!r}; only 'apply' reads it.")  # fmt: skip
        if self.fn is not None:
            _check_hashable(self.fn)
            _check_arity(self.fn)
        if self.site == "allowed" and self.op != "set":
            raise ValueError(f"'allowed' is a table of yes and no: it can be 'set', not {self.op!r}.")

    def edits(self, sizes: Mapping[str, int]) -> tuple[Edit, ...]:
        return (self,)

    @property
    def axes(self) -> tuple[str, ...]:
        """The letters of the site's axes.

        Examples:
            >>> Edit("z", "scale", 0).axes
            ('H', 'T', 'D')
        """
        return SITES[self.site].axes


def _check_arity(fn: Callable[..., Any]) -> None:
    """TypeError for a function that cannot be called with two arguments, where Python can tell."""
    try:
        inspect.signature(fn).bind(None, None)
    except ValueError:  # of a built-in function nothing is known
        return
    except TypeError:
        raise TypeError(
            f"fn of an Edit is called as fn(x, value), and {getattr(fn, '__name__', fn)!r} does not take two arguments: write "
            "for instance lambda x, value: x * 0."
        ) from None


def _check_hashable(fn: Callable[..., Any]) -> None:
    """TypeError for a function that programs cannot be kept by."""
    try:
        hash(fn)
    except TypeError:
        raise TypeError(
            f"fn of an Edit is a {type(fn).__name__} that cannot be hashed, and programs are kept by their functions: give a "
            "function, and what it computes with as value."
        ) from None


def lower(
    interventions: tuple[Any, ...],
    sizes: Mapping[str, int],
    n_covered: AnyArray | int | None = None,
    sites: Mapping[str, Site] = SITES,
) -> list[tuple[int, Edit]]:
    """The edits of canonical interventions, numbered by these, for a run of `sizes` on a model that has `sites`.

    Their arrays cover `n_covered` tokens (None: all).

    Raises:
        ValueError: an edit at a site that the model does not have.
    """
    edits = [(number, edit) for number, item in enumerate(interventions) for edit in item.edits(sizes)]
    edits = [(number, _dense(edit, site_of(edit.site, sites), sizes)) for number, edit in edits]
    if n_covered is None:
        return edits
    return [(number, limit_to_covered(edit, n_covered, sizes)) for number, edit in edits]


def _dense(edit: Edit, site: Site, sizes: Mapping[str, int]) -> Edit:
    """The edit with what leads with `L` because it acts at every layer as `PerLayer`."""
    if edit.layer is not None or not site.layered:
        return edit

    def leaf(x: Any) -> Any:
        if is_per_layer(x) or not jnp.ndim(x):
            return x
        if jnp.shape(x)[0] != sizes["L"]:
            raise ValueError(
                f"An Edit at {site.name!r} acts at every layer with an array {list(jnp.shape(x))}, which must lead with "
                f"L = {sizes['L']}; or name the layers, all of them in a list."
            )
        return PerLayer(x)

    value = jax.tree.map(leaf, edit.value, is_leaf=is_per_layer)
    return dataclasses.replace(edit, mask=leaf(edit.mask), value=value)


def is_per_layer(x: object) -> TypeGuard[PerLayer]:
    return isinstance(x, PerLayer)


def is_whole(x: object) -> TypeGuard[Whole]:
    return isinstance(x, Whole)


def shaped_leaves(tree: object) -> list[Any]:
    """The arrays, and those `PerLayer`, of an edit's value that have the site's axes."""
    found = jax.tree.leaves(tree, is_leaf=lambda x: is_per_layer(x) or is_whole(x))
    return [x for x in found if not is_whole(x)]


def at_layer(tree: Any, layer: Int[Array, ""] | None) -> Any:
    """What arrays of a `PerLayer` hold for one layer; others as they are. Outside of the layers (None) there is no `PerLayer`."""
    if layer is None:
        return tree
    return jax.tree.map(lambda x: entry(x.x, layer) if is_per_layer(x) else x, tree, is_leaf=is_per_layer)


def apply_edit(
    edit: Edit,
    x: Array,
    layer: Int[Array, ""] | None,
    real: Bool[Array, "T"] | None,
    keys: Bool[Array, "S"] | None = None,
) -> Array:
    """The value of a site after one edit.

    Args:
        edit: in canonical form.
        x: the site's value at this layer.
        layer: the layer that runs; None for a site outside the layers.
        real: True at real tokens; padding is never edited, so that nothing of it can reach them. None where all are.
        keys: the same for the key positions, where they are not the tokens that run: in decoding, all so far.
    """
    here: Bool[Array, ""] | None = None
    if layer is not None and edit.layer is not None:
        given = jnp.asarray(edit.layer)
        here = entry(given, layer) if given.dtype == bool else layer == given
    chosen, value = at_layer((edit.mask, edit.value), layer)
    chosen = jnp.asarray(chosen)
    chosen = _broadcast(chosen if here is None else chosen & here, x)
    seen = None
    if real is not None:
        if "S" in edit.axes:
            seen = _broadcast(real if keys is None else keys, x)
        real = _broadcast(real.reshape(-1, *(1,) * (len(edit.axes) - 1 - edit.axes.index("T"))), x)
        chosen = chosen & real if seen is None else chosen & real & seen
    if edit.op == "apply":
        new = _applied(edit, x, value, chosen, here, real, seen)
    else:
        dtype = x.dtype if jnp.asarray(value).dtype == x.dtype else wide(x.dtype)
        operand = _broadcast(jnp.asarray(value).astype(dtype), x)
        match edit.op:
            case "set":
                new = operand
            case "add":
                new = x.astype(dtype) + operand
            case _:
                new = x.astype(dtype) * operand
    return jnp.where(chosen, jnp.asarray(new).astype(x.dtype), x)


def _applied(
    edit: Edit,
    x: Array,
    value: Any,
    chosen: Array,
    here: Array | None,
    real: Array | None,
    visible: Array | None,
) -> Array:
    """What the function of an `apply` edit makes of a site's value."""
    assert edit.fn is not None
    # Where the edit is off, nothing may flow back through fn: its derivative there may be infinite.
    x_in = _only_if(jnp.any(chosen, axis=-1, keepdims=True), x)
    if real is not None:  # z of padding is exactly zero, where a norm or a logarithm has no derivative
        x_in = jnp.where(real, x_in, jnp.ones_like(x_in))
    if visible is not None:  # what goes along the keys of a real token meets nothing of padding
        x_in = jnp.where(visible, x_in, jnp.zeros_like(x_in))
    if here is not None:
        value = jax.tree.map(lambda leaf: _only_if(here, leaf), value)
    if is_site_shaped(edit):
        x_in = x_in.astype(wide(x.dtype))

        def fitted(leaf: Any) -> Array:
            if is_whole(leaf):
                return jnp.asarray(leaf.x).astype(x_in.dtype)
            spread = _broadcast(jnp.asarray(leaf).astype(x_in.dtype), x)
            return spread if visible is None else jnp.where(visible, spread, jnp.zeros_like(spread))

        value = jax.tree.map(fitted, value, is_leaf=is_whole)
    new = edit.fn(x_in, value)
    if jnp.shape(new) != x.shape:
        raise ValueError(
            f"The function of an Edit at {edit.site!r} returned shape {list(jnp.shape(new))}, "
            f"and the site's value {SITES[edit.site].shape} is {list(x.shape)} at a layer."
        )
    return new


def _broadcast(value: Array, x: Array) -> Array:
    return jnp.broadcast_to(jnp.expand_dims(value, tuple(range(x.ndim - value.ndim))), x.shape)


def _only_if(here: Array, leaf: Any) -> Array:
    leaf = jnp.asarray(leaf)
    return jnp.where(_broadcast(here, leaf), leaf, jax.lax.stop_gradient(leaf))


def site_shaped(fn: Callable[[Array, Any], Array]) -> Callable[[Array, Any], Array]:
    """Marks a function of `apply` edits whose value broadcasts to the site's axes, so that it can be cut to some tokens.

    It is given float32 (or wider) arrays of one shape, of JAX or of torch, and does with them what both do alike.

    Examples:
        >>> @site_shaped
        ... def clipped(x, most):
        ...     return x.clip(-most, most)
        >>> out = forward(model, ids, Edit("resid_mid", "apply", 1, value=0.5, fn=clipped), capture="resid_mid")
        >>> float(abs(out["resid_mid"][1]).max())
        0.5
    """
    fn.site_shaped = True  # type: ignore[attr-defined]
    return fn


def is_site_shaped(edit: Edit) -> bool:
    """Whether the arrays of an edit's value broadcast to the site's axes, and are not a function's own business."""
    return edit.op != "apply" or hasattr(edit.fn, "site_shaped")


def limit_to_covered(edit: Edit, n_covered: AnyArray | int, sizes: Mapping[str, int]) -> Edit:
    """The edit in a run that has room for more tokens than its arrays cover: it leaves the others alone.

    Args:
        edit: lowered for `sizes`; its fields were padded to that length when they were made canonical.
        n_covered: how many tokens the user's arrays cover.
        sizes: letter → size of the run, `T` and `S` among them.
    """
    if not is_site_shaped(edit):
        return edit
    n_axes = len(edit.axes)
    inside = jnp.arange(sizes["T"]) < n_covered
    covered = jnp.ones((1,) * n_axes, bool)
    for leaf in shaped_leaves(edit.value):
        shape = jnp.shape(leaf.x)[1:] if is_per_layer(leaf) else jnp.shape(leaf)
        for axis in token_axes(edit, shape, sizes["T"], "TS"):
            covered = covered & inside.reshape(*(1,) * (n_axes + axis), -1, *(1,) * (-axis - 1))
    if covered.size == 1:
        return edit
    if is_per_layer(edit.mask):
        mask = jnp.asarray(edit.mask.x)
        mask = mask.reshape(mask.shape[0], *(1,) * (n_axes + 1 - mask.ndim), *mask.shape[1:])
        return dataclasses.replace(edit, mask=PerLayer(mask & covered[None]))
    mask = jnp.asarray(edit.mask)
    return dataclasses.replace(edit, mask=mask.reshape(*(1,) * (n_axes - mask.ndim), *mask.shape) & covered)


def cut(edit: Edit, slots: Slots, sizes: Mapping[str, int], letters: str = "T") -> Edit:
    """The edit for some tokens of the run.

    Args:
        edit: lowered for `sizes`; of a function that treats its value as it likes, the mask alone is cut.
        slots: which tokens: where they begin and how many there are, or their slots `[R]`, of which those beyond the run find 0.
        sizes: letter → size of the run.
        letters: which axes are cut, `"TS"` for keys too.
    """

    def leaf(x: Any) -> Any:
        if is_whole(x):
            return x
        array = jnp.asarray(x.x if is_per_layer(x) else x)
        for axis in token_axes(edit, array.shape[int(is_per_layer(x)) :], sizes["T"], letters):
            if isinstance(slots, tuple):
                array = jax.lax.dynamic_slice_in_dim(array, *slots, array.ndim + axis)
            else:
                array = jnp.take(array, slots, axis=array.ndim + axis, mode="fill", fill_value=0)
        return PerLayer(array) if is_per_layer(x) else array

    value = edit.value
    if is_site_shaped(edit):
        value = jax.tree.map(leaf, value, is_leaf=lambda x: is_per_layer(x) or is_whole(x))
    return dataclasses.replace(edit, mask=leaf(edit.mask), value=value)


def token_axes(edit: Edit, shape: Sequence[int], length: int, letters: str) -> list[int]:
    """Which axes, counted from the end, of an array of a layer's values are token axes `length` long; one of 1 broadcasts."""
    found = [i - len(edit.axes) for i, letter in enumerate(edit.axes) if letter in letters]
    return [axis for axis in found if length > 1 and len(shape) >= -axis and shape[axis] == length]
