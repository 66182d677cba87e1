"""The two programs of a fit: a block of steps, and the held-out loss. Of several fits, both run all of them side by side."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import eval_jaxpr
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from ..arrays import listing
from ..backends.jax.compiled import compiled
from ..pytrees import pytree
from ..traced import mapped

if TYPE_CHECKING:
    import optax

BLOCK = 64  # steps that one call can make


@pytree
class Now:
    """Where a fit stands, for a loss of three arguments.

    Attributes:
        step: int32, from 0.
        key: a random key of this step, fit and example alone.
        schedule: the row of the step, of what `fit` was given as `schedules`.

    Examples:
        >>> def loss(x, example, now):  # strongly at first
        ...     return jnp.sum((x - example) ** 2) + now.schedule * jnp.sum(jnp.abs(x))
        >>> key, strengths = jax.random.key(0), np.linspace(1, 0, 5)
        >>> found = fit(loss, jnp.ones(3), np.zeros((4, 3)), steps=5, batch_size=2, key=key, schedules=strengths)
        >>> found.losses.shape
        (5,)
    """

    step: Int[Array, ""]
    key: Array
    schedule: Any


@dataclass(frozen=True)
class Start:
    """The leaves of a fit's start, `[N, …]` of N fits: those that are trained, and those that are carried."""

    tree: Any
    floating: tuple[bool, ...]
    trained: list[Array]
    carried: list[Array]

    def joined(self, trained: Sequence[Any], carried: Sequence[Any]) -> Any:
        """The user's pytree again."""
        first, second = iter(trained), iter(carried)
        return jax.tree.unflatten(self.tree, [next(first if own else second) for own in self.floating])


@dataclass(frozen=True)
class Loss:
    """A user's loss as it was traced once: `program` of what it closes over, `consts`, and of its arguments, flattened.

    So the arrays that it closes over, a model for instance, are arguments of the programs, and no constants in them.
    """

    program: Any
    consts: list[Any]

    @classmethod
    def of(cls, loss: Callable[..., Any], start: Start, example: object, now: Now) -> Loss:
        """Traces the loss of one example; TypeError or ValueError where it is no function of two or three arguments to a number.

        `example` and `now` are their shapes.
        """
        n = _count(loss)
        trained, carried = (
            [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in part] for part in (start.trained, start.carried)
        )

        def one(trained: list[Array], carried: list[Array], example: Any, now: Now) -> Any:
            given = start.joined(trained, carried), example, now
            found = loss(*given[:n])
            if not isinstance(found, Array | np.ndarray | np.generic | int | float):
                raise ValueError(
                    f"The loss returns a {type(found).__name__} of one example, and one floating-point number is needed."
                )
            return found

        program, value = jax.make_jaxpr(one, return_shape=True)(trained, carried, example, now)
        if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            what = f"{listing(value.shape)} of {value.dtype}"
            raise ValueError(f"The loss returns {what} of one example, and one floating-point number is needed.")
        return cls(program.jaxpr, list(program.consts))

    def __call__(self, consts: list[Any], *given: Any) -> Float[Array, ""]:
        return eval_jaxpr(self.program, consts, *jax.tree.leaves(given))[0]


def _count(loss: object) -> int:
    """How many arguments a loss takes: two, or three."""
    if not callable(loss):
        raise TypeError(f"loss is a {type(loss).__name__}, and a function loss(parameters, example) is needed.")
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(loss).parameters.values()
    except ValueError:
        raise TypeError(
            f"loss is {loss!r}, whose arguments cannot be read: give a function loss(parameters, example), which may call it."
        ) from None
    n = sum(x.kind in positional and x.default is inspect.Parameter.empty for x in parameters)
    if n not in (2, 3) and not any(x.kind is inspect.Parameter.VAR_POSITIONAL for x in parameters):
        raise TypeError(
            f"loss takes {n} arguments, and is called as loss(parameters, example) or loss(parameters, example, now)."
        )
    return 3 if n == 3 else 2


