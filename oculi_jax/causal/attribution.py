"""`attribution_patching`: what every activation patch would do to a metric, to first order, from one reverse pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import numpy as np
from jax import Array

from ..arrays import AnyArray, integer, listing, under_trace, wide
from ..backends import check_model, programs_of
from ..buckets import Bucket, Window, buckets_of, columns_of_a_program, weights_of, whole
from ..capture import Reading, readings_of
from ..metrics import check_metric
from ..prompts import bucket as rung
from ..prompts import check_prompts
from ..rules import check_family
from ..sites import Site, find_site
from ..sweeps.planning import Call, Cost, Part, Plan, plans
from ..sweeps.sweeping import cost_of
from .attributed import AttributionResult
from .gradients import RUNS, How, attribute

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..metrics import MetricLike
    from ..models.decoder.model import Decoder
    from ..rules import Rules

# How much of a backward pass is kept at once: prompts beyond it run in turn, one prompt beyond it recomputes its layers.
_KEPT_BYTES = 1 << 30
# Of `rules`, `steps`, `at`, `correct` and `each`.
DEFAULT: tuple[Any, ...] = (None, 1, "corrupted", None, ())


def attribution_patching(
    model: Decoder,
    clean: ArrayLike,
    corrupted: ArrayLike,
    metric: MetricLike,
    sites: str | Sequence[str] = ("z",),
    *,
    mask: ArrayLike | None = None,
    rules: Rules | None = None,
    steps: int = 1,
    at: Literal["corrupted", "clean"] = "corrupted",
    correct: Literal["qk"] | None = None,
    each: str | Sequence[str] = (),
) -> AttributionResult:
    """Estimates what patching each clean activation into the corrupted run would do to the metric, all at once.

    `Σ (clean − corrupted) · ∂ metric / ∂ site`, the gradient on the corrupted run, summed over the site's last axis (`each` of
    it alone, where asked): the first-order term of `activation_patching`'s `patched − corrupted` (Nanda 2023,
    neelnanda.io/attribution-patching; Syed, Rager and Conmy 2023, arXiv:2310.10348). Two forward passes side by side and one
    backward pass, whatever the number of sites; no parameter's gradient is computed. The gradient is with respect to zeros that
    are added to every site.

    The metric is not linear in the sites. The estimate is poor for large changes (a whole residual stream early on), for
    queries and keys where attention is saturated, so that the softmax has no gradient, and where direct and indirect effects
    cancel (Kramár et al. 2024, arXiv:2403.00745): `steps`, `correct` and `rules` are for these. `verify` measures how poor.

    Args:
        model: a model of any family, or a Hugging Face one.
        clean, corrupted: ids `[T]`, or `[B, T]` for several pairs of prompts: of one shape, aligned token by token.
        metric: one of `oculi_jax.metrics`, or any function of an `Output` (with all logits `[T, V]`, no activations) to a
            floating-point scalar. A metric's ids are data; a function is a part of the program.
        sites: names of the site table, all but `allowed`, or what the guide or TransformerLens calls them; static.
        mask: bool, shaped as `clean`, True at real tokens, of both prompts of a pair. Padding is 0 in the result.
        rules: other derivatives, of `oculi_jax.rules`; a leading axis on their leaves is a family, one after another.
        steps: over how many gradients to average, k = 0 … steps − 1: at embeddings corrupted + (k / steps)(clean − corrupted).
            They are integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365).
        at: which run the gradient is of, where it is of one.
        correct: `"qk"` for AtP*'s correction (Kramár et al. 2024): what other queries and keys make of the pattern is computed
            exactly, the softmax whole, and only what follows is a gradient. It changes `q` and `k`, a key's over all
            queries that see it, and nothing else.
        each: those of `sites` whose last axis is kept: `"act"` for every neuron at every token, `[L, T, F]`; static.

    Returns:
        An `AttributionResult`: `.values["z"]` `[L, H, T]`, `[B, L, H, T]` for several pairs; all behind an axis of R rules.

    Raises:
        ValueError, TypeError: something that can be seen to be wrong, before anything runs; a metric without a gradient.

    Examples:
        >>> attribution_patching(model, ids, other, metric, "z").values["z"].shape
        (4, 6, 6)
        >>> attribution_patching(model, ids, other, metric, "act", each="act").top(1)
        [{'site': 'act', 'layer': 3, 'position': 5, 'neuron': 77, 'value': 0.909528911113739}]
    """
    pairs = _Pairs.of(model, clean, corrupted, metric, sites, mask, (rules, steps, at, correct, each))
    found = _in_buckets(model, pairs) if pairs.in_buckets(model) else _together(model, pairs)
    return AttributionResult(*found, n_rules=pairs.how.n_rules)


def _named(names: Any, what: str, config: Any) -> list[Site]:
    """The sites that an argument names; ValueError or TypeError where it names none that is there."""
    names = (names,) if isinstance(names, str) else names
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{what} is {names!r}, and a site name or a tuple of those is needed.")
    found = [find_site(name, config.sites) for name in names]
    for name, (site, layer) in zip(names, found, strict=True):
        if layer is not None:
            raise ValueError(
                f"The site {name!r} names layer {layer}, and every layer is attributed: give {site.name!r}."
            )
    return [site for site, _ in found]


def _readings(sites: Any, config: Any) -> tuple[Reading, ...]:
    found = _named(sites, "sites", config)
    if not found:
        raise ValueError("sites is empty; name at least one, such as 'z'.")
    for site in found:
        if site.dtype == "bool":
            raise ValueError(
                f"{site.name!r} is a table of yes and no, and has no gradient; 'scores' and 'pattern' have."
            )
    return readings_of(tuple(site.name for site in found), config, 1)


@plans(attribution_patching)
def _plan_of_attribution(
    model: Decoder,
    clean: ArrayLike,
    corrupted: ArrayLike,
    metric: MetricLike,
    sites: str | Sequence[str],
    mask: ArrayLike | None,
    rules: Rules | None,
    steps: int,
    at: str,
    correct: str | None,
    each: str | Sequence[str],
) -> Plan:
    pairs = _Pairs.of(model, clean, corrupted, metric, sites, mask, (rules, steps, at, correct, each))
    how = pairs.how
    n_prompts, n_tokens = pairs.clean.shape
    config, batches, (n_copies, _) = model.config, pairs.batches(model), programs_of(model).spread(model)
    flops = reading = held = 0.0
    parts = []
    for bucket, n_rows, at_once, remat in batches:
        cost = replace(cost_of(model, bucket.n_tokens, n_prompts, pairs.metric), n_devices=n_copies)
        flops += n_rows * _flops_of_pair(cost, how, remat)
        # The two runs read weights together, and so do the rules that run side by side.
        passes = -(-n_rows // at_once) * how.in_turn * how.steps * (3 if remat else 2)
        reading += passes * config.num_hidden_layers * cost.flops_of_reading
        units = -(-n_rows // n_copies) * _bytes_of_units(model, pairs.readings, how, bucket.n_tokens)
        held = max(held, units + _bytes_of(model, pairs.readings, how, bucket.n_tokens, at_once, remat))
        n = len(bucket.prompts)
        call = Call(
            np.arange(n), np.zeros((n, 1), int), start=0, n_rows=bucket.n_tokens, shared=False, slots=n_rows, size=1
        )
        parts.append(Part(bucket.prompts, bucket.first, bucket.n_tokens, n_rows, reuse=False, calls=(call,)))
    note = "two side by side for each pair, and the backward pass of one"
    note += f", and of {how.steps - 1} more on the way" if how.steps > 1 else ""
    note += f", under {how.n_rules} rules" if how.n_rules is not None else ""
    again = ", its layers run again" if any(batch.remat for batch in batches) else ""
    return Plan(
        n_prompts=n_prompts, n_tokens=n_tokens, n_layers=config.num_hidden_layers,
        n_runs=(how.steps + 1) * n_prompts, parts=tuple(parts),
        flops=flops, bytes=int(held), reading=reading, note=note + again, spread=cost.spread, n_devices=cost.n_workers,
        rate=partial(programs_of(model).rate, model),
    )  # fmt: skip


def _flops_of_pair(cost: Cost, how: How, remat: bool) -> float:
    """Of forward passes, two and one for each more step, and backward ones, which multiply once with each weight, and twice in
    attention.
    """
    c, n = cost.config.sizes, cost.n_tokens
    layer, logits = cost.flops_of_layer(n), 2.0 * cost.n_logits * c["E"]
    attention = 2.0 * n * 2 * c["H"] * c["D"] * n
    forwards, backwards = how.in_turn * (how.steps + 1), how.steps * (how.n_rules or 1)
    layers = c["L"] * ((forwards + backwards * (2 if remat else 1)) * layer + backwards * attention)
    return layers + (forwards + backwards) * logits


def _bytes_of(model: Decoder, readings: tuple[Reading, ...], how: How, n_tokens: int, at_once: int, remat: bool) -> int:
    """The most that a device holds of a call, about: a layer's weights, what the backward pass needs, and the sites thrice.

    Measured on XLA's CPU compiler.
    """
    itemsize, (n_copies, n_parts) = model.dtype.itemsize, programs_of(model).spread(model)
    own, at_once = model.config.shares(n_parts), -(-at_once // n_copies)
    kept = _bytes_of_backward(model, n_tokens)
    if remat:
        kept = kept // own["L"] + 2 * (own["L"] * n_tokens * own["E"]) * itemsize
    found = 3 * 4 * sum(_numbers(model, reading, n_tokens) for reading in readings)
    if how.n_rules is not None:
        found += how.rules_at_once * _bytes_of_rule(model, readings, n_tokens)
    found += 6 * 4 * own["L"] * own["H"] * n_tokens**2 * how.exact
    return sum(weights_of(own)) * itemsize + at_once * (kept + found)


def _numbers(model: Decoder, reading: Reading, n_tokens: int) -> int:
    """How many numbers a device has of a site."""
    _, n_parts = programs_of(model).spread(model)
    sizes, own = model.config.sizes, model.config.shares(n_parts)
    is_cut = any(own[letter] < sizes[letter] for letter in reading.site.axes if letter in own)
    return math.prod(reading.shape(model.config, n_tokens)) // (n_parts if is_cut else 1)


def _bytes_of_units(model: Decoder, readings: tuple[Reading, ...], how: How, n_tokens: int) -> int:
    """What a call returns of a pair at sites whose last axis is kept; the others' is next to nothing."""
    kept = (_numbers(model, x, n_tokens) for x in readings if x.site.name in how.each)
    return wide(model.dtype).itemsize * (how.n_rules or 1) * sum(kept)


