"""`CompositionAnalysis`: how attention heads of different layers work together, from their patterns or from the weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Complex, Float

from ..arrays import on_every_host
from . import weights
from .circuits import CircuitDetection
from .inputs import at_position, check_head, need, row_of
from .result import Result
from .statistics import count, norm, real_tokens

if TYPE_CHECKING:
    from ..adapter.structures import AttentionCapture
    from ..models.decoder.model import Decoder

Head = tuple[int, int]
METHODS = ("qk", "ov")


class CompositionAnalysis:
    """Composition of heads, Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits".

    From patterns: where information could flow on this prompt, not whether the weights read it. From the weights: whether
    they would read it, on any prompt. A head is `(layer, head)` with its true layer number; `source` comes before `target`.
    Methods work under `jit`, `vmap` (over a batch of captures) and `grad` unless they are marked as host functions. Those of
    patterns raise what `qk_composition` does; those of weights a TypeError for what is no model.

    Examples:
        >>> found = CompositionAnalysis.weight_composition(model)
        >>> bool(found.values["k"][1, 4, 2, 2] > 2 * found.details["baseline"])  # a previous-token head, an induction head
        True
    """

    @staticmethod
    def qk_composition(capture: AttentionCapture, source: Head, target: Head) -> Result:
        """How much of what the target looks at, the source had brought there from elsewhere. From patterns.

            values[t] = Σ_s A_target[t, s] · Σ_{u≠s} A_source[s, u]  =  Σ_s A_target[t, s] · (1 − A_source[s, s])

        The share of the target's attention on paths t ← s ← u with u ≠ s: positions where keys (and values) can hold what
        the source moved. It says where information could flow, not whether the weights read it; and a source that rests
        on the first token counts as moving it (`ov_composition` weighs what is moved).

        Args:
            capture: with `patterns`.
            source: (layer, head), the layer being the lower one.
            target: (layer, head).

        Returns:
            `.values` `[T]` in 0…1, 0 at padding.

        Raises:
            ValueError, TypeError: the source's layer is not below the target's, a layer that was not captured, a head that
                there is not, or no patterns.

        Examples:
            >>> repeated = adapter.capture("Rome is in Rome is")
            >>> round(float(CompositionAnalysis.qk_composition(repeated, (1, 4), (2, 2)).values[-1]), 2)
            0.81
        """
        return _pair(capture, source, target, "qk")

    @staticmethod
    def ov_composition(capture: AttentionCapture, source: Head, target: Head) -> Result:
        """As `qk_composition`, what is moved being weighed by its size. From patterns and values.

            values[t] = Σ_s A_target[t, s] · ‖Σ_{u≠s} A_source[s, u] v_u‖ / max_{u≤s} ‖v_u‖

        with v the source's values: the norms of Kobayashi et al. (2020), "Attention is Not Only a Weight",
        arXiv:2004.10102, relative to the largest value up to s, which no average of values exceeds. A source that rests on
        a token with a small value, as heads do on the first one, moves little.

        Args:
            capture: with `patterns` and `values`.
            source, target: as for `qk_composition`, and so are errors.

        Returns:
            `.values` `[T]` in 0…1, 0 at padding.

        Examples:
            >>> repeated = adapter.capture("Rome is in Rome is")
            >>> round(float(CompositionAnalysis.ov_composition(repeated, (1, 4), (2, 2)).values[-1]), 2)
            0.69
        """
        return _pair(capture, source, target, "ov")

    @staticmethod
    def composition_matrix(capture: AttentionCapture, method: str = "qk") -> Result:
        """`qk_composition` (or `ov_composition`) of every pair of heads, its mean over the prompt.

        Args:
            capture: with `patterns`, and `values` for `"ov"`.
            method: `"qk"` or `"ov"`.

        Returns:
            `.values` `[L, H, L, H]` in 0…1: source, then target; 0 unless the source's layer is the lower one. Row i is
            layer `capture.captured_layers[i]`.

        Examples:
            >>> CompositionAnalysis.composition_matrix(capture.attention).values.shape
            (4, 6, 4, 6)
        """
        if method not in METHODS:
            raise ValueError(f"method is {method!r}, and must be 'qk' or 'ov'.")
        patterns = _patterns(capture)
        received = patterns.sum(axis=2) / jnp.maximum(count(real_tokens(capture)), 1.0)
        moved = _moved(patterns, _values(capture) if method == "ov" else None)
        values = jnp.einsum("lhs,jgs->lhjg", moved, received, precision=jax.lax.Precision.HIGHEST)
        layers = np.array(capture.captured_layers)
        earlier = (layers[:, None] < layers[None, :])[:, None, :, None]
        values = jnp.where(jnp.broadcast_to(earlier, values.shape), values, 0.0)
        return Result(values, f"composition_matrix_{method}", layers=capture.captured_layers)

    @staticmethod
    def virtual_attention(capture: AttentionCapture, heads: Sequence[Head]) -> Result:
        """The attention of a path of heads, each reading what the one before it wrote: A_n … A_2 A_1.

        Elhage et al. (2021), "virtual attention heads": the head with W_OV = W_OV,n … W_OV,1 and this pattern. From
        patterns.

        Args:
            capture: with `patterns`.
            heads: (layer, head) of each, layers ascending.

        Returns:
            `.values` `[T, S]`: how much of what arrives at t set out from s. Rows of real tokens sum to 1, rows of padding
            are zero.

        Examples:
            >>> repeated = adapter.capture("Rome is in Rome is")
            >>> int(CompositionAnalysis.virtual_attention(repeated, [(1, 4), (2, 2)]).values[-1].argmax())  # the first " is"
            2
        """
        patterns = _patterns(capture)
        first, *rest = (patterns[row, head] for row, head in _path(capture, heads))
        for pattern in rest:
            first = jnp.matmul(pattern, first, precision=jax.lax.Precision.HIGHEST)
        return Result(first, "virtual_attention")

    @staticmethod
    def path_score(capture: AttentionCapture, heads: Sequence[Head], position: int = -1) -> Result:
        """Where the path brings information to one position from: a row of its virtual attention.

            values[s] = (A_n … A_1)[position, s]

        Args:
            capture: with `patterns`.
            heads: (layer, head) of each, layers ascending.
            position: counts real tokens, negative from the last.

        Returns:
            `.values` `[S]`, which sum to 1: the score of each path by where it begins.

        Examples:
            >>> repeated = adapter.capture("Rome is in Rome is")
            >>> round(float(CompositionAnalysis.path_score(repeated, [(1, 4), (2, 2)]).values[2]), 2)
            0.8
        """
        patterns = _patterns(capture)
        *rest, (row, head) = _path(capture, heads)
        values = at_position(capture, patterns[row, head], 0, position)
        for row, head in reversed(rest):
            values = jnp.matmul(values, patterns[row, head], precision=jax.lax.Precision.HIGHEST)
        return Result(values, "path_score")

    @staticmethod
    def weight_composition(model: Decoder) -> Result:
        """Q-, K- and V-composition of every pair of heads. From the weights.

            Q: ‖W_QKᵀ W_OV‖ / (‖W_QK‖ ‖W_OV‖)    K: ‖W_QK W_OV‖ / (‖W_QK‖ ‖W_OV‖)    V: ‖W_OV W_OV'‖ / (‖W_OV‖ ‖W_OV'‖)

        Frobenius norms, column vectors, the right-hand W_OV being the source's: how much of what the source writes the
        target's queries, keys and values read. Norm weights are folded, the target's into its Q, K, V and the source's
        into its V; the norm's scale, rotary position, biases and the layers between are left out. Under GQA a query head
        uses the keys and values of its group. A head whose circuit is zero scores 0. The norm of what attention adds, where
        the family has one, is folded into W_OV without its scale; where queries and keys are normalised there is no W_QK, and
        of the three V alone.

        Args:
            model: a model of any family and float dtype; computed in float32.

        Returns:
            `.values`: `"q"`, `"k"`, `"v"` (where `config.qk_norm` is not None, `"v"` alone) → `[L, H, L, H]`, source, then
            target; 0 unless the source's layer is the lower one. `.details["baseline"]`: 1/√E, what unrelated heads score:
            where the directions that a source writes are rotated at random against the target, E‖A B‖² = ‖A‖² ‖B‖² / E, so
            this is the root mean square of the score whatever the two matrices are (the mean is a little below).

        Examples:
            >>> round(float(CompositionAnalysis.weight_composition(model).values["k"][1, 4, 2, 2]), 2)
            0.18
        """
        found = dict(zip("qkv", on_every_host(weights.composition(weights.factors(model))), strict=True))
        found = {"v": found["v"]} if model.config.qk_norm is not None else found
        baseline = jnp.asarray(model.config.hidden_size**-0.5, jnp.float32)
        layers = tuple(range(model.config.num_hidden_layers))
        return Result(found, "weight_composition", layers=layers, details={"baseline": baseline})

    @staticmethod
    def detect_induction_circuit(
        capture: AttentionCapture, threshold: float = 0.3, model: Decoder | None = None
    ) -> Result:
        """Pairs of a previous-token head and an induction head in a later layer, and how they compose. Host function.

        Olsson et al. (2022), "In-context Learning and Induction Heads", arXiv:2209.11895: the keys of an induction head
        read what a previous-token head wrote. Heads are found by `CircuitDetection` on this prompt, which must repeat
        something; that they are present together is no proof that the one uses the other.

        Args:
            capture: with `patterns`.
            threshold: what both heads' scores must reach: mean attention to the token before, and to what followed an
                earlier occurrence. A score within rounding of it may reach it on one processor and not on another.
            model: with it the score is K-composition from the weights, a ValueError where queries and keys are normalised;
                without it the mean of `qk_composition`, from patterns.

        Returns:
            `.metadata["circuits"]`: dicts with `previous_token_head` and `induction_head`, each (layer, head) with true
            layer numbers, `composition_score`, `previous_token_score` and `induction_score`, sorted by the first score,
            largest first. `.metadata["composition"]`: `"weights"` or `"patterns"`. `.values` `[L, H, L, H]`: composition
            of these pairs, 0 elsewhere, the source being the previous-token head.

        Examples:
            >>> found = CompositionAnalysis.detect_induction_circuit(adapter.capture("Rome is in Rome is"), 0.9, model)
            >>> found.metadata["circuits"][0]["previous_token_head"], found.metadata["circuits"][0]["induction_head"]
            ((1, 4), (2, 2))
        """
        previous = np.asarray(CircuitDetection.detect_previous_token_heads(capture))
        induction = np.asarray(CircuitDetection.detect_induction_heads(capture))
        layers = np.array(capture.captured_layers)
        if model is None:
            scores = np.asarray(CompositionAnalysis.composition_matrix(capture).values)
        else:
            sizes = weights.config_of(model).sizes
            weights.check_qk(model, "K-composition from the weights")
            if sizes["H"] != capture.n_heads or layers.max() >= sizes["L"]:
                raise ValueError(
                    f"The capture has {capture.n_heads} heads and layers up to {layers.max()}, the model {sizes['H']} "
                    f"heads and {sizes['L']} layers: give the model that was captured."
                )
            scores = np.asarray(CompositionAnalysis.weight_composition(model).values["k"])[layers][:, :, layers]
        both = (previous >= threshold)[:, :, None, None] & (induction >= threshold)[None, None]
        both &= (layers[:, None] < layers[None, :])[:, None, :, None]
        found = sorted(np.argwhere(both).tolist(), key=lambda at: -scores[tuple(at)])
        circuits = [
            {
                "previous_token_head": (int(layers[i]), h),
                "induction_head": (int(layers[j]), g),
                "composition_score": float(scores[i, h, j, g]),
                "previous_token_score": float(previous[i, h]),
                "induction_score": float(induction[j, g]),
            }
            for i, h, j, g in found
        ]
        details = {
            "circuits": circuits,
            "composition": "patterns" if model is None else "weights",
            "threshold": threshold,
        }
        return Result(
            np.where(both, scores, 0.0), "detect_induction_circuit", layers=capture.captured_layers, details=details
        )

    @staticmethod
    def ov_copying_scores(model: Decoder) -> Float[np.ndarray, "L H"]:
        """Σ λ / Σ |λ| over the eigenvalues λ of W_U W_OV W_E: how much each head copies. Host function.

        1 where every eigenvalue is positive (what is attended to is predicted), −1 where every one is negative, near 0 for
        unrelated directions. Elhage et al. (2021). Norm weights are folded, the final one's into W_U; scales are left out.

        Returns:
            `[L, H]` in −1…1, 0 for a head that writes nothing.

        Examples:
            >>> round(float(CompositionAnalysis.ov_copying_scores(model)[2, 2]), 2)
            0.96
        """
        return weights.copying_scores(model)

    @staticmethod
    def qk_eigenvalues(model: Decoder) -> Complex[np.ndarray, "L H D"]:
        """Eigenvalues of W_QK = Qᵀ K, those that are not zero by rank, largest modulus first. Host function.

        Positive ones mean attention to what is similar. JAX has eigenvalues of general matrices on the CPU alone. ValueError
        where queries and keys are normalised.

        Examples:
            >>> CompositionAnalysis.qk_eigenvalues(model).shape
            (4, 6, 32)
        """
        return weights.eigenvalues(model, "qk")

    @staticmethod
    def ov_eigenvalues(model: Decoder) -> Complex[np.ndarray, "L H D"]:
        """Eigenvalues of W_OV = O V, those that are not zero by rank, largest modulus first. Host function.

        Examples:
            >>> CompositionAnalysis.ov_eigenvalues(model).shape
            (4, 6, 32)
        """
        return weights.eigenvalues(model, "ov")

    @overload
    @staticmethod
    def qk_svd(model: Decoder) -> Float[Array, "L H D"]: ...
    @overload
    @staticmethod
    def qk_svd(model: Decoder, layer: int, head: int) -> weights.SVD: ...
    @staticmethod
    def qk_svd(model: Decoder, layer: int | None = None, head: int | None = None) -> Any:
        """Singular values of W_QK = Qᵀ K of every head, or the whole decomposition of one.

        Args:
            model: a model of any family, or a Hugging Face one.
            layer, head: of the one head; neither for all.

        Returns:
            Singular values `[L, H, D]`, largest first; for one head `U [E, D]`, `S [D]`, `Vh [D, E]`, U holding directions
            of the destination and Vh of the source, the signs of a pair being arbitrary.

        Raises:
            ValueError: queries and keys are normalised (`config.qk_norm`), so that there is no W_QK; a layer or head that
                cannot be.

        Examples:
            >>> CompositionAnalysis.qk_svd(model).shape, CompositionAnalysis.qk_svd(model, 2, 2).U.shape
            ((4, 6, 32), (192, 32))
        """
        return weights.svd(model, "qk", layer, head)

    @overload
    @staticmethod
    def ov_svd(model: Decoder) -> Float[Array, "L H D"]: ...
    @overload
    @staticmethod
    def ov_svd(model: Decoder, layer: int, head: int) -> weights.SVD: ...
    @staticmethod
    def ov_svd(model: Decoder, layer: int | None = None, head: int | None = None) -> Any:
        """Singular values of W_OV = O V of every head, or the whole decomposition of one.

        Arguments and result as for `qk_svd`; U holds the directions written, Vh those read.

        Examples:
            >>> CompositionAnalysis.ov_svd(model).shape, CompositionAnalysis.ov_svd(model, 2, 2).Vh.shape
            ((4, 6, 32), (32, 192))
        """
        return weights.svd(model, "ov", layer, head)


def _patterns(capture: AttentionCapture) -> Float[Array, "L H T S"]:
    return need(capture, "AttentionCapture", "patterns").astype(jnp.float32)


def _values(capture: AttentionCapture) -> Float[Array, "L K T D"]:
    """Values, zero at padding."""
    values = need(capture, "AttentionCapture", "values").astype(jnp.float32)
    return values if capture.mask is None else jnp.where(capture.mask[None, None, :, None], values, 0.0)


def _at(capture: AttentionCapture, head: Any, what: str) -> tuple[int, int]:
    """Row and head of a (layer, head) pair."""
    if not isinstance(head, Sequence | np.ndarray) or isinstance(head, str) or len(head) != 2:
        raise TypeError(f"{what} is {head!r}, and a pair (layer, head) is needed.")
    return row_of(capture, head[0]), check_head(capture, head[1])


def _path(capture: AttentionCapture, heads: Sequence[Head]) -> list[tuple[int, int]]:
    """Rows and heads of a path."""
    if not isinstance(heads, Sequence | np.ndarray) or len(heads) == 0:
        raise TypeError(f"heads is {heads!r}, and a list of pairs (layer, head) is needed.")
    path = [_at(capture, head, f"heads[{i}]") for i, head in enumerate(heads)]
    layers = [int(head[0]) for head in heads]
    if any(a >= b for a, b in pairwise(layers)):
        raise ValueError(f"The layers of a path must ascend, and these are {layers}: a head reads only earlier layers.")
    return path


def _pair(capture: AttentionCapture, source: Head, target: Head, method: str) -> Result:
    patterns = _patterns(capture)
    (row, head), (target_row, target_head) = _at(capture, source, "source"), _at(capture, target, "target")
    if source[0] >= target[0]:
        raise ValueError(
            f"source is in layer {source[0]} and target in layer {target[0]}: a head reads only what earlier layers "
            "wrote, so the source's layer must be the lower one."
        )
    values = None
    if method == "ov":
        kv_head = head // (capture.n_heads // capture.n_kv_heads)
        values = _values(capture)[row, kv_head][None, None]
    moved = _moved(patterns[row, head][None, None], values)[0, 0]
    arrived = jnp.matmul(patterns[target_row, target_head], moved, precision=jax.lax.Precision.HIGHEST)
    return Result(arrived, f"{method}_composition")


@partial(jax.jit, inline=True)
def _moved(patterns: Float[Array, "L H T S"], values: Float[Array, "L K T D"] | None) -> Float[Array, "L H T"]:
    """What heads brought to each position from elsewhere, in 0…1: the attention, or where values are given its size."""
    elsewhere = patterns * (1.0 - jnp.eye(patterns.shape[-1], dtype=jnp.float32))[None, None]
    if values is None:
        return elsewhere.sum(axis=-1)
    n_layers, n_heads, n_tokens, _ = patterns.shape
    grouped = elsewhere.reshape(n_layers, values.shape[1], -1, n_tokens, n_tokens)
    brought = norm(jnp.einsum("lkgsu,lkud->lkgsd", grouped, values, precision=jax.lax.Precision.HIGHEST))
    largest = jax.lax.cummax(norm(values), axis=2)[:, :, None]
    return (brought / jnp.where(largest == 0.0, 1.0, largest)).reshape(n_layers, n_heads, n_tokens)
