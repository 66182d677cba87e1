"""Metrics: what a run is judged by, as frozen pytrees called on its `Output`.

The ids of a metric are leaves, so that another pair of tokens is no other program; what it needs of the logits is static.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from .arrays import AnyArray, as_array, integer, listing, on_device
from .capture import at_positions
from .intervals import Interval, bootstrap
from .output import Output
from .pytrees import pytree, static

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = [
    "Interval",
    "Metric",
    "bootstrap",
    "cross_entropy",
    "kl_divergence",
    "log_probability",
    "logit_difference",
    "probability",
    "pytree",
    "rank",
    "static",
]

# What functions take: a `Metric`, or any function of an `Output` to a pytree of arrays.
MetricLike: TypeAlias = Callable[[Output], Any]

# How many axes a leaf has in the metric of one prompt. One more, in front, is a batch of prompts.
EACH, LIST = {"rank": 0}, {"rank": 1}


@pytree
class Metric:
    """What `sweep` asks of a metric, besides calling it. A subclass is a `pytree`.

    Attributes:
        positions: ranks among the real tokens whose logits it reads, negative from the last; static.
        ids: int32 `[N]` (`[B, N]` with ids of B prompts), the only tokens whose logits it reads; None for the whole
            vocabulary.

    Examples:
        >>> @pytree
        ... class Lead(Metric):  # one's own: of the likeliest next token over the second
        ...     def of(self, logits): return jnp.subtract(*jax.lax.top_k(logits[0], 2)[0])
        >>> lead = Lead(positions=(-1,))
        >>> np.allclose(lead(run), lead.of(run.logits[-1:])), lead.ids, lead.per_prompt()
        (True, None, Lead(positions=(-1,)))
    """

    positions: tuple[int, ...] = static()

    @property
    def ids(self) -> Int[Array, "... N"] | np.ndarray | None:
        return None

    def of(self, logits: Float[Array, "P N"] | Float[Array, "P V"]) -> Array:
        """Its value from the logits at `positions`: of `ids` in their order, or of the whole vocabulary where those are None."""
        raise NotImplementedError(f"{type(self).__name__} defines no of(logits), which is what a metric is.")

    def __call__(self, out: Output) -> Array:
        """Its value for one run, a float32 scalar (int32 for `rank`); ValueError or TypeError for logits that it does not have.

        NaN (−1) where there is no such token: beyond the real ones of a mask, or beyond the vocabulary where only the device
        can see the id. Of logits `[T, V]`; `[V]`, those of `logits="last"`, do where the metric reads position −1 alone.
        """
        name = type(self).__name__
        if jax.tree.leaves(self.per_prompt()):
            raise ValueError(
                f"This {name} is of several prompts, and an Output is of one. Map the metric over both: "
                "jax.vmap(lambda metric, out: metric(out), in_axes=(metric.per_prompt(), 0))(metric, out)."
            )
        logits = _logits(out, self.positions, name)
        self.check(logits.shape[-1])
        return _value(self, logits, out.mask)

    def per_prompt(self) -> Any:
        """The same structure with 0 for each leaf that leads with a batch of prompts, else None: `vmap`'s `in_axes`."""
        # A field of somebody's own metric that declares no rank is shared by all prompts.
        ranks = {field.name: field.metadata.get("rank", np.inf) for field in dataclasses.fields(self)}
        leaves = [field.name for field in dataclasses.fields(self) if not field.metadata.get("static")]
        axes = {name: 0 if np.ndim(getattr(self, name)) > ranks[name] else None for name in leaves}
        return dataclasses.replace(self, **axes)

    def check(self, vocab_size: int) -> None:
        """Raises ValueError for an id beyond the vocabulary, where the host can see it."""
        for field in dataclasses.fields(self):
            ids = getattr(self, field.name) if "rank" in field.metadata else None
            if ids is not None and not on_device(ids) and np.max(ids) >= vocab_size:
                raise ValueError(
                    f"{type(self).__name__}.{field.name} is {np.max(ids)}, and this model's vocabulary has ids 0 to "
                    f"{vocab_size - 1}."
                )


@pytree
class LogitDifference(Metric):
    """See `logit_difference`."""

    a: Any = dataclasses.field(metadata=EACH)
    b: Any = dataclasses.field(metadata=EACH)

    @property
    def ids(self) -> Int[Array, "... 2"] | np.ndarray:
        xp: Any = jnp if on_device(self.a) or on_device(self.b) else np
        return xp.stack(xp.broadcast_arrays(self.a, self.b), axis=-1)

    def of(self, logits: Float[Array, "1 2"]) -> Float[Array, ""]:
        return logits[0, 0] - logits[0, 1]


