"""`Circuit`: a part of a graph, its edges, nodes or neurons, with the scores that chose it; in MIB's file format."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from ..arrays import as_array, listing
from ..pytrees import pytree, static
from ..utils.files import write_aside
from ..webpage.network import circuit_view
from .graph import Graph

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

KINDS = ("edges", "nodes", "neurons")


@pytree
class Circuit:
    """A part of a model: some of a graph's edges, of its nodes with all edges between them, or of its neurons.

    One of the three is given. What leads nowhere, or is led to by nothing, is pruned. Host arrays. A notebook shows a network that
    answers to the pointer; `oculi_jax.visualize.plot_circuit` draws it.

    Args:
        graph: of the model; static.
        edges: bool `[N_src, N_dst]`, or their names, such as `"input->a0.h1<q>"`.
        nodes: bool `[N_src]`, or the names of writers.
        neurons: bool `[L, F]`, in units of `act`. None is pruned.
        scores: what they were chosen by, shaped as what was given; None where there is none.

    Raises:
        ValueError, TypeError: none of them is given, or several; an edge that the graph has not.

    Examples:
        >>> graph = Graph.of(model.config)
        >>> circuit = Circuit(graph, edges=["input->a0.h1<v>", "a0.h1->logits", "input->m2"])
        >>> circuit, circuit.names  # nothing leads out of m2
        (Circuit(2 of 927 edges), ('input->a0.h1<v>', 'a0.h1->logits'))
        >>> circuit.save("circuit.json")
        >>> Circuit.load("circuit.json").names == circuit.names, circuit.kind
        (True, 'edges')
    """

    graph: Graph = static()
    edges: Any = None
    nodes: Any = None
    neurons: Any = None
    scores: Any = None

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if not isinstance(self.graph, Graph):
            raise TypeError(f"graph is a {type(self.graph).__name__}, and a Graph is needed: Graph.of(model.config).")
        if len(given) != 1:
            raise ValueError(f"A circuit is of edges, of nodes or of neurons; given are {', '.join(given) or 'none'}.")
        (kind,) = given
        chosen = _chosen(self.graph, kind, getattr(self, kind))
        if kind == "edges":
            chosen = self.graph.pruned(chosen)
        if kind == "nodes":
            chosen = self.graph.pruned(self.graph.edges & chosen[:, None] & _read(self.graph, chosen)).any(axis=1)
        object.__setattr__(self, kind, chosen)
        if self.scores is not None:
            scores = np.asarray(as_array(self.scores), np.float32)
            if scores.shape != chosen.shape:
                raise ValueError(f"scores has shape {listing(scores.shape)}, and {kind} {listing(chosen.shape)}.")
            object.__setattr__(self, "scores", scores)

    @property
    def kind(self) -> str:
        """`"edges"`, `"nodes"` or `"neurons"`."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def mask(self) -> Bool[np.ndarray, "..."]:
        """What it keeps: its edges, nodes or neurons.

        Examples:
            >>> Circuit(Graph.of(model.config), nodes=["input", "m0"]).mask.sum().item()
            2
        """
        return getattr(self, self.kind)

    @property
    def names(self) -> tuple[str, ...]:
        """Of its edges; of a circuit of nodes, those between them; of neurons, `m{l}.n{f}`."""
        if self.kind == "neurons":
            return tuple(f"m{layer}.n{i}" for layer, i in np.argwhere(self.neurons))
        graph = self.graph
        return tuple(f"{graph.writers[u]}->{graph.readers[v]}" for u, v in np.argwhere(self._edges()))

    @property
    def complement(self) -> Circuit:
        """What it leaves out, pruned too: of a complete circuit, little of a metric is left there.

        Examples:
            >>> Circuit(Graph.of(model.config), nodes=["input", "m0"]).complement
            Circuit(0 of 29 nodes)
        """
        rest = ~self.mask & self.graph.edges if self.kind == "edges" else ~self.mask
        given: Any = {self.kind: rest}
        return Circuit(self.graph, **given)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes MIB's `importances.json`; what has no score has 0 there. OSError where it cannot.

        Raises:
            ValueError: a circuit of neurons, or of a grouped graph, for which that format has no place.
        """
        if self.kind == "neurons":
            raise ValueError("That file has no place for neurons; keep circuit.neurons with numpy.save.")
        nodes = None
        scores = self.scores
        if self.kind == "nodes":
            nodes, scores = (np.zeros(len(self.nodes)) if scores is None else scores), None
        write(path, self.graph, self._edges(), scores, nodes)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Circuit:
        """Reads MIB's `importances.json`: a circuit of nodes where these have scores and edges have none, else of edges.

        Raises:
            ValueError: a file of something else; one with neurons, whose units there are coordinates of what nodes write.
        """
        graph, edges, scores, nodes, node_scores = read(path)
        if node_scores is not None and not scores.any():
            return cls(graph, nodes=nodes, scores=node_scores)
        return cls(graph, edges=edges, scores=scores if scores.any() else None)

    def __repr__(self) -> str:
        n = self.graph.n_edges if self.kind == "edges" else self.mask.size
        return f"Circuit({int(self.mask.sum())} of {n} {self.kind})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the network of `oculi_jax.visualize.circuit_view`."""
        return circuit_view(self)._repr_html_()

    def _edges(self) -> Bool[np.ndarray, "N M"]:
        if self.kind == "edges":
            return self.edges
        return self.graph.edges & self.nodes[:, None] & _read(self.graph, self.nodes)


