"""`edge_attribution`: what every edge of a graph does to a metric, to first order, from reverse passes alone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from ..arrays import integer
from ..backends.jax.compiled import compiled
from ..metrics import of_prompt
from ..models.decoder.attention import einsum
from ..models.decoder.derivatives import Derivatives
from ..rules import Rules, check_rules, of_layer
from ..traced import mapped
from .graph import Graph
from .pairs import Batch, Pairs, check_graph_of
from .readers import cotangents, differences, observed, pulled, spans_of, through_norm
from .scores import Scores

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..metrics import MetricLike
    from ..models.decoder.model import Decoder

KEPT_BYTES = 1 << 30  # of what a call holds beside the model: prompts beyond it run in turn
STEPS_AT_ONCE = 10  # whose gradients are held together, for one product at their end


def edge_attribution(
    model: Decoder,
    clean: ArrayLike,
    corrupted: ArrayLike,
    metric: MetricLike,
    *,
    mask: ArrayLike | None = None,
    corrupted_mask: ArrayLike | None = None,
    steps: int = 1,
    path: Literal["inputs", "activations"] = "inputs",
    at: Literal["clean", "corrupted"] = "clean",
    rules: Rules | None = None,
    graph: Graph | None = None,
) -> Scores:
    """Estimates what corrupting each edge of a model would take from a metric, all edges at once.

    `Σ (clean write − corrupted write) · ∂ metric / ∂ (what the reader reads)`, summed over positions, averaged over prompts: EAP
    (Syed, Rager and Conmy 2023, arXiv:2310.10348). Norms are live: a reader's input is differentiated through its own. With
    `steps` m the gradient is the mean of those at embeddings corrupted + (k/m)(clean − corrupted), k = 0 … m − 1: EAP-IG (Hanna,
    Pezzelle and Belinkov 2024, arXiv:2403.17806); then what `input` has in all edges together is the metric's whole difference,
    as m grows. Nothing is kept for a head but its own projections, whatever the number of edges.

    Args:
        model: a model of any family.
        clean, corrupted: ids `[T]`, or `[B, T]` for several pairs: of one shape, aligned token by token.
        metric: one of `oculi_jax.metrics`, or any function of an `Output` (with all logits `[T, V]`, no activations) to a
            floating-point scalar.
        mask, corrupted_mask: bool, shaped as `clean`, True at real tokens; the second is the first where it is not given.
        steps: m; static.
        path: `"inputs"`, or `"activations"`: what a layer's heads, or its MLP, write is interpolated rather than embeddings, one
            layer after another, k = 1 … m, and gives the scores of the edges out of these; static.
        at: the run at which `steps=1` differentiates; static.
        rules: how gradients are taken, such as `oculi_jax.rules.relp(model.config)`; data.
        graph: of this model; `Graph.of(model.config)` for None. Static.

    Returns:
        `Scores` of edges, positive where the edge raises the metric.

    Raises:
        ValueError, TypeError: something that can be seen to be wrong, before anything runs; a metric without a gradient.

    Examples:
        >>> scores = circuits.edge_attribution(model, ids, other, metric, steps=5)
        >>> scores, scores.nodes.shape
        (Scores(29 writers, 77 readers, 927 edges), (29,))
        >>> scores.top(60).names[0]
        'input->a0.h0<q>'
    """
    asked = _asked(model, clean, corrupted, metric, mask, corrupted_mask, steps, path, at, graph)
    pairs, graph, steps, _, remat = asked
    ruled = None if rules is None else check_rules(rules, model.config)
    total: Any = 0.0
    for chunk in pairs.calls(model, partial(_bytes, model, graph, steps), KEPT_BYTES):
        total = total + _scores(
            model, pairs.of_call(chunk), ruled, graph=graph, steps=steps, path=path, at=at, remat=remat
        )  # float32
    return Scores(total / np.float32(len(pairs.clean)), graph)


def _asked(
    model: Decoder,
    clean: Any,
    corrupted: Any,
    metric: Any,
    mask: Any,
    other: Any,
    steps: Any,
    path: str,
    at: str,
    graph: Any,
) -> tuple[Pairs, Graph, int, int, bool]:
    """The pairs, the graph, the steps, of how many runs a prompt's gradient is made, and whether layers are run again."""
    pairs = Pairs.of(model, clean, corrupted, metric, mask, other)
    steps = integer(steps, "steps", 1)
    if path not in ("inputs", "activations"):
        raise ValueError(f"path is {path!r}, and must be 'inputs' or 'activations'.")
    if at not in ("clean", "corrupted"):
        raise ValueError(f"at is {at!r}, and must be 'clean' or 'corrupted'.")
    if at == "corrupted" and (steps > 1 or path == "activations"):
        raise ValueError("at says where steps=1 differentiates; several steps begin at the corrupted run anyway.")
    graph = Graph.of(model.config) if graph is None else graph
    if not isinstance(graph, Graph):
        raise TypeError(f"graph is a {type(graph).__name__}, and a Graph is needed: Graph.of(model.config).")
    c = model.config.sizes
    check_graph_of(model.config, graph.n_layers, graph.n_heads, "graph")
    if graph.grouped and graph.n_shared != c["K"]:
        raise ValueError(f"graph has {graph.n_shared} groups in a layer, and this model {c['K']}.")
    n_runs = steps * (2 * c["L"] + 1) if path == "activations" else steps
    return pairs, graph, steps, n_runs, bytes_of_backward(model, pairs.clean.shape[1]) > KEPT_BYTES


