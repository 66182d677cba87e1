"""The logit lens: the final norm, then the unembedding, at any point of the residual stream (nostalgebraist 2020)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from .arrays import as_array, integer, listing, on_device
from .backends import find_model, programs_of
from .prompts import check_tokens

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from .models.decoder.config import DecoderConfig
    from .models.decoder.model import Decoder


@runtime_checkable
class Translator(Protocol):
    """What comes before the logit lens in another one: each layer's residual stream, moved to where the last layer's would be."""

    kind: ClassVar[str]  # what a `LogitCapture` calls the lens: "tuned", "jacobian"

    def check(self, config: DecoderConfig) -> None:
        """Raises ValueError where it does not fit a model of this shape."""
        ...

    def translate(self, resid: Float[Array, "L T E"], layers: tuple[int, ...]) -> Float[Array, "L T E"]:
        """The streams after `layers`, as the last layer's."""
        ...


def lens(
    model: Decoder, resid: Float[Array, "... E"], top_k: int | None = None, tokens: ArrayLike | None = None
) -> Any:
    """What the model would say if it stopped at `resid` (nostalgebraist 2020, "interpreting GPT: the logit lens").

    Args:
        model: a model of any family, or a Hugging Face one.
        resid: `[..., E]`.
        top_k: return only the k largest logits and their token ids; the logits of the whole vocabulary are never held for
            more than one `[T, E]` at a time.
        tokens: return only the logits of these ids `[N]`; the others are not computed.

    Returns:
        float32 logits `[..., V]`; with `top_k`, `(logits, ids)`, each `[..., k]`; with `tokens`, logits `[..., N]`.

    Raises:
        ValueError, TypeError: a shape, dtype, k or id that cannot be.

    Examples:
        >>> _, likeliest = lens(model, run["resid_post"][:, -1], top_k=1)  # at the last token, after each layer
        >>> tokenizer.convert_ids_to_tokens(likeliest[:, 0].tolist())
        ['▁called', '▁Lima', '▁Paris', '▁Paris']
    """
    model = find_model(model)
    config = model.config
    resid = as_array(resid)
    if resid.ndim == 0 or resid.shape[-1] != config.hidden_size:
        raise ValueError(
            f"resid has shape {listing(resid.shape)}, and [..., E] with E = {config.hidden_size} is needed."
        )
    if not jnp.issubdtype(resid.dtype, jnp.floating):
        raise TypeError(f"resid has dtype {resid.dtype}, and floating-point numbers are needed.")
    if top_k is not None and tokens is not None:
        raise ValueError("Give either top_k or tokens.")
    top_k = None if top_k is None else integer(top_k, "top_k", 1, config.vocab_size)
    lead, n_tokens = resid.shape[:-1], resid.shape[-2] if resid.ndim > 1 else 1
    rows = resid.astype(model.dtype).reshape(math.prod(lead[:-1]), n_tokens, resid.shape[-1])
    kept = programs_of(model).lens
    if top_k is not None:
        names = ("top_k_logits", "top_k_indices")
        found = kept(model, rows, names, top_k=top_k)
        return tuple(found[name].reshape(*lead, top_k) for name in names)
    ids = None
    if tokens is not None:
        ids = check_tokens(tokens if on_device(tokens) else np.atleast_1d(tokens), config.vocab_size)
    name = "logits" if ids is None else "chosen"
    logits = kept(model, rows, (name,), tokens=ids)[name]
    return logits.reshape(*lead, logits.shape[-1])
