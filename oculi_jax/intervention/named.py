"""The interventions that researchers name, each a small pytree that lowers to `Edit`s.

Layers, heads and neurons count from 0. Positions count real tokens and may be negative, from the last one. Index fields take a
set too: a list, a tuple or a range, all of it in one run. Every field carries the axes of a `sweep` in front of its own. Float
fields are differentiable.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from ..pytrees import pytree
from ..sites import SITES
from .each import PerLayer
from .edit import Edit, is_per_layer, site_shaped
from .fields import Capture, Strength, Table, Values, Vector, field
from .indices import Head, Index, Last, Layer, Positions

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..models.decoder.config import DecoderConfig

# Letter → size of this run, T and S among them.
Sizes = Mapping[str, int]


def _chosen(index: Any, size: int) -> Array:
    """bool `[size]`: the place or the places that an index means."""
    index = jnp.asarray(index)
    return index if index.dtype == bool else jnp.arange(size) == index


def at(site: str, sizes: Sizes, *, head: object = None, positions: object = None, last: object = None) -> Array | bool:
    """A mask on the site's axes: some of its heads, of its tokens, of its last axis."""
    axes = SITES[site].axes
    mask: Any = True
    for axis, index in ((0, head), (axes.index("T"), positions), (len(axes) - 1, last)):
        if index is not None:
            chosen = _chosen(index, sizes[axes[axis]])
            mask = mask & chosen.reshape(*(-1 if axis == i else 1 for i in range(len(axes))))
    return mask


def refuse_table(site: str) -> None:
    if site == "allowed":
        raise ValueError("'allowed' is a table of yes and no: it has no directions. AttentionKnockout forbids an edge.")


@pytree
class HeadAblation:
    """Replaces the output `z` of a head, or of several: by zero, or by `replacement`.

    Args:
        layer: from 0, or a set.
        head: query head, from 0, or a set.
        replacement: what `z` becomes: a number, or `[D]` (a mean over a data set, for instance). A `PerLayer` of `[L, D]`, or
            of `[L, H, D]`, each head its own. (A value for each token is an `ActivationPatch`.)

    Examples:
        >>> alone = forward(model, ids, HeadAblation(2, [4, 5]), capture="z")
        >>> alone["z"][2].any(axis=(1, 2))  # which heads still give something
        Array([ True,  True,  True,  True, False, False], dtype=bool)
    """

    layer: Any = field(Layer())
    head: Any = field(Index("H"))
    replacement: Any = field(Vector("z", fixed=True, heads=True), default=0.0)

    @classmethod
    def grid(cls, config: DecoderConfig, replacement: ArrayLike = 0.0) -> HeadAblation:
        """Every head of a config, else TypeError, for `sweep`: axes `[L, H]`. A mean of each, `PerLayer` of `[L, H, D]`, is shared.

        Examples:
            >>> sweep(model, ids, HeadAblation.grid(model.config), metric).shape
            (4, 6)
        """
        if not hasattr(config, "num_hidden_layers") or not hasattr(config, "num_attention_heads"):
            raise TypeError(
                f"HeadAblation.grid takes a model's config, and was given a {type(config).__name__}: model.config."
            )
        layers, heads = np.arange(config.num_hidden_layers), np.arange(config.num_attention_heads)
        return cls(layers[:, None], heads[None, :], replacement)

    def edits(self, sizes: Sizes) -> tuple[Edit, ...]:
        value = self.replacement
        if is_per_layer(value):
            x = jnp.asarray(value.x)
            value = PerLayer(x[:, :, None, :] if x.ndim == 3 else x[:, None, None, :])
        return (Edit("z", "set", self.layer, at("z", sizes, head=self.head), value),)


@site_shaped
def _blend(x: Array, value: tuple[Array, Array]) -> Array:
    keep, other = value
    return keep * x + (1.0 - keep) * other


