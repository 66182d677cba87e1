"""Circuit detection: scores against their definitions in loops, a model whose circuit is known, and the diagnostic."""

from __future__ import annotations

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax import AttentionCapture, forward
from oculi_jax.analysis.circuits import PATTERNS, THRESHOLDS, CircuitDetection, even_scores
from oculi_jax.diagnostics import head_scores, repeated_tokens
from oculi_jax.intervention import HeadAblation
from oculi_jax.models.llama import LlamaAttentionAdapter

from .compilations import compilations
from .induction import HEADS, INDUCTION_HEAD, PREVIOUS_TOKEN_HEAD, induction_llama, repeated
from .margins import assert_clear, assert_leads
from .tiny import tiny_config, tiny_llama
from .tolerances import ROUNDING, ROUTES

MODEL = induction_llama()
SCORES = [name for name in PATTERNS if name != "unknown"]


def capture_of(patterns, tokens, mask=None, layers=None) -> AttentionCapture:
    n_layers, n_heads, n_tokens = patterns.shape[:3]
    return AttentionCapture(
        patterns=jnp.asarray(patterns, jnp.float32), tokens=jnp.asarray(tokens, jnp.int32),
        mask=jnp.ones(n_tokens, bool) if mask is None else jnp.asarray(mask),
        captured_layers=tuple(range(n_layers)) if layers is None else layers,
        n_heads=n_heads, n_kv_heads=n_heads, head_dim=4,
    )  # fmt: skip


def random_patterns(rng, n_layers: int, n_heads: int, mask) -> np.ndarray:
    """Random causal rows that sum to 1 over the real tokens, some entries exactly 0; zero on padding."""
    n_tokens = len(mask)
    raw = rng.exponential(size=(n_layers, n_heads, n_tokens, n_tokens)) ** 3
    raw *= rng.random(raw.shape) > 0.2
    raw += 1e-3 * np.eye(n_tokens)
    raw *= np.tril(np.ones((n_tokens, n_tokens))) * mask[:, None] * mask[None, :]
    return raw / np.maximum(raw.sum(-1, keepdims=True), 1e-30)


def by_definition(patterns: np.ndarray, tokens) -> dict[str, np.ndarray]:
    """The seven scores of a prompt without padding, as the docstrings say them, in loops."""
    tokens, n = [int(token) for token in tokens], len(tokens)
    values: dict[str, list[np.ndarray]] = {name: [] for name in SCORES}
    for t in range(n):
        row = np.asarray(patterns, np.float64)[:, :, t]
        earlier = [s for s in range(t) if tokens[s] == tokens[t]]
        if earlier:
            values["induction"].append(np.sum([row[..., s + 1] for s in earlier], axis=0))
            values["duplicate_token"].append(np.sum([row[..., s] for s in earlier], axis=0))
        if t >= 1:
            values["previous_token"].append(row[..., t - 1])
            values["bos"].append(row[..., 0])
            entropy = -np.sum([p * np.log(np.where(p > 0, p, 1)) for p in np.moveaxis(row, -1, 0)], axis=0)
            values["uniform"].append(entropy / math.log(t + 1))
        for name, near in (("recent", [t - 4, t - 3, t - 2, t - 1]), ("local", [t - 4, t - 3, t - 2, t - 1, t])):
            if min(near) >= 0 and t + 1 - len(near) >= len(near):
                values[name].append(np.sum([row[..., s] for s in near], axis=0))
    zero = np.zeros(patterns.shape[:2])
    return {name: np.mean(rows, axis=0) if rows else zero for name, rows in values.items()}


def assert_scores(found: dict, want: dict, tolerance: float = ROUNDING) -> None:
    assert set(found) == set(want) == set(SCORES)
    for name in want:
        np.testing.assert_allclose(found[name], want[name], atol=tolerance, rtol=0, err_msg=name)


def assert_classes_are_clear(capture: AttentionCapture) -> None:
    """No score is near the threshold that `classify` compares it with, so that every head's class is in no doubt."""
    scores, chance = CircuitDetection.scores(capture), even_scores(capture.tokens, capture.mask)
    for name, threshold in THRESHOLDS.items():
        floor = float(chance.get(name, 0.0))
        assert_clear(scores[name], floor + threshold * (1.0 - floor))


