"""What lenses are judged by: how far what they say is from what the model says, beside the logit lens and an untrained model's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from ..arrays import AnyArray, listing
from ..backends import check_model
from ..backends.jax.compiled import compiled
from ..capture import CaptureSpec
from ..prompts import check_prompts
from ..pytrees import pytree
from ..reading import Translator
from ..run import forward
from .controls import beside
from .running import AT_ONCE

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..models.decoder.config import DecoderConfig
    from ..models.decoder.model import Decoder


@pytree
class FittedLens:
    """A lens, and how far what it says is from what the model says, on prompts that were kept back, beside its controls.

    Attributes:
        lens: a `TunedLens` or a `JacobianLens`.
        kl: `[M, L]`, as `lens_kl` gives it, of each held-out prompt.
        by_seed: `[S]`, its mean over prompts and layers, but for the last one, where every lens is the model, of what each seed
            found; the first is this one.
        controls: the same of `"logit lens"`, which translates nothing, and of `"untrained weights"`: what the same fit finds where
            the model had learnt nothing.
        losses: `[steps]`, of a lens that is fitted by steps: the mean over layers of each step's batch; else None.
        held_out: `[M]`, which prompts these are.

    Examples:
        >>> rows = np.array([ids, other, ids[::-1], other[::-1]])
        >>> found = train_tuned_lens(model, rows, steps=20, batch_size=3, key=jax.random.key(0), progress=False)
        >>> found.kl.shape, list(found.controls)
        ((1, 4), ['logit lens', 'untrained weights'])
    """

    lens: Translator
    kl: Float[np.ndarray, "M L"]
    by_seed: Float[np.ndarray, "S"]
    controls: Mapping[str, Float[np.ndarray, "M L"]]
    losses: Float[np.ndarray, "N"] | None
    held_out: Int[np.ndarray, "M"]

    def __repr__(self) -> str:
        controls = {name: by_prompt(kl) for name, kl in self.controls.items()}
        told = beside(by_prompt(self.kl), controls, "held-out prompts", self.by_seed)
        return f"{self.lens!r}, nats from the model: {told}"


def by_prompt(kl: Float[np.ndarray, "M L"]) -> Float[np.ndarray, "M"]:
    """The mean over layers, but for the last one, where every lens is the model."""
    return kl[:, : max(1, kl.shape[1] - 1)].mean(axis=1)


def lens_kl(
    model: Decoder, lens: Translator | None, tokens: ArrayLike, mask: ArrayLike | None = None
) -> Float[Array, "B L"]:
    """How far a lens is from what the model says: KL(model ‖ lens), the mean over each prompt's real tokens.

    Its mean over prompts, with an interval, is `bootstrap` of it. One layer's logits are held at a time.

    Args:
        model: a model of any family.
        lens: a `TunedLens`, a `JacobianLens`, or any pytree that is a `Translator`; None for the logit lens.
        tokens: ids `[B, T]`, better ones that the lens was not fitted on.
        mask: bool `[B, T]`, True at real tokens.

    Returns:
        `[B, L]` in nats, differentiable with respect to `lens`.

    Raises:
        ValueError, TypeError: a lens of another model or none, ids or a mask that cannot be.

    Examples:
        >>> kl = lens_kl(model, None, np.array([ids, other]))
        >>> [round(float(x), 1) for x in bootstrap(kl).mean]
        [2.3, 1.5, 0.6, 0.0]
    """
    config = check_model(model)
    if lens is not None:
        check_lens(lens, config)
    return divergences(lens, model, None, *check_rows(config, tokens, mask))


def check_lens(lens: object, config: DecoderConfig) -> None:
    """TypeError for what is no lens, ValueError for another model's."""
    if not isinstance(lens, Translator):
        raise TypeError(
            f"lens is a {type(lens).__name__}, and a TunedLens, a JacobianLens, or what translates and checks as they do is needed."
        )
    lens.check(config)


def check_rows(
    config: DecoderConfig, tokens: ArrayLike, mask: ArrayLike | None
) -> tuple[Int[AnyArray, "B T"], Bool[AnyArray, "B T"]]:
    """Ids and mask `[B, T]`; of one prompt too."""
    ids, real, _ = check_prompts(config, tokens, mask)
    return ids, np.ones(ids.shape, bool) if real is None else real


def rows_of(
    resid: Float[Array, "L T E"], layers: tuple[int, ...], n_layers: int, width: int
) -> slice | Int[np.ndarray, "L"]:
    """Which rows of a lens that has all layers translate streams after `layers`; ValueError where it has not those."""
    layers = tuple(int(layer) for layer in layers)
    if wrong := [layer for layer in layers if not 0 <= layer < n_layers]:
        raise ValueError(f"layers holds {wrong}, and this lens has layers 0 to {n_layers - 1}.")
    if resid.ndim != 3 or resid.shape[0] != len(layers) or resid.shape[2] != width:
        raise ValueError(
            f"resid has shape {listing(resid.shape)}, and [L, T, E] with L = {len(layers)} layers and E = {width} is needed."
        )
    return slice(None) if layers == tuple(range(n_layers)) else np.array(layers)


def streams(
    model: Decoder, reads: Decoder | None, tokens: AnyArray, mask: AnyArray, n_layers: int
) -> tuple[Float[Array, "L T E"], Float[Array, "T V"]]:
    """A prompt's residual streams after the first layers, of `reads` or of the model, and the model's log-probabilities."""
    spec = CaptureSpec("resid_post", range(n_layers))
    out = forward(model, tokens, capture=spec if reads is None else (), logits="all", mask=mask)
    there = out if reads is None else forward(reads, tokens, capture=spec, logits="none", mask=mask)
    assert out.logits is not None
    return there["resid_post"], jax.nn.log_softmax(out.logits, axis=-1)


def divergence(
    rows: Float[Array, "T E"], model: Decoder, log_p: Float[Array, "T V"], real: Bool[AnyArray, "T"]
) -> Float[Array, ""]:
    """The sum over real tokens of KL(model ‖ what the model would say of these rows), in nats."""
    log_q = jax.nn.log_softmax(model.logits(model.normalise(rows, lambda _, value: value)), axis=-1)
    return jnp.sum(jnp.where(real, jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1), 0.0))


@compiled()
def divergences(
    lens: Translator | None,
    model: Decoder,
    reads: Decoder | None,
    tokens: Int[AnyArray, "B T"],
    mask: Bool[AnyArray, "B T"],
) -> Float[Array, "B L"]:
    """`lens_kl`, of a lens that is put to the streams of `reads` where it is another model."""
    n_layers = model.config.num_hidden_layers

    def one(prompt: tuple[Array, Array]) -> Array:
        ids, real = prompt
        resid, log_p = streams(model, reads, ids, real, n_layers)
        moved = resid if lens is None else lens.translate(resid, tuple(range(n_layers)))
        found = jax.lax.map(jax.checkpoint(lambda rows: divergence(rows, model, log_p, real)), moved)
        return found / jnp.sum(real, dtype=found.dtype)

    return jax.lax.map(one, (jnp.asarray(tokens), jnp.asarray(mask)), batch_size=min(len(tokens), AT_ONCE))
