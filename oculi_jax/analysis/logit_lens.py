"""`LogitLensAnalysis`: how a prediction forms from layer to layer, read from a `LogitCapture`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import Float, Int

from ..adapter.structures import LogitCapture
from ..arrays import integer
from ..utils.tokens import str_tokens, to_single_token
from .inputs import at_position, check_capture

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..utils.tokens import Tokenizer


class LogitLensAnalysis:
    """What the model would say if it stopped at each layer: nostalgebraist (2020), "interpreting GPT: the logit lens".

    The lens reads the residual stream after a layer, puts the final norm before the unembedding, and with a tuned lens
    translates the stream first. Row `i` of every result is layer `capture.captured_layers[i]`. `token_position` counts real
    tokens, negative from the last. Methods that return arrays may be jitted, mapped and differentiated. Tokens whose logits
    are within rounding of one another may change places, and so ranks, from one processor to another.

    Args:
        tokenizer: of the model; None where only arrays are wanted.

    Examples:
        >>> LogitLensAnalysis(tokenizer).prediction_trajectory(capture.logits)[-1]["text"]
        ' Rome'
    """

    def __init__(self, tokenizer: Tokenizer | None = None):
        self.tokenizer = tokenizer

    def layer_predictions(
        self, capture: LogitCapture, token_position: int = -1, top_k: int = 3
    ) -> list[dict[str, Any]]:
        """The likeliest tokens at each layer. Host function.

        Args:
            capture: a `LogitCapture`.
            token_position: where in the prompt.
            top_k: how many tokens; more than the capture kept are computed from the unembedding.

        Returns:
            One dictionary a layer: `"layer"`, its true number, and `"predictions"`, `[(text, probability), …]`, the
            likeliest first.

        Raises:
            ValueError: a position that was not captured; more tokens than a reopened file holds. TypeError: no tokenizer.

        Examples:
            >>> found = LogitLensAnalysis(tokenizer).layer_predictions(capture.logits)[2]
            >>> found["layer"], [text for text, probability in found["predictions"]]
            (2, [' Rome', ' Europe', ' Dublin'])
        """
        chances, ids = _host_top(capture, token_position, top_k)
        return [
            {"layer": layer, "predictions": list(zip(str_tokens(self.tokenizer, row), map(float, p), strict=True))}
            for layer, row, p in zip(capture.captured_layers, ids, chances, strict=True)
        ]

    def prediction_trajectory(self, capture: LogitCapture, token_position: int = -1) -> list[dict[str, Any]]:
        """The likeliest token of each layer. Host function. Arguments and errors as for `layer_predictions`.

        Returns:
            One dictionary a layer: `"layer"`, `"text"`, `"token"` (its id) and `"probability"`.

        Examples:
            >>> [row["text"] for row in LogitLensAnalysis(tokenizer).prediction_trajectory(capture.logits)]
            [' called', ' Caracas', ' Rome', ' Rome']
        """
        chances, ids = _host_top(capture, token_position, 1)
        texts = str_tokens(self.tokenizer, ids[:, 0])
        rows = zip(capture.captured_layers, texts, ids[:, 0], chances[:, 0], strict=True)
        return [{"layer": n, "text": text, "token": int(i), "probability": float(p)} for n, text, i, p in rows]

    def convergence_layer(self, capture: LogitCapture, token_position: int = -1) -> int:
        """From where on the likeliest token no longer changes. Host function. Arguments and errors as for `layer_predictions`.

        Returns:
            The true number of the lowest captured layer from which on every captured layer has the likeliest token of
            the last one. A layer whose two likeliest tokens are within rounding of one another may count either way.

        Examples:
            >>> LogitLensAnalysis().convergence_layer(capture.logits)
            2
        """
        best = dict(zip(capture.captured_layers, _host_top(capture, token_position, 1)[1][:, 0], strict=True))
        layers = sorted(best)
        differs = [layer for layer in layers if best[layer] != best[layers[-1]]]
        return min(layer for layer in layers if not differs or layer > differs[-1])

    def token_probability_trajectory(
        self, capture: LogitCapture, token: ArrayLike, token_position: int = -1
    ) -> Float[Array, " L"]:
        """The probability of one token at each layer, exact for any token whatever `top_k` was.

        exp(normalized · unembedding[token] − log_normalizer), the product scaled and capped as the model does it.

        Args:
            capture: a `LogitCapture`. Reopened from a file it lacks the unembedding; then its logits serve, or the
                probabilities of `LogitConfig(tokens=…)`.
            token: an id, perhaps traced, or a text that is exactly one token.
            token_position: where in the prompt.

        Returns:
            `[L]`. NaN for an id beyond the vocabulary, or one not kept, where only the device knows it.

        Raises:
            ValueError: what was kept does not tell this token's probability; an id or position that cannot be.

        Examples:
            >>> chances = LogitLensAnalysis(tokenizer).token_probability_trajectory(capture.logits, " Rome")
            >>> [round(float(chance), 2) for chance in chances]
            [0.0, 0.01, 0.45, 1.0]
        """
        check_capture(capture, "LogitCapture")
        token = self._id(capture, token)
        if exact := _exact(capture):
            normalized, unembedding = exact
            row = unembedding.at[token].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
            logit = capture.said(_unembed(_at(capture, normalized, token_position), row[None]))[:, 0]
        elif capture.logits is not None:
            logit = _of_token(_at(capture, capture.logits, token_position).astype(jnp.float32), token)
        else:
            return _kept_probability(capture, token, token_position)
        return jnp.exp(logit - _at(capture, capture.log_normalizer, token_position))

    def token_rank(self, capture: LogitCapture, token: ArrayLike, token_position: int = -1) -> Int[Array, " L"]:
        """How many tokens are likelier than this one at each layer: 0 for the likeliest; equals do not count.

        Args:
            capture: a `LogitCapture` with its unembedding or all logits.
            token: an id, perhaps traced, or a text that is exactly one token.
            token_position: where in the prompt.

        Returns:
            int32 `[L]`; −1 where only the device knows that there is no such token or position.

        Raises:
            ValueError: the capture has neither; an id or position that cannot be.

        Examples:
            >>> LogitLensAnalysis(tokenizer).token_rank(capture.logits, " Rome")[2:].tolist()
            [0, 0]
        """
        check_capture(capture, "LogitCapture")
        token = self._id(capture, token)
        logits = _logits(capture, token_position)
        own = _of_token(logits, token)
        likelier = jnp.sum(logits > own[:, None], axis=-1, dtype=jnp.int32)
        return jnp.where(jnp.isnan(own), jnp.int32(-1), likelier)

    def entropy_by_layer(self, capture: LogitCapture, token_position: int = -1) -> Float[Array, " L"]:
        """Entropy of each layer's whole distribution, −Σ p log p, `[L]` in nats: 0 for certainty, log V for none at all.

        Arguments and errors as for `token_rank`.

        Examples:
            >>> [round(float(x), 2) for x in LogitLensAnalysis().entropy_by_layer(capture.logits)]
            [3.99, 4.73, 2.99, 0.0]
        """
        check_capture(capture, "LogitCapture")
        log_p = jax.nn.log_softmax(_logits(capture, token_position), axis=-1)
        return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)

    def prediction_convergence(self, capture: LogitCapture, token_position: int = -1) -> Float[Array, " L"]:
        """How far each layer is from the last captured one: KL(last ‖ layer) = Σ p_last (log p_last − log p), in nats.

        `[L]`. The measure of Belrose et al. (2023), arXiv:2303.08112, over the whole vocabulary; 0 at the last layer. Arguments
        and errors as for `token_rank`.

        Examples:
            >>> [round(float(x), 2) for x in LogitLensAnalysis().prediction_convergence(capture.logits)]
            [6.66, 4.73, 0.79, 0.0]
        """
        check_capture(capture, "LogitCapture")
        log_p = jax.nn.log_softmax(_logits(capture, token_position), axis=-1)
        last = log_p[capture.captured_layers.index(max(capture.captured_layers))][None, :]
        return jnp.sum(jnp.exp(last) * (last - log_p), axis=-1)

    def _id(self, capture: LogitCapture, token: Any) -> Int[Array, ""]:
        """A token's id as an int32 scalar; checked by value where the host holds it."""
        if isinstance(token, str):
            token = to_single_token(self.tokenizer, token)
        if not isinstance(token, jax.Array):
            token = np.asarray(token)
        if token.ndim or not jnp.issubdtype(token.dtype, jnp.integer):
            raise TypeError(
                f"token has shape {list(token.shape)} and dtype {token.dtype}, and one id, an integer, is needed; for "
                "several use jax.vmap over them."
            )
        size = _size(capture)
        if isinstance(token, np.ndarray) and not 0 <= int(token) < (2**31 if size is None else size):
            raise ValueError(f"token is {token}, and ids are 0 to {'…' if size is None else size - 1}.")
        return jnp.asarray(token).astype(jnp.int32)