@pytest.mark.quick
@pytest.mark.parametrize("n_real", [1, 2, 3, 7, 8, 10, 23])
def test_scores_are_their_definitions_wherever_the_padding_is(n_real: int) -> None:
    """Padding before, after and between, holding ids that the prompt repeats."""
    rng = np.random.default_rng(n_real)
    mask = rng.permutation(np.arange(n_real + 6) < n_real)
    tokens = rng.integers(0, 5, n_real + 6)
    patterns = random_patterns(rng, 2, 3, mask)
    found = CircuitDetection.scores(capture_of(patterns, tokens, mask))
    assert_scores(found, by_definition(patterns[:, :, mask][..., mask], tokens[mask]))
    assert all(value.dtype == jnp.float32 and value.shape == (2, 3) for value in found.values())


def test_each_method_gives_its_score_and_does_not_apply_its_threshold() -> None:
    rng = np.random.default_rng(0)
    capture = capture_of(random_patterns(rng, 2, 3, np.ones(20, bool)), rng.integers(0, 6, 20))
    want = by_definition(np.asarray(capture.patterns), capture.tokens)
    for threshold in (0.0, 0.9):
        found = {
            "induction": CircuitDetection.detect_induction_heads(capture, threshold=threshold),
            "previous_token": CircuitDetection.detect_previous_token_heads(capture, threshold=threshold),
            "duplicate_token": CircuitDetection.detect_duplicate_token_heads(capture, threshold=threshold),
            **CircuitDetection.detect_positional_heads(capture),
        }
        assert_scores(found, want)


def test_a_batch_maps_row_by_row() -> None:
    rng = np.random.default_rng(0)
    masks = [np.arange(16) >= 5, np.arange(16) < 9, np.ones(16, bool)]
    rows = [capture_of(random_patterns(rng, 2, 3, mask) ** 4, rng.integers(0, 5, 16), mask) for mask in masks]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    scores, (codes, values) = jax.jit(
        lambda c: (jax.vmap(CircuitDetection.scores)(c), jax.vmap(CircuitDetection.classify)(c))
    )(batch)
    for i, row in enumerate(rows):
        assert_classes_are_clear(row)
        assert_scores({name: value[i] for name, value in scores.items()}, CircuitDetection.scores(row))
        want_codes, want_values = CircuitDetection.classify(row)
        np.testing.assert_array_equal(codes[i], want_codes)
        np.testing.assert_allclose(values[i], want_values, atol=ROUNDING)
    assert len(np.unique(codes)) > 1


def test_layers_are_true_numbers() -> None:
    rng = np.random.default_rng(0)
    patterns, tokens = random_patterns(rng, 3, 4, np.ones(16, bool)), rng.integers(0, 5, 16)
    whole = capture_of(patterns, tokens)
    some = capture_of(patterns[[2, 0]], tokens, layers=(2, 0))
    assert_classes_are_clear(whole)
    for layer in (0, 2):
        for number in range(4):
            want = CircuitDetection.classify_attention_head(whole, layer, number)
            found = CircuitDetection.classify_attention_head(some, layer, number)
            assert found["pattern"] == want["pattern"] and abs(found["score"] - want["score"]) < ROUNDING
    assert {item[0] for heads in CircuitDetection.summarize(some).values() for item in heads} == {0, 2}
    with pytest.raises(ValueError, match="Layer 1 was not captured; this capture has layers 2, 0"):
        CircuitDetection.classify_attention_head(some, 1, 0)
    with pytest.raises(ValueError, match="must be 0 to 3: there are 4 query heads"):
        CircuitDetection.classify_attention_head(some, 0, 4)
    with pytest.raises(ValueError, match="CaptureConfig\\(capture_patterns=True\\)"):
        CircuitDetection.summarize(dataclasses.replace(some, patterns=None))
    with pytest.raises(ValueError, match="This capture is a batch"):
        CircuitDetection.summarize(jax.tree.map(lambda leaf: leaf[None], some))


def test_scores_stay_within_one_where_rows_sum_to_more() -> None:
    """As rows of bfloat16 do: the number next to 1 is 1.0078."""
    patterns = np.zeros((1, 1, 20, 20), np.float32)
    patterns[..., 0] = 1.0078125
    capture = capture_of(patterns, np.arange(20))
    capture = dataclasses.replace(capture, patterns=capture.patterns.astype(jnp.bfloat16))
    score = CircuitDetection.detect_positional_heads(capture)["bos"]
    assert score.dtype == jnp.float32 and float(score[0, 0]) == 1.0


