"""`InterventionContext`: interventions that an adapter applies for the duration of a `with` block."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from .protocol import as_list

if TYPE_CHECKING:
    from ..adapter.adapter import LlamaAttentionAdapter
    from ..intervention.protocol import Interventions

# What is active here, outermost block first. Each thread and task has its own.
_ACTIVE: ContextVar[tuple[InterventionContext, ...]] = ContextVar("oculi_jax_interventions", default=())


class InterventionContext:
    """Interventions that everything an adapter captures or generates is under, inside a `with` block.

    Nested blocks add up, outer ones first. Leaving the block restores, by an exception too; other threads and tasks do
    not see it. `generate` of the adapter's own model is under it, as is a Hugging Face model's, whose forward is its own again
    when the last block is left; `oculi_jax.forward` and `oculi_jax.generate`, being
    pure, never are.

    Args:
        adapter: a `LlamaAttentionAdapter`.
        interventions: one intervention or a list of them, applied in order.

    Raises:
        TypeError: what is no adapter, or no intervention.

    Examples:
        >>> with InterventionContext(adapter, ActivationPatch("resid_pre", 2, PerLayer(run["resid_pre"]))):
        ...     adapter.generate(text, 2)
        'The capital of Italy is Paris.'
    """

    def __init__(self, adapter: LlamaAttentionAdapter, interventions: Interventions):
        if not hasattr(adapter, "model") or not hasattr(adapter, "capture"):
            hint = " Pass the adapter of that model." if hasattr(adapter, "lm_head") else ""
            raise TypeError(f"InterventionContext takes an adapter, and was given a {type(adapter).__name__}.{hint}")
        self.adapter, self.interventions = adapter, tuple(as_list(interventions))
        self._modules: list[Any] = []

    def __enter__(self) -> InterventionContext:
        if hasattr(self.adapter.model, "intervened"):  # a torch module, whose own generate is under it too
            module = self.adapter.model.intervened()
            module.__enter__()
            self._modules.append(module)
        _ACTIVE.set((*_ACTIVE.get(), self))
        return self

    def __exit__(self, *exception: object) -> None:
        entries = _ACTIVE.get()
        mine = [number for number, entry in enumerate(entries) if entry is self]
        if not mine:
            raise ValueError("This InterventionContext is left where it was not entered.")
        _ACTIVE.set((*entries[: mine[-1]], *entries[mine[-1] + 1 :]))  # blocks of generators may close in another order
        if self._modules:
            self._modules.pop().__exit__(None, None, None)


def active(adapter: object) -> tuple[Any, ...]:
    """The interventions that an adapter is under here."""
    return tuple(item for entry in _ACTIVE.get() if entry.adapter is adapter for item in entry.interventions)


def active_in(module: object) -> tuple[Any, ...]:
    """The interventions that a Hugging Face module's forward is under here."""
    mine = (entry for entry in _ACTIVE.get() if getattr(entry.adapter.model, "hf", None) is module)
    return tuple(item for entry in mine for item in entry.interventions)


def active_on(model: object) -> tuple[Any, ...]:
    """The interventions that a model's own `generate` is under here; ValueError where those here are all for others."""
    entries = _ACTIVE.get()
    mine = tuple(item for entry in entries if entry.adapter.model is model for item in entry.interventions)
    if entries and not any(entry.adapter.model is model for entry in entries):
        raise ValueError(
            "This model is not the one of the InterventionContext that is active here, so its interventions would be left "
            "out: generate with the context's own adapter or its model, or leave the block."
        )
    return mine
