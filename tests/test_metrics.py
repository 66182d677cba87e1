"""Metrics: their laws under padding, jit, vmap and grad; golden numbers from SciPy, from loops, and in closed form."""

from __future__ import annotations

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from oculi_jax import Output, forward
from oculi_jax.intervention import HeadAblation, QScaler
from oculi_jax.metrics import (
    Interval,
    Metric,
    bootstrap,
    cross_entropy,
    kl_divergence,
    log_probability,
    logit_difference,
    probability,
    pytree,
    rank,
)

from .margins import assert_clear
from .tiny import prompt, tiny_llama
from .tolerances import GRADIENT, ROUNDING, ROUTES

V, LENGTH = 61, 11
RNG = np.random.default_rng(5)
ROWS = (3 * RNG.normal(size=(LENGTH, V))).astype(np.float32)
OTHER = (3 * RNG.normal(size=V)).astype(np.float32)
WIDE = scipy.special.log_softmax(ROWS.astype(np.float64), axis=-1)
CONTINUATION = [5, 60, 0, 17]

near = partial(np.testing.assert_allclose, atol=ROUNDING, rtol=ROUNDING)


def output(logits, mask=None) -> Output:
    return Output(None if logits is None else jnp.asarray(logits), {}, jnp.zeros(0, jnp.int32), mask)


def each(position: int = -1) -> dict[str, Metric]:
    """One metric of each kind that reads one position."""
    return {
        "logit_difference": logit_difference(7, 40, position),
        "log_probability": log_probability(7, position),
        "probability": probability(7, position),
        "rank": rank(7, position),
        "kl_divergence": kl_divergence(OTHER, position),
    }


@jax.jit
def values(metrics: dict[str, Metric], out: Output) -> dict[str, jax.Array]:
    return {name: metric(out) for name, metric in metrics.items()}


def golden(position: int) -> dict[str, float]:
    row, log_q = ROWS[position].astype(np.float64), WIDE[position]
    log_p = scipy.special.log_softmax(OTHER.astype(np.float64))
    return {
        "logit_difference": row[7] - row[40],
        "log_probability": log_q[7],
        "probability": scipy.special.softmax(row)[7],
        "rank": sum(1 for logit in row if logit > row[7]),
        "kl_divergence": scipy.stats.entropy(np.exp(log_p), np.exp(log_q)),
    }


@pytest.mark.quick
@pytest.mark.parametrize("position", [-1, 2])
def test_values_are_those_of_scipy(position: int) -> None:
    want = golden(position)
    for name, metric in each(position).items():
        got = metric(output(ROWS))
        near(got, want[name], err_msg=name)
        assert got.shape == () and got.dtype == (jnp.int32 if name == "rank" else jnp.float32)
        rows = ROWS[[position]] if metric.ids is None else ROWS[[position]][:, metric.ids]
        near(metric.of(jnp.asarray(rows)), want[name], err_msg=name)
        assert metric.positions == (position,)
    assert [name for name, metric in each().items() if metric.ids is not None] == ["logit_difference"]
    np.testing.assert_array_equal(logit_difference(7, 40).ids, [7, 40])


def test_cross_entropy_reads_what_predicts_each_token() -> None:
    tokens = prompt()
    tokens[-4:] = CONTINUATION
    want = -np.mean([WIDE[t - 1, tokens[t]] for t in range(LENGTH - 4, LENGTH)])
    metric = cross_entropy(CONTINUATION)
    near(metric(output(ROWS)), want)
    near(metric.of(jnp.asarray(ROWS[-5:-1])), want)
    assert metric.positions == (-5, -4, -3, -2) and metric.ids is None
    # One token: the log-probability of the last, at the position before it.
    near(cross_entropy([17])(output(ROWS)), -log_probability(17, -2)(output(ROWS)))


def test_a_confident_prediction_keeps_its_digits() -> None:
    """−log p = log(1 + 60 e⁻¹²), which a difference of numbers near 1000 would not know."""
    logits = np.full((1, V), 1000.0, np.float32)
    logits[0, 3] += 12
    near(-log_probability(3)(output(logits)), math.log1p(60 * math.exp(-12)), rtol=0)


