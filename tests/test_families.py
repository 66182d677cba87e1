"""Random tiny models of every family and of each of its switches against Hugging Face, every site, both backends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oculi_jax import forward, from_pretrained
from oculi_jax.models.families import FAMILIES

from .tolerances import assert_parity, parity

pytestmark = pytest.mark.torch

SIZES = dict(
    vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    head_dim=6, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
OWN_WIDTH = {name: value for name, value in SIZES.items() if name != "head_dim"}
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)
LINEAR = dict(rope_type="linear", rope_theta=1e4, factor=8.0)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=1e4, factor=16.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
PLAIN = dict(rope_type="default", rope_theta=1e4)
PHI = dict(
    vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LONG = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0, 1.5, 2.0], long_factor=[2.0, 4.0, 8.0])
# Name → class of transformers' config, and its switches; a window of 4 is shorter than the prompt.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", OWN_WIDTH),
    "qwen2, windows, tied": ("Qwen2", dict(
        OWN_WIDTH, use_sliding_window=True, sliding_window=4, max_window_layers=2, tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(SIZES, head_dim=8)),
    "qwen3, windows, biases": ("Qwen3", dict(
        SIZES, head_dim=8, use_sliding_window=True, sliding_window=4, attention_bias=True, tie_word_embeddings=True,
        layer_types=["sliding_attention", "full_attention"] * 2, rope_parameters=YARN)),
    "mistral": ("Mistral", dict(SIZES, head_dim=8, sliding_window=4)),
    "mistral, no window": ("Mistral", dict(SIZES, sliding_window=None, tie_word_embeddings=True)),
    "smollm3": ("SmolLM3", OWN_WIDTH),
    "smollm3, windows, biases": ("SmolLM3", dict(
        OWN_WIDTH, no_rope_layers=[1, 0, 0, 1], use_sliding_window=True, sliding_window=4, attention_bias=True, mlp_bias=True,
        tie_word_embeddings=False)),
    "granite": ("Granite", dict(
        OWN_WIDTH, embedding_multiplier=12.0, attention_multiplier=0.3, residual_multiplier=0.22, logits_scaling=8.0,
        attention_bias=True, mlp_bias=True)),
    "gemma2": ("Gemma2", dict(
        SIZES, head_dim=8, sliding_window=4, query_pre_attn_scalar=5, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)),
    "gemma2, no caps": ("Gemma2", dict(
        SIZES, sliding_window=64, attn_logit_softcapping=None, final_logit_softcapping=None, attention_bias=True,
        tie_word_embeddings=False)),
    "gemma3": ("Gemma3Text", dict(SIZES, head_dim=8, sliding_window=4, num_hidden_layers=7)),
    "gemma3, scaled": ("Gemma3Text", dict(
        SIZES, sliding_window=5, query_pre_attn_scalar=7, final_logit_softcapping=3.0, attention_bias=True,
        layer_types=["full_attention", "sliding_attention"] * 2, hidden_activation="silu",
        rope_parameters={"full_attention": LINEAR, "sliding_attention": dict(PLAIN, rope_theta=100.0)})),
    "olmo2": ("Olmo2", OWN_WIDTH),
    "olmo2, biases, tied": ("Olmo2", dict(OWN_WIDTH, attention_bias=True, tie_word_embeddings=True, num_key_value_heads=4)),
    "olmo3": ("Olmo3", dict(OWN_WIDTH, sliding_window=4)),
    "olmo3, yarn": ("Olmo3", dict(
        OWN_WIDTH, sliding_window=4, layer_types=["full_attention", "sliding_attention"] * 2,
        rope_parameters={"full_attention": YARN, "sliding_attention": PLAIN})),
    "phi3": ("Phi3", dict(PHI, max_position_embeddings=128, sliding_window=4)),
    "phi3, part turns, long": ("Phi3", dict(
        PHI, max_position_embeddings=64, original_max_position_embeddings=8, tie_word_embeddings=True,
        rope_parameters=dict(LONG, partial_rotary_factor=0.75))),
    "phi3, part turns, short": ("Phi3", dict(
        PHI, max_position_embeddings=64, original_max_position_embeddings=32, sliding_window=60,
        rope_parameters=dict(LONG, partial_rotary_factor=0.75))),
    "exaone4": ("Exaone4", dict(OWN_WIDTH, sliding_window=4)),
    "exaone4, no window": ("Exaone4", dict(
        SIZES, head_dim=8, sliding_window=None, sliding_window_pattern=None, layer_types=["full_attention"] * 4,
        tie_word_embeddings=True, rope_parameters=LLAMA3)),
}  # fmt: skip
N = 13


def make(kind: str) -> Any:
    """A random model of transformers, norms around what keeps a value as it is."""
    import torch
    import transformers

    name, options = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**options)
    torch.manual_seed(0)
    hf = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).eval()
    centre = 0.0 if name.startswith("Gemma") else 1.0
    with torch.no_grad():
        for part, parameter in hf.named_parameters():
            parameter.normal_(centre if "norm" in part else 0.0, 0.3)
    return hf


def of_torch(hf: Any) -> Any:
    """The module as our torch backend has it; where torch is not installed this file can still be read."""
    from oculi_jax.backends.torch import TorchDecoder

    return TorchDecoder.of(hf)


def compare(hf: Any, model: Any, mask: np.ndarray | None = None) -> None:
    from .reference import reference_sites

    tokens = np.random.default_rng(1).integers(3, 61, N)
    out = forward(model, tokens, capture=tuple(model.config.sites), mask=mask)
    real = np.ones(N, bool) if mask is None else mask
    assert_parity(parity(out.activations, out.logits, reference_sites(hf, tokens, mask), real))


@pytest.mark.numerical
@pytest.mark.parametrize("kind", KINDS)
def test_every_site_is_hugging_faces(kind: str, tmp_path: Path) -> None:
    hf = make(kind)
    hf.save_pretrained(tmp_path)
    model = from_pretrained(tmp_path)
    assert model.config.model_type == hf.config.model_type
    compare(hf, model)
    compare(hf, model, np.arange(N) >= 3)
    compare(hf, model, np.arange(N) < N - 3)
    own = of_torch(hf)
    assert own.config == model.config
    compare(hf, own)
    compare(hf, own, np.arange(N) >= 3)


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_calls_a_site_gives_its_values(kind: str) -> None:
    import torch

    from .reference import reference_sites

    hf = make(kind)
    config, tokens, seen = of_torch(hf).config, np.arange(3, 3 + N), {}
    modules = dict(hf.named_modules())
    paths = {alias.format(1): site for site in config.sites.values() for alias in site.aliases if "model" in alias}
    assert {"model.norm", "model.layers.1"} <= set(paths)
    handles = [
        modules[path].register_forward_hook(lambda _, args, out, path=path: seen.update({path: out}))
        for path in set(paths) & set(modules)
    ]
    with torch.no_grad():
        hf(torch.tensor(tokens)[None], use_cache=False)
    for handle in handles:
        handle.remove()
    found = reference_sites(hf, tokens)
    assert len(seen) >= 8
    for path, out in seen.items():
        site = paths[path]
        value = (out[0] if isinstance(out, tuple) else out)[0].numpy()
        want = found[site.name][1] if site.layered else found[site.name]
        if site.head_axis is not None:
            value = value.reshape(N, -1, config.head_dim) if value.ndim == 2 else value
            value = value if value.shape == want.shape else value.swapaxes(0, 1)
        np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-5, err_msg=f"{path} is not {site.name}")


def test_every_family_is_here() -> None:
    names = {name for name, _ in KINDS.values()} | {"Llama"}
    assert {family.architecture for family in FAMILIES.values()} == {
        f"{name.removesuffix('Text')}ForCausalLM" for name in names
    }
