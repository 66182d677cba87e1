"""`Layout`: which tokens run, where they stand, and which keys each may look at. All that runs layers begins with one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from ...arrays import AnyArray
from ...models.llama.rope import rotary
from ...pytrees import pytree, static

if TYPE_CHECKING:
    from ...models.llama.config import LlamaConfig


@pytree
class Layout:
    """The tokens of a run: `T` of them, in slots that begin at `first`, among the `S` slots that keys may stand in.

    A whole prompt has `first` 0 and `S = T`. A suffix looks at keys of a run before it; a step of decoding at a cache, whose
    last slots are empty yet.

    Attributes:
        tokens: the ids that run; of padding, which may be no id at all, 0.
        queries: True at real ones among the tokens that run; None where all are.
        keys: True at the slots that hold a token so far; None where all do.
        rotations: cosines and sines of the `A` = D/2 angles, for each kind of layer.
        allowed: which keys each token may look at, for each kind of layer.
        first: the first slot; an integer, part of the program, or (in decoding) data.
        n_keys: `S`; static.
        kinds: the number of each layer's kind; static.
    """

    tokens: Int[Array, "T"]
    queries: Bool[Array, "T"] | None
    keys: Bool[Array, "S"] | None
    rotations: tuple[Float[Array, "C T A"], Float[Array, "C T A"]]
    allowed: Bool[Array, "C T S"]
    first: Any
    n_keys: int = static()
    kinds: tuple[int, ...] = static()

    @property
    def n_tokens(self) -> int:
        return self.tokens.shape[0]

    @property
    def is_whole(self) -> bool:
        """Whether every slot's token runs."""
        return self.n_tokens == self.n_keys

    def at(self, layer: Array) -> tuple[tuple[Float[Array, "T A"], Float[Array, "T A"]], Bool[Array, "T S"]]:
        """The rotation and the allowed keys of a layer."""
        kind = 0 if len(set(self.kinds)) == 1 else jnp.asarray(self.kinds)[layer]
        cos, sin = self.rotations
        return (cos[kind], sin[kind]), self.allowed[kind]

    def join(self, new: Float[Array, "K T D"], past: Float[Array, "K P D"] | None) -> Float[Array, "K S D"]:
        """Keys or values of all slots: those of the tokens that run, in their places among the `past`'s."""
        if self.is_whole:
            return new
        if isinstance(self.first, int):
            before = [] if past is None else [past[:, : self.first]]
            after = self.n_keys - self.first - self.n_tokens
            whole = jnp.concatenate([*before, new], axis=1)
            return jnp.pad(whole, [(0, 0), (0, after), (0, 0)]) if after else whole
        assert past is not None and self.n_tokens == 1
        # A select, which fuses with what reads it, where an update would copy the cache.
        return jnp.where((jnp.arange(self.n_keys) == self.first)[None, :, None], new, past)


def lay_out(
    config: LlamaConfig,
    tokens: Int[AnyArray, "T"],
    real: Bool[AnyArray, "S"] | None = None,
    *,
    first: Array | int = 0,
    n_keys: int | None = None,
) -> Layout:
    """The layout of tokens that stand in the slots from `first` on.

    Args:
        config: the model's.
        tokens: the ids that run.
        real: True at the slots that hold, or will hold, a token; its number is the length that some rotary types read. None
            where all do.
        first: an integer; an array where one program serves every step of decoding.
        n_keys: `S`; None for a whole prompt.
    """
    n_tokens = tokens.shape[0]
    total = n_tokens if n_keys is None else n_keys
    slots, every = first + jnp.arange(n_tokens), jnp.arange(total)
    positions: Array = slots
    length: Array | int = total
    queries: Array | None = None
    keys: Array | None = None
    if real is not None:
        ranks = jnp.maximum(jnp.cumsum(real) - 1, 0)
        queries, positions = (jax.lax.dynamic_slice_in_dim(x, first, n_tokens) for x in (real, ranks))
        length, keys = jnp.sum(real), jnp.asarray(real) & (every < first + n_tokens)
        tokens = jnp.where(queries, tokens, 0)
    kinds = tuple(dict.fromkeys(config.layer_kinds))
    allowed = []
    for kind in kinds:
        may = every[None, :] <= slots[:, None]
        if kind.window is not None:
            may = may & (every[None, :] > slots[:, None] - kind.window)
        allowed.append(may if real is None or queries is None else may & real[None, :] & queries[:, None])
    turned = [rotary(config, positions, length, kind.rope) for kind in kinds]
    cos, sin = (jnp.stack(parts) for parts in zip(*turned, strict=True))
    number = {kind: i for i, kind in enumerate(kinds)}
    return Layout(
        jnp.asarray(tokens),
        queries,
        keys,
        (cos, sin),
        allowed=jnp.stack(allowed),
        first=first,
        n_keys=total,
        kinds=tuple(number[k] for k in config.layer_kinds),
    )