def bytes_of_backward(model: Decoder, n_tokens: int) -> int:
    """What a forward pass leaves for the backward pass, layers not run again."""
    c = model.config.sizes
    per_token = 12 * c["E"] + 6 * c["F"] + 6 * c["H"] * n_tokens
    return c["L"] * n_tokens * per_token * model.dtype.itemsize


def _bytes(model: Decoder, graph: Graph, steps: int, n_tokens: int) -> int:
    """What a call holds of one prompt: a backward pass, the differences of all writers, the gradients of all steps."""
    c, some = model.config.sizes, min(steps, STEPS_AT_ONCE)
    own = (graph.n_heads + 2 * graph.n_shared) * c["D"] + 3 * c["E"]
    readers = (1 + max(end - begin for begin, end in spans_of(c["L"]))) * graph.n_readers * c["E"]
    backward = min(bytes_of_backward(model, n_tokens), KEPT_BYTES)
    return backward + 4 * n_tokens * (len(graph.writers) * c["E"] + some * c["L"] * own + readers)


@compiled("graph", "steps", "path", "at", "remat", alone=True)
def _scores(
    model: Decoder, batch: Batch, rules: Rules | None, *, graph: Graph, steps: int, path: str, at: str, remat: bool
) -> Float[Array, "N M"]:
    """The scores of some pairs together."""
    edges, passes = jnp.asarray(graph.edges), _Passes(model, batch, rules, graph, steps, remat)
    if path == "activations":
        return jnp.where(edges, passes.by_writers(), 0.0)
    if steps == 1:
        slopes, there = passes.slopes(None, corrupted=at == "corrupted")
        other = passes.seen(corrupted=at == "clean")
        runs = (there, other) if at == "clean" else (other, there)
        return jnp.where(edges, passes.product(passes.differences(*runs), slopes, there), 0.0)
    clean, corrupted = passes.seen(corrupted=False), passes.seen(corrupted=True)
    between = passes.differences(clean, corrupted)
    n_groups = -(-steps // STEPS_AT_ONCE)
    size = -(-steps // n_groups)
    shares = np.concatenate([np.arange(steps) / steps, np.zeros(n_groups * size - steps)]).astype(np.float32)
    weights = (np.arange(n_groups * size) < steps).astype(np.float32) / np.float32(steps)

    def group(total: Array, some: tuple[Array, Array]) -> tuple[Array, None]:
        def one(share: Array) -> Any:
            embed = jax.tree.map(lambda x, y: y + share.astype(y.dtype) * (x - y), clean["embed"], corrupted["embed"])
            return passes.slopes(embed, corrupted=False)

        slopes, there = jax.lax.map(one, some[0])
        return total + passes.product(between, slopes, there, some[1]), None

    xs: Any = shares.reshape(n_groups, -1), weights.reshape(n_groups, -1)
    total, _ = jax.lax.scan(group, jnp.zeros(edges.shape), xs)
    return jnp.where(edges, total, 0.0)


class _Passes:
    """The runs of a call's pairs. Arrays of them lead with the pairs; those of several steps with the steps before these."""

    def __init__(self, model: Decoder, batch: Batch, rules: Rules | None, graph: Graph, steps: int, remat: bool):
        self.model, self.batch, self.rules, self.graph = model, batch, rules, graph
        self.steps, self.remat = steps, remat
        self.numbers = jnp.arange(len(batch.clean))

    def _prompt(self, number: Array, corrupted: bool) -> tuple[Array, Array | None]:
        tokens, mask = self.batch.clean, self.batch.mask
        if corrupted:
            tokens, mask = self.batch.corrupted, self.batch.corrupted_mask
        return jnp.asarray(tokens)[number], None if mask is None else jnp.asarray(mask)[number]

    def seen(self, *, corrupted: bool) -> dict[str, Array]:
        """What writers wrote, without a gradient."""

        def one(number: Array) -> dict[str, Array]:
            return observed(self.model, self.graph, self._prompt(number, corrupted))[1]

        return mapped(one, len(self.numbers))(self.numbers)

    def slopes(
        self, embed: Array | None, *, corrupted: bool, put: Mapping[str, tuple[Array, Array]] | None = None
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """The gradient with respect to what readers make of their inputs, of each pair; and what was seen."""

        def one(number: Array, embed: Array | None, put: Any) -> tuple[dict[str, Array], dict[str, Array]]:
            columns = jax.tree.map(lambda x: jnp.asarray(x)[number], self.batch.window)
            metric = of_prompt(self.batch.metric, number)
            prompt = self._prompt(number, corrupted)
            found, seen = cotangents(
                self.model, self.graph, prompt, metric, columns, self.remat, embed, put, self.rules
            )
            count = jnp.asarray(self.batch.count)[number]
            return jax.tree.map(lambda x: jnp.where(count > 0, x, 0.0), found), seen

        axes = (0, None if embed is None else 0, None if put is None else dict.fromkeys(put, (None, 0)))
        return mapped(one, len(self.numbers), axes)(self.numbers, embed, put)

    def differences(self, clean: dict[str, Array], corrupted: dict[str, Array]) -> Float[Array, "N B T E"]:
        """Clean less corrupted, of each writer."""

        def one(number: Array, clean: Any, corrupted: Any) -> Array:
            (tokens, real), (other, also) = self._prompt(number, False), self._prompt(number, True)
            # Up to the first token that differs the two runs are one, to the bit: not so in rows of other programs.
            differs = tokens != other
            if real is not None and also is not None:
                differs = (differs & real) | (real != also)
            return differences(self.model, clean, corrupted, jnp.cumsum(differs) > 0)

        return mapped(one, len(self.numbers), out_axes=1)(self.numbers, clean, corrupted)

    def product(
        self, between: Float[Array, "N B T E"], slopes: Any, there: Any, weights: Array | None = None
    ) -> Float[Array, "N M"]:
        """Differences of writers times gradients of readers, summed over pairs, tokens, and steps where there are any."""
        config, graph = self.model.config, self.graph
        dtype = self.model.dtype
        flat = between.astype(dtype).reshape(len(between), -1)

        def read(one: Any, steps: Any) -> Float[Array, "R X"]:
            """A reader's gradient, from that of one run."""
            if weights is None:
                found = jax.vmap(one, out_axes=1)(*steps)
            else:
                found = jax.vmap(jax.vmap(one, out_axes=1))(*steps)
                found = jnp.sum(found * weights[:, None, None, None, None], axis=0)
            return found.astype(dtype).reshape(len(found), -1)

        def layer(number: Array) -> Float[Array, "R X"]:
            # Indexed: slices of a few layers' weights would be copies of them.
            block, own, before, after = jax.tree.map(lambda x: x[number], (self.model.layers, *xs))
            back = partial(pulled, block, config, self._rules_at(number), split=not graph.grouped)
            return read(lambda own, before, after: back(own, before, after), (own, before, after))

        lead = 1 if weights is None else 2
        own = {site: slope for site, slope in slopes.items() if site != "final_norm"}
        xs = jax.tree.map(lambda x: jnp.moveaxis(x, lead, 0), (own, there["resid_pre"], there["resid_mid"]))
        columns = []
        for begin, end in spans_of(graph.n_layers):
            n = min(len(flat), 1 + (graph.n_heads + 1) * end)  # writers behind it are no edges of it
            # Those of several layers together, since products with one layer's would be thin.
            readers = jax.lax.map(layer, jnp.arange(begin, end)).reshape(-1, flat.shape[1])
            found = einsum("nx,rx->nr", flat[:n], readers, dtype=jnp.float32)
            columns.append(jnp.pad(found, [(0, len(flat) - n), (0, 0)]))
        last = read(
            lambda slope, x: through_norm("final", self.model.norm, config, self._rules_at(None), x, slope[None]),
            (slopes["final_norm"], there["last"]),
        )
        return jnp.concatenate([*columns, einsum("nx,rx->nr", flat, last, dtype=jnp.float32)], axis=1)

    def _rules_at(self, layer: Array | None) -> Derivatives:
        return Derivatives() if self.rules is None else of_layer(self.rules, layer)

    def by_writers(self) -> Float[Array, "N M"]:
        """EAP-IG over activations: each layer's writers are interpolated, and what this gives is of their own edges."""
        clean, corrupted = self.seen(corrupted=False), self.seen(corrupted=True)
        between = self.differences(clean, corrupted)
        n, n_layers = self.graph.n_heads, self.graph.n_layers
        shares = jnp.arange(1, self.steps + 1, dtype=jnp.float32) / self.steps
        weights = jnp.full(self.steps, 1 / self.steps, jnp.float32)

        def mixed(site: str, share: Array) -> Array:
            return corrupted[site] + share.astype(clean[site].dtype) * (clean[site] - corrupted[site])

        def scores(rows: Array, site: str, layer: Array | None) -> Float[Array, "R M"]:
            def one(share: Array) -> Any:
                if layer is None:
                    return self.slopes(mixed(site, share), corrupted=False)
                here = jnp.arange(n_layers) == layer
                return self.slopes(None, corrupted=False, put={site: (here, mixed(site, share))})

            slopes, there = jax.lax.map(one, shares)
            return self.product(rows, slopes, there, weights)

        layers = between[1:].reshape(n_layers, n + 1, *between.shape[1:])
        heads = jax.lax.map(lambda xs: scores(xs[0][:n], "attn_out", xs[1]), (layers, jnp.arange(n_layers)))
        mlps = jax.lax.map(lambda xs: scores(xs[0][n:], "mlp_out", xs[1]), (layers, jnp.arange(n_layers)))
        rest = jnp.concatenate([heads, mlps], axis=1).reshape(len(between) - 1, -1)
        return jnp.concatenate([scores(between[:1], "embed", None), rest])
