"""How a sweep runs its plan, call by call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..arrays import on_device
from ..backends import programs_of
from ..buckets import Bucket, Window
from ..intervention.rows import Rows
from ..metrics import Metric
from ..utils.progress import progress as progress_bar
from .planning import Call, Part, SweepPlan
from .reach import Needs

Progress = Callable[[int, int], None]
# Arrays of a part that are larger go to the device once, and not with every call.
_LARGE = 1 << 20


@dataclass(frozen=True)
class Prepared:
    """What a sweep is given, checked and canonical.

    Attributes:
        tokens, mask: `[B, T]`; where they are `cut`, with room for windows that reach beyond.
        rows: interventions over prompts and variants.
        shared: those of them that are the same in all variants.
        varying: those that are not (all, where none varies).
        n_tokens: `T`, as given.
        cut: whether prompts run with their own columns alone.
        needs: what the interventions ask of a run.
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
    n_tokens: int
    cut: bool
    needs: Needs
    traced: bool

    @property
    def size(self) -> int:
        return int(np.prod(self.axes, dtype=int))


def execute(prepared: Prepared, plan: SweepPlan, progress: Progress | bool | None) -> Any:
    """Runs a plan call by call; the next call is made ready while one runs.

    Returns:
        NumPy arrays `[B, N, …]`; None where a tracer came to light in what a metric's own function holds.
    """
    mesh, model = prepared.mesh, prepared.model
    if mesh is not None and not isinstance(model.embed[...].sharding, NamedSharding):
        prepared = replace(prepared, model=jax.device_put(model, NamedSharding(mesh, PartitionSpec())))
    prepared = _shared_on_device(prepared)
    # One program for a size: where any call gives prompts variants of their own, all do.
    grid = all(call.is_grid for call in plan.calls)
    results: list[np.ndarray] = []
    tree: Any = None
    running: list[tuple[np.ndarray, Call, Any]] = []

    def collect() -> int:
        nonlocal tree
        prompts, call, out = running.pop(0)
        leaves, tree = jax.tree.flatten(out)
        for number, leaf in enumerate(map(np.asarray, leaves)):
            if len(results) == number:
                results.append(np.empty((plan.n_prompts, prepared.size, *leaf.shape[2:]), leaf.dtype))
            results[number][prompts[:, None], call.variants] = leaf[: len(prompts)]
        return len(prompts) + int((np.diff(call.variants, axis=1) != 0).sum())

    with told("sweep", progress, plan.n_prompts * prepared.size) as advance:
        for part in plan.parts:
            made = _Made.of(prepared, part)
            for call in part.calls:
                out = made.run(prepared, call, grid)
                if any(isinstance(x, Tracer) for x in jax.tree.leaves(out)):
                    return None
                running.append((part.prompts[call.prompts], call, out))
                if len(running) > 1:
                    advance(collect())
        while running:
            advance(collect())
    return jax.tree.unflatten(tree, results)


def _shared_on_device(prepared: Prepared) -> Prepared:
    """What all prompts and variants share is sent to the device, or to those of the mesh, once; torch has its own."""
    if not programs_of(prepared.model).traceable:
        return prepared
    everywhere = None if prepared.mesh is None else NamedSharding(prepared.mesh, PartitionSpec())

    def send(rows: Rows) -> Rows:
        own = [p or v for p, v in zip(rows.by_prompt, rows.by_variant, strict=True)]
        leaves = [x if mine else jax.device_put(x, everywhere) for x, mine in zip(rows.leaves, own, strict=True)]
        return replace(rows, leaves=leaves)

    leaves, tree = jax.tree.flatten(prepared.metric)
    leaves = [
        x if by else jax.device_put(x, everywhere) for x, by in zip(leaves, prepared.metric_by_prompt, strict=True)
    ]
    return replace(
        prepared, rows=send(prepared.rows), shared=send(prepared.shared), metric=jax.tree.unflatten(tree, leaves)
    )


