"""Pairs of prompts, one of which gives the other its values at one token: read once, then run from their layer on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from ..arrays import AnyArray, as_array, integer, listing
from ..backends import check_model
from ..backends.jax.compiled import compiled
from ..capture import CaptureSpec
from ..intervention import Basis, Layer, Positions, Subspace, Values, Vector, field
from ..intervention.each import Whole
from ..intervention.edit import Edit
from ..intervention.named import Sizes, at
from ..intervention.subspace import interchange
from ..prompts import check_prompts
from ..pytrees import pytree
from ..run import forward
from ..sites import site_of

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..intervention.protocol import Intervention
    from ..models.decoder.model import Decoder

_AT_ONCE = 16  # prompts


@pytree
class Weighted:
    """A `Subspace` of all dimensions, each taken with a weight of its own: h + (source − h) B diag(weights) Bᵀ."""

    site: str = field(None)
    layer: Any = field(Layer(site="site"))
    basis: Any = field(Basis())
    weights: Any = field(Vector())
    source: Any = field(Values())
    positions: Any = field(Positions(optional=True), default=None)

    def edits(self, sizes: Sizes) -> tuple[Edit, ...]:
        basis = jnp.linalg.qr(jnp.asarray(self.basis))[0]
        read = basis * jnp.asarray(self.weights).astype(basis.dtype)[None, :]
        mask = at(self.site, sizes, positions=self.positions)
        return (Edit(self.site, "apply", self.layer, mask, (Whole(read), Whole(basis), self.source), interchange),)


@dataclass(frozen=True)
class Pairs:
    """Pairs as they are at a layer.

    Attributes:
        tokens, mask: `[B, T]` of the base prompts.
        resid: `[B, T, E]`, the stream that enters the layer.
        source: of the site's axes after `B`, of one token.
        labels: `[B]`.
        width: how long the site's last axis is.
    """

    model: Decoder
    site: str
    layer: int
    position: int
    tokens: Int[AnyArray, "B T"]
    mask: Bool[AnyArray, "B T"] | None
    resid: Float[Array, "B T E"]
    source: Float[Array, "B ..."]
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
        return jax.tree.map(lambda x: jnp.asarray(x)[rows], every)


def prepare(
    model: Decoder,
    base: ArrayLike,
    source: ArrayLike,
    labels: ArrayLike,
    layer: int,
    site: str,
    position: int,
    source_position: int | None,
    masks: Sequence[ArrayLike | None],
) -> Pairs:
    """Checks what is given to an alignment search, and runs the prompts up to the layer."""
    config = check_model(model)
    found = site_of(site, config.sites)
    if not found.layered or found.axes[-1] in "TS":
        why = "its last axis is tokens" if found.layered else "it lies outside the layers"
        raise ValueError(f"site is {site!r}, and a site of the layers whose last axis holds features is needed: {why}.")
    layer = integer(layer, "layer", 0, config.num_hidden_layers - 1)
    position = integer(position, "position")
    other = position if source_position is None else integer(source_position, "source_position")
    (tokens, mask, one), (others, other_mask, _) = (
        check_prompts(config, ids, mask) for ids, mask in zip((base, source), masks, strict=True)
    )
    ids = as_array(labels)
    if one or len(tokens) != len(others) or ids.shape != (len(tokens),):
        raise ValueError(
            f"base has shape {listing(np.shape(tokens))}, source {listing(np.shape(others))} and labels {listing(ids.shape)}: "
            "[B, T], [B, S] and [B] are needed, one of each to a pair."
        )
    if (
        not jnp.issubdtype(ids.dtype, jnp.integer)
        or (np.asarray(ids) < 0).any()
        or (np.asarray(ids) >= config.vocab_size).any()
    ):
        raise ValueError(f"labels holds what is no token id of this model: they are 0 to {config.vocab_size - 1}.")
    taken = _read(model, others, other_mask, site, layer, (other,))
    resid = _read(model, tokens, mask, "resid_pre", layer, None)
    width = config.sizes[found.axes[-1]]
    return Pairs(model, site, layer, position, tokens, mask, resid, taken, np.asarray(ids, np.int32), width)


@compiled("site", "layer", "positions")
def _read(
    model: Decoder, tokens: AnyArray, mask: AnyArray | None, site: str, layer: int, positions: tuple[int, ...] | None
) -> Array:
    """What a site holds at a layer, of each prompt."""

    def one(prompt: tuple[Array, Array | None]) -> Array:
        spec = CaptureSpec(site, [layer], positions)
        return forward(model, prompt[0], capture=spec, mask=prompt[1], logits="none")[site][0]

    return jax.lax.map(one, (tokens, mask), batch_size=min(len(tokens), _AT_ONCE))


def last_logits(model: Decoder, there: Intervention, layer: int, example: dict[str, Any]) -> Float[Array, " V"]:
    """What a base prompt's run ends in, from its layer on."""
    start = layer, example["resid"]
    logits = forward(model, example["tokens"], there, mask=example["mask"], logits="last", start=start).logits
    assert logits is not None
    return logits


def surprise(
    model: Decoder, there: Intervention, layer: int, example: dict[str, Any], shuffled: Array
) -> Float[Array, ""]:
    """−log p of the label, or of another pair's, in nats."""
    logits = last_logits(model, there, layer, example)
    label = jnp.where(shuffled > 0, example["shuffled"], example["label"])
    return jax.nn.logsumexp(logits) - logits[label]


def hits(
    pairs: Pairs, basis: Float[Array, "n r"], rows: Int[np.ndarray, "M"], labels: Int[np.ndarray, "B"] | None = None
) -> Float[np.ndarray, "M"]:
    """1 where the likeliest token under interchange is the label (None: the pairs' own), else 0."""
    said = _likeliest(pairs.model, basis, pairs.examples(rows), pairs.site, pairs.layer, pairs.position)
    want = pairs.labels if labels is None else labels
    return (np.asarray(said) == want[rows]).astype(np.float32)


@compiled("site", "layer", "position")
def _likeliest(
    model: Decoder, basis: Array, examples: dict[str, Any], site: str, layer: int, position: int
) -> Int[Array, " M"]:
    def one(example: dict[str, Any]) -> Array:
        there: Any = Subspace(site, layer, basis, example["source"], position)
        return jnp.argmax(last_logits(model, there, layer, example))

    n = len(examples["tokens"])
    return jax.lax.map(one, examples, batch_size=min(n, _AT_ONCE))
