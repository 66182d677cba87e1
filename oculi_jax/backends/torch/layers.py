"""The network in torch, of many rows at once `[N, …]`, and the one loop over its layers. At each site it calls a tap, and
knows nothing else of edits or captures.

What an Apple GPU lacks or gets wrong is not used: no float64, no reduction of integers, no fused attention there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...models.llama.config import LlamaConfig
from .activations import ACTIVATIONS
from .layout import Layout

# Rows of the unembedding that are widened to float32 at once.
_VOCABULARY_AT_ONCE = 16384
Tap = Callable[[str, Tensor], Tensor]
# Layer, and keys and values of the tokens that run → those of all tokens so far.
Remember = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


class Taps(Protocol):
    """A tap that knows the layer: what `run_layers` calls.

    Attributes:
        layer: the layer that runs; None outside of them.
    """

    layer: int | None

    def enter(self, layer: int | None) -> None:
        """Says which layer the next sites are of."""
        ...

    def touches(self, *sites: str) -> bool:
        """Whether any of these is edited or captured here."""
        ...

    def edits(self, *sites: str) -> bool:
        """Whether any of these is edited here."""
        ...

    def __call__(self, site: str, value: Tensor) -> Tensor: ...


def untouched(_: str, value: Tensor) -> Tensor:
    """A tap that does nothing."""
    return value


@dataclass(frozen=True)
class Weights:
    """References to a model's weights: of each layer by their names in the table of parameters, as a checkpoint shapes them."""

    config: LlamaConfig
    embed: Tensor
    layers: list[dict[str, Tensor]]
    norm: Tensor
    unembed: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """The unembedding `[…, E]` → `[…, V]`; float32 whatever the weights."""
        x = x.to(self.unembed.device)
        if x.dtype == self.unembed.dtype == torch.float32:
            return F.linear(x, self.unembed)
        parts = self.unembed.split(_VOCABULARY_AT_ONCE)
        return torch.cat([F.linear(x.float(), part.float()) for part in parts], dim=-1)

    def normalise(self, x: Tensor, tap: Tap) -> Tensor:
        """The final norm."""
        return tap("final_norm", _norm(x.to(self.norm.device), self.norm, self.config.rms_norm_eps, "final_scale", tap))


def _norm(x: Tensor, weight: Tensor, eps: float, site: str, tap: Tap) -> Tensor:
    wide = x.float()
    scale = tap(site, torch.rsqrt(wide.square().mean(-1) + eps))
    return weight * (wide * scale[..., None]).to(x.dtype)


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = rotation
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def _softmax(scores: Tensor, allowed: Tensor) -> Tensor:
    """Softmax over the allowed keys; a row with none is zero. A score of −∞ counts as not allowed."""
    allowed = allowed & (scores != -torch.inf)
    lowest = torch.finfo(torch.float32).min
    return torch.where(allowed, torch.softmax(torch.where(allowed, scores, lowest), dim=-1), 0.0)


def _attention(
    w: dict[str, Tensor], x: Tensor, layout: Layout, tap: Taps, config: LlamaConfig, remember: Any
) -> Tensor:
    sizes, (n, n_tokens, _) = config.sizes, x.shape
    n_heads, n_kv, head_dim = sizes["H"], sizes["K"], sizes["D"]

    def project(name: str, heads: int) -> Tensor:
        y = F.linear(x, w[f"attn.{name}.weight"], w.get(f"attn.{name}.bias"))
        return y.view(n, n_tokens, heads, head_dim).transpose(1, 2)

    layer = tap.layer
    assert layer is not None
    rotation = layout.rotation(layer)
    q = tap("q", _rotate(tap("q_pre_rope", project("q", n_heads)), rotation))
    k = tap("k", _rotate(tap("k_pre_rope", project("k", n_kv)), rotation))
    v = tap("v", project("v", n_kv))
    if remember is not None:
        k, v = remember(layer, k, v)
    n_keys, groups = k.shape[2], n_heads // n_kv
    if may_fuse(x.device) and not tap.touches("scores", "allowed", "pattern"):
        z = _fused(q, k, v, layout, layer)
    else:
        # Entry g of a key/value head's block of queries is query head k · G + g.
        rows = q.reshape(n, n_kv, groups * n_tokens, head_dim).float()
        scores = torch.matmul(rows, k.float().transpose(-1, -2)) * head_dim**-0.5
        scores = tap("scores", scores.view(n, n_heads, n_tokens, n_keys))
        allowed = layout.allowed(layer)
        if tap.touches("allowed"):
            allowed = tap("allowed", allowed.expand(scores.shape))
        if layout.queries is None and not tap.edits("scores", "allowed"):
            pattern = torch.softmax(scores + layout.bias(layer), dim=-1)
        else:
            pattern = _softmax(scores, allowed)
        pattern = tap("pattern", pattern.to(x.dtype))
        z = torch.matmul(pattern.reshape(n, n_kv, groups * n_tokens, n_keys), v).view(q.shape)
    z = tap("z", z).transpose(1, 2).reshape(n, n_tokens, n_heads * head_dim)
    return tap("attn_out", F.linear(z, w["attn.o.weight"], w.get("attn.o.bias")))


