"""What stands on runs and weights, over a model that torch runs: the analyses that were written for JAX arrays."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from oculi_jax.analysis import AttributionMethods, CompositionAnalysis, LogitLensAnalysis
from oculi_jax.diagnostics import head_scores
from oculi_jax.intervention import HeadAblation
from oculi_jax.models.llama import Llama, LlamaAttentionAdapter

from .test_parity_torch import make
from .tolerances import ROUTES

pytestmark = pytest.mark.torch

IDS = np.random.default_rng(5).integers(0, 61, 9)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaAttentionAdapter, LlamaAttentionAdapter]:
    directory = tmp_path_factory.mktemp("pair")
    hf = make(directory, head_dim=6, max_position_embeddings=64, attention_bias=True)
    return LlamaAttentionAdapter(hf), LlamaAttentionAdapter(Llama.from_pretrained(directory))


def near(ours: Any, want: Any) -> None:
    for mine, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        assert np.abs(np.asarray(mine) - np.asarray(theirs)).max() <= ROUTES


def test_head_scores(pair: Any) -> None:
    for interventions in ((), HeadAblation(0, 1)):
        ours, want = (
            head_scores(adapter.model, n_sequences=3, length=12, interventions=interventions) for adapter in pair
        )
        near(
            (ours.induction, ours.previous_token, ours.standard_error),
            (want.induction, want.previous_token, want.standard_error),
        )


def test_attribution_composition_and_the_lens(pair: Any) -> None:
    def found(adapter: LlamaAttentionAdapter) -> Any:
        full, model = adapter.capture_full(IDS), adapter.model
        unembed = getattr(model, "hf", model).lm_head.weight  # the user's own, as the guide gives it
        direct = AttributionMethods.direct_logit_attribution(full.residual, unembed, 3)
        heads = AttributionMethods.head_attribution(full.attention, model, 3, residual=full.residual)
        return (
            direct.values,
            heads.values,
            CompositionAnalysis.weight_composition(model).values,
            full.logits.top_k_logits,
        )

    near(*(found(adapter) for adapter in pair))
    trajectories = [
        LogitLensAnalysis(None).token_probability_trajectory(adapter.capture_logits(IDS), 5) for adapter in pair
    ]
    near(*trajectories)


def test_the_same_model_in_jax_has_the_same_bits(pair: Any) -> None:
    copy, want = pair[0].model.as_jax(), pair[1].model
    assert jax.tree.structure(jax.tree.leaves(copy)) == jax.tree.structure(jax.tree.leaves(want))
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(copy), jax.tree.leaves(want), strict=True))


def test_what_needs_derivatives_says_so(pair: Any) -> None:
    from oculi_jax.causal import attribution_patching
    from oculi_jax.metrics import logit_difference

    with pytest.raises(TypeError, match="load it with oculi_jax.from_pretrained"):
        attribution_patching(pair[0].model, IDS, IDS[::-1].copy(), logit_difference(3, 5))
    with pytest.raises(TypeError, match="load it with oculi_jax.from_pretrained"):
        attribution_patching(pair[0].model.hf, IDS, IDS[::-1].copy(), logit_difference(3, 5))
