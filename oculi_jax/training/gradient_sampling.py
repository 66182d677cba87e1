"""Uniform gradient sampling: which edges a circuit keeps, from masks drawn at random, with constants for what it leaves out.

Li and Janson (2024), "Optimal ablation for interpretability", arXiv:2409.09951.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from ..arrays import integer, number, random_key
from ..backends.jax.programs import measure
from ..circuits.ablation import Ablated, ablated, ablation_of
from ..circuits.circuit import Circuit
from ..circuits.graph import Graph
from ..circuits.pairs import Pairs
from ..circuits.running import masked
from ..circuits.scores import Scores
from ..circuits.trials import values_of
from ..metrics import of_prompt
from ..output import Activations
from ..pytrees import pytree
from .controls import another, beside, orders
from .fitting import Fit, fit
from .objective import Objective, moments

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..metrics import MetricLike
    from ..models.decoder.model import Decoder
    from ..sweeps.running import Progress

SITES = ("embed", "z", "mlp_out")
_BEGIN = 1.0  # the logit of an edge at first: kept in 0.73 of the draws
_DECAY = 0.995  # of Adam's mean of squares; both are the authors'
_RANDOM = 8  # circuits of as many edges


@pytree
class SampledEdges:
    """Edges as uniform gradient sampling found them, and the loss of the circuit of the likely ones, beside its controls.

    Attributes:
        scores: of each edge the probability that it is kept. What `faithfulness` and `Scores.top` take.
        constants: site → array, what takes the place of a writer's write in the edges that are cut: `z` `[L, H, D]`, `mlp_out`
            `[L, E]`, `embed` `[E]`, an `ablation=` of `faithfulness` and `run_circuit`. None where the corrupted prompt's run does.
        loss: `[M]`, of each held-out prompt in `circuit()`.
        by_seed: `[S]`, its mean for what each seed found; the first is this one.
        controls: the same of `"shuffled answers"`, the circuit and constants of a fit in which each prompt was to say what
            another one is to; of `"random edges"`, as many as of the circuit, the mean of eight draws; `"no edges"`;
            `"mean constants"`, the circuit with means instead of what was learnt; and `"whole"`, the model as it is.
        losses: `[steps]`, penalty included.
        held_out: `[M]`, which prompts these are.

    Examples:
        >>> prompts = tokenizer([f"The capital of {x} is" for x in "Italy France Spain Egypt Japan Peru Cuba Iran".split()])
        >>> found = ugs(model, prompts["input_ids"], steps=10, batch_size=4, key=jax.random.key(0))
        >>> found.scores, found.constants
        (Scores(29 writers, 77 readers, 927 edges), {embed [192], z [4, 6, 32], mlp_out [4, 192]})
        >>> list(found.controls), found.circuit(above=0.9).kind
        (['shuffled answers', 'random edges', 'no edges', 'mean constants', 'whole'], 'edges')
        >>> curve = circuits.faithfulness(model, found.scores, ids, other, metric, ablation=found.constants)
    """

    scores: Scores
    constants: Activations | None
    loss: Float[np.ndarray, "M"]
    by_seed: Float[np.ndarray, "S"]
    controls: Mapping[str, Float[np.ndarray, "M"]]
    losses: Float[np.ndarray, "N"]
    held_out: Int[np.ndarray, "M"]

    def circuit(self, above: float = 0.5) -> Circuit:
        """The edges that are kept with more than this probability, pruned."""
        return _likely(self.scores, above)

    def __repr__(self) -> str:
        return f"SampledEdges({self.circuit()}: {beside(self.loss, self.controls, 'held-out prompts', self.by_seed)})"


def _likely(scores: Scores, above: float) -> Circuit:
    values, graph = np.asarray(scores.values), scores.graph
    return Circuit(graph, edges=(values > above) & graph.edges, scores=values)


def ugs(
    model: Decoder,
    clean: ArrayLike,
    corrupted: ArrayLike | None = None,
    *,
    loss: MetricLike | None = None,
    penalty: float = 1e-3,
    steps: int = 1000,
    batch_size: int = 16,
    learning_rate: float = 0.05,
    constants_rate: float = 0.01,
    held_out: float = 0.25,
    seeds: int = 1,
    key: Array,
    mask: ArrayLike | None = None,
    corrupted_mask: ArrayLike | None = None,
    controls: bool = True,
    file: str | os.PathLike[str] | None = None,
    progress: Progress | bool | None = None,
) -> SampledEdges:
    """Finds a circuit by uniform gradient sampling: of each edge the probability that it is kept, by gradients of sampled masks.

    A step draws a mask for each prompt. An edge of probability p is kept in part in p (1 − p) of them, by a share that is uniform
    from 0 to 1; in the others it is kept whole or cut. The former alone give p a gradient, and its mean is what keeping the edge,
    and not cutting it, does to the loss. `penalty` times the expected number of edges is added to the loss. Host function.

    Args:
        model: a model of any family.
        clean: ids `[B, T]`.
        corrupted: the same shape: what is cut is what the run of this prompt has there. None: it is a constant of its writer, the
            same at all tokens of all prompts, which begins at the mean and is learnt with the mask.
        loss: what is to be small: one of `oculi_jax.metrics`, or any function of an `Output` to a number; None for the divergence
            KL(whole ‖ circuit) of the next token after a prompt, in nats.
        penalty: λ, what an edge costs, in units of the loss.
        steps, batch_size: of the fit, by Adam.
        learning_rate: of the log odds of edges.
        constants_rate: of the constants, in units of the root mean square of what a writer varies by.
        held_out: the share of prompts, drawn by the key, that are kept for judging.
        seeds: how many fits, as one program, each with its own masks and order of prompts; what the first found is returned.
        key: a JAX random key: of masks, of what is held out, of the order of prompts, of random circuits.
        mask, corrupted_mask: bool, shaped as `clean`, True at real tokens; the second is the first where it is not given.
        controls: whether to fit once more, to shuffled answers; the other controls cost little, and are always made.
        file, progress: as in `fit`.

    Returns:
        `SampledEdges`.

    Raises:
        ValueError, TypeError: arguments that do not go together.

    Examples:
        >>> prompts = tokenizer([f"The capital of {x} is" for x in "Italy France Spain Egypt Japan Peru Cuba Iran".split()])
        >>> found = ugs(model, prompts["input_ids"], steps=10, batch_size=4, penalty=0.1, key=jax.random.key(0))
        >>> found.losses.shape, 0 < float(found.scores.values.max()) < 1
        ((10,), True)
    """
    if isinstance(penalty, bool) or not isinstance(penalty, int | float | np.number) or not 0 <= penalty < np.inf:
        raise ValueError(f"penalty is {penalty!r}, and must be 0 or more: what an edge costs.")
    steps, batch_size, seeds = (
        integer(steps, "steps", 1),
        integer(batch_size, "batch_size", 1),
        integer(seeds, "seeds", 1),
    )
    learning_rate = number(learning_rate, "learning_rate")
    constants_rate = number(constants_rate, "constants_rate")
    begin, order, drawn = jax.random.split(random_key(key), 3)
    objective = Objective.of(model, clean, mask, loss, held_out, begin, "clean")
    search = _Search(objective, corrupted, corrupted_mask, constants_rate / learning_rate)
    options: Any = dict(steps=steps, batch_size=batch_size, file=file, progress=progress)
    found = search.fitted(penalty, learning_rate, seeds, controls, order, **options)
    return search.judged(found, seeds, drawn)


def sampled(p: Float[Array, "..."], key: Array) -> Float[Array, "..."]:
    """A mask drawn from probabilities: 1, 0, or, with probability w = p (1 − p), uniform between; its mean is p.

    `clip(½ + (p − u) / w, 0, 1)`, u uniform and w a constant, so that the expected gradient with respect to p is that of a mask
    which is 1 with probability p and else 0.
    """
    window = jnp.maximum(jax.lax.stop_gradient(p * (1 - p)), jnp.finfo(p.dtype).tiny)
    return jnp.clip(0.5 + (p - jax.random.uniform(key, p.shape, p.dtype)) / window, 0, 1)


class _Search:
    """The pairs, the graph, where constants begin, and the units in which they move: a step of log odds for `rate` spreads."""

    def __init__(self, objective: Objective, corrupted: Any, corrupted_mask: Any, rate: float):
        self.objective, self.learns = objective, corrupted is None
        model, mask = objective.model, objective.mask
        other = objective.tokens if corrupted is None else corrupted
        self.pairs = Pairs.of(model, objective.tokens, other, None, mask, corrupted_mask)
        self.graph = Graph.of(model.config)
        self.means, spreads = moments(objective, SITES)
        self.units = {site: rate * spread[..., None] for site, spread in spreads.items()}

    def constants(self, moved: Mapping[str, Array]) -> dict[str, Array]:
        """The constants so many units beside the means."""
        return {site: mean + self.units[site] * moved[site] for site, mean in self.means.items()}

    def _of(self, rows: Int[np.ndarray, "N"]) -> list[Any]:
        """Of some prompts: clean and corrupted ids, and both masks."""
        given = self.pairs.clean, self.pairs.corrupted, self.pairs.mask, self.pairs.corrupted_mask
        return [None if x is None else np.asarray(x)[rows] for x in given]

    def fitted(
        self, penalty: float, learning_rate: float, seeds: int, controls: bool, key: Array, **options: Any
    ) -> Fit:
        """The log odds of edges, and how many units constants moved: of each seed, and of one to shuffled answers."""
        import optax

        model, metric, edges = self.objective.model, self.objective.metric, jnp.asarray(self.graph.edges)
        rows = self.objective.seen
        _, corrupted, _, corrupted_mask = self._of(rows)
        given = {**self.objective.examples(rows), "corrupted": corrupted, "corrupted_mask": corrupted_mask}
        every = jax.tree.map(jnp.asarray, given)

        def loss(parameters: Any, of_fits: Array, now: Any) -> Array:
            row = of_fits[parameters["fit"]]
            example, asked = jax.tree.map(lambda x: x[row], every), every["number"][parameters["asked"][row]]
            p = jnp.where(edges, jax.nn.sigmoid(parameters["edges"]), 0.0)
            prompt = example["tokens"], example["mask"]
            own = self.constants(parameters["moved"]) if self.learns else None
            other = None if own is None else Ablated({site: x[..., None, :] for site, x in own.items()}, False)
            instead = ablated(model, "edges", prompt, (example["corrupted"], example["corrupted_mask"]), other, None)
            kept = jnp.where(edges, sampled(p, now.key), 0.0)
            normalised = masked(model, prompt, kept, instead, "edges", False, remat=True)
            found = measure(model, normalised, prompt[1], of_prompt(metric, asked))
            return found + penalty * jnp.sum(p)

        n = seeds + controls
        start: dict[str, Any] = {"edges": np.full((n, *edges.shape), _BEGIN, np.float32)}
        if self.learns:
            start["moved"] = {site: np.zeros((n, *mean.shape), np.float32) for site, mean in self.means.items()}
        own = np.tile(np.arange(len(rows), dtype=np.int32), (seeds, 1))
        others = [
            another(len(rows), np.random.default_rng(np.asarray(jax.random.key_data(key)).reshape(-1)))
        ] * controls
        start |= {"fit": np.arange(n, dtype=np.int32), "asked": np.stack([*own, *others])}
        optimiser = optax.adam(learning_rate, b2=_DECAY)
        return fit(loss, start, orders(len(rows), n, key), optimiser=optimiser, key=key, many=1, **options)

    def judged(self, found: Fit, seeds: int, key: Array) -> SampledEdges:
        """The circuit of the likely edges on what was held out, beside its controls."""
        (scores, constants), *rest = (self._of_fit(found, number) for number in found.parameters["fit"])
        kept = _likely(scores, 0.5).edges
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).reshape(-1))
        random = [self.graph.pruned(self.graph.random(int(kept.sum()), rng)) for _ in range(_RANDOM)]
        whole, own, none, *others = self._losses(np.stack([kept, np.zeros_like(kept), *random]), constants)
        told = [own, *(self._losses(_likely(other, 0.5).edges[None], theirs)[1] for other, theirs in rest)]
        controls = {"shuffled answers": told[-1]} if len(told) > seeds else {}
        controls |= {"random edges": np.mean(others, axis=0), "no edges": none}
        if self.learns:
            controls["mean constants"] = self._losses(kept[None], Activations(self.means))[1]
        controls["whole"] = whole
        by_seed, losses = np.mean(told[:seeds], axis=1), found.losses[:, 0]
        return SampledEdges(scores, constants, own, by_seed, controls, losses, self.objective.held)

    def _of_fit(self, found: Fit, number: Array) -> tuple[Scores, Activations | None]:
        """Its probabilities and its constants."""
        own = jax.tree.map(lambda x: x[number], found.parameters)
        p = jnp.where(jnp.asarray(self.graph.edges), jax.nn.sigmoid(own["edges"]), 0.0)
        return Scores(p, self.graph), Activations(self.constants(own["moved"])) if self.learns else None

    def _losses(self, masks: np.ndarray, constants: Activations | None) -> Float[np.ndarray, "R M"]:
        """Of the whole model and of each circuit, on each held-out prompt."""
        rows, model = self.objective.held, self.objective.model
        clean, corrupted, mask, corrupted_mask = self._of(rows)
        pairs = Pairs.of(model, clean, corrupted, of_prompt(self.objective.metric, rows), mask, corrupted_mask)
        other = ablation_of(model, pairs, "edges", "corrupted" if constants is None else constants)
        return values_of(model, pairs, masks, other, kind="edges", grouped=False)
