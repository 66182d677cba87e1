"""`Output`: what a run returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax import Array
from jaxtyping import Bool, Float, Int

from .arrays import listing
from .pytrees import pytree


@pytree
class Output:
    """What `forward` returns.

    Attributes:
        logits: float32 `[T, V]`; `[V]` at the last real token for `logits="last"`; None for `"none"`.
        activations: site → its captured values, layered sites stacked on a leading `L` over the layers asked for.
        applied: int32 `[number of interventions]`: on how many of the layers that ran each one changed at least one
            element. 0 says that it never matched, or changed nothing.
        mask: bool `[T]`, True at real tokens, as it was given; None where all are.
    """

    logits: Float[Array, "T V"] | Float[Array, "V"] | None
    activations: Mapping[str, Array]
    applied: Int[Array, "N"]
    mask: Bool[Array, "T"] | None = None

    def __getitem__(self, site: str) -> Array:
        """What was captured at a site: `out["pattern"]` is `out.activations["pattern"]`."""
        if site not in self.activations:
            known = f"captured are {', '.join(self.activations)}" if self.activations else "nothing was"
            raise KeyError(f"{site!r} was not captured; {known}. Ask for it: capture={site!r}.")
        return self.activations[site]

    def __repr__(self) -> str:
        def shape(x: Any) -> str:
            return "None" if x is None else listing(getattr(x, "shape", ()))

        captured = ", ".join(f"{site} {shape(value)}" for site, value in self.activations.items())
        applied = f", applied {shape(self.applied)}" if getattr(self.applied, "shape", (0,)) != (0,) else ""
        return f"Output(logits {shape(self.logits)}, activations {{{captured}}}{applied})"
