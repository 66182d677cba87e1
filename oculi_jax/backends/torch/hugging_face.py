"""A Hugging Face module under interventions: what its `forward`, and so its own `generate`, is inside an `InterventionContext`."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from ...arrays import listing
from ...intervention.canonical import sweep_axes
from ...intervention.context import active_in
from ...intervention.frame import Frame
from ...intervention.rows import Rows
from ...models.families import FAMILIES
from .layers import embed, run_layers
from .layout import lay_out
from .taps import Taps, prepare

if TYPE_CHECKING:
    from .model import TorchDecoder

# Room for new tokens is made for so many at a time, since interventions are made canonical for a number of slots.
_ROOM = 256
_lock = threading.Lock()
# Module (by id) → how many contexts are entered on it, and the forward that was set on it before, if one was.
_entered: dict[int, list[Any]] = {}


def class_of(hf: object) -> Any:
    """The class of transformers that a module is of, found without importing transformers; None where it is of no family."""
    known = {family.architecture for family in FAMILIES.values()}
    return next((kind for kind in type(hf).__mro__ if kind.__name__ in known), None)


@contextmanager
def intervened(model: TorchDecoder) -> Iterator[None]:
    """While it lasts, the module's forward is under the interventions that are active where it is called, and its own elsewhere."""
    hf: Any = model.hf
    with _lock:
        entered = _entered.setdefault(id(hf), [0, hf.__dict__.get("forward")])
        entered[0] += 1
        if entered[0] == 1:
            hf.forward = _Forward(model, hf.forward)
    try:
        yield
    finally:
        with _lock:
            entered[0] -= 1
            if not entered[0]:
                del _entered[id(hf)]
                # Whoever set or deleted it inside the context keeps what they did.
                if isinstance(hf.__dict__.get("forward"), _Forward):
                    del hf.forward
                    if entered[1] is not None:  # another library's, accelerate's for instance
                        hf.forward = entered[1]