def test_divergence_is_zero_at_itself_exact_when_tiny_and_infinite_where_something_is_excluded() -> None:
    for scale in (1e-4, 1e-2, 0.3):
        moved = OTHER + scale * ROWS[0]
        log_p, log_q = (scipy.special.log_softmax(x.astype(np.float64)) for x in (OTHER, moved))
        # Only rounding of the logits themselves, a part in 10⁷ of 10, stands between the two.
        want, rounding = np.sum(np.exp(log_p) * (log_p - log_q)), 1e-6 / scale
        np.testing.assert_allclose(kl_divergence(OTHER)(output(moved[None])), want, rtol=ROUNDING + rounding)
    assert kl_divergence(OTHER)(output(OTHER[None])) == 0
    assert kl_divergence(OTHER)(output(OTHER[None] + 8)) < 1e-9  # the logits' common offset says nothing
    assert kl_divergence(ROWS[0])(output(OTHER[None])) != kl_divergence(OTHER)(output(ROWS[:1]))
    half = np.array([0.0, 0.0, -np.inf], np.float32)
    near(kl_divergence(half)(output(np.zeros((1, 3), np.float32))), math.log(3 / 2))
    assert kl_divergence(np.zeros(3, np.float32))(output(half[None])) == np.inf
    assert kl_divergence(half)(output(half[None])) == 0
    slope = jax.grad(lambda x: kl_divergence(half).of(x[None]))(jnp.zeros(3))
    near(slope, np.exp([-math.log(3)] * 3) - [0.5, 0.5, 0])  # q − p


def test_rank_counts_ties_for_nobody_and_has_no_answer_for_nan() -> None:
    logits = np.array([[2.0, 5.0, 2.0, 1.0, 5.0]], np.float32)
    assert [int(rank(i)(output(logits))) for i in range(5)] == [2, 0, 2, 4, 0]
    logits[0, 3] = np.nan
    assert [int(rank(i)(output(logits))) for i in range(5)] == [-1] * 5


@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_nothing(left: bool) -> None:
    real = np.arange(LENGTH + 3) >= 3 if left else np.arange(LENGTH + 3) < LENGTH
    rows = np.full((LENGTH + 3, V), 50.0, np.float32)
    rows[real] = ROWS
    padded, plain = output(rows, jnp.asarray(real)), output(ROWS)
    metrics = {f"{name} {i}": metric for i in (-1, -4, 0, 10) for name, metric in each(i).items()}
    metrics["cross_entropy"] = cross_entropy(CONTINUATION)
    jax.tree.map(near, values(metrics, padded), values(metrics, plain))
    near(kl_divergence(padded, 4).baseline, ROWS[4])
    # Beyond the real tokens, though within the array: no value rather than a padding row's.
    for position in (LENGTH, -LENGTH - 1):
        for name, value in values(each(position), padded).items():
            assert value == -1 if name == "rank" else np.isnan(value), name


@pytest.mark.numerical
def test_the_last_logits_are_enough_for_the_last_position() -> None:
    model, tokens = tiny_llama(), prompt()
    padded, real = np.concatenate([tokens, [0, 0]]), np.arange(LENGTH + 2) < LENGTH
    whole = forward(model, tokens)
    want = values(each(), whole)
    row = np.asarray(whole.logits[-1])
    assert_clear(np.delete(row, 7), row[7])  # for the rank
    for last in (forward(model, tokens, logits="last"), forward(model, padded, logits="last", mask=real)):
        jax.tree.map(partial(np.testing.assert_allclose, atol=ROUTES), values(each(), last), want)
        np.testing.assert_allclose(kl_divergence(last).baseline, whole.logits[-1], atol=ROUTES)


IDS = [3, np.int64(4), np.uint8(5), np.array(6), jnp.int32(7), jnp.asarray(8, jnp.uint8)]


@pytest.mark.quick
@pytest.mark.parametrize("make", [lambda i: logit_difference(i, 9), log_probability, lambda i: cross_entropy([i, 2])])
def test_other_ids_of_any_type_are_no_other_program(make) -> None:
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def program(metric: Metric, out: Output):
        return metric(out)

    metrics = [make(i) for i in IDS]
    got = [program(metric, output(ROWS)) for metric in metrics]
    near(got, [metric(output(ROWS)) for metric in metrics])
    assert len(set(map(float, got))) == len(IDS)


