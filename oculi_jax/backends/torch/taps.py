"""Edits and captures of many rows: the operations of an `Edit` in torch, and the tap that carries them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import torch
from torch import Tensor

from ...capture import Reading
from ...intervention.edit import Edit, is_per_layer, is_site_shaped, is_whole, token_axes
from ...intervention.rows import Rows
from ...sites import SITES
from .arrays import from_numpy, to_numpy
from .layers import Weights
from .layout import Layout
from .rows import Leaf, lowered

if TYPE_CHECKING:
    from ...buckets import Window


class _Array:
    """A leaf of an edit on a device: cut to the tokens that run, and to the rows and the layer that it is asked for."""

    def __init__(self, given: Any, edit: Edit, sizes: Mapping[str, int], device: torch.device, by_axes: bool):
        self.by_layer = is_per_layer(given)
        leaf: Leaf = given.x if self.by_layer else given
        self.tensor, self.which = from_numpy(leaf.array).to(device), leaf.which
        self.whole = not by_axes
        shape = leaf.shape[int(self.by_layer) :]
        self.t_axes = token_axes(edit, shape, sizes["T"], "T") if by_axes else []
        self.s_axes = token_axes(edit, shape, sizes["S"], "S") if by_axes else []

    def at(self, rows: np.ndarray, layer: int | None, layout: Layout, n_axes: int) -> Tensor:
        """What broadcasts to the site's value at these rows, `[n, *axes]`; what has not its axes as it is, `[n, 1, …]` before."""
        x, led = self.of(rows, layer)
        if self.whole:
            return x.reshape(len(x), *(1,) * max(n_axes + 1 - x.ndim, 0), *x.shape[1:]) if led else x
        for axis in self.t_axes:
            x = x.narrow(axis, layout.first, layout.n_tokens)
        for axis in self.s_axes:
            x = x.narrow(axis, 0, layout.n_keys)
        return x.reshape(len(x), *(1,) * (n_axes + 1 - x.ndim), *x.shape[1:]) if led else x

    def of(self, rows: np.ndarray, layer: int | None) -> tuple[Tensor, bool]:
        """The entries of these rows, and whether there is one for each; one for all where they have the same."""
        x, led = self.tensor, False
        if self.which is not None:
            places = self.which[rows]
            led = bool((places != places[0]).any())
            x = x[torch.from_numpy(places).to(x.device)] if led else x[int(places[0])]
        return (x.select(int(led), layer) if self.by_layer and layer is not None else x), led


