"""Rotary position embedding: frequencies of every type that Llama configs name, and the rotation itself.

The rotation is Su et al. (2021), arXiv:2104.09864, in the half-split layout of Hugging Face checkpoints. Frequencies
and angles are float32 whatever the weights, those of a float64 model too, as they are in transformers: computed in the order of
operations of `transformers.modeling_rope_utils`, which is what published checkpoints were validated against.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from ...arrays import wide
from .config import DecoderConfig, RopeConfig


def _exponents(head_dim: int) -> np.ndarray:
    return np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)


def _powers(theta: float, head_dim: int) -> np.ndarray:
    """θ^(2i/D), correctly rounded to float32: one unit in the last place is 4e-6 radians at position 128."""
    return (theta ** _exponents(head_dim).astype(np.float64)).astype(np.float32)


def _default(rope: RopeConfig, head_dim: int) -> np.ndarray:
    return np.float32(1.0) / _powers(rope.theta, head_dim)


def _llama3(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a linear ramp between."""
    assert rope.factor and rope.low_freq_factor and rope.high_freq_factor and rope.original_max_position_embeddings
    inv_freq = _default(rope, head_dim)
    wavelength = (2 * math.pi / inv_freq).astype(np.float32)
    context = rope.original_max_position_embeddings
    smooth = (context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    ramp = (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq
    scaled = np.where(wavelength > context / rope.low_freq_factor, inv_freq / rope.factor, ramp)
    return np.where(wavelength < context / rope.high_freq_factor, inv_freq, scaled).astype(np.float32)


def _yarn(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """YaRN, Peng et al. (2023), arXiv:2309.00071, equations 17 to 23."""
    assert rope.factor and rope.original_max_position_embeddings

    def dimension(rotations: float) -> float:
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)  # type: ignore[operator]
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast or 32.0), dimension(rope.beta_slow or 1.0)
    if rope.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1).astype(np.float32)
    extrapolated = _default(rope, head_dim)
    interpolated = np.float32(1.0) / (np.float32(rope.factor) * _powers(rope.theta, head_dim))
    return (interpolated * ramp + extrapolated * (1 - ramp)).astype(np.float32)


def _dynamic(config: DecoderConfig, rope: RopeConfig, dim: int, length: Array | int) -> Array:
    """NTK-aware scaling that starts where the context ends (bloc97 and emozilla, 2023)."""
    assert rope.factor
    longest = float(config.max_position_embeddings)
    reached = jnp.maximum(jnp.asarray(length, jnp.float32), longest)
    base = rope.theta * (rope.factor * reached / longest - (rope.factor - 1)) ** (dim / (dim - 2))
    return 1.0 / base ** jnp.asarray(_exponents(dim))


def _longrope(rope: RopeConfig, dim: int, length: Array | int) -> Array:
    """LongRoPE, Ding et al. (2024), arXiv:2402.13753: one set of factors up to the original context, one past it."""
    powers = _powers(rope.theta, dim)
    short, long = (
        np.float32(1.0) / (np.asarray(factors, np.float32) * powers)
        for factors in (rope.short_factor, rope.long_factor)
    )
    return jnp.where(jnp.asarray(length) > rope.original_max_position_embeddings, long, short)  # type: ignore[operator]


def inverse_frequencies(
    config: DecoderConfig, length: Array | int, rope: RopeConfig
) -> Float[Array, " A"] | np.ndarray:
    """Radians per position for each of the `A` pairs of dimensions that turn: D/2, or fewer where the rotary embedding is partial.

    Args:
        config: the model's config.
        length: number of real tokens; `dynamic` and `longrope` depend on it.
        rope: of the layers in question.
    """
    dim = rope.turned(config.head_dim)
    match rope.type:
        case "linear":
            return _default(rope, dim) / np.float32(rope.factor)  # type: ignore[arg-type]
        case "dynamic":
            return _dynamic(config, rope, dim, length)
        case "llama3":
            return _llama3(rope, dim)
        case "yarn":
            return _yarn(rope, dim)
        case "longrope":
            return _longrope(rope, dim, length)
        case _:
            return _default(rope, dim)


def attention_factor(rope: RopeConfig) -> float:
    """What YaRN and LongRoPE multiply cosines and sines by; 1 for the other types."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    factor = rope.factor or 1.0
    if rope.type == "yarn":

        def mscale(weight: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

        if rope.mscale and rope.mscale_all_dim:
            return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
        return mscale(1.0)
    if rope.type == "longrope" and factor > 1:
        return math.sqrt(1 + math.log(factor) / math.log(rope.original_max_position_embeddings))  # type: ignore[arg-type]
    return 1.0


def rotary(
    config: DecoderConfig, positions: Int[Array, "T"], length: Array | int, rope: RopeConfig | None
) -> tuple[Array, Array]:
    """Cosines and sines `[T, A]`, float32, of the angles at each position of a prompt of `length` tokens; of 0 for None."""
    if rope is None:
        nothing = jnp.zeros((positions.shape[0], config.rope.turned(config.head_dim) // 2), jnp.float32)
        return nothing + 1, nothing
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(inverse_frequencies(config, length, rope))[None, :]
    scale = attention_factor(rope)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: Float[Array, "N T D"], rotation: tuple[Array, Array]) -> Float[Array, "N T D"]:
    """Turns each pair (i, i + A) of the last axis by its angle, and leaves what comes after the last of them; computed in
    float32 or wider, returned in `x`'s dtype.
    """
    cos, sin = (part[None].astype(wide(x.dtype)) for part in rotation)
    n = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(wide(x.dtype)), (n, 2 * n), axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)
