"""The entries of an `AttributionResult`: values in a row, and where each of them stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import integer
from ..sites import SITES, Site

if TYPE_CHECKING:
    from .attributed import AttributionResult

# What an entry says of its place on each axis.
WORDS = {
    "L": "layer",
    "H": "head",
    "K": "head",
    "T": "position",
    "S": "key",
    "F": "neuron",
    "E": "dimension",
    "D": "dimension",
}


def number_of(result: AttributionResult, prompt: int | None) -> int:
    """The number of a pair; 0 where there is but one."""
    if result.clean.ndim == 0:
        if prompt is not None:
            raise ValueError(f"prompt is {prompt!r}, and this result is of one pair of prompts: leave it out.")
        return 0
    n = result.clean.shape[0]
    return integer(prompt, "prompt", 0, n - 1, note=f": this result is of {n} pairs of prompts")


def entries_of(result: AttributionResult, site: str | None, number: int) -> Entries:
    """The values of one pair, of one site or of all."""
    if result.n_rules is not None:
        raise ValueError(
            f"This result is of {result.n_rules} rules: take one of them, such as result.rule(0), or result.grad_drop()."
        )
    if site is not None and site not in result.values:
        raise ValueError(f"There are no values of {site!r}; there are those of {', '.join(result.values)}.")
    arrays = {
        name: np.asarray(x if result.clean.ndim == 0 else x[number])
        for name, x in result.values.items()
        if site in (None, name)
    }
    return Entries({name: x.shape for name, x in arrays.items()}, np.concatenate([*map(np.ravel, arrays.values())]))


@dataclass(frozen=True, eq=False)
class Entries:
    """The entries of some sites in a row: the shape of each site's values, and all values `[N]`."""

    shapes: dict[str, tuple[int, ...]]
    values: np.ndarray

    @property
    def _ends(self) -> np.ndarray:
        return np.cumsum([np.prod(shape, dtype=int) for shape in self.shapes.values()])

    def site_of(self, numbers: np.ndarray | int) -> np.ndarray:
        return np.array(list(self.shapes))[np.searchsorted(self._ends, numbers, side="right")]

    def index(self, numbers: np.ndarray | int) -> dict[str, np.ndarray]:
        """`"layer"`, `"head"`, `"position"` and so on of entries of one site, as far as it has them."""
        name = str(np.ravel(self.site_of(numbers))[0])
        at = list(self.shapes).index(name)
        start = self._ends[at - 1] if at else 0
        shape = self.shapes[name]
        places = np.unravel_index(numbers - start, shape) if shape else ()
        return dict(zip((WORDS[letter] for letter in axes_of(SITES[name], shape)), places, strict=True))

    def place(self, number: int) -> dict[str, Any]:
        return {"site": str(self.site_of(number)), **{name: int(i) for name, i in self.index(number).items()}}


def axes_of(site: Site, shape: tuple[int, ...]) -> tuple[str, ...]:
    """The letters of a site's values: all but the last one of a capture where they are sums over that."""
    letters = (*("L" * site.layered), *site.axes)
    return letters if len(shape) == len(letters) else letters[:-1]
