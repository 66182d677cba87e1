"""What an alignment search finds: subspaces, how well they do, and the same of their controls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from ..intervals import Interval
from ..intervention import Subspace
from ..pytrees import pytree
from .controls import beside, ranged

_DRAWS = 2000


@pytree
class Alignment:
    """A subspace that was found, and how often interchanging it does what the causal model says, beside its controls.

    Attributes:
        subspace: a `Subspace` with source 0, which takes away what it holds; `found.subspace.of(source)` gives it one. Its
            basis is orthonormal. This is what `save` takes.
        accuracy: `[M]`, of each held-out pair, 1 where the likeliest token under interchange is its label, else 0.
        by_seed: `[S]`, the mean accuracy of each seed's subspace; the first is this one.
        controls: accuracies `[M]` of what should be at chance: `"random basis"`, of as many dimensions; `"shuffled labels"`, a
            basis fitted to labels in a random order, judged by those of the held-out pairs; `"untrained model"`, one fitted in
            a model that never learnt anything.
        losses: `[steps]`.
        held_out: `[M]`, which pairs these are.

    Examples:
        >>> pairs = tokenizer(["The capital of Italy is", "The capital of France is"] * 4)["input_ids"]
        >>> settings = dict(steps=40, batch_size=4, learning_rate=0.1, key=jax.random.key(0), controls=False, progress=False)
        >>> answers = np.array([paris, rome] * 4)  # after the source, each the other's prompt
        >>> found = align(model, pairs, pairs[1:] + pairs[:1], answers, DAS(rank=1), layers=3, **settings)[3, -1]
        >>> says(forward(model, ids, found.subspace.of(run["resid_pre"][3])))
        'Paris'
    """

    subspace: Subspace
    accuracy: Float[np.ndarray, "M"]
    by_seed: Float[np.ndarray, "S"]
    controls: Mapping[str, Float[np.ndarray, "M"]]
    losses: Float[np.ndarray, "N"]
    held_out: Int[np.ndarray, "M"]

    def __repr__(self) -> str:
        there = self.subspace
        where = f"{there.site}, layer {there.layer}, position {there.positions}, rank {there.basis.shape[1]}"
        return f"Alignment({where}: {beside(self.accuracy, self.controls, 'held-out pairs', self.by_seed)})"


@pytree
class VariableScore:
    """MIB's score of a causal variable: of the best place of each layer, the mean over layers and the best, with intervals.

    Attributes:
        mean, best: each an `Interval` over held-out pairs, which are drawn anew 2000 times.

    Examples:
        >>> VariableScore(bootstrap(np.array([1.0, 0.0, 1.0])), bootstrap(np.ones(3)))
        VariableScore(mean=0.6667 (0 to 1), best=1 (1 to 1))
    """

    mean: Interval
    best: Interval


@dataclass(frozen=True, repr=False)
class Alignments:
    """What `align` found, at each place.

    Attributes:
        layers, positions: the places.
        every: an `Alignment` of each, positions within layers.

    Examples:
        >>> there = Subspace("resid_pre", 3, np.eye(192)[:, :1], 0.0, -1)
        >>> one = Alignment(there, np.array([1.0, 0.0, 1.0]), np.array([2 / 3]), {}, np.zeros(5), np.arange(3))
        >>> found = Alignments((3,), (-1,), (one,))
        >>> found.accuracy.shape, found[3, -1].subspace.layer, found.score().best
        ((1, 1), 3, 0.6667 (0 to 1))
    """

    layers: tuple[int, ...]
    positions: tuple[int, ...]
    every: tuple[Alignment, ...]

    def __getitem__(self, place: tuple[int, int]) -> Alignment:
        """The alignment at a layer and a position."""
        if not isinstance(place, tuple) or len(place) != 2:
            raise TypeError(f"A place is a layer and a position, such as found[{self.layers[0]}, {self.positions[0]}].")
        for given, known, what in zip(place, (self.layers, self.positions), ("layer", "position"), strict=True):
            if given not in known:
                raise KeyError(f"{what} {given} was not looked at; there are {', '.join(map(str, known))}.")
        return self.every[self.layers.index(place[0]) * len(self.positions) + self.positions.index(place[1])]

    def __iter__(self) -> Iterator[Alignment]:
        return iter(self.every)

    @property
    def accuracy(self) -> Float[np.ndarray, "L P"]:
        """The mean over held-out pairs, at each place."""
        return self._hits(None).mean(axis=-1)

    def score(self, control: str | None = None) -> VariableScore:
        """MIB's score: the best position of each layer; of those the mean over layers, and the best (arXiv:2504.13151).

        Places are chosen on the pairs that judge them, so with many places the best is above what others will find there; the
        controls' scores are chosen alike.

        Args:
            control: one of the controls, for the score of that; None for what was found.

        Raises:
            ValueError: no such control.
        """
        found = self._hits(control)
        n = found.shape[-1]
        drawn = np.random.default_rng(0).integers(0, n, (_DRAWS, n))
        often = np.stack([np.bincount(row, minlength=n) for row in drawn]).astype(np.float32)  # each pair in each draw
        own, others = (_scores(x) for x in (found.mean(axis=-1)[None], np.moveaxis(found @ often.T / n, -1, 0)))
        ends = np.quantile(others, [0.025, 0.975], axis=0)
        return VariableScore(*(Interval(own[0, i], ends[0, i], ends[1, i]) for i in range(2)))

    def _hits(self, control: str | None) -> Float[np.ndarray, "L P M"]:
        known = self.every[0].controls
        if control is not None and control not in known:
            raise ValueError(f"control is {control!r}, and there are {', '.join(map(repr, known)) or 'none'}.")
        found = [x.accuracy if control is None else x.controls[control] for x in self.every]
        return np.stack(found).reshape(len(self.layers), len(self.positions), -1)

    def __repr__(self) -> str:
        shown = [("", self.score()), *((f"; {name} ", self.score(name)) for name in self.every[0].controls)]
        told = "".join(f"{name}mean {ranged(x.mean)}, best {ranged(x.best)}" for name, x in shown)
        n, m = len(self.layers), len(self.positions)
        many = f"{n} layer{'s' * (n > 1)} × {m} position{'s' * (m > 1)}, {len(self.every[0].held_out)} held-out pairs"
        places = [
            f"{place} {value:.2f}" for place, value in zip(self.positions * n, self.accuracy.ravel(), strict=True)
        ]
        rows = [f"\n  layer {layer}: position {', '.join(places[i * m :][:m])}" for i, layer in enumerate(self.layers)]
        return f"Alignments({many}: {told}{''.join(rows) if n * m > 1 else ''})"


def _scores(accuracy: Float[np.ndarray, "N L P"]) -> Float[np.ndarray, "N 2"]:
    best = accuracy.max(axis=2)
    return np.stack([best.mean(axis=1), best.max(axis=1)], axis=1)
