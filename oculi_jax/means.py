"""`mean_activations`: what sites hold on average, over the real tokens of a set of prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .arrays import under_trace
from .backends import find_model, programs_of
from .capture import CaptureSpec, Reading, readings_of
from .intervention.frame import Frame
from .intervention.rows import Rows
from .output import Activations
from .prompts import check_prompts

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from .backends.protocol import ModelLike

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
        model: a `Llama`, or a Hugging Face one.
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
    n_prompts, n_tokens = ids.shape
    readings = readings_of(CaptureSpec(sites, layers), found.config, n_tokens)
    if keyed := [r.site.name for r in readings if "S" in r.site.axes and not by_position]:
        raise ValueError(
            f"{', '.join(keyed)} has an axis of keys, which are others at each position: by=('layer', 'position')."
        )

    size = sum(math.prod(r.shape(found.config, n_tokens)) for r in readings) * found.dtype.itemsize
    n_calls = -(-n_prompts // max(1, _AT_ONCE // size))
    at_once = -(-n_prompts // n_calls)
    sums: dict[str, Array] | None = None
    for begin in range(0, n_prompts, at_once):
        rows = np.minimum(
            np.arange(begin, begin + at_once), n_prompts - 1
        )  # the last call repeats a prompt, and counts it once
        counts = real[rows] & (np.arange(begin, begin + at_once) < n_prompts)[:, None]
        frames = [Frame(found.config, found.dtype, n_tokens, row, n_tokens) for row in real[rows]]
        seen = programs_of(found).run_variants(found, ids[rows], real[rows], Rows.of((), frames)[0], readings=readings)
        part = _sums(dict(seen.activations), counts, readings, by_position)
        sums = part if sums is None else jax.tree.map(jnp.add, sums, part)
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


@partial(jax.jit, static_argnums=(2, 3))
def _sums(
    found: dict[str, Array], counts: np.ndarray, readings: tuple[Reading, ...], by_position: bool
) -> dict[str, Array]:
    """Sums over prompts, and over tokens unless by position, of values `[B, 1, *L, …]`."""
    sums = {}
    for reading in readings:
        value = found[reading.site.name][:, 0]
        axis = 1 + int(reading.site.layered) + reading.site.axes.index("T")
        shape = [counts.shape[0], *(1,) * (value.ndim - 1)]
        shape[axis] = counts.shape[1]
        wide = jnp.promote_types(value.dtype, jnp.float32)
        kept = jnp.where(counts.reshape(shape), value.astype(wide), jnp.zeros((), wide))
        sums[reading.site.name] = kept.sum(axis=0) if by_position else kept.sum(axis=(0, axis))
    return sums