@pytree
class Blend:
    """Many heads, neurons or whole components at once, as one table: `x ← keep · x + (1 − keep) · other`.

    Args:
        site: static.
        keep: `[L, n]`, n the site's heads where it has heads (`z`: `[L, H]`), else its last axis (`act`: neurons) or 1 (a whole
            component); `[1, n]` for a site outside the layers. 1 (or True) stays, 0 is replaced; values between mix, so the
            table has a gradient (Michel, Levy and Neubig 2019, arXiv:1905.10650).
        other: a number; an array of the site's axes; another run's capture, or a mean, as `PerLayer`.

    Examples:
        >>> keep = np.ones((4, 6))
        >>> keep[2, [4, 5]] = 0  # what HeadAblation(2, [4, 5]) does; a sweep takes many such tables, [N, 4, 6]
        >>> absent = forward(model, ids, HeadAblation(2, [4, 5]))
        >>> np.allclose(forward(model, ids, Blend("z", keep)).logits, absent.logits, atol=1e-3)
        True
    """

    site: str = field(None)
    keep: Any = field(Table())
    other: Any = field(Values(), default=0.0)

    def check(self) -> None:
        """Raises ValueError where the site cannot be mixed."""
        refuse_table(self.site)

    def edits(self, sizes: Sizes) -> tuple[Edit, ...]:
        site, keep = SITES[self.site], jnp.asarray(self.keep)
        n = len(site.axes)
        shape = (keep.shape[1], *(1,) * (n - 1)) if site.head_axis else (*(1,) * (n - 1), keep.shape[1])
        keep = keep.reshape(keep.shape[0], *shape)
        layers, keep = (np.ones(sizes["L"], bool), PerLayer(keep)) if site.layered else (None, keep[0])
        return (Edit(self.site, "apply", layers, True, (keep, self.other), _blend),)


@pytree
class Freeze:
    """Holds sites to what another run had there: attention patterns, norms' scales, whole components.

    Args:
        run: the `Output` of a run that captured these sites in all layers, or its `activations`; of a prompt as long.
        sites: names, one or several; static.
        layers: where it acts, a layer or a set; None for all. Sites outside the layers take None alone.

    Examples:
        >>> says(forward(model, ids, Freeze(run, "pattern"))), says(forward(model, ids, Freeze(run, "mlp_out")))
        ('Rome', 'Paris')
    """

    run: Any = field(Capture())
    sites: tuple[str, ...] = field(None)
    layers: Any = field(Layer(optional=True), default=None)

    def __post_init__(self) -> None:
        if isinstance(self.sites, str | list):  # hashable, since it is a part of the program
            object.__setattr__(self, "sites", (self.sites,) if isinstance(self.sites, str) else tuple(self.sites))

    def check(self) -> None:
        """Raises ValueError or TypeError where there is nothing to hold, or where `layers` says nothing about a site."""
        if not isinstance(self.sites, tuple) or not all(isinstance(name, str) for name in self.sites):
            raise TypeError(f"sites is {self.sites!r}, and a site name or several are needed.")
        if not self.sites:
            raise ValueError("sites is empty; name at least one, such as 'pattern'.")
        outside = [name for name in self.sites if name in SITES and not SITES[name].layered]
        if outside and self.layers is not None:
            raise ValueError(
                f"layers is given, and {', '.join(outside)} occurs once, outside the layers: freeze it by itself."
            )

    def edits(self, sizes: Sizes) -> tuple[Edit, ...]:
        return tuple(Edit(name, "set", self.layers, True, self.run[name]) for name in self.sites)


@pytree
class QScaler:
    """Scales the rotated queries of one head: `q ← α q`.

    Args:
        layer: from 0, or a set.
        head: query head, from 0, or a set.
        alpha: any finite number; 1 changes nothing.

    Examples:
        >>> flat = forward(model, ids, QScaler(2, 0, alpha=0.0), capture="pattern")
        >>> flat["pattern"][2, 0, -1].round(2)
        Array([0.17, 0.17, 0.17, 0.17, 0.17, 0.17], dtype=float32)
    """

    layer: Any = field(Layer())
    head: Any = field(Index("H"))
    alpha: Any = field(Strength())

    def edits(self, sizes: Sizes) -> tuple[Edit, ...]:
        return (Edit("q", "scale", self.layer, at("q", sizes, head=self.head), self.alpha),)


