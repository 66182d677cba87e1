"""`Edit`, the one primitive of intervention, and what it does to a site's value at a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from .fields import Anything, Index, Mask, Values, field, owner_site, pytree

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
            program. Rows of the last axis that `mask` leaves alone are constants to it: an `fn` that mixes rows gets no
            gradient through those.
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


def apply_edit(edit: Edit, x: Array, layer: Int[Array, ""] | None, real: Bool[Array, "T"] | None) -> Array:
    """The value of a site after one edit.

    Args:
        edit: in canonical form.
        x: the site's value at this layer.
        layer: the layer that runs; None for a site outside the layers.
        real: True at real tokens; padding is never edited, so that nothing of it can reach them. None where all are.
    """
    mask, value = edit.mask, edit.value
    here: Bool[Array, ""] | None = None
    if layer is not None:
        if edit.layer is None:
            mask, value = jax.tree.map(lambda leaf: leaf[layer] if jnp.ndim(leaf) else leaf, (mask, value))
        else:
            here = layer == edit.layer
    chosen = jnp.asarray(mask)
    if here is not None:
        chosen = chosen & here
    chosen = _broadcast(chosen, x)
    if real is not None:
        axes = owner_site(edit).axes
        keys = _broadcast(real, x) if "S" in axes else True
        real = _broadcast(real.reshape(-1, *(1,) * (len(axes) - 1 - axes.index("T"))), x) & keys
        chosen = chosen & real
    if edit.op == "apply":
        assert edit.fn is not None
        # Where the edit is off, nothing may flow back through fn: its derivative there may be infinite.
        x_in = _only_if(jnp.any(chosen, axis=-1, keepdims=True), x)
        if real is not None:  # z of padding is exactly zero, where a norm or a logarithm has no derivative
            x_in = jnp.where(real, x_in, jnp.ones_like(x_in))
        if here is not None:
            value = jax.tree.map(lambda leaf: _only_if(here, leaf), value)
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
