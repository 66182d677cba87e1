"""Makes the two tiny checkpoints beside this file, of random weights with every awkward option on, and what Hugging Face
computes on them: `python weights/make_tiny.py` (needs torch).

`reference.safetensors` holds, for one left-padded prompt, every site of the site table and the logits, so that parity is
tested without torch. tests/reference.py does the computing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from tests.reference import reference_sites  # noqa: E402

COMMON = dict(vocab_size=97, num_hidden_layers=3, bos_token_id=1, eos_token_id=2, pad_token_id=0)
N_TOKENS, N_PADDING = 40, 3


def main() -> None:
    # Grouped queries, a head size that is not E / H, untied, biases everywhere, Llama 3.1's rotary scaling past its
    # original context, a large epsilon, another activation; float32 in shards; transformers 5's spelling of the config.
    make(
        "tiny-gqa",
        LlamaConfig(
            **COMMON, hidden_size=36, intermediate_size=52, num_attention_heads=6, num_key_value_heads=2, head_dim=10,
            hidden_act="gelu_pytorch_tanh", max_position_embeddings=128, rms_norm_eps=3e-3, tie_word_embeddings=False,
            attention_bias=True, mlp_bias=True,
            rope_parameters=dict(
                rope_type="llama3", rope_theta=5000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=16,
            ),
        ),
        torch.float32,
        shard="40KB",
    )  # fmt: skip
    # One key/value head, tied, LongRoPE past its original context; bfloat16 in one file; transformers 4's spelling.
    make(
        "tiny-mqa",
        LlamaConfig(
            **COMMON, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=1, head_dim=8,
            hidden_act="silu", max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=True,
            rope_parameters=dict(
                rope_type="longrope", rope_theta=10000.0, factor=4.0, short_factor=[1.0, 1.1, 1.3, 1.6],
                long_factor=[1.0, 1.9, 3.1, 4.2], original_max_position_embeddings=16,
            ),
        ),
        torch.bfloat16,
        shard="1GB",
        old_spelling=True,
    )  # fmt: skip


def make(name: str, config: LlamaConfig, dtype: torch.dtype, *, shard: str, old_spelling: bool = False) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for (
            key,
            parameter,
        ) in model.named_parameters():  # norms and biases too: a 1 or a 0 would hide one that is not read
            parameter.normal_(1.0 if "norm" in key else 0.0, 0.25)
    model = model.to(dtype)
    directory = HERE / name
    model.save_pretrained(directory, max_shard_size=shard)
    (directory / "generation_config.json").unlink(missing_ok=True)
    if old_spelling:
        path = directory / "config.json"
        values = json.loads(path.read_text())
        scaling = values.pop("rope_parameters")
        values["rope_theta"] = scaling.pop("rope_theta")
        scaling["type"] = scaling.pop("rope_type")
        values["rope_scaling"] = scaling
        values["torch_dtype"] = values.pop("dtype")
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, N_TOKENS).astype(np.int32)
    mask = np.arange(N_TOKENS) >= N_PADDING
    sites = reference_sites(LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval(), tokens, mask)
    arrays = {key: np.ascontiguousarray(value) for key, value in sites.items()}
    save_file({**arrays, "tokens": tokens, "mask": mask}, directory / "reference.safetensors")
    print(directory.name, f"{sum(path.stat().st_size for path in directory.iterdir()) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
