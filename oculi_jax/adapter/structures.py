"""What the guide's captures come back as: frozen pytrees of arrays, what was not asked for being None.

Shapes are those of one prompt; a batch of several leads with `B`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Self, TypeAlias

import jax
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from ..models.decoder.attention import said
from ..pytrees import pytree, static


def _array() -> Any:
    return dataclasses.field(default=None)


# Fields that are the model's and not a prompt's.
_SHARED = ("unembedding", "probability_tokens")


class _Capture:
    """What all captures share: they know their prompt and layers, and print in one line."""

    tokens: Any
    captured_layers: tuple[int, ...]

    @property
    def n_layers(self) -> int:
        """How many layers were captured: `len(captured_layers)`.

        Examples:
            >>> capture.attention.n_layers
            4
        """
        return len(self.captured_layers)

    @property
    def n_tokens(self) -> int:
        """Length of the prompt (of the longest one in a batch).

        Examples:
            >>> capture.attention.n_tokens
            6
        """
        return self.tokens.shape[-1]

    def map(self, analysis: Callable[..., Any], *arguments: Any) -> Any:
        """Maps an analysis of one prompt over a batch: `analysis(prompt, *arguments)` for each, results leading with `B`.

        Raises:
            ValueError: the capture is of one prompt, not of a batch.

        Examples:
            >>> adapter.capture([text, text]).map(analysis.EntropyAnalysis.token_entropy).shape
            (2, 4, 6, 6)
        """
        if self.tokens.ndim == 1:
            raise ValueError("This capture is of one prompt; call the analysis on it.")
        # What all prompts share has no batch axis.
        axes = jax.tree.map(lambda _: 0, self)
        shared = {name: None for name in _SHARED if getattr(self, name, None) is not None}
        axes = dataclasses.replace(axes, **shared)  # type: ignore[type-var]
        return jax.vmap(lambda one: analysis(one, *arguments), in_axes=(axes,))(self)

    def __getitem__(self, row: int) -> Self:
        """One prompt's capture out of a batch's, padded as the batch is: its `mask` says which tokens are real."""
        if self.tokens.ndim == 1:
            raise TypeError("This capture is of one prompt; only a batch of several can be indexed.")
        if not -len(self.tokens) <= row < len(self.tokens):
            raise IndexError(f"Row {row} of a batch of {len(self.tokens)} prompts.")
        shared = {name: value for name in _SHARED if (value := getattr(self, name, None)) is not None}
        return dataclasses.replace(jax.tree.map(lambda x: x[row], self), **shared)  # type: ignore[type-var]

    def __repr__(self) -> str:
        parts = []
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if isinstance(value, jax.Array | np.ndarray):
                parts.append(f"{item.name} [{', '.join(map(str, value.shape))}]")
        layers = self.captured_layers
        whole = layers == tuple(range(len(layers)))
        shown = f"layers 0–{len(layers) - 1}" if whole and len(layers) > 1 else f"layers {', '.join(map(str, layers))}"
        return f"{type(self).__name__}({shown}; {', '.join(parts)})"


@pytree(kw_only=True, repr=False)
class AttentionCapture(_Capture):
    """Attention at the captured layers.

    Attributes:
        queries: `[L, H, T, D]`, at the stage `qk_stage`.
        keys: `[L, K, T, D]`, at the same stage.
        values: `[L, K, T, D]`.
        patterns: `[L, H, T, S]`; rows of real tokens sum to 1, rows of padding are zero.
        z: `[L, H, T, D]`, each head's output before the output projection.
        final_scale: `[T]`, what the final norm multiplied by, where every layer was captured.
        post_scale: `[L, T]`, what the norm of what attention adds multiplied by; None where the family has no such norm.
        tokens: ids `[T]`.
        mask: bool `[T]`, True at real tokens.
        captured_layers: true layer numbers, in the order of the leading axis.
        qk_stage: `"post_rope"` or `"pre_rope"`.
        n_heads, n_kv_heads, head_dim: of the model.
        windows: how many tokens each captured layer sees, its own included, None for all; empty where none has a window.

    Examples:
        >>> capture.attention.queries.shape, capture.attention.keys.shape
        ((4, 6, 6, 32), (4, 2, 6, 32))
    """

    queries: Float[Array, "L H T D"] | None = _array()
    keys: Float[Array, "L K T D"] | None = _array()
    values: Float[Array, "L K T D"] | None = _array()
    patterns: Float[Array, "L H T S"] | None = _array()
    z: Float[Array, "L H T D"] | None = _array()
    final_scale: Float[Array, "T"] | None = _array()
    post_scale: Float[Array, "L T"] | None = _array()
    tokens: Int[Array, "T"] = _array()
    mask: Bool[Array, "T"] = _array()
    captured_layers: tuple[int, ...] = static()
    qk_stage: str = static(default="post_rope")
    n_heads: int = static()
    n_kv_heads: int = static()
    head_dim: int = static()
    windows: tuple[int | None, ...] = static(default=())


@pytree(kw_only=True, repr=False)
class ResidualCapture(_Capture):
    """The residual stream at the captured layers, and what attribution needs besides.

    Attributes:
        pre_attn: `[L, T, E]`, entering the layer.
        post_attn, pre_mlp: `[L, T, E]`, between attention and MLP: one point with two names.
        post_mlp: `[L, T, E]`, leaving the layer. `post_mlp − pre_attn` is what the layer added.
        attn_out, mlp_out: `[L, T, E]`, what attention and the MLP added: kept where the points before and after are, so
            that an edit of the stream itself shows as what is left.
        embedding: `[T, E]`, where the stream begins.
        final_scale: `[T]`, what the final norm multiplied by: 1 / root mean square.
        final_norm: `[T, E]`, after the final norm: what is unembedded.
        final_weight: `[E]`, what the final norm multiplies by besides: its weight, or 1 + weight.
        tokens, mask, captured_layers: as in `AttentionCapture`.
        model_layers: how many layers the model has, so that the first few are not taken for all.
        logit_scale: what the model multiplies logits by.

    Examples:
        >>> np.allclose(capture.residual.post_attn - capture.residual.pre_attn, capture.residual.attn_out, atol=1e-4)
        True
    """

    pre_attn: Float[Array, "L T E"] | None = _array()
    post_attn: Float[Array, "L T E"] | None = _array()
    pre_mlp: Float[Array, "L T E"] | None = _array()
    post_mlp: Float[Array, "L T E"] | None = _array()
    attn_out: Float[Array, "L T E"] | None = _array()
    mlp_out: Float[Array, "L T E"] | None = _array()
    embedding: Float[Array, "T E"] | None = _array()
    final_scale: Float[Array, "T"] | None = _array()
    final_norm: Float[Array, "T E"] | None = _array()
    final_weight: Float[Array, "E"] | None = _array()
    tokens: Int[Array, "T"] = _array()
    mask: Bool[Array, "T"] = _array()
    captured_layers: tuple[int, ...] = static()
    model_layers: int = static()
    logit_scale: float = static(default=1.0)


@pytree(kw_only=True, repr=False)
class MLPCapture(_Capture):
    """The MLP at the captured layers.

    Attributes:
        gate, up: `[L, T, F]`, the two projections.
        post_activation: `[L, T, F]`, silu(gate) · up: the neurons.
        output: `[L, T, E]`, what the MLP adds to the residual stream.
        final_scale, post_scale: as in `AttentionCapture`, of the norm of what the MLP adds.
        tokens, mask, captured_layers: as in `AttentionCapture`.

    Examples:
        >>> capture.mlp.post_activation.shape, capture.mlp.output.shape
        ((4, 6, 512), (4, 6, 192))
    """

    gate: Float[Array, "L T F"] | None = _array()
    up: Float[Array, "L T F"] | None = _array()
    post_activation: Float[Array, "L T F"] | None = _array()
    output: Float[Array, "L T E"] | None = _array()
    final_scale: Float[Array, "T"] | None = _array()
    post_scale: Float[Array, "L T"] | None = _array()
    tokens: Int[Array, "T"] = _array()
    mask: Bool[Array, "T"] = _array()
    captured_layers: tuple[int, ...] = static()


@pytree(kw_only=True, repr=False)
class LogitCapture(_Capture):
    """The lens at the captured layers: the final norm, then the unembedding, of `resid_post`.

    `T` is the number of captured positions.

    Attributes:
        logits: `[L, T, V]`; None where `top_k` was given.
        top_k_logits, top_k_indices: `[L, T, k]`, largest first; None without `top_k`.
        log_normalizer: `[L, T]`, log Σ exp(logits), so that `exp(top_k_logits − log_normalizer)` is a probability.
        probabilities: `[L, T, N]` of the ids `probability_tokens`; None where none were asked for.
        probability_tokens: ids `[N]`.
        normalized: `[L, T, E]`, the residual stream after the final norm, from which any token's logit follows.
        unembedding: `[V, E]`, a reference to the model's; not written to files.
        tokens, mask, captured_layers: as in `AttentionCapture`; of the whole prompt.
        positions: which positions were captured; None for all.
        lens: `"logit"`, or `"tuned"` or `"jacobian"` where such a lens translated the stream first.
        logit_scale, logit_cap: what the model does to logits, as `DecoderConfig` has them.

    Examples:
        >>> tokenizer.convert_ids_to_tokens(capture.logits.top_k_indices[:, -1, 0].tolist())  # layer by layer
        ['▁called', '▁Caracas', '▁Rome', '▁Rome']
    """

    logits: Float[Array, "L T V"] | None = _array()
    top_k_logits: Float[Array, "L T k"] | None = _array()
    top_k_indices: Int[Array, "L T k"] | None = _array()
    log_normalizer: Float[Array, "L T"] | None = _array()
    probabilities: Float[Array, "L T N"] | None = _array()
    probability_tokens: Int[Array, "N"] | None = _array()
    normalized: Float[Array, "L T E"] | None = _array()
    unembedding: Float[Array, "V E"] | None = _array()
    tokens: Int[Array, "T"] = _array()
    mask: Bool[Array, "T"] = _array()
    captured_layers: tuple[int, ...] = static()
    positions: tuple[int, ...] | None = static(default=None)
    lens: str = static(default="logit")
    logit_scale: float = static(default=1.0)
    logit_cap: float | None = static(default=None)

    def said(self, products: Float[Array, "..."]) -> Float[Array, "..."]:
        """Logits, of products of `normalized` and the unembedding: multiplied and capped as the model does it.

        Examples:
            >>> capture.logits.said(np.array([1.0, 2.0]))  # a Llama has neither
            array([1., 2.])
        """
        return said(products, self.logit_scale, self.logit_cap)


@pytree(kw_only=True, repr=False)
class FullCapture:
    """All four captures of one pass.

    Examples:
        >>> capture
        FullCapture(attention at 4 layers, residual at 4 layers, mlp at 4 layers, logits at 4 layers; 6 tokens)
    """

    attention: AttentionCapture = _array()
    residual: ResidualCapture = _array()
    mlp: MLPCapture = _array()
    logits: LogitCapture = _array()

    def __getitem__(self, row: int) -> FullCapture:
        """One prompt's captures out of a batch's."""
        return FullCapture(**{name: getattr(self, name)[row] for name in ("attention", "residual", "mlp", "logits")})

    def __repr__(self) -> str:
        layers = {name: getattr(self, name).n_layers for name in ("attention", "residual", "mlp", "logits")}
        shown = ", ".join(f"{name} at {number} layers" for name, number in layers.items())
        return f"FullCapture({shown}; {self.attention.n_tokens} tokens)"


# A capture of one kind.
AnyCapture: TypeAlias = AttentionCapture | ResidualCapture | MLPCapture | LogitCapture
