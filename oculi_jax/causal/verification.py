"""`verify`: how well estimates of patching agree with exact patches of the same entries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import Array
from jax.core import Tracer

from ..arrays import AnyArray, integer, listing
from ..backends import check_model
from ..intervention import ActivationPatch, PerLayer
from ..metrics import of_prompt
from ..prompts import check_prompts
from ..run import forward
from ..sites import SITES, Site
from ..sweeps.sweeping import Progress, sweep

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..models.decoder.model import Decoder
    from .attributed import AttributionResult

# Effects below this share of the metric are rounding of float32, and have no sign.
ROUNDING = 1e-5


@dataclass(frozen=True, eq=False, repr=False)
class Verification:
    """Estimates beside exact effects, `patched − corrupted` of single patches by `sweep`.

    An entry is a dict as in `AttributionResult.top`, with `"estimate"`, `"exact"` and `"top"` (whether it was one of the
    largest, or drawn at random) for `"value"`.

    Attributes:
        rank_correlation: Spearman's, of estimates and exact effects of all entries (of their sizes, where estimates are
            magnitudes); NaN where either has no variation. Values that only rounding sets apart (1e-5 of the larger of the two
            runs' metrics, and at least 1e-5) are ties.
        sign_errors: the entries whose estimate and exact effect have opposite signs, both beyond that rounding.
        missed: the entries drawn at random that, by |exact effect| beyond rounding, belong to the k largest of all those rerun, k
            being how many `top` ones there are. Each stands for others that were not drawn.
        entries: all of them: the largest estimates first, then the others as drawn.

    Examples:
        >>> guess = attribution_patching(model, ids, other, metric, "z")
        >>> checked = verify(guess, model, ids, other, metric, top=5, sample=5)
        >>> len(checked.entries), checked.sign_errors, checked.entries[0]["head"]
        (10, [], 0)
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


def verify(
    result: AttributionResult,
    model: Decoder,
    clean: ArrayLike,
    corrupted: ArrayLike,
    metric: Callable[..., Any],
    *,
    mask: ArrayLike | None = None,
    top: int = 10,
    sample: int = 50,
    seed: int = 0,
    site: str | None = None,
    prompt: int | None = None,
    progress: Progress | bool | None = None,
) -> Verification:
    """Reruns the entries of largest |value|, and some others at random, as exact patches. Host function.

    Entries where the two runs do not differ at all, and padding, are left out: a patch there changes nothing.

    Args:
        result: of `attribution_patching`.
        model, clean, corrupted, metric, mask: what it was given.
        top: how many of the largest.
        sample: how many of the others, drawn without replacement; fewer where there are no more.
        seed: of the draw.
        site: one of the result's sites; None for all of them together.
        prompt: which pair, of several.
        progress: as in `sweep`, of all entries.

    Returns:
        A `Verification`.

    Raises:
        ValueError: other prompts than the result is of; nothing to verify.

    Examples:
        >>> guess = attribution_patching(model, ids, other, metric, "z")
        >>> verify(guess, model, ids, other, metric, top=5, sample=5).rank_correlation > 0.9
        True
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((result, model, clean, corrupted))):
        raise TypeError("verify runs on the host, and was called inside a trace (jit, vmap, grad): call it outside.")
    config = check_model(model)
    number = number_of(result, prompt)
    clean, real, single = check_prompts(config, clean, mask)
    corrupted, _, _ = check_prompts(config, corrupted, None)
    entries = entries_of(result, site, number)
    sizes = {**config.sizes, "T": clean.shape[1]}
    _check_own(result, entries, clean, corrupted, single, sizes)
    clean_value, corrupted_value = (float(np.ravel(np.asarray(x))[number]) for x in (result.clean, result.corrupted))
    top, sample = integer(top, "top", 0), integer(sample, "sample", 0)
    clean, corrupted, mask = clean[number], corrupted[number], None if real is None else real[number]
    metric = of_prompt(metric, number)
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
            if callable(progress):
                progress(done + n, len(chosen))

        patches = _patches(SITES[site], entries.index(chosen[mine]), source[site], sizes["T"])
        patched[mine] = np.ravel(
            sweep(model, corrupted, patches, metric, mask=mask, progress=report if callable(progress) else progress)
        )
        done += len(mine)
    rounding = ROUNDING * max(1.0, abs(clean_value), abs(corrupted_value))
    exact = patched - np.float32(corrupted_value)
    return _compare(entries, chosen, exact, min(top, len(ranked)), rounding, result.signed)


def _check_own(
    result: AttributionResult,
    entries: Entries,
    clean: AnyArray,
    corrupted: AnyArray,
    single: bool,
    sizes: Mapping[str, int],
) -> None:
    """ValueError for prompts `[B, T]` that are not those of a result, as far as shapes tell."""
    n_prompts = len(np.atleast_1d(result.clean))
    own = single == (result.clean.ndim == 0) and len(clean) == n_prompts and clean.shape == corrupted.shape
    for name, shape in entries.shapes.items():
        letters = (*("L" * SITES[name].layered), *SITES[name].axes[:-1])
        own = own and shape == tuple(sizes[letter] for letter in letters)
    if not own:
        given = " and ".join(listing(x.shape[int(single) :]) for x in (clean, corrupted))
        raise ValueError(
            f"This result is of {n_prompts} pair(s) of prompts, {entries.shapes}, and prompts {given} were given: give its own, "
            "and its model."
        )


def _differs(site: Site, clean: Array, corrupted: Array, mask: Any) -> np.ndarray:
    """For each entry of a site, flat, whether a patch there puts in anything new."""
    differs = np.any(np.asarray(clean) != np.asarray(corrupted), axis=-1)
    if mask is not None and "T" in site.axes[:-1]:
        axis = site.axes.index("T") + site.layered
        differs = differs & np.asarray(mask).reshape(-1, *(1,) * (differs.ndim - 1 - axis))
    return differs.ravel()


def _patches(site: Site, index: dict[str, np.ndarray], value: Array, n_tokens: int) -> ActivationPatch:
    """The patches of N entries of a run's capture, a sweep of axes `[N]`."""
    n = len(next(iter(index.values()), [0]))
    positions = np.ones((n, n_tokens), bool)
    if "position" in index:
        positions = np.arange(n_tokens) == index["position"][:, None]
    given = PerLayer(value) if site.layered else value
    return ActivationPatch(site.name, index.get("layer"), given, index.get("head"), positions)


def _compare(
    entries: Entries, chosen: np.ndarray, exact: np.ndarray, n_top: int, rounding: float, signed: bool
) -> Verification:
    estimate = entries.values[chosen]
    listed = [
        {**entries.place(number), "estimate": float(guess), "exact": float(effect), "top": i < n_top}
        for i, (number, guess, effect) in enumerate(zip(chosen, estimate, exact, strict=True))
    ]
    one, other = (_ranks(x, rounding) for x in (estimate, exact if signed else np.abs(exact)))
    varies = np.ptp(one) > 0 and np.ptp(other) > 0
    correlation = float(np.corrcoef(one, other)[0, 1]) if varies else float("nan")
    clear = (np.abs(estimate) > rounding) & (np.abs(exact) > rounding)
    wrong = np.flatnonzero(clear & (estimate * exact < 0) & signed)
    largest = np.argsort(-np.abs(exact), kind="stable")[:n_top]
    missed = [i for i in largest if i >= n_top and abs(exact[i]) > rounding]
    return Verification(correlation, [listed[i] for i in wrong], [listed[i] for i in missed], listed)


def _ranks(values: np.ndarray, rounding: float) -> np.ndarray:
    """Ranks from 1, where values that only rounding sets apart are level; they sum to N (N + 1) / 2."""
    below = (values[None] < values[:, None] - rounding).sum(1)
    above = (values[None] > values[:, None] + rounding).sum(1)
    return (len(values) + 1 + below - above) / 2
