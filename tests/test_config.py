"""`LlamaConfig`: published configs load, both spellings mean the same, and what is not implemented is refused by name."""

import copy
import json
from pathlib import Path

import pytest

from oculi_jax.models.llama import LlamaConfig

from .tiny import BASE

pytestmark = pytest.mark.quick

_LLAMA_3_ROPE = {
    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
# config.json as published on the Hub, the fields that matter and the odd ones.
PUBLISHED = {
    "SmolLM2-135M": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
        "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 49152,
    },
    "TinyLlama-1.1B": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632,
        "max_position_embeddings": 2048, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 22,
        "num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.35.0", "use_cache": True,
        "vocab_size": 32000,
    },
    "Llama-2-7b": {
        "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0.dev0",
        "use_cache": True, "vocab_size": 32000,
    },
    "Meta-Llama-3-8B": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
        "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.40.0.dev0", "use_cache": True, "vocab_size": 128256,
    },
    "Llama-3.1-8B-Instruct": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": _LLAMA_3_ROPE, "rope_theta": 500000.0, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 128256,
    },
    "Llama-3.2-3B-Instruct": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009], "head_dim": 128, "hidden_act": "silu", "hidden_size": 3072,
        "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 24, "num_hidden_layers": 28, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {**_LLAMA_3_ROPE, "factor": 32.0},
        "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_load_and_survive_a_round_trip(name: str) -> None:
    values = PUBLISHED[name]
    config = LlamaConfig.from_dict(values)
    assert config.head_dim == values["hidden_size"] // values["num_attention_heads"]
    assert config.rope.theta == values.get("rope_theta", 10000.0)
    assert config.dtype == values["torch_dtype"]
    assert LlamaConfig.from_dict(config.to_dict()) == config
    assert hash(config) == hash(LlamaConfig.from_dict(values))


@pytest.mark.torch
@pytest.mark.parametrize("name", PUBLISHED)
def test_our_reading_is_transformers_reading(name: str, tmp_path: Path) -> None:
    from transformers import LlamaConfig as Theirs

    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    theirs, ours = Theirs.from_pretrained(tmp_path), LlamaConfig.from_pretrained(tmp_path)
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                  "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
                  "tie_word_embeddings", "attention_bias", "mlp_bias"):  # fmt: skip
        assert getattr(ours, field) == getattr(theirs, field), field
    rope = dict(theirs.rope_parameters)
    assert (ours.rope.type, ours.rope.theta) == (rope.pop("rope_type"), rope.pop("rope_theta"))
    for field, value in rope.items():
        assert getattr(ours.rope, field) == value, field
    theirs.save_pretrained(tmp_path)  # the other spelling, written by transformers 5
    assert LlamaConfig.from_pretrained(tmp_path) == ours


def test_both_spellings_of_the_rotary_fields_are_one() -> None:
    old = {**BASE, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}
    new = {k: v for k, v in BASE.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
    assert LlamaConfig.from_dict(old) == LlamaConfig.from_dict(new)
    with pytest.raises(ValueError, match="both given"):
        LlamaConfig.from_dict({**new, "rope_scaling": {"type": "linear", "factor": 2.0}})


REFUSED = {
    "unknown field": ({"sliding_windows": 4}, "sliding_windows"),
    "known, other value": ({"is_encoder_decoder": True}, r"is_encoder_decoder = True is implemented only as False"),
    "interleaved": ({"rope_interleaved": True}, "rope_interleaved"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "other model": ({"model_type": "gpt2"}, "'gpt2', and models of type 'llama', 'qwen2', .* load"),
    "activation": ({"hidden_act": "sillu"}, "did you mean 'silu'"),
    "rope type": ({"rope_scaling": {"rope_type": "su", "factor": 2.0}}, "'su' is not one of"),
    "rope field": ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 1.0}}, "rope_scaling.mscale"),
    "rope missing": ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is missing"),
    "rope equal factors": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0}},
        "ramp between them",
    ),
    "longrope length": (
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "list of head_dim/2 = 3"
    ),
    "heads": ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
    "odd head": ({"head_dim": 5}, "needs an even one"),
    "not a number": ({"hidden_size": "24"}, "hidden_size is '24', and a positive integer"),
    "negative": ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
    "not a bool": ({"tie_word_embeddings": 1}, "true or false"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_run_is_refused_by_name(name: str) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_dict({**BASE, **changes})


def test_one_error_lists_everything_and_ignore_fields_is_the_way_through() -> None:
    values = {
        **BASE,
        "attn_logit_softcapping": 50.0,
        "hidden_size": None,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0, "x": 1},
    }
    with pytest.raises(ValueError) as caught:
        LlamaConfig.from_dict(values)
    for part in ("attn_logit_softcapping", "hidden_size is missing", "rope_scaling.x", "ignore_fields"):
        assert part in str(caught.value)
    values = {**values, "hidden_size": 24}
    config = LlamaConfig.from_dict(values, ignore_fields=("attn_logit_softcapping", "rope_scaling.x"))
    assert config.rope.factor == 2.0


def test_the_dictionary_is_not_changed() -> None:
    values = copy.deepcopy(PUBLISHED["Llama-3.1-8B-Instruct"])
    LlamaConfig.from_dict(values)
    assert values == PUBLISHED["Llama-3.1-8B-Instruct"]


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON"), ("[1]", "holds a list"), ("\xff", "not valid JSON")]
)
def test_config_files_that_are_not(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_pretrained(tmp_path)


def test_kv_head_refuses_heads_that_are_not() -> None:
    config = LlamaConfig.from_dict(BASE)
    with pytest.raises(IndexError, match="0 to 3"):
        config.kv_head(4)
