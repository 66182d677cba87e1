"""`save` and `load`: captures and interventions as safetensors files, whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from ..arrays import listing
from ..intervention.protocol import are_interventions
from ..intervention.stored import packed, unpacked
from ..output import Output
from ..sites import SITES
from ..utils.files import read_tensors, write_aside, write_tensors
from .structures import AttentionCapture, FullCapture, LogitCapture, MLPCapture, ResidualCapture

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..adapter.structures import AnyCapture
    from ..intervention.protocol import Interventions

STRUCTURES = {cls.__name__: cls for cls in (AttentionCapture, ResidualCapture, MLPCapture, LogitCapture, FullCapture)}
_NOT_WRITTEN = {"unembedding"}
FORMAT = "oculi_jax capture 1"
INTERVENTIONS = "oculi_jax interventions 1"


def save(
    capture: AnyCapture | FullCapture | Output | Mapping[str, ArrayLike] | Interventions,
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a capture structure, an `Output`, a dictionary of arrays such as `Output.activations`, or interventions, as a
    safetensors file.

    The file is written aside and renamed: it is whole, or it does not exist. It holds arrays, names and numbers, and no code: of
    interventions, those of this library alone, and no `Edit` with a function.

    Args:
        capture: a capture (`AttentionCapture` and its like), an `Output`, or name → array; or an intervention, or a list of them.
        path: where to.
        metadata: texts to keep with it, such as the model's name. The axes of every array of a capture are kept anyway.

    Raises:
        TypeError: what is none of these. ValueError: metadata that is written anyway. OSError: it cannot be written.

    Examples:
        >>> save(capture.attention, "italy.safetensors", metadata={"model": "tiny-facts"})
        >>> save(HeadAblation(2, [4, 5]), "without.safetensors")
    """
    arrays, about = _described(capture)
    if reserved := set(metadata or {}) & {"format", "kind", "static", "axes", "sums"}:
        raise ValueError(f"metadata holds {sorted(reserved)}, which are written anyway; use other names.")
    tensors = {name: np.asarray(value, order="C") for name, value in arrays.items()}
    header = {**(metadata or {}), **about}
    header["sums"] = json.dumps({name: _sum(array) for name, array in tensors.items()})
    with write_aside(path) as aside:
        write_tensors(aside, tensors, header, name=Path(path))


def _described(given: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The arrays of what is saved, and what is to be said of them."""
    if are_interventions(given):
        arrays, static = packed(given)
        return arrays, {"format": INTERVENTIONS, "kind": "interventions", "static": json.dumps(static), "axes": "{}"}
    arrays, static = _flatten(given)
    kind = type(given).__name__ if type(given).__name__ in (*STRUCTURES, "Output") else "arrays"
    axes = {name: axes for name, value in arrays.items() if (axes := _axes(name, np.ndim(value)))}
    return arrays, {"format": FORMAT, "kind": kind, "static": json.dumps(static), "axes": json.dumps(axes)}


def load(path: str | os.PathLike[str]) -> Any:
    """Reopens what `save` wrote: the same structure, a dictionary of arrays, or interventions, their arrays as NumPy's.

    What does not fit together is refused, and nothing in a file is run.

    Raises:
        OSError: there is no such file. ValueError: it is no whole file of `save`.

    Examples:
        >>> save(run, "france.safetensors")
        >>> says(load("france.safetensors"))
        'Paris'
        >>> save([Ablation("mlp_out", 3), HeadAblation(2, [4, 5])], "without.safetensors")
        >>> load("without.safetensors")
        [Ablation(site='mlp_out', layer=3, index=None), HeadAblation(layer=2, head=[4, 5], replacement=0.0)]
    """
    path = Path(path).expanduser()
    tensors, header = read_tensors(path)
    if header.get("format") not in (FORMAT, INTERVENTIONS):
        raise ValueError(f"{path} is a safetensors file, but no capture: it lacks the metadata that save writes.")
    try:
        sums = json.loads(header.get("sums", "{}"))
        changed = [name for name, array in tensors.items() if sums.get(name, _sum(array)) != _sum(array)]
    except (ValueError, AttributeError, RecursionError):
        raise ValueError(f"{path}'s metadata was changed since it was written.") from None
    if changed:
        raise ValueError(f"{path} was changed since it was written: {', '.join(changed)} is not what was saved.")
    if header["format"] == INTERVENTIONS:
        return _interventions(path, header, tensors)
    arrays = {name: _array(value) for name, value in tensors.items()}
    if header.get("kind") == "arrays":
        return arrays
    if header.get("kind") == "Output":
        return _output(path, arrays)
    try:
        found = _build(STRUCTURES[header["kind"]], arrays, json.loads(header["static"]))
        for part in (
            (found.attention, found.residual, found.mlp, found.logits) if isinstance(found, FullCapture) else (found,)
        ):
            _check(part)
        return found
    except _Wrong as error:
        raise ValueError(f"{path} holds no capture that fits together: {error}") from None
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} does not describe a capture that this version knows: {error!r}.") from None


def _interventions(path: Path, header: Mapping[str, str], arrays: dict[str, np.ndarray]) -> Interventions:
    try:
        found = unpacked(json.loads(header["static"]), arrays)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} does not describe interventions that this version knows: {error}") from None
    if not are_interventions(found):
        raise ValueError(f"{path} does not describe interventions that this version knows: it holds {found!r}.")
    return found


def _sum(array: np.ndarray) -> int:
    """A checksum of an array's dtype, shape and bytes: it finds what was damaged, or mixed up, and no more than that."""
    described = zlib.crc32(f"{array.dtype}{array.shape}".encode())
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, described)


