"""SmolLM2-135M-Instruct: the facts that are known of it, parity with Hugging Face, and the command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from oculi_jax import LogitConfig, ResidualConfig, forward
from oculi_jax.intervention import ActivationPatch, HeadAblation, PerLayer
from oculi_jax.models.llama import LlamaAttentionAdapter

from .margins import assert_leads
from .prompts import FRANCE, IOI, PROMPTS
from .tiny import SITES

pytestmark = pytest.mark.real


@pytest.mark.numerical
def test_known_answers(adapter: LlamaAttentionAdapter) -> None:
    """Figures that Hugging Face gives for these weights."""
    model, ids = adapter.model, adapter.tokenizer.encode(FRANCE)
    assert ids == [504, 3575, 282, 4649, 314]
    chances = np.asarray(jax.nn.softmax(forward(model, ids, logits="last").logits))
    for text, chance in ((" Paris", 0.7725), (" the", 0.0645), (" London", 0.0125)):
        assert abs(chances[adapter.to_single_token(text)] - chance) < 2e-4
    mary, john = adapter.to_single_token(" Mary"), adapter.to_single_token(" John")
    for giver, difference in (("John", 6.120), ("Mary", -5.485)):
        logits = forward(model, adapter.tokenizer.encode(IOI.format(giver)), logits="last").logits
        assert abs(float(logits[mary] - logits[john]) - difference) < 2e-3


@pytest.mark.numerical
def test_greedy_continuation(adapter: LlamaAttentionAdapter) -> None:
    ids = adapter.tokenizer.encode(FRANCE)
    for _ in range(9):
        tokens, mask = np.zeros(16, np.int32), np.arange(16) < len(ids)
        tokens[: len(ids)] = ids
        logits = forward(adapter.model, tokens, logits="last", mask=mask).logits
        assert_leads(logits)
        ids.append(int(logits.argmax()))
    assert adapter.tokenizer.decode(ids[5:]).startswith(" Paris.\n\nThe answer is:")


def test_the_lens_sees_the_answer_come_up(adapter: LlamaAttentionAdapter) -> None:
    paris = adapter.to_single_token(" Paris")
    capture = adapter.capture_logits(FRANCE, LogitConfig(top_k=1, positions=[-1], tokens=[paris]))
    trajectory = np.asarray(capture.probabilities)[:, 0, 0]
    assert (
        capture.top_k_indices[-1, 0, 0] == paris
        and trajectory[:20].max() < 1e-3
        and abs(trajectory[-1] - 0.7725) < 2e-4
    )


def test_the_guides_shapes(adapter: LlamaAttentionAdapter) -> None:
    full = adapter.capture_full(FRANCE, residual=ResidualConfig(layers=[10, 15, 20]))
    assert full.attention.queries.shape == (30, 9, 5, 64) and full.attention.keys.shape == (30, 3, 5, 64)
    assert full.attention.patterns.shape == (30, 9, 5, 5) and full.residual.pre_attn.shape == (3, 5, 576)
    assert full.mlp.post_activation.shape == (30, 5, 1536) and full.logits.top_k_indices.shape == (30, 5, 10)


@pytest.mark.numerical
@pytest.mark.torch
@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_every_site_agrees_with_hugging_face(adapter: LlamaAttentionAdapter, hf, number: int) -> None:
    from .reference import assert_near

    text, padding = PROMPTS[number]
    ids = adapter.tokenizer.encode(text)
    tokens, mask = np.array([0] * padding + ids), np.arange(padding + len(ids)) >= padding
    assert len(ids) >= 90 or number != 4
    out = forward(adapter.model, tokens, capture=tuple(SITES), mask=mask if padding else None)
    assert_near(hf, out, tokens, mask)


@pytest.mark.numerical
@pytest.mark.torch
def test_head_ablations_agree_with_hooks_on_hugging_face(adapter: LlamaAttentionAdapter, hf) -> None:
    import torch

    ids = adapter.tokenizer.encode(IOI.format("John"))
    for layer, head in ((23, 3), (29, 1), (0, 8)):

        def zero(module, args, head=head):
            z = args[0].clone()
            z[..., head * 64 : (head + 1) * 64] = 0
            return (z,)

        handle = hf.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(zero)
        with torch.no_grad():
            want = hf(torch.tensor([ids])).logits[0].numpy()
        handle.remove()
        np.testing.assert_allclose(forward(adapter.model, ids, HeadAblation(layer, head)).logits, want, atol=2e-4)


def test_patching_a_whole_run_moves_the_answer(adapter: LlamaAttentionAdapter) -> None:
    model = adapter.model
    clean, corrupted = (adapter.tokenizer.encode(IOI.format(name)) for name in ("John", "Mary"))
    assert adapter.first_difference(clean, corrupted) == 9
    source = forward(model, clean, capture="resid_pre").activations["resid_pre"]
    patched = forward(model, corrupted, ActivationPatch("resid_pre", 12, PerLayer(source))).logits
    np.testing.assert_allclose(patched, forward(model, clean).logits, atol=2e-4)


def oculi(*arguments: str, cache: Path) -> subprocess.CompletedProcess:
    env = {**os.environ, "XLA_FLAGS": "", "XDG_CACHE_HOME": str(cache)}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)  # the suite's; a user's programs are in the cache of the command line
    return subprocess.run(
        [Path(sys.executable).with_name("oculi"), *arguments], capture_output=True, text=True, env=env
    )


def test_oculi_lens(directory: Path, tmp_path: Path) -> None:
    run = oculi("lens", FRANCE, "--model", str(directory), cache=tmp_path)
    assert run.returncode == 0, run.stderr
    said = re.search(r"' Paris' with probability (\d\.\d{3})$", run.stdout, re.M)
    assert said and abs(float(said[1]) - 0.7725) < 5e-4 + 2e-4
    assert len([line for line in run.stdout.splitlines() if line[:5].strip().isdigit()]) == 30
    assert list((tmp_path / "oculi_jax" / "xla").iterdir())
