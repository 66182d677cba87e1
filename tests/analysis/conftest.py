"""The captures of one prompt: as it is, and padded on either side."""

from __future__ import annotations

import numpy as np
import pytest

from oculi_jax import AttentionCapture
from oculi_jax.models.llama import LlamaAttentionAdapter

from ..tiny import tiny_llama
from .captures import PAD, TOKENS, N, assert_steps_are_clear


@pytest.fixture(scope="module")
def tiny() -> LlamaAttentionAdapter:
    return LlamaAttentionAdapter(tiny_llama())


@pytest.fixture(scope="module")
def plain(tiny: LlamaAttentionAdapter) -> AttentionCapture:
    capture = tiny.capture(TOKENS)
    assert_steps_are_clear(capture)
    return capture


@pytest.fixture(scope="module", params=["left", "right"])
def padded(tiny: LlamaAttentionAdapter, request: pytest.FixtureRequest) -> AttentionCapture:
    real = np.arange(N + PAD) >= PAD if request.param == "left" else np.arange(N + PAD) < N
    ids = np.full(N + PAD, 5, np.int32)
    ids[real] = TOKENS
    capture = tiny.capture(ids, attention_mask=real)
    assert_steps_are_clear(capture)
    return capture
