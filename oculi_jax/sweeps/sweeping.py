"""`sweep`, many interventions in one program: the metric of every variant, on one prompt or several."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ..arrays import AnyArray, integer, under_trace
from ..backends import find_model, programs_of
from ..buckets import buckets_of, columns_of_a_program, whole
from ..intervention.frame import Frame
from ..intervention.rows import Rows
from ..metrics import Metric, apply_metric, check_metric
from ..output import Output
from ..prompts import check_prompts
from .grouping import make_plan
from .planning import PLANNERS, Cost, Plan, SweepPlan, plans
from .reach import Needs, Reach, needs_of, reaches_of
from .running import Prepared, Progress, check_progress, execute

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..intervention.protocol import Interventions
    from ..metrics import MetricLike
    from ..models.decoder.model import Decoder

Given = ParamSpec("Given")


def sweep(
    model: Decoder,
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
        model: a model of any family, or a Hugging Face one.
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
    check_progress(progress)
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


@overload
def plan(
    model: Decoder,
    tokens: ArrayLike,
    interventions: Interventions,
    metric: Callable[..., Any],
    *,
    mask: ArrayLike | None = None,
    batch_size: int | Literal["auto"] = "auto",
    reuse: bool = True,
    progress: Progress | bool | None = None,
    mesh: Mesh | None = None,
) -> SweepPlan: ...
@overload
def plan(function: Callable[Given, Any], /, *given: Given.args, **named: Given.kwargs) -> Plan: ...
def plan(*given: Any, **named: Any) -> Plan:
    """What a call will run, and what that costs: operations, memory, about how many seconds. Nothing is run.

    `plan(model, tokens, interventions, metric, …)` is the plan of `sweep` with these arguments. `plan(activation_patching,
    model, clean, corrupted, metric, …)` is that of `activation_patching` with the arguments that follow it, its two runs
    included; likewise of `attribution_patching`.

    Returns:
        A `Plan`; a `SweepPlan` of what sweeps.

    Raises:
        ValueError, TypeError: as the call itself; for a function that has no plan; under a trace (jit, vmap, grad).

    Examples:
        >>> plan(model, ids, HeadAblation.grid(model.config), metric).axes
        (4, 6)
        >>> todo = plan(causal.activation_patching, model, ids, other, metric, by=("layer", "position"))
        >>> todo.axes, todo.n_runs  # one run of each place, and the two that they are made of
        ((4, 6), 26)
    """
    function: Any = sweep
    if given and callable(given[0]) and not hasattr(given[0], "config"):  # no model
        function, given = given[0], given[1:]
    planner = PLANNERS.get(function)
    if planner is None:
        name = getattr(function, "__name__", repr(function))
        known = ", ".join(planned.__name__ for planned in PLANNERS)
        raise TypeError(f"{name} has no plan; what has one is {known}: plan(function, …), with its own arguments.")
    if under_trace((given, named)):
        raise TypeError("plan needs values, and was given traced arrays: under a trace a sweep is the plain vmap.")
    try:
        bound = inspect.signature(function).bind(*given, **named)
    except TypeError as error:
        raise TypeError(f"plan of {function.__name__}: {error}.") from None
    bound.apply_defaults()
    return planner(**bound.arguments)


@plans(sweep)
def _plan_of_sweep(
    model: Decoder,
    tokens: ArrayLike,
    interventions: Interventions,
    metric: MetricLike,
    mask: ArrayLike | None,
    batch_size: int | Literal["auto"],
    reuse: bool,
    progress: object,
    mesh: Mesh | None,
) -> SweepPlan:
    model = find_model(model)
    tokens, mask, _ = check_prompts(model.config, tokens, mask)
    return plan_prompts(model, tokens, mask, interventions, metric, batch_size, reuse, mesh)


def plan_prompts(
    model: Decoder,
    tokens: AnyArray,
    mask: AnyArray | None,
    interventions: Interventions,
    metric: MetricLike,
    batch_size: int | Literal["auto"] = "auto",
    reuse: bool = True,
    mesh: Mesh | None = None,
    held: int = 0,
) -> SweepPlan:
    """The plan of `sweep_prompts`, where so many bytes will be `held` that are free now."""
    return _plan(_prepare(model, tokens, mask, interventions, metric, mesh), batch_size, reuse, held)


def sweep_prompts(
    model: Decoder,
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
    found = None if prepared.traced else execute(prepared, _plan(prepared, batch_size, reuse), progress)
    traced = found is None
    if traced:
        whole = _prepare(model, tokens, mask, interventions, metric, mesh, cut=False)
        found = programs_of(whole.model).run_variants(
            whole.model, whole.tokens, whole.mask, whole.rows, size=whole.size,
            metric=whole.metric, metric_by_prompt=whole.metric_by_prompt, mesh=whole.mesh,
        ).value  # fmt: skip
    lead = prepared.axes if single else (len(tokens), *prepared.axes)
    # On the host NumPy reshapes, for which JAX would compile a program.
    found = jax.tree.map(lambda x: x.reshape((*lead, *x.shape[2:])), found)
    return found if traced else jax.device_put(found)


def _prepare(
    model: Any, tokens: Any, mask: Any, interventions: Any, metric: Any, mesh: Mesh | None, cut: bool = True
) -> Prepared:
    """What a sweep is given, checked and canonical; `cut` says whether prompts may run with their own columns alone."""
    model = find_model(model)
    config = model.config
    metric, leads = check_metric(metric, config.vocab_size, tokens, mask)
    n_prompts, n_tokens = tokens.shape
    if cut := cut and mask is not None and not under_trace((tokens, mask)):
        tokens, mask = np.asarray(tokens), np.asarray(mask)
    masks = [None] * n_prompts if mask is None else mask
    frames = [Frame(config, model.dtype, n_tokens, row) for row in masks]
    rows, axes = Rows.of(interventions, frames)
    traced = under_trace((model, tokens, mask, rows, metric))
    size = int(np.prod(axes, dtype=int))
    needs = Needs("", False, False) if traced else needs_of(rows, tokens, mask, size, config)
    if cut and (traced or needs.columns):
        return _prepare(model, tokens, mask, interventions, metric, mesh, cut=False)
    shared, varying = rows.split()
    return Prepared(
        model, tokens, mask, rows, shared=shared, varying=varying, axes=axes, metric=metric, metric_by_prompt=leads,
        mesh=_mesh(model, mesh), n_tokens=n_tokens, cut=cut, needs=needs, traced=traced,
    )  # fmt: skip


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


def _plan(prepared: Prepared, batch_size: Any, reuse: bool, held: int = 0) -> SweepPlan:
    size = None if batch_size == "auto" else integer(batch_size, "batch_size", 1, note=", or 'auto'")
    model = prepared.model
    programs, n_layers = programs_of(model), model.config.num_hidden_layers
    _check_value(prepared)
    platform, free = programs.room(model)
    n_prompts = len(prepared.tokens)
    cost = cost_of(model, prepared.n_tokens, n_prompts, prepared.metric, prepared.mesh)
    if prepared.cut:
        work = prepared.size * n_layers * cost.flops_of_layer(1)
        buckets = buckets_of(prepared.mask, columns_of_a_program(platform, work))
    else:
        buckets = [whole(n_prompts, prepared.n_tokens)]
    reaches: list[Reach | None] = [None] * len(buckets)
    if reuse and prepared.size > 1:
        reaches = [*reaches_of(prepared, buckets)]
    made = make_plan(cost, prepared.axes, buckets, reaches, batch_size=size, budget=max(free - held, 0) // 2)
    return replace(made, note=prepared.needs.later if any(reaches) else "", rate=partial(programs.rate, model))


def cost_of(model: Decoder, n_tokens: int, n_prompts: int, metric: MetricLike, mesh: Mesh | None = None) -> Cost:
    """What calls of a model cost that run prompts of so many tokens and measure them, spread over the `data` of a mesh."""
    n_read, n_ids = None, model.config.vocab_size
    if isinstance(metric, Metric):
        n_read = len(metric.positions)
        n_ids = n_ids if metric.ids is None else metric.ids.shape[-1]
    platform, _ = programs_of(model).room(model)
    n_devices = 1 if mesh is None else mesh.shape["data"]
    _, n_parts = programs_of(model).spread(model)
    return Cost(model.config, n_tokens, n_prompts, n_read, n_ids, model.dtype.itemsize, platform, n_devices, n_parts)


def _check_value(prepared: Prepared) -> None:
    """TypeError for a function that returns no array, before anything runs."""
    if isinstance(prepared.metric, Metric):
        return
    logits = jax.ShapeDtypeStruct((prepared.n_tokens, prepared.model.config.vocab_size), np.float32)
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
