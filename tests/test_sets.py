"""Sets of prompts: each in the columns of its own tokens, what they share once, and every row the single run's."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from oculi_jax import buckets, forward, plan, sweep
from oculi_jax.buckets import MOST_PADDING, buckets_of
from oculi_jax.causal import attribution_patching
from oculi_jax.intervention import ActivationPatch, Edit, HeadAblation, PerLayer, PerPrompt, Steer
from oculi_jax.metrics import logit_difference
from oculi_jax.sweeps.sweeping import _prepare

from .compilations import compilations
from .tiny import prompt, tiny_llama
from .tolerances import ROUTES

MODEL = tiny_llama()
L, H, E, T = 3, 4, 24, 23
LENGTHS = (23, 9, 22, 10, 9)  # two buckets
B = len(LENGTHS)
A, OTHERS = np.arange(B) + 3, np.arange(B) + 20
METRIC = logit_difference(A, OTHERS)
RNG = np.random.default_rng(0)
VECTOR = RNG.normal(size=E).astype(np.float32)
VALUES = RNG.normal(size=(B, L, T, E)).astype(np.float32)
LAYERS = np.arange(L)[:, None]
# Name → the family, and, of a prompt, the single intervention at a place of its axes.
FAMILIES: dict[str, tuple[Any, Any]] = {
    "heads": (HeadAblation.grid(MODEL.config), lambda _, layer, head: HeadAblation(layer, head)),
    "everywhere": (
        Steer(LAYERS, VECTOR, np.linspace(1, 3, 6)),
        lambda _, layer, i: Steer(layer, VECTOR, np.linspace(1, 3, 6)[i]),
    ),
    "at the end": (
        Steer(LAYERS, VECTOR, 2.0, positions=np.arange(-1, -5, -1)),
        lambda _, layer, i: Steer(layer, VECTOR, 2.0, positions=-1 - i),
    ),
    "values of each prompt": (
        ActivationPatch("resid_mid", LAYERS, PerPrompt(PerLayer(VALUES)), positions=np.arange(9)[None]),
        lambda row, layer, i: ActivationPatch("resid_mid", layer, VALUES[row, layer], positions=int(i)),
    ),
}


def padded_set(side: str, common: int = 0) -> tuple[np.ndarray, np.ndarray]:
    tokens, mask = np.full((B, T), 60, np.int32), np.zeros((B, T), bool)
    for row, n in enumerate(LENGTHS):
        begin = {"right": 0, "left": T - n, "both": (T - n) // 2}[side]
        own = np.concatenate([prompt(common, 99), prompt(n, row)[common:]]) if common else prompt(n, row)
        tokens[row, begin : begin + n], mask[row, begin : begin + n] = own, True
    return tokens, mask


@pytest.fixture(autouse=True)
def small_jobs_are_cut_as_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oculi_jax.buckets.FLOPS_OF_A_PROGRAM", {"cpu": 1e5})


def singles(name: str, tokens: Any, mask: Any) -> np.ndarray:
    """One `forward` for each prompt and variant, with all columns: nothing cut, nothing shared, nothing reused."""
    family, make = FAMILIES[name]
    shape = plan(MODEL, tokens, family, METRIC, mask=mask).axes
    found = np.empty((B, *shape), np.float32)
    for row, *place in np.ndindex(found.shape):
        out = forward(MODEL, tokens[row], make(row, *place), mask=mask[row], logits="last")
        found[(row, *place)] = out.logits[A[row]] - out.logits[OTHERS[row]]
    return found


@pytest.mark.parametrize(("name", "side"), [("heads", "both"), ("everywhere", "right"), ("at the end", "left"),
                                            ("values of each prompt", "left")])  # fmt: skip
def test_a_sets_rows_are_single_runs_and_follow_its_order(name: str, side: str) -> None:
    tokens, mask = padded_set(side)
    family = FAMILIES[name][0]
    planned = plan(MODEL, tokens, family, METRIC, mask=mask, batch_size=4)
    assert planned.reuse and [part.n_tokens for part in planned.parts] == [24, 10]
    found = np.asarray(sweep(MODEL, tokens, family, METRIC, mask=mask, batch_size=4))
    np.testing.assert_allclose(found, singles(name, tokens, mask), rtol=ROUTES, atol=ROUTES)
    if name == "heads":
        order = np.array([3, 0, 1, 4, 2])
        again = sweep(MODEL, tokens[order], family, logit_difference(A[order], OTHERS[order]), mask=mask[order])
        np.testing.assert_allclose(again, found[order], rtol=ROUTES, atol=ROUTES)


@pytest.mark.parametrize(("name", "side"), [("heads", "left"), ("everywhere", "right")])
def test_a_common_beginning_is_run_once_for_each_variant(name: str, side: str) -> None:
    tokens, mask = padded_set(side, common=8)
    family = FAMILIES[name][0]
    planned = plan(MODEL, tokens, family, METRIC, mask=mask, batch_size=4)
    assert all(call.shared for call in planned.calls)
    assert "the first 8 tokens once for all prompts" in repr(planned)
    found = sweep(MODEL, tokens, family, METRIC, mask=mask, batch_size=4)
    np.testing.assert_allclose(found, singles(name, tokens, mask), rtol=ROUTES, atol=ROUTES)


@pytest.mark.quick
def test_what_depends_on_the_prompt_or_looks_ahead_shares_no_beginning() -> None:
    tokens, mask = padded_set("right", common=8)
    ahead = [Edit("allowed", "set", 1, value=True), HeadAblation.grid(MODEL.config)]
    own = Steer(LAYERS, PerPrompt(np.tile(VECTOR, (B, 1))), np.linspace(1, 3, 6))
    # Arrays along the columns hold other values at the beginnings of prompts that are padded on the left.
    along = ActivationPatch("resid_mid", LAYERS, PerLayer(VALUES[0]), positions=np.ones((1, T), bool))
    for family, side in ((ahead, "right"), (own, "right"), (along, "left")):
        tokens, mask = padded_set(side, common=8)
        planned = plan(MODEL, tokens, family, METRIC, mask=mask, batch_size=2)
        assert not any(call.shared for call in planned.calls)


@pytest.mark.parametrize("name", ["heads", "values of each prompt"])
def test_another_set_of_the_same_buckets_compiles_nothing(name: str) -> None:
    family = FAMILIES[name][0]
    first, second = padded_set("right"), padded_set("left")
    order = np.array([4, 2, 0, 1, 3])
    jax.clear_caches()  # whatever tests ran before
    with compilations() as compiled:
        sweep(MODEL, first[0], family, METRIC, mask=first[1], batch_size=2)
        assert compiled
        compiled.clear()
        sweep(MODEL, (second[0][order] + 7) % 60, family, METRIC, mask=second[1][order], batch_size=2)
        assert not compiled


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_function_of_an_output_sees_the_columns_as_they_were_given(side: str) -> None:
    tokens, mask = padded_set(side)

    def metric(out: Any) -> Any:
        return {"logits": out.logits[:, :5], "real": out.mask}

    found = sweep(MODEL, tokens, HeadAblation(1, np.arange(H)), metric, mask=mask)
    assert found["logits"].shape == (B, H, T, 5)
    assert (np.asarray(found["real"]) == mask[:, None]).all()
    for row in (0, 1):
        single = forward(MODEL, tokens[row], HeadAblation(1, 2), mask=mask[row]).logits[:, :5]
        real = mask[row][:, None]
        np.testing.assert_allclose(
            np.where(real, found["logits"][row, 2], 0), np.where(real, single, 0), rtol=ROUTES, atol=ROUTES
        )
    assert (np.asarray(found["logits"])[:, 2][~mask] == 0).all()


@pytest.mark.quick
def test_a_function_that_may_do_anything_is_given_all_columns() -> None:
    def turned(x: Any, _: Any) -> Any:
        return x[::-1]

    tokens, mask = padded_set("right")
    prepared = _prepare(MODEL, tokens, mask, Edit("mlp_out", "apply", np.arange(L), fn=turned), METRIC, None)
    assert not prepared.cut and prepared.tokens.shape == (B, T)


@pytest.mark.quick
@pytest.mark.parametrize("seed", range(8))
def test_buckets_hold_every_token_once_and_little_padding(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, width = int(rng.integers(1, 60)), int(rng.integers(1, 90))
    mask = np.zeros((n, width), bool)
    for row in mask:
        begin = int(rng.integers(0, width))
        row[begin : begin + int(rng.integers(1, width - begin + 1))] = True
    tokens = rng.integers(1, 1000, (n, width)).astype(np.int32)
    for worth in (0, 20, 1e9):
        found = buckets_of(mask, worth)
        assert sorted(np.concatenate([bucket.prompts for bucket in found])) == list(range(n))
        for bucket in found:
            own, kept = bucket.cut(tokens), bucket.cut(mask)
            assert own.shape == (len(bucket.prompts), bucket.n_tokens) and kept.mean() >= 1 - MOST_PADDING
            for row, number in enumerate(bucket.prompts):
                assert own[row][kept[row]].tolist() == tokens[number][mask[number]].tolist()


def test_attribution_of_a_set_is_that_of_its_pairs() -> None:
    sites = ("z", "attn_scale", "pattern", "embed")
    for side in ("left", "right"):
        tokens, mask = padded_set(side)
        other = np.where(mask & (np.arange(T) % 3 == 0), (tokens + 11) % 60, tokens)
        found = attribution_patching(MODEL, tokens, other, METRIC, sites, mask=mask)
        for row in (0, 1, 4):
            own = attribution_patching(
                MODEL, tokens[row], other[row], logit_difference(A[row], OTHERS[row]), sites, mask=mask[row]
            )
            for site in sites:
                np.testing.assert_allclose(found.values[site][row], own.values[site], rtol=1e-3, atol=ROUTES)
            np.testing.assert_allclose(found.clean[row], own.clean, rtol=ROUTES, atol=ROUTES)
    # A function sees the columns that were given.
    at_last = attribution_patching(MODEL, tokens, other, lambda out: out.logits[8, 3], "z", mask=mask)
    own = attribution_patching(MODEL, tokens[1], other[1], lambda out: out.logits[8, 3], "z", mask=mask[1])
    np.testing.assert_allclose(at_last.values["z"][1], own.values["z"], rtol=1e-3, atol=ROUTES)


@pytest.mark.quick
def test_under_a_trace_a_set_runs_whole() -> None:
    tokens, mask = padded_set("left")
    family = HeadAblation(np.arange(L), 1)
    expected = sweep(MODEL, tokens, family, METRIC, mask=mask)
    for call in (
        lambda x, m: sweep(MODEL, x, family, METRIC, mask=m),
        lambda x, _: sweep(MODEL, x, family, METRIC, mask=mask),
    ):
        np.testing.assert_allclose(jax.jit(call)(tokens, mask), expected, rtol=ROUTES, atol=ROUTES)


@pytest.mark.quick
def test_a_plan_says_what_lengths_run() -> None:
    tokens, mask = padded_set("right")
    said = repr(plan(MODEL, tokens, HeadAblation.grid(MODEL.config), METRIC, mask=mask))
    assert "5 prompts of 23 tokens in lengths of 10, 24" in said
    assert buckets.FLOPS_OF_A_PROGRAM == {"cpu": 1e5}
