"""`Verification`: how well estimates of patching agree with exact patches of the same entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jax import Array

from ..forward import forward
from ..intervention.named import ActivationPatch
from ..sites import SITES, Site
from ..sweep import sweep

if TYPE_CHECKING:
    from ..models.llama.model import Llama

# Effects below this share of the metric are rounding of float32, and have no sign.
ROUNDING = 1e-5


@dataclass(frozen=True, eq=False, repr=False)
class Verification:
    """Estimates beside exact effects, `patched − corrupted` of single patches by `sweep`.

    An entry is a dict as in `AttributionResult.top`, with `"estimate"`, `"exact"` and `"top"` (whether it was one of the
    largest, or drawn at random) for `"value"`.

    Attributes:
        rank_correlation: Spearman's, of estimates and exact effects of all entries; NaN where either has no variation. Values
            that only rounding sets apart (1e-5 of the larger of the two runs' metrics, and at least 1e-5) are ties.
        sign_errors: the entries whose estimate and exact effect have opposite signs, both beyond that rounding.
        missed: the entries drawn at random that, by |exact effect| beyond rounding, belong to the k largest of all those rerun, k
            being how many `top` ones there are. Each stands for others that were not drawn.
        entries: all of them: the largest estimates first, then the others as drawn.
    """

    rank_correlation: float
    sign_errors: list[dict[str, Any]]
    missed: list[dict[str, Any]]
    entries: list[dict[str, Any]]

    def __repr__(self) -> str:
        return (
            f"Verification({len(self.entries)} entries, rank correlation {self.rank_correlation:.3f}, "
            f"{len(self.sign_errors)} of wrong sign, {len(self.missed)} missed)"
        )


@dataclass(frozen=True, eq=False)
class Entries:
    """The entries of some sites in a row: the shape of each site's values, and all values `[N]`."""

    shapes: dict[str, tuple[int, ...]]
    values: np.ndarray

    @property
    def _ends(self) -> np.ndarray:
        return np.cumsum([np.prod(shape, dtype=int) for shape in self.shapes.values()])

    def site_of(self, numbers: Any) -> np.ndarray:
        return np.array(list(self.shapes))[np.searchsorted(self._ends, numbers, side="right")]

    def index(self, numbers: Any) -> dict[str, np.ndarray]:
        """`"layer"`, `"head"` and `"position"` of entries of one site, as far as it has them."""
        name = str(np.ravel(self.site_of(numbers))[0])
        at = list(self.shapes).index(name)
        start = self._ends[at - 1] if at else 0
        shape = self.shapes[name]
        places = np.unravel_index(numbers - start, shape) if shape else ()
        return dict(zip(_index_names(SITES[name]), places, strict=True))

    def place(self, number: int) -> dict[str, Any]:
        return {"site": str(self.site_of(number)), **{name: int(i) for name, i in self.index(number).items()}}


def _index_names(site: Site) -> list[str]:
    names = ["position" if letter == "T" else "head" for letter in site.axes[:-1]]
    return ["layer", *names] if site.layered else names


def rerun(
    entries: Entries, model: Llama, clean: Any, corrupted: Any, mask: Any, metric: Any, clean_value: float,
    corrupted_value: float, top: int, sample: int, seed: int, progress: Any,
) -> Verification:  # fmt: skip
    """Patches the entries of largest |value|, and some of the others, one at a time.

    Args:
        entries: with their estimates.
        clean, corrupted, mask: one pair of prompts, `[T]`.
        clean_value, corrupted_value: the metric of the two runs.
        top, sample, seed, progress: as in `AttributionResult.verify`.
    """
    sites = list(entries.shapes)
    source, before = (
        forward(model, tokens, capture=sites, logits="none", mask=mask).activations for tokens in (clean, corrupted)
    )
    possible = np.flatnonzero(np.concatenate([_differs(SITES[s], source[s], before[s], mask) for s in sites]))
    ranked = possible[np.argsort(-np.abs(entries.values[possible]), kind="stable")]
    # The others in the order of their places, since that of their values is up to rounding: a seed is one sample everywhere.
    others = np.random.default_rng(seed).permutation(np.sort(ranked[top:]))
    chosen = np.concatenate([ranked[:top], others[:sample]])
    if not len(chosen):
        raise ValueError(
            "There is nothing to verify: the two runs are the same at these sites, or top and sample are 0."
        )
    patched = np.empty(len(chosen), np.float32)
    done = 0
    for site in sites:
        mine = np.flatnonzero(entries.site_of(chosen) == site)
        if not len(mine):
            continue

        def report(n: int, _: int, done: int = done) -> None:
            progress(done + n, len(chosen))

        patches = _patches(site, entries.index(chosen[mine]), source[site], len(corrupted))
        patched[mine] = np.ravel(
            sweep(model, corrupted, patches, metric, mask=mask, progress=report if callable(progress) else progress)
        )
        done += len(mine)
    rounding = ROUNDING * max(1.0, abs(clean_value), abs(corrupted_value))
    return _compare(entries, chosen, patched - np.float32(corrupted_value), min(top, len(ranked)), rounding)


def _differs(site: Site, clean: Array, corrupted: Array, mask: Any) -> np.ndarray:
    """For each entry of a site, flat, whether a patch there puts in anything new."""
    differs = np.any(np.asarray(clean) != np.asarray(corrupted), axis=-1)
    if mask is not None and "T" in site.axes[:-1]:
        axis = site.axes.index("T") + site.layered
        differs = differs & np.asarray(mask).reshape(-1, *(1,) * (differs.ndim - 1 - axis))
    return differs.ravel()


def _patches(site: str, index: dict[str, np.ndarray], value: Array, n_tokens: int) -> ActivationPatch:
    """The patches of N entries, a sweep of axes `[N, 1, 1]`: more than `value` could lead with, so that it is shared."""
    n = len(next(iter(index.values()), [0]))
    fields = {name: i[:, None, None] for name, i in index.items()}
    positions = np.ones((n, 1, 1, n_tokens), bool)
    if "position" in fields:
        positions = np.arange(n_tokens) == fields["position"][..., None]
    return ActivationPatch(site, fields.get("layer"), value, fields.get("head"), positions)


def _compare(entries: Entries, chosen: np.ndarray, exact: np.ndarray, n_top: int, rounding: float) -> Verification:
    estimate = entries.values[chosen]
    listed = [
        {**entries.place(number), "estimate": float(guess), "exact": float(effect), "top": i < n_top}
        for i, (number, guess, effect) in enumerate(zip(chosen, estimate, exact, strict=True))
    ]
    one, other = (_ranks(x, rounding) for x in (estimate, exact))
    varies = np.ptp(one) > 0 and np.ptp(other) > 0
    correlation = float(np.corrcoef(one, other)[0, 1]) if varies else float("nan")
    clear = (np.abs(estimate) > rounding) & (np.abs(exact) > rounding)
    wrong = np.flatnonzero(clear & (estimate * exact < 0))
    largest = np.argsort(-np.abs(exact), kind="stable")[:n_top]
    missed = [i for i in largest if i >= n_top and abs(exact[i]) > rounding]
    return Verification(correlation, [listed[i] for i in wrong], [listed[i] for i in missed], listed)


def _ranks(values: np.ndarray, rounding: float) -> np.ndarray:
    """Ranks from 1, where values that only rounding sets apart are level; they sum to N (N + 1) / 2."""
    below = (values[None] < values[:, None] - rounding).sum(1)
    above = (values[None] > values[:, None] + rounding).sum(1)
    return (len(values) + 1 + below - above) / 2
