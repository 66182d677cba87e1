"""A circuit drawn: nodes in rows, layers upwards, edges as wide as their scores are large."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..webpage.network import Edge, Network, checked, network
from .canvas import LINES, LITERAL, MEDIUM, NEGATIVE, POSITIVE, SIGNED, SMALL, canvas, inches, ink_on, name_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..circuits import Circuit

PLAIN = "0.45"  # an edge without a score
WIDTHS = (0.5, 4.0)  # points: of a score of 0, and of the largest
MARKS = {"q": ("o", LINES[4], "queries"), "k": ("s", LINES[2], "keys"), "v": ("^", LINES[3], "values")}
LEAST = 3.0  # points, below which no name can be read
SMALLEST = 2.0  # inches, of a picture's sides


def plot_circuit(circuit: Circuit, n: int | None = None, ax: Axes | None = None, title: str | None = None) -> Figure:
    """A circuit: its nodes in rows, layers upwards, and its edges, red where they raise the metric and blue where they lower it.

    An edge is as wide as its score is large, and where it arrives at a head a mark says whether at queries, keys or values. What
    leads past other nodes goes beside them, all that comes from one node together. Of a circuit of nodes or neurons, these are
    coloured by their scores.

    Args:
        circuit: of edges, nodes or neurons. What comes without scores is grey.
        n: how many of these to draw at most, those of the largest scores; None for 200. The picture says of how many.
        ax: where to draw; None for a new figure.
        title: shown literally.

    Returns:
        The figure.

    Raises:
        ValueError, TypeError: an n below 1; what is no circuit.

    Examples:
        >>> scores = circuits.edge_attribution(model, ids, other, metric, steps=5)
        >>> plot_circuit(scores.top(40), n=12).axes[0].get_xlabel()
        '39 of 927 edges; drawn are the 12 largest'
    """
    drawn = network(checked(circuit), n)
    width, height = (max(side, SMALLEST) for side in drawn.size)
    figure, ax = canvas(ax, width, height, largest=40.0)
    ax.set_xlim(-width / 2, width / 2)
    ax.set_ylim((drawn.size[1] - height) / 2, (drawn.size[1] + height) / 2)
    ax.spines[:].set_visible(False)
    ax.grid(False)
    for i, (_, low, high) in enumerate(drawn.bands):
        ax.axhspan(low, high, color="0.96" if i % 2 else "white", linewidth=0, zorder=0)
    ax.set_xticks([])
    ax.set_yticks([(low + high) / 2 for _, low, high in drawn.bands], [label for label, *_ in drawn.bands])
    ax.tick_params(axis="y", length=0)
    name_axes(ax, drawn.caption, "", title)
    for edge in sorted(drawn.edges, key=lambda edge: _share(drawn, edge)):
        _draw_edge(ax, drawn, edge)
    _draw_nodes(ax, drawn)
    _explain(ax, drawn)
    return figure


def _share(drawn: Network, edge: Edge) -> float:
    """A score as a share of the largest, with no sign; 0 where there is none."""
    return abs(edge.score) / drawn.largest if edge.score is not None and drawn.largest else 0.0


def _width(share: float) -> float:
    return WIDTHS[0] + (WIDTHS[1] - WIDTHS[0]) * share


def _draw_edge(ax: Axes, drawn: Network, edge: Edge) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    colour = PLAIN if edge.score is None else NEGATIVE if edge.score < 0 else POSITIVE
    width = 1.0 if edge.score is None else _width(_share(drawn, edge))
    points, codes = zip(*_path(edge), strict=True)
    path = Path(points, [{"M": Path.MOVETO, "C": Path.CURVE4, "L": Path.LINETO}[code] for code in codes])
    style: dict[str, Any] = {"edgecolor": colour, "linewidth": width, "capstyle": "butt", "alpha": 0.8}
    ax.add_patch(PathPatch(path, facecolor="none", zorder=2 + _share(drawn, edge), **style))
    if edge.port:
        marker, own, _ = MARKS[edge.port]
        ax.plot(
            *edge.points[-1], marker, color=own, markersize=4.5, markeredgecolor="white", markeredgewidth=0.4, zorder=5
        )


def _path(edge: Edge) -> Iterator[tuple[tuple[float, float], str]]:
    """The points of a line, and how each is reached."""
    yield edge.points[0], "M"
    for i, ((x, y), (x2, y2)) in enumerate(pairwise(edge.points)):
        if i % 2:
            yield (x2, y2), "L"
        else:
            middle = (y + y2) / 2
            yield from (((x, middle), "C"), ((x2, middle), "C"), ((x2, y2), "C"))


def _draw_nodes(ax: Axes, drawn: Network) -> None:
    import matplotlib
    from matplotlib.patches import FancyBboxPatch

    across, up = (have / want for have, want in zip(inches(ax), drawn.size, strict=True))
    size = SMALL * min(1.0, across, up)
    wide, high = drawn.box
    for node in drawn.nodes:
        share = node.score / drawn.largest if node.score is not None and drawn.largest else 0.0
        fill = matplotlib.colormaps[SIGNED](0.5 + share / 2)
        if drawn.kind == "edges":
            fill = (1.0, 1.0, 1.0, 1.0)
        elif node.score is None:
            fill = (0.75, 0.75, 0.75, 1.0)
        ax.add_patch(FancyBboxPatch((node.x - wide / 2, node.y - high / 2), wide, high, boxstyle="round,pad=0,rounding_size=0.05",
                                    facecolor=fill, edgecolor="0.5", linewidth=0.6, zorder=4))  # fmt: skip
        if size >= LEAST:
            ax.text(
                node.x,
                node.y,
                node.name,
                ha="center",
                va="center_baseline",
                fontsize=size,
                color=ink_on(fill),
                zorder=6,
                **LITERAL,
            )


def _explain(ax: Axes, drawn: Network) -> None:
    """A legend: what widths and colours mean, and marks."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    rows: list[tuple[Any, str]] = []
    scored = drawn.edges or drawn.nodes
    for sign, colour, what in ((1, POSITIVE, "raises the metric"), (-1, NEGATIVE, "lowers it")):
        own = max((sign * one.score for one in scored if one.score is not None), default=0.0)
        if own <= 0 or not drawn.largest:
            continue
        for share in (1.0, 0.5) if drawn.edges and own == drawn.largest else (1.0,):
            shown = f"{sign * share * own:+.3g}".replace("-", "−")
            handle = (
                Line2D([], [], color=colour, linewidth=_width(share * own / drawn.largest))
                if drawn.edges
                else Patch(color=colour)
            )
            rows.append((handle, f"{what}: {shown}"))
    if any(one.score is None for one in scored):
        rows.append((Line2D([], [], color=PLAIN, linewidth=1.0) if drawn.edges else Patch(color="0.75"), "no score"))
    for port, (marker, colour, what) in MARKS.items():
        if any(edge.port == port for edge in drawn.edges):
            rows.append(
                (Line2D([], [], color=colour, marker=marker, linestyle="", markersize=4.5), f"arrives at {what}")
            )
    if rows:  # beside the picture, whose every part may be needed
        handles, names = zip(*rows, strict=True)
        beside: Any = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0}
        ax.legend(handles, names, fontsize=SMALL, frameon=False, **beside)
    if not drawn.nodes:
        ax.text(
            0.5, 0.5, "nothing is kept", transform=ax.transAxes, ha="center", va="center", fontsize=MEDIUM, color="0.4"
        )
