"""`soft_top_k`: its sum, its ends, its derivatives, and theorem 1 of Matryoshka attribution (arXiv:2609.25518)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import expit

from oculi_jax.training import soft_top_k

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("n", [1, 7, 1500])
@pytest.mark.parametrize("temperature", [1e-3, 0.5, 30.0])
def test_it_sums_to_k_and_is_nothing_and_all_at_the_ends(n: int, temperature: float) -> None:
    scores = (3 * RNG.normal(size=n)).astype(np.float32)
    shares = np.array([0.0, 1e-3, 0.2, 0.5, 0.77, 0.999, 1.0]) * n
    masks = jax.vmap(lambda k: soft_top_k(scores, k, temperature))(shares.astype(np.float32))
    assert np.abs(np.asarray(masks, np.float64).sum(axis=1) - shares.astype(np.float32)).max() <= 1e-6 * max(n, 1)
    np.testing.assert_array_equal(masks[0], np.zeros(n))
    np.testing.assert_array_equal(masks[-1], np.ones(n))
    assert (masks >= 0).all() and (masks <= 1).all()
    assert (np.diff(masks, axis=0) >= -1e-6).all()  # of a larger k every entry is larger: the masks are nested
    order = np.argsort(scores)
    assert (np.diff(np.asarray(masks)[:, order], axis=1) >= -1e-6).all()


def test_its_threshold_is_the_root() -> None:
    scores = RNG.normal(size=(4, 5))
    with jax.enable_x64(True):
        for k, temperature in ((0.3, 0.5), (7, 0.1), (19.5, 2.0)):
            tau = brentq(lambda t: expit((scores - t) / temperature).sum() - k, -99, 99, xtol=1e-15, rtol=1e-15)  # noqa: B023
            want = expit((scores - tau) / temperature)
            np.testing.assert_allclose(soft_top_k(scores, k, temperature), want, atol=1e-13)
            assert abs(float(soft_top_k(scores, k, temperature).sum()) - k) <= 1e-12


def test_a_small_temperature_keeps_the_largest() -> None:
    np.testing.assert_allclose(soft_top_k([0.3, 2.0, -1.0, 0.9], 2, 1e-4), [0, 1, 0, 1], atol=1e-6)
    np.testing.assert_allclose(soft_top_k([1.0, 1.0, 0.0, 1.0], 1.5, 1e-2), [0.5, 0.5, 0, 0.5], atol=1e-6)


def test_its_derivatives_are_finite_differences() -> None:
    """With respect to the scores, k and the temperature, and once more; in float64, to 1e-8."""
    scores, weights = RNG.normal(size=9), RNG.normal(size=9)
    with jax.enable_x64(True):

        def value(s: Any, k: Any, t: Any) -> Any:
            return (jnp.sin(soft_top_k(s, k, t) * 3) * weights).sum()

        at, step = (jnp.asarray(scores), jnp.float64(3.3), jnp.float64(0.4)), 1e-5
        slopes = jax.jit(jax.grad(value, (0, 1, 2)))(*at)
        for number, slope in enumerate(slopes):
            for place in np.ndindex(np.shape(at[number])):
                ends = []
                for sign in (2, 1, -1, -2):  # five points: the error is of the fourth order
                    moved = list(at)
                    moved[number] = at[number].at[place].add(sign * step) if place else at[number] + sign * step
                    ends.append(float(value(*moved)))
                want = (-ends[0] + 8 * ends[1] - 8 * ends[2] + ends[3]) / (12 * step)
                assert abs(float(slope[place]) - want) <= 1e-8
        m = soft_top_k(*at)
        bend, g = m * (1 - m), 3 * np.cos(3 * m) * weights
        np.testing.assert_allclose(slopes[0], bend / 0.4 * (g - (g @ bend) / bend.sum()), atol=1e-12)
        turn = RNG.normal(size=9)
        twice = jax.jvp(jax.grad(value), at, (jnp.asarray(turn), jnp.float64(0), jnp.float64(0)))[1]
        near = [jax.grad(value)(at[0] + sign * step * turn, *at[1:]) for sign in (1, -1)]
        np.testing.assert_allclose(twice, (near[0] - near[1]) / (2 * step), atol=1e-7)


def test_theorem_1_the_first_step_is_centred_weighted_integrated_gradients() -> None:
    """At scores of zero the mask is k/n everywhere. So over k uniform on [0, n], the expected gradient of the scores is the
    gradient along the diagonal of the mask, integrated with weight Beta(2, 2), less its mean over units, over 6 temperatures.

    The function is a polynomial of the mask, so that quadrature is exact on both sides; its gradient is NumPy's, by hand.
    """
    n, temperature = 6, 0.5
    a, b, c = RNG.normal(size=n), RNG.normal(size=(n, n)), RNG.normal(size=n)
    nodes, weights = np.polynomial.legendre.leggauss(12)
    shares, weights = (nodes + 1) / 2, weights / 2

    def gradient(m: np.ndarray) -> np.ndarray:
        return a + (b + b.T) @ m + 3 * c * (c @ m) ** 2

    with jax.enable_x64(True):

        def value(scores: Any, k: Any) -> Any:
            m = soft_top_k(scores, k, temperature)
            return m @ a + m @ b @ m + (m @ c) ** 3

        slopes = jax.vmap(jax.grad(value), (None, 0))(jnp.zeros(n), jnp.asarray(shares * n))
        expected = weights @ np.asarray(slopes)
    beta = 6 * shares * (1 - shares)
    path = (weights * beta) @ np.array([gradient(np.full(n, share)) for share in shares])
    np.testing.assert_allclose(expected, (path - path.mean()) / (6 * temperature), rtol=0, atol=1e-12)
    assert np.abs(expected).max() > 0.1


def test_it_maps_and_its_gradient_is_finite_everywhere() -> None:
    scores = RNG.normal(size=(3, 5)).astype(np.float32)
    many = jax.vmap(soft_top_k, (0, 0, None))(scores, np.array([1, 2, 3]), 0.5)
    for row, k, found in zip(scores, (1, 2, 3), many, strict=True):
        np.testing.assert_allclose(found, soft_top_k(row, k, 0.5), atol=1e-6)
    for k in (0, 1, 2.5, 5):
        for temperature in (1e-6, 1.0):
            slope = jax.grad(lambda *x: (soft_top_k(*x) ** 2).sum(), (0, 1, 2))(scores[0], float(k), temperature)
            assert all(np.isfinite(x).all() for x in slope), (k, temperature)


def test_what_cannot_be_is_told() -> None:
    for given, error, message in (
        (([], 0, 1.0), ValueError, r"scores has shape \[0\]: there is nothing to keep"),
        (([1.0, 2.0], 3, 1.0), ValueError, "k is 3, and must be from 0 to 2, the number of scores"),
        (([1.0, 2.0], -1, 1.0), ValueError, "k is -1"),
        (([1.0, 2.0], [1, 1], 1.0), ValueError, r"k has shape \[2\], and one number is needed: map"),
        (([1.0, 2.0], True, 1.0), TypeError, "k is True, and a number"),
        (([1.0, 2.0], 1, 0.0), ValueError, "temperature is 0.0, and must be above 0"),
        ((["a"], 1, 1.0), TypeError, "scores is an array of"),
    ):
        with pytest.raises(error, match=message):
            soft_top_k(*given)
