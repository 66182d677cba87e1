"""Attention patterns: one head, or many small ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .canvas import (
    LARGE,
    LITERAL,
    MEDIUM,
    SMALL,
    WEIGHTS,
    as_numbers,
    as_texts,
    as_values,
    canvas,
    colour_bar,
    door,
    draw_grid,
    label_numbers,
    label_tokens,
    name_axes,
    name_bar,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

KEY, QUERY, WEIGHT = "Key (attending to)", "Query (attending from)", "attention weight"


def attention_heatmap(
    pattern: ArrayLike, tokens: Sequence[str] | None = None, ax: Axes | None = None, title: str | None = None
) -> Figure:
    """One head's pattern: where each token (down) attends to (across).

    Args:
        pattern: `[T, S]`, weights in 0…1, as `capture.patterns[layer, head]`. Entries that are not finite are grey.
        tokens: the texts of the S keys, and of the queries where T = S; None for positions.
        ax: where to draw; None for a new figure.
        title: shown literally.

    Returns:
        The figure.

    Raises:
        ValueError, TypeError: a shape, or a number of tokens, that cannot be.

    Examples:
        >>> figure = attention_heatmap(capture.attention.patterns[2, 0], adapter.str_tokens(text))
        >>> figure.axes[0].get_xlabel()
        'Key (attending to)'
    """
    weights = as_values(
        pattern, "pattern", "T S", hint="Choose a head, pattern[layer, head], or draw many with head_grid."
    )
    n_queries, n_keys = weights.shape
    figure, ax = canvas(ax, 0.26 * n_keys, 0.26 * n_queries, largest=10.0)
    image = draw_grid(ax, weights, (0.0, 1.0), WEIGHTS, "equal" if n_queries == n_keys else "auto")
    colour_bar(image, WEIGHT)
    name_axes(ax, KEY, QUERY, title)
    _label(ax, weights.shape, None if tokens is None else as_texts(tokens, n_keys, "tokens"))
    return figure


def head_grid(
    patterns: ArrayLike,
    titles: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    tokens: Sequence[str] | None = None,
    columns: int | None = None,
    title: str | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Many heads' patterns beside each other, on one scale. It fills a figure, so it takes no `ax`.

    Args:
        patterns: `[L, H, T, S]`, a row of panels for each layer; or `[N, T, S]`, any heads.
        titles: one text for each panel, in order; None for `L3H5` or `H5`.
        layers: true layer numbers: of the L rows, or of each of N panels.
        heads: head numbers: of the H columns, or of each of N panels.
        tokens: the texts of the S keys, and of the queries where T = S; shown at the outer panels.
        columns: panels side by side; None for H, or about √N.
        title: of the whole, shown literally.
        figure: a Figure or SubFigure to draw in; None for a new one.

    Returns:
        The figure.

    Raises:
        ValueError, TypeError: a shape, a number of labels or of columns that cannot be.

    Examples:
        >>> figure = head_grid(capture.attention.patterns[2], layers=[2] * 6)
        >>> figure.axes[0].get_title()
        'L2H0'
    """
    weights = as_values(patterns, "patterns", "N T S", "L H T S", hint="One head is drawn by attention_heatmap.")
    names = titles if titles is None else as_texts(titles, math.prod(weights.shape[:-2]), "titles")
    if weights.ndim == 4:
        rows = as_numbers(layers, weights.shape[0], "layers")
        across = as_numbers(heads, weights.shape[1], "heads")
        names = names or [f"L{layer}H{head}" for layer in rows for head in across]
        columns = weights.shape[1] if columns is None else columns
    else:
        across = as_numbers(heads, len(weights), "heads")
        rows = [None] * len(weights) if layers is None else as_numbers(layers, len(weights), "layers")
        names = names or [f"H{h}" if layer is None else f"L{layer}H{h}" for layer, h in zip(rows, across, strict=True)]
        columns = math.ceil(math.sqrt(len(weights))) if columns is None else columns
    if not isinstance(columns, int) or columns < 1:
        raise ValueError(f"columns is {columns!r}, and must be at least 1.")
    weights = weights.reshape(-1, *weights.shape[-2:])
    columns = min(columns, len(weights))
    n_rows = -(-len(weights) // columns)
    words = None if tokens is None else as_texts(tokens, weights.shape[-1], "tokens")
    door()
    from matplotlib.figure import FigureBase

    from .picture import Picture

    if figure is None:
        side = min(max(0.11 * weights.shape[-1], 1.1), 2.4, 24.0 / columns, 40.0 / n_rows)
        figure = Picture((side * columns + 1.6, (side + 0.2) * n_rows + 0.9), layout="constrained")
    elif not isinstance(figure, FigureBase):
        raise TypeError(f"figure is of type {type(figure).__name__}, and a matplotlib Figure is needed.")
    grid, axes = figure.add_gridspec(n_rows, columns, wspace=0.05, hspace=0.1), []
    for i, panel in enumerate(weights):
        ax = figure.add_subplot(grid[divmod(i, columns)])
        image = draw_grid(ax, panel, (0.0, 1.0), WEIGHTS, "auto")
        ax.set_title(names[i], fontsize=SMALL, pad=2, **LITERAL)
        ax.tick_params(labelsize=SMALL - 1, length=2)
        _label(ax, panel.shape, words)
        ax.tick_params(labelleft=i % columns == 0, labelbottom=i + columns >= len(weights))
        axes.append(ax)
    tall = figure.bbox.height / figure.dpi
    name_bar(
        figure.colorbar(image, ax=axes, shrink=min(1.0, 4.0 / tall), pad=0.02, aspect=min(tall, 4.0) / 0.16), WEIGHT
    )
    figure.supxlabel(KEY, fontsize=MEDIUM)
    figure.supylabel(QUERY, fontsize=MEDIUM)
    if title is not None:
        figure.suptitle(title, fontsize=LARGE, **LITERAL)
    return figure


def _label(ax: Axes, shape: tuple[int, ...], tokens: list[str] | None) -> None:
    """Tokens or positions; none on queries that are only some of the prompt, since which is not known."""
    n_queries, n_keys = shape
    if tokens is None:
        label_numbers(ax, range(n_keys), range(n_keys) if n_queries == n_keys else None)
    else:
        label_tokens(ax, tokens, tokens if n_queries == n_keys else None)
    if n_queries != n_keys:
        ax.set_yticks([])
