"""What calls will run and what that costs: `Plan`, and `SweepPlan`, in which groups a sweep runs its variants."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .. import cells
from ..buckets import weights_of

if TYPE_CHECKING:
    from ..models.decoder.config import DecoderConfig

# Of a large square product's rate, what a sweep reaches beside reading weights (measured: benchmarks/sets.py, benchmarks/rates.py).
EFFICIENCY = 0.75
# What a mesh cuts, and what there is of it.
CUT = {"H": "query heads", "K": "key/value heads", "F": "neurons", "V": "tokens of the vocabulary"}
# A layer's weights are read once for a call: that costs as much time as the arithmetic of so many tokens.
ROWS_OF_A_READ = {"cpu": 40}
ROWS_OF_A_READ_ELSEWHERE = 1024
# The more tokens at once the better, up to where activations leave the processor's caches.
MOST_ROWS = {"cpu": 1024}
MOST_ROWS_ELSEWHERE = 65536


@dataclass(frozen=True, eq=False)
class Call:
    """Prompts, and for each the variants that one call runs it under.

    Attributes:
        prompts: their places in the part, one for each slot.
        variants: numbers `[slots, size]`; what is left over repeats the last one.
        start: the first layer that runs.
        n_rows: how many tokens run, the last ones of the prompt.
        shared: whether the tokens before these run too, once for each variant: they are the same in all prompts.
        slots, size: how many prompts, and variants of each, the program has room for.
    """

    prompts: np.ndarray
    variants: np.ndarray
    start: int
    n_rows: int
    shared: bool
    slots: int
    size: int

    @property
    def is_grid(self) -> bool:
        """Whether all prompts have the same variants."""
        return bool((self.variants == self.variants[:1]).all())


@dataclass(frozen=True, eq=False)
class Part:
    """Prompts whose base runs are there together, and the calls that start from them.

    Attributes:
        prompts: their numbers in the set.
        first: the column at which each begins.
        n_tokens: how many columns run.
        room: how many prompts the program of the base runs has room for.
        reuse: whether variants start from base runs, at their first edited layer and token, or run whole.
        calls: in order.
    """

    prompts: np.ndarray
    first: np.ndarray
    n_tokens: int
    room: int
    reuse: bool
    calls: tuple[Call, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """What a call will do.

    Attributes:
        n_prompts, n_tokens, n_layers: of the run; of pairs of prompts, the pairs.
        n_runs: how many runs of a prompt the call stands for, whatever they share.
        parts: the prompts in groups of near lengths, and the calls that each takes.
        flops: floating-point operations of the matrix products, unembedding included; a multiply-add is two.
        bytes: the most memory that a device holds beside the model and what was given.
        reading: what reading each layer's weights costs beside these, once for a call, in operations of the same time.
        note: what else is to be said of it, in words; else "".
        spread: of a model on several devices, how it lies on them, in words; else "".
        n_devices: how many share the work; virtual ones of a CPU share its cores, and are one.
        rate: measures floating-point operations a second of a device.

    Examples:
        >>> planned = plan(causal.attribution_patching, model, ids, other, metric)
        >>> planned.n_prompts, planned.n_runs, len(planned.calls), planned.seconds < 60
        (1, 2, 1, True)
    """

    n_prompts: int
    n_tokens: int
    n_layers: int
    n_runs: int
    parts: tuple[Part, ...]
    flops: float
    bytes: int
    reading: float = 0.0
    note: str = ""
    spread: str = ""
    n_devices: int = 1
    rate: Callable[[], float] | None = field(default=None, repr=False)

    @property
    def calls(self) -> tuple[Call, ...]:
        """Of all parts.

        Examples:
            >>> call = plan(model, ids, HeadAblation.grid(model.config), metric).calls[0]
            >>> call.variants.shape, call.start, call.n_rows
            ((1, 24), 0, 6)
        """
        return tuple(call for part in self.parts for call in part.calls)

    @property
    def seconds(self) -> float:
        """About how long it takes, compiling apart: a sweep does three quarters of what a matrix product alone would.

        From a product that is measured on the device once in a process, when this is first asked for.

        Examples:
            >>> plan(model, ids, HeadAblation.grid(model.config), metric).seconds < 60
            True
        """
        return (
            math.nan if self.rate is None else (self.flops + self.reading) / (EFFICIENCY * self.n_devices * self.rate())
        )

    def _said(self) -> dict[str, object]:
        """What a table says of it before its costs."""
        return {name: getattr(self, name) for name in ("n_prompts", "n_tokens", "n_runs", "note", "spread")}

    def _repr_html_(self) -> str:
        said = {name: value for name, value in self._said().items() if value != ""}
        more = {"GFLOP": f"{self.flops / 1e9:.3g}", "MB": f"{self.bytes / 1e6:.3g}"}
        rows = {**said, **more, "seconds": f"about {self.seconds:.2g}, and compiling"}
        return cells.table(type(self).__name__, rows.items())

    def __repr__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        n_calls = f"{len(self.calls)} call{'s' * (len(self.calls) > 1)}"
        return f"Plan({self.n_runs} runs of {self.n_tokens} tokens{self._cut()}{note}; {n_calls}; {self._costs()})"

    def _costs(self) -> str:
        took = "" if self.rate is None else f", about {self.seconds:.2g} s and compiling"
        spread = f"; on {self.spread}" if self.spread else ""
        return f"{self.flops / 1e9:.3g} GFLOP{took}, {self.bytes / 1e6:.3g} MB beside the model{spread}"

    def _cut(self) -> str:
        """What padding is left out, in words."""
        lengths = sorted({part.n_tokens for part in self.parts})
        return "" if lengths == [self.n_tokens] else f" in lengths of {', '.join(map(str, lengths))}"


@dataclass(frozen=True, eq=False, kw_only=True)
class SweepPlan(Plan):
    """What `sweep` will do, or what sweeps, as `activation_patching`.

    Attributes:
        axes: of the sweep; their product is the number of variants.
        n_prompts, n_tokens, n_layers: of the run.
        n_runs: how many whole runs it stands for: one of every variant of every prompt, and those of patching before them.
        parts: the prompts in groups of near lengths, and the calls that each takes.
        layer_evaluations: how many times a layer runs on a prompt, the base runs included; some of its columns count by their
            share.
        flops: floating-point operations of the matrix products, unembedding included; a multiply-add is two.
        naive_flops: the same for that many whole runs, padding included.
        bytes: the most memory that a device holds beside the model and the interventions' own arrays: the base runs and one
            call's own; for patching, what it captures too.
        reading: what reading each layer's weights costs beside these, once for a call, in operations of the same time.
        note: why all tokens run, where something that was given needs them; else "".
        spread: of a model on several devices, how it lies on them, in words; else "".
        n_devices: how many share the work; virtual ones of a CPU share its cores, and are one.
        rate: measures floating-point operations a second of a device.

    Examples:
        >>> planned = plan(model, [ids, other], HeadAblation.grid(model.config), metric)
        >>> planned.axes, planned.n_prompts, planned.n_runs, planned.batch_size
        ((4, 6), 2, 48, 12)
    """

    axes: tuple[int, ...]
    layer_evaluations: float
    naive_flops: float

    @property
    def naive_layer_evaluations(self) -> float:
        """How many layer evaluations whole runs would be.

        Examples:
            >>> plan(model, ids, HeadAblation.grid(model.config), metric).naive_layer_evaluations  # 24 variants × 4 layers
            96.0
        """
        return float(self.n_runs * self.n_layers)

    @property
    def reuse(self) -> bool:
        """Whether any variants start from base runs.

        Examples:
            >>> plan(model, ids, HeadAblation.grid(model.config), metric, reuse=False).reuse
            False
        """
        return any(part.reuse for part in self.parts)

    @property
    def batch_size(self) -> int:
        """The most variants of a prompt in a call."""
        return max(call.size for call in self.calls)

    def _said(self) -> dict[str, object]:
        share = self.layer_evaluations / self.naive_layer_evaluations
        said = {name: getattr(self, name) for name in ("axes", "n_prompts", "n_tokens", "batch_size", "note", "spread")}
        return {**said, "layer evaluations": f"{self.layer_evaluations:.0f}, {share:.0%} of whole runs"}

    def __repr__(self) -> str:
        share = self.layer_evaluations / self.naive_layer_evaluations
        n_variants = math.prod(self.axes)
        before = self.n_runs - n_variants * self.n_prompts
        return (
            f"SweepPlan({n_variants} variants × {self.n_prompts} prompt{'s' * (self.n_prompts > 1)} of "
            f"{self.n_tokens} tokens{self._cut()}{f' after {before} whole runs' if before else ''}, {self._way()}; "
            f"{len(self.calls)} calls of up to {self.batch_size} variants; "
            f"{self.layer_evaluations:.0f} layer evaluations, {share:.0%} of {self.naive_layer_evaluations:.0f}; "
            f"{self._costs()}{f'; all tokens run: {self.note}' if self.note else ''})"
        )

    def _way(self) -> str:
        """What is reused, in words."""
        if not self.reuse:
            return "each whole"
        rows = {(call.n_rows, part.n_tokens) for part in self.parts for call in part.calls if not call.shared}
        later = sorted({rows for rows, n_tokens in rows if rows < n_tokens}, reverse=True)
        way = "each from its first edited layer"
        if later:
            way += f" and token (the last {', '.join(map(str, later))} of up to {self.n_tokens})"
        common = {part.n_tokens - call.n_rows for part in self.parts for call in part.calls if call.shared}
        return way + "".join(f", the first {n} tokens once for all prompts" for n in common)


# Function → what plans it, of the same arguments.
PLANNERS: dict[Callable[..., Any], Callable[..., Plan]] = {}
F = TypeVar("F", bound=Callable[..., Plan])


def plans(function: Callable[..., Any]) -> Callable[[F], F]:
    """Says of a function that it plans another, so that `plan(function, …)` is what it returns of all arguments by name."""

    def register(planner: F) -> F:
        PLANNERS[function] = planner
        return planner

    return register


def after_runs(planned: SweepPlan, cost: Cost, n_bare: int, n_captured: int, kept: int) -> SweepPlan:
    """The plan of a sweep with what two calls of whole runs before it cost.

    Args:
        planned: the sweep.
        cost: of its model, tokens and metric.
        n_bare: how many runs of which the metric alone is asked.
        n_captured: how many of which activations are captured too, at all tokens.
        kept: bytes of what is captured, which stays there.
    """
    cost = replace(cost, n_devices=1)
    n_layers, n_runs = cost.config.num_hidden_layers, n_bare + n_captured
    whole = n_layers * cost.flops_of_layer(cost.n_tokens) + 2.0 * cost.n_logits * cost.config.sizes["E"]
    held = cost.bytes_of_call(max(n_bare, n_captured), cost.n_tokens) + cost.bytes_of_last
    return replace(
        planned,
        n_runs=planned.n_runs + n_runs,
        layer_evaluations=planned.layer_evaluations + n_runs * n_layers,
        flops=planned.flops + n_bare * cost.flops_of_layers(n_layers, cost.n_tokens) + n_captured * whole,
        naive_flops=planned.naive_flops + n_runs * whole,
        bytes=kept + max(held, planned.bytes),
        reading=planned.reading + 2 * n_layers * cost.flops_of_reading,
    )


@dataclass(frozen=True)
class Cost:
    """What a call costs, from sizes alone.

    Attributes:
        config: the model's config.
        n_tokens: how many columns of a prompt run.
        n_prompts: of the whole set.
        n_read: at how many tokens the metric reads the stream, which alone leave the last layer; None for all.
        n_ids: how many logits it reads there.
        itemsize: bytes of a number of the model.
        platform: of the device.
        n_devices: over which the variants of a call spread.
        n_parts: over how many each copy of the model is cut.
    """

    config: DecoderConfig
    n_tokens: int
    n_prompts: int
    n_read: int | None
    n_ids: int
    itemsize: int
    platform: str
    n_devices: int
    n_parts: int = 1

    @property
    def own(self) -> dict[str, int]:
        """Letter → how many of them a device has."""
        return self.config.shares(self.n_parts)

    @property
    def n_workers(self) -> int:
        """How many devices share the work; virtual ones of a CPU share its cores."""
        return 1 if self.platform == "cpu" else self.n_devices * self.n_parts

    @property
    def spread(self) -> str:
        """How the model lies on several devices, in words; else ""."""
        c, own, n_parts = self.config.sizes, self.own, self.n_parts
        if self.n_devices * n_parts == 1:
            return ""
        held = self.config.n_params_on(n_parts) * self.itemsize
        said = f"{self.n_devices} × {n_parts} devices, {held / 1e6:.3g} MB of the model on each"
        whole = [f"{c[letter]} {name}" for letter, name in CUT.items() if n_parts > 1 and own[letter] == c[letter]]
        return said + (f", with all {' and '.join(whole)} ({n_parts} do not divide them)" if whole else "")

    @property
    def read(self) -> int:
        return ROWS_OF_A_READ.get(self.platform, ROWS_OF_A_READ_ELSEWHERE) * self.n_devices

    @property
    def most_rows(self) -> int:
        return MOST_ROWS.get(self.platform, MOST_ROWS_ELSEWHERE) * self.n_devices

    @property
    def weights(self) -> tuple[int, int]:
        """How many numbers a layer's attention and its MLP multiply with."""
        return weights_of(self.config.sizes)

    @property
    def flops_of_reading(self) -> float:
        """What reading one layer's weights costs, in operations of the same time."""
        return self.read * 2.0 * sum(self.weights)

    @property
    def n_logits(self) -> int:
        """How many logits the metric reads of a run."""
        return (self.n_tokens if self.n_read is None else self.n_read) * self.n_ids

    def flops_of_layer(self, n_rows: int) -> float:
        """Of one layer on so many of a prompt's tokens."""
        c = self.config.sizes
        return 2.0 * n_rows * (sum(self.weights) + 2 * c["H"] * c["D"] * self.n_tokens)

    def flops_of_layers(self, n_layers: int, n_rows: int) -> float:
        """Of the last `n_layers` on so many of a prompt's tokens, and of the logits that are read."""
        c = self.config.sizes
        logits = 2.0 * self.n_logits * c["E"]
        if self.n_read is None or not n_layers:
            return n_layers * self.flops_of_layer(n_rows) + logits
        last = self.flops_of_layer(self.n_read) + 2.0 * n_rows * 2 * c["E"] * c["K"] * c["D"]
        return (n_layers - 1) * self.flops_of_layer(n_rows) + last + logits

    def bytes_of_call(self, n_variants: int, n_rows: int) -> int:
        """The most that a device holds of a call over `n_variants` (× prompts): in attention, in the MLP, or in the logits.

        A layer's weights are copied out of the stack. Attention holds them all, three streams, and scores with what is made
        of them; the MLP its own weights, the streams, and two hidden layers. Measured on XLA's CPU compiler.
        """
        c, (attention, mlp) = self.own, weights_of(self.own)
        n_variants = -(-n_variants // self.n_devices)
        rows, streams = n_variants * n_rows, 3 * c["E"]
        n_logits = (
            self.n_logits // self.config.sizes["V"] * c["V"] if self.n_ids == self.config.vocab_size else self.n_logits
        )
        scores = int(2.5 * 4 * c["H"] * rows * self.n_tokens)
        return max(
            (attention + mlp + rows * streams) * self.itemsize + scores,
            (mlp + rows * (streams + 2 * c["F"])) * self.itemsize,
            n_variants * n_logits * 4,
        )

    @property
    def bytes_of_last(self) -> int:
        """The weights of the last layer, which are copied beside another's in a whole run that has it do some tokens alone."""
        apart = self.n_read is not None and self.config.num_hidden_layers > 1
        return sum(weights_of(self.own)) * self.itemsize if apart else 0

    def bytes_of_base(self, n_prompts: int, keys: bool) -> int:
        """What is kept of the base runs."""
        c = self.own
        per_token = (c["L"] + 1) * c["E"] + (2 * c["L"] * c["K"] * c["D"] if keys else 0)
        return n_prompts * self.n_tokens * per_token * self.itemsize

    def bytes_of_common(self, n_variants: int, n_common: int) -> int:
        """Keys and values of tokens that run once for all prompts."""
        c = self.own
        return 2 * n_variants * n_common * c["L"] * c["K"] * c["D"] * self.itemsize
