"""Each field that a family reads, changed: the output changes as Hugging Face's does, or the file is refused; inert ones are inert."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oculi_jax import forward, from_pretrained
from oculi_jax.models.decoder.config import _USED, DecoderConfig
from oculi_jax.models.decoder.fields import ANY, INERT
from oculi_jax.models.decoder.rope_config import two_ropes
from oculi_jax.models.families import FAMILIES

from .test_families import SIZES, make
from .test_published import TOKENS, theirs

pytestmark = pytest.mark.torch

# One model of each family with its switches on, by its name in test_families.
KINDS = {
    "llama": "llama", "qwen2": "qwen2, windows, tied", "qwen3": "qwen3, windows, biases", "mistral": "mistral",
    "smollm3": "smollm3, windows, biases", "granite": "granite", "gemma2": "gemma2", "gemma3_text": "gemma3, scaled",
    "olmo2": "olmo2, biases, tied", "olmo3": "olmo3, yarn",
    "phi3": "phi3, part turns, long", "exaone4": "exaone4",
}  # fmt: skip
ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
FULL, SLIDING = "full_attention", "sliding_attention"
# Field → another value. Weights do not fit those of SHAPES; those of WORDS change what the config says, and no logit.
OTHER: dict[str, Any] = {
    "hidden_act": "relu", "hidden_activation": "relu", "rms_norm_eps": 0.5, "sliding_window": 2, "query_pre_attn_scalar": 50,
    "attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.5, "embedding_multiplier": 3.0, "attention_multiplier": 0.9,
    "residual_multiplier": 0.7, "logits_scaling": 2.0, "layer_types": [SLIDING, SLIDING, FULL, FULL],
    "no_rope_layers": [0, 1, 1, 0], "original_max_position_embeddings": 40,
}  # fmt: skip
# These count where another is not given, which is then left out.
INSTEAD: dict[str, tuple[Any, tuple[str, ...]]] = {
    "max_window_layers": (1, ("layer_types",)),
    "use_sliding_window": (False, ("layer_types",)),
    "no_rope_layer_interval": (3, ("no_rope_layers", "layer_types")),
    "rope_theta": (77.0, ("rope_parameters",)),
    "rope_scaling": ({"rope_type": "linear", "factor": 3.0}, ("rope_parameters",)),
    "rope_local_base_freq": (33.0, ("rope_parameters",)),
    "sliding_window_pattern": (2, ("layer_types",)),
    "hidden_act": ("relu", ("hidden_activation",)),
    "partial_rotary_factor": (0.5, ("rope_parameters",)),
}
# Phi-3 turns in no other way than this.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0, 1.0, 1.0, 9.0],
}
OLD_LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0, 1.0, 1.0, 9.0]}
SHAPES = {
    "vocab_size": 60, "hidden_size": 48, "intermediate_size": 39, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 1, "head_dim": 4,
}  # fmt: skip
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")  # turned over
WORDS: dict[str, Any] = {
    "max_position_embeddings": 63, "bos_token_id": 5, "eos_token_id": [6, 7], "pad_token_id": 8, "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """A family, where a model of it is, and Hugging Face's module."""
    name = request.param
    if name == "llama":
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        hf = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)).eval()
        with torch.no_grad():
            for part, parameter in hf.named_parameters():
                parameter.normal_(1.0 if "norm" in part else 0.0, 0.3)
    else:
        hf = make(KINDS[name])
    directory = tmp_path_factory.mktemp(name)
    hf.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    return name, directory, hf


def with_fields(directory: Path, into: Path, without: tuple[str, ...] = (), **fields: Any) -> Path:
    """The checkpoint with other fields."""
    into.mkdir()
    (into / "model.safetensors").symlink_to(directory / "model.safetensors")
    values = json.loads((directory / "config.json").read_text())
    values = {name: value for name, value in values.items() if name not in without}
    (into / "config.json").write_text(json.dumps({**values, **fields}))
    return into


