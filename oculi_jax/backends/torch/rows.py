"""Interventions of many rows as edits on the host: what a backend that is no JAX program reads of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ...arrays import under_trace
from ...buckets import widened
from ...intervention.edit import Edit, cut, lower
from ...intervention.rows import Rows
from ...metrics import Metric, apply_metric
from ...output import Output
from ...sites import SITES, Site, site_of

if TYPE_CHECKING:
    from jax import Array

    from ...arrays import AnyArray
    from ...buckets import Window
    from ...metrics import MetricLike


class Leaf(NamedTuple):
    """An array of an edit: of all rows, or with an entry for each of some, which `which[row]` names."""

    array: np.ndarray
    which: np.ndarray | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that one row sees."""
        return self.array.shape if self.which is None else self.array.shape[1:]

    @property
    def ndim(self) -> int:
        return len(self.shape)


class _Varies(NamedTuple):
    """A leaf with an axis of prompts, of variants, or both, in this order: which of them is told by the type of its parts."""

    by_prompt: tuple[()] | None
    by_variant: tuple[()] | None
    array: Any


def refuse_trace(values: object) -> None:
    """TypeError where something is traced: torch runs outside of JAX's transformations."""
    if under_trace(values):
        raise TypeError(
            "This model runs in torch, which no jit, vmap or grad of JAX reaches into: call it outside of them (for many "
            "interventions use sweep), or load the model with oculi_jax.from_pretrained(directory)."
        )


def lowered(
    rows: Rows,
    sizes: Mapping[str, int],
    n_prompts: int,
    size: int = 1,
    n_covered: int | None = None,
    sites: Mapping[str, Site] = SITES,
    window: Window | None = None,
) -> list[tuple[int, Edit]]:
    """The edits of all rows, prompts × variants, numbered by their interventions; their arrays are each a `Leaf`.

    They are for a run of `sizes`; what the interventions' arrays cover is told by the window, if there is one.

    ValueError for one at a site that is none of `sites`, the model's.

    What rows share is one array, however many there are: an edit's array has an axis only where it depends on a field that has it.
    """
    if not rows.leaves:
        return []
    arrays = [np.asarray(leaf) for leaf in rows.leaves]
    covered = None if n_covered is None else np.int32(n_covered)
    by_prompt, by_variant, columns = rows.by_prompt, rows.by_variant, None
    if window is not None:  # one leaf more, the last
        arrays, by_prompt, by_variant = [*arrays, np.asarray(window.first)], (*by_prompt, True), (*by_variant, False)
        columns = window.n_columns
    found = _lowered(arrays, covered, rows.tree, by_prompt, by_variant, tuple(sorted(sizes.items())), columns)
    prompt, variant = np.divmod(np.arange(n_prompts * size), size)

    def leaf(x: _Varies) -> Leaf:
        array = np.asarray(x.array)
        if x.by_prompt is None or x.by_variant is None:
            which = None if x.by_prompt is x.by_variant else prompt if x.by_variant is None else variant
            return Leaf(array, which)
        return Leaf(array.reshape(-1, *array.shape[2:]), prompt * size + variant)

    marked = jax.tree.map(leaf, found, is_leaf=lambda x: isinstance(x, _Varies))
    edits = [(number, edit) for number, edits in sorted(marked.items()) for edit in edits]
    for _, edit in edits:
        site_of(edit.site, sites)
    return edits


@partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _lowered(
    leaves: list[Any],
    n_covered: Any,
    tree: Any,
    by_prompt: tuple[bool, ...],
    by_variant: tuple[bool, ...],
    sizes: tuple[tuple[str, int], ...],
    n_columns: int | None,
) -> dict[int, list[Edit]]:
    """The edits of each intervention, their leaves as `_Varies`; the last leaf is where a window of `n_columns` begins."""
    run = dict(sizes)

    def one(leaves: list[Any]) -> dict[int, list[Edit]]:
        if n_columns is None:
            edits = lower(jax.tree.unflatten(tree, leaves), run, n_covered)
        else:
            given = {**run, "T": n_columns, "S": n_columns}
            edits = lower(jax.tree.unflatten(tree, leaves[:-1]), given, n_covered)
            edits = [(number, cut(edit, leaves[-1] + jnp.arange(run["T"]), given, "TS")) for number, edit in edits]
        return {number: [edit for own, edit in edits if own == number] for number, _ in edits}

    each = [leaf[(0,) * (p + v)] for leaf, p, v in zip(leaves, by_prompt, by_variant, strict=True)]
    program, shapes = jax.make_jaxpr(one, return_shape=True)(each)
    structure = jax.tree.structure(shapes)
    varies = [_depends(program.jaxpr, lead) for lead in (by_variant, by_prompt)]
    mapped: Any = one
    for lead, depends in zip((by_variant, by_prompt), varies, strict=True):
        if any(depends):
            axes = [0 if x else None for x in lead]
            out = jax.tree.unflatten(structure, [0 if x else None for x in depends])
            mapped = jax.vmap(mapped, in_axes=(axes,), out_axes=out)
    if not any(varies[0]):  # those axes that no edit depends on are not there for `mapped`
        parts = zip(leaves, by_prompt, by_variant, strict=True)
        leaves = [leaf[:, 0] if p and v else leaf[0] if v else leaf for leaf, p, v in parts]
    if not any(varies[1]):
        leaves = [leaf[0] if p else leaf for leaf, p in zip(leaves, by_prompt, strict=True)]
    found = jax.tree.leaves(mapped(leaves))
    marked = [_Varies(() if p else None, () if v else None, x) for x, v, p in zip(found, *varies, strict=True)]
    return jax.tree.unflatten(structure, marked)


def _depends(program: Any, given: tuple[bool, ...]) -> list[bool]:
    """Which outputs of a program depend on the inputs marked in `given`."""
    marked = {id(x) for x, mark in zip(program.invars, given, strict=True) if mark}
    for equation in program.eqns:
        if any(id(x) in marked for x in equation.invars):
            marked.update(map(id, equation.outvars))
    return [id(x) in marked for x in program.outvars]


@partial(jax.jit, static_argnums=(3,))
def judged(
    metric: MetricLike, logits: Array, mask: AnyArray | None, by_prompt: tuple[bool, ...], window: Window | None = None
) -> Any:
    """The metric `[C, N, …]` of C prompts in N variants each, from the logits `[C, N, …]` that it reads."""

    def one(metric: Any, logits: Any, mask: Any, window: Any) -> Any:
        if isinstance(metric, Metric):
            return metric.of(logits)
        if window is not None:
            logits, mask = widened(logits, window), window.mask
        return apply_metric(metric, Output(logits, {}, jnp.zeros(0, jnp.int32), mask))

    axes = jax.tree.unflatten(jax.tree.structure(metric), [0 if lead else None for lead in by_prompt])
    variants = jax.vmap(one, in_axes=(None, 0, None, None))
    over = (axes, 0, *(None if x is None else 0 for x in (mask, window)))
    return jax.vmap(variants, in_axes=over)(metric, logits, mask, window)
