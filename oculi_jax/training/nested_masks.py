"""Matryoshka attribution: scores that rank units by masks of every size, each inside the next (arXiv:2609.25518)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from ..arrays import integer, number, one_of
from ..backends import check_model
from .masks import LearnedScores, Pair, Search, Units
from .top_k import soft_top_k

if TYPE_CHECKING:
    import optax
    from numpy.typing import ArrayLike

    from ..circuits.graph import Graph
    from ..metrics import MetricLike
    from ..models.decoder.model import Decoder
    from ..sweeps.running import Progress

_RATE = 0.05  # of Adam, the authors'
SIZES = ("uniform", "log")


def matryoshka(
    model: Decoder,
    clean: ArrayLike,
    corrupted: ArrayLike,
    metric: MetricLike,
    *,
    kind: Literal["nodes", "neurons", "edges"] = "nodes",
    steps: int = 500,
    batch_size: int = 1,
    sizes: Literal["uniform", "log"] = "uniform",
    temperature: float = 0.5,
    optimiser: optax.GradientTransformation | None = None,
    ablation: str | Mapping[str, ArrayLike] = "corrupted",
    held_out: float = 0.25,
    seeds: int = 1,
    key: Array,
    graph: Graph | None = None,
    mask: ArrayLike | None = None,
    corrupted_mask: ArrayLike | None = None,
    controls: bool = True,
    file: str | os.PathLike[str] | None = None,
    progress: Progress | bool | None = None,
) -> LearnedScores:
    """Learns how much each node, neuron or edge is worth to a metric, from masks of all sizes at once.

    A step draws how many units k to keep, makes the mask `soft_top_k(scores, k, temperature)`, and runs a pair of which that
    share of each unit is the clean run's and the rest is what takes its place, as in `run_circuit`. The scores, zero at first,
    follow the gradient of the metric. So one fit ranks units for circuits of every size (arXiv:2609.25518): its first step is, in
    expectation, integrated gradients along masks, weighted and centred (theorem 1), and the later ones see what others keep.
    Host function.

    Args:
        model: a model of any family.
        clean, corrupted: ids `[B, T]`, of one shape, aligned token by token.
        metric: as in `faithfulness`, with a gradient; what raises it is worth something.
        kind: what is scored. Edges take ten times the steps, and a step of them two to three times as long.
        steps, batch_size: of the fit.
        sizes: k is drawn from 1 to the number of units, `"uniform"`, or `"log"`: its logarithm, which sees small circuits more
            often and large ones, that CPR is made of, less.
        temperature: of the mask.
        optimiser: of optax; `optax.adam(0.05)` for None. `optax.sgd(1.0)` keeps the scores in proportion to the metric.
        ablation: what takes the place of a unit, as in `run_circuit`.
        held_out: the share of pairs, drawn by the key, that are kept for judging.
        seeds: how many fits, as one program; their mean is returned.
        key: a JAX random key: of what is held out, of the order of pairs, of the sizes, of the controls.
        graph: of this model; `Graph.of(model.config)` for None.
        mask, corrupted_mask: bool, shaped as `clean`, True at real tokens; the second is the first where it is not given.
        controls: whether to run them, for as much time again as one fit; without, nothing says what chance would give.
        file: as in `fit`.
        progress: as in `fit`.

    Returns:
        `LearnedScores`.

    Raises:
        ValueError, TypeError: arguments that do not go together, or that `run_circuit` refuses.

    Examples:
        >>> pairs = tokenizer(["The capital of Italy is", "The capital of France is"] * 4)["input_ids"]
        >>> measured = metrics.logit_difference([rome, paris] * 4, [paris, rome] * 4)
        >>> found = matryoshka(model, pairs, pairs[1:] + pairs[:1], measured, steps=40, key=jax.random.key(0))
        >>> found.kind, found.top(12)
        ('nodes', Circuit(12 of 29 nodes))
    """
    check_model(model)
    one_of(sizes, "sizes", SIZES)
    steps, batch_size = integer(steps, "steps", 1), integer(batch_size, "batch_size", 1)
    temperature = number(temperature, "temperature")
    units = Units.of(model.config, kind, graph)
    search = Search(
        model, (clean, corrupted, mask, corrupted_mask), metric, units, ablation, held_out=held_out, seeds=seeds,
        controls=controls, key=key,
    )  # fmt: skip
    if optimiser is None:
        import optax

        optimiser = optax.adam(_RATE)
    found = search.fitted(
        mask_loss(search, sizes, temperature), {"scores": np.zeros(units.n, np.float32)}, steps=steps, batch_size=batch_size,
        optimiser=optimiser, file=file, progress=progress,
    )  # fmt: skip
    values = np.asarray(found.parameters["scores"])
    each = jnp.stack([units.laid(row) for row in values[:seeds]])
    return LearnedScores(
        each.mean(axis=0), units.graph, each, losses=found.losses[:, :seeds], held_out=search.held, **search.judged(values)
    )  # fmt: skip


def mask_loss(search: Search, sizes: str, temperature: float) -> Callable[..., Array]:
    """The loss of `matryoshka`, of one pair."""

    def loss(parameters: Any, example: Array, now: Any) -> Array:
        k = size_drawn(now.key, search.units.n, sizes)
        return loss_of_size(search, search.pair(parameters, example), parameters["scores"], k, temperature)

    return loss


def loss_of_size(search: Search, pair: Pair, scores: Float[Array, " n"], k: Array, temperature: float) -> Array:
    """What a pair loses where so many units are kept."""
    return -pair.value(pair.kept(search.units.laid(soft_top_k(scores, k, temperature))))


def size_drawn(key: Array, n: int, sizes: str) -> Float[Array, ""]:
    """How many units to keep, from 1 to n."""
    share = jax.random.uniform(key)
    return 1 + (n - 1) * share if sizes == "uniform" else jnp.exp(share * np.log(n).astype(np.float32))