def ours(directory: Path) -> np.ndarray:
    return np.asarray(forward(from_pretrained(directory, dtype="float32", backend="torch"), TOKENS).logits)


def reread(directory: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    return theirs(
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    )


@pytest.mark.numerical
def test_every_field_that_is_read_counts(family: tuple[str, Path, Any], tmp_path: Path) -> None:
    name, directory, _ = family
    plain, config = ours(directory), DecoderConfig.from_pretrained(directory)
    values = json.loads((directory / "config.json").read_text())
    np.testing.assert_allclose(plain, reread(directory), atol=2e-4)
    if FAMILIES[name].ropes is two_ropes:
        other_ropes: dict[str, Any] = {FULL: ROPE, SLIDING: {"rope_type": "default", "rope_theta": 500.0}}
    else:
        other_ropes = LONGROPE if name == "phi3" else ROPE
    instead = {**INSTEAD, "rope_scaling": (OLD_LONGROPE, ("rope_parameters",))} if name == "phi3" else INSTEAD
    for field in sorted((_USED | FAMILIES[name].used) - {"model_type"}):
        other = tmp_path / field
        if field in SHAPES or field in FLAGS:
            with pytest.raises(ValueError, match=r"shape: |missing: |unexpected: |cannot be used"):
                from_pretrained(with_fields(directory, other, **{field: SHAPES.get(field, not values.get(field))}))
        elif field in WORDS:
            there = with_fields(directory, other, ("dtype",), **{field: WORDS[field]})
            found = DecoderConfig.from_pretrained(there)
            assert found != config and found != dataclasses.replace(config, dtype=None), field
        elif field == "hidden_act" and name.startswith("gemma"):
            continue  # hidden_activation is what counts, and is tested as itself
        else:
            value, without = instead.get(field, ({**OTHER, "rope_parameters": other_ropes}.get(field), ()))
            # Without this no layer of so few has a window.
            also = {"max_window_layers": 1} if field == "use_sliding_window" and name.startswith("qwen") else {}
            there = with_fields(directory, other, without, **{**also, field: value})
            before = (
                ours(with_fields(directory, tmp_path / f"{field} not given", without, **also)) if without else plain
            )
            after, same = ours(there), there
            assert np.abs(after - before).max() > 1e-3, field
            if (name, field) == ("olmo3", "rope_theta"):
                # Of all layers in transformers 4, which wrote it; transformers 5 gives layers with a window 500,000 whatever it is.
                both = {kind: {"rope_type": "default", "rope_theta": value} for kind in (FULL, SLIDING)}
                same = with_fields(directory, tmp_path / "both", rope_parameters=both)
            np.testing.assert_allclose(after, reread(same), atol=3e-4, err_msg=field)


@pytest.mark.numerical
def test_what_is_inert_changes_nothing_in_hugging_face(family: tuple[str, Path, Any], tmp_path: Path) -> None:
    """And every field that transformers writes is known here."""
    name, directory, hf = family
    inert = {**INERT, **FAMILIES[name].inert}
    before, given = reread(directory), set(hf.config.to_diff_dict())
    assert given <= _USED | FAMILIES[name].used | set(inert)
    others = {
        "attention_dropout": 0.5, "initializer_range": 0.7, "use_cache": False, "pretraining_tp": 2, "_sliding_window_pattern": 3,
        "max_window_layers": 1,
    }  # fmt: skip
    n_changed = 0
    for field in sorted(given - _USED - FAMILIES[name].used):
        allowed = inert[field]
        if field in others:
            values = [others[field]]
        elif allowed is ANY:
            continue  # bookkeeping
        else:
            values = list(allowed)
        for i, value in enumerate(values):
            there = with_fields(directory, tmp_path / f"{field}{i}", **{field: value})
            np.testing.assert_array_equal(reread(there), before, err_msg=field)
            np.testing.assert_array_equal(ours(there), ours(directory), err_msg=field)
            n_changed += 1
    assert n_changed >= 3
