"""`Frame`: what one run fixes (sizes, dtype, which tokens are real), which its interventions are checked against."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ..arrays import AnyArray, on_device, wide
from ..sites import Site, site_of

if TYPE_CHECKING:
    from ..models.decoder.config import DecoderConfig


@dataclass(frozen=True)
class Frame:
    """What the run fixes that interventions are checked against.

    Attributes:
        config: the model's config.
        dtype: the dtype of its residual stream.
        n_tokens: `T`, padding included: what arrays with a token axis cover.
        mask: which tokens are real, bool over all slots; None where all are.
        n_slots: how many tokens the run has room for, where that is more: those that generation adds, or padding that
            the adapter adds. None for `n_tokens`.
        absolute: whether positions must count from the start, since nobody knows yet where the end will be.
        axes: the axes of the sweep that the interventions make; () in one run.
    """

    config: DecoderConfig
    dtype: np.dtype
    n_tokens: int
    mask: AnyArray | None
    n_slots: int | None = None
    absolute: bool = False
    axes: tuple[int, ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        return {**self.config.sizes, "T": self.n_tokens, "S": self.n_tokens}

    @property
    def slots(self) -> int:
        return self.n_tokens if self.n_slots is None else self.n_slots

    def site(self, name: object) -> Site:
        """The site of that name; ValueError where this model has none."""
        return site_of(name, self.config.sites)

    def site_dtype(self, site: Site) -> np.dtype:
        return {"model": self.dtype, "float32": wide(self.dtype)}.get(site.dtype) or np.dtype(site.dtype)

    def positions(self, ranks: AnyArray, where: str) -> AnyArray:
        """bool `[…, T]` over all slots from ranks `[…, M]` (or one rank) among the real tokens, negative ones from the last."""
        n_tokens, mask, given = self.slots, self.mask, ranks
        ranks = ranks if ranks.ndim else ranks[None]
        if self.absolute and not on_device(ranks) and (np.asarray(ranks) < 0).any():
            raise ValueError(
                f"{where} is {_short(given)}: in generation positions count from the start of the prompt, 0 and up, since "
                "the last token changes with every step."
            )
        n_real = n_tokens if mask is None or on_device(mask) else int(mask.sum())
        if on_device(ranks):
            every = jnp.arange(-n_tokens, n_tokens).reshape(*(1,) * ranks.ndim, -1)
            table = jnp.any(ranks[..., None] == every, axis=-2)
        elif np.all((ranks >= -n_real) & (ranks < n_real)):
            table = np.zeros((*ranks.shape[:-1], 2 * n_tokens), bool)
            np.put_along_axis(table, np.asarray(ranks, np.int64) + n_tokens, True, axis=-1)
        else:
            raise ValueError(
                f"{where} is {_short(given)}, but the prompt has {n_real} tokens: positions are 0 to {n_real - 1}, "
                f"or −1 to −{n_real} from the end."
            )
        if on_device(table) or on_device(mask):
            return _at_ranks(table, np.ones(n_tokens, bool) if mask is None else mask)
        return _among_real(table, np.ones(n_tokens, bool) if mask is None else mask, np)


def _short(ranks: AnyArray) -> str:
    listed = np.asarray(ranks).tolist() if ranks.ndim < 2 else np.asarray(ranks).ravel().tolist()
    return str(listed) if not ranks.ndim or len(listed) <= 8 else f"{str(listed[:8])[:-1]}, …]"


def _among_real(table: Any, mask: Any, xp: Any) -> Any:
    """bool `[…, T]` from a table `[…, 2T]` of wanted ranks, −T to T − 1, among the tokens where `mask` holds."""
    rank = xp.cumsum(mask) - 1
    n_tokens = mask.shape[0]
    from_start, from_end = table[..., n_tokens:], table[..., :n_tokens]
    found = from_start[..., rank] | from_end[..., rank - rank[-1] - 1 + n_tokens]
    return found & mask.reshape(*(1,) * (found.ndim - 1), n_tokens)


# Jitted, with a table of one shape whatever is in it, so that other positions are no other program.
_at_ranks = jax.jit(partial(_among_real, xp=jnp))
