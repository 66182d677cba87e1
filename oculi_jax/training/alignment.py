"""Distributed alignment search: the subspace of a site that holds what a causal model says it holds.

Geiger et al. (2023), "Finding Alignments Between Interpretable Causal Variables and Distributed Neural Representations",
arXiv:2303.02536; its boundless form, Wu et al. (2023), "Interpretability at Scale", arXiv:2305.08809.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from ..arrays import integer, random_key
from ..intervention import Subspace
from ..pytrees import pytree
from .controls import beside
from .fitting import Fit, fit
from .interchanges import Pairs, Weighted, hits, prepare, surprise

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..models.decoder.model import Decoder
    from ..sweeps.running import Progress

_WARMEST, _COLDEST = 50.0, 0.1  # temperatures of a boundary, in dimensions: pyvene's


@pytree
class Alignment:
    """A subspace that was found, and how often interchanging it does what the causal model says, beside its controls.

    Attributes:
        subspace: a `Subspace` with source 0, which takes away what it holds; `of` gives it a source. Its basis is orthonormal.
        accuracy: `[M]`, of each held-out pair, 1 where the likeliest token under interchange is its label, else 0.
        controls: the same of what should be at chance: `"random basis"`, of as many dimensions; `"shuffled labels"`, a basis
            fitted to labels in a random order, judged by those of the held-out pairs.
        losses: `[steps]`.
        held_out: `[M]`, which pairs these are.

    Examples:
        >>> pairs = tokenizer(["The capital of Italy is", "The capital of France is"] * 4)["input_ids"]
        >>> answers = np.array([paris, rome] * 4)  # after the source, each the other's prompt
        >>> settings = dict(layer=3, rank=1, steps=60, batch_size=4, learning_rate=0.1, key=jax.random.key(0))
        >>> found = das(model, pairs, pairs[1:] + pairs[:1], answers, **settings)
        >>> says(forward(model, ids, found.of(run["resid_pre"][3])))
        'Paris'
    """

    subspace: Subspace
    accuracy: Float[np.ndarray, "M"]
    controls: Mapping[str, Float[np.ndarray, "M"]]
    losses: Float[np.ndarray, "N"]
    held_out: Int[np.ndarray, "M"]

    def of(self, source: ArrayLike) -> Subspace:
        """The subspace with another run's values, `[T, E]` or one token's `[1, E]`."""
        return replace(self.subspace, source=source)

    def __repr__(self) -> str:
        where = f"{self.subspace.site}, layer {self.subspace.layer}, rank {self.subspace.basis.shape[1]}"
        return f"Alignment({where}: {beside(self.accuracy, self.controls, 'held-out pairs')})"


def das(
    model: Decoder,
    base: ArrayLike,
    source: ArrayLike,
    labels: ArrayLike,
    *,
    layer: int,
    rank: int,
    site: str = "resid_pre",
    position: int = -1,
    source_position: int | None = None,
    steps: int = 300,
    batch_size: int = 16,
    learning_rate: float = 1e-2,
    held_out: float = 0.25,
    key: Array,
    mask: ArrayLike | None = None,
    source_mask: ArrayLike | None = None,
    controls: bool = True,
    file: str | os.PathLike[str] | None = None,
    progress: Progress | bool | None = None,
) -> Alignment:
    """Finds the subspace that, taken from one prompt's run into another's, makes the model say what a causal model says it must.

    The basis is fitted with Adam to the mean surprise `−log p(label)` at the last token, of `base` run with the `source` prompt's
    values in the subspace. What comes before `layer` is run once. The control of shuffled labels is fitted beside it, as one
    program, for as much time again. Host function.

    Args:
        model: a model of any family.
        base: ids `[B, T]`, what is run.
        source: ids `[B, S]`, what is taken from.
        labels: ids `[B]`, the token after `base` once the variable has the value that it has in `source`.
        layer: where, from 0.
        rank: of the subspace, in dimensions of the site's last axis.
        site: a site of the layers whose last axis holds features.
        position: at which token of `base`, counted among the real ones, negative from the last.
        source_position: from which of `source`; None for the same.
        steps, batch_size, learning_rate: of the fit; the rate is constant.
        held_out: the share of pairs, drawn by the key, that are kept for judging.
        key: a JAX random key: of the first basis, of what is held out, of the order of pairs, of the controls.
        mask, source_mask: bool as the ids, True at real tokens.
        controls: whether to run them; without, nothing says what chance would give.
        file: as in `fit`.
        progress: as in `fit`.

    Returns:
        An `Alignment`.

    Raises:
        ValueError, TypeError: arguments that do not go together, or that `forward` refuses.

    Examples:
        >>> pairs = tokenizer(["The capital of Italy is", "The capital of France is"] * 4)["input_ids"]
        >>> answers = np.array([paris, rome] * 4)
        >>> settings = dict(layer=3, rank=1, steps=60, batch_size=4, learning_rate=0.1, key=jax.random.key(0))
        >>> found = das(model, pairs, pairs[1:] + pairs[:1], answers, **settings)
        >>> float(found.accuracy.mean())
        1.0
    """
    pairs = prepare(model, base, source, labels, layer, site, position, source_position, (mask, source_mask))
    rank = integer(rank, "rank", 1, pairs.width)
    loss = search_loss(model, site, layer, position)
    search = _Search(pairs, random_key(key), held_out, controls)
    found = search.fitted(loss, {"basis": search.drawn(rank)}, None, learning_rate, steps=steps, batch_size=batch_size,
                          file=file, progress=progress)  # fmt: skip
    return search.judged(list(found.parameters["basis"]), found)


def search_loss(model: Decoder, site: str, layer: int, position: int) -> Callable[..., Array]:
    """The loss of `das`, of one pair."""

    def loss(parameters: Any, example: Any) -> Array:
        there = Subspace(site, layer, parameters["basis"], example["source"], position)
        return surprise(model, there, layer, example, parameters["shuffled"])

    return loss


def boundless_das(
    model: Decoder,
    base: ArrayLike,
    source: ArrayLike,
    labels: ArrayLike,
    *,
    layer: int,
    site: str = "resid_pre",
    position: int = -1,
    source_position: int | None = None,
    steps: int = 300,
    batch_size: int = 16,
    learning_rate: float = 1e-2,
    penalty: float = 1.0,
    held_out: float = 0.25,
    key: Array,
    mask: ArrayLike | None = None,
    source_mask: ArrayLike | None = None,
    controls: bool = True,
    file: str | os.PathLike[str] | None = None,
    progress: Progress | bool | None = None,
) -> Alignment:
    """`das` that finds the rank too: a rotation of the whole site, of which the first dimensions are taken, up to a boundary.

    Dimension i is taken with weight `σ((b n − i − ½) / τ)`, for a share b of the n dimensions that is fitted with the rotation,
    from one half on, and a temperature τ that falls from 50 dimensions (an eighth of n where that is less) to 0.1. In the end the
    first b n columns, rounded, are the basis of an ordinary `Subspace`.

    Args:
        model, base, source, labels, layer, site, position, source_position: as in `das`, as all that is not named here.
        penalty: what is added to the loss, times b.

    Returns:
        An `Alignment`.

    Examples:
        >>> pairs = tokenizer(["The capital of Italy is", "The capital of France is"] * 4)["input_ids"]
        >>> answers, key = np.array([paris, rome] * 4), jax.random.key(0)
        >>> found = boundless_das(model, pairs, pairs[1:] + pairs[:1], answers, layer=3, steps=60, batch_size=4, key=key)
        >>> found.subspace.basis.shape[1] < 96  # of 192 dimensions, where it began with half
        True
    """
    pairs = prepare(model, base, source, labels, layer, site, position, source_position, (mask, source_mask))
    places = np.arange(pairs.width, dtype=np.float32)

    def loss(parameters: Any, example: Any, now: Any) -> Array:
        share = jnp.clip(parameters["boundary"], 0, 1)
        weights = jax.nn.sigmoid((share * pairs.width - places - 0.5) / now.schedule)
        there = Weighted(site, layer, parameters["basis"], weights, example["source"], position)
        return surprise(model, there, layer, example, parameters["shuffled"]) + penalty * share

    search = _Search(pairs, random_key(key), held_out, controls)
    start = {"basis": search.drawn(pairs.width), "boundary": np.full(1 + controls, 0.5, np.float32)}
    warm = np.linspace(min(_WARMEST, pairs.width / 8), _COLDEST, steps).astype(np.float32)
    found = search.fitted(
        loss, start, warm, learning_rate, steps=steps, batch_size=batch_size, file=file, progress=progress
    )
    ranks = np.clip(np.round(np.asarray(found.parameters["boundary"]) * pairs.width), 1, pairs.width).astype(int)
    turned = [jnp.linalg.qr(basis)[0][:, :rank] for basis, rank in zip(found.parameters["basis"], ranks, strict=True)]
    return search.judged(turned, found)


def interchange_accuracy(
    model: Decoder,
    subspace: Subspace,
    base: ArrayLike,
    source: ArrayLike,
    labels: ArrayLike,
    *,
    source_position: int | None = None,
    mask: ArrayLike | None = None,
    source_mask: ArrayLike | None = None,
) -> Float[np.ndarray, "B"]:
    """Of each pair 1 where, with the source's values in a subspace, the likeliest last token is the label, else 0.

    Its mean is the interchange intervention accuracy of Geiger et al. (2021, arXiv:2106.02997).

    Args:
        subspace: says where: one layer, one position. Its own source is not looked at.
        model, base, source, labels, source_position, mask, source_mask: as in `das`.

    Raises:
        ValueError, TypeError: as `das`.

    Examples:
        >>> whole = Subspace("resid_pre", 3, np.eye(192), 0.0, positions=-1)
        >>> interchange_accuracy(model, whole, [ids, other], [other, ids], [paris, rome])
        array([1., 1.], dtype=float32)
    """
    layer, position = integer(subspace.layer, "subspace.layer"), integer(subspace.positions, "subspace.positions")
    pairs = prepare(model, base, source, labels, layer, subspace.site, position, source_position, (mask, source_mask))
    return hits(pairs, jnp.asarray(subspace.basis), np.arange(len(pairs.labels)))


class _Search:
    """What both forms share: pairs to fit on and to judge on, the control of shuffled labels, and the judgement."""

    def __init__(self, pairs: Pairs, key: Array, held_out: float, controls: bool):
        if isinstance(held_out, bool) or not 0 < held_out < 1:
            raise ValueError(f"held_out is {held_out!r}, and must be a share of the pairs between 0 and 1.")
        n = len(pairs.labels)
        n_held = max(1, round(held_out * n))
        if n_held == n:
            raise ValueError(f"There are {n} pairs, and some are needed to fit on, and some to judge on.")
        self.pairs, self.controls = pairs, controls
        self.key, first, second, self.random = jax.random.split(key, 4)
        order = np.asarray(jax.random.permutation(first, n))
        self.held, self.rest = np.sort(order[:n_held]), np.sort(order[n_held:])
        self.shuffled = np.asarray(pairs.labels)[np.asarray(jax.random.permutation(second, n))]

    def drawn(self, rank: int) -> Float[np.ndarray, "R n r"]:
        """The basis to begin from, of each fit the same."""
        basis = jax.random.normal(jax.random.fold_in(self.key, 0), (self.pairs.width, rank))
        return np.repeat(np.asarray(basis)[None], 1 + self.controls, axis=0)

    def fitted(
        self, loss: Callable[..., Array], start: dict[str, Any], schedules: Any, learning_rate: float, **options: Any
    ) -> Fit:
        import optax

        start = {**start, "shuffled": np.arange(1 + self.controls, dtype=np.int32)}
        data = {**self.pairs.examples(self.rest), "shuffled": jnp.asarray(self.shuffled[self.rest])}
        return fit(
            loss, start, data, optimiser=optax.adam(learning_rate), key=self.key, many=1, schedules=schedules, **options
        )

    def judged(self, bases: list[Array], found: Fit) -> Alignment:
        """The first basis by the true labels, beside the controls."""
        basis = jnp.linalg.qr(bases[0])[0]
        controls = {}
        if self.controls:
            other = jax.random.normal(self.random, basis.shape)
            controls["random basis"] = hits(self.pairs, other, self.held)
            controls["shuffled labels"] = hits(self.pairs, bases[1], self.held, self.shuffled)
        there: Subspace = Subspace(self.pairs.site, self.pairs.layer, basis, 0.0, self.pairs.position)
        return Alignment(there, hits(self.pairs, basis, self.held), controls, found.losses[:, 0], self.held)
