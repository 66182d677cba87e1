"""The metric of many circuits on pairs of prompts: their masks are data of one program."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from ..backends import programs_of
from ..backends.jax.compiled import compiled
from ..backends.jax.layout import lay_out
from ..backends.jax.programs import measure, passed
from ..backends.jax.taps import Taps
from ..metrics import of_prompt
from ..sweeps.planning import MOST_ROWS_ELSEWHERE
from ..traced import mapped
from .ablation import Ablated, ablated
from .edges import KEPT_BYTES, bytes_of_backward
from .pairs import Batch, Pairs
from .running import masked

if TYPE_CHECKING:
    from ..models.decoder.model import Decoder

# Where one circuit is the next one's condition, those side by side are run in part for nothing: so many at most, and no more
# tokens than fill the device.
MOST, FILL = 32, {"cpu": 256}


def values_of(
    model: Decoder, pairs: Pairs, masks: Bool[np.ndarray, "R ..."], other: Ablated | None, *, kind: str, grouped: bool
) -> Float[np.ndarray, "R B"]:
    """The metric of the plain run of each prompt, and then of what each mask keeps, by one program for prompts of a length."""
    values, size = np.zeros((len(masks) + 1, len(pairs.clean)), np.float32), partial(bytes_of_run, model)
    for chunk in pairs.calls(model, size, KEPT_BYTES):
        at_once = max(1, min(len(masks), KEPT_BYTES // (chunk.size * size(chunk.bucket.n_tokens))))
        batch = pairs.of_call(chunk)
        found = _judged(model, batch, masks, other, kind=kind, grouped=grouped, at_once=at_once)
        values[:, chunk.prompts] = np.asarray(found)[:, : len(chunk.prompts)]
    return values


def at_once(model: Decoder, pairs: Pairs) -> int:
    """How many circuits to try side by side, of which each counts only where those before it turned out as foreseen."""
    platform, _ = programs_of(model).room(model)
    return min(max(FILL.get(platform, MOST_ROWS_ELSEWHERE) // pairs.clean.size, 1), MOST)


def bytes_of_run(model: Decoder, n_tokens: int) -> int:
    """What a run of one circuit holds of one prompt: what every writer wrote, before and after, and what a layer reads."""
    c = model.config.sizes
    return 4 * n_tokens * c["E"] * (2 * (1 + c["L"] * (c["H"] + 1)) + 4 * (3 * c["H"] + 1))


def bytes_of_gradient(model: Decoder, kind: str, n_tokens: int) -> int:
    """What a run of one circuit of one prompt keeps for its backward pass, layers not run again."""
    c = model.config.sizes
    own = bytes_of_backward(model, n_tokens)
    # What each reader reads, before and after its norm.
    return own + 2 * 4 * n_tokens * c["E"] * c["L"] * (3 * c["H"] + 1) if kind == "edges" else own


@compiled("kind", "grouped", "at_once", alone=True)
def _judged(
    model: Decoder,
    batch: Batch,
    masks: Bool[Any, "R ..."],
    other: Ablated | None,
    *,
    kind: str,
    grouped: bool,
    at_once: int,
) -> Float[Array, "R C"]:
    """The metric of the plain run of each prompt, and of each circuit."""

    def one(number: Array, masks: Array) -> Float[Array, "R"]:
        def of(x: Any) -> Any:
            return None if x is None else jnp.asarray(x)[number]

        prompt, spoilt = (of(batch.clean), of(batch.mask)), (of(batch.corrupted), of(batch.corrupted_mask))
        window, metric = jax.tree.map(of, batch.window), of_prompt(batch.metric, number)
        first = None if window is None else window.first
        own = ablated(model, kind, prompt, spoilt, other, first)

        def value(normalised: Array) -> Array:
            found = measure(model, normalised, prompt[1], metric, window)
            if not hasattr(found, "shape") or found.shape != ():
                raise TypeError("The metric must give one number for each run.")
            return found.astype(jnp.float32)

        layout = lay_out(model.config, *prompt)
        plain = passed(model, Taps.of((), model.config, layout), (), to_end=True).normalised
        assert plain is not None

        def run(share: Array) -> Array:
            return value(masked(model, prompt, share.astype(jnp.float32), own, kind, grouped))

        found = jax.lax.map(run, masks, batch_size=at_once)
        return jnp.concatenate([value(plain)[None], found])

    # Each prompt has the masks as its own: a product of what all prompts share with what each wrote would move the latter, by far
    # the larger, in memory first.
    n = len(batch.clean)
    return mapped(one, n, out_axes=1)(jnp.arange(n), jnp.broadcast_to(masks, (n, *masks.shape)))
