"""How our dataclasses become pytrees. Their structures are equal where class, static fields and children are.

Those of `jax.tree_util.register_dataclass` compare equal for any two classes with equal static fields and as many leaves
(jax 0.10 to 0.12), so that a cache which compares them after a collision of hashes serves one class the other's program.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import jax

C = TypeVar("C", bound=type)


def register_dataclass(cls: C, data_fields: Sequence[str], meta_fields: Sequence[str]) -> C:
    """Registers a dataclass whose `data_fields` are children and whose `meta_fields` are static; takes what JAX's takes."""
    data, static = tuple(data_fields), tuple(meta_fields)
    keys = tuple(jax.tree_util.GetAttrKey(name) for name in data)

    def flatten_with_keys(x: Any) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
        children, fixed = flatten(x)
        return tuple(zip(keys, children, strict=True)), fixed

    def flatten(x: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(x, name) for name in data), tuple(getattr(x, name) for name in static)

    def unflatten(fixed: tuple[Any, ...], children: Iterable[Any]) -> Any:
        made = object.__new__(cls)  # not by its constructor: leaves may be anything, axes of vmap for instance
        made.__dict__.update(zip(data, children, strict=True))
        made.__dict__.update(zip(static, fixed, strict=True))
        return made

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
