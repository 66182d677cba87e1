"""The fits of an alignment search, at one layer: positions × seeds and their controls, as one program; and their judgement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from ..intervention import Subspace
from ..sweeps.running import part_of
from .alignment import Alignment
from .fitting import Fit, fit
from .interchanges import Pairs, Where, hits, surprise, where_of
from .splitting import apart

if TYPE_CHECKING:
    from ..intervention.protocol import Intervention


Fixed = TypeVar("Fixed", contravariant=True)
Row = TypeVar("Row", contravariant=True)
Parameters: TypeAlias = dict[str, Any]


class Method(Protocol[Fixed, Row]):
    """How a subspace is looked for: `DAS`, `BoundlessDAS`, `DBM`, or one's own, which has these."""

    def start(self, values: Float[np.ndarray, "N n"], key: Array) -> tuple[Parameters, Any]:
        """What a fit begins with, and what it is given that is not fitted, from what the source prompts hold."""
        ...

    def schedule(self, steps: int, values: Float[np.ndarray, "N n"]) -> Any:
        """What changes from step to step, rows of a pytree; None for nothing."""
        ...

    def edit(self, parameters: Parameters, fixed: Fixed, schedule: Row, where: Where) -> Intervention:
        """The interchange that a step judges."""
        ...

    def cost(self, parameters: Parameters, schedule: Row) -> Any:
        """What is added to the loss."""
        ...

    def found(self, parameters: Parameters, fixed: Fixed) -> Float[np.ndarray, "n r"]:
        """The subspace, orthonormal."""
        ...

    def random(self, fixed: Fixed, shape: tuple[int, int], key: Array) -> Float[np.ndarray, "n r"]:
        """A subspace of that shape that nobody looked for, orthonormal."""
        ...


@dataclass(frozen=True)
class Search:
    """What the fits of all layers share: which pairs they are fitted on and judged on, and their keys."""

    method: Method[Any, Any]
    keys: Mapping[str, Array]
    held: Int[np.ndarray, "M"]
    rest: Int[np.ndarray, "N"]
    shuffled: Int[np.ndarray, "B"]
    seeds: int
    controls: bool

    @classmethod
    def of(
        cls, method: Method[Any, Any], pairs: Pairs, key: Array, held_out: float, seeds: int, controls: bool
    ) -> Search:
        n = len(pairs.labels)
        names = ("fit", "held out", "shuffled", "random", "untrained")
        keys: dict[str, Array] = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        held, rest = apart(jax.random.permutation(keys["held out"], n), held_out, "pairs")
        shuffled = pairs.labels[np.asarray(jax.random.permutation(keys["shuffled"], n))]
        return cls(method, keys, held, rest, shuffled, seeds, controls)

    def fitted(
        self,
        pairs: Pairs,
        file: Path | None,
        advance: Callable[[int], None],
        *,
        seeds: bool,
        steps: int,
        **settings: Any,
    ) -> tuple[Fit, list[Any]]:
        """The fits of a layer, positions × (seeds, then the one to shuffled labels), and what each place was given.

        Args:
            seeds: whether to make all of these; else only the first seed's.
        """
        import optax

        n_seeds = self.seeds if seeds else 1
        n_fits = n_seeds + int(self.controls and seeds)
        starts, fixed = [], []
        for place in range(len(pairs.positions)):
            values, key = pairs.values(self.rest, place), jax.random.fold_in(self.keys["fit"], place)
            drawn = [self.method.start(values, jax.random.fold_in(key, seed)) for seed in range(n_seeds)]
            starts += [own for own, _ in drawn] + [drawn[0][0]] * (n_fits - n_seeds)
            fixed.append(drawn[0][1])
        own = jax.tree.map(lambda *x: np.stack(x), *starts)
        start = {
            "own": own,
            "place": np.repeat(np.arange(len(pairs.positions), dtype=np.int32), n_fits),
            "shuffled": np.tile((np.arange(n_fits) >= n_seeds).astype(np.int32), len(pairs.positions)),
        }
        data = {**pairs.examples(self.rest), "shuffled": jnp.asarray(self.shuffled[self.rest])}
        loss = search_loss(self.method, pairs, jax.tree.map(lambda *x: np.stack(x), *fixed))
        optimiser = optax.adam(settings.pop("learning_rate"))
        schedules = self.method.schedule(steps, pairs.values(self.rest, 0))
        found = fit(loss, start, data, steps=steps, optimiser=optimiser, key=self.keys["fit"], many=1, schedules=schedules,
                    file=file, progress=part_of(advance), **settings)  # fmt: skip
        return found, fixed

    def judged(
        self, pairs: Pairs, done: tuple[Fit, list[Any]], other: tuple[Pairs, tuple[Fit, list[Any]]] | None
    ) -> list[Alignment]:
        """An alignment of each position, beside its controls."""
        found, fixed = done
        places, n_fits = len(pairs.positions), self.seeds + int(self.controls)
        bases = [self._basis(found, i, fixed[i // n_fits]) for i in range(places * n_fits)]
        drawn = [
            self.method.random(fixed[i], bases[i * n_fits].shape, jax.random.fold_in(self.keys["random"], i))
            for i in range(places if self.controls else 0)
        ]
        at = [*np.repeat(np.arange(places), n_fits), *range(len(drawn))]
        labels = [
            self.shuffled if self.controls and i < places * n_fits and i % n_fits == self.seeds else pairs.labels
            for i in range(len(at))
        ]
        told = hits(pairs, [*bases, *drawn], at, self.held, labels)
        plain = None
        if other is not None:
            own, (theirs, given) = other
            plain = hits(own, [self._basis(theirs, i, given[i]) for i in range(places)], range(places), self.held)
        alignments = []
        for i, position in enumerate(pairs.positions):
            rows = told[i * n_fits : (i + 1) * n_fits]
            controls = {}
            if plain is not None:
                controls = {"random basis": told[places * n_fits + i], "shuffled labels": rows[-1]}
                controls["untrained model"] = plain[i]
            there: Subspace = Subspace(pairs.site, pairs.layer, jnp.asarray(bases[i * n_fits]), 0.0, position)
            by_seed = rows[: self.seeds].mean(axis=1)
            alignments.append(Alignment(there, rows[0], by_seed, controls, found.losses[:, i * n_fits], self.held))
        return alignments

    def _basis(self, found: Fit, i: int, fixed: Any) -> Float[np.ndarray, "n r"]:
        return self.method.found(jax.tree.map(lambda x: x[i], found.parameters["own"]), fixed)


def check_method(method: object) -> None:
    """TypeError for what is no way to look for a subspace."""
    if not hasattr(method, "found") or isinstance(method, type):
        raise TypeError(f"method is {method!r}, and one such as DAS(rank=8), BoundlessDAS() or DBM() is needed.")


def search_loss(method: Method[Any, Any], pairs: Pairs, fixed: object) -> Callable[..., Array]:
    """The loss of one pair.

    Args:
        fixed: what the method gives of each place and seed.
    """
    model, site, layer, positions = pairs.model, pairs.site, pairs.layer, pairs.positions

    def loss(parameters: Any, example: Any, now: Any) -> Array:
        own = jax.tree.map(lambda x: jnp.asarray(x)[parameters["place"]], fixed)
        where = where_of(site, layer, positions, example["source"], parameters["place"])
        there = method.edit(parameters["own"], own, now.schedule, where)
        told = surprise(model, there, layer, example, parameters["shuffled"])
        return told + method.cost(parameters["own"], now.schedule)

    return loss
