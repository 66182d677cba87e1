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

from ...models.decoder.config import DecoderConfig
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
        """Whether any of these is edited or captured here, or wanted in any case."""
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

    config: DecoderConfig
    embed: Tensor
    layers: list[dict[str, Tensor]]
    norm: Tensor
    unembed: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """The unembedding `[…, E]` → `[…, V]`; float32 whatever the weights."""
        x = x.to(self.unembed.device)
        if x.dtype == self.unembed.dtype == torch.float32:
            found = F.linear(x, self.unembed)
        else:
            parts = self.unembed.split(_VOCABULARY_AT_ONCE)
            found = torch.cat([F.linear(x.float(), part.float()) for part in parts], dim=-1)
        return self.said(found)

    def said(self, logits: Tensor) -> Tensor:
        """Logits multiplied and capped as the family does it."""
        scale, cap = self.config.logit_scale, self.config.logit_cap
        logits = logits if scale == 1 else logits * scale
        return logits if cap is None else _capped(logits, cap)

    def normalise(self, x: Tensor, tap: Tap) -> Tensor:
        """The final norm."""
        return tap("final_norm", _norm(x.to(self.norm.device), self.norm, self.config, "final_scale", tap))


def _norm(x: Tensor, weight: Tensor, config: DecoderConfig, site: str, tap: Tap, together: bool = False) -> Tensor:
    """A norm over the last axis, with the scale's tap; of heads `[N, H, T, D]`, over all of them where they go `together`."""
    wide, eps = x.float(), config.rms_norm_eps
    scale = torch.rsqrt(wide.square().mean((1, -1) if together else -1, keepdim=True) + eps)[..., 0]
    wide = wide * tap(site, scale.expand(x.shape[:-1]))[..., None]
    if x.dim() == 4 and weight.numel() > x.shape[-1]:
        weight = weight.view(x.shape[1], 1, x.shape[-1])
    if config.norm == "narrow":
        return weight * wide.to(x.dtype)
    gain = 1 + weight.float() if config.norm == "offset" else weight.float()
    return (gain * wide).to(x.dtype)


def _capped(x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap)


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotation
    n = cos.shape[-1]
    first, second, rest = x.float().tensor_split((n, 2 * n), dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x.dtype)


def _softmax(scores: Tensor, allowed: Tensor) -> Tensor:
    """Softmax over the allowed keys; a row with none is zero. A score of −∞ counts as not allowed."""
    allowed = allowed & (scores != -torch.inf)
    lowest = torch.finfo(torch.float32).min
    return torch.where(allowed, torch.softmax(torch.where(allowed, scores, lowest), dim=-1), 0.0)


def _attention(
    w: dict[str, Tensor], x: Tensor, layout: Layout, tap: Taps, config: DecoderConfig, remember: Any
) -> Tensor:
    sizes, (n, n_tokens, _) = config.sizes, x.shape
    n_heads, n_kv, head_dim = sizes["H"], sizes["K"], sizes["D"]

    def project(name: str, heads: int) -> Tensor:
        y = F.linear(x, w[f"attn.{name}.weight"], w.get(f"attn.{name}.bias"))
        return y.view(n, n_tokens, heads, head_dim).transpose(1, 2)

    layer = tap.layer
    assert layer is not None
    rotation = layout.rotation(layer)

    def turned(name: str, heads: int) -> Tensor:
        y = project(name, heads)
        if config.qk_norm is not None:
            together = config.qk_norm == "token"
            y = _norm(tap(f"{name}_proj", y), w[f"attn.{name}_norm.weight"], config, f"{name}_scale", tap, together)
        return tap(name, _rotate(tap(f"{name}_pre_rope", y), rotation))

    q, k = turned("q", n_heads), turned("k", n_kv)
    v = tap("v", project("v", n_kv))
    if remember is not None:
        k, v = remember(layer, k, v)
    n_keys, groups = k.shape[2], n_heads // n_kv
    scale, cap = config.attention_scale, config.score_cap
    if cap is None and may_fuse(x.device) and not tap.touches("scores", "allowed", "pattern"):
        z = _fused(q, k, v, layout, layer, scale)
    else:
        # Entry g of a key/value head's block of queries is query head k · G + g.
        rows = q.reshape(n, n_kv, groups * n_tokens, head_dim).float()
        scores = torch.matmul(rows, k.float().transpose(-1, -2)) * scale
        scores = scores if cap is None else _capped(scores, cap)
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
    return F.linear(z, w["attn.o.weight"], w.get("attn.o.bias"))


