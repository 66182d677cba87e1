"""The programs of one run, `run`, and of the logit lens, `lens`; and what every program does before and after the layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from ...arrays import AnyArray
from ...buckets import widened
from ...capture import Reading, at_positions
from ...metrics import Metric, apply_metric
from ...output import Output
from ..protocol import EXIST
from .compiled import compiled
from .layers import Past, read, run_layers
from .layout import lay_out
from .taps import Taps

if TYPE_CHECKING:
    from ...buckets import Window
    from ...metrics import MetricLike
    from ...models.decoder.model import Decoder
    from ...rules import Rules


class Pass(NamedTuple):
    """One pass: the stream after the final norm (None where nobody needs it), what was read, the counts of edits, the cache."""

    normalised: Float[Array, "T E"] | None
    activations: dict[str, Array]
    applied: Int[Array, "N"]
    cache: Past | None


def passed(
    model: Decoder,
    taps: Taps,
    readings: Sequence[Reading],
    *,
    to_end: bool,
    rows: Int[Array, "R"] | None = None,
    start: int = 0,
    resid: Float[AnyArray, "T E"] | None = None,
    **options: Any,
) -> Pass:
    """Embeds the tokens of the taps' layout, runs the layers that are needed, and, where that is wanted, the final norm.

    `rows` says of which tokens alone that is wanted; then nothing is read. With `resid`, what enters layer `start`, the tokens
    are not embedded, and the layers before it do not run. `options` are those of `run_layers`.
    """
    outside, layout = taps.at(None), taps.layout
    resid = model.embed_tokens(layout.tokens, outside) if resid is None else jnp.asarray(resid)
    to_end = to_end or ends(readings)
    stop = None if to_end else max((max(r.layers) + 1 for r in readings if r.site.layered), default=0)
    ran = run_layers(model, resid, taps, readings, start=start, stop=stop, rows=rows, **options)
    last = outside if rows is None else taps.of_rows(rows).at(None)
    normalised = model.normalise(ran.resid, last) if to_end else None
    own = {r.site.name: read(r, outside, layout.queries) for r in readings if not r.site.layered}
    found = {r.site.name: (ran.captured if r.site.layered else own)[r.site.name] for r in readings}
    return Pass(normalised, found, ran.applied + outside.counts(), ran.cache)


def ends(readings: Sequence[Reading]) -> bool:
    """Whether what is read lies after the last layer."""
    return any(reading.site.name in ("final_scale", "final_norm") for reading in readings)


@compiled("readings", "logits", "remat", "attention", "start")
def run(
    model: Decoder,
    tokens: Int[AnyArray, "T"],
    mask: Bool[AnyArray, "T"] | None,
    interventions: tuple[Any, ...],
    readings: tuple[Reading, ...],
    *,
    logits: str = "none",
    remat: bool = False,
    attention: str = "auto",
    rules: Rules | None = None,
    start: int = 0,
    resid: Float[AnyArray, "T E"] | None = None,
) -> Output:
    """See `Programs.run`."""
    layout = lay_out(model.config, tokens, mask)
    wanted = [*(reading.site.name for reading in readings), *EXIST[attention]]
    taps = Taps.of(interventions, model.config, layout, wanted, rules=rules)
    done = passed(model, taps, readings, to_end=logits != "none", remat=remat, start=start, resid=resid)
    out = None
    if logits != "none":
        assert done.normalised is not None
        rows = done.normalised if logits == "all" else at_positions(done.normalised, 0, (-1,), mask)[0]
        out = model.logits(rows)
    return Output(out, done.activations, done.applied, None if mask is None else jnp.asarray(mask))


def measure(
    model: Decoder,
    normalised: Float[Array, "T E"],
    mask: Bool[Array, "T"] | None,
    metric: MetricLike,
    window: Window | None = None,
) -> Any:
    """The metric of one run, from the logits that it reads and no others; a function's from those of all columns."""
    if isinstance(metric, Metric):
        return judge(model, at_positions(normalised, 0, metric.positions, mask), metric)
    logits = model.logits(normalised)
    if window is not None:
        logits, mask = widened(logits, window), jnp.asarray(window.mask)
    return apply_metric(metric, Output(logits, {}, jnp.zeros(0, jnp.int32), mask))


def judge(model: Decoder, rows: Float[Array, "P E"], metric: Metric) -> Any:
    """A metric, from the stream after the final norm at its positions."""
    return metric.of(model.logits(rows) if metric.ids is None else model.logits_of(rows, jnp.asarray(metric.ids)))


@compiled("keep", "top_k", "dtype")
def lens(
    model: Decoder,
    resid: Float[AnyArray, "N T E"],
    keep: tuple[str, ...],
    *,
    top_k: int | None = None,
    tokens: Int[AnyArray, "M"] | None = None,
    dtype: str = "float32",
) -> dict[str, Array]:
    """See `Programs.lens`."""

    def one(row: Float[Array, "T E"]) -> dict[str, Array]:
        found = {"normalized": model.normalise(row, lambda _, value: value)}
        if "chosen" in keep:
            assert tokens is not None
            found["chosen"] = model.logits_of(found["normalized"], tokens).astype(dtype)
        if set(keep) - {"normalized", "chosen"}:
            logits = model.logits(found["normalized"])
            found["logits"] = logits.astype(dtype)
            found["log_normalizer"] = jax.nn.logsumexp(logits, axis=-1)
            if "probabilities" in keep:
                assert tokens is not None
                chosen = jnp.take(logits, tokens, axis=-1) - found["log_normalizer"][:, None]
                found["probabilities"] = jnp.exp(chosen).astype(dtype)
            if top_k is not None:
                values, indices = jax.lax.top_k(logits, top_k)
                found |= {"top_k_logits": values.astype(dtype), "top_k_indices": indices}
        return {name: found[name] for name in keep}

    return jax.lax.map(one, resid)