def may_fuse(device: torch.device) -> bool:
    """Whether fused attention can be trusted: on Apple's GPUs it has been silently wrong (pytorch issues 163597, 181133)."""
    return device.type != "mps"


def _fused(q: Tensor, k: Tensor, v: Tensor, layout: Layout, layer: int) -> Tensor:
    """Attention that nobody reads into; zero where the token is padding."""
    n, n_heads = q.shape[:2]
    if k.shape[1] != n_heads:
        k, v = (
            x[:, :, None].expand(-1, -1, n_heads // x.shape[1], -1, -1).reshape(n, n_heads, *x.shape[2:])
            for x in (k, v)
        )
    if layout.is_causal(layer) and (layout.first == 0 or layout.n_tokens == 1):
        return F.scaled_dot_product_attention(q, k, v, is_causal=layout.n_tokens > 1)
    allowed = layout.allowed(layer)
    if layout.queries is None:
        return F.scaled_dot_product_attention(q, k, v, allowed)
    padding = ~layout.queries[:, None, :, None]
    return F.scaled_dot_product_attention(q, k, v, allowed | padding).masked_fill(padding, 0.0)


def _block(
    w: dict[str, Tensor], resid: Tensor, layout: Layout, tap: Taps, config: LlamaConfig, remember: Any
) -> Tensor:
    eps = config.rms_norm_eps
    resid = tap("resid_pre", resid)
    x = tap("attn_in", _norm(resid, w["attn_norm.weight"], eps, "attn_scale", tap))
    resid = tap("resid_mid", resid + _attention(w, x, layout, tap, config, remember))
    x = tap("mlp_in", _norm(resid, w["mlp_norm.weight"], eps, "mlp_scale", tap))

    def project(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"mlp.{name}.weight"], w.get(f"mlp.{name}.bias"))

    gate, up = tap("gate", project("gate", x)), tap("up", project("up", x))
    learned = {
        name.removeprefix("mlp.act_fn."): x.reshape(()) for name, x in w.items() if name.startswith("mlp.act_fn.")
    }
    gate_act = tap("gate_act", ACTIVATIONS[config.hidden_act](gate, **learned).to(gate.dtype))
    return tap("resid_post", resid + tap("mlp_out", project("down", tap("act", gate_act * up))))


def embed(w: Weights, tokens: np.ndarray, layout: Layout, tap: Tap) -> Tensor:
    """The embeddings of tokens `[N, T]`; of padding, which may be no token at all, token 0's."""
    if layout.real is not None:
        tokens = np.where(layout.real[:, layout.first : layout.first + layout.n_tokens], tokens, 0)
    if tokens.min() < 0 or tokens.max() >= w.config.vocab_size:
        raise ValueError(
            f"tokens holds {tokens.min()} to {tokens.max()}, and this vocabulary has ids 0 to {w.config.vocab_size - 1}."
        )
    return tap("embed", F.embedding(torch.from_numpy(tokens.astype(np.int64)).to(w.embed.device), w.embed))


def run_layers(
    w: Weights, resid: Tensor, layout: Layout, tap: Taps, layers: range, remember: Remember | None = None
) -> Tensor:
    """Runs layers, each where its weights are."""
    for layer in layers:
        own = w.layers[layer]
        device = own["attn_norm.weight"].device
        resid, layout = resid.to(device), layout.to(device)
        tap.enter(layer)
        resid = _block(own, resid, layout, tap, w.config, remember)
    tap.enter(None)
    return resid