def may_fuse(device: torch.device) -> bool:
    """Whether fused attention can be trusted: on Apple's GPUs it has been silently wrong (pytorch issues 163597, 181133)."""
    return device.type != "mps"


def _fused(q: Tensor, k: Tensor, v: Tensor, layout: Layout, layer: int, scale: float) -> Tensor:
    """Attention that nobody reads into; zero where the token is padding."""
    n, n_heads = q.shape[:2]
    if k.shape[1] != n_heads:
        k, v = (
            x[:, :, None].expand(-1, -1, n_heads // x.shape[1], -1, -1).reshape(n, n_heads, *x.shape[2:])
            for x in (k, v)
        )
    if layout.is_causal(layer) and (layout.first == 0 or layout.n_tokens == 1):
        return F.scaled_dot_product_attention(q, k, v, is_causal=layout.n_tokens > 1, scale=scale)
    allowed = layout.allowed(layer)
    if layout.queries is None:
        return F.scaled_dot_product_attention(q, k, v, allowed, scale=scale)
    padding = ~layout.queries[:, None, :, None]
    return F.scaled_dot_product_attention(q, k, v, allowed | padding, scale=scale).masked_fill(padding, 0.0)


def _block(
    w: dict[str, Tensor], resid: Tensor, layout: Layout, tap: Taps, config: DecoderConfig, remember: Any
) -> Tensor:
    def read(name: str, x: Tensor) -> Tensor:
        x = _norm(x, w[f"{name}_norm.weight"], config, f"{name}_scale", tap) if config.pre_norm else x
        return tap(f"{name}_in", x)

    def added(name: str, x: Tensor) -> Tensor:
        if config.post_norm:
            x = _norm(tap(f"{name}_proj", x), w[f"{name}_post_norm.weight"], config, f"{name}_post_scale", tap)
        return tap(f"{name}_out", x if config.residual_scale == 1 else x * config.residual_scale)

    resid = tap("resid_pre", resid)
    out = _attention(w, read("attn", resid), layout, tap, config, remember)
    resid = tap("resid_mid", resid + added("attn", out))
    x = read("mlp", resid)

    def project(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"mlp.{name}.weight"], w.get(f"mlp.{name}.bias"))

    gate, up = tap("gate", project("gate", x)), tap("up", project("up", x))
    learned = {
        name.removeprefix("mlp.act_fn."): x.reshape(()) for name, x in w.items() if name.startswith("mlp.act_fn.")
    }
    gate_act = tap("gate_act", ACTIVATIONS[config.hidden_act](gate, **learned).to(gate.dtype))
    return tap("resid_post", resid + added("mlp", project("down", tap("act", gate_act * up))))


def embed(w: Weights, tokens: np.ndarray, layout: Layout, tap: Tap) -> Tensor:
    """The embeddings of tokens `[N, T]`; of padding, which may be no token at all, token 0's."""
    if layout.real is not None:
        tokens = np.where(layout.real[:, layout.first : layout.first + layout.n_tokens], tokens, 0)
    if tokens.min() < 0 or tokens.max() >= w.config.vocab_size:
        raise ValueError(
            f"tokens holds {tokens.min()} to {tokens.max()}, and this vocabulary has ids 0 to {w.config.vocab_size - 1}."
        )
    found, scale = (
        F.embedding(torch.from_numpy(tokens.astype(np.int64)).to(w.embed.device), w.embed),
        w.config.embed_scale,
    )
    return tap("embed", found if scale == 1 else found * torch.tensor(scale, dtype=found.dtype, device=found.device))


def run_layers(
    w: Weights, resid: Tensor, layout: Layout, tap: Taps, layers: range, remember: Remember | None = None
) -> Tensor:
    """Runs layers, each where its weights are."""
    for layer in layers:
        own = w.layers[layer]
        device = own["attn.q.weight"].device
        resid, layout = resid.to(device), layout.to(device)
        tap.enter(layer)
        resid = _block(own, resid, layout, tap, w.config, remember)
    tap.enter(None)
    return resid
