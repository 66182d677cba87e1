"""`compiled`: `jax.jit`, of which type checkers keep the signature, and which lets go of programs of functions that are gone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, partial, wraps
from types import FunctionType
from typing import Any, TypeVar

import jax

from ...intervention.edit import Edit
from ...intervention.rows import Rows

F = TypeVar("F", bound=Callable[..., Any])

KEPT = 32  # programs with functions of a user's in them: metrics, and what edits apply


def compiled(*static: str) -> Callable[[F], F]:
    """Makes a function a program: compiled once for each value of its `static` arguments, inlined under another trace.

    What JAX has compiled it keeps as long as the function that was compiled, and a lambda that is written anew for every call
    is another program each time. So each set of a user's functions has a copy of the function of its own, and the copies that
    were not used for longest go, with all that was compiled for them.
    """

    def make(function: F) -> F:
        common = _copy(function, static)

        @wraps(function)
        def program(*arguments: Any, **options: Any) -> Any:
            own = _functions((*arguments, *options.values()))
            return (_copy(function, static, own) if own else common)(*arguments, **options)

        program.lower = common.lower  # type: ignore[attr-defined]
        return program  # type: ignore[return-value]

    return make


@lru_cache(maxsize=KEPT)
def _copy(function: Any, static: tuple[str, ...], own: tuple[Any, ...] = ()) -> Any:
    """A program of its own for some functions of a user's: JAX knows what it compiled by the function object."""
    again = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    again.__kwdefaults__, again.__annotations__ = function.__kwdefaults__, function.__annotations__
    return partial(jax.jit, static_argnames=static, inline=True)(again)


def _functions(arguments: Iterable[Any]) -> tuple[Any, ...]:
    """The functions of a user's among a program's arguments: a metric that is one, and what edits apply."""
    found: list[Any] = []
    for argument in arguments:
        if isinstance(argument, jax.tree_util.Partial):
            found.append(argument.func)
        elif isinstance(argument, Rows | tuple):
            items = jax.tree.unflatten(argument.tree, argument.leaves) if isinstance(argument, Rows) else argument
            found += [item.fn for item in items if isinstance(item, Edit) and item.fn is not None]
    return tuple(found)
