"""Random tiny Llamas of every kind of config against Hugging Face, every site, past the original context."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from oculi_jax import forward
from oculi_jax.models.decoder.activations import ACTIVATIONS
from oculi_jax.models.llama import Llama

from .tiny import SITES
from .tolerances import assert_parity, parity

pytestmark = pytest.mark.torch

BASE = dict(
    vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32, rms_norm_eps=1e-5,
)  # fmt: skip
ROPES = {
    "default": dict(rope_type="default", rope_theta=500.0),
    "linear": dict(rope_type="linear", rope_theta=1e4, factor=3.0),
    "dynamic": dict(rope_type="dynamic", rope_theta=1e4, factor=2.5),
    "llama3": dict(
        rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16,
    ),
    "yarn": dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16),
    "yarn-mscale": dict(
        rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=1.3,
        beta_fast=20.0, beta_slow=2.0, truncate=False,
    ),
    "yarn-attention-factor": dict(
        rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16, attention_factor=1.7,
    ),
    "longrope": dict(
        rope_type="longrope", rope_theta=1e4, factor=2.0, original_max_position_embeddings=16,
        short_factor=[1.0, 1.1, 1.2], long_factor=[1.3, 1.9, 4.0],
    ),
    "longrope-implied": dict(
        rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=16, short_factor=[1.0, 1.1, 1.2],
        long_factor=[1.3, 1.9, 4.0],
    ),
}  # fmt: skip


def make(tmp_path: Path, dtype: str = "float32", **changes):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    hf = LlamaForCausalLM(LlamaConfig(**{**BASE, **changes})).eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    hf = hf.to(getattr(torch, dtype))
    hf.save_pretrained(tmp_path)
    return hf


def check(hf, model: Llama, n_tokens: int, n_padding: int = 0) -> None:
    from .reference import reference_sites

    tokens = np.random.default_rng(1).integers(0, 61, n_tokens)
    mask = np.arange(n_tokens) >= n_padding
    out = forward(model, tokens, capture=tuple(SITES), mask=mask if n_padding else None)
    assert_parity(parity(out.activations, out.logits, reference_sites(hf, tokens, mask if n_padding else None), mask))


@pytest.mark.numerical
@pytest.mark.parametrize("n_tokens", [12, 50])
@pytest.mark.parametrize("rope", ROPES)
def test_rotary_types_within_and_past_their_context(tmp_path: Path, rope: str, n_tokens: int) -> None:
    hf = make(tmp_path, head_dim=6, rope_parameters=ROPES[rope])
    check(hf, Llama.from_pretrained(tmp_path), n_tokens, n_padding=3 if rope in ("dynamic", "longrope") else 0)


@pytest.mark.numerical
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "tied"),
    [(4, 4, None, True), (4, 2, 10, False), (6, 3, 4, True), (4, 1, 8, False)],
)
def test_heads_and_ties(tmp_path: Path, heads: int, kv_heads: int, head_dim: int | None, tied: bool) -> None:
    hf = make(
        tmp_path, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, tie_word_embeddings=tied
    )
    check(hf, Llama.from_pretrained(tmp_path), 20, n_padding=4)


@pytest.mark.numerical
@pytest.mark.parametrize(("attention", "mlp"), list(itertools.product([False, True], repeat=2)))
def test_biases(tmp_path: Path, attention: bool, mlp: bool) -> None:
    hf = make(tmp_path, attention_bias=attention, mlp_bias=mlp, rms_norm_eps=0.3)
    check(hf, Llama.from_pretrained(tmp_path), 9)


@pytest.mark.numerical
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(tmp_path: Path, act: str) -> None:
    hf = make(tmp_path, hidden_act=act)
    check(hf, Llama.from_pretrained(tmp_path), 9)


def test_activations_are_all_those_of_transformers() -> None:
    from transformers.activations import ACT2CLS

    assert set(ACTIVATIONS) == set(ACT2CLS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_checkpoint_goes_there_and_back_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    import torch
    from transformers import LlamaForCausalLM

    hf = make(
        tmp_path / "theirs",
        dtype,
        attention_bias=True,
        head_dim=6,
        rope_parameters=ROPES["yarn-mscale"],
        hidden_act="xielu",
    )
    model = Llama.from_pretrained(tmp_path / "theirs")
    assert model.dtype == jnp.dtype(dtype)
    model.save_pretrained(tmp_path / "ours")
    back = LlamaForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto").eval()
    assert back.dtype == getattr(torch, dtype)
    assert back.config.rope_parameters == hf.config.rope_parameters
    theirs, ours = hf.state_dict(), back.state_dict()
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        assert torch.equal(value.to(ours[name].dtype), ours[name]), name
    files = [load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_the_float32_computation_of_the_same_weights(tmp_path: Path, dtype: str) -> None:
    """In half precision two right answers differ by its rounding: ours must be no further from float32 than theirs."""
    import torch
    from transformers import LlamaForCausalLM

    hf = make(tmp_path, dtype)
    exact = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model = Llama.from_pretrained(tmp_path)
    # Of one prompt either side may be the worse by chance, up to twice: six are judged together.
    tokens = np.random.default_rng(1).integers(0, 61, (6, 24))
    with torch.no_grad():
        want, theirs = (m(torch.tensor(tokens)).logits.float().numpy() for m in (exact, hf))
    ours = np.asarray(jax.vmap(lambda row: forward(model, row).logits)(tokens))
    assert ours.dtype == np.float32
    assert_no_further(ours, theirs, want)


def assert_no_further(ours: np.ndarray, theirs: np.ndarray, want: np.ndarray) -> None:
    """That ours are as near to what is wanted as theirs: at the worst, with room for chance, and on the whole."""
    ours, theirs = np.abs(ours - want), np.abs(theirs - want)
    assert ours.max() <= 1.5 * theirs.max()
    assert np.sqrt((ours**2).mean()) <= 1.1 * np.sqrt((theirs**2).mean())
