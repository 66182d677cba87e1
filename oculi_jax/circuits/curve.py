"""`faithfulness`: how much of a metric is left in circuits of many sizes, as MIB judges them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from ..arrays import integer, listing, under_trace
from ..intervals import Interval
from ..pytrees import pytree
from .ablation import ablation_of
from .circuit import Circuit
from .pairs import Pairs
from .running import share_of
from .scores import Scores
from .trials import values_of

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..metrics import MetricLike
    from ..models.decoder.model import Decoder

MIB_SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def faithfulness(
    model: Decoder,
    circuits_or_scores: Scores | Circuit | Sequence[Circuit],
    clean: ArrayLike,
    corrupted: ArrayLike,
    metric: MetricLike,
    *,
    ablation: str | Mapping[str, ArrayLike] = "corrupted",
    sizes: Sequence[float] = MIB_SIZES,
    absolute: bool = False,
    nulls: int = 0,
    key: int | Array | None = None,
    mask: ArrayLike | None = None,
    corrupted_mask: ArrayLike | None = None,
) -> Curve:
    """How faithful circuits are to a model: `f = (m(C) − m(∅)) / (m(all) − m(∅))`, means over prompts. Host function.

    As MIB has it (Mueller et al. 2025, arXiv:2504.13151): the edges of the largest scores, of each size as a share of all edges,
    rounded down, then pruned; m(∅) is the metric with everything ablated. All circuits run in one program.

    Args:
        model: a model of any family.
        circuits_or_scores: scores, of edges, nodes or neurons, from which circuits of `sizes` are made; or a circuit, or several
            of one kind.
        clean, corrupted, ablation, mask, corrupted_mask: as in `run_circuit`.
        metric: one of `oculi_jax.metrics`, or any function of an `Output` to a number.
        sizes: shares of all edges (nodes, neurons), of scores alone; those of circuits are their own.
        absolute: whether they are chosen by magnitude. MIB's tables take CPR of circuits chosen by signed score and CMD of those
            chosen by magnitude.
        nulls: for each circuit so many random ones of as many edges (nodes, neurons) before pruning.
        key: of these, an integer or a JAX key; 0 for None.

    Returns:
        A `Curve`.

    Raises:
        ValueError, TypeError: something that can be seen to be wrong, before anything runs.

    Examples:
        >>> scores = circuits.edge_attribution(model, ids, other, metric, steps=5)
        >>> curve = circuits.faithfulness(model, scores, ids, other, metric, sizes=(0.1, 0.5, 1.0), nulls=2)
        >>> curve.faithfulness.shape, f"{curve.faithfulness[-1]:.2f}", curve.counts[:, 0], curve.nulls.shape
        ((3,), '1.00', array([ 92, 463, 927]), (2, 3))
    """
    if under_trace((model, clean, corrupted)):
        raise TypeError("faithfulness runs on the host and was called inside a trace; run_circuit can be.")
    pairs = Pairs.of(model, clean, corrupted, metric, mask, corrupted_mask)
    kind, shares, chosen, counts = _chosen(circuits_or_scores, sizes, absolute)
    drawn, drawn_counts = _nulls(kind, circuits_or_scores, counts[:, 0], integer(nulls, "nulls", 0), key)
    every = [np.zeros_like(chosen[:1]), chosen, drawn.reshape(-1, *chosen.shape[1:])]
    given: Any = dict.fromkeys(("edges", "nodes", "neurons")) | {kind: every[0][0]}
    _, _, grouped = share_of(model.config, **given)
    other = ablation_of(model, pairs, kind, ablation)
    values = values_of(model, pairs, np.concatenate(every), other, kind=kind, grouped=grouped)
    n = len(chosen)
    return Curve(
        sizes=shares, by_prompt=values[2 : n + 2].T, empty=values[1], whole=values[0], counts=counts,
        null_by_prompt=np.moveaxis(values[n + 2 :].reshape(nulls, n, len(pairs.clean)), -1, 0), null_counts=drawn_counts,
    )  # fmt: skip


@pytree
class Curve:
    """What `faithfulness` returns: metrics of each prompt, from which all else is made. Host arrays.

    Attributes:
        sizes: `[n]`, of each circuit as a share of all edges (nodes, neurons).
        by_prompt: m(C), float32 `[B, n]`.
        empty, whole: m(∅) and m(all), float32 `[B]`.
        counts: int `[n, 2]`: how many edges each circuit has before pruning and after it.
        null_by_prompt: of random circuits, float32 `[B, nulls, n]`.
        null_counts: int `[nulls, n, 2]`, likewise.

    Examples:
        >>> scores = circuits.edge_attribution(model, ids, other, metric, steps=5)
        >>> pairs = [ids, other], [other, ids], metrics.logit_difference([rome, paris], [paris, rome])
        >>> curve = circuits.faithfulness(model, scores, *pairs)
        >>> curve.by_prompt.shape, curve.nulls.shape, curve.accuracy[-1].item(), curve.interval().low.shape
        ((2, 10), (0, 10), 1.0, (10,))
        >>> 0 < curve.cpr < 2, 0 < curve.cmd < 2, 0 <= curve.acc_auc <= 1
        (True, True, True)
    """

    sizes: Float[np.ndarray, "N"]
    by_prompt: Float[np.ndarray, "B N"]
    empty: Float[np.ndarray, "B"]
    whole: Float[np.ndarray, "B"]
    counts: Int[np.ndarray, "N 2"]
    null_by_prompt: Float[np.ndarray, "B M N"]
    null_counts: Int[np.ndarray, "M N 2"]

    @property
    def faithfulness(self) -> Float[np.ndarray, "N"]:
        """f of each circuit, a ratio of means over prompts."""
        return self._ratio(self.by_prompt.mean(axis=0))

    @property
    def nulls(self) -> Float[np.ndarray, "M N"]:
        """f of the random circuits."""
        return self._ratio(self.null_by_prompt.mean(axis=0))

    @property
    def cpr(self) -> float:
        """The area under f over the sizes, by trapezoids: how well circuits perform."""
        return self._area(self.faithfulness, self.sizes)

    @property
    def cmd(self) -> float:
        """The area under |1 − f|: how far circuits are from the model."""
        return self._area(np.abs(1 - self.faithfulness), self.sizes)

    @property
    def accuracy(self) -> Float[np.ndarray, "N"]:
        """The share of prompts whose metric is above 0 in each circuit."""
        return (self.by_prompt > 0).mean(axis=0)

    @property
    def acc_auc(self) -> float:
        """The mean accuracy over the logarithm of the size: its area over that, by how far it reaches (3 tens of MIB's sizes)."""
        with np.errstate(divide="ignore"):
            places = np.log10(self.sizes)
        return self._area(self.accuracy, places) / float(places.max() - places.min())

    def interval(self, of: str = "faithfulness", confidence: float = 0.95) -> Interval:
        """One of the numbers above with its bootstrap interval over prompts: these are drawn anew 2000 times (Efron 1979).

        Args:
            of: `"faithfulness"`, `"nulls"`, `"cpr"`, `"cmd"`, `"accuracy"` or `"acc_auc"`, and so is the interval's shape.
            confidence: the share of draws between its ends.

        Raises:
            ValueError: another name; fewer than two prompts.

        Examples:
            >>> scores = circuits.edge_attribution(model, ids, other, metric, steps=5)
            >>> pairs = [ids, other], [other, ids], metrics.logit_difference([rome, paris], [paris, rome])
            >>> spread = circuits.faithfulness(model, scores, *pairs).interval("cpr")
            >>> bool(spread.low <= spread.mean <= spread.high)
            True
        """
        names = ("faithfulness", "nulls", "cpr", "cmd", "accuracy", "acc_auc")
        if of not in names:
            raise ValueError(f"of is {of!r}, and must be one of {', '.join(names)}.")
        n = len(self.empty)
        if n < 2:
            raise ValueError("An interval over prompts needs at least two of them.")
        rng, found = np.random.default_rng(0), []
        for _ in range(2000):
            rows = rng.integers(0, n, n)
            given = {name: getattr(self, name)[rows] for name in ("by_prompt", "empty", "whole", "null_by_prompt")}
            found.append(getattr(replace(self, **given), of))
        low, high = np.quantile(np.array(found), [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
        return Interval(*(jnp.asarray(x, jnp.float32) for x in (getattr(self, of), low, high)))

    def _ratio(self, mean: Any) -> Any:
        empty, whole = self.empty.mean(), self.whole.mean()
        with np.errstate(divide="ignore", invalid="ignore"):
            return (mean - empty) / (whole - empty)

    def _area(self, values: Any, places: Any) -> float:
        order = np.argsort(places, kind="stable")
        return float(np.trapezoid(np.asarray(values, np.float64)[order], np.asarray(places, np.float64)[order]))

    def __repr__(self) -> str:
        n_prompts, n = self.by_prompt.shape
        more = f", {len(self.null_counts)} nulls each" if len(self.null_counts) else ""
        return f"Curve({n} circuits, {n_prompts} prompts, CPR {self.cpr:.3g}, CMD {self.cmd:.3g}{more})"


def _chosen(
    given: Any, sizes: Sequence[float], absolute: bool
) -> tuple[str, Float[np.ndarray, "N"], np.ndarray, Int[np.ndarray, "N 2"]]:
    """The kind, sizes, masks, and numbers before and after pruning of what was given."""
    if isinstance(given, Scores):
        shares = np.asarray(sizes, np.float64)
        if shares.ndim != 1 or not len(shares) or not ((shares > 0) & (shares <= 1)).all():
            raise ValueError(f"sizes is {sizes!r}, and shares of all {given.kind} are needed, above 0 and up to 1.")
        raw = [int(share * given.n) for share in shares]
        masks = np.stack([given.top(n, absolute=absolute).mask for n in raw])
        counts = np.array([[n, mask.sum()] for n, mask in zip(raw, masks, strict=True)])
        return given.kind, shares, masks, counts
    circuits = [given] if isinstance(given, Circuit) else list(given) if isinstance(given, Sequence) else []
    if not circuits or not all(isinstance(circuit, Circuit) for circuit in circuits):
        raise TypeError(
            "circuits_or_scores is neither Scores nor a Circuit nor several: edge_attribution(…) makes scores."
        )
    kinds = {(circuit.kind, circuit.mask.shape) for circuit in circuits}
    if len(kinds) > 1:
        raise ValueError(
            f"Circuits of one kind can be judged together, and given are {', '.join(f'{k} {listing(s)}' for k, s in kinds)}."
        )
    masks = np.stack([circuit.mask for circuit in circuits])
    n = circuits[0].graph.n_edges if circuits[0].kind == "edges" else masks[0].size
    counts = masks.reshape(len(masks), -1).sum(axis=1)
    return circuits[0].kind, counts / n, masks, np.stack([counts, counts], axis=1)


def _nulls(
    kind: str, given: Any, counts: Int[np.ndarray, "N"], nulls: int, key: int | Array | None
) -> tuple[np.ndarray, Int[np.ndarray, "M N 2"]]:
    """Random circuits of as many edges, nodes or neurons, `[nulls, n, …]`, pruned; and their numbers."""
    first: Any = given if isinstance(given, Scores | Circuit) else given[0]
    graph = first.graph
    shape = np.shape(first.values) if isinstance(first, Scores) else first.mask.shape
    seed = 0 if key is None else key
    rng = np.random.default_rng(np.asarray(seed if isinstance(seed, int) else jax.random.key_data(seed)).reshape(-1))
    drawn = np.zeros((nulls, len(counts), *shape), bool)
    found = np.zeros((nulls, len(counts), 2), int)
    for i in range(nulls):
        for j, n in enumerate(counts.tolist()):
            some = np.zeros(int(np.prod(shape)), bool)
            places = np.flatnonzero(graph.edges) if kind == "edges" else np.arange(some.size)
            some[rng.choice(places, n, replace=False)] = True
            one: Any = {kind: some.reshape(shape)}
            drawn[i, j] = Circuit(graph, **one).mask
            found[i, j] = n, drawn[i, j].sum()
    return drawn, found
