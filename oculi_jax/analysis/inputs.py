"""What analyses ask of captures, in sentences where it is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from jax import Array
from jax.core import Tracer

from ..arrays import integer
from ..capture import at_positions

if TYPE_CHECKING:
    from ..adapter.structures import AnyCapture, AttentionCapture

# Field → the option of a config that keeps it.
_KEPT_BY = {
    "queries": "CaptureConfig(capture_queries=True)",
    "keys": "CaptureConfig(capture_keys=True)",
    "values": "CaptureConfig(capture_values=True)",
    "patterns": "CaptureConfig(capture_patterns=True)",
    "pre_attn": "ResidualConfig(capture_pre_attn=True)",
    "post_attn": "ResidualConfig(capture_post_attn=True)",
    "pre_mlp": "ResidualConfig(capture_pre_mlp=True)",
    "post_mlp": "ResidualConfig(capture_post_mlp=True)",
    "attn_out": "ResidualConfig(capture_pre_attn=True, capture_post_attn=True)",
    "mlp_out": "ResidualConfig(capture_post_attn=True, capture_post_mlp=True)",
    "gate": "MLPConfig(capture_gate=True)",
    "up": "MLPConfig(capture_up=True)",
    "post_activation": "MLPConfig(capture_post_activation=True)",
    "output": "MLPConfig(capture_output=True)",
    "final_scale": "every layer (layers=None)",
    "post_scale": "an adapter of this model",
}


def check_capture(capture: AnyCapture, kind: str) -> None:
    """Raises TypeError where `capture` is no `kind` (the name of a capture structure), ValueError where it is a batch."""
    if type(capture).__name__ != kind:
        part = {"AttentionCapture": "attention", "ResidualCapture": "residual", "MLPCapture": "mlp",
                "LogitCapture": "logits"}[kind]  # fmt: skip
        hint = f" Give its .{part}." if type(capture).__name__ == "FullCapture" else ""
        raise TypeError(f"This analysis takes {_a(kind)}, and was given {_a(type(capture).__name__)}.{hint}")
    if capture.tokens is not None and capture.tokens.ndim != 1:
        raise ValueError(
            f"This capture is a batch: its tokens are [B, T] = {list(capture.tokens.shape)}. Analyses take one prompt: "
            "take one with capture[i], or map over all of them with capture.map(analysis)."
        )


def need(capture: AnyCapture, kind: str, *fields: str) -> Any:
    """The fields of one prompt's capture that an analysis reads (one array, or a tuple of them).

    Args:
        capture: a capture structure.
        kind: the name of the structure that is needed.
        fields: names of fields that must have been captured.
    """
    check_capture(capture, kind)
    if missing := [name for name in fields if getattr(capture, name) is None]:
        ways = " and ".join(_KEPT_BY.get(name, "an adapter's own capture") for name in missing)
        raise ValueError(f"{' and '.join(missing)} of this {kind} {'was' if len(missing) == 1 else 'were'} not captured: "
                         f"capture with {ways}.")  # fmt: skip
    found = tuple(getattr(capture, name) for name in fields)
    return found[0] if len(found) == 1 else found


def row_of(capture: AnyCapture, layer: int) -> int:
    """Where a true layer number is on a capture's leading axis."""
    layers = capture.captured_layers
    layer = integer(layer, "layer")
    if layer not in layers:
        raise ValueError(f"Layer {layer} was not captured; this capture has layers {', '.join(map(str, layers))}.")
    return layers.index(layer)


def check_head(capture: AttentionCapture, head: int) -> int:
    """A query head of the capture's model; ValueError for one that it does not have."""
    return integer(head, "head", 0, capture.n_heads - 1, note=f": there are {capture.n_heads} query heads")


def check_position(capture: AnyCapture, position: object) -> int:
    """A position as an int; ValueError where the host can see that the prompt has no such token."""
    position = integer(position, "position")
    n_tokens = capture.tokens.shape[0]
    if not isinstance(capture.mask, Tracer | None):
        n_tokens = int(np.asarray(capture.mask).sum())
    if not -n_tokens <= position < n_tokens:
        raise ValueError(
            f"position is {position}, but the prompt has {n_tokens} tokens: positions are 0 to {n_tokens - 1}, or −1 to "
            f"−{n_tokens} from the end."
        )
    return position


def at_position(capture: AnyCapture, value: Array, axis: int, position: int) -> Array:
    """One entry of a token axis, at `position` among the real tokens of the prompt, negative from the last.

    ValueError where the host can see that there is no such token; NaN where only the device knows.
    """
    return at_positions(value, axis, (check_position(capture, position),), capture.mask).take(0, axis=axis)


def check_same_prompt(one: AnyCapture, other: AnyCapture) -> None:
    """ValueError for captures of different prompts, where the host can see them; padding may differ."""
    seen = (one.tokens, one.mask, other.tokens, other.mask)
    if any(isinstance(value, Tracer) for value in seen):
        return
    ids = [np.asarray(c.tokens)[... if c.mask is None else np.asarray(c.mask)].tolist() for c in (one, other)]
    if ids[0] != ids[1]:
        names = [type(capture).__name__ for capture in (one, other)]
        raise ValueError(f"The {names[0]} and the {names[1]} are of different prompts; take both from one run.")


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
