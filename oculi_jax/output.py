"""`Output`: what a run returns."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import jax
from jax import Array
from jaxtyping import Bool, Float, Int

from . import cells
from .arrays import listing
from .pytrees import pytree
from .sites import find_site


@jax.tree_util.register_pytree_with_keys_class
class Activations(Mapping[str, Array]):
    """Site → its captured values, in the order in which they were asked for; a pytree that prints as shapes."""

    def __init__(self, values: Mapping[str, Array]):
        self._values = dict(values)

    def __getitem__(self, site: str) -> Array:
        if site in self._values:
            return self._values[site]
        with suppress(ValueError):
            name = find_site(str(site))[0].name
            if name in self._values:
                raise NotCaptured(f"{site!r} is called {name!r} here, and was captured: [{name!r}].")
        near = difflib.get_close_matches(str(site), self._values, 1)
        known = f"captured are {', '.join(self)}" if self else "nothing was"
        hint = f"Did you mean {near[0]!r}?" if near else f"Ask for it: capture={site!r}."
        raise NotCaptured(f"{site!r} was not captured; {known}. {hint}")

    def __eq__(self, other: object) -> bool:  # of arrays there is no one answer
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        shapes = (f"{site} {listing(getattr(value, 'shape', ()))}" for site, value in self.items())
        return "{" + ", ".join(shapes) + "}"

    def _repr_html_(self) -> str:
        return cells.table("captured", self.items())

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
        return [(jax.tree_util.DictKey(name), value) for name, value in self.items()], tuple(self)

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], values: Iterable[Any]) -> Activations:
        return cls(dict(zip(names, values, strict=True)))


class NotCaptured(KeyError):
    """A site that a run did not return."""

    __str__ = Exception.__str__  # KeyError's puts quotes around a sentence


@pytree
class Output:
    """What `forward` returns.

    Attributes:
        logits: float32 `[T, V]`; `[V]` at the last real token for `logits="last"`; None for `"none"`.
        activations: site → its captured values, layered sites stacked on a leading `L` over the layers asked for.
        applied: int32 `[number of interventions]`: on how many of the layers that ran each one changed at least one
            element. 0 says that it never matched, or changed nothing.
        mask: bool `[T]`, True at real tokens, as it was given; None where all are.

    Examples:
        >>> out = forward(model, ids, capture=("z", "final_scale"))
        >>> out, out["z"].dtype
        (Output(logits [6, 576], activations {z [4, 6, 6, 32], final_scale [6]}), dtype('float32'))
    """

    logits: Float[Array, "T V"] | Float[Array, "V"] | None
    activations: Mapping[str, Array]  # an `Activations`
    applied: Int[Array, "N"]
    mask: Bool[Array, "T"] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.activations, dict):
            object.__setattr__(self, "activations", Activations(self.activations))

    def __getitem__(self, site: str) -> Array:
        """What was captured at a site: `out["pattern"]` is `out.activations["pattern"]`."""
        return self.activations[site]

    def _repr_html_(self) -> str:
        rows = {"logits": self.logits, **self.activations, "applied": self.applied, "mask": self.mask}
        return cells.table("Output", rows.items())

    def __repr__(self) -> str:
        def shape(x: Any) -> str:
            return "None" if x is None else listing(getattr(x, "shape", ()))

        applied = f", applied {shape(self.applied)}" if getattr(self.applied, "shape", (0,)) != (0,) else ""
        return f"Output(logits {shape(self.logits)}, activations {self.activations!r}{applied})"
