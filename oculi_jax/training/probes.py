"""Probes: linear readers of a site, least squares and logistic, at many places at once.

Alain and Bengio (2016), "Understanding intermediate layers using linear classifier probes", arXiv:1610.01644; what their accuracy
is to be held against, Hewitt and Liang (2019), "Designing and Interpreting Probes with Control Tasks", arXiv:1909.03368.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from .directions import Direction, Estimator, Places, Sample, judged

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..models.decoder.model import Decoder

# Of centred values in coordinates, as the left vectors `[N, r]` and the sizes of their singular value decomposition, of labels
# `[K, N]` and a penalty: weights `[K, r]` and biases `[K]`.
Solver: TypeAlias = Callable[[np.ndarray, np.ndarray, np.ndarray, float], tuple[np.ndarray, np.ndarray]]
_STEPS, _CLOSE = 100, 1e-10  # of Newton's method: how many at most, and what a last step is


def linear_probe(
    model: Decoder,
    positive: ArrayLike,
    negative: ArrayLike,
    *,
    layers: Places = None,
    site: str = "resid_pre",
    positions: Places = -1,
    penalty: float = 0.01,
    held_out: float = 0.25,
    key: Array,
    positive_mask: ArrayLike | None = None,
    negative_mask: ArrayLike | None = None,
    controls: bool = True,
) -> Direction:
    """Ridge regression of +1 at positive prompts and −1 at negative ones, in closed form.

    At each place it minimises the mean of `(y − x · w − b)²` plus `penalty · s² ‖w‖²`, where `s` is the root mean square of the
    values there about their mean: a penalty means the same in a small stream and in a large one. Host function.

    Args:
        model, positive, negative: as in `difference_of_means`, as is all that is not named here.
        penalty: above 0.

    Returns:
        A `Direction`, whose vector is w. It reads; what it does when it is added is another question.

    Raises:
        ValueError, TypeError: as `difference_of_means`.

    Examples:
        >>> cities, countries = ["Rome", "Paris", "Madrid", "Vienna"] * 2, ["Italy", "France", "Spain", "Austria"] * 2
        >>> positive, negative = ([tokenizer.encode(f"People in {x}") for x in words] for words in (cities, countries))
        >>> found = linear_probe(model, positive, negative, layers=[1, 3], key=jax.random.key(0))
        >>> found.accuracy.mean
        Array([1., 1.], dtype=float32)
    """
    sample = Sample.of(model, positive, negative, (positive_mask, negative_mask), site, layers, positions)
    return judged(sample, _in_coordinates(_ridge, _checked(penalty)), held_out, key, controls)


def logistic_probe(
    model: Decoder,
    positive: ArrayLike,
    negative: ArrayLike,
    *,
    layers: Places = None,
    site: str = "resid_pre",
    positions: Places = -1,
    penalty: float = 0.01,
    held_out: float = 0.25,
    key: Array,
    positive_mask: ArrayLike | None = None,
    negative_mask: ArrayLike | None = None,
    controls: bool = True,
) -> Direction:
    """Logistic regression, by Newton's method to its one minimum.

    At each place it minimises the mean of `log(1 + exp(−y (x · w + b)))`, y = ±1, plus `½ penalty · s² ‖w‖²`, `s` as in
    `linear_probe`; scikit-learn's `C` is `1 / (N · penalty · s²)`. Host function.

    Args:
        model, positive, negative: as in `difference_of_means`, as is all that is not named here.
        penalty: above 0.

    Returns:
        A `Direction`, whose vector is w, in nats of log-odds.

    Raises:
        ValueError, TypeError: as `difference_of_means`.

    Examples:
        >>> cities, countries = ["Rome", "Paris", "Madrid", "Vienna"] * 2, ["Italy", "France", "Spain", "Austria"] * 2
        >>> positive, negative = ([tokenizer.encode(f"People in {x}") for x in words] for words in (cities, countries))
        >>> found = logistic_probe(model, positive, negative, layers=2, positions=[-2, -1], key=jax.random.key(0))
        >>> found.auroc.mean  # before the word and at it
        Array([0.5, 1. ], dtype=float32)
    """
    sample = Sample.of(model, positive, negative, (positive_mask, negative_mask), site, layers, positions)
    return judged(sample, _in_coordinates(_logistic, _checked(penalty)), held_out, key, controls)


def _checked(penalty: float) -> float:
    if isinstance(penalty, bool) or not isinstance(penalty, int | float | np.number) or not 0 < penalty < np.inf:
        raise ValueError(f"penalty is {penalty!r}, and a number above 0 is needed.")
    return float(penalty)


def _in_coordinates(solve: Solver, penalty: float) -> Estimator:
    """An estimator of a solver, which sees centred values of mean square 1, in coordinates of the space that they span."""

    def estimator(values: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        vectors, biases = [], []
        for x in np.moveaxis(values, 1, 0):
            mean = x.mean(axis=0)
            scale = max(
                float(np.sqrt(((x - mean) ** 2).mean())), 1e-30
            )  # of values that are all alike, nothing is read
            left, sizes, right = np.linalg.svd((x - mean) / scale, full_matrices=False)
            weights, bias = solve(left, sizes, labels, penalty)
            vector = weights @ right / scale
            vectors.append(vector)
            biases.append(bias - vector @ mean)
        return np.stack(vectors, axis=1), np.stack(biases, axis=1)

    return estimator


def _ridge(
    left: Float[np.ndarray, "N r"], sizes: Float[np.ndarray, " r"], labels: Bool[np.ndarray, "K N"], penalty: float
) -> tuple[Float[np.ndarray, "K r"], Float[np.ndarray, " K"]]:
    wanted = np.where(labels, 1.0, -1.0)
    bias = wanted.mean(axis=1)
    return (wanted - bias[:, None]) @ left * (sizes / (sizes**2 + labels.shape[1] * penalty)), bias


def _logistic(
    left: Float[np.ndarray, "N r"], sizes: Float[np.ndarray, " r"], labels: Bool[np.ndarray, "K N"], penalty: float
) -> tuple[Float[np.ndarray, "K r"], Float[np.ndarray, " K"]]:
    x = np.concatenate([left * sizes, np.ones((len(left), 1))], axis=1)
    ridge = np.append(np.full(len(sizes), penalty), 0.0)
    sign = np.where(labels, 1.0, -1.0)

    def value(w: np.ndarray) -> np.ndarray:
        return np.logaddexp(0, -sign * (w @ x.T)).mean(axis=1) + (ridge * w**2).sum(axis=1) / 2

    w = np.zeros((len(labels), x.shape[1]))
    for _ in range(_STEPS):
        chance = 0.5 * (1 + np.tanh(w @ x.T / 2))
        slope = (chance - labels) @ x / len(x) + ridge * w
        curve = (x.T[None] * (chance * (1 - chance))[:, None]) @ x / len(x) + np.diag(ridge)
        try:
            step = np.linalg.solve(curve, slope[..., None])[..., 0]
        except np.linalg.LinAlgError:
            raise ValueError(
                f"penalty is {penalty:g}, and too small: where a direction tells all prompts apart it says how long that may be."
            ) from None
        before, length = value(w), np.ones((len(w), 1))
        for _ in range(30):  # a whole step may go too far
            worse = value(w - length * step) > before + 1e-12
            if not worse.any():
                break
            length[worse] /= 2
        w = w - length * step
        if np.abs(length * step).max() < _CLOSE:
            break
    return w[:, :-1], w[:, -1]
