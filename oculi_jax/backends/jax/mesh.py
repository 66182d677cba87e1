"""How a model lies over several devices, as its programs see it, and how what they compute follows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
from jax import Array
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

if TYPE_CHECKING:
    from ...models.decoder.model import Decoder


def mesh_of(model: Decoder) -> AbstractMesh | None:
    """The mesh that a model lies on; None on one device."""
    mesh = jax.typeof(model.embed[...]).sharding.mesh
    return None if mesh.empty or mesh.size == 1 else mesh


def spread(model: Decoder) -> tuple[int, int]:
    """How many copies of a model there are, and over how many devices each is cut: `data` and `model` of its mesh."""
    mesh = mesh_of(model)
    return (1, 1) if mesh is None else (mesh.shape.get("data", 1), mesh.shape.get("model", 1))


def settle(x: Array, mesh: AbstractMesh | None) -> Array:
    """A value that each device of a copy of the model has whole.

    What is mapped over it lies where it lay, or, under a `vmap` that names an axis of the mesh, along that.
    """
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))
