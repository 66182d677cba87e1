"""Everything that a report shows, measured once: a frozen dataclass of NumPy arrays and texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Float, Int

from ..adapter.configs import CaptureConfig, LogitConfig, MLPConfig
from ..analysis.attribution import AttributionMethods
from ..analysis.circuits import PATTERNS
from ..arrays import integer
from ..capture import CaptureSpec
from ..diagnostics import HeadScores, head_scores
from ..intervention import HeadAblation
from ..intervention.context import active
from ..metrics import Metric, logit_difference
from ..output import Output
from ..prompts import is_chat, prepare
from ..run import forward
from ..sweeps.sweeping import sweep

if TYPE_CHECKING:
    from ..adapter.adapter import LlamaAttentionAdapter
    from ..adapter.structures import FullCapture, LogitCapture

NAMED = tuple(name for name in PATTERNS if name != "unknown")
TOP = 5  # likeliest tokens of a cell
N_SEQUENCES, LONGEST_REPEAT = 8, 50  # of the head scores, as `oculi heads` has them
# Bytes of patterns, two a weight, that a page holds by itself, and that it holds when told which heads.
PATTERN_BYTES, MOST_PATTERN_BYTES = 3 << 20, 24 << 20
MOST_TOKENS, MOST_CELLS = 512, 20_000  # of the prompt; of the lens, layers × tokens

HEADS_ALONE = CaptureConfig(capture_queries=False, capture_keys=False, capture_values=False, capture_patterns=False)
OUTPUT_ALONE = MLPConfig(capture_gate=False, capture_up=False, capture_post_activation=False)


@dataclass(frozen=True, eq=False, repr=False)
class Measured:
    """What a report shows of one prompt. Logits and probabilities are at its last token, unless an axis T says otherwise.

    Attributes:
        prompt: its text.
        name: of the model.
        sizes: letter → size, as `DecoderConfig.sizes`; `parameters`: how many; `dtype`: of its weights.
        tokens: ids `[T]`.
        target: the id whose probability, ablations and attribution are shown; `chosen`: whether the user named it.
        rival: the likeliest other id, over which the target leads by `target_logit − rival_logit`.
        target_log_probability, target_logit, rival_logit: of the plain run; the first in nats.
        attributed_logit: the target's logit before a final soft cap, which the parts sum to; `capped`: whether there is one.
        next_ids, next_probabilities: `[5]`, what the model says next, likeliest first.
        lens_ids, lens_probabilities: `[L, T, 5]`, the same of the logit lens after each layer.
        lens_target: `[L, T]`, the target's probability there.
        heads: N (layer, head) pairs whose patterns are kept; `selection`: `"all"`, `"given"` or `"strongest"`.
        patterns: `[N, T, T]`.
        scores, errors: name → `[L, H]`, of `head_scores` on `n_sequences` sequences of `repeat` random tokens twice.
        effects: `[L, H]`, the target's lead without the head (its z set to zero) minus that of the plain run. A lead still
            moves where a probability is all but 1.
        embedding, attention, mlp, other: shares of the target's logit: a number, `[L]`, `[L]`, and what rounding of the
            stream in half precision adds.
        by_head: `[L, H]`, the heads' shares; `bias`: that of the output projections' biases, which belong to no head.
        completeness_error: sum of embedding, attention, mlp and other, minus `attributed_logit`.
        words: id → text, of every id above.
    """

    prompt: str
    name: str
    sizes: dict[str, int]
    parameters: int
    dtype: str
    tokens: Int[np.ndarray, "T"]
    target: int
    chosen: bool
    rival: int
    target_log_probability: float
    target_logit: float
    rival_logit: float
    attributed_logit: float
    capped: bool
    next_ids: Int[np.ndarray, "5"]
    next_probabilities: Float[np.ndarray, "5"]
    lens_ids: Int[np.ndarray, "L T 5"]
    lens_probabilities: Float[np.ndarray, "L T 5"]
    lens_target: Float[np.ndarray, "L T"]
    heads: list[tuple[int, int]]
    selection: str
    patterns: Float[np.ndarray, "N T T"]
    scores: dict[str, Float[np.ndarray, "L H"]]
    errors: dict[str, Float[np.ndarray, "L H"]]
    n_sequences: int
    repeat: int
    effects: Float[np.ndarray, "L H"]
    embedding: float
    attention: Float[np.ndarray, "L"]
    mlp: Float[np.ndarray, "L"]
    other: float
    by_head: Float[np.ndarray, "L H"]
    bias: float
    completeness_error: float
    words: dict[int, str]


def measure(
    adapter: LlamaAttentionAdapter,
    text: str | Sequence[Mapping[str, str]],
    *,
    target: str | None = None,
    heads: Sequence[tuple[int, int]] | None = None,
    progress: Callable[[int, int], None] | bool | None = None,
    allow_longer: bool = False,
) -> Measured:
    """Runs everything that a report shows. Arguments and errors as in `report`."""
    if not isinstance(text, str) and not is_chat(text):
        raise TypeError(f"A report is of one text, or a chat's messages, and a {type(text).__name__} was given.")
    if active(adapter):
        raise ValueError(
            "A report is of the model as it is, and this adapter is inside an InterventionContext: leave it."
        )
    model, config = adapter.model, adapter.model.config
    n_layers, n_heads = config.num_hidden_layers, config.num_attention_heads
    prompt = prepare(text, adapter.tokenizer, config, attention_mask=None, allow_longer=allow_longer)
    tokens = prompt.tokens[0, : prompt.n_tokens]
    _check_sizes(len(tokens), n_layers)
    heads = None if heads is None else check_heads(heads, n_layers, n_heads, len(tokens))
    wanted = None if target is None else adapter.to_single_token(target)

    out = forward(model, tokens, logits="last")
    logits = np.asarray(out.logits)
    if not np.isfinite(logits).all():
        raise ValueError("The model's logits are not finite on this prompt: there is nothing to show.")
    goal = int(np.argmax(logits)) if wanted is None else wanted
    wanted_lens = LogitConfig(top_k=min(TOP, config.vocab_size), tokens=[goal])
    kept_parts: dict[str, Any] = {"attention": HEADS_ALONE, "mlp": OUTPUT_ALONE, "logits": wanted_lens}
    full = adapter.capture_full(text, **kept_parts, allow_longer=allow_longer)
    lens = _lens(full.logits)
    rival = int(np.argmax(np.where(np.arange(len(logits)) == goal, -np.inf, logits)))
    effects = _ablated(model, tokens, logit_difference(goal, rival), out, progress)
    repeat = min(LONGEST_REPEAT, (config.max_position_embeddings - 1) // 2, config.vocab_size - 4)
    found = head_scores(model, n_sequences=N_SEQUENCES, length=repeat)
    kept, selection = (heads, "given") if heads else _choose(effects, found, len(tokens))
    ids = {goal, rival, *tokens.tolist(), *lens["lens_ids"].ravel().tolist()}

    measured = Measured(
        **_described(adapter, text),
        tokens=tokens,
        target=goal,
        chosen=target is not None,
        rival=rival,
        target_log_probability=float(jax.nn.log_softmax(logits)[goal]),
        target_logit=float(logits[goal]),
        rival_logit=float(logits[rival]),
        **lens,
        heads=kept,
        selection=selection,
        patterns=_patterns(model, tokens, kept),
        **_scored(found, repeat),
        effects=effects,
        **_attributed(full, model, goal),
        words=dict(zip(sorted(ids), adapter.str_tokens(sorted(ids)), strict=True)),
    )
    _check_finite(measured)
    return measured


def _name(adapter: LlamaAttentionAdapter) -> str:
    """The last part of where the tokenizer came from, which is where the model did: a directory or a Hub id."""
    source = str(getattr(adapter.tokenizer, "name_or_path", "") or "")
    return Path(source).name or adapter.model.config.family.title


def _triangle(n_tokens: int) -> int:
    """Bytes of one head's pattern in a page."""
    return n_tokens * (n_tokens + 1)


