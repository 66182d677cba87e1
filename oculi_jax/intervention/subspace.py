"""`Subspace`: one subspace of a site from another run, the rest as it is."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array

from ..pytrees import pytree
from ..sites import SITES
from .each import PerLayer, Whole
from .edit import Edit, is_per_layer, site_shaped
from .fields import Basis, Values, field
from .indices import Layer, Positions
from .named import Sizes, at

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@site_shaped
def interchange(x: Array, value: tuple[Array, Array, Array]) -> Array:
    """h + (source − h) A Bᵀ, of JAX and of torch; A and B `[n, r]` are `Whole`."""
    read, written, source = value
    with jax.default_matmul_precision("highest"):
        return x + ((source - x) @ read) @ written.swapaxes(-1, -2)


@pytree
class Subspace:
    """Puts another run's values in place within a subspace: `x ← x + (source − x) B Bᵀ`, with `B` orthonormal.

    An interchange of what a subspace holds, as distributed alignment search learns it (Geiger et al. 2023, arXiv:2303.02536).
    `B` is the Q of a QR decomposition of `basis`, made inside: `basis` may be anything that spans the subspace, and so may what a
    gradient step makes of it.

    Args:
        site: a site whose last axis holds features, such as `resid_pre` or `z` (then each head's); static.
        layer: from 0, or a set; None for a site outside the layers.
        basis: `[n, r]`, the site's last axis × the rank, columns that are linearly independent; a `PerLayer` of that.
        source: of the site's axes, each whole or 1 (one token's values are `[1, E]`); or a number, 0 to take the subspace away; a
            `PerLayer` is a whole run's capture as it is.
        positions: which tokens; None for all. They only mask: `source` keeps its token axis.

    Examples:
        >>> basis = model.lm_head.weight[np.array([rome, paris])].T  # two directions, [192, 2]
        >>> there = Subspace("resid_post", 3, basis, PerLayer(run["resid_post"]), positions=-1)
        >>> says(forward(model, ids, there))
        'Paris'
    """

    site: str = field(None)
    layer: Any = field(Layer(site="site"))
    basis: Any = field(Basis())
    source: Any = field(Values())
    positions: Any = field(Positions(optional=True), default=None)

    def of(self, source: ArrayLike) -> Subspace:
        """The same with another run's values, `[T, E]` or one token's `[1, E]`.

        Examples:
            >>> whole = Subspace("resid_pre", 3, np.eye(192), 0.0, positions=-1)
            >>> says(forward(model, ids, whole.of(run["resid_pre"][3])))
            'Paris'
        """
        return replace(self, source=source)

    def check(self) -> None:
        """Raises ValueError where the site's last axis is tokens."""
        if self.site in SITES and SITES[self.site].axes[-1] in "TS":
            raise ValueError(
                f"{self.site!r} has {SITES[self.site].shape}: its last axis is tokens, and no features span it."
            )

    def edits(self, sizes: Sizes) -> tuple[Edit, ...]:
        given = self.basis
        if is_per_layer(given):
            basis = Whole(PerLayer(jnp.linalg.qr(jnp.asarray(given.x))[0]))
        else:
            basis = Whole(jnp.linalg.qr(jnp.asarray(given))[0])
        mask = at(self.site, sizes, positions=self.positions)
        return (Edit(self.site, "apply", self.layer, mask, (basis, basis, self.source), interchange),)
