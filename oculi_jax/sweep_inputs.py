"""What sweeps and patching are given, checked: one prompt or several, and the metric that judges their runs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .arrays import as_array, listing, on_device
from .forward import check_mask, check_tokens, find_model
from .metrics import Metric


def check_prompts(model: Any, tokens: Any, mask: Any) -> tuple[Any, Any, bool]:
    """Ids `[B, T]`, mask `[B, T]` or None, and whether one prompt `[T]` was given."""
    config = find_model(model).config
    given = tokens if isinstance(tokens, str) else as_array(tokens)
    if isinstance(given, str) or given.ndim != 2:
        tokens = check_tokens(tokens, config.vocab_size)[None]
        mask = check_mask(mask, tokens.shape[1])
        return tokens, None if mask is None else mask[None], True
    if not len(given):
        raise ValueError("tokens has shape [0, T]: there is no prompt.")
    rows = [check_tokens(row, config.vocab_size) for row in given]
    xp = jnp if any(map(on_device, rows)) else np
    if mask is not None:
        masks = as_array(mask)
        if masks.shape != given.shape:
            raise ValueError(f"mask has shape {listing(masks.shape)}, and tokens {listing(given.shape)}.")
        checked = [check_mask(row, given.shape[1]) for row in masks]
        mask = (jnp if on_device(masks) else np).stack(checked)
    return xp.stack(rows), mask, False


def check_metric(metric: Any, vocab_size: int, tokens: Any, mask: Any) -> tuple[Any, tuple[bool, ...]]:
    """A metric as a pytree, and for each of its leaves whether it leads with the prompts `[B, T]`."""
    if not callable(metric):
        raise TypeError(
            f"metric is a {type(metric).__name__}; give one of oculi_jax.metrics, or a function of an Output."
        )
    is_maker = getattr(metric, "__module__", None) == Metric.__module__ and not isinstance(metric, Metric)
    if isinstance(metric, type) or is_maker:
        name = getattr(metric, "__name__", "a class")
        raise TypeError(f"metric is {name} itself, which makes a metric: call it with token ids, {name}(…).")
    if not isinstance(metric, Metric):
        if jax.tree_util.all_leaves([metric]):  # a function is no pytree: it goes into the program by name
            try:
                hash(metric)
            except TypeError:
                raise TypeError(
                    f"metric is a {type(metric).__name__} that cannot be hashed, and programs are kept by their metric: give a "
                    "function, a frozen dataclass of plain values, or make the class a pytree with oculi_jax.metrics.pytree."
                ) from None
            metric = jax.tree_util.Partial(metric)
        return metric, (False,) * len(jax.tree.leaves(metric))
    leads = tuple(axis == 0 for axis in jax.tree.leaves(metric.per_prompt(), is_leaf=lambda axis: axis is None))
    n_prompts, n_tokens = tokens.shape
    shortest = n_tokens if mask is None or on_device(mask) else int(mask.sum(axis=1).min())
    if wrong := [p for p in metric.positions if not -shortest <= p < shortest]:
        raise ValueError(
            f"The metric reads positions {wrong}, and the prompt has {shortest} tokens: positions are 0 to {shortest - 1}, or "
            f"−1 to −{shortest} from the end."
        )
    metric.check(vocab_size)
    leading = {np.shape(x)[0] for x, lead in zip(jax.tree.leaves(metric), leads, strict=True) if lead}
    if leading - {n_prompts}:
        raise ValueError(
            f"The metric has targets for {sorted(leading)[0]} prompts, and tokens holds {n_prompts}: give one target, or one "
            "for each prompt."
        )
    return metric, leads