class _Edit:
    """An edit of all rows, on a device."""

    def __init__(self, number: int, edit: Edit, n_rows: int, sizes: Mapping[str, int], device: torch.device):
        self.number, self.site, self.op, self.fn = number, SITES[edit.site], edit.op, edit.fn
        self.site_shaped = is_site_shaped(edit)
        self.layers: np.ndarray | None = None
        if edit.layer is not None:
            layer: Leaf = edit.layer
            each = layer.array[None] if layer.which is None else layer.array[layer.which]
            if each.dtype != bool:
                each = each[:, None] == np.arange(sizes["L"])
            self.layers = np.broadcast_to(each, (n_rows, sizes["L"]))
        self.mask = _Array(edit.mask, edit, sizes, device, True)
        leaves, self.tree = jax.tree.flatten(
            edit.value, is_leaf=lambda x: isinstance(x, Leaf) or is_per_layer(x) or is_whole(x)
        )
        self.values = [
            _Array(leaf.x, edit, sizes, device, False)
            if is_whole(leaf)
            else _Array(leaf, edit, sizes, device, self.site_shaped)
            for leaf in leaves
        ]
        self.every = np.arange(n_rows)

    def rows(self, layer: int | None) -> np.ndarray:
        """The rows that it is about here."""
        return self.every if layer is None or self.layers is None else np.flatnonzero(self.layers[:, layer])

    def apply(self, x: Tensor, layer: int | None, layout: Layout) -> tuple[Tensor, np.ndarray, Tensor]:
        """The value of the site after the edit, the rows that it was about, and in which of these it changed something."""
        rows, axes = self.rows(layer), self.site.axes
        whole = len(rows) == len(x)
        index = None if whole else torch.from_numpy(rows).to(x.device)
        part = x if index is None else x[index]

        def real_of(real: Tensor, letter: str) -> Tensor:
            some = real if len(real) == 1 or index is None else real[index]
            return some.to(x.device).view(len(some), *(-1 if letter == axis else 1 for axis in axes))

        chosen = self.mask.at(rows, layer, layout, len(axes)).to(x.device)
        real = seen = None
        if layout.queries is not None and layout.keys is not None:
            real = real_of(layout.queries, "T")
            seen = real_of(layout.keys, "S") if "S" in axes else None
            chosen = chosen & real if seen is None else chosen & real & seen
        if self.op == "apply":
            # As in the other backend: padding is ones, and along the keys of a real token nothing of it is met.
            given = part if real is None else choose(real, part, torch.ones_like(part))
            new = self._applied(
                given if seen is None else choose(seen, given, torch.zeros_like(given)), seen, rows, layer, layout
            )
        else:
            operand = self.values[0].at(rows, layer, layout, len(axes)).to(x.device)
            wide = x.dtype if operand.dtype == x.dtype else torch.float32
            operand = operand.to(wide)
            new = (
                operand
                if self.op == "set"
                else part.to(wide) + operand
                if self.op == "add"
                else part.to(wide) * operand
            )
        new = choose(chosen, new.to(x.dtype), part)
        changed = (new != part).flatten(1).any(1)
        return (new if index is None else put(x, rows, new)), rows, changed

    def _applied(self, x: Tensor, seen: Tensor | None, rows: np.ndarray, layer: int | None, layout: Layout) -> Tensor:
        assert self.fn is not None
        n_axes = len(self.site.axes)
        fn: Any = self.fn
        if self.site_shaped:
            parts = []
            for value in self.values:
                part = value.at(rows, layer, layout, n_axes).to(x.device).float()
                part = part if value.whole else part.expand(x.shape)
                parts.append(
                    choose(seen, part, torch.zeros_like(part)) if seen is not None and not value.whole else part
                )
            return fn(x.float(), jax.tree.unflatten(self.tree, parts))
        found = []
        for number, row in enumerate(rows):
            leaves = [value.of(np.array([row]), layer)[0].to(x.device) for value in self.values]
            try:
                new = fn(x[number], jax.tree.unflatten(self.tree, leaves))
            except Exception as error:
                error.add_note(
                    f"The function of an Edit at {self.site.name!r} is given torch tensors here: torch runs this model."
                )
                raise
            if not isinstance(new, Tensor) or new.shape != x.shape[1:]:
                what = f"shape {list(new.shape)}" if isinstance(new, Tensor) else f"a {type(new).__name__}"
                raise ValueError(
                    f"The function of an Edit at {self.site.name!r} returned {what}, and on a model that torch runs it takes and "
                    f"returns torch tensors: the site's value {self.site.shape} is {list(x.shape[1:])} at a layer."
                )
            found.append(new.to(x.dtype))
        return torch.stack(found)


