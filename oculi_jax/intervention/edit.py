"""`Edit`, the one primitive of intervention, and what it does to a site's value at a layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from ..pytrees import pytree
from .fields import Anything, Index, Mask, Values, field, owner_site

OPS = ("set", "add", "scale", "apply")


class _EditValue(Values):
    """An edit's value: fits the site, unless a function of the user's own reads it."""

    def canonical(self, value: Any, owner: Any, frame: Any, where: str) -> Any:
        kind = Anything() if owner.op == "apply" else Values(per_layer=False)
        return kind.canonical(value, owner, frame, where)


@pytree
class Edit:
    """Where `mask` holds, at layer `layer`, replaces the value of `site` by `op(value of the site, value)`.

    Every named intervention lowers to this. Results are cast to the site's dtype.

    Args:
        site: a name of the site table; static.
        op: `"set"`, `"add"`, `"scale"`, or `"apply"`; static.
        layer: which layer, from 0. None is every layer: the dense form, in which `mask` and `value` are scalars or
            lead with `L`. A site outside the layers (`embed`, `final_scale`, `final_norm`) takes None.
        mask: bool, broadcasts to the site's axes.
        value: broadcasts to the site's axes; for `apply` any pytree of arrays (in the dense form, leaves with axes lead
            with `L`).
        fn: for `apply`, `fn(x, value) → x` of the same shape: anything JAX can trace. Static: a new function is a new
            program. It is to treat each token by itself: padding is ones to it, rows of the last axis that `mask` leaves
            alone are constants without a gradient, and in decoding `x` is of one token, `value` being passed whole. A sweep
            runs all tokens where there is one.
    """

    site: str = field(None)
    op: str = field(None)
    layer: Any = field(Index("L", optional=True))
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
        if self.site == "allowed" and self.op != "set":
            raise ValueError(f"'allowed' is a table of yes and no: it can be 'set', not {self.op!r}.")

    def edits(self, sizes: Mapping[str, int]) -> tuple[Edit, ...]:
        return (self,)


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
    mask, value = edit.mask, edit.value
    here: Bool[Array, ""] | None = None
    if layer is not None:
        if edit.layer is None:
            mask, value = jax.tree.map(lambda leaf: leaf[layer] if jnp.ndim(leaf) else leaf, (mask, value))
        else:
            here = layer == edit.layer
            if leaves := cuttable(edit):  # a whole run's capture: this layer's row, shared by all variants of a sweep
                n_axes = len(owner_site(edit).axes)
                rows = [leaf[layer] if jnp.ndim(leaf) > n_axes else leaf for leaf in leaves]
                value = jax.tree.unflatten(jax.tree.structure(value), rows)
    chosen = jnp.asarray(mask)
    if here is not None:
        chosen = chosen & here
    chosen = _broadcast(chosen, x)
    if real is not None:
        axes = owner_site(edit).axes
        visible = _broadcast(real if keys is None else keys, x) if "S" in axes else True
        real = _broadcast(real.reshape(-1, *(1,) * (len(axes) - 1 - axes.index("T"))), x) & visible
        chosen = chosen & real
    if edit.op == "apply":
        assert edit.fn is not None
        # Where the edit is off, nothing may flow back through fn: its derivative there may be infinite.
        x_in = _only_if(jnp.any(chosen, axis=-1, keepdims=True), x)
        if real is not None:  # z of padding is exactly zero, where a norm or a logarithm has no derivative
            x_in = jnp.where(real, x_in, jnp.ones_like(x_in))
        if here is not None:
            value = jax.tree.map(lambda leaf: _only_if(here, leaf), value)
        if hasattr(edit.fn, "site_shaped"):
            x_in = x_in.astype(jnp.float32)
            value = jax.tree.map(lambda leaf: _broadcast(leaf.astype(jnp.float32), x), value)
        new = edit.fn(x_in, value)
        if jnp.shape(new) != x.shape:
            raise ValueError(
                f"The function of an Edit at {edit.site!r} returned shape {list(jnp.shape(new))}, "
                f"and the site's value {owner_site(edit).shape} is {list(x.shape)} at a layer."
            )
    else:
        wide = x.dtype if jnp.asarray(value).dtype == x.dtype else jnp.float32
        operand = _broadcast(jnp.asarray(value).astype(wide), x)
        match edit.op:
            case "set":
                new = operand
            case "add":
                new = x.astype(wide) + operand
            case _:
                new = x.astype(wide) * operand
    return jnp.where(chosen, jnp.asarray(new).astype(x.dtype), x)


def _broadcast(value: Array, x: Array) -> Array:
    return jnp.broadcast_to(jnp.expand_dims(value, tuple(range(x.ndim - value.ndim))), x.shape)


def _only_if(here: Array, leaf: Any) -> Array:
    leaf = jnp.asarray(leaf)
    return jnp.where(_broadcast(here, leaf), leaf, jax.lax.stop_gradient(leaf))


def site_shaped(fn: Callable[[Array, Any], Array]) -> Callable[[Array, Any], Array]:
    """Marks a function of `apply` edits whose value broadcasts to the site's axes, so that it can be cut to some tokens.

    It is given float32 arrays of one shape, of JAX or of torch, and does with them what both do alike.
    """
    fn.site_shaped = True  # type: ignore[attr-defined]
    return fn


def limit_to_covered(edit: Edit, n_covered: Array | int, sizes: Mapping[str, int]) -> Edit:
    """The edit in a run that has room for more tokens than its arrays cover: it leaves the others alone.

    Args:
        edit: lowered for `sizes`; its fields were padded to that length when they were made canonical.
        n_covered: how many tokens the user's arrays cover.
        sizes: letter → size of the run, `T` and `S` among them.
    """
    n_axes = len(owner_site(edit).axes)
    inside = jnp.arange(sizes["T"]) < n_covered
    covered = jnp.ones((1,) * n_axes, bool)
    n_layers = 0
    for leaf in map(jnp.asarray, cuttable(edit)):
        for axis in token_axes(edit, leaf, sizes["T"], "TS"):
            covered = covered & inside.reshape(*(1,) * (n_axes + axis), -1, *(1,) * (-axis - 1))
            n_layers = leaf.shape[0] if is_dense(edit) else 0
    if covered.size == 1:
        return edit
    mask = jnp.asarray(edit.mask)
    if n_layers:
        mask = jnp.broadcast_to(mask, (n_layers,)) if mask.ndim == 0 else mask
        mask = mask.reshape(mask.shape[0], *(1,) * (n_axes + 1 - mask.ndim), *mask.shape[1:])
        return dataclasses.replace(edit, mask=mask & covered[None])
    return dataclasses.replace(edit, mask=mask.reshape(*(1,) * (n_axes - mask.ndim), *mask.shape) & covered)


def cut_rows(edit: Edit, start: Array | int, n_rows: int, sizes: Mapping[str, int]) -> Edit:
    """The edit for `n_rows` tokens of the run that begin at `start`; key axes stay whole."""

    def cut(leaf: Any) -> Array:
        leaf = jnp.asarray(leaf)
        for axis in token_axes(edit, leaf, sizes["T"], "T"):
            leaf = jax.lax.dynamic_slice_in_dim(leaf, start, n_rows, leaf.ndim + axis)
        return leaf

    value = jax.tree.map(cut, edit.value) if cuttable(edit) else edit.value
    return dataclasses.replace(edit, mask=cut(edit.mask), value=value)


def cuttable(edit: Edit) -> list[Any]:
    """The leaves of the edit's value that have the site's axes; none where they are a function's own business."""
    return jax.tree.leaves(edit.value) if edit.op != "apply" or hasattr(edit.fn, "site_shaped") else []


def is_dense(edit: Edit) -> bool:
    """Whether the edit acts at every layer, so that its arrays lead with `L`."""
    return owner_site(edit).layered and edit.layer is None


def token_axes(edit: Edit, leaf: Any, length: int, letters: str) -> list[int]:
    """Which axes, counted from the end, are token axes of the edit's site and `length` long; an axis of one broadcasts."""
    axes = owner_site(edit).axes
    rank = leaf.ndim - is_dense(edit)
    found = [i - len(axes) for i, letter in enumerate(axes) if letter in letters]
    return [axis for axis in found if length > 1 and rank >= -axis and leaf.shape[axis] == length]