@dataclass(frozen=True)
class Programs:
    """`block` makes steps, `held_out` is the loss of examples that it never sees."""

    loss: Loss
    optimiser: optax.GradientTransformation
    n_fits: int
    batch_size: int
    fixed: dict[str, Any]

    @classmethod
    def of(
        cls, loss: Loss, optimiser: optax.GradientTransformation, start: Start, batch_size: int, **fixed: Any
    ) -> Programs:
        """`fixed` are `data`, `schedules` and `key`: what stays as it is throughout."""
        n_fits = start.trained[0].shape[0]
        return cls(loss, optimiser, n_fits, batch_size, {**fixed, "consts": loss.consts, "carried": start.carried})

    def state(self, trained: list[Array]) -> dict[str, Any]:
        """What steps change, at the beginning; the arrays are its own, and lie where a step will leave them."""
        trained = [jnp.array(x) for x in trained]
        own = jax.jit(mapped(self.optimiser.init, self.n_fits))(trained)
        return jax.device_put({"trained": trained, "optimiser": own}, _home(self.fixed))

    def block(
        self, state: dict[str, Any], order: Int[np.ndarray, "N B"], first: int, count: int
    ) -> tuple[dict[str, Any], Float[Array, "N R"]]:
        """The state after `count` steps from step `first` on, of the examples that rows of `order` name, and the losses of each."""
        return self._block(state, self.fixed, order, np.int32(first), np.int32(count))

    def held_out(self, trained: list[Array], held: object, step: int, steps: int) -> Float[Array, " R"]:
        """The mean loss of held-out examples, of each fit."""
        return self._held_out(trained, self.fixed, held, np.int32(min(step, steps - 1)), np.int32(steps))

    @cached_property
    def _block(self) -> Any:
        return compiled(donate=("state",))(_block_of(self))

    @cached_property
    def _held_out(self) -> Any:
        return compiled()(_held_out_of(self))


def _home(fixed: Any) -> Any:
    """Where a program puts what it makes of these arrays, if it is said; None for JAX's default.

    A state that lay elsewhere would have a program of its own in the first call, and another one from the second on.
    """
    for x in jax.tree.leaves(fixed):
        if isinstance(x, Array) and x.committed:
            mesh = getattr(x.sharding, "mesh", None)
            return x.sharding if mesh is None else NamedSharding(mesh, PartitionSpec())
    return None


def _block_of(programs: Programs) -> Any:
    def block(state: Any, fixed: Any, order: Array, first: Array, count: Array) -> Any:
        def step(number: Array, carry: Any) -> Any:
            state, losses = carry
            at = first + number
            batch = jax.tree.map(lambda x: x[order[number]], fixed["data"])
            row, key = jax.tree.map(lambda x: x[at], fixed["schedules"]), jax.random.fold_in(fixed["key"], at)

            def one(fit: Array, state: Any, carried: list[Array]) -> Any:
                keys = jax.random.split(jax.random.fold_in(key, fit), programs.batch_size)

                def mean(trained: list[Array]) -> Array:
                    def of(example: Any, key: Array) -> Array:
                        return programs.loss(fixed["consts"], trained, carried, example, Now(at, key, row))

                    return jnp.mean(mapped(of, programs.batch_size)(batch, keys))

                value, gradient = jax.value_and_grad(mean)(state["trained"])
                return moved(programs.optimiser, state, gradient), value

            state, value = mapped(one, programs.n_fits)(jnp.arange(programs.n_fits), state, fixed["carried"])
            return state, losses.at[number].set(value.astype(losses.dtype))

        losses = jnp.zeros((order.shape[0], programs.n_fits), jnp.float32)
        return jax.lax.fori_loop(0, count, step, (state, losses))

    return block


def moved(optimiser: optax.GradientTransformation, state: Mapping[str, Any], gradient: list[Array]) -> dict[str, Any]:
    """The state of one fit after a step of its optimiser."""
    trained = state["trained"]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax's own arithmetic
        updates, own = optimiser.update(gradient, state["optimiser"], trained)
    return {"trained": jax.tree.map(lambda x, u: x + u.astype(x.dtype), trained, updates), "optimiser": own}


def _held_out_of(programs: Programs) -> Any:
    def held_out(trained: list[Array], fixed: Any, held: Any, step: Array, steps: Array) -> Array:
        n = len(jax.tree.leaves(held)[0])
        row, key = jax.tree.map(lambda x: x[step], fixed["schedules"]), jax.random.fold_in(fixed["key"], steps)

        def one(fit: Array, trained: list[Array], carried: list[Array]) -> Array:
            def of(given: tuple[Any, Array]) -> Array:
                example, key = given
                return programs.loss(fixed["consts"], trained, carried, example, Now(step, key, row))

            keys = jax.random.split(jax.random.fold_in(key, fit), n)
            return jnp.mean(jax.lax.map(of, (held, keys), batch_size=min(n, programs.batch_size)))

        return mapped(one, programs.n_fits)(jnp.arange(programs.n_fits), trained, fixed["carried"])

    return held_out