@pytree
class LogProbability(Metric):
    """See `log_probability`."""

    token: Any = dataclasses.field(metadata=EACH)

    def of(self, logits: Float[Array, "1 V"]) -> Float[Array, ""]:
        return _log_probabilities(logits, self.token[None])[0]


@pytree
class Probability(LogProbability):
    """See `probability`."""

    def of(self, logits: Float[Array, "1 V"]) -> Float[Array, ""]:
        value = super().of(logits)
        # XLA's CPU compiler (jax 0.10) loses a NaN that a select puts into what exp reads; after it, it stays.
        return jnp.where(jnp.isnan(value), jnp.nan, jnp.exp(value))


@pytree
class Rank(LogProbability):
    """See `rank`."""

    def of(self, logits: Float[Array, "1 V"]) -> Int[Array, ""]:
        own = _get(logits, (0, jnp.asarray(self.token)))
        larger = jnp.sum(logits[0] > own, dtype=jnp.int32)
        return jnp.where(jnp.any(jnp.isnan(logits)) | jnp.isnan(own), -1, larger)


@pytree
class KLDivergence(Metric):
    """See `kl_divergence`."""

    baseline: Any = dataclasses.field(metadata=LIST)

    def check(self, vocab_size: int) -> None:
        """Raises ValueError where the baseline is of another vocabulary."""
        if self.baseline.shape[-1] != vocab_size:
            raise ValueError(
                f"The baseline has logits of {self.baseline.shape[-1]} tokens, and this model's vocabulary has {vocab_size}."
            )

    def of(self, logits: Float[Array, "1 V"]) -> Float[Array, ""]:
        log_p, log_q = jax.nn.log_softmax(jnp.asarray(self.baseline)), jax.nn.log_softmax(logits[0])
        p, q = jnp.exp(log_p), jnp.exp(log_q)
        possible = log_p != -jnp.inf
        gap = jnp.where(possible, log_p - log_q, 0.0)
        # Σ p·gap plus Σ (q − p), which is 0: then no term is negative, and what rounding does to the normalisers cancels to
        # first order. Where q is near p a series of p·(gap + e^−gap − 1) keeps the digits that the subtraction loses.
        near = possible & (jnp.abs(gap) < 0.1)
        small, large = jnp.where(near, gap, 0.0), jnp.where(near, 0.0, gap)
        series = small * small / 2 * (1 - small / 3 * (1 - small / 4 * (1 - small / 5)))
        return jnp.sum(jnp.where(near, p * series, p * large + (q - p)))


@pytree
class CrossEntropy(Metric):
    """See `cross_entropy`."""

    continuation: Any = dataclasses.field(metadata=LIST)

    def of(self, logits: Float[Array, "N V"]) -> Float[Array, ""]:
        return -jnp.mean(_log_probabilities(logits, self.continuation))


def apply_metric(metric: Callable[[Output], Any], out: Output) -> Any:
    """What a function of the user's own makes of a run, inside a compiled program; TypeError where it takes numbers out of it."""
    try:
        return metric(out)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        raise TypeError(
            "The metric makes a Python or NumPy number of a value that is not known yet: it is compiled into the program. Leave "
            "out float(), int(), bool(), .item(), if and np., and return the value as it is, such as "
            "lambda out: out.logits[-1, 3]."
        ) from error


def check_metric(
    metric: object, vocab_size: int, tokens: AnyArray, mask: AnyArray | None
) -> tuple[Any, tuple[bool, ...]]:
    """A metric as a pytree, and for each of its leaves whether it leads with the prompts `[B, T]`."""
    if not callable(metric):
        raise TypeError(
            f"metric is a {type(metric).__name__}; give one of oculi_jax.metrics, or a function of an Output."
        )
    is_maker = getattr(metric, "__module__", None) == Metric.__module__ and not isinstance(metric, Metric)
    if isinstance(metric, type) or is_maker:
        name = getattr(metric, "__name__", "a class")
        raise TypeError(f"metric is {name} itself, which makes a metric: call it with token ids, {name}(…).")
    if not isinstance(metric, Metric):
        if jax.tree_util.all_leaves([metric]):  # a function is no pytree: it goes into the program by name
            try:
                hash(metric)
            except TypeError:
                raise TypeError(
                    f"metric is a {type(metric).__name__} that cannot be hashed, and programs are kept by their metric: give a "
                    "function, a frozen dataclass of plain values, or make the class a pytree with oculi_jax.metrics.pytree."
                ) from None
            metric = jax.tree_util.Partial(metric)
        return metric, (False,) * len(jax.tree.leaves(metric))
    leads = tuple(axis == 0 for axis in jax.tree.leaves(metric.per_prompt(), is_leaf=lambda axis: axis is None))
    n_prompts, n_tokens = tokens.shape
    shortest = n_tokens if mask is None or on_device(mask) else int(mask.sum(axis=1).min())
    if wrong := [p for p in metric.positions if not -shortest <= p < shortest]:
        raise ValueError(
            f"The metric reads positions {wrong}, and the prompt has {shortest} tokens: positions are 0 to {shortest - 1}, or "
            f"−1 to −{shortest} from the end."
        )
    metric.check(vocab_size)
    leading = {np.shape(x)[0] for x, lead in zip(jax.tree.leaves(metric), leads, strict=True) if lead}
    if leading - {n_prompts}:
        raise ValueError(
            f"The metric has targets for {sorted(leading)[0]} prompts, and tokens holds {n_prompts}: give one target, or one "
            "for each prompt."
        )
    return metric, leads


