"""`SweepPlan`: in which groups a sweep runs its variants, what that costs, and the choice between the ways to do it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .. import cells

if TYPE_CHECKING:
    from ..models.llama.config import LlamaConfig

# Of a matrix product's rate, what a sweep reaches (measured: 0.73 to 0.85 on CPUs; benchmarks/rates.py).
EFFICIENCY = 0.75
# A layer's weights are read once for a group: that costs as much time as the arithmetic of so many tokens.
ROWS_OF_A_READ = {"cpu": 40}
ROWS_OF_A_READ_ELSEWHERE = 1024
# The more tokens at once the better, up to where activations leave the processor's caches.
MOST_ROWS = {"cpu": 1024}
MOST_ROWS_ELSEWHERE = 65536


@dataclass(frozen=True, eq=False)
class Group:
    """Variants that one call runs.

    Attributes:
        variants: their numbers.
        start: the first layer that runs.
        n_rows: how many tokens run, the last ones of the prompt.
        size: how many variants the program has room for; what is left over repeats the last one.
    """

    variants: np.ndarray
    start: int
    n_rows: int
    size: int


@dataclass(frozen=True, eq=False)
class SweepPlan:
    """What `sweep` will do.

    Attributes:
        axes: of the sweep; their product is the number of variants.
        n_prompts, n_tokens, n_layers: of the run.
        reuse: whether variants start from a base run, at their first edited layer and token, or run whole.
        prompts: how many prompts one call runs, each under all variants of a group.
        groups: the calls, in order, for each such set of prompts.
        layer_evaluations: how many times a layer runs on a prompt, the base runs included; a suffix of the tokens counts
            by its share.
        naive_layer_evaluations: the same for one whole run of every variant.
        flops: floating-point operations of the matrix products, unembedding included; a multiply-add is two.
        naive_flops: the same for one whole run of every variant.
        bytes: the most memory that a device holds beside the model and the interventions' own arrays: the base runs and one
            call's own.
        note: why all tokens run, where something that was given needs them; else "".
        rate: measures floating-point operations a second of the device.

    Examples:
        >>> planned = plan(model, [ids, other], HeadAblation.grid(model.config), metric)
        >>> planned.axes, planned.n_prompts, planned.batch_size, planned.seconds < 60
        ((4, 6), 2, 24, True)
    """

    axes: tuple[int, ...]
    n_prompts: int
    n_tokens: int
    n_layers: int
    reuse: bool
    prompts: int
    groups: tuple[Group, ...]
    layer_evaluations: float
    naive_layer_evaluations: float
    flops: float
    naive_flops: float
    bytes: int
    note: str = ""
    rate: Callable[[], float] | None = field(default=None, repr=False)

    @property
    def seconds(self) -> float:
        """About how long it takes, compiling apart: a sweep does three quarters of what a matrix product alone would.

        From a product that is measured on the device once in a process, when this is first asked for.
        """
        return math.nan if self.rate is None else self.flops / (EFFICIENCY * self.rate())

    @property
    def batch_size(self) -> int:
        """The most variants in a call."""
        return max(group.size for group in self.groups)

    def _repr_html_(self) -> str:
        said = {
            name: getattr(self, name)
            for name in ("axes", "n_prompts", "n_tokens", "batch_size", "note")
            if getattr(self, name) != ""
        }
        share = (
            f"{self.layer_evaluations:.0f}, {self.layer_evaluations / self.naive_layer_evaluations:.0%} of whole runs"
        )
        more = {"layer evaluations": share, "GFLOP": f"{self.flops / 1e9:.3g}", "MB": f"{self.bytes / 1e6:.3g}"}
        return cells.table("SweepPlan", {**said, **more, "seconds": f"about {self.seconds:.2g}, and compiling"}.items())

    def __repr__(self) -> str:
        n_variants, rows = math.prod(self.axes), sorted({group.n_rows for group in self.groups}, reverse=True)
        way = "each from its first edited layer" if self.reuse else "each whole"
        if self.reuse and rows != [self.n_tokens]:
            way += f" and token (the last {', '.join(map(str, rows))} of {self.n_tokens})"
        calls = len(self.groups) * -(-self.n_prompts // self.prompts)
        share = self.layer_evaluations / self.naive_layer_evaluations
        took = "" if self.rate is None else f", about {self.seconds:.2g} s and compiling"
        return (
            f"SweepPlan({n_variants} variants × {self.n_prompts} prompt{'s' * (self.n_prompts > 1)} of {self.n_tokens} tokens, "
            f"{way}; {calls} calls of up to {self.batch_size} variants; {self.layer_evaluations:.0f} layer evaluations, "
            f"{share:.0%} of {self.naive_layer_evaluations:.0f}; {self.flops / 1e9:.3g} GFLOP{took}, {self.bytes / 1e6:.3g} MB "
            f"beside the model{f'; all tokens run: {self.note}' if self.note else ''})"
        )


@dataclass(frozen=True)
class Cost:
    """What a call costs, from sizes alone.

    Attributes:
        config: the model's config.
        n_tokens: of the prompt.
        n_logits: how many logits the metric reads of a variant, over all its positions.
        itemsize: bytes of a number of the model.
        platform: of the device.
        n_devices: over which the variants of a call spread.
    """

    config: LlamaConfig
    n_tokens: int
    n_logits: int
    itemsize: int
    platform: str
    n_devices: int

    @property
    def read(self) -> int:
        return ROWS_OF_A_READ.get(self.platform, ROWS_OF_A_READ_ELSEWHERE) * self.n_devices

    @property
    def most_rows(self) -> int:
        return MOST_ROWS.get(self.platform, MOST_ROWS_ELSEWHERE) * self.n_devices

    @property
    def weights(self) -> tuple[int, int]:
        """How many numbers a layer's attention and its MLP multiply with."""
        c = self.config.sizes
        return 2 * c["E"] * c["D"] * (c["H"] + c["K"]), 3 * c["E"] * c["F"]

    def flops_of_rows(self, n_rows: int) -> float:
        """Of one layer on the last `n_rows` tokens of a prompt."""
        c = self.config.sizes
        return 2.0 * n_rows * (sum(self.weights) + 2 * c["H"] * c["D"] * self.n_tokens)

    @property
    def flops_of_logits(self) -> float:
        return 2.0 * self.n_logits * self.config.sizes["E"]

    def bytes_of_call(self, n_variants: int, n_rows: int) -> int:
        """The most that a device holds of a call over `n_variants` (× prompts): in attention, in the MLP, or in the logits.

        A layer's weights are copied out of the stack. Attention holds them all, three streams, and scores with what is made
        of them; the MLP its own weights, the streams, and two hidden layers. Measured on XLA's CPU compiler.
        """
        c, (attention, mlp) = self.config.sizes, self.weights
        n_variants = -(-n_variants // self.n_devices)
        rows, streams = n_variants * n_rows, 3 * c["E"]
        scores = int(2.5 * 4 * c["H"] * rows * self.n_tokens)
        return max(
            (attention + mlp + rows * streams) * self.itemsize + scores,
            (mlp + rows * (streams + 2 * c["F"])) * self.itemsize,
            n_variants * self.n_logits * 4,
        )

    def bytes_of_base(self, n_prompts: int, keys: bool) -> int:
        """What is kept of the base runs."""
        c = self.config.sizes
        per_token = (c["L"] + 1) * c["E"] + (2 * c["L"] * c["K"] * c["D"] if keys else 0)
        return n_prompts * self.n_tokens * per_token * self.itemsize


def make_plan(
    cost: Cost,
    axes: tuple[int, ...],
    n_prompts: int,
    first_layers: np.ndarray | None,
    first_tokens: np.ndarray | None,
    batch_size: int | None,
    budget: int,
) -> SweepPlan:
    """Chooses groups.

    Args:
        cost: what calls cost.
        axes: of the sweep.
        n_prompts: how many prompts.
        first_layers, first_tokens: of each variant, what it may change first; None to run all whole.
        batch_size: how many variants a call runs; None to choose.
        budget: bytes that a call may hold.
    """
    n, n_tokens, n_layers = math.prod(axes), cost.n_tokens, cost.config.num_hidden_layers
    whole = np.zeros(n, int), np.full(n, n_tokens)
    ways = [_groups(cost, *whole, (n_tokens,), n_prompts, batch_size, budget)]
    if first_layers is not None and first_tokens is not None and (first_layers >= 0).all():
        base = n_layers * (n_prompts * n_tokens + cost.read)
        needed = np.clip(n_tokens - first_tokens, 1, n_tokens)
        shares = sorted({-(-n_tokens * quarters // 4) for quarters in (1, 2, 3)} - {n_tokens})
        for chosen in range(2 ** len(shares)):
            lengths = (*(share for bit, share in enumerate(shares) if chosen >> bit & 1), n_tokens)
            rows = np.array(lengths)[np.searchsorted(lengths, needed)]
            way = _groups(cost, first_layers, rows, lengths, n_prompts=n_prompts, batch_size=batch_size, budget=budget)
            ways.append((way[0] + base, *way[1:]))
    number = min(range(len(ways)), key=lambda i: ways[i][0])
    _, prompts, groups = ways[number]
    reuse = number > 0

    layer_flops = {rows: cost.flops_of_rows(rows) for rows in {g.n_rows for g in groups}}
    runs = [(n_layers - g.start, g.size, g.n_rows) for g in groups]
    sets = -(-n_prompts // prompts) * prompts
    evaluations = sets * sum(layers * size * rows / n_tokens for layers, size, rows in runs)
    flops = sets * sum(layers * size * layer_flops[rows] + size * cost.flops_of_logits for layers, size, rows in runs)
    if reuse:
        evaluations += sets * n_layers
        flops += sets * n_layers * cost.flops_of_rows(n_tokens)
    held = max(cost.bytes_of_call(prompts * g.size, g.n_rows) for g in groups)
    if reuse:
        kept = cost.bytes_of_base(prompts, any(g.n_rows < n_tokens for g in groups))
        # While the base runs, what it keeps is there twice: as it is gathered, and as it is returned.
        held = max(held + kept, cost.bytes_of_call(prompts, n_tokens) + 2 * kept)
    return SweepPlan(
        axes,
        n_prompts,
        n_tokens,
        n_layers,
        reuse=reuse,
        prompts=prompts,
        groups=groups,
        layer_evaluations=evaluations,
        naive_layer_evaluations=float(n * n_prompts * n_layers),
        flops=flops,
        naive_flops=n * n_prompts * (n_layers * cost.flops_of_rows(n_tokens) + cost.flops_of_logits),
        bytes=held,
    )


def _groups(
    cost: Cost,
    first_layers: np.ndarray,
    n_rows: np.ndarray,
    lengths: Sequence[int],
    n_prompts: int,
    batch_size: int | None,
    budget: int,
) -> tuple[float, int, tuple[Group, ...]]:
    """The cheapest groups of variants that have a first layer and a number of tokens each: cost, prompts a call, groups."""
    best: tuple[float, int, tuple[Group, ...]] | None = None
    prompts = 1
    while True:
        room = budget - 2 * cost.bytes_of_base(prompts, True)
        found = 0.0
        groups: list[Group] = []
        for length in lengths:
            members = np.flatnonzero(n_rows == length)
            if members.size:
                members = members[np.argsort(first_layers[members], kind="stable")]
                chosen = _size(cost, first_layers[members], length, prompts, batch_size, room)
                if chosen is None:  # so many prompts do not fit; fewer did
                    assert best is not None
                    return best
                price, size = chosen
                found += price * -(-n_prompts // prompts)
                for i in range(0, len(members), size):
                    some = members[i : i + size]
                    groups.append(Group(some, int(first_layers[some[0]]), length, size))
        if best is None or found < best[0]:
            best = found, prompts, tuple(groups)
        if prompts >= n_prompts:
            return best
        prompts = min(2 * prompts, n_prompts)


def _size(
    cost: Cost, starts: np.ndarray, length: int, prompts: int, batch_size: int | None, room: int
) -> tuple[float, int] | None:
    """The cheapest number of variants in a call, of variants sorted by first layer: cost in token-layers, and that number.

    A group starts where its first variant does, so larger ones waste layers, and smaller ones read the weights more often.
    None where the memory has no room even for the smallest, of several prompts; one prompt must do whatever it takes.
    """
    n, n_layers = len(starts), cost.config.num_hidden_layers
    if batch_size is None:
        sizes = sorted({int(-(-n // parts)) for parts in np.unique(np.geomspace(1, n, 64).astype(int))})
    else:
        sizes = [min(batch_size, n)]
    sizes = sorted({-(-size // cost.n_devices) * cost.n_devices for size in sizes})
    fits = [
        size
        for size in sizes
        if prompts * size * length <= cost.most_rows and cost.bytes_of_call(prompts * size, length) <= room
    ]
    if not fits and prompts > 1:
        return None

    def price(size: int) -> float:
        layers = n_layers - starts[::size]
        return float(np.sum(layers * (prompts * size * length + cost.read)))

    return min((price(size), size) for size in fits or sizes[:1])