def test_gradients_are_finite_where_attention_is_exactly_zero() -> None:
    rng = np.random.default_rng(0)
    for n_tokens in (1, 12):
        patterns = random_patterns(rng, 1, 2, np.ones(n_tokens, bool))
        capture = capture_of(patterns, rng.integers(0, 3, n_tokens))
        total = jax.jit(
            lambda p, c: sum(v.sum() for v in CircuitDetection.scores(dataclasses.replace(c, patterns=p)).values())
        )
        grads = jax.grad(total)(capture.patterns, capture)
        assert np.isfinite(grads).all()
    assert (patterns == 0).any() and np.any(np.asarray(grads) != 0)


def head(target, n_tokens: int = 25) -> np.ndarray:
    """The pattern of a head that attends evenly to `target(t)`, a list of keys."""
    rows = [target(t) for t in range(n_tokens)]
    return np.stack([np.bincount(keys, minlength=n_tokens) / len(keys) for keys in rows])


# BOS, twelve ids, the same twelve again.
REPEATED = [0, *range(1, 13), *range(1, 13)]
IDEAL = {
    "previous_token": lambda t: [max(t - 1, 0)],
    "induction": lambda t: [t - 11 if t > 12 else 0],
    "bos": lambda t: [0],
    "duplicate_token": lambda t: [t - 12 if t > 12 else t],
    "recent": lambda t: list(range(max(t - 4, 0), max(t, 1))),
    "local": lambda t: [t],
    "uniform": lambda t: list(range(t + 1)),
    "unknown": lambda t: [max(t - 7, 0)],
}


def test_ideal_heads_are_classified_as_what_they_are() -> None:
    capture = capture_of(np.stack([head(target) for target in IDEAL.values()])[None], REPEATED, layers=(7,))
    assert_classes_are_clear(capture)
    for number, name in enumerate(IDEAL):
        found = CircuitDetection.classify_attention_head(capture, 7, number)
        assert found["pattern"] == name and (found["score"] > 0.999 if name != "unknown" else found["score"] == 0), (
            found
        )
    summary = CircuitDetection.summarize(capture)
    assert list(summary) == list(PATTERNS) and set(IDEAL) == set(PATTERNS)
    assert {name: [item[:2] for item in heads] for name, heads in summary.items()} == {
        name: [(7, number)] for number, name in enumerate(IDEAL)
    }


@pytest.mark.numerical
def test_the_order_of_patterns_settles_what_one_prompt_confounds() -> None:
    def found(tokens, target) -> str:
        capture = capture_of(head(target, len(tokens))[None, None], tokens)
        assert_classes_are_clear(capture)
        return CircuitDetection.classify_attention_head(capture, 0, 0)["pattern"]

    # A token that returns after one other: what followed it is the token before.
    assert found([1, 2] * 6, IDEAL["previous_token"]) == "previous_token"
    # The first token returns: attending to it always is no sign of matching.
    assert found([1, 2, 3, 4, 1, 5, 6, 7], IDEAL["bos"]) == "bos"
    # In a short prompt, even attention puts a third on what followed, which is no induction.
    assert found([1, 2, 1], IDEAL["uniform"]) == "uniform"
    assert found([1, 2, 1], lambda t: [[0], [1], [0, 1]][t]) == "unknown"
    assert found([1, 2, 1], IDEAL["previous_token"]) == "previous_token"
    assert found([1, 2, 3, 1], lambda t: [[0], [1], [2], [1]][t]) == "induction"


def test_summary_is_sorted_and_complete() -> None:
    rng = np.random.default_rng(1)
    capture = capture_of(random_patterns(rng, 3, 5, np.ones(12, bool)) ** 8, rng.integers(0, 5, 12), layers=(4, 1, 9))
    rows = np.asarray(capture.patterns)
    capture = dataclasses.replace(capture, patterns=jnp.asarray(rows / rows.sum(-1, keepdims=True)))
    assert_classes_are_clear(capture)
    summary = CircuitDetection.summarize(capture)
    assert sorted(item[:2] for heads in summary.values() for item in heads) == [
        (a, b) for a in (1, 4, 9) for b in range(5)
    ]
    assert sum(len(heads) > 0 for heads in summary.values()) >= 3
    for name, heads in summary.items():
        scores = [item[2] for item in heads]
        assert scores == sorted(scores, reverse=True)
        for layer, number, score in heads:
            assert CircuitDetection.classify_attention_head(capture, layer, number) == {"pattern": name, "score": score}


# The model that was written by hand.


def test_the_fixture_does_what_it_was_built_for() -> None:
    for seed in range(3):
        tokens = repeated(seed)
        logits = forward(MODEL, tokens).logits
        assert_leads(logits[21:-1])
        assert (np.asarray(logits)[21:-1].argmax(-1) == tokens[22:]).mean() > 0.95


