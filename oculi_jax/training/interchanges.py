"""Pairs of prompts, one of which gives the other its values at one token: read once, then run from their layer on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from ..arrays import AnyArray, as_array, integer, listing
from ..backends import check_model
from ..intervention import Basis, Layer, Positions, Values, field
from ..intervention.each import Whole
from ..intervention.edit import Edit
from ..intervention.named import Sizes, at
from ..intervention.subspace import interchange
from ..prompts import check_prompts
from ..pytrees import pytree
from ..sites import SITES, site_of
from .running import captured, likeliest, logits_from

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..intervention.protocol import Intervention
    from ..models.decoder.model import Decoder


@pytree
class Weighted:
    """A `Subspace` whose dimensions are each taken with a weight of its own: h + (source − h) B diag(weights) Bᵀ.

    `basis` is B, orthonormal, and `weighted` is B diag(weights).
    """

    site: str = field(None)
    layer: Any = field(Layer(site="site"))
    basis: Any = field(Basis())
    weighted: Any = field(Basis())
    source: Any = field(Values())
    positions: Any = field(Positions(optional=True), default=None)

    def edits(self, sizes: Sizes) -> tuple[Edit, ...]:
        mask = at(self.site, sizes, positions=self.positions)
        value = Whole(jnp.asarray(self.weighted)), Whole(jnp.asarray(self.basis)), self.source
        return (Edit(self.site, "apply", self.layer, mask, value, interchange),)


class Where(NamedTuple):
    """Where an interchange is, and what is put there.

    Attributes:
        source: of the site's axes, of one token.
        position: in the base prompt.
    """

    site: str
    layer: int
    source: Array
    position: Any


@dataclass(frozen=True)
class Pairs:
    """Pairs as they are at a layer.

    Attributes:
        tokens, mask: `[B, T]` of the base prompts.
        positions: the P places that are looked at, in the base prompts.
        resid: `[B, T, E]`, the stream that enters the layer.
        source: `[B, …]`, of the site's axes, whose tokens are the P places.
        labels: `[B]`.
        width: how long the site's last axis is.
    """

    model: Decoder
    site: str
    layer: int
    positions: tuple[int, ...]
    tokens: Int[AnyArray, "B T"]
    mask: Bool[AnyArray, "B T"] | None
    resid: Float[AnyArray, "B T E"]
    source: Float[AnyArray, "B ..."]
    labels: Int[np.ndarray, "B"]
    width: int

    def examples(self, rows: Int[np.ndarray, "N"]) -> dict[str, Any]:
        """Some pairs as the examples of a fit."""
        every = {
            "tokens": self.tokens,
            "mask": self.mask,
            "resid": self.resid,
            "source": self.source,
            "label": self.labels,
        }
        return jax.tree.map(lambda x: jnp.asarray(x[rows]), every)

    def values(self, rows: Int[np.ndarray, "N"], place: int) -> Float[np.ndarray, "N n"]:
        """What the source prompts of some pairs hold at a place; of a site with heads, each head's."""
        taken = np.take(np.asarray(self.source)[rows], place, axis=1 + SITES[self.site].axes.index("T"))
        return taken.reshape(-1, self.width)


def where_of(site: str, layer: int, positions: tuple[int, ...], source: Array, place: Array | int) -> Where:
    """The interchange of one pair at a place, which may be data.

    Args:
        source: what `Pairs.examples` has as that of one pair.
    """
    if len(positions) == 1:
        return Where(site, layer, source, positions[0])
    taken = jax.lax.dynamic_index_in_dim(source, place, SITES[site].axes.index("T"), keepdims=True)
    return Where(site, layer, taken, jnp.asarray(positions)[place])


