"""`verify`: how well scores of edges agree with what corrupting the same edges does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..arrays import under_trace
from ..causal.verification import ROUNDING, Verification, compared, drawn
from .pairs import Pairs
from .running import share_of
from .scores import Scores
from .trials import values_of

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..metrics import MetricLike
    from ..models.decoder.model import Decoder


def verify(
    scores: Scores,
    model: Decoder,
    clean: ArrayLike,
    corrupted: ArrayLike,
    metric: MetricLike,
    *,
    mask: ArrayLike | None = None,
    corrupted_mask: ArrayLike | None = None,
    top: int = 10,
    sample: int = 50,
    seed: int = 0,
) -> Verification:
    """Corrupts the edges of largest |score|, and some others at random, one at a time, and measures. Host function.

    The exact effect of an edge is `m(clean) − m(clean, but for that edge)`, the mean over prompts, as `run_circuit` runs a mask of
    ones with one zero: the reader gets the writer's corrupted write by this edge alone, and all after it is live. A score is
    that to first order, positive where the edge raises the metric; so is the effect `clean − patched` of `path_patching` with
    that sender, that receiver and MLPs frozen (EActP). It is the same whatever scores were made by: steps, rules, either run.
    All edges are one program, whose data their masks are.

    Args:
        scores: of `edge_attribution`, or of a file.
        model, clean, corrupted, metric, mask, corrupted_mask: what it was given, or other prompts.
        top: how many of the largest.
        sample: how many of the others, drawn without replacement; fewer where there are no more.
        seed: of the draw.

    Returns:
        A `Verification`, whose entries have the `"edge"` by its name.

    Raises:
        ValueError, TypeError: scores of another model, or of no edges; nothing to verify.

    Examples:
        >>> scores = circuits.edge_attribution(model, ids, other, metric, steps=5)
        >>> checked = circuits.verify(scores, model, ids, other, metric, top=5, sample=5)
        >>> len(checked.entries), checked.entries[0]["edge"]
        (10, 'input->m0')
    """
    if under_trace((scores, model, clean, corrupted)):
        raise TypeError("verify runs on the host, and was called inside a trace (jit, vmap, grad): call it outside.")
    if not isinstance(scores, Scores):
        raise TypeError(
            f"scores is a {type(scores).__name__}, and Scores are needed: edge_attribution(…). What attribution_patching "
            "returns is verified by oculi_jax.causal.verify."
        )
    if scores.kind != "edges":
        raise ValueError(f"These are scores of {scores.kind}, and those of edges are verified.")
    pairs = Pairs.of(model, clean, corrupted, metric, mask, corrupted_mask)
    graph = scores.graph
    kind, _, grouped = share_of(model.config, graph.edges, None, None)
    values = np.asarray(scores.values).reshape(-1)
    chosen, n_top = drawn(values, np.flatnonzero(graph.edges), top, sample, seed)
    if not len(chosen):
        raise ValueError("There is nothing to verify: top and sample are 0.")
    # The whole graph, nothing of it, and all of it but each edge.
    masks = np.ones((2 + len(chosen), graph.edges.size), bool)
    masks[1] = False
    masks[2 + np.arange(len(chosen)), chosen] = False
    masks = masks.reshape(-1, *graph.edges.shape)
    found = values_of(model, pairs, masks, None, kind=kind, grouped=grouped)[1:].astype(np.float64)
    exact = (found[0] - found[2:]).mean(axis=1)
    rounding = ROUNDING * max(1.0, *np.abs(found[:2]).mean(axis=1).tolist())
    places = [
        {"edge": f"{graph.writers[u]}->{graph.readers[v]}"}
        for u, v in np.stack(np.unravel_index(chosen, graph.edges.shape), axis=1)
    ]
    return compared(places, values[chosen], exact, n_top, rounding)
