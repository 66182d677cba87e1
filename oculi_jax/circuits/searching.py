"""Circuits found by taking edges away: `acdc` from a whole graph, `minimal` until no edge of a circuit can go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from ..arrays import under_trace
from ..causal.patching import SAME
from ..sweeps.running import check_progress, told
from .ablation import ablation_of
from .circuit import Circuit
from .graph import Graph
from .pairs import Pairs
from .running import share_of
from .trials import at_once, values_of

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..metrics import MetricLike
    from ..models.decoder.model import Decoder
    from ..sweeps.running import Progress

Edges = Bool[np.ndarray, "N M"]
# The metric of each of some circuits on each prompt, that of the model itself first.
Judge = Callable[[Sequence[Edges]], Float[np.ndarray, "R B"]]


def acdc(
    model: Decoder,
    clean: ArrayLike,
    corrupted: ArrayLike,
    metric: MetricLike,
    threshold: float,
    *,
    within: Circuit | None = None,
    ablation: str | Mapping[str, ArrayLike] = "corrupted",
    mask: ArrayLike | None = None,
    corrupted_mask: ArrayLike | None = None,
    progress: Progress | bool | None = None,
) -> Circuit:
    """Searches a circuit edge by edge, and leaves out what the metric does not need. Host function.

    Automatic circuit discovery (Conmy et al. 2023, arXiv:2304.14997, algorithm 1). From the last reader to the first, each edge
    into it is taken away, writers in order, and stays away if the distance from the model, the mean over prompts of
    |metric of the circuit − metric of the model|, grows by less than `threshold`. With `metrics.kl_divergence` from the clean
    run's logits, which is 0 in the model, that is the paper's first choice. A logit difference is its other one, but that here
    what raises it counts as what lowers it: the paper's loss lets go of every component that works against the answer.

    With an edge goes what then leads nowhere, untried. Removals run several at once, each as if those before it turned out as
    foreseen, and count up to the first that did not: what is found is what one by one would find, and all trials are one program.
    `plan(acdc, …)` tells how long it takes.

    Args:
        model: a model of any family.
        clean, corrupted, ablation, mask, corrupted_mask: as in `run_circuit`.
        metric: one of `oculi_jax.metrics`, or any function of an `Output` to a number.
        threshold: in the metric's unit, from 0.
        within: where the search begins, a circuit of edges; None for the whole of `Graph.of(model.config)`.
        progress: as in `sweep`, of edges.

    Returns:
        A `Circuit`, whose scores are how much the distance grew without each edge that was tried.

    Raises:
        ValueError, TypeError: something that can be seen to be wrong, before anything runs.

    Examples:
        >>> most = circuits.edge_attribution(model, ids, other, metric, steps=5).top(40)
        >>> found = circuits.acdc(model, ids, other, metric, 0.5, within=most)
        >>> set(found.names) < set(most.names)  # a part of it
        True
    """
    limit = _number(threshold, "threshold", "how much the metric may move for an edge")
    whole = Graph.of(model.config)
    start = Circuit(whole, edges=whole.edges) if within is None else within
    judge, n = _judge(acdc, model, start, clean, corrupted, metric, ablation, mask, corrupted_mask, progress)
    own = judge([start.edges])[0]

    def distances(masks: Sequence[Edges]) -> Float[np.ndarray, "R"]:
        return np.abs(judge(masks)[1:] - own).mean(axis=1)

    order = sorted(np.argwhere(start.edges).tolist(), key=lambda edge: (-edge[1], edge[0]))
    with told("acdc", progress, len(order)) as advance:
        kept, scores = thinned(start, order, distances, lambda new, old: new - old < limit, n, True, advance)
    return Circuit(start.graph, edges=kept, scores=scores)


def minimal(
    model: Decoder,
    circuit: Circuit,
    clean: ArrayLike,
    corrupted: ArrayLike,
    metric: MetricLike,
    *,
    tolerance: float = 0.02,
    ablation: str | Mapping[str, ArrayLike] = "corrupted",
    mask: ArrayLike | None = None,
    corrupted_mask: ArrayLike | None = None,
    progress: Progress | bool | None = None,
) -> Circuit:
    """The part of a circuit of which no edge can go: without any of them, `faithfulness` is not what it was. Host function.

    Edges are taken away one at a time, those of the least score first, and stay away if the faithfulness is still within
    `tolerance` of the given circuit's; so again, until none of those that are left can. Trials run as those of `acdc`.

    Args:
        model: a model of any family.
        circuit: of edges; without scores they are tried as `acdc` tries them.
        clean, corrupted, metric, ablation, mask, corrupted_mask: as in `faithfulness`.
        tolerance: how far its faithfulness may be from what it was, a share of what the model does beyond nothing.
        progress: as in `sweep`, of the edges of each time through.

    Returns:
        A `Circuit` with the scores of the given one.

    Raises:
        ValueError, TypeError: something that can be seen to be wrong, before anything runs; a metric that nothing changes.

    Examples:
        >>> most = circuits.edge_attribution(model, ids, other, metric, steps=5).top(40)
        >>> found = circuits.minimal(model, most, ids, other, metric, tolerance=0.1)
        >>> both = circuits.faithfulness(model, [most, found], ids, other, metric).faithfulness
        >>> set(found.names) < set(most.names), bool(abs(both[0] - both[1]) < 0.1)
        (True, True)
    """
    limit = _number(tolerance, "tolerance", "how far faithfulness may be from what it was")
    judge, n = _judge(minimal, model, circuit, clean, corrupted, metric, ablation, mask, corrupted_mask, progress)
    whole, given, empty = judge([circuit.edges, np.zeros_like(circuit.edges)]).mean(axis=1)
    if abs(whole - empty) <= SAME * max(abs(whole), abs(empty)):
        raise ValueError(
            "The metric is the same in the model and with everything ablated: no circuit can be faithful to that."
        )

    def distances(masks: Sequence[Edges]) -> Float[np.ndarray, "R"]:
        return np.abs(judge(masks)[1:].mean(axis=1) - given) / abs(whole - empty)

    found, again = circuit, False
    while True:
        values = np.zeros(found.edges.shape) if circuit.scores is None else np.abs(circuit.scores)
        order = sorted(np.argwhere(found.edges).tolist(), key=lambda edge: (values[tuple(edge)], -edge[1], edge[0]))
        with told("minimal", progress, len(order)) as advance:
            kept, _ = thinned(found, order, distances, lambda new, old: new <= limit, n, not again, advance)
        if (kept == found.edges).all():
            return found
        found, again = Circuit(circuit.graph, edges=kept, scores=circuit.scores), True


def _judge(
    function: Callable[..., Circuit], model: Decoder, circuit: Circuit, clean: Any, corrupted: Any, metric: Any,
    ablation: Any, mask: Any, corrupted_mask: Any, progress: Any,
) -> tuple[Judge, int]:  # fmt: skip
    """What judges circuits, checked; and how many at once."""
    if under_trace((model, clean, corrupted)):
        raise TypeError(f"{function.__name__} runs on the host and was called inside a trace; run_circuit can be.")
    check_progress(progress)
    if not isinstance(circuit, Circuit) or circuit.kind != "edges":
        what = f"of {circuit.kind}" if isinstance(circuit, Circuit) else f"a {type(circuit).__name__}"
        raise TypeError(
            f"The circuit is {what}, and one of edges is needed: Circuit(graph, edges=…), or scores.top(…)."
        )
    pairs = Pairs.of(model, clean, corrupted, metric, mask, corrupted_mask)
    _, _, grouped = share_of(model.config, circuit.edges, None, None)
    other, n = ablation_of(model, pairs, "edges", ablation), at_once(model, pairs)

    def judge(masks: Sequence[Edges]) -> Float[np.ndarray, "R B"]:
        found: list[np.ndarray] = []
        for begin in range(0, len(masks), n):
            some = masks[begin : begin + n]
            room = np.stack([*some, *[some[-1]] * (n - len(some))])
            plain, *values = values_of(model, pairs, room, other, kind="edges", grouped=grouped)[: len(some) + 1]
            found = found + values if found else [plain, *values]
        return np.stack(found)

    return judge, n


def _number(value: float, name: str, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not value >= 0:
        raise ValueError(f"{name} is {value!r}, and a number from 0 is needed: {what}.")
    return float(value)


def thinned(
    circuit: Circuit,
    order: Sequence[Sequence[int]],
    distances: Callable[[Sequence[Edges]], Float[np.ndarray, "R"]],
    goes: Callable[[float, float], bool],
    n: int,
    foreseen: bool,
    advance: Callable[[int], None],
) -> tuple[Edges, Float[np.ndarray, "N M"]]:
    """The edges that are left of a circuit once each in turn went where it may; and how much the distance grew without each.

    Args:
        order: rows and columns.
        distances: of some circuits from what they are to be like.
        goes: whether an edge does, of the distances without it and with it.
        n: how many are tried at once, each on top of those before it as foreseen: the next does as most of the last n did.
        foreseen: what the first is thought to do.
        advance: is told of how many edges it is known what becomes of them.
    """
    graph, kept, scores = circuit.graph, circuit.edges, np.zeros(circuit.edges.shape, np.float32)
    distance, done, at = float(distances([kept])[0]), [foreseen], 0
    while at < len(order):
        foreseen, begin, base, trials = bool(np.mean(done[-n:]) >= 0.5), at, kept, []
        while at < len(order) and len(trials) < n:
            edge, at = tuple(order[at]), at + 1
            if base[edge]:  # and has not gone with another
                without = base.copy()
                without[edge] = False
                trials.append((at, edge, graph.pruned(without)))
                base = trials[-1][2] if foreseen else base
        for (at_it, edge, mask), found in zip(trials, distances([x[2] for x in trials]) if trials else (), strict=True):
            scores[edge] = found - distance
            done.append(goes(float(found), distance))
            if done[-1]:
                kept, distance = mask, float(found)
            if done[-1] != foreseen:
                at = at_it
                break
        advance(at - begin)
    return kept, scores
