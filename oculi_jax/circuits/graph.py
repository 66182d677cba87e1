"""`Graph`: what writes to the residual stream of a model, what reads it, and which writer stands before which reader."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool

from ..arrays import integer

if TYPE_CHECKING:
    from ..models.decoder.config import DecoderConfig


@dataclass(frozen=True)
class Graph:
    """Writers and readers of the residual stream in depth order, by the names of MIB (Mueller et al. 2025, arXiv:2504.13151).

    Writers are `input`, `a{l}.h{h}` and `m{l}`; readers `a{l}.h{h}<q>`, `a{l}.h{h}<k>`, `a{l}.h{h}<v>`, `m{l}` and `logits`:
    `N_src = 1 + L(H + 1)` and `N_dst = L(3H + 1) + 1`, `N` and `M` in annotations. Two graphs of equal fields are equal.

    Attributes:
        n_layers, n_heads, width: `L`, `H`, `E` of the model.
        n_shared: how many readers of keys, and of values, a layer has: `H`, or `K` of a grouped graph.
        grouped: whether query heads that share a key and value head share its readers, `a{l}.g{k}<k>` and `a{l}.g{k}<v>`, so that
            `N_dst = L(H + 2K + 1) + 1`.

    Examples:
        >>> graph = Graph.of(model.config)
        >>> graph, graph.writers[:3], graph.readers[-2:]
        (Graph(29 writers, 77 readers, 927 edges), ('input', 'a0.h0', 'a0.h1'), ('m3', 'logits'))
        >>> graph.edges.shape, graph.n_edges, Graph.of(model.config, grouped=True).n_edges
        ((29, 77), 927, 559)
    """

    n_layers: int
    n_heads: int
    n_shared: int
    width: int
    grouped: bool = False

    @classmethod
    def of(cls, config: DecoderConfig, grouped: bool = False) -> Graph:
        """The graph of a model of that config."""
        c = config.sizes
        return cls(c["L"], c["H"], c["K" if grouped else "H"], c["E"], bool(grouped))

    @property
    def n_readers(self) -> int:
        """How many readers a layer has.

        Examples:
            >>> Graph.of(model.config).n_readers
            19
        """
        return self.n_heads + 2 * self.n_shared + 1

    @cached_property
    def writers(self) -> tuple[str, ...]:
        """The names of the rows of edges: input, then of each layer its heads and its MLP."""
        layers = ([*(f"a{i}.h{h}" for h in range(self.n_heads)), f"m{i}"] for i in range(self.n_layers))
        return ("input", *(name for layer in layers for name in layer))

    @cached_property
    def readers(self) -> tuple[str, ...]:
        """The names of the columns of edges: of each layer its queries, keys, values and its MLP; then logits."""
        letter, n = "g" if self.grouped else "h", self.n_shared
        names = []
        for i in range(self.n_layers):
            names += [f"a{i}.h{h}<q>" for h in range(self.n_heads)]
            names += [f"a{i}.{letter}{k}<{what}>" for what in "kv" for k in range(n)]
            names.append(f"m{i}")
        return (*names, "logits")

    @cached_property
    def edges(self) -> Bool[np.ndarray, "N M"]:
        """Which writer stands before which reader."""
        n = self.n_heads + 1
        before = np.concatenate(
            [[*[1 + i * n] * (self.n_readers - 1), (i + 1) * n] for i in range(self.n_layers)] + [[len(self.writers)]]
        )
        return np.arange(len(self.writers))[:, None] < before[None, :]

    @property
    def n_edges(self) -> int:
        return int(self.edges.sum())

    @cached_property
    def owners(self) -> Bool[np.ndarray, "N M"]:
        """Which readers are a writer's own: a head's queries, keys and values, shared ones too; an MLP's.

        Examples:
            >>> graph = Graph.of(model.config)
            >>> [name for name, own in zip(graph.readers, graph.owners[1]) if own]
            ['a0.h0<q>', 'a0.h0<k>', 'a0.h0<v>']
        """
        heads, n = np.arange(self.n_heads), self.n_shared
        own = np.zeros((len(self.writers), len(self.readers)), bool)
        for i in range(self.n_layers):
            row, column = 1 + i * (self.n_heads + 1), i * self.n_readers
            own[row + heads, column + heads] = True
            for begin in (column + self.n_heads, column + self.n_heads + n):
                own[row + heads, begin + heads * n // self.n_heads] = True
            own[row + self.n_heads, column + self.n_readers - 1] = True
        return own

    def edge(self, name: str) -> tuple[int, int]:
        """The row and the column of an edge, `"a0.h1->a3.h2<q>"`; ValueError where there is none.

        Examples:
            >>> Graph.of(model.config).edge("input->a0.h1<q>")
            (0, 1)
        """
        writer, arrow, reader = name.partition("->")
        if not arrow:
            raise ValueError(f"{name!r} is no edge: give a writer and a reader, such as {self.names[0]!r}.")
        row, column = self.node(writer), found(reader, self.readers, "readers")
        if not self.edges[row, column]:
            raise ValueError(f"There is no edge {name!r}: {writer} does not stand before {reader}.")
        return row, column

    def node(self, name: str) -> int:
        """The row of a writer; ValueError where there is none.

        Examples:
            >>> Graph.of(model.config).node("m0")
            7
        """
        return found(name, self.writers, "writers")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of all edges, row by row.

        Examples:
            >>> Graph.of(model.config).names[1]
            'input->a0.h1<q>'
        """
        return tuple(f"{self.writers[u]}->{self.readers[v]}" for u, v in np.argwhere(self.edges))

    def pruned(self, edges: Bool[np.ndarray, "N M"]) -> Bool[np.ndarray, "N M"]:
        """These edges without those of nodes into which, or out of which, none leads; so again until there is none. Host function.

        Into `input` something always leads, and out of `logits`.

        Examples:
            >>> graph = Graph.of(model.config)
            >>> some = np.zeros_like(graph.edges)
            >>> for name in ("input->m0", "m0->logits", "a1.h0->logits"):
            ...     some[graph.edge(name)] = True
            >>> int(graph.pruned(some).sum())  # into a1.h0 nothing leads
            2
        """
        edges = np.asarray(edges, bool)
        while True:
            entered: Any = (self.owners & edges.any(axis=0)).any(axis=1)
            entered[0] = True
            alive: Any = entered & edges.any(axis=1)
            read: Any = (self.owners & alive[:, None]).any(axis=0)
            read[-1] = True
            kept = edges & alive[:, None] & read
            if (kept == edges).all():
                return kept
            edges = kept

    def random(self, n: int, rng: np.random.Generator) -> Bool[np.ndarray, "N M"]:
        """So many of the edges, chosen at random; not pruned.

        Examples:
            >>> int(Graph.of(model.config).random(10, np.random.default_rng(0)).sum())
            10
        """
        some = np.zeros_like(self.edges)
        places = np.flatnonzero(self.edges)
        some.reshape(-1)[rng.choice(places, integer(n, "n", 0, len(places)), replace=False)] = True
        return some

    def __repr__(self) -> str:
        kind = ", grouped" if self.grouped else ""
        return f"Graph({len(self.writers)} writers, {len(self.readers)} readers, {self.n_edges} edges{kind})"


def found(name: str, names: Sequence[str], what: str) -> int:
    """The place of a name among `what`; ValueError where it is none of them."""
    if name in names:
        return names.index(name)
    near = difflib.get_close_matches(name, names, 3, 0.5)
    hint = f": did you mean {' or '.join(map(repr, near))}?" if near else "."
    raise ValueError(f"There is no {name!r} among {what}{hint} They are {listed(names)}.")


def listed(names: Sequence[str]) -> str:
    """Of each kind of names the first and the last."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+|<.>", "", name), []).append(name)
    return ", ".join(some[0] if len(some) == 1 else f"{some[0]} to {some[-1]}" for some in kinds.values())
