"""The look that all pictures share: sizes, colours, labels, and how a grid of numbers or a few lines are drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import as_array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.lines import Line2D
    from numpy.typing import ArrayLike

SMALL, MEDIUM, LARGE = 7, 8.5, 10  # points: ticks and cells, names of axes, titles
WEIGHTS, SIGNED, MISSING = "viridis", "RdBu_r", "0.75"  # colour maps, and the grey of what is not finite
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito (2008)
STYLES = ("-", "--", ":", "-.")  # of the second, third and fourth seven lines
POSITIVE, NEGATIVE = "#B2182B", "#2166AC"  # the ends of SIGNED
LITERAL: dict[str, Any] = {"parse_math": False, "usetex": False}  # text is shown as it is, "$" and "_" too
LONGEST = 16  # characters of a token's label


def door() -> None:
    """Imports matplotlib, or says how to get it."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'Pictures need matplotlib: pip install "oculi-jax[viz]".', name="matplotlib"
        ) from error


def canvas(ax: Axes | None, width: float, height: float, largest: float = 16.0) -> tuple[Figure, Axes]:
    """The axes to draw in: `ax`, or those of a new figure that pyplot does not know of.

    Args:
        ax: given by the user, or None.
        width, height: inches that the data wants, without labels; kept between 2 and `largest`.
        largest: inches.
    """
    door()
    from matplotlib.axes import Axes

    from .picture import Picture

    if ax is not None:
        if not isinstance(ax, Axes):
            hint = " Give one element of it." if isinstance(ax, np.ndarray | list | tuple) else ""
            raise TypeError(f"ax is of type {type(ax).__name__}, and one matplotlib Axes is needed.{hint}")
        ax.tick_params(labelsize=SMALL)
        return ax.figure, ax  # type: ignore[return-value]
    width, height = (min(max(side, 2.0), largest) for side in (width, height))
    figure = Picture(figsize=(width + 1.8, height + 1.0), layout="constrained")
    # The layout is settled when the figure is drawn; until then `inches` reads this estimate of it.
    spec = figure.add_gridspec(left=0.9 / (width + 1.8), right=1 - 0.9 / (width + 1.8),
                               bottom=0.6 / (height + 1.0), top=1 - 0.4 / (height + 1.0))  # fmt: skip
    ax = figure.add_subplot(spec[0])
    ax.tick_params(labelsize=SMALL)
    return figure, ax


