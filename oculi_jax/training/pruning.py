"""Pruning: a circuit of a given size, from gates that are open or shut at random and learn how often.

Louizos, Welling and Kingma (2018), "Learning Sparse Neural Networks through L0 Regularization", arXiv:1712.01312; for circuits,
Bhaskar, Wettig, Friedman and Chen (2024), "Finding Transformer Circuits with Edge Pruning", arXiv:2406.16778.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from ..arrays import integer, one_of
from ..backends import check_model
from ..circuits.circuit import Circuit
from ..circuits.curve import Curve
from ..circuits.scores import Scores
from ..pytrees import pytree
from .masks import Pair, Search, Units, beside
from .objective import last_logits

if TYPE_CHECKING:
    import optax
    from numpy.typing import ArrayLike

    from ..circuits.graph import Graph
    from ..metrics import MetricLike
    from ..models.decoder.model import Decoder
    from ..sweeps.running import Progress

LEFT, RIGHT, HEAT = -0.1, 1.1, 2 / 3  # where gates are stretched to, and their temperature: γ, ζ, β of Louizos et al.
_OPEN = 3.0  # log α at first: gates are open 99 times of a hundred
_RATE = 0.3  # of Adam, gates and multipliers alike
_WARM = 0.8  # share of the steps in which the sparsity that is asked for grows to its target
LOSSES = ("kl", "metric")


@pytree
class Pruned:
    """A circuit that was learnt for one size, judged on held-out pairs beside its controls.

    Attributes:
        circuit: of the units whose gates are open most often, pruned of what leads nowhere; its scores are their log α.
        open: the share of gates that are open, in expectation, at the mean of the seeds' log α: what was asked for is
            1 − sparsity.
        each: float32 `[R, …]`, log α of each seed; the circuit is of their mean.
        curve: of the circuit alone, on the held-out pairs.
        controls: the same of circuits of as many units: `"random scores"`, and `"shuffled answers"`, fitted likewise, each pair to
            what another one is to say; of nodes both with `input` first.
        seeds: the same of each seed's circuit, where there are several.
        losses: `[steps, R]`, of the seeds, multipliers included.
        held_out: `[M]`, which pairs these are.

    Examples:
        >>> pairs = tokenizer(["The capital of Italy is", "The capital of France is"] * 4)["input_ids"]
        >>> measured = metrics.logit_difference([rome, paris] * 4, [paris, rome] * 4)
        >>> settings = dict(kind="nodes", sparsity=0.5, steps=200, key=jax.random.key(0))
        >>> found = prune(model, pairs, pairs[1:] + pairs[:1], measured, **settings)
        >>> found.circuit, found.losses.shape, found.held_out.shape
        (Circuit(14 of 29 nodes), (200, 1), (2,))
    """

    circuit: Circuit
    open: Float[Array, ""]
    each: Float[Array, "R ..."]
    curve: Curve
    controls: Mapping[str, Curve]
    seeds: tuple[Curve, ...]
    losses: Float[np.ndarray, "N R"]
    held_out: Int[np.ndarray, "M"]

    def __repr__(self) -> str:
        own = repr(self.circuit).removeprefix("Circuit(").removesuffix(")")
        return f"Pruned({own}: {beside(self.curve, self.controls, self.seeds, 'faithfulness')})"


def prune(
    model: Decoder,
    clean: ArrayLike,
    corrupted: ArrayLike,
    metric: MetricLike,
    *,
    sparsity: float,
    kind: Literal["nodes", "neurons", "edges"] = "edges",
    loss: Literal["kl", "metric"] = "kl",
    steps: int = 1000,
    batch_size: int = 1,
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
) -> Pruned:
    """Learns which edges, nodes or neurons to keep, so that a circuit of a given size says what the whole model says.

    Each unit has a gate between 0 and 1, drawn anew in each step from a hard concrete distribution whose log α is learnt (Louizos
    et al. 2018); a pair runs with the gates as its mask, as in `run_circuit`. To the loss comes `λ₁ (s − t) + λ₂ (s − t)²` of the
    share s of gates that are shut, in expectation, and of its target t, which grows to `sparsity` in the first four fifths of the
    steps; the multipliers λ follow the gradient upwards (Bhaskar et al. 2024). Host function.

    Args:
        model, clean, corrupted, ablation, held_out, key, graph, mask, corrupted_mask, controls, file, progress: as in `matryoshka`.
        metric: what circuits are judged by; and fitted to, where `loss` says so.
        sparsity: which share of the units to leave out, between 0 and 1.
        kind: what is pruned: edge pruning, node pruning, or neurons.
        loss: `"kl"`: the divergence from the whole model's distribution of the next token, in nats; or `"metric"`: what raises it.
        steps, batch_size: of the fit; of too few, `Pruned.open` is still above what was asked for.
        optimiser: of optax; for None Adam, at a rate of 0.3 that falls to 0 over the last fifth.
        seeds: how many fits, as one program; the circuit is of the mean of their log α.

    Returns:
        `Pruned`.

    Raises:
        ValueError, TypeError: arguments that do not go together, or that `run_circuit` refuses.

    Examples:
        >>> pairs = tokenizer(["The capital of Italy is", "The capital of France is"] * 4)["input_ids"]
        >>> measured = metrics.logit_difference([rome, paris] * 4, [paris, rome] * 4)
        >>> settings = dict(kind="nodes", sparsity=0.5, steps=200, key=jax.random.key(0))
        >>> found = prune(model, pairs, pairs[1:] + pairs[:1], measured, **settings)
        >>> found.circuit
        Circuit(14 of 29 nodes)
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float | np.floating) or not 0 < sparsity < 1:
        raise ValueError(f"sparsity is {sparsity!r}, and must be between 0 and 1: the share of units to leave out.")
    check_model(model)
    one_of(loss, "loss", LOSSES)
    steps, batch_size = integer(steps, "steps", 1), integer(batch_size, "batch_size", 1)
    units = Units.of(model.config, kind, graph)
    search = Search(
        model, (clean, corrupted, mask, corrupted_mask), metric, units, ablation, held_out=held_out, seeds=seeds,
        controls=controls, key=key,
    )  # fmt: skip
    if optimiser is None:
        import optax

        falls = max(1, round((1 - _WARM) * steps))
        optimiser = optax.adam(optax.linear_schedule(_RATE, 0.0, falls, steps - falls))
    start = {"log_alpha": np.full(units.n, _OPEN, np.float32), "multipliers": np.zeros(2, np.float32)}
    targets = sparsity * np.minimum(1, np.arange(1, steps + 1) / max(1, _WARM * steps))
    found = search.fitted(
        gate_loss(search, loss), start, schedules=targets.astype(np.float32), steps=steps, batch_size=batch_size,
        optimiser=optimiser, file=file, progress=progress,
    )  # fmt: skip
    values = np.asarray(found.parameters["log_alpha"])
    mean = values[:seeds].mean(axis=0)
    kept = round((1 - sparsity) * units.n)

    def circuit(scores: Scores) -> Circuit:
        return scores.top(kept)

    return Pruned(
        circuit(Scores(units.laid(mean), units.graph)), opening(mean).mean(), jnp.stack([units.laid(x) for x in values[:seeds]]),
        losses=found.losses[:, :seeds], held_out=search.held, **search.judged(values, circuit),
    )  # fmt: skip


