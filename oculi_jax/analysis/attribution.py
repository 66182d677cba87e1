"""`AttributionMethods`: which layers, components, heads and neurons a logit comes from."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from ..arrays import integer
from . import flow
from .inputs import at_position, check_capture, check_position, check_same_prompt, need
from .residual import decompose_resid, pulled_back, written
from .result import Result

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..adapter.structures import AttentionCapture, MLPCapture, ResidualCapture
    from ..models.decoder.model import Decoder

COMPONENTS = ("attention", "mlp")
# Method → what its second axis counts.
_UNITS = {
    "direct_logit_attribution": None,
    "component_attribution": "component",
    "head_attribution": "head",
    "neuron_attribution": "neuron",
}


class AttributionMethods:
    """Direct attribution of a logit, and flow through attention.

    The logit of a token is linear in what was written into the residual stream once the final norm's scale at that
    position is taken as it was: `logit = Σ_parts (part · weight · scale) · unembed[token]`. So each part has its share, in
    logits. Direct effects only: what a part does through later layers is theirs.

    In families beside Llama: the logit is the one before a final soft cap (`config.logit_cap`), and times
    `config.logit_scale`. Where what a sublayer adds is normalised first, so is the part of each head, neuron and bias in it,
    with the scale of that norm taken as it was too, and parts are times `config.residual_scale`.

    `token` is everywhere an id (an integer, or an array scalar that may be traced), or a pair `(a, b)` for the logit
    difference `logit(a) − logit(b)`. An id beyond the vocabulary is refused where the host can see it, and gives NaN where
    not. `position` is static and counts real tokens, negative from the last.

    Examples:
        >>> heads = AttributionMethods.head_attribution(capture.attention, model, (rome, paris))
        >>> [(row["layer"], row["head"]) for row in AttributionMethods.top_attributions(heads, k=1)]
        [(2, 5)]
    """

    @staticmethod
    def direct_logit_attribution(
        residual: ResidualCapture, unembed: Array | Decoder, token: ArrayLike, position: int = -1
    ) -> Result:
        """What each layer adds to a logit directly: its attention's and its MLP's output through the final norm.

        Elhage et al. (2021), transformer-circuits.pub; nostalgebraist (2020), the logit lens.

        Args:
            residual: with all its points.
            unembed: `model.lm_head.weight` `[V, E]`.
            token: an id, or a pair for a logit difference.
            position: whose logit.

        Returns:
            `.values` `[L]`, float32, in logits. `.details`: `"embedding"`, what the embedding adds; `"edits"` `[L]`, what
            jumps of the stream add that no component explains (interventions on the stream itself, and in half precision
            rounding); `"norm_edit"`, what an edit of the final norm's output added; `"logit"`, the logit itself, before a
            final soft cap.
            `.completeness_error` is always the sum of all these parts minus the logit. Of all layers it is rounding; of
            some, minus what the other layers add, and `norm_edit` is 0 unless the model's last layer is among them.

        Raises:
            ValueError, TypeError: something was not captured, an id or position that is not there, or an `unembed` that
                does not fit.

        Examples:
            >>> parts = AttributionMethods.direct_logit_attribution(capture.residual, model.lm_head.weight, rome)
            >>> np.round(parts.values).tolist()
            [0.0, 1.0, 2.0, 14.0]
        """
        parts = _parts(residual, unembed, token, position)
        values = parts.attention + parts.mlp
        return Result(
            values,
            "direct_logit_attribution",
            parts.beside() + values.sum() - parts.logit,
            residual.captured_layers,
            parts.details(),
        )

    @staticmethod
    def component_attribution(
        residual: ResidualCapture,
        mlp: MLPCapture | None,
        unembed: Array | Decoder,
        token: ArrayLike,
        position: int = -1,
    ) -> Result:
        """What each layer's attention and MLP add to a logit directly.

        Args:
            residual: with all its points.
            mlp: of the same layers of the same run, with `output`; None reads the MLPs from `residual`.
            unembed, token, position: as in `direct_logit_attribution`.

        Returns:
            `.values` `[L, 2]`: attention, MLP; in logits. `.details` and `.completeness_error` as in
            `direct_logit_attribution`.

        Raises:
            ValueError, TypeError: as there, and captures of different layers or prompts.

        Examples:
            >>> parts = AttributionMethods.component_attribution(capture.residual, None, model.lm_head.weight, rome)
            >>> np.round(parts.values[3]).tolist()  # attention, MLP
            [2.0, 13.0]
        """
        parts = _parts(residual, unembed, token, position)
        of_mlp = parts.mlp
        if mlp is not None:
            output = need(mlp, "MLPCapture", "output")
            if mlp.captured_layers != residual.captured_layers:
                raise ValueError(
                    f"residual has layers {list(residual.captured_layers)} and mlp {list(mlp.captured_layers)}; capture the "
                    "same layers of both, in one order."
                )
            check_same_prompt(residual, mlp)
            of_mlp = _read(_at(mlp, output, 1, position), parts.gain)
        values = jnp.stack([parts.attention, of_mlp], axis=1)
        error = parts.beside() + values.sum() - parts.logit
        return Result(values, "component_attribution", error, residual.captured_layers, parts.details())

    @staticmethod
    def head_attribution(
        attention: AttentionCapture,
        model: Decoder,
        token: ArrayLike,
        position: int = -1,
        residual: ResidualCapture | None = None,
    ) -> Result:
        """What each head adds to a logit directly: `(z_h W_O,h · weight · scale) · unembed[token]`.

        From `z`, so an ablated head gets no credit. The output projection's bias belongs to no head.

        Args:
            attention: a capture of every layer, which has the final norm's scale; of some, with `residual`.
            model: the model that was captured.
            token, position: as in `direct_logit_attribution`.
            residual: of the same run, with all its points; then the result can say whether all parts sum to the logit.

        Returns:
            `.values` `[L, H]`, float32, in logits. `.details`: `"bias"` `[L]`, what output biases add; with `residual`,
            of its layers also `"mlp"` `[L]` and `"edits"` `[L]`, with `"embedding"`, `"norm_edit"` and `"logit"` as in
            `direct_logit_attribution`. `.completeness_error` is then the sum of all parts minus the logit: beside rounding,
            what layers not captured add, and edits of `attn_out` itself, which no head made. None without `residual`.

        Raises:
            ValueError, TypeError: no scale, captures of different prompts or of another model, or as in
                `direct_logit_attribution`.

        Examples:
            >>> heads = AttributionMethods.head_attribution(capture.attention, model, rome, residual=capture.residual)
            >>> heads.values.shape, abs(float(heads.completeness_error)) < 1e-3
            ((4, 6), True)
        """
        z = need(attention, "AttentionCapture", "z")
        own = written(attention, model, "attn.o", z.shape[1], z.shape[3])
        gain, parts = _gain(attention, model, token, position, residual)
        through, bias = pulled_back(own, attention, gain, position)
        values = (_at(attention, z, 2, position).astype(jnp.float32) * through).sum(axis=-1)
        return _of_units("head_attribution", attention, values, bias, parts, other="mlp")

    @staticmethod
    def neuron_attribution(
        mlp: MLPCapture, model: Decoder, token: ArrayLike, position: int = -1, residual: ResidualCapture | None = None
    ) -> Result:
        """What each neuron adds to a logit directly: its activation times its row of the down projection.

        Geva et al. (2022), arXiv:2203.14680.

        Args:
            mlp: a capture with `post_activation`, of every layer, which has the final norm's scale; of some, with
                `residual`.
            model, token, position, residual: as in `head_attribution`.

        Returns:
            `.values` `[L, F]`, float32, in logits; `.details` and `.completeness_error` as in `head_attribution`, with
            `"attention"` `[L]` in place of `"mlp"`.

        Raises:
            ValueError, TypeError: as in `head_attribution`.

        Examples:
            >>> AttributionMethods.neuron_attribution(capture.mlp, model, rome).values.shape
            (4, 512)
        """
        neurons = need(mlp, "MLPCapture", "post_activation")
        own = written(mlp, model, "mlp.down", neurons.shape[2])
        gain, parts = _gain(mlp, model, token, position, residual)
        through, bias = pulled_back(own, mlp, gain, position)
        values = _at(mlp, neurons, 1, position).astype(jnp.float32) * through
        return _of_units("neuron_attribution", mlp, values, bias, parts, other="attention")

    @staticmethod
    def top_attributions(result: Result, k: int = 10) -> list[dict[str, Any]]:
        """The k largest attributions by absolute value, largest first. Host function; see `top_values`.

        Args:
            result: of one prompt, from a method of this class that attributes a logit.
            k: how many; all where there are fewer.

        Returns:
            Dicts with `"layer"` (its true number), `"value"` in logits, and `"head"`, `"neuron"` or `"component"`
            (`"attention"` or `"mlp"`) where the result has such an axis.

        Raises:
            ValueError: a result of another method or of several prompts, or k below 1.

        Examples:
            >>> heads = AttributionMethods.head_attribution(capture.attention, model, rome)
            >>> [(row["layer"], row["head"]) for row in AttributionMethods.top_attributions(heads, k=2)]
            [(3, 4), (3, 3)]
        """
        method = getattr(result, "method", type(result).__name__)
        if method not in _UNITS:
            raise ValueError(f"top_attributions ranks results of {', '.join(_UNITS)}; this one is of {method}.")
        unit = _UNITS[method]
        rank = 1 if unit is None else 2
        if result.values.ndim != rank:
            raise ValueError(
                f"The values have shape {list(result.values.shape)}, and those of one prompt have {rank} axes: take one row, "
                "with jax.tree.map(lambda x: x[i], result)."
            )
        values, indices = (np.asarray(found) for found in AttributionMethods.top_values(result.values, k))
        rows = []
        for value, index in zip(values.tolist(), indices.tolist(), strict=True):
            row: dict[str, Any] = {"layer": result.layers[index[0]]}
            if unit is not None:
                row[unit] = COMPONENTS[index[1]] if unit == "component" else index[1]
            rows.append({**row, "value": value})
        return rows

    @staticmethod
    def top_values(values: Float[Array, "..."], k: int = 10) -> tuple[Float[Array, "N"], Int[Array, "N R"]]:
        """The k entries of largest absolute value, largest first.

        Args:
            values: any array, of R axes.
            k: how many, static; all where there are fewer.

        Returns:
            N = k entries with their signs, `[N]`, and where they are, int32 `[N, R]`. Entries whose sizes are within rounding
            of one another may change places, or be in and out, on another processor.

        Examples:
            >>> [found.tolist() for found in AttributionMethods.top_values(jnp.array([1.0, -3.0, 2.0]), k=2)]
            [[-3.0, 2.0], [[1], [2]]]
        """
        flat = jnp.ravel(values)
        places = jax.lax.top_k(jnp.abs(flat), min(integer(k, "k", 1), flat.size))[1]
        return flat[places], jnp.stack(jnp.unravel_index(places, values.shape), axis=-1)

    attention_rollout = staticmethod(flow.attention_rollout)
    attention_flow = staticmethod(flow.attention_flow)
    value_weighted_attention = staticmethod(flow.value_weighted_attention)


class _Parts(NamedTuple):
    """Shares of a logit: `gain` `[E]` is what turns a part of the stream into them; `[L]` and scalars."""

    gain: Array
    embedding: Array
    attention: Array
    mlp: Array
    edits: Array
    norm_edit: Array
    logit: Array

    def beside(self) -> Array:
        """What is neither attention nor MLP."""
        return self.embedding + self.edits.sum() + self.norm_edit

    def details(self) -> dict[str, Array]:
        return {
            "embedding": self.embedding,
            "edits": self.edits,
            "norm_edit": self.norm_edit,
            "logit": self.logit,
        }


def _parts(residual: Any, unembed: Any, token: Any, position: int) -> _Parts:
    """Shares of a logit in a residual capture."""
    weight = need(residual, "ResidualCapture", "final_weight", "final_scale", "final_norm")[0]
    layers = residual.captured_layers
    last = layers.index(residual.model_layers - 1) if residual.model_layers - 1 in layers else None
    direction = _direction(unembed, token, weight.shape[-1]) * residual.logit_scale
    return _shares(residual, direction, check_position(residual, position), last)


# One program, rather than one for each step of it whenever the length is new.
@partial(jax.jit, static_argnums=(2, 3))
def _shares(residual: Any, direction: Float[Array, "E"], position: int, last: int | None) -> _Parts:
    """`last` is the row of the model's last layer; None where it was not captured."""
    parts = decompose_resid(residual, position)
    scale = at_position(residual, residual.final_scale, 0, position).astype(jnp.float32)
    norm_gain = residual.final_weight.astype(jnp.float32) * scale
    gain = norm_gain * direction
    final_norm = at_position(residual, residual.final_norm, 0, position).astype(jnp.float32)

    norm_edit = jnp.zeros((), jnp.float32)
    if last is not None:
        leaving = at_position(residual, residual.post_mlp[last], 0, position).astype(jnp.float32)
        norm_edit = _read(final_norm - leaving * norm_gain, direction)
    return _Parts(
        gain,
        _read(parts.embedding, gain),
        _read(parts.attn, gain),
        _read(parts.mlp, gain),
        edits=_read(parts.edits, gain),
        norm_edit=norm_edit,
        logit=_read(final_norm, direction),
    )


