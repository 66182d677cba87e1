"""`auroc`: how well scores tell one kind of prompt from another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from ..arrays import as_array, integer, listing
from ..intervals import Interval

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

_RESAMPLES, _CONFIDENCE = 2000, 0.95


def auroc(positive: ArrayLike, negative: ArrayLike, *, seed: int = 0) -> Interval:
    """How often a positive prompt's score is above a negative one's: the area under the receiver operating characteristic.

    0.5 is chance, 1 tells all apart; ties count half (Hanley and McNeil 1982, doi:10.1148/radiology.143.1.7063747). The interval is
    of 95 %, by a bootstrap that draws as many of each kind as there are. Host function.

    Args:
        positive, negative: scores `[P, …]` and `[N, …]`. Of few prompts the interval is narrower than it should be.
        seed: of the bootstrap, from 0.

    Returns:
        An `Interval` of `[…]`.

    Raises:
        ValueError, TypeError: shapes that do not go together, too few prompts, scores that are not finite numbers.

    Examples:
        >>> float(auroc([0.9, 0.8, 0.4], [0.1, 0.5, 0.3]).mean)  # 8 of 9 pairs
        0.889
    """
    first, second = _scores(positive, "positive"), _scores(negative, "negative")
    if first.shape[1:] != second.shape[1:]:
        raise ValueError(
            f"positive has shape {listing(first.shape)} and negative {listing(second.shape)}: after the prompts, the same axes are "
            "needed."
        )
    rng = np.random.default_rng(integer(seed, "seed", 0))
    n, m = len(first), len(second)
    of_first, of_second = (rng.multinomial(k, np.full(k, 1 / k), _RESAMPLES).astype(np.float64) / k for k in (n, m))
    columns = zip(first.reshape(n, -1).T, second.reshape(m, -1).T, strict=True)
    ends = []
    for x, y in columns:
        wins = above(x, y)
        resampled = ((of_first @ wins) * of_second).sum(axis=1)
        ends.append([wins.mean(), *np.quantile(resampled, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])])
    found = np.array(ends, np.float32).reshape(*first.shape[1:], 3)
    return Interval(*np.moveaxis(found, -1, 0))  # type: ignore[arg-type]


def above(x: Float[np.ndarray, " P"], y: Float[np.ndarray, " N"]) -> Float[np.ndarray, "P N"]:
    """1 where an entry of `x` is above one of `y`, ½ where they are equal, else 0."""
    return (x[:, None] > y[None, :]) + 0.5 * (x[:, None] == y[None, :])


def _scores(given: ArrayLike, what: str) -> np.ndarray:
    array = np.asarray(as_array(given))
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise TypeError(f"{what} is an array of {array.dtype}, and numbers are needed.")
    if array.ndim == 0 or not len(array):
        raise ValueError(f"{what} has shape {listing(array.shape)}, and the scores of at least one prompt are needed.")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{what} holds what is no finite number.")
    return array
