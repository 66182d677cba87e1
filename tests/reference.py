"""Every site of a model computed by Hugging Face's own eager torch code: the independent side of the parity tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import memory
from .tolerances import assert_parity, beyond, parity, record

NAME = "oculi_reference"


def _recording_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """The family's own eager attention, with what goes in and comes out kept on the module."""
    own = vars(sys.modules[type(module).__module__])
    out, pattern = own["eager_attention_forward"](
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )
    scores = torch.matmul(query, own["repeat_kv"](key, module.num_key_value_groups).transpose(2, 3)) * scaling
    if (cap := kwargs.get("softcap")) is not None:
        scores = torch.tanh(scores / cap) * cap
    module.recorded = {
        "q": query, "k": key, "v": value, "scores": scores, "pattern": pattern, "z": out.transpose(1, 2),
        "allowed": (attention_mask == 0).expand(pattern.shape),
    }  # fmt: skip
    return out, pattern


def _scale(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / rms in float64: the definition, not Hugging Face's rounding of it."""
    return torch.rsqrt(x.double().pow(2).mean(-1) + eps)


def reference_sites(hf: PreTrainedModel, tokens: Any, mask: Any = None) -> dict[str, np.ndarray]:
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
    eps, config = hf.config.rms_norm_eps, hf.config
    handles = []

    def keep(module, name, layer, *, what="output"):
        def hook(_, args, kwargs, output):
            value = output if what == "output" else (args[0] if args else kwargs["hidden_states"])
            value = value[0] if isinstance(value, tuple) else value
            seen[name, layer] = value.detach()

        handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def split(module, sizes, layer):
        """What a projection writes that is several, one after the other, as each."""

        def hook(_, args, output):
            for (name, _), part in zip(sizes.items(), output.detach().split(tuple(sizes.values()), -1), strict=True):
                seen[name, layer] = part

        handles.append(module.register_forward_hook(hook))

    model = hf.model
    keep(model.embed_tokens, "embed", -1)
    keep(model.norm, "final_in", -1, what="input")
    keep(model.norm, "final_norm", -1)
    for i, layer in enumerate(model.layers):
        attn, mlp = layer.self_attn, layer.mlp
        first, after = hasattr(layer, "input_layernorm"), hasattr(layer, "post_feedforward_layernorm")
        keep(layer, "resid_pre", i, what="input")
        keep(attn, "attn_in", i, what="input")
        if fused := getattr(attn, "qkv_proj", None):
            width, few = (n * attn.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
            split(fused, {"q_proj": width, "k_proj": few, "": few}, i)
            split(fused, {"q_pre_rope": width, "k_pre_rope": few, "": few}, i)
        else:
            for name in ("q", "k"):
                keep(getattr(attn, f"{name}_proj"), f"{name}_proj", i)
                keep(getattr(attn, f"{name}_norm", getattr(attn, f"{name}_proj")), f"{name}_pre_rope", i)
        keep(attn.o_proj, "attn_proj", i)
        keep(layer.post_attention_layernorm if after else attn.o_proj, "attn_out", i)
        entry = mlp if not first else layer.pre_feedforward_layernorm if after else layer.post_attention_layernorm
        keep(entry, "resid_mid", i, what="input")
        keep(mlp, "mlp_in", i, what="input")
        if fused := getattr(mlp, "gate_up_proj", None):
            split(fused, {"gate": config.intermediate_size, "up": config.intermediate_size}, i)
        else:
            keep(mlp.gate_proj, "gate", i)
            keep(mlp.up_proj, "up", i)
        keep(getattr(mlp, "act_fn", None) or mlp.activation_fn, "gate_act", i)
        keep(mlp.down_proj, "act", i, what="input")
        keep(mlp.down_proj, "mlp_proj", i)
        keep(layer.post_feedforward_layernorm if after else mlp.down_proj, "mlp_out", i)
        keep(layer, "resid_post", i)
    try:
        with torch.no_grad():
            positions = (real.cumsum(-1) - 1).clamp(min=0)
            logits = hf(ids, attention_mask=real, position_ids=positions, use_cache=False).logits[0]
        for i, layer in enumerate(model.layers):
            for name, value in layer.self_attn.recorded.items():
                seen[name, i] = value
            del layer.self_attn.recorded
            head_dim = layer.self_attn.head_dim
            for name in ("q", "k"):
                all_heads = (
                    getattr(getattr(layer.self_attn, f"{name}_norm", None), "weight", torch.empty(0)).numel() > head_dim
                )
                raw = seen[f"{name}_proj", i]
                heads = seen[f"{name}_proj", i] = raw.unflatten(-1, (-1, head_dim)).transpose(1, 2)
                scale = _scale(raw, eps)[:, None] if all_heads else _scale(heads, eps)
                seen[f"{name}_scale", i] = scale.expand(heads.shape[:-1])
                own = seen[f"{name}_pre_rope", i]
                own = own.unflatten(-1, (-1, head_dim)) if own.dim() == 3 else own
                seen[f"{name}_pre_rope", i] = own if own.shape == heads.shape else own.transpose(1, 2)
            seen["attn_scale", i] = _scale(seen["resid_pre", i], eps)
            seen["mlp_scale", i] = _scale(seen["resid_mid", i], eps)
            for name in ("attn", "mlp"):
                seen[f"{name}_post_scale", i] = _scale(seen[f"{name}_proj", i], eps)
                seen[f"{name}_out", i] = seen[f"{name}_out", i] * getattr(config, "residual_multiplier", 1.0)
        seen["embed", -1] = seen["embed", -1] * getattr(config, "embedding_multiplier", 1.0)
        seen["final_scale", -1] = _scale(seen.pop(("final_in", -1)), eps)
    finally:
        for handle in handles:
            handle.remove()
        hf.set_attn_implementation(before)

    def array(x: torch.Tensor) -> np.ndarray:
        return x[0].float().numpy()

    n = len(model.layers)
    names = {name for name, _ in seen if name}
    sites = {
        name: array(seen[name, -1]) if (name, -1) in seen else np.stack([array(seen[name, i]) for i in range(n)])
        for name in names
    }
    sites["allowed"] = sites["allowed"].astype(bool) & real[0].bool().numpy()[:, None]
    return {**sites, "logits": logits.float().numpy()}


@contextmanager
def in_float64(hf: PreTrainedModel) -> Iterator[PreTrainedModel]:
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


@contextmanager
def products_of_xla() -> Iterator[None]:
    """torch's linear maps as XLA multiplies on this processor, everything else being torch's.

    How many terms XLA sums in a row is up to what it makes of a processor's caches: a few hundred on most, 2048 on some, where its
    products are three times as far from float64 as torch's, and so is whatever is made of them.
    """

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        found = jnp.einsum("...e,fe->...f", x.numpy(), weight.detach().numpy(), precision=jax.lax.Precision.HIGHEST)
        y = torch.from_numpy(np.array(found))
        return y if bias is None else y + bias

    own = torch.nn.functional.linear
    torch.nn.functional.linear = linear
    try:
        with torch.no_grad():
            yield
    finally:
        torch.nn.functional.linear = own


@cache
def xla_sums_are_long() -> bool:
    """Whether XLA sums some 2000 terms in a row here: their rounding is then three times that of sums in pieces."""
    x, w = np.random.default_rng(0).normal(size=(2, 64, 2048)).astype(np.float32)
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    found = np.asarray(jnp.einsum("te,fe->tf", x, w, precision=jax.lax.Precision.HIGHEST), np.float64)
    return bool(np.std(found - exact) > 5e-7 * np.std(exact))


def assert_near(hf: PreTrainedModel, out: Any, tokens: Any, mask: np.ndarray) -> None:
    """That a run is within the contract's bounds of Hugging Face's code: in float32, or else, since its rounding is in these too,
    in float64. Where XLA's sums are long, a site may be twice as far from that as XLA's products bring Hugging Face's own code.

    Args:
        hf: the model, in eval mode.
        out: of `forward`, of all sites.
        tokens, mask: `[T]`.
    """
    real = None if mask.all() else mask
    errors = parity(out.activations, out.logits, reference_sites(hf, tokens, real), mask)
    if noisy := beyond(errors):
        with in_float64(hf) as exact_hf:
            exact = reference_sites(exact_hf, tokens, real)
        from_exact = parity(out.activations, out.logits, exact, mask)
        errors |= {site: from_exact[site] for site in noisy}
        if (noisy := beyond(errors)) and xla_sums_are_long():
            record(errors)
            with products_of_xla():
                theirs = reference_sites(hf, tokens, real)
            rounding = parity({site: theirs[site] for site in out.activations}, theirs["logits"], exact, mask)
            errors = {site: error for site, error in errors.items() if site not in noisy or error > 2 * rounding[site]}
    assert_parity(errors)
