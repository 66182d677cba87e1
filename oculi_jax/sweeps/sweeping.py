"""`sweep`, many interventions in one program: the metric of every variant, on one prompt or several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..arrays import AnyArray, integer, on_device, under_trace
from ..backends import find_model, programs_of
from ..intervention.frame import Frame
from ..intervention.rows import Rows
from ..metrics import Metric, apply_metric, check_metric
from ..output import Output
from ..prompts import check_prompts
from ..utils.progress import progress as progress_bar
from .planning import Cost, Group, SweepPlan, make_plan
from .reach import first_touched, what_needs_all_tokens

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..intervention.protocol import Interventions
    from ..metrics import MetricLike
    from ..models.llama.model import Llama

Progress = Callable[[int, int], None]


def sweep(
    model: Llama,
    tokens: ArrayLike,
    interventions: Interventions,
    metric: Callable[..., Any],
    *,
    mask: ArrayLike | None = None,
    batch_size: int | Literal["auto"] = "auto",
    reuse: bool = True,
    progress: Progress | bool | None = None,
    mesh: Mesh | None = None,
) -> Any:
    """Runs a model under every variant of interventions, and returns the metric of each.

    A field carries the axes of the sweep in front of its own, and all fields' axes broadcast together: a `HeadAblation` whose
    layer is `[L, 1]` and head `[1, H]` makes `[L, H]`; a `Steer` with a vector `[N, E]` makes `[N]`. What has no such axes is
    shared by all variants, as is a `PerLayer`; a `PerPrompt` holds one entry for each of several prompts.

    Equal to one `forward` for each variant, to rounding. Only what a variant can have changed is run: an edit at layer l
    leaves earlier layers as they were, one at a token leaves earlier tokens (unless something lets queries see later keys). `plan`
    says what will be run. Other tokens, targets, strengths and values run the same programs; other layers, positions or numbers
    of variants may be grouped otherwise, which compiles once for each new size of a group. Under an outer `jit`, `vmap` or
    `grad` it is the plain `vmap` of whole runs.

    Args:
        model: a `Llama`.
        tokens: ids `[T]`, or `[B, T]` for several prompts, padded to one length.
        interventions: one or a list, applied in order; those without axes are in every variant.
        metric: one of `oculi_jax.metrics`, or any function of an `Output` (with all logits `[T, V]`, no activations and
            nothing in `applied`) to a pytree of arrays. A metric's ids are data; a function is a part of the program, and what
            it closes over is read once.
        mask: bool, shaped as `tokens`, True at real tokens.
        batch_size: how many variants run at once; chosen from the costs and the free memory for `"auto"`.
        reuse: False runs every variant whole.
        progress: a function of how many (variant, prompt) pairs are done and how many there are; None or True draws a bar on
            a terminal after a second, False nothing.
        mesh: a mesh with an axis `data`, over which variants spread; for None, that of a sharded model.

    Returns:
        The metric's value with the axes of the sweep in front, `[*axes, …]`; `[B, *axes, …]` for several prompts.

    Raises:
        ValueError, TypeError: something that can be seen to be wrong, before anything runs.

    Examples:
        >>> effects = sweep(model, ids, HeadAblation.grid(model.config), metric)  # each of 24 heads, absent
        >>> effects.shape, bool((effects < metric(forward(model, ids))).any())
        ((4, 6), True)
    """
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise TypeError(f"progress is {progress!r}, and must be None, a bool, or a function of (done, total).")
    model = find_model(model)
    tokens, mask, single = check_prompts(model.config, tokens, mask)
    return sweep_prompts(
        model,
        tokens,
        mask,
        interventions,
        metric=metric,
        batch_size=batch_size,
        reuse=reuse,
        progress=progress,
        mesh=mesh,
        single=single,
    )


def plan(
    model: Llama,
    tokens: ArrayLike,
    interventions: Interventions,
    metric: Callable[..., Any],
    *,
    mask: ArrayLike | None = None,
    batch_size: int | Literal["auto"] = "auto",
    reuse: bool = True,
    mesh: Mesh | None = None,
) -> SweepPlan:
    """What `sweep` with these arguments will do: the groups of variants, their cost beside whole runs, and the memory.

    Raises:
        ValueError, TypeError: as `sweep`; under a trace (jit, vmap, grad) too, where it has no plan.

    Examples:
        >>> plan(model, ids, HeadAblation.grid(model.config), metric).naive_layer_evaluations  # 24 variants × 4 layers
        96.0
    """
    model = find_model(model)
    tokens, mask, _ = check_prompts(model.config, tokens, mask)
    prepared = _prepare(model, tokens, mask, interventions, metric, mesh)
    if prepared.traced:
        raise TypeError("plan needs values, and was given traced arrays: under a trace a sweep is the plain vmap.")
    return _plan(prepared, batch_size, reuse)


@dataclass(frozen=True)
class _Prepared:
    """Everything checked and canonical.

    Attributes:
        rows: interventions over prompts and variants.
        shared: those of them that are the same in all variants.
        varying: those that are not (all, where none varies).
        traced: whether something is a tracer.
    """

    model: Any
    tokens: Any
    mask: Any
    rows: Rows
    shared: Rows
    varying: Rows
    axes: tuple[int, ...]
    metric: Any
    metric_by_prompt: tuple[bool, ...]
    mesh: Mesh | None
    traced: bool

    @property
    def size(self) -> int:
        return int(np.prod(self.axes, dtype=int))


def sweep_prompts(
    model: Llama,
    tokens: AnyArray,
    mask: AnyArray | None,
    interventions: Interventions,
    metric: MetricLike,
    batch_size: int | Literal["auto"] = "auto",
    reuse: bool = True,
    progress: Progress | bool | None = None,
    mesh: Mesh | None = None,
    single: bool = False,
) -> Any:
    """`sweep` of checked prompts `[B, T]`.

    Returns:
        `[B, *axes, …]`; `[*axes, …]` where there is a `single` prompt.
    """
    prepared = _prepare(model, tokens, mask, interventions, metric, mesh)
    found = None if prepared.traced else _execute(prepared, _plan(prepared, batch_size, reuse), progress)
    traced = found is None
    if traced:
        found = programs_of(prepared.model).run_variants(
            prepared.model, prepared.tokens, prepared.mask, prepared.rows, size=prepared.size,
            metric=prepared.metric, metric_by_prompt=prepared.metric_by_prompt, mesh=prepared.mesh,
        ).value  # fmt: skip
    lead = prepared.axes if single else (len(tokens), *prepared.axes)
    # On the host NumPy reshapes, for which JAX would compile a program.
    found = jax.tree.map(lambda x: x.reshape((*lead, *x.shape[2:])), found)
    return found if traced else jax.device_put(found)


def _prepare(model: Any, tokens: Any, mask: Any, interventions: Any, metric: Any, mesh: Mesh | None) -> _Prepared:
    model = find_model(model)
    config = model.config
    metric, leads = check_metric(metric, config.vocab_size, tokens, mask)
    n_tokens, dtype = tokens.shape[1], model.dtype
    masks = [None] * len(tokens) if mask is None else mask
    frames = [Frame(config, dtype, n_tokens, row) for row in masks]
    rows, axes = Rows.of(interventions, frames)
    shared, varying = rows.split()
    mesh = _mesh(model, mesh)
    traced = under_trace((model, tokens, mask, rows, metric))
    return _Prepared(
        model,
        tokens,
        mask,
        rows,
        shared=shared,
        varying=varying,
        axes=axes,
        metric=metric,
        metric_by_prompt=leads,
        mesh=mesh,
        traced=traced,
    )


def _mesh(model: Any, mesh: Mesh | None) -> Mesh | None:
    """The mesh whose `data` axis variants spread over; None for one device."""
    if mesh is not None and not isinstance(mesh, Mesh):
        raise TypeError(
            f"mesh is a {type(mesh).__name__}, and a jax.sharding.Mesh of devices is needed: jax.make_mesh(…)."
        )
    if not programs_of(model).traceable:
        if mesh is not None:
            raise ValueError("A mesh is of JAX's devices, and this model is run by torch on its own: leave mesh out.")
        return None
    sharding = getattr(model.embed[...], "sharding", None)
    own: Any = sharding.mesh if isinstance(sharding, NamedSharding) else None
    mesh = own if mesh is None else mesh
    if mesh is None:
        return None
    if "data" not in mesh.axis_names:
        raise ValueError(f"The mesh has axes {', '.join(map(str, mesh.axis_names))}, and one called 'data' is needed.")
    if own is not None and own != mesh:
        raise ValueError("The model lies on another mesh than the one given; load it with mesh=.")
    return mesh if mesh.shape["data"] > 1 else None


def _plan(prepared: _Prepared, batch_size: Any, reuse: bool) -> SweepPlan:
    size = None if batch_size == "auto" else integer(batch_size, "batch_size", 1, note=", or 'auto'")
    model, metric = prepared.model, prepared.metric
    config = model.config
    n_prompts, n_tokens = prepared.tokens.shape
    _check_value(prepared)
    n_read, n_ids = n_tokens, config.vocab_size
    if isinstance(metric, Metric):
        n_read = len(metric.positions)
        n_ids = n_ids if metric.ids is None else metric.ids.shape[-1]
    platform, free = programs_of(model).room(model)
    n_devices = 1 if prepared.mesh is None else prepared.mesh.shape["data"]
    cost = Cost(config, n_tokens, n_read * n_ids, model.dtype.itemsize, platform, n_devices)
    first_layers = first_tokens = None
    note = ""
    if reuse and prepared.size > 1:
        reached = first_touched(prepared.varying, prepared.tokens, prepared.mask, prepared.size, config)
        first_layers, first_tokens = map(np.asarray, reached)
        note = what_needs_all_tokens(prepared.rows, prepared.tokens, prepared.mask, prepared.size, config)
        if note:
            first_tokens = np.minimum(first_tokens, 0)
    made = make_plan(
        cost, prepared.axes, n_prompts, first_layers, first_tokens=first_tokens, batch_size=size, budget=free // 2
    )
    return replace(made, note=note, rate=partial(programs_of(model).rate, model))


def _check_value(prepared: _Prepared) -> None:
    """TypeError for a function that returns no array, before anything runs."""
    if isinstance(prepared.metric, Metric):
        return
    logits = jax.ShapeDtypeStruct((prepared.tokens.shape[1], prepared.model.config.vocab_size), np.float32)
    mask = None if prepared.mask is None else prepared.mask[0]
    value = jax.eval_shape(
        lambda metric, logits, mask: apply_metric(metric, Output(logits, {}, jnp.zeros(0, jnp.int32), mask)),
        prepared.metric,
        logits,
        mask,
    )
    if not jax.tree.leaves(value):
        raise TypeError(
            "The metric returns no array: what it returns of an Output is what a sweep gives for each variant."
        )


def _execute(prepared: _Prepared, plan: SweepPlan, progress: Any) -> Any:
    """Runs a plan call by call; the next call is made ready while one runs.

    Returns:
        NumPy arrays `[B, N, …]`; None where a tracer came to light in what a metric's own function holds.
    """
    mesh, model, programs = prepared.mesh, prepared.model, programs_of(prepared.model)
    if mesh is not None and not isinstance(model.embed[...].sharding, NamedSharding):
        prepared = replace(prepared, model=jax.device_put(model, NamedSharding(mesh, PartitionSpec())))
    results: list[np.ndarray] = []
    tree: Any = None
    running: list[tuple[np.ndarray, np.ndarray, Any]] = []

    def collect() -> int:
        nonlocal tree
        prompts, members, out = running.pop(0)
        leaves, tree = jax.tree.flatten(out)
        for number, leaf in enumerate(map(np.asarray, leaves)):
            if len(results) == number:
                results.append(np.empty((plan.n_prompts, prepared.size, *leaf.shape[2:]), leaf.dtype))
            results[number][np.ix_(prompts, members)] = leaf[: len(prompts), : len(members)]
        return len(prompts) * len(members)

    with _progress(progress, plan.n_prompts * prepared.size) as advance:
        for begin in range(0, plan.n_prompts, plan.prompts):
            prompts = np.arange(begin, min(begin + plan.prompts, plan.n_prompts))
            chunk = _of_prompts(prepared, prompts, plan.prompts)
            base = None
            if plan.reuse:
                keep_keys = any(group.n_rows < plan.n_tokens for group in plan.groups)
                base = programs.run_base(chunk.model, chunk.tokens, chunk.mask, chunk.shared, keys=keep_keys)
            for group in plan.groups:
                rows = _of_variants(chunk.rows, group, prepared.mesh)
                out = programs.run_variants(
                    chunk.model, chunk.tokens, chunk.mask, rows, size=group.size,
                    metric=chunk.metric, metric_by_prompt=chunk.metric_by_prompt, mesh=prepared.mesh,
                    base=base, start=np.asarray(group.start, np.int32) if plan.reuse else 0,
                    n_rows=group.n_rows if plan.reuse else None,
                ).value  # fmt: skip
                if any(isinstance(x, Tracer) for x in jax.tree.leaves(out)):
                    return None
                running.append((prompts, group.variants, out))
                if len(running) > 1:
                    advance(collect())
        while running:
            advance(collect())
    return jax.tree.unflatten(tree, results)


def _take(x: Any, places: np.ndarray, size: int, axis: int) -> Any:
    """Entries of an axis, the last one repeated until there are `size`."""
    if len(places) == size == x.shape[axis] and (places == np.arange(size)).all():
        return x
    places = np.concatenate([places, np.full(size - len(places), places[-1], places.dtype)])
    return (jnp if on_device(x) else np).take(x, places, axis=axis)


def _of_prompts(prepared: _Prepared, prompts: np.ndarray, size: int) -> _Prepared:
    """The part of a sweep that is about some prompts."""

    # What all variants share goes to the device, or to those of the mesh, once and not with every call; torch has its own.
    on_host = not programs_of(prepared.model).traceable
    everywhere = None if prepared.mesh is None else NamedSharding(prepared.mesh, PartitionSpec())

    def take(x: Any, by_prompt: bool = True, by_variant: bool = False) -> Any:
        x = _take(x, prompts, size, 0) if by_prompt else x
        return x if by_variant or on_host else jax.device_put(x, everywhere)

    def rows(given: Rows) -> Rows:
        return replace(given, leaves=list(map(take, given.leaves, given.by_prompt, given.by_variant)))

    leaves, tree = jax.tree.flatten(prepared.metric)
    return replace(
        prepared, tokens=take(prepared.tokens), mask=None if prepared.mask is None else take(prepared.mask),
        rows=rows(prepared.rows), shared=rows(prepared.shared),
        metric=jax.tree.unflatten(tree, list(map(take, leaves, prepared.metric_by_prompt))),
    )  # fmt: skip


def _of_variants(rows: Rows, group: Group, mesh: Mesh | None) -> Rows:
    """The leaves of a group, laid out over the mesh where there is one."""
    leaves = []
    for leaf, by_prompt, by_variant in zip(rows.leaves, rows.by_prompt, rows.by_variant, strict=True):
        if by_variant:
            leaf = _take(leaf, group.variants, group.size, int(by_prompt))
            if mesh is not None:
                spec = PartitionSpec(*((None, "data") if by_prompt else ("data",)))
                leaf = jax.device_put(leaf, NamedSharding(mesh, spec))
        leaves.append(leaf)
    return replace(rows, leaves=leaves)


@contextmanager
def _progress(progress: Any, total: int) -> Iterator[Callable[[int], None]]:
    """`advance(n)`, which draws a bar, calls the user's function, or does nothing."""
    if progress is None or progress is True:
        with progress_bar("sweep", total) as advance:
            yield advance
        return
    done = 0

    def call(amount: int) -> None:
        nonlocal done
        done += amount
        if callable(progress):
            progress(done, total)

    yield call