class Taps:
    """The tap of a run of many rows: edits what is to be edited, and keeps, on the host, what is to be captured.

    Attributes:
        layer: the layer that runs; None outside of them.
        layout: of the tokens that run, which edits are cut to.
        captured: site → value `[N, …]` of what was read so far.
    """

    def __init__(
        self,
        edits: Sequence[_Edit],
        n_interventions: int,
        n_rows: int,
        layout: Layout,
        readings: Sequence[Reading] = (),
        wanted: Sequence[str] = (),
    ):
        self.layer: int | None = None
        self.layout, self.n_rows = layout, n_rows
        self.captured: dict[str, Tensor] = {}
        self._edits, self._readings, self._wanted = edits, readings, wanted
        self._here: dict[str, tuple[list[_Edit], Reading | None]] = {}
        self._changed: dict[int, Tensor] = {}
        self._outside: dict[int, Tensor] = {}
        self._counts = [torch.zeros(n_rows, dtype=torch.int32) for _ in range(n_interventions)]
        self.enter(None)

    def enter(self, layer: int | None) -> None:
        """Says which layer the next sites are of."""
        self._count()
        self.layer, self._here = layer, {}
        for edit in self._edits:
            if edit.site.layered == (layer is not None) and len(edit.rows(layer)):
                self._here.setdefault(edit.site.name, ([], None))[0].append(edit)
        for reading in self._readings:
            if reading.site.layered == (layer is not None) and (layer is None or layer in reading.layers):
                self._here[reading.site.name] = (self._here.get(reading.site.name, ([], None))[0], reading)

    def touches(self, *sites: str) -> bool:
        """Whether any of these is edited or captured here, or wanted in any case."""
        return any(site in self._here or site in self._wanted for site in sites)

    def edits(self, *sites: str) -> bool:
        """Whether any of these is edited here."""
        return any(site in self._here and bool(self._here[site][0]) for site in sites)

    def __call__(self, site: str, value: Tensor) -> Tensor:
        if site not in self._here:
            return value
        edits, reading = self._here[site]
        for edit in edits:
            value, rows, changed = edit.apply(value, self.layer, self.layout)
            flags = self._outside if self.layer is None else self._changed
            so_far = flags.get(edit.number, torch.zeros(self.n_rows, dtype=torch.bool)).to(changed.device)
            index = torch.from_numpy(rows).to(changed.device)
            flags[edit.number] = put(so_far, rows, so_far[index] | changed)
        if reading is not None:
            self._keep(reading, value)
        return value

    def _keep(self, reading: Reading, value: Tensor) -> None:
        value = value.expand(self.n_rows, *value.shape[1:])
        if reading.positions is not None:
            value = at_positions(value, 1 + reading.site.axes.index("T"), reading.positions, self.layout.real)
        dtype = value.dtype if reading.dtype is None else getattr(torch, reading.dtype)
        if value.device.type != "cpu":
            # Dense to the host: strided copies from Apple's GPUs have gone to the wrong places (pytorch issue 123836).
            value = value.contiguous().to("cpu")
        if not reading.site.layered:
            self.captured[reading.site.name] = value.to(dtype, copy=True)
            return
        assert self.layer is not None
        shape = (self.n_rows, len(reading.layers), *value.shape[1:])
        buffer = self.captured.setdefault(reading.site.name, torch.empty(0))
        if buffer.shape != shape:
            buffer = self.captured[reading.site.name] = torch.empty(shape, dtype=dtype)
        buffer[:, reading.layers.index(self.layer)].copy_(value)

    def _count(self) -> None:
        for number, changed in self._changed.items():
            self._counts[number] = self._counts[number].to(changed.device) + changed.to(torch.int32)
        self._changed = {}

    def applied(self) -> np.ndarray:
        """int32 `[N, number of interventions]`: on how many layers each changed something."""
        self._changed = {**self._changed, **self._outside}
        self._count()
        if not self._counts:
            return np.zeros((self.n_rows, 0), np.int32)
        return np.stack([to_numpy(count) for count in self._counts], axis=1)


def choose(condition: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """`where`, its condition dense: on Apple's GPUs a strided one has been silently wrong (pytorch issue 150967)."""
    return torch.where(condition.expand(other.shape).contiguous(), one, other)


def put(x: Tensor, rows: np.ndarray, new: Tensor) -> Tensor:
    """`x` with other rows in the place of some; `index_copy` is silently wrong on Apple's GPUs (pytorch issue 160993)."""
    places = np.arange(len(x))
    places[rows] = len(x) + np.arange(len(rows))
    return torch.cat([x, new]).index_select(0, torch.from_numpy(places).to(x.device))


def at_positions(value: Tensor, axis: int, positions: tuple[int, ...], real: np.ndarray | None) -> Tensor:
    """Entries of a token axis at ranks among each row's real tokens; NaN (False) where there is no such token."""
    n, length = value.shape[0], value.shape[axis]
    real = np.ones((1, length), bool) if real is None else real
    counts, slots = real.sum(axis=1), [np.flatnonzero(row) for row in real]
    ranks = np.array(positions)[None] + np.where(np.array(positions)[None] < 0, counts[:, None], 0)
    found = (ranks >= 0) & (ranks < counts[:, None])
    places = np.stack([own[np.where(ok, rank, 0)] for own, rank, ok in zip(slots, ranks, found, strict=True)])
    if len(places) == 1:
        taken = value.index_select(axis, torch.from_numpy(places[0]).to(value.device))
    else:
        rows = torch.arange(n, device=value.device)[:, None]
        taken = value.movedim(axis, 1)[rows, torch.from_numpy(places).to(value.device)].movedim(1, axis)
    if found.all():
        return taken
    there = torch.from_numpy(found).to(value.device)
    there = there.view(len(found), *(len(positions) if i == axis else 1 for i in range(1, value.ndim)))
    return taken & there if taken.dtype == torch.bool else choose(there, taken, torch.full_like(taken, torch.nan))


def prepare(
    w: Weights,
    rows: Rows,
    n_prompts: int,
    size: int,
    n_slots: int,
    n_covered: int | None = None,
    window: Window | None = None,
) -> list[_Edit]:
    """The edits of rows, prompts × variants, in a run of `n_slots` tokens."""
    sizes = {**w.config.sizes, "T": n_slots, "S": n_slots}
    found = lowered(rows, sizes, n_prompts, size, n_covered, w.config.sites, window)
    return [_Edit(number, edit, n_prompts * size, sizes, w.embed.device) for number, edit in found]
