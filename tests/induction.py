"""A Llama written by hand that holds one induction circuit, and is therefore known to the last weight.

Layer 0 has a previous-token head, layer 1 an induction head that reads its output through its keys (K-composition,
Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"); all other heads are random and small.
"""

from __future__ import annotations

import jax
import numpy as np

from oculi_jax.models.decoder.parameters import parameter_table
from oculi_jax.models.llama import Llama, LlamaConfig

PREVIOUS_TOKEN_HEAD = (0, 2)
INDUCTION_HEAD = (1, 1)
BOS, VOCABULARY, WIDTH, HEADS, HEAD_DIM = 0, 24, 128, 4, 32

# The residual stream: which token this is, which one came before, which one to predict, and a constant.
IDENTITY, PREVIOUS, PREDICTED = (VOCABULARY * i + np.arange(VOCABULARY) for i in range(3))
CONSTANT = 3 * VOCABULARY

# Rotary pair i, dimensions (i, i + D/2), turns by 10^−i radians a position. The first three tell positions apart; the
# others hardly turn within a hundred positions, so that what is read through them does not depend on position.
TURNS = 10.0 ** -np.arange(HEAD_DIM // 2)
FAST = np.arange(3)
SLOW = np.concatenate([3 + np.arange(VOCABULARY // 2), 3 + HEAD_DIM // 2 + np.arange(VOCABULARY // 2)])


def induction_config() -> LlamaConfig:
    return LlamaConfig.from_dict(dict(
        model_type="llama", vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=4, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=HEAD_DIM, hidden_act="silu",
        max_position_embeddings=128, rms_norm_eps=1e-6, rope_theta=10.0 ** (HEAD_DIM // 2), tie_word_embeddings=False,
        bos_token_id=BOS,
    ))  # fmt: skip


def induction_llama() -> Llama:
    """The model. On `repeated()` it predicts every token of the second half."""
    config, rng = induction_config(), np.random.default_rng(0)
    params = {row.name: np.zeros(row.shape, np.float32) for row in parameter_table(config)}
    for name in params:
        if "norm" in name:
            params[name][:] = 1.0
        elif ".attn." in name:  # generic, attending almost uniformly and writing little
            params[name][:] = rng.normal(0.0, 0.003 if ".o." in name else 0.05, params[name].shape)
    # Every row has the squared length 2, so the first norm multiplies by √(E/2) = 8.
    params["embed"][np.arange(VOCABULARY), IDENTITY] = 1.0
    params["embed"][:, CONSTANT] = 1.0
    q, k, v, o = (params[f"layers.attn.{name}.weight"] for name in "qkvo")

    layer, head = PREVIOUS_TOKEN_HEAD
    for weight in (q[layer, head], k[layer, head], v[layer, head], o[layer, :, head]):
        weight[:] = 0.0
    # A key at s is turned by s; a query at t begins one position back, so the score is Σ cos(turn · (t − 1 − s)).
    k[layer, head, FAST, CONSTANT] = 2.0
    q[layer, head, FAST, CONSTANT] = 2.0 * np.cos(TURNS[FAST])
    q[layer, head, FAST + HEAD_DIM // 2, CONSTANT] = -2.0 * np.sin(TURNS[FAST])
    v[layer, head, SLOW, IDENTITY] = 1.0 / 8.0
    o[layer, PREVIOUS, head, SLOW] = 1.0

    layer, head = INDUCTION_HEAD
    for weight in (q[layer, head], k[layer, head], v[layer, head], o[layer, :, head]):
        weight[:] = 0.0
    q[layer, head, SLOW, IDENTITY] = 1.5
    k[layer, head, SLOW, PREVIOUS] = 1.5
    v[layer, head, SLOW, IDENTITY] = 0.5
    o[layer, PREDICTED, head, SLOW] = 1.0

    params["unembed"][np.arange(VOCABULARY), PREDICTED] = 1.0
    return Llama(config, jax.tree.map(jax.numpy.asarray, params))


def repeated(seed: int = 0, length: int = 20) -> np.ndarray:
    """BOS, then `length` distinct random tokens, then the same once more: ids `[1 + 2 · length]`."""
    once = 1 + np.random.default_rng(seed).permutation(VOCABULARY - 1)[:length]
    return np.concatenate([[BOS], once, once]).astype(np.int32)