def test_ids_may_be_traced_and_batches_of_prompts_are_mapped() -> None:
    batch = (3 * RNG.normal(size=(3, LENGTH, V))).astype(np.float32)
    outs = jax.vmap(output)(batch)
    a, b, lists = [7, 0, 60], [1, 2, 3], RNG.integers(0, V, (3, 4))
    pairs = {
        "both": (logit_difference(a, b), [logit_difference(*pair) for pair in zip(a, b, strict=True)]),
        "one shared": (logit_difference(a, 9), [logit_difference(i, 9) for i in a]),
        "all shared": (logit_difference(4, 9), [logit_difference(4, 9)] * 3),
        "token": (rank(a, 2), [rank(i, 2) for i in a]),
        "baseline": (kl_divergence(batch[:, 0]), [kl_divergence(row[0]) for row in batch]),
        "continuation": (cross_entropy(lists), [cross_entropy(row) for row in lists]),
    }
    for name, (metric, singles) in pairs.items():
        axes = metric.per_prompt()
        assert type(axes) is type(metric)
        got = jax.jit(jax.vmap(lambda metric, out: metric(out), in_axes=(axes, 0)))(metric, outs)
        near(got, [single(output(row)) for single, row in zip(singles, batch, strict=True)], err_msg=name)
    one = pairs["one shared"][0]
    assert (one.per_prompt().a, one.per_prompt().b) == (0, None)
    np.testing.assert_array_equal(one.ids, [[7, 9], [0, 9], [60, 9]])
    with pytest.raises(ValueError, match=r"several prompts.*per_prompt"):
        one(output(ROWS))
    made = jax.vmap(lambda i, j: logit_difference(i, j)(output(ROWS)))(jnp.asarray(a), jnp.asarray(b))
    near(made, ROWS[-1][a] - ROWS[-1][b])
    near(jax.jit(lambda i: cross_entropy(i)(output(ROWS)))(lists[0]), pairs["continuation"][1][0](output(ROWS)))
    near(jax.jit(lambda i, j: cross_entropy([i, j])(output(ROWS)))(3, 4), cross_entropy([3, 4])(output(ROWS)))


def test_gradients_through_forward_are_finite_differences() -> None:
    model, tokens = tiny_llama(), prompt()
    value = jnp.asarray(RNG.normal(size=6), jnp.float32)
    direction = jnp.asarray(RNG.normal(size=6), jnp.float32)
    metrics = {**each(), "cross_entropy": cross_entropy(tokens[-3:])}
    del metrics["rank"]

    def run(value: jax.Array) -> jax.Array:
        return jnp.stack(jax.tree.leaves(values(metrics, forward(model, tokens, HeadAblation(1, 2, value)))))

    step = 0.02
    ends = jax.jit(jax.vmap(run))(jnp.stack([value + step * direction, value - step * direction]))
    got = jax.jit(jax.jacrev(run))(value) @ direction
    np.testing.assert_allclose(got, (ends[0] - ends[1]) / (2 * step), rtol=GRADIENT, atol=GRADIENT * 0.1)
    assert (abs(got) > 1e-3).sum() >= 4 and jnp.all(got != 0)


def test_an_id_beyond_the_vocabulary_is_nan_where_the_host_cannot_see_it_and_refused_where_it_can() -> None:
    for wrong in (V, 2**30, -1):
        seen = jnp.int32(wrong)  # on the device: not read
        for metric in (logit_difference(seen, 3), logit_difference(3, seen), log_probability(seen), probability(seen)):
            assert np.isnan(metric(output(ROWS)))
        assert np.isnan(log_probability(seen).of(jnp.asarray(ROWS[-1:])))
        assert np.isnan(cross_entropy(jnp.asarray([3, wrong]))(output(ROWS)))
        assert rank(seen)(output(ROWS)) == -1
    for metric in (logit_difference(3, V), rank(V), cross_entropy([3, V])):
        with pytest.raises(ValueError, match=r"is 61, and this model's vocabulary has ids 0 to 60"):
            metric(output(ROWS))
        with pytest.raises(ValueError, match="ids 0 to 60"):
            jax.jit(lambda logits, metric=metric: metric(output(logits)))(ROWS)


def test_no_metric_is_served_the_program_of_another() -> None:
    """Programs are looked up by tree definitions, so those of two kinds may never compare equal."""
    metrics = [*each().values(), cross_entropy(CONTINUATION)]
    trees = [jax.tree.structure(metric) for metric in metrics]
    for i, tree in enumerate(trees):
        assert [tree == other for other in trees] == [i == j for j in range(len(trees))]
    assert trees[0] == jax.tree.structure(logit_difference(1, 2)) != jax.tree.structure(logit_difference(1, 2, -2))
    plain = Interval(*map(jnp.float32, range(3)))
    assert jax.tree.structure(plain) not in map(jax.tree.structure, (QScaler(0, 0, 1.0), HeadAblation(0, 0, 1.0)))
    assert [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(metrics[0])] == [".a", ".b"]


