"""How the next token is chosen from logits: greedy, or by chance among the tokens that the filters leave."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from ..arrays import as_array, integer, on_device
from ..pytrees import pytree, static

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@pytree
class Sampler:
    """Filters in Hugging Face's order: temperature, top-k, top-p, min-p.

    Attributes:
        temperature: divides the logits; at 0 the largest wins.
        top_p: float32 scalar, or None.
        min_p: float32 scalar, or None.
        greedy: whether the temperature is known to be 0; static.
        top_k: static, or None.
    """

    temperature: Any
    top_p: Any
    min_p: Any
    greedy: bool = static()
    top_k: int | None = static()

    def filter(self, logits: Float[Array, "V"]) -> Float[Array, "V"]:
        """The logits over the temperature, the largest at 0; −∞ where a filter leaves a token out, never the likeliest."""
        logits = (logits - jnp.max(logits)) / jnp.where(self.temperature > 0, self.temperature, 1.0)
        if self.top_k is not None:
            smallest = jax.lax.top_k(logits, self.top_k)[0][-1]
            logits = jnp.where(logits < smallest, -jnp.inf, logits)
        if self.top_p is not None:
            ordered = jnp.sort(logits, descending=True)
            chances = jax.nn.softmax(ordered)
            # A token stays where those likelier than it hold less than p (Holtzman et al. 2020, arXiv:1904.09751).
            before = jnp.cumsum(chances) - chances
            stays = (before < self.top_p).at[0].set(True)
            logits = jnp.where(logits < jnp.min(jnp.where(stays, ordered, jnp.inf)), -jnp.inf, logits)
        if self.min_p is not None:
            # Minh et al. 2024, arXiv:2407.01082; in logarithms.
            logits = jnp.where(logits < jnp.max(logits) + jnp.log(self.min_p), -jnp.inf, logits)
        return logits

    def choose(self, logits: Float[Array, "V"], key: Array | None) -> Int[Array, ""]:
        """A token id, int32; −1 where a logit is NaN, rather than an id that looks like an answer."""
        found = jnp.argmax(logits)
        if not self.greedy:
            assert key is not None
            found = jnp.where(self.temperature > 0, jax.random.categorical(key, self.filter(logits)), found)
        return jnp.where(jnp.isnan(logits).any(), -1, found).astype(jnp.int32)


@partial(jax.jit, inline=True)
def choose(sampler: Sampler, keys: Array | None, step: Array | int, logits: Float[Array, "C N V"]) -> Int[Array, "C N"]:
    """The next token of each row, from its key at this step."""

    def one(row: Float[Array, "V"], key: Array | None) -> Int[Array, ""]:
        return sampler.choose(row, None if key is None else jax.random.fold_in(key, step))

    axes = (0, None if keys is None else 0)
    return jax.vmap(jax.vmap(one, axes), axes)(logits, keys)


def sampler(
    temperature: ArrayLike, top_k: int | None, top_p: ArrayLike | None, min_p: ArrayLike | None, vocab_size: int
) -> Sampler:
    """Checks what the host can see of the four options; `temperature`, `top_p` and `min_p` are data of the program."""

    def number(value: Any, name: str, allowed: str, ok: Any) -> Any:
        array = as_array(value)
        if array.shape != () or array.dtype == bool or not (on_device(array) or array.dtype.kind in "iuf"):
            raise TypeError(f"{name} is {value!r}, and a number is needed.")
        if not on_device(array) and not (np.isfinite(array) and ok(array)):
            raise ValueError(f"{name} is {value}, and must be a finite number, {allowed}.")
        return array.astype(np.float32)

    k = None if top_k is None else integer(top_k, "top_k", 1, vocab_size, note=": it is a part of the program")
    heat = number(temperature, "temperature", "0 (greedy) or more", lambda x: x >= 0)
    greedy = not on_device(heat) and heat == 0
    given = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    if greedy and (useless := [name for name, value in given.items() if value is not None]):
        raise ValueError(
            f"{' and '.join(useless)} {'filters' if len(useless) == 1 else 'filter'} chance, and temperature is 0, which "
            "is greedy; give a temperature above 0, such as 1.0."
        )
    return Sampler(
        heat,
        None if top_p is None else number(top_p, "top_p", "above 0 and at most 1", lambda x: 0 < x <= 1),
        None if min_p is None else number(min_p, "min_p", "0 to 1", lambda x: 0 <= x <= 1),
        bool(greedy),
        k,
    )