@pytree
class KScaler:
    """Scales the rotated keys of one key/value head, `k ← α k`: for all the query heads that read it.

    Args:
        layer: from 0, or a set.
        kv_head: key/value head, from 0 to K − 1, or a set.
        alpha: any finite number; 1 changes nothing.

    Examples:
        >>> flat = forward(model, ids, KScaler(2, 0, alpha=0.0), capture="pattern")
        >>> flat["pattern"][2, :3, -1, 0].round(2)  # of the three heads that read these keys
        Array([0.17, 0.17, 0.17], dtype=float32)
    """

    layer: Any = field(Layer())
    kv_head: Any = field(Index("K"))
    alpha: Any = field(Strength())

    def edits(self, sizes: Sizes) -> tuple[Edit, ...]:
        return (Edit("k", "scale", self.layer, at("k", sizes, head=self.kv_head), self.alpha),)


@pytree
class SpectraScaler:
    """Sharpens (`alpha` > 1) or flattens (< 1) one head's attention: its scores are multiplied by `alpha`.

    Heads that share its keys under grouped-query attention do not move.

    Args:
        layer: from 0, or a set.
        head: query head, from 0, or a set.
        alpha: above 0; 1 changes nothing.

    Examples:
        >>> flatter = forward(model, ids, SpectraScaler(2, 0, alpha=0.25), capture="pattern")
        >>> [f"{pattern[2, 0, -1].max():.2f}" for pattern in (capture.attention.patterns, flatter["pattern"])]
        ['1.00', '0.70']
    """

    layer: Any = field(Layer())
    head: Any = field(Index("H"))
    alpha: Any = field(Strength(positive=True))

    def edits(self, sizes: Sizes) -> tuple[Edit, ...]:
        return (Edit("scores", "scale", self.layer, at("scores", sizes, head=self.head), self.alpha),)


@pytree
class ActivationPatch:
    """Puts another run's activation in place (Vig et al. 2020, arXiv:2004.12265).

    Args:
        site: a name of the site table; static.
        layer: from 0, or a set; None for a site outside the layers.
        value: of the site's axes, each whole or 1, without the head axis where `head` is given; or a number. A `PerLayer` is a
            whole run's capture as it is: the row of the layer, and of the head, is taken inside the program.
        head: one entry of the site's head axis (`K` for k and v), or a set; None for all.
        positions: which tokens are patched: an integer, a set, or a bool mask `[T]`; None for all. They only mask:
            `value` keeps its token axis.
        index: which of the site's last axis (a neuron of `act`, a dimension of a stream): from 0, or a set; None for all. It
            only masks.

    Examples:
        >>> patch = ActivationPatch("resid_pre", 2, PerLayer(run["resid_pre"]), positions=4)  # France for Italy
        >>> says(forward(model, ids, patch))
        'Paris'
    """

    site: str = field(None)
    layer: Any = field(Layer(site="site"))
    value: Any = field(Values(head="head"))
    head: Any = field(Head(), default=None)
    positions: Any = field(Positions(optional=True), default=None)
    index: Any = field(Last(), default=None)

    def edits(self, sizes: Sizes) -> tuple[Edit, ...]:
        value = self.value
        if self.head is not None and not is_per_layer(value) and jnp.ndim(value):
            value = jnp.asarray(value)[None]  # room for the head axis
        mask = at(self.site, sizes, head=self.head, positions=self.positions, last=self.index)
        return (Edit(self.site, "set", self.layer, mask, value),)


@site_shaped
def _add(x: Array, value: tuple[Array, Array]) -> Array:
    vector, scale = value
    return x + scale * vector


@pytree
class Steer:
    """Adds a direction: `x ← x + scale · vector` (Turner et al. 2023, arXiv:2308.10248).

    Args:
        layer: from 0, or a set; None for a site outside the layers.
        vector: over the site's last axis (`[E]` for the residual stream); a direction for each layer is a `PerLayer` of `[L, E]`.
            (One for each token is an `Edit` with `op="add"`.)
        scale: strength.
        site: static.
        positions: which tokens; None for all.

    Examples:
        >>> direction = model.lm_head.weight[paris] - model.lm_head.weight[rome]
        >>> says(forward(model, ids, Steer(3, direction, scale=20.0)))
        'Paris'
    """

    layer: Any = field(Layer(site="site"))
    vector: Any = field(Vector())
    scale: Any = field(Strength(), default=1.0)
    site: str = field(None, default="resid_pre")
    positions: Any = field(Positions(optional=True), default=None)

    def check(self) -> None:
        """Raises ValueError where the site cannot be added to."""
        refuse_table(self.site)

    def edits(self, sizes: Sizes) -> tuple[Edit, ...]:
        mask = at(self.site, sizes, positions=self.positions)
        return (Edit(self.site, "apply", self.layer, mask, (rows_of(self.vector, self.site), self.scale), _add),)


