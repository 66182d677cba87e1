"""The logit lens: what the model would say at each layer, and how an answer comes up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .canvas import (
    LITERAL,
    MEDIUM,
    WEIGHTS,
    as_texts,
    as_values,
    canvas,
    colour_bar,
    draw_grid,
    draw_legend,
    inches,
    ink_on,
    label_numbers,
    label_ticks,
    label_tokens,
    name_axes,
    token_labels,
)
from .curves import layer_profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

FORM = '[{"layer": 0, "predictions": [(" Paris", 0.77), …]}, …], as LogitLensAnalysis.layer_predictions returns'


def lens_table(
    predictions: Sequence[Any],
    tokens: Sequence[str] | None = None,
    ax: Axes | None = None,
    title: str | None = None,
) -> Figure:
    """What the model would say at each layer, coloured by probability; layers down.

    Args:
        predictions: what `LogitLensAnalysis.layer_predictions` returns for one position: the likeliest tokens stand side by
            side, with their probabilities. Or a list of those, one for each position: the likeliest token of each.
        tokens: for several positions, the text of the token at each.
        ax: where to draw; None for a new figure.
        title: shown literally.

    Returns:
        The figure. Tokens too long for their cells are cut, with a …; cells too narrow for two letters stay empty.

    Raises:
        ValueError, TypeError: predictions of another form; layers that differ between positions; a number of tokens that
            cannot be.

    Examples:
        >>> figure = lens_table(analysis.LogitLensAnalysis(tokenizer).layer_predictions(capture.logits))
        >>> [cell.get_text() for cell in figure.axes[0].texts[-6:-4]]  # the last layer's likeliest
        ['␣Rome', '1.00']
    """
    many = is_of_positions(predictions)
    layers, rows = read_positions(predictions if many else [predictions])
    if many:
        names = [str(i) for i in range(len(rows[0]))] if tokens is None else as_texts(tokens, len(rows[0]), "tokens")
        cells = [[cell[0] for cell in row] for row in rows]
    else:
        if tokens is not None:
            raise ValueError("tokens are for several positions, and predictions is of one.")
        cells = [cell for (cell,) in rows]
        names = [str(k + 1) for k in range(max(map(len, cells)))]
    values = np.full((len(cells), len(names)), np.nan)
    for i, row in enumerate(cells):
        values[i, : len(row)] = [probability for _, probability in row]

    wide = min(max(14.0 / len(names), 0.6), 1.0) if many else 1.5
    figure, ax = canvas(ax, wide * len(names), 0.2 * len(layers), largest=24.0)
    image = draw_grid(ax, values, (0.0, 1.0), WEIGHTS, "auto")
    colour_bar(image, "probability")
    name_axes(ax, "token at the position" if many else "rank of the prediction", "layer", title)
    ax.xaxis.set_label_position("top")
    ax.xaxis.tick_top()
    width, height = inches(ax)
    label_numbers(ax, rows=layers)
    if many:
        label_tokens(ax, names, on_top=True)
    else:
        label_ticks(ax.xaxis, names, width, 0.3)
    ax.tick_params(length=0)
    size = min(MEDIUM, 50.0 * height / len(layers))  # points
    letters = int((width / len(names) - (0.06 if many else 0.4)) / (0.0088 * size))
    if letters < 2:
        return figure
    for i, row in enumerate(cells):
        for j, (text, shown) in enumerate(zip(row, token_labels([text for text, _ in row], letters), strict=True)):
            colour = ink_on(image.cmap(image.norm(np.ma.masked_invalid(text[1]))))
            style = {"fontsize": size, "va": "center", "color": colour, "clip_on": True}
            if many:
                ax.text(j, i, shown, ha="center", **style, **LITERAL)
            else:
                ax.text(j - 0.46, i, shown, ha="left", **style, **LITERAL)
                ax.text(j + 0.46, i, f"{text[1]:.2f}", ha="right", **style)
    return figure


def probability_trajectory(
    values: ArrayLike, layers: Sequence[int] | None = None, ax: Axes | None = None, title: str | None = None
) -> Figure:
    """The probability of one or several tokens over layers, on a scale of 0 to 1.

    Args:
        values: `[L]`, as `LogitLensAnalysis.token_probability_trajectory` returns; or text → `[L]`.
        layers: true layer numbers; None for 0 to L − 1.
        ax: where to draw; None for a new figure.
        title: shown literally.

    Returns:
        The figure.

    Raises:
        ValueError, TypeError: a shape that cannot be; numbers that are no probabilities.

    Examples:
        >>> chances = analysis.LogitLensAnalysis(tokenizer).token_probability_trajectory(capture.logits, " Rome")
        >>> probability_trajectory({" Rome": chances}).axes[0].get_ylabel()
        'P(token)'
    """
    named = values if isinstance(values, Mapping) else {None: values}
    rows = [as_values(row, "values" if text is None else f"values[{text!r}]", "L") for text, row in named.items()]
    if len({len(row) for row in rows}) != 1:
        raise ValueError(
            f"values has rows of lengths {[len(row) for row in rows]}: one number for each layer is needed."
        )
    table = np.stack(rows)
    finite = table[np.isfinite(table)]
    if finite.size and not (finite.min() >= -1e-6 and finite.max() <= 1 + 1e-3):
        raise ValueError(f"values go from {finite.min():.3g} to {finite.max():.3g}, and probabilities are needed.")
    figure = layer_profile(table, layers, ylabel="P(token)", ax=ax, title=title)
    drawn = figure.axes[0] if ax is None else ax
    drawn.set_ylim(-0.02, 1.02)
    if isinstance(values, Mapping):
        draw_legend(drawn, drawn.lines[-len(rows) :], token_labels(list(map(str, named))))
    return figure


def is_of_positions(predictions: Any) -> bool:
    """Whether predictions are of several positions, a list of what they are for one."""
    return _is_list(predictions) and len(predictions) > 0 and _is_list(predictions[0])


def read_positions(predictions: Sequence[Any]) -> tuple[list[int], list[list[list[tuple[str, float]]]]]:
    """The true layer numbers, and [(text, probability), …] of each layer and position."""
    tables = [_rows(table) for table in predictions]
    layers = [layer for layer, _ in tables[0]]
    if any([layer for layer, _ in table] != layers for table in tables):
        raise ValueError("predictions has positions whose layers differ; give the same layers for each.")
    return layers, [[table[i][1] for table in tables] for i in range(len(layers))]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _rows(table: Any) -> list[tuple[int, list[tuple[str, float]]]]:
    """(layer, [(text, probability), …]) of each layer."""
    try:
        rows = [(int(row["layer"]), [(str(text), float(p)) for text, p in row["predictions"]]) for row in table]
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise TypeError(f"predictions is not of the form {FORM}.") from error
    if not rows or not all(found for _, found in rows):
        raise ValueError("predictions has no layers, or a layer without predictions: there is nothing to draw.")
    return rows
