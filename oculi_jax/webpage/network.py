"""A circuit as a network to be drawn, nodes in rows, layers upwards; and a page of it that answers to the pointer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import integer
from .layered import layered
from .page import Page, numbers, page, part

if TYPE_CHECKING:
    from ..circuits import Circuit

MOST = 200  # of edges, nodes or neurons that are drawn where nobody says how many
HIGH, LANE = 0.2, 0.09  # inches: a node, and the room of a line that passes one
IN_A_ROW, IN_A_GRID = 16, 10  # nodes of circuits with edges and without; what is more stands above them
PORTS = {"q": -0.28, "k": 0.0, "v": 0.28}  # where an edge arrives at a head, as a share of its width from the middle
PIXELS = 96  # an inch on a page


@dataclass(frozen=True)
class Node:
    """What is drawn as a box, whose middle is at `x`, `y`, in inches; `score` is None where it has no finite one of its own."""

    name: str
    x: float
    y: float
    score: float | None


@dataclass(frozen=True)
class Edge:
    """A line between nodes of these numbers, to the queries, keys or values (`port`) of a head or to all else (`""`).

    `points` `[2 n, 2]`: of n curves, which begin and end upright; between two curves the line goes straight up.
    """

    name: str
    begin: int
    end: int
    port: str
    score: float | None
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Network:
    """A circuit, or the largest part of it, in places. Lengths in inches; 0, 0 is the middle of the lower end.

    Attributes:
        kind: `"edges"`, `"nodes"` or `"neurons"`.
        kept, every, drawn: how many of these the circuit keeps, the model has, and are here.
        largest: of all finite scores here, without their signs; None where there are none.
        bands: a label, and where it begins and ends, of input, each layer that has nodes here, and logits.
        box, size: width and height of a node, and of the whole.
    """

    kind: str
    kept: int
    every: int
    drawn: int
    largest: float | None
    nodes: list[Node]
    edges: list[Edge]
    bands: list[tuple[str, float, float]]
    box: tuple[float, float]
    size: tuple[float, float]

    @property
    def caption(self) -> str:
        """What is to be seen, in words."""
        one = {"edges": "edge", "nodes": "node", "neurons": "neuron"}[self.kind]
        whole = f"{self.kept} of {self.every} {self.kind}" if self.every != 1 else f"{self.kept} of 1 {one}"
        if not self.kept:
            return f"empty: {whole}"
        if self.kind == "nodes":
            whole += ", and all edges between them"
        if self.drawn < self.kept:
            by = "largest" if self.largest is not None else "first"
            whole += f"; drawn {'is' if self.drawn == 1 else 'are'} the {self.drawn} {by}"
        return whole


def network(circuit: Circuit, n: int | None = None) -> Network:
    """The places of a circuit, or of the n of its edges, nodes or neurons that have the largest scores; `MOST` for None."""
    most = MOST if n is None else integer(n, "n", 1)
    mask = circuit.mask
    every = circuit.graph.n_edges if circuit.kind == "edges" else mask.size
    places: np.ndarray = np.argwhere(mask)
    scores: list[float | None] | None = None
    if circuit.scores is not None:
        given = np.asarray(circuit.scores, np.float64)[mask]
        order = np.sort(np.argsort(-np.abs(np.nan_to_num(given)), kind="stable")[:most])
        places, scores = places[order], [x if np.isfinite(x) else None for x in given[order].tolist()]
    places = places[:most]
    largest = max((abs(x) for x in scores or [] if x is not None), default=None)
    own: dict[str, float | None] = {}
    lines: list[tuple[str, str, str, float | None]] = []
    if circuit.kind == "edges":
        lines = _lines(circuit, places, scores)
        names = {name for _, begin, end, _ in lines for name in (begin, end.partition("<")[0])}
    else:
        row = circuit.graph.writers
        named = [row[p[0]] if circuit.kind == "nodes" else f"m{p[0]}.n{p[1]}" for p in places.tolist()]
        names = set(named)
        own = {} if scores is None else dict(zip(named, scores, strict=True))
    ordered = sorted(names, key=_depth)
    nodes, edges, bands, box, size = _drawn(ordered, own, lines)
    return Network(
        circuit.kind, int(mask.sum()), every, len(places), largest, nodes, edges, bands, box, size
    )  # fmt: skip


def _lines(
    circuit: Circuit, places: np.ndarray, scores: list[float | None] | None
) -> list[tuple[str, str, str, float | None]]:
    """The name of each edge, its writer, whom it is told to (`a1.h2<q>`, `m3`), and its score.

    What heads of a group share is told to each of them that the circuit has.
    """
    graph, found = circuit.graph, []
    alive = circuit.edges.any(axis=1)
    for i, (u, v) in enumerate(places.tolist()):
        writer, reader = graph.writers[u], graph.readers[v]
        port = re.sub(r"^[^<]*", "", reader)
        owners = [graph.writers[w] for w in np.flatnonzero(graph.owners[:, v] & alive)] or [reader]
        score = None if scores is None else scores[i]
        found += [(f"{writer}->{reader}", writer, f"{owner}{port}", score) for owner in owners]
    return found


def _depth(name: str) -> tuple[int, int, int]:
    """By layer, attention before its MLP, then by number."""
    if name in ("input", "logits"):
        return (-1 if name == "input" else 1 << 30), 0, 0
    kind, layer, number = re.fullmatch(r"([am])(\d+)(?:\.[hn](\d+))?", name).groups()  # type: ignore[union-attr]
    return int(layer), int(kind == "m"), int(number or 0)


def _drawn(
    names: Sequence[str], own: dict[str, float | None], lines: Sequence[tuple[str, str, str, float | None]]
) -> tuple[list[Node], list[Edge], list[tuple[str, float, float]], tuple[float, float], tuple[float, float]]:
    """Nodes, lines, bands, the size of a node and of the whole."""
    number = {name: i for i, name in enumerate(names)}
    levels: dict[tuple[int, int], list[int]] = {}
    for name, i in number.items():
        levels.setdefault(_depth(name)[:2], []).append(i)
    rows, depths = [], []
    for (layer, _), level in levels.items():
        parts = np.array_split(level, -(-len(level) // (IN_A_ROW if lines else IN_A_GRID)))
        rows += [part.tolist() for part in parts]
        depths += [layer] * len(parts)
    ends = [(number[begin], number[end.partition("<")[0]]) for _, begin, end, _ in lines]
    wide = 0.066 * max((len(name) for name in names), default=1) + 0.12
    xs, between = layered(rows, ends, wide + 0.12, LANE)
    apart = HIGH + (0.12 if not lines else 0.36 if len(rows) <= 14 else 0.26)
    ys = {i: (r + 0.5) * apart for r, row in enumerate(rows) for i in row}
    nodes = [Node(name, xs[i], ys[i], own.get(name)) for name, i in number.items()]
    edges = []
    for (name, _, end, score), (i, j), lanes in zip(lines, ends, between, strict=True):
        port = end.partition("<")[2][:1]
        points = [(xs[i], ys[i] + HIGH / 2)]
        for k, x in enumerate(lanes, 1):
            points += [(x, ys[i] + k * apart - HIGH / 2), (x, ys[i] + k * apart + HIGH / 2)]
        points.append((xs[j] + PORTS.get(port, 0.0) * wide, ys[j] - HIGH / 2))
        edges.append(Edge(name, i, j, port, score, points))
    bands: list[tuple[str, float, float]] = []
    for r, depth in enumerate(depths):
        label = {-1: "input", 1 << 30: "logits"}.get(depth, f"layer {depth}")
        low = bands.pop()[1] if bands and bands[-1][0] == label else r * apart
        bands.append((label, low, (r + 1) * apart))
    reach = [abs(node.x) + wide / 2 for node in nodes] + [abs(x) for edge in edges for x, _ in edge.points]
    return nodes, edges, bands, (wide, HIGH), (2 * max(reach, default=1.0) + 0.2, max(len(rows), 1) * apart)


def circuit_view(circuit: Circuit, n: int | None = None) -> Page:
    """A circuit as a network to look through: point at a node for its edges and their scores; a click keeps it. Host function.

    Layers run upwards. An edge is as wide as its score is large, orange where it raises the metric and blue where it lowers it.

    Args:
        circuit: of edges, nodes or neurons.
        n: how many of these to draw at most, those of the largest scores; None for 200. The page says of how many.

    Returns:
        A page that shows itself in a notebook, works offline, and saves itself: `.save("circuit.html")`. A circuit that is the last
        value of a notebook's cell shows this.

    Raises:
        ValueError, TypeError: an n below 1; what is no circuit.

    Examples:
        >>> scores = circuits.edge_attribution(model, ids, other, metric, steps=5)
        >>> circuit_view(scores.top(40)).save("circuit.html")
    """
    drawn = network(checked(circuit), n)
    body = f'<h2 id="network-heading">Circuit</h2>\n{part("network")}'
    data = {"words": [], "tokens": [], "layers": [], "heads": 0, "network": network_data(drawn)}
    height = int(min(max(drawn.size[1] * PIXELS + 150, 520), 760))
    return page("Circuit", "view", body, ("network.js",), "drawNetwork();", data, height, styles=("network.css",))


def checked(circuit: Circuit) -> Circuit:
    if not hasattr(circuit, "graph") or not hasattr(circuit, "mask"):
        hint = " Scores choose one: scores.top(40)." if hasattr(circuit, "top") else ""
        raise TypeError(f"circuit is a {type(circuit).__name__}, and a Circuit is needed.{hint}")
    return circuit


def network_data(drawn: Network) -> dict[str, Any]:
    """What a page's script reads: places in pixels, from the upper left."""
    width, height = drawn.size

    def at(x: float, y: float) -> tuple[float, float]:
        return round((x + width / 2) * PIXELS, 1), round((height - y) * PIXELS, 1)

    def told(score: float | None) -> Any:
        return None if score is None else numbers(score)

    return {
        "kind": drawn.kind,
        "caption": drawn.caption,
        "largest": told(drawn.largest),
        "size": [round(x * PIXELS) for x in drawn.size],
        "box": [round(x * PIXELS, 1) for x in drawn.box],
        "bands": [(label, at(0, high)[1], at(0, low)[1]) for label, low, high in drawn.bands],
        "nodes": [(node.name, *at(node.x, node.y), told(node.score)) for node in drawn.nodes],
        "edges": [
            (edge.name, edge.begin, edge.end, edge.port, told(edge.score), [at(*point) for point in edge.points])
            for edge in drawn.edges
        ],
    }
