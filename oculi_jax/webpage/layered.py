"""Where nodes stand that are drawn in rows, and how lines between rows are led past the nodes that lie on their way.

Sugiyama, Tagawa and Toda (1981): what crosses a row has a place in it, rows are ordered by the means of their neighbours, and
places are as near to those of their neighbours as the order and the widths allow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

ROUNDS = 8  # upwards and downwards


def layered(
    rows: Sequence[Sequence[int]], lines: Sequence[tuple[int, int]], wide: float, lane: float
) -> tuple[dict[int, float], list[list[float]]]:
    """Places across the picture.

    Args:
        rows: nodes, of which each row holds some, from the first row to the last.
        lines: from a node to one of a later row.
        wide: how much room a node needs in its row.
        lane: how much a line needs that crosses the row. Those that come from one node share it.

    Returns:
        Of each node its place, and of each line its places in the rows between its ends. All are centred on 0.
    """
    row_of = {node: r for r, row in enumerate(rows) for node in row}
    highest: dict[int, int] = {}
    for begin, end in lines:
        highest[begin] = max(highest.get(begin, 0), row_of[end])
    # Items of a row: nodes as they are; as (node, row), what comes from a node of an earlier row and goes on to a later one.
    items: list[list[int | tuple[int, int]]] = [list(row) for row in rows]
    for node, last in highest.items():
        for r in range(row_of[node] + 1, last):
            items[r].append((node, r))
    below: dict[int | tuple[int, int], set[int | tuple[int, int]]] = {item: set() for row in items for item in row}
    above: dict[int | tuple[int, int], set[int | tuple[int, int]]] = {item: set() for row in items for item in row}
    for begin, end in lines:
        route = [begin, *((begin, r) for r in range(row_of[begin] + 1, row_of[end])), end]
        for one, next_one in pairwise(route):
            above[one].add(next_one)
            below[next_one].add(one)
    place = _placed(items, (below, above), wide, lane)
    between = [[place[begin, r] for r in range(row_of[begin] + 1, row_of[end])] for begin, end in lines]
    return {node: place[node] for node in row_of}, between


def _placed(
    items: list[list[int | tuple[int, int]]], neighbours: tuple[Mapping, Mapping], wide: float, lane: float
) -> dict[int | tuple[int, int], float]:
    """Items ordered in their rows, then moved."""

    def width(item: int | tuple[int, int]) -> float:
        return lane if isinstance(item, tuple) else wide

    place: dict[int | tuple[int, int], float] = {}
    for row in items:
        widths = np.array([width(item) for item in row])
        place |= dict(zip(row, _offsets(widths) - widths.sum() / 2, strict=True))
    upwards, downwards = range(len(items)), range(len(items) - 1, -1, -1)
    for turn in range(2 * ROUNDS):
        own, order = neighbours[turn % 2], (upwards, downwards)[turn % 2]
        for r in order:
            row = items[r]
            wanted = {item: float(np.mean([place[n] for n in own[item]] or [place[item]])) for item in row}
            row.sort(key=lambda item: wanted[item])
            widths = np.array([width(item) for item in row])
            moved = _apart(np.array([wanted[item] for item in row]), widths)
            place |= dict(zip(row, moved.tolist(), strict=True))
    ends = [(place[item] - width(item) / 2, place[item] + width(item) / 2) for row in items for item in row]
    middle = (min(low for low, _ in ends) + max(high for _, high in ends)) / 2 if ends else 0.0
    return {item: x - middle for item, x in place.items()}


def _offsets(widths: np.ndarray) -> np.ndarray:
    """The middles of things of these widths that stand beside each other from 0 on."""
    return np.cumsum(widths) - widths / 2


def _apart(wanted: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """The places nearest to those that are wanted, in sorted order, at which none touches the next.

    Less the room that those before it take, each must not be below the one before: isotonic regression, by pooling neighbours.
    """
    room = _offsets(widths)
    pools: list[tuple[float, int]] = []
    for x in (wanted - room).tolist():
        pool = (x, 1)
        while pools and pools[-1][0] > pool[0]:
            before, n = pools.pop()
            pool = ((before * n + pool[0] * pool[1]) / (n + pool[1]), n + pool[1])
        pools.append(pool)
    return np.concatenate([np.full(n, x) for x, n in pools] or [np.zeros(0)]) + room
