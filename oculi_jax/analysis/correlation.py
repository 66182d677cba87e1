"""Correlation of two measurements: Pearson's and Spearman's coefficients, as arrays and with p-values."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from .entropy import EntropyAnalysis
from .norms import NormAnalysis
from .statistics import centred, real_tokens

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..adapter.structures import AttentionCapture

_ROUNDINGS = 8  # which two computations of one number may differ by; a power of two, so that 8 ε |x| is exact


class CorrelationAnalysis:
    """Correlation coefficients, −1…1; NaN (0/0) where either side is constant, as in scipy.

    The methods `…_with_pvalue` are host functions, in float64 by scipy; the others are for `jit`, `vmap` and `grad`.

    Examples:
        >>> round(float(CorrelationAnalysis.pearson([1, 2, 3, 4], [4, 3, 2, 1])), 2)
        -1.0
    """

    @staticmethod
    def pearson(x: ArrayLike, y: ArrayLike, axis: int = -1) -> Float[Array, "..."]:
        """Pearson's r = Σ(x − x̄)(y − ȳ) / √(Σ(x − x̄)² Σ(y − ȳ)²) along an axis.

        Args:
            x, y: arrays of one shape, with at least 2 entries on `axis`.
            axis: the axis of the samples.

        Returns:
            Their shape without `axis`, float32. The gradient is finite wherever neither side is constant.

        Raises:
            ValueError: different shapes, or fewer than 2 samples.

        Examples:
            >>> round(float(CorrelationAnalysis.pearson([1, 2, 3, 4], [1, 3, 2, 4])), 2)
            0.8
        """
        x, y = _samples(x, y, axis)
        return _pearson(x, y, jnp.ones(x.shape, bool))

    @staticmethod
    def spearman(x: ArrayLike, y: ArrayLike, axis: int = -1) -> Float[Array, "..."]:
        """Spearman's ρ: Pearson's r of the ranks, ties sharing their mean rank.

        Values are ties where they differ by no more than 8 float32 roundings of the larger one, 2⁻²⁰ |x| or about one
        part in a million: two computations of one number, compiled or not, on one processor or another, get one rank.
        Integers are exact, and are ties only where they are equal.

            rank(i) = (N + 1 + the number of values below i − the number above i) / 2

        In a chain of ties the outer two may be apart, and both tie with the one between; ranks still sum to N (N + 1) / 2.

        Arguments, shapes and errors as for `pearson`; NaN where one side is all ties. Ranks are steps: the gradient is 0,
        and values that are just that far apart may tie on one processor and not on another.

        Examples:
            >>> round(float(CorrelationAnalysis.spearman([1, 2, 3, 100], [0, 1, 2, 3])), 2)
            1.0
        """
        exact = _exact(x), _exact(y)
        x, y = _samples(x, y, axis)
        return _spearman(x, y, jnp.ones(x.shape, bool), exact)

    @staticmethod
    def pearson_with_pvalue(x: ArrayLike, y: ArrayLike, axis: int = -1) -> tuple[np.ndarray, np.ndarray]:
        """Pearson's r and the two-sided p-value of no correlation, of samples that are normal. Host function.

        The p-value is that of r's own distribution (`scipy.stats.pearsonr`: a beta distribution), not of a normal
        approximation. Neighbouring tokens are not independent samples, so for tokens of one prompt it is too small.

        Args:
            x, y: arrays of one shape, with at least 2 entries on `axis`.
            axis: the axis of the samples.

        Returns:
            `(r, p)`, float64 NumPy arrays of that shape without `axis`.

        Raises:
            ValueError: as for `pearson`.

        Examples:
            >>> [round(float(x), 2) for x in CorrelationAnalysis.pearson_with_pvalue([1, 2, 3, 4], [1, 3, 2, 4])]
            [0.8, 0.2]
        """
        from scipy import stats

        x, y = _host_samples(x, y, axis)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.ConstantInputWarning)  # NaN says it
            r, p = stats.pearsonr(x, y, axis=-1)
        return np.asarray(r), np.asarray(p)

    @staticmethod
    def spearman_with_pvalue(x: ArrayLike, y: ArrayLike, axis: int = -1) -> tuple[np.ndarray, np.ndarray]:
        """Spearman's ρ and the two-sided p-value of no monotonic relation. Host function.

        The p-value is that of `scipy.stats.spearmanr`: t = ρ √((n − 2) / (1 − ρ²)) under Student's distribution with
        n − 2 degrees of freedom, an approximation that is good from about 10 samples; NaN for 2.

        Ties are those of `spearman`, but that float64 values (a list of floats is such) are read as they are, and are ties
        within 8 roundings of float64, 2⁻⁴⁹ |x|. All narrower floats are judged at float32's rounding.

        Arguments, returns and errors as for `pearson_with_pvalue`.

        Examples:
            >>> [round(float(x), 2) for x in CorrelationAnalysis.spearman_with_pvalue([1, 2, 3, 100], [1, 3, 2, 4])]
            [0.8, 0.2]
        """
        from scipy import stats

        types = [np.asarray(side).dtype for side in (x, y)]
        x, y = (_host_ranks(*side) for side in zip(_host_samples(x, y, axis), types, strict=True))
        rho = CorrelationAnalysis.pearson_with_pvalue(x, y)[0]
        freedom = x.shape[-1] - 2
        with np.errstate(divide="ignore", invalid="ignore"):
            t = rho * np.sqrt(freedom / ((1 - rho) * (1 + rho)))
        return rho, np.asarray(2 * stats.t.sf(np.abs(t), freedom))

    @staticmethod
    def norm_entropy_correlation(
        capture: AttentionCapture, method: str = "pearson", ignore_first: int = 0
    ) -> Float[Array, "L H"]:
        """Whether a head's long queries go with focused attention: its query norm against its entropy, over real tokens.

        Args:
            capture: an `AttentionCapture` with queries and patterns.
            method: `"pearson"` or `"spearman"`. Of ranks, norms tie as in `spearman`, and entropies within as many roundings
                of 1 + H, 2⁻²⁰ (1 + H) nats: weights that are off by a share ε move −Σ p ln p by up to ε (1 + H), however
                small it is. So heads that attend to one key throughout have constant entropy.
            ignore_first: how many of the first tokens to leave out. The first has entropy 0 whatever its query, and
                often an unusual norm, so `1` may change much.

        Returns:
            `[L, H]`; below 0 where longer queries attend to fewer keys; NaN where entropy is constant.

        Raises:
            ValueError: fewer than 2 tokens, or another method.

        Examples:
            >>> round(float(CorrelationAnalysis.norm_entropy_correlation(capture.attention)[3, 0]), 2)
            -0.96
        """
        correlate = _chosen(method, {"pearson": _pearson, "spearman": lambda x, h, real: _spearman(x, 1.0 + h, real)})
        norms, entropy, real = _norms_and_entropy(capture, ignore_first)
        return correlate(norms, entropy, jnp.broadcast_to(real[None, None, :], norms.shape))

    @staticmethod
    def norm_entropy_correlation_with_pvalue(
        capture: AttentionCapture, method: str = "pearson", ignore_first: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """`norm_entropy_correlation` and its p-values, float64 `[L, H]` each; ties and errors are the same. Host function.

        Examples:
            >>> r, p = CorrelationAnalysis.norm_entropy_correlation_with_pvalue(capture.attention)
            >>> round(float(r[3, 0]), 2), bool(p[3, 0] < 0.01)
            (-0.96, True)
        """
        with_pvalue = _chosen(
            method,
            {
                "pearson": CorrelationAnalysis.pearson_with_pvalue,
                "spearman": lambda x, h: CorrelationAnalysis.spearman_with_pvalue(x, 1 + h),
            },
        )
        norms, entropy, real = map(np.asarray, _norms_and_entropy(capture, ignore_first))
        return with_pvalue(norms[..., real], entropy[..., real])


@partial(jax.jit, inline=True)
def _pearson(x: Float[Array, "... N"], y: Float[Array, "... N"], real: Bool[Array, "... N"]) -> Float[Array, "..."]:
    def unit(values: Array) -> tuple[Array, Array]:
        off = centred(values, real)[1]
        size = jax.lax.stop_gradient(jnp.max(jnp.abs(off), axis=-1, keepdims=True))
        constant = size == 0
        # r is the same for any scale: at a largest deviation of 1 no square under- or overflows.
        off = off / jnp.where(constant, 1.0, size)
        length = jnp.sqrt(jnp.where(constant, 1.0, jnp.sum(off * off, axis=-1, keepdims=True)))
        return off / length, constant[..., 0]

    (x, x_constant), (y, y_constant) = unit(x), unit(y)
    r = jnp.clip(jnp.sum(x * y, axis=-1), -1.0, 1.0)
    return jnp.where(x_constant | y_constant, jnp.nan, r)


@partial(jax.jit, static_argnums=3, inline=True)
def _spearman(
    x: Float[Array, "... N"],
    y: Float[Array, "... N"],
    real: Bool[Array, "... N"],
    exact: tuple[bool, bool] = (False, False),
) -> Float[Array, "..."]:
    def ranks(values: Array, exact: bool) -> Array:
        floor = values if exact else _floor(values, _share(np.float32))
        below = jnp.sum((values[..., None, :] < floor[..., :, None]) & real[..., None, :], axis=-1)
        above = jnp.sum((values[..., :, None] < floor[..., None, :]) & real[..., None, :], axis=-1)
        n = jnp.sum(real, axis=-1, keepdims=True)
        return jnp.where(jnp.isnan(values), jnp.nan, (n + 1 + below - above).astype(jnp.float32) / 2.0)

    return _pearson(ranks(x, exact[0]), ranks(y, exact[1]), real)


def _host_ranks(values: Float[np.ndarray, "... N"], dtype: Any) -> Float[np.ndarray, "... N"]:
    """The ranks of `spearman`, NaN in rows that hold one. Floors ascend as values do, so that counting is searching."""
    share = _share(dtype)
    if share == _share(np.float32):
        values = values.astype(np.float32)  # whose floors then are those of the array function
    ranks = np.full(values.shape, np.nan)
    n = values.shape[-1]
    for row in np.ndindex(values.shape[:-1]):
        if not np.isnan(values[row]).any():
            ascending = np.sort(values[row])
            below = np.searchsorted(ascending, _floor(values[row], share), "left")
            above = n - np.searchsorted(_floor(ascending, share), values[row], "right")
            ranks[row] = (n + 1 + below - above) / 2
    return ranks


def _floor(values: Any, share: float) -> Any:
    """What is smaller than this is below a value, and not level with it; infinities are level with themselves alone."""
    return values - share * abs(values).clip(max=np.finfo(values.dtype).max)


def _share(dtype: Any) -> float:
    """How far apart ties may be, over their size: roundings of what a type is computed in; 0 for integers and bool."""
    if np.dtype(dtype).kind in "iub":
        return 0.0
    return _ROUNDINGS * float(np.finfo(np.float64 if dtype == np.float64 else np.float32).eps)


def _exact(values: Any) -> bool:
    """Whether all are integers (or bool), which are not rounded."""
    return all(_share(jnp.result_type(leaf)) == 0 for leaf in jax.tree.leaves(values))


def _norms_and_entropy(capture: AttentionCapture, ignore_first: int) -> tuple[Array, Array, Array]:
    norms, entropy = NormAnalysis.q_norms(capture), EntropyAnalysis.token_entropy(capture)
    real = real_tokens(capture, ignore_first)
    if (n := real.shape[0] - ignore_first) < 2:
        raise ValueError(f"A correlation needs at least 2 tokens, and {n} is left after ignore_first = {ignore_first}.")
    return norms, entropy, real


def _chosen(method: str, methods: dict[str, Any]) -> Any:
    if method not in methods:
        raise ValueError(f"method is {method!r}, and must be {' or '.join(map(repr, methods))}.")
    return methods[method]


def _samples(x: Any, y: Any, axis: int) -> tuple[Array, Array]:
    x, y = (jnp.asarray(side, jnp.float32) for side in (x, y))
    _check_samples(x, y, axis)
    return jnp.moveaxis(x, axis, -1), jnp.moveaxis(y, axis, -1)


def _host_samples(x: Any, y: Any, axis: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = (np.asarray(side, np.float64) for side in (x, y))
    _check_samples(x, y, axis)
    return np.moveaxis(x, axis, -1), np.moveaxis(y, axis, -1)


def _check_samples(x: Any, y: Any, axis: int) -> None:
    if x.shape != y.shape:
        raise ValueError(f"x has shape {list(x.shape)} and y {list(y.shape)}; they must be the same.")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis is {axis}, but the arrays have {x.ndim} axes.")
    if x.shape[axis] < 2:
        raise ValueError(f"A correlation needs at least 2 samples, and axis {axis} has {x.shape[axis]}.")