class _Pairs(NamedTuple):
    """Pairs of prompts and what is asked of them, checked.

    Attributes:
        clean, corrupted: ids `[B, T]`.
        mask: bool `[B, T]` or None.
        single: whether one pair was given.
        metric: as a pytree.
        leads: for each of its leaves, whether it leads with the pairs.
        readings: the sites.
        rules: canonical, or None.
        how: what else is asked.
    """

    clean: AnyArray
    corrupted: AnyArray
    mask: AnyArray | None
    single: bool
    metric: Any
    leads: tuple[bool, ...]
    readings: tuple[Reading, ...]
    rules: Rules | None
    how: How

    @classmethod
    def of(
        cls,
        model: Decoder,
        clean: Any,
        corrupted: Any,
        metric: MetricLike,
        sites: Any,
        mask: Any,
        asked: tuple[Any, ...] = DEFAULT,
    ) -> _Pairs:
        config = check_model(model)
        clean, real, single = check_prompts(config, clean, mask, ("clean", "mask"))
        corrupted, _, other = check_prompts(config, corrupted, None, ("corrupted", "mask"))
        if (single, clean.shape) != (other, corrupted.shape):
            shapes = (listing(x.shape[alone:]) for x, alone in ((clean, single), (corrupted, other)))
            raise ValueError(
                "clean has shape {}, and corrupted {}: a patch goes from each token to the one in its place, so they must have "
                "one shape. Choose prompts of as many tokens.".format(*shapes)
            )
        readings = _readings(sites, config)
        rules, how = _how(model, readings, clean.shape[1], *asked)
        metric, leads = check_metric(metric, config.vocab_size, clean, real)
        return cls(clean, corrupted, real, single, metric, leads, readings, rules, how)

    def in_buckets(self, model: Decoder) -> bool:
        """Whether pairs run with the columns of their own tokens, and not all with all."""
        given = (model, self.clean, self.corrupted, self.mask, self.metric, self.rules)
        return self.mask is not None and not self.single and not under_trace(given)

    def batches(self, model: Decoder) -> list[_Batch]:
        """What runs one after another."""
        if not self.in_buckets(model):
            n_prompts, n_tokens = self.clean.shape
            return [_Batch(whole(n_prompts, n_tokens), n_prompts, *self.schedule(model, n_prompts, n_tokens))]
        platform, _ = programs_of(model).room(model)
        # Of a column, two forward passes and the backward pass of one of them.
        work = 2 * 4 * model.config.num_hidden_layers * sum(weights_of(model.config.sizes))
        found = []
        for bucket in buckets_of(np.asarray(self.mask), columns_of_a_program(platform, work)):
            n_rows = rung(len(bucket.prompts))  # of few sizes, so that another set runs the same programs
            found.append(_Batch(bucket, n_rows, *self.schedule(model, n_rows, bucket.n_tokens)))
        return found

    def schedule(self, model: Decoder, n_rows: int, n_tokens: int) -> tuple[int, bool]:
        """As `_schedule`, of pairs under as many rules at once as there are."""
        at_once, remat = _schedule(model, n_rows, n_tokens)
        if self.how.n_rules is not None:
            kept = self.how.rules_at_once * _bytes_of_rule(model, self.readings, n_tokens)
            at_once = min(at_once, max(1, _KEPT_BYTES // kept))
        return at_once, remat


class _Batch(NamedTuple):
    """Pairs of one length, and how they run.

    Attributes:
        bucket: which.
        n_rows: for how many the program has room.
        at_once: how many run side by side.
        remat: whether layers are run again in the backward pass.
    """

    bucket: Bucket
    n_rows: int
    at_once: int
    remat: bool


def _together(model: Decoder, pairs: _Pairs) -> tuple[dict[str, Array], Array, Array]:
    """What `attribute` finds of all pairs with all their columns."""
    ((_, _, at_once, remat),) = pairs.batches(model)
    return attribute(
        model, pairs.clean, pairs.corrupted, pairs.mask, None, pairs.metric, pairs.readings, pairs.rules,
        how=pairs.how, single=pairs.single, at_once=at_once, remat=remat,
    )  # fmt: skip


def _in_buckets(model: Decoder, pairs: _Pairs) -> tuple[dict[str, Array], Array, Array]:
    """What `attribute` finds, of pairs that run with the columns in which their own tokens lie; 0 in the others."""
    clean, corrupted, mask = map(np.asarray, pairs[:3])
    n_prompts, n_tokens = mask.shape
    leaves, tree = jax.tree.flatten(pairs.metric)
    values: dict[str, np.ndarray] = {}
    ends = np.zeros((2, n_prompts), wide(model.dtype))
    n_leads = int(pairs.how.n_rules is not None)  # in front of the prompts
    for bucket, n_rows, at_once, remat in pairs.batches(model):
        n = len(bucket.prompts)
        own = bucket.of(np.minimum(np.arange(n_rows), n - 1))
        some = [np.asarray(x)[own.prompts] if lead else x for x, lead in zip(leaves, pairs.leads, strict=True)]
        found, *metrics = attribute(
            model, own.cut(clean), own.cut(corrupted), own.cut(mask), Window(own.first, mask[own.prompts], n_tokens),
            jax.tree.unflatten(tree, some), pairs.readings, pairs.rules,
            how=pairs.how, single=False, at_once=at_once, remat=remat,
        )  # fmt: skip
        ends[:, bucket.prompts] = np.stack(metrics)[:, :n]
        for reading in pairs.readings:
            value, name = np.moveaxis(np.asarray(found[reading.site.name]), n_leads, 0)[:n], reading.site.name
            lead = 1 + n_leads + int(reading.site.layered)
            letters = reading.site.axes[: value.ndim - lead]  # of scales summed over tokens, none
            for axis in [lead + i for i, letter in enumerate(letters) if letter in "TS"]:
                value = bucket.spread(value, axis, n_tokens)
            all_columns = values.setdefault(name, np.zeros((n_prompts, *value.shape[1:]), value.dtype))
            all_columns[bucket.prompts] = value
    values = {name: np.moveaxis(x, 0, n_leads) for name, x in values.items()}
    return jax.device_put(values), *jax.device_put(tuple(ends))


def _how(
    model: Decoder,
    readings: tuple[Reading, ...],
    n_tokens: int,
    rules: Any,
    steps: Any,
    at: Any,
    correct: Any,
    each: Any,
) -> tuple[Rules | None, How]:
    """Rules and options, checked."""
    steps = integer(steps, "steps", 1)
    if at not in RUNS:
        raise ValueError(f"at is {at!r}, and the gradient is of the 'corrupted' run or of the 'clean' one.")
    if at == "clean" and steps > 1:
        raise ValueError(
            f"at is 'clean' with {steps} steps, which go from the corrupted run towards the clean one: leave at out, or take one "
            "step."
        )
    if correct not in (None, "qk"):
        raise ValueError(f"correct is {correct!r}; it can be 'qk', AtP*'s exact softmax, or None.")
    if correct and not {"q", "k"} & {reading.site.name for reading in readings}:
        raise ValueError("correct='qk' changes the sites 'q' and 'k', and sites names neither of them.")
    units = _units(model, readings, each)
    if correct and {"q", "k"} & set(units):
        raise ValueError("correct='qk' is of whole queries and keys: each can name neither of them.")
    if rules is None:
        return None, How(at, steps, correct == "qk", each=units)
    rules, n_rules = check_family(rules, model.config)
    at_once = min(n_rules or 1, max(1, _KEPT_BYTES // _bytes_of_rule(model, readings, n_tokens)))
    return rules, How(at, steps, correct == "qk", n_rules, at_once, units)


def _units(model: Decoder, readings: tuple[Reading, ...], each: Any) -> tuple[str, ...]:
    """The names of the sites whose last axis is kept."""
    own, asked = [reading.site.name for reading in readings], [site.name for site in _named(each, "each", model.config)]
    for name in asked:
        if name not in own:
            raise ValueError(f"each names {name!r}, and sites {', '.join(own)}: what is not attributed has no units.")
    return tuple(name for name in own if name in asked)


def _schedule(model: Decoder, n_prompts: int, n_tokens: int) -> tuple[int, bool]:
    """How many pairs run at once, as many on each copy of the model, and whether each layer is run again in the backward pass
    rather than kept.
    """
    (n_copies, _), kept = programs_of(model).spread(model), _bytes_of_backward(model, n_tokens)
    n_calls = -(-n_prompts // (n_copies * max(1, _KEPT_BYTES // kept)))
    return -(-n_prompts // (n_calls * n_copies)) * n_copies, kept > _KEPT_BYTES


def _bytes_of_rule(model: Decoder, readings: tuple[Reading, ...], n_tokens: int) -> int:
    """What each of several rules adds to the backward pass of a pair: a layer's part of it, and the gradient of each site."""
    found = 4 * sum(_numbers(model, reading, n_tokens) for reading in readings)
    return found + _bytes_of_backward(model, n_tokens) // (4 * model.config.num_hidden_layers)


def _bytes_of_backward(model: Decoder, n_tokens: int) -> int:
    """What the forward passes of a pair leave for the backward pass, layers not run again; on each device."""
    sizes = model.config.shares(programs_of(model).spread(model)[1])
    per_token = 3 * sizes["E"] + 6 * sizes["F"] + 6 * sizes["H"] * n_tokens
    return 2 * sizes["L"] * n_tokens * per_token * model.dtype.itemsize