def _read(graph: Graph, nodes: Bool[np.ndarray, "N"]) -> Bool[np.ndarray, "M"]:
    """Which readers are of nodes, or the logits."""
    found: Any = (graph.owners & nodes[:, None]).any(axis=0)
    found[-1] = True
    return found


def _chosen(graph: Graph, kind: str, given: ArrayLike | Sequence[str]) -> Bool[np.ndarray, "..."]:
    """A mask as it was given, or of names; ValueError or TypeError where it cannot be."""
    shape = {"edges": graph.edges.shape, "nodes": (len(graph.writers),)}.get(kind)
    if isinstance(given, list | tuple | set) and given and all(isinstance(name, str) for name in given):
        if shape is None:
            raise TypeError("neurons are a bool array [L, F], and names were given.")
        names: Any = given
        found: Any = np.zeros(shape, bool)
        for name in names:
            found[graph.edge(name) if kind == "edges" else graph.node(name)] = True
        return found
    array = np.asarray(as_array(given))
    if array.dtype != bool:
        raise TypeError(
            f"{kind} has dtype {array.dtype}, and bool is needed: True at what the circuit keeps; or names."
        )
    if (shape is None and (array.ndim != 2 or len(array) != graph.n_layers)) or (shape and array.shape != shape):
        wanted = ("L", "F") if shape is None else shape
        raise ValueError(f"{kind} has shape {listing(array.shape)}, and {listing(wanted)} is needed for this graph.")
    if kind == "edges" and (wrong := np.argwhere(array & ~graph.edges)).size:
        u, v = wrong[0]
        raise ValueError(
            f"There is no edge {graph.writers[u]}->{graph.readers[v]}: that writer does not stand before that reader. Edges "
            "that there are: graph.edges."
        )
    return array.copy()


def write(
    path: str | os.PathLike[str],
    graph: Graph,
    edges: Bool[np.ndarray, "N M"],
    scores: Float[np.ndarray, "N M"] | None,
    nodes: Float[np.ndarray, "N"] | None,
) -> None:
    """MIB's `importances.json`: of which edges are in a circuit, their scores, and those of nodes; None for no scores."""
    if graph.grouped:
        raise ValueError(
            "MIB's file has a reader for the keys and the values of each query head, and this graph is grouped: make it of "
            "Graph.of(model.config)."
        )
    scores = np.zeros(graph.edges.shape) if scores is None else np.asarray(scores, np.float64)
    inside: Any = edges.any(axis=1)
    found = {name: {"in_graph": bool(inside[i])} for i, name in enumerate(graph.writers)}
    if nodes is not None:
        found = {name: {**found[name], "score": float(nodes[i])} for i, name in enumerate(graph.writers)}
    whole = {
        "cfg": {
            "n_layers": graph.n_layers, "n_heads": graph.n_heads, "parallel_attn_mlp": False, "d_model": graph.width,
        },
        "nodes": {**found, "logits": {"in_graph": True}},
        "edges": {
            name: {"score": float(scores[u, v]), "in_graph": bool(edges[u, v])}
            for name, (u, v) in zip(graph.names, np.argwhere(graph.edges), strict=True)
        },
    }  # fmt: skip
    with write_aside(path) as aside:
        aside.write_text(json.dumps(whole), encoding="utf-8")


def read(path: str | os.PathLike[str]) -> tuple[Graph, Any, Any, Any, Any]:
    """What MIB's `importances.json` says: graph, edges and their scores, nodes and their scores or None."""
    with open(path, encoding="utf-8") as file:
        try:
            whole = json.load(file)
            cfg, given, edges = whole["cfg"], whole["nodes"], whole["edges"]
            sizes = cfg["n_layers"], cfg["n_heads"], cfg["n_heads"], cfg["d_model"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{os.fspath(path)!r} is no circuit: MIB's importances.json has cfg, nodes and edges. {error!r}"
            ) from None
    if cfg.get("parallel_attn_mlp"):
        raise ValueError(
            f"{os.fspath(path)!r} is of a model whose MLP stands beside its attention, which none here does."
        )
    if any("neurons" in node for node in given.values()):
        raise ValueError(
            f"{os.fspath(path)!r} has neurons, and its neurons are coordinates of what nodes write to the stream; those here "
            "are of act, [L, F]."
        )
    graph = Graph(*sizes)
    kept, scores = np.zeros_like(graph.edges), np.zeros(graph.edges.shape, np.float32)
    places = dict(zip(graph.names, map(tuple, np.argwhere(graph.edges)), strict=True))
    if unknown := [name for name in edges if name not in places]:
        graph.edge(unknown[0])
    for name, edge in edges.items():
        kept[places[name]], scores[places[name]] = edge["in_graph"], edge.get("score", 0.0)
    rows = [given.get(name, {}) for name in graph.writers]
    nodes = np.array([bool(row.get("in_graph", False)) for row in rows])
    own = np.array([row.get("score", np.nan) for row in rows], np.float32)
    return graph, kept, scores, nodes, None if np.isnan(own).all() else own