def test_detectors_find_exactly_the_heads_of_a_known_circuit() -> None:
    capture = LlamaAttentionAdapter(MODEL).capture(repeated())
    assert_classes_are_clear(capture)
    found = {
        PREVIOUS_TOKEN_HEAD: np.asarray(CircuitDetection.detect_previous_token_heads(capture)),
        INDUCTION_HEAD: np.asarray(CircuitDetection.detect_induction_heads(capture)),
    }
    for where, scores in found.items():
        assert scores[where] > 0.95 and np.argwhere(scores > 0.3).tolist() == [list(where)]
    summary = CircuitDetection.summarize(capture)
    assert [item[:2] for item in summary["previous_token"]] == [PREVIOUS_TOKEN_HEAD]
    assert [item[:2] for item in summary["induction"]] == [INDUCTION_HEAD]
    assert len(summary["uniform"]) == 2 * HEADS - 2


def test_padding_changes_nothing() -> None:
    """On either side, holding a token that the prompt repeats."""
    adapter, tokens = LlamaAttentionAdapter(MODEL), repeated()
    want = CircuitDetection.scores(adapter.capture(tokens))
    for before, after in ((7, 0), (0, 7), (3, 4)):
        padded = np.pad(tokens, (before, after), constant_values=tokens[-1])
        mask = np.pad(np.ones(len(tokens), bool), (before, after))
        assert_scores(CircuitDetection.scores(adapter.capture(padded, attention_mask=mask)), want, ROUTES)


@pytest.mark.quick
def test_induction_is_judged_from_the_tokens() -> None:
    """The control: with the same patterns and shuffled ids nothing of induction is left, and positions still count."""
    capture = LlamaAttentionAdapter(MODEL).capture(repeated())
    shuffled = dataclasses.replace(capture, tokens=jnp.asarray(np.random.default_rng(0).permutation(repeated())))
    before, after = CircuitDetection.scores(capture), CircuitDetection.scores(shuffled)
    assert before["induction"][INDUCTION_HEAD] > 0.95 and after["induction"][INDUCTION_HEAD] < 0.15
    for name in ("previous_token", "bos", "recent", "local", "uniform"):
        np.testing.assert_array_equal(before[name], after[name])


# The diagnostic.


def test_sequences_are_repeated_once_and_hold_no_special_token() -> None:
    config = tiny_config(bos_token_id=3, eos_token_id=[5, 7], pad_token_id=11)
    tokens = repeated_tokens(config, 0, n_sequences=6, length=30)
    assert tokens.shape == (6, 61) and tokens.dtype == np.int32 and (tokens[:, 0] == 3).all()
    np.testing.assert_array_equal(tokens[:, 1:31], tokens[:, 31:])
    assert (
        all(len(set(row)) == 30 for row in tokens[:, 1:31].tolist()) and not np.isin(tokens[:, 1:], [3, 5, 7, 11]).any()
    )
    assert len({tuple(row) for row in tokens.tolist()}) == 6 and tokens[:, 1:].min() < 3 and tokens.max() == 60
    np.testing.assert_array_equal(tokens, repeated_tokens(config, 0, n_sequences=6, length=30))
    assert (tokens != repeated_tokens(config, 1, n_sequences=6, length=30)).any()
    assert repeated_tokens(tiny_config(), 0, n_sequences=2, length=32).shape == (2, 64)
    with pytest.raises(ValueError, match="length is 32, and must be from 1 to 31: .* context of 64"):
        repeated_tokens(config, 0, n_sequences=6, length=32)
    with pytest.raises(ValueError, match="length is 24, and must be from 1 to 23"):
        head_scores(MODEL, length=24)
    with pytest.raises(ValueError, match="at least 2"):
        head_scores(MODEL, n_sequences=1, length=20)
    with pytest.raises(TypeError, match="give one as from_pretrained"):
        head_scores("SmolLM2")


def test_head_scores_are_means_and_standard_errors_over_sequences() -> None:
    model = tiny_llama(bos_token_id=1)
    found = head_scores(model, seed=3, n_sequences=4, length=12)
    each = []
    for tokens in repeated_tokens(model.config, 3, n_sequences=4, length=12):
        patterns = forward(model, tokens, capture="pattern", logits="none").activations["pattern"]
        each.append(by_definition(np.asarray(patterns), tokens))
    for name in SCORES:
        values = np.stack([scores[name] for scores in each])
        assert values.std(0).min() > 100 * ROUNDING
        np.testing.assert_allclose(getattr(found, name), values.mean(0), atol=ROUNDING)
        np.testing.assert_allclose(found.standard_error[name], values.std(0, ddof=1) / 2, atol=ROUNDING)
    assert repr(found).endswith("each [3, 4])") and set(found.standard_error) == set(SCORES)


