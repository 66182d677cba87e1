"""Every site of a Llama computed by Hugging Face's own eager torch code: the independent side of the parity tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward, repeat_kv

from . import memory

NAME = "oculi_reference"


def _recording_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Hugging Face's eager attention, with what goes in and comes out kept on the module."""
    out, pattern = eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    scores = torch.matmul(query, repeat_kv(key, module.num_key_value_groups).transpose(2, 3)) * scaling
    module.recorded = {
        "q": query, "k": key, "v": value, "scores": scores, "pattern": pattern, "z": out.transpose(1, 2)
    }  # fmt: skip
    return out, pattern


def _scale(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / rms in float64: the definition, not Hugging Face's rounding of it."""
    return torch.rsqrt(x.double().pow(2).mean(-1) + eps)


def reference_sites(hf: LlamaForCausalLM, tokens: Any, mask: Any = None) -> dict[str, np.ndarray]:
    """Site → float32 array with the axes of the site table (layered ones stacked), and `logits` `[T, V]`.

    Args:
        hf: the model, in eval mode.
        tokens: ids `[T]`.
        mask: bool `[T]`, True at real tokens.
    """
    ALL_ATTENTION_FUNCTIONS.register(NAME, _recording_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, eager_mask)
    before = hf.config._attn_implementation
    hf.set_attn_implementation(NAME)
    ids = torch.tensor(np.asarray(tokens))[None]
    real = torch.ones_like(ids) if mask is None else torch.tensor(np.asarray(mask)).long()[None]
    seen: dict[tuple[str, int], torch.Tensor] = {}
    eps, head_dim = hf.config.rms_norm_eps, hf.config.head_dim
    handles = []

    def keep(module, name, layer, *, what="output"):
        def hook(_, args, kwargs, output):
            value = output if what == "output" else (args[0] if args else kwargs["hidden_states"])
            value = value[0] if isinstance(value, tuple) else value
            seen[name, layer] = value.detach()

        handles.append(module.register_forward_hook(hook, with_kwargs=True))

    model = hf.model
    keep(model.embed_tokens, "embed", -1)
    keep(model.norm, "final_in", -1, what="input")
    keep(model.norm, "final_norm", -1)
    for i, layer in enumerate(model.layers):
        attn, mlp = layer.self_attn, layer.mlp
        keep(layer, "resid_pre", i, what="input")
        keep(layer.input_layernorm, "attn_in", i)
        keep(attn.q_proj, "q_pre_rope", i)
        keep(attn.k_proj, "k_pre_rope", i)
        keep(attn.o_proj, "attn_out", i)
        keep(layer.post_attention_layernorm, "resid_mid", i, what="input")
        keep(layer.post_attention_layernorm, "mlp_in", i)
        keep(mlp.gate_proj, "gate", i)
        keep(mlp.up_proj, "up", i)
        keep(mlp.act_fn, "gate_act", i)
        keep(mlp.down_proj, "act", i, what="input")
        keep(mlp.down_proj, "mlp_out", i)
        keep(layer, "resid_post", i)
    try:
        with torch.no_grad():
            positions = (real.cumsum(-1) - 1).clamp(min=0)
            logits = hf(ids, attention_mask=real, position_ids=positions, use_cache=False).logits[0]
        for i, layer in enumerate(model.layers):
            for name, value in layer.self_attn.recorded.items():
                seen[name, i] = value
            del layer.self_attn.recorded
            for name in ("q_pre_rope", "k_pre_rope"):
                seen[name, i] = seen[name, i].unflatten(-1, (-1, head_dim)).transpose(1, 2)
            seen["attn_scale", i] = _scale(seen["resid_pre", i], eps)
            seen["mlp_scale", i] = _scale(seen["resid_mid", i], eps)
        seen["final_scale", -1] = _scale(seen.pop(("final_in", -1)), eps)
    finally:
        for handle in handles:
            handle.remove()
        hf.set_attn_implementation(before)

    def array(x: torch.Tensor) -> np.ndarray:
        return x[0].float().numpy()

    n = len(model.layers)
    names = {name for name, _ in seen}
    sites = {
        name: array(seen[name, -1]) if (name, -1) in seen else np.stack([array(seen[name, i]) for i in range(n)])
        for name in names
    }
    causal = torch.tril(torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool)) & real[0].bool()[None, :]
    sites["allowed"] = (
        (causal & real[0].bool()[:, None]).numpy()[None, None].repeat(n, 0).repeat(hf.config.num_attention_heads, 1)
    )
    return {**sites, "logits": logits.float().numpy()}


@contextmanager
def in_float64(hf: LlamaForCausalLM) -> Iterator[LlamaForCausalLM]:
    """The float32 model computing in float64: each part goes there for its own turn, and back bit for bit.

    Either a copy or the whole model at once would be the most that a test process holds.
    """
    memory.let_go()
    handles = [hf.model.embed_tokens.register_forward_hook(lambda part, given, out: out.double())]
    for part in (*hf.model.layers, hf.model.norm, hf.lm_head):
        handles += [
            part.register_forward_pre_hook(lambda part, given: (part.double(), None)[1]),
            part.register_forward_hook(lambda part, given, out: (part.float(), None)[1]),
        ]
    try:
        yield hf
    finally:
        for handle in handles:
            handle.remove()
