"""`CircuitDetection`: which heads attend as the known circuits do, judged from patterns and token ids."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from ..adapter.structures import AttentionCapture
from .inputs import check_head, need, row_of

# How near "recent" and "local" are: this many tokens back.
WINDOW = 4

# Pattern → threshold of `classify`, which tries them in this order.
THRESHOLDS = {
    "previous_token": 0.5,
    "induction": 0.3,
    "bos": 0.5,
    "duplicate_token": 0.3,
    "recent": 0.5,
    "local": 0.5,
    "uniform": 0.9,
}
PATTERNS = (*THRESHOLDS, "unknown")


class CircuitDetection:
    """Scores of attention heads on one prompt, for every head at once.

    Scores are raw, float32 `[L, H]` in 0…1, row i being layer `capture.captured_layers[i]`. They are means over query
    positions, and 0 where the prompt has no position that a score is about: a prompt without a repeated token says nothing
    of induction. For a test that does not hang on the prompt see `oculi_jax.diagnostics.head_scores`.

    Attention spread evenly is spread over all tokens so far, in a layer with a window over those in it.

    Positions are ranks among the real tokens, so padding on either side changes nothing. All methods but those marked as
    host functions work under `jit`, `vmap` (over a batch of captures) and `grad`. All raise what `detect_induction_heads` does.

    Examples:
        >>> CircuitDetection.classify_attention_head(adapter.capture("Rome is in Rome is"), 2, 2)["pattern"]
        'induction'
    """

    @staticmethod
    def detect_induction_heads(capture: AttentionCapture, threshold: float = 0.3) -> Float[Array, "L H"]:
        """Attention to what followed earlier occurrences of the current token: `[A][B] … [A]` looks at `[B]`.

            mean over t with an earlier occurrence of x_t  of  Σ_s pattern[t, s] · [x_{s−1} = x_t, s − 1 < t]

        Olsson et al. (2022), "In-context Learning and Induction Heads", arXiv:2209.11895 (their prefix matching).

        Args:
            capture: with `patterns`.
            threshold: not used: scores come back as they are. Compare them with it: `scores > threshold`.

        Returns:
            `[L, H]`.

        Raises:
            ValueError, TypeError: the patterns were not captured, or this is no capture of one prompt's attention.

        Examples:
            >>> repeated = adapter.capture("Rome is in Rome is")
            >>> round(float(CircuitDetection.detect_induction_heads(repeated)[2, 2]), 2)
            0.99
        """
        return pattern_scores(*_inputs(capture), ("induction",))["induction"]

    @staticmethod
    def detect_previous_token_heads(capture: AttentionCapture, threshold: float = 0.5) -> Float[Array, "L H"]:
        """Attention to the token before: the mean of pattern[t, t − 1] over t ≥ 1.

        Arguments, result and errors as for `detect_induction_heads`.

        Examples:
            >>> repeated = adapter.capture("Rome is in Rome is")
            >>> round(float(CircuitDetection.detect_previous_token_heads(repeated)[1, 1]), 2)
            0.93
        """
        return pattern_scores(*_inputs(capture), ("previous_token",))["previous_token"]

    @staticmethod
    def detect_duplicate_token_heads(capture: AttentionCapture, threshold: float = 0.3) -> Float[Array, "L H"]:
        """Attention to earlier occurrences of the current token, Wang et al. (2022), arXiv:2211.00593.

            mean over t with an earlier occurrence of x_t  of  Σ_s pattern[t, s] · [x_s = x_t, s < t]

        Arguments, result and errors as for `detect_induction_heads`.

        Examples:
            >>> repeated = adapter.capture("Rome is in Rome is")
            >>> round(float(CircuitDetection.detect_duplicate_token_heads(repeated)[0, 0]), 2)
            0.33
        """
        return pattern_scores(*_inputs(capture), ("duplicate_token",))["duplicate_token"]

    @staticmethod
    def detect_positional_heads(capture: AttentionCapture) -> dict[str, Float[Array, "L H"]]:
        """What depends on position alone.

        Args:
            capture: with `patterns`.

        Returns:
            Name → `[L, H]`:

            - `bos`: attention to the first token, mean over t ≥ 1.
            - `recent`: attention to the 4 tokens before, t − 4 … t − 1, mean over t ≥ 7.
            - `local`: attention to these and to itself, t − 4 … t, mean over t ≥ 9.
            - `uniform`: entropy of the row over log(t + 1), that of attention spread evenly (of the window, where the layer
              has a shorter one); mean over t ≥ 1.

            `recent` and `local` look only at rows in which the window is at most half of the keys: in a shorter row any
            head attends to something near.

        Examples:
            >>> round(float(CircuitDetection.detect_positional_heads(capture.attention)["bos"][2, 4]), 2)
            0.95
        """
        return pattern_scores(*_inputs(capture), ("bos", "recent", "local", "uniform"), capture.windows)

    @staticmethod
    def scores(capture: AttentionCapture) -> dict[str, Float[Array, "L H"]]:
        """Every score: pattern → `[L, H]`, for the seven patterns (`PATTERNS` without `unknown`).

        Examples:
            >>> sorted(CircuitDetection.scores(capture.attention))[:3]
            ['bos', 'duplicate_token', 'induction']
        """
        return pattern_scores(*_inputs(capture), windows=capture.windows)

    @staticmethod
    def classify(capture: AttentionCapture) -> tuple[Int[Array, "L H"], Float[Array, "L H"]]:
        """One pattern for every head: the first in the order of `THRESHOLDS` that it shows.

        A head shows a pattern where its score exceeds that of uniform attention on this prompt by `threshold` of what was
        left to exceed it by:

            score ≥ chance + threshold · (1 − chance)

        so that on a short prompt, where any head looks at everything, few heads show anything; and none does where nothing is
        left, as `local` in a window of a few tokens. (For `uniform` itself chance is 0.) A score within rounding of its
        threshold may fall on the other side of it on another processor.

        The order: a previous-token head also scores as an induction head wherever a token returns after one other, and as
        recent and local; an induction head rests on the first token while it has nothing to match; a head that always
        attends to the first token scores as a duplicate-token head where that token returns.

        Args:
            capture: with `patterns`.

        Returns:
            `codes`, int32 `[L, H]`, indices into `PATTERNS`, and the raw scores `[L, H]` of those patterns, 0 for
            `unknown`.

        Examples:
            >>> codes, scores = CircuitDetection.classify(adapter.capture("Rome is in Rome is"))
            >>> int(codes[2, 2]), round(float(scores[2, 2]), 2)  # PATTERNS[1] is induction
            (1, 0.99)
        """
        return _classify(*_inputs(capture), capture.windows)

    @staticmethod
    def classify_attention_head(capture: AttentionCapture, layer: int, head: int) -> dict[str, Any]:
        """What one head does on this prompt, by the rule of `classify`. Host function.

        Args:
            capture: with `patterns`.
            layer: the true layer number.
            head: query head.

        Returns:
            `{"pattern": name, "score": float}`; the name is one of `PATTERNS`, the score raw.

        Raises:
            ValueError: a layer that was not captured, or a head that there is not.

        Examples:
            >>> CircuitDetection.classify_attention_head(adapter.capture("Rome is in Rome is"), 1, 1)["pattern"]
            'previous_token'
        """
        found = _inputs(capture)
        row, head = row_of(capture, layer), check_head(capture, head)
        codes, values = _classify(*found, capture.windows)
        return {"pattern": PATTERNS[int(codes[row, head])], "score": float(values[row, head])}

    @staticmethod
    def summarize(capture: AttentionCapture) -> dict[str, list[tuple[int, int, float]]]:
        """Every head under its pattern, by the rule of `classify`. Host function.

        Returns:
            Pattern → list of (layer, head, score), true layer numbers, highest score first; all of `PATTERNS` are keys.

        Examples:
            >>> found = CircuitDetection.summarize(adapter.capture("Rome is in Rome is"))
            >>> [(layer, head) for layer, head, score in found["previous_token"]]
            [(1, 1), (1, 4), (1, 2)]
        """
        codes, values = map(np.asarray, _classify(*_inputs(capture), capture.windows))
        found: dict[str, list[tuple[int, int, float]]] = {name: [] for name in PATTERNS}
        for row, layer in enumerate(capture.captured_layers):
            for head in range(codes.shape[1]):
                found[PATTERNS[codes[row, head]]].append((layer, head, float(values[row, head])))
        return {name: sorted(heads, key=lambda item: (-item[2], *item[:2])) for name, heads in found.items()}


@partial(jax.jit, static_argnames=("names", "windows"), inline=True)
def pattern_scores(
    patterns: Float[Array, "L H T S"],
    tokens: Int[Array, "T"],
    mask: Bool[Array, "T"] | None = None,
    names: tuple[str, ...] = tuple(THRESHOLDS),
    windows: tuple[int | None, ...] = (),
) -> dict[str, Float[Array, "L H"]]:
    """The scores of `CircuitDetection`, without a capture; `names` and `windows` are static.

    Args:
        patterns: `[L, H, T, S]`, zero on padding.
        tokens: ids `[T]`.
        mask: bool `[T]`, True at real tokens; None where all are.
        names: of the seven patterns.
        windows: as `AttentionCapture.windows`.
    """
    patterns = patterns.astype(jnp.float32)
    weights = {name: weight for name, weight in _weights(tokens, mask).items() if name in names}
    scores = {}
    if weights:
        table = jnp.stack(list(weights.values()))
        linear = jnp.einsum("lhts,nts->nlh", patterns, table, precision=jax.lax.Precision.HIGHEST)
        scores = dict(zip(weights, linear, strict=True))
    if "uniform" in names:
        scores["uniform"] = _evenness(patterns, *_ranks(tokens, mask), windows)
    # Rows of a pattern sum to 1 up to rounding, in bfloat16 a percent. Unlike minimum, this keeps the gradient at 1.
    return {name: jnp.where(score > 1.0, 1.0, score) for name, score in scores.items()}


@partial(jax.jit, static_argnums=3, inline=True)
def _classify(
    patterns: Array, tokens: Array, mask: Array | None, windows: tuple[int | None, ...]
) -> tuple[Int[Array, "L H"], Float[Array, "L H"]]:
    return decide(pattern_scores(patterns, tokens, mask, windows=windows), even_scores(tokens, mask, windows))


def even_scores(
    tokens: Int[Array, "T"], mask: Bool[Array, "T"] | None = None, windows: tuple[int | None, ...] = ()
) -> dict[str, Float[Array, "*L"]]:
    """What attention spread evenly scores on a prompt, for all patterns but `uniform`; of each layer where there are windows."""
    rank, _ = _ranks(tokens, mask)
    weights = _weights(tokens, mask)

    def one(window: int | None) -> dict[str, Array]:
        # What a key gets where it is allowed; elsewhere it weighs nothing.
        even = 1.0 / _seen(rank, window).astype(jnp.float32)[:, None]
        if window is not None:
            even = jnp.where(rank[:, None] - rank[None, :] < window, even, 0.0)
        return {name: jnp.sum(weight * even) for name, weight in weights.items()}

    if not windows:
        return one(None)
    found = {window: one(window) for window in windows}
    return {name: jnp.stack([found[window][name] for window in windows]) for name in weights}


def _seen(rank: Int[Array, "T"], window: int | None) -> Int[Array, "T"]:
    """How many keys each token may look at."""
    return rank + 1 if window is None else jnp.minimum(rank + 1, window)


def decide(
    scores: Mapping[str, Float[Array, "L H"]], chance: Mapping[str, Array]
) -> tuple[Int[Array, "L H"], Float[Array, "L H"]]:
    """The rule of `CircuitDetection.classify`: codes and scores, of the scores of all patterns and those of even attention."""
    codes = jnp.full(scores["uniform"].shape, PATTERNS.index("unknown"), jnp.int32)
    values = jnp.zeros(codes.shape, jnp.float32)
    for code, (name, threshold) in reversed(list(enumerate(THRESHOLDS.items()))):
        floor = jnp.asarray(chance.get(name, 0.0))
        floor = floor[:, None] if floor.ndim else floor  # of each layer
        # In a window that all of a pattern's keys are in, everything scores 1, and within rounding of its chance.
        shown = (floor < 0.999) & (scores[name] >= floor + threshold * (1.0 - floor))
        codes = jnp.where(shown, code, codes)
        values = jnp.where(shown, scores[name], values)
    return codes, values


def _inputs(capture: AttentionCapture) -> tuple[Array, Array, Array | None]:
    """Patterns, tokens and mask, checked."""
    return need(capture, "AttentionCapture", "patterns"), capture.tokens, capture.mask


def _ranks(tokens: Array, mask: Array | None) -> tuple[Int[Array, "T"], Bool[Array, "T"]]:
    """Each token's position among the real ones, and which are real."""
    real = jnp.ones(tokens.shape, bool) if mask is None else mask
    return jnp.maximum(jnp.cumsum(real, dtype=jnp.int32) - 1, 0), real