def _flatten(capture: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Name → array, and the static fields; parts of a full capture have a dotted name."""
    if isinstance(capture, Mapping):
        if wrong := [name for name in capture if not isinstance(name, str)]:
            raise TypeError(f"save takes names → arrays, and {wrong[0]!r} is not a name.")
        return dict(capture), {}
    if isinstance(capture, Output):
        others = {"logits": capture.logits, "applied": capture.applied, "mask": capture.mask}
        arrays = {f"activations.{name}": value for name, value in capture.activations.items()}
        return arrays | {name: value for name, value in others.items() if value is not None}, {}
    if type(capture) not in STRUCTURES.values():
        hint = ' Give an array a name: save({"logits": array}, path).' if hasattr(capture, "shape") else ""
        parts = [name for name in ("subspace", "edit", "constants", "steer") if hasattr(capture, name)]
        hint = f" It has what is kept: .{parts[0]}{'(scale)' * (parts[0] == 'steer')}." if parts else hint
        raise TypeError(
            "save takes a capture, an Output, a dictionary of arrays or interventions, and was given a "
            f"{type(capture).__name__}.{hint}"
        )
    arrays: dict[str, Any] = {}
    static: dict[str, Any] = {}
    for item in dataclasses.fields(capture):
        value = getattr(capture, item.name)
        if type(value) in STRUCTURES.values():
            inner, static[item.name] = _flatten(value)
            arrays |= {f"{item.name}.{name}": array for name, array in inner.items()}
        elif item.metadata.get("static"):
            static[item.name] = value
        elif value is not None and item.name not in _NOT_WRITTEN:
            arrays[item.name] = value
    return arrays, static


def _build(cls: Any, arrays: dict[str, Any], static: dict[str, Any]) -> Any:
    if cls is FullCapture:
        parts = {}
        for item in dataclasses.fields(cls):
            prefix = f"{item.name}."
            own = {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
            parts[item.name] = _build(_PARTS[item.name], own, static[item.name])
        return cls(**parts)
    frozen = {name: tuple(value) if isinstance(value, list) else value for name, value in static.items()}
    return cls(**arrays, **frozen)


_PARTS = {
    "attention": AttentionCapture, "residual": ResidualCapture, "mlp": MLPCapture, "logits": LogitCapture,
}  # fmt: skip
_FIELD_AXES = {
    "queries": "L H T D", "keys": "L K T D", "values": "L K T D", "patterns": "L H T S", "z": "L H T D",
    "pre_attn": "L T E", "post_attn": "L T E", "pre_mlp": "L T E", "post_mlp": "L T E", "embedding": "T E",
    "attn_out": "L T E", "mlp_out": "L T E", "final_norm": "T E",
    "final_scale": "T", "post_scale": "L T", "final_weight": "E", "gate": "L T F", "up": "L T F", "post_activation": "L T F",
    "output": "L T E", "logits": "L T V", "top_k_logits": "L T k", "top_k_indices": "L T k", "log_normalizer": "L T",
    "probabilities": "L T N", "probability_tokens": "N", "normalized": "L T E", "tokens": "T", "mask": "T",
}  # fmt: skip


class _Wrong(ValueError):
    """What does not fit together in a file."""


def _output(path: Path, arrays: dict[str, Any]) -> Output:
    own = {name: arrays.pop(name, None) for name in ("logits", "applied", "mask")}
    if own["applied"] is None or not all(name.startswith("activations.") for name in arrays):
        raise ValueError(f"{path} does not describe an Output that this version knows.")
    return Output(activations={name.removeprefix("activations."): value for name, value in arrays.items()}, **own)


def _check(capture: Any) -> None:
    """Every static field by its kind, and every array's dtype and axes against them and against one another."""
    fields = dataclasses.fields(capture)
    static = {item.name: getattr(capture, item.name) for item in fields if item.metadata.get("static")}
    if wrong := [f"{name} is {value!r}" for name, value in static.items() if not _is_static(name, value)]:
        raise _Wrong(f"{', '.join(wrong)}.")
    named = {"L": "captured_layers", "H": "n_heads", "K": "n_kv_heads", "D": "head_dim"}
    sizes = {
        k: len(v) if isinstance(v, tuple) else v for k, name in named.items() if (v := static.get(name)) is not None
    }
    if np.ndim(capture.tokens) not in (1, 2):
        raise _Wrong("it has no tokens [T] or [B, T].")
    batch, n_tokens = capture.tokens.shape[:-1], capture.tokens.shape[-1]
    # The positions that a lens was read at are fewer than the tokens of its prompt.
    rows = n_tokens if static.get("positions") is None else len(static["positions"])
    for item in fields:
        value = getattr(capture, item.name)
        if item.name in static or value is None:
            continue
        letters = _FIELD_AXES[item.name].split()
        sizes |= {"T": n_tokens if item.name in ("tokens", "mask") else rows, "S": n_tokens}
        shared = item.name in ("probability_tokens", "final_weight") and value.ndim == len(letters)
        lead = () if shared else batch
        own = zip(letters, value.shape[len(lead) :], strict=False)
        want = (*lead, *(sizes.setdefault(letter, size) for letter, size in own))
        if value.ndim != len(lead) + len(letters) or value.shape != want:
            raise _Wrong(
                f"{item.name} has shape {listing(value.shape)}, and [{', '.join(letters)}] is {listing(want)} here."
            )
        kind = "integer" if item.name in ("tokens", "top_k_indices", "probability_tokens") else "floating"
        of_kind = value.dtype == bool if item.name == "mask" else jnp.issubdtype(value.dtype, getattr(jnp, kind))
        if not of_kind:
            raise _Wrong(f"{item.name} has dtype {value.dtype}.")


def _is_static(name: str, value: object) -> bool:
    """Whether a static field of a capture is of its kind."""
    if name in ("qk_stage", "lens"):
        return value in {"qk_stage": ("post_rope", "pre_rope"), "lens": ("logit", "tuned", "jacobian")}[name]
    if name in ("logit_scale", "logit_cap"):
        none = name == "logit_cap" and value is None
        return none or (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < np.inf)
    if name == "windows":
        return isinstance(value, tuple) and all(x is None or (_is_integer(x) and x > 0) for x in value)
    if name not in ("captured_layers", "positions"):
        return _is_integer(value) and value > 0  # type: ignore[operator]
    if name == "positions" and value is None:
        return True
    if not isinstance(value, tuple) or not all(map(_is_integer, value)) or len(set(value)) < len(value):
        return False
    return name == "positions" or (bool(value) and min(value) >= 0)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _axes(name: str, ndim: int) -> str | None:
    """The letters of an array, by its name; those of a batch lead with B."""
    if name in SITES:
        letters = [*(("L",) if SITES[name].layered else ()), *SITES[name].axes]
    else:
        letters = _FIELD_AXES.get(name.rpartition(".")[2], "").split()
    letters = ["B"] * (ndim - len(letters) == 1) + letters
    return " ".join(letters) if len(letters) == ndim else None


def _array(value: np.ndarray) -> Any:
    """A JAX array, or the NumPy array itself where JAX would make 64 bits 32."""
    return value if value.dtype.itemsize == 8 else jnp.asarray(value)
