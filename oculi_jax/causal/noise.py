"""`Noise`: a corrupted run that is the clean prompt with noise on some of its embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import Bool, Float, Int

from ..arrays import AnyArray, as_array, integer, listing, on_device
from ..decoding.generation import check_key
from ..intervention import Edit, PerPrompt
from ..intervention.fields import Strength, Values
from ..intervention.fields import field as of_kind
from ..intervention.indices import Positions
from ..pytrees import pytree, static

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..models.decoder.model import Decoder


@pytree
class Noise:
    """Gaussian noise on the embeddings of some tokens: causal tracing's corruption (Meng et al. 2022, arXiv:2202.05262).

    `embed ← embed + scale · σ · ε`, ε ~ N(0, 1) for each number, σ the standard deviation of all entries of the embedding
    table, times what the family multiplies embeddings by. (The paper measures σ over the embeddings of its subjects' tokens,
    and takes three times that.) Metrics are means over `samples` draws. A draw belongs to a token by its rank among the real
    tokens, so padding changes nothing, and is the same for every prompt.

    Args:
        positions: the tokens that get noise, the subject's for instance: an integer, a list of them (among the real tokens,
            negative from the last), or bool `[T]`; or bool `[B, T]`, each prompt's own.
        scale: strength in standard deviations, above 0.
        samples: how many draws; static.
        key: a JAX random key.

    Raises:
        ValueError, TypeError: when it is run, positions, a scale, a number of draws or a key that cannot be.

    Examples:
        >>> noise = Noise(4, samples=2, key=jax.random.key(0))  # on Italy
        >>> bool(activation_patching(model, ids, noise, metric, by=("layer", "position")).corrupted < metric(forward(model, ids)))
        True
    """

    positions: Any
    scale: Any = field(default=3.0, kw_only=True)
    samples: int = static(default=10, kw_only=True)
    key: Any = field(kw_only=True)

    def check(self) -> Array:
        """The random key, typed; raises ValueError or TypeError for what makes no noise."""
        integer(self.samples, "Noise.samples", 1)
        scale = as_array(self.scale)
        if scale.shape != () or scale.dtype.kind not in "iuf" or (not on_device(scale) and not 0 < scale < np.inf):
            raise ValueError(f"Noise.scale is {self.scale!r}, and must be one finite number above 0.")
        if self.key is None:
            raise TypeError("Noise.key is None, and a JAX random key is needed: jax.random.key(seed).")
        return check_key(self.key)

    def intervention(
        self, model: Decoder, mask: Bool[AnyArray, "B T"] | None, n_prompts: int, n_tokens: int, drawn: bool = True
    ) -> AddedNoise:
        """The corruption of every prompt in every sample, `B · samples` rows with the prompts outermost.

        Not `drawn` it is zeros, with axes of one, for a plan.
        """
        key, samples = self.check(), int(self.samples)
        value: Any = np.zeros((n_prompts * samples, 1, 1), np.float32)
        if drawn:
            real = np.ones((1, n_tokens), bool) if mask is None else mask
            value = _draw(model.embed[...], key, real, samples) * np.float32(model.config.embed_scale)
            value = value if mask is not None else jnp.tile(value, (n_prompts, 1, 1))
        places = positions_of(self.positions, n_prompts, "Noise.positions", samples)
        return AddedNoise(PerPrompt(value), self.scale, places)


@pytree
class AddedNoise:
    """`embed ← embed + scale · value` at some tokens.

    Args:
        value: `[T, E]`.
        scale: strength.
        positions: which tokens; None for all.
        site: static.
    """

    value: Any = of_kind(Values())
    scale: Any = of_kind(Strength())
    positions: Any = of_kind(Positions(optional=True), default=None)
    site: str = of_kind(None, default="embed")

    def edits(self, sizes: Mapping[str, int]) -> tuple[Edit, ...]:
        value = jnp.asarray(self.value).astype(jnp.float32) * self.scale
        return (Edit(self.site, "add", None, jnp.asarray(self.positions)[:, None], value),)


@partial(jax.jit, static_argnums=(3,), inline=True)
def _draw(table: Float[Array, "V E"], key: Array, real: Bool[Array, "P T"], samples: int) -> Float[Array, "N T E"]:
    """σ ε for every prompt and sample, prompts outermost."""
    wide = table.astype(jnp.float32)
    # Means of rows first: one sum over so many numbers would lose digits.
    mean = jnp.mean(jnp.mean(wide, axis=-1))
    sigma = jnp.sqrt(jnp.mean(jnp.mean(jnp.square(wide - mean), axis=-1)))

    def token(sample: Int[Array, ""], rank: Int[Array, ""]) -> Float[Array, "E"]:
        return sigma * jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, sample), rank), table.shape[1:])

    ranks = jnp.maximum(jnp.cumsum(real, axis=-1) - 1, 0)
    each = jax.vmap(jax.vmap(token, in_axes=(None, 0)), in_axes=(0, None))
    drawn = jax.vmap(each, in_axes=(None, 0))(jnp.arange(samples), ranks)
    return drawn.reshape(-1, *drawn.shape[2:])


def positions_of(positions: ArrayLike | None, n_prompts: int, where: str, each: int = 1) -> Any:
    """A set of positions as a field of an intervention takes it, of prompts that are `each` so many rows.

    From one set for all prompts, or bool `[B, T]`.
    """
    if positions is None or isinstance(positions, list | tuple | range):
        return positions
    array = as_array(positions)
    array = array if isinstance(array, Tracer) else np.asarray(array)
    if array.dtype != bool:
        if array.ndim > 1:
            raise ValueError(
                f"{where} has shape {listing(array.shape)}: give an integer, a list of them, or bool [T] or [B, T]."
            )
        return list(array) if array.ndim else array
    if array.ndim < 2:
        return array
    if array.ndim > 2 or len(array) != n_prompts:
        raise ValueError(
            f"{where} has shape {listing(array.shape)}, and there are {n_prompts} prompts: give bool [B, T]."
        )
    return PerPrompt((jnp if on_device(array) else np).repeat(array, each, axis=0))