def panels(
    rows: int, columns: int, width: float, height: float, widths: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure of several axes, for functions that take `ax`; pyplot does not know of it.

    Args:
        rows, columns: of axes.
        width, height: of the figure, in inches.
        widths: of the columns, relative to each other.

    Returns:
        The figure, and its axes row by row.

    Examples:
        >>> figure, axes = panels(1, 2, width=8, height=3)
        >>> attention_heatmap(capture.attention.patterns[2, 0], ax=axes[0]) is figure
        True
    """
    door()
    from .picture import Picture

    figure = Picture(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, width_ratios=widths).flat)


def inches(ax: Axes) -> tuple[float, float]:
    """Width and height of the axes, as far as they are known before the figure is drawn."""
    return ax.bbox.width / ax.figure.dpi, ax.bbox.height / ax.figure.dpi


def as_values(values: ArrayLike, name: str, *shapes: str, hint: str = "") -> np.ndarray:
    """float64, on the host, of one of the shapes (`"L H"`), none of whose axes is empty."""
    try:
        array = np.asarray(as_array(values), np.float64)
    except ValueError as error:
        raise ValueError(f"{name} is not an array of numbers: {error}") from error
    if array.ndim not in {len(shape.split()) for shape in shapes}:
        wanted = " or ".join(f"[{', '.join(shape.split())}]" for shape in shapes)
        raise ValueError(f"{name} has shape {list(array.shape)}, and {wanted} is needed.{f' {hint}' if hint else ''}")
    if array.size == 0:
        raise ValueError(f"{name} has shape {list(array.shape)}: there is nothing to draw.")
    return array


def as_numbers(given: Sequence[int] | None, count: int, name: str) -> list[int]:
    """True numbers of layers or heads, one for each row; 0, 1, … where none are given."""
    if given is None:
        return list(range(count))
    numbers = np.atleast_1d(np.asarray(given))
    if numbers.dtype.kind not in "iu":
        raise TypeError(f"{name} is {given!r}, and a sequence of integers is needed.")
    if numbers.shape != (count,):
        hint = " Give capture.captured_layers." if name == "layers" else ""
        raise ValueError(f"{name} has {numbers.size} numbers, and the values have {count} {name}.{hint}")
    return [int(number) for number in numbers]


def as_texts(given: Sequence[str] | None, count: int, name: str) -> list[str]:
    """One text for each entry."""
    if isinstance(given, str) or not isinstance(given, Sequence | np.ndarray):
        raise TypeError(f"{name} is of type {type(given).__name__}, and a list of {count} texts is needed.")
    if len(given) != count:
        raise ValueError(f"{name} has {len(given)} texts, and {count} are needed: one for each entry.")
    return [str(text) for text in given]


def token_labels(tokens: Sequence[str], longest: int = LONGEST) -> list[str]:
    """Tokens as people can read them: outer spaces as ␣, what is invisible or not in the font escaped, cut where long."""
    door()
    from matplotlib.font_manager import FontProperties, findfont, get_font

    fonts = [get_font(findfont(FontProperties(family=[family]))) for family in FontProperties().get_family()]

    def shown(character: str) -> str:
        in_font = any(font.get_char_index(ord(character)) for font in fonts)
        if in_font and character.isprintable() and character != "\\":
            return character
        return character.encode("unicode_escape").decode()

    def label(token: str) -> str:
        inner = token.strip(" ")
        before, after = len(token) - len(token.lstrip(" ")), len(token) - len(token.rstrip(" "))
        spaces = ("␣" * before, "␣" * after if inner else "")
        text = "".join(map(shown, inner)).join(spaces) or "''"
        return text if len(text) <= longest else text[: max(longest - 1, 1)] + "…"

    return [label(str(token)) for token in tokens]


def pair_labels(tokens: Sequence[str], others: Sequence[str]) -> list[str]:
    """The labels of two aligned prompts' tokens: one where they agree, both where they differ, as `John→Mary`."""
    same = zip(token_labels(tokens), tokens, others, strict=True)
    both = zip(token_labels(tokens, LONGEST // 2), token_labels(others, LONGEST // 2), strict=True)
    return [label if a == b else "→".join(pair) for (label, a, b), pair in zip(same, both, strict=True)]


def name_axes(ax: Axes, xlabel: str, ylabel: str, title: str | None) -> None:
    ax.set_xlabel(xlabel, fontsize=MEDIUM, **LITERAL)
    ax.set_ylabel(ylabel, fontsize=MEDIUM, **LITERAL)
    if title is not None:
        ax.set_title(title, fontsize=LARGE, **LITERAL)


def label_ticks(axis: Axis, labels: Sequence[Any], length: float, room: float, **style: Any) -> None:
    """A label at each index of an axis of so many inches, or at every n-th where each has less than `room`."""
    step = max(1, math.ceil(room * len(labels) / length))
    axis.set_ticks(range(0, len(labels), step), [str(label) for label in labels[::step]], **LITERAL, **style)


def label_numbers(ax: Axes, columns: Sequence[int] | None = None, rows: Sequence[int] | None = None) -> None:
    """True numbers along the columns and rows of a grid."""
    width, height = inches(ax)
    if columns is not None:
        label_ticks(ax.xaxis, columns, width, 0.08 * (1.5 + len(str(max(columns)))))
    if rows is not None:
        label_ticks(ax.yaxis, rows, height, 0.15)


def slanted(labels: Sequence[str], on_top: bool = False) -> dict[str, Any]:
    """How labels along the columns are turned: not at all where all are short."""
    if max(map(len, labels)) <= 3:
        return {}
    return {"rotation": 45, "ha": "left" if on_top else "right", "va": "center", "rotation_mode": "anchor"}


def label_tokens(
    ax: Axes, columns: Sequence[str] | None = None, rows: Sequence[str] | None = None, on_top: bool = False
) -> None:
    """Tokens along the columns and rows of a grid."""
    width, height = inches(ax)
    if columns is not None:
        labels = token_labels(columns)
        label_ticks(ax.xaxis, labels, width, 0.16, **slanted(labels, on_top))
    if rows is not None:
        label_ticks(ax.yaxis, token_labels(rows), height, 0.13)


def draw_grid(ax: Axes, values: np.ndarray, limits: tuple[float, float], colours: str, aspect: str) -> AxesImage:
    """Cells coloured by value, the first row on top; what is not finite is grey."""
    import matplotlib

    ax.grid(False)
    cmap = matplotlib.colormaps[colours].with_extremes(bad=MISSING)
    return ax.imshow(np.ma.masked_invalid(values), cmap=cmap, vmin=limits[0], vmax=limits[1], aspect=aspect,  # type: ignore[arg-type]
                     origin="upper", interpolation="nearest")  # fmt: skip


def ink_on(colour: ArrayLike) -> str:
    """Black or white, whichever has more contrast with a colour (relative luminance, WCAG 2.2)."""
    return "white" if np.dot(np.power(np.asarray(colour)[:3], 2.2), (0.2126, 0.7152, 0.0722)) < 0.179 else "black"


def colour_bar(image: AxesImage, label: str) -> None:
    """Beside a grid, and as high. Without a layout that makes room for it, the axes give some of theirs."""
    ax, figure = image.axes, image.get_figure()
    assert ax is not None and figure is not None
    if figure.get_layout_engine() is None:
        bar = figure.colorbar(image, ax=ax)
    else:
        bar = figure.colorbar(image, cax=ax.inset_axes((1 + 0.1 / inches(ax)[0], 0.0, 0.16 / inches(ax)[0], 1.0)))
    name_bar(bar, label)


def name_bar(bar: Colorbar, label: str) -> None:
    bar.ax.tick_params(labelsize=SMALL)
    bar.set_label(label, fontsize=MEDIUM, **LITERAL)


def limits_of(values: np.ndarray, diverging: bool) -> tuple[float, float]:
    """The range of the colours: symmetric about 0, or from 0 (or the least value, if negative) to the largest."""
    finite = values[np.isfinite(values)]
    if diverging:
        top = float(np.abs(finite).max(initial=0.0)) or 1.0
        return -top, top
    low, high = float(finite.min(initial=0.0)), float(finite.max(initial=0.0))
    return low, high if high > low else low + 1.0


def draw_lines(ax: Axes, x: np.ndarray, rows: Iterable[np.ndarray]) -> list[Line2D]:
    """One line for each row, with light rules behind."""
    open_frame(ax, "y")
    lines = []
    for i, y in enumerate(rows):
        colour, style = LINES[i % len(LINES)], STYLES[i // len(LINES) % len(STYLES)]
        lines += ax.plot(x, y, style, color=colour, linewidth=1.4, marker="o", markersize=3)
    return lines


def open_frame(ax: Axes, rules: str) -> None:
    """No frame above and on the right; light rules across."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(False)
    ax.grid(True, axis=rules, color="0.9", linewidth=0.6)  # type: ignore[arg-type]
    ax.set_axisbelow(True)


def draw_legend(ax: Axes, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Beside the axes where it is long."""
    beside = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0} if len(names) > 6 else {}
    legend = ax.legend(handles, ["x"] * len(names), fontsize=SMALL, frameon=False, ncols=-(-len(names) // 25), **beside)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=name, **LITERAL)  # afterwards: a legend leaves out names that begin with "_"