def test_head_scores_find_the_known_circuit_again_from_any_seed() -> None:
    with compilations() as compiled:
        first, other, again = (head_scores(MODEL, seed=seed, n_sequences=3, length=21) for seed in (0, 1, 0))
        assert len(compiled) == 1
    chex.assert_trees_all_equal(first, again)
    assert (np.asarray(first.uniform) != np.asarray(other.uniform)).any()
    for scores in (first, other):
        best, second = scores.top("induction", 2)
        assert best[:2] == INDUCTION_HEAD and best[2] > 0.95 and second[2] < 0.1
        best, second = scores.top("previous_token", 2)
        assert best[:2] == PREVIOUS_TOKEN_HEAD and best[2] > 0.95 and second[2] < 0.2
        layer, number, score, error = scores.top("uniform", 1)[0]
        assert score == scores.uniform.max() == scores.uniform[layer, number]
        assert error == scores.standard_error["uniform"][layer, number]
    with pytest.raises(ValueError, match="no score 'inductive'; there are induction"):
        first.top("inductive")


# SmolLM2.


@pytest.mark.real
def test_the_known_heads_of_smollm2(adapter: LlamaAttentionAdapter) -> None:
    scores = head_scores(adapter.model)
    assert_leads(np.ravel(scores.induction), 4)
    assert_leads(np.ravel(scores.previous_token), 2)
    assert [item[:2] for item in scores.top("induction", 4)] == [(18, 6), (17, 3), (17, 4), (17, 5)]
    assert [item[:2] for item in scores.top("previous_token", 2)] == [(16, 0), (11, 1)]
    assert scores.top("induction", 1)[0][2] > 0.8 and scores.top("previous_token", 1)[0][2] > 0.8


@pytest.mark.real
def test_classes_on_an_ordinary_prompt(adapter: LlamaAttentionAdapter) -> None:
    capture = adapter.capture("When Mary and John went to the store, John gave a drink to")
    summary = CircuitDetection.summarize(capture)
    assert (16, 0) in [item[:2] for item in summary["previous_token"]]
    assert (17, 4) in [item[:2] for item in summary["induction"]]
    assert summary["bos"][0][2] > 0.99 and len(summary["bos"]) > 50


@pytest.mark.torch
def test_head_scores_agree_with_hugging_face(trained: LlamaAttentionAdapter, hf_trained) -> None:
    import torch

    tokens = repeated_tokens(trained.model.config, 5, n_sequences=3, length=20)
    before = hf_trained.config._attn_implementation
    hf_trained.set_attn_implementation("eager")
    each = []
    try:
        for row in tokens:
            with torch.no_grad():
                attentions = hf_trained(torch.tensor(row[None].astype(np.int64)), output_attentions=True).attentions
            each.append(by_definition(torch.cat(attentions).numpy(), row))
    finally:
        hf_trained.set_attn_implementation(before)
    found = head_scores(trained.model, 5, n_sequences=3, length=20)
    for name in SCORES:
        values = np.stack([scores[name] for scores in each])
        np.testing.assert_allclose(getattr(found, name), values.mean(0), atol=ROUTES, rtol=0, err_msg=name)
        np.testing.assert_allclose(
            found.standard_error[name], values.std(0, ddof=1) / 3**0.5, atol=ROUTES, rtol=0, err_msg=name
        )


def test_head_scores_under_interventions() -> None:
    """Without the previous-token head there is nothing for the induction head to match."""
    model = induction_llama()
    plain = head_scores(model, n_sequences=2, length=10)
    without = head_scores(model, n_sequences=2, length=10, interventions=HeadAblation(*PREVIOUS_TOKEN_HEAD))
    assert plain.induction[INDUCTION_HEAD] > 0.9 and without.induction[INDUCTION_HEAD] < 0.3
    np.testing.assert_allclose(without.previous_token[0], plain.previous_token[0], atol=ROUNDING)
    with pytest.raises(ValueError, match="head is 9, but there are 4 query heads"):
        head_scores(model, n_sequences=2, length=10, interventions=HeadAblation(0, 9))