def _logits(capture: LogitCapture, position: int) -> Float[Array, "L V"]:
    """The lens's logits over the whole vocabulary at one position, float32."""
    rounded = capture.logits is None or capture.logits.dtype != jnp.float32
    if rounded and (exact := _exact(capture)):
        return capture.said(_unembed(_at(capture, exact[0], position), exact[1]))
    if capture.logits is None:
        kept = 0 if capture.top_k_logits is None else capture.top_k_logits.shape[-1]
        raise ValueError(
            f"This needs the logits of the whole vocabulary, and this capture has those of the {kept} likeliest tokens "
            "alone: files do not hold the unembedding. Capture with LogitConfig(top_k=None), or give it again with "
            "dataclasses.replace(capture, unembedding=model.lm_head.weight)."
        )
    return _at(capture, capture.logits, position).astype(jnp.float32)


def _top(capture: LogitCapture, position: int, k: int) -> tuple[Float[Array, "L k"], Int[Array, "L k"]]:
    """Probabilities and ids of the k likeliest tokens of each layer, the likeliest first."""
    values, ids = capture.top_k_logits, capture.top_k_indices
    if values is None or ids is None or k > values.shape[-1] or (values.dtype != jnp.float32 and _exact(capture)):
        values, ids = jax.lax.top_k(_logits(capture, position), k)
    else:
        values, ids = _at(capture, values[..., :k], position), _at(capture, ids[..., :k], position)
    return jnp.exp(values.astype(jnp.float32) - _at(capture, capture.log_normalizer, position)[:, None]), ids


