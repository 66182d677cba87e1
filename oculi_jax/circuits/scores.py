"""`Scores`: what each edge, node or neuron of a model is worth, from which circuits of any size are made; in MIB's file format."""

from __future__ import annotations

import os
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from ..arrays import integer, listing
from ..pytrees import pytree, static
from .circuit import Circuit, read, write
from .graph import Graph


@pytree
class Scores:
    """What edges, nodes or neurons are worth to a metric: what `edge_attribution` returns, and `oculi_jax.training.matryoshka`.

    Args:
        values: float32, of the writers and readers of `graph` in its order: `[N_src, N_dst]` of edges, 0 where there is none;
            `[N_src]` of nodes; `[L, F]` of neurons, in units of `act`.
        graph: of the model; static.

    Examples:
        >>> scores = circuits.edge_attribution(model, ids, other, metric)
        >>> scores, circuits.Scores(scores.nodes, scores.graph)  # of edges, and of nodes
        (Scores(29 writers, 77 readers, 927 edges), Scores(29 nodes))
    """

    values: Float[Array, "N M"] | Float[Array, "N"] | Float[Array, "L F"]
    graph: Graph = static()

    @property
    def kind(self) -> str:
        """`"edges"`, `"nodes"` or `"neurons"`; ValueError for values of another shape than these have.

        Examples:
            >>> circuits.edge_attribution(model, ids, other, metric).kind
            'edges'
        """
        shape, edges = np.shape(self.values), self.graph.edges.shape
        if shape == edges:
            return "edges"
        if shape == edges[:1]:
            return "nodes"
        if len(shape) == 2 and shape[0] == self.graph.n_layers:
            return "neurons"
        raise ValueError(
            f"values has shape {listing(shape)}, and {listing(edges)} is needed of edges, {listing(edges[:1])} of nodes, or "
            f"{listing((self.graph.n_layers, 'F'))} of neurons."
        )

    @property
    def n(self) -> int:
        """How many edges, nodes or neurons there are.

        Examples:
            >>> circuits.edge_attribution(model, ids, other, metric).n
            927
        """
        return self.graph.n_edges if self.kind == "edges" else int(np.size(self.values))

    @property
    def nodes(self) -> Float[Array, "N"]:
        """Of each writer: of edges, what those out of it have together. ValueError for neurons.

        Examples:
            >>> scores = circuits.edge_attribution(model, ids, other, metric)
            >>> np.allclose(scores.nodes, scores.values.sum(axis=1))
            True
        """
        if self.kind == "neurons":
            raise ValueError("These are scores of neurons, which say nothing of nodes.")
        return self.values.sum(axis=1) if self.kind == "edges" else self.values

    def top(self, n: int | None = None, *, fraction: float | None = None, absolute: bool = False) -> Circuit:
        """The circuit of what has the largest scores, pruned. Host function.

        Args:
            n: how many edges, nodes or neurons.
            fraction: how many of all instead, rounded down.
            absolute: by magnitude.

        Raises:
            ValueError, TypeError: neither is given, or both, or more than there are.

        Examples:
            >>> scores = circuits.edge_attribution(model, ids, other, metric)
            >>> scores.top(10), scores.top(fraction=1.0)
            (Circuit(8 of 927 edges), Circuit(927 of 927 edges))
        """
        if (n is None) == (fraction is None):
            raise ValueError(f"Give n, how many {self.kind}, or fraction, of all of them: one of the two.")
        if fraction is not None:
            if not 0 <= fraction <= 1:
                raise ValueError(f"fraction is {fraction!r}, and must be from 0 to 1.")
            n = int(fraction * self.n)
        values, kind = np.asarray(self.values), self.kind
        places = np.flatnonzero(self.graph.edges) if kind == "edges" else np.arange(values.size)
        own = values.reshape(-1)[places]
        order = np.argsort(-(np.abs(own) if absolute else own), kind="stable")
        found = np.zeros(values.size, bool)
        found[places[order[: integer(n, "n", 0, self.n)]]] = True
        given: Any = {kind: found.reshape(values.shape)}
        return Circuit(self.graph, **given, scores=values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes MIB's `importances.json`, nothing in a circuit yet. OSError where it cannot.

        Raises:
            ValueError: scores of neurons, or of a grouped graph, for which that format has no place.

        Examples:
            >>> circuits.edge_attribution(model, ids, other, metric).save("importances.json")
        """
        kind, values = self.kind, np.asarray(self.values, np.float64)
        if kind == "neurons":
            raise ValueError("That file has no place for neurons; keep scores.values with numpy.save.")
        edges, nodes = (values, None) if kind == "edges" else (None, values)
        write(path, self.graph, np.zeros_like(self.graph.edges), edges, nodes)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Reads the scores in MIB's `importances.json`: those of nodes where these have some and edges have none.

        Raises:
            ValueError: a file of something else.

        Examples:
            >>> scores = circuits.edge_attribution(model, ids, other, metric)
            >>> scores.save("importances.json")
            >>> np.array_equal(circuits.Scores.load("importances.json").values, scores.values)
            True
        """
        graph, _, edges, _, nodes = read(path)
        return cls(jnp.asarray(edges if nodes is None or edges.any() else nodes), graph)

    def __repr__(self) -> str:
        if self.kind == "edges":
            return f"Scores{repr(self.graph).removeprefix('Graph')}"
        return f"Scores({self.n} {self.kind})"