def prepare(
    model: Decoder,
    base: ArrayLike,
    source: ArrayLike,
    labels: ArrayLike,
    layers: int | Sequence[int],
    site: str,
    positions: int | Sequence[int],
    source_positions: int | Sequence[int] | None,
    masks: Sequence[ArrayLike | None],
) -> list[Pairs]:
    """Checks what is given to an alignment search, and runs the prompts once: pairs at each of the layers."""
    config = check_model(model)
    found = site_of(site, config.sites)
    if not found.layered or found.axes[-1] in "TS":
        why = "its last axis is tokens" if found.layered else "it lies outside the layers"
        raise ValueError(f"site is {site!r}, and a site of the layers whose last axis holds features is needed: {why}.")
    (tokens, mask, one), (spoilt, other_mask, _) = (
        check_prompts(config, ids, mask, names)
        for ids, mask, names in zip((base, source), masks, (("base", "mask"), ("source", "source_mask")), strict=True)
    )
    ids = as_array(labels)
    if one or len(tokens) != len(spoilt) or ids.shape != (len(tokens),):
        raise ValueError(
            f"base has shape {listing(np.shape(tokens))}, source {listing(np.shape(spoilt))} and labels {listing(ids.shape)}: "
            "[B, T], [B, S] and [B] are needed, one of each to a pair."
        )
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(
            f"labels has dtype {ids.dtype}, and token ids are needed: of each answer the token that comes first after the prompt."
        )
    if (np.asarray(ids) < 0).any() or (np.asarray(ids) >= config.vocab_size).any():
        raise ValueError(f"labels holds what is no token id of this model: they are 0 to {config.vocab_size - 1}.")
    chosen = _several(layers, "layers", 0, config.num_hidden_layers - 1)
    places = _several(positions, "positions", *_ends(tokens, mask))
    ends = _ends(spoilt, other_mask)
    if source_positions is None:
        others = _several(places, "positions (of the source prompts too, since source_positions is None)", *ends)
    else:
        others = _several(source_positions, "source_positions", *ends, distinct=False)
    if len(others) != len(places):
        raise ValueError(
            f"positions are {listing(places)} and source_positions {listing(others)}: one of these to each of those is needed."
        )
    taken = _read(model, spoilt, other_mask, site, chosen, others)
    resid = _read(model, tokens, mask, "resid_pre", chosen, None)
    width, wanted = config.sizes[found.axes[-1]], np.asarray(ids, np.int32)
    return [
        Pairs(model, site, layer, places, tokens, mask, own, other, wanted, width)
        for layer, own, other in zip(chosen, resid, taken, strict=True)
    ]


def _ends(tokens: AnyArray, mask: AnyArray | None) -> tuple[int, int]:
    """Which positions every prompt has."""
    shortest = tokens.shape[1] if mask is None else int(np.asarray(mask).sum(axis=1).min())
    return -shortest, shortest - 1


def _several(
    given: int | Sequence[int], what: str, low: int | None = None, high: int | None = None, *, distinct: bool = True
) -> tuple[int, ...]:
    """One integer, or a list, a tuple or a range of them."""
    if given is None:
        raise TypeError(f"{what} is None, and one integer or several are needed, such as 3, [0, 3] or range(4).")
    every = tuple(given) if isinstance(given, list | tuple | range) else (given,)
    found = tuple(integer(x, what, low, high) for x in every)
    if not found:
        raise ValueError(f"{what} is empty.")
    if distinct and len(set(found)) < len(found):
        raise ValueError(f"{what} holds {listing(found)}: each once is enough.")
    return found


def _read(
    model: Decoder,
    tokens: AnyArray,
    mask: AnyArray | None,
    site: str,
    layers: tuple[int, ...],
    positions: tuple[int, ...] | None,
) -> list[np.ndarray]:
    """What a site holds at each layer, of each prompt `[B, …]`; on the host."""
    once = None if positions is None else tuple(dict.fromkeys(positions))
    found = np.asarray(captured(model, tokens, mask, site, layers, once))
    if once is not None and once != positions:
        assert positions is not None
        rows = [once.index(x) for x in positions]
        found = np.take(found, rows, axis=2 + SITES[site].axes.index("T"))
    return [found[:, i] for i in range(len(layers))]


def surprise(
    model: Decoder, there: Intervention, layer: int, example: dict[str, Any], shuffled: Array
) -> Float[Array, ""]:
    """−log p of the label, or of another pair's, in nats."""
    logits = logits_from(model, there, layer, example)
    label = jnp.where(shuffled > 0, example["shuffled"], example["label"])
    return jax.nn.logsumexp(logits) - logits[label]


def hits(
    pairs: Pairs,
    bases: Sequence[Float[np.ndarray, "n r"]],
    places: Sequence[int],
    rows: Int[np.ndarray, "M"],
    labels: Sequence[Int[np.ndarray, "B"]] | None = None,
) -> Float[np.ndarray, "R M"]:
    """Of each subspace and pair 1 where the likeliest token under interchange is the label, else 0.

    Args:
        bases: orthonormal, of any ranks.
        places: where each is.
        rows: which pairs.
        labels: of each subspace; the pairs' own for None.
    """
    widest = max(basis.shape[1] for basis in bases)
    given = np.stack([np.pad(basis, ((0, 0), (0, widest - basis.shape[1]))) for basis in bases]).astype(np.float32)
    at = np.asarray(places, np.int32)
    there = _Weighted(pairs.site, pairs.layer, pairs.positions)
    said = likeliest(pairs.model, (given, at), pairs.examples(rows), there, pairs.layer)
    want = [pairs.labels] * len(bases) if labels is None else labels
    return (np.asarray(said) == np.stack([label[rows] for label in want])).astype(np.float32)


@dataclass(frozen=True)
class _Weighted:
    """The interchange of a pair in a subspace `[n, r]` at a place."""

    site: str
    layer: int
    positions: tuple[int, ...]

    def __call__(self, own: tuple[AnyArray, AnyArray], example: dict[str, Any]) -> Intervention:
        basis, place = own
        where = where_of(self.site, self.layer, self.positions, example["source"], jnp.asarray(place))
        return Weighted(where.site, where.layer, basis, basis, where.source, where.position)
