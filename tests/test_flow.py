"""Flow through attention: rollout, maximum flow, value-weighted attention, against matrices, a linear programme and loops."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax import AttentionCapture
from oculi_jax.analysis.attribution import AttributionMethods
from oculi_jax.analysis.flow import attention_flow, attention_rollout, value_weighted_attention

from .test_attribution import captures
from .tiny import prompt, tiny_llama
from .tolerances import ROUNDING

pytestmark = pytest.mark.quick


def as_attention(patterns: Any, layers: tuple[int, ...] | None = None) -> AttentionCapture:
    patterns = jnp.asarray(patterns, jnp.float32)
    n_layers, n_heads, n_tokens, _ = patterns.shape
    return AttentionCapture(
        patterns=patterns, tokens=jnp.zeros(n_tokens, jnp.int32), mask=jnp.ones(n_tokens, bool),
        captured_layers=tuple(range(n_layers)) if layers is None else layers,
        n_heads=n_heads, n_kv_heads=n_heads, head_dim=1,
    )  # fmt: skip


def random_patterns(n_layers: int, n_heads: int, n_tokens: int) -> np.ndarray:
    weights = np.tril(np.random.default_rng(1).random((n_layers, n_heads, n_tokens, n_tokens)) ** 4 + 0.01)
    return weights / weights.sum(-1, keepdims=True)


def mixed(patterns: np.ndarray, weight: float) -> np.ndarray:
    """The paper's matrices, in loops."""
    out = np.zeros((patterns.shape[0], *patterns.shape[2:]))
    for layer, heads in enumerate(patterns):
        for t in range(heads.shape[1]):
            for s in range(heads.shape[1]):
                out[layer, t, s] = weight * (t == s) + (1 - weight) * sum(head[t, s] for head in heads) / len(heads)
            out[layer, t] /= out[layer, t].sum()
    return out


@pytest.mark.parametrize("weight", [0.5, 0.2, 1])
def test_rollout_is_the_product_of_the_papers_matrices(weight: float) -> None:
    patterns = random_patterns(4, 3, 6)
    patterns[2, :, 3] *= 0.4  # a row that an edit has left short is normalised
    values = np.asarray(attention_rollout(as_attention(patterns), weight).values)
    want = np.eye(6)
    for layer, matrix in enumerate(mixed(patterns, weight)):
        want = matrix @ want
        np.testing.assert_allclose(values[layer], want, atol=ROUNDING)
    np.testing.assert_allclose(values.sum(-1), 1, atol=ROUNDING)
    # Of later layers alone: from the input of the first of them.
    late = attention_rollout(as_attention(patterns[2:], (2, 3)), weight)
    np.testing.assert_allclose(late.values[-1], np.linalg.multi_dot([*mixed(patterns, weight)[:1:-1]]), atol=ROUNDING)
    assert late.layers == (2, 3)


def test_flow_solved_by_hand() -> None:
    # Half a pattern, half the identity. Before layer 1, token 2 may draw 0.3, 0.1, 0.6 from tokens 0, 1, 2; these pass on
    # from the inputs: token 0: 1 of input 0; token 1: 0.25, 0.75; token 2: 0.1, 0.2, 0.7.
    #   input 0: min(0.3, 1) + min(0.1, 0.25) + min(0.6, 0.1) = 0.5
    #   input 1:               min(0.1, 0.75) + min(0.6, 0.2) = 0.3
    #   input 2:                                min(0.6, 0.7) = 0.6
    layer_0 = [[1, 0, 0], [0.5, 0.5, 0], [0.2, 0.4, 0.4]]
    layer_1 = [[1, 0, 0], [0.3, 0.7, 0], [0.6, 0.2, 0.2]]
    capture = as_attention(np.array([[layer_0], [layer_1]]))
    result = AttributionMethods.attention_flow(capture)
    assert isinstance(result.values, np.ndarray) and result.method == "attention_flow"
    np.testing.assert_allclose(result.values, [0.5, 0.3, 0.6], atol=ROUNDING)
    # To position 1, token 1 draws 0.15 and 0.85: min(0.15, 1) + min(0.85, 0.25) = 0.4, and min(0.85, 0.75) = 0.75.
    for position in (1, -2):
        np.testing.assert_allclose(attention_flow(capture, position).values, [0.4, 0.75, 0], atol=ROUNDING)


def test_flow_is_the_linear_programme_that_conserves_it() -> None:
    from scipy.optimize import linprog

    patterns = random_patterns(4, 2, 4)
    values = attention_flow(as_attention(patterns), 2).values
    capacity = mixed(patterns, 0.5)
    edges = [(layer, t, s) for layer in range(4) for t in range(4) for s in range(t + 1)]
    # What a token before layers 1 to 3 gives to the layer after is what it takes from the one before.
    conserved = np.array([[(layer == at - 1 and t == n) * 1.0 - (layer == at and s == n) for layer, t, s in edges]
                          for at in (1, 2, 3) for n in range(4)])  # fmt: skip
    for token in range(4):
        bounds = [(0, capacity[e] if (e[0] > 0 or e[2] == token) and (e[0] < 3 or e[1] == 2) else 0) for e in edges]
        out = np.array([-1.0 * (layer == 3) for layer, _, _ in edges])
        best = linprog(out, A_eq=conserved, b_eq=np.zeros(len(conserved)), bounds=bounds)
        assert abs(values[token] + best.fun) < ROUNDING
    # Not the sum of what each path could carry alone, nor the rollout.
    assert np.abs(values - attention_rollout(as_attention(patterns)).values[-1, 2]).max() > 0.05


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_value_weighted_attention_is_the_length_of_each_message(kv_heads: int) -> None:
    model = tiny_llama(num_key_value_heads=kv_heads, attention_bias=True)
    attention, _, _ = captures(model, prompt(7))
    o = np.float64(model.layers.attn.o.weight[...])
    patterns, values = np.float64(attention.patterns), np.float64(attention.values)
    want, plain = np.zeros((2, 3, 4, 7, 7))
    for layer in range(3):
        for head in range(4):
            for t in range(7):
                for s in range(t + 1):
                    message = patterns[layer, head, t, s] * values[layer, model.config.kv_head(head), s]
                    plain[layer, head, t, s] = np.linalg.norm(message)
                    want[layer, head, t, s] = np.linalg.norm(o[layer, :, head] @ message)
    np.testing.assert_allclose(value_weighted_attention(attention, model).values, want, atol=ROUNDING, rtol=ROUNDING)
    np.testing.assert_allclose(value_weighted_attention(attention).values, plain, atol=ROUNDING, rtol=ROUNDING)
