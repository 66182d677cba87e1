"""Desiderata-based masking: of directions that are given, those that hold a variable.

De Cao et al. (2020), "How do Decisions Emerge across Layers in Neural Models?", arXiv:2004.14992; Davies et al. (2023),
"Discovering Variable Binding Circuitry with Desiderata", arXiv:2307.03637; its settings as MIB has them (Mueller et al. 2025,
arXiv:2504.13151).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from ..arrays import as_array, listing, number, one_of
from .interchanges import Weighted

if TYPE_CHECKING:
    from ..intervention.protocol import Intervention
    from .interchanges import Where

_WARMEST, _COLDEST = 1.0, 0.01
_DRAWN = 0.1  # how far scores are from 0 in the beginning, so that seeds differ


@dataclass(frozen=True, eq=False)
class DBM:
    """A mask over directions: each is taken with weight `σ(s / τ)`, for scores s that are fitted; in the end where s > 0.

    The temperature τ falls from 1 to 0.01. Where no score ends above 0, the direction of the highest is taken.

    Args:
        basis: `"neurons"`, the site's own axes; `"pca"`, the principal directions of what the source prompts that are fitted on
            hold there; or directions, `[n, m]`, orthonormal columns.
        penalty: what is added to the loss, times the sum of all weights.

    Examples:
        >>> DBM("pca", penalty=1e-3).penalty
        0.001
    """

    basis: Any = "neurons"
    penalty: float = 1e-4

    def __post_init__(self) -> None:
        if isinstance(self.basis, str):
            one_of(self.basis, "basis", ("neurons", "pca"))
        number(self.penalty, "penalty", low=-np.inf)

    def start(self, values: Float[np.ndarray, "N n"], key: Array) -> tuple[dict[str, Any], Float[np.ndarray, "n m"]]:
        """Scores near 0, and the directions."""
        directions = self._directions(values)
        scores = _DRAWN * np.asarray(jax.random.normal(key, (directions.shape[1],), np.float32))
        return {"scores": scores}, directions

    def schedule(self, steps: int, values: Float[np.ndarray, "N n"]) -> Float[np.ndarray, "N"]:
        """The temperature of each step."""
        return np.linspace(_WARMEST, _COLDEST, steps).astype(np.float32)

    def edit(self, parameters: dict[str, Any], fixed: Array, schedule: Array, where: Where) -> Intervention:
        """The interchange that a step judges."""
        weights = jax.nn.sigmoid(parameters["scores"] / schedule)
        return Weighted(where.site, where.layer, fixed, fixed * weights[None, :], where.source, where.position)

    def cost(self, parameters: dict[str, Any], schedule: Array) -> Array:
        """What is added to the loss."""
        return self.penalty * jnp.sum(jax.nn.sigmoid(parameters["scores"] / schedule))

    def found(self, parameters: dict[str, Any], fixed: Array) -> Float[np.ndarray, "n r"]:
        """The directions that are taken."""
        scores = np.asarray(parameters["scores"])
        taken = scores > 0
        taken[scores.argmax()] = True
        return np.asarray(fixed)[:, taken]

    def random(self, fixed: Array, shape: tuple[int, int], key: Array) -> Float[np.ndarray, "n r"]:
        """As many of the directions, drawn."""
        return np.asarray(jax.random.permutation(key, jnp.asarray(fixed), axis=1, independent=False))[:, : shape[1]]

    def _directions(self, values: Float[np.ndarray, "N n"]) -> Float[np.ndarray, "n m"]:
        width = values.shape[1]
        if isinstance(self.basis, str):
            if self.basis == "neurons":
                return np.eye(width, dtype=np.float32)
            centred = np.asarray(values, np.float64) - values.mean(axis=0, dtype=np.float64)
            return np.linalg.svd(centred, full_matrices=False)[2].T.astype(np.float32)
        given = np.asarray(as_array(self.basis), np.float32)
        if given.ndim != 2 or given.shape[0] != width or not 1 <= given.shape[1] <= width:
            raise ValueError(
                f"basis has shape {listing(given.shape)}, and [n, m] is needed, with n = {width} of the site."
            )
        if not np.abs(given.T @ given - np.eye(given.shape[1])).max() <= 1e-3:
            raise ValueError("basis has columns that are not orthonormal; take np.linalg.qr(basis)[0].")
        return given