def of_prompt(metric: T, number: AnyArray | int) -> Any:
    """The metric of one prompt, or of some, of a metric with targets for several."""
    if not isinstance(metric, Metric):
        return metric
    axes = metric.per_prompt()
    return jax.tree.map(lambda axis, x: x if axis is None else x[number], axes, metric, is_leaf=lambda x: x is None)


def logit_difference(a: ArrayLike, b: ArrayLike, position: int = -1) -> LogitDifference:
    """`logit[a] − logit[b]`, float32, the log of the odds of `a` against `b`. Only these two logits are computed in a sweep.

    Args:
        a, b: token ids, scalars; or `[B]`, one for each prompt.
        position: rank among the real tokens, negative from the last; static.

    Raises:
        ValueError, TypeError: ids or a position that cannot be. The same of every metric here.

    Examples:
        >>> [f"{logit_difference(rome, paris)(out):.2f}" for out in (forward(model, ids), run)]
        ['10.50', '-8.75']
    """
    a, b = _ids(a, "a"), _ids(b, "b")
    if a.ndim and b.ndim and a.shape != b.shape:
        raise ValueError(f"a has shape {listing(a.shape)} and b {listing(b.shape)}; give each one id for each prompt.")
    return LogitDifference(_at(position), a, b)


def log_probability(token: ArrayLike, position: int = -1) -> LogProbability:
    """`log softmax(logits)[token]`, in nats; float32. Of an id, or of `[B]`; arguments as in `logit_difference`.

    Examples:
        >>> f"{log_probability(rome)(run):.2f}"  # in nats, after "The capital of France is"
        '-8.75'
    """
    return LogProbability(_at(position), _ids(token, "token"))


def probability(token: ArrayLike, position: int = -1) -> Probability:
    """`softmax(logits)[token]`, float32, 0 to 1. Of an id, or of `[B]`; arguments as in `logit_difference`.

    Examples:
        >>> f"{probability(paris)(run):.3f}"
        '0.999'
    """
    return Probability(_at(position), _ids(token, "token"))


def rank(token: ArrayLike, position: int = -1) -> Rank:
    """How many tokens have a larger logit, int32: 0 for the likeliest, and for each of those that tie with it.

    −1 where a logit is NaN or there is no such token. It has no gradient. Arguments as in `logit_difference`.

    Examples:
        >>> int(rank(paris)(run)), int(rank(rome)(run))
        (0, 1)
    """
    return Rank(_at(position), _ids(token, "token"))


def kl_divergence(baseline: ArrayLike | Output, position: int = -1) -> KLDivergence:
    """`KL(P ‖ Q) = Σ P log(P / Q)` in nats (Kullback and Leibler 1951), P the baseline's next token and Q this run's.

    Zero for the baseline itself and never below; ∞ where this run excludes what the baseline allows. Float32.

    Args:
        baseline: logits `[V]` at the position, or `[B, V]`, for each prompt; or the `Output` of one run, whose logits at
            `position` (by its own mask) are taken. Of a batch of outputs, give the logits.
        position: rank among the real tokens, negative from the last; static.

    Examples:
        >>> [f"{kl_divergence(run)(out):.2f}" for out in (run, forward(model, ids))]
        ['0.00', '10.49']
    """
    at = _at(position)
    if isinstance(baseline, Output):
        return KLDivergence(at, _rows(_logits(baseline, at, "The baseline"), at, baseline.mask)[0])
    array = as_array(baseline)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"The baseline has dtype {array.dtype}, and logits or an Output are needed.")
    if array.ndim not in (1, 2) or 0 in array.shape:
        raise ValueError(f"The baseline has shape {listing(array.shape)}, and logits [V] or [B, V] are needed.")
    if not on_device(array) and np.isnan(array.astype(np.float32)).any():
        raise ValueError("The baseline holds NaN.")
    return KLDivergence(at, _cast(array, np.float32))