def _gain(
    capture: Any, model: Decoder, token: Any, position: int, residual: Any
) -> tuple[Float[Array, "E"], _Parts | None]:
    """What turns a part of the stream into its share of the logit, and the other parts where a residual capture is given."""
    if residual is not None:
        check_capture(residual, "ResidualCapture")
        check_same_prompt(capture, residual)
        parts = _parts(residual, model.lm_head.weight, token, position)
        return parts.gain, parts
    if capture.final_scale is None:
        raise ValueError(
            f"This {type(capture).__name__} lacks the final norm's scale, which is kept where every layer is captured: "
            "capture with layers=None, or give residual=, a ResidualCapture of the same run."
        )
    scale = _at(capture, capture.final_scale, 0, position).astype(jnp.float32) * model.config.logit_scale
    weight = model.final_weight.astype(jnp.float32)
    return weight * scale * _direction(model.lm_head.weight, token, weight.shape[-1]), None


def _of_units(method: str, capture: Any, values: Array, bias: Array, parts: _Parts | None, other: str) -> Result:
    """The result for heads or neurons, whose sum with the projection's bias is one kind of component; `other` is the other."""
    layers = capture.captured_layers
    if parts is None:
        return Result(values, method, None, layers, {"bias": bias})
    rest = getattr(parts, other)
    error = parts.beside() + rest.sum() + values.sum() + bias.sum() - parts.logit
    return Result(values, method, error, layers, {"bias": bias, other: rest, **parts.details()})