def _weights(tokens: Array, mask: Array | None) -> dict[str, Float[Array, "T S"]]:
    """All scores but `uniform` are linear in the pattern: what each entry of it counts.

    Zero wherever a key is not allowed, so a head that attends evenly scores Σ weight[t, s] / (t + 1).
    """
    rank, real = _ranks(tokens, mask)
    # The index of the real token before each position; −1 where there is none.
    latest = jax.lax.cummax(jnp.where(real, jnp.arange(tokens.shape[0]), -1))
    before = jnp.concatenate([jnp.full(1, -1, latest.dtype), latest[:-1]])
    both = real[:, None] & real[None, :]
    back = rank[:, None] - rank[None, :]
    same = tokens[:, None] == tokens[None, :]
    follows = tokens[:, None] == tokens[jnp.maximum(before, 0)][None, :]
    targets = {
        "previous_token": back == 1,
        "induction": follows & (before >= 0)[None, :] & (back >= 0),
        "bos": (rank == 0)[None, :] & (back >= 1),
        "duplicate_token": same & (back >= 1),
        # Only rows of which the window is at most half: WINDOW of at least 2 · WINDOW keys, and one more with itself.
        "recent": (back >= 1) & (back <= WINDOW) & (rank >= 2 * WINDOW - 1)[:, None],
        "local": (back >= 0) & (back <= WINDOW) & (rank >= 2 * WINDOW + 1)[:, None],
    }

    def weigh(target: Bool[Array, "T S"]) -> Float[Array, "T S"]:
        target = target & both
        rows = jnp.sum(jnp.any(target, axis=1)).astype(jnp.float32)
        return target.astype(jnp.float32) / jnp.maximum(rows, 1.0)

    return {name: weigh(target) for name, target in targets.items()}


def _evenness(
    patterns: Float[Array, "L H T S"], rank: Array, real: Array, windows: tuple[int | None, ...]
) -> Float[Array, "L H"]:
    rows = real & (rank >= 1)
    entropy = -jnp.sum(patterns * jnp.log(jnp.where(patterns > 0, patterns, 1.0)), axis=-1)

    def weigh(window: int | None) -> Float[Array, "T"]:
        largest = jnp.log(jnp.where(rows, jnp.maximum(_seen(rank, window), 2), 2).astype(jnp.float32))
        return jnp.where(rows, 1.0 / largest, 0.0) / jnp.maximum(jnp.sum(rows).astype(jnp.float32), 1.0)

    weight = jnp.stack([weigh(window) for window in windows or (None,) * len(patterns)])
    return jnp.einsum("lht,lt->lh", entropy, weight, precision=jax.lax.Precision.HIGHEST)