class _Forward:
    """The forward of a module inside a context."""

    def __init__(self, model: TorchDecoder, own: Callable[..., Any]):
        self._model, self._own = model, own
        update_wrapper(self, own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        interventions = active_in(self._model.hf)
        return _run(self._model, interventions, *args, **kwargs) if interventions else self._own(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Of a module that is copied or saved: its own, since a copy is in no context."""
        return getattr, (self._model.hf, "forward")


def _run(
    model: TorchDecoder,
    interventions: tuple[Any, ...],
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: Any = None,
    *,
    past_key_values: Any = None,
    use_cache: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    return_dict: bool | None = None,
    **others: Any,
) -> Any:
    """The module's forward, with its cache (`past_key_values` before transformers 5.24), under interventions."""
    hf: Any = model.hf
    cache = past_key_values if cache is None else cache
    ids = _check_call(hf, interventions, input_ids, attention_mask, others)
    w, config = model.weights(), model.config
    library = vars(sys.modules[class_of(model.hf).__module__])
    if cache is None and (use_cache or (use_cache is None and hf.config.use_cache)):
        cache = library["DynamicCache"](config=hf.config)
    first = 0 if cache is None else cache.get_seq_length()
    n_rows, n_tokens = ids.shape
    n_keys = first + n_tokens
    if attention_mask is not None and (len(attention_mask) != n_rows or attention_mask.shape[1] < n_keys):
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)}, and [{n_rows}, {n_keys}] is needed, cached and new tokens."
        )
    real = np.ones((n_rows, n_keys), bool) if attention_mask is None else attention_mask[:, :n_keys].cpu().numpy() != 0
    tokens = ids.cpu().numpy()
    ranks = np.cumsum(real, axis=1)[:, first:] - 1
    if position_ids is not None and (position_ids.cpu().numpy() != ranks)[real[:, first:]].any():
        raise NotImplementedError(
            "Inside an InterventionContext positions count the real tokens: leave position_ids out."
        )
    layout = lay_out(config, real, n_keys, w.embed.device, first)
    edits, rows = _edits(model, interventions, real, first, cache)
    taps = Taps(edits, rows.n_interventions, n_rows, layout)

    def remember(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        assert cache is not None
        found = cache.update(k, v, layer)
        if found[0].shape[2] != n_keys:
            raise NotImplementedError(
                "Inside an InterventionContext the cache is a dynamic one: leave cache_implementation out."
            )
        return found

    resid = embed(w, tokens, layout, taps)
    resid = run_layers(w, resid, layout, taps, range(len(w.layers)), None if cache is None else remember)
    keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
    keep = logits_to_keep if isinstance(logits_to_keep, Tensor) else keep
    logits = w.logits(w.normalise(resid, taps)[:, keep]).to(w.unembed.dtype)
    output = library["CausalLMOutputWithPast"]
    out = output(logits=logits, **{"cache" if hasattr(output, "cache") else "past_key_values": cache})
    return out.to_tuple() if return_dict is False else out


def _check_call(
    hf: Any,
    interventions: tuple[Any, ...],
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    others: dict[str, Any],
) -> Tensor:
    """The ids `[B, T]` of a call of the module's forward; raises for what it has not inside a context."""
    if unknown := [
        name for name, value in others.items() if name != "cache_position" and value is not None and value is not False
    ]:
        raise NotImplementedError(f"Inside an InterventionContext the model's forward has no {', '.join(unknown)}.")
    if input_ids is None or (attention_mask is not None and attention_mask.dim() != 2):
        raise NotImplementedError(
            "Inside an InterventionContext the model's forward takes input_ids and a mask [B, S]."
        )
    if input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError(f"input_ids is {list(input_ids.shape)}, and prompts [B, T] of one token or more are needed.")
    if kept := [name for name in ("output_attentions", "output_hidden_states") if getattr(hf.config, name, False)]:
        raise NotImplementedError(
            f"Inside an InterventionContext the model's forward has no {', '.join(kept)}, which its config asks for: use the "
            "adapter's capture."
        )
    if axes := sweep_axes(interventions, len(input_ids)):
        raise ValueError(
            f"The interventions of this context have axes {listing(axes)}; the adapter's generate decodes variants side by side."
        )
    return input_ids


class _Kept(NamedTuple):
    """What is kept with a cache: the edits of its rows, and what they were made for.

    Attributes:
        n_slots: how many tokens they have room for. n_covered: how many of them arrays cover.
        real: bool `[n, S]`, True at the slots that hold a token.
    """

    interventions: tuple[Any, ...]
    n_slots: int
    n_covered: int
    edits: list[Any]
    rows: Rows
    real: np.ndarray


def _edits(
    model: TorchDecoder, interventions: tuple[Any, ...], real: np.ndarray, first: int, cache: Any
) -> tuple[list[Any], Rows]:
    """The edits of all rows, kept with the cache of their text until that has no room left, or has other rows.

    Arrays cover what was there when the cache was empty, the prompt.
    """
    n_rows, n_keys = real.shape
    kept: _Kept | None = getattr(cache, "_oculi_edits", None) if first else None
    if kept is not None:
        same_rows = np.array_equal(kept.real, real[:, : kept.real.shape[1]])
        if same_rows and kept.interventions == interventions and n_keys <= kept.n_slots:
            return kept.edits, kept.rows
    n_covered, n_slots = n_keys if kept is None else kept.n_covered, n_keys + _ROOM
    slots = np.concatenate([real, np.ones((n_rows, _ROOM), bool)], axis=1)
    frames = [Frame(model.config, model.dtype, n_covered, row, n_slots, absolute=True) for row in slots]
    rows, _ = Rows.of(interventions, frames)
    edits = prepare(model.weights(), rows, n_rows, 1, n_slots, n_covered)
    if cache is not None:
        cache._oculi_edits = _Kept(interventions, n_slots, n_covered, edits, rows, real)
    return edits, rows