def _at(capture: Any, value: Array, axis: int, position: int) -> Array:
    return _at_static(capture, value, axis, check_position(capture, position))


_at_static = jax.jit(at_position, static_argnums=(2, 3))


def _read(part: Float[Array, "... E"], direction: Float[Array, "E"]) -> Float[Array, "..."]:
    return jnp.einsum("...e,e->...", part.astype(jnp.float32), direction, precision=jax.lax.Precision.HIGHEST)


def _direction(unembed: Any, token: Any, width: int) -> Float[Array, "E"]:
    """The row of the unembedding that reads a token's logit, or the difference of two."""
    shape = getattr(unembed, "shape", None)
    if shape is None:
        raise TypeError(f"unembed is a {type(unembed).__name__}, and an array is needed: model.lm_head.weight.")
    if len(shape) != 2 or shape[1] != width:
        raise ValueError(
            f"unembed has shape {list(shape)}, and [V, E] with E = {width} is needed: model.lm_head.weight."
        )
    if isinstance(token, tuple | list):
        if len(token) != 2:
            raise ValueError(
                f"token holds {len(token)} ids; give one id, or a pair (a, b) for logit(a) − logit(b). A text of several "
                "tokens has no logit of its own."
            )
        return _row(unembed, token[0]) - _row(unembed, token[1])
    return _row(unembed, token)


def _row(unembed: Any, token: Any) -> Float[Array, "E"]:
    seen = token if isinstance(token, jax.Array) else np.asarray(token)
    if seen.ndim or not jnp.issubdtype(seen.dtype, jnp.integer):
        raise TypeError(f"token is {token!r}, and an id is needed (adapter.to_single_token(text)), or a pair of them.")
    if not isinstance(token, jax.Array) and not 0 <= int(seen) < unembed.shape[0]:
        raise ValueError(f"token is {token}, and the vocabulary has ids 0 to {unembed.shape[0] - 1}.")
    if hasattr(unembed, "detach"):  # torch's, perhaps on a device and with a gradient
        return jnp.asarray(unembed[int(seen)].detach().cpu().float().numpy())
    ids = jnp.asarray(seen)
    # An id beyond the vocabulary that only the device could see gives NaN, never a neighbour's row.
    rows = jnp.asarray(unembed).at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    return rows.astype(jnp.float32)
