"""Slices and means of an analysis's result by layer, head and token, and the heads at its extremes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from ..arrays import integer
from .inputs import at_position, check_capture, row_of
from .statistics import centred, real_tokens

if TYPE_CHECKING:
    from ..adapter.structures import AttentionCapture


class StratifiedView:
    """Looks at arrays whose axes begin `[L, H, T]`: results of an analysis, or the capture's own (`[L, K, T, …]` too).

    `capture` is the `AttentionCapture` that they come from. Layers are true layer numbers, positions count real tokens
    (negative from the last) and means run over real tokens.

    Raises:
        TypeError: another capture. ValueError: values of other axes; a layer, head or position that is not there; thirds of
            fewer than three layers.

    Examples:
        >>> view = StratifiedView(capture.attention)
        >>> view.mean_by_layer(EntropyAnalysis.token_entropy(capture.attention)).shape
        (4,)
    """

    def __init__(self, capture: AttentionCapture):
        check_capture(capture, "AttentionCapture")
        self.capture = capture

    def by_layer(self, values: Array, layer: int) -> Array:
        """One layer, `[H, …]`.

        Examples:
            >>> StratifiedView(capture.attention).by_layer(capture.attention.patterns, 2).shape
            (6, 6, 6)
        """
        return self._checked(values)[row_of(self.capture, layer)]

    def by_head(self, values: Array, head: int) -> Array:
        """One head at every layer, `[L, …]`.

        Examples:
            >>> StratifiedView(capture.attention).by_head(capture.attention.patterns, 5).shape
            (4, 6, 6)
        """
        values = self._checked(values, 2)
        return values[:, integer(head, "head", 0, values.shape[1] - 1)]

    def by_layer_head(self, values: Array, layer: int, head: int) -> Array:
        """One head, `[…]`.

        Examples:
            >>> StratifiedView(capture.attention).by_layer_head(capture.attention.patterns, 2, 5).shape
            (6, 6)
        """
        return self.by_head(values, head)[row_of(self.capture, layer)]

    def by_token(self, values: Array, position: int = -1) -> Array:
        """One token, `[L, H, …]`; the last real one by default.

        Examples:
            >>> StratifiedView(capture.attention).by_token(capture.attention.patterns, -1).shape
            (4, 6, 6)
        """
        return at_position(self.capture, self._checked(values, 3), 2, position)

    def early_layers(self, values: Array) -> Array:
        """The lowest third of the captured layers, lowest first; a remainder goes to lower thirds.

        Examples:
            >>> StratifiedView(capture.attention).early_layers(capture.attention.patterns).shape  # 2 of 4
            (2, 6, 6, 6)
        """
        return self._third(values, 0)

    def middle_layers(self, values: Array) -> Array:
        """The middle third of the captured layers, lowest first.

        Examples:
            >>> StratifiedView(capture.attention).middle_layers(capture.attention.patterns).shape
            (1, 6, 6, 6)
        """
        return self._third(values, 1)

    def late_layers(self, values: Array) -> Array:
        """The highest third of the captured layers, lowest first.

        Examples:
            >>> StratifiedView(capture.attention).late_layers(capture.attention.patterns).shape
            (1, 6, 6, 6)
        """
        return self._third(values, 2)

    def mean_by_layer(self, values: Array) -> Float[Array, " L"]:
        """Mean of `[L, H]` or `[L, H, T]` over heads and real tokens.

        Examples:
            >>> StratifiedView(capture.attention).mean_by_layer(EntropyAnalysis.token_entropy(capture.attention)).shape
            (4,)
        """
        return jnp.mean(self.mean_by_layer_head(values), axis=1)

    def mean_by_head(self, values: Array) -> Float[Array, " H"]:
        """Mean of `[L, H]` or `[L, H, T]` over layers and real tokens.

        Examples:
            >>> StratifiedView(capture.attention).mean_by_head(EntropyAnalysis.token_entropy(capture.attention)).shape
            (6,)
        """
        return jnp.mean(self.mean_by_layer_head(values), axis=0)

    def mean_by_layer_head(self, values: Array) -> Float[Array, "L H"]:
        """Mean of `[L, H, T]` over real tokens; `[L, H]` as it is.

        Examples:
            >>> StratifiedView(capture.attention).mean_by_layer_head(EntropyAnalysis.token_entropy(capture.attention)).shape
            (4, 6)
        """
        values = self._checked(values, 2).astype(jnp.float32)
        if values.ndim > 3:
            raise ValueError(f"values has shape {list(values.shape)}; means are of [L, H] or [L, H, T].")
        return values if values.ndim == 2 else centred(values, real_tokens(self.capture))[0]

    def _third(self, values: Array, which: int) -> Array:
        layers = self.capture.captured_layers
        if len(layers) < 3:
            raise ValueError(f"Thirds need at least 3 captured layers, and this capture has {len(layers)}.")
        return self._checked(values)[np.array_split(np.argsort(layers), 3)[which]]

    def _checked(self, values: Any, n_axes: int = 1) -> Array:
        values = jnp.asarray(values)
        n_layers, n_tokens = self.capture.n_layers, self.capture.n_tokens
        if values.ndim < n_axes or values.shape[:3:2] not in ((n_layers,), (n_layers, n_tokens)):
            raise ValueError(f"values is {list(values.shape)}; [L, H, T, …] is needed, L = {n_layers}, T = {n_tokens}.")
        return values


def extreme_heads(
    values: Float[Array, "L H"], k: int, largest: bool = True
) -> tuple[Float[Array, "N"], Int[Array, "N"], Int[Array, "N"]]:
    """The k largest (or smallest) values with their rows and heads, the most extreme first, NaN last; `k` is static."""
    values = jnp.asarray(values, jnp.float32)
    flat = values.reshape(-1)
    key = jnp.where(jnp.isnan(flat), -jnp.inf, flat if largest else -flat)
    index = jax.lax.top_k(key, k)[1]
    return flat[index], index // values.shape[1], index % values.shape[1]


def find_extreme_heads(
    values: Float[Array, "L H"], k: int = 5, largest: bool = True, layers: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """The heads at the extremes of an analysis. Host function; `extreme_heads` is the array function beneath it.

    Args:
        values: `[L, H]`.
        k: how many; all, where there are fewer. Undefined values (NaN) are left out.
        largest: the largest, or else the smallest.
        layers: `capture.captured_layers`: true layer numbers of the rows; 0 to L − 1 where None.

    Returns:
        A list of `{"layer", "head", "value"}`, the most extreme first; values within rounding of one another may change
        places, or be in and out, on another processor.

    Raises:
        ValueError: values of another rank, k below 1, or layers that do not number the rows.

    Examples:
        >>> found = find_extreme_heads(EntropyAnalysis.mean_entropy(capture.attention), k=1)
        >>> found[0]["layer"], found[0]["head"]
        (0, 4)
    """
    shape = np.shape(values)
    if len(shape) != 2 or k < 1:
        raise ValueError(f"values is {list(shape)} and k is {k}; [L, H], one number a head, and k ≥ 1 are needed.")
    names = range(shape[0]) if layers is None else tuple(layers)
    if len(names) != shape[0]:
        raise ValueError(f"layers names {len(names)} layers, but values has {shape[0]} rows.")
    found = map(np.asarray, extreme_heads(values, min(int(k), shape[0] * shape[1]), largest))
    return [
        {"layer": int(names[row]), "head": int(head), "value": float(value)}
        for value, row, head in zip(*found, strict=True)
        if not np.isnan(value)
    ]
