"""Prompts put through a model, some at a time: what a site holds of each, and what each says under an intervention."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from ..arrays import AnyArray, wide
from ..backends.jax.compiled import compiled
from ..capture import CaptureSpec
from ..run import forward

if TYPE_CHECKING:
    from ..intervention.protocol import Intervention
    from ..models.decoder.model import Decoder

AT_ONCE = 16  # prompts
Own = TypeVar("Own")


@compiled("site", "layers", "positions")
def captured(
    model: Decoder,
    tokens: Int[AnyArray, "B T"],
    mask: Bool[AnyArray, "B T"] | None,
    site: str,
    layers: tuple[int, ...],
    positions: tuple[int, ...] | Literal["mean"] | None,
) -> Float[Array, "B L ..."]:
    """What a site holds of each prompt at some layers.

    Args:
        positions: at which tokens; None for all; `"mean"` for the mean over the real ones, float32 or wider, as one.
    """

    def one(prompt: tuple[Array, Array | None]) -> Array:
        ids, real = prompt
        spec = CaptureSpec(site, layers, None if positions == "mean" else positions)
        found = forward(model, ids, capture=spec, mask=real, logits="none")[site]
        if positions != "mean":
            return found
        found = found.astype(wide(found.dtype))
        weights = jnp.ones(ids.shape, found.dtype) if real is None else real.astype(found.dtype)
        return jnp.einsum("lte,t->le", found, weights / jnp.sum(weights), precision="highest")[:, None]

    return jax.lax.map(one, (tokens, mask), batch_size=min(len(tokens), AT_ONCE))


def logits_from(model: Decoder, there: Intervention, layer: int, example: dict[str, Any]) -> Float[Array, " V"]:
    """What a prompt's run ends in under an intervention, from a layer on.

    Args:
        example: `tokens` and `mask` `[T]`, and `resid` `[T, E]`, the stream that enters the layer.
    """
    start = layer, example["resid"]
    logits = forward(model, example["tokens"], there, mask=example["mask"], logits="last", start=start).logits
    assert logits is not None
    return logits


@compiled("intervention", "layer")
def likeliest(
    model: Decoder,
    own: Own,
    examples: dict[str, Any],
    intervention: Callable[[Own, dict[str, Any]], Intervention],
    layer: int,
) -> Int[Array, "R B"]:
    """The likeliest token after each example, under each of R interventions.

    Args:
        own: a pytree whose leaves lead with these.
        examples: as `logits_from` takes one, and what else the interventions read of them.
        intervention: of a row of `own` and an example. Static: equal ones share a program.
    """

    def of(own: Own) -> Array:
        def one(example: dict[str, Any]) -> Array:
            return jnp.argmax(logits_from(model, intervention(own, example), layer, example))

        return jax.lax.map(one, examples, batch_size=min(len(examples["tokens"]), AT_ONCE))

    return jax.lax.map(of, own)
