"""The interventions that researchers name, each a small pytree that lowers to `Edit`s.

Layers, heads and neurons count from 0. Positions count real tokens and may be negative, from the last one. Index and
strength fields are scalars in one run, and carry the axes of a `sweep`. Float fields are differentiable.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from ..pytrees import pytree
from ..sites import SITES
from .edit import Edit, site_shaped
from .fields import Direction, Index, Positions, Strength, Table, Values, field

if TYPE_CHECKING:
    from ..models.llama.config import LlamaConfig

# Letter → size of this run, T and S among them.
Sizes = Mapping[str, int]


def _at(site: str, sizes: Sizes, *, head: Any = None, positions: Any = None) -> Array | bool:
    """A mask on the site's axes: one entry of its head axis, some of its token axis."""
    axes = SITES[site].axes
    mask: Any = True
    if head is not None:
        chosen = jnp.arange(sizes[axes[0]]) == head
        mask = chosen.reshape(-1, *(1,) * (len(axes) - 1))
    if positions is not None:
        along = jnp.asarray(positions)
        along = along.reshape(-1, *(1,) * (len(axes) - 1 - axes.index("T")))
        mask = along if mask is True else mask & along[None]
    return mask


def _refuse_table(site: str) -> None:
    if site == "allowed":
        raise ValueError("'allowed' is a table of yes and no: it has no directions. AttentionKnockout forbids an edge.")


def _with_head(value: Any, site: str) -> Array:
    """Room for the head axis in a value that leaves it out: one of rank `[T, D]`, `[L, T, D]`; a whole capture has it."""
    value, rank = jnp.asarray(value), len(SITES[site].axes)
    return value[..., None, :, :] if rank - 1 <= value.ndim <= rank else value


@pytree
class HeadAblation:
    """Replaces the output `z` of one head: by zero, or by `replacement`.

    Args:
        layer: from 0.
        head: query head, from 0.
        replacement: what `z` becomes: a scalar, `[D]` (a mean over a data set, for instance) or `[T, D]`; it may lead
            with `L`, and then its row of `layer` is taken.
    """

    layer: Any = field(Index("L"))
    head: Any = field(Index("H"))
    replacement: Any = field(Values("z"), default=0.0)

    @classmethod
    def grid(cls, config: LlamaConfig, replacement: Any = 0.0) -> HeadAblation:
        """Every head of a model, for `sweep`: axes `[L, H]`. A capture's mean `[L, H, 1, D]` replaces each by its own."""
        if not hasattr(config, "num_hidden_layers") or not hasattr(config, "num_attention_heads"):
            raise TypeError(
                f"HeadAblation.grid takes a model's config, and was given a {type(config).__name__}: model.config."
            )
        layers, heads = np.arange(config.num_hidden_layers), np.arange(config.num_attention_heads)
        return cls(layers[:, None], heads[None, :], replacement)

    def edits(self, sizes: Sizes) -> tuple[Edit, ...]:
        value = _with_head(self.replacement, "z")
        return (Edit("z", "set", self.layer, _at("z", sizes, head=self.head), value),)


@site_shaped
def _blend(z: Array, value: tuple[Array, Array]) -> Array:
    keep, replacement = value
    return keep * z + (1.0 - keep) * replacement


@pytree
class HeadMask:
    """Many heads at once, as one table: `z ← keep · z + (1 − keep) · replacement`.

    Args:
        keep: `[L, H]`, 1 (or True) for heads that stay, 0 for heads that are replaced; values between mix, so the table
            has a gradient (Michel, Levy and Neubig 2019, arXiv:1905.10650).
        replacement: a scalar, or an array that leads with `L` and then broadcasts to `[H, T, D]`: `[L, H, 1, D]` for a
            mean per head.
    """

    keep: Any = field(Table("LH"))
    replacement: Any = field(Values("z"), default=0.0)

    def edits(self, sizes: Sizes) -> tuple[Edit, ...]:
        keep = jnp.asarray(self.keep)[:, :, None, None]
        replacement = jnp.asarray(self.replacement)
        if replacement.ndim:  # a row of the right rank for every layer
            replacement = replacement.reshape(-1, *(1,) * (4 - replacement.ndim), *replacement.shape[1:])
        else:
            replacement = jnp.broadcast_to(replacement, (sizes["L"], 1, 1, 1))
        return (Edit("z", "apply", None, True, (keep, replacement), _blend),)


@pytree
class QScaler:
    """Scales the rotated queries of one head: `q ← α q`.

    Args:
        layer: from 0.
        head: query head, from 0.
        alpha: any finite number; 1 changes nothing.
    """

    layer: Any = field(Index("L"))
    head: Any = field(Index("H"))
    alpha: Any = field(Strength())

    def edits(self, sizes: Sizes) -> tuple[Edit, ...]:
        return (Edit("q", "scale", self.layer, _at("q", sizes, head=self.head), self.alpha),)


@pytree
class KScaler:
    """Scales the rotated keys of one key/value head, `k ← α k`: for all the query heads that read it.

    Args:
        layer: from 0.
        kv_head: key/value head, from 0 to K − 1.
        alpha: any finite number; 1 changes nothing.
    """

    layer: Any = field(Index("L"))
    kv_head: Any = field(Index("K"))
    alpha: Any = field(Strength())

    def edits(self, sizes: Sizes) -> tuple[Edit, ...]:
        return (Edit("k", "scale", self.layer, _at("k", sizes, head=self.kv_head), self.alpha),)


