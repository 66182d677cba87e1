"""Standard experiments that make their own inputs: what every head does on repeated random tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from .analysis.circuits import PATTERNS, decide, even_scores, pattern_scores
from .arrays import AnyArray, integer
from .backends import find_model, programs_of
from .backends.jax.compiled import compiled
from .intervention.canonical import canonical
from .intervention.frame import Frame
from .pytrees import pytree
from .run import forward

if TYPE_CHECKING:
    from .intervention.protocol import Interventions
    from .models.decoder.config import DecoderConfig
    from .models.decoder.model import Decoder

_SCORES = ("induction", "previous_token", "duplicate_token", "bos", "recent", "local", "uniform")


@pytree
class HeadScores:
    """Scores of every head, means over sequences, each in 0…1; `CircuitDetection` defines them.

    Attributes:
        induction: `[L, H]`, attention to what followed earlier occurrences of the current token.
        previous_token: `[L, H]`, attention to the token before.
        duplicate_token: `[L, H]`, attention to earlier occurrences of the current token.
        bos: `[L, H]`, attention to the first token.
        recent: `[L, H]`, attention to the 4 tokens before.
        local: `[L, H]`, attention to these and to itself.
        uniform: `[L, H]`, entropy over the largest possible.
        codes: int32 `[L, H]`, what each head is by the rule of `CircuitDetection.classify` on these means: indices into
            `oculi_jax.analysis.circuits.PATTERNS`.
        standard_error: the name of each → `[L, H]`, standard deviation over sequences (n − 1) / √n.

    Examples:
        >>> head_scores(model).top("previous_token", k=1)[0][:2]
        (1, 1)
    """

    induction: Float[Array, "L H"]
    previous_token: Float[Array, "L H"]
    duplicate_token: Float[Array, "L H"]
    bos: Float[Array, "L H"]
    recent: Float[Array, "L H"]
    local: Float[Array, "L H"]
    uniform: Float[Array, "L H"]
    standard_error: Mapping[str, Float[Array, "L H"]]
    codes: Int[Array, "L H"]

    def top(self, name: str, k: int = 5) -> list[tuple[int, int, float, float]]:
        """The k heads with the highest score, as (layer, head, score, standard error). Host function.

        Args:
            name: a score, for instance `"induction"`.
            k: how many.

        Raises:
            ValueError: there is no such score, or k is below 1.

        Examples:
            >>> [(layer, head, round(score, 2)) for layer, head, score, error in head_scores(model).top("previous_token", k=2)]
            [(1, 1, 0.99), (1, 4, 0.97)]
        """
        if name not in _SCORES:
            raise ValueError(f"There is no score {name!r}; there are {', '.join(_SCORES)}.")
        scores, errors = np.asarray(getattr(self, name)), np.asarray(self.standard_error[name])
        order = np.argsort(-scores, axis=None, kind="stable")[: integer(k, "k", 1)]
        heads = zip(*np.unravel_index(order, scores.shape), strict=True)
        return [
            (int(layer), int(head), float(scores[layer, head]), float(errors[layer, head])) for layer, head in heads
        ]

    def summarize(self) -> dict[str, list[tuple[int, int, float, float]]]:
        """Every head under its pattern, as (layer, head, score, standard error), highest score first. Host function.

        Examples:
            >>> sorted((layer, head) for layer, head, score, error in head_scores(model).summarize()["previous_token"])
            [(1, 1), (1, 2), (1, 4)]
        """
        codes = np.asarray(self.codes)
        found: dict[str, list[tuple[int, int, float, float]]] = {}
        for code, name in enumerate(PATTERNS):
            ranked = self.top(name, codes.size) if name in _SCORES else []
            found[name] = [head for head in ranked if codes[head[:2]] == code]
        found["unknown"] = [(int(n), int(h), 0.0, 0.0) for n, h in np.argwhere(codes == PATTERNS.index("unknown"))]
        return found

    def __repr__(self) -> str:
        names = ", ".join(item.name for item in fields(self))
        return f"HeadScores({names}; each [{', '.join(map(str, self.induction.shape))}])"


def head_scores(
    model: Decoder, seed: int = 0, n_sequences: int = 8, length: int = 50, *, interventions: Interventions = ()
) -> HeadScores:
    """What each head does on random tokens repeated once: the standard test for induction.

    A sequence is the beginning-of-sequence token (where the config has one), `length` distinct random ids without special
    ones, and the same ids once more; Olsson et al. (2022), arXiv:2209.11895. Nothing but the repetition can be predicted,
    so what a head does there is not a matter of the prompt.

    Args:
        model: a model of any family, or a Hugging Face one.
        seed: of the sequences; the same seed gives the same scores. Another one runs the same program.
        n_sequences: how many, at least 2. Patterns are held for one of them at a time.
        length: tokens that are repeated.
        interventions: as in `forward`, active in every sequence: what is left of induction without a previous-token head?
            (An `InterventionContext` is an adapter's, and does not reach here.)

    Returns:
        A `HeadScores`.

    Raises:
        ValueError: a length that the vocabulary or the model's context cannot hold; fewer than 2 sequences.

    Examples:
        >>> round(float(head_scores(model).induction[2, 2]), 2)
        0.93
    """
    model = find_model(model)
    tokens = repeated_tokens(model.config, seed, n_sequences, length)
    interventions = canonical(interventions, Frame(model.config, model.dtype, tokens.shape[1], None))
    if programs_of(model).traceable:
        return _run(model, tokens, interventions)
    windows = model.config.windows
    scores = jax.jit(partial(pattern_scores, windows=windows))
    rows = [_scores(model, row, interventions, scores) for row in tokens]  # torch runs this one
    return _summary({name: jnp.stack([row[name] for row in rows]) for name in rows[0]}, tokens, windows)


def repeated_tokens(config: DecoderConfig, seed: int, n_sequences: int, length: int) -> Int[np.ndarray, "N T"]:
    """The sequences of `head_scores`: int32 `[n_sequences, T]`, with T = 2 · length, plus 1 where there is a BOS.

    Raises:
        ValueError: as for `head_scores`.

    Examples:
        >>> tokens = repeated_tokens(model.config, seed=0, n_sequences=2, length=3)
        >>> tokens.shape, bool((tokens[:, 1:4] == tokens[:, 4:]).all())
        ((2, 7), True)
    """
    n_sequences, length = integer(n_sequences, "n_sequences"), integer(length, "length")
    seed = integer(seed, "seed", 0)
    bos, eos, pad = config.bos_token_id, config.eos_token_id, config.pad_token_id
    special = (bos, pad, *(eos if isinstance(eos, tuple) else (eos,)))
    usable = np.setdiff1d(np.arange(config.vocab_size), [i for i in special if i is not None])
    lead = [bos] if bos is not None and 0 <= bos < config.vocab_size else []
    most = min(len(usable), (config.max_position_embeddings - len(lead)) // 2)
    if not 1 <= length <= most:
        raise ValueError(
            f"length is {length}, and must be from 1 to {most}: the ids are distinct ones of {len(usable)}, and twice as "
            f"many must fit into a context of {config.max_position_embeddings}."
        )
    if n_sequences < 2:
        raise ValueError(f"n_sequences is {n_sequences}; a standard error takes at least 2.")
    rng = np.random.default_rng(seed)
    once = np.stack([rng.choice(usable, length, replace=False) for _ in range(n_sequences)])
    first = np.tile(np.array(lead, once.dtype), (n_sequences, 1))
    return np.concatenate([first, once, once], axis=1).astype(np.int32)


@compiled()
def _run(model: Decoder, tokens: Int[AnyArray, "N T"], interventions: tuple[Any, ...]) -> HeadScores:
    windows = model.config.windows
    scores = partial(pattern_scores, windows=windows)
    return _summary(jax.lax.map(lambda row: _scores(model, row, interventions, scores), tokens), tokens, windows)


def _scores(model: Any, row: Int[Array, "T"], interventions: tuple[Any, ...], scores: Any) -> dict[str, Array]:
    """The scores of one sequence, each `[L, H]`."""
    return scores(forward(model, row, interventions, capture="pattern", logits="none").activations["pattern"], row)


@partial(jax.jit, static_argnums=2, inline=True)
def _summary(each: dict[str, Array], tokens: Int[AnyArray, "N T"], windows: tuple[int | None, ...]) -> HeadScores:
    mean = {name: jnp.mean(value, axis=0) for name, value in each.items()}
    even = jax.lax.map(partial(even_scores, windows=windows), tokens)
    chance = {name: jnp.mean(value, axis=0) for name, value in even.items()}
    root = tokens.shape[0] ** 0.5
    errors = {name: jnp.std(value, axis=0, ddof=1) / root for name, value in each.items()}
    return HeadScores(**mean, standard_error=errors, codes=decide(mean, chance)[0])