def gate_loss(search: Search, loss: str) -> Callable[..., Array]:
    """The loss of `prune`, of one pair."""

    whole = last_logits(search.model, search.pairs.clean, search.pairs.mask) if loss == "kl" else None

    def of(parameters: Any, example: Array, now: Any) -> Array:
        log_alpha, pair = parameters["log_alpha"], search.pair(parameters, example)
        run = pair.kept(search.units.laid(gates(now.key, log_alpha)))
        lost = -pair.value(run) if whole is None else divergence(pair, run, whole[pair.asked])
        return lost + constraint(parameters["multipliers"], 1 - jnp.mean(opening(log_alpha)), now.schedule)

    return of


def gates(key: Array, log_alpha: Float[Array, " n"]) -> Float[Array, " n"]:
    """Gates drawn from hard concrete distributions: 0, 1, or between."""
    end = jnp.finfo(log_alpha.dtype).eps
    u = jax.random.uniform(key, log_alpha.shape, log_alpha.dtype, end, 1 - end)
    s = jax.nn.sigmoid((jnp.log(u) - jnp.log1p(-u) + log_alpha) / HEAT)
    return jnp.clip(s * (RIGHT - LEFT) + LEFT, 0, 1)


def opening(log_alpha: Float[Array, " n"] | Float[np.ndarray, " n"]) -> Float[Array, " n"]:
    """The probability of each gate that it is not 0: of all of them together, the expected L0 norm."""
    return jax.nn.sigmoid(log_alpha - HEAT * np.log(-LEFT / RIGHT).astype(np.float32))


def constraint(multipliers: Float[Array, "2"], shut: Array, target: Array) -> Array:
    """The Lagrangian, whose gradient the multipliers get with the other sign, so that what descends in all else ascends in them."""
    first, second = 2 * jax.lax.stop_gradient(multipliers) - multipliers
    return first * (shut - target) + second * (shut - target) ** 2


def divergence(pair: Pair, run: Float[Array, "T E"], whole: Float[Array, " V"]) -> Float[Array, ""]:
    """KL of a run's distribution of the next token from the whole model's, of which the logits are given, in nats."""
    p, q = jax.nn.log_softmax(whole), pair.predicted(run)
    return jnp.sum(jnp.exp(p) * (p - q))
