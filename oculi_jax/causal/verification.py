"""`verify`: how well estimates of patching agree with exact patches of the same entries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from .attributed import AttributionResult
from .entries import WORDS, Entries, axes_of, entries_of, number_of

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..models.decoder.model import Decoder

# Effects below this share of the metric are rounding of float32, and have no sign.
ROUNDING = 1e-5


@dataclass(frozen=True, eq=False, repr=False)
class Verification:
    """Estimates beside exact effects: of patches `patched − corrupted`, of edges what corrupting them takes from the metric.

    An entry is a dict as in `AttributionResult.top`, or with an edge's name as `"edge"`, and with `"estimate"`, `"exact"` and
    `"top"` (whether it was one of the largest, or drawn at random) for `"value"`.

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

    The exact effect is the same whatever the estimate was made by: rules, steps, `correct`, either run's gradient. Entries where
    the two runs do not differ at all, and padding, are left out: a patch there changes nothing.

    Args:
        result: of `attribution_patching`; of a family of rules one of them, `.rule(i)`, or `.grad_drop()` of one pair, magnitudes
            that are judged by the size of the effects.
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
        ValueError: other prompts than the result is of; nothing to verify; a family of rules, or means over pairs.
        TypeError: other estimates, as of edges, which `oculi_jax.circuits.verify` takes.

    Examples:
        >>> guess = attribution_patching(model, ids, other, metric, "z")
        >>> verify(guess, model, ids, other, metric, top=5, sample=5).rank_correlation > 0.9
        True
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((result, model, clean, corrupted))):
        raise TypeError("verify runs on the host, and was called inside a trace (jit, vmap, grad): call it outside.")
    if not isinstance(result, AttributionResult):
        raise TypeError(
            f"result is a {type(result).__name__}, and an AttributionResult is needed: attribution_patching(…). Scores of edges "
            "are verified by oculi_jax.circuits.verify."
        )
    config = check_model(model)
    number = number_of(result, prompt)
    clean, real, single = check_prompts(config, clean, mask, ("clean", "mask"))
    corrupted, _, _ = check_prompts(config, corrupted, None, ("corrupted", "mask"))
    entries = entries_of(result, site, number)
    sizes = {**config.sizes, "T": clean.shape[1], "S": clean.shape[1]}
    _check_own(result, entries, clean, corrupted, single, sizes)
    clean_value, corrupted_value = (float(np.ravel(np.asarray(x))[number]) for x in (result.clean, result.corrupted))
    clean, corrupted, mask = clean[number], corrupted[number], None if real is None else real[number]
    metric = of_prompt(metric, number)
    sites = list(entries.shapes)
    source, before = (
        forward(model, tokens, capture=sites, logits="none", mask=mask).activations for tokens in (clean, corrupted)
    )
    differs = [_differs(SITES[s], source[s], before[s], mask, entries.shapes[s]) for s in sites]
    possible = np.flatnonzero(np.concatenate(differs))
    chosen, n_top = drawn(entries.values, possible, top, sample, seed)
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
    places = [entries.place(number) for number in chosen]
    return compared(places, entries.values[chosen], exact, n_top, rounding, result.signed)


def drawn(values: np.ndarray, possible: np.ndarray, top: int, sample: int, seed: int) -> tuple[np.ndarray, int]:
    """Which of some entries are rerun, those of largest |value| first, and how many these are."""
    top, sample = integer(top, "top", 0), integer(sample, "sample", 0)
    ranked = possible[np.argsort(-np.abs(values[possible]), kind="stable")]
    # The others in the order of their places, since that of their values is up to rounding: a seed is one sample everywhere.
    others = np.random.default_rng(seed).permutation(np.sort(ranked[top:]))
    return np.concatenate([ranked[:top], others[:sample]]), min(top, len(ranked))


def _check_own(
    result: AttributionResult,
    entries: Entries,
    clean: AnyArray,
    corrupted: AnyArray,
    single: bool,
    sizes: Mapping[str, int],
) -> None:
    """ValueError for prompts `[B, T]` that are not those of a result, as far as shapes tell."""
    if not (result.signed or single):
        raise ValueError(
            "These magnitudes are means over pairs of prompts, and a patch is of one pair: make them of one, from "
            "attribution_patching(model, clean[i], corrupted[i], …).grad_drop()."
        )
    n_prompts = len(np.atleast_1d(result.clean))
    own = single == (result.clean.ndim == 0) and len(clean) == n_prompts and clean.shape == corrupted.shape
    for name, shape in entries.shapes.items():
        own = own and shape == tuple(sizes[letter] for letter in axes_of(SITES[name], shape))
    if not own:
        given = " and ".join(listing(x.shape[int(single) :]) for x in (clean, corrupted))
        raise ValueError(
            f"This result is of {n_prompts} pair(s) of prompts, {entries.shapes}, and prompts {given} were given: give its own, "
            "and its model."
        )


def _differs(site: Site, clean: Array, corrupted: Array, mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    """For each entry of a site's values, flat, whether a patch there puts in anything new."""
    differs = np.asarray(clean) != np.asarray(corrupted)
    if mask is not None:
        axis = site.axes.index("T") + site.layered
        differs = differs & np.asarray(mask).reshape(-1, *(1,) * (differs.ndim - 1 - axis))
    return (differs if differs.shape == shape else differs.any(axis=-1)).ravel()


def _patches(site: Site, index: dict[str, np.ndarray], value: Array, n_tokens: int) -> ActivationPatch:
    """The patches of N entries of a run's capture, a sweep of axes `[N]`."""
    n = len(next(iter(index.values()), [0]))
    positions = np.ones((n, n_tokens), bool)
    if "position" in index:
        positions = np.arange(n_tokens) == index["position"][:, None]
    given = PerLayer(value) if site.layered else value
    unit = None if site.axes[-1] == "T" else index.get(WORDS[site.axes[-1]])
    return ActivationPatch(site.name, index.get("layer"), given, index.get("head"), positions, unit)


def compared(
    places: Sequence[dict[str, Any]],
    estimate: np.ndarray,
    exact: np.ndarray,
    n_top: int,
    rounding: float,
    signed: bool = True,
) -> Verification:
    """The verification of entries at these places, of which the first `n_top` are the largest estimates.

    Args:
        rounding: a difference of effects that means nothing.
        signed: whether estimates have signs, or are magnitudes.
    """
    listed = [
        {**place, "estimate": float(guess), "exact": float(effect), "top": i < n_top}
        for i, (place, guess, effect) in enumerate(zip(places, estimate, exact, strict=True))
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