def test_a_rebuilt_metric_is_not_checked() -> None:
    """Trees of axes, of shapes and of nothing are made of metrics by JAX and by its users."""
    for metric in (*each().values(), cross_entropy(CONTINUATION)):
        for leaf in (None, 0, object(), jax.ShapeDtypeStruct((), jnp.float32)):
            again = jax.tree.map(lambda _, leaf=leaf: leaf, metric)
            assert type(again) is type(metric) and repr(again)
        leaves, tree = jax.tree.flatten(metric)
        assert jax.tree.unflatten(tree, leaves).positions == metric.positions
        assert all(leaf.dtype in (np.int32, np.float32) for leaf in leaves)


def test_a_metric_of_ones_own() -> None:
    @pytree
    class Weighted(Metric):
        weights: jax.Array

        def of(self, logits):
            return jnp.vdot(self.weights, logits[0])

    metric = Weighted((-2,), jnp.asarray(OTHER))
    near(jax.jit(lambda metric: metric(output(ROWS)))(metric), np.dot(ROWS[-2].astype(np.float64), OTHER), rtol=1e-4)
    assert metric.ids is None and metric.per_prompt().weights is None

    @pytree
    class Nothing(Metric):
        pass

    with pytest.raises(NotImplementedError, match=r"Nothing defines no of\(logits\)"):
        Nothing((-1,))(output(ROWS))


