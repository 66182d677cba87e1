"""What a method makes small, a number of each prompt's run; and on which prompts it is fitted, chosen and judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from ..arrays import AnyArray, check_host, listing
from ..backends import check_model
from ..backends.jax.compiled import compiled
from ..capture import CaptureSpec
from ..means import mean_activations
from ..metrics import Metric, apply_metric, check_metric, kl_divergence, of_prompt
from ..prompts import check_prompts
from ..run import forward
from .running import AT_ONCE
from .splitting import apart

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..metrics import MetricLike
    from ..models.decoder.model import Decoder


@dataclass(frozen=True)
class Objective:
    """A loss of a model's runs of prompts.

    Attributes:
        tokens, mask: `[B, T]`.
        metric: as a pytree, of all prompts.
        fitted, choosing, held: which prompts steps are made on, which say after how many to stop, which nothing is fitted to.
    """

    model: Decoder
    tokens: Int[AnyArray, "B T"]
    mask: Bool[AnyArray, "B T"] | None
    metric: Any
    fitted: Int[np.ndarray, "N"]
    choosing: Int[np.ndarray, "N"]
    held: Int[np.ndarray, "M"]

    @classmethod
    def of(
        cls,
        model: Decoder,
        tokens: ArrayLike,
        mask: ArrayLike | None,
        loss: MetricLike | None,
        held_out: float,
        key: Array,
        name: str = "tokens",
    ) -> Objective:
        """Checks what is given, as `name`; the loss for None is the divergence of the next token from the whole model's.

        Raises:
            ValueError, TypeError: something that can be seen to be wrong, before a fit begins.
        """
        config = check_model(model)
        check_host((model, tokens))
        ids, real, one = check_prompts(config, tokens, mask, (name, "mask"))
        if one:
            raise ValueError(f"{name} has shape {listing(np.shape(tokens))}, and several prompts [B, T] are needed.")
        rows = _split(len(ids), held_out, key)
        given = kl_divergence(last_logits(model, ids, real)) if loss is None else loss
        metric, _ = check_metric(given, config.vocab_size, ids, real)
        made = cls(model, ids, real, jax.tree.map(jnp.asarray, metric), *rows)
        made.check()
        return made

    def check(self) -> None:
        """Raises ValueError where the loss of a run is not one floating-point number."""
        mask = None if self.mask is None else self.mask[0]

        def one() -> Any:
            out = forward(self.model, self.tokens[0], mask=mask, logits=self.logits)
            return apply_metric(of_prompt(self.metric, 0), out)

        found: Any = jax.eval_shape(one)
        if getattr(found, "shape", None) != () or not jnp.issubdtype(found.dtype, jnp.floating):
            what = (
                f"{listing(found.shape)} of {found.dtype}" if hasattr(found, "shape") else f"a {type(found).__name__}"
            )
            raise ValueError(f"The loss gives {what} for one run, and one floating-point number is needed.")

    def examples(self, rows: Int[np.ndarray, "N"]) -> dict[str, Any]:
        """Some prompts as the examples of a fit; `number` is which one of all."""
        mask = None if self.mask is None else jnp.asarray(self.mask)[rows]
        return {"tokens": jnp.asarray(self.tokens)[rows], "mask": mask, "number": jnp.asarray(rows, jnp.int32)}

    @property
    def seen(self) -> Int[np.ndarray, "N"]:
        """The prompts that are not kept for judging."""
        return np.sort(np.concatenate([self.fitted, self.choosing]))

    @property
    def logits(self) -> Literal["all", "last"]:
        """Which logits the metric reads."""
        last = isinstance(self.metric, Metric) and self.metric.positions == (-1,)
        return "last" if last else "all"


def moments(objective: Objective, sites: Sequence[str]) -> tuple[dict[str, Array], dict[str, Array]]:
    """What each unit holds on average, over the real tokens of the prompts that are not kept for judging; and how far that varies.

    Returns:
        Site → means, as `mean_activations` gives them; and the root mean square, over tokens and features, of what is beyond
        these: `z` `[L, H]`, `mlp_out` `[L]`, `embed` a number.
    """
    rows = objective.seen
    tokens, mask = (None if x is None else np.asarray(x)[rows] for x in (objective.tokens, objective.mask))
    assert tokens is not None
    means = dict(mean_activations(objective.model, tokens, sites, mask=mask))
    return means, _spreads(objective.model, tokens, mask, means)


@compiled()
def _spreads(
    model: Decoder, tokens: AnyArray, mask: AnyArray | None, means: dict[str, Array]
) -> dict[str, Float[Array, "..."]]:
    spec = CaptureSpec(tuple(means))

    def one(prompt: tuple[Array, Array | None]) -> dict[str, Array]:
        seen = forward(model, prompt[0], capture=spec, mask=prompt[1], logits="none")
        real = jnp.ones(len(prompt[0])) if prompt[1] is None else prompt[1]

        def summed(site: str, mean: Array) -> Array:
            beyond = seen[site].astype(mean.dtype) - mean[..., None, :]
            return jnp.einsum("...t,t->...", jnp.mean(jnp.square(beyond), axis=-1), real.astype(mean.dtype))

        return {site: summed(site, mean) for site, mean in means.items()}

    given = jnp.asarray(tokens), None if mask is None else jnp.asarray(mask)
    found = jax.lax.map(one, given, batch_size=min(len(tokens), AT_ONCE))
    n = jnp.float32(tokens.size) if mask is None else jnp.sum(jnp.asarray(mask), dtype=jnp.float32)
    return jax.tree.map(lambda x: jnp.sqrt(jnp.sum(x, axis=0) / n.astype(x.dtype)), found)


def _split(n: int, held_out: float, key: Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows to fit on, to choose by, a quarter of what is not held out, and to judge on; drawn by the key."""
    order = np.asarray(jax.random.permutation(key, n))
    held, rest = apart(order, held_out)
    if len(rest) < 2:
        raise ValueError(f"There are {n} prompts, and some are needed to fit on, some to choose by, some to judge on.")
    choosing, fitted = apart(order[len(held) :], 0.25)
    return fitted, choosing, held


@compiled()
def last_logits(model: Decoder, tokens: AnyArray, mask: AnyArray | None) -> Float[Array, "B V"]:
    """The logits at the last real token of each prompt."""

    def one(prompt: tuple[Array, Array | None]) -> Array:
        logits = forward(model, prompt[0], mask=prompt[1], logits="last").logits
        assert logits is not None
        return logits

    given = jnp.asarray(tokens), None if mask is None else jnp.asarray(mask)
    return jax.lax.map(one, given, batch_size=min(len(tokens), AT_ONCE))
