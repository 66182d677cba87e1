"""Composition: patterns against loops, and a model whose circuit is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax import AttentionCapture, CaptureConfig
from oculi_jax.analysis.composition import CompositionAnalysis
from oculi_jax.models.llama import Llama, LlamaAttentionAdapter

from .induction import INDUCTION_HEAD, PREVIOUS_TOKEN_HEAD, induction_llama, repeated
from .prompts import FRANCE
from .tiny import prompt, tiny_llama
from .tolerances import ROUNDING

MODEL = tiny_llama()
BOTH = pytest.mark.parametrize("method", ["qk", "ov"])


def capture_of(model: Llama = MODEL, tokens: Any = None, mask: Any = None, **options: Any) -> AttentionCapture:
    tokens = prompt() if tokens is None else tokens
    return LlamaAttentionAdapter(model).capture(tokens, CaptureConfig(**options), attention_mask=mask)


def pair(capture: AttentionCapture, method: str, source: Any = (0, 3), target: Any = (2, 1)) -> np.ndarray:
    return np.asarray(getattr(CompositionAnalysis, f"{method}_composition")(capture, source, target).values)


def pair_in_loops(capture: AttentionCapture, method: str, source: Any, target: Any) -> np.ndarray:
    """The docstrings' equations, for a capture of all layers without padding."""
    a, b = (np.asarray(capture.patterns, np.float64)[layer, head] for layer, head in (source, target))
    v = np.asarray(capture.values, np.float64)[source[0], source[1] // (capture.n_heads // capture.n_kv_heads)]
    values = np.zeros(len(a))
    for t in range(len(a)):
        for s in range(t + 1):
            moved = 1.0 - a[s, s]
            if method == "ov":
                brought = sum((a[s, u] * v[u] for u in range(s)), np.zeros(v.shape[1]))
                moved = np.linalg.norm(brought) / max(np.linalg.norm(v[u]) for u in range(s + 1))
            values[t] += b[t, s] * moved
    return values


@BOTH
def test_pairs_follow_their_equations(method: str) -> None:
    capture = capture_of()
    for source, target in (((0, 3), (2, 1)), ((0, 0), (1, 2)), ((1, 2), (2, 3))):
        found = pair(capture, method, source, target)
        np.testing.assert_allclose(found, pair_in_loops(capture, method, source, target), atol=ROUNDING)
        assert found[0] == 0 and found.min() >= 0 and found.max() <= 1 + ROUNDING


def test_what_is_moved_is_known_for_plain_heads() -> None:
    """A head that looks at itself moves nothing; one that looks one back moves everything but the first token."""
    itself, back = np.eye(5), np.eye(5, k=-1)
    back[0, 0] = 1.0
    values = np.ones((2, 2, 5, 3), np.float32)
    values[0, 1, 2] = 0.5  # moved to position 3 by a head that looks back
    capture = AttentionCapture(
        patterns=jnp.asarray(np.array([[itself, back], [back, itself]]), jnp.float32), values=jnp.asarray(values),
        tokens=jnp.arange(5), mask=jnp.ones(5, bool), captured_layers=(4, 7), n_heads=2, n_kv_heads=2, head_dim=3,
    )  # fmt: skip
    for method in ("qk", "ov"):
        assert not pair(capture, method, (4, 0), (7, 0)).any()
    np.testing.assert_allclose(pair(capture, "qk", (4, 1), (7, 0)), [0, 0, 1, 1, 1])
    np.testing.assert_allclose(pair(capture, "qk", (4, 1), (7, 1)), [0, 1, 1, 1, 1])
    np.testing.assert_allclose(pair(capture, "ov", (4, 1), (7, 1)), [0, 1, 1, 0.5, 1], atol=ROUNDING)


@BOTH
def test_padding_changes_nothing_and_scores_nothing(method: str) -> None:
    plain, want = capture_of(), pair(capture_of(), method)
    for left, right in ((3, 0), (0, 3)):
        mask = np.pad(np.ones(11, bool), (left, right))
        padded = capture_of(tokens=np.pad(prompt(), (left, right), constant_values=7), mask=mask)
        values = jnp.where(jnp.asarray(mask)[None, None, :, None], padded.values, 1e3)  # whatever stands at padding
        padded = dataclasses.replace(padded, values=values)
        found = pair(padded, method)
        np.testing.assert_allclose(found[mask], want, atol=ROUNDING)
        assert not found[~mask].any()
        np.testing.assert_allclose(
            CompositionAnalysis.composition_matrix(padded, method).values,
            CompositionAnalysis.composition_matrix(plain, method).values,
            atol=ROUNDING,
        )
        path = [(0, 1), (2, 2)]
        for position in (-1, 4):
            np.testing.assert_allclose(
                CompositionAnalysis.path_score(padded, path, position).values[mask],
                CompositionAnalysis.path_score(plain, path, position).values,
                atol=ROUNDING,
            )


@BOTH
def test_later_tokens_change_nothing_before_them(method: str) -> None:
    np.testing.assert_allclose(
        pair(capture_of(tokens=prompt()[:7]), method), pair(capture_of(), method)[:7], atol=ROUNDING
    )


@BOTH
def test_the_matrix_is_every_pairs_mean(method: str) -> None:
    """Also for layers in another order, whose rows are those of the capture."""
    capture, layers = capture_of(layers=[2, 0, 1]), (2, 0, 1)
    found = CompositionAnalysis.composition_matrix(capture, method)
    whole = capture_of()
    assert found.layers == layers and found.metadata["layers"] == list(layers)
    want = np.zeros((3, 4, 3, 4))
    for i, source in enumerate(layers):
        for j, target in enumerate(layers):
            for h in range(4):
                for g in range(4):
                    if source < target:
                        want[i, h, j, g] = pair_in_loops(whole, method, (source, h), (target, g)).mean()
    np.testing.assert_allclose(found.values, want, atol=ROUNDING)
    assert not np.asarray(found.values)[want == 0].any()


@pytest.mark.parametrize("call", [
    lambda c: CompositionAnalysis.qk_composition(c, (0, 3), (2, 1)),
    lambda c: CompositionAnalysis.ov_composition(c, (0, 3), (2, 1)),
    lambda c: CompositionAnalysis.composition_matrix(c, "ov"),
    lambda c: CompositionAnalysis.virtual_attention(c, [(0, 3), (2, 1)]),
    lambda c: CompositionAnalysis.path_score(c, [(0, 3), (1, 0), (2, 1)], -2),
])  # fmt: skip
def test_patterns_under_jit_vmap_and_grad(call: Callable[[Any], Any]) -> None:
    captures = [capture_of(tokens=prompt(seed=seed)) for seed in (0, 1)]
    want = [np.asarray(call(capture).values) for capture in captures]
    np.testing.assert_allclose(jax.jit(call)(captures[0]).values, want[0], atol=ROUNDING)
    batch = jax.tree.map(lambda *x: jnp.stack(x), *captures)
    np.testing.assert_allclose(jax.vmap(call)(batch).values, np.stack(want), atol=ROUNDING)

    def total(patterns: Any, values: Any) -> Any:
        return jnp.sum(call(dataclasses.replace(captures[0], patterns=patterns, values=values)).values)

    for gradient in jax.grad(total, (0, 1))(captures[0].patterns, captures[0].values):
        assert np.isfinite(gradient).all()


def test_virtual_attention_is_the_sum_over_paths() -> None:
    capture = capture_of()
    a, b, c = (np.asarray(capture.patterns, np.float64)[at] for at in ((0, 3), (1, 0), (2, 1)))
    want = np.zeros((11, 11))
    for t in range(11):
        for s in range(11):
            want[t, s] = sum(c[t, i] * b[i, j] * a[j, s] for i in range(11) for j in range(11))
    path = [(0, 3), (1, 0), (2, 1)]
    found = np.asarray(CompositionAnalysis.virtual_attention(capture, path).values)
    np.testing.assert_allclose(found, want, atol=ROUNDING)
    np.testing.assert_allclose(found.sum(-1), 1, atol=ROUNDING)
    np.testing.assert_allclose(CompositionAnalysis.path_score(capture, path, 5).values, want[5], atol=ROUNDING)
    np.testing.assert_allclose(CompositionAnalysis.path_score(capture, path).values, want[-1], atol=ROUNDING)


def test_the_known_circuit_is_the_strongest_key_composition() -> None:
    found = CompositionAnalysis.weight_composition(induction_llama())
    scores = np.asarray(found.values["k"])
    at = (*PREVIOUS_TOKEN_HEAD, *INDUCTION_HEAD)
    assert np.unravel_index(scores.argmax(), scores.shape) == at
    assert scores[at] > 1.5 * np.partition(scores.ravel(), -2)[-2]
    assert not any(np.asarray(found.values[name])[at] > 0.01 for name in "qv")  # through its keys alone


def test_the_known_circuit_is_found_and_no_other() -> None:
    model = induction_llama()
    for layers in (None, [1, 0]):
        capture = capture_of(model, repeated(), layers=layers)
        for given, kind in ((None, "patterns"), (model, "weights")):
            found = CompositionAnalysis.detect_induction_circuit(capture, model=given)
            (circuit,) = found.metadata["circuits"]
            assert circuit["previous_token_head"] == PREVIOUS_TOKEN_HEAD and circuit["induction_head"] == INDUCTION_HEAD
            assert found.metadata["composition"] == kind and found.metadata["threshold"] == 0.3
            if given is None:
                want = CompositionAnalysis.qk_composition(capture, PREVIOUS_TOKEN_HEAD, INDUCTION_HEAD).values.mean()
            else:
                want = np.asarray(CompositionAnalysis.weight_composition(model).values["k"])[0, 2, 1, 1]
            assert circuit["composition_score"] == pytest.approx(float(want), abs=ROUNDING)
            assert np.count_nonzero(found.values) == 1 and found.values.sum() == circuit["composition_score"]
        lowest = min(circuit["previous_token_score"], circuit["induction_score"])
        for threshold, number in ((lowest, 1), (lowest + 1e-6, 0)):
            found = CompositionAnalysis.detect_induction_circuit(capture, threshold).metadata["circuits"]
            assert len(found) == number and lowest > 0.3


def test_circuits_are_sorted_and_need_the_lower_layer_first() -> None:
    """With the threshold at 0 every pair of an earlier and a later layer is one."""
    capture = capture_of(layers=[2, 0, 1])
    found = CompositionAnalysis.detect_induction_circuit(capture, threshold=0.0).metadata["circuits"]
    scores = [circuit["composition_score"] for circuit in found]
    assert scores == sorted(scores, reverse=True) and len(found) == 3 * 16
    for circuit in found[:5]:
        source, target = circuit["previous_token_head"], circuit["induction_head"]
        assert source[0] < target[0]
        assert circuit["composition_score"] == pytest.approx(
            float(pair(capture, "qk", source, target).mean()), abs=ROUNDING
        )


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda c: CompositionAnalysis.qk_composition(c, (2, 1), (0, 3)), ValueError, "source is in layer 2 and target in layer 0"),
    (lambda c: CompositionAnalysis.ov_composition(c, (2, 1), (2, 3)), ValueError, "must be the lower one"),
    (lambda c: CompositionAnalysis.qk_composition(c, (1, 1), (2, 3)), ValueError, "Layer 1 was not captured"),
    (lambda c: CompositionAnalysis.qk_composition(c, (0, 4), (2, 3)), ValueError, "4 query heads"),
    (lambda c: CompositionAnalysis.qk_composition(c, 3, (2, 3)), TypeError, "source is 3, and a pair"),
    (lambda c: CompositionAnalysis.composition_matrix(c, "kv"), ValueError, "method is 'kv'"),
    (lambda c: CompositionAnalysis.virtual_attention(c, [(2, 1), (0, 3)]), ValueError, r"must ascend, and these are \[2, 0\]"),
    (lambda c: CompositionAnalysis.virtual_attention(c, []), TypeError, "list of pairs"),
    (lambda c: CompositionAnalysis.path_score(c, [(0, 1), (2, 0)], 11), ValueError, "the prompt has 11 tokens"),
    (lambda c: CompositionAnalysis.ov_composition(c, (0, 1), (2, 0)), ValueError, "values of this AttentionCapture was not captured"),
    (lambda c: CompositionAnalysis.detect_induction_circuit(c, model=tiny_llama(num_hidden_layers=2)), ValueError, "give the model that was captured"),
    (lambda c: CompositionAnalysis.weight_composition("SmolLM2"), TypeError, "The model is 'SmolLM2'"),
    (lambda c: CompositionAnalysis.qk_svd(MODEL, 1), ValueError, "Give layer and head"),
    (lambda c: CompositionAnalysis.ov_svd(MODEL, 1, 4), ValueError, "head is 4"),
])  # fmt: skip
def test_what_cannot_be_is_refused(call: Callable[[Any], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call(capture_of(layers=[0, 2], capture_values=False))


def test_the_guides_chapter(trained: LlamaAttentionAdapter) -> None:
    capture = trained.capture(FRANCE)
    qk = CompositionAnalysis.qk_composition(capture, source=(1, 5), target=(3, 2))
    assert qk.values.shape == (6,) and 0 <= float(f"{qk.values.mean():.4f}") <= 1
    circuits = CompositionAnalysis.detect_induction_circuit(capture, threshold=0.3)
    assert isinstance(circuits.metadata["circuits"], list)
