"""Grids over layers and heads (or layers and tokens): entropies, scores, effects of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .canvas import (
    SIGNED,
    WEIGHTS,
    as_numbers,
    as_texts,
    as_values,
    canvas,
    colour_bar,
    draw_grid,
    inches,
    label_numbers,
    label_ticks,
    limits_of,
    name_axes,
    pair_labels,
    slanted,
    token_labels,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike


def head_heatmap(
    values: ArrayLike,
    label: str,
    layers: Sequence[int] | None = None,
    diverging: bool = False,
    limits: tuple[float, float] | None = None,
    ax: Axes | None = None,
    title: str | None = None,
) -> Figure:
    """A number for each head: layers down, heads across.

    Args:
        values: `[L, H]`. Entries that are not finite are grey.
        label: what the numbers are, with their unit.
        layers: true layer numbers of the L rows, as `capture.captured_layers`; None for 0 to L − 1.
        diverging: colours centred on 0, red above and blue below, for what can have either sign.
        limits: the range of the colours; None for 0 to the largest value (from the least, if that is negative), or
            symmetric about 0 where `diverging`. Give it where pictures are to be compared.
        ax: where to draw; None for a new figure.
        title: shown literally.

    Returns:
        The figure.

    Raises:
        ValueError, TypeError: a shape, or a number of layers, that cannot be.

    Examples:
        >>> figure = head_heatmap(diagnostics.head_scores(model).induction, "induction score", limits=(0, 1))
        >>> figure.axes[0].images[0].colorbar.ax.get_ylabel()
        'induction score'
    """
    return _heatmap(
        as_values(values, "values", "L H"),
        label,
        layers,
        diverging,
        limits=limits,
        columns=None,
        xlabel="head",
        ax=ax,
        title=title,
    )


def entropy_heatmap(
    entropy: ArrayLike, layers: Sequence[int] | None = None, ax: Axes | None = None, title: str | None = None
) -> Figure:
    """Each head's attention entropy in nats: layers down, heads across.

    Args:
        entropy: `[L, H]`, as `EntropyAnalysis.token_entropy(capture).mean(axis=-1)`.
        layers, ax, title: as in `head_heatmap`.

    Returns:
        The figure.

    Raises:
        ValueError, TypeError: as in `head_heatmap`.

    Examples:
        >>> figure = entropy_heatmap(analysis.EntropyAnalysis.mean_entropy(capture.attention))
        >>> figure.axes[0].images[0].colorbar.ax.get_ylabel()
        'attention entropy (nats)'
    """
    hint = "Of entropies [L, H, T], draw the mean: entropy.mean(axis=-1)."
    values = as_values(entropy, "entropy", "L H", hint=hint)
    return _heatmap(
        values, "attention entropy (nats)", layers, False, limits=None, columns=None, xlabel="head", ax=ax, title=title
    )


def sweep_heatmap(
    effects: ArrayLike,
    xlabel: str | None = None,
    label: str = "effect on the metric",
    layers: Sequence[int] | None = None,
    tokens: Sequence[str] | None = None,
    ax: Axes | None = None,
    title: str | None = None,
    sources: Sequence[str] | None = None,
) -> Figure:
    """The effects of a sweep over layers and heads, or layers and positions; colours centred on 0.

    Args:
        effects: `[L, H]` or `[L, T]`, such as values of a sweep minus the value without an intervention, or the `recovery`
            of patching.
        xlabel: what the columns are; None for `"head"`, or `"token"` where `tokens` are given.
        label: what the numbers are, with their unit.
        layers: true layer numbers of the L rows; None for 0 to L − 1.
        tokens: texts of the T columns.
        ax: where to draw; None for a new figure.
        title: shown literally.
        sources: of patching, texts of the T tokens of the run that values come from; a column whose `tokens` differ is
            labelled with both, `John→Mary`.

    Returns:
        The figure.

    Raises:
        ValueError, TypeError: a shape, or a number of labels, that cannot be.

    Examples:
        >>> found = causal.activation_patching(model, ids, other, metric)
        >>> figure = sweep_heatmap(found.recovery, tokens=adapter.str_tokens(other), sources=adapter.str_tokens(text))
        >>> figure.axes[0].get_xticklabels()[4].get_text()
        '␣France→␣Italy'
    """
    values = as_values(effects, "effects", "L H", "L T")
    columns = None
    if tokens is not None:
        tokens = as_texts(tokens, values.shape[1], "tokens")
        columns = token_labels(tokens)
        if sources is not None:
            columns = pair_labels(tokens, as_texts(sources, values.shape[1], "sources"))
    elif sources is not None:
        raise ValueError("sources are the other run's tokens; give those of the patched run as tokens.")
    xlabel = xlabel or ("head" if tokens is None else "token")
    return _heatmap(values, label, layers, True, limits=None, columns=columns, xlabel=xlabel, ax=ax, title=title)


def _heatmap(
    values: np.ndarray,
    label: str,
    layers: Sequence[int] | None,
    diverging: bool,
    limits: tuple[float, float] | None,
    columns: list[str] | None,
    xlabel: str,
    ax: Axes | None,
    title: str | None,
) -> Figure:
    n_rows, n_columns = values.shape
    rows = as_numbers(layers, n_rows, "layers")
    figure, ax = canvas(ax, 0.3 * n_columns, 0.17 * n_rows, largest=12.0)
    limits = limits_of(values, diverging) if limits is None else limits
    colour_bar(draw_grid(ax, values, limits, SIGNED if diverging else WEIGHTS, "auto"), label)
    name_axes(ax, xlabel, "layer", title)
    label_numbers(ax, range(n_columns) if columns is None else None, rows)
    if columns is not None:
        label_ticks(ax.xaxis, columns, inches(ax)[0], 0.16, **slanted(columns))
    return figure
