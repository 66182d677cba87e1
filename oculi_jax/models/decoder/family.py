"""`Family`: what one family of models has that others have not, as data. The network is one; a family is a short file.

A family reads its own fields of a `config.json` into those of `DecoderConfig`, and writes them back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .rope_config import RopeConfig, Ropes, one_rope

if TYPE_CHECKING:
    from .config import DecoderConfig
    from .fields import Reader

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class LayerKind:
    """What the attention of a layer has: its rotary embedding (None: no positions at all), and how many tokens a token sees,
    itself among them (None: all).
    """

    rope: RopeConfig | None
    window: int | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """A row of the table of families.

    Attributes:
        model_type: as `config.json` says it.
        title: as people say it.
        architecture: the class of transformers.
        read: the family's own fields, from a `Reader` and from what every family has → fields of `DecoderConfig`.
        write: the family's own fields of a `config.json` from a config.
        used: the names of the fields that `read` reads.
        inert: fields that change nothing while they hold one of these values, beside those that are so in every family.
        defaults: what a missing field means, where it is not what it means for a Llama.
        prepare: older spellings of fields → those that are read.
        ropes: the rotary fields → the embedding of layers that see all tokens, and of those with a window where it is another.
        norms: our name of each norm of a layer → the name of its tensor.
        multiplied: modules of transformers whose values are multiplied outside of them before they are what a site is.
        fused: a tensor of the checkpoint → our names of those that it holds one after the other, such as `attn.q`.
    """

    model_type: str
    title: str
    architecture: str
    read: Callable[[Reader, Mapping[str, Any]], dict[str, Any]]
    write: Callable[[DecoderConfig], dict[str, Any]]
    used: frozenset[str] = frozenset()
    inert: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = dict
    ropes: Callable[..., Ropes] = one_rope
    norms: Mapping[str, str] = field(
        default_factory=lambda: {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    )
    multiplied: frozenset[str] = frozenset()
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def kinds_of(
    types: Sequence[str], window: int | None, full: RopeConfig | None, sliding: RopeConfig | None
) -> tuple[LayerKind, ...]:
    """The kinds of layers that `layer_types` names: the rotary embedding of each type, and of the second the window."""
    return tuple(LayerKind(sliding, window) if name == SLIDING else LayerKind(full) for name in types)


def read_types(read: Reader, own: Sequence[str], window: int | None) -> list[str]:
    """`layer_types`, one a layer; `own` where the config gives none. Those with a window need one."""
    given = read.fields.get("layer_types")
    types = own if given is None else given
    if not isinstance(types, list | tuple) or len(types) != len(own) or set(types) - {FULL, SLIDING}:
        read.problems.append(f"layer_types is {given!r}, and {len(own)} of {FULL!r} and {SLIDING!r} are expected")
        return list(own)
    if window is None and SLIDING in types:
        read.problems.append(
            f"layers are of the type {SLIDING!r}, and the config gives them no window: sliding_window must be a number, and "
            "use_sliding_window true where a family has that"
        )
    return list(types)


def types_of(config: DecoderConfig) -> list[str]:
    """`layer_types` of a config: which layers have a window."""
    return [FULL if kind.window is None else SLIDING for kind in config.layer_kinds]


def window_of(config: DecoderConfig) -> int | None:
    """The window of those layers that have one."""
    return next((kind.window for kind in config.layer_kinds if kind.window is not None), None)
