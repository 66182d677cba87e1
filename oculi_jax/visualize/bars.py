"""Attribution: what layers, components or heads add to a logit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import integer
from .canvas import (
    LINES,
    MISSING,
    NEGATIVE,
    POSITIVE,
    as_numbers,
    as_texts,
    as_values,
    canvas,
    draw_legend,
    inches,
    label_ticks,
    name_axes,
    open_frame,
    slanted,
    token_labels,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..analysis.result import Result

PARTS = ("attention", "MLP")


def attribution_bars(
    result_or_values: Result | Any,
    labels: Sequence[str] | None = None,
    ax: Axes | None = None,
    k: int | None = None,
    layers: Sequence[int] | None = None,
    label: str = "contribution to the logit",
    title: str | None = None,
) -> Figure:
    """Bars of contributions to a logit, red where they raise it and blue where they lower it.

    Args:
        result_or_values: a `Result` of an attribution, or its values:
            `[L]`, one bar for each layer;
            `[L, 2]`, attention and MLP beside each other at each layer, each in its own colour;
            `[L, H]`, the strongest heads by absolute value, largest first, named like `L18H6` (neurons `[L, F]`, where
            the result's method is about them: `L18N1024`).
            An entry that is not finite is a grey stripe.
        labels: for `[L]`: texts in place of the layer numbers, such as tokens.
        ax: where to draw; None for a new figure.
        k: how many of the strongest to draw, by absolute value and largest first. None for all, or for 20 heads or neurons.
            Two columns are attention and MLP, unless the result's method is about heads.
        layers: true layer numbers of the L rows; None for the result's own, or 0 to L − 1.
        label: what the numbers are, with their unit.
        title: shown literally.

    Returns:
        The figure.

    Raises:
        ValueError, TypeError: a shape, a number of labels or a k that cannot be.

    Examples:
        >>> heads = analysis.AttributionMethods.head_attribution(capture.attention, model, rome)
        >>> [label.get_text() for label in attribution_bars(heads, k=3).axes[0].get_yticklabels()]
        ['L3H4', 'L3H3', 'L2H2']
    """
    given: Any = result_or_values
    method = ""
    if hasattr(given, "values") and hasattr(given, "method"):
        layers, method = given.layers or None if layers is None else layers, given.method
        given = given.values
        if isinstance(given, Mapping):
            raise TypeError(f"This result's values are named: {', '.join(given)}. Give one of them.")
    values = as_values(given, "values", "L", "L H", hint="Give one prompt, and one position.")
    numbers = as_numbers(layers, len(values), "layers")
    k = None if k is None else integer(k, "k", 1)
    if values.ndim == 2 and labels is not None:
        raise ValueError("labels name the bars of values [L]; those of [L, 2] and [L, H] have names of their own.")
    if values.ndim == 1:
        unit = "layer" if labels is None else ""
    else:
        unit = (
            "neuron" if "neuron" in method else "component" if values.shape[1] == 2 and "head" not in method else "head"
        )
    if labels is not None:
        names = token_labels(as_texts(labels, len(values), "labels"), longest=24)
    else:
        ends = {"layer": [""], "component": [f" {part}" for part in PARTS]}.get(unit) or [
            f"{unit[0].upper()}{i}" for i in range(values.shape[1])
        ]
        names = [f"L{number}{end}" for number in numbers for end in ends]
    if k is None and unit not in ("head", "neuron"):
        return _upright(values, numbers if labels is None else names, unit and "layer", label, ax, title)
    return _ranked(values.reshape(-1), names, 20 if k is None else int(k), unit, label=label, ax=ax, title=title)


def _upright(
    values: np.ndarray, names: Sequence[Any], what: str, label: str, ax: Axes | None, title: str | None
) -> Figure:
    n = len(values)
    figure, ax = canvas(ax, (0.2 if values.ndim == 1 else 0.28) * n, 2.8, largest=14.0)
    open_frame(ax, "y")
    places = np.arange(n)
    if values.ndim == 1:
        ax.bar(places, np.nan_to_num(values, posinf=0, neginf=0), 0.8, color=_signs(values))
    else:
        bars = [ax.bar(places + 0.4 * (j - 0.5), np.nan_to_num(values[:, j], posinf=0, neginf=0), 0.4, color=LINES[j])
                for j in range(2)]  # fmt: skip
        draw_legend(ax, bars, PARTS)
    for i in places[~np.isfinite(values).reshape(n, -1).all(axis=1)]:
        ax.axvspan(i - 0.4, i + 0.4, color=MISSING)
    ax.axhline(0.0, color="0.3", linewidth=0.8)
    ax.set_xlim(-0.7, n - 0.3)
    name_axes(ax, what, label, title)
    label_ticks(ax.xaxis, names, inches(ax)[0], 0.18, **slanted([str(name) for name in names]))
    return figure


def _ranked(
    values: np.ndarray, names: Sequence[str], k: int, what: str, label: str, ax: Axes | None, title: str | None
) -> Figure:
    strength = np.where(np.isfinite(values), np.abs(values), -1.0)
    order = np.argsort(-strength, kind="stable")[:k]
    chosen = values[order]
    figure, ax = canvas(ax, 3.6, 0.18 * len(order), largest=14.0)
    open_frame(ax, "x")
    places = np.arange(len(order))
    ax.barh(places, np.nan_to_num(chosen, posinf=0, neginf=0), 0.75, color=_signs(chosen))
    for i in places[~np.isfinite(chosen)]:
        ax.axhspan(i - 0.375, i + 0.375, color=MISSING)
    ax.axvline(0.0, color="0.3", linewidth=0.8)
    ax.set_ylim(len(order) - 0.3, -0.7)  # the strongest on top
    name_axes(ax, label, what, title)
    label_ticks(ax.yaxis, [names[i] for i in order], inches(ax)[1], 0.13)
    return figure


def _signs(values: np.ndarray) -> list[str]:
    return [NEGATIVE if value < 0 else POSITIVE for value in values]
