"""Checkpoints of the families as they are published: text parts of models that see, sparse configs, shards, tied heads."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from oculi_jax import forward, from_pretrained
from oculi_jax.models.decoder.config import DecoderConfig

from .test_families import KINDS, SIZES, make

pytestmark = pytest.mark.torch

SIGHT = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
# As Google publishes Gemma 3 4B; the vision tower's fields matter to nobody here.
GEMMA_3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
    "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
    "vision_config": {"hidden_size": 1152, "image_size": 896, "model_type": "siglip_vision_model", "num_hidden_layers": 27},
}  # fmt: skip
TOKENS = np.random.default_rng(1).integers(3, 58, 13)


def theirs(hf: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return hf(torch.tensor(TOKENS)[None]).logits[0].numpy()


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A Gemma 3 with a vision tower, and where it is saved."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = dict(SIZES, head_dim=8, sliding_window=4, num_hidden_layers=7)
    config = Gemma3Config(
        text_config=text, vision_config=SIGHT, mm_tokens_per_image=4, boi_token_index=58, eoi_token_index=59,
        image_token_index=60,
    )  # fmt: skip
    torch.manual_seed(0)
    hf = Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.normal_(0, 0.3)
    directory = tmp_path_factory.mktemp("seeing")
    hf.save_pretrained(directory)
    return directory, hf


# How transformers' versions name the tensors of the text part, its head, and what sees.
NAMES = {
    "4.50": ("language_model.model.", "language_model.lm_head.", ""),
    "4.52": ("model.language_model.", "lm_head.", "model."),
    "as saved here": None,
}


@pytest.mark.parametrize("backend", ["jax", "torch"])
@pytest.mark.parametrize("version", NAMES)
def test_of_a_gemma_that_sees_the_text_part_is_read(
    seeing: tuple[Path, Any], version: str, backend: str, tmp_path: Path
) -> None:
    directory, hf = seeing
    tensors = load_file(directory / "model.safetensors")
    if names := NAMES[version]:
        text, head, sight = names
        own = {re.sub(r"^(model\.language_model|language_model\.model)\.", "", name): x for name, x in tensors.items()}
        assert len(own) == len(tensors) and "norm.weight" in own
        tensors = {
            (sight if name.startswith(("vision_tower", "multi_modal")) else text) + name: x for name, x in own.items()
        }
        tensors[f"{head}weight"] = tensors[f"{text}embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    with pytest.warns(UserWarning, match="sees pictures too.* multi_modal_projector and vision_tower are left") as said:
        model = from_pretrained(tmp_path, backend=backend)
    assert len(said) == 1
    np.testing.assert_allclose(forward(model, TOKENS).logits, theirs(hf), atol=2e-4)
    assert model.config.model_type == "gemma3_text"
    if backend == "jax":
        model.save_pretrained(tmp_path / "text")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert from_pretrained(tmp_path / "text").config == model.config


def test_of_a_mistral_that_sees_the_text_part_is_read(tmp_path: Path) -> None:
    """Mistral Small 3.1."""
    import torch
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text = dict(SIZES, head_dim=8, sliding_window=None, model_type="mistral", rms_norm_eps=1e-5)
    sight = dict(SIGHT, model_type="pixtral", head_dim=8)
    config = Mistral3Config(text_config=text, vision_config=sight, image_token_index=60)
    torch.manual_seed(0)
    hf = Mistral3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.normal_(0, 0.3)
    hf.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="sees pictures too.* multi_modal_projector and vision_tower are left"):
        model = from_pretrained(tmp_path)
    assert model.config.model_type == "mistral"
    np.testing.assert_allclose(forward(model, TOKENS).logits, theirs(hf), atol=2e-4)


def test_what_sees_and_is_unknown_is_not_passed_over(seeing: tuple[Path, Any], tmp_path: Path) -> None:
    directory, hf = seeing
    tensors = load_file(directory / "model.safetensors")
    save_file({**tensors, "audio_tower.weight": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    with (
        pytest.warns(UserWarning, match="sees pictures"),
        pytest.raises(ValueError, match=r"unexpected: audio_tower\.weight"),
    ):
        from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="Gemma3ForConditionalGeneration, .* reads the text part"):
        forward(hf, TOKENS)


def test_the_published_gemma_3_is_read_as_transformers_reads_it() -> None:
    from transformers import Gemma3Config

    own, full = DecoderConfig.from_dict(GEMMA_3_4B), Gemma3Config.from_dict(GEMMA_3_4B).to_dict()
    assert own == DecoderConfig.from_dict(full)
    text = full["text_config"]
    assert own.sizes["V"] == text["vocab_size"] and own.sizes["K"] == text["num_key_value_heads"]
    kinds = {True: text["rope_parameters"]["full_attention"], False: text["rope_parameters"]["sliding_attention"]}
    for kind, name in zip(own.layer_kinds, text["layer_types"], strict=True):
        rope = kinds[name == "full_attention"]
        assert kind.rope is not None and (kind.window is None) == (name == "full_attention")
        assert (kind.rope.type, kind.rope.theta, kind.rope.factor) == (
            rope["rope_type"], rope["rope_theta"], rope.get("factor"),
        )  # fmt: skip
    assert own.eos_token_id == (1, 106) and own.dtype == "bfloat16"
    with pytest.raises(ValueError, match="quantization_config"):
        DecoderConfig.from_dict({**GEMMA_3_4B, "quantization_config": {"bits": 4}})


# As Microsoft publishes Phi-4-mini, with fewer factors written out.
PHI_4_MINI = {
    "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 199999,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "embd_pdrop": 0.0, "eos_token_id": 199999, "full_attn_mod": 1,
    "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02, "intermediate_size": 8192, "interpolate_factor": 1,
    "lm_head_bias": False, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "phi3", "num_attention_heads": 24,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "original_max_position_embeddings": 4096, "pad_token_id": 199999,
    "partial_rotary_factor": 0.75, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
    "rope_scaling": {"long_factor": [1.0 + i for i in range(48)], "short_factor": [1.0] * 48, "type": "longrope"},
    "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0", "use_cache": True, "vocab_size": 200064,
}  # fmt: skip


@pytest.mark.quick
def test_the_published_phi_4_mini_is_read_as_transformers_reads_it() -> None:
    from transformers import Phi3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from oculi_jax.models.decoder.rope import attention_factor, inverse_frequencies

    config = Phi3Config.from_dict(copy.deepcopy(PHI_4_MINI))  # it changes what it is given
    own = DecoderConfig.from_dict(PHI_4_MINI)
    assert own == DecoderConfig.of_transformers(config.to_dict()) == DecoderConfig.from_dict(own.to_dict())
    assert own.head_dim == 128 and own.rope.turned(128) == 96 and own.steady_length == 4096
    for length in (4096, 4097):
        want, factor = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", seq_len=length)
        np.testing.assert_allclose(inverse_frequencies(own, length, own.rope), want.numpy(), rtol=1e-6)
        assert attention_factor(own.rope) == pytest.approx(factor, rel=1e-12)
    # Names of the type in older files, of which transformers 5 reads no more than the last.
    for kind in ("su", "yarn", "longrope"):
        assert (
            DecoderConfig.from_dict({**PHI_4_MINI, "rope_scaling": {**PHI_4_MINI["rope_scaling"], "type": kind}}) == own
        )
    # transformers 4 takes these three and no others.
    assert set(own.to_dict()["rope_scaling"]) == {"type", "short_factor", "long_factor"}
    for wrong, sentence in (
        ({"partial_rotary_factor": 0.7}, "0.7 of head_dim 128 is 89, and an even number must turn"),
        ({"partial_rotary_factor": 2}, "partial_rotary_factor is 2, and a number from 0 to 1"),
        ({"partial_rotary_factor": 0.5}, "short_factor must be a list of head_dim/2 = 32 numbers"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "the rotary type 'linear' is not one of default, longrope",
        ),
        ({"lm_head_bias": True}, "lm_head_bias = True"),
    ):
        with pytest.raises(ValueError, match=sentence):
            DecoderConfig.from_dict({**PHI_4_MINI, **wrong})


# As LG publishes EXAONE 4.0 32B, with fewer layers.
EXAONE_4_32B = {
    "architectures": ["Exaone4ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 361, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 27392,
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 2,
    "max_position_embeddings": 131072, "model_type": "exaone4", "num_attention_heads": 40, "num_hidden_layers": 8,
    "num_key_value_heads": 8, "pad_token_id": 0, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 1000000, "sliding_window": 4096, "sliding_window_pattern": "LLLG", "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.54.0.dev0", "use_cache": True, "vocab_size": 102400,
}  # fmt: skip


@pytest.mark.quick
def test_the_published_exaone_4_is_read_as_transformers_reads_it() -> None:
    from transformers import Exaone4Config

    own = DecoderConfig.from_dict(EXAONE_4_32B)
    assert own == DecoderConfig.of_transformers(Exaone4Config.from_dict(copy.deepcopy(EXAONE_4_32B)).to_dict())
    assert own == DecoderConfig.from_dict(own.to_dict()) and own.windows == (4096, 4096, 4096, None) * 2
    assert [kind.rope is not None for kind in own.layer_kinds] == [True, True, True, False] * 2
    # With a window no layer turns that sees all tokens, although none has it; without one all do (1.2B).
    full = ["full_attention"] * 8
    for window, pattern, turns in ((4096, "LLLG", False), (None, None, True)):
        found = DecoderConfig.from_dict(
            {**EXAONE_4_32B, "layer_types": full, "sliding_window": window, "sliding_window_pattern": pattern}
        )
        assert DecoderConfig.from_dict(found.to_dict()) == found and found.windows == ()
        assert {kind.rope is not None for kind in found.layer_kinds} == {turns}
    by_letters = {name: value for name, value in EXAONE_4_32B.items() if name != "layer_types"}
    with pytest.raises(ValueError, match="sliding_window_pattern is 'LLLG', and a positive integer is expected"):
        DecoderConfig.from_dict(by_letters)
    assert DecoderConfig.from_dict({**by_letters, "sliding_window_pattern": 4}) == own
    with pytest.raises(TypeError):
        Exaone4Config.from_dict(copy.deepcopy(by_letters))


@pytest.mark.quick
@pytest.mark.parametrize(
    "kind",
    [
        "gemma2",
        "gemma3",
        "olmo3",
        "qwen2, windows, tied",
        "qwen3, windows, biases",
        "smollm3, windows, biases",
        "exaone4",
    ],
)
def test_layers_with_a_window_have_one(kind: str) -> None:
    """Where a config calls layers so and gives no window transformers cannot run them either."""
    import transformers

    name, options = KINDS[kind]
    full = getattr(transformers, f"{name}Config")(**options).to_dict()
    assert "sliding_attention" in full["layer_types"]
    with pytest.raises(ValueError, match="of the type 'sliding_attention', and the config gives them no window"):
        DecoderConfig.of_transformers({**full, "sliding_window": None})
    sizes = {field: value for field, value in options.items() if field != "layer_types"}
    hf = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**{**sizes, "layer_types": full["layer_types"], "sliding_window": None})
    )
    with pytest.raises((ValueError, TypeError, KeyError)):
        theirs(hf)


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_field_means_what_it_means_in_transformers(kind: str) -> None:
    """Each field of each family left out, and all that were not given: ours is then the config of transformers' own defaults."""
    import transformers

    name, options = KINDS[kind]
    cls = getattr(transformers, f"{name}Config")
    full = cls(**options).to_dict()
    sparse = {**options, "model_type": full["model_type"]}
    assert DecoderConfig.from_dict(sparse) == DecoderConfig.of_transformers(full)
    assert DecoderConfig.from_dict(cls(**options).to_diff_dict()) == DecoderConfig.of_transformers(full)

    def read(values: dict[str, Any]) -> DecoderConfig | str:
        try:
            return DecoderConfig.of_transformers(values)
        except ValueError as error:
            return str(error)

    n_compared = 0
    for left_out in options:
        fewer = {field: value for field, value in sparse.items() if field != left_out}
        ours = read(fewer)
        if isinstance(ours, str) and f"{left_out} is missing" in ours:
            continue
        if left_out == "num_hidden_layers" and ("layer_types" in options or "no_rope_layers" in options):
            continue  # transformers' own number of layers is not that of the list
        if left_out == "layer_types" and kind.startswith("exaone4"):
            continue  # without a window transformers divides by zero there
        assert ours == read(cls.from_dict(fewer).to_dict()), left_out
        n_compared += 1
    assert n_compared >= 4
    nothing = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    none = DecoderConfig.from_dict({**sparse, **nothing})
    assert none.eos_token_id is none.pad_token_id is None and DecoderConfig.from_dict(none.to_dict()) == none


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_the_same_model_to_transformers(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    hf = make(kind)
    hf.save_pretrained(tmp_path / "theirs")
    model = from_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    assert from_pretrained(tmp_path / "ours").config == model.config
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", local_files_only=True).eval()
    assert type(back) is type(hf)
    np.testing.assert_array_equal(theirs(back), theirs(hf))


def test_shards_and_tied_heads_of_another_family(tmp_path: Path) -> None:
    hf = make("gemma2")  # tied: lm_head is in no file
    hf.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3 and not (tmp_path / "model.safetensors").exists()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"]
    np.testing.assert_allclose(forward(from_pretrained(tmp_path), TOKENS).logits, theirs(hf), atol=2e-4)


def test_quantised_weights_of_another_family_are_refused_by_name(tmp_path: Path) -> None:
    make("qwen3").save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_text()
    change(tmp_path / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match=r"quantization_config = \{'quant_method': 'gptq'"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(before)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].astype(np.int8)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"up_proj\.weight is I8 in"):
        from_pretrained(tmp_path)
