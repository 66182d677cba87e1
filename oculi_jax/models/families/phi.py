"""Phi-3, Phi-3.5 and Phi-4-mini, dense (arXiv:2404.14219, arXiv:2503.01743): a Llama that keeps its projections in fewer tensors,
and of whose heads a part alone may turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..decoder.family import SLIDING, Family, kinds_of, window_of
from ..decoder.fields import is_number
from ..decoder.rope_config import ORIGINAL, Ropes, one_rope, write_rope

if TYPE_CHECKING:
    from ..decoder.config import DecoderConfig
    from ..decoder.fields import Reader

_PARTIAL = "partial_rotary_factor"
# Of Phi-4-mini's own code, which transformers' does not read.
_INERT = {
    "attention_bias": (False, None), "mlp_bias": (False, None), "lm_head_bias": (False, None), "full_attn_mod": (1, None),
    "interpolate_factor": (1, None),
}  # fmt: skip


def _ropes(
    fields: Mapping[str, Any], head_dim: int | None, longest: int | None, ignored: set[str], problems: list[str]
) -> Ropes:
    """`partial_rotary_factor` is in the group or beside it; the types "su" and "yarn" are old names of "longrope"."""
    spelling = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    group, fields = fields.get(spelling), dict(fields)
    factor = fields.get(_PARTIAL)
    if isinstance(group, dict):
        factor = group.get(_PARTIAL, factor)
        kind = group.get("rope_type", group.get("type"))
        kind = "longrope" if kind in ("su", "yarn") else kind
        group = {name: value for name, value in group.items() if name not in (_PARTIAL, "type", "rope_type")}
        group = {**group, **({} if kind is None else {"rope_type": kind})}
        fields[spelling] = group
        if kind not in (None, "default", "longrope"):
            problems.append(f"the rotary type {kind!r} is not one of default, longrope")
    if not isinstance(group, dict) or group.get("rope_type") in (None, "default"):
        fields.pop(ORIGINAL, None)  # every config of this family has it; plain turns do not read it
    if factor is not None and not (is_number(factor) and 0 < factor <= 1):
        problems.append(f"{_PARTIAL} is {factor!r}, and a number from 0 to 1 is expected")
        factor = None
    factor = None if factor == 1 else factor
    turned = head_dim if factor is None or head_dim is None else int(head_dim * factor)
    if turned is not None and (turned % 2 or not turned):
        problems.append(f"{_PARTIAL} {factor} of head_dim {head_dim} is {turned}, and an even number must turn")
    rope, _ = one_rope(fields, turned, longest, ignored, problems)
    return None if rope is None else dataclasses.replace(rope, partial_rotary_factor=factor), None


def _read(read: Reader, common: Mapping[str, Any]) -> dict[str, Any]:
    window, n_layers = read.optional("sliding_window"), common["num_hidden_layers"]
    return {"layer_kinds": kinds_of([SLIDING] * n_layers, window, common["rope"], common["rope"])}


def _write(config: DecoderConfig) -> dict[str, Any]:
    """transformers 4 takes three fields in `rope_scaling` and no more."""
    rope, own = config.rope, write_rope(config.rope)
    own.pop(_PARTIAL, None)
    longest = own.pop(ORIGINAL, None)
    written = {
        "sliding_window": window_of(config),
        _PARTIAL: 1.0 if rope.partial_rotary_factor is None else rope.partial_rotary_factor,
    }
    if rope.type == "default":
        return written
    if longest and own.get("factor") == config.max_position_embeddings / longest:
        del own["factor"]  # it follows
    own["type"] = own.pop("rope_type")
    return {**written, ORIGINAL: longest, "rope_scaling": own}


PHI3 = Family(
    model_type="phi3",
    title="Phi3",
    architecture="Phi3ForCausalLM",
    used=frozenset({"sliding_window", _PARTIAL, ORIGINAL}),
    inert=_INERT,
    defaults={ORIGINAL: 4096, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000},
    read=_read,
    write=_write,
    ropes=_ropes,
    fused={"self_attn.qkv_proj": ("attn.q", "attn.k", "attn.v"), "mlp.gate_up_proj": ("mlp.gate", "mlp.up")},
)
