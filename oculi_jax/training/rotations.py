"""Distributed alignment search: what it fits is a rotation, of which some dimensions are taken.

Geiger et al. (2023), "Finding Alignments Between Interpretable Causal Variables and Distributed Neural Representations",
arXiv:2303.02536; its boundless form, Wu et al. (2023), "Interpretability at Scale", arXiv:2305.08809.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from ..arrays import integer, number
from ..intervention import Subspace
from .interchanges import Weighted

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..intervention.protocol import Intervention
    from .interchanges import Where

_WARMEST, _COLDEST = 50.0, 0.1  # temperatures of a boundary, in dimensions: pyvene's


@dataclass(frozen=True)
class DAS:
    """Distributed alignment search: a subspace of a rank that is given, anywhere in the space.

    Args:
        rank: of how many dimensions.

    Examples:
        >>> DAS(rank=8)
        DAS(rank=8)
    """

    rank: int

    def __post_init__(self) -> None:
        integer(self.rank, "rank", 1)

    def start(self, values: Float[np.ndarray, "N n"], key: Array) -> tuple[dict[str, Any], None]:
        """What a fit begins with, and what it is given that is not fitted."""
        width = values.shape[1]
        return {"basis": np.asarray(jax.random.normal(key, (width, integer(self.rank, "rank", 1, width))))}, None

    def schedule(self, steps: int, values: Float[np.ndarray, "N n"]) -> None:
        """Nothing changes from step to step."""

    def edit(self, parameters: dict[str, Any], fixed: None, schedule: None, where: Where) -> Intervention:
        """The interchange that a step judges."""
        return Subspace(where.site, where.layer, parameters["basis"], where.source, where.position)

    def cost(self, parameters: dict[str, Any], schedule: None) -> float:
        """What is added to the loss."""
        return 0.0

    def found(self, parameters: dict[str, Any], fixed: None) -> Float[np.ndarray, "n r"]:
        """The subspace, orthonormal."""
        return _turned(parameters["basis"])

    def random(self, fixed: None, shape: tuple[int, int], key: Array) -> Float[np.ndarray, "n r"]:
        """A subspace of that rank that nobody looked for."""
        return _turned(jax.random.normal(key, shape))


@dataclass(frozen=True)
class BoundlessDAS:
    """DAS that finds the rank too: a rotation of the whole site, of which the first dimensions are taken, up to a boundary.

    Dimension i is taken with weight `σ((b n − i − ½) / τ)`, for a share b of the n dimensions that is fitted with the rotation,
    from one half on, and a temperature τ that falls from 50 dimensions (an eighth of n where that is less) to 0.1. In the end the
    first b n columns, rounded, are the basis of an ordinary `Subspace`.

    Args:
        penalty: what is added to the loss, times b.

    Examples:
        >>> BoundlessDAS(penalty=10.0)
        BoundlessDAS(penalty=10.0)
    """

    penalty: float = 1.0

    def __post_init__(self) -> None:
        number(self.penalty, "penalty", low=-np.inf)

    def start(self, values: Float[np.ndarray, "N n"], key: Array) -> tuple[dict[str, Any], None]:
        """A rotation, and the boundary in the middle."""
        width = values.shape[1]
        return {"basis": np.asarray(jax.random.normal(key, (width, width))), "boundary": np.float32(0.5)}, None

    def schedule(self, steps: int, values: Float[np.ndarray, "N n"]) -> Float[np.ndarray, "N"]:
        """The temperature of each step."""
        return np.linspace(min(_WARMEST, values.shape[1] / 8), _COLDEST, steps).astype(np.float32)

    def edit(self, parameters: dict[str, Any], fixed: None, schedule: Array, where: Where) -> Intervention:
        """The interchange that a step judges."""
        basis = jnp.linalg.qr(parameters["basis"])[0]
        width = basis.shape[1]
        share = jnp.clip(parameters["boundary"], 0, 1)
        weights = jax.nn.sigmoid((share * width - jnp.arange(width, dtype=np.float32) - 0.5) / schedule)
        return Weighted(where.site, where.layer, basis, basis * weights[None, :], where.source, where.position)

    def cost(self, parameters: dict[str, Any], schedule: Array) -> Array:
        """What is added to the loss."""
        return self.penalty * jnp.clip(parameters["boundary"], 0, 1)

    def found(self, parameters: dict[str, Any], fixed: None) -> Float[np.ndarray, "n r"]:
        """The subspace up to the boundary, orthonormal."""
        basis = _turned(parameters["basis"])
        return basis[:, : int(np.clip(np.round(float(parameters["boundary"]) * len(basis)), 1, len(basis)))]

    def random(self, fixed: None, shape: tuple[int, int], key: Array) -> Float[np.ndarray, "n r"]:
        """A subspace of that rank that nobody looked for."""
        return _turned(jax.random.normal(key, shape))


def _turned(basis: ArrayLike) -> Float[np.ndarray, "n r"]:
    return np.asarray(jnp.linalg.qr(jnp.asarray(basis))[0])
