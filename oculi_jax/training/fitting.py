"""`fit`: what is learnt about a model whose weights stay, by steps of an optimiser; one fit, or many as one program."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from ..arrays import as_array, check_host, integer, listing, on_device, random_key
from ..data.streams import order
from ..pytrees import pytree
from ..sweeps.running import Progress, check_progress, told
from .resuming import Saved, job_of, path_of
from .steps import BLOCK, Loss, Now, Programs, Start
from .watching import Watch

if TYPE_CHECKING:
    import optax
    from jax import Array


@pytree
class Fit:
    """What `fit` found. With `many`, every leaf and array leads with, or ends in, the axes of the fits.

    Attributes:
        parameters: as `start`: after the last step; or, with `stop`, where the held-out loss was lowest.
        losses: `[steps, …]`, the mean loss of each step's batch, before that step; NaN after a fit has stopped, and no more steps
            than were made when all had.
        held_out: `[n, …]`, the mean loss of the held-out examples; None where there are none.
        measured: `[n]`, after how many steps these were measured.

    Examples:
        >>> key, target = jax.random.key(0), np.ones(8)
        >>> found = fit(lambda x, y: (x - y) ** 2, 0.0, target, steps=40, batch_size=4, key=key, held_out=target)
        >>> found.losses.shape, found.held_out.shape, found.measured[-3:]
        ((40,), (21,), array([36, 38, 40]))
    """

    parameters: Any
    losses: Float[np.ndarray, "N ..."]
    held_out: Float[np.ndarray, "M ..."] | None
    measured: Int[np.ndarray, "M"] | None


def fit(
    loss: Callable[..., Array],
    start: object,
    data: object,
    *,
    steps: int,
    batch_size: int,
    optimiser: optax.GradientTransformation | None = None,
    key: Array,
    held_out: object = None,
    many: int = 0,
    schedules: object = None,
    file: str | os.PathLike[str] | None = None,
    stop: int | None = None,
    progress: Progress | bool | None = None,
) -> Fit:
    """Fits the floating-point leaves of a pytree to a loss, by minibatches. Everything else, a model above all, stays as it is.

    A loss is of one example; `fit` maps and averages it. Steps run many to a call, on the device; which examples a step sees is a
    function of `key` and its number alone, each once before any twice. Host function.

    Args:
        loss: `loss(parameters, example) → number`, through `forward` for instance; or `loss(parameters, example, now)`, with a
            `Now`. What it closes over is read when it is traced, once.
        start: a pytree to begin from. Its floating-point leaves are trained, in float32 (float64 if they are that) whatever the
            model's dtype; others, a layer's number for instance, are carried.
        data: a pytree of arrays that lead with the examples.
        steps: how many.
        batch_size: examples a step.
        optimiser: of optax; `optax.adam(1e-2)` for None. Of several fits, each has its own state.
        key: a JAX random key, of the order of the examples and of `now.key`.
        held_out: as `data`, examples to measure the loss on before the first step, after each twentieth of the steps, and at the
            end.
        many: how many leading axes of every leaf of `start` are fits, independent of one another: layers × positions × seeds.
        schedules: a pytree of arrays `[steps, …]`, of what the loss varies by; a step finds its row in `now.schedule`. A schedule
            of the learning rate goes into `optimiser`: `optax.adam(optax.cosine_decay_schedule(0.1, steps))`.
        file: a safetensors file to go on from where there is one, and which is kept up to date: at most a tenth of the time goes
            into it. A process that was killed goes on, to the same parameters; another fit's file is refused.
        stop: a fit ends when so many measurements in a row of its held-out loss were no new lowest.
        progress: a function of how many steps are done and how many there are; None or True draws a bar, False nothing.

    Returns:
        A `Fit`.

    Raises:
        ValueError, TypeError: arguments that do not go together, a loss that is not one number, a file of another fit. OSError: a
            file that cannot be written.

    Examples:
        >>> def loss(vector, example):  # what to add for Italy's capital to be Paris
        ...     out = forward(model, example, Steer(2, vector), logits="last")
        ...     return -jax.nn.log_softmax(out.logits)[paris]
        >>> found = fit(loss, jnp.zeros(192), np.array([ids]), steps=200, batch_size=1, key=jax.random.key(0))
        >>> says(forward(model, ids, Steer(2, found.parameters)))
        'Paris'
    """
    check_host((start, data, held_out, schedules, key))
    steps, batch_size = integer(steps, "steps", 1), integer(batch_size, "batch_size", 1)
    path = path_of(file)
    check_progress(progress)
    begun, axes = check_parameters(start, integer(many, "many", 0))
    data, n = check_examples(data, "data")
    if batch_size > n:
        raise ValueError(f"batch_size is {batch_size}, and data holds {n} examples.")
    held = None if held_out is None else check_examples(held_out, "held_out", like=data)[0]
    rows = _check_schedules(schedules, steps)
    if stop is not None and held is None:
        raise ValueError("stop is a patience on the held-out loss, and there are no held_out examples.")
    patience = None if stop is None else integer(stop, "stop", 1)
    typed, chosen = random_key(key), _check_optimiser(optimiser)

    example, row = (jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree) for tree in (data, rows))
    now = jax.eval_shape(lambda: Now(jnp.int32(0), typed, None))
    now = replace(now, schedule=row)
    traced = Loss.of(loss, begun, example, now)
    programs = Programs.of(traced, chosen, begun, batch_size, data=data, schedules=rows, key=typed)
    watch = Watch.of(programs, held, steps, patience, begun.trained)
    saved = None
    if path is not None:
        given = {"data": data, "held_out": held, "schedules": rows}
        job = job_of(programs, begun, axes, given, steps=steps, batch_size=batch_size, stop=patience)
        saved = Saved.open(path, job)
    number = int.from_bytes(np.asarray(jax.random.key_data(typed)).tobytes(), "little")
    losses = _run(programs, watch, begun, partial(order, n, batch_size, key=number), saved, progress)
    return _result(begun, axes, losses, watch)


def _run(
    programs: Programs,
    watch: Watch,
    begun: Start,
    order_from: Callable[..., Iterator[np.ndarray]],
    saved: Saved | None,
    progress: Progress | bool | None,
) -> Float[np.ndarray, "N R"]:
    """Makes the steps, block by block; leaves the last parameters with the watch, and returns the losses."""
    steps, size, wrong = watch.steps, 1, False
    losses = np.full((steps, programs.n_fits), np.nan, np.float32)
    state, done = programs.state(begun.trained), 0
    if saved is not None:
        state, done = saved.read(state, losses, watch)
    batches = order_from(start=done)
    with told("Fitting", progress, steps) as advance:
        advance(done)
        while True:
            watch.look(state["trained"], done)
            over = done == steps or not watch.alive.any()
            if saved is not None:
                saved.write(state, losses[:done], watch, always=over)
            if over:
                break
            count = min(size, watch.next(done) - done)
            chosen = np.zeros((BLOCK, programs.batch_size), np.int32)
            chosen[:count] = list(islice(batches, count))
            begin = time.perf_counter()
            state, found = programs.block(state, chosen, done, count)
            losses[done : done + count] = np.where(watch.alive, np.asarray(found)[:count], np.nan)
            took = time.perf_counter() - begin
            # As many steps a call as take a second or so: few calls, and a file and a bar that are up to date.
            size = min(2 * size, BLOCK) if took < 0.5 else max(size // 2, 1) if took > 2 else size
            wrong = wrong or _warned(losses[done : done + count][:, watch.alive], done)
            done += count
            advance(count)
    watch.finish(state["trained"])
    return losses[:done]


def _warned(losses: Float[np.ndarray, "N R"], first: int) -> bool:
    """Says where a loss is not finite."""
    wrong = np.flatnonzero(~np.isfinite(losses).all(axis=1))
    if wrong.size:
        warnings.warn(
            f"A loss is not finite at step {first + wrong[0]}: what is fitted from there on is of no use.", stacklevel=4
        )
    return bool(wrong.size)


def _result(begun: Start, axes: tuple[int, ...], losses: np.ndarray, watch: Watch) -> Fit:
    """With the axes of the fits as they were given."""

    def apart(leaves: Sequence[Array]) -> list[Array]:
        return [x.reshape(*axes, *x.shape[1:]) for x in leaves]

    parameters = begun.joined(apart(watch.best), apart(begun.carried))
    if watch.held is None:
        return Fit(parameters, losses.reshape(-1, *axes), None, None)
    return Fit(parameters, losses.reshape(-1, *axes), np.stack(watch.values).reshape(-1, *axes), np.array(watch.at))


def check_parameters(start: object, many: int) -> tuple[Start, tuple[int, ...]]:
    """The leaves of a start with one axis of fits, and the axes that they were given with."""
    named, tree = jax.tree_util.tree_flatten_with_path(start)
    leaves = [as_array(x) for _, x in named]
    floating = tuple(bool(jnp.issubdtype(x.dtype, jnp.floating)) for x in leaves)
    if not any(floating):
        raise ValueError(
            f"start has no floating-point leaf, so there is nothing to fit: of its leaves, {len(leaves)}, all are carried."
        )
    axes = leaves[0].shape[:many]
    for (path, _), x in zip(named, leaves, strict=True):
        if not jnp.issubdtype(x.dtype, jnp.number) and x.dtype != bool:
            raise TypeError(f"start{jax.tree_util.keystr(path)} is an array of {x.dtype}, and numbers are needed.")
        own = x.shape[:many]
        if len(own) < many or own != axes or 0 in own:
            raise ValueError(
                f"start{jax.tree_util.keystr(path)} has shape {listing(x.shape)}, and many={many} says that every leaf leads "
                f"with {f'the same {many} axes' if many > 1 else 'the axis'} of the fits"
                + (f", {listing(axes)}." if len(axes) == many else ".")
            )

    def cast(x: Any, trained: bool) -> Array:
        wide = x.dtype if not trained or x.dtype == np.float64 else np.float32
        return jnp.asarray(x, jax.dtypes.canonicalize_dtype(wide)).reshape(-1, *x.shape[many:])

    both = [cast(x, own) for x, own in zip(leaves, floating, strict=True)]
    trained = [x for x, own in zip(both, floating, strict=True) if own]
    carried = [x for x, own in zip(both, floating, strict=True) if not own]
    return Start(tree, floating, trained, carried), axes


def check_examples(data: object, what: str, like: object = None) -> tuple[Any, int]:
    """Examples on the device, and how many there are; where `like` is given, of the same kind."""
    found = jax.tree_util.tree_map_with_path(partial(_placed, what), data)
    named = jax.tree_util.tree_leaves_with_path(found)
    if not named:
        raise ValueError(f"{what} is {data!r}: there is no array in it.")
    for path, x in named:
        if not x.ndim or len(x) != len(named[0][1]) or not len(x):
            raise ValueError(
                f"{what}{jax.tree_util.keystr(path)} has shape {listing(x.shape)}, and every array of it leads with the examples"
                + (f", {len(named[0][1])} of them." if named[0][1].ndim else ".")
            )
    if like is not None:
        kinds = [
            (jax.tree.structure(tree), [(x.shape[1:], x.dtype) for x in jax.tree.leaves(tree)])
            for tree in (found, like)
        ]
        if kinds[0] != kinds[1]:
            raise ValueError(f"{what} holds examples of another kind than data: {kinds[0]} beside {kinds[1]}.")
    return found, len(named[0][1])


def _placed(what: str, path: Any, values: object) -> Array:
    """An array of numbers, on the device as it was on the host."""
    array = as_array(values)
    if on_device(array):
        return array
    name = f"{what}{jax.tree_util.keystr(path)}"
    if not jnp.issubdtype(array.dtype, jnp.number) and array.dtype != bool:
        raise TypeError(
            f"{name} is an array of {array.dtype}, and numbers are needed: of texts their ids, of a function its values."
        )
    own = jax.dtypes.canonicalize_dtype(array.dtype)
    if array.dtype.kind in "iu" and array.size and not np.can_cast(array.dtype, own):
        low, high = np.iinfo(own).min, np.iinfo(own).max
        if array.min() < low or array.max() > high:
            raise ValueError(f"{name} holds {array.min()} to {array.max()}, and a {own} holds {low} to {high}.")
    return jnp.asarray(array)


def _check_schedules(schedules: object, steps: int) -> Any:
    found = jax.tree_util.tree_map_with_path(partial(_placed, "schedules"), schedules)
    for path, x in jax.tree_util.tree_leaves_with_path(found):
        if x.shape[:1] != (steps,):
            raise ValueError(
                f"schedules{jax.tree_util.keystr(path)} has shape {listing(x.shape)}, and must lead with the steps, {steps}."
            )
    return found


def _check_optimiser(optimiser: object) -> Any:
    if optimiser is None:
        import optax

        return optax.adam(1e-2)
    if not (hasattr(optimiser, "init") and hasattr(optimiser, "update")):
        raise TypeError(f"optimiser is {optimiser!r}, and one of optax is needed, for instance optax.adam(1e-2).")
    return optimiser
