"""Lines: values over layers, scores over the strength of an intervention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .canvas import as_numbers, as_texts, as_values, canvas, door, draw_legend, draw_lines, name_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike


def layer_profile(
    values: ArrayLike,
    layers: Sequence[int] | None = None,
    labels: Sequence[str] | None = None,
    *,
    ylabel: str,
    spread: ArrayLike | None = None,
    ax: Axes | None = None,
    title: str | None = None,
) -> Figure:
    """One or several series over layers.

    Args:
        values: `[L]`, or `[N, L]` for N series. Entries that are not finite are gaps.
        layers: true layer numbers, as `capture.captured_layers`; None for 0 to L − 1.
        labels: a name for each series.
        ylabel: what the numbers are, with their unit.
        spread: of the shape of `values`: half the height of a band about each line, such as a standard deviation.
        ax: where to draw; None for a new figure.
        title: shown literally.

    Returns:
        The figure.

    Raises:
        ValueError, TypeError: a shape, or a number of labels, that cannot be.

    Examples:
        >>> entropy = analysis.LogitLensAnalysis().entropy_by_layer(capture.logits)
        >>> layer_profile(entropy, ylabel="entropy (nats)").axes[0].get_xlabel()
        'layer'
    """
    series = as_values(values, "values", "L", "N L")
    if spread is not None:
        band = as_values(spread, "spread", "L", "N L")
        if band.shape != series.shape:
            raise ValueError(f"spread has shape {list(band.shape)}, and values {list(series.shape)}: they must agree.")
    series = np.atleast_2d(series)
    numbers = np.asarray(as_numbers(layers, series.shape[1], "layers"))
    names = None if labels is None else as_texts(labels, len(series), "labels")
    door()
    from matplotlib.ticker import MaxNLocator

    figure, ax = canvas(ax, 0.16 * series.shape[1] + 1.5, 2.6, largest=9.0)
    order = np.argsort(numbers)
    lines = draw_lines(ax, numbers[order], series[:, order])
    if spread is not None:
        for line, row, half in zip(lines, series[:, order], np.atleast_2d(band)[:, order], strict=True):
            ax.fill_between(numbers[order], row - half, row + half, color=line.get_color(), alpha=0.15, linewidth=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    name_axes(ax, "layer", ylabel, title)
    if names is not None:
        draw_legend(ax, lines, names)
    return figure


def alpha_curve(
    alphas: ArrayLike,
    scores: ArrayLike,
    ylabel: str = "score",
    best: float | None = None,
    ax: Axes | None = None,
    title: str | None = None,
) -> Figure:
    """Scores over the strength α of an intervention, with α = 1 (no change) and the best marked.

    Args:
        alphas: `[N]` strengths, in any order.
        scores: `[N]`, or name → `[N]` for several lines. Entries that are not finite are gaps.
        ylabel: what the scores are, with their unit.
        best: the strength to mark; None for the highest score of each line. Where lower is better, give it.
        ax: where to draw; None for a new figure.
        title: shown literally.

    Returns:
        The figure.

    Raises:
        ValueError, TypeError: shapes that do not agree; a `best` that is none of the strengths.

    Examples:
        >>> alpha_curve([0.5, 1.0, 1.5], [0.2, 0.5, 0.8]).axes[0].get_legend().get_texts()[0].get_text()
        '★ at α = 1.5 (0.8)'
    """
    x = as_values(alphas, "alphas", "N")
    if not np.isfinite(x).all():
        raise ValueError("alphas has entries that are not finite.")
    order = np.argsort(x, kind="stable")
    named = scores if isinstance(scores, Mapping) else {"": scores}
    series = {str(name): as_values(row, f"scores {name!r}" if name else "scores", "N") for name, row in named.items()}
    if not series:
        raise ValueError("scores has no lines: there is nothing to draw.")
    for name, row in series.items():
        if row.shape != x.shape:
            raise ValueError(f"scores {name!r} has {row.size} entries, and alphas {x.size}: they must agree.")
    if best is not None and not np.isclose(x, best).any():
        raise ValueError(f"best is {best}, which is none of the strengths: {', '.join(f'{a:g}' for a in x[order])}.")
    figure, ax = canvas(ax, 4.2, 2.8)
    lines = draw_lines(ax, x[order], [row[order] for row in series.values()])
    names = list(series)
    for i, (line, row) in enumerate(zip(lines, series.values(), strict=True)):
        finite = np.where(np.isfinite(row), row, -np.inf)
        at = int(finite.argmax() if best is None else np.abs(x - best).argmin())
        if np.isfinite(row[at]):
            ax.plot(x[at], row[at], marker="*", markersize=12, color=line.get_color(), markeredgecolor="white")
            names[i] = f"{names[i]}{': ' if names[i] else ''}★ at α = {x[at]:.3g} ({row[at]:.3g})"
    lines.append(ax.axvline(1.0, color="0.4", linestyle="--", linewidth=1.0, zorder=0))
    draw_legend(ax, lines, [*names, "no change (α = 1)"])
    name_axes(ax, "strength α", ylabel, title)
    return figure
