"""A Llama of torch in float64, whose backward pass has rules written as their papers write them: with `detach()`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from oculi_jax.models.decoder.rope import rotary
from oculi_jax.models.llama import Llama

Site = Callable[[str, int | None, Tensor], Tensor]


def less(x: Tensor, fraction: Any) -> Tensor:
    """x, a fraction of which is a constant: a number, or one for each head."""
    c = torch.as_tensor(np.asarray(fraction, np.float64))
    c = c.reshape(*c.shape, *(1,) * (x.ndim - c.ndim))
    return (1 - c) * x + c * x.detach()


class Softmax(torch.autograd.Function):
    """GIM's, appendix of arXiv:2505.17630: back through p_T = softmax(s / T), without its 1 / T."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, temperature: Tensor) -> Tensor:
        ctx.save_for_backward(torch.softmax(scores / temperature, -1))
        return torch.softmax(scores, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (soft,) = ctx.saved_tensors
        (g,) = gradients
        return soft * (g - (g * soft).sum(-1, keepdim=True)), None


def number(rule: Any, layer: int | None) -> Any:
    """A rule's of one layer: a number is for all."""
    x = np.asarray(rule, np.float64)
    return x if layer is None or not x.ndim else x[layer]


class ByAutograd:
    """The model's own arithmetic in float64, unpadded.

    Args:
        model: whose parameters it has.
    """

    def __init__(self, model: Llama):
        self.config = model.config
        layers = model.layers
        parts = {
            **{name: getattr(layers.attn, name).weight for name in "qkvo"},
            **{name: getattr(layers.mlp, name).weight for name in ("gate", "up", "down")},
            "attn_norm": layers.attn_norm.weight, "mlp_norm": layers.mlp_norm.weight,
        }  # fmt: skip
        self.layers = {name: self.tensor(weight[...]) for name, weight in parts.items()}
        self.embed, self.norm = self.tensor(model.embed[...]), self.tensor(model.norm.weight[...])
        self.unembed = self.tensor(model.lm_head.weight)

    @staticmethod
    def tensor(x: Any) -> Tensor:
        return torch.tensor(np.asarray(x, np.float64))

    def __call__(self, embed: Tensor, rules: Mapping[str, Any] = {}, site: Site = lambda name, layer, x: x) -> Tensor:
        """Logits of the last token.

        Args:
            embed: `[T, E]`.
            rules: a site → the fraction that is stopped there; `"product of z"`, `"product of scores"`, `"product of act"` → at
                each of the two factors; `"secant"`; `"temperature"`.
            site: edits a value before its rule.
        """
        c, w = self.config, self.layers
        n, group = len(embed), c.num_attention_heads // c.num_key_value_heads
        turn = [self.tensor(x) for x in rotary(c, jnp.arange(n), n, c.rope)]  # float32's, of any model
        causal = torch.tril(torch.ones(n, n, dtype=torch.bool))

        def at(name: str, layer: int | None, x: Tensor) -> Tensor:
            x = site(name, layer, x)
            return less(x, number(rules[name], layer)) if name in rules else x

        def normed(name: str, layer: int | None, x: Tensor, weight: Tensor) -> Tensor:
            return x * at(name, layer, torch.rsqrt(x.pow(2).mean(-1) + c.rms_norm_eps))[:, None] * weight

        def turned(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return torch.cat([first * turn[0] - second * turn[1], second * turn[0] + first * turn[1]], -1)

        def factors(name: str, layer: int, *both: Tensor) -> tuple[Tensor, ...]:
            fraction = rules.get(f"product of {name}", 0.0)
            return tuple(less(x, number(fraction, layer)) for x in both)

        x = at("embed", None, embed)
        for layer in range(c.num_hidden_layers):
            x = at("resid_pre", layer, x)
            h = at("attn_in", layer, normed("attn_scale", layer, x, w["attn_norm"][layer]))
            q, k, v = (torch.einsum("te,hde->htd", h, w[name][layer]) for name in "qkv")
            q, k = (at(name, layer, turned(at(f"{name}_pre_rope", layer, y))) for name, y in (("q", q), ("k", k)))
            v = at("v", layer, v)
            q, k = factors("scores", layer, q, k.repeat_interleave(group, 0))
            scores = at("scores", layer, torch.einsum("htd,hsd->hts", q, k) * c.attention_scale)
            scores = scores.masked_fill(~causal, -torch.inf)
            heat = number(rules.get("temperature", 1.0), layer).reshape(-1, 1, 1)
            pattern = at("pattern", layer, Softmax.apply(scores, self.tensor(heat)))
            pattern, v = factors("z", layer, pattern, v.repeat_interleave(group, 0))
            z = at("z", layer, torch.einsum("hts,hsd->htd", pattern, v))
            x = at("resid_mid", layer, x + at("attn_out", layer, torch.einsum("htd,ehd->te", z, w["o"][layer])))
            h = at("mlp_in", layer, normed("mlp_scale", layer, x, w["mlp_norm"][layer]))
            gate, up = (at(name, layer, h @ w[name][layer].T) for name in ("gate", "up"))
            secant = number(rules.get("secant", 0.0), layer)
            ratio = torch.sigmoid(gate)
            gate_act, up = factors("act", layer, at("gate_act", layer, gate * less(ratio, secant)), up)
            out = at("act", layer, gate_act * up) @ w["down"][layer].T
            x = at("resid_post", layer, x + at("mlp_out", layer, out))
        return at("final_norm", None, normed("final_scale", None, x, self.norm))[-1] @ self.unembed.T
