"""`RankOne`: a direction that is read, and another that is written as far as the first one is there."""

from __future__ import annotations

from typing import Any

from jax import Array

from ..pytrees import pytree
from .edit import Edit, site_shaped
from .fields import Strength, Vector, field
from .indices import Layer, Positions
from .named import Sizes, at, refuse_table, rows_of


@site_shaped
def _read_and_write(x: Array, value: tuple[Array, Array, Array]) -> Array:
    read, write, bias = value
    return x + ((x * read).sum(axis=-1, keepdims=True) + bias).clip(min=0) * write


@pytree
class RankOne:
    """Writes one direction where, and as far as, another one is read: `x ← x + max(x · read + bias, 0) write`.

    One neuron more. What is read at a token, `max(x · read + bias, 0)`, says whether it is one that the edit is about; tokens at
    which it is 0 stay as they are. Rank-one representation finetuning: with `write = read` and no bias it detects and steers as
    ReFT-r1 does (Wu et al. 2025, arXiv:2501.17148), each token by what is read there; LoReFT of rank one (Wu et al. 2024,
    arXiv:2404.03592) is this without the `max`.

    Args:
        site: a site whose last axis holds features, such as `resid_pre`; static.
        layer: from 0, or a set; None for a site outside the layers.
        read, write: over the site's last axis; one for each layer is a `PerLayer` of `[L, E]`.
        bias: a number.
        positions: which tokens; None for all.

    Examples:
        >>> italy, france = (forward(model, x, capture="resid_pre")["resid_pre"][1, 4] for x in (ids, other))
        >>> read = (italy - france) / jnp.vdot(italy - france, italy - france)  # 1 at Italy, with a bias that makes it 0 at France
        >>> edit = RankOne("resid_pre", 1, read, france - italy, bias=-jnp.vdot(france, read))
        >>> says(forward(model, ids, edit)), says(forward(model, other, edit))
        ('Paris', 'Paris')
    """

    site: str = field(None)
    layer: Any = field(Layer(site="site"))
    read: Any = field(Vector())
    write: Any = field(Vector())
    bias: Any = field(Strength(), default=0.0)
    positions: Any = field(Positions(optional=True), default=None)

    def check(self) -> None:
        """Raises ValueError where the site cannot be added to."""
        refuse_table(self.site)

    def edits(self, sizes: Sizes) -> tuple[Edit, ...]:
        mask = at(self.site, sizes, positions=self.positions)
        value = rows_of(self.read, self.site), rows_of(self.write, self.site), self.bias
        return (Edit(self.site, "apply", self.layer, mask, value, _read_and_write),)