@site_shaped
def _project_out(x: Array, direction: Array) -> Array:
    length = (direction * direction).sum(axis=-1, keepdims=True)
    along = (x * direction).sum(axis=-1, keepdims=True) / length.clip(
        min=1e-37
    )  # a direction of zeros takes nothing away
    return x - along * direction


@pytree
class DirectionAblation:
    """Removes the component along a direction, d̂ of unit length: `x ← x − (x · d̂) d̂` (Arditi et al. 2024, arXiv:2406.11717).

    Args:
        site: static.
        layer: from 0, or a set; None for a site outside the layers.
        direction: over the site's last axis, of any length but zero; one for each layer is a `PerLayer` of `[L, E]`.
        positions: which tokens; None for all.

    Examples:
        >>> direction = model.lm_head.weight[rome]
        >>> out = forward(model, ids, DirectionAblation("resid_post", 3, direction), capture="resid_post")
        >>> np.allclose(out["resid_post"][3] @ direction, 0.0, atol=1e-3)
        True
    """

    site: str = field(None)
    layer: Any = field(Layer(site="site"))
    direction: Any = field(Vector(nonzero=True))
    positions: Any = field(Positions(optional=True), default=None)

    def check(self) -> None:
        """Raises ValueError where the site has no directions."""
        refuse_table(self.site)

    def edits(self, sizes: Sizes) -> tuple[Edit, ...]:
        mask = at(self.site, sizes, positions=self.positions)
        return (Edit(self.site, "apply", self.layer, mask, rows_of(self.direction, self.site), _project_out),)


def rows_of(vector: object, site: str) -> Any:
    """A vector over a site's last axis; of a `PerLayer`, with the site's other axes as ones after `L`."""
    if not is_per_layer(vector):
        return vector
    x = jnp.asarray(vector.x)
    return PerLayer(x.reshape(x.shape[0], *(1,) * (len(SITES[site].axes) - 1), x.shape[-1]))


@pytree
class AttentionKnockout:
    """Forbids a head to look from `query` at `key`; the rest of the row renormalises (Geva et al. 2023, arXiv:2304.14767).

    It edits which keys are allowed, not the scores; a row with nothing left is zero. `query` and `key` are positions: an
    integer, or a set: every edge between the two.

    Args:
        layer: from 0, or a set.
        head: query head, from 0, or a set.
        query, key: who may not look, and at whom.

    Examples:
        >>> everywhere = AttentionKnockout(range(4), range(6), query=-1, key=4)  # the last token no longer sees Italy
        >>> says(forward(model, ids, everywhere))
        'Apia'
    """

    layer: Any = field(Layer())
    head: Any = field(Index("H"))
    query: Any = field(Positions())
    key: Any = field(Positions())

    def edits(self, sizes: Sizes) -> tuple[Edit, ...]:
        edge = jnp.asarray(self.query)[:, None] & jnp.asarray(self.key)[None, :]
        mask = at("allowed", sizes, head=self.head) & edge[None]
        return (Edit("allowed", "set", self.layer, mask, False),)


@pytree
class Ablation:
    """Sets a whole component to zero, or some of the site's last axis (a neuron of `act`, a dimension of a stream).

    Args:
        site: static.
        layer: from 0, or a set; None for a site outside the layers.
        index: from 0, or a set; None for everything.

    Examples:
        >>> says(forward(model, ids, Ablation("mlp_out", 0))), says(forward(model, ids, Ablation("mlp_out", 3)))
        ('warm', 'Rome')
    """

    site: str = field(None)
    layer: Any = field(Layer(site="site"))
    index: Any = field(Last(), default=None)

    def edits(self, sizes: Sizes) -> tuple[Edit, ...]:
        return (Edit(self.site, "set", self.layer, at(self.site, sizes, last=self.index), 0.0),)
