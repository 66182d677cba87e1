"""What `edge_attribution`, `faithfulness`, `acdc` and `minimal` will do, for `plan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ..backends import programs_of
from ..prompts import bucket as rung
from ..sweeps.planning import Call, Cost, Part, Plan, plans
from ..sweeps.sweeping import cost_of
from .circuit import Circuit
from .curve import _chosen, faithfulness
from .edges import KEPT_BYTES, _asked, _bytes, edge_attribution
from .graph import Graph
from .pairs import Chunk, Pairs
from .readers import spans_of
from .scores import Scores
from .searching import acdc, minimal
from .trials import at_once, bytes_of_run

if TYPE_CHECKING:
    from jax import Array
    from numpy.typing import ArrayLike

    from ..metrics import MetricLike
    from ..models.decoder.model import Decoder
    from ..rules import Rules


@plans(edge_attribution)
def _plan_of_edges(
    model: Decoder,
    clean: ArrayLike,
    corrupted: ArrayLike,
    metric: MetricLike,
    mask: ArrayLike | None,
    corrupted_mask: ArrayLike | None,
    steps: int,
    path: str,
    at: str,
    rules: Rules | None,
    graph: Graph | None,
) -> Plan:
    pairs, own, steps, n_slopes, remat = _asked(
        model, clean, corrupted, metric, mask, corrupted_mask, steps, path, at, graph
    )
    chunks = list(pairs.calls(model, partial(_bytes, model, own, steps), KEPT_BYTES))
    n_plain = 1 if steps == 1 and path == "inputs" else 2
    c = model.config.sizes

    def flops(cost: Cost) -> float:
        n = cost.n_tokens
        layer, logits = cost.flops_of_layer(n), 2.0 * cost.n_logits * c["E"]
        # A backward pass multiplies once with each weight, and twice in attention; then readers' own weights, once more.
        back = layer + 2.0 * n * 2 * c["H"] * c["D"] * n
        readers = 2.0 * n * c["E"] * c["D"] * (own.n_heads + 2 * own.n_shared)
        slopes = n_slopes * (c["L"] * ((2 if remat else 1) * layer + back + readers) + 3 * logits)
        return n_plain * (c["L"] * layer + logits) + slopes + _products(own, n)

    passes = n_plain + n_slopes * (3 if remat else 2)
    note = f"{n_plain + n_slopes} for each pair, {n_slopes} with a backward pass, and one product of all edges"
    return _plan(model, pairs, chunks, flops, (n_plain + n_slopes), passes, partial(_bytes, model, own, steps), note)


@plans(faithfulness)
def _plan_of_curve(
    model: Decoder,
    circuits_or_scores: Scores | Circuit | Sequence[Circuit],
    clean: ArrayLike,
    corrupted: ArrayLike,
    metric: MetricLike,
    ablation: str | Mapping[str, ArrayLike],
    sizes: Sequence[float],
    absolute: bool,
    nulls: int,
    key: int | Array | None,
    mask: ArrayLike | None,
    corrupted_mask: ArrayLike | None,
) -> Plan:
    pairs = Pairs.of(model, clean, corrupted, metric, mask, corrupted_mask)
    kind, shares, _, _ = _chosen(circuits_or_scores, sizes, absolute)
    first: Any = circuits_or_scores if isinstance(circuits_or_scores, Scores | Circuit) else circuits_or_scores[0]
    n_circuits = 1 + len(shares) * (1 + nulls)
    note = f"{n_circuits} circuits and the two plain runs of each pair"
    return _plan_of_trials(model, pairs, first.graph, kind, n_circuits, 1, note)


@plans(acdc)
def _plan_of_search(
    model: Decoder,
    clean: ArrayLike,
    corrupted: ArrayLike,
    metric: MetricLike,
    threshold: float,
    within: Circuit | None,
    ablation: str | Mapping[str, ArrayLike],
    mask: ArrayLike | None,
    corrupted_mask: ArrayLike | None,
    progress: object,
) -> Plan:
    whole = Graph.of(model.config)
    start = Circuit(whole, edges=whole.edges) if within is None else within
    return _plan_of_removals(model, start, Pairs.of(model, clean, corrupted, metric, mask, corrupted_mask), 1)


@plans(minimal)
def _plan_of_minimal(
    model: Decoder,
    circuit: Circuit,
    clean: ArrayLike,
    corrupted: ArrayLike,
    metric: MetricLike,
    tolerance: float,
    ablation: str | Mapping[str, ArrayLike],
    mask: ArrayLike | None,
    corrupted_mask: ArrayLike | None,
    progress: object,
) -> Plan:
    return _plan_of_removals(model, circuit, Pairs.of(model, clean, corrupted, metric, mask, corrupted_mask), 2)


def _plan_of_removals(model: Decoder, start: Circuit, pairs: Pairs, n_times: int) -> Plan:
    """Of a trial for each edge so many times, as many side by side as there is room for."""
    n, n_edges = at_once(model, pairs), int(start.edges.sum())
    n_calls = n_times * -(-n_edges // n) + 2  # and the ends, and where it begins
    times = "" if n_times == 1 else f" {n_times} times"
    note = f"each of {n_edges} edges tried{times}, {n} at once: fewer where edges go with others, more where one is misjudged"
    return _plan_of_trials(model, pairs, start.graph, "edges", n, n_calls, note)


def _plan_of_trials(
    model: Decoder, pairs: Pairs, graph: Graph, kind: str, n_circuits: int, n_calls: int, note: str
) -> Plan:
    """Of so many calls, each of two plain runs and circuits."""
    c, n_runs = model.config.sizes, 2 + n_circuits

    def flops(cost: Cost) -> float:
        whole = c["L"] * cost.flops_of_layer(cost.n_tokens) + 2.0 * cost.n_logits * c["E"]
        if kind != "edges":
            return n_runs * whole
        # Of heads that read their own: keys and values of each, and what each writes.
        more = 2.0 * cost.n_tokens * c["E"] * c["D"] * c["L"] * 2 * (graph.n_shared - c["K"])
        return 2 * whole + n_circuits * (whole + more + _products(graph, cost.n_tokens))

    chunks = n_calls * list(pairs.calls(model, partial(bytes_of_run, model), KEPT_BYTES))
    held = partial(_bytes_of_trials, model, n_circuits)
    return _plan(model, pairs, chunks, flops, n_calls * n_runs, n_runs, held, note)


def _bytes_of_trials(model: Decoder, n_circuits: int, n_tokens: int) -> int:
    own = bytes_of_run(model, n_tokens)
    return own * max(1, min(n_circuits, KEPT_BYTES // own))


def _products(graph: Graph, n_tokens: int) -> float:
    """Of every writer with every reader behind it, as `spans_of` cuts them."""
    per = 2.0 * n_tokens * graph.width
    inner = sum((end - begin) * (1 + end * (graph.n_heads + 1)) for begin, end in spans_of(graph.n_layers))
    return per * (inner * graph.n_readers + len(graph.writers))


def _plan(
    model: Decoder, pairs: Pairs, chunks: list[Chunk], flops: Any, n_runs: int, passes: int, held: Any, note: str
) -> Plan:
    n_prompts, n_tokens = pairs.clean.shape
    n_layers = model.config.num_hidden_layers
    parts, total, reading = [], 0.0, 0.0
    for chunk in chunks:
        columns, n = chunk.bucket.n_tokens, len(chunk.places)
        cost = cost_of(model, columns, n_prompts, pairs.metric)
        total += chunk.size * flops(cost)
        reading += passes * n_layers * cost.flops_of_reading
        call = Call(
            np.arange(n), np.zeros((n, 1), int), start=0, n_rows=columns, shared=False, slots=chunk.size, size=1
        )
        first = chunk.bucket.first[chunk.places]
        parts.append(Part(chunk.prompts, first, columns, rung(chunk.size), reuse=False, calls=(call,)))
    most = max(chunk.size * held(chunk.bucket.n_tokens) for chunk in chunks)
    most += (
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(model.layers)) // n_layers
    )  # of one at a time, a copy
    return Plan(
        n_prompts=n_prompts, n_tokens=n_tokens, n_layers=n_layers, n_runs=n_runs * n_prompts, parts=tuple(parts),
        flops=total, bytes=int(most), reading=reading, note=note, rate=partial(programs_of(model).rate, model),
    )  # fmt: skip
