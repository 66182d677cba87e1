"""What a logit loses without parts of the model: the exact effects beside what direct attribution says of them.

Imported in the functions that need it, since it imports JAX.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

import oculi_jax

from ..causal.verification import ROUNDING, Verification, compared, drawn
from ..intervention import Blend
from ..metrics import LIST, Metric
from ..pytrees import pytree, static
from .effects import announce, counting

if TYPE_CHECKING:
    from ..models.llama import LlamaAttentionAdapter


@pytree
class Logits(Metric):
    """A logit at the last token, or one less another, before the cap that a family may have.

    Attributes:
        tokens: ids `[1]` or `[2]`; `[B, …]` for several prompts.
        cap: `c` of `c · tanh(x / c)`; None for none. Static.
    """

    tokens: Any = dataclasses.field(metadata=LIST)
    cap: float | None = static(default=None)

    @property
    def ids(self) -> Any:
        return self.tokens

    def of(self, logits: Float[Array, "1 N"]) -> Float[Array, ""]:
        own = logits[0] if self.cap is None else self.cap * jnp.arctanh(logits[0] / self.cap)
        return own[0] - own[1] if own.shape[0] == 2 else own[0]


def without(
    adapter: LlamaAttentionAdapter,
    tokens: np.ndarray,
    mask: np.ndarray | None,
    token: np.ndarray,
    by_head: np.ndarray,
    by_mlp: np.ndarray,
    top: int,
    sample: int,
) -> Verification:
    """The parts of largest direct attribution, and some others at random, beside what the logit loses where one is set to zero.

    Args:
        adapter: of the model.
        tokens, mask: of one prompt `[T]`, or of several `[B, T]`, over which effects are means.
        token: ids `[]` of a logit or `[2]` of a difference; of several prompts `[B]` or `[B, 2]`.
        by_head, by_mlp: what each adds, `[L, H]` and `[L]`.
        top, sample: how many of the largest, and how many others.

    Returns:
        A `Verification`, whose entries have the `"part"` by its name.
    """
    values = np.concatenate([by_head, by_mlp[:, None]], axis=1)
    chosen, n_top = drawn(values.reshape(-1), np.arange(values.size), top, sample, seed=0)
    keep = np.ones((1 + len(chosen), values.size), np.float32)  # of the first, all
    keep[1 + np.arange(len(chosen)), chosen] = 0
    keep = keep.reshape(-1, *values.shape)
    parts = Blend("z", keep[..., :-1]), Blend("mlp_out", keep[..., -1:])
    one = np.ndim(token) == np.ndim(tokens) - 1
    metric = Logits(
        (-1,),
        np.asarray(token, np.int32)[..., None] if one else np.asarray(token, np.int32),
        adapter.model.config.logit_cap,
    )
    announce(oculi_jax.plan(adapter.model, tokens, parts, metric, mask=mask))
    with counting("Setting parts to zero") as progress:
        found = oculi_jax.sweep(adapter.model, tokens, parts, metric, mask=mask, progress=progress)
    left = np.asarray(found, np.float64)
    left = left.mean(axis=0) if left.ndim == 2 else left
    places = [{"part": name_of(*divmod(int(i), values.shape[1]), values.shape[1] - 1)} for i in chosen]
    rounding = ROUNDING * max(1.0, abs(float(left[0])))
    return compared(places, values.reshape(-1)[chosen], left[0] - left[1:], n_top, rounding)


def name_of(layer: int, place: int, n_heads: int) -> str:
    """A head's name, `L2H5`, or of the place behind all heads the MLP's, `L2 MLP`."""
    return f"L{layer} MLP" if place == n_heads else f"L{layer}H{place}"
