"""`Layout`: which tokens run, where they stand, and which keys each may look at. All that runs layers begins with one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from ...arrays import AnyArray
from ...models.decoder.attention import Sight
from ...models.decoder.rope import rotary
from ...pytrees import pytree, static
from ...traced import entry

if TYPE_CHECKING:
    from ...models.decoder.config import DecoderConfig


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
        first: the first slot; an integer, part of the program, or (in decoding) data; None where tokens stand anywhere.
        n_keys: `S`; static.
        kinds: the number of each layer's kind; static.
        windowed: whether a kind of layer has a window that hides something; static.
    """

    tokens: Int[Array, "T"]
    queries: Bool[Array, "T"] | None
    keys: Bool[Array, "S"] | None
    rotations: tuple[Float[Array, "C T A"], Float[Array, "C T A"]]
    allowed: Bool[Array, "C T S"]
    first: Any
    n_keys: int = static()
    kinds: tuple[int, ...] = static()
    windowed: bool = static()

    @property
    def n_tokens(self) -> int:
        return self.tokens.shape[0]

    @property
    def is_whole(self) -> bool:
        """Whether every slot's token runs."""
        return self.n_tokens == self.n_keys

    def at(self, layer: Array) -> tuple[tuple[Float[Array, "T A"], Float[Array, "T A"]], Sight]:
        """The rotation of a layer, and which keys it may look at."""
        kind = 0 if len(set(self.kinds)) == 1 else entry(np.array(self.kinds, np.int32), layer)
        cos, sin = self.rotations
        static = isinstance(self.first, int)
        n_seen = self.first + self.n_tokens if static else self.n_keys
        causal = static and self.first == 0 and not self.windowed
        return (entry(cos, kind), entry(sin, kind)), Sight(
            entry(self.allowed, kind), n_seen, causal, padded=self.queries is not None
        )

    def of_rows(self, rows: Int[Array, "R"]) -> Layout:
        """Some of the tokens that run, which look at what the others left."""
        queries = None if self.queries is None else self.queries[rows]
        rotations = self.rotations[0][:, rows], self.rotations[1][:, rows]
        tokens, allowed = self.tokens[rows], self.allowed[:, rows]
        return replace(self, tokens=tokens, queries=queries, rotations=rotations, allowed=allowed, first=None)

    def remember(self, past: tuple[Array, Array] | None) -> Callable[[Array, Array], tuple[Array, Array]]:
        """Keys and values of the tokens that run → of all slots."""
        keys, values = (None, None) if past is None else past
        return lambda k, v: (self.join(k, keys), self.join(v, values))

    def join(self, new: Float[Array, "K T D"], past: Float[Array, "K P D"] | None) -> Float[Array, "K S D"]:
        """Keys or values of all slots: those of the tokens that run, in their places among the `past`'s."""
        if self.is_whole:
            return new
        before = [] if past is None else [past[:, : self.first]]
        after = self.n_keys - self.first - self.n_tokens
        whole = jnp.concatenate([*before, new], axis=1)
        return jnp.pad(whole, [(0, 0), (0, after), (0, 0)]) if after else whole

    def put(self, new: Float[Array, "K T D"], cache: Float[Array, "L K S D"], layer: Array) -> Float[Array, "L K S D"]:
        """The keys or values of the tokens that run, written in their places of a layer of a cache."""
        return jax.lax.dynamic_update_slice(cache, new[None], (layer, 0, self.first, 0))


def lay_out(
    config: DecoderConfig,
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
    # A window counts real tokens, so that padding between them, as between a prompt and what is generated, takes no room.
    positions, places = slots, every
    length: Array | int = total
    queries: Array | None = None
    keys: Array | None = None
    if real is not None:
        places = jnp.maximum(jnp.cumsum(real) - 1, 0)
        queries, positions = (jax.lax.dynamic_slice_in_dim(x, first, n_tokens) for x in (real, places))
        length, keys = jnp.sum(real), jnp.asarray(real) & (every < first + n_tokens)
        tokens = jnp.where(queries, tokens, 0)
    kinds = tuple(dict.fromkeys(config.layer_kinds))
    allowed = []
    for kind in kinds:
        may = every[None, :] <= slots[:, None]
        if kind.window is not None:
            may = may & (places[None, :] > positions[:, None] - kind.window)
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
        windowed=any(kind.window is not None and kind.window < total for kind in kinds),
    )