def _described(adapter: LlamaAttentionAdapter, text: str | Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """The fields of `Measured` that say what was asked of which model."""
    model = adapter.model
    return {
        "prompt": text if isinstance(text, str) else "\n".join(f"{m['role']}: {m['content']}" for m in text),
        "name": _name(adapter),
        "sizes": model.config.sizes,
        "parameters": model.n_params,
        "dtype": str(model.dtype),
    }


def _scored(found: HeadScores, repeat: int) -> dict[str, Any]:
    """The fields of `Measured` that say what heads do on repeated random tokens."""
    return {
        "scores": {name: np.asarray(getattr(found, name)) for name in NAMED},
        "errors": {name: np.asarray(found.standard_error[name]) for name in NAMED},
        "n_sequences": N_SEQUENCES,
        "repeat": repeat,
    }


def _lens(lens: LogitCapture) -> dict[str, np.ndarray]:
    """The fields of `Measured` that the logit lens gives."""
    ids = np.asarray(lens.top_k_indices)
    probabilities = np.exp(np.asarray(lens.top_k_logits) - np.asarray(lens.log_normalizer)[..., None])
    return {
        "next_ids": ids[-1, -1],
        "next_probabilities": probabilities[-1, -1],
        "lens_ids": ids,
        "lens_probabilities": probabilities,
        "lens_target": np.asarray(lens.probabilities)[..., 0],
    }


def _attributed(full: FullCapture, model: Any, goal: int) -> dict[str, Any]:
    """The fields of `Measured` that say where the target's logit comes from."""
    parts = AttributionMethods.component_attribution(full.residual, full.mlp, model.lm_head.weight, goal)
    shares = AttributionMethods.head_attribution(full.attention, model, goal, residual=full.residual)
    assert parts.completeness_error is not None
    return {
        "attributed_logit": float(parts.details["logit"]),
        "capped": model.config.logit_cap is not None,
        "embedding": float(parts.details["embedding"]),
        "attention": np.asarray(parts.values)[:, 0],
        "mlp": np.asarray(parts.values)[:, 1],
        "other": float(np.sum(parts.details["edits"])) + float(parts.details["norm_edit"]),
        "by_head": np.asarray(shares.values),
        "bias": float(np.sum(shares.details["bias"])),
        "completeness_error": float(parts.completeness_error),
    }


def _ablated(model: Any, tokens: np.ndarray, metric: Metric, out: Output, progress: Any) -> np.ndarray:
    """What ablating each head does to a metric, `[L, H]`."""
    values = sweep(model, tokens, HeadAblation.grid(model.config), metric, progress=progress)
    return np.asarray(values) - float(metric(out))


def _check_finite(measured: Measured) -> None:
    numbers = [value for value in vars(measured).values() if isinstance(value, float | np.ndarray)]
    if not all(np.isfinite(value).all() for value in [*numbers, *measured.scores.values()]):
        raise ValueError("The model gives numbers that are not finite on this prompt: there is nothing to show.")


def _check_sizes(n_tokens: int, n_layers: int) -> None:
    most = min(MOST_TOKENS, MOST_CELLS // n_layers)
    if n_tokens > most:
        raise ValueError(
            f"The prompt has {n_tokens} tokens, and a page of a model of {n_layers} layers takes at most {most}: its lens has "
            "a cell for each layer and token. Shorten it."
        )


def check_heads(heads: Sequence[tuple[int, int]], n_layers: int, n_heads: int, n_tokens: int) -> list[tuple[int, int]]:
    pairs = [(integer(layer, "a layer of heads"), integer(head, "a head of heads")) for layer, head in heads]
    if not pairs:
        raise ValueError("heads is empty; leave it out, or name at least one head.")
    for layer, head in pairs:
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise ValueError(
                f"There is no head L{layer}H{head}: this model has layers 0 to {n_layers - 1}, each with heads 0 to {n_heads - 1}."
            )
    pairs = sorted(set(pairs))
    most = MOST_PATTERN_BYTES // _triangle(n_tokens)
    if len(pairs) > most:
        raise ValueError(
            f"{len(pairs)} heads were chosen, and a page of a prompt of {n_tokens} tokens holds the patterns of at most {most}."
        )
    return pairs


def _choose(effects: Float[np.ndarray, "L H"], scores: HeadScores, n_tokens: int) -> tuple[list[tuple[int, int]], str]:
    """All heads where a page can hold them; else those at the top of the rankings by effect and by score, in turns."""
    shape, most = effects.shape, PATTERN_BYTES // _triangle(n_tokens)
    if effects.size <= most:
        return [(int(layer), int(head)) for layer, head in np.ndindex(shape)], "all"
    by = [np.abs(effects), scores.induction, scores.previous_token, scores.duplicate_token]
    ranked = [np.argsort(-np.asarray(value), axis=None, kind="stable") for value in by]
    turns = dict.fromkeys(int(flat) for flat in chain(*zip_longest(*ranked)))
    chosen = sorted(list(turns)[:most])
    return [(flat // shape[1], flat % shape[1]) for flat in chosen], "strongest"


def _patterns(model: Any, tokens: np.ndarray, heads: list[tuple[int, int]]) -> Float[np.ndarray, "N T T"]:
    """The patterns of some heads, of which only their layers are held."""
    layers = sorted({layer for layer, _ in heads})
    spec = CaptureSpec("pattern", layers=tuple(layers), dtype="float32")
    found = jax.device_get(forward(model, tokens, capture=spec, logits="none").activations["pattern"])
    return np.stack([found[layers.index(layer), head] for layer, head in heads])
