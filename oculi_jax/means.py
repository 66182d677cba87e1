"""`mean_activations`: what sites hold on average, over the real tokens of a set of prompts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Int

from .arrays import under_trace, wide
from .backends import find_model, programs_of
from .buckets import buckets_of, columns_of_a_program, weights_of
from .capture import CaptureSpec, Reading, readings_of
from .intervention.frame import Frame
from .intervention.rows import Rows
from .output import Activations
from .prompts import bucket as rung
from .prompts import check_prompts

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from .backends.protocol import Model, ModelLike

_AT_ONCE = 1 << 28  # bytes of activations that are held while they are added up


def mean_activations(
    model: ModelLike,
    tokens: ArrayLike,
    sites: str | Sequence[str],
    *,
    mask: ArrayLike | None = None,
    layers: Sequence[int] | None = None,
    by: Sequence[str] = ("layer",),
) -> Activations:
    """The mean of sites over all real tokens of all prompts: what mean ablation puts in. Host function.

    Args:
        model: a model of any family, or a Hugging Face one.
        tokens: ids `[T]`, or `[B, T]` for several prompts.
        sites: names of the site table.
        mask: bool, shaped as `tokens`, True at real tokens; on either side.
        layers: which; all of them for None.
        by: `("layer",)`, or `("layer", "position")` for a mean at each position over the prompts that reach it, counted in
            real tokens from the first.

    Returns:
        Site → float32 mean (float64 of a float64 model), in units of the site: its axes without `T`, after those of `L`
        layers (`z`: `[L, H, D]`); by position with `T` as long as the longest prompt.

    Raises:
        ValueError, TypeError: something that can be seen to be wrong; `scores` or `pattern` by layer alone, whose keys are
            others at each position.

    Examples:
        >>> tokens, mask = padded(["The capital of Italy is", "Rome is in"], tokenizer)
        >>> mean = mean_activations(model, tokens, "z", mask=mask)["z"]
        >>> mean.shape, says(forward(model, ids, HeadAblation(2, 1, mean[2, 1])))
        ((4, 6, 32), 'Rome')
    """
    found = find_model(model)
    if under_trace(tokens):
        raise TypeError("mean_activations runs on the host and was called inside a trace (jit, vmap, grad).")
    by_position = _axes(by)
    given, real, _ = check_prompts(found.config, tokens, mask)
    real = np.ones(given.shape, bool) if real is None else np.asarray(real)
    # Real tokens first, so that a column is a position whatever side the padding is on.
    order = np.argsort(~real, axis=1, kind="stable")[:, : real.sum(axis=1).max()]
    ids, real = np.take_along_axis(np.asarray(given), order, axis=1), np.take_along_axis(real, order, axis=1)
    n_tokens = ids.shape[1]
    readings = readings_of(CaptureSpec(sites, layers), found.config, n_tokens)
    if keyed := [r.site.name for r in readings if "S" in r.site.axes and not by_position]:
        raise ValueError(
            f"{', '.join(keyed)} has an axis of keys, which are others at each position: by=('layer', 'position')."
        )

    platform, _ = programs_of(found).room(found)
    work = 2.0 * found.config.num_hidden_layers * sum(weights_of(found.config.sizes))
    sums: dict[str, Array] | None = None
    for bucket in buckets_of(real, columns_of_a_program(platform, work)):
        for part, counts in _parts(found, bucket.cut(ids), bucket.cut(real), readings):
            added = _sums(part, counts, readings, n_tokens if by_position else None)
            sums = added if sums is None else jax.tree.map(jnp.add, sums, added)
    assert sums is not None
    means = {}
    for reading in readings:
        total = sums[reading.site.name]
        lead = int(reading.site.layered) + reading.site.axes.index("T")
        shape = (*(1,) * lead, n_tokens, *(1,) * (total.ndim - lead - 1))
        counted = real.sum(axis=0).reshape(shape) if by_position else real.sum()
        means[reading.site.name] = total / np.asarray(counted, total.dtype)
    return Activations(means)


def _axes(by: Sequence[str]) -> bool:
    """Whether a mean is of each position."""
    names = (by,) if isinstance(by, str) else tuple(by)
    if names not in (("layer",), ("layer", "position")):
        raise ValueError(f"by is {by!r}, and can be ('layer',) or ('layer', 'position').")
    return "position" in names


def _parts(
    model: Model, ids: Int[np.ndarray, "P C"], real: Bool[np.ndarray, "P C"], readings: tuple[Reading, ...]
) -> Iterator[tuple[dict[str, Array], Bool[np.ndarray, "R C"]]]:
    """What is captured of some prompts at a time, and which of their tokens count."""
    n_prompts, n_tokens = ids.shape
    size = sum(math.prod(r.shape(model.config, n_tokens)) for r in readings) * model.dtype.itemsize
    most = max(1, _AT_ONCE // size)
    n_calls = -(-n_prompts // most)
    # Of few sizes, so that another set runs the same programs.
    at_once = min(most, rung(-(-n_prompts // n_calls)))
    for begin in range(0, n_prompts, at_once):
        numbers = np.arange(begin, begin + at_once)
        rows = np.minimum(numbers, n_prompts - 1)  # what there is room for repeats a prompt, and counts it once
        frames = [Frame(model.config, model.dtype, n_tokens, row, n_tokens) for row in real[rows]]
        seen = programs_of(model).run_variants(model, ids[rows], real[rows], Rows.of((), frames)[0], readings=readings)
        yield dict(seen.activations), real[rows] & (numbers < n_prompts)[:, None]


@partial(jax.jit, static_argnums=(2, 3))
def _sums(
    found: dict[str, Array],
    counts: Bool[np.ndarray, "R C"],
    readings: tuple[Reading, ...],
    n_tokens: int | None,
) -> dict[str, Array]:
    """Sums over prompts of values `[R, 1, *L, …]`, and over tokens; or at each of `n_tokens` positions."""
    sums = {}
    for reading in readings:
        value, lead = found[reading.site.name][:, 0], int(reading.site.layered)
        axis = 1 + lead + reading.site.axes.index("T")
        shape = [counts.shape[0], *(1,) * (value.ndim - 1)]
        shape[axis] = counts.shape[1]
        dtype = wide(value.dtype)
        kept = jnp.where(counts.reshape(shape), value.astype(dtype), jnp.zeros((), dtype))
        if n_tokens is None:
            total = kept.sum(axis=(0, axis))
        else:
            total = kept.sum(axis=0)
            for place, letter in enumerate(reading.site.axes, lead):
                if letter in "TS":
                    total = _of_length(total, place, n_tokens)
        sums[reading.site.name] = total
    return sums


def _of_length(x: Array, axis: int, n: int) -> Array:
    """The first n entries of an axis, zero where it has fewer."""
    x = jax.lax.slice_in_dim(x, 0, min(n, x.shape[axis]), axis=axis)
    return jnp.pad(x, [(0, n - x.shape[axis] if place == axis else 0) for place in range(x.ndim)])
