"""`compiled`: `jax.jit`, of which type checkers keep the signature."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax

F = TypeVar("F", bound=Callable[..., Any])


def compiled(*static: str) -> Callable[[F], F]:
    """Makes a function a program: compiled once for each value of its `static` arguments, inlined under another trace."""
    return partial(jax.jit, static_argnames=static, inline=True)  # type: ignore[return-value]
