"""The logit lens: the final norm, then the unembedding, at any point of the residual stream (nostalgebraist 2020)."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from .arrays import as_array, listing, on_device
from .forward import check_tokens, find_model, program

if TYPE_CHECKING:
    from .models.llama.model import Llama


def lens(model: Llama, resid: Float[Array, "... E"], top_k: int | None = None, tokens: Any = None) -> Any:
    """What the model would say if it stopped at `resid`.

    Args:
        model: a `Llama`.
        resid: `[..., E]`.
        top_k: return only the k largest logits and their token ids; the logits of the whole vocabulary are never held for
            more than one `[T, E]` at a time.
        tokens: return only the logits of these ids `[N]`; the others are not computed.

    Returns:
        float32 logits `[..., V]`; with `top_k`, `(logits, ids)`, each `[..., k]`; with `tokens`, logits `[..., N]`.

    Raises:
        ValueError, TypeError: a shape, dtype, k or id that cannot be.
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
    if top_k is not None and not (isinstance(top_k, int | np.integer) and 1 <= top_k <= config.vocab_size):
        raise ValueError(f"top_k is {top_k!r}, and must be an integer from 1 to {config.vocab_size}.")
    if tokens is not None:
        tokens = check_tokens(tokens if on_device(tokens) else np.atleast_1d(tokens), config.vocab_size)
    return program(model, run_lens)(model, resid.astype(model.dtype), None if top_k is None else int(top_k), tokens)


@partial(jax.jit, static_argnums=(2,), inline=True)
def run_lens(model: Llama, resid: Array, top_k: int | None, tokens: Array | None) -> Any:
    """The program behind `lens`."""
    lead, width = resid.shape[:-1], resid.shape[-1]
    n_tokens = lead[-1] if lead else 1
    rows = resid.reshape(math.prod(lead[:-1]), n_tokens, width)
    if top_k is not None:
        found = lens_layers(model, rows, top_k, None)
        return tuple(found[name].reshape(*lead, top_k) for name in ("top_k_logits", "top_k_indices"))
    normalized = _normalise(model, resid.reshape(math.prod(lead), width))
    logits = model.logits(normalized) if tokens is None else model.logits_of(normalized, tokens)
    return logits.reshape(*lead, logits.shape[-1])


def _normalise(model: Llama, row: Array) -> Array:
    return model.normalise(row, lambda _, value: value)


def lens_layers(
    model: Llama, resid: Float[Array, "L T E"], top_k: int | None, tokens: Array | None, dtype: str = "float32"
) -> dict[str, Array]:
    """The lens of several layers, one after the other, keeping of the logits only what is asked for.

    Args:
        model: a `Llama`.
        resid: `[L, T, E]`.
        top_k: keep the k largest logits; None for all.
        tokens: ids `[N]` whose probabilities to keep, or None.
        dtype: what logits and probabilities are kept as.

    Returns:
        Fields of a `LogitCapture`: `normalized`, `log_normalizer`, `logits` or `top_k_logits` and `top_k_indices`, and
        `probabilities`.
    """

    def layer(row: Array) -> dict[str, Array]:
        normalized = _normalise(model, row)
        logits = model.logits(normalized)
        kept = {"normalized": normalized, "log_normalizer": jax.nn.logsumexp(logits, axis=-1)}
        if tokens is not None:
            chosen = jnp.take(logits, tokens, axis=-1) - kept["log_normalizer"][:, None]
            kept["probabilities"] = jnp.exp(chosen).astype(dtype)
        if top_k is None:
            return {**kept, "logits": logits.astype(dtype)}
        values, indices = jax.lax.top_k(logits, top_k)
        return {**kept, "top_k_logits": values.astype(dtype), "top_k_indices": indices}

    return jax.lax.map(layer, resid)
