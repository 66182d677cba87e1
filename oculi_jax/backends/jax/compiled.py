"""`compiled`: `jax.jit`, of which type checkers keep the signature, with the compile options of the platform that it runs on,
and which lets go of programs of functions that are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache, wraps
from types import FunctionType
from typing import Any, TypeVar
from weakref import ref

import jax
import numpy as np
from jax.core import Tracer

from ...arrays import on_device, on_every_host, under_trace
from ...intervention.edit import Edit
from ...intervention.rows import Rows
from ...utils.devices import CPU_OPTIONS, GPU_OPTIONS, GPUS

F = TypeVar("F", bound=Callable[..., Any])

KEPT = 64  # programs with functions of a user's in them: metrics, and what edits apply


def compiled(*static: str, donate: tuple[str, ...] = (), alone: bool = False) -> Callable[[F], F]:
    """Makes a function a program: compiled once for each value of its `static` arguments, inlined under another trace.

    What JAX has compiled it keeps as long as the function that was compiled, and a lambda that is written anew for every call
    is another program each time. So each set of a user's functions has a copy of the function of its own, and the copies that
    were not used for longest go, with all that was compiled for them; `jax.clear_caches()` lets go of all. `alone`: on a CPU its
    products are not fused with what follows them where that gives wrong numbers, as of repeated weights it may.
    """

    def make(function: F) -> F:
        common = _Program(function, static, donate, alone)

        @wraps(function)
        def program(*arguments: Any, **options: Any) -> Any:
            own = _functions((*arguments, *options.values()))
            return (_copy(function, static, donate, alone, own) if own else common)(*arguments, **options)

        program.lower = common.lower  # type: ignore[attr-defined]
        return program  # type: ignore[return-value]

    return make


class _Program:
    """A function as JAX compiles it: with the options of the platform, which JAX refuses for what is a part of another program.
    What it gives is whole on each of several hosts.
    """

    def __init__(self, function: Any, static: tuple[str, ...], donate: tuple[str, ...], alone: bool):
        self._function, self._on_cpu = function, CPU_OPTIONS if alone else {}
        self._settings: dict[str, Any] = {"static_argnames": static, "donate_argnames": donate, "inline": True}
        self._tuned: dict[str, Any] = {}

    @cached_property
    def _plain(self) -> Any:
        return jax.jit(self._function, **self._settings)

    def _of(self, given: Any) -> Any:
        # Where no platform has options, as on most machines, not every array of every call need be looked at.
        leaves = jax.tree.leaves(given) if self._on_cpu or has_gpu() else []
        platform = platform_of(leaves) if leaves else ""
        options = self._on_cpu if platform == "cpu" else GPU_OPTIONS if platform in GPUS and accepts() else {}
        if not options or under_trace(leaves):
            return self._plain
        if platform not in self._tuned:
            self._tuned[platform] = jax.jit(self._function, **self._settings, compiler_options=options)
        return self._tuned[platform]

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        program = self._of((arguments, options))
        try:
            found = program(*arguments, **options)
        except ValueError as error:
            # A function of a user's may hold what an outer trace follows, which nothing that is given shows.
            if program is self._plain or "compiler_options" not in str(error):
                raise
            found = self._plain(*arguments, **options)
        return on_every_host(found)

    def lower(self, *arguments: Any, **options: Any) -> Any:
        """`jax.jit(…).lower` of what a call with these arguments would run."""
        return self._of((arguments, options)).lower(*arguments, **options)


@lru_cache
def has_gpu() -> bool:
    try:
        return bool(jax.local_devices(backend="gpu"))
    except RuntimeError:  # JAX knows of none
        return False


def platform_of(leaves: Iterable[Any]) -> str:
    """Where a program of these values runs: where a committed array among them lies, else on JAX's default device."""
    for leaf in leaves:
        if on_device(leaf) and not isinstance(leaf, Tracer) and leaf.committed:
            return next(iter(leaf.devices())).platform
    default: Any = jax.config.jax_default_device  # type: ignore[attr-defined]
    return jax.default_backend() if default is None else getattr(default, "platform", default)


@lru_cache
def accepts() -> bool:
    """Whether the compiler knows a GPU's options: one that does not would refuse the program."""
    try:
        jax.jit(lambda x: x, compiler_options=GPU_OPTIONS).lower(np.int32(0)).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


@lru_cache(maxsize=KEPT)
def _copy(function: Any, static: tuple[str, ...], donate: tuple[str, ...], alone: bool, own: tuple[Any, ...]) -> Any:
    """A program of its own for some functions of a user's: JAX knows what it compiled by the function object."""
    again = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    again.__kwdefaults__ = function.__kwdefaults__
    again.__dict__.update(function.__dict__)
    return _Program(again, static, donate, alone)


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
