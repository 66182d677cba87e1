"""Pages of the embedded model, made once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from oculi_jax import embedded_model
from oculi_jax.models.llama import LlamaAttentionAdapter
from oculi_jax.pages import report

from .pages import HOSTILE, PROMPT, content


@pytest.fixture(scope="session")
def facts() -> LlamaAttentionAdapter:
    return LlamaAttentionAdapter(*embedded_model())


@pytest.fixture(scope="session")
def html(facts: LlamaAttentionAdapter) -> str:
    return report(facts, PROMPT)


@pytest.fixture(scope="session")
def data(html: str) -> dict[str, Any]:
    return content(html)


@pytest.fixture(scope="session")
def ids(facts: LlamaAttentionAdapter) -> np.ndarray:
    return np.array(facts.tokenizer.encode(PROMPT), np.int32)


@pytest.fixture(scope="session")
def hostile(facts) -> str:
    return report(facts, HOSTILE, heads=[(0, 0)])
