"""Hugging Face's own modules run with what every reader reads made by hand: the independent side of the tests of circuits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from oculi_jax import from_pretrained

# A reader's name and what all writers before it wrote, [T, E] each → what it reads.
Read = Callable[[str, Sequence[torch.Tensor]], torch.Tensor]


def theirs(model: Any, directory: Path) -> Any:
    """Our model as transformers loads it, in float64."""
    from transformers import AutoModelForCausalLM

    model.save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()


def ours(hf: Any, directory: Path) -> tuple[Any, Any]:
    """A model of transformers in float64, and ours of its float32 weights."""
    hf.save_pretrained(directory)
    return hf.double(), from_pretrained(directory, dtype="float32")


def whole(name: str, writes: Sequence[torch.Tensor]) -> torch.Tensor:
    """What every reader reads of itself."""
    return sum(writes)


def run_split(
    hf: Any, tokens: np.ndarray, read: Read = whole, instead: dict[str, torch.Tensor] | None = None
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What each writer writes, in depth order, and the logits `[T, V]`, where each reader reads what `read` says.

    `instead` has what some writers write instead of their own.
    """
    names, instead = names_of(hf)[0], instead or {}
    ids = torch.tensor(np.asarray(tokens))[None].long()
    positions = torch.arange(ids.shape[1])[None]
    embed = hf.model.embed_tokens(ids)
    turns = {kind: hf.model.rotary_emb(embed, positions, *kind) for kind in _kinds(hf)}
    writes = [instead.get("input", embed[0])]
    for i, layer in enumerate(hf.model.layers):
        first, after = hasattr(layer, "input_layernorm"), hasattr(layer, "post_feedforward_layernorm")
        norm = layer.input_layernorm if first else torch.nn.Identity()
        given = lambda name, i=i, norm=norm, before=tuple(writes): norm(read(f"a{i}.{name}", before))  # noqa: E731
        heads = _heads(hf, layer.self_attn, turns[_kind(hf, i)], given)
        added = sum(heads)
        if after:  # its own scale, whosever part it is
            heads = [head * (layer.post_attention_layernorm(added) / added) for head in heads]
        writes += [instead.get(name, head) for name, head in zip(names[len(writes) :], heads, strict=False)]
        norm = layer.pre_feedforward_layernorm if first and after else layer.post_attention_layernorm
        out = layer.mlp((norm if first else torch.nn.Identity())(read(f"m{i}", writes)))
        writes.append(instead.get(f"m{i}", layer.post_feedforward_layernorm(out) if after else out))
    logits = hf.lm_head(hf.model.norm(read("logits", writes)))
    if cap := getattr(hf.config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return writes, logits


def _kind(hf: Any, layer: int) -> tuple[str, ...]:
    types = getattr(hf.config, "layer_types", None)
    return (types[layer],) if types and "Gemma3" in type(hf).__name__ else ()


def _kinds(hf: Any) -> set[tuple[str, ...]]:
    return {_kind(hf, i) for i in range(hf.config.num_hidden_layers)}


def _heads(hf: Any, attn: Any, turn: Any, read: Callable[[str], torch.Tensor]) -> list[torch.Tensor]:
    """What each head's own part of the output projection makes of it."""
    n, groups = hf.config.num_attention_heads, attn.num_key_value_groups
    module = vars(sys.modules[type(attn).__module__])

    def rows(name: str, h: int) -> torch.Tensor:
        own = getattr(attn, f"{name}_proj")(read(f"h{h}<{name}>"))
        return own.unflatten(-1, (-1, attn.head_dim))[:, h if name == "q" else h // groups]

    q, k, v = (torch.stack([rows(name, h) for h in range(n)]) for name in "qkv")
    if hasattr(attn, "q_norm"):
        q, k = _normal(attn.q_norm, q, 1), _normal(attn.k_norm, k, groups)
    q, k = module["apply_rotary_pos_emb"](q[None], k[None], *turn)
    scores = q[0] @ k[0].mT * attn.scaling
    if cap := getattr(attn, "attn_logit_softcapping", None):
        scores = cap * torch.tanh(scores / cap)
    places = torch.arange(q.shape[2])
    may = places[None, :] <= places[:, None]
    if window := getattr(attn, "sliding_window", None):
        may = may & (places[None, :] > places[:, None] - window)
    z = scores.masked_fill(~may, -torch.inf).softmax(-1) @ v
    weight = attn.o_proj.weight.unflatten(1, (n, -1))
    return [z[h] @ weight[:, h].T for h in range(n)]


def _normal(norm: Any, x: torch.Tensor, groups: int) -> torch.Tensor:
    """The norm of queries or keys, of each head or of all heads of a token, which those of a group are in as often as they are."""
    if norm.weight.numel() == x.shape[-1]:
        return norm(x)
    width = x.shape[-1]
    scale = torch.rsqrt(x.pow(2).mean((0, 2)) + norm.variance_epsilon)
    return x * scale[None, :, None] * norm.weight.reshape(-1, 1, width).repeat_interleave(groups, 0)


def names_of(hf: Any) -> tuple[list[str], list[str]]:
    """The names of writers and readers in the order of depth, by MIB's convention."""
    n, heads = hf.config.num_hidden_layers, range(hf.config.num_attention_heads)
    writers = ["input", *(name for i in range(n) for name in (*(f"a{i}.h{h}" for h in heads), f"m{i}"))]
    readers = [name for i in range(n) for name in (*(f"a{i}.h{h}<{what}>" for what in "qkv" for h in heads), f"m{i}")]
    return writers, [*readers, "logits"]


def edge_scores(
    hf: Any,
    clean: np.ndarray,
    corrupted: np.ndarray,
    metric: Callable[[torch.Tensor], torch.Tensor],
    instead: dict[str, torch.Tensor] | None = None,
) -> np.ndarray:
    """Σ (clean − corrupted write) · ∂ metric / ∂ input at the clean run, by autograd, `[N_src, N_dst]`."""
    seen: dict[str, tuple[int, torch.Tensor]] = {}

    def read(name: str, writes: Sequence[torch.Tensor]) -> torch.Tensor:
        given = sum(writes).clone()
        given = given if given.requires_grad else given.requires_grad_()
        given.retain_grad()
        seen[name] = len(writes), given
        return given

    hf.requires_grad_(True)
    metric(run_split(hf, clean, read, instead)[1]).backward()
    with torch.no_grad():
        own, other = (run_split(hf, tokens)[0] for tokens in (clean, corrupted))
    writers, readers = names_of(hf)
    scores = np.zeros((len(writers), len(readers)))
    for column, name in enumerate(readers):
        n, given = seen[name]
        for row in range(n if given.grad is not None else 0):
            scores[row, column] = float(((own[row] - other[row]) * given.grad).sum())
    hf.zero_grad()
    return scores


def masked_logits(hf: Any, clean: np.ndarray, corrupted: np.ndarray, mask: np.ndarray, other: Any = None) -> np.ndarray:
    """Logits `[T, V]` where each reader reads of each writer a share of its own write, and the rest of that of another run."""
    readers = names_of(hf)[1]
    with torch.no_grad():
        other = run_split(hf, corrupted)[0] if other is None else other

        def read(name: str, writes: Sequence[torch.Tensor]) -> torch.Tensor:
            share = mask[:, readers.index(name)]
            return sum(m * own + (1 - m) * that for m, own, that in zip(share.tolist(), writes, other, strict=False))

        return run_split(hf, clean, read)[1].numpy()
