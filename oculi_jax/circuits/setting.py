"""What path patching is given, checked: two runs, and who tells whom, by the names of `Graph`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..causal.setting import Runs
from ..models.decoder.parts import without_groups
from .graph import Graph, found, listed
from .pairs import Pairs

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..metrics import MetricLike
    from ..models.decoder.model import Decoder

DIRECTIONS = ("noising", "denoising")


class Place(NamedTuple):
    """Where a name is in a pass.

    Attributes:
        site: what it writes, or what it reads of the stream once that is normalised and projected.
        layer: which; 0 for `input`, the number of layers for `logits`.
        heads: which entries of the site's head axis, where every query head has an entry; empty where there is none.
    """

    site: str
    layer: int
    heads: tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """What path patching is given, checked.

    Attributes:
        model: in which query heads that share keys and values have them alone, where a receiver asks for that.
        base, source: the runs.
        single: whether there is one pair of prompts.
        direction: as given.
        senders, receivers: name → place.
        before: the senders from which paths lead to a receiver.
        each: whether every sender is patched alone.
    """

    model: Decoder
    base: Runs
    source: Runs
    single: bool
    direction: str
    senders: dict[str, Place]
    receivers: dict[str, Place]
    before: list[str]
    each: bool

    @classmethod
    def of(
        cls,
        model: Decoder,
        clean: ArrayLike,
        corrupted: ArrayLike,
        metric: MetricLike,
        senders: str | Sequence[str] | None,
        receivers: str | Sequence[str],
        direction: str,
        mask: ArrayLike | None,
        corrupted_mask: ArrayLike | None,
    ) -> Setting:
        """Raises ValueError or TypeError for what can be seen to be wrong."""
        if direction not in DIRECTIONS:
            raise ValueError(
                f"direction is {direction!r}, and must be 'noising' (corrupted into clean) or 'denoising'."
            )
        pairs = Pairs.of(model, clean, corrupted, metric, mask, corrupted_mask)
        graph, grouped = Graph.of(model.config), Graph.of(model.config, grouped=True)
        # Reader → which writers stand before it.
        ahead = {name: g.edges[:, i] for g in (graph, grouped) for i, name in enumerate(g.readers)}
        given = graph.writers if senders is None else _names(senders, graph.writers, "senders")
        read = _names(receivers, tuple(ahead), "receivers")
        if "logits" in read and len(read) > 1:
            others = ", ".join(name for name in read if name != "logits")
            raise ValueError(
                f"receivers names 'logits' and {others}: patched, the end is what it was told, whatever the others made of "
                "theirs. Ask for 'logits' by itself."
            )
        last = max(read, key=lambda name: ahead[name].sum())
        before = [name for name in given if ahead[last][graph.node(name)]]
        late = [name for name in given if name not in before]
        if late and senders is not None:
            raise ValueError(
                f"{late[0]!r} writes after the last of the receivers, {last!r}, reads: no path leads from it."
            )
        told = {name: _place(name, grouped if name in grouped.readers else graph, reads=True) for name in read}
        if any(place.site in ("k", "v") and len(place.heads) == 1 for place in told.values()):
            model = without_groups(model)
        base, source = (
            Runs(tokens, real, (), pairs.metric)
            for tokens, real in ((pairs.clean, pairs.mask), (pairs.corrupted, pairs.corrupted_mask))
        )
        if direction == "denoising":
            base, source = source, base
        said = {name: _place(name, graph, reads=False) for name in given}
        return cls(model, base, source, pairs.single, direction, said, told, before, senders is None)


def _names(given: object, known: Sequence[str], what: str) -> tuple[str, ...]:
    """The names that a user gives, one or several; ValueError or TypeError for what is none."""
    names: Any = (given,) if isinstance(given, str) else given
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{what} is {given!r}, and names are needed: {listed(known)}.")
    if not names:
        raise ValueError(f"{what} is empty; name at least one: {listed(known)}.")
    for i, name in enumerate(names):
        found(name, known, what)
        if name in names[:i]:
            raise ValueError(f"{what} names {name!r} twice.")
    return tuple(names)


def _place(name: str, graph: Graph, *, reads: bool) -> Place:
    if name in ("input", "logits"):
        return Place("resid_pre", 0, ()) if name == "input" else Place("final_norm", graph.n_layers, ())
    block, _, head = name.partition(".")
    layer = int(block[1:])
    if not head:
        return Place("mlp_in" if reads else "mlp_out", layer, ())
    if not reads:
        return Place("z", layer, (int(head[1:]),))
    own = np.flatnonzero(graph.owners[:, graph.readers.index(name)])
    return Place(name[-2], layer, tuple(((own - 1) % (graph.n_heads + 1)).tolist()))
