"""`compiled`: `jax.jit`, of which type checkers keep the signature, and which lets go of programs of functions that are gone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, wraps
from types import FunctionType
from typing import Any, TypeVar
from weakref import ref

import jax

from ...intervention.edit import Edit
from ...intervention.rows import Rows

F = TypeVar("F", bound=Callable[..., Any])

KEPT = 64  # programs with functions of a user's in them: metrics, and what edits apply


def compiled(*static: str) -> Callable[[F], F]:
    """Makes a function a program: compiled once for each value of its `static` arguments, inlined under another trace.

    What JAX has compiled it keeps as long as the function that was compiled, and a lambda that is written anew for every call
    is another program each time. So each set of a user's functions has a copy of the function of its own, and the copies that
    were not used for longest go, with all that was compiled for them; `jax.clear_caches()` lets go of all.
    """

    def make(function: F) -> F:
        common = _jitted(function, static)

        @wraps(function)
        def program(*arguments: Any, **options: Any) -> Any:
            own = _functions((*arguments, *options.values()))
            return (_copy(function, static, own) if own else common)(*arguments, **options)

        program.lower = common.lower  # type: ignore[attr-defined]
        return program  # type: ignore[return-value]

    return make


def _jitted(function: Any, static: tuple[str, ...]) -> Any:
    return jax.jit(function, static_argnames=static, inline=True)


@lru_cache(maxsize=KEPT)
def _copy(function: Any, static: tuple[str, ...], own: tuple[Any, ...]) -> Any:
    """A program of its own for some functions of a user's: JAX knows what it compiled by the function object."""
    again = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    again.__kwdefaults__ = function.__kwdefaults__
    again.__dict__.update(function.__dict__)
    return _jitted(again, static)


def _functions(arguments: Iterable[Any]) -> tuple[Any, ...]:
    """The functions of a user's among a program's arguments: a metric that is one, and what edits apply."""
    found: list[Any] = []
    for argument in arguments:
        if isinstance(argument, jax.tree_util.Partial):
            found.append(argument.func)
        elif isinstance(argument, Rows | tuple):
            items = jax.tree.unflatten(argument.tree, argument.leaves) if isinstance(argument, Rows) else argument
            found += [item.fn for item in items if isinstance(item, Edit) and item.fn is not None]
    # A function is named without being held: that is JAX's to do. A method is another object each time it is asked for.
    return tuple(ref(function) if isinstance(function, FunctionType) else function for function in found)
