"""Correlation of two measurements: Pearson's and Spearman's coefficients, as arrays and with p-values."""

from __future__ import annotations

import warnings
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
    from ..capture.structures import AttentionCapture


class CorrelationAnalysis:
    """Correlation coefficients, −1…1; NaN (0/0) where either side is constant, as in scipy.

    The methods `…_with_pvalue` are host functions, in float64 by scipy; the others are for `jit`, `vmap` and `grad`.
    """

    @staticmethod
    def pearson(x: Any, y: Any, axis: int = -1) -> Float[Array, "..."]:
        """Pearson's r = Σ(x − x̄)(y − ȳ) / √(Σ(x − x̄)² Σ(y − ȳ)²) along an axis.

        Args:
            x, y: arrays of one shape, with at least 2 entries on `axis`.
            axis: the axis of the samples.

        Returns:
            Their shape without `axis`, float32. The gradient is finite wherever neither side is constant.

        Raises:
            ValueError: different shapes, or fewer than 2 samples.
        """
        x, y = _samples(x, y, axis)
        return _pearson(x, y, jnp.ones(x.shape, bool))

    @staticmethod
    def spearman(x: Any, y: Any, axis: int = -1) -> Float[Array, "..."]:
        """Spearman's ρ: Pearson's r of the ranks, ties sharing their mean rank.

        Arguments, shapes and errors as for `pearson`. Ranks are steps, so the gradient is 0.
        """
        x, y = _samples(x, y, axis)
        return _spearman(x, y, jnp.ones(x.shape, bool))

    @staticmethod
    def pearson_with_pvalue(x: Any, y: Any, axis: int = -1) -> tuple[np.ndarray, np.ndarray]:
        """Pearson's r and the two-sided p-value of no correlation, of samples that are normal. Host function.

        The p-value is that of r's own distribution (`scipy.stats.pearsonr`: a beta distribution), not of a normal
        approximation. Neighbouring tokens are not independent samples, so for tokens of one prompt it is too small.

        Args:
            x, y: arrays of one shape, with at least 2 entries on `axis`.
            axis: the axis of the samples.

        Returns:
            `(r, p)`, float64 NumPy arrays of that shape without `axis`.
        """
        from scipy import stats

        x, y = _host_samples(x, y, axis)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.ConstantInputWarning)  # NaN says it
            r, p = stats.pearsonr(x, y, axis=-1)
        return np.asarray(r), np.asarray(p)

    @staticmethod
    def spearman_with_pvalue(x: Any, y: Any, axis: int = -1) -> tuple[np.ndarray, np.ndarray]:
        """Spearman's ρ and the two-sided p-value of no monotonic relation. Host function.

        The p-value is that of `scipy.stats.spearmanr`: t = ρ √((n − 2) / (1 − ρ²)) under Student's distribution with
        n − 2 degrees of freedom, an approximation that is good from about 10 samples; NaN for 2.

        Arguments and returns as for `pearson_with_pvalue`.
        """
        from scipy import stats

        x, y = _host_samples(x, y, axis)
        x, y = (stats.rankdata(side, axis=-1) for side in (x, y))
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
            method: `"pearson"` or `"spearman"`.
            ignore_first: how many of the first tokens to leave out. The first has entropy 0 whatever its query, and
                often an unusual norm, so `1` may change much.

        Returns:
            `[L, H]`; below 0 where longer queries attend to fewer keys; NaN where entropy is constant.

        Raises:
            ValueError: fewer than 2 tokens, or another method.
        """
        correlate = _chosen(method, {"pearson": _pearson, "spearman": _spearman})
        norms, entropy, real = _norms_and_entropy(capture, ignore_first)
        return correlate(norms, entropy, jnp.broadcast_to(real[None, None, :], norms.shape))

    @staticmethod
    def norm_entropy_correlation_with_pvalue(
        capture: AttentionCapture, method: str = "pearson", ignore_first: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """`norm_entropy_correlation` and its p-values, float64 `[L, H]` each. Host function."""
        with_pvalue = _chosen(
            method,
            {
                "pearson": CorrelationAnalysis.pearson_with_pvalue,
                "spearman": CorrelationAnalysis.spearman_with_pvalue,
            },
        )
        norms, entropy, real = map(np.asarray, _norms_and_entropy(capture, ignore_first))
        return with_pvalue(norms[..., real], entropy[..., real])


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


def _spearman(x: Float[Array, "... N"], y: Float[Array, "... N"], real: Bool[Array, "... N"]) -> Float[Array, "..."]:
    def ranks(values: Array) -> Array:
        one, other = values[..., :, None], jnp.where(real, values, jnp.inf)[..., None, :]
        below = jnp.sum(other < one, axis=-1).astype(jnp.float32)
        level = jnp.sum(other == one, axis=-1).astype(jnp.float32)
        return jnp.where(jnp.isnan(values), jnp.nan, below + (level + 1.0) / 2.0)

    return _pearson(ranks(x), ranks(y), real)


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
