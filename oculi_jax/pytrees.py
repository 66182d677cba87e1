"""How our dataclasses become pytrees. Their structures are equal where class, static fields and children are.

Those of `jax.tree_util.register_dataclass` compare equal for any two classes with equal static fields and as many leaves
(jax 0.10 to 0.12), so that a cache which compares them after a collision of hashes serves one class the other's program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar, dataclass_transform, overload

import jax
import numpy as np

from . import cells

T = TypeVar("T")
_MANY = 8  # of numbers: more of them print as a shape


def static(*, default: object = dataclasses.MISSING, kw_only: Any = dataclasses.MISSING) -> Any:
    """A field of a `pytree` that is no leaf but part of the program: a name, a function, a number that shapes it.

    Examples:
        >>> @pytree
        ... class Line:
        ...     slope: object
        ...     name: str = static(default="line")
        >>> jax.tree.leaves(Line(2.0))
        [2.0]
    """
    return dataclasses.field(default=default, kw_only=kw_only, metadata={"static": True})


@overload
@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(dataclasses.field, static))
def pytree(cls: type[T], /) -> type[T]: ...
@overload
@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(dataclasses.field, static))
def pytree(*, kw_only: bool = False, repr: bool = True) -> Callable[[type[T]], type[T]]: ...
def pytree(cls: type[T] | None = None, /, *, kw_only: bool = False, repr: bool = True) -> Any:
    """Makes a class a frozen dataclass and a pytree: its fields are leaves, but for those that `static` declares.

    Args:
        kw_only, repr: as `dataclasses.dataclass` takes them; `repr=False` keeps the one that a class inherits.

    Examples:
        >>> @pytree
        ... class Line:
        ...     slope: object
        ...     offset: object = 0.0
        >>> jax.tree.map(lambda x: 2 * x, Line(1.0, 3.0))
        Line(slope=2.0, offset=6.0)
    """
    if cls is None:
        return partial(pytree, kw_only=kw_only, repr=repr)
    own = "__repr__" in vars(cls)
    cls = dataclasses.dataclass(frozen=True, eq=False, kw_only=kw_only, repr=False)(cls)
    if repr and not own:
        cls.__repr__ = _shown  # type: ignore[method-assign]
    if "_repr_html_" not in dir(cls):
        cls._repr_html_ = _in_a_notebook  # type: ignore[attr-defined]
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    fixed = tuple(field.name for field in fields if field.metadata.get("static"))
    data = tuple(field.name for field in fields if field.name not in fixed)
    keys = tuple(jax.tree_util.GetAttrKey(name) for name in data)

    def flatten_with_keys(x: Any) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
        children, parts = flatten(x)
        return tuple(zip(keys, children, strict=True)), parts

    def flatten(x: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(x, name) for name in data), tuple(getattr(x, name) for name in fixed)

    def unflatten(parts: tuple[Any, ...], children: Iterable[Any]) -> Any:
        made: Any = object.__new__(cls)  # not by its constructor: leaves may be anything, axes of vmap for instance
        made.__dict__.update(zip(data, children, strict=True))
        made.__dict__.update(zip(fixed, parts, strict=True))
        return made

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def _in_a_notebook(x: Any) -> str:
    return cells.table(type(x).__name__, ((field.name, getattr(x, field.name)) for field in dataclasses.fields(x)))


def _shown(x: Any) -> str:
    """A dataclass's repr in which arrays of more than a few numbers are their types and shapes."""
    values = {field.name: getattr(x, field.name) for field in dataclasses.fields(x)}
    return f"{type(x).__name__}({', '.join(f'{name}={_short(value)}' for name, value in values.items())})"


def _short(value: Any) -> str:
    if isinstance(value, np.ndarray | jax.Array) and value.ndim:
        few = isinstance(value, np.ndarray) and value.ndim == 1 and value.size <= _MANY
        return str(value.tolist()) if few else f"{value.dtype}{list(value.shape)}"
    if isinstance(value, list | tuple) and len(value) > _MANY:
        return f"{type(value).__name__} of {len(value)}"
    return repr(value)
