"""`capture_bytes`: what a capture will cost before anything runs."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING

import jax.numpy as jnp

from ..capture import check_layers, readings_of
from .configs import Config, LogitConfig

if TYPE_CHECKING:
    from jax.typing import DTypeLike

    from ..capture import CaptureLike
    from ..models.decoder.config import DecoderConfig


def capture_bytes(
    config: DecoderConfig, n_tokens: int, capture: CaptureLike | Config, *, dtype: DTypeLike | None = None
) -> int:
    """Bytes of the arrays that a capture of one prompt returns.

    Args:
        config: the model's config (`model.config`).
        n_tokens: `T`.
        capture: what `forward` takes as `capture`, or one of the guide's configs, or a tuple of them (a site that two of
            them want is then counted twice).
        dtype: the dtype of the model; None for the config's own, float32 where it names none.

    Returns:
        Bytes. For a `LogitConfig`, its logits or top k, its probabilities, and the normalised residual that it keeps.

    Raises:
        ValueError, TypeError: no config, a length below 1, or a capture that cannot be.

    Examples:
        >>> capture_bytes(model.config, 6, "pattern")  # 4 layers × 6 heads × 6 × 6 numbers of 4 bytes
        3456
    """
    if not hasattr(config, "num_hidden_layers"):
        raise TypeError(f"capture_bytes takes a config, such as model.config, and was given a {type(config).__name__}.")
    n_tokens = operator.index(n_tokens)
    if n_tokens < 1:
        raise ValueError(f"n_tokens is {n_tokens}, and must be at least 1.")
    own = jnp.dtype(dtype or config.dtype or "float32")
    if isinstance(capture, list | tuple) and any(isinstance(part, Config) for part in capture):
        return sum(capture_bytes(config, n_tokens, part, dtype=dtype) for part in capture)
    if isinstance(capture, LogitConfig):
        capture = capture.canonical(config)
        rows = len(check_layers(capture.layers, config)) * (
            n_tokens if capture.positions is None else len(capture.positions)
        )
        stored = jnp.dtype(capture.dtype).itemsize
        kept = capture.top_k * (stored + 4) if capture.top_k is not None else config.vocab_size * stored
        return rows * (kept + 4 + stored * len(capture.tokens or ()) + config.hidden_size * own.itemsize)
    if isinstance(capture, Config):
        capture = capture.specs(config)
    total = 0
    for reading in readings_of(capture, config, n_tokens):
        dtype = reading.dtype or reading.site.dtype
        itemsize = own.itemsize if dtype == "model" else jnp.dtype(dtype).itemsize
        total += itemsize * math.prod(reading.shape(config, n_tokens))
    return total