def _host_top(capture: LogitCapture, position: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """`_top` on the host, which can see that a prompt is shorter than its padding."""
    check_capture(capture, "LogitCapture")
    size = _size(capture)
    chances, ids = _top(capture, position, integer(k, "top_k", 1, size))
    n_real = int(np.asarray(capture.mask).sum())
    if capture.positions is None and not -n_real <= position < n_real:
        raise ValueError(
            f"token_position is {position}, but the prompt has {n_real} tokens: positions are 0 to {n_real - 1}, or −1 to "
            f"−{n_real} from the end."
        )
    return np.asarray(chances), np.asarray(ids)


def _kept_probability(capture: LogitCapture, token: Array, position: int) -> Float[Array, " L"]:
    """One of the probabilities that `LogitConfig(tokens=…)` kept."""
    ids, found = capture.probability_tokens, "none"
    if capture.probabilities is not None and ids is not None and ids.ndim == 1:
        match = ids == token
        if isinstance(match, Tracer) or match.any():  # traced, whether it was kept is the device's to know
            kept = _at(capture, capture.probabilities, position).astype(jnp.float32)
            return jnp.where(match.any(), jnp.take(kept, match.argmax(), axis=1), jnp.nan)
        found = ", ".join(map(str, np.asarray(ids)))
    wanted = "…" if isinstance(token, Tracer) else str(token)
    raise ValueError(
        f"This capture does not tell the probability of token {wanted}: it has neither all logits nor the unembedding, which "
        f"files do not hold, and the tokens whose probabilities it kept are: {found}. Capture with "
        f"LogitConfig(tokens=[{wanted}]), or give the unembedding again with "
        "dataclasses.replace(capture, unembedding=model.lm_head.weight)."
    )


def _exact(capture: LogitCapture) -> tuple[Array, Array] | None:
    """`normalized` and `unembedding`, from which any logit follows; None where the capture lacks one."""
    normalized, unembedding = capture.normalized, capture.unembedding
    if normalized is None or unembedding is None:
        return None
    if unembedding.ndim != 2:
        raise ValueError(
            f"unembedding has shape {list(unembedding.shape)}, and [V, E] is needed: it is the model's and has no batch axis. "
            "Map over a batch with None as its axis, or give it again with "
            "dataclasses.replace(capture, unembedding=model.lm_head.weight)."
        )
    return normalized, unembedding


def _size(capture: LogitCapture) -> int | None:
    """`V`, where the capture tells."""
    if capture.unembedding is not None:
        return capture.unembedding.shape[0]
    return None if capture.logits is None else capture.logits.shape[-1]


@partial(jax.jit, inline=True)
def _unembed(normalized: Float[Array, "L E"], rows: Float[Array, "N E"]) -> Float[Array, "L N"]:
    dtype = jnp.promote_types(normalized.dtype, rows.dtype)
    return jnp.einsum(
        "le,ne->ln", normalized.astype(dtype), rows.astype(dtype),
        precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
    )  # fmt: skip


@partial(jax.jit, inline=True)
def _of_token(values: Float[Array, "L V"], token: Array) -> Float[Array, " L"]:
    return values.at[:, token].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def _at(capture: LogitCapture, value: Any, position: int) -> Array:
    """`[L, …]` of `[L, T, …]`, where `T` is the captured positions, at a position of the prompt."""
    if capture.positions is not None:
        return value[:, _captured_row(capture, position)]
    if not jnp.issubdtype(value.dtype, jnp.floating):
        # What is not there is marked by NaN. Ids below 2²⁴ survive float32.
        return _at(capture, value.astype(jnp.float32), position).astype(jnp.int32)
    return at_position(capture, value, 1, position)


def _captured_row(capture: LogitCapture, position: int) -> int:
    """Where a position of the prompt is among the positions captured."""
    assert capture.positions is not None
    position = integer(position, "token_position")
    if position in capture.positions:
        return capture.positions.index(position)
    unknown = isinstance(capture.mask, Tracer)
    if not unknown:
        n_real = int(np.asarray(capture.mask).sum())
        ranks = [p % n_real for p in capture.positions]
        if -n_real <= position < n_real and position % n_real in ranks:
            return ranks.index(position % n_real)
    hint = " Inside a trace the prompt's length is unknown: ask for a position as it was captured." if unknown else ""
    raise ValueError(
        f"token_position is {position}, and only the positions {', '.join(map(str, capture.positions))} were captured.{hint}"
    )