class _Made(NamedTuple):
    """A part made ready: its prompts cut to the columns that run, repeated up to `room` of them, and their base runs."""

    tokens: Any
    mask: Any
    window: Window | None
    rows: Rows
    metric_leaves: list[Any]
    base: Any
    n_tokens: int

    @classmethod
    def of(cls, prepared: Prepared, part: Part) -> _Made:
        programs = programs_of(prepared.model)
        numbers = _padded(part.prompts, part.room)
        bucket = Bucket(numbers, _padded(part.first, part.room), part.n_tokens)
        tokens, mask, window = prepared.tokens, prepared.mask, None
        if prepared.cut:
            seen = None if isinstance(prepared.metric, Metric) else mask[numbers]
            if prepared.needs.places or seen is not None:
                window = Window(bucket.first.astype(np.int32), seen, tokens.shape[1])
            tokens, mask = bucket.cut(tokens), bucket.cut(mask)
        else:
            tokens, mask = _take(tokens, numbers), None if mask is None else _take(mask, numbers)

        def of_part(rows: Rows) -> Rows:
            pairs = zip(rows.leaves, rows.by_prompt, strict=True)
            leaves = [_take(x, numbers) if by_prompt else x for x, by_prompt in pairs]
            if programs.traceable:
                everywhere = None if prepared.mesh is None else NamedSharding(prepared.mesh, PartitionSpec())
                large = [
                    p and not v and x.nbytes > _LARGE
                    for x, p, v in zip(leaves, rows.by_prompt, rows.by_variant, strict=True)
                ]
                leaves = [jax.device_put(x, everywhere) if send else x for x, send in zip(leaves, large, strict=True)]
            return replace(rows, leaves=leaves)

        pairs = zip(jax.tree.leaves(prepared.metric), prepared.metric_by_prompt, strict=True)
        metric_leaves = [_take(x, numbers) if by_prompt else x for x, by_prompt in pairs]
        base = None
        if part.reuse:
            keys = any(call.n_rows < part.n_tokens for call in part.calls)
            base = programs.run_base(prepared.model, tokens, mask, of_part(prepared.shared), keys=keys, window=window)
        return cls(tokens, mask, window, of_part(prepared.rows), metric_leaves, base, part.n_tokens)

    def run(self, prepared: Prepared, call: Call, grid: bool) -> Any:
        """The metric of what a call runs, `[slots, size, …]`, on its way."""
        which = _padded(call.prompts, call.slots).astype(np.int32)
        variants = _padded(call.variants, call.slots)
        tree = jax.tree.structure(prepared.metric)
        leaves = [
            _take(x, which) if by else x for x, by in zip(self.metric_leaves, prepared.metric_by_prompt, strict=True)
        ]
        options: dict[str, Any] = {}
        if self.base is not None:
            options = dict(base=self.base, which=which, start=np.asarray(call.start, np.int32))
            options |= dict(first=self.n_tokens - call.n_rows, shared=call.shared)
        return (
            programs_of(prepared.model)
            .run_variants(
                prepared.model,
                _take(self.tokens, which),
                None if self.mask is None else _take(self.mask, which),
                _rows_of(self.rows, which, variants, grid, prepared.mesh),
                size=call.size,
                metric=jax.tree.unflatten(tree, leaves),
                metric_by_prompt=prepared.metric_by_prompt,
                window=jax.tree.map(lambda x: _take(x, which), self.window),
                mesh=prepared.mesh,
                **options,
            )
            .value
        )


def _padded(x: np.ndarray, size: int) -> np.ndarray:
    """An array with its last entry repeated until there are `size`."""
    return x if len(x) == size else np.concatenate([x, np.repeat(x[-1:], size - len(x), axis=0)])


def _take(x: Any, places: np.ndarray, axis: int = 0) -> Any:
    """Entries of an axis."""
    if len(places) == x.shape[axis] and (places == np.arange(len(places))).all():
        return x
    return (jnp if on_device(x) else np).take(x, places, axis=axis)


def _rows_of(rows: Rows, which: np.ndarray, variants: np.ndarray, grid: bool, mesh: Mesh | None) -> Rows:
    """The leaves of a call's slots and their variants, laid out over the mesh where there is one."""
    leaves, by_prompts = [], []
    for leaf, by_prompt, by_variant in zip(rows.leaves, rows.by_prompt, rows.by_variant, strict=True):
        if by_prompt and not (by_variant and not grid):
            leaf = _take(leaf, which)
        if by_variant and grid:
            leaf = _take(leaf, variants[0], int(by_prompt))
        elif by_variant:
            leaf = leaf[(which[:, None], variants) if by_prompt else variants]
        own = by_prompt or (by_variant and not grid)
        if by_variant and mesh is not None:
            spec = PartitionSpec(*((None, "data") if own else ("data",)))
            leaf = jax.device_put(leaf, NamedSharding(mesh, spec))
        leaves.append(leaf)
        by_prompts.append(own)
    return replace(rows, leaves=leaves, by_prompt=tuple(by_prompts))


def check_progress(progress: object) -> None:
    """TypeError for what is no `progress`."""
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise TypeError(f"progress is {progress!r}, and must be None, a bool, or a function of (done, total).")


@contextmanager
def told(label: str, progress: Progress | bool | None, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """`advance(n)`, which draws a bar, calls the user's function, or does nothing; `done` of the total are done before."""
    if progress is None or progress is True:
        with progress_bar(label, total, done=done) as advance:
            yield advance
        return

    def call(amount: int) -> None:
        nonlocal done
        done += amount
        if callable(progress):
            progress(done, total)

    yield call


def part_of(advance: Callable[[int], None]) -> Progress:
    """The `progress` of one of several calls that `told` tells of together."""
    before = 0

    def tell(done: int, _: int) -> None:
        nonlocal before
        advance(done - before)
        before = done

    return tell
