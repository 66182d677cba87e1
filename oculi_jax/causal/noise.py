"""`Noise`: a corrupted run that is the clean prompt with noise on some of its embeddings."""

from __future__ import annotations

from dataclasses import field
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import Bool, Float, Int

from ..arrays import as_array, listing, on_device
from ..generate import check_key
from ..intervention import Steer
from ..pytrees import pytree, static

if TYPE_CHECKING:
    from ..models.llama.model import Llama


@pytree
class Noise:
    """Gaussian noise on the embeddings of some tokens: causal tracing's corruption (Meng et al. 2022, arXiv:2202.05262).

    `embed ← embed + scale · σ · ε`, ε ~ N(0, 1) for each number, σ the standard deviation of all entries of the embedding
    table. (The paper measures σ over the embeddings of its subjects' tokens, and takes three times that.) Metrics are means
    over `samples` draws. A draw belongs to a token by its rank among the real tokens, so padding changes nothing, and is the
    same for every prompt.

    Args:
        positions: the tokens that get noise, the subject's for instance: an integer, a list of them (among the real tokens,
            negative from the last), or bool `[T]`; or bool `[B, T]`, each prompt's own.
        scale: strength in standard deviations, above 0.
        samples: how many draws; static.
        key: a JAX random key.
    """

    positions: Any
    scale: Any = field(default=3.0, kw_only=True)
    samples: int = static(default=10, kw_only=True)
    key: Any = field(kw_only=True)

    def check(self) -> Array:
        """The random key, typed; raises ValueError or TypeError for what makes no noise."""
        if isinstance(self.samples, bool) or not isinstance(self.samples, int | np.integer) or self.samples < 1:
            raise ValueError(f"Noise.samples is {self.samples!r}, and must be an integer of at least 1.")
        scale = as_array(self.scale)
        if scale.shape != () or scale.dtype.kind not in "iuf" or (not on_device(scale) and not 0 < scale < np.inf):
            raise ValueError(f"Noise.scale is {self.scale!r}, and must be one finite number above 0.")
        if self.key is None:
            raise TypeError("Noise.key is None, and a JAX random key is needed: jax.random.key(seed).")
        return check_key(self.key)

    def draws(self, model: Llama, mask: Bool[Array, "B T"] | None, n_prompts: int, n_tokens: int) -> list[Steer]:
        """The corruption of every prompt in every sample, prompts outermost."""
        key = self.check()
        places = position_rows(self.positions, n_prompts, "Noise.positions")
        real = np.ones((1, n_tokens), bool) if mask is None else mask
        drawn = _draw(model.embed[...], key, real, int(self.samples))
        drawn = drawn * n_prompts if mask is None else drawn
        return [
            Steer(None, vector, self.scale, "embed", place)
            for place, vectors in zip(places, drawn, strict=True)
            for vector in vectors
        ]


@partial(jax.jit, static_argnums=(3,), inline=True)
def _draw(
    table: Float[Array, "V E"], key: Array, real: Bool[Array, "P T"], samples: int
) -> tuple[tuple[Float[Array, "T E"], ...], ...]:
    """σ ε for every prompt and sample."""
    wide = table.astype(jnp.float32)
    # Means of rows first: one sum over so many numbers would lose digits.
    mean = jnp.mean(jnp.mean(wide, axis=-1))
    sigma = jnp.sqrt(jnp.mean(jnp.mean(jnp.square(wide - mean), axis=-1)))

    def token(sample: Int[Array, ""], rank: Int[Array, ""]) -> Float[Array, "E"]:
        return sigma * jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, sample), rank), table.shape[1:])

    ranks = jnp.maximum(jnp.cumsum(real, axis=-1) - 1, 0)
    each = jax.vmap(jax.vmap(token, in_axes=(None, 0)), in_axes=(0, None))
    drawn = jax.vmap(each, in_axes=(None, 0))(jnp.arange(samples), ranks)
    return tuple(tuple(prompt[sample] for sample in range(samples)) for prompt in drawn)


def position_rows(positions: Any, n_prompts: int, where: str) -> list[Any]:
    """A set of positions for each prompt, as an intervention takes it, from one for all or bool `[B, T]`."""
    if positions is None or isinstance(positions, list | tuple):
        return [positions] * n_prompts
    array = as_array(positions)
    array = array if isinstance(array, Tracer) else np.asarray(array)
    if array.dtype != bool:
        if array.ndim > 1:
            raise ValueError(
                f"{where} has shape {listing(array.shape)}: give an integer, a list of them, or bool [T] or [B, T]."
            )
        return [list(array) if array.ndim else array] * n_prompts
    if array.ndim < 2:
        return [array] * n_prompts
    if array.ndim > 2 or len(array) != n_prompts:
        raise ValueError(
            f"{where} has shape {listing(array.shape)}, and there are {n_prompts} prompts: give bool [B, T]."
        )
    return list(array)
