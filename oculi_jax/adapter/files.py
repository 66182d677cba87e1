"""`save` and `load`: captures as safetensors files, whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from ..sites import SITES
from ..utils.files import read_tensors, write_aside, write_tensors
from .structures import AttentionCapture, FullCapture, LogitCapture, MLPCapture, ResidualCapture

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..adapter.structures import AnyCapture

STRUCTURES = {cls.__name__: cls for cls in (AttentionCapture, ResidualCapture, MLPCapture, LogitCapture, FullCapture)}
_NOT_WRITTEN = {"unembedding"}
FORMAT = "oculi_jax capture 1"


def save(
    capture: AnyCapture | Mapping[str, ArrayLike],
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a capture structure, or a dictionary of arrays such as `Output.activations`, as a safetensors file.

    The file is written aside and renamed: it is whole, or it does not exist.

    Args:
        capture: a capture (`AttentionCapture` and its like), or name → array.
        path: where to.
        metadata: texts to keep with it, such as the model's name. The axes of every array are kept anyway.
    """
    arrays, static = _flatten(capture)
    kind = type(capture).__name__ if type(capture).__name__ in STRUCTURES else "arrays"
    header = {
        **(metadata or {}),
        "format": FORMAT,
        "kind": kind,
        "static": json.dumps(static),
        "axes": json.dumps({name: axes for name, value in arrays.items() if (axes := _axes(name, np.ndim(value)))}),
    }
    if reserved := set(metadata or {}) & {"format", "kind", "static", "axes"}:
        raise ValueError(f"metadata holds {sorted(reserved)}, which are written anyway; use other names.")
    with write_aside(path) as aside:
        tensors = {name: np.asarray(value, order="C") for name, value in arrays.items()}
        write_tensors(aside, tensors, header, name=Path(path))


def load(path: str | os.PathLike[str]) -> Any:
    """Reopens what `save` wrote: the same structure, or a dictionary of arrays.

    Raises:
        OSError: there is no such file. ValueError: it is no whole capture file.
    """
    path = Path(path).expanduser()
    tensors, header = read_tensors(path)
    arrays = {name: _array(value) for name, value in tensors.items()}
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file, but no capture: it lacks the metadata that save writes.")
    if header.get("kind") == "arrays":
        return arrays
    try:
        return _build(STRUCTURES[header["kind"]], arrays, json.loads(header["static"]))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} does not describe a capture that this version knows: {error!r}.") from None


def _flatten(capture: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Name → array, and the static fields; parts of a full capture have a dotted name."""
    if isinstance(capture, Mapping):
        if wrong := [name for name in capture if not isinstance(name, str)]:
            raise TypeError(f"save takes names → arrays, and {wrong[0]!r} is not a name.")
        return dict(capture), {}
    if type(capture) not in STRUCTURES.values():
        raise TypeError(f"save takes a capture or a dictionary of arrays, and was given a {type(capture).__name__}.")
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
    "final_scale": "T", "final_weight": "E", "gate": "L T F", "up": "L T F", "post_activation": "L T F",
    "output": "L T E", "logits": "L T V", "top_k_logits": "L T k", "top_k_indices": "L T k", "log_normalizer": "L T",
    "probabilities": "L T N", "probability_tokens": "N", "normalized": "L T E", "tokens": "T", "mask": "T",
}  # fmt: skip


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