@pytree
class SpectraScaler:
    """Sharpens (`alpha` > 1) or flattens (< 1) one head's attention: its scores are multiplied by `alpha`.

    Heads that share its keys under grouped-query attention do not move.

    Args:
        layer: from 0.
        head: query head, from 0.
        alpha: above 0; 1 changes nothing.
    """

    layer: Any = field(Index("L"))
    head: Any = field(Index("H"))
    alpha: Any = field(Strength(positive=True))

    def edits(self, sizes: Sizes) -> tuple[Edit, ...]:
        return (Edit("scores", "scale", self.layer, _at("scores", sizes, head=self.head), self.alpha),)


@pytree
class ActivationPatch:
    """Puts another run's activation in place.

    Args:
        site: a name of the site table; static.
        layer: from 0; None for a site outside the layers.
        value: broadcasts to the site's axes, without the head axis where `head` is given. It may lead with `L`, as a
            whole run's capture does: the row of `layer` is taken inside the program.
        head: one entry of the site's head axis (`K` for k and v); None for all.
        positions: which tokens are patched: an integer, a list, or a bool mask `[T]`; None for all. They only mask:
            `value` keeps its token axis.
    """

    site: str = field(None)
    layer: Any = field(Index("L"))
    value: Any = field(Values())
    head: Any = field(Index("head", optional=True), default=None)
    positions: Any = field(Positions(optional=True), default=None)

    def edits(self, sizes: Sizes) -> tuple[Edit, ...]:
        value = self.value if self.head is None else _with_head(self.value, self.site)
        mask = _at(self.site, sizes, head=self.head, positions=self.positions)
        return (Edit(self.site, "set", self.layer, mask, value),)


@pytree
class Steer:
    """Adds a direction: `x ← x + scale · vector`.

    Args:
        layer: from 0; None for a site outside the layers.
        vector: broadcasts to the site's axes (`[E]` for the residual stream); it may lead with `L`.
        scale: strength.
        site: static.
        positions: which tokens; None for all.
    """

    layer: Any = field(Index("L"))
    vector: Any = field(Values())
    scale: Any = field(Strength(), default=1.0)
    site: str = field(None, default="resid_pre")
    positions: Any = field(Positions(optional=True), default=None)

    def check(self) -> None:
        """Raises ValueError where the site cannot be added to."""
        _refuse_table(self.site)

    def edits(self, sizes: Sizes) -> tuple[Edit, ...]:
        vector = jnp.asarray(self.vector)
        if vector.ndim > len(SITES[self.site].axes):  # the layer's row, before each variant has its own strength
            vector = vector[self.layer]
        value = vector.astype(jnp.float32) * self.scale
        return (Edit(self.site, "add", self.layer, _at(self.site, sizes, positions=self.positions), value),)


@site_shaped
def _project_out(x: Array, direction: Array) -> Array:
    length = (direction * direction).sum(axis=-1, keepdims=True)
    along = (x * direction).sum(axis=-1, keepdims=True) / length.clip(
        min=1e-37
    )  # a direction of zeros takes nothing away
    return x - along * direction


@pytree
class DirectionAblation:
    """Removes the component along a direction: `x ← x − (x · d̂) d̂` over the site's last axis, d̂ of unit length.

    Args:
        site: static.
        layer: from 0; None for a site outside the layers.
        direction: broadcasts to the site's axes, of any length but zero; it may lead with `L`.
        positions: which tokens; None for all.
    """

    site: str = field(None)
    layer: Any = field(Index("L"))
    direction: Any = field(Direction())
    positions: Any = field(Positions(optional=True), default=None)

    def check(self) -> None:
        """Raises ValueError where the site has no directions."""
        _refuse_table(self.site)

    def edits(self, sizes: Sizes) -> tuple[Edit, ...]:
        mask = _at(self.site, sizes, positions=self.positions)
        return (Edit(self.site, "apply", self.layer, mask, self.direction, _project_out),)


@pytree
class AttentionKnockout:
    """Forbids a head to look from `query` at `key`; the rest of the row renormalises (Geva et al. 2023, arXiv:2304.14767).

    It edits which keys are allowed, not the scores; a row with nothing left is zero. `query` and `key` are positions: an
    integer, or a list for every edge between two sets.

    Args:
        layer: from 0.
        head: query head, from 0.
        query, key: who may not look, and at whom.
    """

    layer: Any = field(Index("L"))
    head: Any = field(Index("H"))
    query: Any = field(Positions())
    key: Any = field(Positions())

    def edits(self, sizes: Sizes) -> tuple[Edit, ...]:
        edge = jnp.asarray(self.query)[:, None] & jnp.asarray(self.key)[None, :]
        mask = _at("allowed", sizes, head=self.head) & edge[None]
        return (Edit("allowed", "set", self.layer, mask, False),)


@pytree
class Ablation:
    """Sets a whole component to zero, or one index of the site's last axis (a neuron of `act`, a dimension of a stream).

    Args:
        site: static.
        layer: from 0; None for a site outside the layers.
        index: from 0; None for everything.
    """

    site: str = field(None)
    layer: Any = field(Index("L"))
    index: Any = field(Index("last", optional=True), default=None)

    def edits(self, sizes: Sizes) -> tuple[Edit, ...]:
        mask: Any = True
        if self.index is not None:
            axes = SITES[self.site].axes
            mask = (jnp.arange(sizes[axes[-1]]) == self.index).reshape(*(1,) * (len(axes) - 1), -1)
        return (Edit(self.site, "set", self.layer, mask, 0.0),)
