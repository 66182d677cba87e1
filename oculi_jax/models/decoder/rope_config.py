"""`RopeConfig`: what a config says of rotary position embedding, in either spelling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .fields import ANY, Reader, is_number

# Fields of a rotary type: (required, optional). `rope_theta` belongs to all of them.
ROPE_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (
        (),
        (
            "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
            "mscale", "mscale_all_dim", "truncate",
        ),
    ),
    "longrope": (
        ("short_factor", "long_factor"),
        ("factor", "original_max_position_embeddings", "attention_factor"),
    ),
}  # fmt: skip
ORIGINAL = "original_max_position_embeddings"
_INERT_ROPE = {"partial_rotary_factor": (1, None), "finetuned": ANY}


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864): the type and the numbers that its formula reads.

    Examples:
        >>> model.config.rope.type, model.config.rope.theta
        ('default', 10000.0)
    """

    type: str
    theta: float
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    partial_rotary_factor: float | None = None

    def turned(self, head_dim: int) -> int:
        """How many of a head's dimensions turn, from the first on: `partial_rotary_factor` of them, where it is given.

        Examples:
            >>> model.config.rope.turned(32)
            32
        """
        return head_dim if self.partial_rotary_factor is None else int(head_dim * self.partial_rotary_factor)


# The rotary embedding of layers that see all tokens, and that of layers with a window where a config says one.
Ropes = tuple[RopeConfig | None, RopeConfig | None]


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """The type and its numbers, without `rope_theta`, as `config.json` has them."""
    given = {name: getattr(rope, name) for name in rope.__dataclass_fields__ if name not in ("type", "theta")}
    numbers = {name: list(v) if isinstance(v, tuple) else v for name, v in given.items() if v is not None}
    return {"rope_type": rope.type, **numbers}


def one_rope(
    fields: Mapping[str, Any], head_dim: int | None, longest: int | None, ignored: set[str], problems: list[str]
) -> Ropes:
    """Of a family whose layers all turn alike. `longest` is what the model was made for."""
    return read_rope(fields, head_dim, longest, ignored, problems), None


def two_ropes(
    fields: Mapping[str, Any], head_dim: int | None, longest: int | None, ignored: set[str], problems: list[str]
) -> Ropes:
    """Of a family whose layers with a window may turn otherwise: transformers 5 nests `rope_parameters` by the types of layers."""
    groups = fields.get("rope_parameters")
    kinds = ("full_attention", "sliding_attention")
    if not isinstance(groups, dict) or not set(groups) & set(kinds):
        return one_rope(fields, head_dim, longest, ignored, problems)
    if other := sorted(set(groups) - set(kinds)):
        problems.append(f"rope_parameters names {', '.join(other)}, and layers are {' or '.join(kinds)}")
    found = [
        read_rope({**fields, "rope_parameters": groups.get(kind)}, head_dim, longest, ignored, problems)
        for kind in kinds
    ]
    return found[0], found[1]


def read_rope(
    fields: Mapping[str, Any], head_dim: int | None, longest: int | None, ignored: set[str], problems: list[str]
) -> RopeConfig | None:
    """Both spellings: transformers 5's `rope_parameters`, and `rope_theta` beside `rope_scaling`."""
    spelling = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    if fields.get("rope_parameters") and fields.get("rope_scaling"):
        problems.append("rope_parameters and rope_scaling are both given, and they may disagree")
    group = fields.get(spelling) or {}
    if not isinstance(group, dict):
        problems.append(f"{spelling} is {group!r}, and an object or null is expected")
        return None
    group = {name: value for name, value in group.items() if f"{spelling}.{name}" not in ignored}
    kind = group.pop("rope_type", None)
    kind = group.pop("type", None) if kind is None else (group.pop("type", None), kind)[1]
    kind = "default" if kind is None else kind
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        problems.append(f"the rotary type {kind!r} is not one of {', '.join(ROPE_FIELDS)}")
        return None
    theta = group.pop("rope_theta", None)
    theta = fields.get("rope_theta") if theta is None else theta
    required, optional = ROPE_FIELDS[kind]
    if ORIGINAL in fields:  # a few checkpoints keep it outside; transformers lets that one win
        if ORIGINAL in optional:
            group[ORIGINAL] = fields[ORIGINAL]
        else:
            problems.append(f"{ORIGINAL} is given, and the rotary type {kind!r} does not read it")
    Reader(group, problems).refuse_unknown((*required, *optional), _INERT_ROPE, ignore_as=f"{spelling}.{{}}")
    for name in required:
        if group.get(name) is None:
            problems.append(f"{spelling}.{name} is missing, and the rotary type {kind!r} needs it")
    given = [name for name in (*required, *optional) if group.get(name) is not None]
    n_angles = (head_dim or 0) // 2
    values = {name: _rope_value(name, group[name], f"{spelling}.{name}", n_angles, problems) for name in given}
    values = {name: value for name, value in values.items() if value is not None}
    if ORIGINAL in optional:
        values.setdefault(ORIGINAL, longest)
    if "factor" in optional and longest and values.get(ORIGINAL):
        values.setdefault("factor", longest / values[ORIGINAL])
    if values.get("low_freq_factor") and values.get("low_freq_factor") == values.get("high_freq_factor"):
        problems.append(
            f"{spelling}: low_freq_factor and high_freq_factor are equal, so the ramp between them is undefined"
        )
    if kind == "dynamic" and head_dim == 2:
        problems.append("the rotary type 'dynamic' is undefined for head_dim 2")
    if theta is not None and not (is_number(theta) and theta > 1):
        problems.append(f"rope_theta is {theta!r}, and a number above 1 is expected")
        return None
    return RopeConfig(type=kind, theta=10000.0 if theta is None else float(theta), **values)


def _rope_value(name: str, value: Any, where: str, n_angles: int, problems: list[str]) -> Any:
    """One field of a rotary type, checked; None where it cannot be."""
    if name in ("short_factor", "long_factor"):
        if isinstance(value, list) and len(value) == n_angles and all(is_number(v) and 1e-6 <= v <= 1e6 for v in value):
            return tuple(float(v) for v in value)
        problems.append(f"{where} must be a list of head_dim/2 = {n_angles} numbers from 1e-6 to 1e6")
    elif name == "truncate":
        if isinstance(value, bool):
            return value
        problems.append(f"{where} is {value!r}, and true or false is expected")
    elif name == ORIGINAL:
        if isinstance(value, int) and not isinstance(value, bool) and 1 < value < 2**31:
            return value
        problems.append(f"{where} is {value!r}, and an integer above 1 is expected")
    elif is_number(value) and 1e-6 <= value <= 1e6:
        return float(value)
    else:
        problems.append(f"{where} is {value!r}, and a number from 1e-6 to 1e6 is expected")
    return None