REFUSALS = {
    "text": (lambda: log_probability(" Mary"), TypeError, "' Mary'.*tokenizer"),
    "bool": (lambda: rank(True), TypeError, "token is True.*integers"),
    "bool in a list": (lambda: cross_entropy([1, True]), TypeError, "continuation is.*integers"),
    "float": (lambda: logit_difference(3, 4.0), TypeError, r"b is 4\.0"),
    "traced float": (lambda: jax.jit(probability)(1.0), TypeError, "integers"),
    "negative": (lambda: logit_difference(-1, 3), ValueError, "a holds -1"),
    "beyond int32": (lambda: rank(2**40), ValueError, str(2**40)),
    "axes of id": (lambda: rank(np.zeros((2, 2), int)), ValueError, r"\[2, 2\].*one for each prompt"),
    "traced axes": (lambda: jax.jit(rank)(np.zeros((2, 2), int)), ValueError, r"\[2, 2\]"),
    "no prompts": (lambda: rank(np.zeros(0, int)), ValueError, r"shape \[0\]"),
    "unequal": (lambda: logit_difference([1, 2], [1, 2, 3]), ValueError, r"a has shape \[2\] and b \[3\]"),
    "scalar continuation": (lambda: cross_entropy(3), ValueError, r"shape \[\].*\[N\]"),
    "empty continuation": (lambda: cross_entropy(np.zeros(0, int)), ValueError, "continuation is empty"),
    "position": (lambda: rank(3, 1.0), TypeError, r"position is 1\.0"),
    "positions": (lambda: rank(3, [1]), TypeError, r"position is \[1\]"),
    "position of bool": (lambda: rank(3, True), TypeError, "position is True"),
    "baseline's dtype": (lambda: kl_divergence([1, 2, 3]), TypeError, "int64.*Output"),
    "baseline's axes": (lambda: kl_divergence(np.zeros((2, 2, 2))), ValueError, r"\[2, 2, 2\].*\[B, V\]"),
    "baseline of nan": (lambda: kl_divergence([0.0, np.nan]), ValueError, "holds NaN"),
    "baseline's logits": (lambda: kl_divergence(output(None)), ValueError, "baseline.*has none.*logits="),
    "baseline's position": (lambda: kl_divergence(output(ROWS), 11), ValueError, "baseline reads position 11"),
    "baseline's vocabulary": (lambda: kl_divergence(np.zeros(5))(output(ROWS)), ValueError, "logits of 5 tokens.*61"),
    "no logits": (lambda: rank(3)(output(None)), ValueError, "Rank reads logits.*has none.*logits="),
    "last logits": (lambda: rank(3, -2)(output(ROWS[0])), ValueError, "position -2.*last token alone"),
    "last logits, many": (lambda: cross_entropy([1, 2])(output(ROWS[0])), ValueError, "-3 to -2.*last token alone"),
    "position too far": (lambda: rank(3, 11)(output(ROWS)), ValueError, "position 11, and the prompt has 11 tokens.*0 to 10"),
    "too short": (lambda: cross_entropy(np.zeros(11, int))(output(ROWS)), ValueError, "-12 to -2, and the prompt has 11"),
    "bare logits": (lambda: rank(3)(ROWS), TypeError, "takes the Output of forward.*ndarray"),
    "batch": (lambda: rank(3)(jax.vmap(output)(ROWS[None])), ValueError, r"batch.*\[1, 11, 61\].*vmap"),
    "batch of last": (lambda: rank(3)(jax.vmap(output)(ROWS)), ValueError, r"batch.*\[11, 61\].*vmap"),
    "one prompt": (lambda: bootstrap([1.0]), ValueError, r"\[1\].*at least two prompts"),
    "no axis": (lambda: bootstrap(1.0), ValueError, r"\[\].*at least two prompts"),
    "complex": (lambda: bootstrap([1j, 2]), TypeError, "complex"),
    "percent": (lambda: bootstrap([1.0, 2], 95), ValueError, "confidence is 95.*0.95"),
    "resamples": (lambda: bootstrap([1.0, 2], n_resamples=0), ValueError, "n_resamples is 0"),
    "seed": (lambda: bootstrap([1.0, 2], seed=-1), ValueError, "seed is -1"),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_are_sentences(name: str) -> None:
    call, error, match = REFUSALS[name]
    with pytest.raises(error, match=match):
        call()


VALUES = (RNG.gamma(2.0, size=(40, 2, 3)) + np.arange(6).reshape(2, 3) * 100).astype(np.float32)


def test_bootstrap_is_scipys() -> None:
    """Chance moves the ends by about 1/40 of the width at 2000 resamples of each; the columns' offsets take no digits."""
    got = bootstrap(VALUES, 0.9, 20000)
    want = scipy.stats.bootstrap(
        (VALUES.astype(np.float64),),
        np.mean,
        axis=0,
        confidence_level=0.9,
        n_resamples=20000,
        method="percentile",
        rng=1,
    ).confidence_interval
    width = want.high - want.low
    near(got.mean, VALUES.astype(np.float64).mean(0))
    assert (abs(got.low - want.low) < 0.03 * width).all() and (abs(got.high - want.high) < 0.03 * width).all()


def test_bootstrap_of_two_prompts_in_closed_form() -> None:
    """Of 0 and 1: means 0, ½, 1 with chances ¼, ½, ¼."""
    ends = {0.4: (0.5, 0.5), 0.6: (0.0, 1.0), 0.95: (0.0, 1.0)}
    for confidence, (low, high) in ends.items():
        got = bootstrap([0.0, 1.0], confidence)
        assert (got.mean, got.low, got.high) == (0.5, low, high)


def test_bootstrap_is_a_function_of_its_arguments() -> None:
    plain = bootstrap(VALUES)
    same = jax.jit(bootstrap)(VALUES)
    jax.tree.map(near, same, plain)
    jax.tree.map(near, jax.tree.map(lambda x: x[1, 2], plain), bootstrap(VALUES[:, 1, 2]))  # the same prompts are drawn
    assert (bootstrap(VALUES, seed=1).low != plain.low).all()
    assert (bootstrap(VALUES, 0.5).low > plain.low).all()
    near(bootstrap(VALUES + 7).low, plain.low + 7)
    equal = bootstrap(np.full((5, 1), 0.1, np.float32))
    assert equal.low == equal.mean == equal.high
    wrong = VALUES.copy()
    wrong[3, 0, 0] = np.nan
    got = bootstrap(wrong)
    assert np.isnan([got.mean[0, 0], got.low[0, 0], got.high[0, 0]]).all()
    near(got.low[1], plain.low[1])
    ranks = bootstrap(np.array([0, 1, 5]))
    assert ranks.mean == 2 and ranks.low.dtype == jnp.float32
    many = bootstrap(np.tile(VALUES[:, :1, :1], (1, 1, 5000)), n_resamples=20)  # more than one block of columns
    assert many.low.shape == (1, 5000) and np.ptp(many.low) < 1e-6


def test_an_interval_reads_well() -> None:
    def interval(*ends: float) -> str:
        return repr(Interval(*map(jnp.float32, ends)))

    assert interval(0.5791, 0.51, 0.6402) == "0.5791 (0.51 to 0.6402)"
    assert interval(-1234.4, -1300, -1100) == "-1234 (-1300 to -1100)"
    assert interval(0.00123, 0.0011, 0.0014) == "0.00123 (0.0011 to 0.0014)"
    assert interval(3, 3, 3) == "3 (3 to 3)"
    assert interval(1, math.nan, math.nan) == "1 (nan to nan)"
    assert repr(bootstrap(VALUES)) == "Interval(mean, low and high [2, 3])"
    assert repr(jax.tree.map(lambda _: None, bootstrap(VALUES)))
    jax.jit(lambda x: repr(Interval(x, x, x)) and x)(jnp.float32(1))
