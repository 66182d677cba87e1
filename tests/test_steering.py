"""Directions, by means and by probes: beside NumPy and SciPy's minimisers; controls at chance; and where there is nothing to find."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from scipy.optimize import minimize

from oculi_jax import forward, padded, sweep
from oculi_jax.intervention import DirectionAblation, Steer
from oculi_jax.metrics import logit_difference
from oculi_jax.training import Direction, difference_of_means, linear_probe, logistic_probe

from .tiny import prompt, tiny_llama

MODEL, T, N = tiny_llama(), 7, 40
KEY = jax.random.key(0)
SETTINGS: dict[str, Any] = dict(key=KEY, held_out=0.5)


@cache
def prompts() -> tuple[np.ndarray, np.ndarray]:
    """Random tokens; in the positive ones the last but one is 5, in the negative ones it is not."""
    rows = np.stack([prompt(T, seed) for seed in range(2 * N)])
    rows[:, -2] = np.where(rows[:, -2] == 5, 6, rows[:, -2])
    rows[:N, -2] = 5
    return rows[:N], rows[N:]


@cache
def streams() -> np.ndarray:
    """`resid_pre` of whole runs, one after another, `[2 N, L, T, E]`."""
    run = jax.jit(lambda ids: forward(MODEL, ids, capture="resid_pre")["resid_pre"])
    return np.stack([np.asarray(run(row), np.float64) for part in prompts() for row in part])


def split(found: Direction) -> tuple[np.ndarray, np.ndarray]:
    """Which prompts are positive, and which it was fitted on."""
    fitted = np.ones(2 * N, bool)
    fitted[found.held_out] = False
    return np.arange(2 * N) < N, fitted


def test_it_is_the_difference_of_means_and_judged_on_prompts_that_it_never_saw() -> None:
    found = difference_of_means(MODEL, *prompts(), positions=[-2, -1], **SETTINGS)
    own, fitted = split(found)
    assert found.vector.shape == (3, 2, 24) and (own[found.held_out].sum(), len(found.held_out)) == (N // 2, N)
    for layer in range(3):
        for p, position in enumerate((-2, -1)):
            x = streams()[:, layer, position]
            want = x[own & fitted].mean(axis=0) - x[~own & fitted].mean(axis=0)
            np.testing.assert_allclose(found.vector[layer, p], want, atol=1e-4)
            scores = x @ want
            first, second = scores[own & ~fitted][:, None], scores[~own & ~fitted]
            pairs = (first > second) + 0.5 * (first == second)
            np.testing.assert_allclose(found.auroc.mean[layer, p], pairs.mean(), atol=2e-3)
            middle = (x[own & fitted].mean(axis=0) + x[~own & fitted].mean(axis=0)) @ want / 2
            np.testing.assert_allclose(found.at(layer, position).scores(x), scores - middle, atol=1e-3)
            right = ((scores > middle) == own)[~fitted]
            np.testing.assert_allclose(found.accuracy.mean[layer, p], right.mean(), atol=2.5e-2)
    assert float(found.auroc.mean[0, 0]) == 1  # the embedding of a token


def test_controls_are_at_chance_where_they_are_to_be() -> None:
    found = difference_of_means(MODEL, *prompts(), layers=0, positions=[-2, -1], **SETTINGS)
    assert set(found.controls) == {"random direction", "shuffled labels", "untrained model"}
    assert abs(float(found.controls["shuffled labels"].mean[0]) - 0.5) < 0.1
    # Embeddings of another token are enough to tell them apart in any model; before attention, nothing else is.
    assert float(found.controls["untrained model"].mean[0]) == 1
    assert float(found.auroc.mean[0]) == 1 and 0.5 < float(found.controls["random direction"].mean[0]) < 1
    assert abs(float(found.auroc.mean[1]) - 0.5) < 0.25  # at the last token of layer 0 there is nothing to find
    text = repr(found)
    assert text.count("random direction") == text.count("untrained model") == 2
    assert "layer 0, position -2: 1.00 (1.00 to 1.00)" in text and "40 held-out prompts" in text
    none = difference_of_means(MODEL, *prompts(), layers=0, controls=False, **SETTINGS)
    assert none.controls == {} and none.vector.shape == (24,)


def minimum(x: np.ndarray, own: np.ndarray, penalty: float, logistic: bool) -> np.ndarray:
    """Weights and bias by SciPy, from the objective as its docstring writes it."""
    s2 = ((x - x.mean(axis=0)) ** 2).mean()
    y = np.where(own, 1.0, -1.0)

    def value(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        w, b = parameters[:-1], parameters[-1]
        z = x @ w + b
        if logistic:
            outer, total = -y / (1 + np.exp(y * z)), np.logaddexp(0, -y * z).mean() + penalty * s2 * (w @ w) / 2
            slope = outer @ x / len(x) + penalty * s2 * w
        else:
            outer, total = 2 * (z - y), ((y - z) ** 2).mean() + penalty * s2 * (w @ w)
            slope = outer @ x / len(x) + 2 * penalty * s2 * w
        return total, np.append(slope, outer.mean())

    start = np.zeros(x.shape[1] + 1)
    done = minimize(value, start, jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 20_000})
    return done.x


@pytest.mark.parametrize("logistic", [False, True])
@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_probes_are_the_minima_of_their_objectives(logistic: bool, penalty: float) -> None:
    fit = logistic_probe if logistic else linear_probe
    found = fit(MODEL, *prompts(), layers=[1, 2], penalty=penalty, controls=False, **SETTINGS)
    own, fitted = split(found)
    for n, layer in enumerate((1, 2)):
        want = minimum(streams()[fitted, layer, -1], own[fitted], penalty, logistic)
        size = np.abs(want[:-1]).max()
        np.testing.assert_allclose(found.vector[n], want[:-1], atol=2e-3 * size)
        np.testing.assert_allclose(found.bias[n], want[-1], atol=2e-3 * max(1, abs(want[-1])))
        right = ((streams()[~fitted, layer, -1] @ want[:-1] + want[-1] > 0) == own[~fitted]).mean()
        np.testing.assert_allclose(found.accuracy.mean[n], right, atol=2.5e-2)


def test_a_probe_of_labels_without_meaning_is_at_chance() -> None:
    """Many more dimensions than prompts to fit on: it can learn any labels, and says nothing of other prompts."""
    rows = np.concatenate(prompts())
    mixed = rows[np.random.default_rng(1).permutation(2 * N)]
    found = logistic_probe(MODEL, mixed[:N], mixed[N:], layers=1, positions=None, **SETTINGS)
    assert abs(float(found.auroc.mean) - 0.5) < 0.25
    assert abs(float(found.controls["shuffled labels"].mean) - 0.5) < 0.1


def test_padding_changes_nothing_and_a_mean_is_over_real_tokens() -> None:
    rows = [[*row[: 4 + n % 4], 5 if n < N else 6] for n, row in enumerate(np.concatenate(prompts()).tolist())]
    (first, first_mask), (second, second_mask) = padded(rows[:N]), padded(rows[N:])
    masks = dict(positive_mask=first_mask, negative_mask=second_mask)
    found = difference_of_means(MODEL, first, second, layers=1, positions=None, controls=False, **masks, **SETTINGS)
    own, fitted = split(found)
    run = jax.jit(lambda ids: forward(MODEL, ids, capture="resid_pre")["resid_pre"][1].mean(axis=0))
    means = np.stack([np.asarray(run(np.array(row, np.int32))) for row in rows])
    want = means[own & fitted].mean(axis=0) - means[~own & fitted].mean(axis=0)
    np.testing.assert_allclose(found.vector, want, atol=1e-4)


def test_it_steers_ablates_and_one_place_is_one_of_many() -> None:
    found, metric, ids = (
        difference_of_means(MODEL, *prompts(), positions=[-2, -1], controls=False, **SETTINGS),
        logit_difference(3, 7),
        prompt(),
    )
    family = sweep(MODEL, ids, found.steer(2.0), metric)
    assert family.shape == (3, 2)
    one = found.at(2, -1)
    assert one.layers == 2 and one.positions == -1 and one.vector.shape == (24,)
    np.testing.assert_array_equal(one.vector, found.vector[2, 1])
    alone = metric(forward(MODEL, ids, Steer(2, found.vector[2, 1], 2.0)))
    np.testing.assert_allclose(family[2, 1], alone, atol=1e-3)
    np.testing.assert_allclose(metric(forward(MODEL, ids, one.steer(2.0))), alone, atol=1e-3)
    gone = forward(MODEL, ids, DirectionAblation("resid_pre", 2, one.vector), capture="resid_pre")["resid_pre"][2]
    np.testing.assert_allclose(gone @ one.vector, 0, atol=1e-3)
    with pytest.raises(ValueError, match=r"position is None, and this direction was read at \[-2, -1\]"):
        found.at(2)
    with pytest.raises(ValueError, match=r"layer is 3, and this direction was read at \[0, 1, 2\]"):
        found.at(3, -1)


def test_what_cannot_be_is_told() -> None:
    positive, negative = prompts()
    for changes, message in (
        ({"positive": positive[:3]}, r"positive has shape \[3, 7\], and prompts \[B, T\] are needed, four at least"),
        ({"negative": negative[0]}, r"negative has shape \[7\]"),
        ({"negative": [[1, 61]] * 4}, r"negative\[1\] is 61, and this model's vocabulary"),
        ({"negative_mask": np.ones(3, bool)}, r"negative_mask has shape \[3\], and negative \["),
        ({"layers": 3}, "layers is 3, and must be 0 to 2"),
        ({"layers": []}, "layers is empty"),
        ({"positions": [-1, -1]}, r"positions holds \[-1, -1\]: each once is enough"),
        ({"positions": 9}, "position"),
        ({"site": "z"}, "one row of features for each token is needed: it has heads"),
        ({"site": "embed"}, "it lies outside the layers"),
        ({"site": "resid"}, "Unknown site 'resid'"),
        ({"held_out": "0.5"}, "held_out is '0.5', and must be a share"),
        ({"held_out": 1.5}, "held_out is 1.5, and must be a share"),
        ({"positive_mask": np.arange(T)[None] < np.full((N, 1), 1), "positions": -3}, r"positive\[0\] has no finite values"),
    ):  # fmt: skip
        options: dict[str, Any] = {"positive": positive, "negative": negative, "key": KEY, **changes}
        with pytest.raises(ValueError, match=message):
            difference_of_means(MODEL, options.pop("positive"), options.pop("negative"), **options)
    with pytest.raises(TypeError, match="called inside a trace"):
        jax.jit(lambda ids: difference_of_means(MODEL, ids, negative, **SETTINGS).vector)(positive)
    with pytest.raises(ValueError, match="penalty is 1e-300, and too small"):
        logistic_probe(MODEL, positive, negative, layers=1, penalty=1e-300, **SETTINGS)
    with pytest.raises(ValueError, match="penalty is 0, and a number above 0 is needed"):
        linear_probe(MODEL, positive, negative, penalty=0, **SETTINGS)
    found = difference_of_means(MODEL, positive, negative, layers=[0, 1], controls=False, **SETTINGS)
    with pytest.raises(ValueError, match="directions of several places"):
        found.scores(np.ones(24))
    with pytest.raises(ValueError, match=r"values has shape \[23\], and must end in the 24 of resid_pre"):
        found.at(0).scores(np.ones(23))