def cross_entropy(continuation: ArrayLike) -> CrossEntropy:
    """`−1/N Σᵢ log p(continuationᵢ | all before it)`, nats per token of the last N tokens of the prompt; float32.

    It reads the logits at positions −N − 1 to −2, so the prompt has more than N tokens.

    Args:
        continuation: ids `[N]`, the prompt's last N tokens; or `[B, N]`, for each prompt.

    Examples:
        >>> f"{cross_entropy(ids[-2:])(forward(model, ids)):.2f}"  # of "Italy is", after "The capital of"
        '1.92'
    """
    array = _ids(continuation, "continuation", rank=1)
    if array.shape[-1] == 0:
        raise ValueError("continuation is empty: give the ids of the prompt's last tokens.")
    return CrossEntropy(tuple(range(-array.shape[-1] - 1, -1)), array)


@partial(jax.jit, inline=True)
def _value(metric: Metric, logits: Array, mask: Array | None) -> Array:
    rows, ids = _rows(logits, metric.positions, mask), metric.ids
    return metric.of(rows if ids is None else _get(rows, (slice(None), jnp.asarray(ids))))


def _rows(logits: Array, positions: tuple[int, ...], mask: Array | None) -> Float[Array, "P V"]:
    """Logits at positions, from those of an `Output` that has been checked; NaN where a mask leaves no such token."""
    return logits[None] if logits.ndim == 1 else at_positions(logits, 0, positions, mask)


def _get(logits: Array, index: Any) -> Array:
    """Logits at ids; NaN for an id that the vocabulary does not have, rather than a neighbour's."""
    return logits.at[index].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def _log_probabilities(logits: Float[Array, "N V"], ids: Int[Array, "N"]) -> Float[Array, "N"]:
    """log softmax of each row at its id, without an array of the others' log-probabilities."""
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    chosen = _get(logits, (jnp.arange(logits.shape[0]), jnp.asarray(ids)))
    return chosen - top - jnp.log(jnp.sum(jnp.exp(logits - top[:, None]), axis=-1))


def _logits(out: Any, positions: tuple[int, ...], who: str) -> Array:
    """The logits of an `Output`; raises where it has none at these positions, as far as shapes tell."""
    if not isinstance(out, Output):
        raise TypeError(f"{who} takes the Output of forward, and was given a {type(out).__name__}.")
    if out.logits is None:
        raise ValueError(f'{who} reads logits, and this Output has none: use logits="all", or "last" for position −1.')
    if np.ndim(out.applied) > 1 or out.logits.ndim > 2:
        raise ValueError(
            f"{who} reads one run, and this Output is of a batch, logits {listing(out.logits.shape)}: use jax.vmap."
        )
    where = str(positions[0]) if len(positions) == 1 else f"{positions[0]} to {positions[-1]}"
    if out.logits.ndim == 1:
        if positions != (-1,):
            raise ValueError(
                f'{who} reads position {where}, and this Output has those of the last token alone: use logits="all".'
            )
        return out.logits
    n_tokens = out.logits.shape[0]
    if not all(-n_tokens <= position < n_tokens for position in positions):
        raise ValueError(
            f"{who} reads position {where}, and the prompt has {n_tokens} tokens: 0 to {n_tokens - 1}, or −1 to −{n_tokens}."
        )
    return out.logits


def _ids(value: ArrayLike, what: str, rank: int = 0) -> AnyArray:
    """Ids as strong int32, so that integers of any type share a program; checked by value where the host can see them."""
    need = "a token id, or [B] of them, one for each prompt," if rank == 0 else "ids [N], or [B, N] for prompts,"
    if isinstance(value, str):
        raise TypeError(f"{what} is the text {value!r}, and {need} is needed: encode it with the tokenizer.")
    array = as_array(value)
    if not jnp.issubdtype(array.dtype, jnp.integer) or any(isinstance(x, bool) for x in jax.tree.leaves(value)):
        raise TypeError(f"{what} is {value!r}, and {need} is needed: integers.")
    if array.ndim not in (rank, rank + 1) or 0 in array.shape[: array.ndim - rank]:
        raise ValueError(f"{what} has shape {listing(array.shape)}, and {need} is needed.")
    if not on_device(array) and array.size and not (array.min() >= 0 and array.max() < 2**31):
        raise ValueError(f"{what} holds {array.min() if array.min() < 0 else array.max()}, which is no token id.")
    return _cast(array, np.int32)


def _cast(array: Any, dtype: Any) -> Any:
    return jax.lax.convert_element_type(array, dtype) if on_device(array) else np.asarray(array, dtype)


def _at(position: int) -> tuple[int, ...]:
    return (integer(position, "position", note=" that is plain: what is computed depends on it"),)
