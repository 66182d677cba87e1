"""In which calls the prompts of a bucket run under their variants: the cheapest that the memory has room for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from ..buckets import Bucket
from ..prompts import bucket as rung
from .planning import Call, Cost, Part, SweepPlan
from .reach import Reach

# Where variants are so many, some base runs more cost nothing, and spare a program for another number of prompts.
MANY, FEW_PROMPTS = 64, 8


@dataclass(frozen=True, eq=False)
class _Group:
    """Variants that are run alike, in order of their first layer; `size` of them a slot, `slots` a call."""

    members: Int[np.ndarray, "N"]
    starts: Int[np.ndarray, "N"]
    n_rows: int
    shared: bool
    size: int
    slots: int
    price: float

    def calls(self, n_prompts: int) -> Iterator[Call]:
        """The calls of so many prompts."""
        n_blocks = -(-len(self.members) // self.size)
        places = np.minimum(np.arange(n_blocks * self.size), len(self.members) - 1).reshape(n_blocks, self.size)
        # By first layer, so that what a call holds starts where its first slot does and wastes little.
        blocks, prompts = np.divmod(np.arange(n_blocks * n_prompts), n_prompts)
        ends = [n_prompts * (block + 1) for block in range(n_blocks)] if self.shared else [len(blocks)]
        begin = 0
        for end in ends:
            for i in range(begin, end, self.slots):
                some = slice(i, min(i + self.slots, end))
                chosen = places[blocks[some]]
                yield Call(
                    prompts[some], self.members[chosen], int(self.starts[chosen[0, 0]]),
                    n_rows=self.n_rows, shared=self.shared, slots=self.slots, size=self.size,
                )  # fmt: skip
            begin = end


def make_plan(
    cost: Cost,
    axes: tuple[int, ...],
    buckets: Sequence[Bucket],
    reaches: Sequence[Reach | None],
    batch_size: int | None,
    budget: int,
) -> SweepPlan:
    """The plan of a sweep.

    Args:
        cost: what calls cost that run all columns.
        axes: of the sweep.
        buckets: its prompts.
        reaches: of each bucket, what variants may change first; None to run all whole.
        batch_size: how many variants of a prompt a call runs; None to choose.
        budget: bytes that a call and base runs may hold.
    """
    n_layers, n_variants = cost.config.num_hidden_layers, math.prod(axes)
    parts: list[Part] = []
    flops = evaluations = 0.0
    layers_read = 0
    held = 0
    for bucket, reach in zip(buckets, reaches, strict=True):
        own = replace(cost, n_tokens=bucket.n_tokens)
        some = parts_of(own, bucket, n_variants, reach, batch_size, budget)
        for part in some:
            kept = 0
            if part.reuse:
                layers_read += n_layers
                evaluations += part.room * n_layers * part.n_tokens / cost.n_tokens
                flops += part.room * n_layers * own.flops_of_layer(part.n_tokens)
                kept = own.bytes_of_base(part.room, any(call.n_rows < part.n_tokens for call in part.calls))
                # While base runs are made, what they keep is there twice: as it is gathered, and as it is returned.
                held = max(held, own.bytes_of_call(part.room, part.n_tokens) + 2 * kept)
            for call in part.calls:
                layers, runs, before = n_layers - call.start, call.slots * call.size, part.n_tokens - call.n_rows
                layers_read += layers
                evaluations += layers * runs * call.n_rows / cost.n_tokens
                flops += runs * own.flops_of_layers(layers, call.n_rows)
                common = 0 if part.reuse else own.bytes_of_last
                if call.shared:
                    evaluations += layers * call.size * before / cost.n_tokens
                    flops += layers * call.size * own.flops_of_layer(before)
                    common = own.bytes_of_common(call.size, before)
                held = max(held, own.bytes_of_call(runs, call.n_rows) + common + kept)
        parts.extend(some)
    runs = n_variants * cost.n_prompts
    everywhere = replace(cost, n_read=None, n_ids=0).flops_of_layers(n_layers, cost.n_tokens)
    return SweepPlan(
        axes=axes, n_prompts=cost.n_prompts, n_tokens=cost.n_tokens, n_layers=n_layers, n_runs=runs, parts=tuple(parts),
        layer_evaluations=evaluations, flops=flops,
        naive_flops=runs * (everywhere + 2.0 * cost.n_logits * cost.config.sizes["E"]), bytes=held,
        reading=layers_read * cost.flops_of_reading, spread=cost.spread, n_devices=cost.n_workers,
    )  # fmt: skip


def parts_of(
    cost: Cost, bucket: Bucket, n_variants: int, reach: Reach | None, batch_size: int | None, budget: int
) -> list[Part]:
    """The parts of a bucket.

    Args:
        cost: what calls of the bucket's length cost.
        bucket: its prompts.
        n_variants: how many variants each prompt has.
        reach: what they may change first; None to run all whole.
        batch_size: how many variants of a prompt a call runs; None to choose.
        budget: bytes that a call and base runs may hold.
    """
    n_layers, n_prompts = cost.config.num_hidden_layers, len(bucket.prompts)
    n_tokens = bucket.n_tokens
    search = _Search(cost, n_prompts, batch_size, budget - cost.bytes_of_last)
    everything = np.arange(n_variants)
    ways = [(0, n_prompts, [search.group(everything, np.zeros(n_variants, int), n_tokens)])]
    if reach is not None and (reach.layers >= 0).all():
        room = _room(cost, n_prompts, n_variants, budget)
        together = min(room, n_prompts)
        search = _Search(cost, together, batch_size, budget - 2 * cost.bytes_of_base(room, True))
        base = n_layers * (room * n_tokens + cost.read)
        for cut in _cuts(n_tokens, reach):
            groups = [
                search.group(members, reach.layers[members], n_rows, shared)
                for n_rows, shared, members in cut
                if members.size
            ]
            ways.append((base, together, groups))

    def price(way: tuple[float, int, list[_Group]]) -> float:
        base, together, groups = way
        return (base + sum(group.price for group in groups)) * n_prompts / together

    base, together, groups = min(ways, key=price)
    room = _room(cost, n_prompts, n_variants, budget) if base else together
    parts = []
    for i in range(0, n_prompts, together):
        some = slice(i, min(i + together, n_prompts))
        calls = tuple(call for group in groups for call in group.calls(some.stop - i))
        parts.append(Part(bucket.prompts[some], bucket.first[some], n_tokens, room, base > 0, calls))
    return parts


def _cuts(n_tokens: int, reach: Reach) -> Iterator[list[tuple[int, bool, Int[np.ndarray, "M"]]]]:
    """Ways to run no more tokens than variants need: each a list of how many run, whether those before are common, and which."""
    needed = np.clip(n_tokens - reach.tokens, 1, n_tokens)
    shares = sorted({-(-n_tokens * quarters // 4) for quarters in (1, 2, 3)} - {n_tokens})
    for chosen in range(2 ** len(shares)):
        lengths = np.array([*(share for bit, share in enumerate(shares) if chosen >> bit & 1), n_tokens])
        rows = lengths[np.searchsorted(lengths, needed)]
        yield [(int(length), False, np.flatnonzero(rows == length)) for length in lengths]
    if 0 < reach.common < n_tokens:
        rest = n_tokens - reach.common
        yield [(rest, False, np.flatnonzero(needed <= rest)), (rest, True, np.flatnonzero(needed > rest))]


def _room(cost: Cost, n_prompts: int, n_variants: int, budget: int) -> int:
    """How many base runs are made at once: a power of two, so that few sizes exist."""
    room = 1 << (n_prompts - 1).bit_length()
    if n_variants >= MANY:
        room = max(room, min(FEW_PROMPTS, 1 << (cost.n_prompts - 1).bit_length()))
    while room > 1 and (room * cost.n_tokens > cost.most_rows or 4 * cost.bytes_of_base(room, True) > budget):
        room //= 2
    return room


@dataclass(frozen=True)
class _Search:
    """For the prompts of one part."""

    cost: Cost
    n_prompts: int
    batch_size: int | None
    room: int

    def group(
        self, members: Int[np.ndarray, "M"], starts: Int[np.ndarray, "M"], n_rows: int, shared: bool = False
    ) -> _Group:
        """The cheapest group of these variants.

        A call starts where its first variant does, so larger ones waste layers, and smaller ones read the weights more often.
        """
        order = np.argsort(starts, kind="stable")
        members, starts, n = members[order], starts[order], len(members)
        if self.batch_size is None:
            sizes = sorted({int(-(-n // parts)) for parts in np.unique(np.geomspace(1, n, 64).astype(int))})
        else:
            sizes = [min(self.batch_size, n)]
        devices = self.cost.n_devices
        sizes = sorted({-(-size // devices) * devices for size in sizes})
        found = [
            _Group(members, starts, n_rows, shared, size, slots, self._price(starts, size, slots, n_rows, shared))
            for size in sizes
            for slots in self._slots(n, size, n_rows, shared)
        ]
        if not found:  # one prompt must do whatever it takes
            price = self._price(starts, sizes[0], 1, n_rows, shared)
            return _Group(members, starts, n_rows, shared, sizes[0], 1, price)
        return min(found, key=lambda group: (group.price, -group.size))

    def _slots(self, n: int, size: int, n_rows: int, shared: bool) -> set[int]:
        """How many slots of so many variants a call may have; none where there is no room for one."""
        cost, n_slots = self.cost, self.n_prompts * (1 if shared else -(-n // size))
        if self.batch_size is not None or self.n_prompts == 1:  # more variants of a prompt are more of its slot
            n_slots = min(n_slots, self.n_prompts)
        most = min(n_slots, cost.most_rows // (size * n_rows))
        own = cost.bytes_of_common(size, cost.n_tokens - n_rows) if shared else 0
        while most and cost.bytes_of_call(most * size, n_rows) + own > self.room:
            most = most * 3 // 4
        # As few calls as each of these makes, equally full, and of few sizes.
        chosen = {slots for slots in (most, most // 2, most // 4) if slots}
        return {min(slots, rung(-(-n_slots // -(-n_slots // slots)))) for slots in chosen}

    def _price(self, starts: Int[np.ndarray, "M"], size: int, slots: int, n_rows: int, shared: bool) -> float:
        """In token-layers."""
        n_layers, read = self.cost.config.num_hidden_layers, self.cost.read
        layers = n_layers - starts[::size]
        if shared:
            before = self.cost.n_tokens - n_rows
            calls = -(-self.n_prompts // slots)
            return float(np.sum(layers) * calls * (size * (before + slots * n_rows) + read))
        first = np.arange(0, len(layers) * self.n_prompts, slots) // self.n_prompts
        return float(np.sum(layers[first]) * (slots * size * n_rows + read))
