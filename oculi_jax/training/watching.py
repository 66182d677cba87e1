"""The held-out loss of a fit while it runs: when it is measured, which parameters it was lowest with, who has stopped."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .steps import Programs

MEASURED = 20  # times that it is measured after the first step, at most


@dataclass
class Watch:
    """Of N fits side by side.

    Attributes:
        held: the held-out examples, or None.
        patience: how many measurements without a new lowest end a fit; None for no end.
        best: the parameters that the fit is to return: those of the lowest measurement where there is a patience, else the last.
        at, values: after how many steps it was measured, and what was found, `[N]` each.
        lowest, waited: of each fit, its lowest value, and how many measurements came after that.
        alive: bool `[N]`, which have not stopped.
    """

    programs: Programs
    held: Any
    steps: int
    patience: int | None
    best: list[Array]
    lowest: np.ndarray
    waited: np.ndarray
    at: list[int] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def of(cls, programs: Programs, held: object, steps: int, patience: int | None, trained: list[Array]) -> Watch:
        n = programs.n_fits
        return cls(programs, held, steps, patience, trained, np.full(n, np.inf, np.float32), np.zeros(n, np.int32))

    @property
    def alive(self) -> np.ndarray:
        return np.ones(len(self.waited), bool) if self.patience is None else self.waited < self.patience

    @property
    def every(self) -> int:
        return -(-self.steps // MEASURED)

    def next(self, done: int) -> int:
        """After how many steps it is to be measured again, or all are made."""
        return self.steps if self.held is None else min(self.steps, (done // self.every + 1) * self.every)

    def look(self, trained: list[Array], done: int) -> None:
        """Measures, where it is time and it was not done."""
        if self.held is None or (done % self.every and done != self.steps) or (self.at and self.at[-1] == done):
            return
        found = np.asarray(self.programs.held_out(trained, self.held, done, self.steps), np.float32)
        found = np.where(self.alive, found, np.nan).astype(np.float32)
        if np.isnan(found[self.alive]).any() and not np.isnan(self.values).any():
            warnings.warn(f"The held-out loss is not a number after {done} steps: it says nothing.", stacklevel=5)
        better = found < self.lowest
        if self.patience is not None:
            self.best = _chosen(jnp.asarray(better), trained, self.best)
        self.waited = np.where(better, 0, self.waited + self.alive).astype(np.int32)
        self.lowest = np.where(better, found, self.lowest)
        self.at.append(done)
        self.values.append(found)

    def finish(self, trained: list[Array]) -> None:
        """Says which the last parameters are."""
        if self.patience is None:
            self.best = trained


@jax.jit
def _chosen(better: Array, new: list[Array], old: list[Array]) -> list[Array]:
    """The new parameters of those fits that are better."""
    return [jnp.where(better.reshape(-1, *(1,) * (x.ndim - 1)), x, y) for x, y in zip(new, old, strict=True)]
